"""A text with gaps as the network sees it: n + 1 fixed texts, n gaps, their ids, and what may stand at a gap's edges.

All that is not a gap comes back byte for byte. Knows the tokenizer; asks no network.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mezzotint.data.tokenizer import Tokenizer
from mezzotint.errors import MezzotintError
from mezzotint.network.model import Model
from mezzotint.sampling.generate import Span, check_text, readable

GAP = re.compile(r"(\\*)(_{4,}|\[MASK(?:\*([0-9]+))?\])")
NOMINAL = 4  # masks that stand for a gap of unknown length while another one is filled
MOST_ASKED = 10**12 - 1  # masks of a gap: more are not told apart, for no window has as many
PADDING = 8  # masks behind a canvas that is shorter than the window: text unknown, as in training
SHORTEST_CANVAS = 32


Parts = tuple[list[str], list[int | None]]
"""n + 1 fixed strings around n gaps, and each gap's mask count, None where its length is unknown."""


def parse_gaps(text: str) -> tuple[list[str], list[int | None]]:
    r"""Split text at its gaps: n + 1 fixed strings and n mask counts, None where the length is unknown.

    A gap is `____` (four or more underscores: unknown length), `[MASK]` (1 mask) or `[MASK*8]` (8 masks). A backslash
    before it makes it plain text, `\____`; two stand for one backslash before a gap.
    Raises MezzotintError for `[MASK*0]` and for text that is not Unicode.
    """
    check_text(text)
    fixed = [""]
    counts: list[int | None] = []
    last = 0
    for match in GAP.finditer(text):
        slashes, gap = len(match[1]), match[2]
        fixed[-1] += text[last : match.start()] + "\\" * (slashes // 2)
        last = match.end()
        if slashes % 2:
            fixed[-1] += gap
            continue
        fixed.append("")
        if gap.startswith("_"):
            counts.append(None)
        else:
            digits = (match[3] or "1").lstrip("0")
            if not digits:
                raise MezzotintError(f"{gap} asks for no masks: ask for at least 1, or take it out")
            counts.append(min(int(digits[:13]), MOST_ASKED))
    fixed[-1] += text[last:]
    return fixed, counts


def shows(text: str) -> bool:
    """Whether there is anything to see in a text: not white space and control characters only."""
    return any(c.isprintable() and c != " " for c in text)


@dataclass(frozen=True)
class Edges:
    """What a gap's first and last token must respect.

    left, right: characters of the fixed text beside the gap that the first or last token repeats (token healing).
    space_before: that text ends in a space, which belongs to the first token. open_before: the gap begins the text.
    space_after: a space follows. unknown: the gap's length is; its text shows something, so a token that is all of it
    does. begins: its first token does, whatever follows.
    """

    left: str = ""
    right: str = ""
    space_before: bool = False
    open_before: bool = False
    space_after: bool = False
    unknown: bool = False
    begins: bool = False

    def strip(self, text: str, *, first: bool = True, last: bool = True) -> str:
        """Characters of the gap's ids without what they repeat of the fixed text."""
        if first and self.left:
            text = text.removeprefix(self.left)
        elif first and (self.space_before or self.open_before):
            text = text.removeprefix(" ")
        if last and self.right:
            return text.removesuffix(self.right)
        return text.removesuffix(" ") if last and self.space_after else text

    def allow(self, text: str, first: bool, last: bool) -> bool:
        """Whether a token with these characters may be the gap's first or last one."""
        if first and not text.startswith(self.left or (" " if self.space_before else "")):
            return False
        if last and self.right and not text.endswith(self.right):
            return False
        left, right = self.left if first else "", self.right if last else ""
        if len(text) < len(left) + len(right) + bool(self.left or self.right):
            return False
        # A gap is not filled with nothing, nor a space put beside a space.
        inner = text[len(left) : len(text) - len(right)]
        if first and (self.space_before or self.open_before) and not left:
            inner = inner.removeprefix(" ")
        if self.must_show(first, last) and not shows(inner):
            return False
        return bool(inner) and not (last and self.space_after and inner.endswith(" "))

    def must_show(self, first: bool, last: bool) -> bool:
        """Whether a token that is the gap's first or last one, or both, has to show something."""
        return first and (self.begins or (self.unknown and last))


@functools.lru_cache(maxsize=1024)
def _allowed(tokenizer: Tokenizer, edges: Edges, first: bool, last: bool) -> Tensor | None:
    """Ids that may stand at an end of a gap, bool [V]; None where any text may, or where no id could."""
    blank = edges.space_before or edges.open_before
    bound = (first and (edges.left or blank)) or (last and (edges.right or edges.space_after))
    if not bound and not edges.must_show(first, last):
        return None
    able = tokenizer.where(lambda text: edges.allow(text, first, last))
    if not able.any():
        return None  # the tokenizer has no pieces with spaces: then the plain text is put there
    if not (first and (edges.left or edges.space_before)) and not (last and edges.right):
        # All that may not stand here is blank, which a byte of a longer character is not.
        able = able | tokenizer.is_byte & torch.tensor([raw >= b"\x80" for raw in tokenizer.raw])
    return able


def edge_limits(tokenizer: Tokenizer, edges: Edges, count: int) -> dict[int, Tensor]:
    """Place -> the ids (bool [V]) that may stand there, for a gap of `count` tokens; places without limits left out."""
    found = {p: _allowed(tokenizer, edges, p == 0, p == count - 1) for p in {0, count - 1}}
    return {place: able for place, able in found.items() if able is not None}


@dataclass
class GapDraft:
    """A gap. count: masks asked for, None if unknown. ids: MASK until filled; confidence: of each id."""

    count: int | None
    ids: list[int]
    edges: Edges
    confidence: list[float] = field(default_factory=list)


class Draft:
    """A text with gaps. texts: n + 1 strings that come back; ids: how the network sees them; gaps: n.

    Raises MezzotintError when a gap needs more tokens than the window holds.
    """

    def __init__(self, model: Model, text: str | Parts) -> None:
        self.tokenizer = model.tokenizer
        self.mask_id, self.window = model.config.mask_id, model.config.sequence_length
        self.texts, counts = parse_gaps(text) if isinstance(text, str) else text
        for count in counts:
            if (count or 1) > self.window - 1:
                least = "at least " if count == MOST_ASKED else ""
                raise MezzotintError(
                    f"a gap of {least}{count:,} tokens is asked for, but the model's window holds {self.window - 1:,}: "
                    "ask for fewer"
                )
        self.ids = [
            self.encode(self.tokenizer.without_pending_space(t) if i < len(counts) else t, i > 0)
            for i, t in enumerate(self.texts)
        ]
        self.gaps = [
            GapDraft(count, [self.mask_id] * (count or NOMINAL), self._edges(i, count is None))
            for i, count in enumerate(counts)
        ]

    def _edges(self, i: int, unknown: bool) -> Edges:
        before, after = self.texts[i], self.texts[i + 1]
        space_after = bool(after) and (
            after[0].isspace() or self.tokenizer.text_of(self.tokenizer.encode_continuation(after[:64])).startswith(" ")
        )
        return Edges(
            space_before=self.tokenizer.space_pending(before[-64:]),
            open_before=i == 0 and not before,
            space_after=space_after,
            unknown=unknown,
        )

    def encode(self, text: str, inside: bool) -> list[int]:
        """Ids of fixed text, `inside` the whole text or at its start."""
        return self.tokenizer.encode_continuation(text) if inside else self.tokenizer.encode(text)

    def left_of(self, i: int, most: int, filled: Sequence[Sequence[int]] = ()) -> list[int]:
        """The last `most` ids before gap i, BOS where the text begins. filled: other ids for the last gaps before it."""
        parts: list[Sequence[int]] = []
        size = 0
        for k in range(i, -1, -1):
            parts.append(self.ids[k][max(0, len(self.ids[k]) - most) :])
            other = k - 1 - i + len(filled)
            parts.append((filled[other] if other >= 0 else self.gaps[k - 1].ids) if k else [self.tokenizer.bos_id])
            size += len(parts[-1]) + len(parts[-2])
            if size >= most:
                break
        return [t for part in reversed(parts) for t in part][max(0, size - most) :]

    def right_of(self, i: int, most: int) -> list[int]:
        """The first `most` ids behind gap i."""
        found: list[int] = []
        for k in range(i + 1, len(self.ids)):
            found += self.ids[k][:most]
            if len(found) >= most:
                break
            if k < len(self.gaps):
                found += self.gaps[k].ids
        return found[:most]

    def canvas(self, left: list[int], middles: Sequence[list[int]], right: list[int]) -> tuple[Tensor, int]:
        """Rows of left + middle + right + masks, of one length within the window, and where the middles start.

        The longest middle decides how much context fits; it is taken evenly from both sides. Masks at the end stand
        for text unknown, as in training, and make the rows equally long.
        """
        longest = max(map(len, middles))
        room = max(0, self.window - longest)
        take_left = min(len(left), max(room - len(right), room // 2))
        left, right = left[len(left) - take_left :], right[: room - take_left]
        total = min(self.window, max(len(left) + longest + len(right) + PADDING, SHORTEST_CANVAS))
        rows = [left + list(m) + right for m in middles]
        return torch.tensor([row + [self.mask_id] * (total - len(row)) for row in rows]), len(left)

    def text_of(self, i: int, ids: Sequence[int]) -> str:
        """What these ids, in gap i, put between the fixed texts."""
        return self.gaps[i].edges.strip(self.tokenizer.text_of(ids))

    def spans(self, i: int, ids: Sequence[int], confidence: Sequence[float]) -> list[Span]:
        """Ids in gap i one by one, without what they repeat of the fixed text."""
        spans, at = [], 0
        for text, sure, count in readable(self.tokenizer, ids, confidence):
            text = self.gaps[i].edges.strip(text, first=at == 0, last=at + count == len(ids))
            spans.append(Span(text, sure))
            at += count
        return spans
