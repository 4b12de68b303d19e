"""What a tokenizer's ids stand for inside a text, and text inside a text as ids.

Knows nothing of models.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import sentencepiece
import torch
from torch import Tensor

from mezzotint.data.tokenizer import Tokenizer

SPACE = "\u2581"  # how SentencePiece writes a space


@dataclass(frozen=True, eq=False)
class Pieces:
    """What the ids of a tokenizer stand for, one entry per id.

    text: the characters an id adds, "" for control ids and for single bytes. raw: its UTF-8 bytes. is_text: bool [V],
    whether it may be drawn at all. is_byte: bool [V], whether it is a single byte of a longer character.
    probe: a character that the tokenizer knows.
    """

    text: list[str]
    raw: list[bytes]
    is_text: Tensor
    is_byte: Tensor
    probe: str

    def where(self, test: Callable[[str], bool]) -> Tensor:
        """bool [V]: the ids whose characters pass the test; never bytes or control ids."""
        return torch.tensor([bool(t) and test(t) for t in self.text]) & self.is_text


@functools.lru_cache(maxsize=4)
def _pieces(serialized: bytes) -> Pieces:
    processor = sentencepiece.SentencePieceProcessor(model_proto=serialized)
    text: list[str] = []
    raw: list[bytes] = []
    for i in range(processor.get_piece_size()):
        piece = processor.id_to_piece(i)
        if processor.is_byte(i):
            text.append("")
            raw.append(bytes([int(piece[3:-1], 16)]))
        elif processor.is_control(i) or processor.is_unknown(i) or processor.is_unused(i):
            text.append("")
            raw.append(b"")
        else:
            text.append(piece.replace(SPACE, " "))
            raw.append(text[-1].encode())
    return Pieces(
        text,
        raw,
        torch.tensor([len(r) > 0 for r in raw]),
        torch.tensor([len(r) > 0 and not t for t, r in zip(text, raw, strict=True)]),
        next((t for t in text if len(t) == 1 and t.isalnum() and t.isascii()), "x"),
    )


def pieces(tokenizer: Tokenizer) -> Pieces:
    """The piece table of a tokenizer, computed once."""
    return _pieces(tokenizer.serialized)


def text_tokens(tokenizer: Tokenizer, *, bytes_too: bool = True) -> Tensor:
    """bool [V]: ids that stand for text, which leaves out BOS, unknown, padding and other control ids."""
    table = pieces(tokenizer)
    return table.is_text if bytes_too else table.is_text & ~table.is_byte


def broken_bytes(table: Pieces, ids: Sequence[int]) -> list[int]:
    """Positions of single-byte ids that are not part of valid UTF-8. Ids without text count as characters."""
    raw = b""
    owner: list[int] = []
    for position, i in enumerate(ids):
        part = table.raw[i] if i < len(table.raw) and table.raw[i] else b"\0"
        raw += part
        owner += [position] * len(part)
    broken: set[int] = set()
    start = 0
    while start < len(raw):
        try:
            raw[start:].decode()
            break
        except UnicodeDecodeError as error:
            broken.update(owner[start + error.start : start + error.end])
            start += error.end
    return sorted(p for p in broken if bool(table.is_byte[ids[p]]))


def join(table: Pieces, ids: Iterable[int]) -> str:
    """The characters of ids as they stand in the middle of a text; MASK and control ids add nothing."""
    raw = b"".join(table.raw[i] for i in ids if i < len(table.raw))
    return raw.decode("utf-8", errors="replace")


def _encode_inside(tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids of text that follows other text, so that neither a dummy space is added nor its own space lost."""
    if not text:
        return []
    for anchor in (".", ")", "x", "0", "A"):
        # No piece has a space but at its start, so an anchor that stays whole changes nothing behind it.
        head = tokenizer.encode(anchor)
        ids = tokenizer.encode(anchor + text)
        if head and ids[: len(head)] == head:
            return ids[len(head) :]
    return tokenizer.encode(text)


def _space_pending(tokenizer: Tokenizer, text: str) -> bool:
    """Whether a word put behind `text` would begin with a space of `text` (which `encode` drops at its end)."""
    table = pieces(tokenizer)
    probe = table.probe
    return bool(text) and join(table, _encode_inside(tokenizer, text + probe)).endswith(" " + probe)


def _without_pending_space(tokenizer: Tokenizer, text: str) -> str:
    """Text before a gap, without the space at its end that belongs to the gap's first token."""
    return text[:-1] if text.endswith(" ") and _space_pending(tokenizer, text) else text
