"""Texts that might stand in a gap: a beam over its tokens from left to right, and fills drawn by any sampler.

Both see what is left and right of the gap. What they propose is weighed elsewhere (`ranking`).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mezzotint.model import Model
from mezzotint.sampling.constraints import Constraint
from mezzotint.sampling.denoise import denoise
from mezzotint.sampling.draft import Draft, edge_limits
from mezzotint.sampling.generate import resample_invalid_utf8
from mezzotint.sampling.healing import log_probabilities

LEFT, RIGHT = 64, 32  # tokens to each side of the gap that proposals see
BEAM_LENGTHS = 4  # a beam of full width for gaps of so many tokens; an eighth of it for longer ones
TRIES = 256  # tokens tried for each place of a beam until enough meet the constraint; all, until one does

Show = Callable[[int, Sequence[int], Sequence[float]], None]
"""Called after each pass with (passes so far, ids of the gap, confidence of each); may raise to stop."""


@dataclass(frozen=True)
class Candidate:
    """ids of a gap; confidence: the model's probability of each in the pass that revealed it."""

    ids: list[int]
    confidence: list[float]


@dataclass
class Search:
    """Where proposals are sought: gap `i` of a draft, by `model`. passes: forward passes so far."""

    model: Model
    draft: Draft
    i: int
    attention: str
    constraint: Constraint
    show: Show | None
    passes: int = 0

    @functools.cached_property
    def context(self) -> tuple[list[int], list[int]]:
        """Ids left and right of the gap."""
        return self.draft.left_of(self.i, LEFT), self.draft.right_of(self.i, RIGHT)

    @functools.cached_property
    def blank(self) -> Tensor:
        """Tokens that are a space, bool [V], where a space before the gap belongs to its first token."""
        edges, tokenizer = self.draft.gaps[self.i].edges, self.draft.tokenizer
        pending = (edges.space_before or edges.open_before) and not edges.left
        return tokenizer.where(lambda text: text == " " and pending)

    def canvas(self, middles: Sequence[list[int]]) -> tuple[Tensor, int]:
        """Rows with these ids in the gap, and where they start."""
        return self.draft.canvas(self.context[0], middles, self.context[1])

    def allows(self, ids: Sequence[int], *, complete: bool) -> bool:
        """Whether the constraint lets these ids stand in the gap, or begin what may."""
        if not self.constraint:
            return True
        edges, tokenizer = self.draft.gaps[self.i].edges, self.draft.tokenizer
        text = edges.strip(b"".join(tokenizer.raw[t] for t in ids).decode(errors="replace"), last=complete)
        before, after = self.draft.texts[self.i][-32:], self.draft.texts[self.i + 1][:32]
        return self.constraint.allows(text, before, after, complete=complete)


@dataclass(frozen=True)
class _Hypothesis:
    ids: tuple[int, ...] = ()
    log_p: float = 0.0
    confidence: tuple[float, ...] = ()


def beam(search: Search, lengths: Sequence[int], width: int, block_size: int) -> list[Candidate]:
    """The likeliest fills of each length, token by token from the left, all lengths together.

    Keeps `width` beginnings for lengths to BEAM_LENGTHS and an eighth of that for longer ones, but half of it up to twice
    that length under a regular expression. A token is judged by
    its probability given both sides of the gap, the tokens before it and the masks behind it.
    """
    mask_id = search.draft.mask_id
    wide = BEAM_LENGTHS if search.constraint.expression is None else 2 * BEAM_LENGTHS
    widths = {n: width if n <= BEAM_LENGTHS else max(1, width // (2 if n <= wide else 8)) for n in lengths}
    alive = {n: [_Hypothesis()] for n in lengths}
    found: list[Candidate] = []
    for place in range(max(lengths)):
        rows = [(n, h) for n, some in alive.items() for h in some]
        if not rows:
            break
        middles = [[*h.ids, *[mask_id] * (n - place)] for n, h in rows]
        canvas, at = search.canvas(middles)
        positions = torch.zeros(canvas.shape, dtype=torch.bool)
        positions[:, at + place] = True
        log_p, passes = log_probabilities(search.model, canvas, positions, block_size)
        search.passes += passes
        grown: dict[int, list[_Hypothesis]] = {}
        for (n, h), row in zip(rows, log_p, strict=True):
            grown.setdefault(n, []).extend(_extend(search, h, n, row, widths[n]))
        for n, some in grown.items():
            some.sort(key=lambda h: -h.log_p)
            some = some[: widths[n]]
            if place + 1 == n:
                found += [Candidate(list(h.ids), list(h.confidence)) for h in some]
                some = []
            alive[n] = some
        if search.show is not None:
            n, best = max(((n, some[0]) for n, some in grown.items() if some), key=lambda x: x[0], default=(0, None))
            if best is not None:
                rest = n - place - 1
                search.show(search.passes, [*best.ids, *[mask_id] * rest], [*best.confidence, *[0.0] * rest])
    return found


def _extend(search: Search, h: _Hypothesis, n: int, log_p: Tensor, width: int) -> list[_Hypothesis]:
    """The `width` likeliest tokens behind a beginning of `n` tokens that may stand there."""
    place, tokenizer = len(h.ids), search.draft.tokenizer
    able = (
        edge_limits(tokenizer, search.draft.gaps[search.i].edges, n).get(place, tokenizer.is_text) & ~tokenizer.is_byte
    )
    if place == 0 and n > 1 and search.constraint.expression is not None:
        able = able | search.blank  # then a number or a rare character may follow, which no token has a space before
    top = log_p.masked_fill(~able, -math.inf).topk(len(log_p) if search.constraint else min(width, len(log_p)))
    grown: list[_Hypothesis] = []
    for tried, (token, value) in enumerate(zip(top.indices.tolist(), top.values.tolist(), strict=True)):
        if len(grown) == width or value == -math.inf or (grown and tried >= TRIES):
            break
        ids = (*h.ids, token)
        if search.allows(ids, complete=place + 1 == n):
            grown.append(_Hypothesis(ids, h.log_p + value, (*h.confidence, math.exp(value))))
    return grown


def drawn(search: Search, lengths: Sequence[int], seed: int, settings: Mapping[str, Any]) -> list[Candidate]:
    """One fill of each of `lengths` (which may repeat), by `denoise` in one batch. settings: of `SamplingConfig`."""
    draft = search.draft
    canvas, at = search.canvas([[draft.mask_id] * n for n in lengths])
    target = torch.zeros(canvas.shape, dtype=torch.bool)
    limits: dict[tuple[int, int], Tensor] = {}
    for b, n in enumerate(lengths):
        target[b, at : at + n] = True
        edges = draft.gaps[search.i].edges
        limits |= {(b, at + p): able for p, able in edge_limits(draft.tokenizer, edges, n).items()}
    before, middle = search.passes, len(lengths) // 2

    def on_step(step: int, ids: Tensor, confidence: Tensor) -> None:
        if search.show is not None:
            where = slice(at, at + lengths[middle])
            search.show(before + step, ids[middle, where].tolist(), confidence[middle, where].tolist())

    result = denoise(
        search.model, canvas, seed=seed, target=target, only=limits, attention=search.attention,
        on_step=on_step if search.show else None, **settings,
    )  # fmt: skip
    result = resample_invalid_utf8(
        search.model,
        result,
        target,
        seed,
        draft.tokenizer.is_text,
        0,
        only=limits,
        attention=search.attention,
        **settings,
    )
    search.passes += result.forward_passes
    found = []
    for b, n in enumerate(lengths):
        gap = slice(at, at + n)
        found.append(Candidate(result.ids[b, gap].tolist(), result.confidence[b, gap].tolist()))
    return [c for c in found if search.allows(c.ids, complete=True)]
