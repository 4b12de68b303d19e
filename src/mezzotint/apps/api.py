"""OpenAI's completions over HTTP, so that editors and clients that speak to them can use a model here.

`POST /v1/completions` with a `suffix` fills in the middle, without one goes on behind the prompt; `GET /v1/models` names
the one model. Parameters that would change nothing here are refused unless they ask for nothing. Knows what a request
means and how it is answered; who is served when is the desk's affair.
"""

from __future__ import annotations

import json
import secrets
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mezzotint.apps.desk import MAX_CHARACTERS, Desk, Emit, Form, Refused, number, read_json, shared
from mezzotint.errors import MezzotintError
from mezzotint.network.model import Model
from mezzotint.sampling.draft import PADDING, Parts
from mezzotint.sampling.generate import check_text, continued, readable, sample
from mezzotint.sampling.healing import log_probabilities
from mezzotint.sampling.infill import LENGTHS, infill

try:
    from starlette.requests import Request
    from starlette.responses import JSONResponse, Response
    from starlette.routing import Route
except ImportError as error:
    raise MezzotintError("the page needs the extra: pip install 'mezzotint[serve]'") from error

MAX_TOKENS = 512  # of one answer
MAX_CHOICES = 16  # answers to one request
MAX_STOPS = 4
MAX_LOGPROBS = 5
LONGER = (24, 32, 48, 64, 96, 128, 192, 256, 384, 512)  # lengths of a gap to try beyond LENGTHS
CONTEXT = (64, 32)  # tokens to each side of an answer by which its tokens' probabilities are told
# What OpenAI's clients may send, and the values that ask for nothing of what there is not here.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "echo": (None, False),
    "best_of": (None, 1),
    "presence_penalty": (None, 0),
    "frequency_penalty": (None, 0),
    "logit_bias": (None, {}),
}
KNOWN = {
    "model", "prompt", "suffix", "n", "max_tokens", "temperature", "top_p", "seed", "stop", "logprobs", "stream",
    "stream_options", "user", *NEUTRAL,
}  # fmt: skip


# --- requests ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ask:
    """A request, checked. suffix: None to go on behind the prompt. temperature, top_p: None where not given."""

    prompts: tuple[str, ...]
    suffix: str | None
    n: int
    max_tokens: int
    temperature: float | None
    top_p: float | None
    seed: int
    stop: tuple[str, ...]
    logprobs: int | None
    stream: bool
    usage: bool

    @classmethod
    def of(cls, body: dict[str, Any], name: str) -> Ask:
        """From the JSON of a request to the model called `name`. Raises Refused naming the parameter."""
        if unknown := sorted(body.keys() - KNOWN):
            raise Refused(f"unknown parameter {unknown[0]!r}", param=unknown[0])
        if body.get("model") != name:
            message = f"there is no model {body.get('model')!r} here: ask for {name!r}"
            raise Refused(message, 404, "model", "model_not_found")
        for key, values in NEUTRAL.items():
            if body.get(key) not in values:
                raise Refused(f"{key} is not supported here: leave it out", param=key, code="unsupported_parameter")
        body = {k: v for k, v in body.items() if v is not None}
        prompt, suffix = body.get("prompt", ""), body.get("suffix")
        prompts = _strings(prompt, "prompt", MAX_CHOICES)
        if suffix is not None and not isinstance(suffix, str):
            raise Refused("suffix must be a string", param="suffix")
        for text in (*prompts, suffix or ""):
            check_text(text)
        if sum(map(len, prompts)) + len(suffix or "") * len(prompts) > MAX_CHARACTERS:
            message = f"prompt and suffix are longer than {MAX_CHARACTERS:,} characters: send less"
            raise Refused(message, param="prompt", code="context_length_exceeded")
        stream, options = body.get("stream", False), body.get("stream_options", {})
        if not isinstance(stream, bool):
            raise Refused("stream must be true or false", param="stream")
        if not isinstance(options, dict) or options.keys() - {"include_usage", "include_obfuscation"}:
            raise Refused("stream_options may hold include_usage only", param="stream_options")
        n = int(number(body, "n", 1, MAX_CHOICES, 1))
        if n * len(prompts) > MAX_CHOICES:
            raise Refused(f"n times the prompts may be at most {MAX_CHOICES}", param="n")
        stop = _strings(body.get("stop", []), "stop", MAX_STOPS)
        return cls(
            prompts=prompts,
            suffix=suffix,
            n=n,
            max_tokens=int(number(body, "max_tokens", 1, MAX_TOKENS, 16)),
            temperature=number(body, "temperature", 0, 2, 1.0) if "temperature" in body else None,
            top_p=number(body, "top_p", 1e-6, 1, 1.0) if "top_p" in body else None,
            seed=int(number(body, "seed", 0, 2**53, secrets.randbelow(2**31))),
            stop=tuple(s for s in stop if s),
            logprobs=int(number(body, "logprobs", 0, MAX_LOGPROBS, 0)) if "logprobs" in body else None,
            stream=stream,
            usage=options.get("include_usage") is True,
        )

    @property
    def settings(self) -> dict[str, Any]:
        """Those of sampling that were given."""
        given = {"temperature": self.temperature, "top_p": self.top_p}
        return {k: v for k, v in given.items() if v is not None}


def _strings(value: Any, name: str, most: int) -> tuple[str, ...]:
    """A string, or a list of them. Raises Refused."""
    if isinstance(value, str):
        return (value,)
    if not isinstance(value, list) or len(value) > most or not all(isinstance(v, str) for v in value):
        raise Refused(f"{name} must be a string, or a list of at most {most} strings", param=name)
    if name == "prompt" and not value:
        raise Refused("prompt must be a string, or a list of one or more", param=name)
    return tuple(value)


# --- answers -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Choice:
    """One answer. ids: tokens of `text`, the first perhaps with a space of the prompt. ended: whether by itself."""

    text: str
    ids: list[int]
    ended: bool


class _Enough(Exception):
    """Every answer has reached a stop sequence."""


def cut_at(text: str, stop: Sequence[str]) -> str | None:
    """Text before the first stop sequence in it, None where there is none."""
    found = [at for s in stop if (at := text.find(s)) >= 0]
    return text[: min(found)] if found else None


def _lengths(most: int) -> list[int]:
    return [n for n in (*LENGTHS, *LONGER) if n < most] + [most]


def _middles(model: Model, ask: Ask, prompt: str, seed: int) -> list[Choice]:
    """Texts between prompt and suffix, the likeliest first. Distinct ones, as far as that many were found."""
    assert ask.suffix is not None
    lengths, settings = _lengths(ask.max_tokens), ask.settings
    if ask.temperature == 0:
        settings = {}  # the likeliest: a search, which draws nothing
    drawn: dict[str, Any] = {"candidates": max(ask.n, len(lengths)), **settings} if settings else {}
    parts: Parts = ([prompt, ask.suffix], [None])
    gap = infill(model, parts, seed, n=ask.n, lengths=lengths, **drawn).gaps[0]
    found = []
    pending = " " if model.tokenizer.space_pending(prompt) else ""
    for alternative in gap.alternatives:
        text = cut_at(alternative.text, ask.stop)
        text = alternative.text if text is None else text
        found.append(Choice(text, model.tokenizer.encode_continuation(pending + text), True))
    return [found[k % len(found)] for k in range(ask.n)]


def _continuations(
    model: Model, ask: Ask, prompt: str, seed: int, tell: Callable[[int, str], None] | None
) -> list[Choice]:
    """Texts behind the prompt. tell(k, text): answer k begins with this text, of which nothing will change."""
    tokenizer = model.tokenizer
    before = len([tokenizer.bos_id, *tokenizer.encode(tokenizer.without_pending_space(prompt))])
    stopped: dict[int, list[int]] = {}  # ids of answers that have reached a stop sequence
    most = max(map(len, ask.stop), default=1) - 1

    def on_step(_: int, ids: torch.Tensor, __: torch.Tensor) -> None:
        for k, row in enumerate(ids[:, before:].tolist()):
            if k in stopped:
                continue
            end = next((i for i, t in enumerate(row) if t in (model.config.mask_id, tokenizer.bos_id)), len(row))
            whole = continued(tokenizer, prompt, row[:end])[len(prompt) :].partition("\ufffd")[0]
            text = cut_at(whole, ask.stop)
            if text is not None:
                stopped[k] = row[:end]
            if tell is not None:
                tell(k, whole[: len(whole) - most] if text is None else text)
        if len(stopped) == ask.n:
            raise _Enough

    try:
        found = sample(model, ask.n, ask.max_tokens, prompt=prompt, seed=seed, on_step=on_step, **ask.settings)
        rows, ended = found.tokens, found.ended
    except _Enough:
        rows, ended = [stopped[k] for k in range(ask.n)], [True] * ask.n
    choices = []
    for ids, by_itself in zip(rows, ended, strict=True):
        text = continued(tokenizer, prompt, ids)[len(prompt) :]
        short = cut_at(text, ask.stop)
        if short is not None:
            kept = range(len(ids) + 1)
            need = next(k for k in kept if continued(tokenizer, prompt, ids[:k])[len(prompt) :].startswith(short))
            text, ids = short, ids[:need]
        choices.append(Choice(text, ids, by_itself or short is not None))
    return choices


# --- probabilities -----------------------------------------------------------------------------------------------------


def token_log_probabilities(
    model: Model, left: Sequence[int], ids: Sequence[int], right: Sequence[int] | None
) -> torch.Tensor:
    """log p of every token at the place of each of `ids`, given the ones before it: float64 [n, V].

    Behind the text of a model that learnt next tokens (right None) these are their probabilities; else of the masked mode,
    with what is behind a place masked up to `right`.
    """
    if not ids:
        return torch.empty(0, model.config.vocab_size, dtype=torch.float64)
    mask_id, window = model.config.mask_id, model.config.sequence_length
    causal = right is None and model.trained_causally
    behind = list(right or [mask_id] * PADDING)[: min(CONTEXT[1], window // 4)]
    left, found = list(left), []
    at_once = max(1, window // 2) if causal else max(1, window // 4)
    for start in range(0, len(ids), at_once):
        some = list(ids[start : start + at_once])
        context = [*left, *ids[:start]]
        if causal:
            context = context[max(0, len(context) - (window - len(some))) :]
            canvas = torch.tensor([[mask_id, *context, *some[:-1]]])
            where = torch.zeros(canvas.shape, dtype=torch.bool)
            where[0, len(context) :] = True
        else:
            context = context[max(0, len(context) - min(CONTEXT[0], window // 4)) :]
            rows = [[*context, *some[:j], *[mask_id] * (len(some) - j), *behind] for j in range(len(some))]
            canvas = torch.tensor(rows)
            where = torch.zeros(canvas.shape, dtype=torch.bool)
            where[torch.arange(len(some)), len(context) + torch.arange(len(some))] = True
        found.append(log_probabilities(model, canvas, where, 1 if causal else 0)[0])
    return torch.cat(found)


def _spelled(model: Model, token: int) -> str:
    """A token as OpenAI shows it, bytes that are no character as `bytes:\\xe2`."""
    tokenizer = model.tokenizer
    if tokenizer.is_byte[token]:
        return "bytes:" + "".join(f"\\x{b:02x}" for b in tokenizer.raw[token])
    return tokenizer.piece_texts[token]


def _logprobs(model: Model, ask: Ask, prompt: str, choice: Choice) -> list[dict[str, Any]]:
    """Of each token of an answer: token, logprob, top (the likeliest few), text (characters of the answer)."""
    tokenizer = model.tokenizer
    left = [tokenizer.bos_id, *tokenizer.encode(tokenizer.without_pending_space(prompt))]
    right = None if ask.suffix is None else tokenizer.encode_continuation(ask.suffix)
    log_p = token_log_probabilities(model, left, choice.ids, right)
    found: list[dict[str, Any]] = []
    for token, row in zip(choice.ids, log_p, strict=True):
        top = row.topk(min(ask.logprobs or 0, len(row)))
        best = {_spelled(model, t): p for t, p in zip(top.indices.tolist(), top.values.tolist(), strict=True)}
        found.append({"token": _spelled(model, token), "logprob": float(row[token]), "top": best})
    return found


def _pieces(model: Model, choice: Choice) -> list[tuple[str, int]]:
    """An answer's text, token by token, and how many tokens each piece is of; pieces together are the text."""
    shown = readable(model.tokenizer, choice.ids, [1.0] * len(choice.ids))
    pieces = [(text, count) for text, _, count in shown]
    whole = "".join(text for text, _ in pieces)
    extra = len(whole) - len(whole.lstrip(" ")) - (len(choice.text) - len(choice.text.lstrip(" ")))
    if pieces and extra > 0:
        pieces[0] = (pieces[0][0][extra:], pieces[0][1])
        whole = whole[extra:]
    if whole.startswith(choice.text):  # a stop sequence may cut the last token
        over = len(whole) - len(choice.text)
        while over and pieces and len(pieces[-1][0]) <= over and len(pieces) > 1:
            over -= len(pieces[-1][0])
            last = pieces.pop()
            pieces[-1] = (pieces[-1][0], pieces[-1][1] + last[1])
        if over:
            pieces[-1] = (pieces[-1][0][: len(pieces[-1][0]) - over], pieces[-1][1])
        return pieces
    return [(choice.text, len(choice.ids))]


# --- the wire ----------------------------------------------------------------------------------------------------------


def _error(refused: Refused) -> dict[str, Any]:
    kind = "invalid_request_error" if refused.status < 500 else "server_error"
    return {"error": {"message": str(refused), "type": kind, "param": refused.param, "code": refused.code}}


def _event(kind: str, data: Any) -> bytes:
    """A server-sent event as OpenAI's are; what those have no event for is a comment, which clients pass over."""
    if kind in ("chunk", "error"):
        return f"data: {json.dumps(data)}\n\n".encode()
    return b"data: [DONE]\n\n" if kind == "done" else f": {kind}\n\n".encode()


WHOLE = Form(streamed=False, event=_event, error=_error)
STREAM = Form(streamed=True, event=_event, error=_error)


class _Writer:
    """Puts the answers to one request into OpenAI's words, and sends them as they come where it is a stream."""

    def __init__(self, model: Model, name: str, ask: Ask, emit: Emit) -> None:
        self.model, self.ask, self.emit = model, ask, emit
        self.head = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": name,
        }
        self.sent: dict[int, int] = {}  # characters of each answer that are on their way
        self.choices: list[dict[str, Any]] = []
        self.completion_tokens = 0

    def tell(self, index: int, text: str) -> None:
        """Answer `index` begins with `text`."""
        new = text[self.sent.get(index, 0) :]
        if new and self.ask.logprobs is None:
            self._chunk(index, new)
            self.sent[index] = len(text)

    def _chunk(self, index: int, text: str, logprobs: Any = None, reason: str | None = None) -> None:
        choice = {"text": text, "index": index, "logprobs": logprobs, "finish_reason": reason}
        more = {"usage": None} if self.ask.usage else {}
        self.emit("chunk", {**self.head, "choices": [choice], **more})

    def choice(self, index: int, prompt: str, choice: Choice) -> None:
        """All of an answer."""
        self.completion_tokens += len(choice.ids)
        reason = "stop" if choice.ended else "length"
        each = None if self.ask.logprobs is None else _logprobs(self.model, self.ask, prompt, choice)
        pieces = _pieces(self.model, choice)
        if not self.ask.stream:
            told = None if each is None else _columns(each, pieces, len(prompt))
            self.choices.append({"text": choice.text, "index": index, "logprobs": told, "finish_reason": reason})
            return
        if index in self.sent:
            self.tell(index, choice.text)
        else:
            offset, at = len(prompt), 0
            for text, count in pieces:
                told = None if each is None else _columns(each[at : at + count], [(text, count)], offset)
                self._chunk(index, text, told)
                offset, at = offset + len(text), at + count
        self._chunk(index, "", None, reason)

    def end(self) -> None:
        """All has been said."""
        ask, tokenizer = self.ask, self.model.tokenizer
        read = sum(len(tokenizer.encode(p)) + len(tokenizer.encode_continuation(ask.suffix or "")) for p in ask.prompts)
        usage = {
            "prompt_tokens": read,
            "completion_tokens": self.completion_tokens,
            "total_tokens": read + self.completion_tokens,
        }
        if ask.stream and ask.usage:
            self.emit("chunk", {**self.head, "choices": [], "usage": usage})
        self.emit("done", None if ask.stream else {**self.head, "choices": self.choices, "usage": usage})


def _columns(each: list[dict[str, Any]], pieces: Sequence[tuple[str, int]], offset: int) -> dict[str, Any]:
    """Log-probabilities as OpenAI's completions have them: a list for each. offset: characters before the first."""
    offsets: list[int] = []
    for text, count in pieces:
        offsets += [offset] * count
        offset += len(text)
    return {
        "tokens": [e["token"] for e in each],
        "token_logprobs": [e["logprob"] for e in each],
        "top_logprobs": [e["top"] for e in each],
        "text_offset": offsets,
    }


def complete(model: Model, name: str, ask: Ask, emit: Emit) -> None:
    """Answer a request, by events `chunk` (of a stream), `step` and `done`."""
    writer = _Writer(model, name, ask, emit)
    for p, prompt in enumerate(ask.prompts):
        first, seed = p * ask.n, ask.seed + p
        if ask.suffix is not None:
            choices = _middles(model, ask, prompt, seed)
        else:
            tell = (lambda k, text, first=first: writer.tell(first + k, text)) if ask.stream else None
            choices = _continuations(model, ask, prompt, seed, tell)
        for k, choice in enumerate(choices):
            writer.choice(first + k, prompt, choice)
    writer.end()


def routes(model: Model, name: str, desk: Callable[[], Desk]) -> list[Route]:
    """What is served under /v1, and errors in the same form for what is not."""
    card = {"id": name, "object": "model", "created": int(time.time()), "owned_by": "mezzotint"}

    @WHOLE.answers
    async def completions(request: Request) -> Response:
        ask = Ask.of(await read_json(request), name)

        def work(emit: Emit, give_way: Callable[[], None]) -> None:
            complete(shared(model, give_way), name, ask, emit)

        return desk().answer(work, STREAM if ask.stream else WHOLE)

    async def models(_: Request) -> Response:
        return JSONResponse({"object": "list", "data": [card]})

    @WHOLE.answers
    async def one_model(request: Request) -> Response:
        if request.path_params["id"] != name:
            raise Refused(f"there is no model {request.path_params['id']!r} here", 404, "model", "model_not_found")
        return JSONResponse(card)

    @WHOLE.answers
    async def nothing(request: Request) -> Response:
        raise Refused(f"{request.method} {request.url.path} is not offered here", 404, code="unknown_url")

    return [
        Route("/v1/completions", completions, methods=["POST"]),
        Route("/v1/models", models),
        Route("/v1/models/{id:path}", one_model),
        Route("/v1/{rest:path}", nothing, methods=["GET", "POST", "PUT", "PATCH", "DELETE"]),
    ]
