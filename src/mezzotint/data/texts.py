"""Raw texts as windows to score, without a prepared folder: every document apart, behind a BOS that is given.

Charges the bytes of the original text, found by the tokenizer's offsets. Knows nothing of models.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from mezzotint.data.tokenizer import Tokenizer
from mezzotint.errors import DataError


def check_text(text: str) -> None:
    """Raise DataError where a string is no text: a lone surrogate cannot be written as UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"the text has a lone surrogate at character {error.start}, which is not Unicode text: remove it"
        ) from error


class TextWindows(Sequence[np.ndarray]):
    """Windows of `length` tokens over documents, none over two of them. `windows[i]` is int64, BOS first.

    BOS is context and charged nowhere. stride: later windows of a document charge so many tokens and have the text before
    them as context; without it, parts of length - 1 tokens follow one another, each behind BOS alone. A document's number
    of tokens is not charged either. Documents without a token are left out, and counted.
    """

    def __init__(self, texts: Iterable[str], tokenizer: Tokenizer, length: int, stride: int | None = None) -> None:
        room = length - 1
        if room < 1:
            raise DataError(f"windows of {length} tokens have no room behind BOS")
        if stride is not None and not 1 <= stride <= room:
            raise DataError(f"a stride has 1 to {room} tokens here, where BOS takes one of {length}, not {stride}")
        self.tokenizer = tokenizer
        self._documents: list[np.ndarray] = []
        self._bytes: list[np.ndarray] = []
        self._lost: list[np.ndarray] = []
        self._bounds: list[tuple[int, int, int, int]] = []  # document, first token, first charged, end
        self._empty = self._left_out = self._left_out_bytes = 0
        for text in texts:
            check_text(text)
            ids, counts = tokenizer.original_bytes(text)
            if not ids:
                size = len(text.encode())
                self._empty, self._left_out = self._empty + (size == 0), self._left_out + (size > 0)
                self._left_out_bytes += size
                continue
            document, first = len(self._documents), 0
            while first < len(ids):
                stop = min(len(ids), first + (room if first == 0 or stride is None else stride))
                self._bounds.append((document, first if stride is None else max(0, stop - room), first, stop))
                first = stop
            self._documents.append(np.array(ids, dtype=np.int64))
            self._bytes.append(np.concatenate(([0], np.cumsum(counts))))
            self._lost.append(np.concatenate(([0], np.cumsum(tokenizer.lost_bytes(text)))))

    @property
    def documents(self) -> int:
        """How many documents there are."""
        return len(self._documents)

    def account(self) -> dict[str, int]:
        """What the tokenizer makes of the text. bytes_lost: that the tokens do not give back, of documents_lost documents;
        documents_left_out have text and no token, of bytes_left_out bytes.
        """
        lost = [int(sums[-1]) for sums in self._lost]
        return {
            "documents": self.documents,
            "empty_documents": self._empty,
            "bytes": sum(int(sums[-1]) for sums in self._bytes),
            "documents_lost": sum(map(bool, lost)),
            "bytes_lost": sum(lost),
            "documents_left_out": self._left_out,
            "bytes_left_out": self._left_out_bytes,
        }

    def document(self, i: int) -> int:
        """The document that window i is of."""
        return self._bounds[i][0]

    def __len__(self) -> int:
        return len(self._bounds)

    def __getitem__(self, i: int) -> np.ndarray:  # type: ignore[override]
        document, start, _, stop = self._bounds[i]
        return np.concatenate(([self.tokenizer.bos_id], self._documents[document][start:stop]))

    def context(self, i: int) -> int:
        """How many of window i's tokens, in front, are given: BOS, and text that other windows charge."""
        _, start, first, _ = self._bounds[i]
        return 1 + first - start

    def byte_count(self, i: int) -> int:
        """UTF-8 bytes of the text that window i charges."""
        return self._within(self._bytes, i)

    def bytes_lost(self, i: int) -> int:
        """Those of them that the tokens do not give back."""
        return self._within(self._lost, i)

    def _within(self, sums: list[np.ndarray], i: int) -> int:
        document, _, first, stop = self._bounds[i]
        return int(sums[document][stop] - sums[document][first])
