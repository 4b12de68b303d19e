"""Lossless compression of any bytes with a model's next-token likelihood: `.mzz` files.

A file of version 2 opens on every machine, because the probabilities come from exact arithmetic (`exact`); FORMAT.md has
its bytes. Version 1 is read where it could be read before (`version1`). Does not know how models are made or stored.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import math
import os
import shutil
import sys
import tempfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from mezzotint.compression import version1
from mezzotint.compression.blocks import DAMAGED, FRAME_BYTES, Reader, frames, squeeze, unsqueeze, varint
from mezzotint.compression.coder import (
    Decoder,
    Encoder,
    Streams,
    Tick,
    choose_streams,
    decode_runs,
    decode_tokens,
    encode_runs,
    encode_tokens,
    most_streams,
)
from mezzotint.compression.exact import ExactNetwork
from mezzotint.compression.frames import TextFrame, put_together, read_side, take_apart
from mezzotint.errors import ConfigError, DataError
from mezzotint.files import atomic_file, refuse_pointer, writing
from mezzotint.network.model import Model
from mezzotint.progress import OnProgress, Progress
from mezzotint.scoring.journal import model_digest

MAGIC, MAGIC_1 = b"MZZ2", b"MZZ1"
ARITHMETICS = (1, 2)
"""Of files that are read; the last one is written. In 1 half windows are read anew, in 2 they slide."""
END, STORED, LZMA, MODEL, MODELLED, REST = range(6)
DIGEST = 16
MOST_STORED = 1 << 24
EXPANSION = 64
"""Bytes by which a file is larger than its input at most."""
LONG = 8192  # tokens of a frame from which on a probe pays
HOPE = 1.25  # how much dearer than its rival a probe may be: its tokens have less context than most
STANDARD = Path("-")
"""Called with (bytes done, bytes in all; 0 if unknown)."""


@dataclass(frozen=True)
class CompressionReport:
    """What a compression came to. model_bits: what the coder had to pay, -log2 of the coded tokens' probabilities.

    rest_bytes: input that the model did not code. checked: the file was restored and compared.
    """

    input_bytes: int
    output_bytes: int
    tokens: int
    rest_bytes: int
    model_bits: float
    checked: bool = False

    @property
    def bpb(self) -> float:
        """Bits of the whole file per byte of input; 0 for empty input."""
        return 8 * self.output_bytes / self.input_bytes if self.input_bytes else 0.0


class _Network:
    """A model and, once it is needed, its exact arithmetic."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self._exact: ExactNetwork | None = None

    @property
    def exact(self) -> ExactNetwork:
        if self._exact is None:
            self._exact = ExactNetwork(self.model)
        return self._exact

    @property
    def block(self) -> bytes:
        """The block that names the model and the arithmetic."""
        return bytes([MODEL]) + bytes.fromhex(model_digest(self.model)) + bytes([ARITHMETICS[-1]])


class _Writer:
    """Writes blocks such that the whole never exceeds the input by more than 64 bytes."""

    def __init__(self, target: BinaryIO) -> None:
        self.target = target
        self.written = self.read = 0
        self.stored = bytearray()
        self.open_end = False
        self._put(MAGIC)

    def _put(self, data: bytes | bytearray) -> None:
        self.target.write(data)
        self.written += len(data)

    def block(self, block: bytes, data: bytes) -> None:
        """A block that is shorter than the input `data` that it stands for."""
        self._flush()
        self._put(block)
        self.read += len(data)

    def store(self, data: bytes) -> None:
        """Input as it is; stretches of it are joined."""
        if self.open_end:
            self._put(data)
            return
        self.stored += data
        if len(self.stored) > MOST_STORED - FRAME_BYTES:
            self._flush()

    def _flush(self) -> None:
        if not self.stored:
            return
        head = bytes([STORED]) + varint(len(self.stored))
        if self.written + len(head) - self.read > EXPANSION - DIGEST - 1:
            self.open_end = True  # all that follows is stored, up to the digest
            head = bytes([REST])
        self._put(head)
        self._put(self.stored)
        self.read += len(self.stored)
        self.stored.clear()

    def finish(self, digest: bytes) -> int:
        """Write the end; returns all bytes written."""
        self._flush()
        self._put((b"" if self.open_end else bytes([END])) + digest)
        return self.written


def compress_stream(
    source: BinaryIO, target: BinaryIO, model: Model, *, progress: OnProgress | None = None, size: int = 0
) -> CompressionReport:
    """Compress `source` to `target`, a MiB at a time, so that memory stays flat for any length.

    size: the input's length, for `progress` alone. Raises ConfigError for a model that did not learn next tokens.
    """
    if not model.trained_causally:
        raise ConfigError(
            "compress needs a model that learnt next tokens: train with --causal-share above 0, or name the shipped prose"
        )
    network, out, digest = _Network(model), _Writer(target), hashlib.sha256()
    read = tokens = rest = 0
    bits, named = 0.0, False
    for data in frames(source):
        digest.update(data)

        def tick(share: float, before: int = read, frame: int = len(data)) -> None:
            if progress:
                progress(Progress.of_bytes(before + int(share * frame), size))

        squeezed = squeeze(data) if not out.open_end else data
        block = bytes([LZMA]) + _body(len(data), squeezed)
        found = None
        if not out.open_end:
            found = _modelled(data, network, min(len(block), len(data)), tick)
        if found is not None:
            frame, body, cost = found
            modelled = (b"" if named else network.block) + bytes([MODELLED]) + _body(len(data), body)
            if len(modelled) < min(len(block), len(data)):
                block, named = modelled, True
                tokens, bits, rest = tokens + len(frame.tokens), bits + cost, rest + frame.rest_bytes - len(data)
        rest += len(data)
        if len(block) < len(data) and not out.open_end:
            out.block(block, data)
        else:
            out.store(data)
        read += len(data)
        tick(0.0, read)
    return CompressionReport(read, out.finish(digest.digest()[:DIGEST]), tokens, rest, bits)


def _body(size: int, body: bytes) -> bytes:
    """How a block goes on after its kind: bytes of input, bytes of body, body, CRC-32 of the body."""
    return varint(size) + varint(len(body)) + body + zlib.crc32(body).to_bytes(4, "little")


def _modelled(data: bytes, network: _Network, rival: int, tick: Tick) -> tuple[TextFrame, bytes, float] | None:
    """The frame, its body and the bits of its tokens; None where there is no text or a probe says that `rival` wins."""
    frame = take_apart(data, network.model)
    if frame is None or len(frame.packed) >= rival:
        return None
    exact, count = network.exact, len(frame.tokens)
    streams, encoder = choose_streams(exact, count), Encoder()
    most = 8 * (HOPE * rival - len(frame.packed)) if count > LONG else math.inf
    bits = encode_tokens(exact, frame.tokens, streams, encoder, tick, most)
    if bits == math.inf:
        return None
    encode_runs(frame.folded, frame.kinds, frame.number, encoder)
    return frame, varint(len(frame.packed)) + frame.packed + varint(streams.number) + encoder.finish(), bits


def decompress_stream(source: BinaryIO, target: BinaryIO, model: Model, *, progress: OnProgress | None = None) -> int:
    """Write the original bytes to `target` and return their number.

    Raises DataError: not a compressed file, damaged, of a newer version, or made with another model. What was written
    to `target` before an error is not to be used.
    """
    reader = Reader(source)
    try:
        magic = reader.bytes(4)
    except DataError:
        magic = b""
    if magic == MAGIC_1:
        return version1.decompress_rest(source, target, model, progress)
    if magic[:3] != MAGIC[:3]:
        refuse_pointer(magic + source.read(64), "this", DataError)
        raise DataError("not a compressed file: it does not begin with MZZ2")
    if magic != MAGIC:
        raise DataError("the compressed file is of a newer version: upgrade mezzotint")
    network, arithmetic = _Network(model), 0
    digest, total = hashlib.sha256(), 0
    while True:
        reader.taken = b""
        kind = reader.bytes(1)[0]
        if kind == END:
            if reader.bytes(DIGEST) != digest.digest()[:DIGEST]:
                raise DataError("the compressed file is damaged: its checksum is wrong")
            if source.read(1):
                raise DataError("the compressed file is damaged: something follows its end")
            return total
        if kind == REST:
            return total + _copy_rest(source, target, digest)
        if kind == MODEL:
            arithmetic = _check_model(reader.bytes(33), network)
            continue

        def tick(done: float, before: int = total) -> None:
            if progress:
                progress(Progress.of_bytes(before + int(done)))

        data = _block(kind, reader, network, arithmetic, tick)
        digest.update(data)
        target.write(data)
        total += len(data)
        if progress:
            progress(Progress.of_bytes(total))


def _check_model(block: bytes, network: _Network) -> int:
    """The arithmetic of a file that was made with this model. Raises DataError."""
    if block[32] not in ARITHMETICS:
        raise DataError(f"the compressed file needs arithmetic {block[32]}: upgrade mezzotint")
    if block[:32] != network.block[1:33]:
        raise DataError(
            f"the file was compressed with another model: name that one (its SHA-256 begins with {block[:6].hex()})"
        )
    return block[32]


def _copy_rest(source: BinaryIO, target: BinaryIO, digest: hashlib._Hash) -> int:
    """Copy all but the last 16 bytes, which are the digest; returns how many."""
    total, kept = 0, b""
    while part := source.read(1 << 20):
        kept += part
        data, kept = kept[:-DIGEST], kept[-DIGEST:]
        digest.update(data)
        target.write(data)
        total += len(data)
    if len(kept) < DIGEST:
        raise DataError("the compressed file is cut short")
    if kept != digest.digest()[:DIGEST]:
        raise DataError("the compressed file is damaged or cut short: its checksum is wrong")
    return total


def _block(kind: int, reader: Reader, network: _Network, arithmetic: int, tick: Tick) -> bytes:
    """The input that a block stands for. arithmetic: 0 as long as no block named the model. tick: told bytes of it."""
    if kind == STORED:
        return reader.bytes(reader.varint(MOST_STORED))
    if kind not in (LZMA, MODELLED):
        raise DataError(DAMAGED)
    size = reader.varint(FRAME_BYTES)
    body = reader.bytes(reader.varint(FRAME_BYTES))
    if zlib.crc32(body).to_bytes(4, "little") != reader.bytes(4):
        raise DataError(DAMAGED)
    if kind == LZMA:
        return unsqueeze(body, size)
    if not arithmetic:
        raise DataError(DAMAGED)
    inside = Reader(io.BytesIO(body))
    side = read_side(inside.bytes(inside.varint(FRAME_BYTES)), size)
    streams = Streams(side.tokens, inside.varint(most_streams(network.exact)))
    if not 1 <= streams.number <= max(1, streams.count):
        raise DataError(DAMAGED)
    decoder = Decoder(inside.file.read())
    tokens = decode_tokens(network.exact, streams, decoder, lambda share: tick(share * size), slides=arithmetic > 1)
    data = put_together(side, tokens, network.model, lambda texts, number: decode_runs(texts, number, decoder))
    decoder.finish()
    if len(data) != size:
        raise DataError(DAMAGED)
    return data


def compress(data: bytes, model: Model) -> bytes:
    """The compressed form of `data`, at most 64 bytes longer than it. Raises ConfigError: `model` learnt no next tokens."""
    target = io.BytesIO()
    compress_stream(io.BytesIO(data), target, model, size=len(data))
    return target.getvalue()


def decompress(data: bytes, model: Model) -> bytes:
    """The bytes that `compress` was given. data: what it returned; model: the same as there.

    Raises DataError: not compressed, damaged, of a newer version, or made with another model.
    """
    target = io.BytesIO()
    decompress_stream(io.BytesIO(data), target, model)
    return target.getvalue()


class _Compare(io.RawIOBase):
    """A target that keeps nothing but the digest of what is written."""

    def __init__(self) -> None:
        self.digest = hashlib.sha256()

    def write(self, data: bytes) -> int:  # type: ignore[override]
        self.digest.update(data)
        return len(data)


class _Hashed(io.RawIOBase):
    """A source that takes the digest of what is read from it."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.digest = file, hashlib.sha256()

    def read(self, size: int = -1) -> bytes:
        data = self.file.read(size)
        self.digest.update(data)
        return data


def compress_file(
    source: Path, target: Path, model: Model, *, check: bool = False, progress: OnProgress | None = None
) -> CompressionReport:
    """Compress the file `source` to `target`, which appears whole or not at all; `-` is standard input or output.

    check: restore the result and compare it with what was read before it appears. See `compress_stream`.
    Raises DataError where a file cannot be read or written or the check fails, and as `compress_stream` does.
    """
    with _opened(source) as (file, size), _appearing(target) as out:
        hashed = _Hashed(file)
        report = compress_stream(hashed, out, model, progress=progress, size=size)  # type: ignore[arg-type]
        if check:
            out.seek(0)
            restored = _Compare()
            decompress_stream(out, restored, model, progress=progress)  # type: ignore[arg-type]
            if restored.digest.digest() != hashed.digest.digest():
                raise DataError(
                    "the compressed file does not restore to its input: please report this; nothing written"
                )
            out.seek(0, io.SEEK_END)
        return CompressionReport(**{**vars(report), "checked": check})


def decompress_file(source: Path, target: Path, model: Model, *, progress: OnProgress | None = None) -> int:
    """Decompress `source` to `target`, which appears whole and checked or not at all; returns its bytes.

    `-`: see `compress_file`. Raises DataError where a file cannot be read or written, and as `decompress_stream` does.
    """
    with _opened(source) as (file, _), _appearing(target) as out:
        return decompress_stream(file, out, model, progress=progress)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[tuple[BinaryIO, int]]:
    """The file to read and its bytes, 0 where that is not known."""
    if Path(path) == STANDARD:
        yield sys.stdin.buffer, 0
        return
    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context(Path(path).open("rb"))
            size = os.fstat(file.fileno()).st_size
        except OSError as error:
            raise DataError(f"cannot read {path}: {error.strerror}") from error
        yield file, size


@contextlib.contextmanager
def _appearing(path: Path) -> Iterator[BinaryIO]:
    """A file that takes the name `path`, or goes to standard output, once everything is written."""
    if Path(path) == STANDARD:
        with tempfile.TemporaryFile() as file:
            yield file  # type: ignore[misc]
            file.seek(0)
            shutil.copyfileobj(file, sys.stdout.buffer)
            sys.stdout.buffer.flush()
        return
    with writing(path, DataError), atomic_file(path) as file:
        yield file
