"""Bytes <-> text that a tokenizer can hold, and what it takes to get the bytes back.

Knows nothing of models or coders.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from mezzotint.compression.blocks import DAMAGED
from mezzotint.errors import DataError
from mezzotint.network.model import Model

TEXT, REST = 0, 1
SHORTEST = 24
Edit = tuple[int, int, bytes]
"""(bytes to keep since the edit before, bytes to drop, bytes to put in their place)"""


def align(known: bytes, target: bytes) -> list[Edit] | None:
    """Edits that turn `known` into `target`, or None where they differ too much.

    Walks both; at a difference takes the shortest edit after which six bytes agree. Quick where edits are few; not
    always the fewest.
    """
    edits: list[Edit] = []
    p = q = kept = 0
    budget = len(target) // 2 + 16
    while True:
        step = 4096
        while step:
            if known[p : p + step] == target[q : q + step] and max(p + step - len(known), q + step - len(target)) <= 0:
                p, q, kept = p + step, q + step, kept + step
            else:
                step //= 4
        if p == len(known) and q == len(target):
            return edits
        found = _resume(known, target, p, q)
        if found is None:
            return None
        drop, put = found
        edits.append((kept, drop, target[q : q + put]))
        p, q, kept = p + drop, q + put, 0
        budget -= 3 + put
        if budget < 0:
            return None


def _resume(known: bytes, target: bytes, p: int, q: int) -> tuple[int, int] | None:
    """The least (drop, put) after which the texts agree for six bytes or to their ends."""
    for both in range(1, 65):
        for drop in range(both + 1):
            i, j = p + drop, q + both - drop
            if i > len(known) or j > len(target):
                continue
            a, b = known[i : i + 6], target[j : j + 6]
            if a == b and (len(a) == 6 or (i + len(a) == len(known) and j + len(b) == len(target))):
                return drop, both - drop
    return None


def apply_edits(known: bytes, edits: list[Edit]) -> bytes:
    """What `align` aligned `known` to. Raises DataError where an edit lies outside."""
    out = []
    at = 0
    for keep, drop, put in edits:
        if at + keep + drop > len(known):
            raise DataError(DAMAGED)
        out += [known[at : at + keep], put]
        at += keep + drop
    return b"".join([*out, known[at:]])


@dataclass(frozen=True)
class Segment:
    """A stretch of the input; `ids` None: not text. `edits` turn the ids' own bytes into `folded`, which is `data`
    with each run of whitespace as one space where `runs` is given."""

    data: bytes
    ids: list[int] | None = None
    edits: tuple[Edit, ...] = ()
    folded: bytes = b""
    runs: tuple[bytes, ...] = ()


RUN = re.compile(rb"[ \t\r\n]+")


def folds(model: Model) -> bool:
    """Whether the tokenizer turns line ends into spaces, so that whitespace is better kept beside it."""
    probe = "a b\nc"
    return model.tokenizer.decode_bytes(model.tokenizer.encode(probe)) != probe.encode()


def _text(model: Model, data: bytes, fold: bool) -> Segment | None:
    """`data` as text, or None where it is none or the tokenizer makes too much of a change."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        return None
    ids = model.tokenizer.encode(text)
    if model.tokenizer.bos_id in ids or len(ids) > 2 * len(data):
        return None
    folded = RUN.sub(b" ", data) if fold else data
    edits = align(model.tokenizer.decode_bytes(ids), folded)
    if edits is None:
        return None
    return Segment(data, ids, tuple(edits), folded, tuple(RUN.findall(data)) if fold else ())


def _cut(data: bytes) -> int:
    """Where to halve: after the newline, else the space, nearest the middle, else between characters."""
    middle = len(data) // 2
    for mark in (b"\n", b" "):
        after, before = data.find(mark, middle, len(data) - 1), data.rfind(mark, 0, middle)
        candidates = [at + 1 for at in (after, before) if at >= 0]
        if candidates:
            return min(candidates, key=lambda at: abs(at - middle))
    at = middle
    while at > middle - 4 and at > 1 and data[at] & 0xC0 == 0x80:
        at -= 1
    return at


def segments(model: Model, data: bytes, fold: bool) -> list[Segment]:
    """Split `data` into stretches of text and of the rest; their bytes concatenate to `data`.

    Halves what cannot be text, near line or word ends, down to some bytes; neighbouring texts are joined again.
    """
    pieces: list[Segment] = []
    stack = [data]
    while stack:
        part = stack.pop()
        found = _text(model, part, fold)
        if found is not None or len(part) <= SHORTEST:
            pieces.append(found or Segment(part))
        else:
            middle = _cut(part)
            stack += [part[middle:], part[:middle]]
    texts: list[Segment] = []
    for piece in pieces:
        if texts and piece.ids is not None and texts[-1].ids is not None:
            both = _text(model, texts[-1].data + piece.data, fold)
            if both is not None:
                texts[-1] = both
                continue
        texts.append(piece)
    # A short stretch of text among the rest is not worth its BOS and its place in the table.
    out: list[Segment] = []
    rest: list[bytes] = []
    for piece in texts:
        if piece.ids is None or (len(piece.data) < SHORTEST and len(texts) > 1):
            rest.append(piece.data)
            continue
        if rest:
            out.append(Segment(b"".join(rest)))
            rest = []
        out.append(piece)
    if rest:
        out.append(Segment(b"".join(rest)))
    return out
