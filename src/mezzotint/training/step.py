"""One training step: loss, gradients, optimizers, average; no device is waited for on the way.

What the windows are masked with is made ahead, by `corrupt`. Does not know when a run starts, stops or is saved.
"""

from __future__ import annotations

import contextlib
import math
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from mezzotint import seeding
from mezzotint.config import TrainConfig
from mezzotint.data.loader import Loader, Prefetch
from mezzotint.distributed import bfloat16_pays, rank_and_size
from mezzotint.errors import ConfigError, MezzotintError
from mezzotint.network.model import Denoiser, Tables
from mezzotint.objective import nelbo_per_window, token_nll, training_loss
from mezzotint.training.corrupt import Pass, Stage, StepWork, prepare_step, stage_at
from mezzotint.training.optim import MovingAverage, Optimizers
from mezzotint.training.output import MOST_WITHOUT_MAXIMUM, capped_nll
from mezzotint.training.sampled import Entries, entry_chances, sampled_nll
from mezzotint.training.system import keep_freed_memory

ROUNDINGS = 64
"""Steps that are looked at for one with the other number of causal windows, before a run begins."""


class MaskedLoss(nn.Module):
    """Denoiser and cross-entropy in one module: (corrupted, ids, predicted) -> NLL [B, T] in nats, zero elsewhere.

    Only predicted positions (`Pass.predicted`) go through the output layer. With a block size above 1 all blocks are denoised at once, each given the
    clean ones before it; with `next_tokens` also gives the NLL of all next tokens, behind the others: [2B, T].
    """

    def __init__(self, network: Denoiser, compiled: bool) -> None:
        super().__init__()
        self.network = network
        if compiled:  # each shape is a graph: two lengths, left to right or not, shares that are no whole windows
            torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 32)
            # Settings are constants; else they become inputs, tensors on the CPU among them.
            torch._dynamo.config.specialize_float = True
            # What dropout draws comes from PyTorch's own kernel, which on a CPU is the faster one.
            from torch._inductor import config as inductor

            inductor.fallback_random = network.embedding.weight.device.type == "cpu"
        # On a GPU layers are compiled one by one, once for all: the whole network at once takes minutes.
        by_layers = network.embedding.weight.device.type == "cuda"
        network.compile_blocks(compiled and by_layers)
        whole = compiled and not by_layers
        self.hidden = torch.compile(network.hidden, dynamic=False) if whole else network.hidden
        self.blocks = torch.compile(network.hidden_blocks, dynamic=False) if whole else network.hidden_blocks
        # One graph for any number of masked positions: softcap and softmax in two passes over the logits, not ten.
        plain = network.embedding.weight.device.type == "cpu" and network.config.softcap > MOST_WITHOUT_MAXIMUM
        self.nll = self._nll if plain or not compiled else torch.compile(self._nll, dynamic=True)
        self.sampled_nll = torch.compile(self._sampled_nll, dynamic=True) if compiled else self._sampled_nll
        self.tables: dict[tuple[int, int], Tables] = {}

    def _nll(self, hidden: Tensor, targets: Tensor) -> Tensor:
        config, table = self.network.config, self.network.embedding.weight
        if hidden.device.type == "cpu":
            return capped_nll(hidden, table[: config.vocab_size], targets, config.softcap)
        return token_nll(self.network.logits(hidden), targets)

    def _sampled_nll(self, hidden: Tensor, targets: Tensor, entries: Entries) -> Tensor:
        return sampled_nll(hidden, self.network.embedding.weight, targets, entries, self.network.config.softcap)

    def forward(
        self,
        corrupted: Tensor,
        ids: Tensor,
        predicted: Tensor | None,
        block_size: int,
        next_tokens: bool = False,
        entries: Entries | None = None,
    ) -> Tensor:
        shape = (ids.shape[1], block_size)
        if shape not in self.tables:
            self.tables[shape] = self.network.tables(*shape)
        if block_size <= 1:
            hidden = self.hidden(corrupted, block_size, self.tables[shape])
        else:
            hidden = self.blocks(corrupted, ids, block_size, self.tables[shape], next_tokens)
        return self.at(predicted, hidden, torch.cat((ids, ids)) if next_tokens else ids, entries)

    def at(self, predicted: Tensor | None, hidden: Tensor, ids: Tensor, entries: Entries | None = None) -> Tensor:
        """NLL [B, T] of the predicted tokens of `ids` given states [B, T, W]. No shape depends on what a tensor holds."""
        states, targets, tokens = hidden.flatten(0, 1), ids.flatten(), ids.numel()
        if predicted is None:
            return self.nll_of(states, targets, entries).view(ids.shape)
        at = predicted % tokens  # what fills up reads some token or other, and is dropped below
        nll = self.nll_of(states.index_select(0, at), targets.index_select(0, at), entries)
        placed = torch.zeros(tokens + 1, dtype=nll.dtype, device=nll.device).index_put(
            (predicted.clamp(max=tokens),), nll
        )
        return placed[:-1].view(ids.shape)

    def nll_of(self, states: Tensor, targets: Tensor, entries: Entries | None) -> Tensor:
        """NLL [n] of targets [n] given states [n, W], over the whole vocabulary or by a sampled softmax."""
        return self.nll(states, targets) if entries is None else self.sampled_nll(states, targets, entries)


class StepFigures(Mapping[str, float]):
    """A step's figures by name: loss, grad_norm, lr_scale and one of nelbo, narrow, sampled and causal, see `Trainer.run_step`.

    On CUDA they are on their way: whoever reads one waits for the device, nobody else.
    """

    def __init__(self, step: int, kind: str, values: Tensor, lr_scale: float) -> None:
        self.step, self.kind, self.lr_scale = step, kind, lr_scale
        self._values, self._event = values, None
        if values.device.type == "cuda":
            self._values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._values.copy_(values, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def arrived(self) -> bool:
        """Whether they can be read without waiting."""
        return self._event is None or self._event.query()

    def __getitem__(self, name: str) -> float:
        if name == "lr_scale":
            return self.lr_scale
        place = {"loss": 0, self.kind: 1, "grad_norm": 2}[name]
        if self._event is not None:
            self._event.synchronize()
        return float(self._values[place])

    def __iter__(self) -> Iterator[str]:
        return iter(("loss", self.kind, "grad_norm", "lr_scale"))

    def __len__(self) -> int:
        return 4


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
        self.batches = Prefetch(loader, self._prepare)
        self.device = device
        self.half = config.dtype == "bfloat16" and bfloat16_pays(device)
        self.rank, self.world = rank_and_size()
        if config.batch % self.world:
            raise ConfigError(f"batch {config.batch} must be a multiple of the {self.world} processes")
        if config.short_share and network.config.sequence_length % 2:
            raise ConfigError("short_share halves windows: sequence_length must be even")
        network.set_dropout(config.dropout)
        self.optimizers = Optimizers(network, config)
        self.average = MovingAverage(network, config.ema_horizon)
        self.step = 0
        self.seconds = 0.0
        self.compiled = config.compile
        self.loss = self._wrap(config.compile)
        self._unread: deque[StepFigures] = deque()
        self.chances: Tensor | None = None
        vocab_size = network.config.vocab_size
        if config.sampled_share and config.sampled_entries < vocab_size:
            self.chances = entry_chances(loader.token_counts(vocab_size), config.sampled_entries)

    def _wrap(self, compiled: bool) -> nn.Module:
        module: nn.Module = MaskedLoss(self.network, compiled)
        if self.world > 1:
            ids = [self.device.index] if self.device.type == "cuda" else None
            module = nn.parallel.DistributedDataParallel(module, device_ids=ids)
        return module

    def warm_up(self) -> str | None:
        """Run forward and backward passes and drop their gradients, so that compilation is not timed as training.

        Does nothing for a trainer that is not compiled. Falls back to eager mode where torch.compile does not work (no C++
        compiler, unsupported platform); returns the reason, else None.
        """
        keep_freed_memory()
        if not self.compiled:
            return None
        reason = None
        try:
            self._try_step()
        except _compiler_errors() as error:
            reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
            self.compiled = False
            self.loss = self._wrap(False)
        self.network.zero_grad(set_to_none=True)
        return reason

    def _try_step(self) -> None:
        # A run's stretches differ in what they compile: next tokens alone or masks too, halves or whole windows.
        starts = {self.config.causal_start, self.config.short_share, self.config.sampled_share} - {0.0}
        places = sorted({*starts, 0.0, 1.0} if starts else {1.0})
        for stage in dict.fromkeys(stage_at(self.config, progress) for progress in places):
            for work in self._rounded_both_ways(stage):
                self._gradients(work)

    def _rounded_both_ways(self, stage: Stage) -> Iterator[StepWork]:
        """The step of a stage; where the causal share is no whole number of windows, one with the other number as well."""
        first = self.batches.batch(self.step, stage)
        yield first
        if first.both or float(first.num_windows * stage.causal_share).is_integer():
            return
        for step in range(self.step + 1, self.step + ROUNDINGS):
            other = self.batches.batch(step, stage)
            if other.causal_share != first.causal_share:
                yield other
                return

    def _prepare(self, windows: np.ndarray, step: int, stage: Stage) -> StepWork:
        model = self.network.config
        return prepare_step(
            self.config, windows, step, stage, model.mask_id, shifted_output=model.shifted_output, rank=self.rank,
            world=self.world, rounded=self.device.type == "cuda", chances=self.chances,
        )  # fmt: skip

    def gradients(self, windows: np.ndarray, step: int, progress: float = 1.0) -> tuple[float, float]:
        """Add the gradients of this process's rows; returns the global batch's (loss, NELBO) in nats per token.

        progress: 0..1 of the run, which decides on the length of windows and the range of mask rates. The NELBO is
        that of the masked windows, or the causal code length where all windows are causal; over a narrowed range of
        mask rates it is a mean cross-entropy and no bound.
        """
        figures = self._gradients(self._prepare(windows, step, stage_at(self.config, progress)))
        return float(figures[0]), float(figures[1])

    def _gradients(self, work: StepWork) -> Tensor:
        """As `gradients`, of work that is prepared: [loss, NELBO] on the device."""
        exact = torch.float32 if self.device.type == "mps" else torch.float64  # which MPS does not have
        figures = torch.zeros(2, dtype=exact, device=self.device)
        entries = None if work.entries is None else work.entries.to(self.device)
        for n, host in enumerate(work.passes):
            last = n == len(work.passes) - 1
            quiet = contextlib.nullcontext() if last or self.world == 1 else self.loss.no_sync()  # type: ignore[operator]
            part = host.to(self.device)
            with quiet, torch.autocast(self.device.type, torch.bfloat16, enabled=self.half):
                block_size = 1 if part.causal else work.size or 0
                nll = self.loss(part.corrupted, part.ids, part.predicted, block_size, work.both, entries).float()
                nll = nll if part.weights is None else nll * part.weights
                loss = self._share_of_loss(work, part, nll)
                # DistributedDataParallel averages gradients over processes; shares are meant to be summed.
                (loss * self.world).backward()
            figures[0] += loss.detach()
            if not part.causal or work.causal_share == 1:
                nelbos = nelbo_per_window(nll.detach()[: len(part.ids)].to(exact), part.counts, work.size)
                figures[1] += nelbos.sum() / (work.length * (work.masked_windows or work.num_windows))
        if self.world > 1:
            dist.all_reduce(figures)
        return figures

    def _share_of_loss(self, work: StepWork, part: Pass, nll: Tensor) -> Tensor:
        """What a pass adds to the batch's loss. nll: as `MaskedLoss` gives it."""
        tokens = work.num_windows * work.length
        if part.causal:
            return nll.sum() / tokens
        masked, next_tokens = nll[: len(part.ids)], nll[len(part.ids) :]
        totals = (work.masked_windows, work.masked_tokens, work.size)
        loss = (1 - work.causal_share) * training_loss(masked, part.counts, self.config.weighting, *totals)
        return loss + work.causal_share * next_tokens.sum() / tokens if work.both else loss

    def run_step(self, progress: float) -> StepFigures:
        """One optimizer step at `progress` (0..1). Raises MezzotintError, naming the windows, if a step was not finite.

        Returns loss, grad_norm, lr_scale, and `nelbo` or, over a narrowed range of mask rates, `narrow`, or, before masks
        come in, `causal`; what would be a NELBO or causal is `sampled` where the softmax is. On CUDA nothing is waited for, so that a step that was not finite is noticed a few steps later;
        `settle` waits.
        """
        stage = stage_at(self.config, progress)
        if self.config.dropout:  # so that a resumed run drops what one left alone does
            key = f"dropout {self.config.seed} {self.step} {self.rank}"
            torch.manual_seed(seeding.generator(key).initial_seed())
        figures = self._gradients(self.batches.batch(self.step, stage))
        norm = nn.utils.clip_grad_norm_(self.network.parameters(), self.config.grad_clip or math.inf)
        kind = "nelbo"
        if self.config.causal_share < 1:
            if stage.causal_share == 1:
                kind = "causal"
            elif stage.rates != (0.0, 1.0):
                kind = "narrow"
        if kind != "narrow" and stage.sampled and self.chances is not None:
            kind = "sampled"
        scale = self.optimizers.schedule(progress)
        seen = StepFigures(self.step, kind, torch.cat((figures, norm.to(figures.dtype)[None])), scale)
        self._unread.append(seen)
        self.settle(wait=False)
        self.optimizers.step()
        self.step += 1
        self.average.update(self.step)
        return seen

    def settle(self, wait: bool = True) -> None:
        """See that the steps made so far were finite; without `wait`, those that the device is known to have made.

        Raises MezzotintError for the first that was not.
        """
        while self._unread and (wait or self._unread[0].arrived()):
            figures = self._unread.popleft()
            loss, norm = figures["loss"], figures["grad_norm"]
            if not (math.isfinite(loss) and math.isfinite(norm)):
                starts = ", ".join(str(start) for start in self.loader.starts(figures.step))
                raise MezzotintError(
                    f"step {figures.step}: loss {loss} and gradient norm {norm} are not finite, on the windows at "
                    f"training tokens {starts} (process {self.rank}); the last checkpoint is kept: lower the learning "
                    "rate or use float32"
                )
