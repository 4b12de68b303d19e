"""Integers <-> bytes: planes of codes under static tables chosen per row and column, by the `constriction` range coder.

A plane is a matrix of small integers. Every row r carries a class a_r and every column c a class b_c; the code at
(r, c) is coded under table a_r + b_c of a bank shared by many planes. Tables differ mostly in spread, so the two
classes model a variance that factors over rows and columns. Tables, classes and codes all travel in the stream;
nothing is adaptive, so a plane decodes in one vectorised pass per table.

All probabilities are integers over 2^24 made by integer arithmetic from stored levels, so that encoder and decoder
agree on every machine. FORMAT.md has the byte-level specification. Knows nothing of weights, scales or files.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import constriction
import numpy as np

STREAM: Any = constriction.stream  # type: ignore[attr-defined]  # a compiled module, unknown to type checkers


PRECISION = 24
TOTAL = 1 << PRECISION
STEPS = 8  # levels per factor of two in probability
MAX_LEVEL = STEPS * PRECISION
MAX_SYMBOLS = 1024  # symbols in one alphabet
MAX_MAGNITUDE = 511  # largest absolute code of a plane
MAX_TABLES = 64  # tables in one bank
BLOCK = 1 << 20  # entries of a plane that are sorted by table at a time
OFFSET = 32_768  # integers are sent as unsigned 16-bit numbers this much larger


class StreamError(Exception):
    """A stream does not follow the format. The message says how."""


def _power(level: int) -> int:
    """floor(2^(level / STEPS)), in exact integer arithmetic."""
    value = 1 << level  # 2^level, of which the STEPS-th root is wanted
    for _ in range(int(math.log2(STEPS))):
        value = math.isqrt(value)
    return value


POWERS = np.array([0] + [_power(level + STEPS * 8) for level in range(1, MAX_LEVEL + 1)], dtype=object)


def weights_of(levels: np.ndarray) -> np.ndarray:
    """Integer weights that sum to 2^24, each at least 1, from levels.

    levels: integers in 0..MAX_LEVEL, [S] with S >= 2; level q > 0 stands for a probability proportional to
    2^(q / STEPS), level 0 for the least weight. The rounding's remainder goes to the first largest weight.
    Raises StreamError if every level is 0.
    """
    raw = POWERS[levels]
    total = int(raw.sum())
    if total == 0:
        raise StreamError("an empty probability table is in use")
    share = TOTAL - len(levels)
    weights = np.array([int(value) * share // total + 1 for value in raw], dtype=np.int64)
    weights[int(np.argmax(weights))] += TOTAL - int(weights.sum())
    return weights


def levels_of(counts: np.ndarray) -> np.ndarray:
    """Levels (uint8, [S]) that best describe non-negative `counts` [S]: 0 where the count is 0."""
    total = counts.sum()
    with np.errstate(divide="ignore"):
        level = np.rint(STEPS * (np.log2(counts / total) + PRECISION))
    return np.where(counts > 0, np.clip(level, 1, MAX_LEVEL), 0).astype(np.uint8)


def lengths_of(weights: np.ndarray) -> np.ndarray:
    """Code length in bits of each symbol under integer `weights`."""
    return PRECISION - np.log2(weights.astype(np.float64))


def _model(weights: np.ndarray) -> object:
    # constriction turns floats f_i into weights floor(F_i * scale) + i with scale = (2^24 - S) / sum(f). Handing it
    # w_i - 1 makes the sum 2^24 - S and the scale exactly 1, and every partial sum is an integer below 2^24: exact.
    return STREAM.model.Categorical((weights - 1).astype(np.float32), perfect=False)


@lru_cache(maxsize=1)
def _fixed_deltas() -> np.ndarray:
    """The built-in weights for differences between neighbouring levels, -MAX_LEVEL..MAX_LEVEL: two-sided geometric."""
    return weights_of(np.maximum(1, MAX_LEVEL - 2 * np.abs(np.arange(-MAX_LEVEL, MAX_LEVEL + 1))))


class Encoder:
    """Collects symbols of one stream."""

    def __init__(self) -> None:
        self._coder = STREAM.queue.RangeEncoder()
        self._delta = _model(_fixed_deltas())

    def symbols(self, values: np.ndarray, weights: np.ndarray) -> None:
        """Code `values` (indices into `weights`)."""
        if len(values):
            self._coder.encode(np.ascontiguousarray(values, dtype=np.int32), _model(weights))

    def number(self, value: int) -> None:
        """Code one integer in -32,768..32,767."""
        self._coder.encode(int(value) + OFFSET, STREAM.model.Uniform(65_536))

    def uniform(self, values: np.ndarray, size: int) -> None:
        """Code `values`, each of 0..size-1 equally likely (size a power of two)."""
        if len(values):
            self._coder.encode(np.ascontiguousarray(values, dtype=np.int32), STREAM.model.Uniform(size))

    def levels(self, levels: np.ndarray) -> None:
        """Code a table's levels [S] as differences from the one before (the first from 0)."""
        deltas = np.diff(levels.astype(np.int32), prepend=0)
        self._coder.encode(np.ascontiguousarray(deltas + MAX_LEVEL, dtype=np.int32), self._delta)

    def sequence(self, values: np.ndarray) -> None:
        """Code a vector of integers with its own alphabet and table, both sent first."""
        values = np.asarray(values, dtype=np.int64).ravel()
        low = int(values.min()) if len(values) else 0
        size = (int(values.max()) - low + 1) if len(values) else 1
        self.number(low)
        self.number(size)
        if size > 1:
            levels = levels_of(np.bincount(values - low, minlength=size).astype(np.float64))
            self.levels(levels)
            self.symbols(values - low, weights_of(levels))

    def finish(self) -> bytes:
        """The stream: 32-bit words, little-endian."""
        return self._coder.get_compressed().astype("<u4").tobytes()


class Decoder:
    """Reads back what an `Encoder` wrote. Every method raises StreamError on bytes no encoder writes."""

    def __init__(self, data: bytes) -> None:
        if len(data) % 4:
            raise StreamError("a stream is not a whole number of 32-bit words")
        self._coder = STREAM.queue.RangeDecoder(np.frombuffer(data, dtype="<u4").astype(np.uint32))
        self._delta = _model(_fixed_deltas())

    def _decode(self, model: object, count: int | None = None) -> np.ndarray:
        try:
            result = self._coder.decode(model) if count is None else self._coder.decode(model, count)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # the Rust extension's panics are not Exceptions
            raise StreamError("a stream does not decode") from error
        return np.asarray(result)

    def _fill(self, out: np.ndarray, model: object) -> None:
        # A block at a time, so that no memory is taken but `out` itself.
        for start in range(0, len(out), BLOCK):
            part = out[start : start + BLOCK]
            part[:] = self._decode(model, len(part))

    def symbols(self, count: int, weights: np.ndarray) -> np.ndarray:
        """`count` indices into `weights`, int16."""
        values = np.empty(count, dtype=np.int16)
        self._fill(values, _model(weights))
        return values

    def number(self) -> int:
        """One integer in -32,768..32,767."""
        return int(self._decode(STREAM.model.Uniform(65_536))) - OFFSET

    def uniform(self, count: int, size: int) -> np.ndarray:
        """`count` integers of 0..size-1, int32."""
        values = np.empty(count, dtype=np.int32)
        self._fill(values, STREAM.model.Uniform(size))
        return values

    def levels(self, size: int) -> np.ndarray:
        """A table's levels, uint8 [size]. Raises StreamError."""
        levels = np.cumsum(self._decode(self._delta, size).astype(np.int64) - MAX_LEVEL)
        if levels.min() < 0 or levels.max() > MAX_LEVEL:
            raise StreamError("a probability level is out of range")
        return levels.astype(np.uint8)

    def sequence(self, count: int) -> np.ndarray:
        """A vector of `count` integers, int32. Raises StreamError."""
        low, size = self.number(), self.number()
        if not 1 <= size <= MAX_SYMBOLS:
            raise StreamError(f"an alphabet of {size} symbols")
        if size == 1:
            return np.full(count, low, dtype=np.int32)
        values = np.empty(count, dtype=np.int32)
        self._fill(values, _model(weights_of(self.levels(size))))
        values += low
        return values

    def finish(self) -> None:
        """Raises StreamError unless the whole stream was used."""
        if not self._coder.maybe_exhausted():
            raise StreamError("a stream holds more than it should")


@dataclass(frozen=True)
class Bank:
    """Probability tables shared by planes, symmetric in the sign of a code.

    magnitudes: uint8 [K, M + 1], K <= MAX_TABLES, 1 <= M <= MAX_MAGNITUDE: entry [k, m] is the level of code m and of
    code -m in table k, 0 where such codes do not occur.
    """

    magnitudes: np.ndarray

    @property
    def limit(self) -> int:
        """The largest magnitude M of a code."""
        return self.magnitudes.shape[1] - 1

    def levels(self) -> np.ndarray:
        """Levels of codes -M..M, uint8 [K, 2 M + 1]."""
        return np.concatenate((self.magnitudes[:, :0:-1], self.magnitudes), axis=1)

    @cached_property  # asked for by every plane
    def weights(self) -> list[np.ndarray]:
        """Integer weights of codes -M..M in each table, [2 M + 1] each; an empty table gives an empty array."""
        return [weights_of(row) if row.any() else np.zeros(0, dtype=np.int64) for row in self.levels()]

    def lengths(self) -> np.ndarray:
        """Code lengths in bits, float64 [K, 2 M + 1]; infinite in an empty table."""
        return np.stack([lengths_of(w) if len(w) else np.full(2 * self.limit + 1, np.inf) for w in self.weights])

    def write(self, encoder: Encoder) -> None:
        """Code the bank: M, K, each table's number of leading non-zero levels, and these levels' second differences."""
        used = (self.magnitudes > 0).sum(axis=1)
        encoder.number(self.limit)
        encoder.number(len(self.magnitudes))
        encoder.sequence(used)
        parts = [np.diff(row[:count].astype(np.int64), n=2, prepend=(0, 0)) for row, count in
                 zip(self.magnitudes, used, strict=True)]  # fmt: skip
        encoder.sequence(np.concatenate(parts))

    @staticmethod
    def read(decoder: Decoder) -> Bank:
        """Decode a bank. Raises StreamError."""
        limit, tables = decoder.number(), decoder.number()
        if not (1 <= limit <= MAX_MAGNITUDE and 1 <= tables <= MAX_TABLES):
            raise StreamError(f"a bank of {tables} tables up to {limit}")
        used = decoder.sequence(tables).astype(np.int64)
        if used.min() < 0 or used.max() > limit + 1:
            raise StreamError("a table with too many levels")
        differences = decoder.sequence(int(used.sum())).astype(np.int64)
        magnitudes = np.zeros((tables, limit + 1), dtype=np.uint8)
        start = 0
        for row, count in zip(magnitudes, used, strict=True):
            levels = np.cumsum(np.cumsum(differences[start : start + count]))
            if count and (levels.min() < 1 or levels.max() > MAX_LEVEL):
                raise StreamError("a probability level is out of range")
            row[:count] = levels
            start += count
        return Bank(magnitudes)


@dataclass(frozen=True)
class Classes:
    """Which table codes each entry of a plane: table `rows[r] + columns[c]`, clipped to the bank."""

    rows: np.ndarray
    columns: np.ndarray

    def tables(self, count: int) -> np.ndarray:
        """Table index of every entry, uint8 [R, C], for a bank of `count` tables."""
        rows, columns = self.rows.astype(np.int32), self.columns.astype(np.int32)
        return np.clip(rows[:, None] + columns[None, :], 0, count - 1).astype(np.uint8)


def _blocks(shape: tuple[int, int]) -> list[slice]:
    """Runs of whole rows of at most BLOCK entries each (one row if a row is longer)."""
    step = max(1, BLOCK // max(1, shape[1]))
    return [slice(row, min(row + step, shape[0])) for row in range(0, shape[0], step)]


def _order(tables: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Row-major entries grouped by table: (positions in that order, number of entries per table)."""
    flat = tables.ravel()
    return np.argsort(flat, kind="stable"), np.bincount(flat, minlength=MAX_TABLES)


def write_plane(encoder: Encoder, codes: np.ndarray, classes: Classes, bank: Bank) -> None:
    """Code a plane [R, C]: row classes, column classes, then block by block all codes of table 0, of table 1, ..."""
    encoder.sequence(classes.rows)
    encoder.sequence(classes.columns)
    weights = bank.weights
    for block in _blocks(codes.shape):
        part = Classes(classes.rows[block], classes.columns)
        order, counts = _order(part.tables(len(weights)))
        ordered = codes[block].ravel()[order].astype(np.int32) + bank.limit
        start = 0
        for table in np.flatnonzero(counts):
            encoder.symbols(ordered[start : start + counts[table]], weights[table])
            start += counts[table]


def read_plane(decoder: Decoder, shape: tuple[int, int], bank: Bank) -> np.ndarray:
    """Decode a plane, int16 [R, C]. Raises StreamError."""
    codes = np.empty(shape, dtype=np.int16)
    for block, part in read_blocks(decoder, shape, bank):
        codes[block] = part
    return codes


def read_blocks(decoder: Decoder, shape: tuple[int, int], bank: Bank) -> Iterator[tuple[slice, np.ndarray]]:
    """Decode a plane in runs of rows: which rows, and their codes, int16 [r, C]. Raises StreamError."""
    classes = Classes(decoder.sequence(shape[0]), decoder.sequence(shape[1]))
    weights = bank.weights
    for block in _blocks(shape):
        part = Classes(classes.rows[block], classes.columns)
        order, counts = _order(part.tables(len(weights)))
        ordered = np.empty(len(order), dtype=np.int16)
        start = 0
        for table in np.flatnonzero(counts):
            if not len(weights[table]):
                raise StreamError("an empty probability table is in use")
            ordered[start : start + counts[table]] = decoder.symbols(int(counts[table]), weights[table]) - bank.limit
            start += counts[table]
        flat = np.empty_like(ordered)
        flat[order] = ordered
        yield block, flat.reshape(len(part.rows), shape[1])


def plane_bits(codes: np.ndarray, classes: Classes, bank: Bank) -> float:
    """The ideal length of a plane's codes [R, C] in bits (classes and tables not counted)."""
    lengths = bank.lengths()
    return float(lengths[classes.tables(len(lengths)), codes.astype(np.int64) + bank.limit].sum())


def _histogram(first: np.ndarray, values: np.ndarray, groups: int, size: int) -> np.ndarray:
    """Counts [R, groups, size] of values [R, C] by row and by the group `first` [C] of their column."""
    rows = values.shape[0]
    index = (np.arange(rows)[:, None] * groups + first[None, :]) * size + values
    return np.bincount(index.ravel(), minlength=rows * groups * size).reshape(rows, groups, size)


def _assign(values: np.ndarray, other: np.ndarray, lengths: np.ndarray, price: np.ndarray, low: int) -> np.ndarray:
    """The class of each row of `values` [R, C] (symbols) that codes it shortest, given the columns' classes.

    price: bits to name each candidate class low, low + 1, ...
    """
    kinds, group = np.unique(other, return_inverse=True)
    histogram = _histogram(group, values, len(kinds), lengths.shape[1])
    candidates = low + np.arange(len(price))
    tables = np.clip(candidates[:, None] + kinds[None, :], 0, len(lengths) - 1)
    # Entries a table cannot code are infinitely long; 0 * inf is avoided by a large finite length.
    cost = np.einsum("rgs,kgs->rk", histogram.astype(np.float64), np.minimum(lengths, 1e6)[tables], optimize=True)
    return candidates[np.argmin(cost + price, axis=1)]


def _price(classes: np.ndarray, low: int, count: int) -> np.ndarray:
    """Bits to name each class low..low+count-1, from how often they are used (add-one smoothed)."""
    counts = np.bincount(classes - low, minlength=count) + 1.0
    return -np.log2(counts / counts.sum())


SPREADS_PER_OCTAVE = 3
COLUMN_RANGE = 6


def fit(
    planes: list[np.ndarray],
    *,
    tables: int = 32,
    rounds: int = 4,
    columns: bool = True,
    start: list[Classes] | None = None,
) -> tuple[Bank, list[Classes]]:
    """Tables and classes that code `planes` (integer matrices [R, C]) shortest, by alternating minimisation.

    tables: at most so many; rounds: of the minimisation; columns: whether columns have classes too, or rows alone.
    Tables are the counts under the current classes; classes are the shortest under the current tables, naming cost
    included (hard expectation-maximisation). `start` continues from earlier classes. Deterministic.
    Raises ValueError for codes that no stream can hold.
    """
    limit = max(1, max(int(np.abs(plane).max()) for plane in planes))
    if limit > MAX_MAGNITUDE:
        raise ValueError(f"codes reach {limit}, more than {MAX_MAGNITUDE}")
    symbols = [plane.astype(np.int64) + limit for plane in planes]
    if start is None:
        start = []
        for plane in planes:
            magnitude = np.abs(plane).astype(np.float64)
            mean = magnitude.mean() + 1e-9
            # Spread from 1/16 upwards covers planes that are nearly all zero.
            row = np.rint(SPREADS_PER_OCTAVE * (np.log2(magnitude.mean(axis=1) + 1 / 16) + 4))
            column = np.rint(SPREADS_PER_OCTAVE * np.log2((magnitude.mean(axis=0) + mean / 16) / mean))
            column = np.clip(column, -COLUMN_RANGE, COLUMN_RANGE) if columns else np.zeros_like(column)
            start.append(Classes(np.clip(row, 0, tables - 1).astype(np.int64), column.astype(np.int64)))
    classes = start
    bank = _tables(symbols, classes, limit, tables)
    for _ in range(rounds):
        lengths = bank.lengths()
        updated = []
        for values, item in zip(symbols, classes, strict=True):
            rows = _assign(values, item.columns, lengths, _price(item.rows, 0, tables), 0)
            if columns:
                price = _price(item.columns, -COLUMN_RANGE, 2 * COLUMN_RANGE + 1)
                shifted = _assign(values.T, rows, lengths, price, -COLUMN_RANGE)
            else:
                shifted = item.columns
            updated.append(Classes(rows, shifted))
        classes = updated
        bank = _tables(symbols, classes, limit, tables)
    return bank, classes


def _tables(symbols: list[np.ndarray], classes: list[Classes], limit: int, tables: int) -> Bank:
    """Tables from the counts of each magnitude under the current classes. Gaps below the largest are filled."""
    size = 2 * limit + 1
    counts = np.zeros((tables, size))
    for values, item in zip(symbols, classes, strict=True):
        index = item.tables(tables).astype(np.int64) * size + values
        counts += np.bincount(index.ravel(), minlength=tables * size).reshape(tables, size)
    halves = (counts[:, limit:] + counts[:, limit::-1]) / 2  # per symbol: zero's count, then the mean of +m and -m
    magnitudes = np.zeros((tables, limit + 1), dtype=np.uint8)
    for row, half in zip(magnitudes, halves, strict=True):
        seen = np.flatnonzero(half)
        if len(seen):
            row[: seen[-1] + 1] = levels_of(np.where(half > 0, half, 0.25)[: seen[-1] + 1])
    return Bank(magnitudes)


def write_words(encoder: Encoder, words: np.ndarray) -> None:
    """Code a vector of unsigned 16-bit integers: indices into its distinct values if those are few, else bytes."""
    distinct, index = np.unique(words, return_inverse=True)
    if 0 < len(distinct) <= min(MAX_SYMBOLS, len(words) // 2):
        encoder.number(len(distinct))
        encoder.sequence(distinct >> 8)
        encoder.uniform(distinct & 255, 256)
        encoder.sequence(index)
    else:
        encoder.number(0)
        encoder.sequence(words >> 8)
        encoder.uniform(words & 255, 256)


def read_words(decoder: Decoder, count: int) -> np.ndarray:
    """Decode `count` unsigned 16-bit integers, int32. Raises StreamError. No memory is taken but the result's."""

    def pairs(size: int) -> np.ndarray:
        words = decoder.sequence(size)
        if words.min(initial=0) < 0 or words.max(initial=0) > 255:
            raise StreamError("a number is out of range")
        for start in range(0, size, BLOCK):
            part = words[start : start + BLOCK]
            part *= 256
            part += decoder.uniform(len(part), 256)
        return words

    distinct = decoder.number()
    if distinct == 0:
        return pairs(count)
    if not 1 <= distinct <= min(MAX_SYMBOLS, count):
        raise StreamError(f"a dictionary of {distinct} numbers")
    values, words = pairs(distinct), decoder.sequence(count)
    if words.min() < 0 or words.max() >= distinct:
        raise StreamError("a number outside the dictionary")
    for start in range(0, count, BLOCK):
        part = words[start : start + BLOCK]
        part[:] = values[part]
    return words
