"""Code lengths of windows in one order: masked positions revealed group by group, or next tokens in one pass.

Knows how to compute them, not what they prove (`kinds`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence

import numpy as np
import torch

from mezzotint.config import parse_attention
from mezzotint.errors import DataError
from mezzotint.network.model import TOKENS_PER_FORWARD, Model, shift_right
from mezzotint.objective import masked_nll
from mezzotint.scoring.orders import canvas_length, merge_blocks, reveal_order
from mezzotint.scoring.plan import MaskedWindow, Scoring, masked_window_nll

Revealing = tuple[int, Sequence[np.ndarray]]
"""A chosen window's number, and the groups of its charged positions (from 0) in the order they are revealed."""


def revealed_nats(
    model: Model, plan: Scoring, jobs: Sequence[Revealing], block_size: int = 0, given_blocks: int | None = None
) -> Iterator[float]:
    """Nats of each job in turn, a forward pass per group. block_size, given_blocks: see `masked_window_nll`."""
    done, total = 0, sum(len(groups) for _, groups in jobs)
    longest = max((len(plan.windows[plan.chosen[n]]) for n, _ in jobs), default=1)
    rows = plan.batch or max(1, TOKENS_PER_FORWARD // longest // (2 if given_blocks else 1))
    for start in range(0, len(jobs), rows):
        # Step by step over a set of windows, so that the rows of a batch have one canvas length.
        part = jobs[start : start + rows]
        nats = [0.0] * len(part)
        owners: deque[int] = deque()
        canvases = _canvases(plan, part, block_size, owners)
        for nll in masked_window_nll(
            model, canvases, block_size=block_size, batch=plan.batch, given_blocks=given_blocks
        ):
            nats[owners.popleft()] += float(nll.sum())
            done += 1
            plan.tell(done, total)
        yield from nats


def _canvases(plan: Scoring, jobs: Sequence[Revealing], block_size: int, owners: deque[int]) -> Iterator[MaskedWindow]:
    """Every step of every job; appends to `owners` which job each canvas belongs to."""
    texts = [plan.ids(n) for n, _ in jobs]
    context = [plan.context(n) for n, _ in jobs]
    masked = [torch.arange(len(ids)) >= given for ids, given in zip(texts, context, strict=True)]
    for step in range(max(len(groups) for _, groups in jobs)):
        for j, (_, groups) in enumerate(jobs):
            if step >= len(groups):
                continue
            positions = torch.from_numpy(groups[step]) + context[j]
            length = canvas_length(block_size, len(texts[j]), int(positions.max()))
            scored = torch.zeros(len(texts[j]), dtype=torch.bool)
            scored[positions] = True
            owners.append(j)
            yield MaskedWindow(texts[j][:length], masked[j][:length].clone(), scored[:length])
            masked[j][positions] = False


def chain_matrix(model: Model, plan: Scoring, order: str, attention: str) -> tuple[np.ndarray, int]:
    """(nats, float64 [1, windows], forward passes in all) of `order` under `attention`.

    Raises DataError for an unknown order, or for blocks of windows with context; ConfigError for unknown attention.
    """
    block_size = parse_attention(attention)
    if block_size and plan.has_context:
        raise DataError("a stride needs attention over the whole window: leave out the stride or the blocks")
    lengths = plan.lengths
    orders = {length: reveal_order(order, length) for length in set(lengths)}
    size: int | None = block_size or max(orders)
    merged = {length: merge_blocks(groups, size) for length, groups in orders.items()} if size < max(orders) else {}
    if merged and all(merged.values()):
        orders, block_size = merged, 0
    else:
        size = None
    settings = {"method": "chain", "order": order, "visibility": attention}
    with plan.book(model, settings, len(plan.chosen)) as book:
        todo = book.mine()
        jobs = [(n, orders[lengths[n]]) for n in todo]
        for n, nats in zip(todo, revealed_nats(model, plan, jobs, block_size, size), strict=True):
            book.record(n, nats)
    return book.result().T, sum(len(orders[length]) for length in lengths)


def causal_matrix(model: Model, plan: Scoring) -> np.ndarray:
    """Next-token code lengths in nats, float64 [1, windows]."""
    nats = np.zeros((1, len(plan.chosen)))
    sizes = [len(plan.windows[i]) for i in plan.chosen]
    rows = plan.batch or max(1, TOKENS_PER_FORWARD // max(sizes))
    groups: list[list[int]] = []
    for n, size in enumerate(sizes):
        if not groups or len(groups[-1]) >= rows or sizes[groups[-1][0]] != size:
            groups.append([])
        groups[-1].append(n)
    done = 0
    for group in groups:
        ids = torch.stack([plan.ids(n) for n in group]).to(model.device)
        context = torch.tensor([plan.context(n) for n in group], device=ids.device)
        charged = torch.arange(ids.shape[1], device=ids.device) >= context[:, None]
        shifted = shift_right(ids, model.config.mask_id)
        with torch.inference_mode():
            logits = model.logits(shifted, block_size=1, positions=charged)
            nats[0, group] = masked_nll(logits, ids, charged).double().sum(dim=1).cpu().numpy()
        done += len(group)
        plan.tell(done, len(plan.chosen))
    return nats
