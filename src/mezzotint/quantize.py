"""Float weights + calibration -> integer codes and scales: GPTQ with Hessians from real masked text.

A weight matrix W [R, C] becomes codes Q and float16 scales with W ~ Q * rows[:, None] * columns[None, :]. Knows nothing
of files, of bytes or of budgets; code lengths, where a rounding weighs them, are handed in.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from mezzotint.model import Model
from mezzotint.objective import mask_by_count, stratified_counts

INT6_LIMIT = 31
INT8_LIMIT = 127


@dataclass(frozen=True)
class Grid:
    """A quantized matrix: codes int16 [R, C]; scales float16, rows [R] and columns [C] (None: all one)."""

    codes: np.ndarray
    rows: np.ndarray
    columns: np.ndarray | None = None

    def values(self) -> np.ndarray:
        """The matrix the codes stand for, float32 [R, C]: (code * row) * column, each product rounded to float32."""
        values = self.codes.astype(np.float32) * self.rows.astype(np.float32)[:, None]
        return values if self.columns is None else values * self.columns.astype(np.float32)[None, :]


def matrices(network: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers of `network` by module name."""
    return {name: module for name, module in network.named_modules() if isinstance(module, nn.Linear)}


def calibration_hessians(model: Model, windows: Iterable[np.ndarray], seed: int = 0) -> dict[str, Tensor]:
    """Mean of x x^T over the inputs x of every linear layer, float64 [C, C], on masked text.

    windows: int64 vectors of token ids of real text. Each is masked at a count k stratified over 1..T, so that all mask
    rates from nearly none to all are represented, as in the objective. Float32 products, float64 sums.
    """
    windows = list(windows)
    generator = torch.Generator().manual_seed(seed)
    length = max((len(window) for window in windows), default=1)
    counts = stratified_counts(len(windows), length, generator)
    layers = matrices(model.network)
    sums = {name: torch.zeros(m.in_features, m.in_features, dtype=torch.float64) for name, m in layers.items()}
    seen = dict.fromkeys(layers, 0)

    def hook(name: str):
        def accumulate(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0].detach().reshape(-1, inputs[0].shape[-1]).float()
            sums[name] += (x.T @ x).double().cpu()
            seen[name] += len(x)

        return accumulate

    handles = [module.register_forward_pre_hook(hook(name)) for name, module in layers.items()]
    try:
        for window, count in zip(windows, counts, strict=True):
            ids = torch.as_tensor(window, dtype=torch.int64)[None]
            # A last, shorter window keeps its mask rate.
            scaled = (count[None] * len(window) / length).ceil().long().clamp(1, len(window))
            corrupted, _ = mask_by_count(ids, scaled, model.config.mask_id, generator)
            model.logits(corrupted)
    finally:
        for handle in handles:
            handle.remove()
    return {name: total / max(1, seen[name]) for name, total in sums.items()}


def snap(scales: np.ndarray, per_octave: int = 16) -> np.ndarray:
    """Scales rounded to float16 numbers nearest a geometric grid of `per_octave` steps; 0 stays 0.

    Few distinct values make scales cheap to code; 16 steps per octave are within 2.2% of any scale.
    """
    with np.errstate(divide="ignore"):
        exponent = np.rint(np.log2(scales) * per_octave) / per_octave
    return np.where(scales > 0, np.clip(np.exp2(exponent), 2.0**-24, 60_000), 0).astype(np.float16)


def row_scales(weight: np.ndarray, importance: np.ndarray, limit: int) -> np.ndarray:
    """The float16 scale of each row with the least importance-weighted squared error of plain rounding to +-limit.

    weight [R, C]; importance [C] (a Hessian's diagonal). Searched from the row's largest magnitude downwards, in
    steps of 2^(1/16), over a factor of 4.
    """
    largest = np.abs(weight).max(axis=1)
    best = np.full(len(weight), np.inf)
    chosen = np.zeros(len(weight), dtype=np.float16)
    for step in range(33):
        scales = snap(largest / limit * 2.0 ** (-step / 16))
        safe = np.where(scales > 0, scales, 1).astype(np.float32)[:, None]
        codes = np.clip(np.rint(weight / safe), -limit, limit)
        error = (np.square(codes * safe - weight) * importance).sum(axis=1)
        better = error < best
        best[better], chosen[better] = error[better], scales[better]
    return chosen


def round_to_grid(weight: np.ndarray, rows: np.ndarray, limit: int) -> Grid:
    """Plain rounding of weight [R, C] to codes in +-limit."""
    safe = np.where(rows > 0, rows, 1).astype(np.float32)[:, None]
    return Grid(np.clip(np.rint(weight / safe), -limit, limit).astype(np.int16), rows)


def damped(hessian: Tensor, damping: float) -> Tensor:
    """`hessian` [C, C] with `damping` times its mean diagonal added to the diagonal; the identity if it is zero."""
    mean = hessian.diagonal().mean()
    if not mean > 0:
        return torch.eye(len(hessian), dtype=torch.float64)
    return hessian.double() + damping * mean * torch.eye(len(hessian), dtype=torch.float64)


def gptq(
    weight: Tensor,
    hessian: Tensor,
    rows: np.ndarray,
    *,
    limit: int = INT6_LIMIT,
    damping: float = 0.01,
    block: int = 128,
) -> Grid:
    """Codes that make the layer's output error small: E |(W - Q) x|^2 = tr((W - Q) H (W - Q)^T), H = E[x x^T].

    GPTQ (Frantar et al. 2022, algorithm 1): columns are rounded one after the other, by descending diagonal of H, and
    each column's error is spread over the columns still to come by the Cholesky factor of H^-1.
    weight [R, C]; hessian [C, C]; rows float16 [R].
    """
    order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
    h = damped(hessian, damping)[order][:, order]
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(h))
    factor = torch.linalg.cholesky(inverse, upper=True).float()
    work = weight.detach().float().cpu().T[order].contiguous()  # [C, R]: one column of W per row
    scale = torch.from_numpy(rows.astype(np.float32))
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    codes = torch.empty_like(work)
    columns = len(work)
    for start in range(0, columns, block):
        stop = min(start + block, columns)
        errors = torch.empty(stop - start, work.shape[1])
        for j in range(start, stop):
            codes[j] = torch.clamp(torch.round(work[j] / scale), -limit, limit)
            error = (work[j] - codes[j] * scale) / factor[j, j]
            errors[j - start] = error
            work[j + 1 : stop] -= factor[j, j + 1 : stop, None] * error
        work[stop:] -= factor[start:stop, stop:].T @ errors
    result = torch.empty_like(codes)
    result[order] = codes
    return Grid(result.T.contiguous().numpy().astype(np.int16), rows)


def percentile_scales(weight: np.ndarray, limit: int) -> np.ndarray:
    """The reference's row scales: the best of five clip percentiles of |w| by squared error, float16 [R]."""
    best = np.full(len(weight), np.inf)
    chosen = np.zeros(len(weight), dtype=np.float16)
    for percentile in (99.9, 99.95, 99.99, 99.999, 100.0):
        scales = (np.percentile(np.abs(weight), percentile, axis=1) / limit).astype(np.float16)
        error = np.square(round_to_grid(weight, scales, limit).values() - weight).sum(axis=1)
        better = error < best
        best[better], chosen[better] = error[better], scales[better]
    return chosen
