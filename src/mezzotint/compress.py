"""Lossless compression of any bytes with a model's chain rule: the likelihood, cashed in.

Text becomes tokens, tokens become windows, and a range coder (`constriction`) spends -log2 p(token) bits on each, with
p as `evaluate.causal` or `evaluate.chain_rule` has it. What the tokenizer changes (it may fold line ends and runs of
spaces into one space, normalise characters, or know no token for them) is kept beside the tokens as whitespace and
edits, and what is not text at all is kept as it is, so every input comes back exactly. Does not know how models are
made or stored.

File format `.mzz`, version 1; integers are LEB128 varints unless a width is given:

    "MZZ1"                                                        magic and version
    model 16 bytes | "order visibility": length, ASCII | rows | threads        what is needed to decode
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
import re
import tempfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import constriction
import numpy as np
import torch
from torch import Tensor

from mezzotint.errors import ConfigError, DataError
from mezzotint.evaluate import TOKENS_PER_FORWARD, canvas_length, model_digest, reveal_order
from mezzotint.files import sync_folder
from mezzotint.model import Cache, Model, block_size, learnt_next_tokens

MAGIC = b"MZZ1"
FRAME_BYTES = 1 << 20
NEXT = "next"
_stream: Any = getattr(constriction, "stream")  # noqa: B009 - a compiled submodule that type checkers cannot see
TOTAL = 1 << 24
STORED, LZMA, MODELLED = 0, 1, 2
TEXT, REST = 0, 1
SHORTEST = 24
DAMAGED = "the compressed file is damaged"

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


# --- probabilities and the coder ------------------------------------------------------------------------------------


def integer_probabilities(logits: Tensor) -> np.ndarray:
    """Softmax rounded to integers of at least 1 that sum to 2^24. logits: [n, V]; returns float32 [n, V], exact."""
    x = logits.double().cpu().numpy()
    x = np.exp(x - x.max(axis=1, keepdims=True))
    x /= x.sum(axis=1, keepdims=True)
    counts = np.floor(x * (TOTAL - x.shape[1])).astype(np.int64) + 1
    # What rounding down left over, at most V, goes to the likeliest token.
    counts[np.arange(len(counts)), counts.argmax(axis=1)] += TOTAL - counts.sum(axis=1)
    return counts.astype(np.float32)


def _parts(logits: Tensor, symbols: np.ndarray) -> Iterator[tuple[Tensor, np.ndarray]]:
    """Logits and symbols a bounded number of rows at a time: float64 copies of all would be large."""
    step = max(1, (1 << 23) // logits.shape[1])
    for start in range(0, len(symbols), step):
        yield logits[start : start + step], symbols[start : start + step]


@torch.inference_mode()
def next_logits(cache: Cache, ids: Tensor) -> Tensor:
    """Logits [rows, V], float32, of the token after the new input `ids`, int64 [rows]: first MASK, then each token."""
    return cache.network.logits(cache.hidden(ids[:, None], size=1, keep=1)[:, 0])


@dataclass(frozen=True)
class _Code:
    """How windows are coded: the order of revelation, what sees what, and how many windows go together."""

    order: str
    visibility: str
    rows: int


class _Coder:
    """Codes the tokens of windows step by step; encodes without `words`, decodes with them."""

    def __init__(self, model: Model, code: _Code, words: np.ndarray | None) -> None:
        self.model, self.code = model, code
        # The coder adds 1 to the weights that it is given and scales them to 2^24 in all: so ours, less 1, stay.
        self.family = _stream.model.Categorical(perfect=False)
        self.encoder = _stream.queue.RangeEncoder() if words is None else None
        self.decoder = None if words is None else _stream.queue.RangeDecoder(words)
        self.bits = 0.0
        self.passes = 0

    def run(self, count: int, tokens: np.ndarray | None, tick: Callable[[float], None]) -> np.ndarray:
        """Encode `tokens`, or decode `count` of them. int64 [count]. `tick` is told the share done."""
        length = self.model.config.sequence_length
        out = np.zeros(count, dtype=np.int64) if tokens is None else tokens
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
        """One batch of windows [B, T], in place. Both directions do exactly the same arithmetic."""
        rows, length = block.shape
        self.passes += rows * (1 if self.code.order == NEXT else len(reveal_order(self.code.order, length)))
        for group, logits in self._steps(block):
            known = block[:, group].reshape(-1)
            found = [self._symbols(part, symbols) for part, symbols in _parts(logits, known)]
            block[:, group] = np.concatenate(found).reshape(rows, len(group))
            yield len(known)

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
            stop = canvas_length(code.visibility, length, int(group.max()))
            scored = torch.zeros(rows, stop, dtype=torch.bool)
            scored[:, group] = True
            with torch.inference_mode():
                logits = model.logits(
                    canvas[:, :stop].to(model.device), visibility=code.visibility, positions=scored.to(model.device)
                )
            yield group, logits
            canvas[:, group] = torch.from_numpy(np.ascontiguousarray(block[:, group]))

    def _symbols(self, logits: Tensor, known: np.ndarray) -> np.ndarray:
        weights = integer_probabilities(logits)
        if self.encoder is None:
            assert self.decoder is not None
            return self.decoder.decode(self.family, weights - 1).astype(np.int64)
        self.encoder.encode(known.astype(np.int32), self.family, weights - 1)
        self.bits += float(np.log2(TOTAL / weights[np.arange(len(known)), known].astype(np.float64)).sum())
        return known

    def words(self) -> bytes:
        """The coded words, little-endian."""
        assert self.encoder is not None
        return self.encoder.get_compressed().astype("<u4").tobytes()


def numerics(model: Model, code: _Code) -> bytes:
    """Eight bytes that differ where a model's probabilities come out differently: coded probe windows, hashed.

    The probes have the shapes that coding uses (fewer rows) and are half revealed at random.
    """
    length = model.config.sequence_length
    draw = np.random.Generator(np.random.PCG64(0))
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
                logits = model.logits(canvas, visibility=code.visibility, positions=where)
        weights = integer_probabilities(logits)
        symbols = draw.integers(0, model.config.vocab_size, size=len(weights)).astype(np.int32)
        encoder = _stream.queue.RangeEncoder()
        encoder.encode(symbols, _stream.model.Categorical(perfect=False), weights - 1)
        digest.update(weights.tobytes() + encoder.get_compressed().astype("<u4").tobytes())
    return digest.digest()[:8]


# --- text and the rest ----------------------------------------------------------------------------------------------


Edit = tuple[int, int, bytes]
"""(bytes to keep since the edit before, bytes to drop, bytes to put in their place)"""


def align(known: bytes, wanted: bytes) -> list[Edit] | None:
    """Edits that turn `known` into `wanted`, or None where they differ too much.

    Walks both; at a difference takes the shortest edit after which six bytes agree. Quick where edits are few; not
    always the fewest.
    """
    edits: list[Edit] = []
    p = q = kept = 0
    budget = len(wanted) // 2 + 16
    while True:
        step = 4096
        while step:
            if known[p : p + step] == wanted[q : q + step] and max(p + step - len(known), q + step - len(wanted)) <= 0:
                p, q, kept = p + step, q + step, kept + step
            else:
                step //= 4
        if p == len(known) and q == len(wanted):
            return edits
        found = _resume(known, wanted, p, q)
        if found is None:
            return None
        drop, put = found
        edits.append((kept, drop, wanted[q : q + put]))
        p, q, kept = p + drop, q + put, 0
        budget -= 3 + put
        if budget < 0:
            return None


def _resume(known: bytes, wanted: bytes, p: int, q: int) -> tuple[int, int] | None:
    """The least (drop, put) after which the texts agree for six bytes or to their ends."""
    for both in range(1, 65):
        for drop in range(both + 1):
            i, j = p + drop, q + both - drop
            if i > len(known) or j > len(wanted):
                continue
            a, b = known[i : i + 6], wanted[j : j + 6]
            if a == b and (len(a) == 6 or (i + len(a) == len(known) and j + len(b) == len(wanted))):
                return drop, both - drop
    return None


def apply_edits(known: bytes, edits: list[Edit]) -> bytes:
    """What `align` aligned `known` to. Raises DataError where an edit lies outside."""
    out = []
    at = 0
    for keep, drop, put in edits:
        if at + keep + drop > len(known):
            raise DataError(DAMAGED)
        out += [known[at : at + keep], put]
        at += keep + drop
    return b"".join([*out, known[at:]])


@dataclass(frozen=True)
class Segment:
    """A stretch of the input; `ids` None: not text. `edits` turn the ids' own bytes into `folded`, which is `data`
    with each run of whitespace as one space where `runs` is given."""

    data: bytes
    ids: list[int] | None = None
    edits: tuple[Edit, ...] = ()
    folded: bytes = b""
    runs: tuple[bytes, ...] = ()


RUN = re.compile(rb"[ \t\r\n]+")


def folds(model: Model) -> bool:
    """Whether the tokenizer turns line ends into spaces, so that whitespace is better kept beside it."""
    probe = "a b\nc"
    return model.tokenizer.decode_bytes(model.tokenizer.encode(probe)) != probe.encode()


def _text(model: Model, data: bytes, fold: bool) -> Segment | None:
    """`data` as text, or None where it is none or the tokenizer makes too much of a change."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        return None
    ids = model.tokenizer.encode(text)
    if model.tokenizer.bos_id in ids or len(ids) > 2 * len(data):
        return None
    folded = RUN.sub(b" ", data) if fold else data
    edits = align(model.tokenizer.decode_bytes(ids), folded)
    if edits is None:
        return None
    return Segment(data, ids, tuple(edits), folded, tuple(RUN.findall(data)) if fold else ())


def segments(model: Model, data: bytes, fold: bool) -> list[Segment]:
    """Split `data` into stretches of text and of the rest; their bytes concatenate to `data`.

    Halves what cannot be text, near line or word ends, down to some bytes; neighbouring texts are joined again.
    """
    pieces: list[Segment] = []
    stack = [data]
    while stack:
        part = stack.pop()
        found = _text(model, part, fold)
        if found is not None or len(part) <= SHORTEST:
            pieces.append(found or Segment(part))
        else:
            middle = _cut(part)
            stack += [part[middle:], part[:middle]]
    texts: list[Segment] = []
    for piece in pieces:
        if texts and piece.ids is not None and texts[-1].ids is not None:
            both = _text(model, texts[-1].data + piece.data, fold)
            if both is not None:
                texts[-1] = both
                continue
        texts.append(piece)
    # A short stretch of text among the rest is not worth its BOS and its place in the table.
    out: list[Segment] = []
    rest: list[bytes] = []
    for piece in texts:
        if piece.ids is None or (len(piece.data) < SHORTEST and len(texts) > 1):
            rest.append(piece.data)
            continue
        if rest:
            out.append(Segment(b"".join(rest)))
            rest = []
        out.append(piece)
    if rest:
        out.append(Segment(b"".join(rest)))
    return out


COMMON = 15


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


def encode_runs(folded: list[bytes], kinds: np.ndarray, classes: int) -> bytes:
    """Range-code which kind of run (0..classes - 1) each space of the folded texts stands for.

    Context by context and kind by kind: how many of the places left are of it (uniform), then which (at that rate).
    """
    encoder = _stream.queue.RangeEncoder()
    contexts = _run_contexts(folded)
    for context in range(int(contexts.max()) + 1 if len(contexts) else 0):
        left = kinds[contexts == context]
        for kind in range(classes - 1):
            if not len(left):
                break
            hit = (left == kind).astype(np.int32)
            encoder.encode(int(hit.sum()), _stream.model.Uniform(len(left) + 1))
            if 0 < hit.sum() < len(left):
                encoder.encode(hit, _rate(len(left), int(hit.sum())))
            left = left[hit == 0]
    return encoder.get_compressed().astype("<u4").tobytes()


def decode_runs(folded: list[bytes], coded: bytes, classes: int) -> np.ndarray:
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


def _rate(places: int, hits: int) -> Any:
    weights = np.array([places - hits, hits], dtype=np.float64)
    return _stream.model.Categorical(weights / places, perfect=False)


def _cut(data: bytes) -> int:
    """Where to halve: after the newline, else the space, nearest the middle, else between characters."""
    middle = len(data) // 2
    for mark in (b"\n", b" "):
        after, before = data.find(mark, middle, len(data) - 1), data.rfind(mark, 0, middle)
        candidates = [at + 1 for at in (after, before) if at >= 0]
        if candidates:
            return min(candidates, key=lambda at: abs(at - middle))
    at = middle
    while at > middle - 4 and at > 1 and data[at] & 0xC0 == 0x80:
        at -= 1
    return at


# --- the file -------------------------------------------------------------------------------------------------------


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
    visibility: str = "full",
    rows: int | None = None,
    progress: Progress | None = None,
    size: int = 0,
) -> CompressionReport:
    """Compress `source` to `target`, a MiB at a time, so that memory stays flat for any length.

    order: `next`, the code of `evaluate.causal`, for weights trained on next tokens too: with keys and values kept it
    costs one forward pass per window; or an order of `evaluate.reveal_order`, of which `left` is usually smallest and
    costs a pass per token. Default: `next` for such weights, else `left`. visibility: of the canvas, for orders other
    than `next`. rows: windows that go through the network together (default: what holds 16,384 tokens). size: the
    input's length, for `progress` alone. Raises DataError for an unknown order, ConfigError for a visibility.
    """
    length = model.config.sequence_length
    if order is None:
        order = NEXT if learnt_next_tokens(model.info) else "left"
    code = _Code(order, visibility, rows or max(1, TOKENS_PER_FORWARD // length))
    _check(code, length)
    name = f"{order} {visibility}".encode("ascii")
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
    """Raise the error that an order, visibility or number of rows deserves before anything is computed."""
    if code.order != NEXT:
        reveal_order(code.order, length)
    block_size(code.visibility, length)
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
    order, _, visibility = name.partition(" ")
    code = _Code(order, visibility, reader.varint(4096))
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
    data: bytes, model: Model, *, order: str | None = None, visibility: str = "full", rows: int | None = None
) -> bytes:
    """The compressed form of `data`. See `compress_stream`."""
    target = io.BytesIO()
    compress_stream(io.BytesIO(data), target, model, order=order, visibility=visibility, rows=rows)
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
    visibility: str = "full",
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
            visibility=visibility,
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
