"""The commands of this tree beside those of another commit: the same words, in turns, on one machine.

    python benchmarks/commands_commits.py COMMIT MODEL DATA TEXT [--run RUN] [--rounds 3] [--only NAME ...]

help, fill, sample (next tokens), score (causal, NELBO, chain), compress, decompress, and with --run also pack. MODEL, DATA
and RUN must be such as both can read. Seconds are those of the whole command, start-up included; processor seconds are disturbed
less by other work. Threads are those of OMP_NUM_THREADS. Medians of turns; rates are of the median time.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from common import new_parser, say, source_of, table

from mezzotint.pretrained import load

ROOT = Path(__file__).resolve().parents[1]


def measured(source: Path, words: Sequence[str]) -> tuple[float, float]:
    """Seconds and processor seconds of one command with the package in `source`; ends the benchmark where it fails."""
    environment = {**os.environ, "PYTHONPATH": str(source)}
    started = time.perf_counter()
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(
            [sys.executable, "-m", "mezzotint", *words], env=environment, stdout=said, stderr=said
        )
        _, status, used = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            said.seek(0)
            sys.exit(f"{' '.join(words)} with the package in {source}: {said.read().decode()[-600:]}")
    return seconds, used.ru_utime + used.ru_stime


def main(words: Sequence[str] | None = None) -> None:
    """Parse, time, print."""
    parser = new_parser(__doc__)
    parser.add_argument("commit")
    parser.add_argument("model", type=Path, help="artifact or run folder")
    parser.add_argument("data", type=Path, help="prepared folder, whose val split is scored")
    parser.add_argument("text", type=Path, help="file to compress")
    parser.add_argument("--run", type=Path, help="run folder to pack [nothing is packed]")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each [3]")
    parser.add_argument("--tokens", type=int, default=16_384, help="that are scored, by chain an eighth of it [16384]")
    parser.add_argument("--texts", type=int, default=4, help="texts of a window to sample [4]")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="rows of the table [all]")
    options = parser.parse_args(words)
    model, data, text = (str(path.resolve()) for path in (options.model, options.data, options.text))
    length, size = load(options.model).config.sequence_length, options.text.stat().st_size
    score = ["score", model, data, "--tokens"]
    # Name, words, how much the command does, of what. OUT is a file that the command writes.
    asked = [
        ("help", ["--help"], 0, ""),
        ("fill", ["fill", model, "The old ____ was dark."], 1, "gaps"),
        ("sample", ["sample", model, "-n", str(options.texts)], options.texts * length, "tokens"),
        ("causal", [*score, str(options.tokens), "--method", "causal"], options.tokens, "tokens"),
        ("nelbo", [*score, str(options.tokens), "--repeats", "2"], 2 * options.tokens, "tokens of passes"),
        ("chain", [*score, str(options.tokens // 8), "--method", "chain"], options.tokens // 8, "tokens"),
        ("compress", ["compress", text, "--model", model, "--out", "OUT.mzz"], size, "bytes"),
        ("decompress", ["decompress", "OUT.mzz", "--model", model, "--out", "OUT.txt"], size, "bytes"),
    ]
    if options.run:
        asked.append(("pack", ["pack", str(options.run.resolve()), "--out", "OUT.mzt"], 1, "models"))
    cells = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sides = (source_of(options.commit, folder / "before"), ROOT / "src")
        for which, command, amount, unit in asked:
            if options.only and which not in options.only:
                continue
            turns: list[list[tuple[float, float]]] = [[], []]
            for _ in range(options.rounds):
                for side, found, source in zip("01", turns, sides, strict=True):
                    found.append(measured(source, [w.replace("OUT", f"{folder}/{side}") for w in command]))
            before, after = ([statistics.median(column) for column in zip(*t, strict=True)] for t in turns)
            rates = [f"{amount / seconds:,.3g}" if amount else "" for seconds, _ in (before, after)]
            cells.append([which, *(f"{x:.2f}" for x in (before[0], after[0], before[1], after[1])), *rates, unit,
                          f"{before[1] / after[1]:.2f}"])  # fmt: skip
            say(" ".join(cells[-1]))
    then = options.commit
    titles = ["command", f"{then}: s", "now: s", f"{then}: processor s", "now: processor s", f"{then}: a second",
              "now: a second", "of", "times fewer processor s"]  # fmt: skip
    print(table(titles, cells))


if __name__ == "__main__":
    main()
