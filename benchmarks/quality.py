"""Likelihood after equal minutes: the reference's recipe, plain masked diffusion, autoregression, and Mezzotint's best.

    python benchmarks/quality.py DATA [DATA ...] --out DIR --text val=val.parquet --text unseen=unseen.parquet
                                 [--minutes 5] [--threads 2] [--seeds 0 1] [--recipes NAME ...] [--preset small]
                                 [--search-minutes 1] [--bytes 40000] [--chain NAME ...]

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
from common import METRICS, Book, figure, new_parser, recipe, scores, table, trained

from mezzotint.config import ModelConfig, Preset, TrainConfig, preset
from mezzotint.data.dataset import Dataset, Windows
from mezzotint.data.prepare import prepare
from mezzotint.data.sources import documents
from mezzotint.errors import DataError
from mezzotint.files import atomic_write

RECIPES = ("reference", "mdlm", "ar", "mezzotint")
TITLES = {"nelbo": "NELBO", "chain": "chain", "causal": "causal"}
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


def run_and_score(
    minutes: float,
    data: Path,
    chosen: Preset,
    run: Path,
    texts: dict[str, Windows],
    options: argparse.Namespace,
    metrics: Sequence[str] = METRICS,
) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Train for `minutes` on the threads asked for, and score every text: what `train` returns, metrics of each text."""
    timed = recipe(chosen, {}, {"minutes": minutes, "steps": 0, "compile": not options.eager})
    result, model = trained(data, run, timed)
    unchained = [metric for metric in metrics if metric != "chain"]
    asked = {name: metrics if options.chain is None or name in options.chain else unchained for name in texts}
    return result, {name: scores(model, texts[name], metrics=asked[name], repeats=4) for name in texts}


def search(
    name: str, chosen: Preset, data: Path, windows: Windows, options: argparse.Namespace, book: Book
) -> TrainConfig:
    """The best batch and rates of a rival on short runs; every trial is a row of `book`."""
    judged = "causal" if chosen.train.causal_share == 1 else "nelbo"

    def trial(batch: int, scale: float) -> float:
        key = {"recipe": name, "vocab_size": chosen.model.vocab_size, "minutes": options.search_minutes,
               "threads": options.threads, "batch": batch, "scale": scale}  # fmt: skip

        def measured() -> dict[str, Any]:
            run = options.out / "search" / f"{name}_{chosen.model.vocab_size}_{batch}x{scale:g}"
            tried = Preset(chosen.model, tuned(chosen.train, batch, scale))
            result, found = run_and_score(
                options.search_minutes, data, tried, run, {"first": windows}, options, [judged]
            )
            return {"steps": result["steps"], **found["first"]}

        return book.get(measured, **key)[judged]["bpb"]

    batch = min(BATCHES, key=lambda b: trial(b, 1.0))
    scale = min((1.0, *SCALES), key=lambda s: trial(batch, s))
    return tuned(chosen.train, batch, scale)


def report(rows: Sequence[dict[str, Any]], texts: Sequence[str]) -> str:
    """Markdown, a row for each run."""
    titles = ["recipe", "vocabulary", "seed", "parameters", "batch", "Muon's rate", "steps", "tokens"]
    titles += [f"{TITLES[metric]}, {text}" for text in texts for metric in METRICS]
    cells = [
        [
            *(r["recipe"], f"{r['vocab_size']:,}", r["seed"], f"{r['parameters']:,}", r["batch"]),
            *(f"{r['matrix_lr']:g}", f"{r['steps']:,}", f"{r['tokens']:,}"),
            *(figure(r["scores"].get(text, {}).get(m), ".3f", "mask_stderr_bpb") for text in texts for m in METRICS),
        ]
        for r in rows
    ]
    return table(titles, cells)


def _named(text: str) -> tuple[str, str]:
    name, separator, path = text.partition("=")
    if not (name and separator and path):
        raise argparse.ArgumentTypeError(f"write NAME=FILE, not {text!r}")
    return name, path


def main(words: Sequence[str] | None = None) -> None:
    """Parse, train and score what is missing, print."""
    parser = new_parser(__doc__)
    parser.add_argument("data", type=Path, nargs="+", help="prepared folders, one for each vocabulary")
    parser.add_argument("--out", type=Path, required=True, help="folder for runs and rows")
    parser.add_argument(
        "--text", type=_named, action="append", required=True, metavar="NAME=FILE", help="what is scored"
    )
    parser.add_argument("--chain", nargs="*", metavar="NAME", help="texts scored by the chain, too [all]")
    parser.add_argument("--minutes", type=float, default=5.0, help="wall-clock of each training [5]")
    parser.add_argument("--search-minutes", type=float, default=1.0, help="of each trial of a rival's settings [1]")
    parser.add_argument("--threads", type=int, default=2, help="threads that trainings run on [2]")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1], help="[0 1]")
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--preset", default="small")
    parser.add_argument("--bytes", type=int, default=40_000, help="bytes of each text, at least [40000]")
    parser.add_argument("--eager", action="store_true", help="train without torch.compile")
    options = parser.parse_args(words)
    if unknown := set(options.chain or ()) - {name for name, _ in options.text}:
        parser.error(f"--chain names no --text: {', '.join(sorted(unknown))}")
    torch.set_num_threads(options.threads)
    trials, book = Book(options.out / "search.jsonl"), Book(options.out / "rows.jsonl")
    shown = []
    for data in options.data:
        vocab_size = Dataset.open(data).tokenizer.vocab_size
        for name, chosen in recipes(options.preset, vocab_size).items():
            if name not in options.recipes:
                continue
            length = chosen.model.sequence_length
            texts = {t: scored_windows(t, p, data, options.bytes, options.out, length) for t, p in options.text}
            config = chosen.train
            if name != "mezzotint" and options.search_minutes:
                config = search(name, chosen, data, texts[options.text[0][0]], options, trials)
            for seed in options.seeds:
                key = {"recipe": name, "vocab_size": vocab_size, "seed": seed, "minutes": options.minutes,
                       "threads": options.threads, "batch": config.batch, "matrix_lr": config.matrix_lr}  # fmt: skip
                row = book.find(**key)
                if row is None:
                    run = options.out / f"{name}_{vocab_size}_{options.minutes:g}min_seed{seed}"
                    seeded = Preset(chosen.model, dataclasses.replace(config, seed=seed))
                    result, found = run_and_score(options.minutes, data, seeded, run, texts, options)
                    figures = {k: result[k] for k in ("steps", "tokens", "parameters", "seconds")}
                    row = book.add({**key, **figures, "scores": found})
                    print(f"done: {name}, {vocab_size:,} pieces, seed {seed}", flush=True)
                shown.append(row)
    print(f"\n{options.minutes:g} minutes each on {options.threads} threads, bits per byte. NELBO: upper bound. Chain (left "
          "to right) and causal: exact.\n")  # fmt: skip
    print(report(shown, [name for name, _ in options.text]))


if __name__ == "__main__":
    main()
