"""What a command works on: a model, data or text by the words that name it.

Knows where things lie, not what is done with them.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

from mezzotint.cli.streams import input_file
from mezzotint.errors import ConfigError, DataError

if TYPE_CHECKING:
    from mezzotint.data.dataset import Dataset, Windows
    from mezzotint.data.sources import Account
    from mezzotint.network.model import Model


def load_model(path: Path | None, arguments: argparse.Namespace | None = None) -> Model:
    """What `pretrained.load` loads, or for `-` an artifact from standard input; the default one if None.

    arguments: of a command that takes models of transformers as well, with the options for them.
    """
    from mezzotint.pretrained import is_foreign, load

    foreign = path is not None and is_foreign(path)
    if arguments is None and foreign:
        takers = "score, compare, sample, fill and serve"
        raise ConfigError(f"{path} is a model of transformers: of the commands {takers} take such")
    with contextlib.nullcontext() if path is None else input_file(path) as file:
        if arguments is None:
            return load(file)
        # With two models the options are for the one of transformers.
        objective = arguments.objective if foreign or not hasattr(arguments, "b") else None
        return load(file, objective=objective, trust_remote_code=arguments.trust_remote_code)


def run_data(run: Path, given: Path | None, needed: str | None) -> Dataset | None:
    """The data given, else the data the run was trained on. `needed`: what for, if it must be there. Raises DataError."""
    from mezzotint.data.dataset import Dataset
    from mezzotint.data.tokenizer import check_same_tokenizer
    from mezzotint.training.checkpoint import read_run

    run_config = read_run(run)
    folder = given or Path(run_config.get("data_folder") or "")
    if given is None and (not run_config.get("data_folder") or not folder.is_dir()):
        if needed:
            raise DataError(f"the data that {run} was trained on is not at {folder}: name it with --data for {needed}")
        return None
    dataset = Dataset.open(folder)
    check_same_tokenizer(run_config["data"]["tokenizer_sha256"], dataset, run, folder)
    return dataset


def is_data(sources: Sequence[Path]) -> bool:
    """Whether what is to be scored is a prepared folder (or published shards) rather than text."""
    folder = sources[0]
    return len(sources) == 1 and folder.is_dir() and ((folder / "data.json").exists() or any(folder.glob("*.bin")))


def scored_windows(model: Model, arguments: argparse.Namespace, account: Account | None = None) -> Windows:
    """Windows of a prepared folder's split, or of text, a document at a time; account: see `scored_texts`."""
    length = model.config.sequence_length
    stride = getattr(arguments, "stride", None)
    if is_data(arguments.data):
        from mezzotint.data.dataset import Dataset
        from mezzotint.data.tokenizer import check_same_tokenizer

        dataset = Dataset.open(arguments.data[0])
        check_same_tokenizer(model, dataset, data_name=arguments.data[0])
        return dataset.split(arguments.split).windows(length, stride)
    from mezzotint.data.texts import TextWindows

    return cast("Windows", TextWindows(scored_texts(arguments, account), model.tokenizer, length, stride))


def scored_texts(arguments: argparse.Namespace, account: Account | None = None) -> list[str]:
    """The documents that DATA|TEXT names. account: is told what was read and what was skipped."""
    from mezzotint.data.sources import documents

    found: list[str] = []
    for source in arguments.data:
        with input_file(source, ".txt") as file:
            found += documents(file, account=account)
    return found
