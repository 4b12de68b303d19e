"""What needs a package that not everybody has, asked for by name: the rooms below `integrations` import no extra.

Each name is a module of `integrations`, imported when it is asked for; it says itself which package is missing. Knows
nothing of what they do.
"""

from __future__ import annotations

import importlib
from types import ModuleType

PROVIDERS = {
    "datasets": "texts of the Hugging Face Hub as a stream",
    "published": "files that the challenge has published",
    "regex": "patterns that can tell a beginning from what can never match",
    "tensorboard": "a run's figures for TensorBoard",
    "tokenizers": "tokenizer.json of Hugging Face",
    "trackers": "a run's figures for Trackio, Weights & Biases and MLflow",
    "transformers": "models of other software",
}
"""Module of `integrations` -> what it provides to the rooms below. A new one is a row here."""


def extra(name: str) -> ModuleType:
    """The module `integrations.NAME`. Raises what it raises where its package is not installed, a MezzotintError."""
    if name not in PROVIDERS:
        raise KeyError(f"{name} is no row of PROVIDERS")
    return importlib.import_module(f"mezzotint.integrations.{name}")
