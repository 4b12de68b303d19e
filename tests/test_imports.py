"""Imports point one way only, and the package loads lazily."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import mezzotint
from mezzotint.extras import PROVIDERS

FLOORS = [
    ["errors"],
    ["files", "seeding", "progress", "distributed", "signatures", "extras", "config"],
    ["objective", "data"],
    ["network"],
    ["training", "packing", "sampling"],
    ["pretrained", "scoring"],
    ["compression", "integrations"],
    ["apps"],
    ["cli"],
]
"""Rooms (modules or folders) by floor. A room imports from the floors below it, and from itself."""
SOURCE = Path(mezzotint.__file__).parent


def room_of(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    """Modules of the package that a file imports anywhere, inside functions too, without the package's own name."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {n.name for n in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{n.name}" for n in node.names}
    return {name.removeprefix("mezzotint.") for name in found if name.startswith("mezzotint.")}


def rooms(path: Path) -> set[str]:
    known = {name for floor in FLOORS for name in floor}
    return {name.split(".")[0] for name in imports(path)} & known


def test_every_room_has_its_place():
    places = {room_of(p) for p in SOURCE.rglob("*.py")} - {"__init__", "__main__"}
    assert places == {name for floor in FLOORS for name in floor}


@pytest.mark.parametrize("path", sorted(SOURCE.rglob("*.py")), ids=lambda p: str(p.relative_to(SOURCE)))
def test_imports_point_down(path):
    room = room_of(path)
    if room in ("__init__", "__main__"):
        return
    floor = next(i for i, names in enumerate(FLOORS) if room in names)
    assert rooms(path) <= {name for names in FLOORS[:floor] for name in names} | {room}


EXTRAS = {
    "datasets", "huggingface_hub", "lm_eval", "mkdocs", "mlflow", "mlflow_skinny", "regex", "starlette", "tensorboard",
    "tokenizers", "trackio", "transformers", "uvicorn", "wandb",
}  # fmt: skip
"""What packages of the extras import as; `tensorboard` comes through PyTorch as well."""


def imported_packages(path: Path) -> set[str]:
    """Top-level packages that a file imports anywhere, and PyTorch's own door to TensorBoard."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = [n.name for n in node.names] if isinstance(node, ast.Import) else []
        names += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
        found |= {"tensorboard" if name.startswith("torch.utils.tensorboard") else name.split(".")[0] for name in names}
    return found


def test_extras_are_imported_by_integrations_and_apps_only():
    for path in SOURCE.rglob("*.py"):
        if room_of(path) not in ("integrations", "apps"):
            assert not imported_packages(path) & EXTRAS, path
    listed = (Path(__file__).parents[1] / "pyproject.toml").read_text().split("[project.optional-dependencies]")[1]
    named = set(re.findall(r'"([A-Za-z0-9_-]+)', listed.split("dev = [")[0]))
    assert {name.replace("-", "_") for name in named} <= EXTRAS, "an extra that this test does not know"


def test_what_is_asked_for_by_name_is_there():
    """Rows of `extras` are modules of `integrations`, and each row is asked for."""
    used = set()
    for path in SOURCE.rglob("*.py"):
        used |= set(re.findall(r"\bextra\(\"(\w+)\"\)", path.read_text()))
    assert used == set(PROVIDERS) and all((SOURCE / "integrations" / f"{name}.py").is_file() for name in used)


@pytest.mark.parametrize("name", ["regex", "datasets", "published", "tokenizers", "tensorboard"])
def test_a_missing_extra_is_one_line_that_names_it(name):
    package = {"published": "huggingface_hub", "tensorboard": "torch.utils.tensorboard"}.get(name, name)
    said = run(
        f"import sys; sys.modules[{package!r}] = None\nfrom mezzotint.errors import MezzotintError\n"
        f"from mezzotint.extras import extra\ntry: extra({name!r})\nexcept MezzotintError as error: print(error)"
    )
    assert "pip install 'mezzotint[" in said and "\n" not in said


def test_no_circle_inside_a_room():
    """Files of one folder do not import one another in a circle."""
    graph = {}
    for path in SOURCE.rglob("*.py"):
        name = str(path.relative_to(SOURCE).with_suffix("")).replace("/", ".")
        graph[name] = imports(path)
    modules = set(graph)
    graph = {
        n: {m for m in modules if m != n and any(i == m or i.startswith(m + ".") for i in v)} for n, v in graph.items()
    }
    graph.pop("__init__")
    graph.pop("__main__")
    while leaves := [n for n, needs in graph.items() if not needs & graph.keys()]:
        for name in leaves:
            del graph[name]
    assert not graph, f"a circle among {sorted(graph)}"


@pytest.mark.parametrize(("name", "forbidden"), [("config", "torch"), ("packing/entropy", "torch")])
def test_modules_that_know_less(name, forbidden):
    tree = ast.parse((SOURCE / f"{name}.py").read_text())
    names = {n.name.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.Import) for n in node.names}
    names |= {str(node.module).split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert forbidden not in names


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_import_and_help_do_not_load_torch():
    assert run("import sys, mezzotint; print('torch' in sys.modules)") == "False"
    assert run(
        "import sys\nfrom mezzotint.cli.main import main\nmain(['--help'])\nprint('torch' in sys.modules)"
    ).endswith("False")


def test_no_public_function_shares_a_modules_name():
    """So none changes from a function to a module with the order of imports."""
    taken = {p.name.removesuffix(".py") for p in SOURCE.iterdir()}
    assert not taken & set(mezzotint.__all__)


def test_every_public_name_is_there():
    for name in mezzotint.__all__:
        assert getattr(mezzotint, name) is not None
    with pytest.raises(AttributeError, match="nothing"):
        _ = mezzotint.nothing
