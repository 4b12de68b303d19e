"""Cross-entropy by mask rate: where along its integrand the NELBO comes from.

Knows nothing of how it is drawn.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from mezzotint.data.dataset import Windows
from mezzotint.network.model import Model
from mezzotint.scoring.nelbo import nelbo_masks
from mezzotint.scoring.plan import MaskedWindow, Scoring, masked_window_nll, some_bytes


@dataclass(frozen=True)
class RateBin:
    """Mean cross-entropy over masks whose rate lies in (low, high]. bpb is scaled so that the bins' mean is the NELBO
    where bins hold equally many mask counts."""

    low: float
    high: float
    nats_per_token: float
    bpb: float
    stderr_bpb: float
    masks: int


def mask_rate_curve(
    model: Model, windows: Windows, *, tokens: int | None = None, bins: int = 10, repeats: int = 8, seed: int = 0
) -> list[RateBin]:
    """Cross-entropy of a hidden token, by the share of its window that is hidden: the NELBO's integrand.

    NELBO per token = E_k[mean masked NLL at k of T] (objective.py), so the curve's area is the NELBO. Masks are those
    that `likelihood.nelbo` draws for the same seed. Empty bins are left out. Raises DataError if there is nothing to
    score.
    """
    plan = Scoring.make(model, windows, tokens=tokens, progress=None, seed=seed)
    chosen = plan.chosen
    rates: list[float] = []

    def passes() -> Iterator[MaskedWindow]:
        for repeat in range(repeats):
            for item, k in nelbo_masks(plan, repeat):
                rates.append(k / len(item.ids))
                yield item

    means = [float(nll.sum()) for nll in masked_window_nll(model, passes())]
    lengths = np.array([len(windows[i]) for i in chosen] * repeats)
    share = np.array(rates)
    nats = np.array(means) / np.rint(share * lengths)
    size = some_bytes(sum(windows.byte_count(i) for i in chosen))
    scale = len(chosen) * float(lengths.mean()) / size / math.log(2)
    found = []
    for b in range(bins):
        inside = nats[(share > b / bins) & (share <= (b + 1) / bins)]
        if len(inside):
            error = float(inside.std(ddof=1)) / math.sqrt(len(inside)) if len(inside) > 1 else math.nan
            mean = float(inside.mean())
            found.append(RateBin(b / bins, (b + 1) / bins, mean, mean * scale, error * scale, len(inside)))
    return found
