"""Likelihood of a model on windows of tokens: what is exact, what is a bound, what is neither, and how sure.

Scores anything that maps a canvas to logits (`Model.logits`), so a network in training, a reopened artifact and a foreign
model are scored alike. Does not know how models are trained or stored, or where windows come from. Bits per byte divide
by the bytes that `data` charges to the windows. Sums are float64.

Two things can be random in a score. Masks: the NELBO draws them. Windows: with `tokens` only some windows are scored;
they are evenly spaced and the same for every method and seed, so figures on the same `tokens` compare window by
window. `Estimate` reports both errors apart and together.

Windows with a stride (`TokenStream.windows(length, stride)`) put clean text before what they charge: `chain` and `causal`
stay exact, the bounds stay bounds, and all are lower.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from mezzotint import seeding
from mezzotint.data.dataset import Windows
from mezzotint.errors import DataError
from mezzotint.network.model import Model
from mezzotint.progress import OnProgress
from mezzotint.scoring.chain import causal_matrix, chain_matrix
from mezzotint.scoring.kinds import kind_of
from mezzotint.scoring.nelbo import lean_matrix, lower_matrix, nelbo_matrix, nelbo_size, orders_matrix
from mezzotint.scoring.plan import MaskedWindow, Scoring, masked_window_nll, some_bytes
from mezzotint.scoring.statistics import Estimate, assemble

RECONSTRUCTION_RATES = (0.1, 0.3, 0.5, 0.7, 0.9)


def nelbo(
    model: Model,
    windows: Windows,
    *,
    tokens: int | None = None,
    repeats: int | None = None,
    seed: int = 0,
    batch: int | None = None,
    journal: Path | None = None,
    progress: OnProgress | None = None,
    block_size: int | None = None,
    orders: int | None = None,
    order_lean: float = 0.0,
) -> Estimate:
    """The NELBO of the windows: an upper bound on -log p, estimated without bias.

    windows: of ids, as `TokenStream.windows` gives them. tokens: score about so many, in evenly spaced windows (default: all). seed: of the masks. batch: windows of a forward pass
    (default: what holds 16,384 tokens); it changes speed and memory, not the figure. journal: a file that keeps what is done,
    to go on from. progress: told of forward passes.
    block_size: tokens of the blocks that are denoised from left to right, each given the true blocks before it; 0:
    whole windows; default: what the model was trained on. 1 is `causal`, which is exact.
    order_lean: draw orders that lean to the left, of whole windows (`objective.lean_mask`): 0 is the NELBO, infinity an
    estimate of the chain; an upper bound for any lean. orders: the importance-weighted bound over so many orders
    (`nelbo.orders_matrix`), tighter, at a forward pass per token and order; repeats of it are 2 where not given.

    Each repeat is one mask per window with the counts k stratified over the windows, less a control variate for how
    difficult the hidden tokens are (`apply_control`). Repeats are independent, and the mask error is that of their
    mean, with repeats - 1 degrees of freedom (`Estimate.interval` uses Student's t). Over all windows that is the
    whole error; over a subset the error from the choice of windows is added.
    The formula and its sources (Uria et al. 2014, eq. 6; Arriola et al. 2025, eq. 8, for blocks): see `objective`.
    Deterministic in `seed`, up to rounding for any `batch`. Costs repeats * windows forward passes, of twice the length
    for blocks. `journal` and torchrun: see `Journal`; neither is for block size 1.
    Repeats are 8 where not given.
    Raises DataError if there is nothing to score, fewer than 2 repeats, a setting out of range, or for windows of another
    tokenizer.
    """
    repeats = repeats if repeats is not None else 2 if orders else 8
    plan = Scoring.make(
        model, windows, tokens=tokens, progress=progress, repeats=repeats, seed=seed, batch=batch, journal=journal
    )
    if orders is not None or order_lean:
        if block_size:
            raise DataError("orders are those of whole windows: leave out the block size")
        lean = f" lean({order_lean:g})" if order_lean else ""
        if orders is None:
            nats = lean_matrix(model, plan, order_lean)
            return assemble(plan, f"nelbo{lean}", "lean", nats, nats.size)
        nats = orders_matrix(model, plan, orders, order_lean)
        return assemble(plan, f"nelbo orders({orders}){lean}", "orders", nats, repeats * orders * sum(plan.lengths))
    size = nelbo_size(model, plan, block_size)
    if size == 1 and journal is not None:
        raise DataError("blocks of 1 token take a single pass, which needs no journal: leave it out")
    nats, method, family = nelbo_matrix(model, plan, size)
    return assemble(plan, method, family, nats, nats.size)


def lower_bound(
    model: Model,
    windows: Windows,
    *,
    orders: int = 16,
    slack: float = 1.0,
    order_lean: float = 0.0,
    tokens: int | None = None,
    repeats: int = 2,
    seed: int = 0,
    batch: int | None = None,
    journal: Path | None = None,
    progress: OnProgress | None = None,
) -> Estimate:
    """A lower bound on -log p of the mixture over orders, whose upper bound is `nelbo`: the truth lies between the two.

    Estimated without bias from two sets of `orders` orders a window and repeat, a forward pass per token and order, of whole
    windows. slack: nats by which its tangent point is moved away, see `nelbo.lower_matrix`; order_lean: see `nelbo`, whose
    mixture is another for another lean. What is proven is the expectation: in windows of more than some tens of tokens most
    of p comes from orders so rare that they are not drawn, and the estimate of a few repeats and its standard error say
    nothing about them. model, tokens, seed, batch, journal, progress: see `nelbo`.
    Raises DataError as `nelbo` does, and for a slack below 0.
    """
    plan = Scoring.make(
        model, windows, tokens=tokens, progress=progress, repeats=repeats, seed=seed, batch=batch, journal=journal
    )
    nats = lower_matrix(model, plan, orders, order_lean, slack)
    method = f"lower orders({orders})" + (f" lean({order_lean:g})" if order_lean else "")
    return assemble(plan, method, "lower", nats, repeats * 2 * orders * sum(plan.lengths))


def nelbo_by_window(
    model: Model, windows: Windows, *, tokens: int | None = None, repeats: int = 2, seed: int = 0
) -> np.ndarray:
    """Each window's share of `nelbo`, float64 [windows]: their mean is the figure, in bits per byte.

    For differences between models of one tokenizer: the same arguments give the same windows and masks. model, tokens,
    repeats, seed: see `nelbo`. Raises DataError as it does.
    """
    plan = Scoring.make(model, windows, tokens=tokens, progress=None, repeats=repeats, seed=seed)
    mean_bytes = float(plan.byte_counts.mean())
    nats, _, _ = nelbo_matrix(model, plan, nelbo_size(model, plan, None))
    return nats.mean(axis=0) / math.log(2) / mean_bytes


def chain_rule(
    model: Model,
    windows: Windows,
    *,
    tokens: int | None = None,
    order: str = "left",
    attention: str = "full",
    seed: int = 0,
    batch: int | None = None,
    journal: Path | None = None,
    progress: OnProgress | None = None,
) -> Estimate:
    """Exact code length of the windows, each revealed in `order` (see `reveal_order`).

    chain(x, order) = sum_i -log p(x_i | the groups before i's, the rest masked): a normalised distribution over
    windows, which `compress` turns into a file of this size. One forward pass per group, so T for a window of T
    tokens from left to right. With `block(k)` attention, an order that finishes each block before the next (`left`,
    or `block(k)`, a block in a single pass) takes all blocks at once: k passes from left to right, over the doubled
    window of `Denoiser.hidden_blocks`. For other orders only the part of the canvas that can be seen is computed.
    `causal` is `block(1)`, where a token is predicted at a MASK of its own, unlike in the function `causal`. No masks are
    drawn, so over all windows the error is 0; `seed` is only recorded. model, windows, tokens, batch, progress: see `nelbo`.
    `journal` and torchrun: see `Journal`. Raises DataError if there is nothing to score, for an unknown order, or for windows
    of another tokenizer; ConfigError for unknown attention.
    """
    plan = Scoring.make(model, windows, tokens=tokens, progress=progress, seed=seed, batch=batch, journal=journal)
    nats, passes = chain_matrix(model, plan, order, attention)
    method = "chain" if (order, attention) == ("left", "full") else f"chain {order} {attention}"
    return assemble(plan, method, "chain", nats, passes)


def causal(
    model: Model,
    windows: Windows,
    *,
    tokens: int | None = None,
    seed: int = 0,
    batch: int | None = None,
    progress: OnProgress | None = None,
) -> Estimate:
    """Exact next-token code length of a model trained with causal attention: one forward pass per window.

    The input is the window shifted right behind one MASK, so that the output at position i, which sees x_<i, predicts
    x_i. A normalised distribution for any weights, but a poor one for weights never trained this way. No masks are drawn;
    `seed` is only recorded. windows, tokens, batch, progress: see `nelbo`.
    Raises DataError if there is nothing to score, or for windows of another tokenizer.
    """
    plan = Scoring.make(model, windows, tokens=tokens, progress=progress, seed=seed, batch=batch)
    return assemble(plan, "causal", "causal", causal_matrix(model, plan), len(plan.chosen))


def reconstruction_score(
    model: Model,
    windows: Windows,
    *,
    tokens: int | None = None,
    seed: int = 0,
    batch: int | None = None,
    progress: OnProgress | None = None,
) -> Estimate:
    """The reference's score, as the reference computes it: (1/5) sum over t of CE(t) / t. Not a bound on anything.

    Each token is masked with probability t, CE(t) is the mean over all masked tokens in nats per token, and the bytes
    are those of the tokens shifted by one, as for a next-token model. A uniform model scores 3.5746 log V nats per
    token where its true figure is log V. The error covers masks and the choice of windows. model, windows, tokens, seed,
    batch, progress: see `nelbo`. Raises DataError as it does, and for windows with context.
    """
    plan = Scoring.make(model, windows, tokens=tokens, progress=progress, seed=seed, batch=batch)
    if plan.has_context:
        raise DataError("the reconstruction score has no context: leave out the stride, and score prepared data")
    chosen = plan.chosen
    rates = RECONSTRUCTION_RATES
    sums = np.zeros((len(rates), len(chosen)))
    counts = np.zeros((len(rates), len(chosen)))

    def rows() -> Iterator[MaskedWindow]:
        for r, rate in enumerate(rates):
            for n, i in enumerate(chosen):
                ids = plan.ids(n)
                masked = torch.rand(len(ids), generator=seeding.generator(seed, r, 1 + i), dtype=torch.float64) < rate
                counts[r, n] = int(masked.sum())
                yield MaskedWindow(ids, masked, masked)

    for done, nll in enumerate(masked_window_nll(model, rows(), batch=batch)):
        sums[divmod(done, len(chosen))] = nll.sum()
        plan.tell(done + 1, sums.size)

    size = shifted = 0
    for i in chosen:
        ids = np.asarray(windows[i])
        size += len(ids)
        following = np.asarray(windows[i + 1])[:1] if i + 1 < len(windows) else ids[:0]
        target = np.concatenate((ids[1:], following))
        if len(target):
            shifted += int(model.tokenizer.byte_counts(target, int(ids[0])).sum())
    some_bytes(shifted)

    masked_tokens = np.maximum(counts.sum(axis=1), 1)
    ce = sums.sum(axis=1) / masked_tokens
    weight = 1 / (len(rates) * np.array(rates))
    score = float(weight @ ce)
    residual = (weight / masked_tokens) @ (sums - ce[:, None] * counts)
    n = len(chosen)
    error = math.sqrt(n / (n - 1) * float(residual @ residual)) if n > 1 else math.inf
    scale = size / shifted / math.log(2)
    return Estimate(
        method="reconstruction",
        kind=kind_of("reconstruction"),
        bpb=score * scale,
        stderr_bpb=error * scale,
        nats_per_token=score,
        tokens=size,
        bytes=shifted,
        seconds=time.perf_counter() - plan.started,
        forward_passes=sums.size,
        seed=seed,
        mask_stderr_bpb=math.nan,
        window_stderr_bpb=math.nan,
        degrees_of_freedom=max(n - 1, 1),
        bytes_lost=plan.bytes_lost,
    )
