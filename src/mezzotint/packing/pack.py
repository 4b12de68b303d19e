"""The search for the smallest artifact at a given cost, and the writing of it.

Does not know the file's bytes; `artifact` does.
"""

from __future__ import annotations

import dataclasses
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mezzotint.data.dataset import TokenStream
from mezzotint.data.tokenizer import check_same_tokenizer
from mezzotint.distributed import rank_and_size
from mezzotint.errors import ArtifactError
from mezzotint.files import atomic_write, writing
from mezzotint.network.model import Model, count_parameters
from mezzotint.packing import entropy, grid, quantize
from mezzotint.packing.artifact import (
    BUDGET,
    LZMA,
    RANGE,
    Writer,
    compact_floats,
    open_artifact,
    shapes_only,
    table_banks,
    values_of,
    with_values,
)
from mezzotint.packing.grid import Grid
from mezzotint.progress import OnProgress, Progress, silent

PACK_CODECS = ("mezzotint", "int6", "reference")
TOLERANCE = 0.001  # nats per token of measured cost: 0.0005 bits per byte at 2.7 bytes a token
CALIBRATION_TOKENS = 65_536
CHECK_TOKENS = 8_192  # calibration text on which the cost is measured
# Lambda over step^2. ln 2 / 6 = 0.116 follows from D = step^2 / 12, but costs 5% more bytes (LOG.md).
RATE_LAMBDA = 0.03
PENALISED_PASSES = 1
TOLERANCE_ATTEMPTS = 4  # attempts at most to meet the tolerance
COARSEST = 64.0  # the coarsest step tried for a budget, over the finest


def weights_of(model: Model) -> dict[str, np.ndarray]:
    """A model's tensors by name, float32. Raises ArtifactError where one is not finite."""
    state = {name: t.detach().float().cpu().numpy() for name, t in model.network.state_dict().items()}
    for name, value in state.items():
        if not np.isfinite(value).all():
            raise ArtifactError(f"{name} holds numbers that are not finite: the run has diverged; train it again")
    return state


def calibration_windows(model: Model, calibration: TokenStream | None, tokens: int) -> list[np.ndarray]:
    """About `tokens` tokens of windows spread evenly over a stream. Raises ArtifactError if there is no text, DataError for another tokenizer's."""
    if calibration is None or len(calibration) == 0:
        raise ArtifactError("packing needs the run's training data for calibration; give its folder (random ids would "
                            "make a worse artifact)")  # fmt: skip
    if isinstance(calibration, TokenStream):
        check_same_tokenizer(model, calibration)
    windows = calibration.windows(model.config.sequence_length)
    count = min(len(windows), max(1, tokens // model.config.sequence_length))
    return [np.asarray(windows[int(i)]) for i in np.linspace(0, len(windows) - 1, count)]


def calibration_split(
    model: Model, calibration: TokenStream | None, tokens: int
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Windows to quantize by, and windows between them to measure on (the same ones if there is a single window)."""
    windows = calibration_windows(model, calibration, tokens + CHECK_TOKENS)
    every = max(2, (tokens + CHECK_TOKENS) // CHECK_TOKENS)
    check = windows[every // 2 :: every] or windows
    rest = [w for i, w in enumerate(windows) if i % every != every // 2]
    return rest or windows, check


@dataclass(frozen=True)
class PackedModel:
    """One way to pack a model: the file's bytes, what its tensors stand for, and what it took."""

    data: bytes
    tensors: dict[str, Grid | np.ndarray]
    code_bits: float
    pruned: int
    step: float = 0.0


class MeasuredCost:
    """What packing costs in likelihood, measured on masked text: nats per token."""

    def __init__(self, model: Model, windows: list[np.ndarray], seed: int) -> None:
        self.model = model
        self.divergence = quantize.Divergence(model, windows, seed + 1)

    def __call__(self, packed: PackedModel) -> float:
        return self.divergence(with_packed_weights(self.model, packed))


def with_packed_weights(model: Model, packed: PackedModel) -> Model:
    """`model` with the weights that the packed bytes stand for: what reading the file would give."""
    network = with_values(
        shapes_only(model.config), {name: values_of(tensor) for name, tensor in packed.tensors.items()}
    )
    return dataclasses.replace(model, network=network.to(model.device))


class RateDistortionPacker:
    """Rate-distortion-optimised rounding: GPTQ on curvature grids whose roundings pay for their bits. One knob, the step.

    windows: calibration text. tolerance: nats per token that packing may cost. predicted: the step that costs it by the
    curvature.
    """

    def __init__(
        self, model: Model, windows: list[np.ndarray], seed: int, tolerance: float, cost: MeasuredCost, tell: OnProgress
    ) -> None:
        tell(Progress(f"curvature from {sum(map(len, windows)):,} tokens"))
        self.curvature = quantize.curvature(model, windows, seed)
        self.state = weights_of(model)
        self.writer = Writer(model, RANGE)
        self.tolerance = tolerance
        self.cost = cost
        self.tell = tell
        weights = sum(v.size for n, v in self.state.items() if n.removesuffix(".weight") in self.curvature)
        # By the curvature. The cost measured has been 1.5 to 12 times as much.
        self.predicted = math.sqrt(24 * tolerance / weights)

    def pack_at(self, step: float) -> PackedModel:
        """Pack at one step: plain GPTQ, then GPTQ under the code lengths that the codes before it gave."""
        scales: dict[str, tuple[np.ndarray, np.ndarray, bool]] = {}
        tensors: dict[str, Grid | np.ndarray] = {}
        for name, value in self.state.items():
            module = name.removesuffix(".weight")
            if module in self.curvature:
                scales[name] = quantize.curved_scales(value, self.curvature[module], step, entropy.MAX_MAGNITUDE)
            tensors[name] = compact_floats(value)
        models: dict[str, tuple[np.ndarray, entropy.Classes]] = {}
        for _ in range(1 + PENALISED_PASSES):
            for name, (rows, columns, ascending) in scales.items():
                curvature = self.curvature[name.removesuffix(".weight")]
                penalty = None
                if models:
                    lengths, classes = models[name]
                    penalty = quantize.RatePenalty(
                        lengths, classes.tables(len(lengths)), curvature.rows, RATE_LAMBDA * step**2
                    )
                tensors[name] = quantize.gptq(
                    torch.from_numpy(self.state[name]), curvature.inputs, rows, columns,
                    limit=entropy.MAX_MAGNITUDE, penalty=penalty, ascending=ascending,
                )  # fmt: skip
            models = {}
            for names in table_banks(tensors):
                planes = [grid.codes for name in names if isinstance(grid := tensors[name], Grid)]
                bank, classes_of = entropy.fit(planes)
                lengths = bank.lengths()
                models.update({n: (lengths, c) for n, c in zip(names, classes_of, strict=True)})
        self.writer.classes = {name: classes for name, (_, classes) in models.items()}
        data = self.writer.write(tensors)
        self.tell(Progress(f"{len(data):,} bytes at step {step:.3g}"))
        return PackedModel(data, tensors, self.writer.code_bits, 0, step)

    def meet_tolerance(self, limit: int | None = None) -> PackedModel:
        """A packed model that costs about the tolerance by measurement; the first larger than `limit` bytes ends the search.

        The cost goes with the square of the step or a little more, so that few attempts do.
        """
        step, best, nearest = self.predicted, None, math.inf
        for _ in range(TOLERANCE_ATTEMPTS):
            packed = self.pack_at(step)
            if limit is not None and len(packed.data) > limit:
                return packed
            ratio = max(self.cost(packed) / self.tolerance, 1e-9)
            self.tell(Progress(f"measured cost: {ratio * self.tolerance:.2g} nats per token"))
            if abs(math.log(ratio)) < nearest:
                best, nearest = packed, abs(math.log(ratio))
            if 0.8 <= ratio <= 1.1:
                break
            step *= min(8.0, max(0.125, ratio**-0.5))
        assert best is not None
        return best

    def fit(self, limit: int) -> tuple[PackedModel | None, int]:
        """The finest packed model found of at most `limit` bytes, if any, and the smallest size seen.

        Size falls smoothly with the logarithm of the step, so false position with a bisection every third time gets
        within 0.3% of the limit in few attempts.
        """
        first = self.meet_tolerance(limit)
        if len(first.data) <= limit:
            return first, len(first.data)
        fine, coarse = 0.0, math.log(COARSEST)
        last = self.pack_at(first.step * COARSEST)
        if len(last.data) > limit:
            return None, len(last.data)
        fine_size, best = len(first.data), last
        for number in range(8):
            if limit - len(best.data) <= 0.003 * limit or coarse - fine < 0.002:
                break
            # Logarithms of sizes are closer to straight lines than sizes are.
            top, bottom = math.log(fine_size), math.log(len(best.data))
            share = (top - math.log(limit * 0.9985)) / max(1e-9, top - bottom)
            share = 0.5 if number % 3 == 2 else min(0.97, max(0.03, share))
            middle = fine + (coarse - fine) * share
            tried = self.pack_at(first.step * math.exp(middle))
            if len(tried.data) <= limit:
                coarse, best = middle, tried
            else:
                fine, fine_size = middle, len(tried.data)
        return best, len(last.data)


class PruningPacker:
    """int6 codes on a row grid, made to fit by zeroing the codes of +-1 whose loss does the least damage."""

    def __init__(self, model: Model, windows: list[np.ndarray], seed: int, codec: str, tell: OnProgress) -> None:
        tell(Progress(f"Hessians from {sum(map(len, windows)):,} tokens"))
        hessians = quantize.calibration_hessians(model, windows, seed)
        self.tell = tell
        self.tensors: dict[str, Grid | np.ndarray] = {}
        self.where: dict[str, np.ndarray] = {}
        costs = []
        for name, value in weights_of(model).items():
            hessian = hessians.get(name.removesuffix(".weight"))
            grid, damage = (_int6 if codec == "int6" else _reference)(name, value, hessian)
            self.tensors[name] = grid
            if damage is not None and isinstance(grid, Grid):
                self.where[name] = np.flatnonzero(np.abs(grid.codes).ravel() == 1)
                costs.append(damage.ravel()[self.where[name]])
        self.costs = np.concatenate(costs) if costs else np.zeros(0, dtype=np.float32)
        self.order = np.argsort(self.costs, kind="stable")
        self.writer = Writer(model, RANGE if codec == "int6" else LZMA)

    def pack_dropping(self, count: int) -> PackedModel:
        """Pack with the `count` cheapest codes of +-1 zeroed."""
        gone = np.zeros(len(self.costs), dtype=bool)
        gone[self.order[:count]] = True
        tensors = dict(self.tensors)
        start = 0
        for name, where in self.where.items():
            stop = start + len(where)
            grid = tensors[name]
            if gone[start:stop].any() and isinstance(grid, Grid):
                codes = grid.codes.copy()
                codes.ravel()[where[gone[start:stop]]] = 0
                tensors[name] = dataclasses.replace(grid, codes=codes)
            start = stop
        data = self.writer.write(tensors)
        self.tell(Progress(f"{len(data):,} bytes with {count:,} codes of +-1 dropped"))
        return PackedModel(data, tensors, self.writer.code_bits, count)

    def fit(self, limit: int) -> tuple[PackedModel | None, int]:
        """About the fewest codes dropped that fit `limit` bytes, if any do, and the smallest size seen.

        Size falls almost linearly with the count, so interpolation safeguarded by bisection takes few attempts.
        """
        first = self.pack_dropping(0)
        if len(first.data) <= limit:
            return first, len(first.data)
        best = self.pack_dropping(len(self.costs))
        smallest = len(best.data)
        if smallest > limit:
            return None, smallest
        low, low_size, high = 0, len(first.data), len(self.costs)
        for number in range(12):
            if high - low <= 1 or limit - len(best.data) <= limit // 2000:
                break
            share = (low_size - limit * 0.9998) / max(1, low_size - len(best.data))
            middle = low + int((high - low) * (min(0.95, max(0.05, share)) if number % 3 < 2 else 0.5))
            tried = self.pack_dropping(min(high - 1, max(low + 1, middle)))
            if len(tried.data) <= limit:
                high, best = tried.pruned, tried
            else:
                low, low_size = tried.pruned, len(tried.data)
        return best, smallest


def _int6(name: str, value: np.ndarray, hessian: torch.Tensor | None) -> tuple[Grid | np.ndarray, np.ndarray | None]:
    """One tensor under int6 GPTQ (int8 embeddings), and what zeroing each entry costs: scale^2 times H's diagonal."""
    if hessian is not None:
        diagonal = hessian.diagonal().numpy()
        weigh = diagonal if diagonal.sum() > 0 else np.ones_like(diagonal)
        rows = grid.row_scales(value, weigh, grid.INT6_LIMIT)
        damage = np.square(rows.astype(np.float64))[:, None] * weigh[None, :]
        return quantize.gptq(torch.from_numpy(value), hessian, rows), damage.astype(np.float32)
    if name.endswith("embedding.weight"):
        rows = grid.row_scales(value, np.ones(value.shape[1]), grid.INT8_LIMIT)
        return grid.round_to_grid(value, rows, grid.INT8_LIMIT), None
    return compact_floats(value), None


def _reference(
    name: str, value: np.ndarray, hessian: torch.Tensor | None
) -> tuple[Grid | np.ndarray, np.ndarray | None]:
    """One tensor as the seed packs it, and its damage: squared row scale. Hessians are from real text, though."""
    if value.size <= 65_536 or value.ndim != 2:
        return compact_floats(value), None
    if hessian is not None:
        rows = grid.percentile_scales(value, grid.INT6_LIMIT)
        damage = np.broadcast_to(np.square(rows.astype(np.float32))[:, None], value.shape)
        return quantize.gptq(torch.from_numpy(value), hessian, rows), damage
    rows = (np.abs(value).max(axis=1) / grid.INT8_LIMIT).astype(np.float16)
    return grid.round_to_grid(value, rows, grid.INT8_LIMIT), None


def pack(
    model: Model,
    calibration: TokenStream | None,
    out: Path | str,
    *,
    budget: int = BUDGET,
    code: Sequence[Path | str] = (),
    codec: str = "mezzotint",
    tolerance: float = TOLERANCE,
    calibration_tokens: int = CALIBRATION_TOKENS,
    seed: int = 0,
    progress: OnProgress | None = None,
) -> dict[str, Any]:
    """Quantize, code and write `model` to `out` so that the file and the `code` files fit `budget` decimal bytes.

    calibration: the training split's tokens; masked text from it, about `calibration_tokens` of them, gives curvature and
    Hessians. seed: of its masks. progress: told in words. codec: `mezzotint`
    (rate-distortion GPTQ), `int6` (GPTQ to int6 on a row grid, range-coded, +-1 dropping) or `reference` (the seed's
    quantization and LZMA). tolerance (`mezzotint` only): the cost in nats per token below which bytes are not worth
    spending, so that an artifact need not fill its budget; measured (`quantize.Divergence`) on text between the
    calibration's. The written file is reopened and every weight compared before this returns.

    Returns `artifact_bytes`, `code_bytes`, `total_bytes`, `budget_bytes`, `parameters`, `bits_per_parameter` (of the
    artifact), `pruned_codes`, `entropy_bits_per_code` (ideal code length per quantized weight; for `reference` the
    LZMA stream's), `cost_nats_per_token` (measured as above), `verified`. In a process group all processes share the calibration; the first alone goes on and
    writes, the others return {}. Raises ArtifactError if there is no calibration text, if the budget cannot be met
    (naming the smallest reachable size) or if the file cannot be written; `out` is then untouched.
    """
    tell = progress or silent
    out = Path(out)
    if codec not in PACK_CODECS:
        raise ArtifactError(f"unknown codec {codec!r}; known: {', '.join(PACK_CODECS)}")
    if not 0 < tolerance < 10:
        raise ArtifactError(f"tolerance is a small positive number of nats per token, not {tolerance!r}")
    code_bytes = 0
    for item in code:
        if not Path(item).is_file():
            raise ArtifactError(f"{item}: no such code file to count")
        code_bytes += Path(item).stat().st_size
    if not out.parent.is_dir():
        raise ArtifactError(f"{out.parent}: no such folder to write {out.name} to")
    windows, check = calibration_split(model, calibration, calibration_tokens)
    cost = MeasuredCost(model, check, seed)
    packer = (
        RateDistortionPacker(model, windows, seed, tolerance, cost, tell)
        if codec == "mezzotint"
        else PruningPacker(model, windows, seed, codec, tell)
    )
    if rank_and_size()[0] > 0:
        return {}
    packed, smallest = packer.fit(budget - code_bytes)
    if packed is None:
        raise ArtifactError(f"a budget of {budget:,} bytes cannot be met: the smallest reachable size is "
                            f"{smallest + code_bytes:,} bytes ({code_bytes:,} of them code)")  # fmt: skip
    _write_verified(out, packed.data, packed.tensors)
    return _report(model, packed, code_bytes, budget, cost(packed))


def store(model: Model, out: Path | str) -> dict[str, Any]:
    """Write `model` to `out` as it is, unquantized: every weight in float16 where that is exact, else in float32.

    Returns what `pack` returns. Raises ArtifactError if the file cannot be written; `out` is then untouched.
    """
    out = Path(out)
    if not out.parent.is_dir():
        raise ArtifactError(f"{out.parent}: no such folder to write {out.name} to")
    tensors: dict[str, Grid | np.ndarray] = {}
    for name, value in weights_of(model).items():
        with np.errstate(over="ignore"):
            half = value.astype(np.float16)
        tensors[name] = half if half.astype(np.float32).tobytes() == value.tobytes() else value
    data = Writer(model, RANGE).write(tensors)
    _write_verified(out, data, tensors)
    return _report(model, PackedModel(data, tensors, 0.0, 0), 0, BUDGET, 0.0)


def _report(model: Model, packed: PackedModel, code_bytes: int, budget: int, cost: float) -> dict[str, Any]:
    parameters = count_parameters(model.network)
    codes = sum(tensor.codes.size for tensor in packed.tensors.values() if isinstance(tensor, Grid))
    return {
        "artifact_bytes": len(packed.data),
        "code_bytes": code_bytes,
        "total_bytes": len(packed.data) + code_bytes,
        "budget_bytes": budget,
        "parameters": parameters,
        "bits_per_parameter": 8 * len(packed.data) / parameters,
        "pruned_codes": packed.pruned,
        "entropy_bits_per_code": packed.code_bits / max(1, codes),
        "cost_nats_per_token": cost,
        "verified": True,
    }


def sweep(
    model: Model,
    calibration: TokenStream | None,
    score: Callable[[Model], np.ndarray],
    *,
    tolerances: Sequence[float] = (0.0003, 0.001, 0.003, 0.01, 0.03, 0.1),
    seed: int = 0,
    progress: OnProgress | None = None,
) -> list[dict[str, float]]:
    """Bytes against likelihood: pack at each tolerance and score what the file's bytes stand for.

    score: bits per byte of each of a fixed set of windows under fixed masks, so that differences to the unpacked model
    pair up. The first point costs about the first of `tolerances` (increasing; nats per token) by measurement, the
    others' steps follow from its. Returns one dict per tolerance: `tolerance`, `bytes`, `bits_per_parameter`,
    `cost_nats_per_token` (measured as by `pack`, on calibration text), `nelbo_bpb`, `cost_bpb` (over the unpacked
    model) and `cost_stderr_bpb`. seed, progress: see `pack`. Raises ArtifactError as it does.
    """
    tell = progress or silent
    windows, check = calibration_split(model, calibration, CALIBRATION_TOKENS)
    before = np.asarray(score(model), dtype=np.float64)
    measured = MeasuredCost(model, check, seed)
    packer = RateDistortionPacker(model, windows, seed, tolerances[0], measured, tell)
    points = []
    first = packer.meet_tolerance()
    for tolerance in tolerances:
        packed = first
        if tolerance != tolerances[0]:
            packed = packer.pack_at(first.step * math.sqrt(tolerance / tolerances[0]))
        after = np.asarray(score(with_packed_weights(model, packed)), dtype=np.float64)
        cost = after - before
        points.append({
            "tolerance": tolerance, "bytes": len(packed.data),
            "bits_per_parameter": 8 * len(packed.data) / count_parameters(model.network),
            "cost_nats_per_token": measured(packed),
            "nelbo_bpb": float(after.mean()), "cost_bpb": float(cost.mean()),
            "cost_stderr_bpb": float(cost.std(ddof=1) / math.sqrt(len(cost))),
        })  # fmt: skip
        tell(Progress(f"{len(packed.data):,} bytes: {points[-1]['cost_bpb']:+.5f} bits per byte"))
    return points


def _write_verified(out: Path, data: bytes, tensors: Mapping[str, Grid | np.ndarray]) -> None:
    """Write atomically, reopen, compare every weight bit for bit. Raises ArtifactError and leaves nothing if not.

    What is no file (a device, a pipe) cannot be read back: the same bytes are written to a file and compared there first.
    """
    device = out.exists() and not out.is_file() and not out.is_dir()
    if device:
        with tempfile.TemporaryDirectory() as folder:
            _write_verified(Path(folder) / "model.mzt", data, tensors)
    with writing(out, ArtifactError):
        atomic_write(out, data)
    if device:
        return
    try:
        state = open_artifact(out).network.state_dict()
    except ArtifactError:
        out.unlink(missing_ok=True)
        raise
    for name, tensor in tensors.items():
        if state[name].numpy().tobytes() != values_of(tensor).tobytes():
            out.unlink(missing_ok=True)
            raise ArtifactError(f"{out}: {name} did not come back as written; nothing was kept")
