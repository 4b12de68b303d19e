"""What a figure is: its kind, its standard error, and the tests between two.

Knows nothing of models.
"""

from __future__ import annotations

import functools
import html
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mezzotint.errors import DataError
from mezzotint.scoring.kinds import kind_of
from mezzotint.scoring.plan import Scoring


@functools.cache
def _gauss_nodes() -> tuple[np.ndarray, np.ndarray]:
    return np.polynomial.legendre.leggauss(200)


def student_t_tail(t: float, degrees: float) -> float:
    """P(|X| > t) for Student's t with `degrees` of freedom (infinite: the normal distribution).

    Integrates the density after x = sqrt(degrees) tan(angle), which makes the range finite.
    """
    t = abs(t)
    if math.isinf(degrees) or degrees > 1e6:
        return math.erfc(t / math.sqrt(2))
    start = math.atan(t / math.sqrt(degrees))
    stop = math.pi / 2
    if degrees > 30:  # cos^(degrees - 1) is negligible past here; keep the nodes where the mass is
        stop = min(stop, start + 40 / math.sqrt(degrees))
    nodes, weights = _gauss_nodes()
    angles = start + (nodes + 1) * (stop - start) / 2
    log_norm = math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2) - math.lgamma(0.5)
    density = np.exp(log_norm + (degrees - 1) * np.log(np.maximum(np.cos(angles), 1e-300)))
    return float(min(1.0, 2 * np.dot(weights, density) * (stop - start) / 2))


@functools.lru_cache(maxsize=1024)
def student_t_quantile(confidence: float, degrees: float) -> float:
    """The t with P(|X| <= t) = `confidence`; infinity for 0 degrees of freedom."""
    if degrees <= 0:
        return math.inf
    low, high = 0.0, 1.0
    while student_t_tail(high, degrees) > 1 - confidence:
        high *= 2
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if student_t_tail(middle, degrees) > 1 - confidence else (low, middle)
    return (low + high) / 2


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _with_error(figure: Estimate | Comparison) -> str:
    if isinstance(figure, Comparison):
        return f"{figure.difference_bpb:+.4f} \u00b1 {figure.stderr_bpb:.4f} bits/byte"
    return f"{figure.bpb:.4f} \u00b1 {figure.stderr_bpb:.4f} bits/byte"


def _html(estimates: Sequence[Estimate], caption: str = "") -> str:
    """The figures as a table for a notebook."""
    heads = ("method", "kind", "bits/byte", "\u00b1 s.e.", "nats/token", "tokens", "bytes", "bytes lost")
    rows = [
        (e.method, e.kind, f"{e.bpb:.4f}", f"{e.stderr_bpb:.4f}", f"{e.nats_per_token:.4f}", f"{e.tokens:,}",
         f"{e.bytes:,}", f"{e.bytes_lost:,}")
        for e in estimates
    ]  # fmt: skip
    lines = ["".join(f"<th>{html.escape(head)}</th>" for head in heads)]
    lines += ["".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in rows]
    shown = f"<caption>{html.escape(caption)}</caption>" if caption else ""
    return f"<table>{shown}{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"


@dataclass(frozen=True)
class Estimate:
    """A likelihood figure with its kind and error.

    kind: `exact` (a normalised distribution's own code length), `upper bound` (its expectation is at least the
    model's -log p), `lower bound` (at most that), `not a bound`, or `not a code length` (see `kinds.kind_of`). bpb: bits per byte. stderr_bpb: standard error in all; its parts are
    mask_stderr_bpb (the masks drawn, given the windows) and window_stderr_bpb (which windows were scored; 0 when all
    were), nan where they were not told apart. forward_passes: how often the network ran over one window.
    bytes_lost: bytes of the scored text that its tokens do not give back.
    degrees_of_freedom: of Student's t in the interval (infinite where nothing was estimated from few repeats).
    """

    method: str
    kind: str
    bpb: float
    stderr_bpb: float
    nats_per_token: float
    tokens: int
    bytes: int
    seconds: float
    forward_passes: int
    seed: int
    mask_stderr_bpb: float = 0.0
    window_stderr_bpb: float = 0.0
    degrees_of_freedom: float = math.inf
    bytes_lost: int = 0

    def __post_init__(self) -> None:
        if math.isnan(self.bpb):
            raise DataError(
                "the model's outputs are not numbers: its weights are damaged, or of a size nothing was trained to"
            )

    def __repr__(self) -> str:
        return f"Estimate({self.method}: {_with_error(self)} ({self.kind}), {self.tokens:,} tokens)"

    def _repr_html_(self) -> str:
        return _html([self])

    def interval(self, confidence: float = 0.95) -> tuple[float, float]:
        """Two-sided interval in bits per byte, by Student's t."""
        if self.stderr_bpb == 0:
            return self.bpb, self.bpb
        if math.isinf(self.stderr_bpb):
            return -math.inf, math.inf
        half = student_t_quantile(confidence, self.degrees_of_freedom) * self.stderr_bpb
        return self.bpb - half, self.bpb + half

    def to_dict(self) -> dict[str, Any]:
        """JSON object; the interval is the 95% one, and null where it is unbounded."""
        low, high = self.interval()
        return {
            "method": self.method,
            "kind": self.kind,
            "bpb": self.bpb,
            "stderr_bpb": _finite(self.stderr_bpb),
            "interval95_bpb": [low, high] if math.isfinite(high - low) else None,
            "mask_stderr_bpb": _finite(self.mask_stderr_bpb),
            "window_stderr_bpb": _finite(self.window_stderr_bpb),
            "nats_per_token": self.nats_per_token,
            "tokens": self.tokens,
            "bytes": self.bytes,
            "bytes_lost": self.bytes_lost,
            "seconds": self.seconds,
            "forward_passes": self.forward_passes,
            "seed": self.seed,
        }


def _sampling_error(nats: np.ndarray, sizes: np.ndarray, total_windows: int) -> float:
    """Standard error, in nats per byte, of sum(nats) / sum(sizes) from having scored only some windows.

    The ratio estimator with finite-population correction (Cochran 1977, "Sampling techniques", eq. 6.13), treating
    the evenly spaced windows as a random draw; infinite from a single window.
    """
    n = len(nats)
    share_left = 1 - n / total_windows
    if share_left <= 0:
        return 0.0
    if n < 2 or not np.isfinite(nats).all():
        return math.inf
    residual = nats - nats.sum() / sizes.sum() * sizes
    return math.sqrt(share_left * n / (n - 1) * float(residual @ residual)) / float(sizes.sum())


def assemble(plan: Scoring, method: str, family: str, repeats: np.ndarray, forward_passes: int) -> Estimate:
    """An Estimate from nats [repeats, windows]; a single row means that no masks were drawn. family: see `kind_of`."""
    sizes, tokens, windows = plan.byte_counts, sum(plan.lengths), len(plan.windows)
    per_window = repeats.mean(axis=0)
    totals = repeats.sum(axis=1)
    scale = 1 / (float(sizes.sum()) * math.log(2))
    r, n = repeats.shape
    if not np.isfinite(totals).all():
        mask_error = math.inf  # a text without any probability
    else:
        mask_error = 0.0 if r == 1 else float(totals.std(ddof=1)) / math.sqrt(r) * scale
    degrees = math.inf if r == 1 else r - 1
    window_error = _sampling_error(per_window, sizes, windows) / math.log(2)
    error = mask_error
    if window_error:
        # Two-stage sampling (Cochran 1977, eq. 10.15): the spread between scored windows already holds their mask
        # error, so only the sampled share of it is added.
        error = math.sqrt(window_error**2 + n / windows * mask_error**2)
        degrees = max(n - 1, 1)
    lost = plan.bytes_lost
    return Estimate(
        method=method,
        kind=kind_of(family, lost),
        bpb=float(totals.mean() * scale),
        stderr_bpb=error,
        nats_per_token=float(totals.mean() / tokens),
        tokens=tokens,
        bytes=int(sizes.sum()),
        seconds=time.perf_counter() - plan.started,
        forward_passes=forward_passes,
        seed=plan.seed,
        mask_stderr_bpb=mask_error,
        window_stderr_bpb=window_error,
        degrees_of_freedom=degrees,
        bytes_lost=lost,
    )


@dataclass(frozen=True)
class Comparison:
    """Model b against model a on the same windows and masks.

    difference_bpb: b's bits per byte minus a's, negative where b is better. stderr_bpb: of the difference, with the
    same parts as in `Estimate`. p_value: two-sided, of no difference, by Student's t; 0 or 1 where nothing was drawn.
    """

    difference_bpb: float
    stderr_bpb: float
    p_value: float
    degrees_of_freedom: float
    mask_stderr_bpb: float
    window_stderr_bpb: float
    a: Estimate
    b: Estimate

    def __repr__(self) -> str:
        return f"Comparison(b - a: {_with_error(self)}, p = {self.p_value:.2g}; a {self.a!r}, b {self.b!r})"

    def _repr_html_(self) -> str:
        return _html([self.a, self.b], f"b - a: {_with_error(self)}, p = {self.p_value:.2g}")

    def to_dict(self) -> dict[str, Any]:
        """JSON object."""
        half = student_t_quantile(0.95, self.degrees_of_freedom) * self.stderr_bpb if self.stderr_bpb else 0.0
        return {
            "difference_bpb": self.difference_bpb,
            "stderr_bpb": _finite(self.stderr_bpb),
            "interval95_bpb": [self.difference_bpb - half, self.difference_bpb + half] if math.isfinite(half) else None,
            "p_value": self.p_value,
            "a": self.a.to_dict(),
            "b": self.b.to_dict(),
        }
