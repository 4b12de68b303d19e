"""Keyed random generators: what is drawn depends on its key alone, not on what was drawn before it.

Knows nothing of what is drawn.
"""

from __future__ import annotations

import hashlib

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
