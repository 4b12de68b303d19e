"""What listens to a run: metrics rows, checkpoints, TensorBoard, the caller's progress.

Each is told, in every process, of the start, of every step and of the end, in the order of the list that `run` makes.
Knows what is noted and kept. Does not know how a step is made, or when a run ends.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mezzotint.extras import extra
from mezzotint.files import atomic_write
from mezzotint.progress import OnProgress, Progress
from mezzotint.training.checkpoint import mark_best, mark_stable, save_checkpoint, stable_step
from mezzotint.training.step import Trainer


@dataclass
class Step:
    """What listeners are told of a step. Those earlier in the list fill in what later ones read.

    figures: what `Trainer.run_step` gave. progress: share of the run that is done, 0..1. seconds: of training so far.
    last: whether the run ends here (a run counted by the clock knows that only afterwards, and tells `on_end`).
    validate: whether a validation is due, in all processes. validation: its figures, as metrics.jsonl holds them.
    better: whether they are the best so far. row: the row of metrics.jsonl, if this step has one.
    """

    figures: Mapping[str, float]
    progress: float
    seconds: float
    last: bool = False
    validate: bool = False
    validation: dict[str, Any] | None = None
    better: bool = False
    row: dict[str, Any] | None = None


class Listener:
    """Told of what happens in a run; each method does nothing unless overridden."""

    def on_start(self) -> None:
        """The first step comes next: all is set up and compiled."""

    def on_step(self, step: Step) -> None:
        """A step was made."""

    def on_end(self, step: Step) -> None:
        """The run's last step was made; `step` has no figures of its own."""

    def close(self) -> None:
        """Nothing more comes, whether the run ended or failed."""


class MetricsLog(Listener):
    """metrics.jsonl and train.log of a run; writes nothing on all processes but the first.

    bits_per_nat: turns nats per token into bits per byte of the training text.
    """

    def __init__(self, folder: Path, trainer: Trainer, bits_per_nat: float) -> None:
        self.trainer, self.bits_per_nat = trainer, bits_per_nat
        self.tokens_per_step = trainer.config.batch * trainer.network.config.sequence_length
        self.first_step, self.first_seconds = trainer.step, trainer.seconds
        self.since: dict[str, list[float]] = {
            "nelbo": [],
            "narrow": [],
            "sampled": [],
            "causal": [],
        }  # of the steps since the last row
        self.tail: list[float] = []  # (all) NELBOs of this process, for the mean over the run's last tenth
        self.unread: list[Mapping[str, float]] = []  # of steps whose figures may still be on their way
        self.last_figures: Mapping[str, float] = {}
        self.logged_at = time.monotonic()
        self.writes = trainer.rank == 0
        if not self.writes:
            return
        metrics = folder / "metrics.jsonl"
        kept = []
        if trainer.step and metrics.exists():  # rows after the checkpoint will be made again
            for line in metrics.read_text().splitlines():
                with contextlib.suppress(ValueError, KeyError):
                    if json.loads(line)["step"] <= trainer.step:
                        kept.append(line + "\n")
        atomic_write(metrics, "".join(kept))
        self.metrics = metrics.open("a", buffering=1)
        self.log = (folder / "train.log").open("a" if trainer.step else "w", buffering=1)

    def line(self, text: str) -> None:
        """A line of train.log."""
        if self.writes:
            self.log.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")

    def on_start(self) -> None:
        self.logged_at = time.monotonic()

    def on_step(self, step: Step) -> None:
        self.unread.append(step.figures)
        self.last_figures = step.figures
        due = time.monotonic() - self.logged_at >= self.trainer.config.log_every
        if due or step.last or step.validation is not None:
            self._write(step)

    def on_end(self, step: Step) -> None:
        if step.validation is not None:
            self._write(step)

    def _write(self, step: Step) -> None:
        step.row = {**self._row(step), **(step.validation or {})}
        self.logged_at = time.monotonic()
        if self.writes:
            self.metrics.write(json.dumps(step.row) + "\n")

    def _read(self) -> None:
        """Take in the figures of the steps so far, for which a GPU is waited for: once in a row, not in every step."""
        for figures in self.unread:
            for name, values in self.since.items():
                values += [figures[name]] if name in figures else []
            self.tail += [figures["nelbo"]] if "nelbo" in figures else []
        self.unread.clear()

    def _row(self, step: Step) -> dict[str, Any]:
        self._read()
        means = {
            f"train_{name}_bpb": float(np.mean(values)) * self.bits_per_nat if values else None
            for name, values in self.since.items()
        }
        for values in self.since.values():
            values.clear()
        return {
            "step": self.trainer.step,
            "tokens": self.trainer.step * self.tokens_per_step,
            "seconds": round(step.seconds, 3),
            **means,
            **{name: self.last_figures.get(name) for name in ("loss", "lr_scale", "grad_norm")},
            "tokens_per_second": self.tokens_per_second(step.seconds),
        }

    def tokens_per_second(self, seconds: float) -> float:
        """Tokens of a second since this process took the run up, at `seconds` of training."""
        steps = self.trainer.step - self.first_step
        return steps * self.tokens_per_step / max(seconds - self.first_seconds, 1e-9)

    def final_bpb(self) -> float | None:
        """Mean training NELBO over the last tenth of the steps, in bits per byte; None where none was estimated."""
        self._read()
        last = self.tail[-max(1, len(self.tail) // 10) :]
        return float(np.mean(last)) * self.bits_per_nat if last else None

    def close(self) -> None:
        if self.writes:
            self.metrics.close()
            self.log.close()


class Checkpointer(Listener):
    """Writes a checkpoint when one is due, when a validation is the best so far, before the warm-down, and at the end.

    The first process does. The best and the one before the warm-down are kept beside the newest.
    """

    def __init__(self, folder: Path, trainer: Trainer, log: MetricsLog) -> None:
        self.folder, self.trainer, self.log = folder, trainer, log
        self.saved_at = time.monotonic()
        stable = stable_step(folder)
        self.stable = stable is not None and stable <= trainer.step

    def due(self) -> bool:
        """Whether the last checkpoint is older than the settings allow."""
        return time.monotonic() - self.saved_at >= self.trainer.config.checkpoint_minutes * 60

    def save(self) -> None:
        """Write the checkpoint of the trainer's step. Raises CheckpointError."""
        if self.trainer.rank == 0:
            save_checkpoint(self.folder, self.trainer, self.trainer.config.keep_checkpoints)
        self.log.line(f"checkpoint at step {self.trainer.step}")
        self.saved_at = time.monotonic()

    def on_start(self) -> None:
        self.saved_at = time.monotonic()

    def on_step(self, step: Step) -> None:
        falls = self._falls_from_here(step.progress)
        if step.better or falls or self.due():
            self.save()
        self._mark(step)
        if falls and self.trainer.rank == 0:
            mark_stable(self.folder, self.trainer.step)

    def _falls_from_here(self, progress: float) -> bool:
        """Whether the learning rate falls from the next step on, and no checkpoint from before is kept yet."""
        warmdown = self.trainer.config.warmdown
        if self.stable or not 0 < warmdown < 1 or progress < 1 - warmdown or progress >= 1:
            return False
        self.stable = True
        return True

    def on_end(self, step: Step) -> None:
        self.save()
        self._mark(step)

    def _mark(self, step: Step) -> None:
        """Name the checkpoint that was just written the best one, if it is."""
        if step.better and self.trainer.rank == 0:
            mark_best(self.folder, self.trainer.step, step.validation or {})


class TensorBoard(Listener):
    """Every figure of every row, as a TensorBoard scalar. Raises ConfigError where TensorBoard is not installed."""

    def __init__(self, folder: Path) -> None:
        self.board: Any = extra("tensorboard").writer(folder / "tensorboard")

    def on_step(self, step: Step) -> None:
        for key, value in (step.row or {}).items():
            if key not in ("step", "tokens", "seconds", "val_tokens") and value is not None:
                self.board.add_scalar(key, value, (step.row or {})["step"])

    on_end = on_step

    def close(self) -> None:
        self.board.close()


class ProgressReport(Listener):
    """Hands every row to the caller, with the share of the run that is done and the time that is left."""

    def __init__(self, progress: OnProgress) -> None:
        self.progress = progress

    def on_step(self, step: Step) -> None:
        if step.row is not None:
            share = max(step.progress, 1e-9)
            row = {**step.row, "progress": share, "seconds_left": step.seconds * (1 - share) / share}
            self.progress(Progress(f"step {row['step']}", share, 1.0, row))

    on_end = on_step
