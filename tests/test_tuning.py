"""Runs that start from a model's weights, and the command `tune`."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from corpus import validations

import mezzotint
from mezzotint.cli import tuning
from mezzotint.cli.main import build_parser, main
from mezzotint.cli.training import train_configs
from mezzotint.config import TrainConfig, fine_tuning
from mezzotint.data.dataset import Dataset
from mezzotint.errors import ConfigError, DataError
from mezzotint.training.automatic import DROPOUT
from mezzotint.training.checkpoint import best_step, load_run
from mezzotint.training.run import train

STILL = TrainConfig(
    steps=2, batch=4, compile=False, matrix_lr=0.0, embedding_lr=0.0, scalar_lr=0.0, weight_decay=0.0, device="cpu"
)  # fmt: skip


def test_a_run_starts_from_a_models_weights(trained, tmp_path):
    """Of an artifact and of a run; with rates of 0 they are what it ends with, and the first loss is theirs."""
    for name in (trained.artifact, trained.run):
        model = mezzotint.load(name)
        run = tmp_path / Path(name).name
        train(trained.data, run, model=model.config, config=STILL, init=model)
        after = load_run(run).network.state_dict()
        assert all(torch.equal(after[k], v) for k, v in model.network.state_dict().items())
        described = json.loads((run / "config.json").read_text())
        assert described["init"] == {"sha256": model.sha256, "steps": model.info["steps"]}
        train(trained.data, run, model=model.config, config=dataclasses.replace(STILL, steps=3), resume=True)
        assert json.loads((run / "config.json").read_text())["init"] == described["init"]


def test_a_run_that_makes_a_model_worse_keeps_it_as_the_best(trained, tmp_path):
    """The first step, at a thousandth of the rates, is validated; a run of new weights waits for its first tenth."""
    model = mezzotint.load(trained.artifact)
    rates = {"matrix_lr": 1.0, "embedding_lr": 1.0, "scalar_lr": 0.1, "warmup": 1.0, "warmdown": 0.0}
    harsh = dataclasses.replace(STILL, steps=30, **rates)
    still = train(trained.data, tmp_path / "still", model=model.config, config=STILL, init=model)
    worse = train(trained.data, tmp_path / "worse", model=model.config, config=harsh, init=model)
    assert worse["best"]["step"] == best_step(tmp_path / "worse") == 1
    assert abs(worse["best"]["val_nelbo_bpb"] - still["val_nelbo_bpb"]) < 0.01
    assert worse["val_nelbo_bpb"] - still["val_nelbo_bpb"] > 0.01
    assert [row["step"] for row in validations(tmp_path / "worse")] == [1, *range(3, 31, 3)]
    train(trained.data, tmp_path / "new", model=model.config, config=harsh)
    assert [row["step"] for row in validations(tmp_path / "new")] == [*range(3, 31, 3)]


def test_what_cannot_be_started_from_is_said(trained, tmp_path):
    model = mezzotint.load(trained.artifact)
    with pytest.raises(ConfigError, match="another layers"):
        train(trained.data, tmp_path / "r", model=dataclasses.replace(model.config, layers=1), config=STILL, init=model)
    texts = tmp_path / "texts.txt"
    texts.write_text("copper ink press burr steel wax " * 200)
    mezzotint.prepare([texts], tmp_path / "other", vocab_size=290)
    with pytest.raises(DataError, match="another tokenizer"):
        train(tmp_path / "other", tmp_path / "r", model=model.config, config=STILL, init=model)
    assert not (tmp_path / "r").exists()


def test_fine_tuning_goes_on_with_what_was_learnt():
    config = fine_tuning({"causal_share": 0.5, "weighting": "reference", "block_size": 4, "neuron_decay": 0.95,
                          "narrow_share": 0.8, "short_share": 0.5, "matrix_lr": 0.02})  # fmt: skip
    assert (config.causal_share, config.weighting, config.block_size, config.neuron_decay) == (
        0.5,
        "reference",
        4,
        0.95,
    )
    assert config.narrow_share == config.short_share == 0.0
    assert config.matrix_lr == TrainConfig().matrix_lr / 4 and config.warmup < 0.1 and config.warmdown > 0.9
    for strange in (None, {}, [], {"causal_share": 7, "weighting": 3}):
        assert fine_tuning(strange).causal_share == 0.0


def test_the_command_line_takes_shape_and_settings_from_the_model(trained, tmp_path, capsys):
    words = ["train", str(trained.data), "--out", str(tmp_path / "run"), "--init", str(trained.artifact)]
    words += ["--steps", "3", "--batch", "4", "--no-compile"]
    model = mezzotint.load(trained.artifact)
    tokenizer = Dataset.open(trained.data).tokenizer
    shape, config = train_configs(build_parser().parse_args(words), tokenizer, model)
    assert shape == model.config and config.matrix_lr == fine_tuning({}).matrix_lr and config.steps == 3
    assert main([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["steps"] == 3
    for more, said in ((["--preset", "tiny"], "--init"), (["--resume"], "--init"), (["--layers", "5"], "layers")):
        assert main([*words[:3], str(tmp_path / "other"), *words[4:], *more]) == 2
        shown = capsys.readouterr().err.strip().splitlines()
        assert said in shown[-1]


@pytest.fixture
def texts(tmp_path) -> Path:
    folder = tmp_path / "texts"
    folder.mkdir()
    for i in range(20):
        (folder / f"{i}.txt").write_text("until the burnisher drew the old light out of a dark plate " * 12)
    return folder


def test_tune_fine_tunes_packs_and_compares(trained, tmp_path, texts, capsys, monkeypatch):
    monkeypatch.setattr(tuning, "fine_tuning", lambda known: dataclasses.replace(fine_tuning(known), steps=100))
    words = ["tune", str(texts), "--out", str(tmp_path / "mine.mzt"), "--model", str(trained.artifact)]
    assert main([*words, "--minutes", "0.05", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["method"] == "fine-tuned" and result["train"]["val_nelbo_bpb"] is not None
    assert result["prepare"]["val"]["documents"] == 2
    before, after = (result[part][0] for part in ("before", "after"))
    assert before["bytes"] == after["bytes"] and after["bpb"] < before["bpb"]  # one sentence, again and again
    mine = mezzotint.load(tmp_path / "mine.mzt")
    assert mine.tokenizer.sha256 == mezzotint.load(trained.artifact).tokenizer.sha256
    assert main([*words, "--minutes", "0.05"]) == 2
    assert "mine.work is there already" in capsys.readouterr().err


def test_tune_writes_to_standard_output_and_says_its_words_elsewhere(
    trained, tmp_path, texts, capfdbinary, monkeypatch
):
    monkeypatch.setattr(tuning, "fine_tuning", lambda known: dataclasses.replace(fine_tuning(known), steps=2))
    words = ["tune", str(texts), "--out", "-", "--model", str(trained.artifact), "--minutes", "0.05"]
    assert main(words) == 2
    assert b"name it with --work" in capfdbinary.readouterr().err
    assert main([*words, "--work", str(tmp_path / "work")]) == 0
    shown = capfdbinary.readouterr()
    (tmp_path / "mine.mzt").write_bytes(shown.out)
    assert mezzotint.load(tmp_path / "mine.mzt").tokenizer.sha256 == mezzotint.load(trained.artifact).tokenizer.sha256
    assert b"fine-tuned: " in shown.err and b"files read: 20;" in shown.err and (tmp_path / "work" / "run").is_dir()


def test_tune_starts_from_scratch_where_the_tokenizer_does_not_suit(trained, tmp_path, texts, capsys):
    for path in texts.iterdir():
        path.write_text("старая медная пластина была тёмной пока гладилка не вывела свет " * 12)
    words = ["tune", str(texts), "--out", str(tmp_path / "mine.mzt"), "--model", str(trained.artifact)]
    assert main([*words, "--minutes", "0.02"]) == 0
    shown = capsys.readouterr()
    assert "from scratch" in shown.out and "times the tokens of one made for them" in shown.err
    assert "files read: 20; skipped: none; empty documents: 0" in shown.out
    made = mezzotint.load(tmp_path / "mine.mzt")
    assert made.config.vocab_size != 290
    assert made.config.width == mezzotint.preset("small").model.width and made.info["train"]["dropout"] == DROPOUT


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["-"], "standard input"),
        (["x.txt", "--minutes", "0"], "--minutes"),
        (["x.txt", "--minutes", "nan"], "--minutes"),
    ],
)
def test_tune_refuses_at_once_what_cannot_be(tmp_path, capsys, words, said):
    assert main(["tune", *words, "--out", str(tmp_path / "m.mzt")]) == 2
    assert said in capsys.readouterr().err
    assert main(["tune", "x.txt", "--out", str(tmp_path / "none" / "m.mzt")]) == 2
    assert "no such folder" in capsys.readouterr().err


def test_what_suits_a_text():
    theirs = {"train": {"lost_bytes": 0, "bytes": 1000}, "bytes_per_token": 3.0}
    assert tuning.unsuited(theirs, {"bytes_per_token": 4.0}) == ""
    assert "1.5 times the tokens" in tuning.unsuited(theirs, {"bytes_per_token": 4.5})
    assert "loses 2.0%" in tuning.unsuited(
        {**theirs, "train": {"lost_bytes": 20, "bytes": 1000}}, {"bytes_per_token": 3}
    )
