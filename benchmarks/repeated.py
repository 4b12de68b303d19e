"""Little text, read many times: masked diffusion, its mix with next tokens, and autoregression, each regularised as suits it.

    python benchmarks/repeated.py BOOKS --out DIR --author Thackeray --apart Thackeray_Esmond_1852
                                  [--sizes 250000 1000000 4000000] [--minutes 2 8 30 | --tokens 1000000 4000000]
                                  [--grid 0:0.04 0.1:0.04 0.1:0.4] [--objectives mixed masked ar] [--seeds 0 1]
                                  [--preset small] [--change width=128,heads=2] [--batch 16] [--device auto]

BOOKS is a Parquet file with columns `text` and `source`. Of the passages whose source begins with `--author`, so many
bytes are trained on, others choose (`val`) and others are reported (`passages`), all drawn without looking; `--apart`,
another book of the same author, is reported as well (`book`). Every objective is trained with each DROPOUT:DECAY of the
grid on the first seed; the one with the best figure on `val` is trained with the other seeds, and only these are
reported. Weights are those of the best validation of a run, for all alike.

mixed   half of the loss on masked tokens, half on next tokens, as the preset
masked  masked tokens only
ar      next tokens only, in steps of half as many windows, its best of a search (docs/results.md)

NELBO is an upper bound, chain and causal are exact, in bits per byte. Minutes are wall-clock, so nothing else may run
beside; tokens are the same anywhere, so that several processes may share a machine, each with a DIR of its own. Finished
rows are kept in DIR/rows.jsonl, those of the grid with the figures of `val` in DIR/grid.jsonl.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import random
import statistics
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from changes import changed
from common import METRICS, Book, figure, new_parser, recipe, scores, table, trained

from mezzotint.config import Preset, preset
from mezzotint.data.dataset import Dataset
from mezzotint.data.prepare import prepare
from mezzotint.files import atomic_write
from mezzotint.network.model import Model

SHARES = {"mixed": None, "masked": 0.0, "ar": 1.0}
"""`causal_share` of each objective; None: the preset's."""
AR_BATCH = 0.5
"""Windows a step of `ar` as a share of the preset's: what its search chose."""
REPORTED = 40_000
"""Bytes of each text that chooses or is reported."""


def passages(books: Path, author: str, apart: str) -> tuple[list[str], list[str]]:
    """Texts of the author but for the book apart, in an order drawn without looking, and those of that book."""
    import pyarrow.parquet as parquet

    rows = parquet.read_table(books, columns=["source", "text"]).to_pylist()
    own = [row["text"] for row in rows if row["source"].startswith(author) and row["source"] != apart]
    other = [row["text"] for row in rows if row["source"] == apart]
    if not own or not other:
        raise SystemExit(f"{books} has {len(own)} passages of {author} and {len(other)} of {apart}: both are needed")
    for texts in (own, other):
        random.Random(0).shuffle(texts)
    return own, other


def taken(texts: list[str], size: int) -> list[str]:
    """Texts removed from the end of `texts` until they hold `size` bytes."""
    chosen: list[str] = []
    while texts and sum(len(text.encode()) for text in chosen) < size:
        chosen.append(texts.pop())
    return chosen


def corpus(out: Path, own: list[str], other: list[str], size: int, reported: int) -> tuple[Path, dict[str, Path]]:
    """Prepared data of `size` bytes with a tokenizer of its own, and the prepared texts to report, in its tokens."""
    folder = out / f"{size}"
    data = folder / "data"
    names = ("val", "passages", "book", "train")
    files = {name: folder / f"{name}.jsonl" for name in names}
    if not data.exists():
        folder.mkdir(parents=True, exist_ok=True)
        own, other = list(own), list(other)
        texts = {"val": taken(own, reported), "passages": taken(own, reported), "book": taken(other, reported)}
        texts["train"] = taken(own, size)
        for name in names:
            atomic_write(files[name], "".join(json.dumps({"text": text}) + "\n" for text in texts[name]))
        prepare([files["train"]], data, val=[files["val"]])
    prepared = {}
    for name in ("passages", "book"):
        prepared[name] = folder / name
        if not prepared[name].exists():
            prepare([files[name]], prepared[name], tokenizer=data / "tokenizer.model", val=[files[name]])
    return data, prepared


@dataclasses.dataclass(frozen=True)
class Trial:
    """One training, by all that makes it what it is. unit: of the length, minutes or tokens. batch: windows a step."""

    size: int
    length: float
    unit: str
    preset: str
    change: str
    objective: str
    batch: int
    dropout: float
    decay: float
    seed: int

    def recipe(self, vocab_size: int, device: str, compiled: bool) -> Preset:
        """The preset with this objective, length and regularisation."""
        base, share = changed(preset(self.preset), self.change), SHARES[self.objective]
        train: dict[str, Any] = {"batch": self.batch, "dropout": self.dropout, "weight_decay": self.decay}
        train |= {"seed": self.seed, "device": device, "compile": compiled}
        if self.unit == "tokens":
            train["steps"] = max(1, round(self.length / self.batch / base.model.sequence_length))
        else:
            train["minutes"] = self.length
        if share is not None:
            train["causal_share"] = share
        if device == "cuda":
            train["short_share"] = 0.0  # another length of windows is another graph to compile
        return recipe(base, {"vocab_size": vocab_size}, train)


@dataclasses.dataclass(frozen=True)
class Study:
    """The trainings of one text. data: prepared. reported: the prepared texts to report. grid: what was tried."""

    options: argparse.Namespace
    data: Path
    reported: dict[str, Path]
    grid: Book

    def train(self, trial: Trial) -> tuple[dict[str, Any], Model]:
        """What training said, and the model with the weights of its best validation."""
        vocab_size = Dataset.open(self.data).tokenizer.vocab_size
        chosen = trial.recipe(vocab_size, self.options.device, not self.options.eager)
        name = "_".join(f"{value}" for value in dataclasses.astuple(trial))
        result, model = trained(self.data, self.options.out / "runs" / name, chosen)
        if self.options.device != "auto":
            model.network.to(self.options.device)
        return result, model

    def choose(self, trials: list[Trial]) -> Trial:
        """The trial with the best mean of its figures on the validation text."""

        def judged(trial: Trial) -> float:
            row = self.grid.get(lambda: self.judge(trial), **dataclasses.asdict(trial))
            return statistics.mean(estimate["bpb"] for estimate in row["val"].values())

        return min(trials, key=judged)

    def judge(self, trial: Trial) -> dict[str, Any]:
        """Figures of the validation text, all of it; without the chain."""
        return {"val": self.scores(self.train(trial)[1], self.data, ("nelbo", "causal"))}

    def report(self, trial: Trial) -> dict[str, Any]:
        """What is reported of a trial: how long it was, epochs, figures of each text."""
        result, model = self.train(trial)
        found = {name: self.scores(model, folder) for name, folder in self.reported.items()}
        figures = {key: result[key] for key in ("steps", "tokens", "parameters", "seconds")}
        figures["epochs"] = result["tokens"] / len(Dataset.open(self.data).split("train"))
        return {**figures, "best_step": (result.get("best") or {}).get("step"), "scores": found}

    def scores(self, model: Model, folder: Path, metrics: Sequence[str] = METRICS) -> dict[str, Any]:
        windows = Dataset.open(folder).split("val").windows(model.config.sequence_length)
        return scores(model, windows, metrics=metrics, chain_tokens=self.options.chain_tokens, repeats=4)


def report(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown, a row for each variant that was chosen."""
    cells = [
        [
            f"{r['size']:,}", f"{r['length']:g}", r["objective"], r["seed"], f"{r['dropout']:g}", f"{r['decay']:g}",
            f"{r['epochs']:.1f}", r["best_step"], f"{r['steps']:,}",
            *(figure(r["scores"][text].get(m), ".3f") for text in ("passages", "book") for m in METRICS),
        ]
        for r in rows
    ]  # fmt: skip
    titles = ["bytes", "length", "objective", "seed", "dropout", "decay", "epochs", "best step", "steps"]
    return table([*titles, *(f"{m}, {text}" for text in ("passages", "book") for m in METRICS)], cells)


def _pair(text: str) -> tuple[float, float]:
    dropout, _, decay = text.partition(":")
    return float(dropout), float(decay)


def main(words: Sequence[str] | None = None) -> None:
    """Parse, train and score what is missing, print."""
    parser = new_parser(__doc__)
    parser.add_argument("books", type=Path, help="Parquet file with the columns text and source")
    parser.add_argument("--out", type=Path, required=True, help="folder for texts, runs and rows")
    parser.add_argument("--author", required=True, help="beginning of the sources to train on")
    parser.add_argument("--apart", required=True, help="source of the book that is reported and not trained on")
    parser.add_argument("--sizes", type=int, nargs="+", default=[250_000, 1_000_000, 4_000_000], metavar="BYTES")
    lengths = parser.add_mutually_exclusive_group()
    lengths.add_argument("--minutes", type=float, nargs="+", default=[2.0, 8.0, 30.0], help="[2 8 30]")
    lengths.add_argument("--tokens", type=int, nargs="+", help="lengths in tokens instead")
    parser.add_argument(
        "--grid", type=_pair, nargs="+", default=[(0.0, 0.04), (0.1, 0.04), (0.1, 0.4)], metavar="DROPOUT:DECAY"
    )
    parser.add_argument("--objectives", nargs="+", choices=tuple(SHARES), default=list(SHARES))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1], help="[0 1]")
    parser.add_argument("--preset", default="small")
    parser.add_argument("--change", default="", metavar="SETTING=VALUE,...", help="of the preset")
    parser.add_argument("--batch", type=int, default=0, help="windows a step of all objectives [the preset's, ar half]")
    parser.add_argument("--device", default="auto", help="to train and score on [train: auto, score: the CPU]")
    parser.add_argument("--chain-tokens", type=int, default=4_096, help="tokens scored by the chain rule [4096]")
    parser.add_argument("--bytes", type=int, default=REPORTED, help=f"of each text that is scored [{REPORTED}]")
    parser.add_argument("--eager", action="store_true", help="train without torch.compile")
    options = parser.parse_args(words)
    unit = "tokens" if options.tokens else "minutes"
    own, other = passages(options.books, options.author, options.apart)
    rows, grid, shown = Book(options.out / "rows.jsonl"), Book(options.out / "grid.jsonl"), []
    for size in options.sizes:
        data, prepared = corpus(options.out, own, other, size, options.bytes)
        study = Study(options, data, prepared, grid)
        for length, objective in itertools.product(options.tokens or options.minutes, options.objectives):
            base = changed(preset(options.preset), options.change)
            batch = options.batch or max(1, int(base.train.batch * (AR_BATCH if objective == "ar" else 1)))
            what = (size, length, unit, options.preset, options.change, objective, batch)
            best = study.choose([Trial(*what, drop, decay, options.seeds[0]) for drop, decay in options.grid])
            for seed in options.seeds:
                trial = dataclasses.replace(best, seed=seed)
                shown.append(rows.get(partial(study.report, trial), **dataclasses.asdict(trial)))
                print(report(shown[-1:]).splitlines()[-1], flush=True)
    print(f"\nLengths in {unit}. NELBO: upper bound. Chain and causal: exact.\n")
    print(report(shown))


if __name__ == "__main__":
    main()
