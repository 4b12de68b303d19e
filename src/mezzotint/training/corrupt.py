"""What a step does to its windows, made on the host beside the step before it: which are masked where, and the passes.

Every mask is a function of (seed, step, row of the batch), so a process draws those of its own rows only, and any number
of processes draws the same. Knows nothing of networks, devices or optimizers.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mezzotint import seeding
from mezzotint.config import TrainConfig
from mezzotint.distributed import send
from mezzotint.network.model import shift_right
from mezzotint.objective import block_counts, block_lengths, lean_noise, lean_weights, mask_by_noise
from mezzotint.training.sampled import Entries, draw_entries


@dataclass(frozen=True)
class Stage:
    """How windows are learnt at a point of a run. It changes a few times in a run, so the next step's is known ahead.

    halved: windows are cut into two. rates: the range of mask rates, of 0..1. causal_share: of the windows learnt left to
    right, or of the loss where blocks teach both. sampled: the softmax is a sampled one.
    """

    halved: bool
    rates: tuple[float, float]
    causal_share: float
    sampled: bool = False


def stage_at(config: TrainConfig, progress: float) -> Stage:
    """The stage at `progress` (0..1) of a run."""
    return Stage(
        progress < config.short_share,
        (config.narrow_low, config.narrow_high) if progress < config.narrow_share else (0.0, 1.0),
        1.0 if progress < config.causal_start else config.causal_share,
        progress < config.sampled_share,
    )


@dataclass(frozen=True)
class CorruptedBatch:
    """Rows of the global batch of a step, corrupted; what is said of the whole batch is the same in every process.

    causal: bool [batch], the windows that are learnt left to right. counts: int64 [batch], masks of each of the
    others (T for the causal ones, all of whose tokens are predicted). corrupted, masked: [rows, T]. size: None, or
    tokens of the blocks that windows are learnt in; counts are then those of each block, [batch, blocks].
    """

    causal: Tensor
    counts: Tensor
    corrupted: Tensor
    masked: Tensor
    size: int | None


def corrupt_batch(
    config: TrainConfig,
    step: int,
    ids: Tensor,
    mask_id: int,
    rates: tuple[float, float] = (0.0, 1.0),
    causal_share: float | None = None,
    first_row: int = 0,
    num_windows: int | None = None,
) -> CorruptedBatch:
    """Windows corrupted for `step`, drawn from seed, step, row, mask rates and causal share alone.

    ids: int64 [rows, T], the rows from `first_row` on of a batch of `num_windows` (default: the whole batch).
    causal_share: of the windows (None: the config's).

    A masked window, or each of its blocks, gets a stratified number of masks. A causal one is shifted right behind a
    single MASK, so that the output at position i, which sees x_<i, predicts x_i: the same input and target as causal
    scoring.
    """
    total, length = num_windows or len(ids), ids.shape[1]
    generator = seeding.generator("masks", config.seed, step)
    share = config.causal_share if causal_share is None else causal_share
    dither = float(torch.rand((), generator=generator, dtype=torch.float64))
    # Blocks of one token are next tokens: nothing is gained by doubling windows for them.
    n = min(total, int(total * share + dither)) if share < 1 and config.block_size != 1 else total
    causal = torch.zeros(total, dtype=torch.bool)
    causal[[int((j + 0.5) * total / n) for j in range(n)]] = True  # evenly spread, so that processes share them
    size = config.block_size if 1 < config.block_size < length else None
    counts = block_lengths(length, size or length).repeat(total, 1)
    if n < total:  # strata are those of the whole batch: a number for each window or block
        counts[~causal] = block_counts(total - n, length, size or length, generator, rates)
    own = slice(first_row, first_row + len(ids))
    next_tokens = causal[own]
    rows = (~next_tokens).nonzero()[:, 0]
    corrupted, masked = ids.clone(), torch.ones(ids.shape, dtype=torch.bool)
    if len(rows):
        noise = torch.from_numpy(seeding.row_noise(config.seed, step, (first_row + rows).tolist(), length))
        noise = lean_noise(noise, config.order_lean) if config.order_lean else noise
        corrupted[rows], masked[rows] = mask_by_noise(ids[rows], noise, counts[own][rows], mask_id, size)
    corrupted[next_tokens] = shift_right(ids[next_tokens], mask_id)
    return CorruptedBatch(causal, counts if size else counts[:, 0], corrupted, masked, size)


@dataclass(frozen=True)
class Pass:
    """Windows that go through the network together, all learnt in one way.

    causal: left to right. corrupted, ids: int64 [b, T]. counts: as in `CorruptedBatch`, of these windows. predicted: None
    where all tokens are, else int64 [n], places in the [b * T] tokens one after another; b * T stands for no token and
    fills up to a round number. With next tokens beside blocks the places are those of [2 * b * T]. weights: of each token's
    NLL, float32 [b, T], where orders lean (`lean_weights`).
    """

    causal: bool
    corrupted: Tensor
    ids: Tensor
    counts: Tensor
    predicted: Tensor | None
    weights: Tensor | None = None

    def to(self, device: torch.device) -> Pass:
        """On a device, see `send`."""
        predicted = None if self.predicted is None else send(self.predicted, device)
        weights = None if self.weights is None else send(self.weights, device)
        corrupted, ids, counts = (send(x, device) for x in (self.corrupted, self.ids, self.counts))
        return Pass(self.causal, corrupted, ids, counts, predicted, weights)


@dataclass(frozen=True)
class StepWork:
    """A step of one process, ready to run.

    num_windows, length: of the global batch. masked_windows, masked_tokens: in the global batch. causal_share: of the
    windows, or with `both` of the loss. both: blocks and next tokens are learnt from the same windows. entries: what a
    sampled softmax is over, None for the whole vocabulary.
    """

    step: int
    stage: Stage
    passes: tuple[Pass, ...]
    num_windows: int
    length: int
    masked_windows: int
    masked_tokens: int
    causal_share: float
    size: int | None
    both: bool
    entries: Entries | None = None


def prepare_step(
    config: TrainConfig,
    windows: np.ndarray,
    step: int,
    stage: Stage,
    mask_id: int,
    *,
    shifted_output: bool = False,
    rank: int = 0,
    world: int = 1,
    rounded: bool = False,
    chances: Tensor | None = None,
) -> StepWork:
    """Masks and passes of a process's windows, int64 [rows, T]: a function of the arguments alone.

    Windows in blocks of a model with `shifted_output` are learnt both ways, with the causal share as the weight of their
    next tokens; other windows in one way each. rounded: fill `predicted` up to sixteenths of a pass's tokens, so that its
    shapes are few. chances: of the entries of a sampled softmax, which there is none of without them.
    """
    if stage.halved:
        windows = windows.reshape(2 * len(windows), -1)
    ids = torch.from_numpy(np.ascontiguousarray(windows))
    rows, length = ids.shape
    share = stage.causal_share
    # The clean part of a window in blocks is a causal window as it stands: it teaches its share at no pass of its own.
    both = 1 < config.block_size < length and 0 < share < 1 and shifted_output
    first, total = rank * rows, world * rows
    batch = corrupt_batch(config, step, ids, mask_id, stage.rates, 0.0 if both else share, first, total)
    own = slice(first, first + rows)
    counts, causal = batch.counts[own], batch.causal[own]
    passes = []
    for left_to_right in (False, True):
        chosen = (causal == left_to_right).nonzero()[:, 0]
        for part in chosen.split(config.micro_batch or rows):
            if not len(part):
                continue
            predicted = weights = None
            if not left_to_right:
                predicted = _places(batch.masked[part], both, rounded)
                weights = lean_weights(batch.masked[part], config.order_lean) if config.order_lean else None
            passes.append(Pass(left_to_right, batch.corrupted[part], ids[part], counts[part], predicted, weights))
    entries = None
    if stage.sampled and chances is not None:
        entries = draw_entries(chances, config.seed, step)
    hidden = ~batch.causal
    return StepWork(
        step=step, stage=stage, passes=tuple(passes), num_windows=total, length=length,
        masked_windows=int(hidden.sum()), masked_tokens=int(batch.counts[hidden].sum()),
        causal_share=share if both else float(batch.causal.double().mean()), size=batch.size, both=both,
        entries=entries,
    )  # fmt: skip


def _places(masked: Tensor, both: bool, rounded: bool) -> Tensor:
    """`Pass.predicted` of these masks, bool [b, T]; with `both` every next token behind them."""
    tokens = masked.numel()
    places = masked.flatten().nonzero()[:, 0]
    if both:
        places = torch.cat((places, tokens + torch.arange(tokens)))
    least = max(1, tokens // 16) if rounded else 1
    missing = -len(places) % least
    return torch.nn.functional.pad(places, (0, missing), value=tokens * (1 + both)) if missing else places
