"""Keyed random generators: what is drawn depends on its key alone, not on what was drawn before it.

Knows nothing of what is drawn.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch


def generator(*key: int | str) -> torch.Generator:
    """A CPU generator of its own for every key.

    key: whole numbers, which NumPy's SeedSequence spreads over 64 bits; or words, of whose SHA-256 the first 64 bits count.
    """
    if any(isinstance(k, str) for k in key):
        state = int.from_bytes(hashlib.sha256(" ".join(map(str, key)).encode()).digest()[:8], "little")
    else:
        numbers = [int(k) & 0xFFFFFFFFFFFFFFFF for k in key]
        state = int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])
    return numbered_generator(state >> 1)


def numbered_generator(state: int) -> torch.Generator:
    """A CPU generator begun at PyTorch's own state of that number: what packed files draw their calibration from."""
    return torch.Generator().manual_seed(state)


def numpy_generator(*key: int) -> np.random.Generator:
    """NumPy's generator (PCG64) of a key of whole numbers, 0 or more."""
    return np.random.Generator(np.random.PCG64(list(key)))


def row_noise(seed: int, step: int, rows: Sequence[int], length: int) -> np.ndarray:
    """Uniform numbers in 0..1 (1 excluded), float32 [rows, length]: each row's depend on (seed, step, row) alone.

    Philox, a generator by counters (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"), with (seed, step) as
    its key and the row as the high half of its counter.
    """
    noise = np.empty((len(rows), length), dtype=np.float32)
    key = np.array([seed & 0xFFFFFFFFFFFFFFFF, step], dtype=np.uint64)
    for line, row in zip(noise, rows, strict=True):
        bits = np.random.Philox(key=key, counter=np.array([0, 0, row, 0], dtype=np.uint64))
        np.random.Generator(bits).random(out=line, dtype=np.float32)
    return noise
