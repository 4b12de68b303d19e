"""Regular expressions of the `regex` package, which can tell of a beginning whether it may still become a match.

Knows nothing of gaps.
"""

from __future__ import annotations

from typing import Any

from mezzotint.errors import ConfigError

try:
    import regex
except ImportError as error:
    raise ConfigError("regex needs the extra: pip install 'mezzotint[regex]'") from error


def compiled(pattern: str) -> Any:
    """The pattern, compiled. Raises ConfigError."""
    try:
        return regex.compile(pattern)
    except (regex.error, TypeError) as error:
        raise ConfigError(f"regex {pattern!r} is not a regular expression: {error}") from error
