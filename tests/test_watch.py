"""What a person sees of a canvas being revealed."""

from __future__ import annotations

import io

from rich.console import Console
from test_sample import TEXT, Recall, own_tokenizer

from mezzotint.apps.watch import SCALE, Watch, colour, render
from mezzotint.sampling.generate import Span, sample
from mezzotint.sampling.infill import infill


def test_colours_run_from_doubt_to_certainty():
    assert colour(0) == SCALE[0][1] and colour(1) == SCALE[-1][1] and colour(7.0) == SCALE[-1][1]
    green = [colour(i / 50)[1] for i in range(51)]
    assert green == sorted(green) and green[0] < green[-1]


def test_masks_are_blocks_and_given_text_is_plain():
    text = render([Span("a b", None), Span("", 0.0), Span("c", 0.9)], "pass 1")
    assert text.plain == "a b\u2591c\npass 1"
    styled = {text.plain[span.start : span.end]: str(span.style) for span in text.spans}
    assert "a b" not in styled and "dim" in styled["\u2591"] and "rgb(" in styled["c"]


def test_watching_sample_and_fill_ends_with_the_text():
    model = Recall(own_tokenizer(), [TEXT])
    for fill in (False, True):
        screen = io.StringIO()
        with Watch(Console(file=screen, force_terminal=True, width=100, color_system="truecolor"), pause=1e-6) as watch:
            if fill:
                infill(model, "London is the ____ of England.", temperature=0.0, on_step=watch.spans)
            else:
                sample(model, 2, 20, temperature=0.3, on_step=watch.canvas(model.tokenizer, row=1))
        shown = screen.getvalue()
        last = shown[shown.rindex("London") :]
        assert "0 masks left" in last and "\u2591" not in last
        if fill:
            assert "capital\x1b[0m of England." in last
        assert "\u2591" in shown and "London" in shown


def test_text_taller_than_the_terminal_is_shown_around_the_first_mask_and_whole_at_the_end():
    spans = [Span(f"line {i}\n", None) for i in range(40)]
    screen = io.StringIO()
    with Watch(Console(file=screen, force_terminal=True, width=40, height=8), pause=1e-6) as watch:
        watch.spans(1, [*spans[:20], Span("", 0.0), *spans[20:]])
        live = screen.getvalue()
        watch.spans(2, [*spans[:20], Span("found", 0.5), *spans[20:]])
    assert "\u2591" in live and "pass 1" in live and "line 0" not in live and live.count("line") <= 6
    # Exactly one frame scrolls: the last one.
    assert screen.getvalue().count("line 0\n") == 1 and "found" in screen.getvalue()
