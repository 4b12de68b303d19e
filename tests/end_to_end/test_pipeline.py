"""The whole way through the real command line, on a small text: prepare to submit, and every kind of bad input."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from commands import run_command

MODEL = ["--sequence-length", "32", "--layers", "2", "--width", "32", "--heads", "2", "--kv-heads", "2"]
QUICK = ["--preset", "tiny", *MODEL, "--batch", "4", "--no-compile", "--log-every", "0"]


def mezzotint(*words: str | Path, check: int | None = 0, **options) -> subprocess.CompletedProcess[str]:
    if options:
        command = [sys.executable, "-m", "mezzotint", *(str(word) for word in words)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, **options)
    else:
        done = run_command(words)
    assert check is None or done.returncode == check, f"exit {done.returncode}: {done.stderr[-3000:]}"
    return done


def figures(*words: str | Path) -> dict:
    """A command's JSON: one object on standard output, nothing else."""
    return json.loads(mezzotint(*words, "--json").stdout)


@pytest.fixture(scope="session")
def home(tmp_path_factory) -> Path:
    """data/, run/ and model.mzt, made by the commands."""
    folder = tmp_path_factory.mktemp("end_to_end")
    rng = np.random.default_rng(0)
    words = ["the", "old", "plate", "was", "dark", "until", "a", "burnisher", "drew", "the", "light", "out", "of", "it"]
    lines = [json.dumps({"text": " ".join(rng.choice(words, 80)) + ".\n"}) for _ in range(80)]
    (folder / "corpus.jsonl").write_text("\n".join(lines))
    prepared = figures("prepare", folder / "corpus.jsonl", "--out", folder / "data", "--vocab-size", "290")
    assert set(prepared) >= {"train", "val", "vocab_size", "bytes_per_token"} and prepared["vocab_size"] == 290
    assert set(prepared["train"]) >= {"documents", "tokens", "bytes"}
    trained = figures("train", folder / "data", "--out", folder / "run", *QUICK, "--steps", "60")
    assert set(trained) >= {
        "steps",
        "tokens",
        "seconds",
        "tokens_per_second",
        "parameters",
        "train_nelbo_bpb",
        "final_checkpoint",
    }
    assert trained["steps"] == 60
    packed = figures("pack", folder / "run", "--out", folder / "model.mzt", "--code", folder / "corpus.jsonl")
    assert packed["artifact_bytes"] == (folder / "model.mzt").stat().st_size
    assert packed["code_bytes"] == (folder / "corpus.jsonl").stat().st_size
    assert (
        packed["total_bytes"] == packed["artifact_bytes"] + packed["code_bytes"] <= packed["budget_bytes"] == 16_000_000
    )
    assert packed["verified"] is True
    return folder


def test_packing_again_gives_the_same_bytes(home, tmp_path):
    mezzotint("pack", home / "run", "--out", tmp_path / "again.mzt")
    assert (tmp_path / "again.mzt").read_bytes() == (home / "model.mzt").read_bytes()


def test_scores(home):
    run = figures("score", home / "run", home / "data", "--method", "all", "--tokens", "256")
    packed = figures("score", home / "model.mzt", home / "data", "--method", "all", "--tokens", "256")
    kinds = {r["method"]: r["kind"] for r in packed["results"]}
    assert kinds["nelbo"] == "upper bound" and kinds["chain"] == "exact" and kinds["reconstruction"] == "not a bound"
    for before, after in zip(run["results"], packed["results"], strict=True):
        assert after["bpb"] == pytest.approx(before["bpb"], abs=0.1)
        assert set(after) >= {"method", "kind", "bpb", "stderr_bpb", "nats_per_token", "tokens", "bytes", "seconds"}
        assert set(after) >= {"forward_passes", "seed"}
    assert packed["model_sha256"] and len(packed["model_sha256"]) == 64
    again = figures("score", home / "model.mzt", home / "data", "--tokens", "256")
    assert again["results"][0]["bpb"] == packed["results"][0]["bpb"]
    table = mezzotint("score", home / "model.mzt", home / "data", "--method", "all", "--tokens", "256").stdout
    assert "not a bound" in table and "upper bound" in table and "autoregressive" in table


def test_orders_and_journals(home, tmp_path):
    words = ["score", home / "model.mzt", home / "data", "--method", "chain", "--tokens", "128"]
    left = figures(*words)["results"][0]
    spread = figures(*words, "--order", "spread(4)")["results"][0]
    assert spread["kind"] == "exact" and spread["forward_passes"] < left["forward_passes"]
    journal = tmp_path / "journal"
    assert figures(*words, "--journal", journal)["results"][0]["bpb"] == left["bpb"] and journal.exists()
    again = figures(*words, "--journal", journal)["results"][0]
    assert again["bpb"] == left["bpb"] and again["seconds"] < left["seconds"]
    refused("score", home / "model.mzt", home / "data", "--order", "left", contains="--method chain")
    refused(*words, "--order", "middle", contains="unknown order")
    refused("score", home / "model.mzt", home / "data", "--method", "all", "--journal", journal, contains="one figure")


def test_compare(home):
    """A model against itself differs by nothing; a model against its own packed form by less than the figures' error."""
    same = figures("compare", home / "model.mzt", home / "model.mzt", home / "data", "--tokens", "512")
    assert same["difference_bpb"] == 0 and same["p_value"] == 1
    found = figures("compare", home / "run", home / "model.mzt", home / "data", "--tokens", "512")
    assert found["stderr_bpb"] < found["a"]["stderr_bpb"] / 3
    assert found["difference_bpb"] == pytest.approx(found["b"]["bpb"] - found["a"]["bpb"])
    assert "B - A" in mezzotint("compare", home / "run", home / "model.mzt", home / "data", "--tokens", "256").stdout


def test_sample_and_fill(home):
    drawn = figures("sample", home / "model.mzt", "-n", "2", "--length", "12", "--seed", "3")
    assert len(drawn["texts"]) == 2 and drawn["seed"] == 3 and drawn["forward_passes"] > 0
    assert drawn["texts"] == figures("sample", home / "model.mzt", "-n", "2", "--length", "12", "--seed", "3")["texts"]
    for sampler in ("ancestral", "confidence"):
        mezzotint("sample", home / "model.mzt", "--length", "8", "--sampler", sampler, "--steps", "4")
    text = "  The old ____ was\tdark — [MASK*2] é\n"
    answer = figures("fill", home / "model.mzt", text)
    filled = answer["text"]
    assert all(gap["text"] in filled and len(gap["confidence"]) == gap["tokens"] for gap in answer["gaps"])
    assert answer["gaps"] and answer["forward_passes"] > 0
    assert filled.startswith("  The old ") and " was\tdark — " in filled and filled.endswith(" é\n")
    assert "____" not in filled and "[MASK" not in filled
    assert mezzotint("fill", home / "model.mzt", "no gap é").stdout == "no gap é\n"


def test_inspect(home):
    looked = figures("inspect", home / "model.mzt")
    assert looked["bytes"] == (home / "model.mzt").stat().st_size
    assert all(looked["checks"].values())
    assert "attention.query" in mezzotint("inspect", home / "model.mzt").stdout


def test_report_is_one_file(home, tmp_path):
    page = tmp_path / "report.html"
    mezzotint("report", home / "run", "--model", home / "model.mzt", "--tokens", "256", "--out", page)
    html = page.read_text()
    for title in ("Loss", "Cross-entropy against mask rate", "Bytes per tensor", "Samples"):
        assert title in html
    assert 'src="http' not in html and 'href="http' not in html and "<svg" in html


def test_record_folder_stands_alone(home, tmp_path):
    """The record's own scorer, without the package on the path, gives the record's figure."""
    record = tmp_path / "record"
    made = figures("submit", home / "run", home / "model.mzt", "--out", record, "--tokens", "256")
    names = {p.name for p in record.iterdir()}
    assert names >= {"README.md", "submission.json", "train.log", "model.mzt", "train_gpt.py", "score.py"}
    described = json.loads((record / "submission.json").read_text())
    code = sum((record / n).stat().st_size for n in ("train_gpt.py", "score.py"))
    total = code + (record / "model.mzt").stat().st_size
    assert described["bytes_total"] == made["total_bytes"] == total <= 16_000_000
    assert described["val_bpb"] == pytest.approx(made["val_bpb"])
    help_text = subprocess.run([sys.executable, "-I", record / "score.py", "--help"], capture_output=True, text=True)
    assert help_text.returncode == 0 and "--data" in help_text.stdout
    blocker = tmp_path / "blocked"
    blocker.mkdir()
    code_text = (
        "import importlib.abc, runpy, sys\n"
        "class Block(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] == 'mezzotint': raise ImportError('the installed package was used')\n"
        "sys.meta_path.insert(0, Block())\n"
        "sys.argv = sys.argv[1:]\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    words = [sys.executable, "-I", "-c", code_text, record / "score.py", "--data", home / "data", "--tokens", "256"]
    scored = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert scored.returncode == 0, scored.stderr[-2000:]
    assert json.loads(scored.stdout)["results"][0]["bpb"] == pytest.approx(made["val_bpb"], rel=1e-6)


def test_settings_reach_the_run(home, tmp_path):
    mezzotint(
        "train",
        home / "data",
        "--out",
        tmp_path / "r",
        *QUICK,
        "--steps",
        "2",
        "--matrix_lr=0.5",
        "--weighting",
        "reference",
    )
    described = json.loads((tmp_path / "r" / "config.json").read_text())
    assert described["train"]["matrix_lr"] == 0.5 and described["train"]["weighting"] == "reference"
    assert described["model"]["width"] == 32 and described["model"]["vocab_size"] == 290


def test_resume_by_command(home, tmp_path):
    run = tmp_path / "r"
    mezzotint("train", home / "data", "--out", run, *QUICK, "--steps", "3")
    again = mezzotint("train", home / "data", "--out", run, *QUICK, "--steps", "5", check=2)
    assert "--resume" in again.stderr
    resumed = figures("train", home / "data", "--out", run, *QUICK, "--steps", "5", "--resume")
    assert resumed["steps"] == 5


def test_every_command_explains_itself():
    text = mezzotint("--help").stdout
    for name in ("demo", "prepare", "train", "pack", "score", "sample", "fill", "inspect", "submit", "report"):
        assert name in text
        assert len(mezzotint(name, "--help").stdout) > 200
    assert "--matrix-lr" in mezzotint("train", "--help").stdout


# --- bad input: one line, exit status 2, nothing half-written ---------------------------------------------------------


def refused(*words: str | Path, contains: str, **options) -> None:
    done = mezzotint(*words, check=None, **options)
    assert done.returncode == 2, f"exit {done.returncode}: {done.stderr[-2000:]}"
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1 and "Traceback" not in done.stderr, done.stderr[-2000:]
    assert contains in lines[0], lines[0]
    assert done.stdout == ""


def spoiled(home: Path, tmp_path: Path, change: Callable[[bytearray], None]) -> Path:
    content = bytearray((home / "model.mzt").read_bytes())
    change(content)
    path = tmp_path / "spoiled.mzt"
    path.write_bytes(content)
    return path


def test_missing_files(home, tmp_path):
    refused("prepare", tmp_path / "none.txt", "--out", tmp_path / "d", contains="does not exist")
    refused("train", tmp_path / "none", "--out", tmp_path / "r", contains="not a data folder")
    refused("score", tmp_path / "none.mzt", home / "data", contains="does not exist")
    refused("score", home / "model.mzt", tmp_path / "none", contains="does not exist")
    refused("inspect", tmp_path / "none.mzt", contains="none.mzt")
    refused("pack", tmp_path, "--out", tmp_path / "m.mzt", contains="not a run folder")
    assert list(tmp_path.iterdir()) == []


def test_empty_corpus(tmp_path):
    (tmp_path / "empty.txt").write_text("")
    refused("prepare", tmp_path / "empty.txt", "--out", tmp_path / "d", contains="empty")
    assert [p.name for p in tmp_path.iterdir()] == ["empty.txt"]


@pytest.mark.parametrize(("content", "message"), [(b"short", "truncated"), (b"\0" * 2000, "not a token shard")])
def test_truncated_and_foreign_shards(home, tmp_path, content, message):
    shutil.copytree(home / "data", tmp_path / "data")
    for shard in (tmp_path / "data").glob("*.bin"):
        shard.write_bytes(content)
    refused("train", tmp_path / "data", "--out", tmp_path / "r", *QUICK, "--steps", "1", contains=message)
    refused("score", home / "model.mzt", tmp_path / "data", contains=message)
    assert not (tmp_path / "r").exists()


def test_wrong_tokenizer(home, tmp_path):
    mezzotint("prepare", home / "corpus.jsonl", "--out", tmp_path / "other", "--vocab-size", "295")
    refused("score", home / "model.mzt", tmp_path / "other", contains="another tokenizer")
    refused("score", home / "run", tmp_path / "other", contains="another tokenizer")
    refused(
        "pack", home / "run", "--data", tmp_path / "other", "--out", tmp_path / "m.mzt", contains="another tokenizer"
    )
    refused("train", tmp_path / "other", "--out", home / "run", *QUICK, "--resume", contains="another tokenizer")
    assert not (tmp_path / "m.mzt").exists()


def test_budget_too_small(home, tmp_path):
    done = mezzotint("pack", home / "run", "--out", tmp_path / "m.mzt", "--budget", "2000", check=2)
    last = done.stderr.strip().splitlines()[-1]
    assert "smallest reachable size" in last and "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_corrupted_artifact(home, tmp_path):
    def flip(content: bytearray) -> None:
        content[len(content) // 2] ^= 1

    def newer(content: bytearray) -> None:
        at = content.index(1, 4)
        content[at] = 9

    refused("inspect", spoiled(home, tmp_path, flip), contains="spoiled.mzt")
    refused("sample", spoiled(home, tmp_path, lambda c: c.__delitem__(slice(100, None))), contains="spoiled.mzt")
    refused(
        "fill",
        spoiled(home, tmp_path, lambda c: c.__setitem__(slice(0, 4), b"PK\3\4")),
        "a ____",
        contains="spoiled.mzt",
    )
    refused("score", spoiled(home, tmp_path, newer), home / "data", contains="version")


def test_a_gap_that_the_window_does_not_hold(home):
    refused("fill", home / "model.mzt", "a [MASK*3000] b", contains="window")


def test_settings_that_make_no_sense(home, tmp_path):
    refused("train", home / "data", "--out", tmp_path / "r", "--heads", "7", contains="heads")
    refused("train", home / "data", "--out", tmp_path / "r", "--preset", "huge", contains="huge")
    refused("train", home / "data", "--out", tmp_path / "r", "--steps", "many", contains="many")
    refused("nonsense", contains="nonsense")
    refused("sample", home / "model.mzt", "--temperature", "-1", contains="temperature")


def test_disk_full(home, tmp_path):
    """A real small file system where one can be mounted, else the kernel's limit on file sizes."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = (
        shutil.which("mount") is not None
        and subprocess.run(["mount", "-t", "tmpfs", "-o", "size=40k", "tmpfs", disk], capture_output=True).returncode
        == 0
    )
    resource = pytest.importorskip("resource")
    options = {} if mounted else {"preexec_fn": lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (8000, 8000))}
    try:
        for words in (
            ("prepare", home / "corpus.jsonl", "--out", disk / "data", "--vocab-size", "290"),
            ("train", home / "data", "--out", disk / "run", *QUICK, "--steps", "3"),
            ("pack", home / "run", "--out", disk / "model.mzt"),
        ):
            if mounted:
                for path in list(disk.iterdir()):
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
                (disk / "ballast").write_bytes(b"x" * (20_000 if words[0] != "pack" else 36_000))
            done = mezzotint(*words, check=2, **options)
            assert "Traceback" not in done.stderr
            last = done.stderr.strip().splitlines()[-1]
            assert any(w in last for w in ("disk", "space", "limit", "large")), last
            left = [p for p in disk.rglob("*") if p.suffix in (".tmp", ".mzt") or p.name.startswith(("step_", "data"))]
            assert left == []
    finally:
        if mounted:
            subprocess.run(["umount", disk], check=True)
