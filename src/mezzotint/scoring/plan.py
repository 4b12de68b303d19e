"""What is scored, how often and with which seed, decided once; and canvases through a network, many at a time.

Does not know what a score is made of.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mezzotint.config import OPTIONS
from mezzotint.data.dataset import Windows
from mezzotint.data.texts import TextWindows
from mezzotint.data.tokenizer import check_same_tokenizer
from mezzotint.errors import DataError
from mezzotint.network.model import TOKENS_PER_FORWARD, Model
from mezzotint.objective import masked_nll
from mezzotint.progress import OnProgress, Progress, silent
from mezzotint.scoring.journal import Journal


def some_bytes(size: float) -> float:
    """`size`, bytes to divide by. Raises DataError if there are none."""
    if size == 0:
        raise DataError("the windows to score stand for no bytes of text: nothing to divide by")
    return size


def choose_windows(windows: Windows | TextWindows, tokens: int | None) -> list[int]:
    """Indices of the windows to score: all, or as many evenly spaced ones as hold `tokens` tokens.

    Depends on nothing but the two arguments. Raises DataError when there is nothing to score.
    """
    total = len(windows)
    if total == 0:
        raise DataError("nothing to score: the split has no tokens")
    if tokens is None:
        return list(range(total))
    if tokens < 1:
        raise DataError(f"cannot score {tokens} tokens: ask for at least 1")
    middle = total // 2  # the first window may charge more tokens than the others do
    num_windows = -(-tokens // (len(windows[middle]) - windows.context(middle)))
    if num_windows >= total:
        return list(range(total))
    return [(2 * j + 1) * total // (2 * num_windows) for j in range(num_windows)]


@dataclass(frozen=True)
class Scoring:
    """The plan of one score. windows: what there is; chosen: indices of those that are scored.

    A window is its ids and how many of them, in front, are clean context: given, and charged elsewhere.
    tokens: what was asked for, None for all. batch: rows at a time, None for what holds 16,384 tokens.
    """

    windows: Windows | TextWindows
    chosen: list[int]
    tokens: int | None = None
    repeats: int = 1
    seed: int = 0
    batch: int | None = None
    journal: Path | None = None
    progress: OnProgress = silent
    started: float = field(default_factory=time.perf_counter)

    @classmethod
    def make(
        cls,
        model: Model,
        windows: Windows | TextWindows,
        *,
        tokens: int | None,
        progress: OnProgress | None,
        **more: Any,
    ) -> Scoring:
        """Raises DataError: nothing to score, no windows, a number of repeats out of range, or `model` and `windows` have different tokenizers."""
        if not hasattr(windows, "context"):
            raise DataError(
                f"a {type(windows).__name__} is not windows: "
                'Dataset.open(data).split("val").windows(model.config.sequence_length) are'
            )
        check_same_tokenizer(model, windows)
        if "repeats" in more:
            more["repeats"] = OPTIONS["repeats"].check("repeats", more["repeats"], DataError)
        return cls(windows, choose_windows(windows, tokens), tokens, progress=progress or silent, **more)

    def ids(self, n: int) -> Tensor:
        """Ids of the n-th chosen window, context in front: int64 [T]."""
        return torch.from_numpy(np.array(self.windows[self.chosen[n]], dtype=np.int64))

    def context(self, n: int) -> int:
        """How many of them are context."""
        return self.windows.context(self.chosen[n])

    @property
    def lengths(self) -> list[int]:
        """Tokens that each chosen window charges."""
        return [len(self.windows[i]) - self.windows.context(i) for i in self.chosen]

    @property
    def has_context(self) -> bool:
        return any(self.windows.context(i) for i in self.chosen)

    @property
    def byte_counts(self) -> np.ndarray:
        """Bytes that each chosen window charges, float64 [windows]. Raises DataError if they are none at all."""
        sizes = np.array([self.windows.byte_count(i) for i in self.chosen], dtype=np.float64)
        some_bytes(float(sizes.sum()))
        return sizes

    @property
    def bytes_lost(self) -> int:
        """Bytes of the scored windows' text that their tokens do not give back."""
        return sum(self.windows.bytes_lost(i) for i in self.chosen)

    def tell(self, done: int, total: int) -> None:
        """So many forward passes are done, of so many."""
        self.progress(Progress.nth("pass", done, total))

    def book(self, model: Model, settings: dict[str, Any], units: int, columns: int = 1) -> Journal:
        """Where finished units are kept. settings: what tells this score from others of the same model and windows."""
        return Journal(self.journal, model, self.windows, {**settings, "tokens": self.tokens}, units, columns)


@dataclass(frozen=True)
class MaskedWindow:
    """One row of a forward batch: the ids, what is masked, and what of that is scored (bool, all [T])."""

    ids: Tensor
    masked: Tensor
    scored: Tensor


def masked_window_nll(
    model: Model,
    rows: Iterable[MaskedWindow],
    *,
    block_size: int = 0,
    batch: int | None = None,
    given_blocks: int | None = None,
) -> Iterator[np.ndarray]:
    """Run canvases through the network, many at a time, and yield the NLL of each in order.

    Yields float64 [T]: nats at the scored positions, 0 elsewhere. block_size: what positions attend to, see
    `Denoiser.forward`. batch: rows at a time (default: what holds 16,384 tokens); it changes speed and memory, not the
    figures. given_blocks: predict in blocks of so many tokens, each from what its row shows of it and from the true
    tokens of the blocks before it.
    """
    pending: list[MaskedWindow] = []
    tokens_per_forward = TOKENS_PER_FORWARD // 2 if given_blocks else TOKENS_PER_FORWARD  # blocks double a window

    def flush() -> Iterator[np.ndarray]:
        if not pending:
            return
        ids = torch.stack([row.ids for row in pending]).to(model.device)
        masked = torch.stack([row.masked for row in pending]).to(model.device)
        scored = torch.stack([row.scored for row in pending]).to(model.device)
        with torch.inference_mode():
            canvas = ids.masked_fill(masked, model.config.mask_id)
            if given_blocks:
                logits = model.block_logits(canvas, ids, given_blocks, positions=scored)
            else:
                logits = model.logits(canvas, block_size=block_size, positions=scored)
            nll = masked_nll(logits, ids, scored).double().cpu().numpy()
        pending.clear()
        yield from nll

    for row in rows:
        if pending and (
            len(pending) >= (batch or max(1, tokens_per_forward // len(row.ids))) or len(row.ids) != len(pending[0].ids)
        ):
            yield from flush()
        pending.append(row)
    yield from flush()
