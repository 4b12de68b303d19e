"""What a model and a training run are, as frozen dataclasses, and the presets.

Every field's help text becomes the command line's help. Knows nothing of torch, files or arguments.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

from mezzotint.errors import ConfigError


def _option(default: Any, help: str, choices: tuple[str, ...] | None = None, metavar: str | None = None) -> Any:
    metadata: dict[str, Any] = {"help": help}
    if choices:
        metadata["choices"] = choices
    if metavar:
        metadata["metavar"] = metavar
    return field(default=default, metadata=metadata)


def parse_attention(words: str) -> int:
    """Who attends to whom, in words -> block size: `full` 0 (the whole window), `causal` 1, `block(k)` k.

    A position attends to its own block and to all before it. Raises ConfigError for any other word.
    """
    if words in ("full", "causal"):
        return int(words == "causal")
    if words.startswith("block(") and words.endswith(")") and words[6:-1].isdecimal() and len(words) < 18:
        size = int(words[6:-1])
        if size >= 1:
            return size
    raise ConfigError(f"attention must be full, causal or block(k) with k >= 1, not {words!r}")


@dataclass(frozen=True)
class ModelConfig:
    """Shape of the denoiser. The MASK id is `vocab_size`, one past the tokenizer's last id."""

    vocab_size: int = _option(1024, "tokens in the vocabulary, MASK not counted")
    sequence_length: int = _option(256, "tokens in a training window")
    layers: int = _option(6, "transformer layers")
    width: int = _option(256, "channels of the residual stream")
    heads: int = _option(4, "query heads")
    kv_heads: int = _option(4, "key and value heads (grouped-query attention)")
    mlp_ratio: float = _option(4.0, "MLP hidden width as a multiple of the width")
    activation: str = _option("relu2", "MLP activation, squared", ("relu2", "leaky_relu2"))
    rotary_dims: int = _option(0, "channels of each head that rotate with position (0: all)")
    rotary_base: float = _option(10_000.0, "base of the rotary frequencies")
    query_gain: float = _option(1.5, "initial learned per-head gain on normalised queries")
    softcap: float = _option(30.0, "logits are bounded to +-softcap by tanh")
    embedding_std: float = _option(0.005, "initial standard deviation of the token embedding")
    depth_scaled_norm: bool = _option(False, "scale layer i's normalised input by 1/sqrt(i+1)")
    exclusive_attention: bool = _option(False, "remove from each head's output its own position's value direction")
    unet_skips: bool = _option(False, "add the first half's outputs to the second half, learned per channel")
    embedding_mix: bool = _option(False, "each layer mixes its input with the embedding, learned per channel")
    channel_scales: bool = _option(False, "learned per-channel scales on attention and MLP outputs")
    neighbour_reach: int = _option(0, "tokens to each side that a depthwise convolution mixes in (0: none)")
    shifted_output: bool = _option(False, "predict each token at the position before it, as left-to-right windows do")
    bigram_buckets: int = _option(0, "rows of the hashed bigram embedding (0: none)")
    bigram_width: int = _option(128, "width of the hashed bigram embedding")
    value_embedding_width: int = _option(0, "width of the token embedding added to values (0: none)")
    value_embedding_layers: int = _option(2, "how many of the last layers add the value embedding")

    def __post_init__(self) -> None:
        for name in ("vocab_size", "sequence_length", "layers", "width", "heads", "kv_heads", "mlp_ratio", "softcap"):
            value = getattr(self, name)
            if not (isinstance(value, (int, float)) and math.isfinite(value) and value > 0):
                raise ConfigError(f"{name} must be positive, not {value!r}")
        for name in (
            "rotary_dims",
            "neighbour_reach",
            "bigram_buckets",
            "value_embedding_width",
            "value_embedding_layers",
        ):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} must not be negative")
        if self.mlp_width < 1:
            raise ConfigError(f"mlp_ratio {self.mlp_ratio} leaves the MLP no unit")
        if self.width % self.heads or self.head_width % 2:
            raise ConfigError(f"width {self.width} must be an even multiple of heads {self.heads}")
        if self.heads % self.kv_heads:
            raise ConfigError(f"heads {self.heads} must be a multiple of kv_heads {self.kv_heads}")
        if self.rotary_dims % 2 or self.rotary_dims > self.head_width:
            raise ConfigError(f"rotary_dims must be even and at most the head width {self.head_width}")
        if self.activation not in ("relu2", "leaky_relu2"):
            raise ConfigError(f"activation must be relu2 or leaky_relu2, not {self.activation!r}")
        if self.bigram_buckets == 1:
            raise ConfigError("bigram_buckets must be 0 or at least 2: one bucket stands for the start of the window")
        if self.vocab_size > 65_535:
            raise ConfigError("vocab_size must fit 16-bit shards: at most 65,535")

    @property
    def mask_id(self) -> int:
        """The id of MASK: one past the last token."""
        return self.vocab_size

    @property
    def head_width(self) -> int:
        """Channels of one attention head."""
        return self.width // self.heads

    @property
    def mlp_width(self) -> int:
        """Hidden units of one MLP."""
        return int(self.mlp_ratio * self.width)


@dataclass(frozen=True)
class TrainConfig:
    """How a model is trained. A run ends at `steps` or at `minutes`, whichever is set; minutes if neither."""

    minutes: float = _option(5.0, "wall-clock length of the run (used when steps is 0)")
    steps: int = _option(0, "length of the run in steps (0: go by minutes)")
    batch: int = _option(16, "windows per step over all processes")
    micro_batch: int = _option(0, "windows per forward pass (0: the whole share of a process)")
    weighting: str = _option(
        "nelbo",
        "training loss: the NELBO, or the reference's mean over all masked tokens (which weights windows by t)",
        ("nelbo", "reference"),
    )
    causal_share: float = _option(
        0.0, "share of the windows (or of the loss, where blocks teach both) learnt left to right, as next tokens"
    )
    causal_start: float = _option(0.0, "share of the run, at its start, that learns all windows left to right")
    block_size: int = _option(
        0, "tokens of the blocks denoised one after another, given those before (0: whole windows; 1: next tokens only)"
    )
    short_share: float = _option(0.0, "share of the run, at its start, that trains on halves of windows, twice as many")
    narrow_share: float = _option(
        0.0, "share of the run, at its start, that masks between narrow_low and narrow_high of a window only"
    )
    narrow_low: float = _option(0.1, "lowest mask rate of the run's start")
    narrow_high: float = _option(0.6, "highest mask rate of the run's start")
    matrix_lr: float = _option(0.02, "Muon learning rate of the weight matrices")
    embedding_lr: float = _option(0.01, "AdamW learning rate of the embeddings")
    scalar_lr: float = _option(0.01, "AdamW learning rate of gains, scales and mixes")
    momentum: float = _option(0.95, "Muon momentum after its warm-up")
    momentum_start: float = _option(0.85, "Muon momentum at the first step")
    momentum_warmup: float = _option(0.1, "share of the run over which the momentum rises")
    neuron_decay: float = _option(
        0.0, "decay of the second moments by which Muon normalises per neuron, as NorMuon does (0: plain Muon)"
    )
    beta1: float = _option(0.9, "AdamW first-moment decay")
    beta2: float = _option(0.95, "AdamW second-moment decay")
    weight_decay: float = _option(0.04, "decoupled weight decay of matrices and embeddings")
    grad_clip: float = _option(1.0, "global gradient norm above which gradients are scaled down (0: never)")
    warmup: float = _option(0.01, "share of the run over which the learning rate rises from 0")
    warmdown: float = _option(0.5, "share of the run, at its end, over which the learning rate falls")
    lr_floor: float = _option(0.0, "share of the learning rate that is left when the run ends")
    ema_horizon: float = _option(0.02, "averaging horizon of the weights' EMA as a share of the steps so far (0: none)")
    seed: int = _option(0, "seed of initialisation, data order and masks")
    device: str = _option("auto", "cpu, cuda, mps, or auto")
    dtype: str = _option("bfloat16", "autocast type; master weights stay float32", ("bfloat16", "float32"))
    compile: bool = _option(True, "use torch.compile where it works")
    log_every: float = _option(1.0, "seconds between metric rows")
    checkpoint_minutes: float = _option(5.0, "minutes between checkpoints")
    keep_checkpoints: int = _option(2, "how many checkpoints to keep")
    tensorboard: bool = _option(False, "also write TensorBoard events (needs the tensorboard package)")

    def __post_init__(self) -> None:
        if self.steps < 0 or self.minutes < 0 or (self.steps == 0 and self.minutes == 0):
            raise ConfigError("set a positive number of minutes or steps")
        if self.batch < 1 or self.micro_batch < 0 or self.keep_checkpoints < 1:
            raise ConfigError("batch and keep_checkpoints must be at least 1, micro_batch at least 0")
        if self.block_size < 0:
            raise ConfigError(f"block_size must be 0 (whole windows) or at least 1 token, not {self.block_size}")
        if not self.narrow_low < self.narrow_high:
            raise ConfigError("narrow_low must be below narrow_high")
        for name in (
            "causal_share",
            "causal_start",
            "short_share",
            "narrow_share",
            "narrow_low",
            "narrow_high",
            "warmup",
            "warmdown",
            "lr_floor",
            "momentum_warmup",
            "neuron_decay",
            "ema_horizon",
        ):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} is a share: between 0 and 1")
        for item in dataclasses.fields(self):
            choices = item.metadata.get("choices")
            if choices and getattr(self, item.name) not in choices:
                raise ConfigError(f"{item.name} must be one of {', '.join(choices)}, not {getattr(self, item.name)!r}")


@dataclass(frozen=True)
class Preset:
    """A named pair of model and training settings."""

    model: ModelConfig
    train: TrainConfig


PRESETS: dict[str, Preset] = {
    # Trains to readable words within the minutes of a demonstration.
    "tiny": Preset(
        ModelConfig(sequence_length=128, layers=4, width=128, heads=2, kv_heads=2, neighbour_reach=1),
        TrainConfig(minutes=1.5, batch=16, causal_share=0.5),
    ),
    # The best recipe of LOG.md for minutes on two cores.
    "small": Preset(
        ModelConfig(
            layers=5,
            width=192,
            heads=3,
            kv_heads=3,
            neighbour_reach=1,
            shifted_output=True,
            value_embedding_width=64,
            value_embedding_layers=5,
        ),
        TrainConfig(
            weighting="reference",
            causal_share=0.5,
            short_share=0.5,
            narrow_share=0.8,
            neuron_decay=0.95,
            warmdown=0.7,
            lr_floor=0.1,
        ),
    ),
    # The recipe of `small` at the challenge's scale, 8 GPUs for 20 minutes. Its size follows from the budget: (16,000,000
    # bytes - 183,000 of code) / 0.44 bytes a parameter, as rounding a model at its true cost takes, are 35.9 million
    # parameters. This shape has 35.3 with 8,192 pieces; with 1,024, `--layers 7 --value-embedding-layers 7` has 35.2.
    "best16mb": Preset(
        ModelConfig(
            vocab_size=8192,
            sequence_length=1024,
            layers=6,
            width=640,
            heads=10,
            kv_heads=10,
            neighbour_reach=1,
            shifted_output=True,
            value_embedding_width=64,
            value_embedding_layers=6,
        ),
        TrainConfig(
            minutes=20.0,
            batch=512,
            weighting="reference",
            causal_share=0.5,
            short_share=0.5,
            narrow_share=0.8,
            neuron_decay=0.95,
            warmdown=0.7,
            lr_floor=0.1,
        ),
    ),
    # The seed's exact shape and optimizer: "Masked Text Diffusion (SP1024)", Parameter Golf pull request 1596.
    "reference": Preset(
        ModelConfig(
            sequence_length=2048,
            layers=11,
            width=512,
            heads=8,
            kv_heads=4,
            mlp_ratio=3.0,
            activation="leaky_relu2",
            rotary_dims=16,
            depth_scaled_norm=True,
            exclusive_attention=True,
            unet_skips=True,
            embedding_mix=True,
            channel_scales=True,
            bigram_buckets=2048,
            value_embedding_width=128,
        ),
        TrainConfig(
            minutes=20.0,
            batch=384,
            matrix_lr=0.025,
            embedding_lr=0.035,
            scalar_lr=0.025,
            momentum=0.99,
            momentum_start=0.92,
            momentum_warmup=0.13,
            weight_decay=0.04,
            grad_clip=0.3,
            warmup=0.0,
            warmdown=0.013,
        ),
    ),
}


def preset(name: str) -> Preset:
    """The preset called `name`. Raises ConfigError with the known names."""
    if name not in PRESETS:
        raise ConfigError(f"unknown preset {name!r}; known: {', '.join(PRESETS)}")
    return PRESETS[name]


def from_dict(kind: type[Any], values: Any) -> Any:
    """A `ModelConfig` or `TrainConfig` from a JSON object. Raises ConfigError on unknown fields or wrong types."""
    if not isinstance(values, dict):
        raise ConfigError(f"{kind.__name__} must be a JSON object")
    known = {item.name: item for item in dataclasses.fields(kind)}
    checked: dict[str, Any] = {}
    for name, value in values.items():
        if name not in known:
            raise ConfigError(f"unknown setting {name!r}; known: {', '.join(known)}")
        expected = type(known[name].default)
        if expected is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if type(value) is not expected:
            raise ConfigError(f"{name} must be {expected.__name__}, not {value!r}")
        checked[name] = value
    return kind(**checked)


def to_dict(config: ModelConfig | TrainConfig) -> dict[str, Any]:
    """The JSON object that `from_dict` reads back."""
    return dataclasses.asdict(config)


SAMPLERS = ("ancestral", "confidence", "margin", "entropy", "blocks", "remask")
BLOCK = 32


@dataclass(frozen=True)
class SamplingConfig:
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

    sampler: str = _option(
        "confidence",
        "how masks are revealed [confidence; sample, where next tokens were learnt: one by one, left to right]",
        SAMPLERS,
    )
    steps: int | None = _option(None, "forward passes [by sampler]", metavar="K")
    temperature: float = _option(1.0, "below 1: safer words", metavar="T")
    top_p: float = _option(1.0, "draw from the most probable share P only", metavar="P")
    block: int | None = _option(None, "tokens in a block of `blocks` [what was learnt, 32]", metavar="N")
    entropy_budget: float = _option(0.5, "doubt that a pass of `entropy` may reveal", metavar="NATS")
    remask: float = _option(0.05, "of drawn tokens that a pass of `remask` hides again", metavar="SHARE")
    order_noise: float = _option(0.0, "noise on the order of `confidence` and `margin`", metavar="X")
    no_repeat: int = _option(0, "no N tokens in a row occur twice", metavar="N")

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


REVEAL_OPTIONS = {"sampler", "steps", "entropy_budget", "block", "remask", "order_noise"}
"""Settings that say how masks are revealed; the others are about which tokens are drawn."""
