"""Bytes in and out: bounded reads, variable-length numbers, LZMA, and cutting a stream into frames.

Knows nothing of models or of what the bytes mean.
"""

from __future__ import annotations

import lzma
from collections.abc import Iterator
from typing import BinaryIO

from mezzotint.errors import DataError

DAMAGED = "the compressed file is damaged"
FRAME_BYTES = 1 << 20
LZMA_MEMORY = 64 << 20


def varint(value: int) -> bytes:
    """LEB128: seven bits a byte, the lowest first."""
    out = bytearray()
    while True:
        value, low = value >> 7, value & 0x7F
        out.append(low | (0x80 if value else 0))
        if not value:
            return bytes(out)


class Reader:
    """Bounded reads from a stream; running out is a DataError."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.taken = b""

    def bytes(self, count: int) -> bytes:
        """The next `count` bytes. Raises DataError where there are fewer."""
        parts: list[bytes] = []
        while count > 0:
            part = self.file.read(count)  # a pipe may give less
            if not part:
                raise DataError("the compressed file is cut short")
            parts.append(part)
            count -= len(part)
        data = b"".join(parts)
        self.taken += data
        return data

    def varint(self, most: int) -> int:
        """A number. Raises DataError if it exceeds `most`, or does not end."""
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


def squeeze(data: bytes) -> bytes:
    """LZMA, the `.lzma` format."""
    return lzma.compress(data, format=lzma.FORMAT_ALONE, preset=6)


def unsqueeze(data: bytes, size: int) -> bytes:
    """LZMA back to exactly `size` bytes, without ever holding more. Raises DataError for other sizes and damaged data."""
    try:
        decoder = lzma.LZMADecompressor(format=lzma.FORMAT_ALONE, memlimit=LZMA_MEMORY)
        out = decoder.decompress(data, max_length=size + 1)
    except lzma.LZMAError as error:
        raise DataError(DAMAGED) from error
    if len(out) != size:
        raise DataError(DAMAGED)
    return out


def frames(file: BinaryIO) -> Iterator[bytes]:
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
