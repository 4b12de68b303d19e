"""A program for test_survival.py: trains, kills what it forks in awkward moments, and prints what was left as JSON.

One process loads PyTorch once and forks for every trial; it keeps to one thread, so that forking is safe. Compiled runs,
on two threads, kill themselves: `print_compiled` is for a process of its own.
"""

from __future__ import annotations

import ctypes
import dataclasses
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from mezzotint.config import ModelConfig, TrainConfig
from mezzotint.data.dataset import Dataset
from mezzotint.data.loader import Loader
from mezzotint.errors import CheckpointError
from mezzotint.network.model import Denoiser
from mezzotint.progress import Progress
from mezzotint.training.checkpoint import load_checkpoint, newest_checkpoint, save_checkpoint
from mezzotint.training.run import train
from mezzotint.training.step import Trainer

PTRACE_TRACEME, PTRACE_SYSCALL = 0, 24
STEPS = 24


def model_config(data: Path) -> ModelConfig:
    vocab = Dataset.open(data).tokenizer.vocab_size
    return ModelConfig(vocab_size=vocab, sequence_length=16, layers=1, width=16, heads=2, kv_heads=1)


# A rate that falls from the start: no checkpoint is made of the weights before it falls.
CONFIG = TrainConfig(
    steps=STEPS, batch=4, compile=False, dtype="float32", log_every=0.0, causal_share=0.5, warmdown=1.0
)


def forked(work: Callable[[], Any]) -> int:
    """Run `work` in a fork of this process; its process id."""
    child = os.fork()
    if child:
        return child
    try:
        work()
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def ended(child: int) -> int:
    """The exit status of a child, negative where a signal ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def contents(folder: Path) -> str:
    """A digest of a checkpoint but for its clock."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def steps(data: Path, home: Path) -> dict[str, Any]:
    """Runs killed after random steps and gone on with, beside one that was left alone."""
    model = model_config(data)
    whole = home / "whole"
    train(data, whole, model=model, config=CONFIG)
    wanted = contents(newest_checkpoint(whole)[0])
    losses = [json.loads(line)["loss"] for line in (whole / "metrics.jsonl").read_text().splitlines()]
    draw, trials = random.Random(0), []
    for number, k in enumerate(draw.sample(range(1, STEPS), 20)):
        run = home / f"killed{number}"
        # With and without checkpoints in between (validation makes them too): the latter starts anew.
        between = {"checkpoint_minutes": 0.0} if number % 4 else {"checkpoint_minutes": 60.0, "val_every": -1.0}
        config = dataclasses.replace(CONFIG, keep_checkpoints=1, **between)

        def kill(told: Progress, k: int = k) -> None:
            if told.figures["step"] == k:
                os.kill(os.getpid(), signal.SIGKILL)

        def first(run: Path = run, config: TrainConfig = config, kill: Any = kill) -> None:
            train(data, run, model=model, config=config, progress=kill)

        def second(run: Path = run, config: TrainConfig = config) -> None:
            train(data, run, model=model, config=config, resume=True)

        killed, resumed = ended(forked(first)), ended(forked(second))
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        trials.append(
            {
                "k": k,
                "killed": killed,
                "resumed": resumed,
                "equal": contents(newest_checkpoint(run)[0]) == wanted,
                "steps": [row["step"] for row in rows] == list(range(1, STEPS + 1)),
                "losses": [row["loss"] for row in rows] == losses,
                "went_on": "resuming at" in (run / "train.log").read_text(),
                "left": len(list((run / "checkpoints").glob(".*"))),
            }
        )
    return {"trials": trials}


def stopped_at(work: Callable[[], Any], calls: int) -> bool:
    """Fork `work` and kill it with SIGKILL on its way into or out of a system call, after `calls` such stops.

    True if it was killed, False if it had ended before. Raises OSError where tracing is not allowed.
    """
    libc = ctypes.CDLL(None, use_errno=True)

    def traced() -> None:
        if libc.ptrace(PTRACE_TRACEME, 0, None, None):
            os._exit(99)
        os.kill(os.getpid(), signal.SIGSTOP)
        work()

    child = forked(traced)
    _, status = os.waitpid(child, 0)
    if os.WIFEXITED(status):
        raise OSError("tracing is not allowed here")
    for _ in range(calls):
        libc.ptrace(PTRACE_SYSCALL, child, None, None)
        _, status = os.waitpid(child, 0)
        if os.WIFEXITED(status):
            assert os.waitstatus_to_exitcode(status) == 0, "the save failed by itself"
            return False
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return True


def writes(data: Path, home: Path, damaged: bool) -> dict[str, Any]:
    """Saves killed at every system call, over an older checkpoint, of which one only is kept.

    damaged: a folder of the step being saved is already there, and is not whole.
    """
    stream, model = Dataset.open(data).split("train"), model_config(data)
    loader = Loader(stream, 16, 4, seed=0)
    torch.manual_seed(0)
    trainer = Trainer(Denoiser(model), CONFIG, loader, torch.device("cpu"))
    known = {}
    for step in (1, 2):
        trainer.run_step(0.5)
        known[step] = contents(save_checkpoint(home / "kept", trainer, keep=5))
    old = home / "kept" / "checkpoints" / "step_00000001"
    found = {1: 0, 2: 0}
    wrong: list[str] = []
    calls = 0
    while True:
        run = home / "run"
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(old, run / "checkpoints" / old.name)
        if damaged:
            shutil.copytree(old, run / "checkpoints" / "step_00000002")
            (run / "checkpoints" / "step_00000002" / "state.json").write_text("{}")
        killed = stopped_at(lambda run=run: save_checkpoint(run, trainer, keep=1), calls)
        try:
            folder, state = newest_checkpoint(run)
            found[state["step"]] += 1
            if contents(folder) != known[state["step"]]:
                wrong.append(f"after {calls} stops: another content")
            load_checkpoint(folder, state, Trainer(Denoiser(model), CONFIG, loader, torch.device("cpu")))
        except CheckpointError as error:
            wrong.append(f"after {calls} stops: {error}")
        if not killed:
            return {"stops": calls, "old": found[1], "new": found[2], "wrong": wrong}
        calls += 3 if damaged else 1


def compiled(data: Path, run: Path, when: str) -> dict[str, Any]:
    """A compiled run on two threads, gone on with where it was left; kills itself at `when`: a step, or `compiling`."""
    torch.set_num_threads(2)
    config = dataclasses.replace(CONFIG, steps=6, causal_share=0.0, compile=True, checkpoint_minutes=0.0)

    def kill(told: Progress) -> None:
        if str(told.figures["step"]) == when:
            os.kill(os.getpid(), signal.SIGKILL)

    def warn(line: str) -> None:
        if when == "compiling":
            threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGKILL)).start()

    made = train(data, run, model=model_config(data), config=config, resume=True, progress=kill, warn=warn)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [(row["step"], row["loss"]) for row in rows]
    return {"compiled": made["compiled"], "threads": torch.get_num_threads(), "losses": losses,
            "contents": contents(newest_checkpoint(run)[0])}  # fmt: skip


def print_compiled(data: Path, run: Path, when: str = "") -> None:
    """`compiled` in a process of its own, which may not come back from it."""
    print(json.dumps(compiled(data, run, when)))


if __name__ == "__main__":
    torch.set_num_threads(1)
    part, data, home = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    print(json.dumps(steps(data, home) if part == "steps" else writes(data, home, part == "damaged")))
