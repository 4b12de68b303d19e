"""Every measured number of README and docs stands in a record or in LOG.md, and docs/figures.py notices where it does not."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import shutil
from pathlib import Path

import pytest

import mezzotint

ROOT = Path(__file__).parent.parent
spec = importlib.util.spec_from_file_location("figures", ROOT / "docs" / "figures.py")
assert spec and spec.loader
figures = importlib.util.module_from_spec(spec)
spec.loader.exec_module(figures)


def test_pages_and_sources_agree():
    """Where this fails, `python docs/figures.py` says the same, and `--write` mends what can be mended."""
    assert figures.check(ROOT) == []


def test_figures_are_of_the_shipped_model():
    """A new shipped model needs a new record, and what it compresses measured again."""
    shipped = hashlib.sha256((Path(mezzotint.__file__).parent / "models" / "prose.mzt").read_bytes()).hexdigest()
    records = json.loads((ROOT / "docs" / "figures.json").read_text("utf-8"))["records"]
    for name in ("prose", "compress"):
        assert json.loads((ROOT / records[name]).read_text("utf-8"))["model_sha256"] == shipped, records[name]


@pytest.fixture
def copy(tmp_path):
    """A checkout with one page, one record and a log."""
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text("Takes 1.25 s.\n\n| a | 2.50 ± 0.10 |\n\nBetween 0.1 and\n0.6: 1,234 `9.9`.\n")
    (tmp_path / "CONTRIBUTING.md").write_text("Nothing of 2026-11-26 here.\n")
    (tmp_path / "LOG.md").write_text(
        "# Log\n\n## 2026: speed (kept)\n\nIt took 7 runs and 1.245 s.\n\n## 2026: more\n\n1 s\n"
    )
    rows = [
        {"k": "a", "x": 2.4951, "se": 0.1, "tokens": 9},
        {"k": "a", "x": 3, "se": 0, "tokens": 2},
        {"k": "b", "x": 1},
    ]
    (tmp_path / "record.json").write_text(json.dumps({"n": 1234, "rows": rows}))
    table = {
        "records": {"r": "record.json"},
        "figures": [
            {"page": "README.md", "text": "Takes {} s.",
             "from": [{"entry": "2026: speed", "text": "took {-} runs and {} s"}]},
            {"page": "README.md", "text": "| a | {} ± {} |", "from": ["r:rows[k=a].x", "r:rows[k=a].se"]},
            {"page": "README.md", "text": "0.6: {}", "from": ["2 * r:n / 2"]},
        ],
        "not measured": [{"page": "README.md", "text": "Between 0.1 and 0.6", "why": "a setting"}],
    }  # fmt: skip
    (tmp_path / "docs" / "figures.json").write_text(json.dumps(table))
    return tmp_path


def test_right_numbers_pass_and_keep_their_decimals(copy):
    """1.245 is 1.25 with two decimals, 2.4951 is 2.50; code and dates are no figures."""
    assert figures.check(copy) == []


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ("2.50", "2.49", "README.md: 2.49 should be 2.50 in: | a"),
        ("1.25 s", "1.2 s", None),  # fewer decimals
        ("1.25 s", "1.3 s", "1.3 should be 1.2"),
        ("\n\nBetween", "\n| b | 12 |\n\nBetween", "line 4: 12 has no source"),
        ("Between", "Half of it, 50%, and 3.5 more. Between", "50% has no source"),
        ("1,234", "1,234 or 56.78", "56.78 has no source"),
        ("Takes", "It takes", "0 times instead of once: Takes"),
        ("Between 0.1", "Between 0.2", "0.2 has no source"),
    ],
)
def test_what_is_noticed(copy, old, new, complaint):
    """A number changed, without a source, or whose words have gone from the page."""
    page = copy / "README.md"
    page.write_text(page.read_text().replace(old, new, 1))
    problems = figures.check(copy)
    assert (problems == []) if complaint is None else any(complaint in problem for problem in problems)


def test_a_source_that_changed_or_went_is_noticed_and_written(copy):
    """A new record's numbers go to the pages by `--write`; a heading that has gone does not mend itself."""
    record = copy / "record.json"
    record.write_text(record.read_text().replace("2.4951", "3.14159").replace("1234", "987654"))
    assert len(figures.check(copy)) == 2
    assert figures.check(copy, write=True) == []
    assert "| a | 3.14 ± 0.10 |" in (copy / "README.md").read_text() and "987,654" in (copy / "README.md").read_text()
    assert figures.check(copy) == []
    (copy / "LOG.md").write_text("# Log\n")
    assert "0 entries of LOG.md begin with '2026: speed'" in figures.check(copy)[0]


def test_a_page_without_measured_numbers(copy):
    """Named without a text, all of it is left out."""
    (copy / "docs" / "limits.md").write_text("| files | 64 |\n")
    assert figures.check(copy) == ["docs/limits.md, line 1: 64 has no source in docs/figures.json"]
    table = json.loads((copy / "docs" / "figures.json").read_text())
    table["not measured"].append({"page": "docs/limits.md", "why": "bounds"})
    (copy / "docs" / "figures.json").write_text(json.dumps(table))
    assert figures.check(copy) == []


def test_the_list_names_pages_that_exist(copy):
    shutil.move(copy / "README.md", copy / "docs" / "readme.md")
    (copy / "README.md").write_text("")
    table = copy / "docs" / "figures.json"
    table.write_text(table.read_text().replace("README.md", "docs/gone.md"))
    assert "docs/figures.json: there is no page docs/gone.md" in figures.check(copy)
