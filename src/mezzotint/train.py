"""The training loop, and the only writer of run folders and checkpoints.

Knows the order of a step: windows, masks, loss, optimizer, average. Does not know how models are scored or packed.

A run folder holds config.json, tokenizer.model, metrics.jsonl (a row per logged step), train.log and
checkpoints/step_XXXXXXXX/ with weights.safetensors, average.safetensors (the EMA, which is what is scored),
optimizer.safetensors, state.json and, written last, manifest.json with the SHA-256 of each. No pickle anywhere.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import gc
import hashlib
import json
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mezzotint.config import ModelConfig, TrainConfig, from_dict, to_dict
from mezzotint.data import Dataset, Loader, Prefetch, Tokenizer
from mezzotint.errors import CheckpointError, ConfigError, DataError, MezzotintError
from mezzotint.files import atomic_folder, atomic_write
from mezzotint.model import Denoiser, Model, Tables, block_size, count_parameters
from mezzotint.objective import (
    block_counts,
    block_lengths,
    in_place,
    mask_by_count,
    nelbo_per_window,
    token_nll,
    training_loss,
)
from mezzotint.optim import MovingAverage, Optimizers

Progress = Callable[[dict[str, Any]], None]
"""Called with every metrics row, which also carries `progress` (0..1) and `seconds_left`."""

WEIGHTS, AVERAGE, OPTIMIZER, STATE, MANIFEST = (
    "weights.safetensors",
    "average.safetensors",
    "optimizer.safetensors",
    "state.json",
    "manifest.json",
)


class Interrupted(MezzotintError):
    """The run was asked to stop (SIGINT, SIGTERM); its checkpoint is written."""


# --- devices and processes ------------------------------------------------------------------------------------------


def choose_device(name: str, local_rank: int = 0) -> torch.device:
    """The device called `name`; `auto` takes CUDA, then MPS, then the CPU. Raises ConfigError if it is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"unknown device {name!r}: use auto, cpu, cuda or mps") from error
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ConfigError("this PyTorch sees no CUDA device; use --device cpu")
        device = torch.device("cuda", local_rank if device.index is None else device.index)
        torch.cuda.set_device(device)
    elif device.type == "mps" and not torch.backends.mps.is_available():
        raise ConfigError("this PyTorch sees no MPS device; use --device cpu")
    elif device.type not in ("cpu", "mps"):
        raise ConfigError(f"device {name!r} is not supported: use auto, cpu, cuda or mps")
    return device


@contextlib.contextmanager
def process_group(device_name: str) -> Iterator[tuple[int, int, int]]:
    """Join torchrun's process group if there is one; yields (rank, world size, local rank)."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1 or dist.is_initialized():
        initialized = dist.is_initialized()
        yield (dist.get_rank(), dist.get_world_size(), 0) if initialized else (0, 1, 0)
        return
    cuda = device_name == "cuda" or (device_name == "auto" and torch.cuda.is_available())
    store, rank, _ = next(dist.rendezvous("env://"))
    if os.environ.get("LOCAL_WORLD_SIZE") == str(world):
        # torchrun keeps its store over restarts. Gloo would find the addresses of processes that are gone. Machines count
        # their restarts by themselves, so this is for one only (docs/scaling.md says what to do with many).
        store = dist.PrefixStore(f"restart {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    dist.init_process_group("nccl" if cuda else "gloo", store=store, rank=rank, world_size=world)
    try:
        yield rank, world, int(os.environ.get("LOCAL_RANK", "0"))
    finally:
        # DistributedDataParallel holds the group in reference cycles. While it lives so do Gloo's threads, which may
        # still own tensors, and one that frees a tensor during the interpreter's exit aborts the process.
        gc.collect()
        dist.destroy_process_group()
        gc.collect()


def process() -> tuple[int, int]:
    """(rank, processes) of the torch.distributed group, (0, 1) without one."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def commit_id() -> str | None:
    """The commit of the source tree this package runs from, with `+` if it has changes; None outside a checkout."""
    folder = Path(__file__).resolve().parent
    try:
        run = lambda *words: subprocess.run(  # noqa: E731
            ["git", *words], cwd=folder, capture_output=True, text=True, timeout=10, check=True
        ).stdout.strip()
        if Path(run("rev-parse", "--show-toplevel")) not in folder.parents:
            return None
        return run("rev-parse", "HEAD") + ("+" if run("status", "--porcelain", "--", ".") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def peak_memory_bytes() -> int:
    """Largest resident memory of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def keep_freed_memory() -> None:
    """Let this process keep the memory it frees. glibc gives large blocks back to the system after every use, which
    then clears their pages for the next one: a twelfth of a training step. Does nothing where malloc is another."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        malloc_option = ctypes.CDLL(None).mallopt
        malloc_option(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: how much may lie free at the heap's end
        malloc_option(-3, 2**25)  # M_MMAP_THRESHOLD: from which size a block is mapped apart; the largest allowed


# --- one step -------------------------------------------------------------------------------------------------------


class MaskedLoss(nn.Module):
    """Denoiser and cross-entropy in one module: (corrupted, ids, masked) -> NLL [B, T] in nats, zero where not masked.

    Only masked positions go through the output layer. Under `block(k)` all blocks are denoised at once, each given the
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
        self.tables: dict[tuple[int, str], Tables] = {}

    def _nll(self, hidden: Tensor, targets: Tensor) -> Tensor:
        return token_nll(self.network.logits(hidden), targets)

    def forward(
        self, corrupted: Tensor, ids: Tensor, masked: Tensor, visibility: str, next_tokens: bool = False
    ) -> Tensor:
        shape = (ids.shape[1], visibility)
        if shape not in self.tables:
            self.tables[shape] = self.network.tables(*shape)
        if visibility in ("full", "causal"):
            hidden = self.hidden(corrupted, visibility, self.tables[shape])
        else:
            size = block_size(visibility, ids.shape[1])
            hidden = self.blocks(corrupted, ids, size, self.tables[shape], next_tokens)
        if next_tokens:
            ids, masked = torch.cat((ids, ids)), torch.cat((masked, torch.ones_like(masked)))
        return in_place(self.nll(hidden[masked], ids[masked]), masked)


@dataclass(frozen=True)
class Draw:
    """What a step does to each window of the global batch, the same in every process and after any resume.

    causal: bool [batch], the windows that are learnt left to right. counts: int64 [batch], masks of each of the
    others (T for the causal ones, all of whose tokens are predicted). corrupted, masked: [batch, T]. size: None, or
    tokens of the blocks that windows are learnt in; counts are then those of each block, [batch, blocks].
    """

    causal: Tensor
    counts: Tensor
    corrupted: Tensor
    masked: Tensor
    size: int | None


def draw_step(
    config: TrainConfig,
    step: int,
    ids: Tensor,
    mask_id: int,
    rates: tuple[float, float] = (0.0, 1.0),
    causal_share: float | None = None,
) -> Draw:
    """The draw of `step`: a function of seed, step, range of mask rates and causal share alone. ids: int64 [batch, T].

    causal_share: of the windows (None: the config's).

    A masked window, or each of its blocks, gets a stratified number of masks. A causal one is shifted right behind a
    single MASK, so that the output at position i, which sees x_<i, predicts x_i: the same input and target as causal
    scoring.
    """
    rows, length = ids.shape
    digest = hashlib.sha256(f"masks {config.seed} {step}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    share = config.causal_share if causal_share is None else causal_share
    wanted = rows * share
    dither = float(torch.rand((), generator=generator, dtype=torch.float64))
    # Blocks of one token are next tokens: nothing is gained by doubling windows for them.
    n = min(rows, int(wanted + dither)) if share < 1 and config.block_size != 1 else rows
    causal = torch.zeros(rows, dtype=torch.bool)
    causal[[int((j + 0.5) * rows / n) for j in range(n)]] = True  # evenly spread, so that processes share them
    size = config.block_size if 1 < config.block_size < length else None
    counts = block_lengths(length, size or length).repeat(rows, 1)
    if n < rows:
        counts[~causal] = block_counts(rows - n, length, size or length, generator, rates)
    corrupted, masked = mask_by_count(ids, counts, mask_id, generator, size)
    if n:
        corrupted[causal] = nn.functional.pad(ids[causal, :-1], (1, 0), value=mask_id)
    return Draw(causal, counts if size else counts[:, 0], corrupted, masked, size)


class Trainer:
    """State of a run: network, optimizers, average, step; and how one step is made."""

    def __init__(self, network: Denoiser, config: TrainConfig, loader: Loader, device: torch.device) -> None:
        self.network = network
        self.config = config
        self.loader = loader
        self.batches = Prefetch(loader)
        self.device = device
        self.rank, self.world = process()
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
        except Exception as error:
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
        batch, length = self.world * len(windows), windows.shape[1]
        all_ids = torch.zeros(batch, length, dtype=torch.int64)
        all_ids[mine] = torch.from_numpy(windows)
        share = self.causal_share(progress)
        # The clean part of a window in blocks is a causal window as it stands: it teaches its share at no pass of its own.
        both = 1 < config.block_size < length and 0 < share < 1 and self.network.config.shifted_output
        rates, mask_id = self.mask_rates(progress), self.network.config.mask_id
        draw = draw_step(config, step, all_ids, mask_id, rates, 0.0 if both else share)
        visibility = f"block({draw.size})" if draw.size else "full"
        if not both:
            share = float(draw.causal.double().mean())
        masked_windows = int((~draw.causal).sum())
        masked_tokens = int(draw.counts[~draw.causal].sum())
        micro = config.micro_batch or len(windows)
        parts = []
        for causal in (False, True):
            rows = (draw.causal[mine] == causal).nonzero()[:, 0] + mine.start
            parts += [(causal, part) for part in rows.split(micro) if len(part)]
        figures = torch.zeros(2, dtype=torch.float64)
        for n, (causal, rows) in enumerate(parts):
            last = n == len(parts) - 1
            quiet = contextlib.nullcontext() if last or self.world == 1 else self.loss.no_sync()  # type: ignore[operator]
            inputs = (t[rows] for t in (draw.corrupted, all_ids, draw.masked, draw.counts))
            if self.device.type == "cuda":  # copies from pinned memory run beside the computation
                inputs = (t.pin_memory() for t in inputs)
            corrupted, ids, masked, k = (t.to(self.device, non_blocking=True) for t in inputs)
            with quiet, torch.autocast(self.device.type, torch.bfloat16, enabled=config.dtype == "bfloat16"):
                nll = self.loss(corrupted, ids, masked, "causal" if causal else visibility, both).float()
                nll, next_tokens = nll[: len(ids)], nll[len(ids) :]
                if causal:
                    loss = nll.sum() / (batch * length)
                else:
                    totals = (masked_windows, masked_tokens, draw.size)
                    loss = (1 - share) * training_loss(nll, k, config.weighting, *totals)
                if both:
                    loss = loss + share * next_tokens.sum() / (batch * length)
                # DistributedDataParallel averages gradients over processes; shares are meant to be summed.
                (loss * self.world).backward()
            figures[0] += loss.detach().double().cpu()
            if not causal or share == 1:
                per_window = nelbo_per_window(nll.detach().double(), k, draw.size).sum().cpu()
                figures[1] += per_window / (length * (masked_windows or batch))
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


# --- checkpoints ----------------------------------------------------------------------------------------------------


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def save_checkpoint(run: Path, trainer: Trainer, keep: int) -> Path:
    """Write the checkpoint of the trainer's step whole or not at all, then drop all but the newest `keep`."""
    folder = run / "checkpoints" / f"step_{trainer.step:08d}"
    # A whole one of this step is never replaced: a crash in between would lose both.
    with contextlib.suppress(CheckpointError):
        check_checkpoint(folder)
        return folder
    try:
        with atomic_folder(folder) as temporary:
            tensors = {name: p.detach().cpu().contiguous() for name, p in trainer.network.named_parameters()}
            save_file(tensors, temporary / WEIGHTS)
            save_file({name: t.cpu().contiguous() for name, t in trainer.average.average.items()}, temporary / AVERAGE)
            state = trainer.optimizers.state_tensors()
            save_file({name: t.cpu().contiguous() for name, t in state.items()}, temporary / OPTIMIZER)
            described = {"step": trainer.step, "seconds": trainer.seconds, "loader": trainer.loader.state_dict()}
            (temporary / STATE).write_text(json.dumps(described))
            files = {name: _sha256(temporary / name) for name in (WEIGHTS, AVERAGE, OPTIMIZER, STATE)}
            (temporary / MANIFEST).write_text(json.dumps({"format": 1, "files": files}))
    except (OSError, SafetensorError) as error:
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "os error 28" in str(error)
        reason = "no space left on the disk" if full else str(error).splitlines()[0]
        raise CheckpointError(f"cannot write checkpoint {folder}: {reason}; earlier checkpoints are kept") from error
    for old in _checkpoint_folders(run)[keep:]:
        shutil.rmtree(old, ignore_errors=True)
    return folder


def _checkpoint_folders(run: Path) -> list[Path]:
    """Checkpoint folders, newest first, valid or not."""
    found = (run / "checkpoints").glob("step_*")
    return sorted((p for p in found if p.name[5:].isdigit()), key=lambda p: int(p.name[5:]), reverse=True)


def check_checkpoint(folder: Path) -> dict[str, Any]:
    """The checkpoint's state if every file has its SHA-256. Raises CheckpointError."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        for name in (WEIGHTS, AVERAGE, OPTIMIZER, STATE):
            if _sha256(folder / name) != manifest["files"][name]:
                raise CheckpointError(f"{folder / name} does not match its SHA-256")
        return json.loads((folder / STATE).read_text())
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder} is not a whole checkpoint ({type(error).__name__})") from error


def newest_checkpoint(run: Path, warn: Callable[[str], None] = lambda line: None) -> tuple[Path, dict[str, Any]]:
    """The newest valid checkpoint and its state; damaged ones are skipped with a warning. Raises CheckpointError."""
    for folder in _checkpoint_folders(run):
        try:
            return folder, check_checkpoint(folder)
        except CheckpointError as error:
            warn(f"skipping {error}")
    raise CheckpointError(f"{run} has no valid checkpoint; train it first with `mezzotint train`")


def load_checkpoint(folder: Path, state: dict[str, Any], trainer: Trainer) -> None:
    """Put a checkpoint back into the trainer. Raises CheckpointError if it does not fit the model."""
    try:
        weights = load_file(folder / WEIGHTS)
        trainer.network.load_state_dict(weights)
        for name, value in load_file(folder / AVERAGE).items():
            trainer.average.average[name].copy_(value)
        trainer.optimizers.load_state_tensors(load_file(folder / OPTIMIZER))
        trainer.loader.load_state_dict(state["loader"])
        trainer.step, trainer.seconds = int(state["step"]), float(state["seconds"])
    except (KeyError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"{folder} does not fit this model: {str(error).splitlines()[0]}") from error


def read_run(run: Path) -> dict[str, Any]:
    """A run's config.json, with `model` and `train` as dataclasses. Raises CheckpointError."""
    path = Path(run) / "config.json"
    try:
        described = json.loads(path.read_text())
        described["model"] = from_dict(ModelConfig, described["model"])
        described["train"] = from_dict(TrainConfig, described["train"])
    except FileNotFoundError as error:
        raise CheckpointError(f"{run} is not a run folder: it has no config.json") from error
    except (OSError, ValueError, KeyError, TypeError, ConfigError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    return described


def load_run(run: Path) -> Model:
    """The model of a run folder: the averaged weights of its newest valid checkpoint, in eval mode on the CPU.

    Raises CheckpointError.
    """
    run = Path(run)
    described = read_run(run)
    folder, state = newest_checkpoint(run, lambda line: print(line, file=sys.stderr))
    try:
        tokenizer = Tokenizer.load(run / "tokenizer.model")
    except (OSError, DataError) as error:
        raise CheckpointError(f"{run / 'tokenizer.model'} cannot be read: {error}") from error
    network = Denoiser(described["model"])
    try:
        network.load_state_dict(load_file(folder / AVERAGE))
    except RuntimeError as error:
        raise CheckpointError(f"{folder} does not fit the run's config.json") from error
    info = {"commit": described.get("commit"), "train": to_dict(described["train"]), "steps": state["step"]}
    return Model(described["model"], tokenizer, network.eval(), info)


# --- the run --------------------------------------------------------------------------------------------------------


class _Log:
    """metrics.jsonl and train.log of a run; silent on all processes but the first."""

    def __init__(self, run: Path, first: bool, step: int) -> None:
        self.first = first
        if not first:
            return
        metrics = run / "metrics.jsonl"
        kept = []
        if step and metrics.exists():  # rows after the checkpoint will be made again
            for line in metrics.read_text().splitlines():
                with contextlib.suppress(ValueError, KeyError):
                    if json.loads(line)["step"] <= step:
                        kept.append(line + "\n")
        atomic_write(metrics, "".join(kept))
        self.metrics = metrics.open("a", buffering=1)
        self.log = (run / "train.log").open("a" if step else "w", buffering=1)

    def row(self, values: dict[str, Any]) -> None:
        if self.first:
            self.metrics.write(json.dumps(values) + "\n")

    def line(self, text: str) -> None:
        if self.first:
            self.log.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")

    def close(self) -> None:
        if self.first:
            self.metrics.close()
            self.log.close()


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """Collect SIGTERM and SIGINT instead of dying of them; a second one is obeyed at once."""
    received: list[int] = []
    previous: dict[int, Any] = {}

    def note(number: int, frame: Any) -> None:
        received.append(number)
        signal.signal(number, previous[number])

    with contextlib.suppress(ValueError):  # not in the main thread: the caller keeps its own handling
        for number in (signal.SIGTERM, signal.SIGINT):
            previous[number] = signal.signal(number, note)
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def train(
    data: Path | str,
    out: Path | str,
    *,
    model: ModelConfig,
    config: TrainConfig,
    resume: bool = False,
    progress: Progress | None = None,
    warn: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Train a denoiser on a prepared folder and write the run folder `out`.

    With `resume`, goes on from the newest valid checkpoint of `out` (from the start if it has none); the same model
    and data are required. A run counted by steps that is stopped and resumed ends bit-equal on the CPU.

    Returns steps, tokens, seconds, tokens_per_second, parameters, train_nelbo_bpb (mean over the last tenth of the
    steps, an estimate on training text), final_checkpoint, setup_seconds (compilation, not counted in `seconds`),
    compiled, peak_memory_bytes.
    Raises DataError, ConfigError, CheckpointError; Interrupted after a signal, with a checkpoint written.
    """
    with process_group(config.device) as (rank, world, local_rank), _signals() as received:
        return _train(Path(data), Path(out), model, config, resume, progress, warn, received, rank, world, local_rank)


def _train(
    data: Path,
    out: Path,
    model: ModelConfig,
    config: TrainConfig,
    resume: bool,
    progress: Progress | None,
    warn: Callable[[str], None],
    received: list[int],
    rank: int,
    world: int,
    local_rank: int,
) -> dict[str, Any]:
    first = rank == 0
    started = time.monotonic()
    device = choose_device(config.device, local_rank)
    dataset = Dataset.open(data)
    tokenizer = dataset.tokenizer
    if tokenizer.vocab_size != model.vocab_size:
        raise ConfigError(f"the data has {tokenizer.vocab_size} tokens, the model {model.vocab_size}: set --vocab-size")
    stream = dataset.split("train")
    bits_per_nat = 1 / stream.bytes_per_token() / math.log(2)  # nats per token -> bits per byte of the training text
    if out.exists() and not out.is_dir():
        raise CheckpointError(f"{out} is a file; name a folder for the run")
    described = {
        "model": to_dict(model),
        "train": to_dict(config),
        "data": {"tokenizer_sha256": tokenizer.sha256, "tokens": len(stream), "bytes": stream.known_bytes},
        "data_folder": str(data.resolve()),
        "commit": commit_id(),
        "torch": torch.__version__,
    }
    _same_everywhere(described, world)
    torch.manual_seed(config.seed)
    network = Denoiser(model).to(device)
    loader = Loader(stream, model.sequence_length, config.batch, config.seed, rank, world)
    trainer = Trainer(network, config, loader, device)
    resumed = False
    if resume and _checkpoint_folders(out):
        before = json.loads((out / "config.json").read_text())
        for key in ("model", "data"):
            if before.get(key) != described[key]:
                raise CheckpointError(f"{out} was trained with another {key}; resume it with the same, or start anew")
        folder, state = newest_checkpoint(out, warn)
        load_checkpoint(folder, state, trainer)
        resumed = True
    elif not resume and _checkpoint_folders(out):
        raise CheckpointError(f"{out} already holds a run; add --resume to go on with it, or name another folder")
    _same_everywhere({"step to go on from, in a folder that all must see": trainer.step}, world)
    if first:
        out.mkdir(parents=True, exist_ok=True)
        for left in (out / "checkpoints").glob(".step_*"):  # of a process that was killed while it wrote
            shutil.rmtree(left, ignore_errors=True)
        atomic_write(out / "config.json", json.dumps(described, indent=1))
        atomic_write(out / "tokenizer.model", tokenizer.serialized)
    log = _Log(out, first, trainer.step)
    board = _tensorboard(out) if config.tensorboard and first else None
    length = model.sequence_length
    log.line(f"{'resuming at' if resumed else 'starting at'} step {trainer.step}; {json.dumps(described)}")
    log.line(f"parameters {count_parameters(network)}, processes {world}, device {device}")

    reason = trainer.warm_up()
    if reason:
        warn(f"torch.compile does not work here ({reason}); training without it")
        log.line(f"not compiled: {reason}")
    setup = time.monotonic() - started
    log.line(f"set up in {setup:.1f} s, compiled: {trainer.compiled}")

    goal = config.minutes * 60
    clock = time.monotonic() - trainer.seconds
    saved_at = logged_at = time.monotonic()
    first_step, first_seconds = trainer.step, trainer.seconds
    checkpoint: Path | None = None
    since: dict[str, list[float]] = {"nelbo": [], "narrow": [], "causal": []}  # of the steps since the last row
    tail: list[float] = []  # (all) NELBOs of this process, for the mean over the run's last tenth

    def done() -> float:
        return min(1.0, trainer.step / config.steps if config.steps else trainer.seconds / goal)

    def save() -> Path | None:
        folder = save_checkpoint(out, trainer, config.keep_checkpoints) if first else None
        log.line(f"checkpoint at step {trainer.step}")
        return folder

    try:
        while True:
            trainer.seconds = time.monotonic() - clock
            part = done()
            # Clocks and signals differ between processes; the first one decides for all.
            flags = _agree([part, float(bool(received)), float(_due(saved_at, config))], world, device)
            part = flags[0]
            if part >= 1.0:
                break
            if flags[1]:
                save()
                raise Interrupted(f"stopped at step {trainer.step}; go on with --resume")
            if flags[2]:
                save()
                saved_at = time.monotonic()
            figures = trainer.run_step(part)
            for name, values in since.items():
                values += [figures[name]] if name in figures else []
            tail += [figures["nelbo"]] if "nelbo" in figures else []
            now = time.monotonic()
            if now - logged_at >= config.log_every or (config.steps and trainer.step == config.steps):
                seconds = now - clock
                tokens_per_second = (
                    (trainer.step - first_step) * config.batch * length / max(seconds - first_seconds, 1e-9)
                )
                row = {
                    "step": trainer.step,
                    "tokens": trainer.step * config.batch * length,
                    "seconds": round(seconds, 3),
                    **{f"train_{k}_bpb": float(np.mean(v)) * bits_per_nat if v else None for k, v in since.items()},
                    "loss": figures["loss"],
                    "lr_scale": figures["lr_scale"],
                    "grad_norm": figures["grad_norm"],
                    "tokens_per_second": tokens_per_second,
                }
                log.row(row)
                if board is not None:
                    for key, value in row.items():
                        if key not in ("step", "tokens", "seconds") and value is not None:
                            board.add_scalar(key, value, trainer.step)
                if progress is not None and first:
                    trainer.seconds = seconds
                    share = part = max(done(), 1e-9)
                    progress({**row, "progress": part, "seconds_left": seconds * (1 - share) / share})
                for values in since.values():
                    values.clear()
                logged_at = now
        checkpoint = save()
    finally:
        log.line(f"ended at step {trainer.step} after {trainer.seconds:.1f} s")
        log.close()
        trainer.batches.close()
        if board is not None:
            board.close()
    steps = trainer.step - first_step
    seconds = trainer.seconds - first_seconds
    last = tail[-max(1, len(tail) // 10) :]
    folder = checkpoint or (out / "checkpoints" / f"step_{trainer.step:08d}")
    return {
        "steps": trainer.step,
        "tokens": trainer.step * config.batch * length,
        "seconds": trainer.seconds,
        "tokens_per_second": steps * config.batch * length / seconds if steps else 0.0,
        "parameters": count_parameters(network),
        "train_nelbo_bpb": float(np.mean(last)) * bits_per_nat if last else None,
        "final_checkpoint": str(folder),
        "setup_seconds": setup,
        "compiled": trainer.compiled,
        "peak_memory_bytes": peak_memory_bytes(),
    }


def _same_everywhere(described: dict[str, Any], world: int) -> None:
    """Check that all processes are about the same run, before they wait for one another in the middle of it."""
    if world == 1:
        return
    shown: list[Any] = [None] * world
    dist.all_gather_object(shown, {key: value for key, value in described.items() if key != "data_folder"})
    for rank, other in enumerate(shown):
        for key, value in shown[0].items():
            if other[key] != value:
                raise ConfigError(f"process {rank} has another {key} than process 0: {_difference(other[key], value)}")


def _difference(one: Any, other: Any) -> str:
    if isinstance(one, dict) and isinstance(other, dict):
        key = next(k for k in {**one, **other} if one.get(k) != other.get(k))
        return f"{key} {one.get(key)}, not {other.get(key)}"
    return f"{one}, not {other}"


def _due(saved_at: float, config: TrainConfig) -> bool:
    return time.monotonic() - saved_at >= config.checkpoint_minutes * 60


def _agree(values: list[float], world: int, device: torch.device) -> list[float]:
    """The first process's values, everywhere; a signal seen by any process counts."""
    if world == 1:
        return values
    shared = torch.tensor(values, dtype=torch.float64, device=device if device.type == "cuda" else "cpu")
    signalled = shared[1].clone()
    dist.all_reduce(signalled, dist.ReduceOp.MAX)
    dist.broadcast(shared, 0)
    return [float(shared[0]), float(signalled), float(shared[2])]


def _tensorboard(out: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ConfigError("TensorBoard is not installed: pip install 'mezzotint[tensorboard]'") from error
    return SummaryWriter(str(out / "tensorboard"))
