"""The desk: turns by a clock that the test winds, places and queues behind a gate that the test opens."""

# Toys stand in for models here.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportOptionalMemberAccess=false

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import socket
import threading
import time

import pytest
import torch

pytest.importorskip("starlette", reason="needs the extra serve")
pytest.importorskip("uvicorn", reason="needs the extra serve")

from test_sample import random_model
from test_serve import Slow, ask, events, post, running

from mezzotint.apps import desk as desks
from mezzotint.apps import serve
from mezzotint.apps.desk import SERVING, WAITING, Cancelled, Desk, Refused, Turn, Turns, shared
from mezzotint.sampling.denoise import denoise
from mezzotint.sampling.generate import sample
from mezzotint.sampling.infill import infill


def wait_for(condition, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


class Gate(Slow):
    """Answers nothing before it is opened."""

    def __init__(self) -> None:
        super().__init__()
        self.open = threading.Event()

    def logits(self, ids, **options):
        self.calls += 1
        assert self.open.wait(20)
        return Slow.__base__.logits(self, ids, **options)


# --- turns -------------------------------------------------------------------------------------------------------------


class Workers:
    """Pieces of work whose passes cost what they say, on a clock of their own; they begin when all are there."""

    def __init__(self) -> None:
        self.now, self.turns, self.log = 0.0, Turns(lambda: self.now), []
        self.threads: list[threading.Thread] = []

    def work(self, name: str, passes: int, cost: float, turn: Turn) -> None:
        with self.turns.taken(turn):
            for _ in range(passes):
                self.turns.give_way(turn)
                self.log.append(name)
                self.now += cost

    def start(self, *arguments) -> None:
        self.threads.append(threading.Thread(target=self.work, args=arguments, daemon=True))
        waiting = len(self.turns.waiting)
        self.threads[-1].start()
        wait_for(lambda: len(self.turns.waiting) > waiting)

    def run(self, *works) -> str:
        first = Turn()
        with self.turns.taken(first):  # holds the others back until all wait
            for work in works:
                self.start(*work)
        for thread in self.threads:
            thread.join(20)
        return "".join(self.log)


def test_equal_passes_alternate():
    log = Workers().run(("a", 20, 1.0, Turn()), ("b", 3, 1.0, Turn()))
    assert sorted(log[:6]) == ["a"] * 3 + ["b"] * 3 and log[6:] == "a" * 17


def test_time_is_shared_and_not_passes():
    log = Workers().run(("a", 5, 4.0, Turn()), ("b", 40, 1.0, Turn()))
    for k in range(1, 4):  # when a has had k passes of 4 seconds, b has had as many seconds, give or take one pass of a
        upto = [i for i, name in enumerate(log) if name == "a"][k - 1]
        assert abs(log[:upto].count("b") - 4 * (k - 1)) <= 4


def test_who_comes_later_waits_for_one_pass_and_is_owed_nothing():
    workers = Workers()
    turns, old, new = workers.turns, Turn(), Turn()
    with turns.taken(old):
        workers.now += 100.0
        workers.start("new", 3, 1.0, new)
        assert new.served == 100.0
        for _ in range(3):
            turns.give_way(old)
            workers.log.append("old")
            workers.now += 1.0
    workers.threads[0].join(20)
    assert workers.log.count("new") == 3 and "new" in workers.log[:2]


def test_work_without_a_client_ends_at_its_next_pass():
    turns, turn = Turns(), Turn()
    with pytest.raises(Cancelled), turns.taken(turn):
        turns.give_way(turn)
        turn.gone.set()
        turns.give_way(turn)
    with turns.taken(Turn()):  # the model is free again
        pass


def test_too_much_of_the_models_time_is_refused():
    now = [0.0]
    turns, turn = Turns(lambda: now[0]), Turn(most=5.0)
    with pytest.raises(Refused, match="ask for less"), turns.taken(turn):
        for _ in range(3):
            turns.give_way(turn)
            now[0] += 3.0
    assert now[0] == 6.0


@pytest.mark.parametrize("causal", [False, True])
def test_a_shared_model_is_the_same_model_and_every_pass_is_told_of(causal, monkeypatch):
    model = dataclasses.replace(random_model(), info={})
    model.info["train"] = {"causal_share": 0.5 if causal else 0.0}
    told: list[int] = []
    lent = shared(model, lambda: told.append(1))
    assert lent.trained_causally == causal and lent.config is model.config
    text = "London is [MASK*2] of ____."
    assert infill(lent, text, n=3).gaps == infill(model, text, n=3).gaps and len(told) > 5
    del told[:]
    drawn = sample(lent, 2, 6, prompt="He", seed=1)
    assert drawn.texts == sample(model, 2, 6, prompt="He", seed=1).texts and len(told) >= 6
    with torch.inference_mode():
        ids = torch.zeros(1, 8, dtype=torch.int64)
        where = torch.ones(1, 8, dtype=torch.bool)
        assert torch.equal(
            lent.block_logits(ids, ids, 4, positions=where), model.block_logits(ids, ids, 4, positions=where)
        )

    read: list[int] = []
    layers = model.network._layers
    monkeypatch.setattr(
        model.network, "_layers", lambda x, *more, **named: read.append(x.shape[1]) or layers(x, *more, **named)
    )
    for one in (model, lent):  # keys and values are kept for either
        del read[:]
        denoise(one, torch.full((1, 12), model.config.mask_id), sampler="blocks", attention="causal")
        assert read == [1] * 12

    def stop() -> None:
        raise Cancelled

    for asked in (lambda m: infill(m, text), lambda m: sample(m, 1, 4)):
        with pytest.raises(Cancelled):
            asked(shared(model, stop))


# --- places ------------------------------------------------------------------------------------------------------------


def test_a_hundred_at_once_are_served_or_told_to_come_back():
    model = Gate()
    with running(model) as port:
        answers: list[tuple[int, bytes]] = []

        def client() -> None:
            answers.append(ask(port, "/api/fill", {"text": "London is [MASK]", "temperature": 0}))

        clients = [threading.Thread(target=client, daemon=True) for _ in range(100)]
        for thread in clients:
            thread.start()
        wait_for(lambda: len(answers) == 100 - SERVING - WAITING)
        assert {status for status, _ in answers} == {503} and "waiting" in json.loads(answers[0][1])["error"]
        model.open.set()
        for thread in clients:
            thread.join(30)
        done = [events(raw) for status, raw in answers if status == 200]
        assert len(answers) == 100 and len(done) == SERVING + WAITING
        assert {found[-1][1]["text"] for found in done} == {"London is the"}
        assert sum(found[0][0] == "waiting" for found in done) == WAITING


def test_a_thread_ends_with_its_answer():
    """Threads that stay keep teams of OpenMP workers, which slow down all others (`desk._in_a_thread`)."""
    model = Slow()
    with running(model) as port:
        for _ in range(3):
            assert ask(port, "/api/fill", {"text": "London is [MASK]"})[0] == 200
            wait_for(lambda: not any(thread.name == "desk" for thread in threading.enumerate()))


def test_the_queue_is_told_where_it_stands_and_moves_up():
    model = Gate()
    with running(model, serving=1, waiting=2) as port:
        first = post(port, "London is [MASK]")
        wait_for(lambda: model.calls == 1)
        others = []
        for _ in range(2):
            others.append(post(port, "London is [MASK]"))
            _until(others[-1], b"event: waiting", 1)
        _until(others[1], b'{"ahead": 1}', 1)
        others[0].close()
        _until(others[1], b'{"ahead": 0}', 1)
        model.open.set()
        _until(others[1], b"event: done", 1)
        first.close()
        others[1].close()


_read: dict[socket.socket, bytes] = {}


def _until(connection: socket.socket, what: bytes, times: int) -> bytes:
    """What a connection has sent, at least until `what` has come so many times."""
    connection.settimeout(20)
    while _read.get(connection, b"").count(what) < times:
        new = connection.recv(4096)
        assert new
        _read[connection] = _read.get(connection, b"") + new
    return _read[connection]


def test_a_short_question_does_not_wait_for_a_long_one(monkeypatch):
    """Passes of the long one take until somebody else waits for the model, or has been served."""
    served = threading.Event()
    kept: list[Turns] = []
    monkeypatch.setattr(desks, "Turns", lambda: kept.append(Turns()) or kept[0])

    class Patient(Slow):
        def logits(self, ids, **options):
            if ids.shape[1] > 60:
                wait_for(lambda: kept[0].waiting or served.is_set())
            return super().logits(ids, **options)

    with running(Patient()) as port:
        long = post(port, "London [MASK*60]")
        wait_for(lambda: kept and kept[0].holder is not None)
        assert events(ask(port, "/api/fill", {"text": "London is [MASK]"})[1])[-1][0] == "done"
        served.set()
        assert _until(long, b"event: done", 1).count(b"event: step") > 30
        long.close()


# --- slow clients ------------------------------------------------------------------------------------------------------


def test_a_client_who_asks_nothing_is_let_go(monkeypatch):
    monkeypatch.setattr(serve, "IDLE_SECONDS", 0.1)
    with running(Slow()) as port:
        for head in (b"", b"POST /api/fill HTTP/1.1\r\nHost: localhost\r\nX-Slow: "):
            connection = socket.create_connection(("127.0.0.1", port), timeout=20)
            connection.sendall(head)
            with contextlib.suppress(ConnectionResetError):
                assert connection.recv(100) == b""
            connection.close()
        assert ask(port, "/api/model")[0] == 200


def test_a_request_that_does_not_arrive_is_refused(monkeypatch):
    monkeypatch.setattr(desks, "BODY_SECONDS", 0.2)
    with running(Slow()) as port:
        connection = socket.create_connection(("127.0.0.1", port), timeout=20)
        connection.sendall(
            b"POST /api/fill HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 900\r\n\r\n{"
        )
        assert b" 408 " in connection.recv(100)
        connection.close()


@pytest.mark.parametrize("streamed", [True, False])
def test_a_client_who_takes_nothing_costs_nothing(monkeypatch, streamed):
    monkeypatch.setattr(desks, "SEND_SECONDS", 0.05)
    form = desks.Form(streamed=streamed, event=lambda kind, data: b"x" * 1000, error=lambda refused: {})
    ended = threading.Event()
    passes: list[int] = []

    def work(emit, give_way) -> None:
        try:
            while True:
                give_way()
                passes.append(1)
                emit("step", {})
                time.sleep(0.001)
        finally:
            ended.set()

    async def run() -> None:
        desk = Desk(1, 0)

        async def receive():
            if streamed:
                await asyncio.sleep(60)
            await asyncio.sleep(0.2)
            return {"type": "http.disconnect"}

        async def send(message) -> None:
            if message["type"] == "http.response.body":
                await asyncio.sleep(60)

        await desk.answer(work, form)({"type": "http"}, receive, send)
        await asyncio.get_running_loop().run_in_executor(None, ended.wait, 20)
        while desk.places == 0:
            await asyncio.sleep(0.005)
        assert desk.free == 1

    asyncio.run(run())
    assert ended.is_set() and passes


def test_what_fails_in_the_model_is_told_in_one_line():
    class Broken(Slow):
        def logits(self, ids, **options):
            raise ValueError("secret path")

    with running(Broken()) as port:
        found = events(ask(port, "/api/fill", {"text": "London [MASK]"})[1])
        assert found[-1] == ("error", {"message": "something went wrong in the model: see the server's terminal"})


def test_time_of_the_model_is_bounded(monkeypatch):
    monkeypatch.setattr(desks, "MODEL_SECONDS", 0)
    with running(Slow(delay=0.001)) as port:
        found = events(ask(port, "/api/fill", {"text": "London [MASK*4]"})[1])
        assert found[-1][0] == "error" and "ask for less" in found[-1][1]["message"]
