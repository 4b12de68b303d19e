"""The sampled softmax: cross-entropy over some entries of the vocabulary, the frequent ones and a few others, anew each step.

Bengio and Senécal 2008, "Adaptive importance sampling to accelerate training of a neural probabilistic language model"; Jean et
al. 2015, "On using very large target vocabulary", section 3. Of a small network with a large vocabulary the output layer is
most of a step. Training only: all scores are over the whole vocabulary. Knows nothing of masks, networks or steps.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mezzotint import seeding
from mezzotint.distributed import send
from mezzotint.network.layers import float32_linear
from mezzotint.training.output import MOST_WITHOUT_MAXIMUM, capped


class Entries(NamedTuple):
    """The K entries of a step. ids: int64 [K]. place: int64 [V], of each token among them, -1 where it is none of them.
    log_weight: float32 [K], log of how many entries each stands for."""

    ids: Tensor
    place: Tensor
    log_weight: Tensor

    def to(self, device: torch.device) -> Entries:
        """On a device, see `send`."""
        return Entries(*(send(x, device) for x in self))


def entry_chances(counts: np.ndarray, entries: int) -> Tensor:
    """Of each entry the chance to be drawn, float64 [V]: 1, or in proportion to the root of its count; `entries` in all.

    counts: int64 [V], how often each token is seen. entries: 1..V - 1. With the root the variance of the sum is least where
    rare tokens, at the places where they can stand, are about as likely as frequent ones at theirs.
    """
    root = torch.from_numpy(np.sqrt(counts + 1.0))
    ordered, order = root.sort(descending=True, stable=True)
    rest = ordered.flip(0).cumsum(0).flip(0)  # of an entry and all behind it
    # So many are certain that the chance of the next one is below 1.
    left = entries - torch.arange(entries)
    certain = int((ordered[:entries] * left < rest[:entries]).int().argmax())
    chances = torch.ones(len(root), dtype=torch.float64)
    chances[order[certain:]] = ordered[certain:] * ((entries - certain) / rest[certain])
    return chances


def draw_entries(chances: Tensor, seed: int, step: int) -> Entries:
    """The entries of (seed, step), each drawn with its chance, always as many: systematic sampling in random order.

    chances: see `entry_chances`. Each entry drawn stands for 1 / chance of them (Horvitz and Thompson 1952).
    """
    random = seeding.generator("sampled softmax", seed, step)
    unsure = (chances < 1).nonzero()[:, 0]
    unsure = unsure[torch.randperm(len(unsure), generator=random)]
    upto = chances[unsure].cumsum(0)
    # Steps of 1 along the chances, each of which is below 1: no entry is met twice.
    steps = torch.rand((), generator=random, dtype=torch.float64) + torch.arange(round(float(upto[-1])))
    met = torch.searchsorted(upto, steps, right=True).clamp(max=len(unsure) - 1)
    ids = torch.cat(((chances >= 1).nonzero()[:, 0], unsure[met]))
    place = torch.full((len(chances),), -1).scatter_(0, ids, torch.arange(len(ids)))
    return Entries(ids, place, -chances[ids].log().float())


def sampled_nll(rows: Tensor, table: Tensor, targets: Tensor, entries: Entries, cap: float) -> Tensor:
    """-log p of each target over its own entry and `entries`, in nats, float32 [n], under logits cap * tanh(row . entry / cap).

    rows: [n, W]. table: [V, W]. targets: int64 [n]. The sum below the fraction is in expectation that over the vocabulary, so
    that the result is on average a little below the exact one (Jensen): an estimate to train by, and no bound.
    """
    products = float32_linear(rows, table.index_select(0, entries.ids))
    own = cap * torch.tanh((rows * table.index_select(0, targets)).sum(1).float() / cap)
    return SampledCrossEntropy.apply(products, own, entries.place[targets], entries.log_weight, cap)


class SampledCrossEntropy(torch.autograd.Function):
    """Products [n, K] of rows and entries, logits [n] of the targets, their place among the entries (-1: none), log weights
    [K], cap -> `sampled_nll`.

    Written out so that compiled code passes over the products once each way.
    """

    @staticmethod
    def forward(ctx: Any, products: Tensor, own: Tensor, place: Tensor, log_weight: Tensor, cap: float) -> Tensor:
        others = _others(products, place, log_weight, cap)
        if cap > MOST_WITHOUT_MAXIMUM:
            log_sum = torch.logaddexp(others.logsumexp(1), own)
        else:
            log_sum = (others.exp().sum(1) + own.exp()).log()
        ctx.save_for_backward(products, own, place, log_weight, log_sum)
        ctx.cap = cap
        return log_sum - own

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        products, own, place, log_weight, log_sum = ctx.saved_tensors
        share = (_others(products, place, log_weight, ctx.cap) - log_sum[:, None]).exp()
        slope = (1 - (capped(products, ctx.cap) / ctx.cap).square()) * grads[0][:, None]
        return share * slope, ((own - log_sum).exp() - 1) * grads[0], None, None, None


def _others(products: Tensor, place: Tensor, log_weight: Tensor, cap: float) -> Tensor:
    """Weighted logits [n, K] without those of the targets, which stand for themselves."""
    true = torch.arange(products.shape[1], device=products.device) == place[:, None]
    return (capped(products, cap) + log_weight).masked_fill(true, -torch.inf)
