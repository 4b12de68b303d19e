"""The entropy coder (rANS) and its sessions over tokens and whitespace.

Knows probabilities as integers that sum to 2^24, and nothing of files or text. FORMAT.md has the arithmetic.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from mezzotint.compression.exact import TOTAL, Cache, ExactNetwork
from mezzotint.errors import DataError

DAMAGED = "the compressed file is damaged"
LOWEST = 1 << 32  # the coder's state lies between this and 2^64
MOST_STREAMS = 256
KEPT_BYTES = 1 << 28  # keys and values of all streams together
STREAM_TOKENS = 2048  # a stream's start has little context: it costs some three bytes
FEW_STREAMS = 48  # up to so many a stream may be half as long: a step costs some time, however few take part
PROBE_TOKENS = 1792  # after so many, from all over a text, their price tells whether the rest is worth its while
POSITIONS = 768  # positions that go through the network together where windows are short: few calls
Tick = Callable[[float], None]
"""Told the share of a job that is done."""


class Encoder:
    """Collects (start, frequency) of symbols in the decoder's order; the coding itself goes from last to first."""

    def __init__(self) -> None:
        self.starts: list[int] = []
        self.frequencies: list[int] = []

    def put(self, start: int, frequency: int) -> None:
        """A symbol that takes `frequency` of 2^24, from `start` on."""
        self.starts.append(start)
        self.frequencies.append(frequency)

    def finish(self) -> bytes:
        """The state, 8 bytes, and the words, 4 bytes each, in the order in which the decoder reads them."""
        state, words = LOWEST, []
        for start, frequency in zip(reversed(self.starts), reversed(self.frequencies), strict=True):
            if state >= frequency << 40:
                words.append(state & 0xFFFFFFFF)
                state >>= 32
            state = (state // frequency << 24) + state % frequency + start
        return state.to_bytes(8, "little") + np.array(words[::-1], dtype="<u4").tobytes()


class Decoder:
    """Reads what `Encoder.finish` wrote; anything else ends in a DataError, at `finish` at the latest."""

    def __init__(self, data: bytes) -> None:
        if len(data) < 8 or len(data) % 4:
            raise DataError(DAMAGED)
        self.state = int.from_bytes(data[:8], "little")
        self.words: Iterator[int] = iter(np.frombuffer(data, dtype="<u4", offset=8).tolist())

    def peek(self) -> int:
        """Which of the 2^24 the next symbol's are."""
        return self.state & (TOTAL - 1)

    def take(self, start: int, frequency: int) -> None:
        """Go past the symbol, which is the one that `peek` fell on. Raises DataError where the data end before."""
        state = frequency * (self.state >> 24) + (self.state & (TOTAL - 1)) - start
        if state < LOWEST:
            word = next(self.words, None)
            if word is None:
                raise DataError(DAMAGED)
            state = state << 32 | word
        self.state = state

    def finish(self) -> None:
        """Raises DataError unless everything was read and the state is the encoder's first."""
        if self.state != LOWEST or next(self.words, None) is not None:
            raise DataError(DAMAGED)


@dataclass(frozen=True)
class Streams:
    """`count` tokens cut into `number` stretches that are coded side by side; the first `longer` have one more."""

    count: int
    number: int

    @property
    def most(self) -> int:
        """Tokens of the longest stream."""
        return -(-self.count // self.number)

    def alive(self, place: int) -> int:
        """How many streams, the first ones, have a token at `place`."""
        return self.number if place < self.count // self.number else self.count % self.number

    def table(self, tokens: np.ndarray) -> np.ndarray:
        """int64 [number, most], the missing last tokens 0."""
        out = np.zeros((self.number, self.most), dtype=np.int64)
        short, longer = divmod(self.count, self.number)
        at = 0
        for stream in range(self.number):
            size = short + (stream < longer)
            out[stream, :size] = tokens[at : at + size]
            at += size
        return out

    def flat(self, table: np.ndarray) -> np.ndarray:
        """The tokens that `table` was made of."""
        short, longer = divmod(self.count, self.number)
        return np.concatenate([row[: short + (i < longer)] for i, row in enumerate(table)])


def most_streams(network: ExactNetwork) -> int:
    """How many streams a model's keys and values leave memory for, 1 to 256."""
    c = network.config
    each = 8 * c.layers * c.kv_heads * c.head_width * network.length
    return max(1, min(MOST_STREAMS, KEPT_BYTES // each))


def choose_streams(network: ExactNetwork, count: int) -> Streams:
    """Enough streams to decode at speed, few enough to cost next to nothing."""
    wished = max(min(FEW_STREAMS, count // 1024), count // STREAM_TOKENS)
    return Streams(count, max(1, min(most_streams(network), wished)))


def _inputs(table: np.ndarray, start: int, stop: int, mask_id: int) -> np.ndarray:
    """What the network reads to predict the tokens `start` .. `stop` - 1: those one place before, and MASK before all."""
    if start:
        return table[:, start - 1 : stop - 1]
    return np.concatenate((np.full((len(table), 1), mask_id), table[:, : stop - 1]), axis=1)


def encode_tokens(
    network: ExactNetwork, tokens: np.ndarray, streams: Streams, encoder: Encoder, tick: Tick, most: float = math.inf
) -> float:
    """Hand all tokens to `encoder`, half windows at a time; returns what they cost in bits.

    Infinity, and nothing to `encoder`, where at the price of a first few all would cost more than `most` bits.
    """
    c = network.config
    table = streams.table(tokens)
    starts = np.zeros(table.shape, dtype=np.int64)
    frequencies = np.zeros_like(starts)
    half = network.half
    together = max(1, POSITIONS // half)
    seen, seen_bits = 0, 0.0
    # Streams from all over the text come first.
    order = np.argsort(np.arange(streams.number) % -(-streams.number // 8), kind="stable")
    groups = [order[row : row + together] for row in range(0, streams.number, together)]
    # A probe takes the start of the first groups; apart from that one group after the other, so that few are kept.
    probed = math.ceil(PROBE_TOKENS / (together * half)) if most < math.inf else 0
    plan = [(group, 0) for group in range(min(probed, len(groups)))]
    for group in range(len(groups)):
        plan += [(group, start) for start in range(half if group < probed else 0, streams.most, half)]
    caches: dict[int, Cache] = {}
    done = 0
    for group, start in plan:
        stop, rows = min(start + half, streams.most), groups[group]
        part = table[rows]
        if not start:
            caches[group] = Cache(network, len(rows), min(2 * half, streams.most))
        cache = caches[group] if stop < streams.most else caches.pop(group)
        if cache.full:
            cache.slide(network)
        hidden = network.hidden(_inputs(part, start, stop, c.mask_id), cache).reshape(-1, c.width)
        found = network.intervals(hidden, part[:, start:stop].ravel())
        starts[rows, start:stop], frequencies[rows, start:stop] = (x.reshape(len(part), -1) for x in found)
        if seen < PROBE_TOKENS:
            seen += found[1].size
            seen_bits += float(np.log2(TOTAL / found[1]).sum())
            if seen >= PROBE_TOKENS and seen_bits / seen * len(tokens) > most:
                return math.inf
        done += len(part) * (stop - start)
        tick(done / table.size)
    bits = 0.0
    for place in range(streams.most):
        alive = streams.alive(place) if place == streams.most - 1 else streams.number
        encoder.starts += starts[:alive, place].tolist()
        encoder.frequencies += frequencies[:alive, place].tolist()
        bits += float(np.log2(TOTAL / frequencies[:alive, place]).sum())
    return bits


def decode_tokens(
    network: ExactNetwork, streams: Streams, decoder: Decoder, tick: Tick, *, slides: bool = True
) -> np.ndarray:
    """The tokens that `encode_tokens` was given, step by step in all streams side by side. int64 [count].

    slides: whether the window slides, or, as in files of arithmetic 1, each half window is read anew behind MASK.
    Raises DataError for damaged data.
    """
    c = network.config
    table = np.zeros((streams.number, streams.most), dtype=np.int64)
    length = 2 * network.half if slides else network.length
    cache = Cache(network, streams.number, min(length, streams.most))
    for place in range(streams.most):
        if slides and cache.full:
            cache.slide(network)
        if cache.kept == length:  # of arithmetic 1
            hidden = _read_anew(network, table[:, place - length + network.half : place], cache)
        else:
            hidden = network.hidden(_inputs(table, place, place + 1, c.mask_id), cache)[:, 0]
        alive = streams.alive(place)
        table[:alive, place] = _decode_step(network, hidden[:alive], decoder)
        tick((place + 1) / streams.most)
    return streams.flat(table)


def _read_anew(network: ExactNetwork, table: np.ndarray, cache: Cache) -> np.ndarray:
    """Fill `cache` with MASK and the tokens of `table`; what the network says of those that come next, [B, W]."""
    size = table.shape[1] + 1
    inputs = _inputs(table, 0, size, network.config.mask_id)
    together = max(1, POSITIONS // network.length)
    parts = [slice(row, row + together) for row in range(0, len(table), together)]
    hidden = [network.hidden(inputs[rows], cache.part(rows), size - 1)[:, 0] for rows in parts]
    cache.kept = size
    return np.concatenate(hidden)


def _decode_step(network: ExactNetwork, hidden: np.ndarray, decoder: Decoder) -> list[int]:
    """One token for each row of hidden [n, W]."""
    out = []
    for row in torch.from_numpy(network.frequencies(hidden)).cumsum(1).numpy():
        token = int(row.searchsorted(decoder.peek(), side="right"))
        below = int(row[token - 1]) if token else 0
        decoder.take(below, int(row[token]) - below)
        out.append(token)
    return out


class RunModel:
    """How likely the kinds of whitespace are, learnt as they come: counts in three contexts, the coarser as the prior.

    Contexts: none; the byte before and the byte after; these, the second byte before, and the distance from the last
    run that was not of the commonest kind. Letters, digits and bytes above 127 count as classes.
    """

    def __init__(self, kinds: int) -> None:
        self.kinds = kinds
        self.counts: dict[tuple[int, ...], list[int]] = {}
        self.last = 0

    def _cells(self, node: int, near: tuple[int, int, int], distance: int) -> tuple[list[list[int]], int]:
        """The three contexts' counts, and how probable node's kind is, of 2^16."""
        two, one, after = near
        probability, cells = 1 << 15, []
        for context in ((node,), (node, one, after), (node, one, after, two, distance.bit_length())):
            cell = self.counts.setdefault(context, [0, 0])
            probability = ((cell[1] << 16) + 4 * probability) // (cell[0] + cell[1] + 4)
            cells.append(cell)
        return cells, max(1, min((1 << 16) - 1, probability)) << 8

    def run(self, folded: Iterable[bytes], decide: Callable[[int, int], bool]) -> list[int]:
        """The kind of each space of the folded texts: `decide(node, probability of 2^24)`, kind by kind, says which."""
        out = []
        for text in folded:
            padded = b"\0\0" + text + b"\0"
            last, at = 0, padded.find(b" ", 2)
            while at >= 0:
                near = CLASSES[padded[at - 2]], CLASSES[padded[at - 1]], CLASSES[padded[at + 1]]
                kind = self.kinds - 1
                for node in range(self.kinds - 1):
                    cells, probability = self._cells(node, near, at - last)
                    hit = decide(node, probability)
                    for cell in cells:
                        cell[hit] += 1
                    if hit:
                        kind = node
                        break
                if kind:
                    last = at
                out.append(kind)
                at = padded.find(b" ", at + 1)
        return out


CLASSES = [
    65 if 65 <= b <= 90 else 97 if 97 <= b <= 122 else 48 if 48 <= b <= 57 else 128 if b >= 128 else b
    for b in range(256)
]


def encode_runs(folded: Iterable[bytes], kinds: Iterable[int], number: int, encoder: Encoder) -> None:
    """Hand the kind (0 .. number - 1) of each space of the folded texts to `encoder`."""
    upcoming = iter(kinds)
    now = 0

    def decide(node: int, probability: int) -> bool:
        nonlocal now
        if node == 0:
            now = next(upcoming)
        hit = now == node
        encoder.put(0 if hit else probability, probability if hit else TOTAL - probability)
        return hit

    RunModel(number).run(folded, decide)


def decode_runs(folded: Iterable[bytes], number: int, decoder: Decoder) -> list[int]:
    """The kinds that `encode_runs` was given. Raises DataError for damaged data."""

    def decide(node: int, probability: int) -> bool:
        hit = decoder.peek() < probability
        decoder.take(0 if hit else probability, probability if hit else TOTAL - probability)
        return hit

    return RunModel(number).run(folded, decide)
