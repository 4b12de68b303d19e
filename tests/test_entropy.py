"""Entropy coding: round trips, ideal lengths, and an independent decoder written from FORMAT.md."""

from __future__ import annotations

import math
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mezzotint.packing import entropy


def spread_plane(rows: int, columns: int, seed: int, limit: int = 31) -> np.ndarray:
    """Gaussian codes whose spread varies by row and by column."""
    rng = np.random.default_rng(seed)
    spread = np.exp(rng.normal(0, 0.6, (rows, 1)) + rng.normal(0, 0.4, (1, columns)) + 1)
    return np.clip(np.rint(rng.normal(size=(rows, columns)) * spread), -limit, limit).astype(np.int16)


def code_planes(planes: list[np.ndarray], **options) -> tuple[bytes, list[bytes], float]:
    bank, classes = entropy.fit(planes, **options)
    encoder = entropy.Encoder()
    bank.write(encoder)
    streams, bits = [], 0.0
    for plane, item in zip(planes, classes, strict=True):
        writer = entropy.Encoder()
        entropy.write_plane(writer, plane, item, bank)
        streams.append(writer.finish())
        bits += entropy.plane_bits(plane, item, bank)
    return encoder.finish(), streams, bits


def read_planes(head: bytes, streams: list[bytes], shapes: list[tuple[int, int]]) -> list[np.ndarray]:
    decoder = entropy.Decoder(head)
    bank = entropy.Bank.read(decoder)
    decoder.finish()
    planes = []
    for stream, shape in zip(streams, shapes, strict=True):
        reader = entropy.Decoder(stream)
        planes.append(entropy.read_plane(reader, shape, bank))
        reader.finish()
    return planes


def test_planes_come_back() -> None:
    planes = [spread_plane(70, 90, 0), spread_plane(3, 500, 1), np.zeros((5, 7), np.int16), spread_plane(1, 1, 2)]
    head, streams, _ = code_planes(planes)
    for plane, back in zip(planes, read_planes(head, streams, [p.shape for p in planes]), strict=True):
        np.testing.assert_array_equal(plane, back)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 12), st.integers(1, 12), st.integers(-200, 200), st.integers(0, 300), st.integers(0, 2**32 - 1))
def test_any_small_plane_comes_back(rows: int, columns: int, low: int, span: int, seed: int) -> None:
    plane = np.random.default_rng(seed).integers(low, low + span + 1, (rows, columns)).astype(np.int16)
    head, streams, _ = code_planes([plane])
    np.testing.assert_array_equal(read_planes(head, streams, [plane.shape])[0], plane)


def test_blocks_of_rows_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(entropy, "BLOCK", 200)
    plane = spread_plane(70, 90, 3)
    head, streams, _ = code_planes([plane])
    np.testing.assert_array_equal(read_planes(head, streams, [plane.shape])[0], plane)


def test_size_is_near_the_ideal_code_length() -> None:
    planes = [spread_plane(256, 300, seed) for seed in range(4)]
    _, streams, bits = code_planes(planes)
    size = 8 * sum(map(len, streams))
    assert bits < size <= 1.01 * bits + sum(8 * (p.shape[0] + p.shape[1]) for p in planes)


def test_size_approaches_the_source_entropy() -> None:
    """Independent of the coder's own figures: the entropy of the known distributions that made the codes."""
    rng = np.random.default_rng(0)
    spread = np.repeat([1.0, 6.0], 150)[:, None] * np.repeat([1.0, 2.0], 200)[None, :]
    plane = np.rint(rng.normal(size=spread.shape) * spread).astype(np.int16)
    true = 0.0
    for sigma in np.unique(spread):
        edges = np.arange(-60, 61) + 0.5
        cdf = np.array([0.5 * (1 + math.erf(e / sigma / math.sqrt(2))) for e in edges])
        p = np.diff(cdf)
        p = p[p > 0]
        true += -(p * np.log2(p)).sum() * (spread == sigma).sum()
    head, streams, _ = code_planes([plane])
    assert 8 * (len(streams[0]) + len(head)) < 1.03 * true


def test_row_and_column_classes_pay() -> None:
    planes = [spread_plane(256, 300, seed) for seed in range(3)]
    _, _, both = code_planes(planes)
    _, _, rows = code_planes(planes, columns=False)
    codes = np.concatenate([p.ravel() for p in planes])
    share = np.unique(codes, return_counts=True)[1] / codes.size
    order_zero = -(share * np.log2(share)).sum() * codes.size
    assert both < 0.97 * rows < 0.94 * order_zero


def test_coding_is_deterministic() -> None:
    assert code_planes([spread_plane(40, 40, 5)]) == code_planes([spread_plane(40, 40, 5)])


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, entropy.MAX_LEVEL), min_size=2, max_size=80))
def test_weights_are_probabilities(levels: list[int]) -> None:
    array = np.array(levels, dtype=np.uint8)
    if not array.any():
        with pytest.raises(entropy.StreamError):
            entropy.weights_of(array)
        return
    weights = entropy.weights_of(array)
    assert weights.sum() == 1 << 24 and weights.min() >= 1


def test_powers_are_exact() -> None:
    """floor(2^(8 + q/8)) by exact comparison: power^8 <= 2^(64 + q) < (power + 1)^8."""
    for q in range(1, entropy.MAX_LEVEL + 1):
        power = int(entropy.POWERS[q])
        assert power**8 <= 1 << (64 + q) < (power + 1) ** 8


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 65_535), max_size=300), st.booleans())
def test_words_come_back(words: list[int], few: bool) -> None:
    array = np.array([w % 7 * 9_000 for w in words] if few else words, dtype=np.uint16)
    encoder = entropy.Encoder()
    entropy.write_words(encoder, array)
    decoder = entropy.Decoder(encoder.finish())
    np.testing.assert_array_equal(entropy.read_words(decoder, len(array)), array)
    decoder.finish()


def test_hostile_streams_raise_stream_error() -> None:
    head, streams, _ = code_planes([spread_plane(30, 30, 6)])
    rng = np.random.default_rng(0)
    refused = 0
    for trial in range(300):
        bad = bytearray(head if trial % 2 else streams[0])
        if trial % 3 == 0:
            bad = bad[: 4 * rng.integers(0, len(bad) // 4)]
        else:
            for _ in range(rng.integers(1, 4)):
                bad[rng.integers(len(bad))] = rng.integers(256)
        try:
            read_planes(*((bytes(bad), streams) if trial % 2 else (head, [bytes(bad)])), [(30, 30)])
        except entropy.StreamError:
            refused += 1
    assert refused > 100  # others decode to different codes, which is the checksum's business
    with pytest.raises(entropy.StreamError):
        entropy.Decoder(b"abc")


class PlainDecoder:
    """A range decoder in plain integers, written from FORMAT.md alone."""

    def __init__(self, data: bytes) -> None:
        self.words = list(struct.unpack(f"<{len(data) // 4}I", data))
        self.at = 0
        self.lower, self.range = 0, (1 << 64) - 1
        self.point = self.word() << 32 | self.word()

    def word(self) -> int:
        self.at += 1
        return self.words[self.at - 1] if self.at <= len(self.words) else 0

    def symbol(self, weights: list[int]) -> int:
        scale = self.range >> 24
        quantile = min((self.point - self.lower) % (1 << 64) // scale, (1 << 24) - 1)
        left = index = 0
        while quantile >= left + weights[index]:
            left += weights[index]
            index += 1
        self.lower = (self.lower + scale * left) % (1 << 64)
        self.range = scale * weights[index]
        if self.range < 1 << 32:
            self.lower = self.lower << 32 & ((1 << 64) - 1)
            self.range <<= 32
            self.point = (self.point << 32 | self.word()) & ((1 << 64) - 1)
        return index


def test_stream_matches_the_specification() -> None:
    """Symbols coded here decode with an independent integer decoder."""
    rng = np.random.default_rng(1)
    tables = [np.array(t, dtype=np.uint8) for t in ([10, 100, 3, 0, 90], [192, 1], list(range(1, 180, 3)))]
    encoder = entropy.Encoder()
    sent = []
    for _ in range(300):
        levels = tables[rng.integers(3)]
        values = rng.integers(0, len(levels), rng.integers(1, 4))
        encoder.symbols(values, entropy.weights_of(levels))
        sent.append((levels, values))
    plain = PlainDecoder(encoder.finish())
    for levels, values in sent:
        weights = entropy.weights_of(levels).tolist()
        assert [plain.symbol(weights) for _ in values] == values.tolist()
