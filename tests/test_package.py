"""What is built and installed: the wheel's and the sdist's contents, and what the base installation asks for."""

from __future__ import annotations

import ast
import email
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "mezzotint"
BUILD = "from setuptools import build_meta as b; b.build_wheel('dist'); b.build_sdist('dist')"


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """dist/ of a copy of the repository that holds a shipped model besides; no network, no isolation."""
    pytest.importorskip("setuptools", minversion="77")
    folder = tmp_path_factory.mktemp("checkout")
    ignore = shutil.ignore_patterns("*.egg-info", "__pycache__", "build")
    shutil.copytree(ROOT / "src", folder / "src", ignore=ignore)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    if not any((folder / "src" / "mezzotint" / "models").glob("*.mzt")):
        shutil.copy(ROOT / "tests" / "golden" / "v1.mzt", folder / "src" / "mezzotint" / "models" / "prose.mzt")
    (folder / "dist").mkdir()
    done = subprocess.run([sys.executable, "-c", BUILD], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return folder / "dist"


def wanted() -> set[str]:
    """Every source file, and what a user gets besides."""
    names = {f"mezzotint/{p.relative_to(SOURCE).as_posix()}" for p in SOURCE.rglob("*.py")}
    return names | {f"mezzotint/{n}" for n in ("py.typed", "apps/report.html", "apps/serve.html", "models/prose.mzt")}


def test_wheel_holds_package_data_and_nothing_else(built):
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as file:
        names = set(file.namelist())
    assert wanted() <= names
    outside = {n for n in names if not n.startswith("mezzotint/") and ".dist-info/" not in n}
    assert not outside and not any("test" in n or n.endswith((".pyc", ".bin")) for n in names)


def test_sdist_holds_the_same(built):
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as file:
        names = {n.partition("/")[2].removeprefix("src/") for n in file.getnames()}
    assert wanted() <= names


def test_installed_wheel_loads_its_model(built, tmp_path):
    """The wheel's own files, with nothing of the checkout on the path."""
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as file:
        file.extractall(tmp_path / "site")
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path / 'site')!r}); import mezzotint; print(mezzotint.__file__); "
        "print(mezzotint.pretrained_models()); print(mezzotint.load('prose').config.vocab_size)"
    )
    done = subprocess.run([sys.executable, "-I", "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    place, names, size = done.stdout.splitlines()
    assert place.startswith(str(tmp_path)) and "prose" in names and int(size) > 0


def test_base_dependencies_are_what_the_package_imports(built):
    """Each is imported by some module, and each other package that is imported belongs to an extra."""
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as file:
        (place,) = [n for n in file.namelist() if n.endswith(".dist-info/METADATA")]
        metadata = email.message_from_bytes(file.read(place))
    required = [str(line) for line in metadata.get_all("Requires-Dist") or []]
    base = {re.split(r"[\s<>=!~;\[]", line)[0].lower() for line in required if "extra ==" not in line}
    imported: set[str] = set()
    for path in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                imported.add(node.module.partition(".")[0])
    third = imported - set(sys.stdlib_module_names) - {"mezzotint"}
    extras = {
        "datasets",
        "huggingface_hub",
        "lm_eval",
        "regex",
        "starlette",
        "tensorboard",
        "tokenizers",
        "transformers",
        "uvicorn",
    }
    comes_with = {"markupsafe": "jinja2", "typing_extensions": "torch"}
    assert {comes_with.get(name, name).lower() for name in third - extras} == base
    optional = {re.split(r"[\s<>=!~;\[]", line)[0].replace("-", "_") for line in required if "extra ==" in line}
    assert extras <= optional
