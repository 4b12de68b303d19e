"""Which masks to reveal, and as what: the samplers, one row of `SAMPLERS` each.

A sampler is three small answers about a canvas that is being revealed, for all its rows at once:

    select_positions(canvas)   where the network is asked in this pass
    surest(canvas, drawn)      in which order the tokens drawn there deserve to stay
    count(canvas, drawn)       how many of them stay

and `remask`, whether it masks tokens again. To add one, write what is new of these and a row of the table, and put its
name into `config.SAMPLERS`. Knows ids and logits; neither text nor network.

Randomness: every row draws from a generator of its own, in float64, and never looks at another row. So a text does not
depend on the batch it was drawn in, but for rounding inside the network.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from mezzotint.config import BLOCK, SamplingConfig
from mezzotint.objective import scatter_to


def sample_tokens(logits: Tensor, uniform: Tensor, temperature: float, top_p: float) -> Tensor:
    """One token per row by inverting the cumulative distribution. logits: float64 [n, V]; uniform: float64 [n].

    float64 matters: in float32 both Gumbel noise and cumulative sums truncate the tail, which acts as a lowered
    temperature (Zheng et al. 2024, "Masked diffusion models are secretly time-agnostic masked models", section 4.2).
    """
    if temperature == 0:
        return logits.argmax(dim=-1)
    if top_p < 1:
        ordered, index = _nucleus(logits, temperature, top_p)
        return index.gather(-1, _invert_cdf(ordered, uniform)[:, None])[:, 0]
    return _invert_cdf(torch.softmax(logits / temperature, dim=-1), uniform)


def probabilities(logits: Tensor, temperature: float, top_p: float) -> Tensor:
    """What `sample_tokens` draws from, float64 [n, V]. logits: float64 [n, V]."""
    if temperature == 0:
        return torch.nn.functional.one_hot(logits.argmax(-1), logits.shape[-1]).double()
    if top_p < 1:
        ordered, index = _nucleus(logits, temperature, top_p)
        return torch.zeros_like(ordered).scatter_(-1, index, ordered / ordered.sum(-1, keepdim=True))
    return torch.softmax(logits / temperature, dim=-1)


def _nucleus(logits: Tensor, temperature: float, top_p: float) -> tuple[Tensor, Tensor]:
    """Probabilities [n, V] in falling order, 0 outside the nucleus, and the token of each (Holtzman et al. 2020)."""
    ordered, index = torch.softmax(logits / temperature, dim=-1).sort(dim=-1, descending=True)
    # A token stays if those before it do not hold top_p yet, so at least one does.
    return torch.where(ordered.cumsum(-1) - ordered < top_p, ordered, 0.0), index


def _invert_cdf(weights: Tensor, uniform: Tensor) -> Tensor:
    cumulative = weights.cumsum(dim=-1)
    target = uniform[:, None] * cumulative[:, -1:]
    chosen = torch.searchsorted(cumulative, target, right=True)[:, 0]
    # uniform * total can round up to total: then the last token with any weight is meant.
    last = weights.shape[-1] - 1 - (weights > 0).flip(-1).to(torch.uint8).argmax(dim=-1)
    return torch.minimum(chosen, last)


@dataclass(frozen=True)
class Drawn:
    """What a pass drew at the positions it asked about, row-major; n of them.

    positions: bool [B, T]. tokens: int64 [n]. nats: float64 [n], -log of the model's own probability of each.
    logits: float64 [n, V] that they were drawn from, -inf for tokens that may not stand there.
    """

    positions: Tensor
    tokens: Tensor
    nats: Tensor
    logits: Tensor


class Canvas:
    """Rows of ids on their way from MASK to text.

    ids: int64 [B, T]. target: bool [B, T], the masks to reveal. permitted: bool [V] or None, tokens that may be drawn;
    limits: (row, position) -> bool [V], further ones. stop_id: a drawn token behind which nothing is revealed.
    block_size: tokens of one of the network's own blocks, T where it sees the whole window.
    """

    def __init__(
        self,
        ids: Tensor,
        target: Tensor,
        mask_id: int,
        config: SamplingConfig,
        generators: list[torch.Generator],
        permitted: Tensor,
        limits: Mapping[tuple[int, int], Tensor],
        stop_id: int | None,
        block_size: int,
    ) -> None:
        self.ids, self.target, self.mask_id, self.config = ids, target, mask_id, config
        self.generators, self.stop_id = generators, stop_id
        self.confidence = (ids != mask_id).float()
        self.nats = torch.zeros(ids.shape, dtype=torch.float64)
        self.drawn = torch.zeros(ids.shape, dtype=torch.bool)
        self.masked = target.clone()  # what is still to be revealed
        self.step = torch.zeros(len(ids), dtype=torch.int64)  # passes that each row has behind it
        self.total = target.sum(1)
        self.num_steps = torch.full_like(self.total, config.steps) if config.steps else self.total
        if not SAMPLERS[config.sampler].remask:
            # steps is a promise of "at most": more passes than masks only pays where tokens are masked again.
            self.num_steps = torch.minimum(self.num_steps, self.total)
        self.block, self.deadline = self._plan_blocks(block_size) if config.sampler == "blocks" else (None, None)
        tables = [permitted, *(permitted & able for able in limits.values())]
        self.permitted = torch.stack(tables) if limits or not bool(permitted.all()) else None
        self.limit = torch.zeros(ids.shape, dtype=torch.int64)
        for n, place in enumerate(limits, start=1):
            self.limit[place] = n

    def _plan_blocks(self, own: int) -> tuple[Tensor, Tensor]:
        """Number of each target's block, int64 [B, T], and the step by which each block must be done, [B, blocks].

        No block reaches beyond one of the network's own blocks of `own` positions, which sees no further.
        """
        length = self.ids.shape[1]
        most = self.config.block or (own if own < length else BLOCK)
        number = torch.full(self.ids.shape, length)
        deadlines: list[list[int]] = []
        for b, row in enumerate(self.target):
            left = row.nonzero()[:, 0]
            groups = [g for k in torch.unique(left // own) for g in left[left // own == k].split(most)]
            done, deadline = 0, []
            for i, group in enumerate(groups):
                number[b, group] = i
                done += len(group)
                deadline.append(max(i + 1, round(int(self.num_steps[b]) * done / int(self.total[b]))))
            deadlines.append(deadline)
        longest = max(map(len, deadlines), default=0) or 1
        return number, torch.tensor([d + [0] * (longest - len(d)) for d in deadlines])

    def current_block(self) -> Tensor:
        """Number of each row's first block with masks, int64 [B]."""
        assert self.block is not None
        return self.block.masked_fill(~self.masked, self.ids.shape[1]).amin(1)

    # --- randomness, row by row

    def uniform(self, positions: Tensor) -> Tensor:
        """A number in [0, 1) for each of `positions` (bool [B, T]), row-major, from its row's generator."""
        parts = [
            torch.rand(n, generator=g, dtype=torch.float64)
            for n, g in zip(positions.sum(1).tolist(), self.generators, strict=True)
            if n
        ]
        return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.float64)

    def gumbel(self, positions: Tensor) -> Tensor:
        """Standard Gumbel noise for each of `positions`, as `uniform`."""
        return -(-self.uniform(positions).clamp_min(1e-300).log()).log()

    # --- one pass

    def quota(self, left: Tensor) -> Tensor:
        """Tokens to reveal in this pass so that `left` masks (int64 [B]) are gone after the remaining passes."""
        return -(-left // (self.num_steps - self.step).clamp_min(1))

    def commit(self, positions: Tensor, logits: Tensor) -> None:
        """Draw tokens at `positions` (bool [B, T]) from their logits [n, V], and reveal those the sampler keeps."""
        sampler = SAMPLERS[self.config.sampler]
        logits = logits.double().cpu()
        log_p = torch.log_softmax(logits, dim=-1)
        if self.permitted is not None:
            logits = logits.masked_fill(~self.permitted[self.limit[positions]], -math.inf)
        if self.config.no_repeat:
            self._forbid_repeats(positions, logits)
        tokens = sample_tokens(logits, self.uniform(positions), self.config.temperature, self.config.top_p)
        drawn = Drawn(positions, tokens, -log_p.gather(-1, tokens[:, None])[:, 0], logits)
        surest = scatter_to(positions, sampler.surest(self, drawn), -math.inf)
        order = surest.argsort(dim=1, descending=True, stable=True)
        # Positions that were not asked come last, whatever the scores are.
        order = order.gather(1, (~positions).gather(1, order).to(torch.uint8).argsort(dim=1, stable=True))
        rank = torch.empty_like(order).scatter_(1, order, torch.arange(order.shape[1]).expand_as(order))
        kept = positions & (rank < sampler.count(self, drawn)[:, None])
        before = self.drawn.clone()
        self._reveal(drawn, kept, rank)
        if sampler.remask:
            self._mask_again(before & positions.any(1, keepdim=True))
        self.step += positions.any(1)

    def _reveal(self, drawn: Drawn, kept: Tensor, rank: Tensor) -> None:
        """Put the kept tokens (bool [B, T]) onto the canvas in the order of their rank."""
        tokens = scatter_to(drawn.positions, drawn.tokens, self.mask_id)
        if self.stop_id is not None:
            # A token that is less sure than an end of text to its left is behind the end.
            stops = rank.masked_fill(~(kept & (tokens == self.stop_id)), rank.shape[1])
            first = torch.nn.functional.pad(stops[:, :-1], (1, 0), value=rank.shape[1]).cummin(1).values
            kept = kept & (rank < first)
        if self.config.no_repeat:
            kept = self._without_repeats(kept, tokens, rank)
        nats = scatter_to(drawn.positions, drawn.nats, 0.0)
        self.ids[kept] = tokens[kept]
        self.nats[kept] = nats[kept]
        self.confidence[kept] = (-nats[kept]).exp().float()
        self.drawn |= kept
        self._refresh()

    def _refresh(self) -> None:
        """What is left to do: target, still MASK, and not behind an end of text, which starts another text."""
        self.masked = self.target & (self.ids == self.mask_id)
        if self.stop_id is not None:
            self.masked &= (self.drawn & (self.ids == self.stop_id)).cumsum(1) == 0

    def num_remasked(self) -> Tensor:
        """How many drawn tokens are masked again after this pass, int64 [B]: none in the last."""
        count = (self.config.remask * self.drawn.sum(1).double()).long()
        return count.masked_fill(self.step + 1 >= self.num_steps, 0)

    def _mask_again(self, drawn: Tensor) -> None:
        """Mask the least confident of `drawn`, the tokens drawn before this pass, with Gumbel noise on the choice."""
        candidates = drawn & (self.step + 1 < self.num_steps)[:, None]
        doubt = scatter_to(candidates, self.nats[candidates] + self.gumbel(candidates), -math.inf)
        order = doubt.argsort(dim=1, descending=True, stable=True)
        count = (self.config.remask * candidates.sum(1).double()).long()
        chosen = torch.zeros_like(candidates).scatter_(1, order, torch.arange(order.shape[1]) < count[:, None])
        self.ids[chosen] = self.mask_id
        self.confidence[chosen] = 0
        self.nats[chosen] = 0
        self.drawn &= ~chosen
        self._refresh()

    # --- no run of tokens twice: row by row and token by token, as each choice forbids others

    def _forbid_repeats(self, positions: Tensor, logits: Tensor) -> None:
        for n, (b, position) in enumerate(positions.nonzero().tolist()):
            rest = logits[n].clone()
            rest[repeats(self.ids[b].tolist(), position, self.config.no_repeat, self.mask_id)] = -math.inf
            if torch.isfinite(rest).any():  # else every token would repeat something: better that than none
                logits[n] = rest

    def _without_repeats(self, kept: Tensor, tokens: Tensor, rank: Tensor) -> Tensor:
        """Those of the kept tokens that, put down one by one, say nothing twice; the others wait for the next pass."""
        kept = kept.clone()
        for b in kept.any(1).nonzero()[:, 0].tolist():
            ids = self.ids[b].tolist()
            places = kept[b].nonzero()[:, 0]
            for i, position in enumerate(places[rank[b, places].argsort()].tolist()):
                token = int(tokens[b, position])
                if i and token in repeats(ids, position, self.config.no_repeat, self.mask_id):
                    kept[b, position] = False
                else:
                    ids[position] = token
        return kept


def repeats(ids: list[int], position: int, n: int, mask_id: int) -> list[int]:
    """The tokens that would complete, at `position`, a run of n tokens that `ids` already has."""
    known = {tuple(ids[i : i + n]) for i in range(len(ids) - n + 1) if mask_id not in ids[i : i + n]}
    taken: list[int] = []
    runs: list[tuple[int, list[int]]] = []
    for start in range(max(0, position - n + 1), min(position, len(ids) - n) + 1):
        run, place = ids[start : start + n], position - start
        if mask_id in run[:place] + run[place + 1 :]:
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


# --- where the network is asked: bool [B, T]


def all_masked(canvas: Canvas) -> Tensor:
    """Every mask."""
    return canvas.masked


def each_with_equal_chance(canvas: Canvas) -> Tensor:
    """Each mask with probability 1 / passes left, at least one; one in random order where passes suffice."""
    chosen = torch.zeros_like(canvas.masked)
    for b in canvas.masked.any(1).nonzero()[:, 0].tolist():
        left, generator = canvas.masked[b].nonzero()[:, 0], canvas.generators[b]
        num_steps = int(canvas.num_steps[b])
        count = 1 if num_steps >= int(canvas.total[b]) else 0
        while count == 0:
            # A pass that would reveal nothing leaves the canvas as it is and need not run.
            rate = 1 / max(1, num_steps - int(canvas.step[b]))
            uniform = torch.rand(len(left), generator=generator, dtype=torch.float64)
            count = int((uniform < rate).sum()) if rate < 1 else len(left)
            canvas.step[b] += count == 0
        chosen[b, left[torch.randperm(len(left), generator=generator)[:count]]] = True
    return chosen


def first_block(canvas: Canvas) -> Tensor:
    """The masks of the first block that has any."""
    assert canvas.block is not None
    return canvas.masked & (canvas.block == canvas.current_block()[:, None])


# --- which deserve to stay: float64 [n], the larger the surer


def left_to_right(canvas: Canvas, drawn: Drawn) -> Tensor:
    """The first position first."""
    return torch.zeros(len(drawn.tokens), dtype=torch.float64)


def at_random(canvas: Canvas, drawn: Drawn) -> Tensor:
    """Any order."""
    scores = []
    for n, generator in zip(drawn.positions.sum(1).tolist(), canvas.generators, strict=True):
        score = torch.empty(n, dtype=torch.float64)
        if n:
            score[torch.randperm(n, generator=generator)] = -torch.arange(n, dtype=torch.float64)
        scores.append(score)
    return torch.cat(scores)


def probability(canvas: Canvas, drawn: Drawn) -> Tensor:
    """The most probable token first."""
    return _with_noise(canvas, drawn, -drawn.nats)


def margin(canvas: Canvas, drawn: Drawn) -> Tensor:
    """First where the best token is the furthest ahead of the second."""
    best = drawn.logits.softmax(-1).topk(min(2, drawn.logits.shape[-1]), dim=-1).values
    return _with_noise(canvas, drawn, (best[:, 0] - (best[:, 1] if best.shape[1] > 1 else 0.0)).log())


def _with_noise(canvas: Canvas, drawn: Drawn, score: Tensor) -> Tensor:
    """`order_noise` times Gumbel noise that fades over the passes."""
    if not canvas.config.order_noise:
        return score
    left = 1 - canvas.step.double() / canvas.num_steps.clamp_min(1).double()
    row = drawn.positions.nonzero()[:, 0]
    return score + canvas.config.order_noise * left[row] * canvas.gumbel(drawn.positions)


def certainty(canvas: Canvas, drawn: Drawn) -> Tensor:
    """The least entropy first."""
    return -entropy(drawn.logits)


def entropy(logits: Tensor) -> Tensor:
    """Entropy of each row of logits [n, V]: nats, float64 [n]."""
    log_p = logits.log_softmax(-1)
    p = log_p.exp()
    return -torch.where(p > 0, p * log_p, 0.0).sum(-1)


# --- how many stay: int64 [B]


def all_asked(canvas: Canvas, drawn: Drawn) -> Tensor:
    """All."""
    return drawn.positions.sum(1)


def even_share(canvas: Canvas, drawn: Drawn) -> Tensor:
    """As many in every pass that is left."""
    return canvas.quota(drawn.positions.sum(1))


def even_share_of_block(canvas: Canvas, drawn: Drawn) -> Tensor:
    """As many in every pass until the block's deadline."""
    assert canvas.deadline is not None
    block = canvas.current_block().clamp_max(canvas.deadline.shape[1] - 1)
    left = canvas.deadline.gather(1, block[:, None])[:, 0] - canvas.step
    return -(-drawn.positions.sum(1) // left.clamp_min(1))


def even_share_and_remasked(canvas: Canvas, drawn: Drawn) -> Tensor:
    """As `even_share`, and as many more as are masked again."""
    count = drawn.positions.sum(1)
    return torch.minimum(count, canvas.quota(count) + canvas.num_remasked())


def within_entropy_budget(canvas: Canvas, drawn: Drawn) -> Tensor:
    """As many of the least entropies as keep (their sum - the largest) within the budget; with `steps`, no fewer than those need."""
    ascending = scatter_to(drawn.positions, entropy(drawn.logits), math.inf).sort(dim=1).values
    ascending = torch.where(ascending.isfinite(), ascending, 0.0)
    # The largest of the first n is the n-th: the sum without it must fit the budget.
    fits = (ascending.cumsum(1) - ascending <= canvas.config.entropy_budget).sum(1)
    count = drawn.positions.sum(1)
    floor = canvas.quota(count) if canvas.config.steps else torch.ones_like(count)
    return torch.minimum(count, torch.maximum(fits, floor))


@dataclass(frozen=True)
class Sampler:
    """What a sampler answers; see the module's head."""

    select_positions: Callable[[Canvas], Tensor]
    surest: Callable[[Canvas, Drawn], Tensor]
    count: Callable[[Canvas, Drawn], Tensor]
    remask: bool = False


SAMPLERS: dict[str, Sampler] = {
    "ancestral": Sampler(each_with_equal_chance, left_to_right, all_asked),
    "confidence": Sampler(all_masked, probability, even_share),
    "margin": Sampler(all_masked, margin, even_share),
    "entropy": Sampler(all_masked, certainty, within_entropy_budget),
    "blocks": Sampler(first_block, probability, even_share_of_block),
    "remask": Sampler(all_masked, at_random, even_share_and_remasked, remask=True),
}
