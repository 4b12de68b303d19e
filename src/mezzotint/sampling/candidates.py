"""Texts that might stand in a gap: a beam over its tokens from left to right, and fills drawn by any sampler.

Both see what is left and right of the gap. What they propose is weighed elsewhere (`ranking`).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from mezzotint.network.model import TOKENS_PER_FORWARD, Denoiser, Model, Surroundings
from mezzotint.sampling.constraints import Constraint
from mezzotint.sampling.denoise import denoise
from mezzotint.sampling.draft import Draft, edge_limits
from mezzotint.sampling.generate import resample_invalid_utf8
from mezzotint.sampling.healing import log_probabilities

LEFT, RIGHT = 64, 32  # tokens to each side of the gap that proposals see
BEAM_LENGTHS = 4  # tokens of gaps that are sought by a beam of full width; an eighth of it for longer ones
NEAR = 2  # of these are read anew with each beginning of a beam, the others once for each length (`_Reader`)
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
    """Where proposals are sought: gap `i` of a draft, by `model`. passes: forward passes so far.

    near: tokens to each side of the gap that are read anew with each beginning of a beam; None: all.
    """

    model: Model
    draft: Draft
    i: int
    attention: str
    constraint: Constraint
    show: Show | None
    passes: int = 0
    near: int | None = None

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


class _Reader:
    """What the model says of the tokens of a gap of some lengths, given their beginnings.

    With `Search.near`, what is further off is read once for each length, with masks in the gap: an approximation
    that costs a tenth, of a network that can do it and canvases that may be held.
    """

    def __init__(self, search: Search, lengths: Sequence[int], block_size: int) -> None:
        self.search, self.lengths, self.block_size = search, lengths, block_size
        self.kept: Surroundings | None = None

    def _read(self) -> None:
        """Read what is further off, where that is wanted and can be done."""
        search = self.search
        network = getattr(search.model, "network", None)
        # By what it can do, not by its class: a server lends a network under another one.
        if search.near is None or self.block_size or not hasattr(network, "prefix_inputs"):
            return
        self.canvas, self.at = search.canvas([[search.draft.mask_id] * n for n in self.lengths])
        if self.canvas.numel() <= TOKENS_PER_FORWARD:
            stop = self.at + max(self.lengths) + search.near
            self.kept = Surroundings(cast(Denoiser, network), self.canvas, max(0, self.at - search.near), stop)
            search.passes += 1

    @torch.inference_mode()
    def log_probabilities(self, rows: Sequence[tuple[int, Sequence[int]]], place: int) -> Tensor:
        """Of what stands at `place`, [R, V]; place 0 comes first. rows: length of the gap, and its `place` first ids."""
        search = self.search
        if place == 0:
            self._read()
        if self.kept is None:
            canvas, at = search.canvas([[*ids, *[search.draft.mask_id] * (n - place)] for n, ids in rows])
            positions = torch.zeros(canvas.shape, dtype=torch.bool)
            positions[:, at + place] = True
            log_p, passes = log_probabilities(search.model, canvas, positions, self.block_size)
            search.passes += passes
            return log_p
        network, where = search.model.network, self.at + place - self.kept.start
        number = {n: b for b, n in enumerate(self.lengths)}
        which = torch.tensor([number[n] for n, _ in rows])
        if place == 0:
            return network.logits(self.kept.given[which.to(search.model.device), where]).cpu().log_softmax(-1)
        canvas = self.canvas[which]
        canvas[:, self.at : self.at + place] = torch.tensor([list(ids) for _, ids in rows])
        found = []
        at_once = max(1, TOKENS_PER_FORWARD // canvas.shape[1])
        for some, of in zip(canvas.split(at_once), which.split(at_once), strict=True):
            found.append(network.logits(self.kept.hidden(some, of)[:, where]).cpu().log_softmax(-1))
        search.passes += len(found)
        return torch.cat(found)


@dataclass(frozen=True)
class _Hypothesis:
    ids: tuple[int, ...] = ()
    log_p: float = 0.0
    confidence: tuple[float, ...] = ()


def beam(search: Search, lengths: Sequence[int], width: int, block_size: int) -> list[Candidate]:
    """The likeliest fills of each length, token by token from the left, all lengths together.

    Keeps `width` beginnings for a length to BEAM_LENGTHS, on average (more for the shorter ones), and an eighth of that
    for longer ones, but half of it up to twice that length under a regular expression. A token is judged by
    its probability given both sides of the gap, the tokens before it and the masks behind it.
    """
    wide = BEAM_LENGTHS if search.constraint.expression is None else 2 * BEAM_LENGTHS
    # Most of what may be tried goes to the shortest, which cost least and which most gaps are.
    share = sum(1 / n for n in lengths if n <= BEAM_LENGTHS) / max(1, sum(n <= BEAM_LENGTHS for n in lengths))
    widths = {
        n: max(1, round(width / n / share) if n <= BEAM_LENGTHS else width // (2 if n <= wide else 8)) for n in lengths
    }
    # Few long ones do not make the many short ones read more beside the gap.
    groups = [[n for n in widths if (n <= BEAM_LENGTHS) == short] for short in (True, False)]
    readers = [_Reader(search, group, block_size) for group in groups if group]
    alive = {n: [_Hypothesis()] for n in widths}
    found: list[Candidate] = []
    for place in range(max(lengths)):
        grown: dict[int, list[_Hypothesis]] = {}
        for reader in readers:
            some = {n: alive[n] for n in reader.lengths if alive[n]}
            if not some:
                continue
            log_p = reader.log_probabilities([(n, h.ids) for n, these in some.items() for h in these], place)
            shown = bool(grown)  # by the shorter lengths' reader
            for (n, these), each in zip(some.items(), log_p.split([len(x) for x in some.values()]), strict=True):
                grown[n] = sorted(_extend(search, these, n, each, widths[n]), key=lambda h: -h.log_p)[: widths[n]]
            if not shown:
                _show_longest(search, grown, place)
        for n, these in grown.items():
            if place + 1 == n:
                found += [Candidate(list(h.ids), list(h.confidence)) for h in these]
            alive[n] = these if place + 1 < n else []
    return found


def _show_longest(search: Search, grown: Mapping[int, list[_Hypothesis]], place: int) -> None:
    """Show the best beginning of the longest gap that has one, up to and with `place`."""
    if search.show is None:
        return
    n, best = max(((n, h[0]) for n, h in grown.items() if h), key=lambda x: x[0], default=(0, None))
    if best is not None:
        rest = n - place - 1
        search.show(search.passes, [*best.ids, *[search.draft.mask_id] * rest], [*best.confidence, *[0.0] * rest])


def _extend(search: Search, beginnings: list[_Hypothesis], n: int, log_p: Tensor, width: int) -> list[_Hypothesis]:
    """The `width` likeliest tokens behind each beginning of `n` tokens that may stand there. log_p: [beginnings, V]."""
    place, tokenizer = len(beginnings[0].ids), search.draft.tokenizer
    able = (
        edge_limits(tokenizer, search.draft.gaps[search.i].edges, n).get(place, tokenizer.is_text) & ~tokenizer.is_byte
    )
    if place == 0 and n > 1 and search.constraint.expression is not None:
        able = able | search.blank  # then a number or a rare character may follow, which no token has a space before
    vocabulary = log_p.shape[1]
    top = log_p.masked_fill(~able, -math.inf).topk(vocabulary if search.constraint else min(width, vocabulary))
    grown: list[_Hypothesis] = []
    for h, tokens, values in zip(beginnings, top.indices, top.values, strict=True):
        before = len(grown)
        for tried, (token, value) in enumerate(zip(tokens.tolist(), values.tolist(), strict=True)):
            more = len(grown) - before
            if more == width or value == -math.inf or (more and tried >= TRIES):
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
