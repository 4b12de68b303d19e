"""Files of version 1, `MZZ1`, which only like arithmetic opens: the same torch build, processor and number of threads.

Reads them; nothing writes them any more. Integers are LEB128 varints unless a width is given:

    model 16 bytes | "order attention": length, ASCII | rows | threads        what is needed to decode
    fingerprint 8 bytes                                           of the arithmetic: coded probe windows, hashed
    frame*                                                        each of at most 1 MiB of input
    0 | SHA-256 of the whole input, 32 bytes                      the end

    frame: bytes of input (at least 1) | mode 1 byte | body: length, bytes | CRC-32 of the frame so far, 4 bytes
    mode 0: the input itself; 1: the input under LZMA; 2: modelled: side information (`frames`), whitespace, and
    words of a range coder over the tokens; 32 bits, little-endian
"""

from __future__ import annotations

import hashlib
import io
import os
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

import constriction
import numpy as np
import torch
from torch import Tensor

from mezzotint import seeding
from mezzotint.compression.blocks import DAMAGED, FRAME_BYTES, Reader, unsqueeze
from mezzotint.compression.frames import put_together, read_side
from mezzotint.config import parse_attention
from mezzotint.errors import ConfigError, DataError
from mezzotint.network.model import TOKENS_PER_FORWARD, Cache, Model
from mezzotint.progress import OnProgress, Progress
from mezzotint.scoring.journal import model_digest
from mezzotint.scoring.orders import canvas_length, reveal_order

NEXT = "next"
TOTAL = 1 << 24
STORED, LZMA, MODELLED = 0, 1, 2
MOST_THREADS = max(64, os.cpu_count() or 1)

_stream: Any = getattr(constriction, "stream")  # noqa: B009 - a compiled submodule that type checkers cannot see


def integer_probabilities(logits: Tensor) -> np.ndarray:
    """Softmax rounded to integers of at least 1 that sum to 2^24. logits: [n, V]; returns float32 [n, V], exact."""
    x = logits.double().cpu().numpy()
    x = np.exp(x - x.max(axis=1, keepdims=True))
    x /= x.sum(axis=1, keepdims=True)
    counts = np.floor(x * (TOTAL - x.shape[1])).astype(np.int64) + 1
    # What rounding down left over, at most V, goes to the likeliest token.
    counts[np.arange(len(counts)), counts.argmax(axis=1)] += TOTAL - counts.sum(axis=1)
    return counts.astype(np.float32)


@torch.inference_mode()
def next_logits(cache: Cache, ids: Tensor) -> Tensor:
    """Logits [rows, V], float32, of the token after the new input `ids`, int64 [rows]: first MASK, then each token."""
    return cache.network.logits(cache.hidden(ids[:, None], size=1, keep=1)[:, 0])


@dataclass(frozen=True)
class _Code:
    """How windows are coded: the order of revelation, what sees what, and how many windows go together."""

    order: str
    attention: str
    rows: int


class _Coder:
    """Decodes the tokens of windows step by step."""

    def __init__(self, model: Model, code: _Code, words: np.ndarray) -> None:
        self.model, self.code = model, code
        # The coder adds 1 to the weights that it is given and scales them to 2^24 in all: so ours, less 1, stay.
        self.family = _stream.model.Categorical(perfect=False)
        self.decoder = _stream.queue.RangeDecoder(words)

    def run(self, count: int, tick: Callable[[float], None]) -> np.ndarray:
        """Decode `count` tokens. int64 [count]. `tick` is told the share done."""
        length = self.model.config.sequence_length
        out = np.zeros(count, dtype=np.int64)
        full = count // length
        blocks = [
            out[start * length : min(start + self.code.rows, full) * length].reshape(-1, length)
            for start in range(0, full, self.code.rows)
        ]
        if count % length:
            blocks.append(out[full * length :].reshape(1, -1))
        done = 0
        for block in blocks:
            for symbols in self._windows(block):
                done += symbols
                tick(done / count)
        return out

    def _windows(self, block: np.ndarray) -> Iterator[int]:
        """One batch of windows [B, T], in place."""
        for group, logits in self._steps(block):
            # A bounded number of rows at a time: float64 copies of all logits would be large.
            found = [
                self.decoder.decode(self.family, integer_probabilities(part) - 1).astype(np.int64)
                for part in logits.split(max(1, (1 << 23) // logits.shape[1]))
            ]
            block[:, group] = np.concatenate(found).reshape(len(block), len(group))
            yield len(block) * len(group)

    def _steps(self, block: np.ndarray) -> Iterator[tuple[np.ndarray, Tensor]]:
        """(positions, logits of them, row by row) from what `block` holds of the groups yielded before."""
        rows, length = block.shape
        model, code, mask_id = self.model, self.code, self.model.config.mask_id
        if code.order == NEXT:
            cache = Cache(model.network, rows, length)
            given = torch.full((rows,), mask_id)
            for i in range(length):
                yield np.array([i]), next_logits(cache, given)
                given = torch.from_numpy(block[:, i].copy())
            return
        canvas = torch.full((rows, length), mask_id, dtype=torch.long)
        for group in reveal_order(code.order, length):
            stop = canvas_length(parse_attention(code.attention), length, int(group.max()))
            scored = torch.zeros(rows, stop, dtype=torch.bool)
            scored[:, group] = True
            with torch.inference_mode():
                logits = model.logits(
                    canvas[:, :stop].to(model.device),
                    block_size=parse_attention(code.attention),
                    positions=scored.to(model.device),
                )
            yield group, logits
            canvas[:, group] = torch.from_numpy(np.ascontiguousarray(block[:, group]))


def numerics_fingerprint(model: Model, code: _Code) -> bytes:
    """Eight bytes that differ where a model's probabilities come out differently: coded probe windows, hashed.

    The probes have the shapes that coding uses (fewer rows) and are half revealed at random.
    """
    length = model.config.sequence_length
    draw = seeding.numpy_generator(0)
    digest = hashlib.sha256()
    for batch in sorted({1, min(code.rows, 4)}):
        ids = draw.integers(0, model.config.vocab_size + 1, size=(batch, length))
        with torch.inference_mode():
            if code.order == NEXT:
                cache = Cache(model.network, batch, min(length, 16))
                logits = torch.cat([next_logits(cache, torch.from_numpy(i)) for i in ids.T[:16]])
            else:
                scored = torch.zeros(batch, length, dtype=torch.bool)
                scored[:, :: max(1, length // 16)] = True
                ids[scored.numpy()] = model.config.mask_id
                canvas, where = torch.from_numpy(ids).to(model.device), scored.to(model.device)
                logits = model.logits(canvas, block_size=parse_attention(code.attention), positions=where)
        weights = integer_probabilities(logits)
        symbols = draw.integers(0, model.config.vocab_size, size=len(weights)).astype(np.int32)
        encoder = _stream.queue.RangeEncoder()
        encoder.encode(symbols, _stream.model.Categorical(perfect=False), weights - 1)
        digest.update(weights.tobytes() + encoder.get_compressed().astype("<u4").tobytes())
    return digest.digest()[:8]


def _rate(places: int, hits: int) -> Any:
    weights = np.array([places - hits, hits], dtype=np.float64)
    return _stream.model.Categorical(weights / places, perfect=False)


def _run_contexts(folded: list[bytes]) -> np.ndarray:
    """A small number for every space of the folded texts, the same for spaces that are alike.

    Alike in the two bytes before and the byte after, of which letters count as upper or lower only; or in fewer of
    these, where so much occurs fewer than 100 times: what a context costs must not exceed what it saves.
    """
    parts = []
    for text in folded:
        padded = np.frombuffer(b"\0\0" + text + b"\0", dtype=np.uint8).astype(np.int64)
        at = np.flatnonzero(padded[2:-1] == 32) + 2
        after = padded[at + 1]
        after = np.where((after >= 65) & (after <= 90), 65, np.where((after >= 97) & (after <= 122), 97, after))
        parts.append(np.stack((padded[at - 2], padded[at - 1], after)))
    two, one, after = np.concatenate(parts, axis=1) if parts else np.zeros((3, 0), dtype=np.int64)
    contexts = (two * 257 + one) * 257 + after
    for coarser in ((256 * 257 + one) * 257 + after, (256 * 257 + one) * 257 + 256, np.full_like(one, -1)):
        _, which, counts = np.unique(contexts, return_inverse=True, return_counts=True)
        contexts = np.where(counts[which] < 100, coarser, contexts)
    return np.unique(contexts, return_inverse=True)[1]


def _decode_runs(folded: list[bytes], coded: bytes, classes: int) -> np.ndarray:
    """The kinds that `encode_runs` was given."""
    decoder = _stream.queue.RangeDecoder(np.frombuffer(coded, dtype="<u4").astype(np.uint32))
    contexts = _run_contexts(folded)
    kinds = np.full(len(contexts), classes - 1)
    for context in range(int(contexts.max()) + 1 if len(contexts) else 0):
        left = np.flatnonzero(contexts == context)
        for kind in range(classes - 1):
            if not len(left):
                break
            many = int(decoder.decode(_stream.model.Uniform(len(left) + 1)))
            hit = np.full(len(left), many == len(left))
            if 0 < many < len(left):
                hit = decoder.decode(_rate(len(left), many), len(left)) == 1
            kinds[left[hit]] = kind
            left = left[~hit]
    return kinds


def decompress_rest(source: BinaryIO, target: BinaryIO, model: Model, progress: OnProgress | None) -> int:
    """Write what follows the magic, decoded, to `target`; returns its bytes. Raises DataError."""
    reader = Reader(source)
    if reader.bytes(16) != hashlib.sha256(model_digest(model).encode()).digest()[:16]:
        raise DataError("the file was compressed with another model: name that one")
    code = _read_code(reader, model.config.sequence_length)
    threads = reader.varint(1 << 20)
    if not 1 <= threads <= MOST_THREADS:
        raise DataError(
            f"the file was compressed with {threads:,} threads; this machine takes {MOST_THREADS:,} at most"
        )
    expected = reader.bytes(8)
    used = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        if numerics_fingerprint(model, code) != expected:
            raise DataError(
                "this machine or torch build rounds differently from the one that compressed the file: decompress there"
            )
        return _frames(reader, target, model, code, progress)
    finally:
        torch.set_num_threads(used)


def _read_code(reader: Reader, length: int) -> _Code:
    order, _, attention = reader.bytes(reader.varint(64)).decode("ascii", "replace").partition(" ")
    code = _Code(order, attention, reader.varint(4096))
    try:
        if order != NEXT:
            reveal_order(order, length)
        parse_attention(attention)
    except (DataError, ConfigError) as error:
        raise DataError(DAMAGED) from error
    if code.rows < 1 or code.rows * length > 4 * max(length, TOKENS_PER_FORWARD):
        raise DataError(f"the compressed file asks for {code.rows:,} windows at once: more than any such file needs")
    return code


def _frames(reader: Reader, target: BinaryIO, model: Model, code: _Code, progress: OnProgress | None) -> int:
    digest, total = hashlib.sha256(), 0
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
                progress(Progress.of_bytes(before + int(share * frame)))

        data = _frame(mode, body, size, model, code, tick)
        digest.update(data)
        target.write(data)
        total += size
        tick(0.0, total)
    if reader.bytes(32) != digest.digest() or reader.file.read(1):
        raise DataError("the compressed file is damaged, or decoded with other arithmetic: its checksum is wrong")
    return total


def _frame(mode: int, body: bytes, size: int, model: Model, code: _Code, tick: Callable[[float], None]) -> bytes:
    if mode == STORED:
        data = body
    elif mode == LZMA:
        data = unsqueeze(body, size)
    elif mode == MODELLED:
        reader = Reader(io.BytesIO(body))
        packed, coded = (reader.bytes(reader.varint(FRAME_BYTES)) for _ in range(2))
        words = reader.file.read()
        side = read_side(packed, size)
        if len(words) % 4 or len(coded) % 4:
            raise DataError(DAMAGED)
        coder = _Coder(model, code, np.frombuffer(words, dtype="<u4").astype(np.uint32))
        try:
            tokens = coder.run(side.tokens, tick)
            data = put_together(side, tokens, model, lambda texts, number: _decode_runs(texts, coded, number).tolist())
        except (AssertionError, ValueError) as error:  # the range decoder met words that no encoder writes
            raise DataError(DAMAGED) from error
    else:
        raise DataError(DAMAGED)
    if len(data) != size:
        raise DataError(DAMAGED)
    return data
