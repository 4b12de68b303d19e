"""One change at a time to a recipe: equal steps, scored on the same windows and masks, with the error of the difference.

    python benchmarks/changes.py DATA --out DIR [--preset small] [--steps 600] [--tokens 49152] [--seed 0]
                                 --change [name=] SETTING=VALUE,SETTING=VALUE ...

Every `--change` is a list of settings of ModelConfig or TrainConfig; the preset itself is the first row. Finished rows
and runs are kept in DIR and not made again. NELBO: upper bound, 2 masks a window. Causal: exact. Differences are to the
first row. Equal steps, not equal minutes: what a step costs is for `throughput.py`, on a quiet machine.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

from mezzotint.config import ModelConfig, Preset, TrainConfig, preset
from mezzotint.data.dataset import Dataset
from mezzotint.scoring import likelihood
from mezzotint.scoring.compare import compare
from mezzotint.training.checkpoint import load_run
from mezzotint.training.run import train


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
    return Preset(dataclasses.replace(base.model, **model), dataclasses.replace(base.train, **rest))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="folder for runs")
    parser.add_argument("--preset", default="small")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--tokens", type=int, default=49_152, help="tokens scored [49152]")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--change", action="append", default=[], metavar="SETTING=VALUE,...")
    options = parser.parse_args()
    dataset = Dataset.open(options.data)
    chosen = preset(options.preset)
    base = Preset(
        dataclasses.replace(chosen.model, vocab_size=dataset.tokenizer.vocab_size),
        dataclasses.replace(chosen.train, steps=options.steps, seed=options.seed),
    )
    first = None
    print("| change | parameters | NELBO | causal | difference of the NELBO |\n| --- | --- | --- | --- | --- |")
    for change in ("", *options.change):
        name = f"{options.preset}_{options.steps}_{options.seed}_{change or 'none'}"
        run, row = options.out / name, options.out / name / f"row_{options.tokens}.json"
        recipe = changed(base, change)
        if not row.exists():
            made = train(options.data, run, model=recipe.model, config=recipe.train, resume=True)
            model = load_run(run)
            windows = dataset.split("val").windows(model.config.sequence_length)
            causal = likelihood.causal(model, windows, tokens=options.tokens) if recipe.train.causal_share else None
            figures = {
                "parameters": made["parameters"],
                "nelbo": likelihood.nelbo(model, windows, tokens=options.tokens, repeats=2).to_dict(),
                "causal": causal and causal.to_dict(),
            }
            if first:
                there = compare(first, model, windows, tokens=options.tokens, repeats=2)
                figures["difference"] = there.to_dict()
            row.write_text(json.dumps(figures))
        figures = json.loads(row.read_text())
        first = first or load_run(run)
        cells = [f"{figures[m]['bpb']:.3f} ± {figures[m]['stderr_bpb']:.3f}" if figures[m] else "" for m in ("nelbo", "causal")]  # fmt: skip
        there = figures.get("difference")
        cells.append(f"{there['difference_bpb']:+.4f} ± {there['stderr_bpb']:.4f}" if there else "")
        print(f"| {change or 'none'} | {figures['parameters']:,} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
