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


def sync_folder(folder: Path) -> None:
    """Make a rename inside `folder` durable (no-op where folders cannot be opened, as on Windows)."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def atomic_write(path: Path, data: bytes | str) -> None:
    """Write `data` to `path`: temporary neighbour, fsync, rename. On any failure `path` is untouched.

    Raises OSError (for example when the disk is full) after removing the temporary file.
    """
    path = Path(path)
    content = data.encode() if isinstance(data, str) else data
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(name, 0o666 & ~umask)  # mkstemp is private; a finished file follows the user's umask
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise
    sync_folder(path.parent)


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
