"""Likelihood at equal wall-clock: the reference's recipe, plain masked diffusion, autoregression, and Mezzotint's best.

    python benchmarks/quality.py DATA --out DIR [--minutes 5] [--seeds 0 1] [--recipes NAME ...] [--preset small]
                                 [--tokens 131072] [--chain-tokens 8192]

Equal wall-clock means equal step-seconds: before anything is trained, the recipes' steps are timed in turns on the
quiet machine, and each is then trained for the number of steps that fit in the minutes. So a disturbance of a long run
changes nothing, a run can be stopped and gone on with (`--resume` is implied), and a seed gives the same table twice.
All recipes are scored on the same windows and masks. Finished rows are kept in DIR/rows.jsonl.

reference  the challenge entry's loss, optimizer settings and architecture details
mdlm       plain masked diffusion: the NELBO on masked windows, a plain transformer
ar         autoregression: the preset's trunk, every window left to right
mezzotint  the preset
All have the preset's layers, width and window. The first two have half its batch, and so more steps for the
minutes; they were not tried with its own.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from mezzotint.config import ModelConfig, Preset, TrainConfig, preset
from mezzotint.data.dataset import Dataset
from mezzotint.data.loader import Loader
from mezzotint.model import Denoiser
from mezzotint.scoring import likelihood
from mezzotint.training.checkpoint import load_run
from mezzotint.training.run import train
from mezzotint.training.step import Trainer


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


def step_seconds(chosen: dict[str, Preset], dataset: Dataset, rounds: int = 4, steps: int = 6) -> dict[str, float]:
    """Seconds of a step of each recipe, timed in turns; the median over turns, each spread over a whole run."""
    trainers, times = {}, {name: [] for name in chosen}
    for name, recipe in chosen.items():
        torch.manual_seed(0)
        config = dataclasses.replace(recipe.train, steps=1000)
        loader = Loader(dataset.split("train"), recipe.model.sequence_length, config.batch, 0, 0, 1)
        trainers[name] = Trainer(Denoiser(recipe.model), config, loader, torch.device("cpu"))
        trainers[name].warm_up()
        trainers[name].run_step(0.0)
    for _ in range(rounds):
        for name, trainer in trainers.items():
            started = time.perf_counter()
            for step in range(steps):
                trainer.run_step((step + 0.5) / steps)  # what a step does may depend on how far the run is
            times[name].append((time.perf_counter() - started) / steps)
    return {name: statistics.median(each) for name, each in times.items()}


def score(run: Path, dataset: Dataset, options: argparse.Namespace) -> dict[str, Any]:
    """NELBO of what is trained on masks, causal code length of what is trained left to right, and the chain rule."""
    model = load_run(run)
    windows = dataset.split("val").windows(model.config.sequence_length)
    share = model.info["train"]["causal_share"]
    figures: dict[str, Any] = {}
    if share < 1:
        figures["nelbo"] = likelihood.nelbo(model, windows, tokens=options.tokens, repeats=4).to_dict()
        figures["chain"] = likelihood.chain_rule(model, windows, tokens=options.chain_tokens).to_dict()
    if share > 0:
        figures["causal"] = likelihood.causal(model, windows, tokens=options.tokens).to_dict()
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="folder for runs and rows")
    parser.add_argument("--minutes", type=float, default=5.0, help="wall-clock of each training [5]")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1], help="[0 1]")
    parser.add_argument("--recipes", nargs="+", default=["reference", "mdlm", "ar", "mezzotint"])
    parser.add_argument("--preset", default="small")
    parser.add_argument("--tokens", type=int, default=131_072, help="tokens scored by nelbo and causal [131072]")
    parser.add_argument("--chain-tokens", type=int, default=8_192, help="tokens scored by the chain rule [8192]")
    options = parser.parse_args()
    dataset = Dataset.open(options.data)
    chosen = recipes(options.preset, dataset.tokenizer.vocab_size)
    options.out.mkdir(parents=True, exist_ok=True)
    timed = options.out / "step_seconds.json"
    if not timed.exists():
        timed.write_text(json.dumps(step_seconds(chosen, dataset), indent=1))
    seconds = json.loads(timed.read_text())
    book = options.out / "rows.jsonl"
    rows = [json.loads(line) for line in book.read_text().splitlines()] if book.exists() else []
    for seed in options.seeds:
        for name in options.recipes:
            if any((r["recipe"], r["seed"], r["minutes"]) == (name, seed, options.minutes) for r in rows):
                continue
            steps = max(1, round(60 * options.minutes / seconds[name]))
            config = dataclasses.replace(chosen[name].train, steps=steps, seed=seed)
            run = options.out / f"{name}_{options.minutes:g}min_seed{seed}"
            made = train(options.data, run, model=chosen[name].model, config=config, resume=True)
            row = {
                "recipe": name,
                "seed": seed,
                "minutes": options.minutes,
                "steps": steps,
                "tokens": made["tokens"],
                "parameters": made["parameters"],
                "step_ms": 1000 * seconds[name],
                "seconds": made["seconds"],
                **score(run, dataset, options),
            }
            rows.append(row)
            with book.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(f"done: {name}, seed {seed}", flush=True)
    print(f"\n{options.minutes:g} minutes of steps each, {torch.get_num_threads()} threads. NELBO: upper bound. "
          "Chain (left to right) and causal: exact.\n")  # fmt: skip
    print("| recipe | seed | parameters | ms a step | tokens | NELBO | chain | causal |\n|" + " --- |" * 8)
    for r in rows:
        if r["minutes"] != options.minutes:
            continue
        cells = [
            f"{r[m]['bpb']:.3f} ± {r[m]['stderr_bpb']:.3f}" if m in r else "" for m in ("nelbo", "chain", "causal")
        ]
        print(f"| {r['recipe']} | {r['seed']} | {r['parameters']:,} | {r['step_ms']:.0f} | {r['tokens']:,} | "
              + " | ".join(cells) + " |")  # fmt: skip


if __name__ == "__main__":
    main()
