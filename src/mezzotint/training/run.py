"""The training loop, and the only writer of run folders and checkpoints.

Knows the order of a step: windows, masks, loss, optimizer, average. Does not know how models are scored or packed.

A run folder holds config.json, tokenizer.model, metrics.jsonl (a row per logged step), train.log and
checkpoints/step_XXXXXXXX/ with weights.safetensors, average.safetensors (the EMA, which is what is scored),
optimizer.safetensors, state.json and, written last, manifest.json with the SHA-256 of each. No pickle anywhere.
"""

from __future__ import annotations

import contextlib
import json
import math
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from mezzotint.config import ModelConfig, TrainConfig, to_dict
from mezzotint.data.dataset import Dataset
from mezzotint.data.loader import Loader
from mezzotint.distributed import agree_on, choose_device, process_group
from mezzotint.errors import CheckpointError, ConfigError, Interrupted
from mezzotint.files import atomic_write
from mezzotint.model import Denoiser, count_parameters
from mezzotint.system import commit_id, peak_memory_bytes
from mezzotint.training.checkpoint import (
    _checkpoint_folders,
    changed_settings,
    load_checkpoint,
    newest_checkpoint,
    run_lock,
    save_checkpoint,
)
from mezzotint.training.step import Trainer, deterministic_sums

Progress = Callable[[dict[str, Any]], None]
"""Called with every metrics row, which also carries `progress` (0..1) and `seconds_left`."""


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
    changes: Sequence[str] = (),
    progress: Progress | None = None,
    warn: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Train a denoiser on a prepared folder and write the run folder `out`.

    With `resume`, goes on from the newest valid checkpoint of `out` (from the start if it has none); the same model
    and data are required, and the same settings but for those of `FREE_TO_CHANGE` (the run's length among them) and
    those named in `changes`, each of which is noted in train.log with the step from which it holds. A run counted by
    steps that is stopped and resumed ends bit-equal on the CPU. One process at a time may train in a folder.

    Returns steps, tokens, seconds, tokens_per_second, parameters, train_nelbo_bpb (mean over the last tenth of the
    steps, an estimate on training text), final_checkpoint, setup_seconds (compilation, not counted in `seconds`),
    compiled, peak_memory_bytes.
    Raises DataError, ConfigError, CheckpointError; Interrupted after a signal, with a checkpoint written.
    """
    with (
        process_group(config.device) as (rank, world, local_rank),
        deterministic_sums(choose_device(config.device, local_rank)),
        run_lock(Path(out)) if rank == 0 else contextlib.nullcontext(),
        _signals() as received,
    ):
        return _train(
            Path(data), Path(out), model, config, resume, changes, progress, warn, received, rank, world, local_rank
        )


def _train(
    data: Path,
    out: Path,
    model: ModelConfig,
    config: TrainConfig,
    resume: bool,
    changes: Sequence[str],
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
    resumed, changed = False, []
    if resume and _checkpoint_folders(out):
        before = json.loads((out / "config.json").read_text())
        for key in ("model", "data"):
            if before.get(key) != described[key]:
                raise CheckpointError(f"{out} was trained with another {key}; resume it with the same, or start anew")
        changed = changed_settings(out, config, changes)
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
        atomic_write(out / tokenizer.file_name, tokenizer.serialized)
    log = _Log(out, first, trainer.step)
    board = _tensorboard(out) if config.tensorboard and first else None
    length = model.sequence_length
    log.line(f"{'resuming at' if resumed else 'starting at'} step {trainer.step}; {json.dumps(described)}")
    for line in changed:
        log.line(f"from step {trainer.step} on: {line}")
    log.line(f"parameters {count_parameters(network)}, processes {world}, device {device}")

    if config.compile and first:
        warn("compiling the training step; this can take a minute")
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
            flags = agree_on([part, float(bool(received)), float(_due(saved_at, config))], world, device)
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


def _tensorboard(out: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ConfigError("TensorBoard is not installed: pip install 'mezzotint[tensorboard]'") from error
    return SummaryWriter(str(out / "tensorboard"))
