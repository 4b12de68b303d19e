"""Verbatim repetition: found exactly what a plain search finds, and planted repetition is seen."""

from __future__ import annotations

import dataclasses
import random

import numpy as np
import pytest

import mezzotint
from mezzotint.errors import ConfigError, DataError
from mezzotint.sampling.generate import Samples
from mezzotint.scoring import memorization
from mezzotint.scoring.memorization import find_strings, memorized, stream_text


@pytest.mark.parametrize("chunk", [64, 1 << 20])
def test_finds_what_python_finds(chunk, monkeypatch):
    """Against `in`, on text of few letters where near misses abound, with pieces that end inside strings."""
    monkeypatch.setattr(memorization, "CHUNK", chunk)
    rng = random.Random(0)
    parts = [bytes(rng.choices(b"ab \x80", k=n)) for n in (3000, 11, 12, 0, 700)]
    wanted = [p[i : i + 12] for p in parts for i in range(0, max(0, len(p) - 11), 37)]
    wanted += [bytes(rng.choices(b"ab \x80", k=12)) for _ in range(300)] + [b"too short"]
    expected = {s for s in wanted if len(s) == 12 and any(s in p for p in parts)}
    assert find_strings(wanted, parts, 12) == expected
    assert 50 < len(expected) < len(set(wanted))


def test_stream_text_misses_nothing_at_its_seams(trained, monkeypatch):
    stream = mezzotint.Dataset.open(trained.data).split("train")
    whole = b"\0".join(stream_text(stream, 51))
    monkeypatch.setattr(memorization, "CHUNK", 97)
    ids = np.asarray(stream[0 : len(stream)])
    documents = [
        stream.tokenizer.decode_bytes(d) for d in np.split(ids, np.flatnonzero(ids == stream.tokenizer.bos_id))
    ]
    strings = {d[i : i + 50] for d in documents for i in range(0, len(d) - 49, 7)}
    assert find_strings(strings, stream_text(stream, 51), 50) == strings
    assert all(d in whole for d in documents)


def fake_samples(texts):
    left = list(texts)

    def sample(model, n, length, *, seed, **settings):
        return Samples([left.pop(0) for _ in range(n)], [[]] * n, [True] * n, 1, 0.0, seed)

    return sample


def test_planted_repetition_is_seen(trained, monkeypatch):
    """Two texts of 100 bytes: one from the training split, one of words it does not have."""
    dataset = mezzotint.Dataset.open(trained.data)
    copied = next(stream_text(dataset.split("train"), 51)).split(b"\0")[3][:100].decode()
    fresh = "zinc " * 20
    monkeypatch.setattr(memorization, "sample", fake_samples([copied, fresh]))
    result = memorized(mezzotint.load(trained.artifact), dataset, samples=2, held_out=2, batch=1, tokens=96)
    sampled = result["sampled"]
    assert (sampled["texts"], sampled["strings"], sampled["found"]) == (2, 102, 51)
    assert sampled["share"] == 0.5 and sampled["example"] == copied[:50]
    # Two units of equal size with shares 1 and 0: the standard error of their mean is 1/2.
    assert sampled["stderr"] == pytest.approx(0.5)
    nothing = memorization.Share(32, 1000, 0, 0.0, 0.0, "")
    assert (1 - nothing.upper95) ** 32 == pytest.approx(0.05), "nothing found in 32 texts is no proof of nothing"


def test_held_out_share_is_that_of_a_plain_search(trained):
    dataset = mezzotint.Dataset.open(trained.data)
    model = mezzotint.load(trained.artifact)
    result = memorized(model, dataset, samples=4, held_out=4, tokens=24, length=8, seed=0, steps=4)
    train = b"\0".join(stream_text(dataset.split("train"), 9))
    texts = memorization.held_out_texts(dataset, 4, 24)
    strings = [t[i : i + 8] for t in texts for i in range(len(t) - 7)]
    assert result["held_out"]["strings"] == len(strings)
    assert result["held_out"]["found"] == sum(s in train for s in strings) > 0
    assert result == memorized(model, dataset, samples=4, held_out=4, tokens=24, length=8, seed=0, steps=4)
    assert 0 <= result["sampled"]["share"] <= 1 and result["ratio"] is not None


def test_bad_input_is_refused(trained):
    dataset, model = mezzotint.Dataset.open(trained.data), mezzotint.load(trained.artifact)
    with pytest.raises(ConfigError, match="at least"):
        memorized(model, dataset, samples=0)
    with pytest.raises(DataError, match="longer or more samples"):
        memorized(model, dataset, samples=1, tokens=4, length=500, steps=1)
    other = dataclasses.replace(model, tokenizer=type("T", (), {"sha256": "other", "bos_id": 1})())
    with pytest.raises(DataError, match="another tokenizer"):
        memorized(other, dataset)
