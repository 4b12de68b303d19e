"""The report: its figures agree with the modules they come from, and its page loads nothing and escapes everything."""

from __future__ import annotations

import json
import math
import shutil
from html.parser import HTMLParser

import numpy as np
import pytest
from toy import TableModel, conditional_nll, toy_windows

from mezzotint.apps import charts, report
from mezzotint.data.dataset import Dataset
from mezzotint.errors import ArtifactError, CheckpointError, DataError
from mezzotint.packing.artifact import inspect_artifact, open_artifact
from mezzotint.scoring import kinds, likelihood
from mezzotint.scoring.rates import mask_rate_curve


class Page(HTMLParser):
    """Tags and references of a page; unbalanced tags are an error."""

    VOID = frozenset({"meta", "br", "link", "img", "hr", "input"})

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.references: list[str] = []
        self.ids: list[str] = []
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.references += [v for k, v in attributes if k in ("src", "href", "xlink:href", "action", "data") and v]
        self.ids += [v for k, v in attributes if k == "id" and v]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def page(trained, tmp_path_factory) -> str:
    out = tmp_path_factory.mktemp("report") / "report.html"
    made = report.report(
        trained.run, out, artifact=trained.artifact, dataset=Dataset.open(trained.data), tokens=512, samples=2
    )
    assert made["bytes"] == out.stat().st_size and made["file"] == str(out)
    assert set(made["sections"]) == {
        "Loss", "Cross-entropy against mask rate", "Bytes per tensor", "Scores", "Filled gaps", "Samples",
    }  # fmt: skip
    return out.read_text(encoding="utf-8")


def test_the_page_is_whole_and_loads_nothing(page):
    parsed = Page(page)
    assert parsed.tags.count("svg") == 3 and "script" not in parsed.tags
    assert {"img", "link", "iframe", "object"}.isdisjoint(parsed.tags)
    ids = set(parsed.ids)
    assert len(ids) == len(parsed.ids), "ids of different charts collide"
    assert all(r.startswith("#") and r[1:] in ids for r in parsed.references)
    assert "url(http" not in page and "@import" not in page and "default-src 'none'" in page
    assert "purl.org" not in page and "<?xml" not in page


def test_charts_follow_the_readers_colours(page):
    chart = page[page.index("<svg") : page.rindex("</svg>")]
    for sentinel in (charts.INK, charts.MUTED, charts.GRID, *charts.SERIES):
        assert sentinel not in page
    assert "var(--ink)" in chart and "var(--muted)" in chart and "var(--s0)" in chart
    assert "prefers-color-scheme: dark" in page


def test_figures_on_the_page_are_those_of_the_modules(page, trained):
    model = open_artifact(trained.artifact)
    windows = Dataset.open(trained.data).split("val").windows(model.config.sequence_length)
    bound = likelihood.nelbo(model, windows, tokens=512)
    assert f"≤ {bound.bpb:.3f}" in page and f"{bound.bpb:.4f}" in page and f"{bound.stderr_bpb:.4f}" in page
    assert f"{trained.artifact.stat().st_size:,}" in page and str(model.sha256) in page
    assert "yes, as a bound from above" in page


def test_a_page_without_artifact_or_data(trained, tmp_path):
    made = report.report(trained.run, tmp_path / "plain.html", samples=0)
    assert made["sections"] == ["Loss"]
    Page((tmp_path / "plain.html").read_text())


@pytest.mark.parametrize("width", [390, 1200])
def test_the_page_is_no_wider_than_a_screen(page, browser, width):
    """Nothing reaches over the right edge; what is wider, as tables may be, is scrolled by itself. No script goes wrong."""
    context = browser.new_context(viewport={"width": width, "height": 844})
    wrong: list[str] = []
    try:
        sheet = context.new_page()
        sheet.on("pageerror", lambda error: wrong.append(str(error)))
        sheet.set_content(page)
        assert sheet.evaluate("document.documentElement.scrollWidth") <= width
        smallest = "Math.min(...[...document.querySelectorAll('svg')].map(s => s.getBoundingClientRect().width))"
        assert sheet.evaluate(smallest) >= 0.6 * min(width, 600)
    finally:
        context.close()
    assert wrong == []


def test_text_is_escaped(trained, tmp_path):
    """A run's name, its settings and sampled text are data, never markup."""
    run = tmp_path / "<script>alert(1)</script>".replace("/", "\u2215")
    shutil.copytree(trained.run, run)
    report.report(run, tmp_path / "r.html", samples=0)
    html = (tmp_path / "r.html").read_text()
    assert "<script" not in html and "&lt;script&gt;" in html
    assert report._clean("a\0b\x1bc\td\n") == "a\ufffdb\ufffdc\td\n"


def test_comparison_names_what_may_stand_beside_an_autoregressive_figure():
    assert charts.comparison(kinds.EXACT) == (True, "yes")
    assert charts.comparison(kinds.UPPER_BOUND)[0] and "bound" in charts.comparison(kinds.UPPER_BOUND)[1]
    assert charts.comparison(kinds.NOT_A_BOUND) == (False, "no")


def test_mask_rate_curve_against_enumeration():
    """With a bin for every mask count, each bin's mean is the enumerated cross-entropy at that count."""
    import itertools

    model = TableModel(vocab_size=3, length=3, seed=4)
    windows = toy_windows(model, 24, seed=2)
    curve = mask_rate_curve(model, windows, bins=3, repeats=400, seed=1)  # type: ignore[arg-type]
    assert [(round(b.low * 3), round(b.high * 3)) for b in curve] == [(0, 1), (1, 2), (2, 3)]
    size = sum(windows.byte_count(i) for i in range(len(windows)))
    for k, b in enumerate(curve, 1):
        exact = []
        for i in range(len(windows)):
            x = tuple(int(t) for t in windows[i])
            sets = list(itertools.combinations(range(3), k))
            exact.append(np.mean([sum(conditional_nll(model, x, set(s), j) for j in s) / k for s in sets]))
        to_bpb = len(windows.ids) / size / math.log(2)
        assert b.bpb / b.nats_per_token == pytest.approx(to_bpb)
        assert b.nats_per_token == pytest.approx(np.mean(exact), abs=5 * b.stderr_bpb / to_bpb + 1e-9)
        assert 0 < b.stderr_bpb < 0.1 and b.masks > 1000


def test_mean_height_of_the_curve_is_the_nelbo():
    model = TableModel(vocab_size=3, length=4, seed=7)
    windows = toy_windows(model, 32)
    curve = mask_rate_curve(model, windows, bins=4, repeats=300)  # type: ignore[arg-type]
    bound = likelihood.nelbo(model, windows, repeats=300)  # type: ignore[arg-type]
    assert np.mean([b.bpb for b in curve]) == pytest.approx(bound.bpb, abs=0.03)


def test_every_byte_of_an_artifact_is_shown_once(trained):
    looked = inspect_artifact(trained.artifact)
    places = charts.bytes_by_group(looked)
    assert sum(sum(parts.values()) for parts in places.values()) == trained.artifact.stat().st_size
    assert {"embeddings", "layer 1", "layer 2", "file"} <= set(places)
    one = [t["bytes"] for t in looked["tensors"] if t["name"] == "blocks.1.mlp.up.weight"]
    assert places["layer 2"]["mlp.up"] == one[0] and places["file"]["rest"] > 0


def test_filled_gaps_keep_the_text_around(trained):
    model = open_artifact(trained.artifact)
    windows = Dataset.open(trained.data).split("val").windows(model.config.sequence_length)
    gaps = report.filled_gaps(model, windows, count=3)
    text = Dataset.open(trained.data).split("val")
    whole = model.tokenizer.decode([int(i) for i in text[0 : len(text)]])
    assert len(gaps) == 3
    for gap in gaps:
        assert gap["filled"] and gap["original"].strip()
        assert (gap["before"] + gap["original"] + gap["after"]).strip() in whole


def test_metrics_cut_short_by_a_crash_are_read(trained, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(trained.run, run)
    rows = charts.read_metrics(run)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 31, "tok')
    assert charts.read_metrics(run) == rows and rows[-1]["step"] == 30
    (run / "metrics.jsonl").write_text('{"step": 1}\nnonsense\n{"step": 3}\n')
    with pytest.raises(CheckpointError, match="line 2"):
        charts.read_metrics(run)
    (run / "metrics.jsonl").unlink()
    with pytest.raises(CheckpointError, match="no metrics"):
        charts.read_metrics(run)


def test_what_cannot_be_reported_leaves_nothing(trained, tmp_path):
    import mezzotint

    out = tmp_path / "r.html"
    with pytest.raises(CheckpointError):
        report.report(tmp_path, out)
    (tmp_path / "bad.mzt").write_bytes(b"nonsense")
    with pytest.raises(ArtifactError):
        report.report(trained.run, out, artifact=tmp_path / "bad.mzt")
    (tmp_path / "t.txt").write_text("one two three four five six seven " * 500)
    mezzotint.prepare([tmp_path / "t.txt"], tmp_path / "other", vocab_size=280, val=[tmp_path / "t.txt"])
    with pytest.raises(DataError, match="another tokenizer"):
        report.report(trained.run, out, dataset=Dataset.open(tmp_path / "other"))
    with pytest.raises(OSError):
        report.report(trained.run, tmp_path / "none" / "r.html", samples=0)
    assert not out.exists() and not list(tmp_path.glob(".*tmp"))


def test_one_row_of_metrics_draws(tmp_path):
    rows = [json.loads('{"step": 1, "train_nelbo_bpb": 4.0, "seconds": 1.0, "tokens": 10}')]
    assert charts.loss_chart(rows).startswith("<svg")
    assert "validation text" in charts.loss_chart([*rows, {"step": 2, "val_nelbo_bpb": 3.0}])
