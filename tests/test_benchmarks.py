"""The scripts in benchmarks/ that make records and judge them, on a tiny run."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import math
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

import mezzotint
from mezzotint.apps import submission
from mezzotint.cli import main
from mezzotint.cli.training import train_configs
from mezzotint.config import ModelConfig, Preset, TrainConfig
from mezzotint.errors import ArtifactError, DataError
from mezzotint.scoring import likelihood
from mezzotint.training.checkpoint import read_run

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))  # they find one another as `python benchmarks/NAME.py` does


def script(name: str) -> ModuleType:
    """A benchmark as a module."""
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", BENCHMARKS / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look their annotations up
    spec.loader.exec_module(module)
    return module


# --- record ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def kept(trained, tmp_path_factory):
    folder = tmp_path_factory.mktemp("records")
    (folder / "data.md").write_text("Thirteen words, drawn by a generator. Public domain.\n")
    figures = script("record").make_record(
        trained.run, trained.artifact, trained.data, folder / "2026-01-01_tiny", folder / "data.md", tokens=256,
        chain_tokens=64, samples=2, length=8, memorization=3, string_bytes=10, unseen=trained.data,
    )  # fmt: skip
    return folder / "2026-01-01_tiny", figures


def test_record_holds_the_run_and_its_figures(kept, trained):
    out, figures = kept
    names = {p.name for p in out.iterdir()}
    assert names == {
        "README.md", "config.json", "metrics.jsonl", "train.log", "commands.sh", "data.md", "figures.json", "samples.md",
    }  # fmt: skip
    assert json.loads((out / "figures.json").read_text()) == figures
    bounds = [r for r in figures["results"] if r["method"] == "nelbo" and r["tokens"] > 64]
    assert [r["seed"] for r in bounds] == [0, 1, 2] and len({r["bpb"] for r in bounds}) == 3
    model = mezzotint.open_artifact(trained.artifact)
    windows = mezzotint.Dataset.open(trained.data).split("val").windows(32)
    assert bounds[1]["bpb"] == likelihood.nelbo(model, windows, tokens=256, seed=1).bpb
    again = [r for r in figures["unseen"] if r["tokens"] > 64]  # here the same text once more, under one seed
    assert [r["bpb"] for r in again] == [bounds[0]["bpb"]] and "not in the training text" in (
        out / "README.md"
    ).read_text()
    assert (out / "commands.sh").read_text().count("UNSEEN") == 2
    few = [r for r in figures["results"] if r["tokens"] <= 64]
    assert [r["method"] for r in few] == ["chain", "nelbo"] and len({r["bytes"] for r in few}) == 1
    readme = (out / "README.md").read_text()
    assert all(f"| nelbo | upper bound | {r['seed']} | {r['bpb']:.4f} |" in readme for r in bounds)
    shares = figures["memorization"]
    assert shares["length"] == 10 and shares["sampled"]["texts"] == 3
    assert f"of {shares['sampled']['strings']:,} in 3 texts" in readme and "Word for word" in readme
    assert figures["model_sha256"] in readme and "Thirteen words" in (out / "data.md").read_text()
    assert mezzotint.fill(model, "The old ____ was dark.", seed=0) in (out / "samples.md").read_text()


def test_record_names_no_folder_of_the_machine(kept, trained):
    for path in kept[0].iterdir():
        text = path.read_text()
        assert str(trained.data) not in text and str(trained.run) not in text, path.name
    assert json.loads((kept[0] / "config.json").read_text())["data_folder"] == "DATA"


def test_commands_give_the_runs_settings(kept, trained):
    """The command line itself, given the first line of commands.sh, arrives at the run's settings."""
    lines = [shlex.split(line) for line in (kept[0] / "commands.sh").read_text().splitlines()]
    parsed = [main.build_parser().parse_args(line[1:]) for line in lines]
    tokenizer = mezzotint.Tokenizer.load(trained.run / "tokenizer.model")
    described = read_run(trained.run)
    assert train_configs(parsed[0], tokenizer) == (described["model"], described["train"])
    assert [p.command for p in parsed[1:5]] == ["pack", "score", "score", "score"]
    other = ModelConfig(vocab_size=290, unet_skips=True, width=320), TrainConfig(compile=False, matrix_lr=0.03)
    words = script("record").training_command(*other)
    assert train_configs(main.build_parser().parse_args(words[1:]), tokenizer) == other


def test_record_refuses_what_does_not_belong(kept, trained, tmp_path):
    make = script("record").make_record
    (tmp_path / "d.md").write_text("x")
    with pytest.raises(ArtifactError, match="already there"):
        make(trained.run, trained.artifact, trained.data, kept[0], tmp_path / "d.md")
    with pytest.raises(DataError, match="states what"):
        make(trained.run, trained.artifact, trained.data, tmp_path / "r", tmp_path / "none.md")
    assert not (tmp_path / "r").exists()


# --- judge -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def submitted(trained, tmp_path_factory):
    out = tmp_path_factory.mktemp("submitted") / "record"
    submission.submit(trained.run, trained.artifact, out, dataset=mezzotint.Dataset.open(trained.data), tokens=512)
    return out


def test_judge_agrees_with_an_honest_record(submitted, trained):
    rows = {what: (finding, holds) for what, finding, holds in script("judge").judge(submitted, trained.data)}
    assert all(holds for _, holds in rows.values()), rows
    total = sum((submitted / n).stat().st_size for n in ("model.mzt", "score.py", "train_gpt.py"))
    assert rows["bytes"][0].startswith(f"{total:,} of 16,000,000")
    fields = json.loads((submitted / "submission.json").read_text())
    assert f"{fields['val_bpb']:.6f} on 512 tokens" in rows["figure"][0]


def test_judge_notices(submitted, trained, tmp_path, monkeypatch):
    """A figure too good, bytes left out, a file over the limit."""
    judge = script("judge")
    shutil.copytree(submitted, tmp_path / "r")
    fields = json.loads((submitted / "submission.json").read_text())
    fields.update(val_bpb=fields["val_bpb"] - 0.01, bytes_total=fields["bytes_total"] - 1)
    (tmp_path / "r" / "submission.json").write_text(json.dumps(fields))
    monkeypatch.setattr(judge, "LIMIT", fields["bytes_total"])
    verdict = {what: holds for what, _, holds in judge.judge(tmp_path / "r", trained.data)}
    assert verdict == {
        "bytes": False, "bytes reported": False, "scorer ran": True, "kind": True, "figure": False,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("body", "contains"),
    [
        ("import socket; socket.create_connection(('127.0.0.1', 9), 1)", "allows no network"),
        ("import mezzotint", "not in the record's requirements"),
        ("import rich", "not in the record's requirements"),
    ],
)
def test_judge_lets_no_scorer_cheat(body, contains, tmp_path, monkeypatch):
    judge = script("judge")
    monkeypatch.setattr(judge, "without_network", lambda: [])
    (tmp_path / "requirements.txt").write_text("torch>=2\nnumpy\n")
    (tmp_path / "score.py").write_text(body + "\nprint('{}')\n")
    with pytest.raises(RuntimeError, match=contains):
        judge.run_scorer(tmp_path, tmp_path, None)


def test_a_namespace_has_no_network():
    """Where the kernel makes one, nothing outside can be reached from it, by any program."""
    prefix = script("judge").without_network()
    if not prefix:
        pytest.skip("this kernel gives no network namespace here")
    code = "import socket; print(len(socket.if_nameindex()))"
    seen = subprocess.run([*prefix, sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert seen.stdout.strip() == "1", "only the loopback interface, which is down"


# --- memorization and user paths ---------------------------------------------------------------------------------------


def test_memorization_script_prints_both_shares(trained, capsys, monkeypatch, tmp_path):
    module = script("memorization")
    words = [
        str(trained.artifact),
        str(trained.data),
        "--samples",
        "2",
        "--held-out",
        "2",
        "--tokens",
        "24",
        "--length",
        "8",
        "--steps",
        "2",
    ]
    monkeypatch.setattr(sys, "argv", ["memorization.py", *words, "--json", str(tmp_path / "m.json")])
    module.main()
    printed = capsys.readouterr().out
    result = json.loads((tmp_path / "m.json").read_text())
    assert f"| held out, real | 2 | {result['held_out']['strings']:,} |" in printed and "| sampled | 2 |" in printed


# --- fuzz ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def fuzzer(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)  # its dataclasses look their module up by name
    return importlib.import_module("fuzz")


def test_hostile_files_end_in_one_line(fuzzer, tmp_path):
    """FUZZ_FILES sets how many files (default 400); `python benchmarks/fuzz.py` opens 20,000 and larger ones."""
    report = fuzzer.fuzz(int(os.environ.get("FUZZ_FILES", "400")), tmp_path / "kept", pads=(10_000,))
    assert report.failures == [], report.table()
    assert sum(row.files for row in report.rows.values()) >= 400
    assert report.rows["by hand"].refused == report.rows["by hand"].files > 50
    assert report.rows["bytes"].refused == report.rows["bytes"].files
    assert all(row.refused for row in report.rows.values())


def test_fuzz_notices(fuzzer, tmp_path, monkeypatch):
    """A reader that lets an exception through, and one that takes memory for what is not there."""
    files = iter(range(4))

    def broken(path):
        if next(files) < 3:
            raise KeyError(path)
        assert len(b"x" * (300 << 20)) > fuzzer.MEMORY
        raise ArtifactError("late")

    trial = fuzzer.Trial(tmp_path, tmp_path / "kept")
    monkeypatch.setattr(fuzzer.artifact, "open_artifact", broken)
    for number in range(4):
        trial("by hand", str(number), b"data")
    assert [("KeyError" in line, "MiB over" in line) for line in trial.report.failures] == [(True, False)] * 3 + [
        (False, True)
    ]
    assert len(list((tmp_path / "kept").iterdir())) == 4


# --- scaling -----------------------------------------------------------------------------------------------------------


def test_a_known_scaling_law_is_found_again():
    scaling = script("scaling")
    known = scaling.Law(1.2, math.log(60), 0.35, math.log(900), 0.45)
    n, d = np.repeat([3e5, 8e5, 3e6, 8e6], 3), np.tile([1e6, 4e6, 16e6], 4)
    assert float(known(1e6, 1e7)) == pytest.approx(1.2 + 60 / 1e6**0.35 + 900 / 1e7**0.45, rel=1e-12)
    found = scaling.fit(n, d, known(n, d))
    assert dataclasses.astuple(found) == pytest.approx(dataclasses.astuple(known), rel=1e-4)
    noisy = known(n, d) * np.exp(np.random.default_rng(0).normal(0, 0.003, 12))
    law = scaling.fit(n, d, noisy)
    spread = [other(35e6, 1e8) for other in scaling.bootstrap(law, n, d, noisy, 60, seed=0)]
    low, high = scaling.interval(spread)
    assert low < known(35e6, 1e8) < high and 0.005 < high - low < 0.3
    with pytest.raises(SystemExit, match="at least 6 runs"):
        scaling.fit(n[:5], d[:5], noisy[:5])


def test_a_grid_of_runs_goes_on_and_is_plotted(trained, tmp_path, capsys):
    words = [str(trained.data), "--out", str(tmp_path / "grid"), "--sizes", "1x8", "1x16", "2x16", "--tokens", "4096",
             "8192", "--preset", "tiny", "--score-tokens", "256", "--chain-tokens", "128", "--bootstrap", "5",
             "--eager", "--predict", "1000000:1e8"]  # fmt: skip
    book = tmp_path / "grid" / "rows.jsonl"
    kept = {
        "size": "1x8",
        "asked": 4096,
        "seed": 0,
        "preset": "tiny",
        "parameters": 3000,
        "tokens": 4096,
        "seconds": 1.0,
    }
    kept |= {metric: {"bpb": 4.5} for metric in ("nelbo", "chain", "causal")}
    book.parent.mkdir()
    book.write_text(json.dumps(kept) + "\n")
    script("scaling").main(words)
    rows = [json.loads(line) for line in book.read_text().splitlines()]
    assert rows[0] == kept and len(rows) == 6  # what is finished is not made again
    assert [r["tokens"] for r in rows] == [4096] * 3 + [8192] * 3 and len({r["parameters"] for r in rows}) == 4
    fitted = json.loads((tmp_path / "grid" / "fit.json").read_text())
    assert set(fitted) == {"nelbo", "chain", "causal"}
    assert all(len(f["predictions"]) == 1 and f["predictions"][0]["bpb"] > 0 for f in fitted.values())
    assert "parameters" in (tmp_path / "grid" / "scaling.svg").read_text()
    first = capsys.readouterr().out
    script("scaling").main(words)
    assert book.read_text().count("\n") == 6 and capsys.readouterr().out == first


# --- quality -----------------------------------------------------------------------------------------------------------


def test_rivals_are_searched_and_all_columns_stand_on_the_same_text(trained, tmp_path, capsys):
    (tmp_path / "held.jsonl").write_text(
        "".join(json.dumps({"text": f"the old plate {i} was dark"}) + "\n" for i in range(40))
    )
    quality = script("quality")
    words = [str(trained.data), "--out", str(tmp_path / "out"), "--text", f"val={tmp_path / 'held.jsonl'}", "--text",
             f"other={tmp_path / 'held.jsonl'}", "--chain", "val", "--minutes", "0.002", "--search-minutes", "0.0005",
             "--threads", "1", "--seeds", "0", "--recipes", "ar", "mezzotint", "--preset", "tiny", "--bytes", "300",
             "--eager"]  # fmt: skip
    quality.main(words)
    trials = [json.loads(line) for line in (tmp_path / "out" / "search.jsonl").read_text().splitlines()]
    assert [t["recipe"] for t in trials] == ["ar"] * 5 and {t["batch"] for t in trials[:3]} == {8, 16, 32}
    best = min(trials, key=lambda t: t["causal"]["bpb"])
    rows = [json.loads(line) for line in (tmp_path / "out" / "rows.jsonl").read_text().splitlines()]
    assert [r["recipe"] for r in rows] == ["ar", "mezzotint"]
    assert rows[0]["batch"] == best["batch"] and rows[0]["matrix_lr"] == pytest.approx(0.02 * best["scale"])
    assert set(rows[0]["scores"]["val"]) == {"causal"} and set(rows[1]["scores"]["val"]) == {"nelbo", "chain", "causal"}
    assert set(rows[1]["scores"]["other"]) == {"nelbo", "causal"}
    sizes = {figure["bytes"] for row in rows for figure in row["scores"]["val"].values()}
    assert len(sizes) == 1 and 300 <= sizes.pop() < 330  # whole documents, the same in all rows and columns
    capsys.readouterr()
    quality.main(words)  # nothing is made again
    assert (tmp_path / "out" / "rows.jsonl").read_text().count("\n") == 2
    assert capsys.readouterr().out.count("\n| ") == 4  # title, rule, two rows
    with pytest.raises(SystemExit):
        quality.main([*words, "--chain", "nothing"])
    assert "--chain names no --text: nothing" in capsys.readouterr().err


# --- the others, run small -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def both_ways(trained, tmp_path_factory) -> Path:
    """A run that learnt masks and next tokens."""
    out = tmp_path_factory.mktemp("both_ways") / "run"
    model = ModelConfig(vocab_size=290, sequence_length=32, layers=1, width=32, heads=2, kv_heads=1)
    config = TrainConfig(steps=4, batch=4, compile=False, causal_share=0.5, dtype="float32", device="cpu")
    mezzotint.train(trained.data, out, model=model, config=config)
    return out


@pytest.fixture
def prose(tmp_path) -> Path:
    path = tmp_path / "prose.txt"
    path.write_text("The old plate was dark until a burnisher drew light out of it. " * 12)
    return path


def rows_of(printed: str) -> list[list[str]]:
    """Cells of all rows of the Markdown tables in what was printed."""
    return [line.strip("| ").split(" | ") for line in printed.splitlines() if line.startswith("| ")]


def test_finished_rows_are_kept_and_figures_have_errors(tmp_path):
    common = script("common")
    book, made = common.Book(tmp_path / "new" / "rows.jsonl"), []
    for _ in range(2):
        book.get(lambda: made.append(1) or {"bpb": 1.5, "stderr_bpb": 0.25}, seed=0, size="2x8")
    assert len(made) == 1 and common.Book(book.path).find(seed=0)["bpb"] == 1.5
    assert common.Book(book.path).find(seed=1) is None
    assert common.figure(book.rows[0]) == "1.5000 ± 0.2500" and common.figure(None) == ""
    assert common.plus_minus(0.5, math.nan, "+.1f") == "+0.5 ± unknown"
    assert common.table(["a", "b"], [[1, 0.25]]) == "| a | b |\n| --- | --- |\n| 1 | 0.2500 |"


def test_changes_trains_each_once_and_pairs_them(trained, tmp_path, capsys):
    words = [str(trained.data), "--out", str(tmp_path), "--preset", "tiny", "--steps", "2", "--tokens", "128", "--eager",
             "--change", "matrix_lr=0.01,causal_share=0.0"]  # fmt: skip
    script("changes").main(words)
    _, _, first, other = rows_of(printed := capsys.readouterr().out)
    assert first[0] == "none" and " ± " in first[2] and first[3] and other[0] == "matrix_lr=0.01,causal_share=0.0"
    assert not other[3] and other[4][0] in "+-"
    script("changes").main(words)
    assert capsys.readouterr().out == printed and (tmp_path / "rows.jsonl").read_text().count("\n") == 2
    with pytest.raises(SystemExit, match="unknown setting 'widht'"):
        script("changes").main([*words, "--change", "widht=8"])


def test_block_sizes_scores_every_size_it_trains(trained, tmp_path, capsys):
    words = [str(trained.data), "--out", str(tmp_path), "--preset", "tiny", "--steps", "2", "--layers", "1", "--width",
             "32", "--sequence-length", "16", "--batch", "4", "--sizes", "1", "4", "0", "--no-compile", "--tokens", "64",
             "--chain-tokens", "32", "--at-once", "1", "2", "--repeats", "2"]  # fmt: skip
    script("block_sizes").main(words)
    rows = rows_of(capsys.readouterr().out)[2:]
    figures = {(size, name) for size, name, *_ in rows}
    assert {("1", "next tokens"), ("4", "NELBO"), ("4", "2 at once"), ("4", "4 at once"), ("16", "NELBO")} <= figures
    script("block_sizes").main(words)
    assert rows_of(capsys.readouterr().out)[2:] == rows
    assert (tmp_path / "rows.jsonl").read_text().count("\n") == len(rows)


def test_likelihood_answers_every_question(both_ways, trained, prose, tmp_path, capsys):
    words = [str(both_ways), str(trained.data), "--windows", "2", "--repeats", "2", "--chain-windows", "1",
             "--chain-repeats", "2", "--short", "8", "--stride-tokens", "64", "--compare-repeats", "2", "--noise", "0.5",
             "--orders-drawn", "16", "--text", str(prose), "--bytes", "300", "--check", "--json", str(tmp_path / "l.json")]  # fmt: skip
    script("likelihood").main(words)
    found = json.loads((tmp_path / "l.json").read_text())
    assert set(found) == {"variance", "orders", "bounds", "compress", "compare"} and len(found["variance"]) == 5
    assert [r["figure"] for r in found["orders"]][:2] == ["NELBO", "left"]
    some = {row["method"]: row for row in found["bounds"] if "orders" in row["method"]}
    one, four, sixteen = (some[f"nelbo orders({k})"] for k in (1, 4, 16))  # of the same orders: Jensen's inequality
    assert one["bpb"] > four["bpb"] > sixteen["bpb"] > 0 and one["passes"] == sixteen["passes"] == 16 * one["tokens"]
    ours = next(row for row in found["compress"] if row[""] == "mezzotint")
    assert "decompressed identical" in ours["note"] and "## bounds" in capsys.readouterr().out


def test_sampling_has_its_parts(both_ways, trained, tmp_path, monkeypatch, capsys):
    import pyarrow
    import pyarrow.parquet

    texts = tmp_path / "texts.parquet"
    long = "the old plate was dark until a burnisher drew light out of it " * 50
    pyarrow.parquet.write_table(pyarrow.table({"text": [long]}), texts)
    module = script("sampling")
    monkeypatch.setattr(module, "SPANS", (2,))
    words = [str(both_ways), "--judge", str(both_ways), "--data", str(trained.data), "--out", str(tmp_path / "out"), "--n",
             "2", "--n-infill", "2", "--length", "12", "--passes", "2", "--temperatures", "1.0", "--samplers",
             "ancestral,entropy,next tokens", "--texts", str(texts), "--n-words", "1"]  # fmt: skip
    module.main(words)
    points = [json.loads(line) for line in (tmp_path / "out" / "points.jsonl").read_text().splitlines()]
    names = {p["name"] for p in points}
    assert {"real text", "ancestral", "entropy", "next tokens", "infill", "words", "sentences", "latency"} <= names
    assert all(p["judged_bpb"] > 0 and 0 <= p["distinct4"] <= 1 for p in points if "judged_bpb" in p)
    assert (tmp_path / "out" / "frontier.png").stat().st_size > 10_000
    assert ["ancestral T=1 steps=2", "2.0"] in [row[:2] for row in rows_of(capsys.readouterr().out)]


def test_compression_restores_every_file(both_ways, prose, tmp_path, monkeypatch, capsys):
    module = script("compression")
    whole = module.files
    monkeypatch.setattr(module, "files", lambda text: {"prose": text, ".gz": whole(text)[".gz"][:200], "empty": b""})
    module.main(
        ["files", "--text", str(prose), "--bytes", "300", "--model", str(both_ways), "--json", str(tmp_path / "c")]
    )
    rows = json.loads((tmp_path / "c").read_text())["rows"]
    assert [(r["file"], r["bytes"], r["restored"]) for r in rows][::2] == [("prose", 300, True), ("empty", 0, True)]
    assert all(row["xz -9e"] > 0 for row in rows) and rows[1]["restored"]
    monkeypatch.setattr(module, "SETTINGS", {"OMP_NUM_THREADS": ("1",)})
    module.main(["matrix", "--bytes", "600"])
    assert "1 combinations, 1 different files, 0 failed" in capsys.readouterr().out


def test_rate_distortion_measures_every_packing(trained, tmp_path, monkeypatch, capsys):
    module = script("rate_distortion")
    monkeypatch.setattr(module, "VARIANT_STEPS", (0.8,))
    words = [str(trained.run), str(trained.data), "--out", str(tmp_path), "--windows", "4", "--calibration", "512",
             "--steps", "0.8", "2", "--deviations", "9", "--drop", "0"]  # fmt: skip
    module.main(words)
    points = [json.loads(line) for line in (tmp_path / "points.jsonl").read_text().splitlines()]
    assert len(points) == 2 + 2 + 1 + 1 + len(module.INGREDIENTS)
    assert all(p["bytes"] > 1000 and np.isfinite(p["rise"]).all() and min(p["divergence"]) > -1e-6 for p in points)
    text = (tmp_path / "table.md").read_text()
    assert text in capsys.readouterr().out and "| price of bits | " in text and "sorting MLP units" in text
    module.main(words)
    assert (tmp_path / "points.jsonl").read_text().count("\n") == len(points)
    with pytest.raises(SystemExit, match="name another folder"):
        module.main([*words, "--windows", "5"])


def test_throughput_times_every_row(trained, tmp_path, monkeypatch, capsys):
    module = script("throughput")
    small = ModelConfig(vocab_size=290, sequence_length=32, layers=1, width=32, heads=2, kv_heads=1)
    recipe = Preset(small, TrainConfig(batch=4, causal_share=0.5))
    monkeypatch.setattr(module, "peak", lambda *_: 1e9)
    monkeypatch.setattr(module, "preset", lambda _: recipe)
    module.main(["--preset", "tiny", "--rounds", "1", "--steps", "1", "--eager", "--json", str(tmp_path / "t.json")])
    rows = json.loads((tmp_path / "t.json").read_text())
    assert len(rows) == 3 and all(row["tokens_per_second"] > 0 for row in rows)
    processes = script("throughput_processes")
    options = argparse.Namespace(data=trained.data, preset="tiny", steps=1, eager=True)
    assert processes.tokens_per_second(options, 1, 1) > 0
    monkeypatch.setattr(processes, "tokens_per_second", lambda _, processes, threads: 1000 * processes)
    processes.main([str(trained.data), "--rounds", "1"])
    assert "ratio 2.00" in capsys.readouterr().out
    script("h100_estimate").main(["--gpus", "4"])
    assert "on 4 H100s, estimated" in capsys.readouterr().out


def test_two_commits_take_turns(monkeypatch, capsys):
    """A step that takes no time, in two processes; the first one's package is that of a commit."""
    module = script("throughput_commits")
    first = {"failed": None, "tokens": 64, "threads": 1}
    says = f"import json, sys, mezzotint\nprint({json.dumps(json.dumps(first))}, flush=True)\n"
    monkeypatch.setattr(module, "STEPPER", says + "for _ in sys.stdin:\n    print([0.5, 0.25], flush=True)\n")
    if subprocess.run(["git", "-C", str(BENCHMARKS), "rev-parse", "HEAD"], capture_output=True).returncode:
        pytest.skip("no checkout")
    module.main(["HEAD", "--rounds", "2"])
    assert rows_of(capsys.readouterr().out)[2] == ["HEAD", "500", "128", "250", "yes"]


def test_commands_of_two_commits_take_turns(both_ways, trained, prose, tmp_path, capsys):
    if subprocess.run(["git", "-C", str(BENCHMARKS), "rev-parse", "HEAD"], capture_output=True).returncode:
        pytest.skip("no checkout")
    (short := tmp_path / "short.txt").write_bytes(prose.read_bytes()[:300])
    names = ["help", "causal", "compress", "decompress"]
    words = ["HEAD", str(both_ways), str(trained.data), str(short), "--rounds", "1", "--tokens", "64"]
    script("commands_commits").main([*words, "--only", *names])
    rows = rows_of(capsys.readouterr().out)[2:]
    assert [row[0] for row in rows] == names and all(float(cell) > 0 for row in rows for cell in row[1:5])
    assert rows[1][7] == "tokens" and float(rows[1][5]) == pytest.approx(64 / float(rows[1][1]), rel=0.02)


def test_spans_of_two_commits_are_judged(both_ways, trained, tmp_path, monkeypatch, capsys):
    if subprocess.run(["git", "-C", str(BENCHMARKS), "rev-parse", "HEAD"], capture_output=True).returncode:
        pytest.skip("no checkout")
    words = ["old", "plate", "was", "dark", "until", "a", "burnisher", "drew", "the", "light", "out", "of", "it"]
    rng = np.random.default_rng(0)
    texts = [json.dumps({"text": " ".join(rng.choice(words, 400))}) for _ in range(60)]
    (tmp_path / "texts.jsonl").write_text("\n".join(texts))
    command = ["HEAD", str(both_ways), str(tmp_path / "texts.jsonl"), "--out", str(tmp_path / "out"), "--n", "2"]
    spans = script("spans_commits")
    monkeypatch.setattr(spans, "JUDGED", 10)  # the judge's window has 32 tokens
    spans.main([*command, "--spans", "1", "--model", str(trained.artifact)])
    titles, _, row = rows_of(capsys.readouterr().out)
    assert titles[5] == "difference" and row[1] == "2"
    # The same package and model: the same fills.
    assert row[3] == row[4] and row[5].startswith("+0.000")


def test_user_paths_are_open(capsys):
    assert script("user_paths").main(["--quick", "--only", "install"]) == 0
    assert rows_of(capsys.readouterr().out)[2][0] == "install"


# --- a GPU's check, on a CPU --------------------------------------------------------------------------------------------


def test_gpu_check_reports_a_step_by_its_parts_and_keeps_what_fails(tmp_path):
    """All of the script but CUDA's own figures; a part that fails leaves its traceback and the other parts alone."""
    command = [sys.executable, str(BENCHMARKS / "gpu_check.py"), "--device", "cpu", "--small", "--quick"]
    command += ["--out", str(tmp_path), "--parts", "reference+block(0x),best16mb+block(16),choices"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "gpu_check.json").read_text())
    assert "Traceback" in found["reference+block(0x)"]["failed"]
    step = found["best16mb+block(16)"]
    assert not [key for key in step if key.endswith("failed")], step
    assert step["gradients_ms"] > 0 and step["step_ms"] > 0 and step["estimate_8_gpus_ms"] > 0
    page = (tmp_path / "gpu_check.md").read_text()
    assert page in done.stdout and "103.5 ms" in page and "| optimizer, ms |" in page


# --- the server's latencies ---------------------------------------------------------------------------------------------


def test_serving_measures_every_row(trained, tmp_path, capsys):
    pytest.importorskip("openai", reason="needs the openai client, a development dependency")
    pytest.importorskip("uvicorn", reason="needs the extra serve")
    words = ["--model", str(trained.artifact), "--requests", "2", "--clients", "3", "--masks", "12", "--tokens", "3"]
    script("serving").main([*words, "--json", str(tmp_path / "rows.json")])
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert list(rows) == [
        "middle", "middle, drawn", "3 tokens", "3 tokens, first", "3 at once", "beside 12 masks",
    ]  # fmt: skip
    for row in rows.values():
        assert 0 < row["p50"] <= row["p95"] and row["requests"] >= 1
    assert capsys.readouterr().out.count("\n| ") == 1 + len(rows)


def test_percentiles_of_latencies():
    found = script("serving").summary([float(k) for k in range(100, 0, -1)])
    assert found == {"p50": 50.5, "p95": 96.0, "requests": 100}


# --- repeated ----------------------------------------------------------------------------------------------------------


def test_little_text_is_read_many_times_by_every_objective(tmp_path, capsys):
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    words = [
        "the", "old", "plate", "was", "dark", "and", "slowly", "it", "became", "a", "clear", "picture", "of", "an", "house",
    ]  # fmt: skip
    draw = np.random.default_rng(0)
    rows = [{"source": source, "text": " ".join(draw.choice(words, 60))} for source in ["A_one"] * 60 + ["A_two"] * 20]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "books.parquet")
    command = [str(tmp_path / "books.parquet"), "--out", str(tmp_path / "out"), "--author", "A_", "--apart", "A_two",
               "--sizes", "6000", "--tokens", "6144", "--grid", "0:0.04", "0.2:0.4", "--seeds", "0", "1", "--preset", "tiny",
               "--bytes", "1500", "--chain-tokens", "64", "--eager", "--objectives", "mixed", "ar"]  # fmt: skip
    script("repeated").main(command)
    rows = [json.loads(line) for line in (tmp_path / "out" / "rows.jsonl").read_text().splitlines()]
    grid = [json.loads(line) for line in (tmp_path / "out" / "grid.jsonl").read_text().splitlines()]
    assert len(grid) == 2 * 2 and len(rows) == 2 * 2  # both points on the first seed, the better one reported on both
    assert all(set(row["scores"]) == {"passages", "book"} for row in rows)
    assert all("nelbo" not in row["scores"]["book"] for row in rows if row["objective"] == "ar")
    for objective, tokens in {"mixed": 3 * 16 * 128, "ar": 6 * 8 * 128}.items():
        tried = {
            (row["dropout"], row["decay"]): np.mean([estimate["bpb"] for estimate in row["val"].values()])
            for row in grid
            if row["objective"] == objective
        }
        reported = [row for row in rows if row["objective"] == objective]
        assert [row["seed"] for row in reported] == [0, 1] and {row["tokens"] for row in reported} == {tokens}
        assert {(row["dropout"], row["decay"]) for row in reported} == {min(tried, key=tried.__getitem__)}
    trained_on = (tmp_path / "out" / "6000" / "train.jsonl").read_text().splitlines()
    for name in ("val", "passages", "book"):
        assert not set(trained_on) & set((tmp_path / "out" / "6000" / f"{name}.jsonl").read_text().splitlines())
    capsys.readouterr()
