"""Texts made to do harm: what `fill`, `score` and `compress` make of thousands of them, and what each takes.

    python benchmarks/fuzz_texts.py --texts 2000 [--seed 0] [--model prose] [--verbs fill score compress] [--keep FOLDER]

Every text goes through every verb, in a process that may have 1.5 GB of data (RLIMIT_DATA: heap and private memory,
the model's among it) and 20 seconds of processor time for each, and one more for each gap after the first ten. A text
must end in a result that holds (the text around the gaps byte for byte; a finite figure; the same bytes restored) or in
one line of error. Whatever else happens is broken: another exception, memory or time beyond the limits, a process that
dies. Broken texts are kept in FOLDER.
Both clocks are reported: on a machine that does other work the wall's says little. Exit status 1 if anything broke.

The kinds: words without a space, scripts without spaces, code points at random, marks upon marks, control characters,
white space, what looks like the tokenizer's own pieces, many gaps and gaps of odd sizes, repetition, base64, tables,
long lines. Knows the public functions only.
"""

from __future__ import annotations

import base64
import contextlib
import io
import json
import multiprocessing
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import Findings, end, memory_of, new_parser, say, table

import mezzotint
from mezzotint.compression.container import compress_stream, decompress_stream
from mezzotint.data.texts import TextWindows
from mezzotint.errors import MezzotintError

SECONDS = 20.0  # of processor time for a text and a verb
GAP_SECONDS = 1.0  # more for each gap after the first ten: `fill` takes time linear in the gaps
WALL = 600.0  # after which a process is given up
MEMORY = 1_500_000_000
LONGEST = 20_000  # characters of a text
SCORED = 1_024  # tokens of a text that are scored

# ------------------------------------------------------------------------------------------------------- the texts


def _length(rng: np.random.Generator, most: int = LONGEST) -> int:
    """Mostly short: as many texts between 1 and 10 characters as between 1,000 and 10,000."""
    return int(np.exp(rng.uniform(0, np.log(most))))


def _of(alphabet: str) -> Callable[[np.random.Generator], str]:
    return lambda rng: "".join(rng.choice(list(alphabet), _length(rng)))


def _range(first: int, last: int) -> Callable[[np.random.Generator], str]:
    """Code points of a range."""
    return lambda rng: "".join(map(chr, rng.integers(first, last + 1, _length(rng))))


def _any(rng: np.random.Generator) -> str:
    """Any code points but surrogates."""
    points = rng.integers(0, 0x110000, _length(rng, 4_000))
    return "".join(chr(p) for p in points if not 0xD800 <= p < 0xE000)


def _surrogates(rng: np.random.Generator) -> str:
    text = _of("the old house ")(rng)
    place = int(rng.integers(len(text) + 1))
    return text[:place] + chr(int(rng.integers(0xD800, 0xE000))) + text[place:]


def _marks(rng: np.random.Generator) -> str:
    return "".join(
        chr(letter) + "".join(map(chr, rng.integers(0x300, 0x370, int(rng.integers(0, 40)))))
        for letter in rng.integers(97, 123, _length(rng, 500))
    )


def _pieces(rng: np.random.Generator) -> str:
    words = [
        "<s>",
        "</s>",
        "<unk>",
        "<0x0A>",
        "<0xFF>",
        "\u2581",
        "\u2581\u2581",
        "[MASK]",
        "<pad>",
        " ",
        "\n",
        "\\",
        "a",
    ]
    return "".join(rng.choice(words, _length(rng, 2_000)))


def _gaps(rng: np.random.Generator) -> str:
    marks = ["____", "________", "[MASK*1]", "[MASK*3]", "[MASK]", "\\____", "\\[MASK*2]", "\\\\____", "____[MASK*2]"]
    odd = [
        "[MASK*0]",
        "[MASK*-1]",
        "[MASK*99999999999999999999]",
        "[MASK*\u00b2]",
        "[MASK*1.5]",
        "[MASK*" + "9" * 5_000 + "]",
    ]
    words = ["the", "old", " ", ", ", ".\n", "house", "\u5c4b", "x" * 50]
    some = rng.choice([*marks, *words, *words, *words], int(rng.integers(1, 30))).tolist()
    if rng.integers(4) == 0:
        some.insert(int(rng.integers(len(some) + 1)), str(rng.choice(odd)))
    return "".join(some)


def _repeated(rng: np.random.Generator) -> str:
    part = _any(rng)[: int(rng.integers(1, 30))] or "a"
    return part * (_length(rng) // len(part) + 1)


def _base64(rng: np.random.Generator) -> str:
    return base64.b64encode(rng.bytes(_length(rng))).decode()


def _table(rng: np.random.Generator) -> str:
    rows = rng.integers(-(10**6), 10**6, (_length(rng, 500), int(rng.integers(1, 8))))
    return json.dumps(rows.tolist()) if rng.integers(2) else "\n".join("\t".join(map(str, row)) for row in rows)


def _mixed(rng: np.random.Generator) -> str:
    names = [name for name in KINDS if name not in ("mixed", "surrogates")]
    return "".join(KINDS[str(name)](rng)[:400] for name in rng.choice(names, 4))


def _prose(rng: np.random.Generator) -> str:
    words = [
        "the",
        "old",
        "house",
        "stood",
        "at",
        "the",
        "end",
        "of",
        "a",
        "road",
        "where",
        "nobody",
        "had",
        "lived",
        "for",
        "years",
        "and",
        "then",
        "she",
        "said",
        "no",
    ]
    return " ".join(rng.choice(words, _length(rng, 3_000))) + str(rng.choice(["", ".", "\r\n", "\n\n", " "]))


KINDS: dict[str, Callable[[np.random.Generator], str]] = {
    "one long word": _of("abcdefghijklmnopqrstuvwxyz"),
    "one letter": lambda rng: str(rng.choice(list("aZ0-_\u00e9"))) * _length(rng),
    "Chinese": _range(0x4E00, 0x9FFF),
    "Thai": _range(0x0E01, 0x0E3A),
    "right to left": _range(0x05D0, 0x06FF),
    "emoji": _range(0x1F300, 0x1FAFF),
    "any code points": _any,
    "surrogates": _surrogates,
    "marks upon marks": _marks,
    "control characters": _range(0, 0x1F),
    "white space": _of(" \t\n\r\u00a0\u2003\u3000\u200b\ufeff\u2028"),
    "pieces": _pieces,
    "gaps": _gaps,
    "repeated": _repeated,
    "base64": _base64,
    "table": _table,
    "digits": _of("0123456789"),
    "punctuation": _of("!\"#$%&'()*+,-./:;<=>?@[\\]^`{|}~"),
    "prose": _prose,
    "mixed": _mixed,
}


def hostile_text(number: int, seed: int) -> tuple[str, str]:
    """The kind and the text of this number; the same for a seed, whatever came before."""
    kind = list(KINDS)[number % len(KINDS)]
    return kind, KINDS[kind](np.random.default_rng([seed, number]))


# ------------------------------------------------------------------------------------------------------- the verbs


def fill(model: Any, text: str, rng: np.random.Generator) -> None:
    """A text with a gap put in, where it has none, and a second one now and then."""
    from mezzotint.sampling.draft import parse_gaps

    for _ in range(1 + int(rng.integers(4) == 0)):
        if "____" not in text and "[MASK" not in text:
            place = int(rng.integers(len(text) + 1))
            text = f"{text[:place]}____{text[place:]}"
    around = parse_gaps(text)[0]
    filled = mezzotint.infill(model, text)
    rest = filled.text
    for part in around:
        found = rest.find(part)
        if found < 0:
            raise AssertionError("the text around the gaps is not what it was")
        rest = rest[found + len(part) :]
    if not filled.text.startswith(around[0]) or not filled.text.endswith(around[-1]):
        raise AssertionError("the text before or behind the gaps is not what it was")


def score(model: Any, text: str, rng: np.random.Generator) -> None:
    """The NELBO, and the next tokens' figure where they were learnt, of the text's first tokens."""
    windows: Any = TextWindows([text], model.tokenizer, model.config.sequence_length)
    figures = [mezzotint.nelbo(model, windows, tokens=SCORED, repeats=2)]
    if model.trained_causally:
        figures.append(mezzotint.causal(model, windows, tokens=SCORED))
    if not all(0 <= figure.bpb < 1e6 for figure in figures):
        raise AssertionError(f"a figure of {[figure.bpb for figure in figures]} bits per byte")


def compress(model: Any, text: str, rng: np.random.Generator) -> None:
    """Its bytes, half of the time cut anywhere, there and back."""
    data = text.encode("utf-8", "surrogatepass")
    if rng.integers(2):
        data = data[int(rng.integers(0, 4)) : len(data) - int(rng.integers(0, 4))]
    packed, restored = io.BytesIO(), io.BytesIO()
    compress_stream(io.BytesIO(data), packed, model)
    if packed.tell() > len(data) + 64:
        raise AssertionError(f"{len(data):,} bytes became {packed.tell():,}")
    packed.seek(0)
    decompress_stream(packed, restored, model)
    if restored.getvalue() != data:
        raise AssertionError("other bytes came back")


VERBS: dict[str, Callable[[Any, str, np.random.Generator], None]] = {"fill": fill, "score": score, "compress": compress}


# ------------------------------------------------------------------------------------------------------- the trial


def _attempt(model: Any, verb: str, number: int, seed: int) -> tuple[str, str, float, float, int]:
    """What one text ends in (`result`, `refused` or `broken`), a remark, seconds of processor and wall, peak memory."""
    _, text = hostile_text(number, seed)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    wall, processor = time.perf_counter(), time.process_time()
    ending, remark = "result", ""
    try:
        VERBS[verb](model, text, np.random.default_rng([seed, number, 1]))
    except MezzotintError as error:
        ending, remark = "refused", str(error)
        if not remark or "\n" in remark or not remark.isprintable() or len(remark) > 1_000:
            ending = "broken"
    except Exception as error:
        ending, remark = "broken", f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    seconds, processor = time.perf_counter() - wall, time.process_time() - processor
    gaps = text.count("[MASK") + text.count("____") if verb == "fill" else 0
    if processor > SECONDS + GAP_SECONDS * max(0, gaps - 10):
        ending, remark = "broken", f"took {processor:.1f} s; {remark}"
    return ending, remark, processor, seconds, memory_of("VmHWM")


def _serve(model: Any, seed: int, pipe: Connection) -> None:
    """In a process of its own: (verb, number) after another, until there are none."""
    torch.set_num_threads(1)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    while (asked := pipe.recv()) is not None:
        verb, number = asked
        pipe.send(_attempt(model, verb, number, seed))


@dataclass
class Row:
    """What became of the texts of one verb. memory: the most bytes a process held, the model's among them."""

    texts: int = 0
    result: int = 0
    refused: int = 0
    broken: int = 0
    processor: float = 0.0
    wall: float = 0.0
    total: float = 0.0
    memory: int = 0
    slowest: str = ""


class Report(Findings[Row]):
    """What became of all texts; failures: one line for each broken one."""

    def table(self) -> str:
        titles = ("verb", "texts", "results", "refused", "broken", "slowest, processor s", "its kind", "slowest, wall s",
                  "all, processor s", "peak MB")  # fmt: skip
        return table(titles, [
            (verb, *(f"{n:,}" for n in (row.texts, row.result, row.refused, row.broken)), f"{row.processor:.1f}",
             row.slowest, f"{row.wall:.1f}", f"{row.total:,.0f}", f"{row.memory / 1e6:,.0f}")
            for verb, row in self.rows.items()
        ])  # fmt: skip


class _Worker:
    """A process that tries texts, made anew when it has died or been given up."""

    def __init__(self, model: Any, seed: int) -> None:
        self.model, self.seed = model, seed
        self.context = multiprocessing.get_context("fork")
        self.start()

    def start(self) -> None:
        self.pipe, other = self.context.Pipe()
        self.process = self.context.Process(target=_serve, args=(self.model, self.seed, other), daemon=True)
        self.process.start()
        other.close()

    def attempt(self, verb: str, number: int) -> tuple[str, str, float, float, int]:
        begun = time.perf_counter()
        try:
            self.pipe.send((verb, number))
            if self.pipe.poll(WALL):
                return self.pipe.recv()
            remark = f"gave nothing in {WALL:.0f} s"
        except (EOFError, OSError):
            remark = "its process died"
        self.process.kill()
        self.process.join()
        self.start()
        return "broken", remark, 0.0, time.perf_counter() - begun, 0

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.pipe.send(None)
        self.process.join(5)


def fuzz(
    texts: int,
    keep: Path,
    *,
    model: Any = None,
    seed: int = 0,
    first: int = 0,
    verbs: tuple[str, ...] = tuple(VERBS),
    progress: Callable[[str], None] | None = None,
) -> Report:
    """Try `texts` texts with every verb. keep: folder for those that break. first: number of the first text."""
    model = model if model is not None else mezzotint.load()
    report = Report({verb: Row() for verb in verbs})
    torch.set_num_threads(1)
    worker = _Worker(model, seed)
    for number in range(first, first + texts):
        kind, text = hostile_text(number, seed)
        for verb in verbs:
            ending, remark, processor, wall, memory = worker.attempt(verb, number)
            row = report.rows[verb]
            row.texts += 1
            row.total += processor
            setattr(row, ending, getattr(row, ending) + 1)
            row.wall, row.memory = max(row.wall, wall), max(row.memory, memory)
            if processor > row.processor:
                row.processor, row.slowest = processor, f"{kind}, {len(text):,} characters"
            if ending == "broken":
                keep.mkdir(parents=True, exist_ok=True)
                (keep / f"{number:05d}.txt").write_bytes(text.encode("utf-8", "surrogatepass"))
                report.failures.append(f"{verb} {number} ({kind}, {len(text):,} characters): {remark}")
        if progress and (number + 1 - first) % 50 == 0:
            progress(f"{number + 1 - first:,} texts, {len(report.failures)} broken\n{report.table()}")
    worker.close()
    return report


def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("--texts", type=int, default=2_000, help="how many [2000]")
    parser.add_argument("--first", type=int, default=0, help="number of the first one [0]")
    parser.add_argument("--seed", type=int, default=0, help="of the texts [0]")
    parser.add_argument("--model", default=None, help="a model's name, artifact or run [the shipped prose]")
    parser.add_argument("--verbs", nargs="+", choices=tuple(VERBS), default=tuple(VERBS), help="[all]")
    parser.add_argument("--keep", type=Path, default=Path("fuzz"), help="folder for texts that break something [fuzz]")
    options = parser.parse_args()
    report = fuzz(
        options.texts, options.keep, model=mezzotint.load(options.model), seed=options.seed, first=options.first,
        verbs=tuple(options.verbs), progress=say,
    )  # fmt: skip
    end(report)


if __name__ == "__main__":
    main()
