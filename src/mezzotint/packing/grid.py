"""Grids of integer codes with row scales: rounding to them and back.

Knows nothing of curvature or files.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

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


def round_to_octave_grid(scales: np.ndarray, per_octave: int = 16) -> np.ndarray:
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
        scales = round_to_octave_grid(largest / limit * 2.0 ** (-step / 16))
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
