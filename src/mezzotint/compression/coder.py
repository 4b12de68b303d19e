"""Probabilities as integers, and the range coder's sessions over windows.

Knows nothing of files or text.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import constriction
import numpy as np
import torch
from torch import Tensor

from mezzotint.config import parse_attention
from mezzotint.model import Cache, Model
from mezzotint.scoring.orders import canvas_length, reveal_order

NEXT = "next"


_stream: Any = getattr(constriction, "stream")  # noqa: B009 - a compiled submodule that type checkers cannot see


TOTAL = 1 << 24
DAMAGED = "the compressed file is damaged"


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
    attention: str
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
