"""The order in which training reads windows: (step, rank) -> windows, the same for any number of processes.

Knows nothing of files, masks or models.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import numpy as np

from mezzotint.data.dataset import TokenStream
from mezzotint.distributed import helper_thread
from mezzotint.errors import DataError

COUNTED, STRETCHES = 1 << 20, 64
"""Tokens that are looked at to tell frequent ones from rare ones, and the stretches that they lie in."""


def _mix(value: np.ndarray, key: int) -> np.ndarray:
    """A 64-bit mixing function (the finaliser of splitmix64; Steele et al. 2014)."""
    with np.errstate(over="ignore"):
        z = value + np.uint64((key * 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


def permute(index: np.ndarray, size: int, key: int) -> np.ndarray:
    """A keyed permutation of 0..size-1 at `index`, int64 of its shape, without listing it; another for every `key`.

    A four-round Feistel network on the next even power of two, walked until it lands inside (Black and Rogaway 2002,
    "Ciphers with arbitrary finite domains", the cycle-walking cipher).
    """
    half = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    mask = np.uint64((1 << int(half)) - 1)
    value = index.astype(np.uint64)
    outside = np.ones(len(value), dtype=bool)
    while outside.any():
        left, right = value[outside] >> half, value[outside] & mask
        for turn in range(4):
            left, right = right, left ^ (_mix(right, key * 8 + turn + 1) & mask)
        value[outside] = (left << half) | right
        outside = value >= size
    return value.astype(np.int64)


class Loader:
    """(step, rank) -> windows. The order is a function of seed and step alone, whatever the number of processes.

    Each epoch takes every full window once, in an order and at a phase of its own. Raises DataError when the stream is
    shorter than a window.
    """

    def __init__(
        self, stream: TokenStream, length: int, global_batch: int, seed: int, rank: int = 0, world_size: int = 1
    ) -> None:
        if len(stream) < length:
            raise DataError(f"the training text has {len(stream)} tokens, fewer than one window of {length}")
        if global_batch % world_size:
            raise DataError(f"a batch of {global_batch} cannot be shared by {world_size} processes")
        self.stream, self.length, self.global_batch, self.seed = stream, length, global_batch, seed
        self.rank, self.world_size = rank, world_size
        self.phases = min(length, len(stream) - length + 1)
        self.epoch_windows = (len(stream) - self.phases + 1) // length

    def starts(self, step: int) -> np.ndarray:
        """First token of each of this process's windows of `step`."""
        rows = self.global_batch // self.world_size
        number = step * self.global_batch + self.rank * rows + np.arange(rows)
        starts = np.empty(rows, dtype=np.int64)
        for epoch in np.unique(number // self.epoch_windows):
            here = number // self.epoch_windows == epoch
            key = self.seed * 1_000_003 + int(epoch)
            phase = int(_mix(np.array([epoch], dtype=np.uint64), key + 7)[0] % np.uint64(self.phases))
            order = permute(number[here] % self.epoch_windows, self.epoch_windows, key)
            starts[here] = order * self.length + phase
        return starts

    def token_counts(self, vocab_size: int) -> np.ndarray:
        """How often each token stands in up to COUNTED tokens from all over the text, int64 [V]."""
        tokens, stretch = len(self.stream), COUNTED // STRETCHES
        if tokens <= COUNTED:
            starts = np.arange(0, tokens, stretch)
        else:
            starts = np.linspace(0, tokens - stretch, STRETCHES, dtype=np.int64)
        counts = np.zeros(vocab_size, dtype=np.int64)
        for start in starts.tolist():
            counts += np.bincount(self.stream[start : start + stretch], minlength=vocab_size)
        return counts

    def batch(self, step: int) -> np.ndarray:
        """int64 [global_batch / world_size, length]."""
        return np.stack([self.stream[int(s) : int(s) + self.length] for s in self.starts(step)]).astype(np.int64)

    def state_dict(self) -> dict[str, int]:
        """What fixes the order; the position is the step, which the caller keeps."""
        return {"seed": self.seed, "length": self.length, "batch": self.global_batch, "tokens": len(self.stream)}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Check that `state` is of the same order. Raises DataError naming what differs."""
        for key, value in self.state_dict().items():
            if state.get(key) != value:
                raise DataError(f"cannot resume: the run's {key} was {state.get(key)}, now {value}")


class Prefetch:
    """Reads the loader's batches one ahead, in a thread, and there makes of them what is wanted.

    prepare: (windows, step, *how) -> what `batch` gives; the windows themselves where not given. Ask for consecutive steps
    in the same way; any other works, unhurried.
    """

    def __init__(self, loader: Loader, prepare: Callable[..., Any] | None = None) -> None:
        self.loader, self.prepare = loader, prepare
        self._pool = helper_thread("prefetch")
        self._ahead: dict[tuple[Any, ...], Future[Any]] = {}

    def _make(self, step: int, *how: Any) -> Any:
        windows = self.loader.batch(step)
        return windows if self.prepare is None else self.prepare(windows, step, *how)

    def batch(self, step: int, *how: Any) -> Any:
        """What is made of the loader's batch of `step`, with its errors; the next one is made meanwhile in the same way.

        how: whatever else `prepare` wants, which must have a hash.
        """
        wanted = self._ahead.pop((step, *how), None) or self._pool.submit(self._make, step, *how)
        for other in self._ahead.values():
            other.cancel()
        self._ahead = {(step + 1, *how): self._pool.submit(self._make, step + 1, *how)}
        return wanted.result()

    def close(self) -> None:
        """Let the thread end; no batch can be asked for afterwards."""
        self._pool.shutdown(wait=False, cancel_futures=True)
