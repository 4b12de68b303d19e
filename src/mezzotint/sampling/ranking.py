"""Candidates for a gap by the exact code length of the text with each in it.

Of a model that learnt next tokens the code length is that of next tokens: one pass. Of another it is the chain rule from
left to right, each token given the ones before it, with what is behind it masked. Either way the length of a candidate
needs no rule: a longer one pays for its tokens, and for how the text goes on behind it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from mezzotint.network.model import TOKENS_PER_FORWARD, Cache, Model
from mezzotint.objective import token_nll
from mezzotint.sampling.draft import Draft

CONTEXT = 96  # tokens before the gap
HORIZON = 32  # tokens behind the gap that are weighed: what follows further on hardly differs between candidates
NEAR_HORIZON = 8  # of these are weighed for all candidates, the others for those that are not far behind then
MARGIN = 4.0  # nats
MOST_TOKENS = 12  # to each side that are encoded anew with a candidate
LOGITS_AT_ONCE = 1 << 24
ROWS_AT_ONCE = 64  # whose keys and values are held


def code_lengths(model: Model, texts: Sequence[tuple[list[int], list[int]]]) -> tuple[list[float], int]:
    """-log p, in nats, of each second list of ids given the first before it; and forward passes.

    Exact, summed in float64. No list pair may be longer than the window.
    """
    found: list[float] = []
    passes = 0
    for start in range(0, len(texts), 256):  # so that memory does not grow with the number of texts
        rows = texts[start : start + 256]
        if model.trained_causally:
            nats, more = _by_next_tokens(model, rows)
        else:
            nats, more = _by_chain(model, rows)
        found += nats
        passes += more
    return found, passes


def least_code_lengths(
    model: Model, texts: Sequence[tuple[list[int], list[int]]], tail: int, count: int
) -> tuple[list[float], int]:
    """`code_lengths` of at least the `count` texts that have the least; of others a guess, more than any of these.

    All are weighed without their last `tail` ids, which they share, first. What is then MARGIN nats behind the best
    is not weighed to its end: its tail is taken to cost what the others' cost.
    """
    early, passes = code_lengths(model, [(a, b[: max(1, len(b) - tail)]) for a, b in texts])
    if not tail:
        return early, passes
    order = sorted(range(len(texts)), key=lambda n: early[n])
    ahead = [n for k, n in enumerate(order) if k < count or early[n] < early[order[0]] + MARGIN]
    exact, more = code_lengths(model, [texts[n] for n in ahead])
    mean = sum(nats - early[n] for n, nats in zip(ahead, exact, strict=True)) / len(ahead)
    # A guess comes behind the texts asked for, which are weighed exactly.
    least = math.nextafter(sorted(exact)[min(count, len(exact)) - 1], math.inf)
    nats = [max(least, x + mean) for x in early]
    for n, x in zip(ahead, exact, strict=True):
        nats[n] = x
    return nats, passes + more


@torch.inference_mode()
def _by_next_tokens(model: Model, texts: Sequence[tuple[list[int], list[int]]]) -> tuple[list[float], int]:
    """What all texts begin with is read once; its keys and values are then those of every row."""
    mask_id = model.config.mask_id
    start = next((k for k, same in enumerate(zip(*(a for a, _ in texts), strict=False)) if len(set(same)) > 1), None)
    start = min(len(a) for a, _ in texts) if start is None else start
    sizes = [len(a) + len(b) - start for a, b in texts]  # tokens of each row's own
    once = Cache(model.network, 1, start)
    if start:  # read shifted right behind one MASK, as they are learnt and scored
        once.hidden(torch.tensor([[mask_id, *texts[0][0][: start - 1]]]), 1, keep=start)
    found = [0.0] * len(texts)
    passes = int(start > 0)
    for rows in _alike(sizes, lambda longest: _rows_at_once(model, longest)):
        longest = max(sizes[row] for row in rows)
        ids = torch.tensor([[*a[start:], *b, *[mask_id] * (longest - n)] for a, b, n in
                            ((*texts[row], sizes[row]) for row in rows)])  # fmt: skip
        first = torch.tensor([[texts[row][0][start - 1] if start else mask_id] for row in rows])
        cache = Cache(model.network, len(rows), start + longest)
        cache.copy_row(once)
        # What stands behind a row's end changes nothing.
        hidden = cache.hidden(torch.cat((first, ids[:, :-1]), dim=1), 1, keep=0)
        place = torch.arange(longest)
        counts = torch.tensor([len(texts[row][1]) for row in rows])
        ends = torch.tensor([sizes[row] for row in rows])[:, None]
        scored = (place >= ends - counts[:, None]) & (place < ends)
        nll = token_nll(model.network.logits(hidden[scored.to(hidden.device)]).cpu(), ids[scored])
        for row, part in zip(rows, nll.split(counts.tolist()), strict=True):
            found[row] = float(part.double().sum())
        passes += 1
    return found, passes


def _alike(sizes: Sequence[int], at_once: Callable[[int], int]) -> Iterator[list[int]]:
    """Numbers of rows of about the same size, at most `at_once(the largest)` of them together."""
    rows: list[int] = []
    for row in sorted(range(len(sizes)), key=lambda row: sizes[row]):
        if rows and (len(rows) >= at_once(sizes[row]) or sizes[row] > 1.25 * sizes[rows[0]] + 2):
            yield rows
            rows = []
        rows.append(row)
    if rows:
        yield rows


def _by_chain(model: Model, texts: Sequence[tuple[list[int], list[int]]]) -> tuple[list[float], int]:
    mask_id, longest = model.config.mask_id, max(len(a) + len(b) for a, b in texts)
    inputs, ids, owner = [], [], []
    for n, (a, b) in enumerate(texts):
        for j in range(len(b)):
            known = [*a, *b[:j]]
            inputs.append(known + [mask_id] * (longest - len(known)))
            ids.append([*known, b[j], *[mask_id] * (longest - len(known) - 1)])
            owner.append((n, len(known)))
    if not owner:
        return [0.0] * len(texts), 0
    scored = torch.zeros(len(owner), longest, dtype=torch.bool)
    scored[torch.arange(len(owner)), torch.tensor([place for _, place in owner])] = True
    each, passes = _nats(model, torch.tensor(inputs), torch.tensor(ids), scored)
    nats = [0.0] * len(texts)
    for (n, _), value in zip(owner, each, strict=True):
        nats[n] += value
    return nats, passes


def _nats(model: Model, inputs: Tensor, ids: Tensor, scored: Tensor) -> tuple[list[float], int]:
    """Sum of -log p of the ids at `scored` (bool [B, T]) of each row, and forward passes."""
    at_once = _rows_at_once(model, inputs.shape[1])
    found: list[float] = []
    for start in range(0, len(inputs), at_once):
        rows = slice(start, start + at_once)
        with torch.inference_mode():
            logits = model.logits(inputs[rows].to(model.device), positions=scored[rows].to(model.device))
        nll = token_nll(logits.double().cpu(), ids[rows][scored[rows]])
        found += [float(part.sum()) for part in nll.split(scored[rows].sum(1).tolist())]
    return found, -(-len(inputs) // at_once)


def _rows_at_once(model: Model, width: int) -> int:
    """Rows of `width` tokens that go through the network together."""
    return max(1, min(TOKENS_PER_FORWARD // width, LOGITS_AT_ONCE // (width * model.config.vocab_size), ROWS_AT_ONCE))


def with_candidate(draft: Draft, left: list[int], ids: list[int], right: list[int]) -> tuple[list[int], list[int]]:
    """Context and text to weigh for one candidate: the words at the gap's edges, and it, as the tokenizer would have them.

    A candidate's own ids may spell the text in a way that the tokenizer never does, which no model finds likely.
    """
    tokenizer = draft.tokenizer

    def spaced(t: int) -> bool:
        return t < tokenizer.vocab_size and tokenizer.piece_texts[t].startswith(" ")

    near = next((k for k in range(1, min(MOST_TOKENS, len(left)) + 1) if spaced(left[-k])), 0)
    far = next((k for k in range(min(MOST_TOKENS, len(right))) if spaced(right[k])), 0)
    word = [*left[len(left) - near :], *ids, *right[:far]]
    text = tokenizer.text_of(word)
    encoded = draft.tokenizer.encode_continuation(text)
    if tokenizer.text_of(encoded) == text and draft.mask_id not in word:
        word = encoded
    return left[: len(left) - near], word + right[far:]
