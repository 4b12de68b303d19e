"""A canvas in the terminal while it is revealed, coloured by confidence.

Draws what `sample` reports; does not know how it came about. Off a terminal it prints nothing until the end.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from types import TracebackType

from rich.console import Console
from rich.live import Live
from rich.style import Style
from rich.text import Text
from torch import Tensor

from mezzotint.data.tokenizer import Tokenizer
from mezzotint.sampling.denoise import OnStep
from mezzotint.sampling.generate import Span, canvas_spans

# From doubtful to sure; told apart by lightness too, so that colour-blind eyes and grey terminals can read it.
SCALE = ((0.0, (224, 79, 120)), (0.35, (230, 140, 70)), (0.7, (205, 200, 90)), (1.0, (110, 215, 160)))
FRAMES_PER_SECOND = 15
MASK = "\u2591"


def colour(confidence: float) -> tuple[int, int, int]:
    """Red, green, blue (0..255) of a confidence in 0..1, interpolated on `SCALE`."""
    for (low, a), (high, b) in itertools.pairwise(SCALE):
        if confidence <= high:
            t = max(0.0, (confidence - low) / (high - low))
            return round(a[0] + t * (b[0] - a[0])), round(a[1] + t * (b[1] - a[1])), round(a[2] + t * (b[2] - a[2]))
    return SCALE[-1][1]


def render(spans: Sequence[Span], caption: str = "") -> Text:
    """Given text plain, drawn text coloured by confidence, masks as dim blocks."""
    text = Text()
    for span in spans:
        if span.confidence is None:
            text.append(span.text)
        elif span.text == "" and span.confidence == 0:
            text.append(MASK, Style(dim=True))
        else:
            r, g, b = colour(span.confidence)
            text.append(span.text, Style(color=f"rgb({r},{g},{b})", bold=True))
    if caption:
        text.append(f"\n{caption}", Style(dim=True))
    return text


class Watch:
    """Context manager that shows spans live: pass `Watch.spans` to `infill`, `Watch.canvas(tokenizer)` to `sample`.

    pause: seconds to hold each pass, for eyes to follow. The last state stays on the screen.
    """

    def __init__(self, console: Console | None = None, pause: float = 0.0) -> None:
        self.console = console or Console(stderr=True)
        self.pause = pause
        self.last = Text()
        self.live = Live(console=self.console, refresh_per_second=FRAMES_PER_SECOND, vertical_overflow="visible")

    def __enter__(self) -> Watch:
        self.live.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.live.update(self.last)
        self.live.__exit__(kind, error, trace)

    def spans(self, step: int, spans: list[Span]) -> None:
        """`on_step` of `infill`."""
        drawn = [s.confidence for s in spans if s.confidence]
        caption = f"pass {step}, {sum(s.confidence == 0 for s in spans)} masks left"
        if drawn:
            caption += f", confidence {sum(drawn) / len(drawn):.2f}"
        self.last = render(spans, caption)
        self.live.update(self._fitted(self.last), refresh=self.pause > 0)
        if self.pause:
            time.sleep(self.pause)

    def _fitted(self, text: Text) -> Text:
        """No more lines than the terminal has, around the first mask: what has scrolled away cannot be drawn over."""
        if not self.console.is_terminal:
            return text
        room = max(2, self.console.height - 1)
        lines = text.wrap(self.console, self.console.width)
        if len(lines) <= room:
            return text
        first = next((i for i, line in enumerate(lines) if MASK in line.plain), len(lines))
        start = max(0, min(first - room // 2, len(lines) - room))
        return Text("\n").join([*lines[start : start + room - 1], lines[-1]])

    def canvas(self, tokenizer: Tokenizer, row: int = 0) -> OnStep:
        """`on_step` of `sample`, showing one of its texts."""

        def on_step(step: int, ids: Tensor, confidence: Tensor) -> None:
            self.spans(step, canvas_spans(tokenizer, ids[row].tolist(), confidence[row].tolist()))

        return on_step
