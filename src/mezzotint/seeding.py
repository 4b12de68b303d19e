"""Keyed random generators: what is drawn depends on its key alone, not on what was drawn before it.

Knows nothing of what is drawn.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch


def generator(*key: int) -> torch.Generator:
    """A CPU generator of its own for every key of whole numbers (NumPy's SeedSequence spreads them over 64 bits)."""
    state = np.random.SeedSequence([k & 0xFFFFFFFFFFFFFFFF for k in key]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state >> np.uint64(1)))


def named_generator(name: str) -> torch.Generator:
    """A CPU generator of its own for every name (by SHA-256)."""
    digest = hashlib.sha256(name.encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


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
