"""Quality and speed of samplers, and of filling gaps, judged by an independently trained autoregressive model.

    python benchmarks/sampling.py MODEL --judge AR_RUN --data DATA --out FOLDER [--parts frontier,infill,latency]
                                  [--continuer AR_RUN]

frontier: texts of a window's length for each sampler, number of passes and temperature. Judged bits per byte alone
would crown repetition, so each point also has the entropy of its ids and its share of distinct 4-grams, beside those
of real text, and two points count as equal only if neither is worse in any of the three. `next tokens`, for a model that learnt them
too, draws a token a pass but keeps keys and values, so that a pass costs a fraction of the others'.
infill: spans removed from held-out text, filled by the model (which sees both sides; the surest token first, or from
left to right) and by an autoregressive model going on from the left, which does not see the suffix. That one should
be another than the judge, of the same shape and minutes as the model: who judges its own words finds them likely. What
is judged is the span and the 32 ids after it. Also single words of --texts, by exact match, and the sentences of
sentences.txt; these need no judge.
latency: loading, and one gap in a sentence.

Every finished point is a line of FOLDER/points.jsonl and is not computed again; a frontier may be drawn in several calls.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import Book, judged_nats, new_parser, plus_minus, table
from torch import Tensor

from mezzotint import seeding
from mezzotint.data.dataset import Dataset
from mezzotint.network.model import Model, shift_right
from mezzotint.pretrained import load
from mezzotint.sampling.denoise import denoise
from mezzotint.sampling.infill import infill
from mezzotint.sampling.samplers import sample_tokens

SAMPLERS: dict[str, dict[str, Any]] = {
    "ancestral": {"sampler": "ancestral"},
    "confidence": {"sampler": "confidence"},
    "confidence+noise": {"sampler": "confidence", "order_noise": 4.0},
    "margin+noise": {"sampler": "margin", "order_noise": 4.0},
    "entropy": {"sampler": "entropy"},
    "blocks": {"sampler": "blocks", "block": 32, "order_noise": 4.0},
    "remask": {"sampler": "remask"},
    "next tokens": {"sampler": "blocks", "block": 1, "attention": "causal"},
}
BUDGETS = (0.1, 0.3, 1.0, 3.0, 8.0)  # of `entropy`, whose passes follow from the budget
SPANS = (1, 2, 4, 8, 16, 32)
AFTER = 32


@torch.inference_mode()
def continue_left_to_right(model: Model, left: Tensor, count: int, temperature: float, seed: int) -> Tensor:
    """`count` ids after each row of `left` [B, n], by the autoregressive model. Returns [B, n + count]."""
    allowed = model.tokenizer.is_text
    generators = [seeding.generator(seed, b) for b in range(len(left))]
    ids = left
    for _ in range(count):
        shifted = shift_right(ids, model.config.mask_id, keep_last=True)
        logits = model.logits(shifted, block_size=1)[:, -1].double().masked_fill(~allowed, -math.inf)
        uniform = torch.stack([torch.rand((), generator=g, dtype=torch.float64) for g in generators])
        ids = torch.cat((ids, sample_tokens(logits, uniform, temperature, 1.0)[:, None]), 1)
    return ids


def character(ids: Tensor) -> dict[str, float]:
    """Entropy of the ids within a text (nats, mean over texts) and the share of distinct 4-grams within a text."""
    entropy, distinct = [], []
    for row in ids.tolist():
        p = np.array(list(Counter(row).values())) / len(row)
        entropy.append(float(-(p * np.log(p)).sum()))
        grams = list(zip(row, row[1:], row[2:], row[3:], strict=False))
        distinct.append(len(set(grams)) / len(grams))
    return {"entropy": float(np.mean(entropy)), "distinct4": float(np.mean(distinct))}


def judged(judge: Model, ids: Tensor) -> dict[str, float]:
    """Bits per byte under the judge, BOS at place 0 given, with the standard error over texts."""
    nats = judged_nats(judge, ids)[:, 1:].sum(1).numpy() / math.log(2)
    counts = judge.tokenizer.byte_counts
    size = np.array([counts(row[1:], int(row[0])).sum() for row in ids.numpy()])
    ratio = float(nats.sum() / size.sum())
    error = float(np.std(nats - ratio * size, ddof=1) * math.sqrt(len(size)) / size.sum())
    return {"judged_bpb": ratio, "stderr": error, **character(ids[:, 1:])}


def starts(model: Model, data: Dataset, count: int, length: int) -> Tensor:
    """Real text: `length` ids of `count` validation documents, evenly spaced, from the BOS of each."""
    stream = data.split("val")
    ids = np.asarray(stream[0 : len(stream)]).astype(np.int64)
    heads = np.flatnonzero(ids == model.tokenizer.bos_id)
    long = [h for h, end in zip(heads, [*heads[1:], len(ids)], strict=True) if end - h >= length]
    chosen = [long[i * len(long) // count] for i in range(min(count, len(long)))]
    return torch.from_numpy(np.stack([ids[h : h + length] for h in chosen]))


class Points(Book):
    """Points already computed, by `key`; prints each new one."""

    def point(self, key: str, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The point of `key`, computed where there is none yet."""
        known = self.find(key=key)
        if known is None:
            known = self.add({"key": key, **compute()})
            print(json.dumps(known), flush=True)
        return known


def measure(
    model: Model,
    judge: Model,
    options: argparse.Namespace,
    name: str,
    temperature: float,
    more: dict[str, Any],
    other_seed: int = 0,
) -> dict[str, Any]:
    """Draw texts at one point and have them judged.

    BOS would end a text early and make lengths, and so entropies, unequal; it is left out for every sampler alike.
    """
    length = options.length or model.config.sequence_length
    canvas = torch.full((options.n, length), model.config.mask_id)
    canvas[:, 0] = model.tokenizer.bos_id
    ids, passes, seconds = [], 0.0, 0.0
    # The rows of a batch stop at different passes under `entropy`: one by one the mean is exact.
    size = 1 if name == "entropy" else options.n
    for row in range(0, options.n, size):
        started = time.perf_counter()
        result = denoise(
            model,
            canvas[row : row + size],
            seed=options.seed + other_seed,
            first_row=row,
            temperature=temperature,
            **SAMPLERS[name],
            **more,
        )
        seconds += time.perf_counter() - started
        passes += result.forward_passes * len(result.ids) / options.n
        ids.append(result.ids)
    rate = options.n * (length - 1) / seconds
    point = {"name": name, "temperature": temperature, **more, "passes": passes, "tokens_per_second": rate}
    return point | judged(judge, torch.cat(ids))


def frontier(model: Model, judge: Model, data: Dataset, book: Points, options: argparse.Namespace) -> None:
    length = options.length or model.config.sequence_length
    book.point("real", lambda: {"name": "real text", **judged(judge, starts(model, data, 64, length))})
    for name in SAMPLERS:
        if options.samplers and name not in options.samplers.split(","):
            continue
        if name == "next tokens" and not model.trained_causally:
            continue
        for temperature in options.temperatures:
            grid: list[dict[str, Any]] = [{"steps": k} for k in options.passes if k <= length]
            if name == "next tokens":
                grid = [{"steps": length}]
            if name == "entropy":
                grid = [{"entropy_budget": b} for b in BUDGETS]
            for more in grid:
                key = f"{name} T={temperature:g} " + " ".join(f"{k}={v:g}" for k, v in more.items())
                book.point(key, lambda n=name, t=temperature, m=more: measure(model, judge, options, n, t, m))


def infilling(
    model: Model, judge: Model, continuer: Model, data: Dataset, book: Points, options: argparse.Namespace
) -> list[dict]:
    length = model.config.sequence_length
    texts = starts(model, data, options.n_infill, length)
    points = []
    for span in SPANS:

        def compute(span=span) -> dict[str, Any]:
            at = (length - span) // 2
            end = at + span + AFTER
            canvas = texts.clone()
            canvas[:, at : at + span] = model.config.mask_id
            size = model.tokenizer.byte_counts
            found: dict[str, Any] = {"name": "infill", "span": span}
            how = {"seed": options.seed, "temperature": options.fill_temperature}
            surest = denoise(model, canvas, sampler="confidence", **how)
            in_order = denoise(model, canvas, sampler="blocks", block=1, attention="full", **how)
            left = continue_left_to_right(continuer, texts[:, :at], span, options.fill_temperature, options.seed)
            theirs = torch.cat((left, texts[:, at + span :]), 1)
            # The model itself, left to right and blind to the suffix.
            own = denoise(model, canvas[:, : at + span], sampler="blocks", block=1, **how)
            blind = torch.cat((own.ids, texts[:, at + span :]), 1)
            fills = {"original": texts, "surest": surest.ids, "in_order": in_order.ids}
            fills |= {"continuation": theirs, "blind": blind}
            off: dict[str, np.ndarray] = {}
            for name, ids in fills.items():
                nats = judged_nats(judge, ids)[:, at:end].sum(1).numpy() / math.log(2)
                count = np.array([size(row[at:end], int(row[at - 1])).sum() for row in ids.numpy()])
                ratio = nats.sum() / count.sum()
                off[name] = (nats - ratio * count) / count.mean()  # of each text, whose mean is 0
                found[name] = float(ratio)
                found[name + "_stderr"] = float(np.std(off[name], ddof=1) / len(count) ** 0.5)
            for name in ("surest", "in_order"):
                found[f"exact_{name}"] = float((fills[name] == texts).all(1).float().mean())
                # What texts cost all fills alike drops out of the difference.
                paired = off[name] - off["continuation"]
                found[f"difference_{name}"] = found[name] - found["continuation"]
                found[f"difference_{name}_stderr"] = float(np.std(paired, ddof=1) / len(paired) ** 0.5)
            return found

        against = f" against {options.continuer.name}" if options.continuer else ""
        points.append(book.point(f"infill {span} T={options.fill_temperature:g}{against}", compute))
    return points


def gaps_of_one_word(path: Path, count: int, characters: int = 640, skip: int = 1200) -> list[tuple[str, str, str]]:
    """(text before, word, text after) from `count` texts of a Parquet file, evenly spaced: the word in the middle."""
    import pyarrow.parquet as pq

    found = []
    for text in pq.read_table(path, columns=["text"])["text"].to_pylist():
        if len(text) <= skip + 2 * characters:
            continue
        start = text.index(" ", skip) + 1
        part = text[start : start + characters]
        part = part[: part.rfind(" ")]
        places = [m for m in re.finditer(r"(?<= )[A-Za-z]{2,}(?= )", part) if abs(m.start() - len(part) // 2) < 120]
        if places:
            place = min(places, key=lambda m: abs(m.start() - len(part) // 2))
            found.append((part[: place.start()], place[0], part[place.end() :]))
    return [found[i * len(found) // count] for i in range(min(count, len(found)))]


def single_words(model: Model, path: Path, count: int, how: str) -> dict[str, Any]:
    """Single words of real text taken out, length not told: how often the fill is the word, among five, of its length."""
    options: dict[str, Any] = {"n": 5} if how == "ranked" else {"temperature": 0.0}
    size = model.tokenizer.encode_continuation
    rows, started, seconds = [], time.process_time(), 0.0
    for before, word, after in gaps_of_one_word(path, count):
        filled = infill(model, f"{before}____{after}", **options)
        texts = [a.text for a in filled.gaps[0].alternatives]
        seconds += filled.seconds
        rows.append((texts[0] == word, word in texts, len(size(" " + texts[0])) == len(size(" " + word))))
    first, five, length = np.mean(rows, axis=0).tolist()
    return {
        "name": "words",
        "words": len(rows),
        "exact": first,
        "exact_stderr": math.sqrt(first * (1 - first) / len(rows)),
        "among_five": five,
        "length_right": length,
        "seconds_a_gap": seconds / len(rows),
        "processor_seconds_a_gap": (time.process_time() - started) / len(rows),
    }


def sentences(model: Model) -> dict[str, Any]:
    """The sentences of sentences.txt, filled."""
    lines = (Path(__file__).parent / "sentences.txt").read_text().splitlines()
    return {"name": "sentences", "filled": [infill(model, line).text for line in lines]}


def latency(path: Path, book: Points) -> list[dict]:
    def compute() -> dict[str, Any]:
        started = time.perf_counter()
        model = load(path)
        loading = time.perf_counter() - started
        times, passes = [], 0
        for seed in range(7):
            filled = infill(model, "The old man opened the ____ and looked out at the sea.", seed)
            times.append(filled.seconds)
            passes = filled.forward_passes
        return {
            "name": "latency",
            "load_seconds": loading,
            "first_fill_seconds": times[0],
            "fill_seconds": float(np.median(times)),
            "passes": passes,
            "threads": torch.get_num_threads(),
        }

    return [book.point(f"latency threads={torch.get_num_threads()}", compute)]


def no_worse(point: dict, than: dict) -> bool:
    """Judged no worse, and hardly more repetitive by either measure.

    No allowance for the standard error: it would be the larger the fewer texts were drawn.
    """
    return (
        point["judged_bpb"] <= than["judged_bpb"]
        and point["entropy"] >= than["entropy"] - 0.05
        and point["distinct4"] >= than["distinct4"] - 0.01
    )


def confirm(
    model: Model, judge: Model, data: Dataset, book: Points, points: list[dict], options: argparse.Namespace
) -> None:
    """For ancestral sampling at each temperature: the point with the fewest passes that is no worse, on two seeds.

    What counts as ancestral's passes is the fewest by which ancestral sampling itself is no worse than its own most.
    The fewest of many points is partly luck, so what was picked on one seed is believed only if it holds on another.
    """

    def again(point: dict) -> dict:
        more = {k: point[k] for k in ("steps", "entropy_budget") if k in point}
        return book.point(
            f"fresh seed: {point['key']}",
            lambda: measure(model, judge, options, point["name"], point["temperature"], more, 1),
        )

    drawn = [p for p in points if "passes" in p]
    rows = []
    for temperature in options.temperatures:
        own = [p for p in drawn if p["name"] == "ancestral" and p["temperature"] == temperature]
        if not own:
            continue
        most = max(own, key=lambda p: p["passes"])
        equal = sorted((p for p in drawn if no_worse(p, most)), key=lambda p: p["passes"])
        itself = next(p for p in equal if p["name"] == "ancestral")
        fewest = equal[0]
        holds = no_worse(again(fewest), again(most))
        fewer = f"{itself['passes'] / fewest['passes']:.1f} times fewer"
        rows.append([most["key"], itself["key"], fewest["key"], fewer, "yes" if holds else "no"])
    titles = ["ancestral", "judged as well by itself", "by any", "passes", "holds on a fresh seed"]
    print("\n" + table(titles, rows), flush=True)


def plot(points: list[dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(13, 5), constrained_layout=True)
    real = next(p for p in points if p["name"] == "real text")
    temperatures = sorted({p["temperature"] for p in points if "temperature" in p}, reverse=True)
    for i, name in enumerate(SAMPLERS):
        for temperature in temperatures:
            line = [p for p in points if p["name"] == name and p["temperature"] == temperature]
            if not line:
                continue
            line.sort(key=lambda p: p["passes"])
            style: dict[str, Any] = {
                "color": f"C{i}",
                "marker": "o",
                "ms": 4,
                "alpha": 0.4 + 0.6 * (1 + temperatures.index(temperature)) / len(temperatures),
                "label": f"{name}, T={temperature:g}",
            }
            axes[0].plot([p["passes"] for p in line], [p["judged_bpb"] for p in line], **style)
            axes[1].plot([p["tokens_per_second"] for p in line], [p["judged_bpb"] for p in line], **style)
            axes[2].plot([p["entropy"] for p in line], [p["judged_bpb"] for p in line], **style)
    for axis, label in zip(axes, ("forward passes", "tokens per second", "entropy of ids, nats"), strict=True):
        axis.axhline(real["judged_bpb"], color="grey", lw=1)
        axis.set(xlabel=label, ylabel="judged bits per byte")
    axes[0].set_xscale("log", base=2)
    axes[1].set_xscale("log")
    axes[2].plot(real["entropy"], real["judged_bpb"], "k*", ms=12, label="real text")
    handles, labels = axes[2].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, fontsize=8)
    figure.savefig(path, dpi=130)


def main(words: Sequence[str] | None = None) -> None:
    """Parse, draw and judge what is missing, print."""
    parser = new_parser(__doc__)
    parser.add_argument("model", type=Path, help="run folder, .mzt artifact or the name of a shipped model")
    parser.add_argument("--judge", type=Path, help="run folder of the autoregressive judge")
    parser.add_argument(
        "--continuer", type=Path, help="run folder of the autoregressive model that goes on from the left [the judge]"
    )
    parser.add_argument("--data", type=Path, help="prepared data")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--parts", default="frontier,infill,latency")
    parser.add_argument("--n", type=int, default=32, help="texts per point")
    parser.add_argument("--n-infill", type=int, default=128, help="texts with a span removed")
    parser.add_argument("--texts", type=Path, nargs="*", default=[], help="Parquet files to take single words out of")
    parser.add_argument("--n-words", type=int, default=200, help="words taken out of each")
    parser.add_argument("--length", type=int, default=0)
    parser.add_argument("--passes", type=int, nargs="+", default=[8, 16, 32, 64, 128, 256])
    parser.add_argument("--temperatures", type=float, nargs="+", default=[1.0, 0.9, 0.8])
    parser.add_argument("--fill-temperature", type=float, default=0.7)
    parser.add_argument("--samplers", default="")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(words)
    book = Points(options.out / "points.jsonl")
    parts = options.parts.split(",")
    if "latency" in parts:
        latency(options.model, book)
    if "infill" in parts:
        model = load(options.model)
        for path in options.texts:
            for how in ("greedy", "ranked"):
                book.point(f"words {path.name} {how}", lambda p=path, h=how: single_words(model, p, options.n_words, h))
        book.point("sentences", lambda: sentences(model))
    if "frontier" in parts or ("infill" in parts and options.judge):
        if options.judge is None or options.data is None:
            parser.error("frontier, and spans judged, need --judge and --data")
        model, judge, data = load(options.model), load(options.judge), Dataset.open(options.data)
        if "frontier" in parts:
            frontier(model, judge, data, book, options)
            points = [p for p in book.rows if "judged_bpb" in p and not p["key"].startswith("fresh seed")]
            plot(points, options.out / "frontier.png")
            confirm(model, judge, data, book, points, options)
        if "infill" in parts:
            continuer = load(options.continuer) if options.continuer else judge
            infilling(model, judge, continuer, data, book, options)
    cells = [
        [p["key"], f"{p.get('passes', 0):.1f}", plus_minus(p["judged_bpb"], p["stderr"], ".3f"), f"{p['entropy']:.3f}",
         f"{p['distinct4']:.3f}", f"{p.get('tokens_per_second', 0):.0f}"]
        for p in book.rows if "judged_bpb" in p
    ]  # fmt: skip
    print("\n" + table(["point", "passes", "judged bpb", "entropy", "distinct 4-grams", "tokens/s"], cells))
    cells = []
    for p in (p for p in book.rows if p["name"] == "infill"):
        fills = ("original", "surest", "in_order", "continuation", "blind")
        cells.append([p["span"], *(plus_minus(p[k], p[f"{k}_stderr"], ".3f") for k in fills)])
        for k in ("surest", "in_order"):
            paired = plus_minus(p[f"difference_{k}"], p[f"difference_{k}_stderr"], "+.3f")
            cells[-1].append(f"{paired}, exact {p[f'exact_{k}']:.0%}")
    titles = ["span", "original", "surest first", "left to right", "continuation", "own continuation"]
    print("\n" + table([*titles, "surest less continuation", "left to right less continuation"], cells))


if __name__ == "__main__":
    main()
