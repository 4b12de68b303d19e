"""Files that appear whole or not at all, and one line about what could not be written: which, why, what to do."""

from __future__ import annotations

import dataclasses
import errno
import os
import shutil
import stat
from pathlib import Path

import pytest
from safetensors import SafetensorError

import mezzotint
from mezzotint import files
from mezzotint.cli import main
from mezzotint.errors import CheckpointError, DataError, Interrupted, MezzotintError
from mezzotint.files import atomic_file, atomic_folder, atomic_write, why_not_written, writing
from mezzotint.training.checkpoint import read_run

NUMBERS = {
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some space",
    errno.EFBIG: "ulimit -f",
    errno.EROFS: "name a place elsewhere",
    errno.EACCES: "name another folder",
    errno.ENOENT: "make it first",
    errno.EISDIR: "name a file",
    errno.ENOTDIR: "name another place",
}


@pytest.mark.parametrize(("number", "advice"), NUMBERS.items())
def test_every_reason_names_the_file_and_what_to_do(number, advice):
    for error in (OSError(number, os.strerror(number)), SafetensorError(f"I/O error: it failed (os error {number})")):
        text = why_not_written(Path("some/where.mzt"), error)
        assert text.startswith(f"cannot write {Path('some/where.mzt')}: ") and advice in text and "\n" not in text


def test_what_is_not_about_writing_passes():
    for error in (ValueError("a bug"), Interrupted("stopped"), DataError("other data (os error 28)")):
        with pytest.raises(type(error)), writing("x", CheckpointError):
            raise error
    with (
        pytest.raises(CheckpointError, match="cannot write x: odd; earlier ones are kept"),
        writing("x", CheckpointError, "; earlier ones are kept"),
    ):
        raise OSError("odd")


def test_whole_or_nothing(tmp_path):
    atomic_write(tmp_path / "a", "old")
    with pytest.raises(ValueError), atomic_file(tmp_path / "a") as file:
        file.write(b"half")
        raise ValueError
    with pytest.raises(ValueError), atomic_folder(tmp_path / "f") as folder:
        (folder / "half").write_text("half")
        raise ValueError
    assert (tmp_path / "a").read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["a"]
    if os.name != "nt":
        umask = os.umask(0)
        os.umask(umask)
        assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o666 & ~umask


def outputs(trained) -> dict[str, list[str | Path]]:
    """Every command that writes, but for where to."""
    return {
        "prepare": ["prepare", Path(__file__), "--vocab-size", "360", "--out"],
        "train": ["train", trained.data, "--preset", "tiny", "--steps", "1", "--no-compile", "--out"],
        "pack": ["pack", trained.run, "--out"],
        "export": ["export", trained.artifact, "--out"],
        "compress": ["compress", Path(__file__).with_name("__init__.py"), "-o"],
        "report": ["report", trained.run, "--tokens", "64", "--out"],
        "score": ["score", trained.artifact, trained.data, "--tokens", "64", "--journal"],
    }


def refused(words, capsys) -> str:
    """The one line that a command ends with."""
    assert main.main([str(w) for w in words]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("mezzotint:")]
    assert len(lines) == 1
    return lines[0]


COMMANDS = ("prepare", "train", "pack", "export", "compress", "report", "score")


@pytest.mark.parametrize("command", COMMANDS)
def test_a_full_disk_is_one_line_and_leaves_nothing(command, trained, tmp_path, monkeypatch, capsys):
    words = outputs(trained)[command]
    if command == "compress":
        words[1] = trained.run / "config.json"

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files.os, "fsync", full)
    line = refused([*words, tmp_path / "new"], capsys)
    assert "cannot write" in line and str(tmp_path / "new") in line and "free some space" in line
    left = [p.name for p in tmp_path.rglob("*") if p.is_file()]
    assert not [name for name in left if name.endswith(".tmp")] and (command == "train" or not left)


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="permissions do not bind an administrator")
@pytest.mark.parametrize("command", COMMANDS)
def test_a_folder_without_permission_is_one_line(command, trained, tmp_path, capsys):
    words = outputs(trained)[command]
    if command == "compress":
        words[1] = trained.run / "config.json"
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o500)
    line = refused([*words, closed / "new"], capsys)
    assert str(closed / "new") in line and "name another folder" in line
    closed.chmod(0o700)
    assert not list(closed.iterdir())


def test_checkpoints_name_theirs_and_what_is_kept(trained, tmp_path, monkeypatch):
    run = tmp_path / "run"
    shutil.copytree(trained.run, run)
    described = read_run(run)
    config = dataclasses.replace(described["train"], steps=described["train"].steps + 1)
    before = sorted(p.name for p in (run / "checkpoints").iterdir())
    whole = files.os.fsync

    def full(descriptor: int) -> None:
        if list(run.glob("checkpoints/.step*")):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        whole(descriptor)

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(
        CheckpointError, match=r"checkpoints.step_.*free some space.*earlier checkpoints are kept"
    ) as error:
        mezzotint.train(trained.data, run, model=described["model"], config=config, resume=True)
    assert "\n" not in str(error.value)
    monkeypatch.undo()
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == before and mezzotint.load_run(run)


@pytest.mark.parametrize("name", ["model.mzt", "exported/model.safetensors", "exported/config.json", "text.mzz"])
def test_a_pointer_in_a_files_place_is_called_one(trained, tmp_path, name):
    """What a clone without Git LFS holds, wherever a file is read."""
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"
    mezzotint.export_folder(mezzotint.load(trained.artifact), tmp_path / "exported")
    path = tmp_path / name
    path.write_bytes(pointer)
    with pytest.raises(MezzotintError, match="is a Git LFS pointer"):
        if name == "text.mzz":
            mezzotint.decompress(pointer, mezzotint.load(trained.artifact))
        else:
            mezzotint.load(path if name == "model.mzt" else path.parent)


@pytest.mark.parametrize(
    "name", ["data.json", "tokenizer.model", "val_lost.npy", "run/config.json", "run/weights.safetensors"]
)
def test_a_pointer_in_a_folder_of_data_or_of_a_run_is_called_one(trained, tmp_path, name, capsys):
    data = tmp_path / "data"
    (tmp_path / "a.txt").write_text("a word the tokenizer knows and one it does not: \u2581 x\n" * 9)
    tokenizer = mezzotint.Tokenizer.load(trained.data)
    mezzotint.prepare([tmp_path / "a.txt"], data, tokenizer=tokenizer)
    shutil.copytree(trained.run, data / "run")
    for path in [data / name] if "weights" not in name else [*data.glob("run/checkpoints/*/weights.safetensors")]:
        path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n")
    with pytest.raises(MezzotintError) as caught:
        mezzotint.load(data / "run") if name.startswith("run") else mezzotint.Dataset.open(data).split("val")
    assert "is a Git LFS pointer" in str(caught.value) + capsys.readouterr().err


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such modes")
def test_a_file_written_anew_keeps_its_mode(tmp_path: Path) -> None:
    path = tmp_path / "private"
    for mode in (0o600, 0o640):
        path.write_bytes(b"old")
        path.chmod(mode)
        atomic_write(path, b"new")
        assert path.read_bytes() == b"new" and stat.S_IMODE(path.stat().st_mode) == mode


def test_a_shard_that_is_a_git_lfs_pointer_is_called_one(tmp_path: Path) -> None:
    from mezzotint.data.dataset import _open_shard

    shard = tmp_path / "val_000000.bin"
    shard.write_text(f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 12345\n")
    with pytest.raises(DataError, match=r"val_000000\.bin is a Git LFS pointer"):
        _open_shard(shard)
