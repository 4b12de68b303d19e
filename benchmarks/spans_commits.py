"""Gaps of known length, filled by the pretrained model of this tree and by that of another commit, judged by one model.

    python benchmarks/spans_commits.py COMMIT AR_RUN TEXT.parquet --out FOLDER [--n 48] [--spans 1 2 4 8 16 32]

Of each text a span of so many of the judge's tokens is taken out. Both fill it as `fill` does when nothing is said, told how many of
their own tokens it had. AR_RUN, an autoregressive model that neither was trained with, then gives the bits per byte of the
span and of the 100 characters behind it, given all that is before. Low is likely, not good: what is filled at a low temperature is
likelier than what people write. Rows are kept in FOLDER/rows.jsonl.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from common import Book, judged_nats, new_parser, plus_minus, source_of, table

from mezzotint.data.sources import documents
from mezzotint.errors import ConfigError
from mezzotint.network.model import Model
from mezzotint.pretrained import load

ROOT = Path(__file__).resolve().parents[1]
BEFORE, BEHIND, JUDGED = 400, 200, 100  # characters
FILL = """
import json, sys, time
import mezzotint
model = mezzotint.load(sys.argv[3])
encode = model.tokenizer.encode
out = []
for before, span, behind in json.load(open(sys.argv[1])):
    count = max(1, len(encode(before + span)) - len(encode(before)))
    started = time.process_time()
    text = mezzotint.fill(model, f"{before}[MASK*{count}]{behind}", seed=0)
    out.append((text[len(before) : len(text) - len(behind)], time.process_time() - started))
json.dump(out, open(sys.argv[2], "w"))
"""
Part = tuple[str, str, str]  # the text before, the span, the text behind


def taken_out(judge: Model, source: Path, count: int, span: int) -> list[Part]:
    """From `count` texts, evenly spaced, a span of so many tokens that begins and ends between words."""
    encode = judge.tokenizer.encode_continuation
    found = []
    for text in documents(source):
        start = text.find(" ", 1000) + 1
        before = text[start : start + BEFORE].rpartition(" ")[0]
        rest = text[start + len(before) :]
        words = rest[: 16 * span + BEHIND].split(" ")
        taken = next((n for n in range(2, len(words)) if len(encode(" ".join(words[:n]))) >= span), None)
        inside = " ".join(words[:taken])
        behind = rest[len(inside) :][:BEHIND]
        fits = start and taken and len(encode(inside)) == span and len(behind) == BEHIND
        if fits and "[" not in before + inside + behind:
            found.append((before, inside, behind))
    return [found[i * len(found) // count] for i in range(min(count, len(found)))]


def filled(source: Path, model: str, parts: Sequence[Part]) -> list[tuple[str, float]]:
    """The fill of each gap, and its processor seconds, by the package in `source`."""
    with tempfile.TemporaryDirectory() as folder:
        there, back = Path(folder, "parts.json"), Path(folder, "fills.json")
        there.write_text(json.dumps(parts))
        environment = {**os.environ, "PYTHONPATH": str(source)}
        subprocess.run([sys.executable, "-c", FILL, there, back, model], env=environment, check=True)
        return [(text, seconds) for text, seconds in json.loads(back.read_text())]


def judged(judge: Model, parts: Sequence[Part], fills: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Bits, and bytes, of each fill and what is judged behind it. Raises ConfigError where the judge's window is too short."""
    encode, window = judge.tokenizer.encode, judge.config.sequence_length
    bits, size = [], []
    for (before, _, behind), fill in zip(parts, fills, strict=True):
        ids = encode(before + fill + behind[:JUDGED])
        count = len(ids) - len(encode(before))
        if count > window:
            raise ConfigError(
                f"the judge's window of {window} tokens does not hold a span and what is judged behind it"
            )
        nats = judged_nats(judge, torch.tensor([ids[-window:]]))[0, -count:]
        bits.append(float(nats.sum()) / math.log(2))
        size.append(len((fill + behind[:JUDGED]).encode()))
    return np.array(bits), np.array(size)


def compared(judge: Model, model: str, parts: Sequence[Part], sources: dict[str, Path]) -> dict[str, float]:
    """Bits per byte of the originals and of each source's fills, and the difference of the last two, paired by text."""
    fills = {name: filled(source, model, parts) for name, source in sources.items()}
    texts = {"original": [span for _, span, _ in parts]} | {n: [text for text, _ in f] for n, f in fills.items()}
    row: dict[str, float] = {"texts": len(parts)}
    off = {}
    for name, chosen in texts.items():
        bits, size = judged(judge, parts, chosen)
        row[name] = float(bits.sum() / size.sum())
        off[name] = (bits - row[name] * size) / size.mean()
        if name in fills:
            row[f"{name}_seconds"] = float(np.mean([seconds for _, seconds in fills[name]]))
            row[f"{name}_exact"] = float(np.mean([a == b for a, b in zip(chosen, texts["original"], strict=True)]))
    first, second = sources
    row["difference"] = row[second] - row[first]
    row["difference_stderr"] = float(np.std(off[second] - off[first], ddof=1) / len(parts) ** 0.5)
    return row


def main(words: Sequence[str] | None = None) -> None:
    """Parse, fill, judge, print."""
    parser = new_parser(__doc__)
    parser.add_argument("commit")
    parser.add_argument("judge", type=Path, help="run folder of an autoregressive model")
    parser.add_argument("text", type=Path, help="Parquet file of documents")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--n", type=int, default=48, help="texts for each length [48]")
    parser.add_argument("--spans", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32], help="tokens [1 2 4 8 16 32]")
    parser.add_argument("--model", default="prose", help="that both load [prose, of which each has its own]")
    options = parser.parse_args(words)
    judge, book, rows = load(options.judge), Book(options.out / "rows.jsonl"), []
    with tempfile.TemporaryDirectory() as folder:
        sources = {"before": source_of(options.commit, Path(folder, "before")), "now": ROOT / "src"}
        for span in options.spans:
            parts = taken_out(judge, options.text, options.n, span)
            key = {
                "commit": options.commit,
                "model": options.model,
                "span": span,
                "text": options.text.name,
                "n": options.n,
            }
            row = book.get(lambda parts=parts: compared(judge, options.model, parts, sources), **key)
            figures = [f"{row[name]:.3f}" for name in ("original", "before", "now")]
            exact = [f"{row[f'{name}_exact']:.0%}" for name in ("before", "now")]
            seconds = [f"{row[f'{name}_seconds']:.2f}" for name in ("before", "now")]
            difference = plus_minus(row["difference"], row["difference_stderr"], "+.3f")
            rows.append([span, row["texts"], *figures, difference, *exact, *seconds])
    titles = ["tokens", "texts", "original", options.commit, "now", "difference"]
    titles += [f"exact, {options.commit}", "exact, now", f"processor s, {options.commit}", "now"]
    print(table(titles, rows))


if __name__ == "__main__":
    main()
