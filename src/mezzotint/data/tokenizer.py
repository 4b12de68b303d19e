"""Tokenizers: text as ids, and ids as text again, with the bytes that each id stands for and those that are lost.

`Tokenizer` is the protocol that the rest of the package uses. Two backends answer it: SentencePiece (`.model`), here, and
Hugging Face `tokenizers` (`tokenizer.json`), of `integrations`. Knows nothing of shards, files of text or models.
"""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import sentencepiece

from mezzotint.errors import DataError, Interrupted
from mezzotint.extras import extra
from mezzotint.files import refuse_pointer

if TYPE_CHECKING:
    from torch import Tensor

SPACE = "\u2581"  # how SentencePiece writes a space
LONG_TEXT = 1_000_000  # characters encoded in one go
MOST_UNCUT = 20_000_000  # characters of a long document between two places where it may be cut: 1 GB in the tokenizer
MAX_BYTES = 16 << 20  # of a SentencePiece model
MAX_JSON_BYTES = 40 << 20  # of a tokenizer.json
MAX_PIECES = 300_000
FREE_FIELDS = 1 << 14  # of a SentencePiece model's protocol buffer, besides 5 for each piece
ANCHORS = (".", ")", "x", "0", "A")  # text put before a continuation


class Vocabulary(Protocol):
    """What the ids of a tokenizer stand for: text and bytes, forwards only.

    vocab_size: ids, V. raw: per id, the UTF-8 bytes it stands for, b"" for those that stand for no text (BOS, unknown,
    padding and other control ids). leading: bool [V], ids whose first byte is a space that is dropped at the start of a
    text, because the tokenizer puts one there itself.
    """

    vocab_size: int
    raw: list[bytes]
    leading: np.ndarray

    def text_of(self, ids: Iterable[int]) -> str:
        """The characters of ids as they stand in the middle of a text; MASK and control ids add nothing."""
        return b"".join(self.raw[i] for i in ids if i < self.vocab_size).decode(errors="replace")

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids` from its start. Bytes that are not UTF-8 become U+FFFD; control ids are silent."""
        return self.decode_bytes(ids).decode(errors="replace")

    def decode_bytes(self, ids: Sequence[int] | np.ndarray) -> bytes:
        """The bytes `ids` stand for; a leading space is dropped after a silent id and at the start."""
        parts = []
        spaced = False
        for i in np.asarray(ids, dtype=np.int64).tolist():
            raw = self.raw[i]
            parts.append(raw[1:] if not spaced and self.leading[i] else raw)
            spaced = bool(raw)
        return b"".join(parts)

    @cached_property
    def piece_texts(self) -> list[str]:
        """The characters that each id adds; "" for control ids and for bytes that are no whole characters."""
        return [_whole(raw) if not single else "" for raw, single in zip(self.raw, self._single_bytes, strict=True)]

    @cached_property
    def _single_bytes(self) -> list[bool]:
        """Ids that are written as bytes, whatever they say alone."""
        return [False] * self.vocab_size

    @cached_property
    def is_text(self) -> Tensor:
        """bool [V]: ids that stand for text, which leaves out BOS, unknown, padding and other control ids."""
        import torch  # here, so that `prepare` starts without it

        return torch.tensor([len(raw) > 0 for raw in self.raw])

    @cached_property
    def is_byte(self) -> Tensor:
        """bool [V]: ids that are single bytes, or other parts of a longer character."""
        import torch

        return torch.tensor([len(raw) > 0 and not text for text, raw in zip(self.piece_texts, self.raw, strict=True)])

    def where(self, test: Callable[[str], bool]) -> Tensor:
        """bool [V]: the ids whose characters pass the test; never bytes or control ids."""
        import torch

        return torch.tensor([bool(text) and test(text) for text in self.piece_texts]) & self.is_text

    @cached_property
    def control_ids(self) -> frozenset[int]:
        """Ids that stand for no text: control, unknown and unused pieces (BOS is one)."""
        return frozenset(i for i, raw in enumerate(self.raw) if not raw)

    def invalid_utf8(self, ids: Sequence[int]) -> list[int]:
        """Positions of byte ids that are not part of valid UTF-8. Ids without text count as characters."""
        raw = b""
        owner: list[int] = []
        for position, i in enumerate(ids):
            part = (self.raw[i] if i < self.vocab_size else b"") or b"\0"
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
        return sorted(p for p in broken if bool(self.is_byte[ids[p]]))

    @cached_property
    def _byte_tables(self) -> tuple[np.ndarray, np.ndarray]:
        """Per id: bytes without a leading space, and whether it stands for no text."""
        length = np.array([len(raw) for raw in self.raw], dtype=np.int64)
        return length - self.leading, length == 0

    def byte_counts(self, ids: np.ndarray, previous: int | None = None) -> np.ndarray:
        """UTF-8 bytes charged to each token, int64 like `ids`; BOS and other silent ids are charged 0.

        The challenge's rule, applied to the token that is scored: a piece's bytes, with its leading space counted
        unless the token before it is silent. `previous`: the id before ids[0], None at the start of a text.
        """
        base, silent = self._byte_tables
        ids = np.asarray(ids, dtype=np.int64)
        after_silence = np.ones(len(ids), dtype=bool)
        after_silence[1:] = silent[ids[:-1]]
        if len(ids) and previous is not None:
            after_silence[0] = silent[previous]
        return base[ids] + (self.leading[ids] & ~after_silence)

    def sum_bytes(self, ids: np.ndarray, previous: int | None = None) -> int:
        """The sum of `byte_counts`, from a histogram: several times quicker on long arrays."""
        base, silent = self._byte_tables
        counts = np.bincount(ids, minlength=self.vocab_size)
        total = int(counts @ (base + self.leading))
        if len(ids) and (previous is None or silent[previous]):
            total -= int(self.leading[ids[0]])
        for quiet in np.flatnonzero(counts.astype(bool) & silent):
            after = np.flatnonzero(ids[:-1] == quiet) + 1
            total -= int(self.leading[ids[after]].sum())
        return total


class Tokenizer(Vocabulary, Protocol):
    """What a tokenizer answers for its own text. Immutable.

    serialized: the bytes of its file, which is called file_name; sha256: their digest; bos_id: the id before each
    document. New backends set these and what a `Vocabulary` has, and implement `encode`, `_encode_all`, `piece`
    and `_spans`; the rest follows.
    """

    file_name: str
    serialized: bytes
    sha256: str
    bos_id: int

    @staticmethod
    def load(path: str | Path) -> Tokenizer:
        """Read a SentencePiece `.model`, a Hugging Face `tokenizer.json`, or a folder that holds one.

        Time and memory are bounded by MAX_BYTES, MAX_JSON_BYTES and MAX_PIECES. Raises DataError naming the file.
        """
        path = Path(path)
        if path.is_dir():
            names = (SentencePieceTokenizer.file_name, "tokenizer.json")
            path = next((path / name for name in names if (path / name).exists()), path / names[0])
        try:
            with path.open("rb") as file:
                serialized = file.read(MAX_JSON_BYTES + 1)
        except OSError as error:
            raise DataError(f"cannot read tokenizer {path}: {error.strerror}") from error
        try:
            return Tokenizer.from_bytes(serialized)
        except DataError as error:
            raise DataError(f"{path}: {error}") from error

    @staticmethod
    def from_bytes(serialized: bytes, most_pieces: int = MAX_PIECES) -> Tokenizer:
        """The tokenizer of a file's bytes, SentencePiece or Hugging Face. Raises DataError.

        most_pieces: refuse more of them before the parser has spent memory on them (some 60 bytes each).
        """
        if not serialized:
            raise DataError("the tokenizer's file is empty")
        refuse_pointer(serialized, "this", DataError)
        is_json = serialized[:64].lstrip()[:1] == b"{"
        most = MAX_JSON_BYTES if is_json else MAX_BYTES
        if len(serialized) > most:
            raise DataError(f"the tokenizer's file is larger than {most >> 20} MiB")
        if is_json:
            return extra("tokenizers").HuggingFaceTokenizer(serialized, most_pieces)
        return SentencePieceTokenizer(serialized, most_pieces)

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, without BOS."""
        ...

    def encode_batch(self, texts: Sequence[str], goes_on: Sequence[bool] | None = None) -> list[list[int]]:
        """Ids of each text, without BOS, on all cores. `goes_on`: which texts are later parts given by `cut`."""
        goes_on = goes_on or [False] * len(texts)
        # Behind a letter, whose ids are then dropped, a part's first space reads as it does inside the text.
        encoded = self._encode_all(["a" + text if later else text for text, later in zip(texts, goes_on, strict=True)])
        letter = len(self.encode("a"))
        return [ids[letter:] if later else ids for ids, later in zip(encoded, goes_on, strict=True)]

    def _encode_all(self, texts: list[str]) -> list[list[int]]:
        """Ids of each text, without BOS, on all cores."""
        ...

    def piece(self, id: int) -> str:
        """The piece's own spelling in the tokenizer's file."""
        ...

    def _spans(self, text: str) -> tuple[list[int], list[int]]:
        """Ids of `text`, and for each the byte of `text` where what it was made from ends (never falling)."""
        ...

    def cut(self, text: str | Iterable[str], limit: int = LONG_TEXT) -> Iterator[str]:
        """Parts of `text` (or of the text that its stretches make) whose ids by `encode_batch` are, put together, those
        of the whole.

        A tokenizer takes some 50 bytes of memory per character of a text. Parts have `limit` characters or a little more
        and are cut before a space between two letters; text with no such space is not cut. Raises DataError for
        stretches of a text that would have to be held for more than MOST_UNCUT characters.
        """
        space = re.compile("(?<=[A-Za-z]) (?=[A-Za-z])" if self._words_are_separate else "(?!)")
        held, searched = "", 0
        for stretch in (text,) if isinstance(text, str) else text:
            held, begin = held + stretch, 0
            while (found := space.search(held, max(begin + limit, searched))) is not None:
                yield held[begin : found.start()]
                begin, searched = found.start(), 0
            held = held[begin:]
            searched = max(0, len(held) - 1)  # a space there needs the next letter
            if len(held) > MOST_UNCUT and not isinstance(text, str):
                raise DataError(
                    f"a text of more than {MOST_UNCUT:,} characters without a space between two letters cannot be cut for "
                    "the tokenizer: break it into several documents"
                )
        yield held

    def encode_continuation(self, text: str) -> list[int]:
        """Ids of text that follows other text, so that neither a dummy space is added nor its own space lost."""
        if not text:
            return []
        for anchor in ANCHORS:
            # No piece has a space but at its start, so an anchor that stays whole changes nothing behind it.
            head = self.encode(anchor)
            ids = self.encode(anchor + text)
            if head and ids[: len(head)] == head:
                return ids[len(head) :]
        return self.encode(text)

    @cached_property
    def _words_are_separate(self) -> bool:
        """Whether no piece spans a space, so that text before and after one is encoded independently."""
        return not any(b" " in raw.lstrip(b" ") for raw in self.raw)

    @cached_property
    def _probe(self) -> str:
        """A character that the tokenizer knows."""
        return next((t for t in self.piece_texts if len(t) == 1 and t.isalnum() and t.isascii()), "x")

    def space_pending(self, text: str) -> bool:
        """Whether a word put behind `text` would begin with a space of `text` (which `encode` drops at its end)."""
        probe = self._probe
        return bool(text) and self.text_of(self.encode_continuation(text + probe)).endswith(" " + probe)

    def without_pending_space(self, text: str) -> str:
        """Text before a gap, without the space at its end that belongs to the gap's first token."""
        return text[:-1] if text.endswith(" ") and self.space_pending(text) else text

    def original_bytes(self, text: str) -> tuple[list[int], np.ndarray]:
        """Ids of `text` without BOS, and the bytes of `text` itself charged to each, by offsets: their sum is its size.

        A token is charged all that lies between the end of the token before it and its own, so white space that was
        dropped as well; the last one is charged what follows it.
        """
        ids, ends = self._spans(text)
        if not ids:
            return [], np.zeros(0, dtype=np.int64)
        return ids, np.diff([0, *ends[:-1], len(text.encode())])

    def lost_bytes(self, text: str, goes_on: bool = False) -> np.ndarray:
        """Bytes of `text` that its ids do not give back, charged to each id: int64 like `encode(text)`.

        Unknown pieces lose all they were made from; normalisation and dropped white space lose the bytes that differ, and
        at least one where they only add. Text without any id loses nothing here: its caller has no token to charge.
        goes_on: `text` is a later part given by `cut`.
        """
        ids, ends = self._spans("a" + text if goes_on else text)
        data = ("a" + text if goes_on else text).encode()
        lost = np.zeros(len(ids), dtype=np.int64)
        if not ids or self.decode_bytes(ids) == data:
            return lost[len(self.encode("a")) :] if goes_on else lost
        ends[-1] = len(data)
        start = first = 0
        for last, end in enumerate(ends):
            if last + 1 < len(ends) and ends[last + 1] == end:
                continue  # the parts of one character share its span
            raw = self.raw[ids[last]] if first == last else b"".join(self.raw[i] for i in ids[first : last + 1])
            if (first == 0 or not self.raw[ids[first - 1]]) and self.leading[ids[first]]:
                raw = raw[1:]
            if data[start:end] != raw:
                lost[last] = _difference(data[start:end], raw)
            start, first = end, last + 1
        return lost[len(self.encode("a")) :] if goes_on else lost

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.vocab_size:,} pieces, sha256 {self.sha256[:12]})"


def _whole(raw: bytes) -> str:
    """The characters of bytes, "" where they are not whole ones."""
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return ""


def _difference(given: bytes, back: bytes) -> int:
    """Bytes of `given` outside the longest beginning and end that it shares with `back`; at least 1 if they differ."""
    if given == back:
        return 0
    room = min(len(given), len(back))
    head = next((i for i in range(room) if given[i] != back[i]), room)
    tail = next((i for i in range(room - head) if given[-1 - i] != back[-1 - i]), room - head)
    return max(1, len(given) - head - tail)


def check_same_tokenizer(
    model: Any, data: Any, model_name: object = "the model", data_name: object = "the data"
) -> None:
    """Raise DataError unless two things have the same tokenizer.

    model, data: models, datasets, streams (what has a tokenizer), or a tokenizer's SHA-256, which is what a run keeps.
    """
    one, other = (thing if isinstance(thing, str) else thing.tokenizer.sha256 for thing in (model, data))
    if one != other:
        raise DataError(
            f"{data_name} was prepared with another tokenizer than {model_name}: prepare it again with the model's "
            "(`mezzotint prepare --tokenizer MODEL`)"
        )


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model. Raises DataError when the bytes are no such model or it has no BOS."""

    file_name = "tokenizer.model"

    def __init__(self, serialized: bytes, most_pieces: int = MAX_PIECES) -> None:
        try:
            most = FREE_FIELDS + 5 * most_pieces
            if _count_fields(serialized, most) > most:
                raise DataError(f"the tokenizer has more than {most_pieces:,} pieces")
            sp = self._processor = sentencepiece.SentencePieceProcessor(model_proto=serialized)  # type: ignore[call-arg]
        except DataError:
            raise
        except Exception as error:
            raise DataError("not a SentencePiece model: give a .model file made by sentencepiece") from error
        self.serialized = serialized
        self.sha256 = hashlib.sha256(serialized).hexdigest()
        self.vocab_size = sp.get_piece_size()
        self.bos_id = sp.bos_id()
        if self.bos_id < 0:
            raise DataError("the tokenizer has no BOS piece, which must precede each document")
        self.raw = [self._raw(i) for i in range(self.vocab_size)]
        self.leading = np.array([r.startswith(b" ") and not sp.is_byte(i) for i, r in enumerate(self.raw)], dtype=bool)

    def _raw(self, i: int) -> bytes:
        sp = self._processor
        if sp.is_control(i) or sp.is_unknown(i) or sp.is_unused(i):
            return b""
        if sp.is_byte(i):
            return bytes([int(sp.id_to_piece(i)[3:5], 16)])
        return sp.id_to_piece(i).replace(SPACE, " ").encode()

    @cached_property
    def _single_bytes(self) -> list[bool]:
        return [self._processor.is_byte(i) for i in range(self.vocab_size)]

    def encode(self, text: str) -> list[int]:
        return self._processor.encode(text)

    def _encode_all(self, texts: list[str]) -> list[list[int]]:
        return self._processor.encode(texts, num_threads=-1)  # type: ignore[call-arg]

    def piece(self, id: int) -> str:
        return self._processor.id_to_piece(id)

    def _spans(self, text: str) -> tuple[list[int], list[int]]:
        ids, ends = _pieces(self._processor.encode(text, out_type="serialized_proto"))  # type: ignore[arg-type]
        return ids, np.maximum.accumulate(ends).tolist()


def _wire(raw: bytes) -> Iterator[tuple[int, Any]]:
    """(field, number or bytes) of a protocol buffer. Raises ValueError where a parser would have to give up."""
    at = 0

    def number() -> int:
        nonlocal at
        value = 0
        for shift in range(0, 70, 7):
            if at >= len(raw):
                break
            byte = raw[at]
            at += 1
            value |= (byte & 127) << shift
            if byte < 128:
                return value
        raise ValueError("a number does not end")

    while at < len(raw):
        field, kind = divmod(number(), 8)
        if kind == 0:
            yield field, number()
            continue
        if kind not in (1, 2, 5):
            raise ValueError("a field of an unknown kind")
        length = number() if kind == 2 else 8 if kind == 1 else 4
        if at + length > len(raw):
            raise ValueError("a field reaches past the end")
        at += length
        yield field, raw[at - length : at]


def _pieces(message: bytes) -> tuple[list[int], list[int]]:
    """Id and end of each piece of a SentencePieceText, as SentencePiece writes it.

    Its field 2 is a piece, whose fields 2 and 5 are these (0 left out). `_wire` reads the same, at five times the time.
    """
    ids: list[int] = []
    ends: list[int] = []
    at, stop = 0, len(message)
    while at < stop:
        tag, number = message[at], message[at + 1]
        if tag & 7 == 5:  # 4 bytes: a score
            at += 5
            continue
        at += 2
        shift = 7
        while number >> shift:  # its last byte had the bit that says: more
            number += (message[at] - 1) << shift
            at, shift = at + 1, shift + 7
        if tag == 0x12:  # a piece: what follows are its fields
            ids.append(0)
            ends.append(0)
        elif tag == 0x10:
            ids[-1] = number
        elif tag == 0x28:
            ends[-1] = number
        elif tag & 7 == 2:  # text
            at += number
    return ids, ends


def _count_fields(raw: bytes, most: int) -> int:
    """Fields of a SentencePiece model and of the messages right in it; counting ends above `most`.

    Even an empty field costs its parser some 60 bytes of memory, so that 16 MiB of them would take 600.
    """
    count = 0
    for field, value in _wire(raw):
        inner = _wire(value) if isinstance(value, bytes) and field <= 5 else iter(())
        count += 1
        for _ in inner:
            count += 1
            if count > most:
                break
        if count > most:
            break
    return count


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A BPE tokenizer with byte fallback and no normalisation, so that text decodes to itself. Deterministic.

    Raises DataError when the text cannot fill the vocabulary.
    """
    texts = list(texts)
    tokenizer = _train(texts, vocab_size)
    # In text with hardly any spaces the space is too rare to be kept, and would come back as U+2581.
    known = any(tokenizer.piece(i) == SPACE for i in range(tokenizer.vocab_size))
    return tokenizer if known else _train(texts, vocab_size, required_chars=SPACE)


def _train(texts: list[str], vocab_size: int, **more: Any) -> Tokenizer:
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
            **more,
        )
    except Interrupted:  # raised by a signal's handler while the texts were read
        raise
    except Exception as error:
        reason = str(error)
        most = re.search(r"value <= (\d+)", reason)
        least = re.search(r"(\d+) vs (\d+)", reason)
        if most:
            advice = f"the text has too few different words for more than {most[1]}; give --vocab-size {most[1]} or more text"
        elif least and "required_chars" in reason:
            advice = f"its bytes and characters alone need {least[2]}; give at least --vocab-size {least[2]}"
        elif vocab_size < 262:
            advice = (
                "256 bytes, 4 control pieces and the text's own characters come first; give --vocab-size 512 or more"
            )
        elif "sentences_.empty()" in reason:
            advice = "there is no text"
        else:
            advice = " ".join(reason.split())[-160:] or type(error).__name__
        raise DataError(f"cannot train a tokenizer of {vocab_size} pieces: {advice}") from error
    return SentencePieceTokenizer(model.getvalue())
