"""A training step of this tree beside that of another commit: two processes, in turns, on one machine.

    python benchmarks/throughput_commits.py COMMIT [--preset small] [--change layers=5,width=192,heads=3] [--vocab-size 4096]
                                                   [--rounds 5] [--steps 3] [--progress 0.9]

Both make the same number of steps on random ids, compiled, whole windows at all mask rates, with the preset's shape as each
commit has it, or both with the shape that `--change` says; and with a sampled softmax where the preset has one at this
progress of a run. Beside the time of a step
stands its processor time, which other work on the machine disturbs less (with one thread, OMP_NUM_THREADS=1). Medians of turns.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import new_parser, source_of, table

STEPPER = """
import dataclasses, json, sys, time
from ast import literal_eval
import numpy as np, torch
from mezzotint.config import preset
from mezzotint import Denoiser
try:
    from mezzotint.training.step import Trainer
except ModuleNotFoundError:  # as it was called until 2026-11-25
    from mezzotint.train import Trainer

name, vocab_size, steps, progress = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])
shape = dict(pair.split("=") for pair in sys.argv[5].split(",") if pair)
chosen = preset(name)
model = dataclasses.replace(chosen.model, **{setting: literal_eval(value) for setting, value in shape.items()})
model = dataclasses.replace(model, vocab_size=vocab_size or model.vocab_size)
config = dataclasses.replace(chosen.train, steps=1000, short_share=0.0, narrow_share=0.0)


class Windows:
    ids = np.random.default_rng(0).integers(0, model.vocab_size, (config.batch, model.sequence_length))

    def batch(self, step):
        return self.ids

    def token_counts(self, vocab_size):
        return np.ones(vocab_size, dtype=np.int64)


torch.manual_seed(0)
trainer = Trainer(Denoiser(model), config, Windows(), torch.device("cpu"))
failed = trainer.warm_up()
for _ in range(2):
    trainer.run_step(progress)
print(json.dumps({"failed": failed, "tokens": config.batch * model.sequence_length,
                  "threads": torch.get_num_threads()}), flush=True)
for line in sys.stdin:
    started, used = time.perf_counter(), time.process_time()
    for _ in range(steps):
        trainer.run_step(progress)
    print(json.dumps([(time.perf_counter() - started) / steps, (time.process_time() - used) / steps]), flush=True)
"""


def stepper(source: Path, words: Sequence[str]) -> tuple[subprocess.Popen[str], dict[str, Any]]:
    """A process that makes a turn of steps for each line it reads, with the package in `source`, and what it says first."""
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(source)!r})\n{STEPPER}", *words]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    first = process.stdout.readline()
    if not first:
        sys.exit(f"no step with the package in {source}: its error is above")
    return process, json.loads(first)


def turn(process: subprocess.Popen[str]) -> list[float]:
    """Seconds of a step and processor seconds of a step, over one turn."""
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write("go\n")
    process.stdin.flush()
    return json.loads(process.stdout.readline())


def main(words: Sequence[str] | None = None) -> None:
    """Parse, time, print."""
    parser = new_parser(__doc__)
    parser.add_argument("commit")
    parser.add_argument("--preset", default="small")
    parser.add_argument("--vocab-size", type=int, default=0, help="pieces [the preset's]")
    parser.add_argument("--change", default="", metavar="SETTING=VALUE,...", help="settings of the model, for both")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each [5]")
    parser.add_argument("--steps", type=int, default=3, help="steps in a turn [3]")
    parser.add_argument("--progress", type=float, default=0.9, help="share of the run that is over [0.9]")
    options = parser.parse_args(words)
    root = Path(__file__).resolve().parents[1]
    with tempfile.TemporaryDirectory() as folder:
        sources = (source_of(options.commit, Path(folder) / "before"), root / "src")
        asked = [options.preset, str(options.vocab_size), str(options.steps), str(options.progress), options.change]
        made = [stepper(source, asked) for source in sources]
        times: list[list[list[float]]] = [[], []]
        for _ in range(options.rounds):
            for (process, _), found in zip(made, times, strict=True):
                found.append(turn(process))
        for process, _ in made:
            process.communicate()
    cells, medians = [], []
    for name, (_, facts), found in zip((options.commit, "this tree"), made, times, strict=True):
        wall, used = (statistics.median(column) for column in zip(*found, strict=True))
        medians.append((wall, used))
        cells.append([name, f"{1000 * wall:.0f}", f"{facts['tokens'] / wall:,.0f}", f"{1000 * used:.0f}",
                      facts["failed"] or "yes"])  # fmt: skip
    print(table(["step of", "ms", "tokens/s", "processor ms", "compiled"], cells))
    (before, before_used), (after, after_used) = medians
    print(f"\n{made[0][1]['threads']} threads; {before / after:.2f} times the tokens/s, "
          f"{before_used / after_used:.2f} times fewer processor seconds")  # fmt: skip


if __name__ == "__main__":
    main()
