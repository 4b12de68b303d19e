"""Rows of a dataset of the Hugging Face Hub, or of a local folder of one, as a stream through `datasets`.

Knows nothing of texts.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mezzotint.errors import DataError
from mezzotint.integrations.network import reachable

try:
    import datasets
except ImportError as error:
    raise DataError("hf:... needs datasets: pip install 'mezzotint[datasets]'") from error


def rows(source: str, place: str, config: str | None, split: str) -> Iterator[dict[str, Any]]:
    """The rows of `place`, one after another. source: what errors call it. Raises DataError."""
    if not Path(place).exists() and not reachable():
        raise DataError(
            f"cannot read {source}: the Hub cannot be reached; try again with a network, or name a local folder"
        )
    try:
        yield from datasets.load_dataset(place, config, split=split, streaming=True)
    except Exception as error:  # the library's own errors are of many kinds
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise DataError(f"cannot read {source}: {reason}") from error
