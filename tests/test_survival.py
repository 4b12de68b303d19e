"""Runs that are killed: at any step, at any system call of a checkpoint's write, one process of two."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import killed as killed_runs
import pytest
from commands import Done, start, torchrun
from corpus import metrics, prepared_words

from mezzotint.data.dataset import Dataset

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return prepared_words(tmp_path_factory.mktemp("survival"))


def killed(part: str, data: Path, home: Path) -> dict:
    words = [sys.executable, str(Path(__file__).parent / "helpers" / "killed.py"), part, str(data), str(home)]
    done = subprocess.run(words, capture_output=True, text=True, env=ENVIRONMENT, timeout=300)
    if "tracing is not allowed here" in done.stderr:
        pytest.skip("this machine allows no tracing of system calls")
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_killed_after_any_step_and_gone_on_with_is_the_same_run(data, tmp_path):
    trials = killed("steps", data, tmp_path)["trials"]
    assert len({trial["k"] for trial in trials}) == 20
    for number, trial in enumerate(trials):
        assert trial["went_on"] == (number % 4 > 0), trial  # in every fourth run checkpoints are an hour apart
        assert (trial["killed"], trial["resumed"], trial["left"]) == (-9, 0, 0), trial
        assert trial["equal"] and trial["steps"] and trial["losses"], trial


@pytest.mark.parametrize("part", ["writes", "damaged"])
def test_killed_at_any_system_call_of_a_save_leaves_a_whole_checkpoint(data, tmp_path, part):
    result = killed(part, data, tmp_path)
    assert result["wrong"] == []
    assert result["stops"] > 200 and result["old"] > 50 and result["new"] > 5, result


def test_a_compiled_run_on_two_threads_killed_and_gone_on_with_is_the_same_run(data, tmp_path):
    """SIGKILL after a step, or amid the first one's compilation; each part is a process of its own."""
    whole = json.loads(start(killed_runs.print_compiled, data, tmp_path / "whole")().stdout)
    assert whole["compiled"] and whole["threads"] == 2
    for when in ("compiling", "3"):
        done = start(killed_runs.print_compiled, data, tmp_path / "run", when)()
        assert done.returncode == -9, done.stderr[-2000:]
    resumed = start(killed_runs.print_compiled, data, tmp_path / "run")()
    assert "resuming at step" in (tmp_path / "run" / "train.log").read_text()
    assert json.loads(resumed.stdout) == whole


SCRIPT = """
import json, os, signal, sys
import torch
torch.set_num_threads(1)
from mezzotint.cli import main
from mezzotint.config import ModelConfig, TrainConfig
from mezzotint.errors import MezzotintError
from mezzotint.training.run import train
data, out, mode, vocab = sys.argv[1:5]
rank, again = int(os.environ["RANK"]), int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
model = dict(vocab_size=int(vocab), sequence_length=16, layers=1, width=16, heads=2, kv_heads=1)
config = dict(steps=12, batch=4, compile=False, dtype="float32", log_every=0.0, checkpoint_minutes=0.0)
if mode == "config" and rank:
    config["matrix_lr"] = 0.5
if mode == "model" and rank:
    model["layers"] = 2

if mode == "kill" and rank and not again:
    from mezzotint.training.step import Trainer
    whole = Trainer.run_step
    def run_step(self, progress):
        if self.step == 6:
            os.kill(os.getpid(), signal.SIGKILL)
        return whole(self, progress)
    Trainer.run_step = run_step
try:
    train(data, out, model=ModelConfig(**model), config=TrainConfig(**config), resume=True)
except MezzotintError as error:
    print(f"rank {rank}: {error}", file=sys.stderr)
    sys.exit(2)
"""


def two_trainings(data: Path, out: Path, mode: str, *options: str) -> Done:
    script = out.parent / "run.py"
    script.write_text(SCRIPT)
    return torchrun(*options, script, data, out, mode, str(Dataset.open(data).tokenizer.vocab_size))


def test_one_of_two_workers_killed(data, tmp_path):
    """torchrun starts both anew and the run goes on from its last checkpoint."""
    undisturbed = two_trainings(data, tmp_path / "whole", "calm")
    assert undisturbed.returncode == 0, undisturbed.stderr[-2000:]
    disturbed = two_trainings(data, tmp_path / "run", "kill", "--max-restarts=1")
    assert disturbed.returncode == 0, disturbed.stderr
    rows = [metrics(tmp_path / name) for name in ("whole", "run")]
    assert [row["step"] for row in rows[1]] == list(range(1, 13))
    assert [row["loss"] for row in rows[1]] == [row["loss"] for row in rows[0]]
    log = (tmp_path / "run" / "train.log").read_text()
    assert "resuming at step 6;" in log or "resuming at step 5;" in log


@pytest.mark.parametrize("mode, words", [("config", "matrix_lr 0.5, not 0.02"), ("model", "layers 2, not 1")])
def test_processes_that_disagree_say_on_what(data, tmp_path, mode, words):
    done = two_trainings(data, tmp_path / "run", mode)
    assert done.returncode != 0
    assert "process 1 has another" in done.stderr and words in done.stderr
    assert not (tmp_path / "run").exists()
