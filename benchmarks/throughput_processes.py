"""One process with two threads against two processes with one thread each: the same global batch, timed in turns.

    python benchmarks/throughput_processes.py DATA [--preset small] [--steps 60] [--rounds 3]

Each turn is a short training run under torchrun; its tokens/s leave out set-up and compilation.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from common import new_parser, table


def tokens_per_second(options: argparse.Namespace, processes: int, threads: int) -> float:
    """Of one run of `--steps` steps."""
    with tempfile.TemporaryDirectory() as folder:
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        train = ["-m", "mezzotint", "train", str(options.data), "--out", f"{folder}/run", "--preset", options.preset]
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        command = [*launch, *train, "--steps", str(options.steps), "--json"]
        command += ["--no-compile"] if options.eager else []
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        if done.returncode:
            sys.exit(done.stderr[-2000:])
        return json.loads(done.stdout)["tokens_per_second"]


def main(words: Sequence[str] | None = None) -> None:
    """Parse, time, print."""
    parser = new_parser(__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("--preset", default="small")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--eager", action="store_true", help="without torch.compile")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args(words)
    rates: dict[tuple[int, int], list[float]] = {(1, 2): [], (2, 1): []}
    for _ in range(options.rounds):
        for (processes, threads), found in rates.items():
            found.append(tokens_per_second(options, processes, threads))
    one, two = (statistics.median(found) for found in rates.values())
    print(table(["processes x threads", "tokens/s, median"], [["1 x 2", f"{one:,.0f}"], ["2 x 1", f"{two:,.0f}"]]))
    print(f"\nratio {two / one:.2f}")


if __name__ == "__main__":
    main()
