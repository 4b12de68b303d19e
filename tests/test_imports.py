"""Imports point one way only, and the package loads lazily."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import mezzotint

ORDER = [
    "errors",
    "files",
    "config",
    "data",
    "model",
    "objective",
    "optim",
    "train",
    "quantize",
    "entropy",
    "artifact",
    "exchange",
    "shipped",
    "evaluate",
    "compress",
    "sample",
    "memorization",
    "harness",
    "hub",
    "submission",
    "report",
    "watch",
    "serve",
    "cli",
]
SOURCE = Path(mezzotint.__file__).parent


def imported(path: Path) -> set[str]:
    """Modules of the package that a file imports anywhere, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {n.name.split(".")[1] for n in node.names if n.name.startswith("mezzotint.")}
        elif isinstance(node, ast.ImportFrom) and node.module == "mezzotint":
            found |= {n.name for n in node.names if n.name in ORDER}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("mezzotint."):
            found.add(str(node.module).split(".")[1])
    return found


def test_every_module_has_its_place():
    modules = {p.stem for p in SOURCE.glob("*.py")} - {"__init__", "__main__"}
    assert modules <= set(ORDER)


@pytest.mark.parametrize("name", [n for n in ORDER if (SOURCE / f"{n}.py").exists()])
def test_imports_point_one_way(name):
    allowed = set(ORDER[: ORDER.index(name)])
    assert imported(SOURCE / f"{name}.py") <= allowed


@pytest.mark.parametrize(("name", "forbidden"), [("config", "torch"), ("entropy", "torch")])
def test_modules_that_know_less(name, forbidden):
    tree = ast.parse((SOURCE / f"{name}.py").read_text())
    names = {n.name.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.Import) for n in node.names}
    names |= {str(node.module).split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert forbidden not in names


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_import_and_help_do_not_load_torch():
    assert run("import sys, mezzotint; print('torch' in sys.modules)") == "False"
    assert run("import sys\nfrom mezzotint.cli import main\nmain(['--help'])\nprint('torch' in sys.modules)").endswith(
        "False"
    )


def test_functions_that_share_a_modules_name():
    """`mezzotint.train` can be called whichever way it was first imported."""
    for first in (
        "import mezzotint.train, mezzotint.sample",
        "from mezzotint import train",
        "from mezzotint.train import train",
    ):
        assert (
            run(f"{first}\nimport mezzotint\nprint(callable(mezzotint.train), callable(mezzotint.sample))")
            == "True True"
        )


def test_every_public_name_is_there():
    for name in mezzotint.__all__:
        assert getattr(mezzotint, name) is not None
    with pytest.raises(AttributeError, match="nothing"):
        _ = mezzotint.nothing
