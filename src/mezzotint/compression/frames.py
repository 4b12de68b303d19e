"""A frame of text as side information and two sequences: tokens, and kinds of whitespace.

What the tokenizer changes (it may fold line ends and runs of spaces into one space, normalise characters, or know no
token for them) is kept beside the tokens as whitespace and edits, and what is not text at all is kept as it is, so every
input comes back exactly. Versions 1 and 2 of `.mzz` share this; they differ in how the sequences are coded.
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np

from mezzotint.compression.blocks import DAMAGED, FRAME_BYTES, Reader, squeeze, unsqueeze, varint
from mezzotint.compression.text import REST, TEXT, Edit, apply_edits, folds, segments
from mezzotint.errors import DataError
from mezzotint.network.model import Model

COMMON = 15
MOST_TOKEN_BYTES = 16 * FRAME_BYTES  # the longest that the tokens of a frame can be


@dataclass
class TextFrame:
    """A frame taken apart. packed: the side information. tokens: of all texts, each led by BOS, int64.

    kinds: of each space of the texts `folded`, one of `number` kinds (none where whitespace is not folded).
    """

    packed: bytes
    tokens: np.ndarray
    folded: list[bytes]
    kinds: list[int]
    number: int
    rest_bytes: int


def take_apart(data: bytes, model: Model) -> TextFrame | None:
    """`data` as a frame of text; None where there is no text in it."""
    fold = folds(model)
    parts = segments(model, data, fold)
    texts = [part for part in parts if part.ids is not None]
    if not texts:
        return None
    table = [varint(len(parts))]
    for part in parts:
        if part.ids is None:
            table.append(bytes([REST]) + varint(len(part.data)))
        else:
            table.append(bytes([TEXT]) + varint(len(part.ids)) + varint(len(part.edits)))
    runs = [run for text in texts for run in text.runs]
    common = [run for run, _ in Counter(runs).most_common(COMMON)]
    table.append(bytes([fold]))
    if fold:
        table += [varint(len(common)), *(varint(len(run)) + run for run in common)]
    for text in texts:
        for keep, drop, put in text.edits:
            table += [varint(keep), varint(drop), varint(len(put)), put]
    number = {run: i for i, run in enumerate(common)}
    table += [varint(len(run)) + run for run in runs if run not in number]
    rest = b"".join(part.data for part in parts if part.ids is None)
    side = b"".join([*table, rest])
    packed = squeeze(side)
    packed = b"\1" + varint(len(side)) + packed if len(packed) + 3 < len(side) else b"\0" + side
    stream = np.array([t for text in texts for t in (model.tokenizer.bos_id, *(text.ids or ()))], dtype=np.int64)
    folded = [text.folded for text in texts] if fold else []
    kinds = [number.get(run, len(common)) for run in runs]
    return TextFrame(packed, stream, folded, kinds, len(common) + 1, len(rest))


@dataclass
class Side:
    """Side information as read: what `put_together` needs beside the sequences."""

    size: int
    table: list[tuple[int, int, int]] = field(default_factory=list)
    fold: bool = False
    common: list[bytes] = field(default_factory=list)
    changes: list[list[Edit]] = field(default_factory=list)
    inside: Reader = field(default_factory=lambda: Reader(io.BytesIO()))

    @property
    def tokens(self) -> int:
        """Tokens of all texts, each led by BOS."""
        return sum(count + 1 for kind, count, _ in self.table if kind == TEXT)


def read_side(packed: bytes, size: int) -> Side:
    """Side information of a frame of `size` bytes. Raises DataError for what no encoder writes."""
    # It can be longer than the input it belongs to only by what its numbers take.
    inside = Reader(io.BytesIO(packed[1:]))
    if packed[:1] == b"\1":
        length = inside.varint(8 * FRAME_BYTES)
        inside = Reader(io.BytesIO(unsqueeze(inside.file.read(), length)))
    side = Side(size, inside=inside)
    for _ in range(inside.varint(FRAME_BYTES)):
        kind, count = inside.bytes(1)[0], inside.varint(2 * FRAME_BYTES)
        if kind not in (TEXT, REST):
            raise DataError(DAMAGED)
        side.table.append((kind, count, inside.varint(FRAME_BYTES) if kind == TEXT else 0))
    side.fold = inside.bytes(1) == b"\1"
    side.common = [inside.bytes(inside.varint(size)) for _ in range(inside.varint(COMMON))] if side.fold else []
    edits = [edits for kind, _, edits in side.table if kind == TEXT]
    if side.tokens > 2 * size + len(edits):
        raise DataError(DAMAGED)
    side.changes = [
        [
            (inside.varint(MOST_TOKEN_BYTES), inside.varint(MOST_TOKEN_BYTES), inside.bytes(inside.varint(size)))
            for _ in range(many)
        ]
        for many in edits
    ]
    return side


def put_together(
    side: Side, tokens: np.ndarray, model: Model, kinds_of: Callable[[list[bytes], int], Iterable[int]]
) -> bytes:
    """The frame's bytes. kinds_of: (folded texts, number of kinds) -> the kind of each of their spaces. Raises DataError for
    what no encoder writes.
    """
    folded = []
    at = 0
    texts = [count for kind, count, _ in side.table if kind == TEXT]
    for count, edits in zip(texts, side.changes, strict=True):
        known = model.tokenizer.decode_bytes(tokens[at + 1 : at + 1 + count].tolist())
        if len(known) > MOST_TOKEN_BYTES:
            raise DataError(DAMAGED)
        folded.append(apply_edits(known, edits))
        at += count + 1
    common, inside = side.common, side.inside
    kinds = list(kinds_of(folded, len(common) + 1)) if side.fold else []
    lengths = [*(len(run) for run in common), 1]
    if sum(map(len, folded)) + sum(lengths[kind] for kind in kinds) - len(kinds) > side.size:
        raise DataError(DAMAGED)
    runs = iter([common[k] if k < len(common) else inside.bytes(inside.varint(side.size)) for k in kinds])
    whole = iter(folded)
    out = []
    for kind, count, _ in side.table:
        if kind == REST:
            out.append(inside.bytes(count))
            continue
        text = next(whole)
        first, *words = text.split(b" ") if side.fold else [text]
        out += [first, *(part for word in words for part in (next(runs), word))]
    return b"".join(out)
