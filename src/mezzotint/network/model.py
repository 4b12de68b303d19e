"""The denoiser, ids -> logits: a bidirectional transformer over a window with MASK tokens.

Time-independent: the number of masks is visible, so no timestep is fed. Knows nothing of noise, loss or optimizer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mezzotint.config import ModelConfig
from mezzotint.data.tokenizer import Tokenizer
from mezzotint.network.attention import (
    AttentionFn,
    additive_mask,
    attend,
    attend_doubled,
    block_mask,
    flex_attention_under,
    noisy_block_mask,
)
from mezzotint.network.layers import Block, Inputs, float32_linear

TOKENS_PER_FORWARD = 16_384
"""Tokens that go through the network together where nobody asks for another number."""
TOKENS_IN_CACHE = 2_048
"""Of these, those that a CPU takes through all layers together: with more, states leave its caches between operations."""


def shift_right(ids: Tensor, first: int, keep_last: bool = False) -> Tensor:
    """`first` and then all ids but the last, as next tokens are read: [B, T] -> [B, T]; with `keep_last` [B, T + 1]."""
    return F.pad(ids if keep_last else ids[:, :-1], (1, 0), value=first)


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


class Denoiser(Inputs):
    """ids with MASK -> logits over the tokenizer's vocabulary (MASK itself is never predicted)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
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
        return cap * torch.tanh(float32_linear(hidden, table) / cap)


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


def cacheable(network: Any) -> bool:
    """Whether a `Cache` can be made for a network: a `Denoiser`, or what stands in for one; none of another library."""
    return hasattr(network, "_layers")


class Surroundings:
    """A denoiser under full attention on rows that differ from given ones in one stretch only: the rest is read once.

    Keys and values of the inputs outside the stretch stay what they were with the given ids in it, so all but the given rows
    is an approximation (the dual cache of Wu et al. 2025, "Fast-dLLM", section 3.2), for the cost of the stretch.
    Holds 2 * layers * rows * T * kv_heads * head_width floats.
    """

    @torch.inference_mode()
    def __init__(self, network: Denoiser, ids: Tensor, start: int, stop: int) -> None:
        """ids: int64 [B, T], on any device. start, stop: the stretch."""
        self.network, self.start, self.stop = network, start, min(stop, ids.shape[1])
        self.ids = self._inputs(ids.to(network.embedding.weight.device))  # (B, I): T, or 1 + T with a shifted output
        self.outside: list[tuple[Tensor, Tensor]] = []  # of each layer, keys and values: (B, H_kv, I - S, D)
        self.end = self.stop + self.ids.shape[1] - ids.shape[1]  # of the stretch's S inputs
        like = network.embedding.weight
        self.cos, self.sin = network.rotary(self.ids.shape[1], like.device, like.dtype)

        def attention_fn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            self.outside.append((self._without(k), self._without(v)))
            return attend(q, k, v)

        x = network.embed(self.ids, causal=False)
        hidden = network._layers(x, self.ids, self.cos, self.sin, lambda layer: attention_fn, self.stop)
        self.given = hidden[:, start:]
        """The given rows' hidden states, [B, stop - start, W]: exact."""

    def _inputs(self, ids: Tensor) -> Tensor:
        shifted = self.network.prefix_inputs(ids.shape[1])
        return shift_right(ids, self.network.config.mask_id, keep_last=True) if shifted else ids

    def _without(self, x: Tensor) -> Tensor:
        return torch.cat((x[:, :, : self.start], x[:, :, self.end :]), dim=2)

    @torch.inference_mode()
    def hidden(self, ids: Tensor, rows: Tensor) -> Tensor:
        """Hidden states [R, stop - start, W] of the stretch in `ids` (int64 [R, T]), which is row `rows` (int64 [R]) of the given
        ones elsewhere."""
        net, device = self.network, self.ids.device
        inputs, which = self._inputs(ids.to(device)), rows.to(device)
        near = net.config.neighbour_reach + 1  # what the embedding of the stretch looks at beside it
        first = max(0, self.start - near)
        x = net.embed(inputs[:, first : self.end + near], causal=False)[:, self.start - first : self.end - first]

        def attention_fn(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            keys, values = self.outside[layer]
            return attend(q, torch.cat((keys[which], k), dim=2), torch.cat((values[which], v), dim=2))

        place = slice(self.start, self.end)
        cos, sin, count = self.cos[place], self.sin[place], self.stop - self.start
        return net._layers(x, inputs[:, place], cos, sin, lambda layer: partial(attention_fn, layer), count)


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
        ids = ids.to(self.device)
        rows = max(1, TOKENS_IN_CACHE // max(1, ids.shape[1]))
        if ids.device.type != "cpu" or len(ids) <= rows:
            return self.network(ids, block_size=block_size, positions=positions)
        hidden = torch.cat([self.network.hidden(some, block_size) for some in ids.split(rows)])
        return self.network.logits(hidden if positions is None else hidden[positions])

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
