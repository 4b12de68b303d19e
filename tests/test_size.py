"""No file, class, function or parameter list is too long to be taken in at once."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import mezzotint

SOURCE = Path(mezzotint.__file__).parent
FILE, CLASS, FUNCTION, PARAMETERS = 650, 220, 80, 6
EXCEPTIONS: dict[str, str] = {}
"""What is, or may be, longer -> why."""


def long_parts(path: Path) -> Iterator[str]:
    """Names of what is beyond the limits, with its size."""
    name = path.relative_to(SOURCE).as_posix()
    text = path.read_text("utf-8")
    if (lines := len(text.splitlines())) > FILE:
        yield f"{name}: {lines} lines"
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        lines = (node.end_lineno or 0) - node.lineno + 1
        if lines > (CLASS if isinstance(node, ast.ClassDef) else FUNCTION):
            yield f"{name}: {node.name}: {lines} lines"
        if isinstance(node, ast.ClassDef):
            continue
        taken = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
        taken = [a for a in taken if a not in ("self", "cls")]
        if node.name.startswith("_") and not node.name.startswith("__") and len(taken) > PARAMETERS:
            yield f"{name}: {node.name}: {len(taken)} parameters"


def test_nothing_is_too_long():
    found = {part.rpartition(":")[0]: part for path in sorted(SOURCE.rglob("*.py")) for part in long_parts(path)}
    assert found.keys() <= EXCEPTIONS.keys(), sorted(part for name, part in found.items() if name not in EXCEPTIONS)


def test_this_test_can_fail(tmp_path, monkeypatch):
    monkeypatch.setattr("test_size.SOURCE", tmp_path)
    body = "    x = 1\n" * 80
    (tmp_path / "a.py").write_text(f"def f():\n{body}\n\ndef _g(a, b, c, d, e, *, f, g): ...\n" + "y = 2\n" * 600)
    assert list(long_parts(tmp_path / "a.py")) == ["a.py: 684 lines", "a.py: f: 81 lines", "a.py: _g: 7 parameters"]
