"""Between autoregression and masked diffusion: the same trunk trained at several block sizes, and what each costs.

    python benchmarks/block_sizes.py DATA --out DIR [--sizes 1 4 16 64 0] [--steps N | --minutes M] [--preset small]

Block size 0 is the whole window, learnt as the preset says; block size 1 is next tokens. Blocks between learn next tokens
for the first `--causal-start` of the run, then weigh them by `--causal-share`, and are else trained as the preset says. All
have equal minutes or equal steps and are then scored on `val`:

NELBO        upper bound on decoding a block's tokens one by one in random order, so up to k passes for k tokens
next tokens  exact code length from left to right, of every size that learnt them; also on the fewer tokens that the
             chains are scored on
m at once    exact code length when m neighbours are decoded in a pass, from left to right, each by its own marginal;
             m = k decodes a block in a single pass

One pass more per block, to keep the keys and values of finished blocks, is shared with the next block's first. A step
in blocks runs over doubled windows, so equal steps are not equal time: both are in the rows.

Every finished row is a line of DIR/rows.jsonl and is not computed again; an interrupted training goes on.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mezzotint.config import PRESETS, ModelConfig, TrainConfig
from mezzotint.data.dataset import Dataset
from mezzotint.model import Model
from mezzotint.scoring.likelihood import causal, chain_rule, nelbo
from mezzotint.scoring.statistics import Estimate
from mezzotint.training.checkpoint import load_run
from mezzotint.training.run import train


def figures(model: Model, windows: Any, size: int, args: argparse.Namespace) -> Iterator[tuple[str, float, Any]]:
    """(name, tokens decoded per forward pass, function that gives the Estimate) of one trained model."""
    length = model.config.sequence_length
    if model.trained_causally:
        yield "next tokens", 1, lambda: causal(model, windows, tokens=args.tokens)
        yield "next tokens, where chains are", 1, lambda: causal(model, windows, tokens=args.chain_tokens)
    if size == 1:
        return
    words = {"tokens": args.tokens, "repeats": args.repeats, "seed": args.seed}
    yield "NELBO", 1, lambda: nelbo(model, windows, block_size=size % length, **words)
    attention = f"block({size})" if size < length else "full"
    for m in sorted({m for m in args.at_once if m < size and size % m == 0} | {size}):
        words = {"tokens": args.chain_tokens, "order": f"block({m})", "attention": attention}
        # A last block that is shorter makes the passes fewer than length / m by a fraction.
        passes = sum(math.ceil(min(size, length - start) / m) for start in range(0, length, size))
        yield f"{m} at once", length / passes, lambda words=words: chain_rule(model, windows, **words)


def configs(data: Dataset, size: int, args: argparse.Namespace) -> tuple[ModelConfig, TrainConfig]:
    """The preset's settings with the options given, for blocks of `size`."""
    chosen = PRESETS[args.preset]
    trunk = {k: getattr(args, k) for k in ("layers", "width", "sequence_length") if getattr(args, k)}
    model = dataclasses.replace(chosen.model, vocab_size=data.tokenizer.vocab_size, **trunk)
    more = {k: getattr(args, k) for k in ("batch", "weighting") if getattr(args, k)}
    learnt = 0 if size >= model.sequence_length else size
    more |= {"block_size": learnt, "seed": args.seed, "compile": args.compile}
    if learnt == 1:
        more |= {"causal_share": 1.0}
    elif learnt:
        more |= {"causal_share": args.causal_share, "causal_start": args.causal_start}
    return model, dataclasses.replace(chosen.train, steps=args.steps, minutes=args.minutes, **more)


def run_size(data: Dataset, size: int, rows: dict[str, dict[str, Any]], args: argparse.Namespace) -> list[str]:
    """Train one size unless it is done, score what is missing; returns the keys of its rows in order."""
    model_config, config = configs(data, size, args)
    size = config.block_size or model_config.sequence_length
    budget = f"{args.steps} steps" if args.steps else f"{args.minutes:g} minutes"
    shape = f"{model_config.layers}x{model_config.width}x{model_config.sequence_length}"
    setting = f"{args.preset} {shape} {budget} batch {config.batch} {config.weighting} causal {config.causal_share:g}"
    setting += f" after {config.causal_start:g}" if config.causal_start else ""
    folder = args.out / f"{setting} seed {args.seed} block {size}".replace(" ", "_")
    done = folder / "trained.json"
    if not done.exists():
        print(f"block size {size}: training {budget}", flush=True)
        result = train(args.data, folder, model=model_config, config=config, resume=True)
        done.write_text(json.dumps(result))
    trained = json.loads(done.read_text())
    model = load_run(folder)
    windows = data.split("val").windows(model.config.sequence_length)
    keys = []
    for name, per_pass, score in figures(model, windows, size, args):
        tokens = args.tokens if name in ("NELBO", "next tokens") else args.chain_tokens
        key = f"{folder.name} {name} {tokens} tokens" + (f" {args.repeats} repeats" if name == "NELBO" else "")
        keys.append(key)
        if key in rows:
            continue
        estimate: Estimate = score()
        rows[key] = {
            "key": key,
            "block size": size,
            "figure": name,
            "tokens per pass": per_pass,
            "steps": trained["steps"],
            "tokens per second": trained["tokens_per_second"],
            **estimate.to_dict(),
        }
        with (args.out / "rows.jsonl").open("a") as file:
            file.write(json.dumps(rows[key]) + "\n")
        print(f"  {name}: {estimate.bpb:.4f} ± {estimate.stderr_bpb:.4f} ({estimate.kind})", flush=True)
    return keys


def main() -> None:
    """Parse, run what is missing, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 4, 16, 64, 0], help="block sizes, 0: the window")
    parser.add_argument("--preset", choices=sorted(PRESETS), default="small")
    parser.add_argument("--steps", type=int, default=0, help="equal steps (0: equal minutes)")
    parser.add_argument("--minutes", type=float, default=5.0, help="equal minutes")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--width", type=int)
    parser.add_argument("--sequence-length", type=int)
    parser.add_argument("--batch", type=int)
    parser.add_argument("--weighting", choices=("nelbo", "reference"), help="[the preset's]")
    parser.add_argument("--causal-share", type=float, default=0.5, help="weight of next tokens beside blocks [0.5]")
    parser.add_argument(
        "--causal-start", type=float, default=0.5, help="share of a run with blocks that learns next tokens alone [0.5]"
    )
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--tokens", type=int, default=32_768, help="validation tokens to score")
    parser.add_argument("--chain-tokens", type=int, default=8_192, help="validation tokens for the exact chains")
    parser.add_argument("--at-once", type=int, nargs="+", default=[1, 2, 4, 8], help="neighbours decoded in a pass")
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    book = args.out / "rows.jsonl"
    rows = {}
    if book.exists():
        rows = {row["key"]: row for row in map(json.loads, book.read_text().splitlines())}
    data = Dataset.open(args.data)
    length = args.sequence_length or PRESETS[args.preset].model.sequence_length
    sizes = dict.fromkeys(min(size, length) or length for size in args.sizes)  # in the order given, each once
    keys = [key for size in sizes for key in run_size(data, size, rows, args)]
    print(
        "\n| block size | figure | kind | bits per byte ± s.e. | tokens per forward pass | steps | trained tokens/s |"
    )
    print("| --: | -- | -- | --: | --: | --: | --: |")
    for row in (rows[key] for key in keys):
        error = math.nan if row["stderr_bpb"] is None else row["stderr_bpb"]
        print(
            f"| {row['block size']} | {row['figure']} | {row['kind']} | {row['bpb']:.4f} ± {error:.4f} | "
            f"{row['tokens per pass']:.2f} | {row['steps']} | {row['tokens per second']:,.0f} |"
        )


if __name__ == "__main__":
    main()
