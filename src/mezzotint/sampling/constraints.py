"""What may stand in a gap by a user's wish: whole words, so many of them, a regular expression, none of certain words.

Tells of a text that grows from the left whether it can still become one that is allowed. Knows text only.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mezzotint.errors import ConfigError
from mezzotint.extras import extra

WORD = re.compile(r"\w+(?:['\u2019-]\w+)*")


MATCH_SECONDS = 0.5  # a pattern that takes longer on the text of one gap is refused


@dataclass(frozen=True)
class Constraint:
    """whole_words: the gap neither begins nor ends inside a word. max_words: at most so many words. expression: a
    compiled `regex` that the gap's text must match as a whole. avoid: words, lower case, that must not occur."""

    whole_words: bool = False
    max_words: int | None = None
    expression: Any = None
    avoid: frozenset[str] = frozenset()

    @classmethod
    def of(
        cls, *, whole_words: bool = False, max_words: int | None = None, regex: str | None = None,
        avoid: Sequence[str] | str = (),
    ) -> Constraint:  # fmt: skip
        """From `infill`'s options. Raises ConfigError."""
        if max_words is not None and max_words < 1:
            raise ConfigError(f"max_words must be at least 1, not {max_words}")
        avoided = frozenset(w.lower() for w in ([avoid] if isinstance(avoid, str) else avoid))
        if any(not WORD.fullmatch(w) for w in avoided):
            raise ConfigError("avoid takes single words, of letters and digits")
        return cls(whole_words, max_words, None if regex is None else extra("regex").compiled(regex), avoided)

    def __bool__(self) -> bool:
        return self.whole_words or self.max_words is not None or self.expression is not None or bool(self.avoid)

    def allows(self, text: str, before: str, after: str, *, complete: bool) -> bool:
        """Whether `text` between these two may stand in the gap, or, not `complete`, may begin what may.

        before, after: the characters beside the gap, a few of them suffice. Raises ConfigError for an expression that takes too
        long.
        """
        words = list(WORD.finditer(text))
        if self.max_words is not None and len(words) > self.max_words:
            return False
        if self.whole_words and before[-1:].isalnum() and _joined(before, text):
            return False
        if self.whole_words and complete and (not words or (after[:1].isalnum() and _joined(text, after))):
            return False
        if self.avoid and self._holds_avoided(text, before, after, complete):
            return False
        if self.expression is None:
            return True
        try:
            return bool(self.expression.fullmatch(text, partial=not complete, timeout=MATCH_SECONDS))
        except TimeoutError as error:
            raise ConfigError("the regular expression takes too long on a short text: make it simpler") from error

    def _holds_avoided(self, text: str, before: str, after: str, complete: bool) -> bool:
        """Whether a word that is to be avoided stands in the gap, or is made there of what stands beside it."""
        whole = before + text + (after if complete else "")
        for word in WORD.finditer(whole):
            touches = word.end() > len(before) and word.start() < len(before) + len(text)
            # A word at the end may go on.
            if touches and word[0].lower() in self.avoid and (complete or word.end() < len(whole)):
                return True
        return False


def _joined(left: str, right: str) -> bool:
    """Whether a word goes on from the end of `left` into `right`."""
    return any(word.start() < len(left) < word.end() for word in WORD.finditer(left + right))
