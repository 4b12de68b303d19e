"""Bytes against likelihood: Mezzotint's packing, its ingredients one by one, the seed's codec, and the field's recipe.

    python benchmarks/rate_distortion.py RUN DATA [--windows 96] [--out FOLDER]

Every way of packing is swept over its own knob and scored on the same validation windows under the same masks, so that
differences pair up and have small standard errors. The table gives, at the likelihood cost of each baseline's points,
the bytes Mezzotint needs (interpolated on its curve: log bytes over log cost). All sizes are whole files: tokenizer
and header included on all sides. Writes rate_distortion.json and rate_distortion.png to --out.

The field's recipe: int6 GPTQ, rows clipped at a multiple of their standard deviation, int8 embeddings, codes and
scales compressed by the best of brotli (quality 11), zstd (level 22) and LZMA (preset 9 extreme).
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import json
import lzma
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import brotli
import matplotlib
import numpy as np
import torch
import zstandard

from mezzotint import artifact, quantize
from mezzotint.data import Dataset
from mezzotint.model import Model
from mezzotint.objective import mask_by_count, masked_nll, nelbo_per_window, stratified_counts
from mezzotint.train import load_run

matplotlib.use("Agg")
import matplotlib.pyplot as plt


class Score:
    """Bits per byte of each of a fixed set of full windows under fixed masks."""

    def __init__(self, data: Dataset, length: int, count: int, mask_id: int, repeats: int, seed: int = 0) -> None:
        windows = data.split("val").windows(length)
        full = [i for i in range(len(windows)) if len(windows[i]) == length]
        chosen = [full[int(i)] for i in np.linspace(0, len(full) - 1, min(count, len(full)))]
        self.ids = torch.from_numpy(np.stack([windows[i] for i in chosen]))
        self.bytes = torch.tensor([windows.byte_count(i) for i in chosen], dtype=torch.float64)
        generator = torch.Generator().manual_seed(seed)
        self.masks = []
        for _ in range(repeats):
            counts = stratified_counts(len(chosen), length, generator)
            self.masks.append((counts, *mask_by_count(self.ids, counts, mask_id, generator)))

    def __call__(self, model: Model) -> np.ndarray:
        rows = []
        for counts, corrupted, masked in self.masks:
            for start in range(0, len(self.ids), 8):
                part = slice(start, start + 8)
                logits = model.logits(corrupted[part], positions=masked[part])
                nll = masked_nll(logits, self.ids[part], masked[part])
                bits = nelbo_per_window(nll.double(), counts[part]) / math.log(2)
                # Over the mean bytes of a window, so that the mean over windows is bits per byte of all of them.
                rows.append(bits / self.bytes.mean())
        return torch.stack(rows_to_windows(rows, len(self.ids))).mean(0).numpy()


def rows_to_windows(rows: list[torch.Tensor], windows: int) -> list[torch.Tensor]:
    """One tensor of all windows per repeat."""
    flat = torch.cat(rows)
    return list(flat.reshape(-1, windows))


def general_purpose(data: bytes) -> tuple[int, str]:
    """Size under the best of three general-purpose compressors, and its name."""
    sizes = {
        "brotli": len(brotli.compress(data, quality=11, lgwin=24)),
        "zstd-22": len(zstandard.ZstdCompressor(level=22).compress(data)),
        "lzma": len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME)),
    }
    best = min(sizes, key=lambda name: sizes[name])
    return sizes[best], best


def clipped(state: dict[str, np.ndarray], hessians: dict[str, torch.Tensor], deviations: float) -> dict[str, Any]:
    """int6 GPTQ with rows clipped at `deviations` standard deviations; int8 embeddings."""
    tensors: dict[str, Any] = {}
    for name, value in state.items():
        hessian = hessians.get(name.removesuffix(".weight"))
        if hessian is not None:
            rows = (deviations * value.std(axis=1) / quantize.INT6_LIMIT).astype(np.float16)
            tensors[name] = quantize.gptq(torch.from_numpy(value), hessian, rows)
        elif name.endswith("embedding.weight"):
            rows = (np.abs(value).max(axis=1) / quantize.INT8_LIMIT).astype(np.float16)
            tensors[name] = quantize.round_to_grid(value, rows, quantize.INT8_LIMIT)
        else:
            tensors[name] = artifact._floats(value)
    return tensors


@contextlib.contextmanager
def without(ingredient: str, packer: artifact._Rate) -> Iterator[None]:
    """Mezzotint's packing with one ingredient taken away."""
    original_scales, original_fit = quantize.curved_scales, artifact.entropy.fit
    curvature = packer.curvature

    def one_column_scale(weight, item, step, limit, **options):
        rows, columns = original_scales(weight, item, step, limit, **options)
        middle = float(np.exp(np.log(columns.astype(np.float64)).mean()))
        rows = rows.astype(np.float64) * middle
        rows = np.maximum(rows, np.abs(weight).max(axis=1) / (0.8 * limit))
        return quantize.snap(rows, 8), np.ones_like(columns)

    patches: dict[str, Any] = {
        "nothing": contextlib.nullcontext(),
        "price of bits": mock.patch.object(artifact, "BIT_PRICE", 0.0),
        "column steps": mock.patch.object(quantize, "curved_scales", one_column_scale),
        "row importance": mock.patch.object(
            packer,
            "curvature",
            {n: dataclasses.replace(c, rows=np.ones_like(c.rows)) for n, c in curvature.items()},
        ),
        "column classes": mock.patch.object(
            artifact.entropy, "fit", lambda planes, **o: original_fit(planes, **{**o, "columns": False})
        ),
    }
    with patches[ingredient]:
        yield


INGREDIENTS = ("nothing", "price of bits", "column steps", "row importance", "column classes")


def interpolate(curve: list[dict[str, float]], cost: float) -> float | None:
    """Bytes at a likelihood cost, log-log linear between points of a curve; None outside."""
    points = sorted((p["cost_bpb"], p["bytes"]) for p in curve if p["cost_bpb"] > 0)
    for (a, x), (b, y) in itertools.pairwise(points):
        if a <= cost <= b:
            share = (math.log(cost) - math.log(a)) / max(1e-12, math.log(b) - math.log(a))
            return math.exp(math.log(x) + share * (math.log(y) - math.log(x)))
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--windows", type=int, default=96, help="validation windows scored")
    parser.add_argument("--repeats", type=int, default=1, help="masks per window")
    parser.add_argument("--calibration-tokens", type=int, default=32_768)
    parser.add_argument("--out", type=Path, default=Path())
    parser.add_argument("--quick", action="store_true", help="fewer points and no ablations")
    options = parser.parse_args()

    model, data = load_run(options.run), Dataset.open(options.data)
    score = Score(data, model.config.sequence_length, options.windows, model.config.mask_id, options.repeats)
    before = score(model)
    print(f"unpacked: {before.mean():.5f} bits per byte on {len(before)} windows", file=sys.stderr)
    windows = artifact.calibration_windows(model, data.split("train"), options.calibration_tokens)
    state = artifact._state(model)

    def measure(name: str, knob: float, size: int, tensors: dict[str, Any], **more: Any) -> dict[str, Any]:
        values = {n: artifact._values(t) for n, t in tensors.items()}
        packed = dataclasses.replace(model, network=artifact.network_of(model.config, values))
        cost = score(packed) - before
        point = {
            "packing": name, "knob": knob, "bytes": size, "cost_bpb": float(cost.mean()),
            "stderr_bpb": float(cost.std(ddof=1) / math.sqrt(len(cost))), **more,
        }  # fmt: skip
        print(
            f"{name:28s} {knob:10.4g} {size:11,d} bytes  {point['cost_bpb']:+.5f} +- {point['stderr_bpb']:.5f}",
            file=sys.stderr,
        )
        return point

    points: list[dict[str, Any]] = []
    quiet = lambda _: None  # noqa: E731
    packer = artifact._Rate(model, windows, 0, artifact.TOLERANCE, quiet)
    knobs = [2.0**k for k in (range(-4, 3, 2) if options.quick else range(-4, 7))]
    for ingredient in INGREDIENTS[:1] if options.quick else INGREDIENTS:
        label = "mezzotint" if ingredient == "nothing" else f"without {ingredient}"
        for knob in knobs if ingredient == "nothing" else knobs[1::2]:
            begin = time.perf_counter()
            with without(ingredient, packer):
                tried = packer.attempt(packer.finest * knob)
            seconds = time.perf_counter() - begin
            points.append(measure(label, knob, len(tried.data), tried.tensors, seconds=seconds))

    for codec in ("int6", "reference"):
        pruner = artifact._Pruned(model, windows, 0, codec, quiet)
        for share in (0.0, 1.0) if options.quick else (0.0, 0.25, 0.5, 1.0):
            tried = pruner.attempt(int(share * len(pruner.costs)))
            points.append(measure(f"--codec {codec}", share, len(tried.data), tried.tensors))

    hessians = quantize.calibration_hessians(model, windows)
    tokenizer = len(artifact._Writer(model, artifact.LZMA).tokenizer)
    for deviations in (12, 48) if options.quick else (6, 12, 24, 48, 96):
        tensors = clipped(state, hessians, deviations)
        size, best = general_purpose(b"".join(b"".join(artifact._raw_parts(t)) for t in tensors.values()))
        # The same tokenizer and 600 bytes of header as an artifact has.
        name = "std-clip + general purpose"
        points.append(measure(name, deviations, size + tokenizer + 600, tensors, compressor=best))
        coded = artifact._Writer(model, artifact.RANGE).write(tensors)
        points.append(measure("std-clip + range coder", deviations, len(coded), tensors))

    curve = [p for p in points if p["packing"] == "mezzotint"]
    print("| packing | knob | bytes | bits/param | cost, bits per byte | Mezzotint's bytes at that cost | saved |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    parameters = sum(v.size for v in state.values())
    for point in points:
        same = None if point["packing"] == "mezzotint" else interpolate(curve, point["cost_bpb"])
        point["mezzotint_bytes"] = same
        print(
            f"| {point['packing']} | {point['knob']:g} | {point['bytes']:,} | {8 * point['bytes'] / parameters:.3f} "
            f"| {point['cost_bpb']:+.5f} ± {point['stderr_bpb']:.5f} "
            + (f"| {same:,.0f} | {1 - same / point['bytes']:.1%} |" if same else "| | |")
        )
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "rate_distortion.json").write_text(json.dumps(points, indent=1))
    figure, axes = plt.subplots(figsize=(8, 5))
    for name in dict.fromkeys(p["packing"] for p in points):
        own = sorted((p["bytes"] / 1e6, p["cost_bpb"]) for p in points if p["packing"] == name)
        axes.plot(*zip(*own, strict=True), marker="o", label=name, linewidth=2 if name == "mezzotint" else 1)
    axes.set(xlabel="artifact, millions of bytes", ylabel="NELBO cost, bits per byte")
    axes.set_yscale("symlog", linthresh=1e-4)
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(options.out / "rate_distortion.png", dpi=150)


if __name__ == "__main__":
    main()
