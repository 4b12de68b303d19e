"""How much a model repeats of its training text word for word, beside how much held-out real text does.

    python benchmarks/memorization.py MODEL DATA [--samples 32] [--length 50] [--seed 0] [--json FILE]

Texts are drawn as `mezzotint sample` draws them, unless told otherwise. MODEL is an artifact, a run folder or a shipped
model's name, DATA the prepared folder it was trained on. The share is of all strings of so many bytes in the texts,
found verbatim anywhere in the training split.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import new_parser, say, table, write_json

from mezzotint.data.dataset import Dataset
from mezzotint.pretrained import load
from mezzotint.scoring.memorization import memorized


def report(result: dict[str, Any]) -> str:
    """The two shares as a Markdown table."""
    titles = ["text", "texts", f"strings of {result['length']} bytes", "found in training text", "share"]
    rows = []
    for name, key in (("sampled", "sampled"), ("held out, real", "held_out")):
        row = result[key]
        errors = ("unknown" if row[k] is None else f"{row[k]:.4%}" for k in ("stderr", "upper95"))
        rows.append([name, row["texts"], f"{row['strings']:,}", f"{row['found']:,}", f"{row['share']:.4%}", *errors])
    return table([*titles, "standard error", "95% at most"], rows)


def main(words: Sequence[str] | None = None) -> None:
    """Parse, measure, print."""
    parser = new_parser(__doc__)
    parser.add_argument("model", help="a .mzt artifact, a run folder or a shipped model's name")
    parser.add_argument("data", type=Path, help="the prepared folder the model was trained on")
    parser.add_argument("--samples", type=int, default=32, help="texts to draw [32]")
    parser.add_argument("--held-out", type=int, default=256, help="held-out stretches to compare with [256]")
    parser.add_argument("--tokens", type=int, help="tokens of each text [the window]")
    parser.add_argument("--length", type=int, default=50, help="bytes of a string [50]")
    parser.add_argument("--steps", type=int, help="forward passes per text [as `sample` has it]")
    parser.add_argument("--temperature", type=float, help="[as `sample` has it]")
    parser.add_argument("--seed", type=int, default=0, help="[0]")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures here")
    options = parser.parse_args(words)
    started = time.monotonic()
    given: dict[str, Any] = {"steps": options.steps, "temperature": options.temperature}
    result = memorized(
        load(options.model), Dataset.open(options.data), samples=options.samples, held_out=options.held_out, tokens=options.tokens,
        length=options.length, seed=options.seed, **{name: value for name, value in given.items() if value is not None},
        progress=say,
    )  # fmt: skip
    print(report(result))
    for key in ("sampled", "held_out"):
        if result[key]["example"]:
            print(f"\nfirst found, {key.replace('_', ' ')}: {result[key]['example']!r}")
    print(f"\n{time.monotonic() - started:.0f} s")
    write_json(options.json, result)


if __name__ == "__main__":
    main()
