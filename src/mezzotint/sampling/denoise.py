"""One `denoise(canvas)` under generation, prompts, gaps and suffixes: which masks to reveal, and as what.

A canvas is ids with MASK where text is wanted; what is not MASK is never touched. Does not know of text, only of ids.

Randomness: every row of a canvas draws from a generator of its own, keyed by (seed, row), in float64, and never looks
at another row. So a text does not depend on the batch it was drawn in, but for rounding inside the network.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mezzotint import seeding
from mezzotint.config import BLOCK, SamplingConfig, parse_attention
from mezzotint.errors import MezzotintError
from mezzotint.model import TOKENS_PER_FORWARD, Cache, Model
from mezzotint.sampling.pieces import text_tokens

OnStep = Callable[[int, Tensor, Tensor], None]
"""Called after each pass with (pass number from 1, ids [B, T], confidence [B, T]); raise in it to stop."""


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
        settings: SamplingConfig,
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

    keep: rows are revealed block after block of what the block size says, so that the keys and values of finished blocks
    can be kept and only the current block is computed.
    """

    def __init__(self, model: Model, rows: int, length: int, block_size: int, keep: bool) -> None:
        self.model, self.block_size, self.length = model, block_size, length
        self.size = block_size or length
        self.causal = block_size == 1
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
                return self.model.logits(batch, block_size=self.block_size, positions=where).split(counts)
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
    attention: str | None = None,
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
    attention: what a position attends to, `full`, `causal` or `block(k)`. Default: `full`, but for `blocks` on a model that
    was trained in blocks these blocks, from left to right; keys and values of finished ones are then kept.
    settings: the fields of `SamplingConfig`.

    Decided positions never pass the output layer. Deterministic in (seed, row) up to rounding for any batch.
    Raises ConfigError for bad settings.
    """
    options = SamplingConfig(**settings)
    mask_id = model.config.mask_id
    ids = canvas.to("cpu", torch.int64).clone()
    length = ids.shape[1]
    if attention is None:
        block_size = model.block_size if options.sampler == "blocks" else 0
    else:
        block_size = parse_attention(attention)
    size = block_size or length
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
                    only=limits_here, stop_id=stop_id, first_row=first_row + start, attention=attention, **settings,
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
            seeding.generator(seed, first_row + b),
            banned,
            limits.get(b, {}),
            stop_id,
            size,
        )
        for b in range(len(ids))
    ]
    network = _Network(model, len(ids), length, block_size, keep and len(ids) <= at_once)
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
