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
import hashlib
import importlib.resources
import json
import math
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from mezzotint.apps import api
from mezzotint.apps.desk import MAX_CHARACTERS, SERVING, WAITING, Desk, Emit, Form, Refused, number, read_json, shared
from mezzotint.config import SAMPLERS
from mezzotint.errors import MezzotintError
from mezzotint.network.model import Model, count_parameters
from mezzotint.pretrained import pretrained_file, pretrained_models
from mezzotint.sampling.constraints import WORD
from mezzotint.sampling.draft import parse_gaps
from mezzotint.sampling.generate import Span, check_text
from mezzotint.sampling.infill import CANDIDATES, Alternative, Gap, check_fills, infill
from mezzotint.scoring.text import text_likelihood

try:
    import uvicorn
    from starlette.applications import Starlette
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from starlette.requests import Request
    from starlette.responses import HTMLResponse, JSONResponse, Response
    from starlette.routing import Route
    from uvicorn.protocols.http.h11_impl import H11Protocol
except ImportError as error:
    raise MezzotintError("the page needs the extra: pip install 'mezzotint[serve]'") from error


MAX_GAPS = 64  # of a text
MOST_SIZES = 4  # lengths of a gap that are compared for whoever looks at it
TRAINED_ON = {
    "prose": "97 public-domain English novels of the 19th and early 20th century and four OpenStax textbooks."
}
CONNECTIONS = 160
IDLE_SECONDS = 10  # for a client to ask something, and for one who takes nothing any more
SEARCH = "search"
DRAWING = {"steps", "temperature", "top_p", "no_repeat"}
LOCAL_NAMES = ("127.0.0.1", "localhost", "[::1]")
# The page is one file with its own style and script; it may speak to this server and to nobody else.
POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


def _settings(body: dict[str, Any], window: int) -> tuple[dict[str, Any], int]:
    """Options of `infill` from a request, and alternatives wanted. Raises Refused naming what is wrong.

    sampler: a name of `SAMPLERS`, or `search`: texts are sought by a beam and the likeliest is taken, which nothing else
    steers. n: alternatives that are wanted for each gap.
    """
    sampler, n = body.get("sampler", "confidence"), int(number(body, "n", 1, 64, 1))
    if sampler == SEARCH:
        if wrong := DRAWING & body.keys():
            raise Refused(f"{SEARCH} draws nothing: leave out {', '.join(sorted(wrong))}")
        return {"n": max(n, CANDIDATES)}, n  # all, so that lengths can be compared
    if sampler not in SAMPLERS:
        raise Refused(f"sampler must be one of {', '.join((SEARCH, *SAMPLERS))}", param="sampler")
    drawing = {
        "n": n,
        "sampler": sampler,
        "steps": None if body.get("steps") is None else number(body, "steps", 1, window, 1),
        "temperature": number(body, "temperature", 0, 5, 0.7),
        "top_p": number(body, "top_p", 0.01, 1, 1.0),
        "no_repeat": number(body, "no_repeat", 0, 16, 0),
    }
    return drawing, n


async def _body(request: Request) -> dict[str, Any]:
    """A request about a text. Raises Refused."""
    body = await read_json(request)
    if not isinstance(body.get("text"), str):
        raise Refused('the request must be a JSON object with a string "text"')
    if len(body["text"]) > MAX_CHARACTERS:
        raise Refused(f"the text is longer than {MAX_CHARACTERS:,} characters: send less")
    check_text(body["text"])
    return body


def _gap(gap: Gap, asked: int | None, n: int) -> dict[str, Any]:
    """A filled gap for the page, with `n` alternatives and the best text of each length in words (the best MOST_SIZES).

    asked: tokens that the text asks for. bits of the gap: of its tokens where they were drawn; of a text: its code length.
    """
    best: dict[int, Alternative] = {}
    for other in gap.alternatives:  # the likeliest first
        best.setdefault(len(WORD.findall(other.text)), other)
    sizes = sorted(list(best.items())[:MOST_SIZES], key=lambda size: size[0])
    return {
        "text": gap.text,
        "tokens": gap.tokens,
        "bits": gap.nats / math.log(2),
        "asked": asked,
        "alternatives": [{"text": a.text, "bits": a.bits, "probability": a.probability} for a in gap.alternatives[:n]],
        "lengths": [{"words": words, "text": a.text, "bits": a.bits} for words, a in sizes],
    }


def _is_shipped(model: Model, name: str) -> bool:
    if name not in pretrained_models():
        return False
    with pretrained_file(name) as path:
        return model.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def about_model(model: Model, name: str) -> str:
    """What a model is and what it was trained on, as far as is known, in a few sentences for the page."""
    told = f"“{name}” is a language model of {count_parameters(model.network) / 1e6:.1f} million parameters that reads "
    told += "the text on both sides of a gap, as far as its window goes. "
    steps, train = model.info.get("steps"), model.info.get("train")
    minutes = train.get("minutes") if isinstance(train, dict) else None
    trained = f" for {minutes:g} minutes" if isinstance(minutes, (int, float)) and minutes > 0 else ""
    trained += f" ({steps:,} steps)" if isinstance(steps, int) else ""
    if name in TRAINED_ON and _is_shipped(model, name):
        told += f"It was trained{trained} on {TRAINED_ON[name]} "
    else:
        told += f"It was trained{trained} on texts that its file does not name. " if trained else ""
    return told + (
        "It writes what is likely in such texts and looks nothing up: names, dates and facts in its answers are made up. "
        "Nothing that you write leaves the machine that serves this page."
    )


def _span(span: Span) -> list[Any]:
    return [span.text, None if span.confidence is None else round(span.confidence, 4)]


def _event(kind: str, data: Any) -> bytes:
    """A server-sent event of the page."""
    if kind == "error":
        data = {"message": data["error"]}
    return f"event: {kind}\ndata: {json.dumps(data)}\n\n".encode()


PAGE = Form(streamed=True, event=_event, error=lambda refused: {"error": str(refused)})


def _facts(model: Model, name: str) -> dict[str, Any]:
    """What the page is told about its model and its bounds."""
    return {
        "name": name,
        "parameters": count_parameters(model.network),
        "window": model.config.sequence_length,
        "vocabulary": model.config.vocab_size,
        "samplers": list(SAMPLERS),
        "max_characters": MAX_CHARACTERS,
        "max_gaps": MAX_GAPS,
        "about": about_model(model, name),
    }


def create_app(
    model: Model,
    *,
    name: str = "model",
    serving: int = SERVING,
    waiting: int = WAITING,
    hosts: tuple[str, ...] = LOCAL_NAMES,
) -> Starlette:
    """The page and its API as an ASGI application.

    name: shown on the page. serving: clients who share the model; waiting: those who queue, more are told to come back.
    hosts: names the server answers to ("*": all). API: GET /api/model; POST /api/fill {"text", "seed", "sampler",
    "steps", "temperature", "top_p", "no_repeat", "n"} and POST /api/likelihood {"text", "seed"}, both answered by events
    `waiting`, `step`, `done` and `error`; and what `api` answers under /v1.
    """
    check_fills(model)
    page = importlib.resources.files("mezzotint.apps").joinpath("serve.html").read_text("utf-8")
    facts = _facts(model, name)
    desks: list[Desk] = []  # made in the running loop

    def desk() -> Desk:
        if not desks:
            desks.append(Desk(serving, waiting))
        return desks[0]

    async def home(_: Request) -> Response:
        return HTMLResponse(page, headers={"Content-Security-Policy": POLICY, "X-Content-Type-Options": "nosniff"})

    async def about(_: Request) -> Response:
        return JSONResponse(facts)

    @PAGE.answers
    async def fill(request: Request) -> Response:
        body = await _body(request)
        settings, wanted = _settings(body, model.config.sequence_length)
        seed = int(number(body, "seed", 0, 2**53, 0))
        parts, counts = parse_gaps(body["text"])
        if len(counts) > MAX_GAPS:
            raise Refused(f"the text has {len(counts):,} gaps: at most {MAX_GAPS} are filled at once")

        def work(emit: Emit, give_way: Callable[[], None]) -> None:
            def on_step(step: int, spans: list[Span]) -> None:
                emit("step", {"step": step, "spans": [_span(s) for s in spans]})

            filled = infill(shared(model, give_way), body["text"], seed, on_step=on_step, **settings)
            emit(
                "done",
                {
                    "text": filled.text,
                    "parts": parts,
                    "gaps": [_gap(g, count, wanted) for g, count in zip(filled.gaps, counts, strict=True)],
                    "forward_passes": filled.forward_passes,
                    "seconds": filled.seconds,
                },
            )

        return desk().answer(work, PAGE)

    @PAGE.answers
    async def likelihood(request: Request) -> Response:
        body = await _body(request)
        seed = int(number(body, "seed", 0, 2**53, 0))

        def work(emit: Emit, give_way: Callable[[], None]) -> None:
            found = text_likelihood(shared(model, give_way), body["text"], seed=seed, check=lambda: emit("step", {}))
            emit("done", found.to_dict())

        return desk().answer(work, PAGE)

    middleware = [] if "*" in hosts else [Middleware(TrustedHostMiddleware, allowed_hosts=list(hosts))]
    return Starlette(
        routes=[
            Route("/", home),
            Route("/api/model", about),
            Route("/api/fill", fill, methods=["POST"]),
            Route("/api/likelihood", likelihood, methods=["POST"]),
            *api.routes(model, name, desk),
        ],
        middleware=middleware,
    )


class _Connection(H11Protocol):
    """A connection that is closed when nothing is asked on it, or nothing is taken that was sent."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._watch(object())

    def _watch(self, before: object) -> None:
        closing = self.transport.is_closing()
        idle = closing or self.cycle is None or self.cycle.response_complete
        now = (closing, self.cycle) if idle else object()
        if now == before:
            self.transport.abort()
        elif self in self.connections:
            self.loop.call_later(IDLE_SECONDS, self._watch, now)


def make_server(
    model: Model,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    name: str = "model",
    serving: int = SERVING,
    waiting: int = WAITING,
) -> uvicorn.Server:
    """A server ready to `run()`. A host other than this machine answers to that name too."""
    everywhere = host in ("0.0.0.0", "::")
    hosts = ("*",) if everywhere else tuple(dict.fromkeys((*LOCAL_NAMES, host)))
    app = create_app(model, name=name, serving=serving, waiting=waiting, hosts=hosts)
    return uvicorn.Server(
        uvicorn.Config(
            app,
            host=host,
            port=port,
            log_level="warning",
            timeout_graceful_shutdown=3,
            limit_concurrency=CONNECTIONS,
            http=_Connection,
        )
    )


@contextlib.contextmanager
def running(model: Model, **options: Any) -> Iterator[int]:
    """A server in a thread of this process, for as long as the context lasts: its port on 127.0.0.1.

    options: those of `make_server`; port: a free one unless given.
    """
    with socket.create_server(("127.0.0.1", options.pop("port", 0))) as listener:
        server = make_server(model, **options)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.01)
        try:
            yield listener.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join(10)


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
