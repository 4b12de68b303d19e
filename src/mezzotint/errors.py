"""The errors a user can cause. Each message is one line: what is wrong and what to do about it,
with values quoted by `shown`.

Knows nothing of what raises them; `cli` prints them and exits with status 2.
"""

from __future__ import annotations

from typing import Any


class MezzotintError(Exception):
    """Base of every error that is the input's fault rather than the program's."""


class ConfigError(MezzotintError):
    """A setting is missing, unknown or out of range."""


class DataError(MezzotintError):
    """A corpus, shard or tokenizer cannot be used."""


class CheckpointError(MezzotintError):
    """A run folder or checkpoint cannot be used."""


class ArtifactError(MezzotintError):
    """A `.mzt` file is damaged, foreign, too new, or cannot be made to fit."""


class Interrupted(MezzotintError):
    """The run was asked to stop (SIGINT, SIGTERM); its checkpoint is written."""


def shown(value: Any) -> str:
    """A value as an error quotes it: one line of printable characters, cut where it is long."""
    try:
        text = repr(value)
    except Exception:  # Python writes no whole number of more than 4,300 digits; others have a repr of their own
        text = f"a value of type {type(value).__name__}"
    text = "".join(c if c.isprintable() else " " for c in " ".join(text.split()))
    return text if len(text) <= 60 else text[:60] + "..."
