"""A model by what a user calls it: the name of one that came with the package, an artifact, or a folder.

Knows where models lie, not what is in them. The shipped ones are package data, `models/NAME.mzt`.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.resources
import json
from collections.abc import Iterator
from pathlib import Path

from mezzotint.data.tokenizer import Tokenizer
from mezzotint.errors import CheckpointError, ConfigError
from mezzotint.extras import extra
from mezzotint.network.model import Model
from mezzotint.packing import safetensors
from mezzotint.packing.artifact import MAGIC, open_artifact
from mezzotint.training.checkpoint import load_run, split_run

DEFAULT = "prose"


def pretrained_models() -> list[str]:
    """Names of the models that came with this installation."""
    folder = importlib.resources.files("mezzotint").joinpath("models")
    if not folder.is_dir():
        return []
    return sorted(item.name.removesuffix(".mzt") for item in folder.iterdir() if item.name.endswith(".mzt"))


@contextlib.contextmanager
def pretrained_file(name: str) -> Iterator[Path]:
    """The artifact of a shipped model, as a file for as long as the context lasts. Raises CheckpointError."""
    known_models = pretrained_models()
    if name not in known_models:
        known = ", ".join(known_models) or "none in this installation"
        raise CheckpointError(
            f"{name} does not exist; name a .mzt artifact, a run folder or a shipped model (shipped: {known})"
        )
    item = importlib.resources.files("mezzotint").joinpath("models").joinpath(f"{name}.mzt")
    with importlib.resources.as_file(item) as path:
        yield path


def is_foreign(name: str | Path) -> bool:
    """Whether `name` is a model of transformers: `hf:OWNER/NAME`, or a folder that it saved."""
    if str(name).startswith("hf:"):
        return True
    try:
        found = json.loads((Path(name) / "config.json").read_text("utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and "architectures" in found and "mezzotint_version" not in found


def load(model: str | Path | None = None, *, objective: str | None = None, trust_remote_code: bool = False) -> Model:
    """The model called `model`, on the CPU: a shipped one's name, a `.mzt` file, a run folder (RUN for its best checkpoint
    if validation ran, else its newest; RUN@last, RUN@STEP), an exported folder, or a model of transformers: a folder of
    it, or `hf:OWNER/NAME` on the Hub. objective, trust_remote_code: of the last alone, see
    `integrations.transformers.load_transformers`.

    A file or folder with a model that is there wins over a shipped model of the same name; None is always the shipped
    `prose`. Raises CheckpointError, ArtifactError or ConfigError.
    """
    if model is not None and is_foreign(model):
        # By name: an extra of a floor above, loaded only where it is asked for.
        foreign = extra("transformers")
        return foreign.load_transformers(model, objective, trust_remote_code=trust_remote_code)
    if objective is not None:
        raise ConfigError("an objective is that of a model of transformers: this package's models know their own")
    if model is None:
        with pretrained_file(DEFAULT) as file:
            return open_artifact(file)
    path = Path(model)
    if safetensors.is_exported(path):
        return safetensors.import_folder(path)
    if path.is_file():
        return open_artifact(path)
    if (split_run(path)[0] / "config.json").is_file():
        return load_run(path)
    if path.is_dir() and str(model) not in pretrained_models():
        return load_run(path)  # says what the folder lacks
    with pretrained_file(str(model)) as file:
        return open_artifact(file)


def tokenizer_of(name: str | Path) -> Tokenizer:
    """The tokenizer in a tokenizer's own file, in a folder that holds one (a run, an exported model), or of a model (`load`).

    Raises DataError, CheckpointError or ArtifactError.
    """
    path = Path(name)
    if path.is_dir() or path.suffix in (".model", ".json"):
        return Tokenizer.load(path)
    if path.is_file():
        with path.open("rb") as file:
            packed = file.read(len(MAGIC)) == MAGIC
        return open_artifact(path).tokenizer if packed else Tokenizer.load(path)
    return load(name).tokenizer
