"""A desk between many clients and one model: who may come in, who waits, and whose pass the model runs next.

Each client's work runs in a thread of its own and is cut at the model's passes: before each one it gives way to whoever
has had less of the model's time. So a short question beside a long one takes about twice its own time, not the long
one's. Work whose client has gone ends at its next pass. Knows requests and answers (ASGI), nothing of what the work is.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

from mezzotint.errors import MezzotintError
from mezzotint.network.model import Model

try:
    from starlette.requests import ClientDisconnect, Request
    from starlette.responses import JSONResponse, Response
    from starlette.types import Receive, Scope, Send
except ImportError as error:
    raise MezzotintError("the page needs the extra: pip install 'mezzotint[serve]'") from error

SERVING = 8  # clients that share the model
WAITING = 32  # clients that queue; more are told to come back
MAX_BODY = 64_000  # bytes of a request
MAX_CHARACTERS = 8_000  # of its text
BODY_SECONDS = 15  # for a client to send its request
SEND_SECONDS = 30  # for a client to take what it is sent
MODEL_SECONDS = 120  # of the model's time for one request
BACKLOG = 32  # steps that are kept for a client who reads slowly; later ones are left out

Emit = Callable[[str, Any], None]
"""Called with (event, JSON data) by work in a thread; raises Cancelled when nobody listens any more."""


class Cancelled(Exception):
    """Nobody is waiting for the answer any more."""


class Refused(MezzotintError):
    """A request that is not answered. status: of HTTP; param, code: as OpenAI's clients know them."""

    def __init__(self, message: str, status: int = 400, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code


# --- turns -------------------------------------------------------------------------------------------------------------


class Turn:
    """One piece of work among those that share the model. gone: set when nobody waits for it. served: seconds so far."""

    def __init__(self, most: float = math.inf) -> None:
        self.gone = threading.Event()
        self.mine = threading.Event()
        self.served, self.since, self.most = 0.0, 0.0, most


class Turns:
    """Lets one piece of work go on at a time, at each pass the one that has had least of the time."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.lock, self.clock = threading.Lock(), clock
        self.holder: Turn | None = None
        self.waiting: list[Turn] = []

    @contextlib.contextmanager
    def taken(self, turn: Turn) -> Iterator[None]:
        """The work of `turn`, done inside, has the model whenever `give_way` has returned."""
        with self.lock:
            # Who comes later is owed nothing for the time before.
            self._account()
            rivals = [t.served for t in (self.holder, *self.waiting) if t is not None]
            turn.most += min(rivals, default=0.0)
            turn.served = min(rivals, default=0.0)
            self.waiting.append(turn)
            if self.holder is None:
                self._next()
        turn.mine.wait()
        try:
            self._check(turn)
            yield
        finally:
            with self.lock:
                self._account()
                self._next()

    def give_way(self, turn: Turn) -> None:
        """Called between passes. Raises Cancelled when the client has gone, Refused when it has had too much time."""
        self._check(turn)
        with self.lock:
            self._account()
            if turn.served > turn.most:
                raise Refused(f"this takes more than {MODEL_SECONDS} seconds of the model: ask for less at once")
            if all(t.served >= turn.served for t in self.waiting):
                return
            turn.mine.clear()
            self.waiting.append(turn)
            self._next()
        turn.mine.wait()
        self._check(turn)

    def _check(self, turn: Turn) -> None:
        if turn.gone.is_set():
            raise Cancelled

    def _account(self) -> None:
        if self.holder is not None:
            now = self.clock()
            self.holder.served += now - self.holder.since
            self.holder.since = now

    def _next(self) -> None:
        self.holder = min(self.waiting, key=lambda t: t.served, default=None)
        if self.holder is not None:
            self.waiting.remove(self.holder)
            self.holder.since = self.clock()
            self.holder.mine.set()


class _Network:
    """A network whose passes are told of before they run. All of them, whatever is kept, go through `_layers`."""

    def __init__(self, network: Any, before_pass: Callable[[], None]) -> None:
        self._real, self._before_pass = network, before_pass

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def _layers(self, *arguments: Any, **options: Any) -> Any:
        self._before_pass()
        return self._real._layers(*arguments, **options)


class _Shared:
    """A model, all of it, whose passes are told of before they run."""

    def __init__(self, model: Any, before_pass: Callable[[], None]) -> None:
        self._real, self._before_pass = model, before_pass

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._real, name)
        return _Network(value, self._before_pass) if name == "network" else value

    def logits(self, *arguments: Any, **options: Any) -> Any:
        self._before_pass()
        return self._real.logits(*arguments, **options)

    def block_logits(self, *arguments: Any, **options: Any) -> Any:
        self._before_pass()
        return self._real.block_logits(*arguments, **options)


def shared(model: Model, before_pass: Callable[[], None]) -> Model:
    """The same model; before_pass() is called before each forward pass and may wait, or raise to stop the work."""
    return cast(Model, _Shared(model, before_pass))


# --- requests ----------------------------------------------------------------------------------------------------------


async def read_json(request: Request) -> dict[str, Any]:
    """The JSON object of a request, never more than MAX_BODY bytes of it in memory. Raises Refused."""
    if request.headers.get("content-type", "").split(";")[0].strip() != "application/json":
        raise Refused("send a JSON object (content type application/json)")
    data = b""

    async def receive() -> None:
        nonlocal data
        async for chunk in request.stream():
            data += chunk
            if len(data) > MAX_BODY:
                raise Refused(f"the request is longer than {MAX_BODY:,} bytes: send less text")

    try:
        await asyncio.wait_for(receive(), BODY_SECONDS)
    except asyncio.TimeoutError as error:
        raise Refused(f"the request did not arrive within {BODY_SECONDS} seconds: send it again", 408) from error
    try:
        body = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise Refused("the request is not JSON") from error
    if not isinstance(body, dict):
        raise Refused("the request must be a JSON object")
    return body


def number(body: dict[str, Any], name: str, low: float, high: float, default: float) -> float:
    """A number of a request, of the default's kind. Raises Refused naming it."""
    value = body.get(name, default)
    good = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not good or not low <= value <= high or (isinstance(default, int) and value != int(value)):
        raise Refused(f"{name} must be a number from {low:g} to {high:g}", param=name)
    return type(default)(value)


# --- answers -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Form:
    """How an answer goes over the wire.

    streamed: events are sent as they come, as `event` writes them; else only the data of the last one, `done`, as JSON.
    error: the JSON of a refusal. media_type: of a stream.
    """

    streamed: bool
    event: Callable[[str, Any], bytes]
    error: Callable[[Refused], dict[str, Any]]
    media_type: str = "text/event-stream"

    def refusal(self, refused: Refused) -> Response:
        """The answer to a request that is not served."""
        headers = {"Retry-After": "5"} if refused.status == 503 else None
        return JSONResponse(self.error(refused), refused.status, headers)

    def answers(self, handler: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
        """A route's handler whose errors of the client are answered in this form."""

        async def answer(request: Request) -> Response:
            try:
                return await handler(request)
            except ClientDisconnect:
                return Response(status_code=400)
            except Refused as refused:
                return self.refusal(refused)
            except MezzotintError as error:
                return self.refusal(Refused(str(error)))

        return answer


def _in_a_thread(work: Callable[[], None]) -> asyncio.Future[None]:
    """Run `work` in a thread that ends with it. Done when it is, whatever it raised.

    A thread that stays keeps its own team of OpenMP workers; once there are more of them than cores, they no longer wait for
    one another awake, and every product of the model takes up to twice as long.
    """
    loop = asyncio.get_running_loop()
    ended: asyncio.Future[None] = loop.create_future()

    def body() -> None:
        try:
            work()
        finally:
            with contextlib.suppress(RuntimeError):  # the server has stopped meanwhile
                loop.call_soon_threadsafe(ended.set_result, None)

    threading.Thread(target=body, name="desk").start()
    return ended


class Desk:
    """Serves `serving` clients at a time, who share the model; `waiting` more queue. Made in the running loop."""

    def __init__(self, serving: int, waiting: int) -> None:
        self.turns = Turns()
        self.free = serving + waiting
        self.places = serving
        self.queue: deque[asyncio.Future[None]] = deque()

    def answer(self, work: Callable[[Emit, Callable[[], None]], None], form: Form) -> Response:
        """What `work` emits, or status 503 when as many wait as may. work(emit, give_way) runs in a thread, in turns."""
        if self.free <= 0:
            return form.refusal(Refused("too many are waiting: try again in a moment", 503, code="overloaded"))
        self.free -= 1
        return _Answer(self, work, form)

    async def enter(self, told: Callable[[int], Awaitable[None]]) -> None:
        """Wait for a place; told(how many are ahead) whenever that has changed."""
        if self.places > 0:
            self.places -= 1
            return
        mine: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.queue.append(mine)
        try:
            last = -1
            while not mine.done():
                ahead = self.queue.index(mine)
                if ahead != last:
                    await told(ahead)
                    last = ahead
                    continue
                await asyncio.wait([mine], timeout=0.5)
        except BaseException:
            if mine in self.queue:
                self.queue.remove(mine)
            else:
                self.leave()
            raise

    def leave(self) -> None:
        """Give a place to the next in the queue."""
        if self.queue:
            self.queue.popleft().set_result(None)
        else:
            self.places += 1


class _Answer(Response):
    """Runs work in a thread when its turn comes, and sends what it emits."""

    def __init__(self, desk: Desk, work: Callable[[Emit, Callable[[], None]], None], form: Form) -> None:
        super().__init__(media_type=form.media_type, headers={"Cache-Control": "no-store"})
        del self.headers["content-length"]
        self.desk, self.work, self.form = desk, work, form
        self.turn = Turn(MODEL_SECONDS)
        self.started = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_soon(message: Any) -> None:
            await asyncio.wait_for(send(message), SEND_SECONDS)

        talk = self._stream if self.form.streamed else self._whole
        tasks = [asyncio.create_task(self._listen(receive)), asyncio.create_task(talk(scope, receive, send_soon))]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self.turn.gone.set()
            for task in tasks:
                task.cancel()
            for result in await asyncio.gather(*tasks, return_exceptions=True):
                if isinstance(result, Exception) and not isinstance(result, (asyncio.TimeoutError, OSError)):
                    logging.getLogger(__name__).error("an answer failed", exc_info=result)
            if not self.started:
                self.desk.free += 1

    async def _listen(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    async def _stream(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def put(kind: str, data: Any) -> None:
            await send({"type": "http.response.body", "body": self.form.event(kind, data), "more_body": True})

        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await self.desk.enter(lambda ahead: put("waiting", {"ahead": ahead}))
        items = self._start()
        while (item := await items.get()) is not None:
            kind, data = item
            await put(kind, self.form.error(data) if isinstance(data, Refused) else data)
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _whole(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def nothing(_: int) -> None:
            pass

        await self.desk.enter(nothing)
        items, found = self._start(), None
        while (item := await items.get()) is not None:
            if item[0] in ("done", "error"):
                found = item[1]
        answer = self.form.refusal(found) if isinstance(found, Refused) else JSONResponse(found)
        await answer(scope, receive, send)

    def _start(self) -> asyncio.Queue[tuple[str, Any] | None]:
        """Let the work begin, which has a place. What it emits, and None at its end."""
        self.started = True
        loop, turn, desk = asyncio.get_running_loop(), self.turn, self.desk
        items: asyncio.Queue[tuple[str, Any] | None] = asyncio.Queue()

        def put(item: tuple[str, Any] | None) -> None:
            with contextlib.suppress(RuntimeError):  # the server has stopped meanwhile
                loop.call_soon_threadsafe(items.put_nowait, item)

        def emit(kind: str, data: Any) -> None:
            if turn.gone.is_set():
                raise Cancelled
            if kind != "step" or items.qsize() < BACKLOG:
                put((kind, data))

        def run() -> None:
            try:
                with desk.turns.taken(turn):
                    self.work(emit, lambda: desk.turns.give_way(turn))
            except Cancelled:
                pass
            except Refused as error:
                put(("error", error))
            except MezzotintError as error:
                put(("error", Refused(str(error))))
            except Exception:
                logging.getLogger(__name__).exception("a request failed")
                put(("error", Refused("something went wrong in the model: see the server's terminal", 500)))

        def leave(_: Any) -> None:
            # Only now is the place free: hurried clients, who go and come again, must not pile up threads.
            desk.leave()
            desk.free += 1
            items.put_nowait(None)

        _in_a_thread(run).add_done_callback(leave)
        return items
