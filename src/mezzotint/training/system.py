"""What differs between operating systems, behind one door: memory, the source tree's commit.

Knows nothing of models or data.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import subprocess
import sys
from pathlib import Path

try:
    import fcntl
    import resource
except ImportError:  # Windows
    fcntl = resource = None


def commit_id() -> str | None:
    """The commit of the source tree this package runs from, with `+` if it has changes; None outside a checkout."""
    folder = Path(__file__).resolve().parent
    try:
        run = lambda *words: subprocess.run(  # noqa: E731
            ["git", *words], cwd=folder, capture_output=True, text=True, timeout=10, check=True
        ).stdout.strip()
        if Path(run("rev-parse", "--show-toplevel")) not in folder.parents:
            return None
        return run("rev-parse", "HEAD") + ("+" if run("status", "--porcelain", "--", ".") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def try_lock(descriptor: int) -> bool:
    """Lock an open file for this process without waiting; False if another holds it. Gone when the process is."""
    try:
        if fcntl is not None:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        elif sys.platform == "win32":
            import msvcrt

            os.lseek(descriptor, 1 << 20, os.SEEK_SET)  # behind the text: others cannot read what is locked
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EAGAIN, errno.EDEADLK):
            raise
        return False
    return True


def peak_memory_bytes() -> int:
    """Largest resident memory of this process so far; 0 where the system does not say (Windows)."""
    if resource is None:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def keep_freed_memory() -> None:
    """Let this process keep the memory it frees. glibc gives large blocks back to the system after every use, which
    then clears their pages for the next one: a twelfth of a training step. Does nothing where malloc is another."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        malloc_option = ctypes.CDLL(None).mallopt
        malloc_option(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: how much may lie free at the heap's end
        malloc_option(-3, 2**25)  # M_MMAP_THRESHOLD: from which size a block is mapped apart; the largest allowed
