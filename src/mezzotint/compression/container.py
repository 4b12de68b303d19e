"""Lossless compression of any bytes with a model's chain rule: the likelihood, cashed in.

Text becomes tokens, tokens become windows, and a range coder (`constriction`) spends -log2 p(token) bits on each, with
p as `evaluate.causal` or `evaluate.chain_rule` has it. What the tokenizer changes (it may fold line ends and runs of
spaces into one space, normalise characters, or know no token for them) is kept beside the tokens as whitespace and
edits, and what is not text at all is kept as it is, so every input comes back exactly. Does not know how models are
made or stored.

File format `.mzz`, version 1; integers are LEB128 varints unless a width is given:

    "MZZ1"                                                        magic and version
    model 16 bytes | "order attention": length, ASCII | rows | threads        what is needed to decode
    numerics 8 bytes                                              see below
    frame*                                                        each of at most 1 MiB of input
    0 | SHA-256 of the whole input, 32 bytes                      the end

    frame: bytes of input (at least 1) | mode 1 byte | body: length, bytes | CRC-32 of the frame so far, 4 bytes
    mode 0: the input itself; 1: the input under LZMA; 2: modelled:
      side: length, 1 byte (1: under LZMA, then its length in full), bytes; holds
        count of segments, each kind 1 byte, then: kind 0, text: tokens, edits; kind 1, the rest: bytes
        1 byte: runs of whitespace were folded; if so the 15 commonest runs: count, each length and bytes
        per edit: tokenizer's bytes since the edit before, bytes dropped, bytes put in their place: length, bytes
        uncommon runs: each length, bytes; then all bytes of kind 1
      whitespace: length, words of the range coder, see `encode_runs`
      words of the range coder over the tokens of all text segments, each led by BOS; 32 bits, little-endian

Decoding repeats the encoder's arithmetic, so it must be the same arithmetic. Guaranteed: the same model, torch build,
kind of processor and number of threads decode what they encoded; probabilities are integers (of 2^24) before they
reach the coder. Another build or processor may round a logit differently. To notice before, not after, the header
holds the hash of coded probe windows; if they do not code alike here, decoding stops with an error that says so.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import lzma
import os
import tempfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch

from mezzotint.compression.coder import DAMAGED, NEXT, _Code, _Coder, numerics
from mezzotint.compression.text import COMMON, REST, TEXT, apply_edits, decode_runs, encode_runs, folds, segments
from mezzotint.config import parse_attention
from mezzotint.errors import ConfigError, DataError
from mezzotint.files import sync_folder
from mezzotint.model import TOKENS_PER_FORWARD, Model
from mezzotint.scoring.journal import model_digest
from mezzotint.scoring.orders import reveal_order

MAGIC = b"MZZ1"
FRAME_BYTES = 1 << 20
STORED, LZMA, MODELLED = 0, 1, 2
Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all; 0 if unknown)."""


@dataclass(frozen=True)
class CompressionReport:
    """What a compression came to. model_bits: what the range coder had to pay, -log2 of the coded probabilities.

    order: how the tokens were coded. rest_bytes: input that the model did not code.
    """

    input_bytes: int
    output_bytes: int
    tokens: int
    rest_bytes: int
    model_bits: float
    forward_passes: int
    order: str

    @property
    def bpb(self) -> float:
        """Bits of the whole file per byte of input; 0 for empty input."""
        return 8 * self.output_bytes / self.input_bytes if self.input_bytes else 0.0


def _varint(value: int) -> bytes:
    out = bytearray()
    while True:
        value, low = value >> 7, value & 0x7F
        out.append(low | (0x80 if value else 0))
        if not value:
            return bytes(out)


class _Reader:
    """Bounded reads from a stream; running out is a DataError."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.taken = b""

    def bytes(self, count: int) -> bytes:
        data = self.file.read(count)
        self.taken += data
        if len(data) != count:
            raise DataError("the compressed file is cut short")
        return data

    def varint(self, most: int) -> int:
        value = shift = 0
        while True:
            byte = self.bytes(1)[0]
            value |= (byte & 0x7F) << shift
            shift += 7
            if not byte & 0x80:
                break
            if shift > 35:
                raise DataError(DAMAGED)
        if value > most:
            raise DataError(DAMAGED)
        return value


def _squeeze(data: bytes) -> bytes:
    return lzma.compress(data, format=lzma.FORMAT_ALONE, preset=6)


def _unsqueeze(data: bytes, size: int) -> bytes:
    """LZMA back to exactly `size` bytes, without ever holding more."""
    try:
        decoder = lzma.LZMADecompressor(format=lzma.FORMAT_ALONE, memlimit=64 << 20)
        out = decoder.decompress(data, max_length=size + 1)
    except lzma.LZMAError as error:
        raise DataError(DAMAGED) from error
    if len(out) != size:
        raise DataError(DAMAGED)
    return out


def _frames(file: BinaryIO) -> Iterator[bytes]:
    """The input in pieces of at most 1 MiB, cut after a line, a word or a character where one is near."""
    kept = b""
    while True:
        fresh = file.read(FRAME_BYTES - len(kept))
        data = kept + fresh
        if not data:
            return
        if len(data) < FRAME_BYTES:
            # A short read is not always the end (pipes), so only an empty one is.
            kept = data
            if fresh:
                continue
            yield data
            return
        cut = max(data.rfind(b"\n", len(data) - 4096), data.rfind(b" ", len(data) - 4096)) + 1
        if cut <= 0:
            cut = len(data)
            while cut > len(data) - 4 and data[cut - 1] & 0xC0 == 0x80:
                cut -= 1
            if data[cut - 1] >= 0xC0:
                cut -= 1
        yield data[:cut]
        kept = data[cut:]


def compress_stream(
    source: BinaryIO,
    target: BinaryIO,
    model: Model,
    *,
    order: str | None = None,
    attention: str = "full",
    rows: int | None = None,
    progress: Progress | None = None,
    size: int = 0,
) -> CompressionReport:
    """Compress `source` to `target`, a MiB at a time, so that memory stays flat for any length.

    order: `next`, the code of `evaluate.causal`, for weights trained on next tokens too: with keys and values kept it
    costs one forward pass per window; or an order of `orders.reveal_order`, of which `left` is usually smallest and
    costs a pass per token. Default: `next` for such weights, else `left`. attention: of the canvas, for orders other
    than `next`. rows: windows that go through the network together (default: what holds 16,384 tokens). size: the
    input's length, for `progress` alone. Raises DataError for an unknown order, ConfigError for a attention.
    """
    length = model.config.sequence_length
    if order is None:
        order = NEXT if model.trained_causally else "left"
    code = _Code(order, attention, rows or max(1, TOKENS_PER_FORWARD // length))
    _check(code, length)
    name = f"{order} {attention}".encode("ascii")
    header = MAGIC + _model_id(model) + _varint(len(name)) + name
    header += _varint(code.rows) + _varint(torch.get_num_threads()) + numerics(model, code)
    target.write(header)
    written, read, tokens, rest_bytes, bits, passes = len(header), 0, 0, 0, 0.0, 0
    digest = hashlib.sha256()
    for data in _frames(source):
        digest.update(data)

        def tick(share: float, before: int = read, frame: int = len(data)) -> None:
            if progress:
                progress(before + int(share * frame), size)

        part = _encode_frame(data, model, code, tick)
        frame = _varint(len(data)) + bytes([part.mode]) + _varint(len(part.body)) + part.body
        frame += zlib.crc32(frame).to_bytes(4, "little")
        target.write(frame)
        written += len(frame)
        read += len(data)
        tokens, rest_bytes = tokens + part.tokens, rest_bytes + part.rest_bytes
        bits, passes = bits + part.bits, passes + part.passes
        if progress:
            progress(read, size)
    target.write(b"\0" + digest.digest())
    return CompressionReport(read, written + 33, tokens, rest_bytes, bits, passes, order)


def _model_id(model: Model) -> bytes:
    return hashlib.sha256(model_digest(model).encode()).digest()[:16]


def _check(code: _Code, length: int) -> None:
    """Raise the error that an order, attention or number of rows deserves before anything is computed."""
    if code.order != NEXT:
        reveal_order(code.order, length)
    parse_attention(code.attention)
    if not 1 <= code.rows <= 4096:
        raise DataError("rows must be between 1 and 4096")


@dataclass(frozen=True)
class _Frame:
    """An encoded frame; tokens and bits are 0 unless the model coded it."""

    mode: int
    body: bytes
    tokens: int
    rest_bytes: int
    bits: float
    passes: int


def _encode_frame(data: bytes, model: Model, code: _Code, tick: Callable[[float], None]) -> _Frame:
    """The shortest of the three modes."""
    squeezed = _squeeze(data)
    mode, body = (LZMA, squeezed) if len(squeezed) < len(data) else (STORED, data)
    modelled = _modelled(data, model, code, tick)
    if modelled is not None and len(modelled.body) < len(body):
        return modelled
    return _Frame(mode, body, 0, len(data), 0.0, modelled.passes if modelled else 0)


def _modelled(data: bytes, model: Model, code: _Code, tick: Callable[[float], None]) -> _Frame | None:
    """The frame with its text coded by the model; None where there is no text."""
    fold = folds(model)
    parts = segments(model, data, fold)
    texts = [part for part in parts if part.ids is not None]
    if not texts:
        return None
    table = [_varint(len(parts))]
    for part in parts:
        if part.ids is None:
            table.append(bytes([REST]) + _varint(len(part.data)))
        else:
            table.append(bytes([TEXT]) + _varint(len(part.ids)) + _varint(len(part.edits)))
    runs = [run for text in texts for run in text.runs]
    common = [run for run, _ in Counter(runs).most_common(COMMON)]
    table.append(bytes([fold]))
    if fold:
        table += [_varint(len(common)), *(_varint(len(run)) + run for run in common)]
    for text in texts:
        for keep, drop, put in text.edits:
            table += [_varint(keep), _varint(drop), _varint(len(put)), put]
    number = {run: i for i, run in enumerate(common)}
    kinds = np.array([number.get(run, len(common)) for run in runs], dtype=np.int64)
    table += [_varint(len(run)) + run for run in runs if run not in number]
    rest = b"".join(part.data for part in parts if part.ids is None)
    side = b"".join([*table, rest])
    packed = _squeeze(side)
    packed = b"\1" + _varint(len(side)) + packed if len(packed) + 3 < len(side) else b"\0" + side
    spaces = encode_runs([text.folded for text in texts], kinds, len(common) + 1) if fold else b""
    stream = [t for text in texts for t in (model.tokenizer.bos_id, *(text.ids or ()))]
    coder = _Coder(model, code, None)
    coder.run(len(stream), np.array(stream, dtype=np.int64), tick)
    body = _varint(len(packed)) + packed + _varint(len(spaces)) + spaces + coder.words()
    return _Frame(MODELLED, body, len(stream), len(rest), coder.bits, coder.passes)


def decompress_stream(source: BinaryIO, target: BinaryIO, model: Model, *, progress: Progress | None = None) -> int:
    """Write the original bytes to `target` and return their number.

    Raises DataError: not a compressed file, damaged, of a newer version, made with another model, or on a machine
    whose arithmetic differs. What was written to `target` before an error is not to be used.
    """
    reader = _Reader(source)
    magic = source.read(4)
    if magic[:3] != MAGIC[:3]:
        raise DataError("not a compressed file: it does not begin with MZZ1")
    if magic != MAGIC:
        raise DataError("the compressed file is of another version: use the mezzotint that wrote it, or a newer one")
    if reader.bytes(16) != _model_id(model):
        raise DataError("the file was compressed with another model: name that one")
    name = reader.bytes(reader.varint(64)).decode("ascii", "replace")
    order, _, attention = name.partition(" ")
    code = _Code(order, attention, reader.varint(4096))
    try:
        _check(code, model.config.sequence_length)
    except (DataError, ConfigError) as error:
        raise DataError(DAMAGED) from error
    threads = reader.varint(4096)
    expected = reader.bytes(8)
    used = torch.get_num_threads()
    try:
        torch.set_num_threads(max(1, threads))
        if numerics(model, code) != expected:
            raise DataError(
                "this machine or torch build rounds differently from the one that compressed the file: decompress there"
            )
        digest = hashlib.sha256()
        total = 0
        while True:
            reader.taken = b""
            size = reader.varint(FRAME_BYTES)
            if size == 0:
                break
            mode = reader.bytes(1)[0]
            body = reader.bytes(reader.varint(FRAME_BYTES))
            if zlib.crc32(reader.taken).to_bytes(4, "little") != reader.bytes(4):
                raise DataError(DAMAGED)

            def tick(share: float, before: int = total, frame: int = size) -> None:
                if progress:
                    progress(before + int(share * frame), 0)

            data = _decode_frame(mode, body, size, model, code, tick)
            digest.update(data)
            target.write(data)
            total += size
            if progress:
                progress(total, 0)
        if reader.bytes(32) != digest.digest() or source.read(1):
            raise DataError("the compressed file is damaged, or decoded with other arithmetic: its checksum is wrong")
    finally:
        torch.set_num_threads(used)
    return total


def _decode_frame(mode: int, body: bytes, size: int, model: Model, code: _Code, tick: Callable[[float], None]) -> bytes:
    if mode == STORED:
        data = body
    elif mode == LZMA:
        data = _unsqueeze(body, size)
    elif mode == MODELLED:
        data = _decode_modelled(body, size, model, code, tick)
    else:
        raise DataError(DAMAGED)
    if len(data) != size:
        raise DataError(DAMAGED)
    return data


def _decode_modelled(body: bytes, size: int, model: Model, code: _Code, tick: Callable[[float], None]) -> bytes:
    reader = _Reader(io.BytesIO(body))
    packed = reader.bytes(reader.varint(FRAME_BYTES))
    coded = reader.bytes(reader.varint(FRAME_BYTES))
    words = reader.file.read()
    # Side information can be longer than the input it belongs to only by what its numbers take.
    inside = _Reader(io.BytesIO(packed[1:]))
    if packed[:1] == b"\1":
        length = inside.varint(8 * FRAME_BYTES)
        inside = _Reader(io.BytesIO(_unsqueeze(inside.file.read(), length)))
    table: list[tuple[int, int, int]] = []
    for _ in range(inside.varint(FRAME_BYTES)):
        kind, count = inside.bytes(1)[0], inside.varint(2 * FRAME_BYTES)
        if kind not in (TEXT, REST):
            raise DataError(DAMAGED)
        table.append((kind, count, inside.varint(FRAME_BYTES) if kind == TEXT else 0))
    fold = inside.bytes(1) == b"\1"
    common = [inside.bytes(inside.varint(size)) for _ in range(inside.varint(COMMON))] if fold else []
    texts = [(count, edits) for kind, count, edits in table if kind == TEXT]
    stream_size = sum(count + 1 for count, _ in texts)
    if stream_size > 2 * size + len(texts) or len(words) % 4 or len(coded) % 4:
        raise DataError(DAMAGED)
    most = 16 * FRAME_BYTES  # the longest that the tokens of a frame can be
    changes = [
        [(inside.varint(most), inside.varint(most), inside.bytes(inside.varint(size))) for _ in range(edits)]
        for _, edits in texts
    ]
    coder = _Coder(model, code, np.frombuffer(words, dtype="<u4").astype(np.uint32))
    try:
        stream = coder.run(stream_size, None, tick)
        folded = []
        at = 0
        for (count, _), edits in zip(texts, changes, strict=True):
            folded.append(apply_edits(model.tokenizer.decode_bytes(stream[at + 1 : at + 1 + count].tolist()), edits))
            at += count + 1
        kinds = decode_runs(folded, coded, len(common) + 1) if fold else np.zeros(0, dtype=np.int64)
    except (AssertionError, ValueError) as error:  # the range decoder met words that no encoder writes
        raise DataError(DAMAGED) from error
    lengths = np.array([*(len(run) for run in common), 1])
    if sum(map(len, folded)) + int(lengths[kinds].sum()) - len(kinds) > size:
        raise DataError(DAMAGED)
    runs = iter([common[k] if k < len(common) else inside.bytes(inside.varint(size)) for k in kinds.tolist()])
    whole = iter(folded)
    out = []
    for kind, count, _ in table:
        if kind == REST:
            out.append(inside.bytes(count))
            continue
        text = next(whole)
        first, *words = text.split(b" ") if fold else [text]
        out += [first, *(part for word in words for part in (next(runs), word))]
    return b"".join(out)


def compress(
    data: bytes, model: Model, *, order: str | None = None, attention: str = "full", rows: int | None = None
) -> bytes:
    """The compressed form of `data`. See `compress_stream`."""
    target = io.BytesIO()
    compress_stream(io.BytesIO(data), target, model, order=order, attention=attention, rows=rows)
    return target.getvalue()


def decompress(data: bytes, model: Model) -> bytes:
    """The bytes that `compress` was given. Raises DataError as `decompress_stream` does."""
    target = io.BytesIO()
    decompress_stream(io.BytesIO(data), target, model)
    return target.getvalue()


def compress_file(
    source: Path,
    target: Path,
    model: Model,
    *,
    order: str | None = None,
    attention: str = "full",
    rows: int | None = None,
    progress: Progress | None = None,
) -> CompressionReport:
    """Compress the file `source` to `target`, which appears whole or not at all. See `compress_stream`."""
    with _open(source) as file, _whole(target) as out:
        return compress_stream(
            file,
            out,
            model,
            order=order,
            attention=attention,
            rows=rows,
            progress=progress,
            size=Path(source).stat().st_size,
        )


def decompress_file(source: Path, target: Path, model: Model, *, progress: Progress | None = None) -> int:
    """Decompress the file `source` to `target`, which appears whole and checked or not at all; returns its bytes."""
    with _open(source) as file, _whole(target) as out:
        return decompress_stream(file, out, model, progress=progress)


def _open(path: Path) -> BinaryIO:
    try:
        return Path(path).open("rb")
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error


@contextlib.contextmanager
def _whole(path: Path) -> Iterator[BinaryIO]:
    """A temporary neighbour of `path` that takes its name once everything is written and on the disk."""
    path = Path(path)
    try:
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    except OSError as error:
        raise DataError(f"cannot write {path}: {error.strerror}") from error
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        Path(name).chmod(0o666 & ~umask)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    sync_folder(path.parent)
