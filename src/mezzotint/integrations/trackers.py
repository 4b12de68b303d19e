"""Experiment trackers as listeners of a run: Trackio, Weights & Biases, MLflow; each needs an extra.

All write into the run folder and send nothing, unless the tracker's own environment variable says where to. Knows how to hand
rows on, not what is in them.
"""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import Any

from mezzotint.errors import ConfigError
from mezzotint.training.listeners import Listener, Step

NOT_FIGURES = ("step", "tokens", "seconds", "val_tokens")


def figures(row: dict[str, Any]) -> dict[str, float]:
    """What a tracker draws of a row of metrics.jsonl."""
    return {key: value for key, value in row.items() if key not in NOT_FIGURES and value is not None}


def _library(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(f"{name} is not installed: pip install 'mezzotint[{name}]'") from error


class Tracker(Listener):
    """Every figure of every row, at its step. Raises ConfigError where the library is not installed.

    folder: the run's; what the tracker writes goes into it. settings: of the run, flat.
    """

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        raise NotImplementedError

    def log(self, values: dict[str, float], step: int) -> None:
        """Hand on the figures of a step."""
        raise NotImplementedError

    def on_step(self, step: Step) -> None:
        if step.row is not None:
            self.log(figures(step.row), step.row["step"])

    on_end = on_step


class Wandb(Tracker):
    """Weights & Biases, in RUN/wandb; WANDB_MODE=online sends it."""

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        mode: Any = os.environ.get("WANDB_MODE", "offline")
        options: dict[str, Any] = {"project": os.environ.get("WANDB_PROJECT", "mezzotint"), "name": folder.name}
        self.run = _library("wandb").init(dir=str(folder), mode=mode, config=settings, **options)

    def log(self, values: dict[str, float], step: int) -> None:
        self.run.log(values, step=step)

    def close(self) -> None:
        self.run.finish()


class Trackio(Tracker):
    """Trackio, in RUN/trackio, or where TRACKIO_DIR says."""

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        os.environ.setdefault("TRACKIO_DIR", str(folder / "trackio"))  # read when it is imported
        self.library = _library("trackio")
        self.run = self.library.init(project="mezzotint", name=folder.name, config=settings, resume="allow")

    def log(self, values: dict[str, float], step: int) -> None:
        self.run.log(values, step=step)

    def close(self) -> None:
        self.run.finish()


class MLflow(Tracker):
    """MLflow, in RUN/mlruns, or where MLFLOW_TRACKING_URI says."""

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # files need no database packages
        library = _library("mlflow")
        uri = os.environ.get("MLFLOW_TRACKING_URI", (folder / "mlruns").resolve().as_uri())
        self.client = library.MlflowClient(tracking_uri=uri)
        known = self.client.get_experiment_by_name("mezzotint")
        experiment = known.experiment_id if known else self.client.create_experiment("mezzotint")
        self.run = self.client.create_run(experiment, run_name=folder.name).info.run_id
        for name, value in settings.items():
            self.client.log_param(self.run, name, value)

    def log(self, values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            self.client.log_metric(self.run, name, value, step=step)

    def close(self) -> None:
        self.client.set_terminated(self.run)


TRACKERS: dict[str, type[Tracker]] = {"trackio": Trackio, "wandb": Wandb, "mlflow": MLflow}


def tracker(name: str, folder: Path, settings: dict[str, Any]) -> Tracker:
    """The listener called `name`."""
    return TRACKERS[name](folder, settings)
