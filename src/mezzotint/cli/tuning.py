"""From texts to a model for them in one command: `tune`.

Knows what comes after what, and when a model's tokenizer suits a text; not how anything is done.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mezzotint.cli.arguments import DEFAULT_MODEL, add_out, add_ruled, describe
from mezzotint.cli.console import Display, emit, table
from mezzotint.cli.inputs import load_model
from mezzotint.cli.scoring import score_by
from mezzotint.cli.streams import output_file, to_standard
from mezzotint.config import ModelConfig, TrainConfig, fine_tuning
from mezzotint.errors import ConfigError, DataError, Interrupted

if TYPE_CHECKING:
    from mezzotint.network.model import Model
    from mezzotint.scoring.statistics import Estimate

HELD_OUT = 0.1
MOST_LOST = 0.005
"""Share of the text's bytes that a tokenizer may lose and still suit it."""
MOST_TOKENS = 1.4
"""How many times the tokens of a tokenizer made for the text one may take and still suit it."""
COMPILED_FROM = 2.0  # minutes: below, compiling takes longer than it saves
SCORED_TOKENS = 32_768


def add_tune_arguments(parser: argparse.ArgumentParser) -> None:
    describe(
        parser,
        "Prepares the texts with the model's tokenizer and trains it on them; where the tokenizer does not suit them, "
        "a new model is trained from scratch, with a tokenizer of its own. A tenth of the texts is held out: validated "
        "on while training, and scored before and after. Data and run stay in a folder beside the file.",
    )
    parser.add_argument("sources", nargs="+", metavar="TEXTS", help="files and folders, as `prepare` takes them")
    add_out(parser, "MODEL.mzt", "file to write (-: standard output, with --work)")
    add_ruled(parser, "--minutes", "training time [3]", default=3.0)
    parser.add_argument("--model", type=Path, metavar="MODEL", help=f"to start from [the shipped {DEFAULT_MODEL}]")
    parser.add_argument("--work", type=Path, metavar="DIR", help="new folder for data and run [MODEL.work]")
    parser.add_argument("--text-field", default="text", metavar="A.B", help="column or JSON key of the text [text]")


def run_tune(arguments: argparse.Namespace, display: Display) -> None:
    if to_standard(arguments) and arguments.work is None:
        raise ConfigError("with --out - data and run need a folder of their own: name it with --work")
    work: Path = arguments.work or arguments.out.with_suffix(".work")
    _check(arguments, work)
    with output_file(arguments.out) as out:
        _tune(arguments, out, work, display)


def _tune(arguments: argparse.Namespace, out: Path, work: Path, display: Display) -> None:
    """All of the command, once it is known where it writes: the file `out`, data and run below `work`."""
    from mezzotint.data.sources import files_in_words
    from mezzotint.distributed import choose_device
    from mezzotint.packing.artifact import open_artifact
    from mezzotint.packing.pack import pack
    from mezzotint.training.automatic import automatic
    from mezzotint.training.checkpoint import load_run

    started = time.monotonic()
    step = display.steps()
    model = load_model(arguments.model)
    name = str(arguments.model or DEFAULT_MODEL)
    step("preparing the texts")
    why, prepared = _prepare(arguments, work, model)
    step(f"scoring {name} on the held-out tenth")
    before = _scores(model, work / "data", display)
    if why:
        step(f"training from scratch: {name} does not suit these texts, for {why}")
        data = work / "own"
        tokens, length = prepared["train"]["tokens"], TrainConfig(minutes=arguments.minutes)
        chosen = automatic(tokens, prepared["vocab_size"], length, choose_device("auto").type)
        shape, config = chosen.model, chosen.train
    else:
        step(f"fine-tuning {name}, whose tokenizer suits these texts")
        data, shape, config = work / "data", model.config, fine_tuning(model.info.get("train"))
    config = dataclasses.replace(config, minutes=arguments.minutes, compile=arguments.minutes >= COMPILED_FROM)
    trained = _train(data, work / "run", shape, config, None if why else model, display)
    step("packing and verifying")
    packed = pack(load_run(work / "run"), _train_text(data), out)
    step("scoring the packed model")
    after = _scores(open_artifact(out), data, display)
    step("done")
    result = {
        "method": "from scratch" if why else "fine-tuned",
        "from": name,
        "why": why or "its tokenizer suits the texts",
        "prepare": prepared,
        "train": trained,
        "pack": packed,
        "before": [e.to_dict() for e in before],
        "after": [e.to_dict() for e in after],
        "seconds": time.monotonic() - started,
    }
    if arguments.json:
        return emit(arguments, result)
    rows = [(part, e.method, e.kind, f"{e.bpb:.4f}", f"{e.stderr_bpb:.4f}")
            for part, scores in ((f"before ({name})", before), (f"after ({arguments.out})", after)) for e in scores]  # fmt: skip
    columns = [("held-out tenth", "left"), ("method", "left"), ("kind", "left"), ("bits/byte", "right"),
               ("± s.e.", "right")]  # fmt: skip
    title = f"{result['method']}: {packed['artifact_bytes']:,} bytes in {arguments.out}"
    table(title, columns, rows, stderr=to_standard(arguments))
    print(files_in_words(prepared["files"]), file=sys.stderr if to_standard(arguments) else sys.stdout)


def _check(arguments: argparse.Namespace, work: Path) -> None:
    """Raise ConfigError for what would fail only after minutes."""
    if "-" in arguments.sources:
        raise ConfigError("the texts are read twice, standard input only once: name files")
    if not arguments.out.parent.is_dir():
        raise ConfigError(f"{arguments.out.parent}: no such folder to write {arguments.out.name} to")
    if work.exists():
        raise ConfigError(f"{work} is there already: name another folder with --work, or remove it")


def _prepare(arguments: argparse.Namespace, work: Path, model: Model) -> tuple[str, dict[str, Any]]:
    """The texts as data/ with the model's tokenizer, and as own/ with one made for them; the same tenth is held out.

    Returns why the model's tokenizer does not suit them, empty where it does, and the account of the one that is used.
    """
    from mezzotint.data.prepare import prepare

    options: dict[str, Any] = {"val_fraction": HELD_OUT, "text_field": arguments.text_field}
    theirs = prepare(arguments.sources, work / "data", tokenizer=model.tokenizer, **options)
    try:
        own = prepare(arguments.sources, work / "own", **options)
    except DataError:  # too little text for a tokenizer of its own
        return "", theirs
    why = unsuited(theirs, own)
    return why, own if why else theirs


def unsuited(theirs: dict[str, Any], own: dict[str, Any]) -> str:
    """Why a tokenizer does not suit a text; empty if it does. Both are what `prepare` returns, own of one made for it."""
    lost = theirs["train"]["lost_bytes"] / theirs["train"]["bytes"]
    if lost > MOST_LOST:
        return f"its tokenizer loses {lost:.1%} of their bytes"
    times = own["bytes_per_token"] / theirs["bytes_per_token"]
    if times > MOST_TOKENS:
        return f"its tokenizer takes {times:.1f} times the tokens of one made for them"
    return ""


def _train_text(data: Path) -> Any:
    from mezzotint.data.dataset import Dataset

    return Dataset.open(data).split("train")


def _train(
    data: Path, run: Path, shape: ModelConfig, config: TrainConfig, init: Model | None, display: Display
) -> dict[str, Any]:
    from mezzotint.training.run import train

    say: Callable[[str], None] = display.say
    try:
        return train(data, run, model=shape, config=config, init=init, progress=display.training, warn=say)
    except Interrupted as error:
        raise Interrupted(
            f"stopped; `mezzotint train {data} --out {run} --resume` goes on, and `mezzotint pack {run}` packs what "
            "there is"
        ) from error
    finally:
        display.close()


def _scores(model: Model, data: Path, display: Display) -> list[Estimate]:
    """NELBO and, where next tokens were learnt, causal code length on the held-out tenth."""
    from mezzotint.data.dataset import Dataset

    windows = Dataset.open(data).split("val").windows(model.config.sequence_length)
    methods = ("nelbo", "causal") if model.trained_causally else ("nelbo",)
    options = {"tokens": SCORED_TOKENS, "repeats": 4, "seed": 0}
    found = [score_by(method, model, windows, options, display) for method in methods]
    display.close()
    return found
