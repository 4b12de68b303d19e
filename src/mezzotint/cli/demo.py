"""The whole way in minutes: `demo`.

Knows what comes after what, not how it is done.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mezzotint.cli.arguments import DEFAULT_MODEL, add_ruled, named
from mezzotint.cli.console import Display, emit, finite
from mezzotint.cli.packing import print_pack
from mezzotint.cli.scoring import print_scores, score_by
from mezzotint.config import preset
from mezzotint.errors import ConfigError, Interrupted
from mezzotint.files import atomic_write

if TYPE_CHECKING:
    from mezzotint.scoring.statistics import Estimate

PRESET = "tiny"
VOCAB_SIZE = 4096  # pieces; more were not tried with so short a run
DEMO_TEXT = "def ____(self, name):\n    return self.name"
SHIPPED_TEXT = "The old house stood at the end of the ____, and nobody had lived in it for years."


def add_demo_arguments(parser: argparse.ArgumentParser) -> None:
    add_ruled(parser, "--minutes", "training time; all else takes about one more [2]", default=2.0)
    parser.add_argument("--out", type=named, default=Path("demo"), metavar="DIR", help="folder for all files [demo]")


def run_demo(arguments: argparse.Namespace, display: Display) -> None:
    out: Path = arguments.out
    mark = _own_folder(out)
    started = time.monotonic()
    step = display.steps()
    result: dict[str, Any] = {"shipped": fill_with_pretrained(step)}
    try:
        result |= _train_and_pack(out, arguments.minutes, step, display)
    except Interrupted as stop:  # its own advice is for `train`
        raise Interrupted(f"stopped; `mezzotint demo --out {out}` starts again from the beginning") from stop
    estimates, shown = _look_at(out, step, display)
    step("done")
    result |= {**shown, "seconds": time.monotonic() - started}
    names = ("prepare", "train", "pack", "score", "sample", "fill", "shipped", "report", "seconds")
    result = {name: result[name] for name in names}
    atomic_write(mark, json.dumps({"finished": True, **finite(result)}, indent=1))
    if arguments.json:
        return emit(arguments, result)
    print_pack(arguments, out / "model.mzt", result["pack"])
    print_scores(estimates)
    _print_texts(result)
    print(f"\nreport: {result['report']['file']}   artifact: {out / 'model.mzt'}   all in {result['seconds']:.0f} s")


def _own_folder(out: Path) -> Path:
    """The folder, without an earlier demo's data; returns the file that marks it. Raises ConfigError if it is not ours."""
    mark = out / "demo.json"
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not mark.is_file())):
        raise ConfigError(f"{out} already holds other files; name another folder with --out, or remove it")
    for old in ("data", "run"):  # an earlier demo's, as the mark says
        shutil.rmtree(out / old, ignore_errors=True)
    out.mkdir(parents=True, exist_ok=True)
    atomic_write(mark, json.dumps({"finished": False}))
    return mark


def fill_with_pretrained(step: Callable[[str], None]) -> dict[str, str] | None:
    """What the shipped model makes of a sentence with a gap; None in an installation without it."""
    from mezzotint.pretrained import load, pretrained_models
    from mezzotint.sampling.infill import fill

    if DEFAULT_MODEL not in pretrained_models():
        return None
    step(f"the shipped model, {DEFAULT_MODEL}, fills a gap: {SHIPPED_TEXT}")
    text = fill(load(), SHIPPED_TEXT, seed=0)
    step(text)
    return {"model": DEFAULT_MODEL, "text": text}


def _train_and_pack(out: Path, minutes: float, step: Callable[[str], None], display: Display) -> dict[str, Any]:
    """data/, run/ and model.mzt in the folder; returns what `prepare`, `train` and `pack` did."""
    from mezzotint.data.dataset import Dataset
    from mezzotint.data.prepare import prepare
    from mezzotint.packing.pack import pack
    from mezzotint.training.checkpoint import load_run
    from mezzotint.training.run import train

    step("preparing this Python's library sources, and a tokenizer for them")
    prepared = prepare(["stdlib"], out / "data", vocab_size=VOCAB_SIZE)
    chosen = preset(PRESET)
    step(f"training {minutes:g} minutes")
    trained = train(
        out / "data",
        out / "run",
        model=dataclasses.replace(chosen.model, vocab_size=prepared["vocab_size"]),
        # Compiling takes longer than it saves in a run of minutes.
        config=dataclasses.replace(chosen.train, minutes=minutes, compile=False),
        progress=display.training,
        warn=display.say,
    )
    step("packing and verifying")
    packed = pack(load_run(out / "run"), Dataset.open(out / "data").split("train"), out / "model.mzt")
    return {"prepare": prepared, "train": trained, "pack": packed}


def _look_at(out: Path, step: Callable[[str], None], display: Display) -> tuple[list[Estimate], dict[str, Any]]:
    """The artifact's figures and texts, and the run's report."""
    from mezzotint.apps.report import report
    from mezzotint.data.dataset import Dataset
    from mezzotint.packing.artifact import open_artifact
    from mezzotint.sampling.generate import sample
    from mezzotint.sampling.infill import fill

    dataset, model = Dataset.open(out / "data"), open_artifact(out / "model.mzt")
    windows = dataset.split("val").windows(model.config.sequence_length)
    step("scoring the artifact")
    plan = [("nelbo", 32_768), ("chain", 2_048), ("causal", 32_768), ("reconstruction", 16_384)]
    if not preset(PRESET).train.causal_share:
        plan.remove(("causal", 32_768))
    estimates = [
        score_by(method, model, windows, {"tokens": tokens, "repeats": 8, "seed": 0}, display)
        for method, tokens in plan
    ]
    step("sampling and filling")
    drawn = sample(model, 2, 64, seed=0)
    filled = fill(model, DEMO_TEXT, seed=0)
    step("writing the report")
    options = {"artifact": out / "model.mzt", "dataset": dataset, "estimates": estimates, "tokens": 16_384}
    return estimates, {
        "score": {"results": [e.to_dict() for e in estimates], "model_sha256": model.sha256},
        "sample": drawn.to_dict(),
        "fill": {"text": filled},
        "report": report(out / "run", out / "report.html", samples=2, **options),
    }


def _print_texts(result: dict[str, Any]) -> None:
    if shown := result["shipped"]:
        print(
            f"a gap filled by the shipped model, {shown['model']}:\n  | {SHIPPED_TEXT}\nbecomes\n  | {shown['text']}\n"
        )
    print("two texts from nothing:")
    for text in result["sample"]["texts"]:
        print("  | " + text.replace("\n", "\n  | "))
    print(f"\na gap filled:\n  | {DEMO_TEXT}".replace("\n    ", "\n  |     "))
    print(f"becomes\n  | {result['fill']['text']}".replace("\n    ", "\n  |     "))
