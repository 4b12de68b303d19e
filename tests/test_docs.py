"""What the documentation tells a user to type is run: every `mezzotint` command and every Python block of each page.

Pages are README.md and docs/*.md. A page's blocks run in order in a folder of its own, in this process. The folder
holds `my_texts/`, and `data/`, `run/` and `model.mzt` too unless the page itself prepares data. The shipped model is a
small stand-in. So that all pages together take a minute, `shortened` cuts training down; nothing else is changed.

A block behind the line `<!-- not run: REASON -->` is only parsed: its commands must exist with their options.
"""

from __future__ import annotations

import dataclasses
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import toy

import mezzotint
from mezzotint import config, pretrained
from mezzotint.cli import main
from mezzotint.cli.arguments import canonical
from mezzotint.sampling import samplers

ROOT = Path(__file__).parent.parent
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
SHORT = [
    "--steps",
    "2",
    "--no-compile",
    "--layers",
    "1",
    "--width",
    "32",
    "--heads",
    "2",
    "--kv-heads",
    "2",
    "--sequence-length",
    "32",
    "--batch",
    "2",
]


@dataclass(frozen=True)
class Block:
    """A fenced block of a page: its language, text, line, and why it is not run, if it is not."""

    language: str
    text: str
    line: int
    excuse: str | None


def blocks(page: Path) -> Iterator[Block]:
    """The fenced blocks of a page, in order."""
    found = re.compile(
        r"(?:<!-- not run: (?P<excuse>.+?) -->\n)?^```(?P<language>\w*)\n(?P<text>.*?)^```$", re.M | re.S
    )
    text = page.read_text("utf-8")
    for match in found.finditer(text):
        line = text.count("\n", 0, match.start("text")) + 1
        yield Block(match["language"], match["text"], line, match["excuse"])


def commands(text: str) -> Iterator[list[str]]:
    """The words behind `mezzotint` of each such command of a shell block, without comments."""
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words[:1] == ["mezzotint"]:
            yield words[1:]


def shortened(words: list[str]) -> list[str]:
    """A `train` command of two steps of a tiny model (resuming: of the run's own); any other as it is."""
    if words[0] != "train":
        return words
    kept = [w for i, w in enumerate(words) if w != "--minutes" and (i == 0 or words[i - 1] != "--minutes")]
    return [*kept, *(["--steps", "3"] if "--resume" in words else SHORT)]


@pytest.fixture(scope="module")
def house(tmp_path_factory) -> Path:
    """What pages find in their folders: my_texts/, data/, run/, model.mzt."""
    folder = tmp_path_factory.mktemp("house")
    (folder / "my_texts").mkdir()
    rng = np.random.default_rng(0)
    parts = ["plate", "dark", "old", "light", "scrap", "burn", "ish", "er", "draw", "ing", "s", "ly", "re", "un", "the"]
    words = ["".join(rng.choice(parts, rng.integers(1, 5))) for _ in range(2000)]
    for i in range(40):
        (folder / "my_texts" / f"{i}.txt").write_text("The " + " ".join(rng.choice(words, 60)) + ".\n")
    mezzotint.prepare([folder / "my_texts"], folder / "data", val_fraction=0.1)
    model = mezzotint.ModelConfig(sequence_length=32, layers=1, width=32, heads=2, kv_heads=2)
    settings = mezzotint.TrainConfig(steps=2, batch=2, compile=False, device="cpu", causal_share=0.5)
    mezzotint.train(folder / "data", folder / "run", model=model, config=settings)
    stream = mezzotint.Dataset.open(folder / "data").split("train")
    mezzotint.pack(mezzotint.load_run(folder / "run"), stream, folder / "model.mzt")
    return folder


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_page(page, house, tmp_path, monkeypatch, capfd):
    todo = list(blocks(page))
    makes_data = any(
        words[0] == "prepare" for b in todo if b.language == "sh" and not b.excuse for words in commands(b.text)
    )
    shutil.copytree(house / "my_texts", tmp_path / "my_texts")
    if not makes_data:
        for name in ("data", "run"):
            shutil.copytree(house / name, tmp_path / name)
        shutil.copy(house / "model.mzt", tmp_path)
        settings = (tmp_path / "run" / "config.json").read_text().replace(str(house / "data"), str(tmp_path / "data"))
        (tmp_path / "run" / "config.json").write_text(settings)
    (tmp_path / "package" / "models").mkdir(parents=True)
    shutil.copy(house / "model.mzt", tmp_path / "package" / "models" / "prose.mzt")
    for name in ("report.html", "serve.html"):
        shutil.copy(Path(mezzotint.__file__).parent / "apps" / name, tmp_path / "package")
    monkeypatch.setattr(pretrained.importlib.resources, "files", lambda name: tmp_path / "package")
    monkeypatch.setattr("mezzotint.apps.serve.serve", lambda model, **words: None)
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for block in todo:
        where = f"{page.name}, line {block.line}"
        if block.language == "python":
            code = compile("\n" * (block.line - 1) + block.text, str(page), "exec")
            if not block.excuse:
                exec(code, names)
        elif block.language == "sh":
            for words in commands(block.text):
                if block.excuse:
                    main.build_parser().parse_args(canonical(words))
                    continue
                status = main.main(shortened(words))
                assert status == 0, f"{where}: mezzotint {shlex.join(words)}: {capfd.readouterr().err[-2000:]}"
        elif "mezzotint " in block.text:
            pytest.fail(f"{where}: a block of {block.language or 'no language'} hides its commands from this test")


def test_this_test_can_fail(tmp_path):
    """Blocks, excuses and commands are found where they are."""
    page = tmp_path / "page.md"
    page.write_text(
        "a\n```sh\nls\nmezzotint fill \"a # b\"   # why\n```\n<!-- not run: slow -->\n```sh\nmezzotint x\n```\n"
        "```python\n1 / 0\n```\n"
    )  # fmt: skip
    found = list(blocks(page))
    assert [(b.language, b.line, b.excuse) for b in found] == [("sh", 3, None), ("sh", 8, "slow"), ("python", 11, None)]
    assert list(commands(found[0].text)) == [["fill", "a # b"]]
    assert shortened(["train", "d", "--minutes", "5", "--out", "r"])[:4] == ["train", "d", "--out", "r"]


def test_the_sampler_that_contributing_adds_works(monkeypatch):
    """A row and a function are all it takes, besides the name."""
    (block,) = [b for b in blocks(ROOT / "CONTRIBUTING.md") if b.language == "python"]
    monkeypatch.setitem(samplers.SAMPLERS, "pairs", samplers.SAMPLERS["confidence"])  # taken out again at the end
    exec(block.text, {})
    (field,) = [f for f in dataclasses.fields(mezzotint.SamplingConfig) if f.name == "sampler"]
    named = dataclasses.replace(
        field.metadata["rule"], choices=(*config.SAMPLERS, "pairs")
    )  # as config.SAMPLERS would say
    monkeypatch.setattr(field, "metadata", {**field.metadata, "rule": named})
    canvas, allowed = torch.full((2, 6), 3), torch.ones(3, dtype=torch.bool)
    done = mezzotint.denoise(toy.TableModel(3, 6), canvas, allowed=allowed, sampler="pairs")
    assert done.forward_passes == 3 and (done.ids < 3).all()


def test_the_tree_names_every_file():
    """AGENTS.md has a line for each module and page of the package, and no line for a file that has gone."""
    tree = (ROOT / "AGENTS.md").read_text("utf-8").split("```")[1]
    named = [line.split()[0] for line in tree.splitlines() if line.strip()]
    source = ROOT / "src" / "mezzotint"
    files = {p.relative_to(source).as_posix() for p in source.rglob("*") if p.suffix in (".py", ".html")}
    assert len(named) == len(set(named))
    assert set(named) == {name for name in files if "/__init__" not in name}


def test_links_between_pages_and_files_hold():
    """Relative links lead to files of the repository."""
    for page in [*PAGES, *ROOT.glob("*.md")]:
        for target in re.findall(r"\]\((?!https?:|#|mailto:)([^)#]+)", page.read_text("utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_picture_is_the_scripts(tmp_path):
    subprocess.run([sys.executable, ROOT / "docs" / "mask_process.py", tmp_path / "p.svg"], check=True)
    assert (tmp_path / "p.svg").read_bytes() == (ROOT / "docs" / "mask_process.svg").read_bytes()


def test_the_guide_builds(tmp_path):
    """mkdocs in its strict mode, in which a broken link or a missing page is an error."""
    pytest.importorskip("mkdocs")
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    shutil.copy(ROOT / "mkdocs.yml", tmp_path)
    if not (tmp_path / "docs" / "scaling.md").exists():
        (tmp_path / "docs" / "scaling.md").write_text("# Scaling out\n")
    words = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", tmp_path / "site"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "site" / "mask_process.svg").is_file() and not (tmp_path / "site" / "mask_process.py").exists()
    assert "Reading the figures" in (tmp_path / "site" / "figures" / "index.html").read_text()


def test_the_workflow_runs_on_four_systems():
    """Every combination has a machine; every step either uses an action or runs a command."""
    yaml = pytest.importorskip("yaml")
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "tests.yml").read_text("utf-8"))["jobs"]
    matrix = jobs["tests"]["strategy"]["matrix"]
    assert {row["system"] for row in matrix["include"]} == set(matrix["system"])
    assert {row["runner"] for row in matrix["include"]} >= {"ubuntu-latest", "macos-latest", "windows-latest"}
    for job in jobs.values():
        assert all(("uses" in step) != ("run" in step) for step in job["steps"])
