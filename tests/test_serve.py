"""The page: its API over a real socket, and the page itself in a real browser."""

# Toys stand in for models here.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportOptionalMemberAccess=false

from __future__ import annotations

import dataclasses
import http.client
import json
import math
import re
import shutil
import socket
import time

import pytest
import torch

pytest.importorskip("starlette", reason="needs the extra serve")
pytest.importorskip("uvicorn", reason="needs the extra serve")

from test_sample import TEXT, Recall, own_tokenizer, random_model

from mezzotint.apps.desk import MAX_BODY, MAX_CHARACTERS
from mezzotint.apps.serve import about_model, make_server, serve
from mezzotint.apps.serve import running as running_as
from mezzotint.errors import MezzotintError
from mezzotint.pretrained import load
from mezzotint.sampling.infill import infill
from mezzotint.scoring.text import text_likelihood


class Slow(Recall):
    """Takes its time, and counts how often it was asked."""

    def __init__(self, delay: float = 0.0) -> None:
        super().__init__(own_tokenizer(), [TEXT], window=64)
        self.network = torch.nn.Linear(3, 1)
        self.delay, self.calls = delay, 0

    def logits(self, ids, **options):
        self.calls += 1
        time.sleep(self.delay)
        return super().logits(ids, **options)


def running(model, **options):
    return running_as(model, **{"name": "toy", **options})


def ask(port: int, path: str, body=None, headers=None, method=None) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
    kind = {"Content-Type": "application/json"} if data is not None else {}
    connection.request(method or ("GET" if data is None else "POST"), path, data, {**kind, **(headers or {})})
    response = connection.getresponse()
    answer = response.status, response.read()
    connection.close()
    return answer


def events(raw: bytes) -> list[tuple[str, dict]]:
    found = []
    for part in raw.decode().split("\n\n")[:-1]:
        kind, data = part.split("\n")
        found.append((kind.removeprefix("event: "), json.loads(data.removeprefix("data: "))))
    return found


@pytest.fixture(scope="module")
def port():
    with running(Slow()) as port:
        yield port


def test_filling_is_streamed_pass_by_pass(port):
    status, page = ask(port, "/")
    assert status == 200 and b"<textarea" in page
    assert json.loads(ask(port, "/api/model")[1])["window"] == 64
    status, raw = ask(port, "/api/fill", {"text": "London is the ____ of England.", "temperature": 0})
    found = events(raw)
    assert status == 200 and [kind for kind, _ in found] == ["step"] * (len(found) - 1) + ["done"]
    assert found[-1][1]["text"] == "London is the capital of England."
    assert found[-1][1]["gaps"][0]["text"] == "capital"
    assert "".join(text for text, _ in found[-2][1]["spans"]) == "London is the capital of England."
    assert ["London is the ", None] in found[0][1]["spans"] and ["", 0.0] in found[0][1]["spans"]


def test_a_text_is_weighed(port):
    known = events(ask(port, "/api/likelihood", {"text": "London is the capital of England."})[1])[-1][1]
    other = events(ask(port, "/api/likelihood", {"text": "Zebras quizzed 17 vexed foxes."})[1])[-1][1]
    assert known["kind"] == "upper bound" and known["bytes"] == 33
    assert 0 < known["bits_per_byte"] < other["bits_per_byte"]
    assert events(ask(port, "/api/likelihood", {"text": ""})[1])[-1][1]["bits_per_byte"] is None


def test_likelihood_of_text_longer_than_the_window_is_that_of_its_parts():
    class Uniform(Recall):
        def logits(self, ids, *, block_size=0, positions=None):
            return torch.zeros(int(positions.sum()), self.config.vocab_size)

    model = Uniform(own_tokenizer(), [TEXT], window=16)
    found = text_likelihood(model, TEXT, masks=4)
    tokens = len(model.tokenizer.encode(TEXT))
    assert tokens > 60
    expected = tokens * math.log2(model.config.vocab_size) / len(TEXT.encode())
    assert found.bits_per_byte == pytest.approx(expected, rel=1e-6) and found.stderr == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
    "body, words",
    [
        (b"not json", "JSON"),
        (b"[1]", "JSON object"),
        (b"[" * 50_000, "JSON"),
        ({"text": 3}, "text"),
        ({"text": "x" * (MAX_CHARACTERS + 1)}, "longer"),
        (b'{"text": "' + b"x" * MAX_BODY + b'"}', "longer"),
        ({"text": "____", "steps": 0}, "steps"),
        ({"text": "____", "steps": 1e9}, "steps"),
        ({"text": "____", "temperature": "hot"}, "temperature"),
        (b'{"text": "____", "temperature": NaN}', "temperature"),
        ({"text": "____", "sampler": "x"}, "sampler"),
        ({"text": "____", "seed": -1}, "seed"),
        ({"text": "\ud800 ____"}, "surrogate"),
        ({"text": "[MASK*0]"}, "masks"),
    ],
)
def test_bad_requests_are_refused_in_one_line(port, body, words):
    status, raw = ask(port, "/api/fill", body)
    assert status == 400
    message = json.loads(raw)["error"]
    assert words in message and "\n" not in message


def test_too_many_gaps_are_an_error_event(port):
    found = events(ask(port, "/api/fill", {"text": "[MASK*64]"})[1])
    assert found[-1][0] == "error" and "window holds 63" in found[-1][1]["message"]


def test_other_names_and_other_sites_are_refused(port):
    assert ask(port, "/", headers={"Host": "evil.example"})[0] == 400
    assert ask(port, "/api/fill", b'{"text": ""}', {"Content-Type": "text/plain"})[0] == 400
    assert ask(port, "/api/fill", method="GET")[0] == 405
    assert ask(port, "/../pyproject.toml")[0] == 404


def test_it_listens_on_this_machine_only():
    assert make_server(Slow()).config.host == "127.0.0.1"


@pytest.mark.parametrize("host, port", [("127.0.0.1", 99_999), ("no.such.host.invalid", 8000), ("127.0.0.1", 0)])
def test_an_address_that_cannot_be_had_is_one_line(host, port):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = port or taken.getsockname()[1]
        with pytest.raises(MezzotintError, match=r"cannot serve on .* choose another") as error:
            serve(Slow(), host=host, port=port)
    assert "\n" not in str(error.value)


def post(port: int, text: str) -> socket.socket:
    body = json.dumps({"text": text, "temperature": 0}).encode()
    head = (
        f"POST /api/fill HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    )
    connection = socket.create_connection(("127.0.0.1", port))
    connection.sendall(f"{head}\r\n\r\n".encode() + body)
    return connection


def test_leaving_stops_the_work_and_frees_the_place():
    model = Slow(delay=0.05)
    with running(model, serving=1, waiting=1) as port:
        first, second = post(port, "London [MASK*50]"), post(port, "London [MASK*50]")
        time.sleep(0.4)
        # One is served and one waits: a third is told so at once.
        status, raw = ask(port, "/api/fill", {"text": "London [MASK]"})
        assert status == 503 and "waiting" in json.loads(raw)["error"]
        second.close()
        first.close()
        time.sleep(0.4)
        calls = model.calls
        assert 2 < calls < 30
        time.sleep(0.4)
        assert model.calls == calls
        for _ in range(3):
            assert events(ask(port, "/api/fill", {"text": "London is [MASK]"})[1])[-1][0] == "done"


def until(page, condition: str, seconds: float = 20) -> None:
    """Wait for a JavaScript condition, from outside: the page's own policy forbids what waits inside it."""
    end = time.monotonic() + seconds
    while not page.evaluate(condition):
        assert time.monotonic() < end, condition
        time.sleep(0.02)


def test_the_page_in_a_browser():
    """Typing, filling, stopping, replaying and phone width, all by keyboard, in headless Chromium."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("needs Chromium")
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    with running(Slow(delay=0.02)) as port, playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 390, "height": 844})
        wrong: list[str] = []
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
        page.goto(f"http://localhost:{port}/")
        until(page, "document.querySelectorAll('#sampler option').length > 3")
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
        page.focus("#text")
        page.keyboard.press("Control+A")
        page.keyboard.type("London is the ____ of England. <b>Paris</b> & co.")
        page.click("#more summary")
        page.select_option("#sampler", "confidence")
        page.focus("#temperature")
        for _ in range(20):
            page.keyboard.press("ArrowLeft")
        assert page.inner_text("#temperature-out") == "0"
        page.keyboard.press("Control+Enter")
        until(page, "document.querySelector('#status').textContent === 'Done.'")
        assert page.inner_text("#canvas") == "London is the capital of England. <b>Paris</b> & co."
        assert "bits/byte" in page.inner_text("#bpb") and "±" in page.inner_text("#bpb")
        page.focus("#canvas .drawn")
        assert "the model gave it" in page.inner_text("#tip")
        page.focus("#replay")
        page.keyboard.press("Home")
        assert page.locator("#canvas .mask").count() > 0
        page.keyboard.press("End")
        assert page.locator("#canvas .mask").count() == 0
        page.fill("#text", "London [MASK*40]")
        page.keyboard.press("Control+Enter")
        until(page, "document.querySelectorAll('#canvas .drawn').length > 2")
        page.keyboard.press("Escape")
        until(page, "document.querySelector('#status').textContent === 'Stopped.'")
        page.fill("#text", "[MASK*99]")
        page.keyboard.press("Control+Enter")
        until(page, "document.querySelector('#error').textContent.includes('window holds')")
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
        browser.close()
    assert not wrong


def test_a_real_network_is_served():
    with running(random_model()) as port:
        assert json.loads(ask(port, "/api/model")[1])["parameters"] > 1000
        found = events(ask(port, "/api/fill", {"text": "a ____ b [MASK*2]", "sampler": "entropy", "steps": 3})[1])
        assert found[-1][0] == "done" and found[-1][1]["text"].startswith("a ")


def test_the_search_is_that_of_infill_and_its_lengths_are_told(port):
    text = "London is the ____ of England. Paris is [MASK*2] capital."
    found = events(ask(port, "/api/fill", {"text": text, "sampler": "search", "n": 3})[1])[-1][1]
    expected = infill(Slow(), text, n=64)
    assert found["text"] == expected.text
    assert found["parts"] == ["London is the ", " of England. Paris is ", " capital."]
    for gap, want, asked in zip(found["gaps"], expected.gaps, (None, 2), strict=True):
        assert gap["alternatives"] == [dataclasses.asdict(a) for a in want.alternatives[:3]] and gap["asked"] == asked
        words = {}
        for other in want.alternatives[::-1]:  # the likeliest of each length is written last
            words[len(re.findall(r"\w+", other.text))] = other.bits
        assert [row["words"] for row in gap["lengths"]] == sorted(row["words"] for row in gap["lengths"])
        assert len(gap["lengths"]) <= 4 and all(row["bits"] == words[row["words"]] for row in gap["lengths"])
        assert min(row["bits"] for row in gap["lengths"]) == want.alternatives[0].bits


def test_a_search_takes_no_settings_of_drawing(port):
    status, raw = ask(port, "/api/fill", {"text": "____", "sampler": "search", "temperature": 0})
    assert status == 400 and "leave out temperature" in json.loads(raw)["error"]


def test_text_that_only_looks_like_a_gap_is_weighed(port):
    assert events(ask(port, "/api/likelihood", {"text": "[MASK*0] ____"})[1])[-1][0] == "done"
    assert ask(port, "/api/likelihood", {"text": "\ud800"})[0] == 400


def test_what_a_model_is_and_was_trained_on():
    model = Slow()
    assert "trained" not in about_model(model, "toy") and "“toy” is a language model" in about_model(model, "toy")
    model.info = {"steps": 1200, "train": {"minutes": 5.0}}
    assert "trained for 5 minutes (1,200 steps) on texts that its file does not name" in about_model(model, "toy")
    model.sha256 = "0"
    assert "novels" not in about_model(model, "prose")  # another model of that name
    shipped = load("prose")
    assert "English novels" in about_model(shipped, "prose")
