"""One training step: masks, loss, gradients, optimizers, average.

Does not know when a run starts, stops or is saved.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from mezzotint import seeding
from mezzotint.config import TrainConfig
from mezzotint.data.loader import Loader, Prefetch
from mezzotint.distributed import rank_and_size
from mezzotint.errors import ConfigError, MezzotintError
from mezzotint.model import Denoiser, Tables, shift_right
from mezzotint.objective import (
    block_counts,
    block_lengths,
    mask_by_count,
    nelbo_per_window,
    scatter_to,
    token_nll,
    training_loss,
)
from mezzotint.system import keep_freed_memory
from mezzotint.training.optim import MovingAverage, Optimizers


class MaskedLoss(nn.Module):
    """Denoiser and cross-entropy in one module: (corrupted, ids, masked) -> NLL [B, T] in nats, zero where not masked.

    Only masked positions go through the output layer. With a block size above 1 all blocks are denoised at once, each given the
    clean ones before it; with `next_tokens` also gives the NLL of all next tokens, behind the others: [2B, T].
    """

    def __init__(self, network: Denoiser, compiled: bool) -> None:
        super().__init__()
        self.network = network
        if compiled:  # each shape is a graph: two lengths, left to right or not, shares that are no whole windows
            torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 32)
        self.hidden = torch.compile(network.hidden, dynamic=False) if compiled else network.hidden
        self.blocks = torch.compile(network.hidden_blocks, dynamic=False) if compiled else network.hidden_blocks
        # One graph for any number of masked positions: softcap and softmax in two passes over the logits, not ten.
        self.nll = torch.compile(self._nll, dynamic=True) if compiled else self._nll
        self.tables: dict[tuple[int, int], Tables] = {}

    def _nll(self, hidden: Tensor, targets: Tensor) -> Tensor:
        return token_nll(self.network.logits(hidden), targets)

    def forward(
        self, corrupted: Tensor, ids: Tensor, masked: Tensor, block_size: int, next_tokens: bool = False
    ) -> Tensor:
        shape = (ids.shape[1], block_size)
        if shape not in self.tables:
            self.tables[shape] = self.network.tables(*shape)
        if block_size <= 1:
            hidden = self.hidden(corrupted, block_size, self.tables[shape])
        else:
            hidden = self.blocks(corrupted, ids, block_size, self.tables[shape], next_tokens)
        if next_tokens:
            ids, masked = torch.cat((ids, ids)), torch.cat((masked, torch.ones_like(masked)))
        return scatter_to(masked, self.nll(hidden[masked], ids[masked]))


@dataclass(frozen=True)
class CorruptedBatch:
    """The global batch of a step, corrupted: the same in every process and after any resume.

    causal: bool [batch], the windows that are learnt left to right. counts: int64 [batch], masks of each of the
    others (T for the causal ones, all of whose tokens are predicted). corrupted, masked: [batch, T]. size: None, or
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
) -> CorruptedBatch:
    """The batch `ids` (int64 [batch, T]) corrupted for `step`, drawn from seed, step, mask rates and causal share alone.

    causal_share: of the windows (None: the config's).

    A masked window, or each of its blocks, gets a stratified number of masks. A causal one is shifted right behind a
    single MASK, so that the output at position i, which sees x_<i, predicts x_i: the same input and target as causal
    scoring.
    """
    rows, length = ids.shape
    generator = seeding.named_generator(f"masks {config.seed} {step}")
    share = config.causal_share if causal_share is None else causal_share
    dither = float(torch.rand((), generator=generator, dtype=torch.float64))
    # Blocks of one token are next tokens: nothing is gained by doubling windows for them.
    n = min(rows, int(rows * share + dither)) if share < 1 and config.block_size != 1 else rows
    causal = torch.zeros(rows, dtype=torch.bool)
    causal[[int((j + 0.5) * rows / n) for j in range(n)]] = True  # evenly spread, so that processes share them
    size = config.block_size if 1 < config.block_size < length else None
    counts = block_lengths(length, size or length).repeat(rows, 1)
    if n < rows:
        counts[~causal] = block_counts(rows - n, length, size or length, generator, rates)
    corrupted, masked = mask_by_count(ids, counts, mask_id, generator, size)
    if n:
        corrupted[causal] = shift_right(ids[causal], mask_id)
    return CorruptedBatch(causal, counts if size else counts[:, 0], corrupted, masked, size)


def _compiler_errors() -> tuple[type[Exception], ...]:
    """What torch.compile raises where it does not work; an error of the step itself is none of these."""
    from torch._dynamo import exc
    from torch._inductor.exc import CppCompileError, InvalidCxxCompiler

    return (exc.TorchDynamoException, CppCompileError, InvalidCxxCompiler)


@contextlib.contextmanager
def deterministic_sums(device: torch.device) -> Iterator[None]:
    """Let gradients that are added up at an index (embeddings, masked positions) add up in one order, on the CPU.

    Compiled code adds them from several threads as these come, so that two runs with one seed differ. On CUDA the same
    setting refuses some operations, so there it stays as it is.
    """
    if device.type != "cpu":
        yield
        return
    settings: Any = torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filling = settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    settings.fill_uninitialized_memory = False  # a debugging aid that writes every new tensor twice
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        settings.fill_uninitialized_memory = filling


class Trainer:
    """State of a run: network, optimizers, average, step; and how one step is made."""

    def __init__(self, network: Denoiser, config: TrainConfig, loader: Loader, device: torch.device) -> None:
        self.network = network
        self.config = config
        self.loader = loader
        self.batches = Prefetch(loader)
        self.device = device
        self.rank, self.world = rank_and_size()
        if config.batch % self.world:
            raise ConfigError(f"batch {config.batch} must be a multiple of the {self.world} processes")
        if config.short_share and network.config.sequence_length % 2:
            raise ConfigError("short_share halves windows: sequence_length must be even")
        self.optimizers = Optimizers(network, config)
        self.average = MovingAverage(network, config.ema_horizon)
        self.step = 0
        self.seconds = 0.0
        self.compiled = config.compile
        self.loss = self._wrap(config.compile)

    def _wrap(self, compiled: bool) -> nn.Module:
        module: nn.Module = MaskedLoss(self.network, compiled)
        if self.world > 1:
            ids = [self.device.index] if self.device.type == "cuda" else None
            module = nn.parallel.DistributedDataParallel(module, device_ids=ids)
        return module

    def warm_up(self) -> str | None:
        """Run one forward and backward pass and drop its gradients, so that compilation is not timed as training.

        Falls back to eager mode where torch.compile does not work (no C++ compiler, unsupported platform); returns
        the reason, else None.
        """
        keep_freed_memory()
        reason = None
        try:
            self._try_step()
        except _compiler_errors() as error:
            if not self.compiled:
                raise
            reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
            self.compiled = False
            self.loss = self._wrap(False)
            self._try_step()
        self.network.zero_grad(set_to_none=True)
        return reason

    def _try_step(self) -> None:
        # A run's stretches differ in what they compile: next tokens alone or masks too, halves or whole windows.
        starts = {self.config.causal_start, self.config.short_share} - {0.0}
        for progress in sorted({*starts, 0.0, 1.0} if starts else {1.0}):
            self.gradients(self.batches.batch(self.step), self.step, progress)

    def mask_rates(self, progress: float) -> tuple[float, float]:
        """The range that mask rates are drawn from at `progress` (0..1) of the run."""
        config = self.config
        return (config.narrow_low, config.narrow_high) if progress < config.narrow_share else (0.0, 1.0)

    def causal_share(self, progress: float) -> float:
        """The share of windows learnt left to right at `progress` (0..1) of the run."""
        return 1.0 if progress < self.config.causal_start else self.config.causal_share

    def gradients(self, windows: np.ndarray, step: int, progress: float = 1.0) -> tuple[float, float]:
        """Add the gradients of this process's rows; returns the global batch's (loss, NELBO) in nats per token.

        progress: 0..1 of the run, which decides on the length of windows and the range of mask rates. The NELBO is
        that of the masked windows, or the causal code length where all windows are causal; over a narrowed range of
        mask rates it is a mean cross-entropy and no bound. Windows in blocks of a model with `shifted_output` are
        learnt both ways, with the causal share as the weight of their next tokens; other windows in one way each.
        """
        config = self.config
        if progress < config.short_share:
            windows = windows.reshape(2 * len(windows), -1)
        mine = slice(self.rank * len(windows), (self.rank + 1) * len(windows))
        num_windows, length = self.world * len(windows), windows.shape[1]
        all_ids = torch.zeros(num_windows, length, dtype=torch.int64)
        all_ids[mine] = torch.from_numpy(windows)
        share = self.causal_share(progress)
        # The clean part of a window in blocks is a causal window as it stands: it teaches its share at no pass of its own.
        both = 1 < config.block_size < length and 0 < share < 1 and self.network.config.shifted_output
        rates, mask_id = self.mask_rates(progress), self.network.config.mask_id
        batch = corrupt_batch(config, step, all_ids, mask_id, rates, 0.0 if both else share)
        if not both:
            share = float(batch.causal.double().mean())
        masked_windows = int((~batch.causal).sum())
        masked_tokens = int(batch.counts[~batch.causal].sum())
        micro = config.micro_batch or len(windows)
        parts = []
        for causal in (False, True):
            rows = (batch.causal[mine] == causal).nonzero()[:, 0] + mine.start
            parts += [(causal, part) for part in rows.split(micro) if len(part)]
        figures = torch.zeros(2, dtype=torch.float64)
        for n, (causal, rows) in enumerate(parts):
            last = n == len(parts) - 1
            quiet = contextlib.nullcontext() if last or self.world == 1 else self.loss.no_sync()  # type: ignore[operator]
            inputs = (t[rows] for t in (batch.corrupted, all_ids, batch.masked, batch.counts))
            if self.device.type == "cuda":  # copies from pinned memory run beside the computation
                inputs = (t.pin_memory() for t in inputs)
            corrupted, ids, masked, k = (t.to(self.device, non_blocking=True) for t in inputs)
            with quiet, torch.autocast(self.device.type, torch.bfloat16, enabled=config.dtype == "bfloat16"):
                nll = self.loss(corrupted, ids, masked, 1 if causal else batch.size or 0, both).float()
                nll, next_tokens = nll[: len(ids)], nll[len(ids) :]
                if causal:
                    loss = nll.sum() / (num_windows * length)
                else:
                    totals = (masked_windows, masked_tokens, batch.size)
                    loss = (1 - share) * training_loss(nll, k, config.weighting, *totals)
                if both:
                    loss = loss + share * next_tokens.sum() / (num_windows * length)
                # DistributedDataParallel averages gradients over processes; shares are meant to be summed.
                (loss * self.world).backward()
            figures[0] += loss.detach().double().cpu()
            if not causal or share == 1:
                per_window = nelbo_per_window(nll.detach().double(), k, batch.size).sum().cpu()
                figures[1] += per_window / (length * (masked_windows or num_windows))
        if self.world > 1:
            shared = figures.to(self.device) if self.device.type == "cuda" else figures
            dist.all_reduce(shared)
            figures = shared.cpu()
        return float(figures[0]), float(figures[1])

    def run_step(self, progress: float) -> dict[str, float]:
        """One optimizer step at `progress` (0..1). Raises MezzotintError, naming the windows, if it is not finite.

        Returns loss, grad_norm, lr_scale, and `nelbo` or, over a narrowed range of mask rates, `narrow`, or, before masks
        come in, `causal`.
        """
        windows = self.batches.batch(self.step)
        loss, nelbo = self.gradients(windows, self.step, progress)
        limit = self.config.grad_clip or math.inf
        norm = float(nn.utils.clip_grad_norm_(self.network.parameters(), limit))
        if not (math.isfinite(loss) and math.isfinite(norm)):
            starts = ", ".join(str(start) for start in self.loader.starts(self.step))
            raise MezzotintError(
                f"step {self.step}: loss {loss} and gradient norm {norm} are not finite, on the windows at training "
                f"tokens {starts} (process {self.rank}); the last checkpoint is kept: lower the learning rate or use "
                "float32"
            )
        scale = self.optimizers.schedule(progress)
        self.optimizers.step()
        self.step += 1
        self.average.update(self.step)
        kind = "nelbo"
        if self.config.causal_share < 1:
            if self.causal_share(progress) == 1:
                kind = "causal"
            elif self.mask_rates(progress) != (0.0, 1.0):
                kind = "narrow"
        return {"loss": loss, kind: nelbo, "grad_norm": norm, "lr_scale": scale}
