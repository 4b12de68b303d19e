"""Writing files so that a reader sees the whole new file or the old one, never a half; and why one could not be written.

Knows nothing of what is written.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from mezzotint.errors import MezzotintError

REASONS = {
    errno.ENOSPC: "the disk is full (no space left on it); free some space and run again",
    errno.EDQUOT: "the disk is full (your share of it is used up); free some space and run again",
    errno.EFBIG: "the file size limit was reached; raise it (ulimit -f) and run again",
    errno.EROFS: "the disk is read-only; name a place elsewhere",
    errno.EACCES: "no permission to write there; name another folder, or change its permissions",
    errno.EPERM: "no permission to write there; name another folder, or change its permissions",
    errno.EISDIR: "that is a folder; name a file",
    errno.ENOTDIR: "a part of its path is a file, not a folder; name another place",
    errno.ENAMETOOLONG: "its name is too long; give a shorter one",
}
"""What the system says when a file cannot be written -> what is wrong and what to do."""


class NotWritten(OSError):
    """What the system said while a file or folder was written; `filename` is its own, not that of a temporary one."""


def refuse_pointer(start: bytes, what: Path | str, kind: type[MezzotintError]) -> None:
    """Raise `kind` where `start`, the first bytes of a file, are those of what Git LFS leaves in a file's place."""
    if start.startswith(b"version https://git-lfs"):
        raise kind(f"{what} is a Git LFS pointer, not the file itself: fetch it with `git lfs pull`")


@contextlib.contextmanager
def _named(path: Path, temporary: str) -> Iterator[None]:
    """What is said without a name, or of the temporary file, is about `path`."""
    try:
        yield
    except OSError as error:
        if isinstance(error, (NotWritten, BrokenPipeError)) or (
            error.filename and temporary not in str(error.filename)
        ):
            raise
        raise NotWritten(error.errno, error.strerror or str(error), str(path)) from error


def why_not_written(path: Path | str, error: Exception) -> str:
    """One line: that `path` could not be written, why, and what to do.

    error: the system's, or of a library that passes its number on in words, as safetensors does.
    """
    number = getattr(error, "errno", None)
    if number is None and (found := re.search(r"os error (\d+)", str(error))):
        number = int(found[1])
    if number == errno.ENOENT and not Path(path).parent.exists():
        reason = f"there is no folder {Path(path).parent}; make it first"
    else:
        reason = REASONS.get(number or 0) or getattr(error, "strerror", None) or " ".join(str(error).split())
    return f"cannot write {path}: {reason}"


@contextlib.contextmanager
def writing(path: Path | str, kind: type[MezzotintError], more: str = "") -> Iterator[None]:
    """While `path` is written: what the system refuses becomes an error of `kind` in one line. more: what is left."""
    try:
        yield
    except Exception as error:
        if isinstance(error, MezzotintError) or not (isinstance(error, OSError) or "os error" in str(error)):
            raise
        named = error.filename if isinstance(error, NotWritten) else path
        raise kind(why_not_written(named, error) + more) from error


@contextlib.contextmanager
def reported(kind: type[MezzotintError]) -> Iterator[None]:
    """Whatever file `atomic_file` or `atomic_folder` cannot write in here becomes an error of `kind`, as `writing` does."""
    try:
        yield
    except NotWritten as error:
        raise kind(why_not_written(error.filename, error)) from error


def sync_folder(folder: Path) -> None:
    """Make a rename inside `folder` durable (no-op where folders cannot be opened, as on Windows)."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Yield a file, open for writing and reading, that becomes `path` once everything is written and on the disk.

    On any failure `path` is untouched and nothing is left behind. A symbolic link stays one: what it points to is
    written. What is no regular file (a device, a named pipe) is written to directly at the end, never replaced.
    Raises NotWritten (for example when the disk is full).
    """
    path = Path(os.path.realpath(path))
    direct = path.exists() and not path.is_file() and not path.is_dir()
    folder = None if direct else path.parent
    with _named(path, f".{path.name}."):
        descriptor, name = tempfile.mkstemp(dir=folder, prefix=f".{path.name}.", suffix=".tmp")
        yield from _written(path, descriptor, name, direct)


def _written(path: Path, descriptor: int, name: str, direct: bool) -> Iterator[BinaryIO]:
    """The temporary file `name`, which then becomes `path`."""
    try:
        with os.fdopen(descriptor, "w+b") as file:
            yield file
            file.flush()
            if direct:
                file.seek(0)
                with path.open("wb") as target:
                    shutil.copyfileobj(file, target)
            else:
                os.fsync(file.fileno())
        if not direct:
            umask = os.umask(0)
            os.umask(umask)
            # mkstemp is private: a new file follows the umask, one that is written anew keeps its mode
            os.chmod(name, path.stat().st_mode & 0o777 if path.exists() else 0o666 & ~umask)
            os.replace(name, path)
            sync_folder(path.parent)
    finally:
        with contextlib.suppress(OSError):
            os.unlink(name)


def atomic_write(path: Path, data: bytes | str) -> None:
    """Write `data` to `path` as `atomic_file` does."""
    with atomic_file(path) as file:
        file.write(data.encode() if isinstance(data, str) else data)


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder next to `path`; on success fsync every file in it and rename it to `path`.

    An existing folder at `path` is replaced. A symbolic link stays one: the folder it points to is replaced. On failure
    nothing is left behind.
    """
    path = Path(os.path.realpath(path))
    with _named(path, f".{path.name}."):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp"))
        yield from _filled(path, temporary)


def _filled(path: Path, temporary: Path) -> Iterator[Path]:
    """The folder `temporary`, which then becomes `path`."""
    try:
        yield temporary
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o777 & ~umask)
        for file in sorted(p for p in temporary.rglob("*") if p.is_file()):
            os.chmod(file, 0o666 & ~umask)  # some writers make private files
            descriptor = os.open(file, os.O_RDWR if os.name == "nt" else os.O_RDONLY)  # Windows syncs writers only
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        for folder in sorted(p for p in temporary.rglob("*") if p.is_dir()):
            sync_folder(folder)
        sync_folder(temporary)
        if path.exists():
            # A folder cannot be replaced in one call; move the old one aside so that a crash loses neither.
            aside = path.with_name(f".{path.name}.old")
            shutil.rmtree(aside, ignore_errors=True)
            os.replace(path, aside)
            os.replace(temporary, path)
            shutil.rmtree(aside, ignore_errors=True)
        else:
            os.replace(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync_folder(path.parent)
