"""Candidates for a gap by the exact code length of the text with each in it.

Of a model that learnt next tokens the code length is that of next tokens: one pass. Of another it is the chain rule from
left to right, each token given the ones before it, with what is behind it masked. Either way the length of a candidate
needs no rule: a longer one pays for its tokens, and for how the text goes on behind it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mezzotint.model import TOKENS_PER_FORWARD, Cache, Model
from mezzotint.objective import token_nll
from mezzotint.sampling.draft import Draft

CONTEXT = 96  # tokens before the gap
HORIZON = 32  # tokens behind the gap that are weighed: what follows further on hardly differs between candidates
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


@torch.inference_mode()
def _by_next_tokens(model: Model, texts: Sequence[tuple[list[int], list[int]]]) -> tuple[list[float], int]:
    """What all texts begin with is read once; its keys and values are then those of every row."""
    mask_id = model.config.mask_id
    start = next((k for k, same in enumerate(zip(*(a for a, _ in texts), strict=False)) if len(set(same)) > 1), None)
    start = min(len(a) for a, _ in texts) if start is None else start
    longest = max(len(a) + len(b) for a, b in texts)
    # Read shifted right behind one MASK, as they are learnt and scored; what stands behind a row's end changes nothing.
    inputs = torch.tensor([[mask_id, *a, *b, *[mask_id] * (longest - len(a) - len(b))] for a, b in texts])
    ids, inputs = inputs[:, 1:], inputs[:, :-1]
    once = Cache(model.network, 1, longest)
    if start:
        once.hidden(inputs[:1, :start], 1, keep=start)
    found: list[float] = []
    at_once = _rows_at_once(model, longest - start)
    for first in range(0, len(texts), at_once):
        rows = range(first, min(first + at_once, len(texts)))
        cache = Cache(model.network, len(rows), longest)
        cache.copy_row(once)
        hidden = cache.hidden(inputs[rows.start : rows.stop, start:], 1, keep=0)
        for n, row in enumerate(rows):
            scored = slice(len(texts[row][0]), len(texts[row][0]) + len(texts[row][1]))
            logits = model.network.logits(hidden[n, scored.start - start : scored.stop - start])
            found.append(float(token_nll(logits.double().cpu(), ids[row, scored]).sum()))
    return found, bool(start) + -(-len(texts) // at_once)


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
