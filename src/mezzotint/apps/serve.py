"""A local web page: text with gaps goes in, and is watched being revealed. Needs the extra `serve`.

HTTP around `infill` and `text_likelihood`, nothing of its own about models. A page asks by POST with a JSON body and is
answered by a stream of server-sent events; closing the connection stops the work at the next pass. Everything a
stranger could make large is bounded: the body, the text, the gaps (by the window), who works and who waits.

It answers only to the names it was bound to, so that a web site whose name resolves to this machine reads nothing, and
takes only JSON, which no other site's page can send.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.resources
import json
import logging
import math
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from mezzotint import seeding
from mezzotint.config import SAMPLERS
from mezzotint.errors import MezzotintError
from mezzotint.model import Model, count_parameters
from mezzotint.objective import mask_by_count, masked_nll, nelbo_per_window, stratified_counts
from mezzotint.sampling.draft import parse_gaps
from mezzotint.sampling.generate import Span
from mezzotint.sampling.infill import infill

try:
    import uvicorn
    from starlette.applications import Starlette
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from starlette.requests import ClientDisconnect, Request
    from starlette.responses import HTMLResponse, JSONResponse, Response
    from starlette.routing import Route
    from starlette.types import Receive, Scope, Send
except ImportError as error:
    raise MezzotintError("the page needs the extra: pip install 'mezzotint[serve]'") from error


MAX_BODY = 64_000
MAX_CHARACTERS = 8_000
LIKELIHOOD_MASKS = 32
LOCAL_NAMES = ("127.0.0.1", "localhost", "[::1]")
# The page is one file with its own style and script; it may speak to this server and to nobody else.
POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


class Cancelled(Exception):
    """Nobody is waiting for the answer any more."""


@dataclass(frozen=True)
class TextLikelihood:
    """How likely a text is: the NELBO over random masks, an upper bound on its code length.

    bits_per_byte, stderr: of the whole text, None for a text of nothing. bytes: of its UTF-8. masks: drawn per window.
    """

    bits_per_byte: float | None
    stderr: float | None
    bytes: int
    tokens: int
    masks: int

    def to_dict(self) -> dict[str, Any]:
        """JSON object."""
        return {
            "bits_per_byte": self.bits_per_byte,
            "stderr": self.stderr,
            "kind": "upper bound",
            "bytes": self.bytes,
            "tokens": self.tokens,
            "masks": self.masks,
        }


def text_likelihood(
    model: Model, text: str, *, masks: int = LIKELIHOOD_MASKS, seed: int = 0, check: Callable[[], None] | None = None
) -> TextLikelihood:
    """The NELBO of a text in bits per byte of its UTF-8, from `masks` masks of each window, counts stratified.

    BOS is given, not charged: it is not part of the text. Windows do not overlap. The standard error is that of the
    mean over masks. check() is called between forward passes and may raise to stop.
    """
    ids = model.tokenizer.encode(text)
    size = len(text.encode())
    if not ids or not size:
        return TextLikelihood(None, None, size, len(ids), 0)
    window = model.config.sequence_length - 1
    mean = variance = 0.0
    for number, start in enumerate(range(0, len(ids), window)):
        part = torch.tensor(ids[start : start + window])
        generator = seeding.generator(seed, number)
        counts = stratified_counts(masks, len(part), generator)
        rows = part.expand(masks, -1)
        corrupted, masked = mask_by_count(rows, counts, model.config.mask_id, generator)
        # What is before a window's text is BOS at its start, and else the id before it.
        before = torch.full((masks, 1), model.tokenizer.bos_id if start == 0 else ids[start - 1])
        nats: list[torch.Tensor] = []
        for chunk in range(0, masks, 8):
            if check is not None:
                check()
            some = slice(chunk, chunk + 8)
            where = torch.cat((torch.zeros_like(before[some], dtype=torch.bool), masked[some]), 1)
            with torch.inference_mode():
                logits = model.logits(torch.cat((before[some], corrupted[some]), 1), positions=where.to(model.device))
            nll = masked_nll(logits.cpu(), rows[some], masked[some])
            nats.append(nelbo_per_window(nll.double(), counts[some]))
        each = torch.cat(nats).numpy()
        mean += float(each.mean())
        variance += float(each.var(ddof=1)) / masks
    scale = 1 / (size * math.log(2))
    return TextLikelihood(mean * scale, float(np.sqrt(variance)) * scale, size, len(ids), masks)


def _number(body: dict[str, Any], name: str, low: float, high: float, default: float) -> float:
    """A number of a request, of the default's kind. Raises MezzotintError naming it."""
    value = body.get(name, default)
    good = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not good or not low <= value <= high or (isinstance(default, int) and value != int(value)):
        raise MezzotintError(f"{name} must be a number from {low:g} to {high:g}")
    return type(default)(value)


def _settings(body: dict[str, Any], window: int) -> dict[str, Any]:
    """The sampling settings of a request. Raises MezzotintError naming what is wrong."""
    sampler = body.get("sampler", "confidence")
    if sampler not in SAMPLERS:
        raise MezzotintError(f"sampler must be one of {', '.join(SAMPLERS)}")
    return {
        "sampler": sampler,
        "steps": None if body.get("steps") is None else _number(body, "steps", 1, window, 1),
        "temperature": _number(body, "temperature", 0, 5, 0.7),
        "top_p": _number(body, "top_p", 0.01, 1, 1.0),
        "no_repeat": _number(body, "no_repeat", 0, 16, 0),
    }


async def _body(request: Request) -> dict[str, Any]:
    """The JSON object of a request, never more than MAX_BODY bytes of it in memory."""
    if request.headers.get("content-type", "").split(";")[0].strip() != "application/json":
        raise MezzotintError("send a JSON object (content type application/json)")
    data = b""
    async for chunk in request.stream():
        data += chunk
        if len(data) > MAX_BODY:
            raise MezzotintError(f"the request is longer than {MAX_BODY:,} bytes: send less text")
    try:
        body = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise MezzotintError("the request is not JSON") from error
    if not isinstance(body, dict) or not isinstance(body.get("text"), str):
        raise MezzotintError('the request must be a JSON object with a string "text"')
    if len(body["text"]) > MAX_CHARACTERS:
        raise MezzotintError(f"the text is longer than {MAX_CHARACTERS:,} characters: send less")
    return body


def _span(span: Span) -> list[Any]:
    return [span.text, None if span.confidence is None else round(span.confidence, 4)]


Emit = Callable[[str, Any], None]
"""Called with (event, JSON data) by work in a thread; raises Cancelled when nobody listens any more."""


class Desk:
    """How many are being served, each by a thread of its own, and how many may wait for it."""

    def __init__(self, serving: int, waiting: int) -> None:
        self.serving = asyncio.Semaphore(serving)
        self.free = serving + waiting

    def answer(self, work: Callable[[Emit], None]) -> Response:
        """A stream of what `work` emits, or status 503 when as many wait as may."""
        if self.free <= 0:
            return JSONResponse({"error": "too many are waiting: try again in a moment"}, 503, {"Retry-After": "5"})
        self.free -= 1
        return EventStream(self, work)


class EventStream(Response):
    """Runs work in a thread when its turn comes, and sends what it emits as server-sent events."""

    def __init__(self, desk: Desk, work: Callable[[Emit], None]) -> None:
        super().__init__(media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        del self.headers["content-length"]
        self.desk, self.work = desk, work
        self.gone = threading.Event()
        self.started = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        tasks = [asyncio.create_task(self._listen(receive)), asyncio.create_task(self._talk(send))]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self.gone.set()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            if not self.started:
                self.desk.free += 1

    async def _listen(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    async def _talk(self, send: Send) -> None:
        loop = asyncio.get_running_loop()
        queue: asyncio.Queue[tuple[str, Any] | None] = asyncio.Queue()

        def put(item: tuple[str, Any] | None) -> None:
            with contextlib.suppress(RuntimeError):  # the server has stopped meanwhile
                loop.call_soon_threadsafe(queue.put_nowait, item)

        def emit(kind: str, data: Any) -> None:
            if self.gone.is_set():
                raise Cancelled
            put((kind, data))

        def run() -> None:
            try:
                self.work(emit)
            except Cancelled:
                pass
            except MezzotintError as error:
                put(("error", {"message": str(error)}))
            except Exception:
                logging.getLogger(__name__).exception("a request failed")
                put(("error", {"message": "something went wrong in the model: see the server's terminal"}))
            put(None)

        def leave(_: Any) -> None:
            # Only now is the place free: hurried clients, who go and come again, must not pile up threads.
            self.desk.serving.release()
            self.desk.free += 1

        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await self.desk.serving.acquire()
        self.started = True
        loop.run_in_executor(None, run).add_done_callback(leave)
        while (item := await queue.get()) is not None:
            data = f"event: {item[0]}\ndata: {json.dumps(item[1])}\n\n".encode()
            await send({"type": "http.response.body", "body": data, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def create_app(
    model: Model,
    *,
    name: str = "model",
    serving: int = 1,
    waiting: int = 8,
    hosts: tuple[str, ...] = LOCAL_NAMES,
) -> Starlette:
    """The page and its API as an ASGI application.

    name: shown on the page. serving: clients at work at once; waiting: those who queue, more are told to come back.
    hosts: names the server answers to ("*": all). API: GET /api/model; POST /api/fill {"text", "seed", "sampler",
    "steps", "temperature", "top_p", "no_repeat"} and POST /api/likelihood {"text", "seed"}, both answered by events
    `step`, `done` and `error`.
    """
    page = importlib.resources.files("mezzotint.apps").joinpath("serve.html").read_text("utf-8")
    desk: list[Desk] = []  # made in the running loop

    async def home(_: Request) -> Response:
        return HTMLResponse(page, headers={"Content-Security-Policy": POLICY, "X-Content-Type-Options": "nosniff"})

    async def about(_: Request) -> Response:
        return JSONResponse(
            {
                "name": name,
                "parameters": count_parameters(model.network),
                "window": model.config.sequence_length,
                "vocabulary": model.config.vocab_size,
                "samplers": list(SAMPLERS),
                "max_characters": MAX_CHARACTERS,
            }
        )

    def stream(work: Callable[[Emit], None]) -> Response:
        if not desk:
            desk.append(Desk(serving, waiting))
        return desk[0].answer(work)

    async def fill(request: Request) -> Response:
        try:
            body = await _body(request)
            settings = _settings(body, model.config.sequence_length)
            seed = int(_number(body, "seed", 0, 2**53, 0))
            parse_gaps(body["text"])
        except MezzotintError as error:
            return JSONResponse({"error": str(error)}, 400)
        except ClientDisconnect:
            return Response(status_code=400)

        def work(emit: Emit) -> None:
            def on_step(step: int, spans: list[Span]) -> None:
                emit("step", {"step": step, "spans": [_span(s) for s in spans]})

            filled = infill(model, body["text"], seed, on_step=on_step, **settings)
            emit(
                "done",
                {
                    "text": filled.text,
                    "gaps": [{"text": g.text, "tokens": g.tokens, "bits": g.nats / math.log(2)} for g in filled.gaps],
                    "forward_passes": filled.forward_passes,
                    "seconds": filled.seconds,
                },
            )

        return stream(work)

    async def likelihood(request: Request) -> Response:
        try:
            body = await _body(request)
            seed = int(_number(body, "seed", 0, 2**53, 0))
            parse_gaps(body["text"])
        except MezzotintError as error:
            return JSONResponse({"error": str(error)}, 400)
        except ClientDisconnect:
            return Response(status_code=400)

        def work(emit: Emit) -> None:
            found = text_likelihood(model, body["text"], seed=seed, check=lambda: emit("step", {}))
            emit("done", found.to_dict())

        return stream(work)

    middleware = [] if "*" in hosts else [Middleware(TrustedHostMiddleware, allowed_hosts=list(hosts))]
    return Starlette(
        routes=[
            Route("/", home),
            Route("/api/model", about),
            Route("/api/fill", fill, methods=["POST"]),
            Route("/api/likelihood", likelihood, methods=["POST"]),
        ],
        middleware=middleware,
    )


def make_server(
    model: Model, *, host: str = "127.0.0.1", port: int = 8000, name: str = "model", serving: int = 1, waiting: int = 8
) -> uvicorn.Server:
    """A server ready to `run()`; tests run it in a thread. A host other than this machine answers to that name too."""
    everywhere = host in ("0.0.0.0", "::")
    hosts = ("*",) if everywhere else tuple(dict.fromkeys((*LOCAL_NAMES, host)))
    app = create_app(model, name=name, serving=serving, waiting=waiting, hosts=hosts)
    return uvicorn.Server(
        uvicorn.Config(
            app, host=host, port=port, log_level="warning", timeout_graceful_shutdown=3, limit_concurrency=64
        )
    )


def serve(model: Model, *, host: str = "127.0.0.1", port: int = 8000, name: str = "model") -> None:
    """Serve the page until interrupted. Raises MezzotintError when the address cannot be had."""
    # Bound here and not by uvicorn, which logs what is wrong and leaves, or throws.
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.create_server((host, port), family=family)
    except (OSError, OverflowError, UnicodeError) as error:
        reason = str(getattr(error, "strerror", None) or error).partition(" (while")[0].rstrip(".")
        raise MezzotintError(f"cannot serve on {host}:{port} ({reason}): choose another --port or --host") from error
    with listener:
        make_server(model, host=host, port=port, name=name).run(sockets=[listener])
