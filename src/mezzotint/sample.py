"""Text from a denoiser: one `denoise(canvas)` under generation, prompts, gaps and suffixes.

A canvas is ids with MASK where text is wanted; what is not MASK is never touched. `sample` is a canvas of masks behind
a BOS; `fill` is text with gaps. Does not know how models are trained, stored or scored, nor who watches.

Randomness: every row of a canvas draws from a generator of its own, keyed by (seed, row), in float64, and never looks
at another row. So a text does not depend on the batch it was drawn in, but for rounding inside the network.

End of text: a document is its ids preceded by BOS, so a BOS that is drawn says that the text before it has ended.
`sample` allows it and cuts there; inside a gap it cannot occur.
"""

from __future__ import annotations

import functools
import math
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import sentencepiece
import torch
from torch import Tensor

from mezzotint.data import Tokenizer
from mezzotint.errors import ConfigError, MezzotintError
from mezzotint.model import Cache, Model, block_size, learnt_next_tokens, trained_block_size

OnStep = Callable[[int, Tensor, Tensor], None]
"""Called after each pass with (pass number from 1, ids [B, T], confidence [B, T]); raise in it to stop."""

SAMPLERS = ("ancestral", "confidence", "margin", "entropy", "blocks", "remask")
TOKENS_PER_FORWARD = 16_384
BLOCK = 32
SPACE = "\u2581"  # how SentencePiece writes a space


def _option(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class Sampling:
    """How masks are turned into tokens. Raises ConfigError when out of range.

    `ancestral`: positions in random order; with `steps` K, each mask of pass s is revealed with probability
    1 / (K - s), the last pass revealing the rest (Sahoo et al. 2024, "Simple and effective masked diffusion language
    models", section 3.2.3, linear schedule). One token a pass draws from the model's own random-order chain.
    `confidence`: a token is drawn everywhere, the most probable ones stay (Chang et al. 2022, MaskGIT; Nie et al. 2025,
    LLaDA). `margin`: the positions whose two best tokens differ most (Kim et al. 2025, "Train for the worst, plan for
    the best"). `entropy`: as many of the least uncertain positions as keep (sum of entropies - largest) within
    `entropy_budget`, which bounds the error of drawing them independently (Ben-Hamu et al. 2025, EB-Sampler, eq. 8).
    `blocks`: from left to right in blocks of `block` tokens, each most confident first (semi-autoregressive; block 1 is
    left to right); of a model that was trained in blocks no further than its own block at a time. `remask`: as
    ancestral, but every pass also hides again a share `remask` of the drawn tokens, the least confident first (Wang et
    al. 2025, ReMDM-conf).
    """

    sampler: str = _option("confidence", f"which positions to reveal first: {', '.join(SAMPLERS)}")
    steps: int | None = _option(None, "passes at most (default: one token a pass; `entropy` decides for itself)")
    temperature: float = _option(1.0, "softens (above 1) or sharpens (below 1) the token choice; 0 takes the best")
    top_p: float = _option(1.0, "draw only from the most probable tokens that together hold this probability")
    entropy_budget: float = _option(0.5, "nats of joint uncertainty that one pass of `entropy` may reveal")
    block: int | None = _option(None, "tokens in a block of `blocks` (default: the block the model learnt, else 32)")
    remask: float = _option(0.05, "share of drawn tokens that each pass of `remask` hides again")
    order_noise: float = _option(0.0, "Gumbel noise on the order of confidence and margin, fading over the passes")
    no_repeat: int = _option(0, "no sequence of this many tokens occurs twice (0: no such rule)")

    def __post_init__(self) -> None:
        if self.sampler not in SAMPLERS:
            raise ConfigError(f"unknown sampler {self.sampler!r}; known: {', '.join(SAMPLERS)}")
        if self.steps is not None and self.steps < 1:
            raise ConfigError(f"steps must be at least 1, not {self.steps}")
        for name, low, high in (
            ("temperature", 0.0, 100.0),
            ("top_p", 0.0, 1.0),
            ("entropy_budget", 0.0, math.inf),
            ("remask", 0.0, 1.0),
            ("order_noise", 0.0, math.inf),
        ):
            value = getattr(self, name)
            if not low <= value <= high or (name == "top_p" and value == 0):
                least = "above" if name == "top_p" else "at least"
                most = f" and at most {high:g}" if high < math.inf else ""
                raise ConfigError(f"{name} must be {least} {low:g}{most}, not {value!r}")
        if self.block is not None and self.block < 1:
            raise ConfigError(f"block must be at least 1 token, not {self.block}")
        if self.no_repeat < 0 or self.no_repeat == 1:
            raise ConfigError(f"no_repeat must be 0 or at least 2 tokens, not {self.no_repeat}")


ASKED = {"sampler", "steps", "entropy_budget", "block", "remask", "order_noise"}
"""Settings that say how masks are revealed; the others are about which tokens are drawn."""


@dataclass(frozen=True)
class Denoised:
    """A canvas with its masks revealed.

    ids: int64 [B, T]. confidence: float32 [B, T], the model's probability of each revealed token in the pass that
    revealed it; 1 where the canvas was given, 0 where a mask is left (not wanted, or behind an end of text).
    nats: float64 [B], -log of the product of those probabilities. forward_passes: how often the network ran (the
    rows of one batch run together).
    """

    ids: Tensor
    confidence: Tensor
    nats: Tensor
    forward_passes: int


def row_generator(seed: int, row: int) -> torch.Generator:
    """The generator of one row, which depends on nothing but (seed, row)."""
    key = [seed & 0xFFFFFFFFFFFFFFFF, row]
    state = np.random.SeedSequence(key).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state >> np.uint64(1)))


def draw(logits: Tensor, uniform: Tensor, temperature: float, top_p: float) -> Tensor:
    """One token per row by inverting the cumulative distribution. logits: float64 [n, V]; uniform: float64 [n].

    float64 matters: in float32 both Gumbel noise and cumulative sums truncate the tail, which acts as a lowered
    temperature (Zheng et al. 2024, "Masked diffusion models are secretly time-agnostic masked models", section 4.2).
    """
    if temperature == 0:
        return logits.argmax(dim=-1)
    probabilities = torch.softmax(logits / temperature, dim=-1)
    if top_p < 1:
        ordered, index = probabilities.sort(dim=-1, descending=True)
        # A token stays if those before it do not hold top_p yet, so at least one does (Holtzman et al. 2020).
        kept = torch.where(ordered.cumsum(-1) - ordered < top_p, ordered, 0.0)
        return index.gather(-1, _invert(kept, uniform)[:, None])[:, 0]
    return _invert(probabilities, uniform)


def _invert(weights: Tensor, uniform: Tensor) -> Tensor:
    cumulative = weights.cumsum(dim=-1)
    target = uniform[:, None] * cumulative[:, -1:]
    chosen = torch.searchsorted(cumulative, target, right=True)[:, 0]
    # uniform * total can round up to total: then the last token with any weight is meant.
    last = weights.shape[-1] - 1 - (weights > 0).flip(-1).to(torch.uint8).argmax(dim=-1)
    return torch.minimum(chosen, last)


class _Row:
    """One row of a canvas on its way: which positions to ask the network about, and which of its answers to keep."""

    def __init__(
        self,
        ids: Tensor,
        wanted: Tensor,
        mask_id: int,
        settings: Sampling,
        generator: torch.Generator,
        banned: Tensor | None,
        only: Mapping[int, Tensor],
        stop_id: int | None,
        size: int,
    ) -> None:
        self.ids = ids
        self.mask_id = mask_id
        self.settings = settings
        self.generator = generator
        self.banned = banned
        self.only = only
        self.stop_id = stop_id
        self.confidence = (ids != mask_id).float()
        self.nats = torch.zeros(len(ids), dtype=torch.float64)
        self.drawn = torch.zeros(len(ids), dtype=torch.bool)
        self.wanted = wanted
        self.todo = wanted.clone()
        self.total = int(wanted.sum())
        self.passes = 0
        # steps is a promise of "at most": more passes than masks only pays where tokens are hidden again.
        self.budget = settings.steps or self.total
        if settings.sampler != "remask":
            self.budget = min(self.budget, self.total)
        self.step = 0
        self.blocks: list[tuple[Tensor, int]] = []
        if settings.sampler == "blocks":
            self._plan_blocks(size)

    def _plan_blocks(self, size: int) -> None:
        """Blocks of masked positions and, for each, the step by which it must be done.

        None reaches beyond one of the network's own blocks of `size`, which sees no further.
        """
        left = self.todo.nonzero()[:, 0]
        most = self.settings.block or (size if size < len(self.ids) else BLOCK)
        groups = [g for own in torch.unique(left // size) for g in left[left // size == own].split(most)]
        done = 0
        for i, group in enumerate(groups):
            done += len(group)
            self.blocks.append((group, max(i + 1, round(self.budget * done / self.total))))

    @property
    def active(self) -> bool:
        return bool(self.todo.any())

    def ask(self) -> Tensor:
        """Positions (int64 [n], ascending) whose logits this pass needs."""
        left = self.todo.nonzero()[:, 0]
        if self.settings.sampler == "ancestral":
            count = 1 if self.budget >= self.total else 0
            while count == 0:
                # A pass that would reveal nothing leaves the canvas as it is and need not run.
                rate = 1 / max(1, self.budget - self.step)
                uniform = torch.rand(len(left), generator=self.generator, dtype=torch.float64)
                count = int((uniform < rate).sum()) if rate < 1 else len(left)
                self.step += count == 0
            picked = torch.randperm(len(left), generator=self.generator)[:count]
            return left[picked].sort().values
        if self.settings.sampler == "blocks":
            while not self.todo[self.blocks[0][0]].any():
                self.blocks.pop(0)
            group = self.blocks[0][0]
            return group[self.todo[group]]
        return left

    def answer(self, positions: Tensor, logits: Tensor) -> None:
        """Reveal some of `positions` given their logits [n, V]."""
        logits = logits.double().cpu()
        plain = torch.log_softmax(logits, dim=-1)
        if self.banned is not None:
            logits = logits.masked_fill(self.banned, -math.inf)
        for n, position in enumerate(positions.tolist()):
            if position in self.only:
                logits[n].masked_fill_(~self.only[position], -math.inf)
        if self.settings.no_repeat:
            self._ban_repeats(positions, logits)
        uniform = torch.rand(len(positions), generator=self.generator, dtype=torch.float64)
        tokens = draw(logits, uniform, self.settings.temperature, self.settings.top_p)
        nats = -plain.gather(-1, tokens[:, None])[:, 0]
        order = self._order(logits, nats)
        old = self.drawn.clone()
        for i, n in enumerate(order.tolist()):
            self._reveal(int(positions[n]), int(tokens[n]), float(nats[n]), first=i == 0)
        if self.settings.sampler == "remask":
            self._hide_again(old)
        self.step += 1
        self.passes += 1

    def _quota(self, left: int) -> int:
        """Tokens to reveal in this pass so that `left` masks are gone after the remaining passes."""
        return -(-left // max(1, self.budget - self.step))

    def _order(self, logits: Tensor, nats: Tensor) -> Tensor:
        """Which of the asked positions to reveal, the surest first (indices into them)."""
        name = self.settings.sampler
        count = len(nats)
        if name == "ancestral":
            return torch.arange(count)
        if name == "remask":
            quota = min(count, self._quota(count) + self._hidden_again())
            return torch.randperm(count, generator=self.generator)[:quota]
        log_p = torch.log_softmax(logits, dim=-1)
        if name == "entropy":
            p = log_p.exp()
            entropy = -torch.where(p > 0, p * log_p, 0.0).sum(-1)
            order = entropy.argsort(stable=True)
            # Entropies ascend, so the largest of the first n is the n-th: the sum without it must fit the budget.
            fits = entropy[order].cumsum(0) - entropy[order] <= self.settings.entropy_budget
            floor = self._quota(count) if self.settings.steps else 1
            return order[: max(int(fits.sum()), floor)]
        if name == "margin":
            best = log_p.exp().topk(min(2, log_p.shape[-1]), dim=-1).values
            score = (best[:, 0] - (best[:, 1] if best.shape[1] > 1 else 0.0)).log()
        else:
            score = -nats
        if self.settings.order_noise:
            uniform = torch.rand(count, generator=self.generator, dtype=torch.float64)
            left = 1 - self.step / max(1, self.budget)
            score = score - self.settings.order_noise * left * (-uniform.clamp_min(1e-300).log()).log()
        quota = -(-count // max(1, self.blocks[0][1] - self.step)) if name == "blocks" else self._quota(count)
        return score.argsort(descending=True, stable=True)[:quota]

    def _hidden_again(self) -> int:
        """How many drawn tokens the `remask` sampler hides after this pass: none in the last."""
        if self.step + 1 >= self.budget:
            return 0
        return int(self.settings.remask * int(self.drawn.sum()))

    def _hide_again(self, old: Tensor) -> None:
        """Hide the least confident of the tokens drawn before this pass, with Gumbel noise on the choice."""
        candidates = old.nonzero()[:, 0]
        if self.step + 1 >= self.budget or not len(candidates):
            return
        count = int(self.settings.remask * len(candidates))
        uniform = torch.rand(len(candidates), generator=self.generator, dtype=torch.float64)
        doubt = self.nats[candidates] - (-uniform.clamp_min(1e-300).log()).log()
        for position in candidates[doubt.argsort(descending=True, stable=True)[:count]].tolist():
            self.ids[position] = self.mask_id
            self.confidence[position] = 0
            self.nats[position] = 0
            self.drawn[position] = False
        self._refresh()

    def _reveal(self, position: int, token: int, nats: float, first: bool) -> None:
        if not self.todo[position]:
            return  # behind an end of text that this pass drew
        if self.settings.no_repeat and not first and token in self._repeats(self._ngrams(), position):
            return  # tokens of this pass would say something twice: this one waits for the next pass
        self.ids[position] = token
        self.confidence[position] = math.exp(-nats)
        self.nats[position] = nats
        self.drawn[position] = True
        self._refresh()

    def _refresh(self) -> None:
        """What is left to do: wanted, still masked, and not behind an end of text, which starts another text."""
        self.todo = self.wanted & (self.ids == self.mask_id)
        if self.stop_id is not None:
            stops = (self.drawn & (self.ids == self.stop_id)).nonzero()
            if len(stops):
                self.todo[int(stops[0]) :] = False

    def _ngrams(self) -> set[tuple[int, ...]]:
        n, ids = self.settings.no_repeat, self.ids.tolist()
        return {tuple(ids[i : i + n]) for i in range(len(ids) - n + 1) if self.mask_id not in ids[i : i + n]}

    def _repeats(self, known: set[tuple[int, ...]], position: int) -> list[int]:
        """The tokens that would complete, at `position`, a run of n tokens that the canvas already has."""
        n = self.settings.no_repeat
        taken: list[int] = []
        runs: list[tuple[int, list[int]]] = []
        for start in range(max(0, position - n + 1), min(position, len(self.ids) - n) + 1):
            run, place = self.ids[start : start + n].tolist(), position - start
            if self.mask_id in run[:place] + run[place + 1 :]:
                continue
            fits = tuple(run[:place]), tuple(run[place + 1 :])
            taken += [k[place] for k in known if (k[:place], k[place + 1 :]) == fits]
            # The token is in several runs, which must differ from one another too: "a ? a" is not filled with "a".
            for other_place, other in runs:
                token = run[other_place]
                run[place] = other[other_place] = token
                if run == other:
                    taken.append(token)
            runs.append((place, run))
        return taken

    def _ban_repeats(self, positions: Tensor, logits: Tensor) -> None:
        known = self._ngrams()
        for n, position in enumerate(positions.tolist()):
            rest = logits[n].clone()
            rest[self._repeats(known, position)] = -math.inf
            if torch.isfinite(rest).any():  # else every token would repeat something: better that than none
                logits[n] = rest


class _Network:
    """Answers about canvases of `rows` rows while they are revealed.

    keep: rows are revealed block after block of what `visibility` says, so that the keys and values of finished blocks
    can be kept and only the current block is computed.
    """

    def __init__(self, model: Model, rows: int, length: int, visibility: str, keep: bool) -> None:
        self.model, self.visibility, self.length = model, visibility, length
        self.size = block_size(visibility, length)
        self.causal = visibility != "full" and self.size == 1
        self.cache = Cache(model.network, rows, length) if keep and self.size < length else None

    def logits(self, ids: Tensor, group: Sequence[int], asked: Sequence[Tensor]) -> Sequence[Tensor]:
        """Logits [n, V] at the asked positions of each row in `group`. ids: int64 [rows, T]."""
        counts = [len(where) for where in asked]
        canvas = ids[list(group)]
        if self.causal:  # next tokens are learnt, and scored, with the input shifted right behind one MASK
            canvas = torch.nn.functional.pad(canvas[:, :-1], (1, 0), value=self.model.config.mask_id)
        if self.cache is None:
            positions = torch.zeros(canvas.shape, dtype=torch.bool)
            for i, where in enumerate(asked):
                positions[i, where] = True
            batch, where = canvas.to(self.model.device), positions.to(self.model.device)
            with torch.inference_mode():
                return self.model.logits(batch, visibility=self.visibility, positions=where).split(counts)
        together: dict[tuple[int, int], list[int]] = {}  # rows that have come equally far
        for i, (b, where) in enumerate(zip(group, asked, strict=True)):
            together.setdefault((self.cache.kept[b], int(where[0]) // self.size * self.size), []).append(i)
        answers: dict[int, Tensor] = {}
        for (kept, start), members in together.items():
            rows = [group[i] for i in members]
            stop = min(start + self.size, self.length)
            final = stop if self.causal else start
            hidden = self.cache.hidden(
                canvas[members, kept:stop],
                self.size,
                keep=final - kept,
                rows=None if rows == list(range(len(ids))) else rows,
            )
            with torch.inference_mode():
                picked = torch.cat([h[asked[i].to(h.device) - kept] for i, h in zip(members, hidden, strict=True)])
                parts = self.model.network.logits(picked).split([counts[i] for i in members])
            answers |= zip(members, parts, strict=True)
        return [answers[i] for i in range(len(group))]


def denoise(
    model: Model,
    canvas: Tensor,
    *,
    seed: int = 0,
    wanted: Tensor | None = None,
    allowed: Tensor | None = None,
    only: Mapping[tuple[int, int], Tensor] | None = None,
    stop_id: int | None = None,
    first_row: int = 0,
    visibility: str | None = None,
    on_step: OnStep | None = None,
    **settings: Any,
) -> Denoised:
    """Reveal the masks of a canvas.

    canvas: int64 [B, T], MASK (`model.config.mask_id`) where text is wanted; every other id comes back as it was.
    wanted: bool [B, T], the masks to reveal (default: all); the others stay, as text that may be anything.
    allowed: bool [V], tokens that may be drawn (default: those that stand for text, see `text_tokens`).
    only: further limits, (row, position) -> bool [V].
    stop_id: a drawn token that ends the text; masks behind the first one stay masked.
    first_row: number of the canvas's first row, for a seed's rows drawn in several calls.
    visibility: what a position sees, `full`, `causal` or `block(k)`. Default: `full`, but for `blocks` on a model that
    was trained in blocks these blocks, from left to right; keys and values of finished ones are then kept.
    settings: the fields of `Sampling`.

    Decided positions never pass the output layer. Deterministic in (seed, row) up to rounding for any batch.
    Raises ConfigError for bad settings.
    """
    options = Sampling(**settings)
    mask_id = model.config.mask_id
    ids = canvas.to("cpu", torch.int64).clone()
    length = ids.shape[1]
    if visibility is None:
        learnt = trained_block_size(model.info) if options.sampler == "blocks" else 0
        visibility = f"block({learnt})" if learnt else "full"
    size = block_size(visibility, length)
    at_once = max(1, TOKENS_PER_FORWARD // max(1, length))
    keep = options.sampler == "blocks" and size < length
    if keep and len(ids) > at_once and on_step is None:
        # Keys and values are kept for as many rows at a time as a batch has.
        parts = []
        for start in range(0, len(ids), at_once):
            here = slice(start, start + at_once)
            limits_here = {(r - start, p): t for (r, p), t in (only or {}).items() if start <= r < start + at_once}
            parts.append(
                denoise(
                    model, canvas[here], seed=seed, wanted=None if wanted is None else wanted[here], allowed=allowed,
                    only=limits_here, stop_id=stop_id, first_row=first_row + start, visibility=visibility, **settings,
                )
            )  # fmt: skip
        return Denoised(
            torch.cat([p.ids for p in parts]),
            torch.cat([p.confidence for p in parts]),
            torch.cat([p.nats for p in parts]),
            max(p.forward_passes for p in parts),
        )
    masked = ids == mask_id
    hidden: Tensor = masked if wanted is None else masked & wanted.to("cpu")
    drawable: Tensor = text_tokens(model.tokenizer) if allowed is None else allowed
    banned = None if bool(drawable.all()) else ~drawable
    limits: dict[int, dict[int, Tensor]] = {}
    for (row, position), tokens in (only or {}).items():
        if not (tokens & drawable).any():
            raise MezzotintError(f"no token may stand at position {position}: loosen the limits on it")
        limits.setdefault(row, {})[position] = tokens
    rows = [
        _Row(
            ids[b],
            hidden[b],
            mask_id,
            options,
            row_generator(seed, first_row + b),
            banned,
            limits.get(b, {}),
            stop_id,
            size,
        )
        for b in range(len(ids))
    ]
    network = _Network(model, len(ids), length, visibility, keep and len(ids) <= at_once)
    passes = 0
    while True:
        active = [b for b, row in enumerate(rows) if row.active]
        if not active:
            break
        passes += 1
        for start in range(0, len(active), at_once):
            group = active[start : start + at_once]
            asked = [rows[b].ask() for b in group]
            for b, where, answer in zip(group, asked, network.logits(ids, group, asked), strict=True):
                rows[b].answer(where, answer)
        if on_step is not None:
            on_step(passes, ids.clone(), torch.stack([row.confidence for row in rows]))
    return Denoised(
        ids,
        torch.stack([row.confidence for row in rows]),
        torch.stack([row.nats.sum() for row in rows]),
        passes,
    )


@dataclass(frozen=True, eq=False)
class Pieces:
    """What the ids of a tokenizer stand for, one entry per id.

    text: the characters an id adds, "" for control ids and for single bytes. raw: its UTF-8 bytes. is_text: bool [V],
    whether it may be drawn at all. is_byte: bool [V], whether it is a single byte of a longer character.
    probe: a character that the tokenizer knows.
    """

    text: list[str]
    raw: list[bytes]
    is_text: Tensor
    is_byte: Tensor
    probe: str

    def where(self, test: Callable[[str], bool]) -> Tensor:
        """bool [V]: the ids whose characters pass the test; never bytes or control ids."""
        return torch.tensor([bool(t) and test(t) for t in self.text]) & self.is_text


@functools.lru_cache(maxsize=4)
def _pieces(serialized: bytes) -> Pieces:
    processor = sentencepiece.SentencePieceProcessor(model_proto=serialized)
    text: list[str] = []
    raw: list[bytes] = []
    for i in range(processor.get_piece_size()):
        piece = processor.id_to_piece(i)
        if processor.is_byte(i):
            text.append("")
            raw.append(bytes([int(piece[3:-1], 16)]))
        elif processor.is_control(i) or processor.is_unknown(i) or processor.is_unused(i):
            text.append("")
            raw.append(b"")
        else:
            text.append(piece.replace(SPACE, " "))
            raw.append(text[-1].encode())
    return Pieces(
        text,
        raw,
        torch.tensor([len(r) > 0 for r in raw]),
        torch.tensor([len(r) > 0 and not t for t, r in zip(text, raw, strict=True)]),
        next((t for t in text if len(t) == 1 and t.isalnum() and t.isascii()), "x"),
    )


def pieces(tokenizer: Tokenizer) -> Pieces:
    """The piece table of a tokenizer, computed once."""
    return _pieces(tokenizer.serialized)


def text_tokens(tokenizer: Tokenizer, *, bytes_too: bool = True) -> Tensor:
    """bool [V]: ids that stand for text, which leaves out BOS, unknown, padding and other control ids."""
    table = pieces(tokenizer)
    return table.is_text if bytes_too else table.is_text & ~table.is_byte


def broken_bytes(table: Pieces, ids: Sequence[int]) -> list[int]:
    """Positions of single-byte ids that are not part of valid UTF-8. Ids without text count as characters."""
    raw = b""
    owner: list[int] = []
    for position, i in enumerate(ids):
        part = table.raw[i] if i < len(table.raw) and table.raw[i] else b"\0"
        raw += part
        owner += [position] * len(part)
    broken: set[int] = set()
    start = 0
    while start < len(raw):
        try:
            raw[start:].decode()
            break
        except UnicodeDecodeError as error:
            broken.update(owner[start + error.start : start + error.end])
            start += error.end
    return sorted(p for p in broken if bool(table.is_byte[ids[p]]))


def join(table: Pieces, ids: Iterable[int]) -> str:
    """The characters of ids as they stand in the middle of a text; MASK and control ids add nothing."""
    raw = b"".join(table.raw[i] for i in ids if i < len(table.raw))
    return raw.decode("utf-8", errors="replace")


def _mend(
    model: Model, result: Denoised, drawn: Tensor, seed: int, allowed: Tensor, first_row: int, **settings: Any
) -> Denoised:
    """Redraw, from whole characters only, the drawn byte ids that do not form valid UTF-8 (a rare accident).

    drawn: bool [B, T], positions that were not given.
    """
    table = pieces(model.tokenizer)
    if not table.is_byte.any():
        return result
    wanted = torch.zeros_like(drawn)
    for b, row in enumerate(result.ids.tolist()):
        wanted[b, broken_bytes(table, row)] = True
    wanted &= drawn
    if not wanted.any():
        return result
    again = denoise(
        model,
        result.ids.masked_fill(wanted, model.config.mask_id),
        seed=seed + 1,
        wanted=wanted,
        allowed=allowed & ~table.is_byte,
        first_row=first_row,
        **settings,
    )
    confidence = torch.where(wanted, again.confidence, result.confidence)
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
        return {
            "texts": self.texts,
            "forward_passes": self.forward_passes,
            "seconds": self.seconds,
            "seed": self.seed,
        }


def _check_text(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise MezzotintError(
            f"the text has a lone surrogate at character {error.start}, which is not Unicode text: remove it"
        ) from error


def sample(
    model: Model,
    n: int = 1,
    length: int | None = None,
    *,
    prompt: str = "",
    seed: int = 0,
    on_step: OnStep | None = None,
    visibility: str | None = None,
    **settings: Any,
) -> Samples:
    """Draw `n` texts of `length` tokens, or less where a text ends by itself.

    length: by default what the window holds behind the prompt, and at least half a window. Text i depends on (seed, i)
    only. Each begins after a BOS, with `prompt` if given. A length beyond the window is drawn window after window, each
    seeing the last half window of text before it; `steps` is then per window.
    on_step sees the whole canvas [n, tokens]. visibility: see `denoise`. settings: the fields of `Sampling`. Unless told
    how to reveal masks, a model that learnt next tokens draws one after another, at a temperature of 0.9 if none is given,
    and keeps keys and values; one trained in blocks is sampled by `blocks`. `order_noise` is 4 unless given. Raises
    MezzotintError for a bad number, length or prompt.
    """
    started = time.perf_counter()
    if trained_block_size(model.info):
        settings.setdefault("sampler", "blocks")
    elif learnt_next_tokens(model.info) and visibility is None and not ASKED & settings.keys():
        # Next tokens at 1 are judged worse than text, at 0.8 as well but poorer in words (LOG.md, benchmarks/sampling.py).
        settings = {"temperature": 0.9, **settings, "sampler": "blocks", "block": 1}
        visibility = "causal"
    if settings.get("sampler", "confidence") in ("confidence", "margin"):
        # The surest first, on a canvas of nothing but masks, says the same again and again; noise on the order cures it.
        settings.setdefault("order_noise", 4.0)
    _check_text(prompt)
    if n < 1:
        raise ConfigError(f"cannot draw {n} texts: ask for at least 1")
    if length is not None and length < 1:
        raise ConfigError(f"a text needs at least 1 token, not {length}")
    window, mask_id, bos = model.config.sequence_length, model.config.mask_id, model.tokenizer.bos_id
    lead = [bos, *model.tokenizer.encode(_without_pending_space(model.tokenizer, prompt))]
    length = max(1, window // 2, window - len(lead)) if length is None else length
    table = pieces(model.tokenizer)
    allowed = table.is_text.clone()
    allowed[bos] = True
    canvas = torch.full((n, len(lead) + length), mask_id, dtype=torch.int64)
    canvas[:, : len(lead)] = torch.tensor(lead)
    confidence = (canvas != mask_id).float()
    ended = torch.zeros(n, dtype=torch.bool)
    done, passes, round_ = len(lead), 0, 0
    while done < canvas.shape[1] and not ended.all():
        # Half a window of text to go by; a window of 1 token has none.
        start = 0 if canvas.shape[1] <= window else max(0, min(done - window // 2, canvas.shape[1] - window))
        stop = min(canvas.shape[1], start + window)
        view = canvas[:, start:stop].clone()
        wanted = (view == mask_id) & ~ended[:, None]
        watch = None
        if on_step is not None:
            watch = functools.partial(_watch_window, on_step, canvas, confidence, start, passes)
        round_seed = seed + 0x9E3779B97F4A7C15 * round_
        result = denoise(
            model, view, seed=round_seed, wanted=wanted, allowed=allowed, stop_id=bos, visibility=visibility,
            on_step=watch, **settings,
        )  # fmt: skip
        passes += result.forward_passes
        result = _mend(model, result, wanted, round_seed, allowed & table.is_text, 0, visibility=visibility, **settings)
        canvas[:, start:stop] = result.ids
        confidence[:, start:stop] = result.confidence
        ended |= ((canvas == bos)[:, len(lead) :]).any(dim=1)
        done, round_ = stop, round_ + 1
    texts, tokens = [], []
    for row in canvas.tolist():
        body = row[len(lead) :]
        body = body[: body.index(bos)] if bos in body else body
        tokens.append(body)
        texts.append(model.tokenizer.decode(lead[1:] + body))
    if prompt:
        # The prompt itself comes back as it was given, not as the tokenizer normalises it.
        texts = [prompt + _attach(model.tokenizer, prompt, join(table, body)) for body in tokens]
    return Samples(texts, tokens, ended.tolist(), passes, time.perf_counter() - started, seed)


def _attach(tokenizer: Tokenizer, before: str, after: str) -> str:
    """`after` without the space that the end of `before` already is."""
    return after[1:] if after.startswith(" ") and _space_pending(tokenizer, before) else after


@dataclass(frozen=True)
class Span:
    """A stretch of a text being revealed. confidence: None for given text, 0 for a mask (text ""), else of its id."""

    text: str
    confidence: float | None


def _readable(table: Pieces, ids: Sequence[int], confidence: Sequence[float]) -> list[tuple[str, float, int]]:
    """(text, confidence, how many ids) of ids for a person to see; a mask is ("", 0.0, 1).

    Ids of single bytes that together are a character are shown together, with the product of their confidences.
    """
    found: list[tuple[str, float, int]] = []
    at = 0
    while at < len(ids):
        i, n = ids[at], 1
        if i >= len(table.raw):
            found.append(("", 0.0, 1))
        else:
            if table.is_byte[i]:
                lead = table.raw[i][0]
                n = 1 + (lead >= 0xC0) + (lead >= 0xE0) + (lead >= 0xF0)
                if broken_bytes(table, ids[at : at + n]):
                    n = 1
            found.append((join(table, ids[at : at + n]), math.prod(map(float, confidence[at : at + n])), n))
        at += n
    return found


def canvas_spans(tokenizer: Tokenizer, ids: Sequence[int], confidence: Sequence[float]) -> list[Span]:
    """One row of `sample`'s canvas for a person to see: id by id up to an end of text, masks as empty spans."""
    ids = list(ids)
    if tokenizer.bos_id in ids[1:]:
        ids = ids[: ids.index(tokenizer.bos_id, 1)]
    shown = _readable(pieces(tokenizer), ids, confidence)
    return [Span(text, sure if sure < 1 else None) for text, sure, _ in shown if text or sure == 0]


def _watch_window(
    on_step: OnStep, canvas: Tensor, confidence: Tensor, start: int, before: int, step: int, ids: Tensor, sure: Tensor
) -> None:
    """Show a window's canvas as part of the whole one."""
    whole, certain = canvas.clone(), confidence.clone()
    whole[:, start : start + ids.shape[1]] = ids
    certain[:, start : start + ids.shape[1]] = sure
    on_step(before + step, whole, certain)


# --- text with gaps ---------------------------------------------------------------------------------------------------

GAP = re.compile(r"_{4,}|\[MASK(?:\*([0-9]+))?\]")
LENGTHS = (1, 2, 3, 4, 6, 8, 12, 16)
NOMINAL = 4  # masks that stand for a gap of unknown length while another one is filled
RIGHT_TOKENS = 4  # tokens right of a gap whose plausibility judges its length
LONGEST_OVERLAP = 12  # characters of a broken word that a token across a gap's edge may take in


@dataclass
class _Fixed:
    """Text that comes back as it is. tokens: how the network sees it."""

    text: str
    tokens: list[int]


@dataclass
class _Gap:
    """A gap. count: masks asked for, None if unknown. tokens: MASK until filled.

    left, right: characters of the fixed text beside it that its first or last token repeats (see `_heal`).
    """

    count: int | None
    tokens: list[int]
    confidence: list[float] = field(default_factory=list)
    left: str = ""
    right: str = ""
    space_before: bool = False
    open_before: bool = False
    space_after: bool = False
    text: str | None = None
    nats: float = 0.0


@dataclass(frozen=True)
class Gap:
    """A filled gap. text: what was put there. tokens: how many ids. confidence: of each; nats: -log of their product.

    The confidence of an id that crosses the gap's edge counts the id whole.
    """

    text: str
    tokens: int
    confidence: list[float]
    nats: float


@dataclass(frozen=True)
class Filled:
    """Text whose gaps are filled. text: all of it, the fixed parts byte for byte."""

    text: str
    gaps: list[Gap]
    forward_passes: int
    seconds: float
    seed: int

    def to_dict(self) -> dict[str, Any]:
        """JSON object."""
        return asdict(self)


def parse_gaps(text: str) -> tuple[list[str], list[int | None]]:
    """Split text at its gaps: n + 1 fixed strings and n mask counts, None where the length is unknown.

    A gap is `____` (four or more underscores: unknown length), `[MASK]` (1 mask) or `[MASK*8]` (8 masks).
    Raises MezzotintError for `[MASK*0]` and for text that is not Unicode.
    """
    _check_text(text)
    fixed: list[str] = []
    counts: list[int | None] = []
    last = 0
    for match in GAP.finditer(text):
        fixed.append(text[last : match.start()])
        last = match.end()
        if match[0].startswith("_"):
            counts.append(None)
        else:
            digits = (match[1] or "1").lstrip("0")
            if not digits:
                raise MezzotintError(f"{match[0]} asks for no masks: ask for at least 1, or take it out")
            # More digits than any window has tokens: the number only has to be too large.
            counts.append(int(digits[:12]))
    return [*fixed, text[last:]], counts


def _encode_inside(tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids of text that follows other text, so that neither a dummy space is added nor its own space lost."""
    if not text:
        return []
    for anchor in (".", ")", "x", "0", "A"):
        # No piece has a space but at its start, so an anchor that stays whole changes nothing behind it.
        head = tokenizer.encode(anchor)
        ids = tokenizer.encode(anchor + text)
        if head and ids[: len(head)] == head:
            return ids[len(head) :]
    return tokenizer.encode(text)


def _space_pending(tokenizer: Tokenizer, text: str) -> bool:
    """Whether a word put behind `text` would begin with a space of `text` (which `encode` drops at its end)."""
    table = pieces(tokenizer)
    probe = table.probe
    return bool(text) and join(table, _encode_inside(tokenizer, text + probe)).endswith(" " + probe)


def _without_pending_space(tokenizer: Tokenizer, text: str) -> str:
    """Text before a gap, without the space at its end that belongs to the gap's first token."""
    return text[:-1] if text.endswith(" ") and _space_pending(tokenizer, text) else text


class _Filling:
    """One call of `infill`: the segments, the cost so far, and what is being watched."""

    def __init__(
        self,
        model: Model,
        text: str,
        seed: int,
        visibility: str,
        on_step: Callable[[int, list[Span]], None] | None,
        settings: dict[str, Any],
    ) -> None:
        self.model, self.seed, self.visibility, self.on_step, self.settings = model, seed, visibility, on_step, settings
        self.tokenizer, self.mask_id = model.tokenizer, model.config.mask_id
        self.table = pieces(model.tokenizer)
        self.passes = 0
        self.calls = 0
        strings, counts = parse_gaps(text)
        room = model.config.sequence_length - 1
        masks = sum(count or 1 for count in counts)
        if masks > room:
            raise MezzotintError(
                f"the text has {len(counts):,} gap{'s' * (len(counts) > 1)} of at least {masks:,} tokens, but the "
                f"model's window holds {room:,}: fill {'fewer or ' * (len(counts) > 1)}shorter gaps at a time"
            )
        self.parts: list[_Fixed | _Gap] = [self._fixed(strings[0], inside=False, before_gap=bool(counts))]
        for i, count in enumerate(counts):
            before, after = strings[i], strings[i + 1]
            gap = _Gap(count, [self.mask_id] * (count or NOMINAL))
            gap.open_before = i == 0 and not before
            gap.space_before = _space_pending(self.tokenizer, before)
            gap.space_after = bool(after) and join(self.table, _encode_inside(self.tokenizer, after)).startswith(" ")
            gap.space_after |= bool(after) and after[0].isspace()
            self.parts += [gap, self._fixed(after, inside=True, before_gap=i + 1 < len(counts))]

    def _fixed(self, text: str, *, inside: bool, before_gap: bool) -> _Fixed:
        """Fixed text as ids. A space at its end, if a gap follows, belongs to the gap's first token."""
        seen = _without_pending_space(self.tokenizer, text) if before_gap else text
        return _Fixed(text, _encode_inside(self.tokenizer, seen) if inside else self.tokenizer.encode(seen))

    # --- canvases

    def context(self, index: int, side: int) -> list[int]:
        """Ids left (side -1) or right (side 1) of part `index`, whole text; the left begins with BOS."""
        if side < 0:
            return [self.tokenizer.bos_id, *(t for part in self.parts[:index] for t in part.tokens)]
        return [t for part in self.parts[index + 1 :] for t in part.tokens]

    def canvas(self, left: list[int], middles: list[list[int]], right: list[int]) -> tuple[Tensor, int]:
        """Rows of left + middle + right + masks, of one length within the window, and where the middles start.

        The longest middle decides how much context fits; it is taken evenly from both sides. Masks at the end stand
        for text unknown, as in training, and make the rows equally long.
        """
        window = self.model.config.sequence_length
        longest = max(len(m) for m in middles)
        room = max(0, window - longest)
        take_left = min(len(left), max(room - len(right), room // 2))
        take_right = min(len(right), room - take_left)
        left = left[len(left) - take_left :]
        right = right[:take_right]
        total = min(window, max(len(left) + longest + len(right) + PADDING, SHORTEST_CANVAS))
        rows = [left + m + right for m in middles]
        return torch.tensor([row + [self.mask_id] * (total - len(row)) for row in rows]), len(left)

    def log_p(self, canvas: Tensor, wanted: Tensor) -> Tensor:
        """Log-probabilities, float64 [n, V], at the wanted positions of the canvas, which are hidden for it."""
        self.passes += 1
        hidden = canvas.masked_fill(wanted, self.mask_id).to(self.model.device)
        with torch.inference_mode():
            logits = self.model.logits(hidden, visibility=self.visibility, positions=wanted.to(self.model.device))
        return torch.log_softmax(logits.double().cpu(), dim=-1)

    # --- edges of gaps

    def limits(self, gap: _Gap, count: int) -> list[Tensor | None]:
        """Which ids may stand at each of the gap's `count` positions; None where any text may."""
        found: list[Tensor | None] = [None] * count
        left, right, blank = gap.left, gap.right, gap.space_before or gap.open_before

        def fits(text: str, first: bool, last: bool) -> bool:
            if first and left and not text.startswith(left):
                return False
            if last and right and not text.endswith(right):
                return False
            if first and not left and gap.space_before and not text.startswith(" "):
                return False
            inner = text[len(left) if first else 0 : len(text) - (len(right) if last else 0)]
            if len(text) < (len(left) if first else 0) + (len(right) if last else 0) + (1 if left or right else 0):
                return False
            # A gap is not filled with nothing, nor a space put beside a space.
            if first and blank and not left:
                inner = inner.removeprefix(" ")
            return bool(inner) and not (last and gap.space_after and inner.endswith(" "))

        for place in {0, count - 1}:
            first, last = place == 0, place == count - 1
            if not (first and (left or blank)) and not (last and (right or gap.space_after)):
                continue
            able = self.table.where(lambda text, first=first, last=last: fits(text, first, last))
            # Without any such id the tokenizer has no pieces with spaces: then the plain text is put there.
            found[place] = able if bool(able.any()) else None
            if found[place] is not None and not (first and (left or gap.space_before)) and not (last and right):
                # All that may not stand here is a space, which a byte of a longer character is not.
                found[place] = able | self.table.is_byte & torch.tensor([raw != b" " for raw in self.table.raw])
        return found

    def possible(self, gap: _Gap, count: int) -> bool:
        """Whether `count` tokens can meet both edges: one alone may have to be a space, a word and a word's rest."""
        return count > 1 or not self._narrow(gap) or self.limits(gap, count)[0] is not None

    def _narrow(self, gap: _Gap) -> bool:
        return bool(gap.right) and (bool(gap.left) or gap.space_before or gap.open_before)

    def heal(self, index: int) -> None:
        """Let a gap's first and last tokens cross its edges, where the edge cuts a word: "Lon____ is" -> "London is".

        The tokens of "Lon" alone are not those with which "London" begins, so a model that is shown them would not
        go on with "don". For each way to cut the word W at the edge into tokens w_1..w_j and a rest r that the gap's
        first token must begin with (and exceed), the model's probability of the word so far is

            p(w_1..w_j, r...) = prod_i p(w_i | w_<i, context) * sum over tokens v that begin with r of p(v | w, context)

        and the most probable cut is taken. At the right edge likewise, from right to left. Cuts are bounded by
        LONGEST_OVERLAP characters, and all are scored in one batch.
        """
        gap = self.parts[index]
        before, after = self.parts[index - 1], self.parts[index + 1]
        options: list[tuple[str, list[int], list[int]]]
        assert isinstance(gap, _Gap) and isinstance(before, _Fixed) and isinstance(after, _Fixed)
        inside = index > 1
        whole = join(self.table, before.tokens)
        start = whole.rfind(" ") if " " in whole else 0
        if not gap.space_before and whole and self._plain(before.tokens) and before.text[-1:].isalnum():
            options = []
            head = self._encode(whole[:start], inside)
            for cut in range(max(start, len(whole) - LONGEST_OVERLAP), len(whole)):
                ids = self._encode(whole[:cut], inside)
                if ids[: len(head)] == head and join(self.table, ids) == whole[:cut]:
                    options.append((whole[cut:], ids, ids[len(head) :]))
            if before.tokens[: len(head)] != head:
                head = []  # the ids of the word depend on what is before it: then all of the text is the word
                options.clear()
            options.append(("", before.tokens, before.tokens[len(head) :]))
            far_left = self.context(index - 1, -1) + head
            right = self.context(index, 1)
            best = self._best_cut(options, far_left, right, leftwards=False)
            gap.left, before.tokens = options[best][0], options[best][1]
        whole = join(self.table, after.tokens)
        end = whole.find(" ") if " " in whole else len(whole)
        if not gap.space_after and whole and self._plain(after.tokens) and after.text[:1].isalnum():
            options = []
            tail = _encode_inside(self.tokenizer, whole[end:])
            if after.tokens[len(after.tokens) - len(tail) :] != tail:
                tail = []
            options.append(("", after.tokens, after.tokens[: len(after.tokens) - len(tail)]))
            for cut in range(1, min(end, LONGEST_OVERLAP) + 1 if tail or end == len(whole) else 1):
                ids = _encode_inside(self.tokenizer, whole[cut:])
                word = ids[: len(ids) - len(tail)]
                if ids[len(word) :] == tail and join(self.table, ids) == whole[cut:]:
                    options.append((whole[:cut], ids, word))
            far_right = tail + self.context(index + 1, 1)
            best = self._best_cut(options, self.context(index, -1), far_right, leftwards=True)
            gap.right, after.tokens = options[best][0], options[best][1]

    def _encode(self, text: str, inside: bool) -> list[int]:
        """Ids of fixed text; of the first one also if `text` already shows the space that its encoding adds."""
        if inside:
            return _encode_inside(self.tokenizer, text)
        ids = self.tokenizer.encode(text)
        if text.startswith(" ") and join(self.table, ids) != text:
            bare = self.tokenizer.encode(text[1:])
            ids = bare if join(self.table, bare) == text else ids
        return ids

    def _plain(self, ids: list[int]) -> bool:
        return all(self.table.text[i] for i in ids)

    def _best_cut(
        self, options: list[tuple[str, list[int], list[int]]], left: list[int], right: list[int], *, leftwards: bool
    ) -> int:
        """The most probable of (overlap, ids of the text, ids of the word's part that stays); see `heal`."""
        span = max(len(word) for _, _, word in options) + NOMINAL
        rows: list[list[int]] = []
        asked: list[tuple[int, int, Tensor]] = []  # option, place in the span, ids whose probability counts
        for n, (overlap, _, word) in enumerate(options):
            known = word[::-1] if leftwards else word
            for j in range(len(known) + (1 if overlap else 0)):
                row = known[:j] + [self.mask_id] * (span - j)
                if j < len(known):
                    able = torch.zeros(len(self.table.text), dtype=torch.bool)
                    able[known[j]] = True
                elif leftwards:
                    able = self.table.where(lambda t, o=overlap: t.endswith(o) and len(t) > len(o))
                else:
                    able = self.table.where(lambda t, o=overlap: t.startswith(o) and len(t) > len(o))
                rows.append(row[::-1] if leftwards else row)
                asked.append((n, span - 1 - j if leftwards else j, able))
        if len(options) == 1:
            return 0
        canvas, offset = self.canvas(left, rows, right)
        wanted = torch.zeros(canvas.shape, dtype=torch.bool)
        for r, (_, place, _) in enumerate(asked):
            wanted[r, offset + place] = True
        log_p = self.log_p(canvas, wanted)
        score = torch.zeros(len(options), dtype=torch.float64)
        for (n, _, able), row in zip(asked, log_p, strict=True):
            score[n] += torch.logsumexp(row.masked_fill(~able, -math.inf), dim=0)
        return int(score.argmax())

    # --- filling

    def denoise(self, canvas: Tensor, wanted: Tensor, only: dict[tuple[int, int], Tensor], show: Any) -> Denoised:
        """`denoise` with a seed of its own for every call, byte ids mended."""
        seed = self.seed + 0x9E3779B97F4A7C15 * self.calls
        self.calls += 1
        watch = None
        if self.on_step is not None:
            watch = functools.partial(self._show, self.passes, show)
        drawable = self.table.is_text
        result = denoise(
            self.model, canvas, seed=seed, wanted=wanted, only=only, visibility=self.visibility, on_step=watch,
            **self.settings,
        )  # fmt: skip
        result = _mend(
            self.model, result, wanted, seed, drawable, 0, only=only, visibility=self.visibility, **self.settings
        )
        self.passes += result.forward_passes
        return result

    def _show(self, before: int, show: Any, step: int, ids: Tensor, confidence: Tensor) -> None:
        assert self.on_step is not None
        shown = show(ids, confidence)
        spans: list[Span] = []
        for i, part in enumerate(self.parts):
            if isinstance(part, _Fixed):
                if part.text:
                    spans.append(Span(part.text, None))
            elif i in shown:
                spans += self.spans(part, *shown[i])
            elif part.text is not None:
                spans += self.spans(part, part.tokens, part.confidence)
            else:
                spans += [Span("", 0.0)] * len(part.tokens)
        self.on_step(before + step, spans)

    def spans(self, gap: _Gap, ids: Sequence[int], confidence: Sequence[float]) -> list[Span]:
        """A gap's ids one by one, without what they repeat of the fixed text."""
        spans = []
        at = 0
        for text, sure, count in _readable(self.table, ids, confidence):
            if at == 0:
                text = self._cut_left(gap, text)
            at += count
            if at == len(ids):
                text = self._cut_right(gap, text)
            spans.append(Span(text, sure))
        return spans

    def _cut_left(self, gap: _Gap, text: str) -> str:
        if gap.left:
            return text.removeprefix(gap.left)
        return text.removeprefix(" ") if gap.space_before or gap.open_before else text

    def _cut_right(self, gap: _Gap, text: str) -> str:
        if gap.right:
            return text.removesuffix(gap.right)
        return text.removesuffix(" ") if gap.space_after else text

    def settle(self, gap: _Gap, ids: list[int], confidence: list[float]) -> None:
        """Take these ids for the gap."""
        gap.tokens, gap.confidence = ids, confidence
        gap.text = self._cut_right(gap, self._cut_left(gap, join(self.table, ids)))
        gap.nats = -sum(math.log(max(c, 1e-300)) for c in confidence)

    def fill_unknown(self, index: int, lengths: Sequence[int]) -> None:
        """Fill a gap of unknown length: the length that, per byte, makes the gap and what follows it most probable.

        Each length l is filled (a row of one batch) and scored by

            -sum_i log p(g_i | context, the g revealed before) / bytes(g)
            -sum_j log p(r_j | context, l masks, the other r hidden) / bytes(r)

        over the gap's ids g in the order revealed, and over the RIGHT_TOKENS ids r to its right, hidden together with
        the gap. The first term is a chain-rule likelihood; the second says how well the text to the right fits l
        tokens on, before anything is put in between, so a length cannot win by what it fills itself with. Bytes of g
        and r in one denominator would let the longest gap win by diluting r.
        """
        gap = self.parts[index]
        assert isinstance(gap, _Gap)
        left, right = self.context(index, -1), self.context(index, 1)
        window = self.model.config.sequence_length
        # A gap that took most of the window would leave no context to judge it by.
        lengths = [n for n in lengths if n <= max(2, window // 4) and self.possible(gap, n)] or [
            2 if self._narrow(gap) else min(lengths)
        ]
        near = [t for t in right[:RIGHT_TOKENS] if t != self.mask_id] if right[:1] != [self.mask_id] else []
        near_nats = [0.0] * len(lengths)
        if near:
            canvas, at = self.canvas(left, [[self.mask_id] * n for n in lengths], right)
            asked = torch.zeros(canvas.shape, dtype=torch.bool)
            for b, n in enumerate(lengths):
                asked[b, at + n : at + n + len(near)] = True
            log_p = self.log_p(canvas, asked).view(len(lengths), -1, len(self.table.text))
            targets = torch.tensor(near)[None, :, None].expand(len(lengths), -1, 1)[:, : log_p.shape[1]]
            near_nats = (-log_p.gather(-1, targets).sum(dim=(1, 2))).tolist()
        canvas, at = self.canvas(left, [[self.mask_id] * n for n in lengths], right)
        wanted = torch.zeros(canvas.shape, dtype=torch.bool)
        only: dict[tuple[int, int], Tensor] = {}
        for b, n in enumerate(lengths):
            wanted[b, at : at + n] = True
            only |= {(b, at + i): able for i, able in enumerate(self.limits(gap, n)) if able is not None}

        def show(ids: Tensor, confidence: Tensor) -> dict[int, tuple[list[int], list[float]]]:
            b = len(lengths) // 2
            here = slice(at, at + lengths[b])
            return {index: (ids[b, here].tolist(), confidence[b, here].tolist())}

        result = self.denoise(canvas, wanted, only, show)
        near_bytes = max(1, sum(len(self.table.raw[t]) for t in near))
        scores = []
        for b, n in enumerate(lengths):
            ids = result.ids[b, at : at + n].tolist()
            nats = -result.confidence[b, at : at + n].double().clamp_min(1e-300).log().sum().item()
            size = max(1, len(b"".join(self.table.raw[t] for t in ids)))
            scores.append(nats / size + near_nats[b] / near_bytes)
        best = scores.index(min(scores))
        n = lengths[best]
        self.settle(gap, result.ids[best, at : at + n].tolist(), result.confidence[best, at : at + n].tolist())
        if self.on_step is not None:
            self._show(self.passes, lambda *_: {}, 0, canvas, canvas)

    def fill_known(self, indices: list[int]) -> None:
        """Fill gaps of known lengths that lie in one window, all at once."""
        first, last = indices[0], indices[-1]
        middle = [t for part in self.parts[first : last + 1] for t in part.tokens]
        canvas, at = self.canvas(self.context(first, -1), [middle], self.context(last, 1))
        wanted = torch.zeros(canvas.shape, dtype=torch.bool)
        only: dict[tuple[int, int], Tensor] = {}
        places: dict[int, slice] = {}
        for i, part in enumerate(self.parts[first : last + 1], start=first):
            if i in indices:
                assert isinstance(part, _Gap)
                places[i] = slice(at, at + len(part.tokens))
                wanted[0, places[i]] = True
                limits = self.limits(part, len(part.tokens))
                only |= {(0, at + j): able for j, able in enumerate(limits) if able is not None}
            at += len(part.tokens)

        def show(ids: Tensor, confidence: Tensor) -> dict[int, tuple[list[int], list[float]]]:
            return {i: (ids[0, here].tolist(), confidence[0, here].tolist()) for i, here in places.items()}

        result = self.denoise(canvas, wanted, only, show)
        for i, here in places.items():
            part = self.parts[i]
            assert isinstance(part, _Gap)
            self.settle(part, result.ids[0, here].tolist(), result.confidence[0, here].tolist())

    def run(self, lengths: Sequence[int]) -> None:
        """Gaps of unknown length from left to right, then the others, as many together as a window holds."""
        known: list[int] = []
        for i, part in enumerate(self.parts):
            if isinstance(part, _Gap) and part.count is None:
                self.heal(i)
                self.fill_unknown(i, lengths)
            elif isinstance(part, _Gap):
                known.append(i)
        while known:
            group = [known.pop(0)]
            while known and self._span(group[0], known[0]) <= self.model.config.sequence_length // 2:
                group.append(known.pop(0))
            self.fill_known(group)

    def _span(self, first: int, last: int) -> int:
        return sum(len(part.tokens) for part in self.parts[first : last + 1])


PADDING = 8
SHORTEST_CANVAS = 32


def infill(
    model: Model,
    text: str,
    seed: int = 0,
    *,
    lengths: Sequence[int] = LENGTHS,
    visibility: str = "full",
    on_step: Callable[[int, list[Span]], None] | None = None,
    **settings: Any,
) -> Filled:
    """Fill the gaps of a text (see `parse_gaps`); all the rest of it comes back byte for byte.

    lengths: token counts to try for gaps of unknown length. on_step(pass, spans) sees the text being revealed.
    settings: the fields of `Sampling`; temperature is 0.7 unless given, and `steps` is per gap. Text longer than the
    window is seen through a window around each gap. Raises MezzotintError when all gaps together need more tokens than
    the window holds.
    """
    started = time.perf_counter()
    settings.setdefault("temperature", 0.7)
    Sampling(**settings)
    if not lengths or min(lengths) < 1:
        raise ConfigError("lengths to try must be at least 1 token each")
    filling = _Filling(model, text, seed, visibility, on_step, settings)
    filling.run(lengths)
    parts = filling.parts
    output = "".join(part.text or "" for part in parts)
    gaps = [
        Gap(part.text or "", len(part.tokens), part.confidence, part.nats) for part in parts if isinstance(part, _Gap)
    ]
    return Filled(output, gaps, filling.passes, time.perf_counter() - started, seed)


def fill(model: Model, text: str, seed: int = 0, **options: Any) -> str:
    """The text with its gaps filled: `infill(...).text`. Text without gaps comes back as it is."""
    return infill(model, text, seed, **options).text
