"""The fuzz of texts, run small: a few texts through every verb, and what it says of verbs that misbehave."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

import mezzotint

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import fuzz_texts

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="processes that share the model are forked")


def test_every_kind_makes_texts_that_depend_on_their_number_alone():
    count = 2 * len(fuzz_texts.KINDS)
    once = [fuzz_texts.hostile_text(n, 3) for n in range(count)]
    assert once == [fuzz_texts.hostile_text(n, 3) for n in reversed(range(count))][::-1]
    assert {kind for kind, _ in once} == set(fuzz_texts.KINDS) and len({text for _, text in once}) > count // 2


def test_hostile_texts_break_nothing(tmp_path):
    """Of the pretrained model, from a process that holds nothing else; the long run is the benchmark's."""
    script = (
        "import json, sys; from pathlib import Path; import fuzz_texts\n"
        "texts, first, verbs = int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:]\n"
        "report = fuzz_texts.fuzz(texts, Path(sys.argv[1]), verbs=verbs, first=first)\n"
        "rows = [(r.texts, r.result, r.refused, r.memory) for r in report.rows.values()]\n"
        "print(json.dumps({'failures': report.failures, 'rows': rows}))\n"
    )
    places = [Path(fuzz_texts.__file__).parent, Path(mezzotint.__file__).parents[1]]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, places))}
    for verbs, texts, first in ((("score", "compress"), 4, 6), (("fill",), 1, 2)):
        words = [sys.executable, "-c", script, str(tmp_path / "kept"), str(texts), str(first), *verbs]
        done = subprocess.run(words, capture_output=True, text=True, env=environment, timeout=600)
        assert done.returncode == 0, done.stderr[-2000:]
        report = json.loads(done.stdout.splitlines()[-1])
        assert report["failures"] == [] and not (tmp_path / "kept").exists()
        assert len(report["rows"]) == len(verbs)
        for tried, results, refused, memory in report["rows"]:
            assert tried == texts == results + refused and 0 < memory < fuzz_texts.MEMORY


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
