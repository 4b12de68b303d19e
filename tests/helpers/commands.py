"""Processes forked from one that has imported the package: a command, or a group as torchrun starts it, without the imports.

Knows nothing of what they do. Where no process can be forked, each starts from nothing.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

PRELOADED = [
    *(f"mezzotint.cli.{name}" for name in ("main", "training", "packing", "scoring", "text")),
    *("mezzotint.training.run", "mezzotint.packing.pack", "mezzotint.scoring.likelihood", "mezzotint.scoring.compare"),
    *("mezzotint.sampling.infill", "mezzotint.sampling.generate", "mezzotint.data.prepare", "mezzotint.apps.report"),
    "torch._dynamo",
]
SECONDS = 300
Done = subprocess.CompletedProcess[str]


def _enter(function: Callable[..., Any], arguments: Sequence[Any], environment: dict[str, str], folder: str) -> None:
    """In the new process: the function on one thread, with what it prints in two files."""
    import torch

    torch.set_num_threads(1)
    os.environ.clear()
    os.environ.update(environment)
    for number, name in ((1, "out"), (2, "err")):
        file = os.open(Path(folder, name), os.O_WRONLY | os.O_CREAT)
        os.dup2(file, number)
        os.close(file)
    status = function(*arguments)
    sys.stdout.flush()
    sys.exit(status)


def start(function: Callable[..., Any], *arguments: Any, **environment: str) -> Callable[[], Done]:
    """Begin function(*arguments) in a process of its own, on one thread and without standard input; what waits for its end.

    function: of a module that can be imported; what it returns is the exit status, None for 0.
    """
    forks = "forkserver" in multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if forks else "spawn")
    context.set_forkserver_preload(PRELOADED)
    folder = tempfile.mkdtemp()
    process = context.Process(target=_enter, args=(function, arguments, {**os.environ, **environment}, folder))
    process.start()

    def end() -> Done:
        process.join(SECONDS)
        if process.exitcode is None:
            process.kill()
            raise subprocess.TimeoutExpired(str(arguments), SECONDS)
        out, err = (Path(folder, name).read_text() for name in ("out", "err"))
        shutil.rmtree(folder)
        return subprocess.CompletedProcess(list(map(str, arguments)), process.exitcode, out, err)

    return end


def mezzotint(words: list[str]) -> int:
    """The command line in this process."""
    from mezzotint.cli.main import main

    sys.argv = ["mezzotint", *words]
    return main()


def run_command(words: Sequence[str | Path]) -> Done:
    """`mezzotint WORDS`: its exit status and what it wrote."""
    return start(mezzotint, [str(word) for word in words])()


def run_together(processes: int, function: Callable[..., Any], *arguments: Any) -> Done:
    """function(*arguments) in so many processes that find each other as those of torchrun do; how the first ended.

    Fails where any of them failed.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "GLOO_SOCKET_IFNAME": "lo"}
    group |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    ends = [start(function, *arguments, **group, RANK=str(i), LOCAL_RANK=str(i)) for i in range(processes)]
    done = [end() for end in ends]
    failed = [one.stderr[-2000:] for one in done if one.returncode]
    assert not failed, "\n".join(failed)
    return done[0]


def torchrun(*words: str | Path, seconds: int = 240) -> Done:
    """`torchrun WORDS` with two processes, on one thread each; at most so many seconds."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *map(str, words)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    return subprocess.run(launch, capture_output=True, text=True, env=environment, timeout=seconds)
