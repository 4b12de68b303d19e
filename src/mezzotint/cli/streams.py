"""`-`: standard input where a file is read, standard output where one is written; a folder is a tar archive there.

The public functions know names of files only, so a temporary one stands between. Knows nothing of what is in it.
"""

from __future__ import annotations

import argparse
import contextlib
import shutil
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

from mezzotint.errors import ConfigError, DataError

STANDARD = Path("-")
READ_FROM = ("model", "a", "b", "artifact", "file", "folder", "data", "text", "prompt", "sources", "val", "tokenizer")
ARTIFACTS = ("pack", "import", "export", "compress", "report", "tune")
"""Commands whose output is nothing for a terminal."""
Copy = Callable[[Path], None]


def check_streams(arguments: argparse.Namespace) -> None:
    """One thing at most comes from standard input, and no artifact goes to a terminal. Raises ConfigError."""
    given = {name: vars(arguments).get(name) for name in READ_FROM}
    reading = [
        name.upper()
        for name, value in given.items()
        for item in (value if isinstance(value, list) else [value])
        if item is not None and str(item) == "-"
    ]
    if len(reading) > 1:
        raise ConfigError(f"standard input is read once: {' and '.join(reading)} cannot both be -")
    if to_standard(arguments) and arguments.command in ARTIFACTS and sys.stdout.isatty():
        raise ConfigError("standard output is a terminal: send it on with > FILE or | COMMAND, or name a file to write")


def to_standard(arguments: argparse.Namespace) -> bool:
    """Whether the command's output itself, rather than words about it, goes to standard output."""
    return getattr(arguments, "out", None) == STANDARD


@contextlib.contextmanager
def _standing_in(given: Path, name: str, before: Copy | None = None, after: Copy | None = None) -> Iterator[Path]:
    """What was given, or for `-` a temporary path of this name: before() fills it, after() reads it where all went well."""
    if given != STANDARD:
        yield given
        return
    with tempfile.TemporaryDirectory(prefix="mezzotint.") as place:
        path = Path(place) / name
        if before is not None:
            before(path)
        yield path
        if after is not None:
            after(path)


def input_file(given: Path, suffix: str = "") -> AbstractContextManager[Path]:
    """The file given, or for `-` one with this suffix that holds standard input, for as long as the context lasts."""
    return _standing_in(given, f"standard input{suffix}", before=_read_file)


def _read_file(path: Path) -> None:
    with path.open("wb") as file:
        shutil.copyfileobj(sys.stdin.buffer, file)


def output_file(given: Path) -> AbstractContextManager[Path]:
    """The name to write under; for `-` one whose content goes to standard output once the context ends well."""
    return _standing_in(given, "standard output", after=_write_file)


def _write_file(path: Path) -> None:
    with contextlib.suppress(FileNotFoundError), path.open("rb") as file:  # one process of several writes
        shutil.copyfileobj(file, sys.stdout.buffer)
    sys.stdout.buffer.flush()


def input_folder(given: Path, names: tuple[str, ...]) -> AbstractContextManager[Path]:
    """The folder given, or for `-` one with the files of these names from a tar archive. Raises DataError."""

    def read(folder: Path) -> None:
        folder.mkdir()
        try:
            with tarfile.open(fileobj=sys.stdin.buffer, mode="r|") as archive:
                for member in archive:
                    content = archive.extractfile(member) if member.isreg() else None
                    if content is not None and Path(member.name).name in names:
                        with (folder / Path(member.name).name).open("wb") as file:
                            shutil.copyfileobj(content, file)
        except (tarfile.TarError, EOFError) as error:
            raise DataError(f"standard input is not a tar archive of a folder ({error})") from error

    return _standing_in(given, "standard input", before=read)


def output_folder(given: Path) -> AbstractContextManager[Path]:
    """The folder to write; for `-` one whose files go to standard output as a tar archive, the same for the same files."""
    return _standing_in(given, "standard output", after=_write_folder)


def _write_folder(folder: Path) -> None:
    with tarfile.open(fileobj=sys.stdout.buffer, mode="w|", format=tarfile.USTAR_FORMAT) as archive:
        for path in sorted(folder.iterdir()):
            member = tarfile.TarInfo(path.name)
            member.size, member.mode = path.stat().st_size, 0o644
            with path.open("rb") as file:
                archive.addfile(member, file)
    sys.stdout.buffer.flush()


def read_text(given: str) -> str:
    """The text given, or for `-` that of standard input. Raises DataError where that is no text."""
    if given != "-":
        return given
    try:
        return sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError("standard input is not UTF-8 text") from error
