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
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from common import Book, figure, new_parser, recipe, table, trained

from mezzotint.config import PRESETS, Preset
from mezzotint.data.dataset import Dataset
from mezzotint.network.model import Model
from mezzotint.scoring.likelihood import causal, chain_rule, nelbo


def figures(model: Model, windows: Any, size: int, args: argparse.Namespace) -> Iterator[tuple[str, float, Any]]:
    """(name, tokens decoded per forward pass, function that gives the Estimate) of one trained model."""
    length = model.config.sequence_length
    if model.trained_causally:
        yield "next tokens", 1, lambda: causal(model, windows, tokens=args.tokens)
        yield "next tokens, where chains are", 1, lambda: causal(model, windows, tokens=args.chain_tokens)
    if size == 1:
        return
    masks = {"tokens": args.tokens, "repeats": args.repeats, "seed": args.seed}
    yield "NELBO", 1, lambda: nelbo(model, windows, block_size=size % length, **masks)
    attention = f"block({size})" if size < length else "full"
    for m in sorted({m for m in args.at_once if m < size and size % m == 0} | {size}):
        chain = {"tokens": args.chain_tokens, "order": f"block({m})", "attention": attention}
        # A last block that is shorter makes the passes fewer than length / m by a fraction.
        passes = sum(math.ceil(min(size, length - start) / m) for start in range(0, length, size))
        yield f"{m} at once", length / passes, lambda chain=chain: chain_rule(model, windows, **chain)


def variant(data: Dataset, size: int, args: argparse.Namespace) -> Preset:
    """The preset's settings with the options given, for blocks of `size`."""
    chosen = PRESETS[args.preset]
    trunk = {k: getattr(args, k) for k in ("layers", "width", "sequence_length") if getattr(args, k)}
    more = {k: getattr(args, k) for k in ("batch", "weighting") if getattr(args, k)}
    learnt = 0 if size >= trunk.get("sequence_length", chosen.model.sequence_length) else size
    more |= {"block_size": learnt, "seed": args.seed, "compile": args.compile}
    if learnt == 1:
        more |= {"causal_share": 1.0}
    elif learnt:
        more |= {"causal_share": args.causal_share, "causal_start": args.causal_start}
    more |= {"steps": args.steps, "minutes": args.minutes}
    return recipe(chosen, {"vocab_size": data.tokenizer.vocab_size, **trunk}, more)


def run_size(data: Dataset, size: int, book: Book, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Train one size unless it is done, score what is missing; returns its rows in order."""
    chosen = variant(data, size, args)
    model_config, config = chosen.model, chosen.train
    size = config.block_size or model_config.sequence_length
    budget = f"{args.steps} steps" if args.steps else f"{args.minutes:g} minutes"
    shape = f"{model_config.layers}x{model_config.width}x{model_config.sequence_length}"
    setting = f"{args.preset} {shape} {budget} batch {config.batch} {config.weighting} causal {config.causal_share:g}"
    setting += f" after {config.causal_start:g}" if config.causal_start else ""
    folder = args.out / f"{setting} seed {args.seed} block {size}".replace(" ", "_")
    print(f"block size {size}: {budget}", flush=True)
    result, model = trained(args.data, folder, chosen)
    windows = data.split("val").windows(model.config.sequence_length)
    rows = []
    for name, per_pass, score in figures(model, windows, size, args):
        tokens = args.tokens if name in ("NELBO", "next tokens") else args.chain_tokens
        key = f"{folder.name} {name} {tokens} tokens" + (f" {args.repeats} repeats" if name == "NELBO" else "")
        row = book.find(key=key)
        if row is None:
            row = {"key": key, "block size": size, "figure": name, "tokens per pass": per_pass}
            row |= {"steps": result["steps"], "tokens per second": result["tokens_per_second"], **score().to_dict()}
            book.add(row)
            print(f"  {name}: {figure(row)} ({row['kind']})", flush=True)
        rows.append(row)
    return rows


def main(words: Sequence[str] | None = None) -> None:
    """Parse, run what is missing, print the table."""
    parser = new_parser(__doc__)
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
    args = parser.parse_args(words)
    book = Book(args.out / "rows.jsonl")
    data = Dataset.open(args.data)
    length = args.sequence_length or PRESETS[args.preset].model.sequence_length
    sizes = dict.fromkeys(min(size, length) or length for size in args.sizes)  # in the order given, each once
    titles = ["block size", "figure", "kind", "bits per byte ± s.e.", "tokens per forward pass", "steps"]
    cells = [
        [r["block size"], r["figure"], r["kind"], figure(r), f"{r['tokens per pass']:.2f}", r["steps"],
         f"{r['tokens per second']:,.0f}"]
        for size in sizes for r in run_size(data, size, book, args)
    ]  # fmt: skip
    print("\n" + table([*titles, "trained tokens/s"], cells))


if __name__ == "__main__":
    main()
