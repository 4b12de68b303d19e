"""The page in a real browser, by keyboard, on a phone, in forced colours; and what it says when something is not as hoped."""

# Toys stand in for models here.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportOptionalMemberAccess=false

from __future__ import annotations

import json
import re
import threading

import pytest

pytest.importorskip("starlette", reason="needs the extra serve")
pytest.importorskip("uvicorn", reason="needs the extra serve")

from test_desk import Gate, wait_for
from test_serve import Slow, ask, events, post, running, until

from mezzotint.apps import serve
from mezzotint.apps.desk import MAX_CHARACTERS
from mezzotint.apps.serve import MAX_GAPS
from mezzotint.scoring.text import TextLikelihood

LONDON = "London is the ____ of England."
DONE = "document.querySelector('#status').textContent === 'Done.'"


@pytest.fixture(scope="module")
def port():
    with running(Slow()) as port:
        yield port


@pytest.fixture
def visit(browser):
    """Opens the page of a port; any error of its script fails the test."""
    contexts, wrong = [], []

    def opened(port: int, text: str | None = None, **options):
        context = browser.new_context(**{"viewport": {"width": 900, "height": 800}, **options})
        contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.goto(f"http://localhost:{port}/")
        until(page, "document.querySelectorAll('#sampler option').length > 3")
        if text is not None:
            page.fill("#text", text)
        return page

    yield opened
    for context in contexts:
        context.close()
    assert not wrong


def fill(page) -> None:
    page.click("#go")
    until(page, DONE)


# --- for everybody -----------------------------------------------------------------------------------------------------


def test_every_control_has_a_name(visit, port):
    page = visit(port, LONDON)
    fill(page)
    page.click("#meanings summary")
    for role, names in {
        "slider": ["Passes a gap", "Temperature", "Replay the passes"],
        "textbox": ["Text with gaps"],
        "combobox": ["How to fill"],
        "spinbutton": ["Seed"],
        "button": ["Fill the gaps", "Stop", "Make a gap", "Another", "Copy", "Edit this text"],
    }.items():
        for name in names:
            assert page.get_by_role(role, name=name, exact=True).count() == 1, (role, name)
    nameless = r"- (slider|textbox|combobox|spinbutton|button|radio)( \[[^]]*\])*(:.*)?$"
    assert not re.findall(nameless, page.locator("body").aria_snapshot(), re.MULTILINE)
    words = page.inner_text("#meanings")
    for name in ("bits", "temperature", "seed", "search", *serve.SAMPLERS):
        assert name in words.lower()
    assert "looks nothing up" in words and "million parameters" in words


def test_a_gap_is_one_stop_of_the_tab_key_and_arrows_go_on(visit, port):
    page = visit(port, "London is [MASK*6] again; Paris is the ____ of France.")
    fill(page)
    assert page.locator("#canvas .drawn").count() > 4
    assert page.locator("#canvas [tabindex='0']").count() == 2
    page.locator("#canvas [tabindex='0']").first.focus()
    first = page.inner_text("#tip")
    page.keyboard.press("ArrowRight")
    assert page.inner_text("#tip") != first and "the model gave it" in page.inner_text("#tip")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.dataset.gap") == "1"


def test_focus_stays_where_it_was(visit):
    model = Gate()
    with running(model) as port:
        page = visit(port, LONDON)
        page.focus("#go")
        page.keyboard.press("Enter")
        wait_for(lambda: model.calls)
        assert page.evaluate("document.activeElement.id") == "go"
        assert page.get_attribute("#go", "aria-disabled") == "true"
        page.keyboard.press("Enter")  # is passed over, not served twice
        page.focus("#stop")
        page.keyboard.press("Enter")
        until(page, "document.querySelector('#status').textContent === 'Stopped.'")
        assert page.evaluate("document.activeElement.id") == "stop"
        model.open.set()


def test_what_was_written_is_said(visit, port):
    page = visit(port, LONDON)
    assert page.get_attribute("#said", "role") == page.get_attribute("#status", "role") == "status"
    assert page.get_attribute("#error", "role") == "alert"
    fill(page)
    assert page.text_content("#said") == "Filled. Gap 1: capital."


def test_forced_colours_tell_drawn_text_and_how_sure_it_is(visit, port):
    page = visit(port, LONDON, forced_colors="active")
    fill(page)
    drawn = "getComputedStyle(document.querySelector('#canvas .drawn'))"
    assert page.evaluate(f"{drawn}.borderBottomWidth") == "2px"
    styles = page.evaluate(
        "[0.9, 0.3, 0.05].map(c => { const t = token('a', c); document.querySelector('#canvas').append(t);"
        " return getComputedStyle(t).borderBottomStyle; })"
    )
    assert styles == ["solid", "dashed", "dotted"]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_on_a_phone_the_result_is_in_sight(visit, port, scheme):
    page = visit(port, LONDON, viewport={"width": 390, "height": 844}, color_scheme=scheme, has_touch=True)
    assert page.evaluate("document.querySelector('#canvas').getBoundingClientRect().bottom < 0.7 * innerHeight")
    fill(page)
    box = page.evaluate("(({top, bottom}) => [top, bottom])(document.querySelector('#canvas').getBoundingClientRect())")
    assert 0 <= box[0] < box[1] <= 844
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    small = page.evaluate(
        "[...document.querySelectorAll('button, .choice')].filter(b => b.offsetHeight && b.offsetHeight < 36).length"
    )
    assert small == 0
    paper, ink = (page.evaluate(f"getComputedStyle(document.body).{name}") for name in ("backgroundColor", "color"))
    light = [sum(map(int, re.findall(r"\d+", colour)[:3])) for colour in (paper, ink)]
    assert (light[0] > light[1]) == (scheme == "light")


# --- answers -----------------------------------------------------------------------------------------------------------


def test_alternatives_by_keyboard(visit, port):
    page = visit(port, LONDON)
    fill(page)
    told = events(ask(port, "/api/fill", {"text": LONDON, "sampler": "search", "n": 5})[1])[-1][1]["gaps"][0]
    page.focus("#canvas .drawn")
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.type") == "radio"
    rows = page.locator(".choice").all_inner_texts()
    assert len(rows) == len(told["alternatives"]) == 5
    for row, other in zip(rows, told["alternatives"], strict=True):
        assert other["text"].strip() in row and f"{other['bits']:.1f} bits" in row and "%" in row
    page.keyboard.press("ArrowDown")
    second = f"London is the {told['alternatives'][1]['text']} of England."
    assert page.text_content("#canvas") == second
    until(page, DONE)
    page.keyboard.press("Escape")
    assert page.evaluate("document.activeElement.dataset.gap") == "0"
    page.click("#keep")
    assert page.input_value("#text") == second


def test_alternatives_by_a_click_and_why_this_length(visit, port):
    page = visit(port, f"{LONDON} Paris is [MASK*2] capital.")
    fill(page)
    assert "Why this length: the best text of each" in page.inner_text(
        "#why"
    ) and "1 word “capital”" in page.inner_text("#why")
    page.locator("#canvas .drawn").last.click()
    assert page.inner_text("#list legend").startswith("Gap 2 of 2")
    assert "exactly 2 tokens" in page.inner_text("#why")


def test_another_and_copy(visit, port):
    page = visit(port, LONDON, permissions=["clipboard-read", "clipboard-write"])
    fill(page)
    page.click("#another")
    second = page.text_content("#canvas")
    assert second != "London is the capital of England." and second.startswith("London is the ")
    page.click("#copy")
    until(page, "document.querySelector('#tip').textContent === 'Copied.'")
    assert page.evaluate("navigator.clipboard.readText()") == second
    page.select_option("#sampler", "confidence")
    fill(page)
    page.click("#another")
    assert page.input_value("#seed") == "1"
    until(page, DONE)


def test_a_replay_tells_its_pass_and_forgets_the_tip(visit, port):
    page = visit(port, LONDON)
    fill(page)
    page.focus("#canvas .drawn")
    assert "the model gave it" in page.inner_text("#tip")
    page.focus("#replay")
    page.keyboard.press("Home")
    assert page.inner_text("#tip") == "" and page.inner_text("#replay-out").startswith("pass 1 of ")
    page.keyboard.press("End")
    assert page.locator("#canvas [data-gap]").count()
    page.fill("#text", "[MASK*99]")
    page.keyboard.press("Control+Enter")
    until(page, "document.querySelector('#error').textContent.includes('window holds')")
    assert page.inner_text("#tip") == "" and page.inner_text("#replay-out") == page.inner_text("#passes") == "–"


def test_weighing_does_not_keep_from_filling(visit, monkeypatch):
    released = threading.Event()

    def slow(model, text, *, seed, check):
        while not released.wait(0.01):
            check()
            model._before_pass()
        return TextLikelihood(1.0, 0.1, 1, 1, 1, 0)

    monkeypatch.setattr(serve, "text_likelihood", slow)
    with running(Slow()) as port:
        page = visit(port, LONDON)
        page.click("#go")
        until(page, "document.querySelector('#status').textContent.startsWith('Filled. Weighing')")
        page.fill("#text", "Paris is the ____ of France.")
        page.click("#go")
        until(page, "document.querySelector('#canvas').textContent === 'Paris is the capital of France.'")
        released.set()
        until(page, DONE)
        assert page.inner_text("#bpb") == "1.00 ± 0.10 bits/byte"


# --- writing -----------------------------------------------------------------------------------------------------------


def test_a_word_or_a_selection_becomes_a_gap(visit, port):
    page = visit(port, "She was very happy today.")
    page.evaluate("document.querySelector('#text').setSelectionRange(15, 15)")
    page.click("#gap")
    assert page.input_value("#text") == "She was very ____ today." and "“happy” is a gap" in page.inner_text("#note")
    page.evaluate("document.querySelector('#text').setSelectionRange(3, 13)")
    page.click("#gap")
    assert page.input_value("#text") == "She ____ ____ today."
    page.keyboard.press("Control+z")
    assert page.input_value("#text") == "She was very ____ today."
    page.focus("#gap")  # by keyboard alike
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "text"


def test_text_and_settings_are_kept_over_a_reload(visit, port):
    page = visit(port, "Kept: ____")
    page.select_option("#sampler", "margin")
    page.fill("#seed", "7")
    page.reload()
    until(page, "document.querySelector('#sampler').value === 'margin'")
    assert page.input_value("#text") == "Kept: ____" and page.input_value("#seed") == "7"


def test_a_wrong_seed_is_told_however_it_is_asked(visit, port):
    page = visit(port, LONDON)
    page.select_option("#sampler", "confidence")
    for wrong in ("-1", "1.5", ""):
        page.fill("#seed", wrong)
        page.keyboard.press("Control+Enter")
        assert "whole number" in page.inner_text("#error") and page.evaluate("document.activeElement.id") == "seed"
    page.fill("#seed", "3")
    page.keyboard.press("Control+Enter")
    until(page, DONE)
    assert page.inner_text("#error") == ""


# --- told kindly -------------------------------------------------------------------------------------------------------


def test_three_underscores_are_understood(visit, port):
    page = visit(port, "London is the ___ of England.")
    page.click("#go")
    assert "three underscores; a gap has four" in page.inner_text("#note")
    page.click("#note button")
    assert page.input_value("#text") == LONDON
    fill(page)
    assert page.text_content("#canvas") == "London is the capital of England."


def test_text_without_gaps_is_weighed_and_told(visit, port):
    page = visit(port, "London is the capital.")
    fill(page)
    assert "There is no gap" in page.inner_text("#note") and "bits/byte" in page.inner_text("#bpb")
    page.fill("#text", " ")
    page.click("#go")
    assert "nothing to fill" in page.inner_text("#note")


def test_too_long_a_text_is_not_cut(visit, port):
    page = visit(port)
    long = "a" * (MAX_CHARACTERS + 42)
    page.fill("#text", long)
    assert page.inner_text("#count") == "42 characters too many"
    page.click("#go")
    assert "42 characters too long" in page.inner_text("#error") and page.input_value("#text") == long
    page.fill("#text", "\U0001f3f0" * MAX_CHARACTERS)  # characters, not halves of them
    assert "8,000 of 8,000" in page.inner_text("#count")
    page.fill("#text", "____ " * (MAX_GAPS + 1))
    page.click("#go")
    until(page, f"document.querySelector('#error').textContent.includes('at most {MAX_GAPS}')")


def test_a_waiting_turn_is_told(visit):
    model = Gate()
    with running(model, serving=1, waiting=1) as port:
        first = post(port, "London is [MASK]")
        wait_for(lambda: model.calls)
        page = visit(port, LONDON)
        page.click("#go")
        until(page, "document.querySelector('#status').textContent === 'Waiting for a turn: you are next.'")
        other = visit(port, LONDON)
        other.click("#go")
        until(other, "document.querySelector('#error').textContent.startsWith('Too many people are waiting')")
        model.open.set()
        until(page, DONE)
        first.close()


def test_a_lost_server_is_told(visit):
    with running(Slow()) as port:
        page = visit(port, LONDON)
    page.click("#go")
    until(page, "document.querySelector('#error').textContent.includes('does not answer')")
    assert page.input_value("#text") == LONDON and page.get_attribute("#go", "aria-disabled") == "false"


def test_an_answer_of_nothing_and_one_that_breaks_off_are_told(visit, port):
    page = visit(port, LONDON)
    gap = {"text": "", "tokens": 1, "bits": 1.0, "asked": 1, "alternatives": [], "lengths": []}
    done = {"text": "", "parts": ["London is the ", " of England."], "gaps": [gap], "forward_passes": 1, "seconds": 0.1}
    answers = [f"event: done\ndata: {json.dumps(done)}\n\n", 'event: step\ndata: {"step": 1, "spans": []}\n\n']
    page.route(
        "**/api/fill", lambda route: route.fulfill(body=answers.pop(0), headers={"Content-Type": "text/event-stream"})
    )
    page.click("#go")
    until(page, "document.querySelector('#note').textContent.includes('nothing you could see into gap 1')")
    assert "∅" in page.inner_text("#canvas")
    page.click("#go")
    until(page, "document.querySelector('#error').textContent.includes('does not answer')")
