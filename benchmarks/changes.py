"""One change at a time to a recipe: equal steps, scored on the same windows and masks, with the error of the difference.

    python benchmarks/changes.py DATA --out DIR [--preset small] [--steps 600] [--tokens 49152] [--seed 0]
                                 --change [name=] SETTING=VALUE,SETTING=VALUE ...

Every `--change` is a list of settings of ModelConfig or TrainConfig; the preset itself is the first row. Finished rows
and runs are kept in DIR and not made again. NELBO: upper bound, 2 masks a window. Causal: exact. Differences are to the
first row. Equal steps, not equal minutes: what a step costs is for `throughput.py`, on a quiet machine.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from common import Book, figure, new_parser, plus_minus, recipe, scores, table, trained

from mezzotint.config import ModelConfig, Preset, TrainConfig, preset
from mezzotint.data.dataset import Dataset
from mezzotint.scoring.compare import compare
from mezzotint.training.checkpoint import load_run


def changed(base: Preset, settings: str) -> Preset:
    """`base` with settings such as `width=128,matrix_lr=0.01`."""
    kinds = {f.name: type(f.default) for kind in (ModelConfig, TrainConfig) for f in dataclasses.fields(kind)}
    values = {}
    for pair in filter(None, settings.split(",")):
        name, _, value = pair.partition("=")
        if name not in kinds:
            raise SystemExit(f"unknown setting {name!r}")
        values[name] = value == "True" if kinds[name] is bool else kinds[name](value)
    model = {f.name: values[f.name] for f in dataclasses.fields(ModelConfig) if f.name in values}
    rest = {name: value for name, value in values.items() if name not in model}
    return recipe(base, model, rest)


def main(words: Sequence[str] | None = None) -> None:
    """Parse, train and score what is missing, print."""
    parser = new_parser(__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="folder for runs")
    parser.add_argument("--preset", default="small")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--tokens", type=int, default=49_152, help="tokens scored [49152]")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--eager", action="store_true", help="train without torch.compile")
    parser.add_argument("--change", action="append", default=[], metavar="SETTING=VALUE,...")
    options = parser.parse_args(words)
    dataset = Dataset.open(options.data)
    base = recipe(
        preset(options.preset),
        {"vocab_size": dataset.tokenizer.vocab_size},
        {"steps": options.steps, "seed": options.seed, "compile": not options.eager},
    )
    book, first, rows = Book(options.out / "rows.jsonl"), None, []
    for change in ("", *options.change):
        run = options.out / f"{options.preset}_{options.steps}_{options.seed}_{change or 'none'}"
        row = book.find(run=run.name, tokens=options.tokens)
        if row is None:
            result, model = trained(options.data, run, changed(base, change))
            windows = dataset.split("val").windows(model.config.sequence_length)
            row = {"run": run.name, "tokens": options.tokens, "parameters": result["parameters"]}
            row |= scores(model, windows, metrics=("nelbo", "causal"), tokens=options.tokens)
            if first:
                row["difference"] = compare(first, model, windows, tokens=options.tokens, repeats=2).to_dict()
            book.add(row)
        first = first or load_run(run)
        there = row.get("difference")
        paired = plus_minus(there["difference_bpb"], there["stderr_bpb"], "+.4f") if there else ""
        figures = [figure(row.get(metric), ".3f") for metric in ("nelbo", "causal")]
        rows.append([change or "none", f"{row['parameters']:,}", *figures, paired])
    print(table(["change", "parameters", "NELBO", "causal", "difference of the NELBO"], rows))


if __name__ == "__main__":
    main()
