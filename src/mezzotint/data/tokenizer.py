"""SentencePiece tokenizers: training one, and what ids stand for: text, bytes, pieces.

Knows nothing of shards, files of text or models.
"""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import sentencepiece

from mezzotint.errors import DataError

SPACE = "\u2581"
TOKENIZER_SAMPLE_BYTES = 16_000_000
LONG_TEXT = 1_000_000  # characters encoded in one go
DEFAULT_VOCAB_SIZES = (1024, 512, 384)  # the first that the text can fill


class Tokenizer:
    """A SentencePiece model, held as its bytes. Immutable.

    serialized: the model file's bytes; sha256: their digest; vocab_size: pieces; bos_id: the id before each document.
    Raises DataError when the bytes are no SentencePiece model or it has no BOS.
    """

    def __init__(self, serialized: bytes) -> None:
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=serialized)  # type: ignore[call-arg]
        except Exception as error:
            raise DataError("not a SentencePiece model: give a .model file made by sentencepiece") from error
        self.serialized = serialized
        self.sha256 = hashlib.sha256(serialized).hexdigest()
        self.vocab_size: int = self._processor.get_piece_size()
        self.bos_id: int = self._processor.bos_id()
        if self.bos_id < 0:
            raise DataError("the tokenizer has no BOS piece, which must precede each document")
        if self.vocab_size > 65_535:
            raise DataError(f"the tokenizer has {self.vocab_size} pieces; 16-bit shards hold at most 65,535")

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """Read a `.model` file. Raises DataError naming it."""
        try:
            serialized = Path(path).read_bytes()
        except OSError as error:
            raise DataError(f"cannot read tokenizer {path}: {error.strerror}") from error
        try:
            return cls(serialized)
        except DataError as error:
            raise DataError(f"{path}: {error}") from error

    @cached_property
    def _pieces(self) -> list[bytes | None]:
        """UTF-8 of each piece with spaces as spaces; None where a piece stands for no text (control, unknown)."""
        table: list[bytes | None] = []
        sp = self._processor
        for i in range(self.vocab_size):
            if sp.is_control(i) or sp.is_unknown(i) or sp.is_unused(i):
                table.append(None)
            elif sp.is_byte(i):
                table.append(bytes([int(sp.id_to_piece(i)[3:5], 16)]))
            else:
                table.append(sp.id_to_piece(i).replace(SPACE, " ").encode())
        return table

    @cached_property
    def _byte_tables(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Per id: bytes without a leading space, whether it begins with one, whether it stands for no text."""
        silent = np.array([piece is None for piece in self._pieces])
        leading = np.array(
            [
                piece is not None and piece.startswith(b" ") and not self._processor.is_byte(i)
                for i, piece in enumerate(self._pieces)
            ]
        )
        length = np.array([len(piece or b"") for piece in self._pieces], dtype=np.int64)
        return length - leading, leading, silent

    @cached_property
    def control_ids(self) -> frozenset[int]:
        """Ids that stand for no text: control, unknown and unused pieces (BOS is one)."""
        return frozenset(i for i, piece in enumerate(self._pieces) if piece is None)

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, without BOS."""
        return self._processor.encode(text)

    def encode_batch(self, texts: Sequence[str], goes_on: Sequence[bool] | None = None) -> list[list[int]]:
        """Ids of each text, without BOS, on all cores. `goes_on`: which texts are later parts given by `cut`."""
        goes_on = goes_on or [False] * len(texts)
        # Behind a letter, whose ids are then dropped, a part's first space reads as it does inside the text.
        behind = ["a" + text if later else text for text, later in zip(texts, goes_on, strict=True)]
        encoded = self._processor.encode(behind, num_threads=-1)  # type: ignore[call-arg]
        letter = len(self.encode("a"))
        return [ids[letter:] if later else ids for ids, later in zip(encoded, goes_on, strict=True)]

    @cached_property
    def _words_are_separate(self) -> bool:
        """Whether no piece spans a space, so that text before and after one is encoded independently."""
        return not any(SPACE in self.piece(i).lstrip(SPACE) for i in range(self.vocab_size))

    def cut(self, text: str, limit: int = LONG_TEXT) -> Iterator[str]:
        """Parts of `text` whose ids by `encode_batch` are, put together, those of the whole.

        SentencePiece takes some 50 bytes of memory per character of a text. Parts have `limit` characters or a little
        more and are cut before a space between two letters; text with no such space is not cut.
        """
        start = 0
        while len(text) - start > limit and self._words_are_separate:
            space = re.compile("(?<=[A-Za-z]) (?=[A-Za-z])").search(text, start + limit)
            if space is None:
                break
            yield text[start : space.start()]
            start = space.start()
        yield text[start:]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`. Bytes that are not UTF-8 become U+FFFD; control pieces are silent."""
        return self.decode_bytes(ids).decode(errors="replace")

    def decode_bytes(self, ids: Sequence[int] | np.ndarray) -> bytes:
        """The bytes `ids` stand for; a leading space is dropped after a silent piece and at the start."""
        parts = []
        spaced = False
        for i in np.asarray(ids, dtype=np.int64).tolist():
            piece = self._pieces[i]
            if piece is None:
                spaced = False
                continue
            if not spaced and piece.startswith(b" ") and not self._processor.is_byte(i):
                piece = piece[1:]
            parts.append(piece)
            spaced = True
        return b"".join(parts)

    def piece(self, id: int) -> str:
        """The piece's own spelling, with U+2581 for a space."""
        return self._processor.id_to_piece(id)

    def byte_counts(self, ids: np.ndarray, previous: int | None = None) -> np.ndarray:
        """UTF-8 bytes charged to each token, int64 like `ids`; BOS and other silent pieces are charged 0.

        The challenge's rule, applied to the token that is scored: a piece's bytes, with its leading space counted
        unless the token before it is silent. `previous`: the id before ids[0], None at the start of a text.
        """
        base, leading, silent = self._byte_tables
        ids = np.asarray(ids, dtype=np.int64)
        after_silence = np.ones(len(ids), dtype=bool)
        after_silence[1:] = silent[ids[:-1]]
        if len(ids) and previous is not None:
            after_silence[0] = silent[previous]
        return base[ids] + (leading[ids] & ~after_silence)

    def sum_bytes(self, ids: np.ndarray, previous: int | None = None) -> int:
        """The sum of `byte_counts`, from a histogram: several times quicker on long arrays."""
        base, leading, silent = self._byte_tables
        counts = np.bincount(ids, minlength=self.vocab_size)
        total = int(counts @ (base + leading))
        if len(ids) and (previous is None or silent[previous]):
            total -= int(leading[ids[0]])
        for quiet in np.flatnonzero(counts.astype(bool) & silent):
            after = np.flatnonzero(ids[:-1] == quiet) + 1
            total -= int(leading[ids[after]].sum())
        return total


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A BPE tokenizer with byte fallback and no normalisation, so that text decodes to itself. Deterministic.

    Raises DataError when the text cannot fill the vocabulary.
    """
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(  # type: ignore[attr-defined]
            sentence_iterator=iter(texts),
            model_writer=model,
            vocab_size=vocab_size,
            model_type="bpe",
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            character_coverage=0.999,
            max_sentence_length=1 << 24,
            pad_id=0,
            bos_id=1,
            eos_id=2,
            unk_id=3,
            num_threads=1,
            minloglevel=2,
        )
    except Exception as error:
        reason = str(error)
        most = re.search(r"value <= (\d+)", reason)
        least = re.search(r"(\d+) vs (\d+)", reason)
        if most:
            advice = f"the text is too short for more than {most[1]}; give --vocab-size {most[1]} or more text"
        elif least and "required_chars" in reason:
            advice = f"its bytes and characters alone need {least[2]}; give at least --vocab-size {least[2]}"
        elif "sentences_.empty()" in reason:
            advice = "there is no text"
        else:
            advice = " ".join(reason.split())[-160:] or type(error).__name__
        raise DataError(f"cannot train a tokenizer of {vocab_size} pieces: {advice}") from error
    return Tokenizer(model.getvalue())


def _sample(texts: Iterable[str], limit: int, size: int) -> Iterator[str]:
    """About `limit` of the texts' `size` bytes, evenly spread, in passages of 4,000 characters; all if they are fewer."""
    taken = seen = 0
    for text in texts:
        for start in range(0, len(text), 4000):
            passage = text[start : start + 4000]
            length = len(passage.encode())
            if taken * size <= seen * limit:
                yield passage
                taken += length
            seen += length


def _halves(text: str, fraction: float) -> tuple[str, str]:
    """Cut one document near its end, at a paragraph, line or word boundary, so that it can be both splits."""
    target = int(len(text) * (1 - fraction))
    for mark in ("\n\n", "\n", " "):
        at = text.find(mark, target)
        at = at if at >= 0 else text.rfind(mark, 0, target)
        if at > 0 and text[at + len(mark) :].strip():
            return text[: at + len(mark)], text[at + len(mark) :]
    return text[:target], text[target:]
