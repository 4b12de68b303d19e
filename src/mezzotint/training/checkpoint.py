"""Run folders and checkpoints: written whole or not at all, checked by SHA-256, no pickle.

Does not know how a step is made.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from mezzotint.config import ModelConfig, TrainConfig, from_dict, to_dict
from mezzotint.data.tokenizer import Tokenizer
from mezzotint.errors import CheckpointError, ConfigError, DataError
from mezzotint.files import atomic_folder, atomic_write, refuse_pointer, why_not_written, writing
from mezzotint.network.model import Denoiser, Model
from mezzotint.training.step import Trainer
from mezzotint.training.system import try_lock

WEIGHTS, AVERAGE, OPTIMIZER, STATE, MANIFEST = (
    "weights.safetensors",
    "average.safetensors",
    "optimizer.safetensors",
    "state.json",
    "manifest.json",
)

BEST, STABLE = "best.json", "stable.json"
"""Which steps' checkpoints are kept beside the newest: the best validation's, and the last before the warm-down."""


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def checkpoint_folder(run: Path, step: int) -> Path:
    """Where the checkpoint of a step lies, if it is kept."""
    return run / "checkpoints" / f"step_{step:08d}"


def save_checkpoint(run: Path, trainer: Trainer, keep: int) -> Path:
    """Write the checkpoint of the trainer's step whole or not at all, then drop all but the newest `keep` and the marked.

    Raises CheckpointError, and MezzotintError rather than save the weights of a step that was not finite.
    """
    trainer.settle()
    folder = checkpoint_folder(run, trainer.step)
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
        raise CheckpointError(f"{why_not_written(folder, error)}; earlier checkpoints are kept") from error
    kept = [checkpoint_folder(run, step) for step in (best_step(run), stable_step(run)) if step is not None]
    for old in _checkpoint_folders(run)[keep:]:
        if old not in kept:
            shutil.rmtree(old, ignore_errors=True)
    return folder


def mark_best(run: Path, step: int, figures: dict[str, Any]) -> None:
    """Name the checkpoint of `step`, which is there, the best; it is kept beside the newest ones."""
    atomic_write(run / BEST, json.dumps({"step": step, **figures}))


def best_step(run: Path) -> int | None:
    """The step of the checkpoint with the best validation, None where no validation ran."""
    return _marked_step(run / BEST)


def stable_step(run: Path) -> int | None:
    """The step of the last checkpoint before the warm-down, None where there is none."""
    return _marked_step(run / STABLE)


def mark_stable(run: Path, step: int) -> None:
    """Name the checkpoint of `step`, which is there, the last before the warm-down; it is kept, for `extend_run`."""
    atomic_write(run / STABLE, json.dumps({"step": step}))


def _marked_step(path: Path) -> int | None:
    try:
        step = json.loads(path.read_text())["step"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return step if type(step) is int else None


def extend_run(run: Path, out: Path) -> dict[str, Any]:
    """Make `out` a run folder that goes on, when it is resumed, from the last checkpoint of `run` before its warm-down.

    `run` stays as it is. Returns the checkpoint's state (step, seconds). Raises CheckpointError.
    """
    read_run(run)
    step = stable_step(run)
    if out.exists():
        raise CheckpointError(f"{out} exists; name a new folder for the longer run")
    if step is None:
        raise CheckpointError(
            f"{run} kept no checkpoint from before its warm-down: it has none, or did not come so far"
        )
    folder = checkpoint_folder(run, step)
    state = check_checkpoint(folder)
    tokenizer = Tokenizer.load(run).file_name
    with writing(out, CheckpointError), atomic_folder(out) as copy:
        shutil.copytree(folder, checkpoint_folder(copy, step))
        for name in ("config.json", tokenizer, "metrics.jsonl"):
            shutil.copy(run / name, copy / name)
    return state


def read_metrics_rows(run: Path) -> list[dict[str, Any]]:
    """Rows of a run folder's metrics.jsonl that are whole and have a step; none where there is no such file."""
    rows = []
    with contextlib.suppress(OSError):
        for line in (run / "metrics.jsonl").read_text().splitlines():
            with contextlib.suppress(ValueError):
                row = json.loads(line)
                if isinstance(row, dict) and isinstance(row.get("step"), int):
                    rows.append(row)
    return rows


def _checkpoint_folders(run: Path) -> list[Path]:
    """Checkpoint folders, newest first, valid or not."""
    found = (run / "checkpoints").glob("step_*")
    return sorted((p for p in found if p.name[5:].isdecimal()), key=lambda p: int(p.name[5:]), reverse=True)


def check_checkpoint(folder: Path) -> dict[str, Any]:
    """The checkpoint's state if every file has its SHA-256. Raises CheckpointError."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        for name in (WEIGHTS, AVERAGE, OPTIMIZER, STATE):
            if _sha256(folder / name) != manifest["files"][name]:
                with (folder / name).open("rb") as file:
                    refuse_pointer(file.read(64), folder / name, CheckpointError)
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


def split_run(name: Path | str) -> tuple[Path, str]:
    """RUN@WHICH -> (RUN, WHICH), WHICH being `last`, `best` or a step; WHICH is empty for RUN alone.

    A folder whose own name has an @ is itself.
    """
    path = Path(name)
    folder, sign, which = path.name.rpartition("@")
    if not sign or not folder or path.exists():
        return path, ""
    return path.with_name(folder), which


def choose_checkpoint(run: Path, which: str = "") -> tuple[Path, dict[str, Any]]:
    """A run's checkpoint and its state: its best if validation ran, else its newest valid one.

    which: `last` for the newest, `best`, or a step. Damaged ones are skipped, with a line on standard error, unless
    asked for by step. Raises CheckpointError, naming the steps there are.
    """

    def say(line: str) -> None:
        print(line, file=sys.stderr)

    best = best_step(run)
    if which.isascii() and which.isdigit():
        folder = checkpoint_folder(run, int(which))
        if not folder.is_dir():
            steps = ", ".join(str(int(f.name[5:])) for f in reversed(_checkpoint_folders(run)))
            raise CheckpointError(f"{run} has no checkpoint of step {which}; there are: {steps or 'none'}")
        return folder, check_checkpoint(folder)
    if which not in ("", "last", "best"):
        raise CheckpointError(f"{run}@{which}: name a checkpoint as RUN@last, RUN@best or RUN@STEP")
    if which == "best" and best is None:
        raise CheckpointError(f"{run} has no best checkpoint: no validation ran; take RUN@last")
    if which != "last" and best is not None:
        folder = checkpoint_folder(run, best)
        try:
            return folder, check_checkpoint(folder)
        except CheckpointError as error:
            say(f"skipping the best checkpoint: {error}")
    return newest_checkpoint(run, say)


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
    """A run's config.json, with `model` and `train` as dataclasses. run: RUN or RUN@WHICH. Raises CheckpointError."""
    path = split_run(run)[0] / "config.json"
    try:
        text = path.read_bytes()
        refuse_pointer(text, path, CheckpointError)
        described = json.loads(text)
        described["model"] = from_dict(ModelConfig, described["model"])
        described["train"] = from_dict(TrainConfig, described["train"])
    except FileNotFoundError as error:
        raise CheckpointError(f"{run} is not a run folder: it has no config.json") from error
    except (OSError, ValueError, KeyError, TypeError, ConfigError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    return described


FREE_TO_CHANGE = frozenset(
    ("minutes", "steps", "micro_batch", "device", "compile", "log_every", "checkpoint_minutes", "keep_checkpoints",
     "tensorboard", "track", "val_every", "val_tokens", "patience")
)  # fmt: skip
"""Settings that may change when a run is resumed: how long, where and with what notes, not what is learnt."""


def changed_settings(run: Path, config: TrainConfig, allowed: Sequence[str]) -> list[str]:
    """What differs from the settings that the run was trained with so far, a line each: `NAME: OLD -> NEW`.

    Raises ConfigError if anything else than `FREE_TO_CHANGE` and `allowed` differs.
    """
    before, now = to_dict(read_run(run)["train"]), to_dict(config)
    names = [name for name, value in now.items() if before[name] != value]
    for name in names:
        if name not in FREE_TO_CHANGE and name not in allowed:
            option = name.replace("_", "-")
            raise ConfigError(
                f"{run} was trained with --{option} {before[name]}, not {now[name]}: leave the option out, or say "
                f"--change {option}={now[name]} to go on with another"
            )
    return [f"{name}: {before[name]} -> {now[name]}" for name in names]


@contextlib.contextmanager
def run_lock(run: Path) -> Iterator[None]:
    """Hold the run folder for this process. Raises CheckpointError naming the process that holds it.

    The system's lock on a file with the holder's process number and machine: it ends with the process, however that
    ends, and two that find a stale one cannot both take it over. Not every network drive shares locks between machines,
    so a file that names another machine counts as held until somebody deletes it.
    """
    created = not run.exists()
    path = run / "train.lock"
    if run.exists() and not run.is_dir():
        raise CheckpointError(f"{run} is a file; name a folder for the run")
    with writing(run, CheckpointError):
        run.mkdir(parents=True, exist_ok=True)
        descriptor = _open_lock(run, path)
    try:
        os.ftruncate(descriptor, 0)
        os.lseek(descriptor, 0, os.SEEK_SET)
        os.write(descriptor, f"{os.getpid()} {socket.gethostname()}".encode())
        yield
    finally:
        os.ftruncate(descriptor, 0)
        with contextlib.suppress(OSError):
            path.unlink()  # Windows keeps an open file: an empty one is left there, held by nobody
        os.close(descriptor)
        if created:
            with contextlib.suppress(OSError):
                run.rmdir()  # nothing came of it


def _open_lock(run: Path, path: Path) -> int:
    """The descriptor of the lock file, locked. Raises CheckpointError if another training holds it."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            free = try_lock(descriptor)
            pid, _, host = path.read_text(errors="replace").partition(" ")
            if not free or host not in ("", socket.gethostname()):
                holder = f"process {pid} on {host}" if host else "a process that is just starting"
                raise CheckpointError(
                    f"{run} is being trained by {holder}; wait for it, or delete {path} if it is gone"
                )
            if os.path.samestat(os.fstat(descriptor), path.stat()):
                return descriptor
        except FileNotFoundError:
            pass  # its holder ended between our opening and our locking it
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def load_run(run: Path) -> Model:
    """The model of a run folder, in eval mode on the CPU: the averaged weights of a checkpoint.

    run: RUN for its best if validation ran, else its newest valid one; RUN@last for the newest, RUN@STEP for that of a
    step. Raises CheckpointError.
    """
    run, which = split_run(run)
    described = read_run(run)
    folder, state = choose_checkpoint(run, which)
    try:
        tokenizer = Tokenizer.load(run)
    except (OSError, DataError) as error:
        raise CheckpointError(f"the run's tokenizer cannot be read: {error}") from error
    with torch.device("meta"):  # whatever config.json says, no memory is taken but that of the weights
        network = Denoiser(described["model"])
    try:
        weights = {name: value.float() for name, value in load_file(folder / AVERAGE).items()}
        network.load_state_dict(weights, assign=True)
    except (RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"{folder} does not fit the run's config.json") from error
    info = {"commit": described.get("commit"), "train": to_dict(described["train"]), "steps": state["step"]}
    return Model(described["model"], tokenizer, network.eval(), info)
