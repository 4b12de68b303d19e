"""What `--preset auto` chooses: larger for longer runs, dropout for text that is read often."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math

import pytest

from mezzotint.cli.main import main
from mezzotint.config import TrainConfig, preset
from mezzotint.network.model import Denoiser, count_parameters
from mezzotint.training import automatic as automatic_module
from mezzotint.training.automatic import DROPOUT, MOST_READINGS, MOST_TOKENS, READ_OFTEN, SHAPES, automatic, sized
from mezzotint.training.checkpoint import read_run

TOKENS_A_STEP = preset("small").train.batch * preset("small").model.sequence_length


def run(minutes: float = 5.0, steps: int = 0) -> TrainConfig:
    return TrainConfig(minutes=minutes, steps=steps)


def test_five_minutes_of_a_processor_are_small():
    found = automatic(10**8, 4096, run())
    assert found.model == dataclasses.replace(preset("small").model, vocab_size=4096)
    assert found.train == preset("small").train and found.train.sampled_share > 0
    assert automatic(10**8, 4096, run(), "cuda").train.sampled_share == 0


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_longer_runs_are_never_narrower_and_come_to_every_shape(device):
    lengths = [2.0**n for n in range(-10, 16)]
    widths = [automatic(10**9, 4096, run(minutes), device).model.width for minutes in lengths]
    assert widths == sorted(widths) and set(widths) == {shape.width for shape in SHAPES}


def test_a_quicker_device_and_a_smaller_vocabulary_go_further_in_the_same_time():
    assert automatic(0, 4096, run(), "cuda").model.width > automatic(0, 4096, run(), "cpu").model.width
    wide = [automatic(0, pieces, run(20.0)).model.width for pieces in (16_384, 1024)]
    assert wide[0] < wide[1]


def test_a_sampled_softmax_reads_as_often_as_it_did_when_it_was_timed():
    # `small` with 16,384 pieces read 17.2 million tokens in 20 minutes, on a processor that read two thirds of what
    # PRODUCTS_A_SECOND says (records/2026-11-28_sampled): a text of a million is read often, and so has dropout.
    assert automatic(1_000_000, 16_384, run(20.0)).train.dropout == DROPOUT
    assert automatic(2_000_000, 16_384, run(20.0)).train.dropout == 0
    assert automatic(1_000_000, 16_384, run(20.0)).model.width == SHAPES[0].width


@pytest.mark.parametrize(("shorter", "longer"), itertools.pairwise(SHAPES))
def test_by_steps_a_shape_is_taken_from_its_tokens_on(shorter, longer):
    steps = -(-longer.least_tokens // TOKENS_A_STEP)
    assert automatic(0, 4096, run(steps=int(steps))).model.width == longer.width
    assert automatic(0, 4096, run(steps=int(steps) - 1)).model.width == shorter.width


def test_dropout_is_for_text_that_is_read_often():
    tokens = 1000 * TOKENS_A_STEP
    assert automatic(int(tokens / READ_OFTEN), 4096, run(steps=1000)).train.dropout == DROPOUT
    assert automatic(int(tokens / READ_OFTEN) + 1, 4096, run(steps=1000)).train.dropout == 0
    assert automatic(0, 4096, run(steps=1000)).train.dropout == 0
    twice = automatic(int(2 * tokens / READ_OFTEN), 4096, run(steps=1000), batch=32).train
    assert twice.dropout == DROPOUT and twice.batch == 32


def test_minutes_end_when_the_text_is_read_often_enough():
    long = automatic(400_000, 4096, run(60.0))
    assert long.train.steps == math.ceil(MOST_READINGS * 400_000 / TOKENS_A_STEP) and long.train.dropout == DROPOUT
    assert long.model.width == automatic(400_000, 4096, run(steps=long.train.steps)).model.width == SHAPES[0].width
    assert automatic(400_000, 4096, run(5.0)).train.steps == 0  # too few minutes, though the text would be read often
    assert automatic(0, 4096, run(60.0)).train.steps == automatic(400_000, 4096, run(60.0), "cuda").train.steps == 0
    assert automatic(50, 4096, run(60.0)).train.steps == math.ceil(MOST_TOKENS / TOKENS_A_STEP)
    assert automatic(400_000, 4096, run(60.0), batch=32).train.steps == math.ceil(long.train.steps / 2)


def test_the_command_bounds_minutes_by_readings_and_not_steps(trained, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(automatic_module, "MOST_TOKENS", 2)
    monkeypatch.setattr(automatic_module, "MOST_READINGS", 1e-9)
    words = ["train", str(trained.data), "--preset", "auto", "--no-compile", "--width", "32", "--sequence-length", "16"]
    words += ["--batch", "2", "--json"]
    assert main([*words, "--minutes", "1", "--out", str(tmp_path / "a")]) == 0
    shown = capsys.readouterr()
    assert json.loads(shown.out)["steps"] == 1 and "the run ends at step 1, when" in shown.err
    assert read_run(tmp_path / "a")["train"].steps == 1
    assert main([*words, "--steps", "3", "--out", str(tmp_path / "b")]) == 0
    shown = capsys.readouterr()
    assert json.loads(shown.out)["steps"] == 3 and "the run ends" not in shown.err


@pytest.mark.parametrize("shape", SHAPES)
def test_parameters_are_those_of_the_network(shape):
    model = sized(preset("small").model, shape.layers, shape.width, 4096)
    assert shape.parameters(4096) == pytest.approx(count_parameters(Denoiser(model)), rel=0.01)


def test_the_command_says_what_it_chose_and_options_have_the_last_word(trained, tmp_path, capsys):
    words = ["train", str(trained.data), "--preset", "auto", "--no-compile", "--steps", "2", "--width", "32"]
    words += ["--sequence-length", "16", "--out"]
    assert main([*words, str(tmp_path / "a"), "--batch", "2", "--json"]) == 0
    shown = capsys.readouterr()
    assert json.loads(shown.out)["steps"] == 2
    assert "preset auto: 3 layers x 32, 2 windows a step, dropout 0" in shown.err
    made = read_run(tmp_path / "a")
    assert made["model"].width == 32 and made["train"].batch == 2
    assert main([*words, str(tmp_path / "b"), "--init", str(trained.artifact)]) == 2
    assert "--init" in capsys.readouterr().err
