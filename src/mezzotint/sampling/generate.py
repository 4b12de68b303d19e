"""Text from nothing: a canvas of masks behind a BOS, read back as text.

End of text: a document is its ids preceded by BOS, so a BOS that is drawn says that the text before it has ended.
`sample` allows it and cuts there.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mezzotint import seeding
from mezzotint.config import OPTIONS, REVEAL_OPTIONS, Rule, SamplingConfig, SamplingOptions
from mezzotint.data.texts import check_text
from mezzotint.data.tokenizer import Tokenizer
from mezzotint.errors import ConfigError
from mezzotint.network.model import Model, cacheable
from mezzotint.sampling import speculate as speculation
from mezzotint.sampling.denoise import Denoised, OnStep, denoise

if TYPE_CHECKING:
    from typing_extensions import Unpack


# Next tokens at 1 are judged worse than text, at 0.8 as well but poorer in words (LOG.md, benchmarks/sampling.py).
NEXT_TOKEN_TEMPERATURE = 0.9
MOST_TOKENS = 1 << 24  # of all texts drawn by one call, prompts included: 16 bytes each


def resample_invalid_utf8(
    model: Model, result: Denoised, drawn: Tensor, seed: int, allowed: Tensor, first_row: int, **settings: Any
) -> Denoised:
    """Redraw, from whole characters only, the drawn byte ids that do not form valid UTF-8 (a rare accident).

    drawn: bool [B, T], positions that were not given.
    """
    tokenizer = model.tokenizer
    if not tokenizer.is_byte.any():
        return result
    broken = torch.zeros_like(drawn)
    for b, row in enumerate(result.ids.tolist()):
        broken[b, tokenizer.invalid_utf8(row)] = True
    broken &= drawn
    if not broken.any():
        return result
    again = denoise(
        model,
        result.ids.masked_fill(broken, model.config.mask_id),
        seed=seed + 1,
        target=broken,
        allowed=allowed & ~tokenizer.is_byte,
        first_row=first_row,
        **settings,
    )
    confidence = torch.where(broken, again.confidence, result.confidence)
    return Denoised(again.ids, confidence, result.nats, result.forward_passes + again.forward_passes)


@dataclass(frozen=True)
class Samples:
    """Texts from nothing (or from a prompt), and what they cost.

    tokens: drawn ids of each text. ended: whether a text reached its end or was cut at the length asked for.
    forward_passes: how often the network ran over the batch. to_dict() is the command line's JSON.
    """

    texts: list[str]
    tokens: list[list[int]]
    ended: list[bool]
    forward_passes: int
    seconds: float
    seed: int

    def to_dict(self) -> dict[str, Any]:
        """JSON object."""
        return {"texts": self.texts, "forward_passes": self.forward_passes, "seconds": self.seconds, "seed": self.seed}


def sample(
    model: Model,
    n: int = 1,
    length: int | None = None,
    *,
    prompt: str = "",
    seed: int = 0,
    on_step: OnStep | None = None,
    attention: str | None = None,
    speculate: int = 0,
    **settings: Unpack[SamplingOptions],
) -> Samples:
    """Draw `n` texts of `length` tokens, or less where a text ends by itself.

    length: by default what the window holds behind the prompt, and at least half a window. Text i depends on (seed, i)
    only. Each begins after a BOS, with `prompt` if given. A length beyond the window is drawn window after window, each
    seeing the last half window of text before it; `steps` is then per window.
    on_step sees the whole canvas [n, tokens] after each pass. attention: see `denoise`. settings: the fields of `SamplingConfig`. Unless told
    how to reveal masks, a model that learnt next tokens draws one after another, at a temperature of 0.9 if none is given,
    and keeps keys and values; one trained in blocks is sampled by `blocks`. `order_noise` is 4 unless given. Raises
    MezzotintError for a bad number, length or prompt.
    speculate: draw next tokens, so many drafted at a time by the masked mode and verified by the causal one: the same
    distribution, by fewer passes (see `speculate`). For models that learnt next tokens, within one window.
    """
    started = time.perf_counter()
    if speculate:
        return sample_by_speculation(model, n, length, prompt, seed, speculate, dict(settings))
    if model.block_size:
        settings.setdefault("sampler", "blocks")
    elif model.trained_causally and attention is None and not REVEAL_OPTIONS & settings.keys():
        settings = {"temperature": NEXT_TOKEN_TEMPERATURE, **settings, "sampler": "blocks", "block": 1}
        attention = "causal"
    if settings.get("sampler", "confidence") in ("confidence", "margin"):
        # The surest first, on a canvas of nothing but masks, says the same again and again; noise on the order cures it.
        settings.setdefault("order_noise", 4.0)
    check_text(prompt)
    OPTIONS["n"].check("n", n)
    Rule(int).check("seed", seed)
    window, mask_id, bos = model.config.sequence_length, model.config.mask_id, model.tokenizer.bos_id
    prompt_ids = [bos, *model.tokenizer.encode(model.tokenizer.without_pending_space(prompt))]
    length = max(1, window // 2, window - len(prompt_ids)) if length is None else length
    OPTIONS["length"].check("length", length)
    if n * (len(prompt_ids) + length) > MOST_TOKENS:
        raise ConfigError(
            f"{n:,} texts of {length:,} tokens behind {len(prompt_ids):,} are more than {MOST_TOKENS:,} tokens at once: "
            "ask for fewer, or shorter ones"
        )
    tokenizer = model.tokenizer
    allowed = tokenizer.is_text.clone()
    allowed[bos] = True
    canvas = torch.full((n, len(prompt_ids) + length), mask_id, dtype=torch.int64)
    canvas[:, : len(prompt_ids)] = torch.tensor(prompt_ids)
    confidence = (canvas != mask_id).float()
    ended = torch.zeros(n, dtype=torch.bool)
    done, passes, round_ = len(prompt_ids), 0, 0
    while done < canvas.shape[1] and not ended.all():
        # Half a window of text to go by; a window of 1 token has none.
        start = 0 if canvas.shape[1] <= window else max(0, min(done - window // 2, canvas.shape[1] - window))
        stop = min(canvas.shape[1], start + window)
        view = canvas[:, start:stop].clone()
        target = (view == mask_id) & ~ended[:, None]
        watch = None if on_step is None else _in_window(on_step, canvas, confidence, start, passes)
        round_seed = seed + 0x9E3779B97F4A7C15 * round_
        result = denoise(
            model, view, seed=round_seed, target=target, allowed=allowed, stop_id=bos, attention=attention,
            on_step=watch, **settings,
        )  # fmt: skip
        passes += result.forward_passes
        result = resample_invalid_utf8(
            model, result, target, round_seed, allowed & tokenizer.is_text, 0, attention=attention, **settings
        )
        canvas[:, start:stop] = result.ids
        confidence[:, start:stop] = result.confidence
        ended |= ((canvas == bos)[:, len(prompt_ids) :]).any(dim=1)
        done, round_ = stop, round_ + 1
    tokens = [row[len(prompt_ids) :] for row in canvas.tolist()]
    tokens = [body[: body.index(bos)] if bos in body else body for body in tokens]
    texts = [continued(model.tokenizer, prompt, body) for body in tokens]
    return Samples(texts, tokens, ended.tolist(), passes, time.perf_counter() - started, seed)


def sample_by_speculation(
    model: Model, n: int, length: int | None, prompt: str, seed: int, drafted: int, settings: dict[str, Any]
) -> Samples:
    """`sample` by `speculate`, text after text, `drafted` tokens at a time.

    Raises ConfigError: the model learnt no next tokens, or options and sizes that drafting does not take.
    """
    started = time.perf_counter()
    config = SamplingConfig(**{"temperature": NEXT_TOKEN_TEMPERATURE, **settings})
    if not model.trained_causally or not cacheable(model.network):
        raise ConfigError("speculate needs a model of this package that learnt next tokens too (causal_share above 0)")
    if wrong := (REVEAL_OPTIONS | {"no_repeat"}) & settings.keys():
        raise ConfigError(f"speculate draws next tokens: {', '.join(sorted(wrong))} cannot be given with it")
    check_text(prompt)
    tokenizer, window = model.tokenizer, model.config.sequence_length
    prefix = [tokenizer.bos_id, *tokenizer.encode(tokenizer.without_pending_space(prompt))]
    length = max(1, window // 2, window - len(prefix)) if length is None else length
    if n < 1 or length < 1 or drafted < 1 or len(prefix) + length > window:
        raise ConfigError(
            f"speculate draws 1 text or more, of 1 token or more, within the window of {window:,} tokens: not {n:,} "
            f"of {length:,} behind {len(prefix):,}"
        )
    allowed = tokenizer.is_text & ~tokenizer.is_byte
    allowed[tokenizer.bos_id] = True
    tokens, ended, passes = [], [], 0
    for row in range(n):
        found = speculation.speculate(
            model, prefix, length, drafted, config=config, generator=seeding.generator(seed, row), allowed=allowed,
            stop_id=tokenizer.bos_id,
        )  # fmt: skip
        passes += found.drafts + found.checks
        ended.append(tokenizer.bos_id in found.tokens)
        tokens.append([t for t in found.tokens if t != tokenizer.bos_id])
    texts = [continued(tokenizer, prompt, body) for body in tokens]
    return Samples(texts, tokens, ended, passes, time.perf_counter() - started, seed)


def continued(tokenizer: Tokenizer, prompt: str, ids: Sequence[int]) -> str:
    """The prompt as it was given, not as the tokenizer normalises it, and the drawn ids behind it."""
    if not prompt:
        return tokenizer.decode([tokenizer.bos_id, *ids])
    after = tokenizer.text_of(ids)
    # A space at the prompt's end is the one that the first id begins with.
    return prompt + (after[1:] if after.startswith(" ") and tokenizer.space_pending(prompt) else after)


@dataclass(frozen=True)
class Span:
    """A stretch of a text being revealed. confidence: None for given text, 0 for a mask (text ""), else of its id."""

    text: str
    confidence: float | None


def readable(tokenizer: Tokenizer, ids: Sequence[int], confidence: Sequence[float]) -> list[tuple[str, float, int]]:
    """(text, confidence, how many ids) of ids for a person to see; a mask is ("", 0.0, 1).

    Ids of single bytes that together are a character are shown together, with the product of their confidences.
    """
    found: list[tuple[str, float, int]] = []
    at = 0
    while at < len(ids):
        i, n = ids[at], 1
        if i >= tokenizer.vocab_size:
            found.append(("", 0.0, 1))
        else:
            if tokenizer.is_byte[i]:
                lead = tokenizer.raw[i][0]
                n = 1 + (lead >= 0xC0) + (lead >= 0xE0) + (lead >= 0xF0)
                if tokenizer.invalid_utf8(ids[at : at + n]):
                    n = 1
            found.append((tokenizer.text_of(ids[at : at + n]), math.prod(map(float, confidence[at : at + n])), n))
        at += n
    return found


def canvas_spans(tokenizer: Tokenizer, ids: Sequence[int], confidence: Sequence[float]) -> list[Span]:
    """One row of `sample`'s canvas for a person to see: id by id up to an end of text, masks as empty spans."""
    ids = list(ids)
    if tokenizer.bos_id in ids[1:]:
        ids = ids[: ids.index(tokenizer.bos_id, 1)]
    shown = readable(tokenizer, ids, confidence)
    return [Span(text, sure if sure < 1 else None) for text, sure, _ in shown if text or sure == 0]


def _in_window(on_step: OnStep, canvas: Tensor, confidence: Tensor, start: int, before: int) -> OnStep:
    """An `on_step` for a window from `start` that shows it as part of the whole canvas, after `before` passes."""

    def shown(step: int, ids: Tensor, sure: Tensor) -> None:
        whole, certain = canvas.clone(), confidence.clone()
        whole[:, start : start + ids.shape[1]] = ids
        certain[:, start : start + ids.shape[1]] = sure
        on_step(before + step, whole, certain)

    return shown
