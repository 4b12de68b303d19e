"""Writing files so that a reader sees the whole new file or the old one, never a half.

Knows nothing of what is written.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


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
    Raises OSError (for example when the disk is full).
    """
    path = Path(os.path.realpath(path))
    direct = path.exists() and not path.is_file() and not path.is_dir()
    folder = None if direct else path.parent
    descriptor, name = tempfile.mkstemp(dir=folder, prefix=f".{path.name}.", suffix=".tmp")
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
            os.chmod(name, 0o666 & ~umask)  # mkstemp is private; a finished file follows the user's umask
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

    An existing folder at `path` is replaced. On failure nothing is left behind.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp"))
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
