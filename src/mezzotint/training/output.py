"""The output layer and its cross-entropy on a CPU: a stretch of rows at a time, so that logits stay in the cache, or compiled.

Written out with its backward pass; `Denoiser.logits` and `objective.token_nll` say the same in two lines and are what it is
tested against. Knows nothing of masks, networks or steps.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

LOGITS_TOGETHER = 1 << 20
"""Logits of a stretch: 4 MB in float32."""
MOST_WITHOUT_MAXIMUM = 60.0
"""Up to this cap the exponentials of logits and the sums of them are float32 numbers as they are."""


class CappedCrossEntropy(torch.autograd.Function):
    """Rows [n, W], table [V, W], targets int64 [n], cap, type of the products -> -log p of each target, [n] in float32.

    Logits are cap * tanh(row . entry / cap). What is kept for the backward pass is the hyperbolic tangents.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, table: Tensor, targets: Tensor, cap: float, products: torch.dtype) -> Tensor:
        entries = table.detach().to(products)
        nll = torch.empty(len(rows), dtype=torch.float32, device=rows.device)
        logs, kept = torch.empty_like(nll), []
        size = max(16, LOGITS_TOGETHER // len(table))
        for start in range(0, len(rows), size):
            here = slice(start, start + size)
            bent = (rows[here].to(products) @ entries.T).float().mul_(1 / cap).tanh_()
            logits = bent * cap
            at_target = logits.gather(1, targets[here, None])[:, 0]
            if cap > MOST_WITHOUT_MAXIMUM:
                logs[here] = logits.logsumexp(1)
            else:
                logs[here] = logits.exp_().sum(1).log_()
            nll[here] = logs[here] - at_target
            kept.append(bent)
        ctx.save_for_backward(rows, entries, targets, logs, *kept)
        ctx.cap, ctx.size, ctx.table_type = cap, size, table.dtype
        return nll

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        rows, entries, targets, logs, *kept = ctx.saved_tensors
        (g,) = grads
        grad_rows = torch.empty_like(rows)
        grad_table = torch.zeros(entries.shape, dtype=torch.float32, device=rows.device)
        for i, bent in enumerate(kept):
            here = slice(i * ctx.size, (i + 1) * ctx.size)
            # d nll / d logit = p - [target], and d logit / d product = 1 - tanh^2.
            change = (bent * ctx.cap).sub_(logs[here, None]).exp_()
            place = targets[here, None]
            change.scatter_(1, place, change.gather(1, place) - 1)
            change.mul_(g[here, None].float())
            change.addcmul_(change * bent, bent, value=-1)
            change = change.to(entries.dtype)
            grad_rows[here] = (change @ entries).to(rows.dtype)
            grad_table.add_(change.T @ rows[here].to(entries.dtype))
        return grad_rows, grad_table.to(ctx.table_type), None, None, None


def capped(products: Tensor, cap: float) -> Tensor:
    """cap * tanh(products / cap), of any shape, by the exponential: one function of a vector in compiled code."""
    return cap - 2 * cap / ((products * (2 / cap)).exp() + 1)


class BoundedCrossEntropy(torch.autograd.Function):
    """Products [n, V] of rows and table, targets int64 [n], cap <= MOST_WITHOUT_MAXIMUM -> as `CappedCrossEntropy`.

    For compiled code, whose one pass over the products is faster than stretches: logits are worked out anew for the backward
    pass rather than kept.
    """

    @staticmethod
    def forward(ctx: Any, products: Tensor, targets: Tensor, cap: float) -> Tensor:
        log_sum = capped(products, cap).exp().sum(1).log()
        ctx.save_for_backward(products, targets, log_sum)
        ctx.cap = cap
        return log_sum - cap * torch.tanh(products.gather(1, targets[:, None])[:, 0] / cap)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        products, targets, log_sum = ctx.saved_tensors
        cap: float = ctx.cap
        logits = capped(products, cap)
        true = torch.arange(products.shape[1], device=products.device) == targets[:, None]
        slope = (1 - (logits / cap).square()) * grads[0][:, None]
        return ((logits - log_sum[:, None]).exp() - true.float()) * slope, None, None


def capped_nll(rows: Tensor, table: Tensor, targets: Tensor, cap: float) -> Tensor:
    """-log p of each target in nats, float32 [n], under logits that are cap * tanh(row . entry / cap).

    rows: [n, W]. table: [V, W]. targets: int64 [n]. Products are in autocast's type where it is on, else in the rows'.
    """
    if torch.compiler.is_compiling() and cap <= MOST_WITHOUT_MAXIMUM:
        return BoundedCrossEntropy.apply(functional.linear(rows, table).float(), targets, cap)
    products = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else rows.dtype
    return CappedCrossEntropy.apply(rows, table, targets, cap, products)
