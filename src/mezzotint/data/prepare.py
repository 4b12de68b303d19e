"""Text -> token shards with an account of documents, tokens and bytes; and the challenge's published shards.

Alone writes data folders. Does not know how they are read.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import signal
import sys
import tempfile
import threading
import time
from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from mezzotint import seeding
from mezzotint.config import OPTIONS
from mezzotint.data.dataset import (
    FORMAT,
    HEADER_BYTES,
    SHARD_MAGIC,
    SHARD_TOKENS,
    SHARD_VERSION,
    TokenStream,
    checksums,
)
from mezzotint.data.sources import Account, LongText, long_documents
from mezzotint.data.tokenizer import LONG_TEXT, Tokenizer, train_tokenizer
from mezzotint.errors import DataError, Interrupted, shown
from mezzotint.extras import extra
from mezzotint.files import atomic_folder, writing
from mezzotint.progress import OnProgress, Progress

TOKENIZER_SAMPLE_BYTES = 16_000_000
MAX_VOCAB = 65_535  # ids of 16 bits
DEFAULT_VOCAB_SIZES = (16384, 8192, 4096, 2048, 1024, 512, 384)  # the first that the text is long enough for, and fills
BYTES_PER_PIECE = 240  # of text, for a default above 1,024 pieces: 1 MB gains by 4,096, not by 8,192; 4 MB do (LOG.md)


def _passages(text: str | LongText, size: int) -> Iterator[str]:
    """A text in passages of `size` characters, the last one shorter."""
    held = ""
    for stretch in (text,) if isinstance(text, str) else text:
        held += stretch
        whole = len(held) // size * size
        yield from (held[start : start + size] for start in range(0, whole, size))
        held = held[whole:]
    if held:
        yield held


def _sample(texts: Iterable[str | LongText], limit: int, size: int) -> Iterator[str]:
    """About `limit` of the texts' `size` bytes, evenly spread, in passages of 4,000 characters; all if they are fewer."""
    taken = seen = 0
    for text in texts:
        for passage in _passages(text, 4000):
            length = len(passage.encode())
            if taken * size <= seen * limit:
                yield passage
                taken += length
            seen += length


def _halves(text: str | LongText, fraction: float) -> tuple[Iterable[str], Iterable[str]]:
    """Cut one document near its end, at a paragraph, line or word boundary, so that it can be both splits, in stretches.

    Raises DataError if one of them is empty.
    """
    length = sum(map(len, _stretches(text)))
    place = _boundary(_stretches(text), int(length * (1 - fraction)))
    if not 0 < place < length:
        raise DataError("the corpus is a single document too short to split; give --val or more text")
    return _between(_stretches(text), 0, place), _between(_stretches(text), place, length)


def _stretches(text: str | LongText) -> Iterable[str]:
    return (text,) if isinstance(text, str) else text


def _boundary(stretches: Iterable[str], target: int) -> int:
    """Where a text is cut: behind the first paragraph's, line's or word's end from `target` on, else the last before."""
    marks = ("\n\n", "\n", " ")
    first, last = dict.fromkeys(marks, -1), dict.fromkeys(marks, -1)
    before, offset, content = (
        "",
        0,
        0,
    )  # the character before, where a stretch begins, the end of what is no white space
    for stretch in stretches:
        text, offset = before + stretch, offset - len(before)
        begin = max(0, target - offset)
        for mark in marks:
            if first[mark] < 0 and (at := text.find(mark, begin)) >= 0:
                first[mark] = offset + at
            if (at := text.rfind(mark, 0, begin)) >= 0:
                last[mark] = offset + at
        content = offset + len(text.rstrip()) if text.strip() else content
        before, offset = text[-1:], offset + len(text)
    for mark in marks:
        at = first[mark] if first[mark] >= 0 else last[mark]
        if at > 0 and content > at + len(mark):
            return at + len(mark)
    return target


def _between(stretches: Iterable[str], begin: int, end: int) -> Iterator[str]:
    """The characters from `begin` to `end`."""
    offset = 0
    for stretch in stretches:
        if part := stretch[max(0, begin - offset) : max(0, end - offset)]:
            yield part
        offset += len(stretch)


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
        self.lost = array("q")  # token and bytes of each token that does not give back what it was made from
        self.pending: list[tuple[str, bool]] = []  # parts of documents; whether one begins
        self.pending_size = 0
        self.start = self.missing = 0  # of the document being written
        self.faithful = True
        self.last: int | None = None

    def add(self, text: str | Iterable[str]) -> None:
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
            if self.tokenizer.decode_bytes(ids) != (raw if begins else raw[1:]):
                self.faithful = False
                self._add_lost(text, len(raw), begins)
            self.missing += len(raw) - pieces
            self.bytes += len(raw)
            self.piece_bytes += pieces
            self.shards.append(ids)
            self.last = int(ids[-1]) if len(ids) else self.last
        self.pending, self.pending_size = [], 0

    def _add_lost(self, text: str, size: int, begins: bool) -> None:
        """Note the bytes that the next part of a document loses, token by token; without a token, at the one before."""
        lost = self.tokenizer.lost_bytes(text, goes_on=not begins)
        first = self.shards.tokens + begins
        for i in np.flatnonzero(lost).tolist():
            self.lost.extend((first + i, int(lost[i])))
        if not len(lost):
            self.lost.extend((first - 1, size))

    def _end_document(self) -> None:
        if self.missing:
            self.corrections.extend((self.start, self.missing))
        self.not_round_trip += not self.faithful
        self.missing, self.faithful = 0, True

    def finish(self) -> dict[str, int]:
        self.flush()
        self._end_document()
        self.shards.finish()
        lost = np.array(self.lost, dtype=np.int64).reshape(-1, 2)
        if self.corrections:
            np.save(
                self.folder / f"{self.split}_corrections.npy", np.array(self.corrections, dtype=np.int64).reshape(-1, 2)
            )
        if len(lost):
            np.save(self.folder / f"{self.split}_lost.npy", lost)
        return {
            "documents": self.documents,
            "tokens": self.shards.tokens,
            "bytes": self.bytes,
            "piece_bytes": self.piece_bytes,
            "not_round_trip": self.not_round_trip,
            "lost_bytes": int(lost[:, 1].sum()),
        }


def prepare(
    sources: Sequence[str | Path],
    out: str | Path,
    *,
    tokenizer: Tokenizer | str | Path | None = None,
    vocab_size: int | None = None,
    val_fraction: float | None = None,
    val: Sequence[str | Path] | None = None,
    text_field: str = "text",
    seed: int = 0,
    progress: OnProgress | None = None,
) -> dict[str, Any]:
    """Turn sources into a data folder: train_*.bin, val_*.bin, the tokenizer's file, data.json. Whole or not at all.

    out: the folder, new or empty. progress: told of documents read and encoded.
    sources, val: files and folders of them (kinds: see `sources`), `-` (UTF-8 text from standard input), `stdlib`,
    `hf:OWNER/NAME[:CONFIG][:SPLIT]`, or, alone, `fineweb:sp1024[:SHARDS]`. text_field: the column or JSON key of the text,
    `a.b` for b inside a. A file of text is read in stretches, so memory does not grow with it. Without `val`, a
    `val_fraction` (default 0.02) of the documents is drawn by `seed`; of a single document, its end. tokenizer: one, its
    file, or a folder that holds it (a run, an exported model); without it, one of `vocab_size` pieces is trained on `sources`
    (default 16,384, or fewer where the text is too short for that).

    Returns train and val, each {documents, tokens, bytes, piece_bytes, not_round_trip, lost_bytes}, vocab_size,
    bytes_per_token, and files {read, skipped: {why: how many}, empty_documents} with, where a folder has files that are no
    text, not_utf8: {name: first byte that breaks it}. bytes are those of the text's UTF-8; piece_bytes what the piece table
    says; not_round_trip counts documents that do not decode to themselves, lost_bytes the bytes of theirs that are not
    given back. Raises DataError, and Interrupted after SIGTERM.
    """
    out = Path(out)
    if not sources:
        raise DataError("no source given: name a file, a folder, -, stdlib, hf:OWNER/NAME or fineweb:sp1024")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DataError(f"{out} exists; name a new folder")
    if isinstance(vocab_size, int) and not 262 <= vocab_size <= MAX_VOCAB:
        raise DataError(f"--vocab-size must lie between 262 (256 bytes come first) and 65,535, not {shown(vocab_size)}")
    for name, value in (("val_fraction", val_fraction), ("vocab_size", vocab_size), ("seed", seed)):
        if value is not None:
            OPTIONS[name].check("--" + name.replace("_", "-"), value, DataError)
    if not isinstance(text_field, str):
        raise DataError(f"text_field must be the name of a column or JSON key, not {shown(text_field)}")
    if val_fraction is not None and val:
        raise DataError("give --val or --val-fraction, not both")
    if vocab_size is not None and tokenizer is not None:
        raise DataError("give --tokenizer or --vocab-size, not both")
    with writing(out, DataError, "; nothing was left there"), _stoppable():
        if any(str(s).startswith("fineweb:") for s in sources):
            if len(sources) > 1 or val or tokenizer or vocab_size or val_fraction:
                raise DataError("fineweb:... comes with its own tokenizer and validation split; give it alone")
            return _prepare_published(str(sources[0]), out, progress)
        if isinstance(tokenizer, (str, Path)):
            tokenizer = Tokenizer.load(tokenizer)
        if tokenizer is not None and tokenizer.vocab_size > MAX_VOCAB:
            raise DataError(f"the tokenizer has {tokenizer.vocab_size:,} pieces; 16-bit shards hold at most 65,535")
        with _standard_input([*sources, *(val or [])]) as typed:
            reading = _Reading([typed or s if str(s) == "-" else s for s in sources], text_field, progress)
            val_reading = _Reading([typed or s if str(s) == "-" else s for s in val or []], text_field, progress)
            if not sum(1 for _ in reading.documents("reading")):
                raise DataError(f"no text in {', '.join(map(str, reading.sources))}: every document is empty")
            tokenizer = tokenizer or _choose_tokenizer(reading, vocab_size)
            description = {"sources": [_source_name(source) for source in sources], "seed": seed}
            return _prepare_texts(reading, val_reading, out, tokenizer, val_fraction or 0.02, description)


def _source_name(source: str | Path) -> str:
    """A source as data.json keeps it: without the folders above it."""
    name = str(source)
    return name if name in ("stdlib", "-") or name.startswith("hf:") else Path(source).resolve().name


@contextlib.contextmanager
def _standard_input(sources: Sequence[str | Path]) -> Iterator[Path | None]:
    """Standard input as a file, where a source asks for it: sources are read more than once."""
    if "-" not in map(str, sources):
        yield None
        return
    if [str(s) for s in sources].count("-") > 1:
        raise DataError("- (standard input) can be given once")
    with tempfile.TemporaryDirectory(prefix="mezzotint-") as folder:
        path = Path(folder, "standard input.txt")
        with writing(path, DataError), path.open("wb") as file:
            shutil.copyfileobj(sys.stdin.buffer, file)
        yield path


@contextlib.contextmanager
def _stoppable() -> Iterator[None]:
    """SIGTERM becomes Interrupted, so that what is half written is taken away."""

    def stop(*_: object) -> None:
        raise Interrupted("stopped by SIGTERM; nothing was written")

    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


class _Reading:
    """Sources that are read several times, with the account of the first reading and progress by bytes."""

    def __init__(self, sources: Sequence[str | Path], text_field: str, progress: OnProgress | None) -> None:
        self.sources, self.text_field, self.progress = sources, text_field, progress
        self.account = Account()
        self.count = self.size = 0  # documents and bytes of the whole text, once it has been read

    def documents(self, what: str) -> Iterator[str | LongText]:
        """All documents, reported as `what`: how many, how many bytes, the time left once the size is known."""
        account, count, size, started = Account(), 0, 0, time.monotonic()
        for source in self.sources:
            for text in long_documents(source, self.text_field, account):
                count, size = count + 1, size + sum(len(part.encode()) for part in _stretches(text))
                if self.progress and count % 256 == 0:
                    left = (self.size - size) / size * (time.monotonic() - started) if self.size else 0.0
                    said = f", {left / 60:.0f} min left" if left > 90 else f", {left:.0f} s left" if self.size else ""
                    self.progress(Progress(f"{what} ({size / 1e6:,.1f} MB{said}): {count:,} documents", count))
                yield text
        self.account, self.count, self.size = account, count, size


def _choose_tokenizer(reading: _Reading, vocab_size: int | None) -> Tokenizer:
    """Train one on a sample of the text: of `vocab_size` pieces, or of the first default that the text can fill."""
    fitting = [pieces for pieces in DEFAULT_VOCAB_SIZES if pieces <= max(1024, reading.size // BYTES_PER_PIECE)]
    for pieces in (vocab_size,) if vocab_size else fitting:
        texts = reading.documents("sampling for the tokenizer")
        try:
            return train_tokenizer(_sample(texts, TOKENIZER_SAMPLE_BYTES, reading.size), pieces)
        except DataError:
            if pieces in (vocab_size, DEFAULT_VOCAB_SIZES[-1]):
                raise
    raise AssertionError("no default size")


def _prepare_texts(
    reading: _Reading, val: _Reading, out: Path, tokenizer: Tokenizer, val_fraction: float, description: dict[str, Any]
) -> dict[str, Any]:
    """Write the data folder of sources that have been read once. description: the names of the sources and the seed."""
    count = reading.count
    chosen: set[int] = set()
    if not val.sources and count > 1:
        held = min(count - 1, max(1, round(count * val_fraction)))
        chosen = set(seeding.numpy_generator(description["seed"]).choice(count, held, replace=False).tolist())
    with atomic_folder(out) as folder:
        train_split = _SplitWriter(folder, "train", tokenizer)
        val_split = _SplitWriter(folder, "val", tokenizer)
        try:
            for i, text in enumerate(reading.documents("encoding")):
                if not val.sources and count == 1:
                    first, last = _halves(text, val_fraction)
                    train_split.add(first)
                    val_split.add(last)
                else:
                    (val_split if i in chosen else train_split).add(text)
            for text in val.documents("encoding validation"):
                val_split.add(text)
            report: dict[str, Any] = {"train": train_split.finish(), "val": val_split.finish()}
        finally:
            train_split.shards.discard()
            val_split.shards.discard()
        if report["val"]["documents"] == 0:
            raise DataError("the validation sources hold no text")
        report["vocab_size"] = tokenizer.vocab_size
        report["bytes_per_token"] = report["train"]["bytes"] / report["train"]["tokens"]
        report["files"] = (reading.account + val.account).to_dict()
        _write_description(folder, tokenizer, report, description)
    return report


def _write_description(folder: Path, tokenizer: Tokenizer, report: dict[str, Any], more: dict[str, Any]) -> None:
    (folder / tokenizer.file_name).write_bytes(tokenizer.serialized)
    sums = {path.name: checksums(path) for path in sorted(folder.glob("*.bin"))}
    description = {"format": FORMAT, "tokenizer_sha256": tokenizer.sha256, **report, **more, "checksums": sums}
    (folder / "data.json").write_text(json.dumps(description, indent=1))


def _prepare_published(source: str, out: Path, progress: OnProgress | None) -> dict[str, Any]:
    """Fetch `fineweb:VARIANT[:SHARDS]`, the challenge's published shards, through huggingface_hub."""
    words = source.split(":")
    if len(words) not in (2, 3) or not words[1] or (len(words) == 3 and not re.fullmatch("[0-9]{1,9}", words[2])):
        raise DataError(f"{shown(source)}: write fineweb:sp1024, or fineweb:sp1024:10 for 10 training shards")
    name = f"fineweb10B_{words[1]}"
    published = extra("published")

    def fetch(path: str) -> Path:
        if progress:
            progress(Progress(f"fetching {path}"))
        return published.fetch(path)

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
    shards_asked = int(words[2]) if len(words) == 3 else train_files
    if not 1 <= shards_asked <= train_files:
        raise DataError(f"{name} has {train_files} training shards; ask for 1 to {train_files}, not {shards_asked}")
    if val_files < 1:
        raise DataError(f"the published {name} has no validation shards")
    tokenizer = Tokenizer.load(fetch(f"tokenizers/{Path(model).name}"))
    with atomic_folder(out) as folder:
        for split, shards in (("val", val_files), ("train", shards_asked)):
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
                progress(Progress(f"counting bytes: {split}"))
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
