"""A training run from set-up to result: the only writer of run folders.

Knows the order of a run: set up, compile, step after step, end. What is noted and kept on the way is the listeners'
(`listeners`). Does not know how models are scored or packed.

A run folder holds config.json, tokenizer.model, metrics.jsonl (a row per logged step), train.log and
checkpoints/step_XXXXXXXX/ with weights.safetensors, average.safetensors (the EMA, which is what is scored),
optimizer.safetensors, state.json and, written last, manifest.json with the SHA-256 of each. best.json and stable.json name
the steps of the checkpoint with the best validation and of the last before the warm-down. No pickle anywhere.
"""

from __future__ import annotations

import contextlib
import json
import math
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from mezzotint.config import ModelConfig, TrainConfig, to_dict
from mezzotint.data.dataset import Dataset, TokenStream
from mezzotint.data.loader import Loader
from mezzotint.data.tokenizer import check_same_tokenizer
from mezzotint.distributed import agree_on, choose_device, process_group
from mezzotint.errors import CheckpointError, ConfigError, DataError, Interrupted
from mezzotint.extras import extra
from mezzotint.files import atomic_write, reported
from mezzotint.network.model import Denoiser, Model, count_parameters
from mezzotint.progress import OnProgress
from mezzotint.training.checkpoint import (
    BEST,
    _checkpoint_folders,
    best_step,
    changed_settings,
    checkpoint_folder,
    load_checkpoint,
    newest_checkpoint,
    read_metrics_rows,
    run_lock,
)
from mezzotint.training.listeners import Checkpointer, Listener, MetricsLog, ProgressReport, Step, TensorBoard
from mezzotint.training.step import Trainer, deterministic_sums
from mezzotint.training.system import commit_id, peak_memory_bytes
from mezzotint.training.validation import Validated, Validation, past_validations

SECONDS_BETWEEN_SIGNS = 10.0
"""How often a run says that it is still compiling."""


class _StopNow(BaseException):
    """A signal that came while nothing can be saved. No Exception, which the compiler would take for its own failure."""


class _Signals:
    """SIGTERM and SIGINT, collected instead of obeyed; a second one is obeyed at once."""

    def __init__(self) -> None:
        self.received: list[int] = []
        self.prompt = False

    @contextlib.contextmanager
    def collected(self) -> Iterator[_Signals]:
        """Collect signals in here. Outside the main thread the caller keeps its own handling."""
        previous: dict[int, Any] = {}

        def note(number: int, frame: Any) -> None:
            self.received.append(number)
            signal.signal(number, previous[number])
            if self.prompt:
                raise _StopNow

        with contextlib.suppress(ValueError):  # not in the main thread
            for number in (signal.SIGTERM, signal.SIGINT):
                previous[number] = signal.signal(number, note)
        try:
            yield self
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    @contextlib.contextmanager
    def obeyed(self, message: str) -> Iterator[None]:
        """End at once on a signal, in here. Raises Interrupted with the message."""
        self.prompt = True
        try:
            if self.received:
                raise _StopNow
            yield
        except _StopNow:
            raise Interrupted(message) from None
        finally:
            self.prompt = False


@dataclass(frozen=True)
class _Job:
    """What was asked for, and which of how many processes this is."""

    data: Path
    out: Path
    model: ModelConfig
    config: TrainConfig
    resume: bool
    changes: Sequence[str]
    init: Model | None
    progress: OnProgress | None
    warn: Callable[[str], None]
    rank: int
    world: int
    local_rank: int

    @property
    def first(self) -> bool:
        return self.rank == 0


def train(
    data: Path | str,
    out: Path | str,
    *,
    model: ModelConfig,
    config: TrainConfig,
    resume: bool = False,
    changes: Sequence[str] = (),
    init: Model | None = None,
    progress: OnProgress | None = None,
    warn: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Train a denoiser on a prepared folder and write the run folder `out`.

    With `resume`, goes on from the newest valid checkpoint of `out` (from the start if it has none); the same model
    and data are required, and the same settings but for those of `FREE_TO_CHANGE` (the run's length among them) and
    those named in `changes`, each of which is noted in train.log with the step from which it holds. init: a model whose
    weights the run starts from, of the same shape and tokenizer; the optimizer is new (`config.fine_tuning` has settings
    for it). progress: told of every row of metrics.jsonl. A run counted by
    steps that is stopped and resumed ends bit-equal on the CPU. One process at a time may train in a folder.

    About ten times a run (`val_every`) the averaged weights are scored on a fixed part of the validation text, with
    fixed masks, and with `init` after the first step too; the checkpoint with the best figures is kept (`best.json`
    names its step) beside the newest ones.

    Returns steps, tokens, seconds, tokens_per_second, parameters, train_nelbo_bpb (mean over the last tenth of the
    steps, an estimate on training text), val_nelbo_bpb and val_causal_bpb (of the last validation; None without), best
    (step and figures of the best one), best_checkpoint, ended_early (by `patience`), validation_seconds (of this call,
    counted in `seconds` but for a last one), final_checkpoint, setup_seconds (compilation, not counted in `seconds`),
    compiled, peak_memory_bytes.
    Raises DataError, ConfigError, CheckpointError; Interrupted after a signal, with a checkpoint written, or at once
    while the step is compiled, when there is nothing to save. `warn` is also called from a thread, every ten seconds
    while the step is compiled.
    """
    with (
        process_group(config.device) as (rank, world, local_rank),
        deterministic_sums(choose_device(config.device, local_rank)),
        run_lock(Path(out)) if rank == 0 else contextlib.nullcontext(),
        reported(CheckpointError),
        _Signals().collected() as signals,
    ):
        job = _Job(
            Path(data), Path(out), model, config, resume, changes, init, progress, warn, rank, world, local_rank
        )  # fmt: skip
        run = _Run(job)
        try:
            if not run.finished:
                run.compile(signals)
            elif rank == 0:
                warn(f"nothing to do: the run ended at step {run.trainer.step}; give it more time or steps to go on")
            run.loop(signals)
        finally:
            run.close()
        return run.result()


def _setup(job: _Job) -> tuple[Dataset, dict[str, Any], Trainer, list[str]]:
    """The data, what config.json will say, the trainer where it goes on, and the first lines of train.log.

    Checks all that can be checked before anything is written. Raises DataError, ConfigError, CheckpointError.
    """
    # 1. Do data and model fit?
    device = choose_device(job.config.device, job.local_rank)
    dataset = Dataset.open(job.data)
    tokenizer, model = dataset.tokenizer, job.model
    if tokenizer.vocab_size != model.vocab_size:
        raise ConfigError(f"the data has {tokenizer.vocab_size} tokens, the model {model.vocab_size}: set --vocab-size")
    stream = dataset.split("train")
    if job.out.exists() and not job.out.is_dir():
        raise CheckpointError(f"{job.out} is a file; name a folder for the run")
    described = {
        "model": to_dict(model),
        "train": to_dict(job.config),
        "data": {"tokenizer_sha256": tokenizer.sha256, "tokens": len(stream), "bytes": stream.known_bytes},
        "data_folder": str(job.data.resolve()),
        "commit": commit_id(),
        "torch": torch.__version__,
    }
    _same_everywhere(described, job.world)
    # 2. Network, optimizers and data order from the seed.
    torch.manual_seed(job.config.seed)
    network = Denoiser(model)
    if job.init is not None and not (job.resume and _checkpoint_folders(job.out)):
        described["init"] = _start_from(network, job.init, dataset)
    network.to(device)
    loader = Loader(stream, model.sequence_length, job.config.batch, job.config.seed, job.rank, job.world)
    trainer = Trainer(network, job.config, loader, device)
    # 3. Where the run was.
    notes = _restore(job, described, trainer)
    _same_everywhere({"step to go on from, in a folder that all must see": trainer.step}, job.world)
    notes.append(f"parameters {count_parameters(network)}, processes {job.world}, device {device}")
    return dataset, described, trainer, notes


def _start_from(network: Denoiser, init: Model, dataset: Dataset) -> dict[str, Any]:
    """Put a model's weights into the network; returns what config.json says of it. Raises ConfigError, DataError."""
    if init.config != network.config:
        names = [name for name, value in to_dict(init.config).items() if getattr(network.config, name) != value]
        raise ConfigError(f"the model to start from has another {', '.join(names)}: its shape is the run's")
    check_same_tokenizer(init, dataset)
    network.load_state_dict(init.network.state_dict())
    return {"sha256": init.sha256, "steps": init.info.get("steps")}


def _restore(job: _Job, described: dict[str, Any], trainer: Trainer) -> list[str]:
    """Load the newest checkpoint where the run is to go on; lines for train.log. Raises CheckpointError, ConfigError."""
    resumed, changed = False, []
    if job.resume and _checkpoint_folders(job.out):
        before = json.loads((job.out / "config.json").read_text())
        for key in ("model", "data"):
            if before.get(key) != described[key]:
                raise CheckpointError(
                    f"{job.out} was trained with another {key}; resume it with the same, or start anew"
                )
        if "init" in before:
            described["init"] = before["init"]
        changed = changed_settings(job.out, job.config, job.changes)
        folder, state = newest_checkpoint(job.out, job.warn)
        load_checkpoint(folder, state, trainer)
        resumed = True
    elif not job.resume and _checkpoint_folders(job.out):
        raise CheckpointError(f"{job.out} already holds a run; add --resume to go on with it, or name another folder")
    begun = f"{'resuming at' if resumed else 'starting at'} step {trainer.step}; {json.dumps(described)}"
    return [begun, *(f"from step {trainer.step} on: {line}" for line in changed)]


def _validation_text(job: _Job, dataset: Dataset) -> TokenStream | None:
    """The validation split; None where there is none and nobody asked for validation. Raises DataError."""
    try:
        stream = dataset.split("val")
        if len(stream) == 0:
            raise DataError(f"{job.data} has no validation text: leave out --val-every")
    except DataError:
        if job.config.val_every > 0 or job.config.patience:
            raise
        return None
    return stream


def _history(job: _Job, trainer: Trainer) -> list[Validated]:
    """The validations of the run so far, the same in all processes; best.json is dropped where it is of a later step."""
    shared: list[Any] = [[]]
    if job.first:
        rows = read_metrics_rows(job.out) if trainer.step else []
        shared = [[row for row in rows if row["step"] <= trainer.step]]
        best = best_step(job.out)
        if best is not None and best > trainer.step:
            (job.out / BEST).unlink()
    if job.world > 1:
        dist.broadcast_object_list(shared)
    return past_validations(shared[0], job.config)


def _write_folder(job: _Job, described: dict[str, Any], dataset: Dataset) -> None:
    """Settings and tokenizer of the run; what a killed process left half-written goes."""
    job.out.mkdir(parents=True, exist_ok=True)
    for left in (job.out / "checkpoints").glob(".step_*"):
        shutil.rmtree(left, ignore_errors=True)
    atomic_write(job.out / "config.json", json.dumps(described, indent=1))
    atomic_write(job.out / dataset.tokenizer.file_name, dataset.tokenizer.serialized)


def _trackers(job: _Job) -> list[Listener]:
    """The trackers that were asked for. Raises ConfigError where one is not installed."""
    asked, found = job.config.track, []
    if job.config.tensorboard or asked == "tensorboard":
        found.append(TensorBoard(job.out))
    if asked not in ("none", "tensorboard"):
        found.append(extra("trackers").tracker(asked, job.out, {**to_dict(job.model), **to_dict(job.config)}))
    return found


@contextlib.contextmanager
def _signs_of_life(say: Callable[[str], None], what: str) -> Iterator[None]:
    """Say every few seconds for how long this has been going on."""
    ended = threading.Event()
    started = time.monotonic()

    def beat() -> None:
        while not ended.wait(SECONDS_BETWEEN_SIGNS):
            say(f"{what}, {time.monotonic() - started:.0f} s")

    thread = threading.Thread(target=beat, name="signs of life", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


class _Run:
    """A run that is set up, and who listens to it. Raises as `train` does."""

    def __init__(self, job: _Job) -> None:
        self.job = job
        self.started = time.monotonic()
        dataset, described, self.trainer, notes = _setup(job)
        # nats per token -> bits per byte of the training text
        bits_per_nat = 1 / self.trainer.loader.stream.bytes_per_token() / math.log(2)
        val_text = _validation_text(job, dataset)
        if job.first:
            _write_folder(job, described, dataset)
        self.log = MetricsLog(job.out, self.trainer, bits_per_nat)
        # Validation comes before the log, whose row shows its figures, and both before the checkpoint that names the best.
        self.checkpoints = Checkpointer(job.out, self.trainer, self.log)
        history = _history(job, self.trainer)
        self.validation = Validation(self.trainer, val_text, history, self.log.line, "init" in described)
        self.listeners: list[Listener] = [self.validation, self.log, self.checkpoints]
        self.listeners += _trackers(job) if job.first else []
        if job.progress is not None and job.first:
            self.listeners.append(ProgressReport(job.progress))
        for line in notes:
            self.log.line(line)
        self.first_step, self.first_seconds = self.trainer.step, self.trainer.seconds
        self.clock = self.setup_seconds = 0.0

    @property
    def finished(self) -> bool:
        """Whether no step is left to be made."""
        return self.share_done(self.trainer.seconds) >= 1.0 or self.validation.gave_up

    def compile(self, signals: _Signals) -> None:
        """Compile the step, where that works, so that it is not timed as training."""
        job, says = self.job, contextlib.ExitStack()
        again = "start it again" + (" with --resume" if self.trainer.step else "")
        with signals.obeyed(f"stopped while setting up, before a step was made; {again}"), says:
            if job.config.compile and job.first:
                job.warn(
                    "compiling the training step; this takes a few minutes at first, and less when it is made again"
                )
                says.enter_context(_signs_of_life(job.warn, "still compiling"))
            reason = self.trainer.warm_up()
        if reason:
            job.warn(f"torch.compile does not work here ({reason}); training without it")
            self.log.line(f"not compiled: {reason}")
        self.setup_seconds = time.monotonic() - self.started
        self.log.line(f"set up in {self.setup_seconds:.1f} s, compiled: {self.trainer.compiled}")

    def seconds(self) -> float:
        """Seconds of training so far, those before a resume included."""
        return time.monotonic() - self.clock

    def share_done(self, seconds: float) -> float:
        """How much of the run is done, 0..1, after so many seconds of training."""
        config = self.job.config
        return min(1.0, self.trainer.step / config.steps if config.steps else seconds / (config.minutes * 60))

    def loop(self, signals: _Signals) -> None:
        """Step after step until the run's end. Raises Interrupted after a signal, with a checkpoint written."""
        trainer, config = self.trainer, self.job.config
        self.clock = time.monotonic() - trainer.seconds
        for listener in self.listeners:
            listener.on_start()
        while True:
            trainer.seconds = self.seconds()
            # Clocks and signals differ between processes; the first one decides for all.
            validate = self.validation.due_after_next_step(trainer.seconds)
            flags = [self.share_done(trainer.seconds), float(bool(signals.received)), float(validate)]
            share, stopped, validate = agree_on(flags, self.job.world)
            if share >= 1.0 or self.validation.gave_up:
                break
            if stopped:
                self.checkpoints.save()
                raise Interrupted(f"stopped at step {trainer.step}; go on with --resume")
            figures = trainer.run_step(share)
            trainer.seconds = self.seconds()
            last = bool(config.steps) and trainer.step == config.steps
            step = Step(figures, self.share_done(trainer.seconds), trainer.seconds, last, bool(validate))
            for listener in self.listeners:
                listener.on_step(step)
        end = Step({}, self.share_done(trainer.seconds), trainer.seconds, last=True)
        for listener in self.listeners:
            listener.on_end(end)
        if self.validation.gave_up and self.job.first:
            self._say_why_it_ended()

    def _say_why_it_ended(self) -> None:
        best = self.validation.best
        assert best is not None
        text = f"the last {self.job.config.patience} validations were no better than that of step {best.step}"
        self.log.line(text)
        self.job.warn(f"ended at step {self.trainer.step}: {text}")

    def close(self) -> None:
        """Let go of files and threads, however the run ended."""
        self.log.line(f"ended at step {self.trainer.step} after {self.trainer.seconds:.1f} s")
        for listener in self.listeners:
            listener.close()
        self.trainer.batches.close()

    def result(self) -> dict[str, Any]:
        """See `train`."""
        trainer = self.trainer
        made = trainer.step > self.first_step
        last, best = (self.validation.history or [None])[-1], self.validation.best
        kept = best_step(self.job.out)
        return {
            "steps": trainer.step,
            "tokens": trainer.step * self.log.tokens_per_step,
            "seconds": trainer.seconds,
            "tokens_per_second": self.log.tokens_per_second(trainer.seconds) if made else 0.0,
            "parameters": count_parameters(trainer.network),
            "train_nelbo_bpb": self.log.final_bpb(),
            **(last.figures() if last else {"val_nelbo_bpb": None, "val_causal_bpb": None}),
            "best": {"step": best.step, **best.figures()} if best else None,
            "best_checkpoint": None if kept is None else str(checkpoint_folder(self.job.out, kept)),
            "ended_early": self.validation.gave_up,
            "validation_seconds": self.validation.spent,
            "final_checkpoint": str(checkpoint_folder(self.job.out, trainer.step)),
            "setup_seconds": self.setup_seconds,
            "compiled": trainer.compiled and made,
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
