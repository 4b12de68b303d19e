"""The command line in this process: arguments, one-line errors, exit statuses, output. tests/end_to_end runs it whole."""

from __future__ import annotations

import argparse
import dataclasses
import errno
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import threading
from pathlib import Path

import pytest
from commands import torchrun

import mezzotint
from mezzotint.cli import arguments, console, main, packing, training
from mezzotint.config import PRESETS, ModelConfig, SamplingConfig, TrainConfig
from mezzotint.errors import MezzotintError
from mezzotint.progress import Progress

COMMANDS = (
    "demo", "prepare", "train", "tune", "pack", "score", "sample", "fill", "inspect", "submit", "report", "compress",
    "decompress", "serve", "export", "import",
)  # fmt: skip


def one_line(capsys, words: list[str | Path], contains: str, status: int = 2) -> str:
    """The command fails with this status and one line on standard error, which has these words."""
    assert main.main([str(w) for w in words]) == status
    printed = capsys.readouterr()
    lines = printed.err.strip().splitlines()
    assert len(lines) == 1 and printed.out == "", printed.err
    assert contains in lines[0] and lines[0].startswith("mezzotint: "), lines[0]
    return lines[0]


# --- arguments --------------------------------------------------------------------------------------------------------


def parsed(*words: str) -> argparse.Namespace:
    return main.build_parser().parse_args(arguments.canonical(words))


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_and_json(name, capsys):
    assert main.main([name, "--help"]) == 0
    text = capsys.readouterr().out
    assert "--json" in text and "usage: mezzotint " + name in text


def test_every_setting_is_an_option_with_its_help(capsys):
    main.main(["train", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    for kind in (ModelConfig, TrainConfig):
        for item in dataclasses.fields(kind):
            assert "--" + item.name.replace("_", "-") in text
            assert item.metadata["help"].split(",")[0][:25] in text
    assert "tiny 128" in text and "reference 2048" in text, "presets' own values are shown"


def test_the_table_names_every_command_of_this_test():
    assert {*COMMANDS, "compare"} == main.COMMANDS.keys()


@pytest.mark.parametrize("name", ["sample", "fill"])
def test_sampling_options_are_the_fields_of_its_settings(name, capsys):
    main.main([name, "--help"])
    text = " ".join(capsys.readouterr().out.split())
    values = {"sampler": "blocks", "steps": 3, "block": 4, "no_repeat": 2}
    given = {item.name: values.get(item.name, 0.25) for item in dataclasses.fields(SamplingConfig)}
    words = [f"--{key}={value}" for key, value in given.items()]
    assert arguments.sampling_settings(parsed(name, "m", *(["t"] * (name == "fill")), *words)) == given
    for item in dataclasses.fields(SamplingConfig):
        assert item.metadata["help"][:25] in text
    assert arguments.sampling_settings(parsed(name, *(["t"] * (name == "fill")), "--attention", "causal")) == {
        "attention": "causal"
    }


def test_former_names_work_and_say_the_new_one(capsys):
    for words in (["--visibility", "block(4)"], ["--visibility=block(4)"]):
        assert parsed("fill", "m", *words, "--", "--visibility").attention == "block(4)"
        assert capsys.readouterr().err == "mezzotint: --visibility is now called --attention\n"
    assert parsed("fill", "m", "a --visibility b").text == "a --visibility b" and capsys.readouterr().err == ""


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["fill", "--help"], ["train", "--help"], ["nonsense"]])
def test_help_loads_nothing_heavy(words):
    code = f"import sys; from mezzotint.cli.main import main; main({words}); print('LOADED', *sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.partition("LOADED")[2].split())
    assert "mezzotint.cli.main" in loaded and not loaded & {"torch", "numpy", "rich", "matplotlib"}


def test_dashes_and_underscores_mean_the_same():
    one, two = (
        parsed("train", "d", "--out", "r", "--matrix_lr=0.5"),
        parsed("train", "d", "--out", "r", "--matrix-lr", "0.5"),
    )
    assert arguments.settings(one, TrainConfig) == arguments.settings(two, TrainConfig) == {"matrix_lr": 0.5}


@pytest.mark.parametrize("text", ["--- a ____ b", "-- the ____ house", "--x____ y", "____ --a_b"])
def test_text_is_not_mistaken_for_an_option(text):
    assert arguments.canonical(["fill", "m", text]) == ["fill", "m", text]
    assert parsed("fill", "m", text).text == text


def test_words_after_two_dashes_stay():
    assert parsed("fill", "m", "--", "--some_word").text == "--some_word"


def test_settings_come_from_the_preset_and_then_the_options(trained):
    tokenizer = mezzotint.Tokenizer.load(trained.run / "tokenizer.model")
    words = parsed("train", "d", "--out", "none", "--preset", "tiny", "--layers", "3", "--no-compile", "--batch", "8")
    model, train = training.train_configs(words, tokenizer)
    assert model == dataclasses.replace(PRESETS["tiny"].model, layers=3, vocab_size=290)
    assert train == dataclasses.replace(PRESETS["tiny"].train, compile=False, batch=8)


def test_resume_takes_the_runs_own_settings(trained):
    tokenizer = mezzotint.Tokenizer.load(trained.run / "tokenizer.model")
    words = parsed("train", str(trained.data), "--out", str(trained.run), "--resume", "--steps", "40")
    model, train = training.train_configs(words, tokenizer)
    described = json.loads((trained.run / "config.json").read_text())
    assert dataclasses.asdict(model) == described["model"] and model.width == 32
    assert dataclasses.asdict(train) == {**described["train"], "steps": 40}
    minutes = parsed("train", str(trained.data), "--out", str(trained.run), "--resume", "--minutes", "2")
    assert training.train_configs(minutes, tokenizer)[1].steps == 0, "minutes given on the command line must count"


@pytest.mark.parametrize(
    ("words", "contains"),
    [
        ([], "COMMAND"),
        (["nonsense"], "nonsense"),
        (["train", "d"], "--out"),
        (["train", "d", "--out", "r", "--layers", "many"], "many"),
        (["train", "d", "--out", "r", "--weighting", "odd"], "odd"),
        (["train", "d", "--out", "r", "--preset", "huge"], "huge"),
        (["train", "d", "--out", "r", "--no-such-thing", "1"], "--no-such-thing"),
        (["score", "m", "d", "--tokens", "0"], "positive whole number"),
        (["score", "m", "d", "--tokens", "lots"], "positive whole number"),
        (["score", "m", "d", "--method", "guess"], "guess"),
        (["sample", "m", "--sampler", "odd"], "odd"),
        (["pack", "r", "--out", "m", "--budget", "-5"], "--budget"),
    ],
)
def test_bad_arguments_are_one_line(words, contains, capsys):
    assert "--help" in one_line(capsys, words, contains)


def test_budget_may_be_written_with_separators():
    assert parsed("pack", "r", "--out", "m", "--budget", "16,000,000").budget == 16_000_000
    assert parsed("pack", "r", "--out", "m", "--budget", "16_000_000").budget == 16_000_000


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "contains", "status"),
    [
        (MezzotintError("something\n  is wrong"), "something is wrong", 2),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "x.bin"), "x.bin: No such file", 2),
        (PermissionError(errno.EACCES, "Permission denied", "x.bin"), "x.bin: Permission denied", 2),
        (OSError(errno.ENOSPC, "No space left on device", "x.bin"), "disk is full", 2),
        (OSError(errno.EFBIG, "File too large", "x.bin"), "limit", 2),
        (MemoryError(), "memory", 2),
        (RuntimeError("CUDA out of memory. Tried to allocate 3 GiB\nsee the manual"), "memory", 2),
        (KeyboardInterrupt(), "stopped", 130),
    ],
)
def test_errors_become_one_line(error, contains, status, monkeypatch, capsys):
    def fails(arguments, progress):
        raise error

    monkeypatch.setattr(packing, "run_inspect", fails)
    monkeypatch.setattr(main, "drop_output", lambda: None)
    one_line(capsys, ["inspect", "x.mzt"], contains, status)


def test_a_bug_keeps_its_traceback(monkeypatch):
    def fails(arguments, progress):
        raise RuntimeError("a bug")

    monkeypatch.setattr(packing, "run_inspect", fails)
    with pytest.raises(RuntimeError, match="a bug"):
        main.main(["inspect", "x.mzt"])


def test_an_interrupted_run_says_how_to_go_on(monkeypatch, capsys):
    from mezzotint.errors import Interrupted

    def fails(arguments, progress):
        raise Interrupted("stopped at step 3; go on with --resume")

    monkeypatch.setattr(training, "run_train", fails)
    one_line(capsys, ["train", "d", "--out", "r"], "--resume", 130)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_full_output_and_closed_pipes_are_quiet(trained):
    command = [sys.executable, "-m", "mezzotint", "inspect", str(trained.artifact)]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "disk is full" in done.stderr, done.stderr
    piped = subprocess.run(f"{' '.join(command)} | head -n 1", shell=True, capture_output=True, text=True)
    assert piped.stderr == ""


# --- tokenizers, data, artifacts --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def other_data(tmp_path_factory) -> Path:
    """Data of another tokenizer."""
    folder = tmp_path_factory.mktemp("other")
    (folder / "t.txt").write_text("one two three four five six seven " * 500)
    mezzotint.prepare([folder / "t.txt"], folder / "data", vocab_size=280, val=[folder / "t.txt"])
    return folder / "data"


def test_wrong_tokenizer_wherever_a_model_meets_data(trained, other_data, tmp_path, capsys):
    out = tmp_path / "out"
    for words in (
        ["score", trained.run, other_data],
        ["score", trained.artifact, other_data],
        ["pack", trained.run, "--data", other_data, "--out", out],
        ["report", trained.run, "--data", other_data, "--out", out],
        ["submit", trained.run, trained.artifact, "--data", other_data, "--out", out],
        ["train", other_data, "--out", trained.run, "--resume"],
    ):
        one_line(capsys, words, "another tokenizer")
    assert not out.exists()


def test_data_that_has_moved_is_asked_for(trained, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(trained.run, run)
    described = json.loads((run / "config.json").read_text())
    described["data_folder"] = str(tmp_path / "gone")
    (run / "config.json").write_text(json.dumps(described))
    one_line(capsys, ["pack", run, "--out", tmp_path / "m.mzt"], "--data")
    assert not (tmp_path / "m.mzt").exists()


def test_sweep_writes_a_table_and_a_plot(trained, tmp_path, capsys):
    words = ["pack", str(trained.run), "--sweep", "--out", str(tmp_path), "--tokens", "256", "--json"]
    assert main.main(words) == 0
    result = json.loads(capsys.readouterr().out)
    points = result["points"]
    sizes, costs = [p["bytes"] for p in points], [p["cost_nats_per_token"] for p in points]
    assert len(points) >= 4 and sizes == sorted(sizes, reverse=True) and 0 < costs[0] < costs[-1]
    lines = (tmp_path / "sweep.csv").read_text().splitlines()
    assert result["table"] == str(tmp_path / "sweep.csv") and len(lines) == 1 + len(points)
    first = dict(zip(lines[0].split(","), lines[1].split(","), strict=True))
    assert int(first["bytes"]) == sizes[0] and float(first["cost_stderr_bpb"]) > 0
    assert (tmp_path / "sweep.png").read_bytes().startswith(b"\x89PNG") and len(list(tmp_path.iterdir())) == 2


def test_sweep_refuses_what_it_would_ignore(trained, tmp_path, capsys):
    for words in (["--budget", "1000"], ["--codec", "int6"], ["--tolerance", "0.1"], ["--code", trained.artifact]):
        one_line(capsys, ["pack", trained.run, "--sweep", "--out", tmp_path / "s", *words], "--sweep")
    one_line(capsys, ["pack", trained.run, "--out", tmp_path / "m.mzt", "--tokens", "64"], "--sweep")
    one_line(capsys, ["pack", trained.run, "--sweep", "--out", tmp_path / "no" / "s"], "no such folder")
    assert not list(tmp_path.iterdir())


def test_demo_does_not_touch_other_files(tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("mine")
    one_line(capsys, ["demo", "--out", tmp_path], "other files")
    one_line(capsys, ["demo", "--out", tmp_path / "mine.txt"], "other files")
    one_line(capsys, ["demo", "--out", tmp_path / "new", "--minutes", "0"], "minutes")
    assert (tmp_path / "mine.txt").read_text() == "mine" and not (tmp_path / "new").exists()


# --- output -----------------------------------------------------------------------------------------------------------


def test_score_table_says_what_may_be_compared(trained, capsys):
    assert main.main(["score", str(trained.artifact), str(trained.data), "--method", "all", "--tokens", "128"]) == 0
    rows = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line.strip()}
    assert rows["chain"].rstrip().endswith("yes") and "exact" in rows["chain"]
    assert rows["nelbo"].rstrip().endswith("yes, as a bound from above") and "upper bound" in rows["nelbo"]
    assert rows["reconstruction"].rstrip().endswith("no") and "not a bound" in rows["reconstruction"]


def test_figures_on_a_folder_of_texts_say_what_was_read(trained, tmp_path, capsys):
    """`score` and `compare` give the account that `prepare` gives, as a line and as JSON."""
    (tmp_path / "a.txt").write_text("the old house was dark and the light was low. " * 3)
    (tmp_path / "a.md").write_text("the bright water went away over the cold hill. " * 3)
    (tmp_path / "b.png").write_bytes(b"no")
    (tmp_path / "c.txt").write_bytes(b"the \xe9")
    said = f"files read: 2; skipped: 1 not UTF-8 ({tmp_path.name}/c.txt at byte 4), 1 other types; empty documents: 0"
    files = {"read": 2, "skipped": {"not UTF-8": 1, "other types": 1}, "empty_documents": 0}
    files["not_utf8"] = {f"{tmp_path.name}/c.txt": 4}
    scored = ["score", trained.artifact, tmp_path, "--repeats", "2"]
    for words in (scored, ["compare", trained.artifact, trained.artifact, tmp_path, "--repeats", "2"]):
        assert main.main([*map(str, words)]) == 0
        assert said in capsys.readouterr().out
        assert main.main([*map(str, words), "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["files"] == files
    one_line(capsys, ["score", trained.artifact, tmp_path / "c.txt"], "c.txt is not UTF-8 text: byte 4 breaks it")
    assert main.main([*map(str, scored[:2]), str(trained.data), "--tokens", "64", "--json"]) == 0
    assert "files" not in json.loads(capsys.readouterr().out)


def test_blocks_are_scored_as_asked(trained, capsys):
    words = ["score", trained.artifact, trained.data, "--tokens", "64", "--json"]

    def scored(*more: str) -> dict:
        assert main.main([str(w) for w in (*words, *more)]) == 0
        (result,) = json.loads(capsys.readouterr().out)["results"]
        return result

    bound = scored("--block-size", "4", "--repeats", "2")
    assert bound["method"] == "nelbo block(4)" and bound["kind"] == "upper bound"
    assert scored("--block-size", "1")["bpb"] == scored("--method", "causal")["bpb"]
    chain = scored("--method", "chain", "--attention", "block(4)")
    assert chain["kind"] == "exact" and chain["forward_passes"] == 2 * 4
    at_once = scored("--method", "chain", "--attention", "block(4)", "--order", "block(4)")
    assert at_once["forward_passes"] == 2 and at_once["bpb"] != chain["bpb"]
    one_line(capsys, [*words, "--attention", "block(4)"], "--method chain")
    one_line(capsys, [*words, "--method", "chain", "--attention", "causal"], "--method causal")
    one_line(capsys, [*words, "--method", "chain", "--attention", "sideways"], "attention")
    one_line(capsys, [*words, "--method", "chain", "--block-size", "4"], "--block-size")
    one_line(capsys, [*words, "--block-size", "-4"], "blocks")


def test_json_is_all_of_standard_output_and_has_no_nan(trained, capsys):
    # One window: the standard error is unknown, which JSON must say as null.
    words = ["score", str(trained.artifact), str(trained.data), "--method", "all", "--tokens", "1", "--json"]
    assert main.main(words) == 0
    result = json.loads(capsys.readouterr().out, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
    assert {r["method"]: r["stderr_bpb"] for r in result["results"]}["chain"] is None
    assert console.finite({"a": [float("nan"), 1.5], "b": (float("inf"), "x")}) == {"a": [None, 1.5], "b": [None, "x"]}


def test_fill_shows_ranked_answers(trained, capsys):
    words = ["fill", str(trained.artifact), "the old ____ was dark", "--n", "3", "--candidates", "8", "--words"]
    assert main.main([*words, "--max-words", "1", "--avoid", "the", "--json"]) == 0
    (gap,) = json.loads(capsys.readouterr().out)["gaps"]
    assert len(gap["alternatives"]) == 3 and gap["alternatives"][0]["text"] == gap["text"]
    assert all(len(a["text"].split()) == 1 and a["text"].lower() != "the" for a in gap["alternatives"])
    assert main.main(words) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("the old ") and "gap 1" in printed and "probability" in printed and "%" in printed
    assert main.main(["fill", str(trained.artifact), r"a \____ b", "--greedy"]) == 0
    assert capsys.readouterr().out == "a ____ b\n"


def test_fill_reads_and_writes_bytes(trained):
    """Standard input to standard output: line ends of every kind and non-ASCII text come back as they were."""
    text = "the old ____ was\r\n dark \u2014 \u00e9\n\n"
    command = [sys.executable, "-m", "mezzotint", "fill", str(trained.artifact), "-"]
    done = subprocess.run(command, input=text.encode(), capture_output=True)
    assert done.returncode == 0
    assert done.stdout.startswith(b"the old ") and done.stdout.endswith(" was\r\n dark \u2014 \u00e9\n\n".encode())
    bad = subprocess.run(command, input=b"\xff\xfe ____", capture_output=True)
    assert bad.returncode == 2 and b"not UTF-8" in bad.stderr and bad.stdout == b""


def test_a_terminal_without_unicode_is_no_error(trained):
    environment = {"PYTHONIOENCODING": "ascii", "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
    words = ["score", str(trained.artifact), str(trained.data), "--tokens", "64"]
    done = subprocess.run([sys.executable, "-m", "mezzotint", *words], capture_output=True, env=environment)
    assert done.returncode == 0, done.stderr.decode()


def test_progress_off_a_terminal_is_plain_lines(capsys):
    display = console.Display(every=0.0)
    row = {"step": 7, "train_nelbo_bpb": 2.5, "tokens_per_second": 1e4, "progress": 0.5, "seconds_left": 75}
    display.training(Progress("step 7", 0.5, 1.0, row))
    display.bar_of("nelbo")(Progress.nth("pass", 1, 4))
    display.close()
    printed = capsys.readouterr()
    assert printed.out == "" and "\x1b" not in printed.err
    assert "nelbo: pass 1 of 4" in printed.err
    assert "step 7" in printed.err and "1:15 left" in printed.err and "pass 1 of 4" in printed.err


def test_torchrun_is_for_what_can_be_shared(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main.main(["sample", "model.mzt"]) == 2
    assert "run this command by itself" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["score", "nowhere", "data"], ["score", "a"], ["sample", "nowhere"]])
def test_an_error_of_all_processes_is_said_once(words, tmp_path):
    """By one of them; torchrun's own report, too, has that line."""
    errors = under_torchrun(tmp_path, f"main({words})").splitlines()
    (line,) = [e for e in errors if e.startswith("mezzotint: ")]
    assert sum(e.strip() == f"traceback : {line}" for e in errors) == 1
    assert sum("Traceback" in e for e in errors) == 1, "torchrun's"


def test_an_error_of_another_process_than_the_first_is_said(trained, tmp_path):
    words = ["score", str(trained.artifact), str(trained.data), "--tokens", "64"]
    errors = under_torchrun(tmp_path, f"main(['score', 'nowhere', 'data'] if os.environ['RANK'] == '1' else {words})")
    assert sum(e.startswith("mezzotint: nowhere does not exist") for e in errors.splitlines()) == 1


def under_torchrun(folder: Path, call: str) -> str:
    """Standard error of two processes that fail."""
    (folder / "run.py").write_text(f"import os, sys\nfrom mezzotint.cli.main import main\nsys.exit({call})\n")
    done = torchrun(folder / "run.py")
    assert done.returncode == 1 and done.stdout == ""
    return done.stderr


# --- standard input and output ----------------------------------------------------------------------------------------


@pytest.fixture
def piped(monkeypatch, capsysbinary):
    """A command with bytes on its standard input; what it writes to standard output."""

    def run(*words: str | Path, data: bytes = b"", status: int = 0) -> bytes:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
        assert main.main([str(w) for w in words]) == status
        return capsysbinary.readouterr().out

    return run


def test_artifacts_go_through_standard_input_and_output(trained, tmp_path, piped):
    artifact = trained.artifact.read_bytes()
    exported = piped("export", "-", "--out", "-", data=artifact)
    with tarfile.open(fileobj=io.BytesIO(exported)) as archive:
        assert archive.getnames() == ["config.json", "model.safetensors", "tokenizer.model"]
    piped("export", trained.artifact, "--out", tmp_path / "folder")
    piped("import", tmp_path / "folder", "--out", tmp_path / "a.mzt")
    stored = piped("import", "-", "--out", "-", data=exported)
    assert stored == (tmp_path / "a.mzt").read_bytes()
    described = json.loads(piped("inspect", "-", "--json", data=stored))
    assert described["file"] == "-" and described["bytes"] == len(stored)
    fill = ("the old ____ was dark", "--greedy", "--json")
    assert (
        json.loads(piped("fill", "-", *fill, data=artifact))["text"]
        == json.loads(piped("fill", trained.artifact, *fill))["text"]
    )
    packed = ("pack", trained.run, "--codec", "reference", "--out")
    piped(*packed, tmp_path / "b.mzt")
    assert piped(*packed, "-") == (tmp_path / "b.mzt").read_bytes()


def test_texts_and_reports_go_through_standard_input_and_output(trained, tmp_path, piped):
    words = ("sample", trained.artifact, "--length", "8")
    assert piped(*words, "--prompt", "-", data="the \u00e9".encode()) == piped(*words, "--prompt", "the \u00e9")
    text = "the old house was dark and the light was low. " * 8
    (tmp_path / "text.txt").write_text(text)
    score = ("score", trained.artifact, "--repeats", "2", "--json")
    given, named = (
        json.loads(o) for o in (piped(*score, "-", data=text.encode()), piped(*score, tmp_path / "text.txt"))
    )
    assert given["results"][0]["bpb"] == named["results"][0]["bpb"]
    page = piped("report", trained.run, "--tokens", "64", "--out", "-")
    assert page.startswith(b"<!doctype html>") or page.lower().startswith(b"<!doctype html")
    squeezed = piped("compress", "-", "-o", "-", "--json", data=b"the old house")
    assert piped("decompress", "-", "-o", "-", data=squeezed) == b"the old house"


def test_a_tokenizer_comes_from_standard_input(trained, tmp_path, piped):
    (tmp_path / "a.txt").write_text("the old house was dark and the light was low. " * 8)
    words = ("prepare", tmp_path / "a.txt", "--out")
    for name in (trained.data / "tokenizer.model", trained.artifact):  # a tokenizer's own file, or a model with one
        out = tmp_path / name.name
        piped(*words, out, "--tokenizer", "-", data=name.read_bytes())
        assert (out / "tokenizer.model").read_bytes() == (trained.data / "tokenizer.model").read_bytes()


def test_text_is_what_was_typed_in_an_ascii_locale_too(trained, tmp_path):
    """There Python keeps the bytes of arguments as lone surrogates. Names of files stay as the system has them."""
    model = tmp_path / "mod\u00e8le.mzt"
    shutil.copyfile(trained.artifact, model)
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    code = "import sys; from mezzotint.cli.main import main; sys.exit(main())"

    def filled(*words: bytes) -> subprocess.CompletedProcess[bytes]:
        words = (b"fill", os.fsencode(model), *words, b"--greedy")
        return subprocess.run([sys.executable, "-c", code, *words], capture_output=True, env=environment)

    text = "The \u00e9 ____ \u5929"
    done = filled(text.encode())
    assert done.returncode == 0, done.stderr
    assert done.stdout.decode().startswith("The \u00e9 ") and done.stdout.decode().endswith(" \u5929\n")
    broken = filled(b"The \xe9 ____")
    assert broken.returncode == 2 and b"lone surrogate at character 4" in broken.stderr


def test_what_standard_input_and_output_cannot_be(trained, tmp_path, monkeypatch, capsys):
    one_line(capsys, ["fill", "-", "-"], "MODEL and TEXT")
    one_line(capsys, ["score", "-", "-"], "MODEL and DATA")
    one_line(capsys, ["compare", "-", "-", "x"], "read once")
    one_line(capsys, ["prepare", "-", "--tokenizer", "-", "--out", "x"], "SOURCES and TOKENIZER cannot both be -")
    one_line(capsys, ["compress", "-", "-o", "x", "--model", "-"], "read once")
    for words in ("prepare x --out -", "train x --out -", "score m d --journal -"):
        one_line(capsys, [*words.split()], "needs a name")
    one_line(capsys, ["pack", trained.run, "--sweep", "--out", "-"], "cannot be -")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"no tar archive" * 100)))
    one_line(capsys, ["import", "-", "--out", tmp_path / "x"], "tar archive")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"no artifact")))
    one_line(capsys, ["inspect", "-"], "standard input")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    for words in (["pack", trained.run], ["import", tmp_path], ["export", trained.artifact], ["compress", "x"]):
        one_line(capsys, [*words, "--out", "-"], "standard output is a terminal")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_pipes_and_links_stay_what_they_are(trained, tmp_path, piped):
    piped("export", trained.artifact, "--out", tmp_path / "folder")
    (tmp_path / "link").symlink_to(tmp_path / "folder", target_is_directory=True)
    piped("export", trained.artifact, "--out", tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "folder" / "config.json").is_file()
    pipe, read = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: read.append(pipe.read_bytes()), daemon=True)
    reader.start()
    piped("import", tmp_path / "link", "--out", pipe)
    reader.join(60)
    piped("import", tmp_path / "folder", "--out", tmp_path / "file.mzt")
    assert pipe.is_fifo() and read == [(tmp_path / "file.mzt").read_bytes()]
