"""Likelihood after equal minutes: the reference's recipe, plain masked diffusion, autoregression, and Mezzotint's best.

    python benchmarks/quality.py DATA [DATA ...] --out DIR --text val=val.parquet --text unseen=unseen.parquet
                                 [--minutes 5] [--threads 2] [--seeds 0 1] [--recipes NAME ...] [--preset small]
                                 [--search-minutes 1] [--bytes 40000]

reference  the challenge entry's loss, optimizer settings and architecture details
mdlm       plain masked diffusion: the NELBO on masked windows, a plain transformer
ar         autoregression: the preset's trunk, every window left to right
mezzotint  the preset

All have the preset's layers, width and window. One DATA for each vocabulary, all of the same text. Rivals get the batch
and the learning rates that suit them: of `--search-minutes` each, batches of 8, 16 and 32 windows, then all rates halved
and doubled at the best of them, judged on the first text by what the recipe is trained for; `search.jsonl` keeps what
came out. 0 minutes: no search. The minutes are wall-clock on the threads that the table names, so nothing else may run
beside; a run that was stopped goes on with the minutes it has left.

Every row is scored on the same documents: of each `--text` so many, drawn once, that they hold `--bytes`. All windows of
them, in all columns; the first text chooses recipes, the others are only reported. Errors are those of the masks: the
choice of the documents, which all rows share, is not in them. Finished rows are kept in DIR/rows.jsonl.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from mezzotint.config import ModelConfig, Preset, TrainConfig, preset
from mezzotint.data.dataset import Dataset, Windows
from mezzotint.data.prepare import prepare
from mezzotint.data.sources import documents
from mezzotint.errors import DataError
from mezzotint.files import atomic_write
from mezzotint.scoring import likelihood
from mezzotint.training.checkpoint import load_run
from mezzotint.training.run import train

RECIPES = ("reference", "mdlm", "ar", "mezzotint")
METRICS = ("nelbo", "chain", "causal")
BATCHES = (8, 16, 32)
SCALES = (0.5, 2.0)


def recipes(name: str, vocab_size: int) -> dict[str, Preset]:
    """The four recipes for the trunk of preset `name`."""
    best = preset(name)
    seed = preset("reference")
    own = dataclasses.replace(best.model, vocab_size=vocab_size)
    shape = {name: getattr(own, name) for name in ("vocab_size", "sequence_length", "layers", "width")}
    halved = dataclasses.replace(seed.model, **shape, heads=4, kv_heads=2)  # two query heads to a key, as the entry
    plain = ModelConfig(**shape, heads=own.heads, kv_heads=own.kv_heads)
    few = max(1, best.train.batch // 2)
    return {
        "reference": Preset(halved, dataclasses.replace(seed.train, batch=few, weighting="reference")),
        "mdlm": Preset(plain, TrainConfig(batch=few)),
        "ar": Preset(own, dataclasses.replace(best.train, causal_share=1.0)),
        "mezzotint": Preset(own, best.train),
    }


def tuned(config: TrainConfig, batch: int, scale: float) -> TrainConfig:
    """`config` with another batch, and all learning rates times `scale`."""
    rates = {name: scale * getattr(config, name) for name in ("matrix_lr", "embedding_lr", "scalar_lr")}
    return dataclasses.replace(config, batch=batch, **rates)


def chosen_documents(source: str, size: int) -> list[str]:
    """Documents of a file or folder, drawn without looking, until they hold `size` bytes; at least one."""
    texts = list(documents(source))
    random.Random(0).shuffle(texts)
    chosen: list[str] = []
    while texts and sum(len(text.encode()) for text in chosen) < size:
        chosen.append(texts.pop())
    if not chosen:
        raise DataError(f"no text in {source}")
    return chosen


def scored_windows(name: str, source: str, data: Path, size: int, out: Path, length: int) -> Windows:
    """All windows of the chosen documents of a text, in the vocabulary of `data`."""
    folder = out / "texts" / f"{name}_{Dataset.open(data).tokenizer.sha256[:12]}"
    if not folder.exists():
        listed = out / "texts" / f"{name}.jsonl"
        listed.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(listed, "".join(json.dumps({"text": text}) + "\n" for text in chosen_documents(source, size)))
        prepare([listed], folder, tokenizer=data / "tokenizer.model", val=[listed])
    return Dataset.open(folder).split("val").windows(length)


def score(run: Path, windows: Windows, metrics: Sequence[str] = METRICS) -> dict[str, Any]:
    """NELBO and chain of what is trained on masks, causal code length of what is trained left to right."""
    model = load_run(run)
    share = model.info["train"]["causal_share"]
    figures: dict[str, Any] = {}
    if share < 1 and "nelbo" in metrics:
        figures["nelbo"] = likelihood.nelbo(model, windows, repeats=4).to_dict()
    if share < 1 and "chain" in metrics:
        figures["chain"] = likelihood.chain_rule(model, windows).to_dict()
    if share > 0 and "causal" in metrics:
        figures["causal"] = likelihood.causal(model, windows).to_dict()
    return figures


class Book:
    """Rows of a JSONL file, each made once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def find(self, key: dict[str, Any]) -> dict[str, Any] | None:
        """The row with all of `key`, if there is one."""
        return next((row for row in self.rows if all(row.get(name) == value for name, value in key.items())), None)

    def add(self, row: dict[str, Any]) -> dict[str, Any]:
        """Keep a finished row."""
        self.rows.append(row)
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        return row


def run_for(minutes: float, data: Path, recipe: Preset, run: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Train `recipe` for `minutes` on the threads asked for."""
    config = dataclasses.replace(recipe.train, minutes=minutes, steps=0, compile=not options.eager)
    return train(data, run, model=recipe.model, config=config, resume=True)


def search(
    name: str, recipe: Preset, data: Path, windows: Windows, options: argparse.Namespace, book: Book
) -> TrainConfig:
    """The best batch and rates of a rival on short runs; every trial is a row of `book`."""
    judged = "causal" if recipe.train.causal_share == 1 else "nelbo"

    def trial(batch: int, scale: float) -> float:
        key = {"recipe": name, "vocab_size": recipe.model.vocab_size, "minutes": options.search_minutes,
               "threads": options.threads, "batch": batch, "scale": scale}  # fmt: skip
        row = book.find(key)
        if row is None:
            run = options.out / "search" / f"{name}_{recipe.model.vocab_size}_{batch}x{scale:g}"
            config = tuned(recipe.train, batch, scale)
            made = run_for(options.search_minutes, data, Preset(recipe.model, config), run, options)
            row = book.add({**key, "steps": made["steps"], **score(run, windows, [judged])})
        return row[judged]["bpb"]

    batch = min(BATCHES, key=lambda b: trial(b, 1.0))
    scale = min((1.0, *SCALES), key=lambda s: trial(batch, s))
    return tuned(recipe.train, batch, scale)


def table(rows: Sequence[dict[str, Any]], texts: Sequence[str]) -> str:
    """Markdown, a row for each run."""
    names = {"nelbo": "NELBO", "chain": "chain", "causal": "causal"}
    titles = ["recipe", "vocabulary", "seed", "parameters", "batch", "Muon's rate", "steps", "tokens"]
    titles += [f"{names[metric]}, {text}" for text in texts for metric in METRICS]
    lines = [f"| {' | '.join(titles)} |", "|" + " --- |" * len(titles)]
    for r in rows:
        cells = [r["recipe"], f"{r['vocab_size']:,}", f"{r['seed']}", f"{r['parameters']:,}", f"{r['batch']}"]
        cells += [f"{r['matrix_lr']:g}", f"{r['steps']:,}", f"{r['tokens']:,}"]
        for text in texts:
            for metric in METRICS:
                figure = r["scores"].get(text, {}).get(metric)
                cells.append(f"{figure['bpb']:.3f} ± {figure['mask_stderr_bpb']:.3f}" if figure else "")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _named(text: str) -> tuple[str, str]:
    name, separator, path = text.partition("=")
    if not (name and separator and path):
        raise argparse.ArgumentTypeError(f"write NAME=FILE, not {text!r}")
    return name, path


def main(words: Sequence[str] | None = None) -> None:
    """Parse, train and score what is missing, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("data", type=Path, nargs="+", help="prepared folders, one for each vocabulary")
    parser.add_argument("--out", type=Path, required=True, help="folder for runs and rows")
    parser.add_argument(
        "--text", type=_named, action="append", required=True, metavar="NAME=FILE", help="what is scored"
    )
    parser.add_argument("--minutes", type=float, default=5.0, help="wall-clock of each training [5]")
    parser.add_argument("--search-minutes", type=float, default=1.0, help="of each trial of a rival's settings [1]")
    parser.add_argument("--threads", type=int, default=2, help="threads that trainings run on [2]")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1], help="[0 1]")
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--preset", default="small")
    parser.add_argument("--bytes", type=int, default=40_000, help="bytes of each text, at least [40000]")
    parser.add_argument("--eager", action="store_true", help="train without torch.compile")
    options = parser.parse_args(words)
    torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    trials, book = Book(options.out / "search.jsonl"), Book(options.out / "rows.jsonl")
    shown = []
    for data in options.data:
        vocab_size = Dataset.open(data).tokenizer.vocab_size
        for name, recipe in recipes(options.preset, vocab_size).items():
            if name not in options.recipes:
                continue
            length = recipe.model.sequence_length
            texts = {t: scored_windows(t, p, data, options.bytes, options.out, length) for t, p in options.text}
            config = recipe.train
            if name != "mezzotint" and options.search_minutes:
                config = search(name, recipe, data, texts[options.text[0][0]], options, trials)
            for seed in options.seeds:
                key = {"recipe": name, "vocab_size": vocab_size, "seed": seed, "minutes": options.minutes,
                       "threads": options.threads, "batch": config.batch, "matrix_lr": config.matrix_lr}  # fmt: skip
                row = book.find(key)
                if row is None:
                    run = options.out / f"{name}_{vocab_size}_{options.minutes:g}min_seed{seed}"
                    seeded = Preset(recipe.model, dataclasses.replace(config, seed=seed))
                    made = run_for(options.minutes, data, seeded, run, options)
                    row = {**key, **{k: made[k] for k in ("steps", "tokens", "parameters", "seconds")}}
                    row = book.add({**row, "scores": {t: score(run, windows) for t, windows in texts.items()}})
                    print(f"done: {name}, {vocab_size:,} pieces, seed {seed}", flush=True)
                shown.append(row)
    print(f"\n{options.minutes:g} minutes each on {options.threads} threads, bits per byte. NELBO: upper bound. Chain (left "
          "to right) and causal: exact.\n")  # fmt: skip
    print(table(shown, [name for name, _ in options.text]))


if __name__ == "__main__":
    main()
