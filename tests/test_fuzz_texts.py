"""The fuzz of texts, run small: a few texts through every verb, and what it says of verbs that misbehave."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import fuzz_texts

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="processes that share the model are forked")


def test_every_kind_makes_texts_that_depend_on_their_number_alone():
    count = 2 * len(fuzz_texts.KINDS)
    once = [fuzz_texts.hostile_text(n, 3) for n in range(count)]
    assert once == [fuzz_texts.hostile_text(n, 3) for n in reversed(range(count))][::-1]
    assert {kind for kind, _ in once} == set(fuzz_texts.KINDS) and len({text for _, text in once}) > count // 2


def test_hostile_texts_break_nothing(tmp_path):
    """Of the shipped model; the long run is the benchmark's."""
    for verbs, texts, first in ((("score", "compress"), 4, 6), (("fill",), 1, 2)):
        report = fuzz_texts.fuzz(texts, tmp_path / "kept", verbs=verbs, first=first)
        assert report.failures == [] and not (tmp_path / "kept").exists()
        for row in report.rows.values():
            assert row.texts == texts == row.result + row.refused and 0 < row.memory < fuzz_texts.MEMORY


def _raises(model, text, rng):
    raise ValueError("a bug")


def _dies(model, text, rng):
    os._exit(1)


def _eats(model, text, rng):
    bytearray(2 * fuzz_texts.MEMORY)


def _dawdles(model, text, rng):
    begun = time.process_time()
    while time.process_time() < begun + 0.02:
        pass


def test_what_breaks_is_told_and_kept(tmp_path, monkeypatch):
    bad = {"raises": _raises, "dies": _dies, "dawdles": _dawdles}
    if sys.platform == "linux":  # elsewhere the limit is not kept
        bad["eats"] = _eats
    monkeypatch.setattr(fuzz_texts, "VERBS", bad)
    monkeypatch.setattr(fuzz_texts, "SECONDS", 0.01)
    report = fuzz_texts.fuzz(1, tmp_path, model=object(), verbs=tuple(bad))
    said = {line.split()[0]: line for line in report.failures}
    assert said.keys() == bad.keys() and all(row.broken == 1 for row in report.rows.values())
    assert "ValueError: a bug" in said["raises"] and "died" in said["dies"] and "took 0.0" in said["dawdles"]
    assert "eats" not in said or "MemoryError" in said["eats"]
    assert len(list(tmp_path.iterdir())) == 1 and report.table().count("\n") == 1 + len(bad)
