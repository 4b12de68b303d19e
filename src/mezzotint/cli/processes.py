"""Commands under torchrun: who joins whom, who prints, and an error said once.

Knows the environment that torchrun gives a process, not what the processes do.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mezzotint.cli.console import Display

CUT_OFF = ("Connection closed by peer", "Connection reset by peer", "Socket closed", "Broken pipe")
"""What the backends of torch.distributed say when another process is gone."""


def several() -> bool:
    """Whether this is one process of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def first() -> bool:
    """Whether this is the only process, or the first of several."""
    return os.environ.get("RANK", "0") == "0"


@contextlib.contextmanager
def joined(display: Display) -> Iterator[None]:
    """Join the other processes; the first alone prints."""
    from mezzotint.distributed import process_group

    with process_group("cpu") as (rank, _, _), contextlib.ExitStack() as stack:
        if rank:
            display.quiet = True
            stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        yield


def cut_off(error: Exception) -> bool:
    """Whether an error says no more than that another process, which has an error of its own to tell, is gone."""
    return several() and any(words in str(error) for words in CUT_OFF)


def say_error(message: str) -> bool:
    """One line on standard error. False where another process of this machine has said the same already.

    Such a process may end as if all were well: torchrun then reports the one that has not, and nothing of the others.
    """
    line = f"mezzotint: {message}"
    place = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if several() and place:
        # torchrun gives each process a file to tell its error in, all in folders side by side.
        said = Path(place).parent.parent / f"said.{hashlib.sha256(line.encode()).hexdigest()[:16]}"
        told = {"message": line, "extraInfo": {"py_callstack": line, "timestamp": str(int(time.time()))}}
        try:
            said.touch(exist_ok=False)
            Path(place).write_text(json.dumps({"message": told}))
        except FileExistsError:
            return False
        except OSError:  # then it is said once more
            pass
    print(line, file=sys.stderr, flush=True)
    return True
