"""Attention: who sees whom, and the ways to compute it that suit a device.

Pure functions of queries, keys, values and masks. Knows nothing of layers, weights or positions.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

AttentionFn = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Who attends to whom: (q [B, H, T, D], k [B, H_kv, T, D], v like k) -> [B, H, T, D]."""


def block_mask(queries: Tensor, keys: Tensor, size: int) -> Tensor:
    """What positions `queries` [Q] see of positions `keys` [K] in blocks of `size`: bool [Q, K]."""
    return (queries // size)[:, None] >= (keys // size)[None, :]


def additive_mask(mask: Tensor) -> Tensor:
    """An attention mask as a term of the scores: bool, True where attended to -> float32, 0 there and -inf elsewhere."""
    return torch.zeros(mask.shape, device=mask.device).masked_fill(~mask, -torch.inf)


def split_blocks(x: Tensor, size: int, dim: int) -> Tensor:
    """Cut `dim` into blocks of `size`, the last one filled up with zeros: [..., n, ...] -> [..., blocks, size, ...]."""
    blocks = -(-x.shape[dim] // size)
    pads = (0, 0) * (x.dim() - dim - 1) + (0, blocks * size - x.shape[dim])
    return F.pad(x, pads).unflatten(dim, (blocks, size))


def use_matmul_attention(q: Tensor, length: int) -> bool:
    """Whether attention is better written out: the CPU's fused kernel has a slow backward pass, compiled matrix
    products take under half its time."""
    return q.device.type == "cpu" and torch.compiler.is_compiling() and length <= 1024


class MatmulAttention(torch.autograd.Function):
    """Attention as matrix products, q, k, v: [B, H, T or S, D]. Its backward pass keeps the weights in v's type and makes
    the gradient of k as [S, D]; autograd's own has it transposed, which the compiled code behind it reads slowly."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None) -> Tensor:
        scores = (q @ k.transpose(-1, -2)).float() * q.shape[-1] ** -0.5  # (B, H, T, S)
        if attn_mask is not None:
            scores = scores + attn_mask
        weights = scores.softmax(-1).to(v.dtype)
        out = weights @ v  # (B, H, T, D)
        ctx.save_for_backward(q, k, v, weights, out)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, weights, out = ctx.saved_tensors
        (g,) = grads
        # Of softmax: d scores = weights * (d weights - sum(weights * d weights)), whose sum is that of out * g.
        mean = (g.float() * out.float()).sum(-1, keepdim=True)
        grad_scores = weights.float() * ((g @ v.transpose(-1, -2)).float() - mean) * q.shape[-1] ** -0.5
        grad_scores = grad_scores.to(q.dtype)  # (B, H, T, S)
        return grad_scores @ k, grad_scores.transpose(-1, -2) @ q, weights.transpose(-1, -2) @ g, None


def attend(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, causal: bool = False, dropout: float = 0.0
) -> Tensor:
    """Softmax attention with grouped heads. q: [B, H, T, D]; k, v: [B, H_kv, S, D]; attn_mask: [T, S] of `additive_mask`.

    `causal` says that the mask is that of blocks of one position, T = S. dropout: share of the weights that are dropped.
    """
    if not dropout and use_matmul_attention(q, k.shape[2]):
        k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
        v = v.repeat_interleave(q.shape[1] // v.shape[1], dim=1)
        half = q.shape[2] // 2
        if not causal or attn_mask is None or not half:
            return MatmulAttention.apply(q, k, v, attn_mask)
        # The first half sees nothing of the second: a quarter of the products is left out. Quarters gained no more.
        first = MatmulAttention.apply(q[:, :, :half], k[:, :, :half], v[:, :, :half], attn_mask[:half, :half])
        return torch.cat((first, MatmulAttention.apply(q[:, :, half:], k, v, attn_mask[half:])), dim=2)
    grouped = q.shape[1] != k.shape[1]
    attn_mask = None if attn_mask is None or causal else attn_mask.to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v, attn_mask, dropout, is_causal=causal, enable_gqa=grouped)


@functools.cache
def compiled_flex_attention() -> Callable[..., Tensor]:
    """PyTorch's FlexAttention, whose kernel is compiled for a mask."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)  # type: ignore[return-value]


def flex_attention_under(mask: Any) -> AttentionFn:
    """Attention that skips what a FlexAttention mask rules out, as a graph of its own. Shapes as in `attend`."""

    def attend_by_blocks(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        groups = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        return compiled_flex_attention()(q, k, v, block_mask=mask)

    return torch.compiler.disable(attend_by_blocks)  # type: ignore[return-value]


def noisy_block_mask(num_noisy: int, length: int, size: int, prefix: int, device: torch.device) -> Any:
    """The noisy part's mask of a doubled window in blocks of `size` positions, for FlexAttention: [N, N + T]."""
    from torch.nn.attention.flex_attention import create_block_mask

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        block = query // (size + prefix)
        return ((key < num_noisy) & (key // (size + prefix) == block)) | (
            (key >= num_noisy) & (key - num_noisy < block * size)
        )

    return create_block_mask(visible, None, None, num_noisy, num_noisy + length, device=str(device))


def attend_doubled(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    size: int,
    clean_attn_mask: Tensor,
    noisy_attn_mask: Tensor,
    noisy_attention: AttentionFn | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Attention over a doubled window [noisy | clean]. q: [B, H, N + T, D], or the noisy part of it; k, v: [B, H_kv,
    N + T, D]; returns as q.

    clean_attn_mask: [T, T], the clean part's. noisy_attn_mask: [N, N + T], the noisy part's: its own block of `size`
    noisy inputs, and the clean ones before. Written out, a noisy query meets the T clean keys and the `size` noisy ones
    of its own block only. noisy_attention: the noisy part's, where its mask is not used.
    dropout: share of the weights that are dropped; then nothing is written out.
    """
    length = noisy_attn_mask.shape[0]  # N
    if q.shape[2] > length:
        masks = (clean_attn_mask, noisy_attn_mask, noisy_attention, dropout)
        clean_q, clean_k, clean_v = (x[:, :, length:] for x in (q, k, v))  # (B, H, T, D)
        clean_out = attend(clean_q, clean_k, clean_v, clean_attn_mask, causal=True, dropout=dropout)
        noisy_out = attend_doubled(q[:, :, :length], k, v, size, *masks)  # (B, H, N, D)
        return torch.cat((noisy_out, clean_out), dim=2)  # (B, H, N + T, D)
    if noisy_attention is not None and not dropout:
        return noisy_attention(q, k, v)
    if dropout or not use_matmul_attention(q, length):
        return attend(q, k, v, noisy_attn_mask, dropout=dropout)
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    v = v.repeat_interleave(q.shape[1] // v.shape[1], dim=1)
    q = q * q.shape[-1] ** -0.5
    blocked = partial(split_blocks, size=size, dim=2)  # (B, H, N, D) -> (B, H, blocks, size, D)
    scores_clean = (q @ k[:, :, length:].transpose(-1, -2)).float() + noisy_attn_mask[:, length:]  # (B, H, N, T)
    scores_noisy = (blocked(q) @ blocked(k[:, :, :length]).transpose(-1, -2)).float()  # (B, H, blocks, size, size)
    if length % size:  # keys that fill up the last block are nobody's
        number = torch.arange(scores_noisy.shape[2] * size, device=q.device)
        scores_noisy = scores_noisy.masked_fill(number.view(-1, 1, size) >= length, -torch.inf)
    scores = torch.cat((scores_clean, scores_noisy.flatten(2, 3)[:, :, :length]), dim=-1)  # (B, H, N, T + size)
    weights_clean, weights_noisy = scores.softmax(-1).to(v.dtype).split((scores_clean.shape[-1], size), dim=-1)
    noisy_out = (blocked(weights_noisy) @ blocked(v[:, :, :length])).flatten(2, 3)[:, :, :length]
    return weights_clean @ v[:, :, length:] + noisy_out  # (B, H, N, D)
