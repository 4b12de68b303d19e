"""Token healing: a gap's first and last tokens may cross its edges, where an edge cuts a word: "Lon____ is" -> "London is".

The tokens of "Lon" alone are not those with which "London" begins, so a model that is shown them would not go on with
"don". For each way to cut the word at the edge into tokens w_1..w_j and a rest r that the gap's first token must begin
with (and exceed), the model's probability of the word so far is

    p(w_1..w_j, r...) = prod_i p(w_i | w_<i, context) * sum over tokens v that begin with r of p(v | w, context)

and the most probable cut is taken. At the right edge likewise, from right to left. Only the last few tokens at an edge are
looked at, so that work is bounded whatever stands there: a long word, or a text without spaces.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mezzotint.network.model import TOKENS_PER_FORWARD, Model
from mezzotint.sampling.draft import NOMINAL, Draft

LONGEST_OVERLAP = 12  # characters of a broken word that a token across a gap's edge may take in
MOST_TOKENS = 16  # at an edge that may be encoded anew
CONTEXT = 96  # tokens to each side by which cuts are judged


@dataclass(frozen=True)
class Cut:
    """One way to cut the text at an edge: the characters left to the gap's token, and the ids that stay."""

    overlap: str
    ids: list[int]


def heal(model: Model, draft: Draft, i: int) -> int:
    """Let gap i's first and last tokens cross its edges where that is more probable. Returns forward passes."""
    passes = 0
    gap = draft.gaps[i]
    if not gap.edges.space_before and draft.texts[i][-1:].isalnum():
        ids = draft.ids[i]
        keep, cuts = _cuts(draft, ids, i, left=True)
        if len(cuts) > 1:
            context = draft.left_of(i, CONTEXT + len(ids) - keep)
            context = context[: len(context) - (len(ids) - keep)]
            best, passes = _most_probable(model, draft, cuts, context, draft.right_of(i, CONTEXT), left=True)
            draft.ids[i] = ids[:keep] + best.ids
            gap.edges = replace(gap.edges, left=best.overlap)
    if not gap.edges.space_after and draft.texts[i + 1][:1].isalnum():
        ids = draft.ids[i + 1]
        keep, cuts = _cuts(draft, ids, i, left=False)
        if len(cuts) > 1:
            context = draft.right_of(i, CONTEXT + len(ids) - keep)[len(ids) - keep :]
            best, more = _most_probable(model, draft, cuts, draft.left_of(i, CONTEXT), context, left=False)
            passes += more
            draft.ids[i + 1] = best.ids + ids[len(ids) - keep :]
            gap.edges = replace(gap.edges, right=best.overlap)
    return passes


def _cuts(draft: Draft, ids: list[int], i: int, *, left: bool) -> tuple[int, list[Cut]]:
    """How many ids away from the edge stay in any case, and the ways to cut the others; the first one cuts nothing."""
    tokenizer, near = draft.tokenizer, 0
    if not ids or not all(tokenizer.piece_texts[t] for t in (ids[-MOST_TOKENS:] if left else ids[:MOST_TOKENS])):
        return len(ids), []
    # Back to the start of the word (on to its end), or as many characters as a token may take in.
    while near < min(len(ids), MOST_TOKENS):
        token = tokenizer.piece_texts[ids[len(ids) - 1 - near] if left else ids[near]]
        if not left and token.startswith(" "):
            break
        near += 1
        if left and token.startswith(" "):
            break
        if len(tokenizer.text_of(ids[len(ids) - near :] if left else ids[:near])) > 2 * LONGEST_OVERLAP:
            break
    edge = ids[len(ids) - near :] if left else ids[:near]
    text = tokenizer.text_of(edge)
    cuts = [Cut("", edge)]
    if draft.tokenizer.encode_continuation(text) != edge:
        return len(ids) - near, cuts  # encoded in another way than by itself: not to be cut
    for size in range(1, min(len(text), LONGEST_OVERLAP) + 1):
        rest, overlap = (text[:-size], text[-size:]) if left else (text[size:], text[:size])
        encoded = draft.tokenizer.encode_continuation(rest)
        if " " not in overlap.removeprefix(" ") and tokenizer.text_of(encoded) == rest:
            cuts.append(Cut(overlap, encoded))
    return len(ids) - near, cuts


def _most_probable(
    model: Model, draft: Draft, cuts: Sequence[Cut], before: list[int], after: list[int], *, left: bool
) -> tuple[Cut, int]:
    """The most probable cut, and forward passes. before, after: context without the ids at the edge."""
    span = max(len(cut.ids) for cut in cuts) + NOMINAL
    rows: dict[tuple[int, ...], int] = {}  # what is known of the word, nearest to the context first
    asked: list[tuple[int, int, int | Callable[[str], bool]]] = []  # cut, row, what counts there
    for n, cut in enumerate(cuts):
        known = cut.ids if left else cut.ids[::-1]
        for j, token in enumerate(known):
            asked.append((n, rows.setdefault(tuple(known[:j]), len(rows)), token))
        if cut.overlap:
            o = cut.overlap
            counts = (lambda t, o=o: t.startswith(o) and t != o) if left else (lambda t, o=o: t.endswith(o) and t != o)
            asked.append((n, rows.setdefault(tuple(known), len(rows)), counts))
    middles = [list(known) + [draft.mask_id] * (span - len(known)) for known in rows]
    canvas, at = draft.canvas(before, middles if left else [m[::-1] for m in middles], after)
    positions = torch.zeros(canvas.shape, dtype=torch.bool)
    for known, row in rows.items():
        positions[row, at + (len(known) if left else span - 1 - len(known))] = True
    log_p, passes = log_probabilities(model, canvas, positions)
    score = torch.zeros(len(cuts), dtype=torch.float64)
    for n, row, what in asked:
        if isinstance(what, int):
            score[n] += log_p[row, what]
        else:
            score[n] += log_p[row].masked_fill(~draft.tokenizer.where(what), -math.inf).logsumexp(0)
    return cuts[int(score.argmax())], passes


def log_probabilities(model: Model, canvas: Tensor, positions: Tensor, block_size: int = 0) -> tuple[Tensor, int]:
    """Log-probabilities, float64 [n, V], at `positions` (bool [B, T], row-major) of a canvas, and forward passes."""
    at_once = max(1, TOKENS_PER_FORWARD // canvas.shape[1])
    parts = []
    for some, where in zip(canvas.split(at_once), positions.split(at_once), strict=True):
        with torch.inference_mode():
            logits = model.logits(some.to(model.device), block_size=block_size, positions=where.to(model.device))
        parts.append(logits.double().cpu().log_softmax(-1))
    return torch.cat(parts), len(parts)
