"""What a person sees: progress on standard error, tables, JSON and aligned lines on standard output.

Knows nothing of what is shown.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from mezzotint.cli.streams import to_standard
from mezzotint.progress import OnProgress, Progress


class Display:
    """Progress on standard error: a live line on a terminal, a plain line every few seconds elsewhere."""

    def __init__(self, every: float = 5.0) -> None:
        from rich.console import Console

        self.console = Console(stderr=True, highlight=False)
        self.live = None
        self.task: Any = None
        self.every, self.last = every, 0.0
        self.quiet = False
        self.validated = ""

    def say(self, text: str | Progress) -> None:
        """One line that stays."""
        if not self.quiet:
            self.console.print(str(text), markup=False, style="dim")

    def steps(self) -> Callable[[str], None]:
        """What says a line with the seconds since now before it, in place of the bar."""
        started = time.monotonic()

        def step(text: str) -> None:
            self.close()
            self.say(f"[{time.monotonic() - started:5.0f} s] {text}")

        return step

    def bar(self, share: float, text: str) -> None:
        """Move the bar to `share` (0..1)."""
        if self.quiet:
            return
        if self.console.is_terminal:
            if self.live is None:
                from rich import progress

                shown = (progress.TextColumn("{task.percentage:>3.0f}%"), progress.TextColumn("{task.description}"))
                self.live = progress.Progress(progress.BarColumn(), *shown, console=self.console, transient=True)
                self.live.start()
                self.task = self.live.add_task("", total=1.0)
            self.live.update(self.task, completed=share, description=text)
        elif time.monotonic() - self.last >= self.every:
            self.last = time.monotonic()
            print(f"{share:4.0%} {text}", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Take the bar away."""
        if self.live is not None:
            self.live.stop()
            self.live = None

    def bar_of(self, work: str = "") -> OnProgress:
        """What moves the bar as some work goes on. work: what it is, before what it tells."""
        return lambda told: self.bar(told.share, f"{work}: {told}" if work else str(told))

    def training(self, told: Progress) -> None:
        """A metrics row of `train`."""
        row = told.figures
        left = int(row["seconds_left"])
        if row.get("val_nelbo_bpb") is not None:
            causal = row.get("val_causal_bpb")
            self.validated = f"  validation {row['val_nelbo_bpb']:.3f}" + (f", causal {causal:.3f}" if causal else "")
        for kind, words in (
            ("nelbo", "bits/byte (training NELBO)"),
            ("narrow", "(some mask rates)"),
            ("sampled", "(sampled softmax)"),
            ("causal", "(next tokens)"),
        ):
            if row[f"train_{kind}_bpb"] is not None:
                loss = f"{row[f'train_{kind}_bpb']:.3f} {words}"
                break
        else:
            loss = ""
        self.bar(
            told.share,
            f"step {row['step']}  {loss}{self.validated}  {row['tokens_per_second']:,.0f} tokens/s  "
            f"{left // 60}:{left % 60:02d} left",
        )


def table(
    title: str, columns: Sequence[tuple[str, str]], rows: Sequence[Sequence[str]], *, stderr: bool = False
) -> None:
    """A table on standard output, or on standard error. columns: (name, justify)."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title or None, box=box.SIMPLE_HEAD, title_justify="left")
    for name, justify in columns:
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    console = Console(highlight=False, stderr=stderr)
    if not console.is_terminal:
        console = Console(highlight=False, stderr=stderr, width=160)
    console.print(table)


def finite(value: Any) -> Any:
    """The value with null for what JSON has no number for."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def emit(arguments: argparse.Namespace, result: dict[str, Any], lines: Sequence[tuple[str, Any]] = ()) -> None:
    """The result as JSON, or as aligned lines for a person: on standard error where standard output has the file."""
    stream = sys.stderr if to_standard(arguments) else sys.stdout
    if arguments.json:
        print(json.dumps(finite(result), allow_nan=False), file=stream)
        return
    width = max((len(name) for name, _ in lines), default=0)
    for name, value in lines:
        print(f"{name:<{width}}  {f'{value:,}' if isinstance(value, int) else value}", file=stream)


@contextlib.contextmanager
def watching(arguments: argparse.Namespace, display: Display) -> Iterator[Any]:
    """With `--watch`, the canvas on standard error while it is revealed."""
    if not arguments.watch:
        yield None
        return
    from mezzotint.apps.watch import Watch

    with Watch(display.console, pause=0.05) as watch:
        yield watch
