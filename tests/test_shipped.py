"""Models by name: shipped ones, files and folders, what wins, and what a user who names nothing gets."""

from __future__ import annotations

import json
import shutil

import pytest

import mezzotint
from mezzotint import pretrained
from mezzotint.cli import demo, main
from mezzotint.errors import CheckpointError


@pytest.fixture
def package(trained, tmp_path, monkeypatch):
    """An installation whose one shipped model is the small trained one."""
    (tmp_path / "package" / "models").mkdir(parents=True)
    shutil.copy(trained.artifact, tmp_path / "package" / "models" / "prose.mzt")
    monkeypatch.setattr(pretrained.importlib.resources, "files", lambda name: tmp_path / "package")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def printed(capsys, *words) -> dict:
    assert main.main([*map(str, words), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_by_name_and_by_path(package, trained):
    expected = mezzotint.open_artifact(trained.artifact).sha256
    assert mezzotint.pretrained_models() == ["prose"]
    assert mezzotint.load("prose").sha256 == mezzotint.load().sha256 == expected
    assert mezzotint.load(trained.artifact).sha256 == mezzotint.load(str(trained.artifact)).sha256 == expected
    steps = mezzotint.load(trained.run).info["steps"]
    assert steps == 30
    mezzotint.export_folder(mezzotint.load(), package / "exported")
    assert mezzotint.load(package / "exported").config == mezzotint.load().config


def test_unknown_names_list_the_shipped_ones(package, tmp_path):
    with pytest.raises(CheckpointError, match=r"verse does not exist.*\(shipped: prose\)"):
        mezzotint.load("verse")
    (package / "package" / "models" / "prose.mzt").unlink()
    for name in ("prose", None):
        with pytest.raises(CheckpointError, match=r"prose does not exist.*none in this installation"):
            mezzotint.load(name)
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="not a run folder"):
        mezzotint.load(tmp_path / "empty")


def test_own_models_win_but_other_folders_do_not(package, trained):
    """A run called prose is the user's; a data folder called prose is no model."""
    (package / "prose").mkdir()
    assert mezzotint.load("prose").sha256 is not None
    shutil.copy(trained.run / "config.json", package / "prose")
    with pytest.raises(CheckpointError, match="checkpoint"):
        mezzotint.load("prose")
    assert mezzotint.load().sha256 is not None, "naming nothing is always the shipped one"


def test_commands_without_a_model_use_the_shipped_one(package, trained, capsys):
    text = "the old ____ was dark"
    expected = printed(capsys, "fill", trained.artifact, text)["text"]
    assert printed(capsys, "fill", text)["text"] == expected
    assert printed(capsys, "fill", "prose", text)["text"] == expected
    assert printed(capsys, "fill", "--seed", "0", text)["text"] == expected
    assert printed(capsys, "fill", text, "--seed", "0")["text"] == expected
    assert printed(capsys, "fill", trained.artifact, "--seed", "0", text)["text"] == expected
    drawn = printed(capsys, "sample", "-n", "2", "--length", "8")["texts"]
    assert drawn == printed(capsys, "sample", trained.artifact, "-n", "2", "--length", "8")["texts"]
    assert drawn == printed(capsys, "sample", "-n", "2", "--length", "8", trained.artifact)["texts"]
    (package / "a.txt").write_text("the old plate was dark")
    assert main.main(["compress", "a.txt", "-o", "a.mzz"]) == 2  # this one never learnt next tokens
    assert "learnt next tokens" in capsys.readouterr().err


def test_serve_without_a_model(package, monkeypatch):
    pytest.importorskip("uvicorn")
    served = []
    monkeypatch.setattr(
        "mezzotint.apps.serve.serve", lambda model, **words: served.append((model.sha256, words["name"]))
    )
    assert main.main(["serve"]) == 0
    assert served == [(mezzotint.load().sha256, "prose")]


@pytest.mark.parametrize(
    ("words", "model", "text"),
    [
        (["m", "t ____"], "m", "t ____"),
        (["t ____"], None, "t ____"),
        (["-"], None, "-"),
        (["m", "-"], "m", "-"),
        (["m", "--seed", "1", "t"], "m", "t"),
        (["m", "--seed", "1", "--", "--t"], "m", "--t"),
        (["m", "--seed", "1", "-x ____ y"], "m", "-x ____ y"),
        (["m", "--", "--some_word"], "m", "--some_word"),
        (["--", "--some_word"], None, "--some_word"),
        (["--watch", "m", "t"], "m", "t"),
    ],
)
def test_where_the_model_of_fill_may_stand(words, model, text):
    known = main.build_parser().parse_args(["fill", *words])
    assert (known.model and str(known.model), known.text) == (model, text)


@pytest.mark.parametrize("words", [["m", "t", "u"], ["t", "--odd"], ["m", "t", "--seed", "1", "u"], []])
def test_what_fill_does_not_know_stays_an_error(words, capsys):
    assert main.main(["fill", *words]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_model_without_a_text_is_noticed(package, trained, capsys):
    assert main.main(["fill", str(trained.artifact)]) == 2
    assert "give the text" in capsys.readouterr().err


def test_export_and_import_by_command(package, trained, capsys):
    made = printed(capsys, "export", "prose", "--out", "folder")
    assert made["bytes"] == sum(p.stat().st_size for p in (package / "folder").iterdir())
    assert printed(capsys, "import", "folder", "--out", "again.mzt")["verified"] is True
    assert printed(capsys, "fill", "again.mzt", "the ____")["text"] == printed(capsys, "fill", "the ____")["text"]
    assert main.main(["import", "nothing", "--out", "x.mzt"]) == 2
    assert "not an exported model" in capsys.readouterr().err and not (package / "x.mzt").exists()


def test_demo_shows_the_shipped_model_first(package, trained):
    """Its text with the gap filled, as `fill` does; an installation without it goes on without."""
    said: list[str] = []
    shown = demo.fill_with_pretrained(said.append)
    expected = mezzotint.fill(mezzotint.open_artifact(trained.artifact), demo.SHIPPED_TEXT, seed=0)
    assert shown == {"model": "prose", "text": expected} and said[-1] == expected and "____" not in expected
    (package / "package" / "models" / "prose.mzt").unlink()
    assert demo.fill_with_pretrained(said.append) is None and len(said) == 2
