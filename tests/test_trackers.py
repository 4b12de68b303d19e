"""Trackers: the real libraries, each writing into the run folder; skipped where one is not installed."""

from __future__ import annotations

import dataclasses
import json
import sqlite3
from pathlib import Path

import pytest

from mezzotint.config import ModelConfig, TrainConfig
from mezzotint.errors import ConfigError
from mezzotint.integrations import trackers
from mezzotint.training.run import train

SHAPE = ModelConfig(vocab_size=290, sequence_length=32, layers=1, width=16, heads=2, kv_heads=2)
CONFIG = TrainConfig(steps=4, batch=2, compile=False, log_every=0.0, dtype="float32", device="cpu")


@pytest.fixture(autouse=True)
def no_services(monkeypatch):
    for name in ("WANDB_MODE", "WANDB_PROJECT", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)


def tracked(trained, run: Path, name: str) -> list[dict]:
    """Rows of metrics.jsonl of a run that the tracker watched."""
    train(trained.data, run, model=SHAPE, config=dataclasses.replace(CONFIG, track=name))
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_figures_are_numbers_with_a_meaning():
    row = {"step": 3, "tokens": 9, "seconds": 1.0, "loss": 2.0, "train_causal_bpb": None, "val_tokens": 7}
    assert trackers.figures(row) == {"loss": 2.0}


def test_a_tracker_that_is_not_installed_is_named(trained, tmp_path, monkeypatch):
    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr(trackers.importlib, "import_module", missing)
    for name in trackers.TRACKERS:
        with pytest.raises(ConfigError, match=rf"mezzotint\[{name}\]"):
            trackers.tracker(name, tmp_path, {})


def test_wandb_offline(trained, tmp_path):
    wandb = pytest.importorskip("wandb")
    tracked(trained, tmp_path / "run", "wandb")
    wandb.teardown()  # its process has then written all
    (log,) = (tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb")
    content = log.read_bytes()
    assert [name for name in (b"val_nelbo_bpb", b"train_nelbo_bpb", b"matrix_lr") if name not in content] == []


def test_mlflow_in_a_file(trained, tmp_path):
    mlflow = pytest.importorskip("mlflow")
    rows = tracked(trained, tmp_path / "run", "mlflow")
    client = mlflow.MlflowClient(tracking_uri=(tmp_path / "run" / "mlruns").as_uri())
    (run,) = client.search_runs([client.get_experiment_by_name("mezzotint").experiment_id])
    history = client.get_metric_history(run.info.run_id, "loss")
    assert [(m.step, m.value) for m in history] == [(row["step"], row["loss"]) for row in rows]
    assert run.data.params["matrix_lr"] == str(CONFIG.matrix_lr) and run.info.status == "FINISHED"


def test_trackio_in_a_folder(trained, tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "run" / "trackio"))
    pytest.importorskip("trackio")
    rows = tracked(trained, tmp_path / "run", "trackio")
    (path,) = (tmp_path / "run" / "trackio").glob("mezzotint*.db")
    with sqlite3.connect(path) as database:
        found = database.execute("select step, metrics from metrics order by step").fetchall()
    assert [(step, json.loads(text)["loss"]) for step, text in found] == [(row["step"], row["loss"]) for row in rows]
