"""Text -> token ids and byte counts: tokenizers, shards, windows, the loader. Sole owner of the bits-per-byte
denominator.

Knows nothing of models or masks. A document is its ids preceded by BOS. Shards are the Parameter Golf challenge's:
256 little-endian int32 ([0] = 20240520, [1] = 1, [2] = tokens), then uint16 ids; memory-mapped, never read whole.
"""

from __future__ import annotations

import bisect
import contextlib
import errno
import hashlib
import io
import json
import mmap
import os
import re
import shutil
import sysconfig
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow
import pyarrow.parquet
import sentencepiece

from mezzotint.errors import DataError
from mezzotint.files import atomic_folder

SHARD_MAGIC, SHARD_VERSION, HEADER_BYTES = 20_240_520, 1, 1024
SHARD_TOKENS = 100_000_000
SPACE = "\u2581"
FORMAT = 1
TOKENIZER_SAMPLE_BYTES = 16_000_000
LONG_TEXT = 1_000_000  # characters encoded in one go
FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
DEFAULT_VOCAB_SIZES = (1024, 512, 384)  # the first that the text can fill
HUB_REPOSITORY = "willdepueoai/parameter-golf"

Progress = Callable[[str, int], None]
"""Called with (what is being done, documents so far)."""


# --- tokenizer --------------------------------------------------------------------------------------------------------


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


# --- sources ----------------------------------------------------------------------------------------------------------


def _read_text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text (byte {error.start}); convert it first") from error
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error


def _jsonl_documents(path: Path) -> Iterator[str]:
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    text = json.loads(line)["text"]
                    text.encode()  # lone surrogates can be written in JSON but are no text
                except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                    raise DataError(f'{path}, line {number}: expected a JSON object with a string "text"') from error
                yield text
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error


def _parquet_documents(path: Path) -> Iterator[str]:
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            if "text" not in file.schema_arrow.names:
                raise DataError(f'{path} has no column "text" (it has {", ".join(file.schema_arrow.names)})')
            for batch in file.iter_batches(batch_size=256, columns=["text"]):
                for text in batch.column(0).to_pylist():
                    if text is not None and not isinstance(text, str):
                        raise DataError(f'{path}: column "text" holds {type(text).__name__}, not strings')
                    if text:
                        yield text
    except UnicodeDecodeError as error:
        raise DataError(f'{path}: column "text" is not UTF-8 text; convert it first') from error
    except OSError as error:
        raise DataError(f"cannot read {path}: {str(error).splitlines()[0]}") from error
    except pyarrow.ArrowException as error:
        raise DataError(f"{path} is not a readable Parquet file: {str(error).splitlines()[0]}") from error


READERS: dict[str, Callable[[Path], Iterator[str]]] = {
    ".txt": lambda path: iter([_read_text(path)]),
    ".jsonl": _jsonl_documents,
    ".parquet": _parquet_documents,
}


def _stdlib_files() -> list[Path]:
    """The running Python's own library modules, in order, without tests, caches and installed packages."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skip = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__", "turtledemo"}
    files = []
    for folder, inner, names in os.walk(root):
        inner[:] = [name for name in inner if name not in skip]
        files += [Path(folder, name) for name in names if name.endswith(".py")]
    return sorted(files, key=lambda p: p.relative_to(root).as_posix())


def _source_files(source: str | Path) -> list[Path]:
    """The files a source stands for. Raises DataError if there are none."""
    path = Path(source)
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.suffix.lower() in READERS and p.is_file())
        if not files:
            raise DataError(f"{path} holds no .txt, .jsonl or .parquet file")
        return files
    if not path.exists():
        raise DataError(f"{source} does not exist; give a file, a folder, stdlib or fineweb:sp1024")
    if path.suffix.lower() not in READERS:
        raise DataError(f"{path}: unknown kind of file; use .txt, .jsonl or .parquet")
    return [path]


def documents(source: str | Path) -> Iterator[str]:
    """The non-empty documents of a source: a file, a folder of them, or `stdlib`. Raises DataError."""
    if str(source) == "stdlib":
        for path in _stdlib_files():
            with contextlib.suppress(UnicodeDecodeError, OSError):
                text = path.read_bytes().decode("utf-8")
                if text:
                    yield text
        return
    for path in _source_files(source):
        yield from (text for text in READERS[path.suffix.lower()](path) if text)


# --- writing ----------------------------------------------------------------------------------------------------------


class _ShardWriter:
    """Appends ids to numbered shards of at most SHARD_TOKENS tokens."""

    def __init__(self, folder: Path, split: str) -> None:
        self.folder, self.split = folder, split
        self.shards = self.tokens = self.in_shard = 0
        self.file: BinaryIO | None = None

    def append(self, ids: np.ndarray) -> None:
        while len(ids):
            if self.file is None:
                self.file = (self.folder / f"{self.split}_{self.shards:06d}.bin").open("wb")
                self.file.write(bytes(HEADER_BYTES))
                self.shards, self.in_shard = self.shards + 1, 0
            part = ids[: SHARD_TOKENS - self.in_shard]
            self.file.write(part.astype("<u2").tobytes())
            self.in_shard += len(part)
            self.tokens += len(part)
            ids = ids[len(part) :]
            if self.in_shard == SHARD_TOKENS:
                self.finish()

    def finish(self) -> None:
        if self.file is not None:
            header = np.zeros(256, dtype="<i4")
            header[:3] = SHARD_MAGIC, SHARD_VERSION, self.in_shard
            self.file.seek(0)
            self.file.write(header.tobytes())
            self.file.close()
            self.file = None

    def discard(self) -> None:
        if self.file is not None:
            with contextlib.suppress(OSError):
                self.file.close()


class _SplitWriter:
    """One split: shards, and the account of its documents, tokens and bytes."""

    def __init__(self, folder: Path, split: str, tokenizer: Tokenizer) -> None:
        self.folder, self.split, self.tokenizer = folder, split, tokenizer
        self.shards = _ShardWriter(folder, split)
        self.documents = self.bytes = self.piece_bytes = self.not_round_trip = 0
        self.corrections = array("q")  # first token and missing bytes of each document that the piece table miscounts
        self.pending: list[tuple[str, bool]] = []  # parts of documents; whether one begins
        self.pending_size = 0
        self.start = self.missing = 0  # of the document being written
        self.faithful = True
        self.last: int | None = None

    def add(self, text: str) -> None:
        for i, part in enumerate(self.tokenizer.cut(text, LONG_TEXT)):
            self.pending.append((part, i == 0))
            self.pending_size += len(part)
            if self.pending_size > 4 * LONG_TEXT:
                self.flush()

    def flush(self) -> None:
        encoded = self.tokenizer.encode_batch(
            [part for part, _ in self.pending], [not begins for _, begins in self.pending]
        )
        for (text, begins), tokens in zip(self.pending, encoded, strict=True):
            raw = text.encode()
            if begins:
                self._end_document()
                self.documents += 1
                self.start, self.last = self.shards.tokens, None
                ids = np.array([self.tokenizer.bos_id, *tokens], dtype=np.int64)
            else:
                ids = np.array(tokens, dtype=np.int64)
            pieces = self.tokenizer.sum_bytes(ids, self.last)
            # A part that goes on begins with a space, which alone it would not be given back.
            self.faithful &= self.tokenizer.decode_bytes(ids) == (raw if begins else raw[1:])
            self.missing += len(raw) - pieces
            self.bytes += len(raw)
            self.piece_bytes += pieces
            self.shards.append(ids)
            self.last = int(ids[-1]) if len(ids) else self.last
        self.pending, self.pending_size = [], 0

    def _end_document(self) -> None:
        if self.missing:
            self.corrections.extend((self.start, self.missing))
        self.not_round_trip += not self.faithful
        self.missing, self.faithful = 0, True

    def finish(self) -> dict[str, int]:
        self.flush()
        self._end_document()
        self.shards.finish()
        if self.corrections:
            np.save(
                self.folder / f"{self.split}_corrections.npy", np.array(self.corrections, dtype=np.int64).reshape(-1, 2)
            )
        return {
            "documents": self.documents,
            "tokens": self.shards.tokens,
            "bytes": self.bytes,
            "piece_bytes": self.piece_bytes,
            "not_round_trip": self.not_round_trip,
        }


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


def prepare(
    sources: Sequence[str | Path],
    out: str | Path,
    *,
    tokenizer: str | Path | None = None,
    vocab_size: int | None = None,
    val_fraction: float | None = None,
    val: Sequence[str | Path] | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Turn sources into a data folder: train_*.bin, val_*.bin, tokenizer.model, data.json. Whole or not at all.

    sources, val: files (.txt, .jsonl, .parquet with a text column), folders of them, `stdlib`, or, alone,
    `fineweb:sp1024[:SHARDS]`. Without `val`, a `val_fraction` (default 0.02) of the documents is drawn by `seed`; of a
    single document, its end. Without `tokenizer`, one of `vocab_size` pieces is trained on `sources` (default
    1,024, or fewer where the text is too short for that).

    Returns train and val, each {documents, tokens, bytes, piece_bytes, not_round_trip}, vocab_size, bytes_per_token.
    bytes are those of the text's UTF-8; piece_bytes what the piece table says; not_round_trip counts documents that
    do not decode to themselves. Raises DataError.
    """
    out = Path(out)
    if not sources:
        raise DataError("no source given: name a file, a folder, stdlib or fineweb:sp1024")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DataError(f"{out} exists; name a new folder")
    if val_fraction is not None and not 0 < val_fraction < 1:
        raise DataError(f"--val-fraction must lie between 0 and 1, not {val_fraction}")
    if val_fraction is not None and val:
        raise DataError("give --val or --val-fraction, not both")
    if vocab_size is not None and tokenizer is not None:
        raise DataError("give --tokenizer or --vocab-size, not both")
    if vocab_size is not None and not 2 <= vocab_size <= 65_535:
        raise DataError(f"--vocab-size must be at most 65,535, not {vocab_size}")
    try:
        if any(str(s).startswith("fineweb:") for s in sources):
            if len(sources) > 1 or val or tokenizer or vocab_size or val_fraction:
                raise DataError("fineweb:... comes with its own tokenizer and validation split; give it alone")
            return _prepare_published(str(sources[0]), out, progress)
        return _prepare_texts(sources, out, tokenizer, vocab_size, val_fraction or 0.02, val, seed, progress)
    except OSError as error:
        if error.errno in FULL_DISK:
            raise DataError(f"the disk is full: could not write {out}; nothing was left there") from error
        raise DataError(f"cannot write {out}: {error.strerror or error}") from error


def _prepare_texts(
    sources: Sequence[str | Path],
    out: Path,
    tokenizer_path: str | Path | None,
    vocab_size: int | None,
    val_fraction: float,
    val: Sequence[str | Path] | None,
    seed: int,
    progress: Progress | None,
) -> dict[str, Any]:
    def all_documents(names: Sequence[str | Path], what: str) -> Iterator[str]:
        seen = 0
        for name in names:
            for text in documents(name):
                seen += 1
                if progress and seen % 256 == 0:
                    progress(what, seen)
                yield text

    count = size = 0
    for text in all_documents(sources, "reading"):
        count, size = count + 1, size + len(text.encode())
    if count == 0:
        raise DataError(f"no text in {', '.join(str(s) for s in sources)}: every document is empty")
    if tokenizer_path is not None:
        tokenizer = Tokenizer.load(tokenizer_path)
    else:
        tokenizer = None
        for pieces in (vocab_size,) if vocab_size else DEFAULT_VOCAB_SIZES:
            texts = all_documents(sources, "sampling for the tokenizer")
            try:
                tokenizer = train_tokenizer(_sample(texts, TOKENIZER_SAMPLE_BYTES, size), pieces)
                break
            except DataError:
                if pieces in (vocab_size, DEFAULT_VOCAB_SIZES[-1]):
                    raise
        assert tokenizer is not None
    chosen: set[int] = set()
    if not val and count > 1:
        held = min(count - 1, max(1, round(count * val_fraction)))
        chosen = set(np.random.default_rng(seed).choice(count, held, replace=False).tolist())
    with atomic_folder(out) as folder:
        train_split = _SplitWriter(folder, "train", tokenizer)
        val_split = _SplitWriter(folder, "val", tokenizer)
        try:
            for i, text in enumerate(all_documents(sources, "encoding")):
                if not val and count == 1:
                    first, last = _halves(text, val_fraction)
                    if not first or not last:
                        raise DataError("the corpus is a single document too short to split; give --val or more text")
                    train_split.add(first)
                    val_split.add(last)
                else:
                    (val_split if i in chosen else train_split).add(text)
            for text in all_documents(val or [], "encoding validation"):
                val_split.add(text)
            report: dict[str, Any] = {"train": train_split.finish(), "val": val_split.finish()}
        finally:
            train_split.shards.discard()
            val_split.shards.discard()
        if report["val"]["documents"] == 0:
            raise DataError("the validation sources hold no text")
        report["vocab_size"] = tokenizer.vocab_size
        report["bytes_per_token"] = report["train"]["bytes"] / report["train"]["tokens"]
        names = [str(s) if str(s) == "stdlib" else Path(s).resolve().name for s in sources]
        _write_description(folder, tokenizer, report, {"sources": names, "seed": seed})
    return report


def _write_description(folder: Path, tokenizer: Tokenizer, report: dict[str, Any], more: dict[str, Any]) -> None:
    (folder / "tokenizer.model").write_bytes(tokenizer.serialized)
    described = {"format": FORMAT, "tokenizer_sha256": tokenizer.sha256, **report, **more}
    (folder / "data.json").write_text(json.dumps(described, indent=1))


def _prepare_published(source: str, out: Path, progress: Progress | None) -> dict[str, Any]:
    """Fetch `fineweb:VARIANT[:SHARDS]`, the challenge's published shards, through huggingface_hub."""
    try:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
    except ImportError as error:
        raise DataError("fineweb:... needs huggingface_hub: pip install 'mezzotint[hub]'") from error
    words = source.split(":")
    if len(words) not in (2, 3) or not words[1] or (len(words) == 3 and not words[2].isdigit()):
        raise DataError(f"{source!r}: write fineweb:sp1024, or fineweb:sp1024:10 for 10 training shards")
    name = f"fineweb10B_{words[1]}"

    def fetch(path: str) -> Path:
        if progress:
            progress(f"fetching {path}", 0)
        try:
            return Path(hf_hub_download(HUB_REPOSITORY, f"datasets/{path}", repo_type="dataset"))
        except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
            if isinstance(error, OSError) and error.errno in FULL_DISK:
                raise
            raise DataError(
                f"cannot fetch datasets/{path} from {HUB_REPOSITORY}: {str(error).splitlines()[0]}"
            ) from error

    try:
        manifest = json.loads(fetch("manifest.json").read_text())
        entry = next(e for e in manifest["datasets"] if e["name"] == name)
        model = next(t["model_path"] for t in manifest["tokenizers"] if t["name"] == entry["tokenizer_name"])
        train_files, val_files = int(entry["stats"]["files_train"]), int(entry["stats"]["files_val"])
        counts = {k: int(v) for k, v in entry["stats"].items() if isinstance(v, int)}
    except StopIteration as error:
        raise DataError(f"the published data has no {name}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError("the published manifest.json is not as expected; this version may be too old for it") from error
    wanted = int(words[2]) if len(words) == 3 else train_files
    if not 1 <= wanted <= train_files:
        raise DataError(f"{name} has {train_files} training shards; ask for 1 to {train_files}, not {wanted}")
    if val_files < 1:
        raise DataError(f"the published {name} has no validation shards")
    tokenizer = Tokenizer.load(fetch(f"tokenizers/{Path(model).name}"))
    with atomic_folder(out) as folder:
        for split, shards in (("val", val_files), ("train", wanted)):
            for i in range(shards):
                found = fetch(f"datasets/{name}/fineweb_{split}_{i:06d}.bin").resolve()
                target = folder / f"fineweb_{split}_{i:06d}.bin"
                try:
                    target.hardlink_to(found)  # published shards are 200 MB each; share them with the hub's cache
                except OSError:
                    shutil.copyfile(found, target)
        report: dict[str, Any] = {}
        for split in ("train", "val"):
            if progress:
                progress(f"counting bytes: {split}", 0)
            stream = TokenStream(sorted(folder.glob(f"fineweb_{split}_*.bin")), tokenizer)
            report[split] = {
                "documents": sum(int((part == tokenizer.bos_id).sum()) for part in stream.chunks(0, len(stream))),
                "tokens": len(stream),
                "bytes": stream.bytes,
                "piece_bytes": stream.bytes,
                "not_round_trip": None,
            }
        report["vocab_size"] = tokenizer.vocab_size
        report["bytes_per_token"] = report["train"]["bytes"] / report["train"]["tokens"]
        _write_description(
            folder, tokenizer, report, {"sources": [source], "bytes_kind": "pieces", "published": counts}
        )
    return report


# --- reading ----------------------------------------------------------------------------------------------------------


def _open_shard(path: Path) -> np.ndarray:
    """A shard's ids, memory-mapped uint16. Raises DataError naming it."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            header = np.frombuffer(file.read(HEADER_BYTES), dtype=np.uint8)
    except OSError as error:
        raise DataError(f"cannot read shard {path}: {error.strerror}") from error
    if len(header) < HEADER_BYTES:
        raise DataError(f"shard {path} is truncated: {size} bytes do not hold a header")
    fields = header.view("<i4")
    if fields[0] != SHARD_MAGIC:
        raise DataError(f"{path} is not a token shard (magic {fields[0]}, expected {SHARD_MAGIC})")
    if fields[1] != SHARD_VERSION:
        raise DataError(f"shard {path} has version {fields[1]}; this program reads version {SHARD_VERSION}")
    tokens = int(fields[2])
    if tokens < 0 or size != HEADER_BYTES + 2 * tokens:
        raise DataError(f"shard {path} is damaged: {size} bytes, its header says {HEADER_BYTES + 2 * tokens}")
    if tokens == 0:
        return np.zeros(0, dtype="<u2")
    ids = np.memmap(path, dtype="<u2", mode="r", offset=HEADER_BYTES, shape=(tokens,))
    if hasattr(mmap, "MADV_RANDOM"):
        # Windows are read in shuffled order; read-ahead would fetch 30 times what is used.
        ids._mmap.madvise(mmap.MADV_RANDOM)  # type: ignore[attr-defined]
    return ids


class TokenStream:
    """The shards of a split as one sequence of ids, memory-mapped. `len` is tokens; `stream[a:b]` is uint16.

    bytes: raw UTF-8 bytes of the split's text where they are known (`bytes_kind` "raw"), else the piece table's sum
    ("pieces"). Ids are checked against the vocabulary as they are read.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        tokenizer: Tokenizer,
        raw_bytes: int | None = None,
        corrections: np.ndarray | None = None,
    ) -> None:
        self.paths = list(paths)
        self.tokenizer = tokenizer
        self._shards = [_open_shard(path) for path in self.paths]
        self._starts = np.concatenate(([0], np.cumsum([len(s) for s in self._shards]))).astype(np.int64)
        self._raw_bytes = raw_bytes
        self.bytes_kind = "pieces" if raw_bytes is None else "raw"
        self.corrections = np.zeros((0, 2), dtype=np.int64) if corrections is None else corrections

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, where: slice) -> np.ndarray:
        start, stop, stride = where.indices(len(self))
        if stride != 1:
            raise ValueError("a stream is read in steps of 1")
        parts = []
        shard = int(np.searchsorted(self._starts, start, side="right")) - 1
        while start < stop:
            base = int(self._starts[shard])
            part = self._read(shard, start - base, min(stop - base, len(self._shards[shard])))
            if len(part) and int(part.max()) >= self.tokenizer.vocab_size:
                raise DataError(
                    f"shard {self.paths[shard]} has id {int(part.max())}, beyond the tokenizer's "
                    f"{self.tokenizer.vocab_size}: it was made with another tokenizer"
                )
            parts.append(part)
            start += len(part)
            shard += 1
        return np.concatenate(parts) if parts else np.zeros(0, dtype=np.uint16)

    def _read(self, shard: int, start: int, stop: int) -> np.ndarray:
        """Ids of one shard: short stretches through the map, long ones by a plain read, which has read-ahead."""
        if stop - start < 1 << 20:
            return np.asarray(self._shards[shard][start:stop])
        path = self.paths[shard]
        try:
            part = np.fromfile(path, dtype="<u2", count=stop - start, offset=HEADER_BYTES + 2 * start)
        except OSError as error:
            raise DataError(f"cannot read shard {path}: {error.strerror}") from error
        if len(part) != stop - start:
            raise DataError(f"shard {path} was cut short while it was read")
        return part

    def chunks(self, start: int, stop: int, size: int = 1 << 22) -> Iterator[np.ndarray]:
        """Tokens start..stop in consecutive stretches of `size`, uint16; never more than one in memory."""
        for a in range(start, stop, size):
            yield self[a : min(a + size, stop)]

    def count_bytes(self, start: int, stop: int) -> int:
        """Bytes charged to tokens start..stop: the piece table, and what it misses of a document at the document's BOS."""
        total = 0
        previous = int(self[start - 1 : start][0]) if start else None
        for ids in self.chunks(start, stop):
            total += self.tokenizer.sum_bytes(ids, previous)
            previous = int(ids[-1])
        rows = self.corrections[:, 0]
        inside = slice(bisect.bisect_left(rows, start), bisect.bisect_left(rows, stop))
        return total + int(self.corrections[inside, 1].sum())

    @property
    def known_bytes(self) -> int | None:
        """Bytes of the whole split where nobody has to count them: from data.json."""
        return self._raw_bytes

    def bytes_per_token(self, sample: int = 1 << 20) -> float:
        """Mean bytes of a token: exact where the bytes are known or few, else of about `sample` tokens spread evenly."""
        if self._raw_bytes is not None or len(self) <= sample:
            return self.bytes / max(1, len(self))
        part = sample // 64
        starts = [int(start) for start in np.linspace(0, len(self) - part, 64)]
        return sum(self.count_bytes(start, start + part) for start in starts) / (64 * part)

    @cached_property
    def bytes(self) -> int:
        """Bytes of the whole split."""
        return self._raw_bytes if self._raw_bytes is not None else self.count_bytes(0, len(self))

    def windows(self, length: int) -> Windows:
        """Consecutive windows of `length` tokens."""
        return Windows(self, length)


class Windows(Sequence[np.ndarray]):
    """Consecutive windows that do not overlap; the last may be shorter. `windows[i]` is int64.

    Every token is in one window, so charging each window's tokens charges each token of the split once.
    """

    def __init__(self, stream: TokenStream, length: int) -> None:
        if length < 1:
            raise DataError(f"a window has at least 1 token, not {length}")
        self.stream, self.length = stream, length

    def __len__(self) -> int:
        return -(-len(self.stream) // self.length)

    def __getitem__(self, i: int) -> np.ndarray:  # type: ignore[override]
        if not 0 <= i < len(self):
            raise IndexError(i)
        return self.stream[i * self.length : (i + 1) * self.length].astype(np.int64)

    def byte_count(self, i: int) -> int:
        """Bytes charged to window i. Over all windows they sum to the stream's bytes."""
        return self.stream.count_bytes(i * self.length, min((i + 1) * self.length, len(self.stream)))


class Dataset:
    """A prepared folder, or a folder of the challenge's published shards with its tokenizer beside or in it."""

    def __init__(self, folder: Path, tokenizer: Tokenizer, described: dict[str, Any]) -> None:
        self.folder, self.tokenizer, self.described = folder, tokenizer, described

    @classmethod
    def open(cls, folder: str | Path) -> Dataset:
        """Raises DataError: no such folder, no tokenizer, another tokenizer than the one that made the shards."""
        folder = Path(folder)
        if not folder.is_dir():
            raise DataError(f"{folder} is not a data folder; make one with `mezzotint prepare`")
        described: dict[str, Any] = {}
        if (folder / "data.json").exists():
            try:
                described = json.loads((folder / "data.json").read_text())
                wanted = described["tokenizer_sha256"]
                if described["format"] != FORMAT:
                    raise DataError(f"{folder} was prepared by another version (format {described['format']})")
                for name in ("train", "val"):
                    if any(type(described[name][key]) is not int for key in ("tokens", "bytes", "piece_bytes")):
                        raise TypeError("a count that is no number")
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise DataError(f"{folder / 'data.json'} cannot be read; prepare the data again") from error
            tokenizer = Tokenizer.load(folder / "tokenizer.model")
            if tokenizer.sha256 != wanted:
                raise DataError(f"{folder / 'tokenizer.model'} is not the tokenizer that made the shards beside it")
        else:
            tokenizer = cls._published_tokenizer(folder)
        return cls(folder, tokenizer, described)

    @staticmethod
    def _published_tokenizer(folder: Path) -> Tokenizer:
        if not any(folder.glob("*.bin")):
            raise DataError(f"{folder} holds no data.json and no shards; make it with `mezzotint prepare`")
        full = folder.resolve()
        wanted = full.name.rpartition("sp")[2]
        for place in (full, full.parent / "tokenizers", full.parent.parent / "tokenizers"):
            models = sorted(place.glob("*.model"))
            exact = [m for m in models if wanted and f"_{wanted}_" in m.name]
            if exact or len(models) == 1:
                return Tokenizer.load((exact or models)[0])
        raise DataError(f"{folder} has shards but no tokenizer; put the .model file that made them beside them")

    def split(self, name: str) -> TokenStream:
        """The `train` or `val` stream. Raises DataError when a shard is missing, foreign or damaged."""
        paths = sorted(self.folder.glob(f"{name}_*.bin")) or sorted(self.folder.glob(f"fineweb_{name}_*.bin"))
        paths = [p for p in paths if p.stem.rpartition("_")[2].isdigit()]
        if not paths:
            raise DataError(f"{self.folder} has no {name} shards")
        for i, path in enumerate(paths):
            number = int(path.stem.rpartition("_")[2])
            first = int(paths[0].stem.rpartition("_")[2])
            if number != first + i:
                raise DataError(f"{self.folder}: {name} shard {first + i:06d} is missing")
        account = self.described.get(name, {})
        raw = account.get("bytes")
        corrections = None
        if account and account.get("piece_bytes") != raw:
            path = self.folder / f"{name}_corrections.npy"
            try:
                corrections = np.load(path, mmap_mode="r", allow_pickle=False)
                if corrections.dtype != np.int64 or corrections.shape[1:] != (2,):
                    raise ValueError("not rows of two numbers")
                if int(corrections[:, 1].sum()) != raw - account["piece_bytes"]:
                    raise ValueError("not the corrections of this split")
            except (OSError, ValueError, EOFError) as error:
                raise DataError(f"{path} is missing or damaged; prepare the data again") from error
        stream = TokenStream(paths, self.tokenizer, raw, corrections)
        if account and len(stream) != account["tokens"]:
            raise DataError(
                f"{self.folder}: the {name} shards hold {len(stream)} tokens, data.json says {account['tokens']}: "
                "a shard is missing or from elsewhere"
            )
        if self.described.get("bytes_kind") == "pieces":
            stream.bytes_kind = "pieces"
        return stream


# --- the loader -------------------------------------------------------------------------------------------------------


def _mix(value: np.ndarray, key: int) -> np.ndarray:
    """A 64-bit mixing function (the finaliser of splitmix64; Steele et al. 2014)."""
    with np.errstate(over="ignore"):
        z = value + np.uint64((key * 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


def permute(index: np.ndarray, size: int, key: int) -> np.ndarray:
    """A keyed permutation of 0..size-1 at `index`, without listing it.

    A four-round Feistel network on the next even power of two, walked until it lands inside (Black and Rogaway 2002,
    "Ciphers with arbitrary finite domains", the cycle-walking cipher).
    """
    half = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    mask = np.uint64((1 << int(half)) - 1)
    value = index.astype(np.uint64)
    outside = np.ones(len(value), dtype=bool)
    while outside.any():
        left, right = value[outside] >> half, value[outside] & mask
        for turn in range(4):
            left, right = right, left ^ (_mix(right, key * 8 + turn + 1) & mask)
        value[outside] = (left << half) | right
        outside = value >= size
    return value.astype(np.int64)


class Loader:
    """(step, rank) -> windows. The order is a function of seed and step alone, whatever the number of processes.

    Each epoch takes every full window once, in an order and at a phase of its own. Raises DataError when the stream is
    shorter than a window.
    """

    def __init__(
        self, stream: TokenStream, length: int, global_batch: int, seed: int, rank: int = 0, world_size: int = 1
    ) -> None:
        if len(stream) < length:
            raise DataError(f"the training text has {len(stream)} tokens, fewer than one window of {length}")
        if global_batch % world_size:
            raise DataError(f"a batch of {global_batch} cannot be shared by {world_size} processes")
        self.stream, self.length, self.global_batch, self.seed = stream, length, global_batch, seed
        self.rank, self.world_size = rank, world_size
        self.phases = min(length, len(stream) - length + 1)
        self.epoch_windows = (len(stream) - self.phases + 1) // length

    def starts(self, step: int) -> np.ndarray:
        """First token of each of this process's windows of `step`."""
        rows = self.global_batch // self.world_size
        number = step * self.global_batch + self.rank * rows + np.arange(rows)
        starts = np.empty(rows, dtype=np.int64)
        for epoch in np.unique(number // self.epoch_windows):
            here = number // self.epoch_windows == epoch
            key = self.seed * 1_000_003 + int(epoch)
            phase = int(_mix(np.array([epoch], dtype=np.uint64), key + 7)[0] % np.uint64(self.phases))
            order = permute(number[here] % self.epoch_windows, self.epoch_windows, key)
            starts[here] = order * self.length + phase
        return starts

    def batch(self, step: int) -> np.ndarray:
        """int64 [global_batch / world_size, length]."""
        return np.stack([self.stream[int(s) : int(s) + self.length] for s in self.starts(step)]).astype(np.int64)

    def state_dict(self) -> dict[str, int]:
        """What fixes the order; the position is the step, which the caller keeps."""
        return {"seed": self.seed, "length": self.length, "batch": self.global_batch, "tokens": len(self.stream)}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Check that `state` is of the same order. Raises DataError naming what differs."""
        for key, value in self.state_dict().items():
            if state.get(key) != value:
                raise DataError(f"cannot resume: the run's {key} was {state.get(key)}, now {value}")


class Prefetch:
    """Reads the loader's batches one ahead, in a thread. Ask for consecutive steps; any other works, unhurried."""

    def __init__(self, loader: Loader) -> None:
        self.loader = loader
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="prefetch")
        self._ahead: dict[int, Future[np.ndarray]] = {}

    def batch(self, step: int) -> np.ndarray:
        """The loader's batch of `step`, with its errors; the next one is read meanwhile."""
        wanted = self._ahead.pop(step, None) or self._pool.submit(self.loader.batch, step)
        for other in self._ahead.values():
            other.cancel()
        self._ahead = {step + 1: self._pool.submit(self.loader.batch, step + 1)}
        return wanted.result()

    def close(self) -> None:
        """Let the thread end; no batch can be asked for afterwards."""
        self._pool.shutdown(wait=False, cancel_futures=True)
