"""What a likelihood figure costs, and whether it can be cashed in. One command, one table per question.

    python benchmarks/likelihood.py MODEL DATA [--part variance|orders|bounds|compress|compare|all] [--json FILE]

MODEL is an artifact or a run folder, DATA a prepared folder whose `val` split is scored; `compress` needs `--text`, a
Parquet (`text` column) or plain file. Sizes are options so that a slow machine can answer too.

variance  forward passes to a standard error of 0.005 bits per byte over 64 windows, for the usual estimator (one
          uniform-t Bernoulli mask per window and pass) and each thing that Mezzotint does about it
orders    the NELBO and the exact code length of each order on the same windows, with the passes each takes
compress  real file sizes and speeds beside the chain figure, xz -9e, zstd -19 and brotli -q 11
bounds    strides on whole windows; leaning orders and K orders, on windows of `--short` tokens (those of the model, if it is as many);
          with the passes each takes. K = 1, 4 and 16 are of the same `--orders-drawn` orders a window, in groups
compare   a planted difference: the same model with Gaussian noise on its weights, paired and unpaired
"""

from __future__ import annotations

import argparse
import copy
import io
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import compressors, new_parser, table, write_json

from mezzotint.compression.container import compress_stream, decompress
from mezzotint.data.dataset import Dataset, Windows
from mezzotint.data.sources import documents
from mezzotint.data.texts import TextWindows
from mezzotint.network.model import Model
from mezzotint.objective import stratified_counts
from mezzotint.pretrained import load
from mezzotint.scoring.compare import compare
from mezzotint.scoring.likelihood import causal, chain_rule, lower_bound, nelbo
from mezzotint.scoring.nelbo import apply_control, nelbo_counts, nelbo_mask, orders_matrix, token_surprisal
from mezzotint.scoring.plan import MaskedWindow, Scoring, choose_windows, masked_window_nll
from mezzotint.scoring.statistics import Estimate

TARGET = 0.005


def bernoulli(ids: torch.Tensor, random: torch.Generator) -> tuple[MaskedWindow, float]:
    """The usual estimator: t uniform, each token masked with probability t, the sum of NLL divided by t."""
    t = max(1e-3, float(torch.rand((), generator=random, dtype=torch.float64)))
    masked = torch.rand(len(ids), generator=random) < t
    return MaskedWindow(ids, masked, masked), len(ids) / t


def variance(model: Model, windows: Windows, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Standard deviation of each estimator over independent repeats of one pass per window."""
    chosen = choose_windows(windows, args.windows * model.config.sequence_length)
    ids = [torch.from_numpy(np.array(windows[i])) for i in chosen]
    n, lengths = len(chosen), [len(x) for x in ids]
    size = sum(windows.byte_count(i) for i in chosen)
    surprisal = token_surprisal(windows, chosen, model.config.vocab_size)
    names = (
        "uniform t, Bernoulli mask",
        "uniform count, independent",
        "count stratified over windows",
        "stratified, complementary pairs",
        "stratified, control variate",
    )
    bpb: dict[str, list[float]] = {name: [] for name in names}

    def total(nats: np.ndarray) -> float:
        return float(nats.sum()) / size / math.log(2)

    for repeat in range(args.repeats):
        random = torch.Generator().manual_seed(repeat)
        drawn = [bernoulli(x, random) for x in ids]
        nll = masked_window_nll(model, (item for item, _ in drawn))
        nats = np.array([float(y.sum()) * factor / len(y) for y, (_, factor) in zip(nll, drawn, strict=True)])
        bpb[names[0]].append(total(nats))

        counts = torch.cat([stratified_counts(1, length, random) for length in lengths])
        passes = [nelbo_mask(x, i, int(k), (1_000_000, repeat)) for x, i, k in zip(ids, chosen, counts, strict=True)]
        sums = np.array([float(y.sum()) for y in masked_window_nll(model, passes)])
        bpb[names[1]].append(total(sums * np.array(lengths) / counts.numpy()))

        counts = nelbo_counts(lengths, args.seed, repeat)
        passes = [nelbo_mask(x, i, int(k), (args.seed, repeat)) for x, i, k in zip(ids, chosen, counts, strict=True)]
        rows = list(masked_window_nll(model, passes))
        k = counts.numpy()
        nats = np.array([float(y.sum()) for y in rows]) * np.array(lengths) / k
        bpb[names[2]].append(total(nats))
        columns = []
        for item, y in zip(passes, rows, strict=True):
            masked = item.masked.numpy()
            guess = surprisal[item.ids.numpy()]
            a, b = guess[masked], y[masked]
            control = len(y) / len(a) * a.sum() - guess.sum()
            centred = a - a.mean()
            columns.append((control, centred @ centred, centred @ b))
        control, squares, products = np.array(columns).T
        bpb[names[4]].append(total(apply_control(nats, control, squares, products, k / np.array(lengths))))

        # Two passes per window from one permutation: the first k positions, and the last T + 1 - k.
        both = np.zeros(n)
        pairs = []
        for x, first in zip(ids, nelbo_counts(lengths, args.seed + 1, repeat).tolist(), strict=True):
            shuffled = torch.randperm(len(x), generator=random)
            for chosen_positions in (shuffled[:first], shuffled[first - 1 :]):
                mask = torch.zeros(len(x), dtype=torch.bool)
                mask[chosen_positions] = True
                pairs.append(MaskedWindow(x, mask, mask))
        for m, y in enumerate(masked_window_nll(model, pairs)):
            both[m // 2] += float(y.sum()) * len(y) / int(pairs[m].masked.sum()) / 2
        bpb[names[3]].append(total(both))

    rows_out = []
    usual = None
    for name in names:
        values = np.array(bpb[name])
        passes_each = 2 * n if "pairs" in name else n
        per_pass = float(values.var(ddof=1)) * passes_each
        usual = usual or per_pass
        rows_out.append(
            {
                "estimator": name,
                "mean bpb": float(values.mean()),
                "std. error of mean": float(values.std(ddof=1)) / math.sqrt(len(values)),
                "std. deviation of one repeat": math.sqrt(per_pass / n),
                f"passes for {TARGET}": math.ceil(per_pass / TARGET**2),
                "times fewer": round(usual / per_pass, 1),
            }
        )
    return rows_out


def orders(model: Model, windows: Windows, args: argparse.Namespace) -> list[dict[str, Any]]:
    """NELBO and exact code lengths on the same windows."""
    tokens = args.chain_windows * model.config.sequence_length
    rows = []
    estimates = [nelbo(model, windows, tokens=tokens, repeats=args.chain_repeats, seed=args.seed)]
    length = model.config.sequence_length
    names = ["left", "random(0)", *(f"spread({length // n})" for n in (2, 8)), *(f"block({n})" for n in (2, 4, 8))]
    estimates += [chain_rule(model, windows, tokens=tokens, order=name) for name in names]
    for name, e in zip(["", *names], estimates, strict=True):
        rows.append(
            {
                "figure": name or "NELBO",
                "kind": e.kind,
                "bpb": e.bpb,
                "mask std. error": e.mask_stderr_bpb,
                "passes per window": round(e.forward_passes / (e.tokens / length), 1),
                "seconds": round(e.seconds, 1),
            }
        )
    return rows


def compression(model: Model, _: Windows, args: argparse.Namespace) -> list[dict[str, Any]]:
    """The text's first bytes under the model and under general-purpose compressors."""
    if args.text is None:
        raise SystemExit("compress needs --text FILE")
    data = "\n".join(documents(args.text)).encode()[: args.bytes or None]
    data = data.decode("utf-8", "ignore").encode()  # the cut may fall inside a character
    rows: list[dict[str, Any]] = []

    def add(name: str, size: int, seconds: float, note: str = "") -> None:
        rows.append({"": name, "bytes": size, "bpb": 8 * size / len(data), "seconds": round(seconds, 1), "note": note})

    add("input", len(data), 0.0)
    for name, squeeze in compressors().items():
        started = time.perf_counter()
        add(name, len(squeeze(data)), time.perf_counter() - started)
    target = io.BytesIO()
    started = time.perf_counter()
    report = compress_stream(io.BytesIO(data), target, model)
    add("mezzotint", report.output_bytes, time.perf_counter() - started, f"{report.rest_bytes} bytes not modelled")
    if args.check:
        started = time.perf_counter()
        same = decompress(target.getvalue(), model) == data
        took = time.perf_counter() - started
        rows[-1]["note"] += f", decompressed {'identical' if same else 'DIFFERENT'} in {took:.1f} s"
    if not report.rest_bytes:
        started = time.perf_counter()
        whole: Any = TextWindows([data.decode()], model.tokenizer, model.config.sequence_length)
        figure = causal(model, whole)
        size = math.ceil(figure.bpb * len(data) / 8)
        add("figure of causal, windows that do not overlap", size, time.perf_counter() - started)
        rows[-1]["note"] = f"file is {100 * (report.output_bytes * 8 / len(data) / figure.bpb - 1):+.2f}% of this"
    return rows


def planted(model: Model, windows: Windows, args: argparse.Namespace) -> list[dict[str, Any]]:
    """The model against itself with noise on its weights: is the difference seen, and at what cost?"""
    rows = []
    for noise in args.noise:
        worse = copy.copy(model)
        worse.network = copy.deepcopy(model.network)
        worse.sha256 = None
        random = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in worse.network.parameters():
                draw = torch.randn(parameter.shape, generator=random).to(parameter.device)
                parameter.add_(draw * float(parameter.std() if parameter.numel() > 1 else 0) * noise)
        started = time.perf_counter()
        found = compare(
            model, worse, windows, tokens=args.windows * model.config.sequence_length, repeats=args.compare_repeats
        )
        mask_only = found.difference_bpb / found.mask_stderr_bpb if found.mask_stderr_bpb else math.inf
        rows.append(
            {
                "noise": noise,
                "difference bpb": found.difference_bpb,
                "std. error": round(found.stderr_bpb, 6),
                "p": f"{found.p_value:.2g}",
                "masks' std. error": round(found.mask_stderr_bpb, 6),
                "in these": round(mask_only, 1),
                "unpaired std. error": round(math.hypot(found.a.stderr_bpb, found.b.stderr_bpb), 6),
                "passes": found.a.forward_passes + found.b.forward_passes,
                "seconds": round(time.perf_counter() - started, 1),
            }
        )
    return rows


class First(Windows):
    """The windows that charge the first `tokens` tokens of a stream: the same text for every stride."""

    def __init__(self, windows: Windows, length: int, stride: int | None, tokens: int) -> None:
        super().__init__(windows.stream, length, stride)
        self.tokens = tokens

    def __len__(self) -> int:
        return max(1, min(super().__len__(), 1 + (self.tokens - self.length) // self.stride))


def bounds(model: Model, windows: Windows, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Every tighter figure beside the plain ones, on the same text; errors are those of the masks and orders drawn."""
    rows: list[dict[str, Any]] = []

    def add(what: str, estimate: Estimate) -> None:
        row = {"windows": what, "method": estimate.method, "kind": estimate.kind, "bpb": estimate.bpb}
        row |= {"s.e.": estimate.mask_stderr_bpb, "passes": estimate.forward_passes, "tokens": estimate.tokens}
        show(row | {"bytes": estimate.bytes}, estimate.seconds)

    def show(row: dict[str, Any], seconds: float) -> None:
        rows.append(row | {"seconds": round(seconds)})
        print(rows[-1], flush=True)
        if args.json:
            write_json(args.json, rows)

    length = model.config.sequence_length
    strided = {
        stride: First(windows, length, stride, args.stride_tokens) for stride in (length, length // 4, length // 8)
    }
    for stride, some in strided.items():
        add(f"{length}, stride {stride}", causal(model, some))
    for stride, some in strided.items():
        repeats = max(2, round(args.stride_passes / len(some)))  # about as many passes for each
        add(f"{length}, stride {stride}", nelbo(model, some, repeats=repeats, seed=args.seed))
    tokens = args.chain_windows * args.short
    short = First(windows, args.short, None, tokens)
    for lean in (0.0, 1.0, 4.0, 16.0):
        add(f"{args.short}", nelbo(model, short, repeats=args.chain_repeats, order_lean=lean, seed=args.seed))
    add(f"{args.short}", chain_rule(model, short))
    started = time.perf_counter()
    plan = Scoring.make(
        model, short, tokens=None, progress=None, repeats=args.orders_drawn, seed=args.seed, journal=args.journal
    )
    each = orders_matrix(model, plan, 1)
    for orders in (k for k in (1, 4, 16) if k <= len(each)):
        groups = each[: len(each) // orders * orders].reshape(-1, orders, each.shape[1])
        nats = (math.log(orders) - np.logaddexp.reduce(-groups, axis=1)).sum(1)  # the text's, of each group
        bpb = nats / plan.byte_counts.sum() / math.log(2)
        error = float(bpb.std(ddof=1)) / math.sqrt(len(bpb)) if len(bpb) > 1 else math.nan
        row = {"windows": f"{args.short}", "method": f"nelbo orders({orders})", "kind": "upper bound"}
        row |= {"bpb": float(bpb.mean()), "s.e.": error, "passes": groups[..., 0].size * sum(plan.lengths)}
        show(row | {"tokens": sum(plan.lengths), "bytes": int(plan.byte_counts.sum())}, time.perf_counter() - started)
    if args.lower_orders:
        add(f"{args.short}", lower_bound(model, short, orders=args.lower_orders, repeats=2, seed=args.seed))
    return rows


PARTS = {"variance": variance, "orders": orders, "bounds": bounds, "compress": compression, "compare": planted}


def main(words: Sequence[str] | None = None) -> None:
    """Parse, run, print."""
    parser = new_parser(__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--part", choices=[*PARTS, "all"], default="all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--windows", type=int, default=64, help="windows for variance and compare")
    parser.add_argument("--repeats", type=int, default=32, help="independent repeats for variance")
    parser.add_argument("--chain-windows", type=int, default=16, help="windows for orders")
    parser.add_argument("--chain-repeats", type=int, default=32, help="NELBO repeats for orders")
    parser.add_argument("--short", type=int, default=64, help="tokens of a window for K orders and leans")
    parser.add_argument("--orders-drawn", type=int, default=64, help="orders of a window for K orders")
    parser.add_argument("--lower-orders", type=int, default=16, help="for the lower bound (0: none)")
    parser.add_argument("--journal", type=Path, help="keeps what is done of K orders, to go on from")
    parser.add_argument("--stride-tokens", type=int, default=32_768, help="tokens for causal and nelbo with strides")
    parser.add_argument("--stride-passes", type=int, default=1024, help="forward passes for nelbo with each stride")
    parser.add_argument("--compare-repeats", type=int, default=8, help="NELBO repeats for compare")
    parser.add_argument("--noise", type=float, nargs="+", default=[0.02, 0.05], help="relative to each tensor's spread")
    parser.add_argument("--text", type=Path, help="file to compress: its documents joined by newlines")
    parser.add_argument("--bytes", type=int, default=100_000, help="how much of it (0: all)")
    parser.add_argument("--check", action="store_true", help="decompress as well")
    parser.add_argument("--json", type=Path, help="also write the tables here")
    args = parser.parse_args(words)
    model = load(args.model)
    windows = Dataset.open(args.data).split("val").windows(model.config.sequence_length)
    found = {}
    for part in PARTS if args.part == "all" else [args.part]:
        print(f"## {part}\n")
        found[part] = PARTS[part](model, windows, args)
        print(table(list(found[part][0]), [row.values() for row in found[part]]) + "\n", flush=True)
    write_json(args.json, found)


if __name__ == "__main__":
    main()
