"""What long work tells: one type, a line for a person, a share for a bar; and `print` shows all of it."""

from __future__ import annotations

import pytest
from toy import TableModel, toy_windows

from mezzotint.progress import Progress
from mezzotint.scoring import likelihood


def test_lines_and_shares():
    assert str(Progress.nth("pass", 1_000, 4_000)) == "pass 1,000 of 4,000"
    assert str(Progress.of_bytes(1_024, 2_048)) == "1,024 of 2,048 bytes" and str(Progress.of_bytes(3)) == "3 bytes"
    assert Progress.nth("gap", 1, 4).share == 0.25
    assert Progress("writing").share == Progress.of_bytes(3).share == 0


@pytest.mark.parametrize("score", [likelihood.nelbo, likelihood.chain_rule])
def test_print_shows_it(score, capsys):
    model = TableModel(4, 3)
    score(model, toy_windows(model, 32), progress=print)
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].startswith("pass ") and lines[-1].split()[1] == lines[-1].split()[3]
