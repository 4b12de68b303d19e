"""What benchmarks share: finished rows, Markdown tables, figures with errors, training and scoring a variant.

Does not know what any of them measures. Beside them, so that `python benchmarks/NAME.py` finds it.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import lzma
import math
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Generic, NoReturn, TypeVar

import torch
from torch import Tensor

from mezzotint.config import Preset
from mezzotint.data.dataset import Windows
from mezzotint.network.model import Model, shift_right
from mezzotint.scoring import likelihood
from mezzotint.training.checkpoint import load_run
from mezzotint.training.run import train

Row = dict[str, Any]
T = TypeVar("T")
METRICS = ("nelbo", "chain", "causal")


def new_parser(doc: str | None) -> argparse.ArgumentParser:
    """An argument parser whose help is a module's docstring, as it is laid out there."""
    return argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)


def say(text: object) -> None:
    """A line of progress, on standard error."""
    print(text, file=sys.stderr, flush=True)


def write_json(path: Path | None, content: Any) -> None:
    """`content` as a JSON file; nothing where no path was given."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=1) + "\n", "utf-8")


class Book:
    """Finished rows, one JSON object a line of a file, each made once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self.rows: list[Row] = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def find(self, **key: Any) -> Row | None:
        """The row that has all of `key`, if there is one."""
        return next((row for row in self.rows if all(row.get(name) == value for name, value in key.items())), None)

    def add(self, row: Row) -> Row:
        """Keep a finished row."""
        self.rows.append(row)
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        return row

    def get(self, make: Callable[[], Row], **key: Any) -> Row:
        """The row of `key`, made by `make()` where there is none yet."""
        return self.find(**key) or self.add({**key, **make()})


def table(titles: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table. Cells are written as they print; floats with four decimals."""
    cells = [[f"{cell:.4f}" if isinstance(cell, float) else str(cell) for cell in row] for row in rows]
    lines = [f"| {' | '.join(row)} |" for row in [titles, ["---"] * len(titles), *cells]]
    return "\n".join(lines)


@dataclasses.dataclass
class Findings(Generic[T]):
    """What became of many trials: a row a kind, and one line for each failure."""

    rows: dict[str, T] = dataclasses.field(default_factory=dict)
    failures: list[str] = dataclasses.field(default_factory=list)

    def table(self) -> str:
        """The rows, as Markdown."""
        raise NotImplementedError


def end(findings: Findings[Any], summary: str = "") -> NoReturn:
    """Print the table, the failures and a last line; the exit status is 1 if there were any."""
    print(findings.table())
    for line in [*findings.failures, *([summary] if summary else [])]:
        print(line)
    sys.exit(1 if findings.failures else 0)


def memory_of(name: str) -> int:
    """`VmRSS` or `VmHWM` of this process, in bytes; where there is no /proc, its peak."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith(name)).split()[1])
    except (OSError, StopIteration):
        import resource  # not on Windows

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def plus_minus(value: float, error: float | None, form: str = ".4f") -> str:
    """A figure with its standard error, "x ± s.e."; "x ± unknown" where that is none. form: of both, as in a format."""
    known = error is not None and not math.isnan(error)
    return f"{value:{form}} ± " + (f"{error:{form.lstrip('+')}}" if known else "unknown")


def figure(estimate: Row | None, form: str = ".4f", error: str = "stderr_bpb") -> str:
    """Bits per byte of an `Estimate.to_dict()` with an error of it; nothing where there is none."""
    return plus_minus(estimate["bpb"], estimate[error], form) if estimate else ""


def recipe(base: Preset, model: dict[str, Any], train: dict[str, Any]) -> Preset:
    """`base` with other settings."""
    return Preset(dataclasses.replace(base.model, **model), dataclasses.replace(base.train, **train))


def trained(data: Path, run: Path, chosen: Preset) -> tuple[Row, Model]:
    """What `train` said of a recipe, and the model; trained in the folder `run` unless that is done.

    A run that was stopped goes on. What it said is kept in the folder, as trained.json.
    """
    kept = run / "trained.json"
    if not kept.exists():
        write_json(kept, train(data, run, model=chosen.model, config=chosen.train, resume=True))
    return json.loads(kept.read_text()), load_run(run)


def scores(
    model: Model,
    windows: Windows,
    *,
    metrics: Sequence[str] = METRICS,
    tokens: int | None = None,
    chain_tokens: int | None = None,
    repeats: int = 2,
) -> dict[str, Row]:
    """Those of the metrics that the model learnt, as `Estimate.to_dict()` gives them.

    NELBO (upper bound) and chain (exact) of what is trained on masks, causal (exact) of what is trained left to right.
    """
    share = model.info["train"]["causal_share"]
    found: dict[str, Row] = {}
    if share < 1 and "nelbo" in metrics:
        found["nelbo"] = likelihood.nelbo(model, windows, tokens=tokens, repeats=repeats).to_dict()
    if share < 1 and "chain" in metrics:
        found["chain"] = likelihood.chain_rule(model, windows, tokens=chain_tokens).to_dict()
    if share > 0 and "causal" in metrics:
        found["causal"] = likelihood.causal(model, windows, tokens=tokens).to_dict()
    return found


@torch.inference_mode()
def judged_nats(judge: Model, ids: Tensor) -> Tensor:
    """-log p of each id given those before it, float64 [B, T]; shifted input as `evaluate.causal` has it."""
    nats = []
    for part in ids.split(16):
        shifted = shift_right(part, judge.config.mask_id)
        logits = judge.logits(shifted, block_size=1).double()
        nats.append(-logits.log_softmax(-1).gather(-1, part[..., None])[..., 0])
    return torch.cat(nats)


def source_of(commit: str, folder: Path) -> Path:
    """The package's source at another commit of this repository, taken out into `folder`, which is made."""
    root = Path(__file__).resolve().parents[1]
    folder.mkdir()
    archive = subprocess.run(["git", "-C", str(root), "archive", commit, "src"], capture_output=True, check=True)
    subprocess.run(["tar", "-x", "-C", folder], input=archive.stdout, check=True)
    return folder / "src"


def compressors(zstd: int = 19, window: int = 22) -> dict[str, Callable[[bytes], bytes]]:
    """The general-purpose compressors at hand, at strong settings. zstd: its level; window: brotli's, a power of two."""
    found: dict[str, Callable[[bytes], bytes]] = {"xz -9e": lambda d: lzma.compress(d, preset=9 | lzma.PRESET_EXTREME)}
    with contextlib.suppress(ImportError):
        import zstandard

        found[f"zstd -{zstd}"] = lambda data: zstandard.ZstdCompressor(level=zstd).compress(data)
    with contextlib.suppress(ImportError):
        import brotli

        found["brotli -q 11"] = lambda data: brotli.compress(data, quality=11, lgwin=window)
    return found
