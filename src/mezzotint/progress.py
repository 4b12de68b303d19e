"""How far long work is: one type for all of it, handed to whoever asked to be told. `progress=print` shows it.

Does not know who shows it, or how.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Progress:
    """What a piece of work tells while it goes on. str() of it is `text`.

    text: one line for a person. done, total: how much of how much, in what `text` counts (passes, gaps, bytes, documents;
    for `train` the share of the run, of 1); total is 0 where it is not known, both are where nothing is counted.
    figures: of `train` alone, the row of metrics.jsonl with `progress` (0..1) and `seconds_left`.
    """

    text: str
    done: float = 0
    total: float = 0
    figures: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def nth(cls, unit: str, done: float, total: float) -> Progress:
        """Of things done one after another: "pass 3 of 16"."""
        return cls(f"{unit} {done:,.0f} of {total:,.0f}", done, total)

    @classmethod
    def of_bytes(cls, done: float, total: float = 0) -> Progress:
        """Of bytes: "3 of 16 bytes", or "3 bytes" where their number is not known."""
        return cls(f"{done:,.0f}{f' of {total:,.0f}' if total else ''} bytes", done, total)

    @property
    def share(self) -> float:
        """Done so far, 0..1; 0 where the total is not known."""
        return self.done / self.total if self.total else 0.0

    def __str__(self) -> str:
        return self.text


OnProgress = Callable[[Progress], None]
"""Told of work as it goes on. What it raises stops the work."""


def silent(progress: Progress) -> None:
    """The OnProgress that shows nothing."""
