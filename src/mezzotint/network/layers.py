"""The layers of the network: attention, MLP, block, embeddings of pairs and of values, and the functions they are made of.

Each is told who attends to whom. Knows nothing of masks, caches or the output.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mezzotint.config import ModelConfig
from mezzotint.network.attention import AttentionFn, split_blocks


class Float32Products(torch.autograd.Function):
    """a @ b.T of bfloat16 matrices [n, W] and [V, W], in float32 as the products are summed, not rounded in between."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        if a.is_cuda:
            return torch.mm(a, b.T, out_dtype=torch.float32)
        return a.float() @ b.float().T

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        a, b = ctx.saved_tensors
        g = grads[0].to(a.dtype)
        return g @ b, g.T @ a


def float32_linear(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weight.T in float32: [..., W], [V, W] -> [..., V]. Under autocast of bfloat16 operands, not rounded on CUDA."""
    if x.is_cuda and torch.is_autocast_enabled("cuda"):
        products: Tensor = Float32Products.apply(x.flatten(0, -2).bfloat16(), weight.bfloat16())
        return products.view(*x.shape[:-1], -1)
    return F.linear(x, weight).float()


def short_conv(x: Tensor, kernel: Tensor, causal: bool = False, before: Tensor | None = None) -> Tensor:
    """Depthwise convolution over positions. x: [..., T, W]; kernel: [2r + 1, W]; before: [..., r, W], left of x (or 0).

    Row r + d weights the neighbour d to the right, of which there is none right of x, or with `causal` at all.
    """
    length, reach = x.shape[-2], kernel.shape[0] // 2
    padded = F.pad(x, (0, 0, reach, reach))  # (..., r + T + r, W)
    if before is not None:
        padded = torch.cat((before, padded[..., reach:, :]), dim=-2)
    mixed = torch.zeros_like(x)
    for offset in range(-reach, 1 if causal else reach + 1):
        start = reach + offset
        mixed = mixed + padded[..., start : start + length, :] * kernel[start].to(x.dtype)
    return mixed


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions (Su et al. 2021, eq. 34) on the first 2 * cos.shape[-1] channels of x [B, T, H, D]."""
    half = cos.shape[-1]
    if 2 * half == x.shape[-1]:  # no slices, whose gradients a compiled graph would mask element by element
        a, b = x.unflatten(-1, (2, half)).unbind(-2)
        return torch.stack((a * cos + b * sin, b * cos - a * sin), dim=-2).flatten(-2)
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat((a * cos + b * sin, b * cos - a * sin, rest), dim=-1)


class Attention(nn.Module):
    """Grouped-query attention with QK-norm, per-head query gain and partial rotary positions."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        kv_width = config.kv_heads * config.head_width
        self.query = nn.Linear(config.width, config.width, bias=False)
        self.key = nn.Linear(config.width, kv_width, bias=False)
        self.value = nn.Linear(config.width, kv_width, bias=False)
        self.output = nn.Linear(config.width, config.width, bias=False)
        self.query_gain = nn.Parameter(torch.full((config.heads,), config.query_gain))

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        attention_fn: AttentionFn,
        value_bias: Tensor | None,
        num_queries: int | None,
    ) -> Tensor:
        """x: [B, T, W]; the first `num_queries` (Q; None: all) positions are queries, all are keys. Returns [B, Q, W]."""
        c = self.config
        b, t, _ = x.shape
        asking = x[:, :num_queries]
        q = self.query(asking).view(b, asking.shape[1], c.heads, c.head_width)  # (B, Q, H, D)
        k = self.key(x).view(b, t, c.kv_heads, c.head_width)  # (B, T, H_kv, D)
        v = self.value(x)  # (B, T, H_kv * D)
        if value_bias is not None:
            v = v + value_bias
        v = v.view(b, t, c.kv_heads, c.head_width)  # (B, T, H_kv, D)
        q = F.rms_norm(q, (c.head_width,))
        k = F.rms_norm(k, (c.head_width,))
        q = rotate(q, cos[:num_queries], sin[:num_queries]) * self.query_gain.to(q.dtype)[:, None]
        k = rotate(k, cos, sin)
        y = attention_fn(q.to(v.dtype).transpose(1, 2), k.to(v.dtype).transpose(1, 2), v.transpose(1, 2))
        y = y.transpose(1, 2)  # (B, Q, H, D)
        if c.exclusive_attention:
            # A head's output minus its component along its own position's value: what others say, not oneself.
            grouped = y.reshape(b, asking.shape[1], c.kv_heads, c.heads // c.kv_heads, c.head_width)
            own = F.normalize(v[:, :num_queries], dim=-1).unsqueeze(3).to(y.dtype)  # (B, Q, H_kv, 1, D)
            y = grouped - (grouped * own).sum(-1, keepdim=True) * own
        return self.output(y.reshape(b, asking.shape[1], c.width))


class MLP(nn.Module):
    """Two matrices around a squared (leaky) ReLU (So et al. 2021, "Primer")."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.slope = 0.5 if config.activation == "leaky_relu2" else 0.0
        self.up = nn.Linear(config.width, config.mlp_width, bias=False)
        self.down = nn.Linear(config.mlp_width, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x)
        h = F.leaky_relu(h, self.slope) if self.slope else F.relu(h)
        return self.down(h.square())


class Block(nn.Module):
    """One pre-norm transformer layer."""

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        self.norm_scale = 1.0 / math.sqrt(index + 1) if config.depth_scaled_norm else 1.0
        self.attention = Attention(config)
        self.mlp = MLP(config)
        width = config.width
        self.attention_scale = nn.Parameter(torch.ones(width)) if config.channel_scales else None
        self.mlp_scale = nn.Parameter(torch.ones(width)) if config.channel_scales else None
        self.dropout = 0.0
        mix = torch.zeros(2, width)
        mix[0].fill_(1.0)
        self.embedding_mix = nn.Parameter(mix) if config.embedding_mix else None

    def norm(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        normed = F.rms_norm(x, (x.shape[-1],))
        if scale is not None:
            return normed * scale
        return normed * self.norm_scale if self.norm_scale != 1.0 else normed

    def _dropped(self, x: Tensor) -> Tensor:
        """With dropout, in training only; without it nothing is drawn."""
        return F.dropout(x, self.dropout) if self.dropout and self.training else x

    def forward(
        self, x: Tensor, embedded: Tensor, *attention: Any, num_queries: int | None, norm_scale: Tensor | None = None
    ) -> Tensor:
        """x, embedded: [B, T, W]. Returns the first `num_queries` (Q; None: all) positions, [B, Q, W].

        norm_scale: this layer's, as a tensor, for code that is compiled once for all layers.
        """
        if self.embedding_mix is not None:
            mix = self.embedding_mix.to(x.dtype)
            x = mix[0] * x + mix[1] * embedded
        a = self._dropped(self.attention(self.norm(x, norm_scale), *attention, num_queries))
        x = x[:, :num_queries] + (a * self.attention_scale.to(a.dtype) if self.attention_scale is not None else a)
        m = self._dropped(self.mlp(self.norm(x, norm_scale)))
        return x + (m * self.mlp_scale.to(m.dtype) if self.mlp_scale is not None else m)


class BigramEmbedding(nn.Module):
    """A hashed embedding of (previous, own) ids of the corrupted input, projected to the width."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.buckets = config.bigram_buckets
        self.embedding = nn.Embedding(config.bigram_buckets, config.bigram_width)
        self.project = nn.Linear(config.bigram_width, config.width, bias=False)
        self.scale = nn.Parameter(torch.tensor(0.05))

    def forward(self, ids: Tensor, previous: Tensor) -> Tensor:
        # Multiplicative hashing by two odd primes; the last bucket stands for "no previous token", an id of -1.
        bucket = torch.bitwise_xor(36_313 * ids, 27_191 * previous) % (self.buckets - 1)
        return self.project(self.embedding(bucket.masked_fill(previous < 0, self.buckets - 1))) * self.scale


class ValueEmbedding(nn.Module):
    """A token embedding shared by the last layers and added to their values, with a learned gain per layer."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embedding = nn.Embedding(config.vocab_size + 1, config.value_embedding_width)
        self.project = nn.Linear(config.value_embedding_width, config.kv_heads * config.head_width, bias=False)
        self.scale = nn.Parameter(torch.tensor(0.1))
        self.layer_scales = nn.Parameter(torch.ones(config.value_embedding_layers))

    def forward(self, ids: Tensor) -> Tensor:
        return self.project(self.embedding(ids)) * self.scale


def previous_ids(ids: Tensor) -> Tensor:
    """The id before each, -1 before the first. [B, T] -> [B, T]."""
    return F.pad(ids[:, :-1], (1, 0), value=-1)


class Inputs(nn.Module):
    """What enters the first layer, of windows and of blocks: embeddings of ids, of pairs, and of the neighbours mixed in."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size + 1, config.width)
        self.bigram = BigramEmbedding(config) if config.bigram_buckets else None
        self.value_embedding = ValueEmbedding(config) if config.value_embedding_width else None
        kernel = torch.zeros(2 * config.neighbour_reach + 1, config.width)
        self.neighbour_taps = nn.Parameter(kernel) if config.neighbour_reach else None

    def prefix_inputs(self, size: int) -> int:
        """Inputs that a block of `size` positions reads before its own: 1 with `shifted_output`, see `hidden_blocks`."""
        return int(self.config.shifted_output and size > 1)

    def block_inputs(self, length: int, size: int) -> tuple[Tensor, Tensor]:
        """Number of the block, and place, of each input that the blocks of `length` positions read: int64 [N], [N].

        N is `length`, and with `shifted_output` one more for each block. Places are those of a causal window's inputs.
        """
        prefix, blocks = self.prefix_inputs(size), -(-length // size)
        number = torch.arange(length + blocks * prefix, device=self.embedding.weight.device)
        block = number // (size + prefix)
        return block, number - block * prefix

    def embed(self, ids: Tensor, causal: bool) -> Tensor:
        """What enters the first layer, [B, T, W]."""
        return self._mixed(self._embedded(ids, previous_ids(ids)), causal)

    def _embedded(self, ids: Tensor, previous: Tensor) -> Tensor:
        x = self.embedding(ids)
        return x if self.bigram is None else x + self.bigram(ids, previous)

    def _mixed(self, x: Tensor, causal: bool = False, before: Tensor | None = None) -> Tensor:
        """Embeddings [..., T, W] with their neighbours mixed in, normalised. causal, before: see `short_conv`."""
        if self.neighbour_taps is not None:
            x = x + short_conv(x, self.neighbour_taps, causal, before)
        return F.rms_norm(x, (self.config.width,))

    def embed_blocks(self, noisy: Tensor, read: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
        """What the blocks of `noisy` read: ids [B, N]; what enters the first layer, [B, N, W]; the same for `read`.

        noisy: int64 [B, T]. read: int64 [B, c + T], the clean inputs at the T positions and c before them. N: see
        `block_inputs`.
        """
        length = noisy.shape[1]
        context, blocks = read.shape[1] - length, -(-length // size)
        prefix = self.prefix_inputs(size)
        total = length + blocks * prefix  # N

        def at_block_starts(x: Tensor) -> Tensor:
            """Of [B, >= c + T, ...] those at the first position of each block: [B, blocks, ...]."""
            return x[:, context : context + (blocks - 1) * size + 1 : size]

        ids = split_blocks(noisy, size, 1)  # (B, blocks, size)
        if prefix:
            ids = torch.cat((at_block_starts(read)[:, :, None], ids), dim=2)  # (B, blocks, 1 + size)
        before_read = previous_ids(read)
        previous = torch.cat((at_block_starts(before_read)[:, :, None], ids[:, :, :-1]), dim=2)
        ids, previous = ids.flatten(1)[:, :total], previous.flatten(1)[:, :total]  # (B, N)
        x, clean = self._embedded(ids, previous), self._embedded(read, before_read)
        before = None
        if self.neighbour_taps is not None:
            reach = self.config.neighbour_reach
            earlier = F.pad(clean, (0, 0, reach, 0))
            before = torch.stack([at_block_starts(earlier[:, i:]) for i in range(reach)], dim=2)  # (B, blocks, r, W)
        x = self._mixed(split_blocks(x, size + prefix, 1), before=before).flatten(1, 2)[:, :total]  # (B, N, W)
        return ids, x, self._mixed(clean, causal=True)

    def block_outputs(self, hidden: Tensor, size: int, length: int) -> Tensor:
        """States of the inputs of `embed_blocks` -> those that predict its T tokens. [B, N, W] -> [B, T, W]."""
        if not self.prefix_inputs(size):
            return hidden
        return split_blocks(hidden, size + 1, 1)[:, :, :size].flatten(1, 2)[:, :length]
