"""The record folder: its bytes are counted right, its scripts run alone and give the record's figure."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import mezzotint
from mezzotint.apps import submission
from mezzotint.data.dataset import Dataset
from mezzotint.errors import ArtifactError, CheckpointError, DataError
from mezzotint.training.checkpoint import read_run

BLOCK = """
import importlib.abc, runpy, sys
class Block(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "mezzotint":
            raise ImportError("the installed package was used")
sys.meta_path.insert(0, Block())
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def alone(script: Path, *words: object, cwd: Path) -> str:
    """Run a script isolated, with the installed package out of reach; its standard output."""
    command = [sys.executable, "-I", "-c", BLOCK, str(script), *(str(w) for w in words)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def record(trained, tmp_path_factory):
    out = tmp_path_factory.mktemp("record") / "2026-01-01_test"
    made = submission.submit(
        trained.run,
        trained.artifact,
        out,
        dataset=Dataset.open(trained.data),
        tokens=512,
        name="A name",
        author="An author",
        github_id="someone",
        date="2026-01-01T00:00:00Z",
    )
    return out, made


def test_fields_and_bytes(record, trained):
    out, made = record
    fields = json.loads((out / "submission.json").read_text())
    # The fields that every record of the challenge has, with its types.
    kinds = {"author": str, "github_id": str, "name": str, "blurb": str, "date": str, "val_loss": float,
             "val_bpb": float, "bytes_total": int, "bytes_code": int}  # fmt: skip
    assert {k: type(fields[k]) for k in kinds} == kinds
    assert fields["author"] == "An author" and fields["date"] == "2026-01-01T00:00:00Z"
    code = sum((out / name).stat().st_size for name in ("train_gpt.py", "score.py"))
    assert fields["bytes_code"] == made["code_bytes"] == code == submission.code_bytes(trained.run)
    assert fields["bytes_total"] == made["total_bytes"] == code + (out / "model.mzt").stat().st_size <= 16_000_000
    assert (out / "model.mzt").read_bytes() == trained.artifact.read_bytes()
    assert fields["val_bpb_kind"] == "upper bound" and fields["val_bpb_stderr"] > 0
    readme = (out / "README.md").read_text()
    assert f"{fields['bytes_total']:,}" in readme and f"{fields['val_bpb']:.5f}" in readme and "upper bound" in readme


def test_log_is_the_runs_without_its_machine(record, trained):
    out, _ = record
    log = (out / "train.log").read_text()
    assert "checkpoint at step 30" in log and str(trained.data.parent) not in log


def test_scorer_alone_gives_the_records_figure(record, trained, tmp_path):
    out, made = record
    result = json.loads(alone(out / "score.py", "--data", trained.data, "--tokens", "512", cwd=tmp_path))
    assert result["results"][0]["bpb"] == pytest.approx(made["val_bpb"], abs=1e-9)
    assert result["model_sha256"] == mezzotint.open_artifact(trained.artifact).sha256


def test_trainer_alone_trains_packs_and_scores(record, trained, tmp_path):
    """Two steps from the record's own script: the same steps as the package makes."""
    out, _ = record
    words = ("--data", trained.data, "--out", tmp_path / "out", "--steps", "2", "--tokens", "256")
    figures = json.loads(alone(out / "train_gpt.py", *words, cwd=tmp_path).splitlines()[-1])
    assert figures["steps"] == 2 and figures["pack"]["verified"] is True
    assert figures["pack"]["code_bytes"] == submission.code_bytes(trained.run)
    assert figures["score"]["kind"] == "upper bound"
    described = read_run(trained.run)
    config = dataclasses.replace(described["train"], steps=2)
    mezzotint.train(trained.data, tmp_path / "ours", model=described["model"], config=config)
    theirs = mezzotint.load_run(tmp_path / "out" / "run").network.state_dict()
    for name, tensor in mezzotint.load_run(tmp_path / "ours").network.state_dict().items():
        assert tensor.equal(theirs[name])


def test_source_can_be_read(record, tmp_path):
    out, _ = record
    alone(out / "train_gpt.py", "--source", tmp_path / "source", cwd=tmp_path)
    package = Path(mezzotint.__file__).parent
    source = tmp_path / "source" / "mezzotint"
    written = {p.relative_to(source).as_posix() for p in source.rglob("*.py")}
    assert {
        "__init__.py",
        "training/run.py",
        "packing/artifact.py",
        "scoring/likelihood.py",
        "network/model.py",
    } <= written
    assert not any(name.startswith(("cli/", "apps/")) for name in written)
    for name in written - {"__init__.py"}:
        assert (tmp_path / "source" / "mezzotint" / name).read_text() == (package / name).read_text()


def test_requirements_are_what_the_scripts_import(record):
    out, _ = record
    needed = (out / "requirements.txt").read_text().split()
    assert {"torch", "numpy", "sentencepiece", "safetensors"} <= set(needed)
    assert {"rich", "matplotlib", "jinja2"}.isdisjoint(needed)


def test_scripts_are_deterministic_and_plain_text(trained):
    texts = submission.scripts(trained.run)
    assert texts == submission.scripts(trained.run)
    for text in texts.values():
        compile(text, "script", "exec")
        assert text.isascii()


def test_over_budget_names_the_budget_to_pack_with(trained, tmp_path, monkeypatch):
    code = submission.code_bytes(trained.run)
    monkeypatch.setattr(submission, "BUDGET", trained.artifact.stat().st_size + code - 1)
    with pytest.raises(ArtifactError) as refused:
        submission.submit(trained.run, trained.artifact, tmp_path / "r", dataset=Dataset.open(trained.data))
    found = re.search(r"--budget (\d+)", str(refused.value))
    assert found and int(found[1]) == trained.artifact.stat().st_size - 1
    assert not (tmp_path / "r").exists()


def test_what_does_not_belong_together_is_refused(trained, tmp_path):
    data = Dataset.open(trained.data)
    other = tmp_path / "other"
    shutil.copytree(trained.run, other)
    described = json.loads((other / "config.json").read_text())
    described["train"]["seed"] = 99
    (other / "config.json").write_text(json.dumps(described))
    with pytest.raises(ArtifactError, match="not packed from"):
        submission.submit(other, trained.artifact, tmp_path / "r", dataset=data)
    described["model"]["width"] = 64
    (other / "config.json").write_text(json.dumps(described))
    with pytest.raises(ArtifactError, match="not packed from"):
        submission.submit(other, trained.artifact, tmp_path / "r", dataset=data)
    with pytest.raises(DataError, match="needs a score"):
        submission.submit(trained.run, trained.artifact, tmp_path / "r")
    shutil.copytree(trained.run, tmp_path / "no_log")
    (tmp_path / "no_log" / "train.log").unlink()
    with pytest.raises(CheckpointError, match=r"train\.log"):
        submission.submit(tmp_path / "no_log", trained.artifact, tmp_path / "r", dataset=data)
    assert not (tmp_path / "r").exists()


def test_other_peoples_files_are_not_replaced(trained, tmp_path):
    out = tmp_path / "thesis"
    out.mkdir()
    (out / "chapter.txt").write_text("years of work")
    with pytest.raises(ArtifactError, match="other files"):
        submission.submit(trained.run, trained.artifact, out, dataset=Dataset.open(trained.data))
    with pytest.raises(ArtifactError, match="is a file"):
        submission.submit(trained.run, trained.artifact, out / "chapter.txt", dataset=Dataset.open(trained.data))
    assert (out / "chapter.txt").read_text() == "years of work"
