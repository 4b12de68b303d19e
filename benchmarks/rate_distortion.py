"""Bytes against likelihood: Mezzotint's packing, its ingredients one by one, the seed's codec, and the field's recipe.

    python benchmarks/rate_distortion.py RUN DATA --out FOLDER [--windows 96] [--only mezzotint]
    python benchmarks/rate_distortion.py RUN DATA --out FOLDER --windows 12 --short --only mezzotint reference general \
        --steps 0.4 1 2.5 --deviations 6 12 --drop 0
    python benchmarks/rate_distortion.py RUN DATA --out FOLDER --time
    python benchmarks/rate_distortion.py RUN DATA --out FOLDER --time-reference

Every way of packing is swept over its own knob and scored on the same validation windows under the same masks, so that
differences pair up and have small standard errors. Two costs are given: the rise of the NELBO, which is what counts,
and the divergence from the unpacked model's predictions under the NELBO's weights, its expectation if the text were
drawn from these predictions, which has a far smaller error. "Bytes at equal ..." are interpolated on Mezzotint's curve
(log bytes over log divergence). All sizes are whole files: tokenizer and header included on all sides. Standard errors
are over windows. Each point is kept in points.jsonl, so a run that was stopped goes on where it was; table.md and
rate_distortion.png are written anew each time.

The field's recipe: int6 GPTQ, rows clipped at a multiple of their standard deviation, int8 embeddings, codes and
scales compressed by the best of LZMA (preset 9 extreme) and, where installed, brotli (quality 11) and zstd (level 22).
Knows nothing of training. The second command above is for a large model: few rows, few windows, and none of what
was not built. `--time` packs the run and opens the artifact, `--time-reference` a network of the reference preset with
random weights.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import hashlib
import itertools
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from common import Book, compressors, new_parser, plus_minus, say, table

from mezzotint.config import ModelConfig, preset, to_dict
from mezzotint.data.dataset import Dataset
from mezzotint.network.model import Denoiser, Model
from mezzotint.objective import mask_by_count, masked_nll, nelbo_per_window, stratified_counts
from mezzotint.packing import artifact, entropy, grid, pack, quantize
from mezzotint.training.checkpoint import load_run

FULL = "mezzotint"
RECIPE = "std-clip int6 + general purpose"
STEPS = (0.3, 0.5, 0.8, 1.25, 2.0, 3.2, 5.0, 8.0)  # over the step that costs the default tolerance by prediction
VARIANT_STEPS = (0.8, 2.0)
DEVIATIONS = (6.0, 9.0, 12.0, 24.0, 48.0)
DROPS = (0.0, 1.0)
SHARE = 0.42  # bytes per parameter at which the cost is given
Point = dict[str, Any]
STRONGEST = compressors(zstd=22, window=24)
Packed = tuple[int, dict[str, Any], dict[str, Any]]


class Score:
    """Costs of packed models against the unpacked one, in bits per byte, window by window, under fixed masks."""

    def __init__(self, model: Model, data: Dataset, count: int, repeats: int, seed: int = 0) -> None:
        length = model.config.sequence_length
        windows = data.split("val").windows(length)
        full = [i for i in range(len(windows)) if len(windows[i]) == length]
        chosen = [full[int(i)] for i in np.linspace(0, len(full) - 1, min(count, len(full)))]
        self.ids = torch.from_numpy(np.stack([windows[i] for i in chosen]))
        # Over the mean bytes of a window, so that the mean over windows is bits per byte of all of them.
        self.unit = math.log(2) * float(np.mean([windows.byte_count(i) for i in chosen]))
        generator = torch.Generator().manual_seed(seed)
        self.masks = []
        for _ in range(repeats):
            counts = stratified_counts(len(chosen), length, generator)
            self.masks.append((counts, *mask_by_count(self.ids, counts, model.config.mask_id, generator)))
        self.before = list(self._logits(model))

    def _logits(self, model: Model) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]]:
        for counts, corrupted, masked in self.masks:
            for start in range(0, len(self.ids), 8):
                part = slice(start, start + 8)
                yield model.logits(corrupted[part], positions=masked[part]), self.ids[part], masked[part], counts[part]

    def _nelbo(self, logits: torch.Tensor, ids: torch.Tensor, masked: torch.Tensor, counts: torch.Tensor) -> np.ndarray:
        return nelbo_per_window(masked_nll(logits, ids, masked).double(), counts).numpy() / self.unit

    def _by_window(self, rows: list[np.ndarray]) -> np.ndarray:
        return np.concatenate(rows).reshape(len(self.masks), len(self.ids)).mean(axis=0)

    def unpacked(self) -> np.ndarray:
        """The unpacked model's NELBO, window by window."""
        return self._by_window([self._nelbo(*part) for part in self.before])

    def __call__(self, model: Model) -> tuple[np.ndarray, np.ndarray]:
        """Rise of the NELBO, and divergence, window by window."""
        rises, divergences = [], []
        for after, before in zip(self._logits(model), self.before, strict=True):
            rises.append(self._nelbo(*after) - self._nelbo(*before))
            old, new = before[0].log_softmax(-1), after[0].log_softmax(-1)
            _, ids, masked, counts = before
            weight = (ids.shape[1] / counts.double())[:, None].expand(masked.shape)[masked]
            row = torch.arange(len(ids))[:, None].expand(masked.shape)[masked]
            moved = (old.exp() * (old - new)).sum(-1).double() * weight
            divergences.append(torch.zeros(len(ids), dtype=torch.float64).index_add(0, row, moved).numpy() / self.unit)
        return self._by_window(rises), self._by_window(divergences)


def general_purpose(tensors: dict[str, Any]) -> tuple[int, str]:
    """Size of the raw codes and scales under the best general-purpose compressor, and its name."""
    parts = []
    for tensor in tensors.values():
        codes = tensor.codes if isinstance(tensor, grid.Grid) else np.zeros(0, dtype=np.int16)
        # Codes beyond int8 go as their low bytes and then their high bytes, which compress to little.
        wide = np.abs(codes).max(initial=0) > 127
        parts += artifact.raw_parts(tensor)
        if wide:
            parts.append((codes >> 8).astype(np.int8).tobytes())
    data = b"".join(parts)
    sizes = {name: len(compress(data)) for name, compress in STRONGEST.items()}
    best = min(sizes, key=lambda name: sizes[name])
    return sizes[best], best


def clipped(state: dict[str, np.ndarray], hessians: dict[str, torch.Tensor], deviations: float) -> dict[str, Any]:
    """int6 GPTQ with rows clipped at `deviations` standard deviations; int8 embeddings."""
    tensors: dict[str, Any] = {}
    for name, value in state.items():
        hessian = hessians.get(name.removesuffix(".weight"))
        if hessian is not None:
            rows = (deviations * value.std(axis=1) / grid.INT6_LIMIT).astype(np.float16)
            tensors[name] = quantize.gptq(torch.from_numpy(value), hessian, rows)
        elif name.endswith("embedding.weight"):
            rows = (np.abs(value).max(axis=1) / grid.INT8_LIMIT).astype(np.float16)
            tensors[name] = grid.round_to_grid(value, rows, grid.INT8_LIMIT)
        else:
            tensors[name] = artifact.compact_floats(value)
    return tensors


# ------------------------------------------------------------------------------------------------- ingredients


def _one_column_scale(original: Any) -> Any:
    def scales(weight, item, step, limit, **options):
        rows, columns, ascending = original(weight, item, step, limit, **options)
        middle = float(np.exp(np.log(columns.astype(np.float64)).mean()))
        rows = np.maximum(rows.astype(np.float64) * middle, np.abs(weight).max(axis=1) / (0.8 * limit))
        return grid.round_to_octave_grid(rows, 8), np.ones_like(columns), ascending

    return scales


def _plain_rounding(weight, hessian, rows, columns=None, *, limit, **_):
    across = columns.astype(np.float32) if columns is not None else np.float32(1)
    step = rows.astype(np.float32)[:, None] * across
    codes = np.clip(np.rint(weight.numpy() / np.where(step > 0, step, 1)), -limit, limit)
    return grid.Grid(codes.astype(np.int16), rows, columns)


@contextlib.contextmanager
def without(ingredient: str, packer: pack.RateDistortionPacker, hessians: dict[str, torch.Tensor]) -> Iterator[None]:
    """Mezzotint's packing with one ingredient taken away, or with another setting."""
    fit, order = entropy.fit, quantize.rounding_order
    curvature = packer.curvature

    def one_table(planes, **_):
        zeros = [entropy.Classes(np.zeros(p.shape[0], np.int64), np.zeros(p.shape[1], np.int64)) for p in planes]
        return fit(planes, rounds=0, start=zeros)

    def activations() -> dict[str, quantize.Curvature]:
        """Second moments of a layer's inputs in place of the curvature, scaled to its trace; embeddings keep theirs."""
        replaced = {}
        for name, item in curvature.items():
            inputs = hessians.get(name, item.inputs)
            replaced[name] = quantize.Curvature(inputs * (item.inputs.trace() / inputs.trace()), item.rows)
        return replaced

    flat = {n: dataclasses.replace(c, rows=np.ones_like(c.rows)) for n, c in curvature.items()}
    settings: dict[str, list[tuple[Any, str, Any]]] = {
        "price of bits": [(pack, "PENALISED_PASSES", 0)],
        "GPTQ's feedback": [(quantize, "gptq", _plain_rounding), (pack, "PENALISED_PASSES", 0)],
        "ascending order": [(quantize, "rounding_order", lambda hessian, _=False: order(hessian))],
        "column steps": [(quantize, "curved_scales", _one_column_scale(quantize.curved_scales))],
        "row importance": [(packer, "curvature", flat)],
        "gradients in the curvature": [(packer, "curvature", activations())],
        "column classes": [(entropy, "fit", lambda planes, **o: fit(planes, **{**o, "columns": False}))],
        "row and column classes": [(entropy, "fit", one_table)],
        "a light price (0.12, the high-rate one)": [(pack, "RATE_LAMBDA", 0.12)],
    }  # fmt: skip
    with contextlib.ExitStack() as stack:
        for target, name, value in settings[ingredient]:
            stack.enter_context(mock.patch.object(target, name, value))
        yield


INGREDIENTS = (
    "price of bits", "a light price (0.12, the high-rate one)", "GPTQ's feedback", "ascending order", "column steps",
    "row importance", "gradients in the curvature", "column classes", "row and column classes",
)  # fmt: skip
CODER = "range coder (best general-purpose compressor on the same codes)"


# ------------------------------------------------------------------------------------- what was not built, measured


def code_lengths(packed: pack.PackedModel, classes: dict[str, entropy.Classes]) -> tuple[float, int]:
    """Bytes of all codes: ideal under the tables, and as coded (without scales, classes and tables)."""
    coded, ideal = 0, 0.0
    for names in artifact.table_banks(packed.tensors):
        planes = [packed.tensors[name].codes for name in names]
        bank, found = entropy.fit(planes, rounds=1, start=[classes[name] for name in names])
        for plane, item in zip(planes, found, strict=True):
            whole, side = entropy.Encoder(), entropy.Encoder()
            entropy.write_plane(whole, plane, item, bank)
            side.sequence(item.rows)
            side.sequence(item.columns)
            coded += len(whole.finish()) - len(side.finish())
            ideal += entropy.plane_bits(plane, item, bank) / 8
    return ideal, coded


def _entropy(*columns: np.ndarray) -> float:
    """Joint empirical entropy of integer columns, in bits in all."""
    _, counts = np.unique(np.stack(columns), axis=1, return_counts=True)
    return float(-(counts * np.log2(counts / counts.sum())).sum())


def context_gain(packed: pack.PackedModel, classes: dict[str, entropy.Classes]) -> dict[str, float]:
    """Bytes that splitting each table by the magnitude of neighbouring codes would save, table costs not counted.

    Magnitudes are over their table's mean; six contexts by quantiles. A split always fits the codes at hand better:
    the gain of the same contexts shuffled is subtracted.
    """
    gains: dict[str, float] = {"above": 0.0, "left": 0.0, "above and left": 0.0}
    generator = np.random.default_rng(0)
    for names in artifact.table_banks(packed.tensors):
        planes = [packed.tensors[name].codes for name in names]
        bank, found = entropy.fit(planes, rounds=1, start=[classes[name] for name in names])
        probability = np.exp2(-bank.lengths())
        mean = (probability * np.abs(np.arange(-bank.limit, bank.limit + 1))).sum(axis=1)
        tables = [item.tables(len(mean)).astype(np.int64) for item in found]
        sizes = [
            np.pad(np.abs(p) / np.maximum(mean[t], 1e-3), ((1, 0), (1, 0)), constant_values=1)
            for p, t in zip(planes, tables, strict=True)
        ]
        table = np.concatenate([t.ravel() for t in tables])
        magnitude = np.concatenate([np.abs(p).ravel() for p in planes]).astype(np.int64)
        above = np.concatenate([s[:-1, 1:].ravel() for s in sizes])
        left = np.concatenate([s[1:, :-1].ravel() for s in sizes])

        def bits(context: np.ndarray, table=table, magnitude=magnitude) -> float:
            span = int(magnitude.max()) + 1
            counts = np.bincount((table * 6 + context) * span + magnitude).astype(np.float64)
            counts = np.pad(counts, (0, -len(counts) % span)).reshape(-1, span)
            share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
            return float(-(counts[counts > 0] * np.log2(share[counts > 0])).sum())

        for name, value in (("above", above), ("left", left), ("above and left", above + left)):
            context = np.searchsorted(np.quantile(value, [0.15, 0.35, 0.65, 0.85, 0.95]), value)
            gains[name] += (bits(generator.permutation(context)) - bits(context)) / 8
    return gains


def ordering_gain(packed: pack.PackedModel, classes: dict[str, entropy.Classes]) -> tuple[float, str]:
    """Bytes that sorting MLP units would save at most, and by what: sorted values cost only their differences.

    A unit is a row of `up` and a column of `down`, with a scale and a class in each; permuting units changes nothing
    else. Needs a format that codes differences, which version 1 does not.
    """
    saved: dict[str, float] = {}
    for name, up in packed.tensors.items():
        if not (name.endswith("mlp.up.weight") and isinstance(up, grid.Grid)):
            continue
        other = name.replace("mlp.up", "mlp.down")
        down = packed.tensors[other]
        assert isinstance(down, grid.Grid) and down.columns is not None
        features = {
            "scale of up": np.unique(up.rows, return_inverse=True)[1],
            "scale of down": np.unique(down.columns, return_inverse=True)[1],
            "class of up": classes[name].rows,
            "class of down": classes[other].columns,
        }
        for label, value in features.items():
            gain = _entropy(value) - _entropy(np.diff(np.sort(value)))
            saved[label] = saved.get(label, 0.0) + gain / 8
    best = max(saved, key=lambda label: saved[label], default="")
    return saved.get(best, 0.0), best


# ------------------------------------------------------------------------------------------------------ the tables


def _curve(points: list[Point]) -> list[Point]:
    return sorted(points, key=lambda p: p["bytes"])


def _mean(point: Point, key: str, picked: np.ndarray) -> float:
    return float(np.asarray(point[key])[picked].mean())


def bytes_at(curve: list[Point], divergence: float, picked: np.ndarray) -> float:
    """Bytes of a curve at a mean divergence over the picked windows; log-log linear, end segments extended."""
    points = sorted((math.log(_mean(p, "divergence", picked)), math.log(p["bytes"])) for p in curve)
    want = math.log(divergence)
    at = min(max(1, sum(x < want for x, _ in points)), len(points) - 1)
    (a, low), (b, high) = points[at - 1], points[at]
    return math.exp(low + (want - a) / (b - a) * (high - low))


def rises_at(curve: list[Point], size: float, key: str = "rise") -> np.ndarray | None:
    """The rise of the NELBO of each window at a size, linear in log bytes between points; None outside the curve.

    key: `divergence` for that instead.
    """
    points = _curve(curve)
    for low, high in itertools.pairwise(points):
        if low["bytes"] <= size <= high["bytes"]:
            share = math.log(size / low["bytes"]) / math.log(high["bytes"] / low["bytes"])
            return (1 - share) * np.asarray(low[key]) + share * np.asarray(high[key])
    return None


def resampled(windows: int, statistic: Callable[[np.ndarray], float]) -> tuple[float, float]:
    """A statistic of windows, and its standard error by 200 resamplings of them."""
    generator = np.random.default_rng(0)
    values = [statistic(generator.integers(0, windows, windows)) for _ in range(200)]
    return statistic(np.arange(windows)), float(np.std(values, ddof=1))


def _pair(values: np.ndarray) -> str:
    return plus_minus(values.mean(), values.std(ddof=1) / math.sqrt(len(values)), "+.5f")


def packing_rows(points: list[Point], curve: list[Point], parameters: int) -> list[list[Any]]:
    """A row for each way of packing and knob: its costs, and Mezzotint's bytes at the same cost."""
    within = min(np.mean(p["divergence"]) for p in curve), max(np.mean(p["divergence"]) for p in curve)
    rows = []
    for point in points:
        rise, size = np.asarray(point["rise"]), point["bytes"]
        costs = [_pair(rise), _pair(np.asarray(point["divergence"]))]
        row = [point["packing"], f"{point['knob']:g}", f"{size:,}", f"{8 * size / parameters:.3f}", *costs]
        rows.append(row)
        if point["packing"] == FULL:
            row += [""] * 4
            continue

        def saving(picked: np.ndarray, point: Point = point) -> float:
            return 1 - bytes_at(curve, _mean(point, "divergence", picked), picked) / point["bytes"]

        cost = np.mean(point["divergence"])
        if within[0] <= cost <= within[1]:
            share, error = resampled(len(rise), saving)
            row += [f"{(1 - share) * size:,.0f}", plus_minus(share, error, ".1%")]
        else:  # no guess at what lies beyond the curve: its end, and the difference there
            end = curve[0] if cost > within[1] else curve[-1]
            row += [f"{end['bytes']:,}, NELBO {_pair(np.asarray(end['rise']) - rise)}"]
            row += [f"{1 - end['bytes'] / size:.1%}, the curve's end"]
        for share in (0.8, 0.92):
            ours = rises_at(curve, share * size)
            row.append(_pair(ours - rise) if ours is not None else "beyond the curve")
    return rows


def ingredient_rows(points: list[Point], curve: list[Point]) -> list[list[Any]]:
    """A row for each ingredient taken away: more bytes at equal divergence, at each knob."""
    rows: dict[str, list[Any]] = {}
    for point in sorted(points, key=lambda p: -p["bytes"]):

        def more(picked: np.ndarray, point: Point = point) -> float:
            return point["bytes"] / bytes_at(curve, _mean(point, "divergence", picked), picked) - 1

        name = point["packing"].removeprefix("without ")
        rows.setdefault(name, [name]).append(plus_minus(*resampled(len(point["rise"]), more), "+.2%"))
    return [rows[name] for name in INGREDIENTS if name in rows]


def report(points: list[Point], facts: dict[str, Any], parameters: int) -> list[str]:
    """The report, in Markdown."""
    curve = _curve([p for p in points if p["packing"] == FULL])
    variants = [p for p in points if p["packing"].startswith("without")]
    titles = [
        "packing",
        "knob",
        "bytes",
        "bits/param",
        "NELBO cost",
        "divergence",
        "Mezzotint's bytes at equal divergence",
    ]
    titles += ["saved", "NELBO less baseline's at 20% fewer bytes", "at 8% fewer"]
    lines = [
        f"Unpacked NELBO {facts['nelbo']:.4f} bits per byte on {len(curve[0]['rise'])} windows, {facts['tokens']:,} tokens; "
        f"{parameters:,} parameters. Costs in bits per byte. General-purpose compressors: {', '.join(STRONGEST)}.",
        "", table(titles, packing_rows([p for p in points if p not in variants], curve, parameters)),
    ]  # fmt: skip
    if variants:
        titles = ["taken away", "bytes at equal divergence, %", *[""] * (len(VARIANT_STEPS) - 1)]
        lines += ["", table(titles, ingredient_rows(variants, curve))]
    size = SHARE * parameters
    rise, divergence = rises_at(curve, size), rises_at(curve, size, "divergence")
    if rise is not None and divergence is not None:
        lines += ["", f"At {SHARE} bytes a parameter: NELBO cost {_pair(rise)}, divergence {_pair(divergence)}."]
    return [*lines, "", *facts["notes"]]


def plot(points: list[Point], out: Path) -> None:
    """Bytes against NELBO cost of every packing."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    for name in dict.fromkeys(p["packing"] for p in points if not p["packing"].startswith("without")):
        own = _curve([p for p in points if p["packing"] == name])
        sizes = [p["bytes"] / 1e6 for p in own]
        error = [np.std(p["rise"], ddof=1) / math.sqrt(len(p["rise"])) for p in own]
        axes.errorbar(sizes, [np.mean(p["rise"]) for p in own], yerr=error, marker="o", markersize=4, capsize=2,
                      label=name, linewidth=2 if name == FULL else 1)  # fmt: skip
    axes.set(xlabel="artifact, millions of bytes", ylabel="NELBO cost, bits per byte")
    axes.set_yscale("symlog", linthresh=1e-3)
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    figure.savefig(out, dpi=150)


def timed(model: Model, data: Dataset, path: Path, codec: str = FULL) -> str:
    """Seconds to pack a model on all threads and to open the file on one, in words."""
    threads = torch.get_num_threads()
    begin = time.perf_counter()
    packed = pack.pack(model, data.split("train"), path, codec=codec, progress=say)
    seconds = time.perf_counter() - begin
    torch.set_num_threads(1)
    begin = time.process_time()
    artifact.open_artifact(path)
    opened = time.process_time() - begin
    torch.set_num_threads(threads)
    return (
        f"{packed['parameters']:,} parameters, --codec {codec}: {packed['artifact_bytes']:,} bytes, packed in "
        f"{seconds:.0f} s with {threads} threads, opened in {opened:.2f} s of processor time"
    )


def time_reference(model: Model, data: Dataset, out: Path) -> None:
    """Seconds to pack and to open a network of the reference preset with random weights, on real calibration text."""
    config = ModelConfig(**(to_dict(preset("reference").model) | {"vocab_size": model.config.vocab_size}))
    torch.manual_seed(0)
    network = Denoiser(config).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            if not parameter.any():
                parameter.normal_(std=0.02)
    whole = Model(config, model.tokenizer, network)
    # Random weights matter little, so that the first codec drops most; int6 keeps them all.
    for codec in (FULL, "int6"):
        found = timed(whole, data, out / f"reference_{codec}.mzt", codec)
        print(f"reference preset, random weights: {found}", flush=True)


class Packings:
    """Every way of packing one run, measured at its knobs; a point that a book has is not made again.

    A way of packing gives (bytes, tensors, more of the point's fields).
    """

    def __init__(self, options: argparse.Namespace, model: Model, data: Dataset) -> None:
        self.options, self.model = options, model
        self.state = pack.weights_of(model)
        self.parameters = sum(v.size for v in self.state.values())
        weights = hashlib.sha256(b"".join(v.tobytes() for v in self.state.values())).hexdigest()[:16]
        self.setting = {"weights": weights, "windows": options.windows, "repeats": options.repeats,
                        "price": pack.RATE_LAMBDA, "calibration": options.calibration}  # fmt: skip
        self.book = Book(options.out / "points.jsonl")
        if any({k: p.get(k) for k in self.setting} != self.setting for p in self.book.rows):
            sys.exit(
                f"{self.book.path} holds points of other weights, windows, masks or settings of packing: name another "
                "folder with --out"
            )
        self.pruners: dict[str, pack.PruningPacker] = {}
        self.started = time.perf_counter()
        self.score = Score(model, data, options.windows, options.repeats)
        self.windows, self.check = pack.calibration_split(model, data.split("train"), options.calibration)
        # The header that an artifact would have.
        self.overhead = len(artifact.Writer(model, artifact.LZMA).tokenizer) + 600

    @functools.cached_property
    def hessians(self) -> dict[str, torch.Tensor]:
        """Second moments of all layers' inputs."""
        return quantize.calibration_hessians(self.model, self.windows)

    @functools.cached_property
    def _packer(self) -> pack.RateDistortionPacker:
        cost = pack.MeasuredCost(self.model, self.check, 0)
        return pack.RateDistortionPacker(self.model, self.windows, 0, pack.TOLERANCE, cost, lambda _: None)

    @property
    def packer(self) -> pack.RateDistortionPacker:
        """Mezzotint's packing, with nothing carried over from the point before."""
        self._packer.writer.classes = None
        return self._packer

    def point(self, name: str, knob: float, way: Callable[[float], Packed]) -> None:
        """Measure one way of packing at one knob, unless that is done or not asked for."""
        if self.book.find(packing=name, knob=knob) or not any(text in name for text in self.options.only):
            return
        begin = time.perf_counter()
        size, tensors, more = way(knob)
        seconds = time.perf_counter() - begin
        rise, divergence = self.score(pack.with_packed_weights(self.model, pack.PackedModel(b"", tensors, 0.0, 0)))
        self.book.add({"packing": name, "knob": knob, "bytes": size, "seconds": seconds, **self.setting,
                       "rise": rise.tolist(), "divergence": divergence.tolist(), **more})  # fmt: skip
        took = time.perf_counter() - self.started
        say(f"{took:5.0f} s  {name} {knob:g}: {size:,} bytes  {_pair(rise)}  {_pair(divergence)}")

    def mezzotint(self, knob: float) -> Packed:
        """Mezzotint's own at `knob` times the predicted step; at some knobs what was not built is measured too."""
        packer = self.packer
        packed = packer.pack_at(packer.predicted * knob)
        more: dict[str, Any] = {}
        if knob in VARIANT_STEPS:
            classes = packer.writer.classes or {}
            ideal, coded = code_lengths(packed, classes)
            more = {"ideal": ideal, "coded": coded}
            if not self.options.short:
                saved, by = ordering_gain(packed, classes)
                more |= {"contexts": context_gain(packed, classes), "ordering": saved, "ordered_by": by,
                         "general": general_purpose(packed.tensors)[0]}  # fmt: skip
        return len(packed.data), packed.tensors, more

    def without(self, ingredient: str, knob: float) -> Packed:
        """As `mezzotint`, with one ingredient taken away."""
        packer = self.packer
        with without(ingredient, packer, self.hessians):
            packed = packer.pack_at(packer.predicted * knob)
        return len(packed.data), packed.tensors, {}

    def codec(self, codec: str, share: float) -> Packed:
        """`--codec`, with a share of the codes of +-1 dropped."""
        if codec not in self.pruners:
            self.pruners[codec] = pack.PruningPacker(self.model, self.windows, 0, codec, lambda _: None)
        pruner = self.pruners[codec]
        packed = pruner.pack_dropping(int(share * len(pruner.costs)))
        return len(packed.data), packed.tensors, {}

    def recipe(self, deviations: float, ranged: bool = False) -> Packed:
        """The field's recipe; ranged: with our range coder in place of general-purpose compressors."""
        tensors = clipped(self.state, self.hessians, deviations)
        if ranged:
            return len(artifact.Writer(self.model, artifact.RANGE).write(tensors)), tensors, {}
        size, best = general_purpose(tensors)
        return size + self.overhead, tensors, {"compressor": best}

    def run(self) -> list[Point]:
        """All points, in the order in which they were made."""
        for knob in self.options.steps:
            self.point(FULL, knob, self.mezzotint)
        for codec in ("reference", "int6"):
            for share in self.options.drop:
                self.point(f"--codec {codec}", share, functools.partial(self.codec, codec))
        for deviations in self.options.deviations:
            self.point(RECIPE, deviations, self.recipe)
        self.point("std-clip int6 + range coder", 12, functools.partial(self.recipe, ranged=True))
        for ingredient in INGREDIENTS:
            for knob in VARIANT_STEPS:
                self.point(f"without {ingredient}", knob, functools.partial(self.without, ingredient))
        return self.book.rows

    def notes(self, points: list[Point]) -> list[str]:
        """What the points at which more was measured say of the coder and of what was not built."""
        lines = []
        for p in (p for p in points if "ideal" in p):
            lines += [
                f"At {p['bytes']:,} bytes ({8 * p['bytes'] / self.parameters:.2f} bits a parameter):",
                f"- codes take {p['coded']:,} bytes, {p['coded'] / p['ideal'] - 1:+.3%} over their cross-entropy under "
                "the tables;",
            ]
            if "contexts" in p:
                best = max(p["contexts"], key=lambda name: p["contexts"][name])
                lines += [
                    f"- without the {CODER}: {(p['general'] + self.overhead) / p['bytes'] - 1:+.1%};",
                    f"- contexts of neighbouring magnitudes would save {p['contexts'][best] / p['bytes']:.3%} ({best}), "
                    "tables not counted;",
                    f"- sorting MLP units by the {p['ordered_by']} would save at most {p['ordering'] / p['bytes']:.2%}.",
                ]
        return lines


def main(words: Sequence[str] | None = None) -> None:
    """Parse, pack what is missing, report."""
    parser = new_parser(__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="folder for points.jsonl, table.md and the plot")
    parser.add_argument("--windows", type=int, default=96, help="validation windows scored [96]")
    parser.add_argument("--repeats", type=int, default=1, help="masks per window [1]")
    parser.add_argument("--only", nargs="+", default=[""], help="measure only packings whose name holds one of these")
    parser.add_argument("--steps", nargs="+", type=float, default=STEPS, help=f"Mezzotint's rates {STEPS}")
    parser.add_argument("--deviations", nargs="+", type=float, default=DEVIATIONS, help=f"the recipe's {DEVIATIONS}")
    parser.add_argument("--drop", nargs="+", type=float, default=DROPS, help=f"shares of +-1 dropped by others {DROPS}")
    parser.add_argument("--calibration", type=int, default=pack.CALIBRATION_TOKENS, help="tokens to quantize by")
    parser.add_argument("--short", action="store_true", help="leave out contexts, orderings and our codes' compressors")
    parser.add_argument("--time", action="store_true", help="time packing and opening of the run instead")
    parser.add_argument("--time-reference", action="store_true", help="time the reference preset instead")
    options = parser.parse_args(words)
    model, data = load_run(options.run), Dataset.open(options.data)
    options.out.mkdir(parents=True, exist_ok=True)
    if options.time_reference:
        return time_reference(model, data, options.out)
    if options.time:
        return print(timed(model, data, options.out / "timed.mzt"))
    packings = Packings(options, model, data)
    points = packings.run()
    own = [p for p in points if p["packing"] == FULL]
    if len(own) < 2:
        return
    score = packings.score
    facts = {"nelbo": float(score.unpacked().mean()), "tokens": score.ids.numel() * options.repeats}
    text = "\n".join(report(points, {**facts, "notes": packings.notes(own)}, packings.parameters))
    (options.out / "table.md").write_text(text + "\n")
    plot(points, options.out / "rate_distortion.png")
    print(text)
    took = time.perf_counter() - packings.started
    say(f"{sum(p['seconds'] for p in points):.0f} s of packing in all, {took:.0f} s now")


if __name__ == "__main__":
    main()
