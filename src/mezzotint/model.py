"""The denoiser, ids -> logits: a bidirectional transformer over a window with MASK tokens.

Time-independent: the number of masks is visible, so no timestep is fed. Knows nothing of noise, loss or optimizer.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mezzotint.attention import (
    AttentionFn,
    additive_mask,
    attend,
    attend_doubled,
    block_mask,
    flex_attention_under,
    noisy_block_mask,
    split_blocks,
)
from mezzotint.config import ModelConfig
from mezzotint.data.tokenizer import Tokenizer

TOKENS_PER_FORWARD = 16_384
"""Tokens that go through the network together where nobody asks for another number."""


def shift_right(ids: Tensor, first: int, keep_last: bool = False) -> Tensor:
    """`first` and then all ids but the last, as next tokens are read: [B, T] -> [B, T]; with `keep_last` [B, T + 1]."""
    return F.pad(ids if keep_last else ids[:, :-1], (1, 0), value=first)


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


def previous_ids(ids: Tensor) -> Tensor:
    """The id before each, -1 before the first. [B, T] -> [B, T]."""
    return shift_right(ids, -1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions (Su et al. 2021, eq. 34) on the first 2 * cos.shape[-1] channels of x [B, T, H, D]."""
    half = cos.shape[-1]
    if 2 * half == x.shape[-1]:  # no slices, whose gradients a compiled graph would mask element by element
        a, b = x.unflatten(-1, (2, half)).unbind(-2)
        return torch.stack((a * cos + b * sin, b * cos - a * sin), dim=-2).flatten(-2)
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat((a * cos + b * sin, b * cos - a * sin, rest), dim=-1)


class Tables(NamedTuple):
    """What depends on the length and the block size of a window alone (`Denoiser.tables`).

    cos, sin: [inputs, 1, rotated channels / 2]. attn_mask: None, or [T, T] of `additive_mask`. noisy_attn_mask: for
    a doubled window of N + T inputs only, [N, N + T]. noisy_attention: that of the
    noisy part without its mask, on CUDA.
    A compiled graph that makes these itself works them out anew for every element that reads them: a tenth of a step.
    """

    cos: Tensor
    sin: Tensor
    attn_mask: Tensor | None
    noisy_attn_mask: Tensor | None = None
    noisy_attention: AttentionFn | None = None


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


class Denoiser(nn.Module):
    """ids with MASK -> logits over the tokenizer's vocabulary (MASK itself is never predicted)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size + 1, config.width)
        self.bigram = BigramEmbedding(config) if config.bigram_buckets else None
        self.value_embedding = ValueEmbedding(config) if config.value_embedding_width else None
        kernel = torch.zeros(2 * config.neighbour_reach + 1, config.width)
        self.neighbour_taps = nn.Parameter(kernel) if config.neighbour_reach else None
        self.blocks = nn.ModuleList(Block(config, i) for i in range(config.layers))
        skips = config.layers // 2
        self.skip_scales = nn.Parameter(torch.ones(skips, config.width)) if config.unet_skips else None
        self.compiled_block: Callable[..., Tensor] | None = None
        self.norm_scales: list[Tensor] | None = None
        self.dropout = 0.0
        self.reset_parameters()

    def set_dropout(self, share: float) -> None:
        """Drop this share of the attention weights and of what each layer adds to the residual stream, in training mode.

        No part of the model's description: a setting of training. Draws from torch's global generator.
        """
        for module in self.modules():
            if isinstance(module, (Denoiser, Block)):
                module.dropout = share

    @property
    def _attention_dropout(self) -> float:
        return self.dropout if self.training else 0.0

    def reset_parameters(self) -> None:
        """Orthogonal matrices, zero output projections, small normal embeddings, from torch's global generator."""
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                if name.endswith(("output", "down", "project")):
                    nn.init.zeros_(module.weight)
                else:
                    nn.init.orthogonal_(module.weight)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=self.config.embedding_std)

    def compile_blocks(self, wanted: bool = True) -> None:
        """Compile a layer, once for all layers, lengths and batches; without `wanted`, run them as they are written.

        For a device whose kernels take long to compile and are launched from Python: an eighth of the code of a network.
        """
        self.compiled_block = torch.compile(Block.forward, dynamic=True) if wanted else None
        scales = [torch.tensor(block.norm_scale, device=self.embedding.weight.device) for block in self.blocks]
        self.norm_scales = scales if self.config.depth_scaled_norm else None

    def rotary(self, length: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and sin, each [T, 1, rotated channels / 2]."""
        channels = self.config.rotary_dims or self.config.head_width
        rate = self.config.rotary_base ** (-torch.arange(0, channels, 2, device=device, dtype=torch.float32) / channels)
        angle = torch.arange(length, device=device, dtype=torch.float32)[:, None] * rate
        return angle.cos()[:, None].to(dtype), angle.sin()[:, None].to(dtype)

    def forward(self, ids: Tensor, *, block_size: int = 0, positions: Tensor | None = None) -> Tensor:
        """Logits in float32.

        ids: int64 [B, T], MASK allowed, any T >= 1. block_size: positions attend to their own block of so many
        and to all before it; 0 for the whole window, 1 for causal attention.
        positions: bool [B, T]; only these go through the output layer, row-major.
        Returns [B, T, V], or [n, V] with `positions`.
        """
        hidden = self.hidden(ids, block_size)
        if positions is not None:
            hidden = hidden[positions]
        return self.logits(hidden)

    def prefix_inputs(self, size: int) -> int:
        """Inputs that a block of `size` positions reads before its own: 1 with `shifted_output`, see `hidden_blocks`."""
        return int(self.config.shifted_output and size > 1)

    def tables(self, length: int, block_size: int) -> Tables:
        """What `hidden`, or for blocks shorter than the window `hidden_blocks`, needs for a window of `length`."""
        size = block_size or length
        weight = self.embedding.weight
        if 1 < size < length:
            return self._block_tables(length, size)
        if size > 1:
            return Tables(*self.rotary(length + self.prefix_inputs(size), weight.device, weight.dtype), None)
        place = torch.arange(length, device=weight.device)
        mask = additive_mask(block_mask(place, place, 1)) if length > 1 else None
        return Tables(*self.rotary(length, weight.device, weight.dtype), mask)

    def _block_tables(self, length: int, size: int) -> Tables:
        """Tables of the doubled window, cos and sin for both parts of it."""
        weight = self.embedding.weight
        block, noisy_place = self.block_inputs(length, size)
        place = torch.arange(length, device=weight.device)
        cos, sin = self.rotary(length + 1, weight.device, weight.dtype)
        places = torch.cat((noisy_place, place))
        noisy = torch.cat((block[:, None] == block, place < block[:, None] * size), dim=1)
        masks = (additive_mask(block_mask(place, place, 1)), additive_mask(noisy))
        attention = None
        if self.compiled_block is not None and weight.is_cuda:
            mask = noisy_block_mask(len(block), length, size, self.prefix_inputs(size), weight.device)
            attention = flex_attention_under(mask)
        return Tables(cos[places], sin[places], *masks, attention)

    def block_inputs(self, length: int, size: int) -> tuple[Tensor, Tensor]:
        """Number of the block, and place, of each input that the blocks of `length` positions read: int64 [N], [N].

        N is `length`, and with `shifted_output` one more for each block. Places are those of a causal window's inputs.
        """
        prefix, blocks = self.prefix_inputs(size), -(-length // size)
        number = torch.arange(length + blocks * prefix, device=self.embedding.weight.device)
        block = number // (size + prefix)
        return block, number - block * prefix

    def hidden(self, ids: Tensor, block_size: int = 0, tables: Tables | None = None) -> Tensor:
        """The normalised last hidden state, [B, T, W]. tables: `tables(T, block_size)`, made here where not given.

        With `shifted_output` and the whole window as one block, the network reads one MASK and then the window, and the state at
        input i predicts token i, which is input i + 1. A causal window, which its caller shifts right behind a MASK,
        is read in the same way, so that both kinds of windows teach one another (the shift operation of Gong et al.
        2025, "Scaling diffusion language models via adaptation from autoregressive models", section 3.2).

        With blocks every block sees itself as it stands and the ones before it, read from left to right: this is
        `hidden_blocks` of `ids` and `ids`. Blocks no shorter than the window are the whole window.
        """
        length = ids.shape[1]
        size = block_size or length
        if 1 < size < length:
            return self.hidden_blocks(ids, ids, size, tables)
        tables = tables or self.tables(length, block_size)
        if self.prefix_inputs(size):
            ids = shift_right(ids, self.config.mask_id, keep_last=True)  # (B, 1 + T)
        causal, dropout = tables.attn_mask is not None, self._attention_dropout
        attention_fn = partial(attend, attn_mask=tables.attn_mask, causal=causal, dropout=dropout)
        x = self.embed(ids, size == 1)  # (B, T or 1 + T, W)
        return self._layers(x, ids, tables.cos, tables.sin, lambda layer: attention_fn, length)

    def hidden_blocks(
        self, noisy: Tensor, clean: Tensor, size: int, tables: Tables | None = None, next_tokens: bool = False
    ) -> Tensor:
        """All blocks of a window at once, each denoised given the clean ones before it: hidden states [B, T, W].

        noisy, clean: int64 [B, T], the same window with and without MASK. In block b (`size` positions, the last one
        perhaps fewer) the result is that of `hidden` with blocks of `size` on [clean blocks < b, noisy block b]. One
        pass over the doubled window [noisy | clean] (Arriola et al. 2025, "Block diffusion", section 3.2), whose clean
        part is read from left to right.

        With `shifted_output` token i is predicted by the state at the input before it, here too: a block of k positions
        reads k + 1 inputs, the token before it and its own, and the clean part is a causal window, shifted right behind
        a MASK. next_tokens: return that window's states too, [2B, T, W]: first the blocks, then the next tokens.
        """
        length = noisy.shape[1]
        prefix = self.prefix_inputs(size)
        assert prefix or not next_tokens
        if size >= length:
            return self.hidden(noisy, 0, tables)
        tables = tables or self._block_tables(length, size)
        assert tables.attn_mask is not None and tables.noisy_attn_mask is not None
        masks = {"clean_attn_mask": tables.attn_mask, "noisy_attn_mask": tables.noisy_attn_mask}
        more = {"noisy_attention": tables.noisy_attention, "dropout": self._attention_dropout}
        attention_fn = partial(attend_doubled, size=size + prefix, **masks, **more)
        read = shift_right(clean, self.config.mask_id) if prefix else clean  # (B, T)
        ids, *embedded = self.embed_blocks(noisy, read, size)
        num_noisy = ids.shape[1]
        x, ids = torch.cat(embedded, dim=1), torch.cat((ids, read), dim=1)  # (B, N + T, W), (B, N + T)
        num_queries = None if next_tokens else num_noisy
        hidden = self._layers(x, ids, tables.cos, tables.sin, lambda layer: attention_fn, num_queries)
        denoised = self.block_outputs(hidden[:, :num_noisy], size, length)  # (B, T, W)
        return torch.cat((denoised, hidden[:, num_noisy:])) if next_tokens else denoised

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

    def _layers(
        self,
        x: Tensor,
        ids: Tensor,
        cos: Tensor,
        sin: Tensor,
        layer_attention: Callable[[int], AttentionFn],
        num_queries: int | None = None,
    ) -> Tensor:
        """All layers and the last norm, of the first `num_queries` positions (None: of all).

        layer_attention: the number of a layer -> its attention. Only the last layer has fewer queries than keys.
        """
        c = self.config
        embedded = x
        values = self.value_embedding(ids) if self.value_embedding is not None else None
        skips: list[Tensor] = []
        for i, block in enumerate(self.blocks):
            if self.skip_scales is not None and i >= c.layers // 2 and skips:
                x = x + self.skip_scales[i - c.layers // 2].to(x.dtype) * skips.pop()
            bias = None
            late = i - (c.layers - c.value_embedding_layers)
            if self.value_embedding is not None and values is not None and late >= 0:
                bias = values * self.value_embedding.layer_scales[late].to(values.dtype)
            queries = num_queries if i == c.layers - 1 else None
            inputs = (x, embedded, cos, sin, layer_attention(i), bias)
            if self.compiled_block is None:
                x = block(*inputs, num_queries=queries)
            else:  # one query less is not worth code of its own
                few = queries is not None and queries + 1 < ids.shape[1]
                scale = None if self.norm_scales is None else self.norm_scales[i]
                x = self.compiled_block(block, *inputs, num_queries=queries if few else None, norm_scale=scale)
                x = x[:, :queries]
            if self.skip_scales is not None and i < c.layers // 2:
                skips.append(x)
        return F.rms_norm(x, (c.width,))

    def logits(self, hidden: Tensor) -> Tensor:
        """Tied output layer without the MASK row, soft-capped (Gemma Team 2024, section 2). [..., W] -> [..., V]."""
        cap = self.config.softcap
        table = self.embedding.weight[: self.config.vocab_size]
        if hidden.is_cuda and torch.is_autocast_enabled("cuda"):
            raw = Float32Products.apply(hidden.flatten(0, -2).bfloat16(), table.bfloat16())
            raw = raw.view(*hidden.shape[:-1], -1)
        else:
            raw = F.linear(hidden, table).float()
        return cap * torch.tanh(raw / cap)


class Cache:
    """A denoiser under block attention, the newest positions at a time: keys and values of finished blocks are kept.

    `hidden` gives `Denoiser.hidden(..., block_size=size)` at the newest positions, up to rounding, for the
    cost of these positions. Finished blocks are read from left to right, so what is kept of them is the same for any
    size. Holds 2 * layers * rows * length * kv_heads * head_width floats.
    """

    def __init__(self, network: Denoiser, rows: int, length: int) -> None:
        c, like = network.config, network.embedding.weight
        self.network = network
        shape = (c.layers, rows, c.kv_heads, length, c.head_width)
        self.keys = torch.zeros(shape, device=like.device, dtype=like.dtype)
        self.values = torch.zeros_like(self.keys)
        self.ids = torch.zeros(rows, length, dtype=torch.int64, device=like.device)
        self.kept = [0] * rows
        self.cos, self.sin = network.rotary(length + 1, like.device, like.dtype)

    def copy_row(self, other: Cache) -> None:
        """Let every row keep what the first row of `other` keeps, which has no more positions."""
        at = other.kept[0]
        self.keys[:, :, :, :at] = other.keys[:, :1, :, :at]
        self.values[:, :, :, :at] = other.values[:, :1, :, :at]
        self.ids[:, :at] = other.ids[:1, :at]
        self.kept = [at] * len(self.kept)

    @torch.inference_mode()
    def hidden(self, ids: Tensor, size: int, keep: int, rows: list[int] | None = None) -> Tensor:
        """Hidden states [R, n, W] of the n positions that follow what is kept.

        ids: int64 [R, n]. keep: how many of them are final, whole blocks of `size`, and stay for later calls.
        rows: the R rows meant, all with the same number of kept positions (default: all rows).
        """
        net, n = self.network, ids.shape[1]
        ids = ids.to(self.keys.device)
        numbers = range(len(self.kept)) if rows is None else rows
        at = self.kept[numbers[0]]
        assert all(self.kept[r] == at for r in numbers)
        # A view, where all rows are meant: no copy of what is kept.
        which: Any = slice(None) if rows is None else torch.tensor(rows, device=ids.device)
        self.ids[which, at : at + n] = ids
        # Positions read from left to right: those to keep, and those that later blocks here look back on.
        clean = n if size == 1 else max(keep, (n - 1) // size * size)
        stop = at + clean
        # What the embedding of these positions looks back on.
        context = min(at, net.config.neighbour_reach + 1)
        prefix = net.prefix_inputs(size)
        first = at - context - prefix  # -1 is the MASK before the window
        read = self.ids[which, max(first, 0) : at + n - prefix]
        read = F.pad(read, (max(-first, 0), 0), value=net.config.mask_id)
        known = slice(context, context + clean)
        inputs = read[:, known]
        place = torch.arange(stop, device=ids.device)
        places = place[at:]
        visible = block_mask(places, place, 1)  # (queries, stop)
        num_noisy = 0
        if size == 1:
            x = net.embed(read, causal=True)[:, known]
        else:
            grouped, embedded, x = net.embed_blocks(ids, read, size)
            block, noisy_places = net.block_inputs(n, size)
            x, inputs = torch.cat((embedded, x[:, known]), dim=1), torch.cat((grouped, inputs), dim=1)
            places = torch.cat((at + noisy_places, places))
            num_noisy = len(block)
            own = torch.cat((place < at + block[:, None] * size, block[:, None] == block), dim=1)
            visible = torch.cat((own, F.pad(visible, (0, num_noisy))))
        attn_mask = None if bool(visible.all()) else additive_mask(visible)

        def attention_fn(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            self.keys[layer, which, :, at:stop] = k[:, :, num_noisy:]
            self.values[layer, which, :, at:stop] = v[:, :, num_noisy:]
            keys, values = self.keys[layer, which, :, :stop], self.values[layer, which, :, :stop]
            if num_noisy:
                keys = torch.cat((keys, k[:, :, :num_noisy]), dim=2)  # (R, H_kv, stop + N, D)
                values = torch.cat((values, v[:, :, :num_noisy]), dim=2)
            return attend(q, keys, values, None if attn_mask is None else attn_mask[: q.shape[2]])

        cos, sin = self.cos[places], self.sin[places]
        hidden = net._layers(x, inputs, cos, sin, lambda layer: partial(attention_fn, layer), num_noisy or None)
        for r in numbers:
            self.kept[r] += keep
        return net.block_outputs(hidden, size, n)


@dataclass
class Model:
    """All that scoring and sampling need: config, tokenizer and weights."""

    config: ModelConfig
    tokenizer: Tokenizer
    network: Denoiser
    info: dict[str, Any] = field(default_factory=dict)
    sha256: str | None = None

    def __repr__(self) -> str:
        config, parameters = self.config, count_parameters(self.network)
        return (
            f"Model({parameters:,} parameters, {config.layers} layers x {config.width}, {config.vocab_size:,} tokens, "
            f"window {config.sequence_length:,})"
        )

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.network.embedding.weight.device

    @torch.inference_mode()
    def logits(self, ids: Tensor, *, block_size: int = 0, positions: Tensor | None = None) -> Tensor:
        """`Denoiser.forward` without gradients, in float32 arithmetic. Shapes as there."""
        return self.network(ids.to(self.device), block_size=block_size, positions=positions)

    @torch.inference_mode()
    def block_logits(self, noisy: Tensor, clean: Tensor, size: int, *, positions: Tensor) -> Tensor:
        """Logits [n, V] at `positions` (bool [B, T], row-major) of all blocks at once, see `Denoiser.hidden_blocks`."""
        hidden = self.network.hidden_blocks(noisy.to(self.device), clean.to(self.device), size)
        return self.network.logits(hidden[positions.to(self.device)])

    @property
    def block_size(self) -> int:
        """Tokens of the blocks that the model learnt to denoise from left to right; 0: whole windows.

        1 for a model that learnt nothing but next tokens.
        """
        return _trained_block_size(self.info)

    @property
    def trained_causally(self) -> bool:
        """Whether causal attention was trained: some windows, or all, were learnt left to right."""
        share = _training(self.info).get("causal_share")
        return (isinstance(share, (int, float)) and share > 0) or self.block_size == 1


def _training(info: dict[str, Any]) -> dict[str, Any]:
    """The training settings that a model carries; what is no such thing counts as none."""
    settings = info.get("train")
    return settings if isinstance(settings, dict) else {}


def _trained_block_size(info: dict[str, Any]) -> int:
    """See `Model.block_size`. info: what a model carries about its training; may hold anything."""
    settings = _training(info)
    size = settings.get("block_size", 0)
    if isinstance(size, int) and size > 0:
        return size
    return 1 if settings.get("causal_share") == 1 else 0


def count_parameters(network: nn.Module) -> int:
    """Learned numbers in `network`, shared ones counted once."""
    return sum(p.numel() for p in network.parameters())
