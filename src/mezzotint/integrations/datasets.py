"""Rows of a dataset of the Hugging Face Hub, or of a local folder of one, as a stream through `datasets`.

Knows nothing of texts.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from mezzotint.errors import DataError

try:
    import datasets
except ImportError as error:
    raise DataError("hf:... needs datasets: pip install 'mezzotint[datasets]'") from error


def rows(source: str, place: str, config: str | None, split: str) -> Iterator[dict[str, Any]]:
    """The rows of `place`, one after another. source: what errors call it. Raises DataError."""
    try:
        yield from datasets.load_dataset(place, config, split=split, streaming=True)
    except Exception as error:  # the library's own errors are of many kinds
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise DataError(f"cannot read {source}: {reason}") from error
