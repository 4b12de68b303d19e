"""The denoiser, ids -> logits: a bidirectional transformer over a window with MASK tokens.

Time-independent: the number of masks is visible, so no timestep is fed. Knows nothing of noise, loss or optimizer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mezzotint.config import ModelConfig
from mezzotint.data import Tokenizer
from mezzotint.errors import ConfigError


def block_size(visibility: str, length: int) -> int:
    """Positions that see one another: `full` is one block of all, `causal` blocks of 1, `block(k)` blocks of k.

    A position sees its own block and all before it. Raises ConfigError for any other word.
    """
    if visibility == "full":
        return length
    if visibility == "causal":
        return 1
    if visibility.startswith("block(") and visibility.endswith(")") and visibility[6:-1].isdigit():
        size = int(visibility[6:-1])
        if size >= 1:
            return size
    raise ConfigError(f"visibility must be full, causal or block(k) with k >= 1, not {visibility!r}")


def attend(q: Tensor, k: Tensor, v: Tensor, size: int) -> Tensor:
    """Softmax attention with grouped heads under block visibility. q: [B, H, T, D]; k, v: [B, H_kv, T, D]."""
    length = q.shape[2]
    mask = None
    if 1 < size < length:
        block = torch.arange(length, device=q.device) // size
        mask = block[:, None] >= block[None, :]
    if q.device.type == "cpu" and torch.compiler.is_compiling() and length <= 1024:
        # The CPU's fused kernel has a slow backward pass; compiled matrix products take under half its time.
        k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
        v = v.repeat_interleave(q.shape[1] // v.shape[1], dim=1)
        scores = ((q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)).float()
        if size == 1 and length > 1:
            mask = torch.ones(length, length, dtype=torch.bool, device=q.device).tril()
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf)
        return scores.softmax(-1).to(v.dtype) @ v
    grouped = q.shape[1] != k.shape[1]
    causal = size == 1 and length > 1
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=grouped)


def mix_neighbours(x: Tensor, taps: Tensor, size: int) -> Tensor:
    """Depthwise convolution over positions that respects block visibility. x: [B, T, W]; taps: [2r + 1, W].

    Tap r + d reads the neighbour d to the right. Beyond the window there is nothing; beyond the own block, nothing to
    the right.
    """
    length, reach = x.shape[1], taps.shape[0] // 2
    padded = F.pad(x, (0, 0, reach, reach))
    within = torch.arange(length, device=x.device) % size
    mixed = torch.zeros_like(x)
    for offset in range(-reach, reach + 1):
        if offset > 0 and size == 1:
            break
        tap = taps[reach + offset].to(x.dtype)
        neighbour = padded[:, reach + offset : reach + offset + length]
        if offset > 0 and size < length:
            neighbour = neighbour * (within + offset < size)[:, None].to(x.dtype)
        mixed = mixed + neighbour * tap
    return mixed


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions (Su et al. 2021, eq. 34) on the first 2 * cos.shape[-1] channels of x [B, T, H, D]."""
    half = cos.shape[-1]
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

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, size: int, value_bias: Tensor | None) -> Tensor:
        c = self.config
        b, t, _ = x.shape
        q = self.query(x).view(b, t, c.heads, c.head_width)
        k = self.key(x).view(b, t, c.kv_heads, c.head_width)
        v = self.value(x)
        if value_bias is not None:
            v = v + value_bias
        v = v.view(b, t, c.kv_heads, c.head_width)
        q = F.rms_norm(q, (c.head_width,))
        k = F.rms_norm(k, (c.head_width,))
        q = rotate(q, cos, sin) * self.query_gain.to(q.dtype)[:, None]
        k = rotate(k, cos, sin)
        y = attend(q.to(v.dtype).transpose(1, 2), k.to(v.dtype).transpose(1, 2), v.transpose(1, 2), size).transpose(
            1, 2
        )
        if c.exclusive_attention:
            # A head's output minus its component along its own position's value: what others say, not oneself.
            grouped = y.reshape(b, t, c.kv_heads, c.heads // c.kv_heads, c.head_width)
            own = F.normalize(v, dim=-1).unsqueeze(3).to(y.dtype)
            y = grouped - (grouped * own).sum(-1, keepdim=True) * own
        return self.output(y.reshape(b, t, c.width))


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
        mix = torch.stack((torch.ones(width), torch.zeros(width)))
        self.embedding_mix = nn.Parameter(mix) if config.embedding_mix else None

    def norm(self, x: Tensor) -> Tensor:
        normed = F.rms_norm(x, (x.shape[-1],))
        return normed * self.norm_scale if self.norm_scale != 1.0 else normed

    def forward(self, x: Tensor, embedded: Tensor, *attention: Any) -> Tensor:
        if self.embedding_mix is not None:
            mix = self.embedding_mix.to(x.dtype)
            x = mix[0] * x + mix[1] * embedded
        a = self.attention(self.norm(x), *attention)
        x = x + (a * self.attention_scale.to(a.dtype) if self.attention_scale is not None else a)
        m = self.mlp(self.norm(x))
        return x + (m * self.mlp_scale.to(m.dtype) if self.mlp_scale is not None else m)


class BigramEmbedding(nn.Module):
    """A hashed embedding of (previous, own) ids of the corrupted input, projected to the width."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.buckets = config.bigram_buckets
        self.embedding = nn.Embedding(config.bigram_buckets, config.bigram_width)
        self.project = nn.Linear(config.bigram_width, config.width, bias=False)
        self.scale = nn.Parameter(torch.tensor(0.05))

    def forward(self, ids: Tensor) -> Tensor:
        # Multiplicative hashing by two odd primes; the last bucket stands for "no previous token".
        bucket = torch.bitwise_xor(36_313 * ids[:, 1:], 27_191 * ids[:, :-1]) % (self.buckets - 1)
        bucket = F.pad(bucket, (1, 0), value=self.buckets - 1)
        return self.project(self.embedding(bucket)) * self.scale


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
        taps = 2 * config.neighbour_reach + 1
        self.neighbour_taps = nn.Parameter(torch.zeros(taps, config.width)) if config.neighbour_reach else None
        self.blocks = nn.ModuleList(Block(config, i) for i in range(config.layers))
        skips = config.layers // 2
        self.skip_scales = nn.Parameter(torch.ones(skips, config.width)) if config.unet_skips else None
        self.reset_parameters()

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

    def rotary(self, length: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and sin, each [T, 1, rotated channels / 2]."""
        channels = self.config.rotary_dims or self.config.head_width
        rate = self.config.rotary_base ** (-torch.arange(0, channels, 2, device=device, dtype=torch.float32) / channels)
        angle = torch.arange(length, device=device, dtype=torch.float32)[:, None] * rate
        return angle.cos()[:, None].to(dtype), angle.sin()[:, None].to(dtype)

    def forward(self, ids: Tensor, *, visibility: str = "full", positions: Tensor | None = None) -> Tensor:
        """Logits in float32.

        ids: int64 [B, T], MASK allowed, any T >= 1. visibility: `full`, `causal` or `block(k)`.
        positions: bool [B, T]; only these go through the output layer, row-major.
        Returns [B, T, V], or [n, V] with `positions`.
        """
        hidden = self.hidden(ids, visibility)
        if positions is not None:
            hidden = hidden[positions]
        return self.logits(hidden)

    def hidden(self, ids: Tensor, visibility: str = "full") -> Tensor:
        """The normalised last hidden state, [B, T, W].

        With `shifted_output` and full visibility, the network reads one MASK and then the window, and the state at
        input i predicts token i, which is input i + 1. A causal window, which its caller shifts right behind a MASK,
        is read in the same way, so that both kinds of windows teach one another (the shift operation of Gong et al.
        2025, "Scaling diffusion language models via adaptation from autoregressive models", section 3.2).
        """
        c = self.config
        size = block_size(visibility, ids.shape[1])
        shifted = c.shifted_output and 1 < ids.shape[1] == size
        if shifted:
            ids = F.pad(ids, (1, 0), value=c.mask_id)
            size += 1
        x = self.embedding(ids)
        if self.bigram is not None:
            x = x + self.bigram(ids)
        if self.neighbour_taps is not None:
            x = x + mix_neighbours(x, self.neighbour_taps, size)
        x = embedded = F.rms_norm(x, (c.width,))
        cos, sin = self.rotary(ids.shape[1], ids.device, x.dtype)
        values = self.value_embedding(ids) if self.value_embedding is not None else None
        skips: list[Tensor] = []
        for i, block in enumerate(self.blocks):
            if self.skip_scales is not None and i >= c.layers // 2 and skips:
                x = x + self.skip_scales[i - c.layers // 2].to(x.dtype) * skips.pop()
            bias = None
            late = i - (c.layers - c.value_embedding_layers)
            if self.value_embedding is not None and values is not None and late >= 0:
                bias = values * self.value_embedding.layer_scales[late].to(values.dtype)
            x = block(x, embedded, cos, sin, size, bias)
            if self.skip_scales is not None and i < c.layers // 2:
                skips.append(x)
        if shifted:
            x = x[:, :-1]
        return F.rms_norm(x, (c.width,))

    def logits(self, hidden: Tensor) -> Tensor:
        """Tied output layer without the MASK row, soft-capped (Gemma Team 2024, section 2). [..., W] -> [..., V]."""
        cap = self.config.softcap
        raw = F.linear(hidden, self.embedding.weight[: self.config.vocab_size]).float()
        return cap * torch.tanh(raw / cap)


@dataclass
class Model:
    """All that scoring and sampling need: config, tokenizer and weights."""

    config: ModelConfig
    tokenizer: Tokenizer
    network: Denoiser
    info: dict[str, Any] = field(default_factory=dict)
    sha256: str | None = None

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.network.embedding.weight.device

    @torch.inference_mode()
    def logits(self, ids: Tensor, *, visibility: str = "full", positions: Tensor | None = None) -> Tensor:
        """`Denoiser.forward` without gradients, in float32 arithmetic. Shapes as there."""
        return self.network(ids.to(self.device), visibility=visibility, positions=positions)


def count_parameters(network: nn.Module) -> int:
    """Learned numbers in `network`, shared ones counted once."""
    return sum(p.numel() for p in network.parameters())
