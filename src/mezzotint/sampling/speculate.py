"""Self-speculation: several next tokens drafted by the masked mode in one pass, verified by the causal mode in another.

Both modes are the same weights. What comes out has exactly the distribution of next tokens drawn one by one (Leviathan
et al. 2023, "Fast inference from transformers via speculative decoding", theorem 1), whatever the drafts are; they
only decide how many tokens a pass yields. Knows ids, not text.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mezzotint.config import SamplingConfig
from mezzotint.network.model import Cache, Model
from mezzotint.sampling.samplers import probabilities, sample_tokens

CONTEXT = 64  # tokens that a draft looks back on
PADDING = 8  # masks behind a draft, text unknown


@dataclass(frozen=True)
class Speculated:
    """tokens: drawn ids. drafts, checks: passes of the masked and of the causal mode. accepted: drafted tokens kept."""

    tokens: list[int]
    drafts: int
    checks: int
    accepted: int


def accept(p: Tensor, q: Tensor, drafted: Tensor, generator: torch.Generator) -> list[int]:
    """The drafted tokens to keep, and one more: 1 to k + 1 tokens, distributed as drawn from `p` one by one.

    p: float64 [k + 1, V], the distribution of each next token given the drafted ones before it. q: [k, V], what
    `drafted` (int64 [k]) were drawn from. Token i is kept with probability min(1, p_i / q_i); the first that is not is
    drawn anew from the positive part of p_i - q_i, and behind k kept ones the next from p_k.
    """
    kept: list[int] = []
    uniform = torch.rand(len(drafted) + 1, generator=generator, dtype=torch.float64)
    for i, token in enumerate(drafted.tolist()):
        if uniform[i] * q[i, token] < p[i, token]:
            kept.append(token)
            continue
        rest = (p[i] - q[i]).clamp_min(0)
        return [*kept, int(sample_tokens(rest.log()[None], uniform[-1:], 1.0, 1.0))]
    return [*kept, int(sample_tokens(p[-1].log()[None], uniform[-1:], 1.0, 1.0))]


@torch.inference_mode()
def speculate(
    model: Model,
    prefix: Sequence[int],
    length: int,
    drafted: int,
    *,
    config: SamplingConfig,
    generator: torch.Generator,
    allowed: Tensor,
    stop_id: int | None = None,
) -> Speculated:
    """`length` next tokens behind `prefix`, or fewer where `stop_id` is drawn, `drafted` of them drafted at a time.

    temperature and top_p of `config` count; allowed: bool [V]. Prefix and text must fit the window.
    """
    ids, mask_id = list(prefix), model.config.mask_id
    total = len(ids) + length
    cache = Cache(model.network, 1, total)
    drafts = checks = accepted = 0

    def shaped(logits: Tensor) -> Tensor:
        logits = logits.double().cpu().masked_fill(~allowed, -math.inf)
        return probabilities(logits, config.temperature, config.top_p)

    while len(ids) < total and (stop_id is None or stop_id not in ids[len(prefix) :]):
        k = min(drafted, total - len(ids) - 1)
        q, tokens = torch.empty(0, len(allowed), dtype=torch.float64), torch.empty(0, dtype=torch.int64)
        if k:
            context = ids[-CONTEXT:]
            canvas = torch.tensor([context + [mask_id] * (k + PADDING)])[:, : model.config.sequence_length]
            where = torch.zeros(canvas.shape, dtype=torch.bool)
            where[0, len(context) : len(context) + k] = True
            q = shaped(model.logits(canvas, positions=where.to(model.device)))
            tokens = sample_tokens(q.log(), torch.rand(len(q), generator=generator, dtype=torch.float64), 1.0, 1.0)
            drafts += 1
        # Read shifted right behind one MASK, as next tokens are learnt: the input at a place is the id before it.
        inputs = [mask_id, *ids, *tokens.tolist()][cache.kept[0] :]
        hidden = cache.hidden(torch.tensor([inputs]), 1, keep=len(ids) + 1 - cache.kept[0])
        p = shaped(model.network.logits(hidden[0, len(inputs) - len(tokens) - 1 :]))
        checks += 1
        new = accept(p, q, tokens, generator)
        accepted += len(new) - 1
        ids += new
    found = ids[len(prefix) : total]
    if stop_id in found:
        found = found[: found.index(stop_id) + 1]
    return Speculated(found, drafts, checks, accepted)
