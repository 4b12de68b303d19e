"""Validation while training: its figures, when it is made, and the best checkpoint."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from corpus import metrics as rows
from corpus import prepared_words, small_config, stop_at, validations
from safetensors.torch import load_file

from mezzotint.cli.console import Display
from mezzotint.cli.main import main
from mezzotint.config import ModelConfig, TrainConfig, to_dict
from mezzotint.data.dataset import Dataset
from mezzotint.data.loader import Loader
from mezzotint.errors import CheckpointError, ConfigError, DataError, Interrupted
from mezzotint.network.model import Denoiser, Model
from mezzotint.pretrained import load
from mezzotint.progress import Progress
from mezzotint.scoring.chain import causal_matrix
from mezzotint.scoring.plan import Scoring
from mezzotint.training import validation
from mezzotint.training.checkpoint import best_step, load_run, read_run, split_run
from mezzotint.training.run import train
from mezzotint.training.step import Trainer
from mezzotint.training.validation import Validated, Validation, ValidationSet, past_validations

QUICK = TrainConfig(
    steps=20, batch=4, compile=False, dtype="float32", log_every=60, checkpoint_minutes=60, causal_share=0.5
)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return prepared_words(tmp_path_factory.mktemp("validation"))


@pytest.fixture(scope="module")
def shape(data) -> ModelConfig:
    return small_config(data)


def random_model(data: Path, shape: ModelConfig, **train) -> Model:
    torch.manual_seed(1)
    network = Denoiser(shape)
    for p in network.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return Model(shape, Dataset.open(data).tokenizer, network.eval(), {"train": to_dict(TrainConfig(**train))})


@pytest.mark.parametrize("block_size", [0, 5])
def test_figures_are_those_of_the_definition(data, shape, block_size):
    """Against the NELBO of each mask written out token by token, and against the score `causal`."""
    model = random_model(data, shape, causal_share=0.5, block_size=block_size)
    stream = Dataset.open(data).split("val")
    drawn = ValidationSet.draw(stream, model, 10**9)
    windows = stream.windows(16)
    assert len(drawn.ids) == len(stream) // 16
    assert drawn.bytes == sum(windows.byte_count(i) for i in range(len(drawn.ids)))
    nelbo, causal = drawn.nats(model)
    for n in range(8):
        ids, masked = drawn.ids[n], drawn.masked[n]
        assert ids.tolist() == windows[n].tolist()
        assert torch.equal(drawn.corrupted[n], ids.masked_fill(masked, shape.mask_id))
        expected = 0.0
        for start in range(0, 16, block_size or 16):
            block = slice(start, start + (block_size or 16))
            canvas = torch.cat((ids[:start], drawn.corrupted[n, block]))
            logp = model.logits(canvas[None], block_size=block_size)[0].double().log_softmax(-1)
            here = [i for i in range(start, len(canvas)) if masked[i]]
            assert len(here) == int(drawn.counts[n].view(-1)[start // block_size if block_size else 0])
            expected -= sum(float(logp[i, ids[i]]) for i in here) * (len(canvas) - start) / len(here)
        assert nelbo[n] == pytest.approx(expected, rel=1e-5)
    plan = Scoring(windows, list(range(len(drawn.ids))))
    assert causal == pytest.approx(causal_matrix(model, plan)[0], rel=1e-6)


def test_what_was_not_trained_is_not_scored(data, shape):
    stream = Dataset.open(data).split("val")
    for share in (0.0, 1.0):
        model = random_model(data, shape, causal_share=share)
        nelbo, causal = ValidationSet.draw(stream, model, 100).nats(model)
        assert (nelbo > 0).all() and ((causal == nelbo).all() if share else (causal == 0).all())


def test_processes_share_the_windows_and_change_no_figure(data, shape, monkeypatch):
    monkeypatch.setattr(validation, "TOKENS_PER_PASS", 48)
    model = random_model(data, shape, causal_share=0.5)
    drawn = ValidationSet.draw(Dataset.open(data).split("val"), model, 10**9)
    alone = drawn.nats(model)
    for world in (2, 4):
        parts = [drawn.nats(model, rank, world) for rank in range(world)]
        assert ((np.stack(parts) > 0).sum(axis=0) == 1).all()
        assert np.array_equal(sum(parts), alone)


def test_a_subset_is_fixed_and_spread(data, shape):
    model = random_model(data, shape)
    stream = Dataset.open(data).split("val")
    some, again = (ValidationSet.draw(stream, model, 200) for _ in range(2))
    assert len(some.ids) == 12 and torch.equal(some.corrupted, again.corrupted)
    whole = ValidationSet.draw(stream, model, 10**9).ids.tolist()
    places = [whole.index(row) for row in some.ids.tolist()]
    assert places == sorted(places) and len(set(places)) == 12 and places[-1] > len(whole) * 0.8
    assert len(ValidationSet.draw(stream, model, 1).ids) == 1
    longer = random_model(data, dataclasses.replace(shape, sequence_length=2 * len(stream)))
    assert ValidationSet.draw(stream, longer, 10**9).ids.shape == (1, len(stream))  # all there is, no whole window


def test_a_run_validates_ten_times_and_is_the_same_run(data, shape, tmp_path):
    """Rows of metrics.jsonl have the figures, TensorBoard too; no weight, no random number depends on it."""
    told = []
    result = train(data, tmp_path / "a", model=shape, config=QUICK, progress=lambda at: told.append(at.figures))
    never = train(data, tmp_path / "b", model=shape, config=dataclasses.replace(QUICK, val_every=-1))
    for name in ("weights", "average", "optimizer"):
        one, other = (load_file(Path(r["final_checkpoint"]) / f"{name}.safetensors") for r in (result, never))
        assert one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)
    made = validations(tmp_path / "a")
    assert [row["step"] for row in made] == list(range(2, 21, 2))
    assert [row["val_nelbo_bpb"] for row in told] == [row["val_nelbo_bpb"] for row in made]
    assert (
        result["val_nelbo_bpb"] == made[-1]["val_nelbo_bpb"] and result["val_causal_bpb"] == made[-1]["val_causal_bpb"]
    )
    assert not validations(tmp_path / "b") and never["val_nelbo_bpb"] is None and never["best"] is None
    assert best_step(tmp_path / "b") is None
    # The last one again, from the checkpoint that was written.
    model = load_run(tmp_path / "a@last")
    drawn = ValidationSet.draw(Dataset.open(data).split("val"), model, made[-1]["val_tokens"])
    bpb = drawn.nats(model).sum(axis=1) / drawn.bytes / math.log(2)
    assert bpb.tolist() == pytest.approx([made[-1]["val_nelbo_bpb"], made[-1]["val_causal_bpb"]], rel=1e-6)


def test_a_resumed_run_validates_as_one_left_alone(data, shape, tmp_path):
    config = dataclasses.replace(QUICK, val_every=3, log_every=0.0)
    train(data, tmp_path / "whole", model=shape, config=config)
    with pytest.raises(Interrupted, match="step 7"):
        train(data, tmp_path / "parts", model=shape, config=config, progress=stop_at(7))
    train(data, tmp_path / "parts", model=shape, config=config, resume=True)
    whole, parts = (validations(tmp_path / name) for name in ("whole", "parts"))
    assert [row["step"] for row in whole] == [3, 6, 9, 12, 15, 18, 20]
    for one, other in zip(whole, parts, strict=True):
        assert all(one[k] == other[k] for k in ("step", "val_nelbo_bpb", "val_causal_bpb", "val_tokens", "loss"))
    assert (tmp_path / "whole" / "best.json").read_text() == (tmp_path / "parts" / "best.json").read_text()


def worst_after(step: int):
    """Validations whose figures fall until `step` and rise afterwards, in place of real ones."""

    def validate(self, progress):
        at = self.trainer.step
        made = Validated(at, 1 + abs(at - step) / 10, None, 1 + abs(at - step) / 10, 64)
        self.history.append(made)
        return made

    return validate


def test_the_best_checkpoint_is_kept_and_taken(data, shape, tmp_path, monkeypatch):
    monkeypatch.setattr(Validation, "validate", worst_after(6))
    run = tmp_path / "run"
    config = dataclasses.replace(QUICK, keep_checkpoints=1, checkpoint_minutes=0.0)
    result = train(data, run, model=shape, config=config)
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == [
        "step_00000006",
        "step_00000010",
        "step_00000020",
    ]
    assert json.loads((run / "best.json").read_text()) == {
        "step": 6, "val_nelbo_bpb": 1.0, "val_causal_bpb": None, "val_tokens": 64,
    }  # fmt: skip
    assert result["best"]["step"] == 6 and result["steps"] == 20 and not result["ended_early"]
    assert result["best_checkpoint"].endswith("step_00000006")
    assert result["final_checkpoint"].endswith("step_00000020")
    for name, step in (("run", 6), ("run@best", 6), ("run@last", 20), ("run@20", 20), ("run@6", 6)):
        assert load(tmp_path / name).info["steps"] == step
        assert read_run(tmp_path / name)["model"] == shape
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 7; there are: 6, 10, 20"):
        load(tmp_path / "run@7")
    with pytest.raises(CheckpointError, match="RUN@STEP"):
        load(tmp_path / "run@first")
    (run / "checkpoints" / "step_00000006" / "average.safetensors").write_bytes(b"")
    assert load_run(run).info["steps"] == 20
    (tmp_path / "a@b").mkdir()
    assert split_run(tmp_path / "a@b") == (tmp_path / "a@b", "") and split_run("x/a@b@7") == (Path("x/a@b"), "7")


def test_patience_ends_a_run_that_gets_worse(data, shape, tmp_path, monkeypatch):
    monkeypatch.setattr(Validation, "validate", worst_after(6))
    said: list[str] = []
    config = dataclasses.replace(QUICK, patience=3)
    result = train(data, tmp_path / "run", model=shape, config=config, warn=said.append)
    assert result["ended_early"] and result["steps"] == 12 and result["best"]["step"] == 6
    assert "3 validations were no better than that of step 6" in said[-1]
    assert load_run(tmp_path / "run").info["steps"] == 6
    again = train(data, tmp_path / "run", model=shape, config=config, resume=True)
    assert again["steps"] == 12 and again["ended_early"]
    more = dataclasses.replace(config, patience=5)
    assert train(data, tmp_path / "run", model=shape, config=more, resume=True)["steps"] == 16


def test_validations_of_a_run_by_the_clock(data, shape, monkeypatch):
    trainer = Trainer(
        Denoiser(shape), dataclasses.replace(QUICK, steps=0, minutes=10.0),
        Loader(Dataset.open(data).split("train"), 16, 4, 0), torch.device("cpu"),
    )  # fmt: skip
    stream = Dataset.open(data).split("val")
    made = Validation(trainer, stream, [], lambda line: None)
    due = [second for second in range(600) if made.due_after_next_step(float(second))]
    assert due == list(range(60, 600, 60))
    # What would cost more than 3% of the run is left out, but for the one at its end.
    made = Validation(trainer, stream, [], lambda line: None)
    due = []
    for second in range(600):
        if made.due_after_next_step(float(second)):
            due.append(second)
            made.spent, made.longest = made.spent + 5.0, 5.0
    assert due == [60, 120]
    trainer.step = 100
    passes = made.tokens(0.001) / (100_000 * 64)  # a run of 100,000 steps
    assert made.tokens(1.0) == 16 * 16  # a run of 100 steps: no fewer than 16 windows
    assert passes * 10 * 2 == pytest.approx(validation.TEXT_SHARE, rel=0.05)
    trainer.batches.close()


def test_runs_without_validation_text(data, shape, tmp_path):
    folder = tmp_path / "data"
    shutil.copytree(data, folder)
    for path in folder.glob("val_*.bin"):
        path.unlink()
    assert train(folder, tmp_path / "run", model=shape, config=QUICK)["val_nelbo_bpb"] is None
    for asked in ({"val_every": 5.0}, {"patience": 2}):
        with pytest.raises(DataError, match="val"):
            train(folder, tmp_path / "other", model=shape, config=dataclasses.replace(QUICK, **asked))
    with pytest.raises(ConfigError, match="patience"):
        dataclasses.replace(QUICK, patience=2, val_every=-1)


def test_rows_without_figures_are_no_validations():
    made = [
        {"step": 1},
        {"step": 2, "val_nelbo_bpb": 2.0, "val_causal_bpb": 1.0, "val_tokens": 5},
        {"step": 3, "val_nelbo_bpb": None},
    ]
    (one,) = past_validations(made, dataclasses.replace(QUICK, causal_share=0.25))
    assert (one.step, one.objective_bpb, one.tokens) == (2, 1.75, 5)


def test_the_command_line_shows_validations(data, tmp_path, capsys):
    words = ["train", str(data), "--out", str(tmp_path / "run"), "--preset", "tiny", "--steps", "6", "--layers", "1"]
    words += ["--batch", "2", "--no-compile", "--sequence-length", "16", "--device", "cpu"]
    assert main(words) == 0
    shown = capsys.readouterr()
    made = validations(tmp_path / "run")
    assert f"{made[-1]['val_nelbo_bpb']:.4f} bits/byte (NELBO), {made[-1]['val_causal_bpb']:.4f} (causal)" in shown.out
    console = Display(every=0.0)
    console.training(Progress("", 0.5, 1.0, {**made[0], "seconds_left": 1.0}))
    line = f"validation {made[0]['val_nelbo_bpb']:.3f}, causal {made[0]['val_causal_bpb']:.3f}"
    assert line in capsys.readouterr().err
    row = {**rows(tmp_path / "run")[0], "val_nelbo_bpb": None, "seconds_left": 1.0}
    console.training(Progress("", 0.6, 1.0, row))
    assert line in capsys.readouterr().err, "the last figures stay on the line"
