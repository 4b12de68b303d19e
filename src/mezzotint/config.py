"""What a model and a training run are, as frozen dataclasses, the presets, and what every setting may be.

Every field has its help and its `Rule` beside it: the command line's help, its errors and those of Python come from
there. `OPTIONS` has the rules of what is no field. Knows nothing of torch, files or arguments.
"""

from __future__ import annotations

import dataclasses
import math
import numbers
from dataclasses import dataclass, field
from typing import Any, TypedDict

from mezzotint.errors import ConfigError, MezzotintError, shown

MOST_WINDOW = 1 << 16  # tokens: the logits of one window of the largest vocabulary are 17 GB
MOST_WIDTH = 1 << 16
MOST_SEED = 2**63 - 1
MOST = 10**9  # of what is counted and has no other bound


@dataclass(frozen=True)
class Rule:
    """What values a setting takes. kind: bool, int, float or str. choices: the words that a str may be, all if none.

    least, most: bounds of a number; with `above` or `below` the bound itself is left out. Not-a-number is never within,
    infinity only where `most` is infinite. optional: None, for "decided elsewhere", is a value too. unit: what is counted.
    """

    kind: type
    least: float = -math.inf
    most: float = math.inf
    above: bool = False
    below: bool = False
    choices: tuple[str, ...] = ()
    optional: bool = False
    unit: str = ""

    def words(self) -> str:
        """What is taken, for people: `a number from 0 to 1`."""
        return self._range() + (f", {self.unit}" if self.unit else "")

    def _range(self) -> str:
        if self.choices:
            return f"one of {', '.join(self.choices)}"
        if self.kind in (bool, str):
            return "true or false" if self.kind is bool else "text"
        shown_most = f"{self.most:,.0f}" if self.most >= 1000 else f"{self.most:g}"
        shown_most = f"{self.most:,}" if self.kind is int else shown_most
        upto = "" if self.most == math.inf else f" {'below' if self.below else 'at most'} {shown_most}"
        if self.kind is int:
            if self.least == -math.inf:
                return "a whole number" + (f",{upto}" if upto else "")
            if self.least == 1:
                return "a positive whole number" + (f",{upto}" if upto else "")
            return f"a whole number from {self.least:,}" + (f" to {shown_most}" if upto else " on")
        if self.above or self.below or not upto:
            return f"a number {'above' if self.above else 'of at least'} {self.least:g}" + (f",{upto}" if upto else "")
        return f"a number from {self.least:g} to {shown_most}"

    def check(self, name: str, value: Any, error: type[MezzotintError] = ConfigError) -> Any:
        """The value as Python's own type (NumPy's numbers are taken). Raises `error`, one line that names the setting."""
        if value is None and self.optional:
            return None
        if isinstance(value, (numbers.Integral, numbers.Real)) and not isinstance(value, (bool, int, float)):
            value = int(value) if isinstance(value, numbers.Integral) else float(value)
        right = isinstance(value, (int, float) if self.kind is float else self.kind)
        right = right and isinstance(value, bool) == (self.kind is bool)
        if right and self.kind in (int, float):
            number: Any = value
            right = self.least <= number <= self.most and (self.kind is int or abs(number) < 2**1023)
            right = right or number == self.most
            right = right and not (self.above and number == self.least) and not (self.below and number == self.most)
        if not right or (self.choices and value not in self.choices):
            none = " or None" if self.optional else ""
            raise error(f"{name} must be {self.words()}{none}, not {shown(value)}")
        return value

    def parse(self, name: str, text: str) -> Any:
        """The value that a text on the command line stands for, checked. Whole numbers may have commas or underscores."""
        value: Any = text
        try:
            if self.kind is bool:
                value = {"true": True, "false": False}.get(text.lower(), text)
            elif self.kind is not str:
                value = self.kind(text.replace(",", "") if self.kind is int else text)
        except ValueError:
            pass  # the text itself is no value: `check` says so
        return self.check(name, value)


def _rule(kind: type, within: str = "", choices: tuple[str, ...] = (), optional: bool = False) -> Rule:
    """within: an interval as mathematicians write it, `[0, 1)` for at least 0 and below 1."""
    if not within:
        return Rule(kind, choices=choices, optional=optional)
    least, most = ((int if kind is int else float)(word) for word in within[1:-1].split(","))
    return Rule(kind, least, most, within[0] == "(", within[-1] == ")", choices, optional)


def _option(
    default: Any, help: str, within: str = "", *, choices: tuple[str, ...] = (), metavar: str | None = None
) -> Any:
    """A field: a default of None stands for a whole number that is decided elsewhere."""
    rule = _rule(int if default is None else type(default), within, choices, default is None)
    metadata = {"help": help, "rule": rule, "metavar": metavar or rule.kind.__name__.upper()}
    return field(default=default, metadata=metadata)


def _check_fields(config: Any) -> None:
    """Every field of a settings object by its rule. Raises ConfigError."""
    for item in dataclasses.fields(config):
        value = item.metadata["rule"].check(item.name, getattr(config, item.name))
        object.__setattr__(config, item.name, value)


def parse_attention(words: str) -> int:
    """Who attends to whom, in words -> block size: `full` 0 (the whole window), `causal` 1, `block(k)` k.

    A position attends to its own block and to all before it. Raises ConfigError for any other word.
    """
    if not isinstance(words, str):
        raise ConfigError(f"attention must be full, causal or block(k) with k >= 1, not {shown(words)}")
    if words in ("full", "causal"):
        return int(words == "causal")
    if words.startswith("block(") and words.endswith(")") and words[6:-1].isdecimal() and len(words) < 18:
        size = int(words[6:-1])
        if size >= 1:
            return size
    raise ConfigError(f"attention must be full, causal or block(k) with k >= 1, not {shown(words)}")


@dataclass(frozen=True)
class ModelConfig:
    """Shape of the denoiser. The MASK id is `vocab_size`, one past the tokenizer's last id."""

    vocab_size: int = _option(1024, "tokens in the vocabulary, MASK not counted", "[1, 65535]")
    sequence_length: int = _option(256, "tokens in a training window", "[1, 65536]")
    layers: int = _option(6, "transformer layers", "[1, 256]")
    width: int = _option(256, "channels of the residual stream", "[2, 65536]")
    heads: int = _option(4, "query heads", "[1, 32768]")
    kv_heads: int = _option(4, "key and value heads (grouped-query attention)", "[1, 32768]")
    mlp_ratio: float = _option(4.0, "MLP hidden width as a multiple of the width", "(0, 1024]")
    activation: str = _option("relu2", "MLP activation, squared", choices=("relu2", "leaky_relu2"))
    rotary_dims: int = _option(0, "channels of each head that rotate with position (0: all)", "[0, 65536]")
    rotary_base: float = _option(10_000.0, "base of the rotary frequencies", "[1, 1e12]")
    query_gain: float = _option(1.5, "initial learned per-head gain on normalised queries", "[0, 1000]")
    softcap: float = _option(30.0, "logits are bounded to +-softcap by tanh", "[0.01, 10000]")
    embedding_std: float = _option(0.005, "initial standard deviation of the token embedding", "[0, 10]")
    depth_scaled_norm: bool = _option(False, "scale layer i's normalised input by 1/sqrt(i+1)")
    exclusive_attention: bool = _option(False, "remove from each head's output its own position's value direction")
    unet_skips: bool = _option(False, "add the first half's outputs to the second half, learned per channel")
    embedding_mix: bool = _option(False, "each layer mixes its input with the embedding, learned per channel")
    channel_scales: bool = _option(False, "learned per-channel scales on attention and MLP outputs")
    neighbour_reach: int = _option(0, "tokens to each side that a depthwise convolution mixes in (0: none)", "[0, 256]")
    shifted_output: bool = _option(False, "predict each token at the position before it, as left-to-right windows do")
    bigram_buckets: int = _option(0, "rows of the hashed bigram embedding (0: none)", "[0, 16777216]")
    bigram_width: int = _option(128, "width of the hashed bigram embedding", "[0, 65536]")
    value_embedding_width: int = _option(0, "width of the token embedding added to values (0: none)", "[0, 65536]")
    value_embedding_layers: int = _option(2, "how many of the last layers add the value embedding", "[0, 256]")

    def __post_init__(self) -> None:
        _check_fields(self)
        if not 1 <= self.mlp_width <= MOST_WIDTH:
            raise ConfigError(
                f"mlp_ratio {self.mlp_ratio:g} makes an MLP of {self.mlp_width:,} channels: 1 to {MOST_WIDTH:,}"
            )
        if self.width % self.heads or self.head_width % 2:
            raise ConfigError(f"width {self.width} must be an even multiple of heads {self.heads}")
        if self.heads % self.kv_heads:
            raise ConfigError(f"heads {self.heads} must be a multiple of kv_heads {self.kv_heads}")
        if self.rotary_dims % 2 or self.rotary_dims > self.head_width:
            raise ConfigError(f"rotary_dims must be even and at most the head width {self.head_width}")
        if self.bigram_buckets == 1:
            raise ConfigError("bigram_buckets must be 0 or at least 2: one bucket stands for the start of the window")
        if self.bigram_buckets and not self.bigram_width:
            raise ConfigError("bigram_width must be at least 1 where there are bigram_buckets")

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

    minutes: float = _option(5.0, "wall-clock length of the run (used when steps is 0)", "[0, 1e6]")
    steps: int = _option(0, "length of the run in steps (0: go by minutes)", "[0, 1000000000]")
    batch: int = _option(16, "windows per step over all processes", "[1, 1000000]")
    micro_batch: int = _option(0, "windows per forward pass (0: the whole share of a process)", "[0, 1000000]")
    weighting: str = _option(
        "nelbo",
        "training loss: the NELBO, or the reference's mean over all masked tokens (which weights windows by t)",
        choices=("nelbo", "reference"),
    )
    causal_share: float = _option(
        0.0,
        "share of the windows (or of the loss, where blocks teach both) learnt left to right, as next tokens",
        "[0, 1]",
    )
    causal_start: float = _option(
        0.0, "share of the run, at its start, that learns all windows left to right", "[0, 1]"
    )
    block_size: int = _option(
        0,
        "tokens of the blocks denoised one after another, given those before (0: whole windows; 1: next tokens only)",
        "[0, 65536]",
    )
    order_lean: float = _option(
        0.0,
        "lean to the left of the orders that masks are drawn from, as of score --order-lean (0: any order alike)",
        "[0, 1000]",
    )
    short_share: float = _option(
        0.0, "share of the run, at its start, that trains on halves of windows, twice as many", "[0, 1]"
    )
    narrow_share: float = _option(
        0.0, "share of the run, at its start, that masks between narrow_low and narrow_high of a window only", "[0, 1]"
    )
    narrow_low: float = _option(0.1, "lowest mask rate of the run's start", "[0, 1]")
    narrow_high: float = _option(0.6, "highest mask rate of the run's start", "[0, 1]")
    sampled_share: float = _option(
        0.0,
        "share of the run, at its start, with a sampled softmax: over sampled_entries of a larger vocabulary only",
        "[0, 1]",
    )
    sampled_entries: int = _option(
        2048, "entries of a sampled softmax, drawn for each step: frequent ones always, rare ones seldom", "[2, 65535]"
    )
    matrix_lr: float = _option(0.02, "Muon learning rate of the weight matrices", "[0, 10]")
    embedding_lr: float = _option(0.01, "AdamW learning rate of the embeddings", "[0, 10]")
    scalar_lr: float = _option(0.01, "AdamW learning rate of gains, scales and mixes", "[0, 10]")
    momentum: float = _option(0.95, "Muon momentum after its warm-up", "[0, 1)")
    momentum_start: float = _option(0.85, "Muon momentum at the first step", "[0, 1)")
    momentum_warmup: float = _option(0.1, "share of the run over which the momentum rises", "[0, 1]")
    neuron_decay: float = _option(
        0.0,
        "decay of the second moments by which Muon normalises per neuron, as NorMuon does (0: plain Muon)",
        "[0, 1)",
    )
    beta1: float = _option(0.9, "AdamW first-moment decay", "[0, 1)")
    beta2: float = _option(0.95, "AdamW second-moment decay", "[0, 1)")
    weight_decay: float = _option(0.04, "decoupled weight decay of matrices and embeddings", "[0, 10]")
    dropout: float = _option(
        0.0,
        "share of attention weights and of layers' outputs dropped in training, for text that is read many times",
        "[0, 1)",
    )
    grad_clip: float = _option(1.0, "global gradient norm above which gradients are scaled down (0: never)", "[0, 1e6]")
    warmup: float = _option(0.01, "share of the run over which the learning rate rises from 0", "[0, 1]")
    warmdown: float = _option(0.5, "share of the run, at its end, over which the learning rate falls", "[0, 1]")
    lr_floor: float = _option(0.0, "share of the learning rate that is left when the run ends", "[0, 1]")
    ema_horizon: float = _option(
        0.02, "averaging horizon of the weights' EMA as a share of the steps so far (0: none)", "[0, 1]"
    )
    seed: int = _option(0, "seed of initialisation, data order and masks", "[0, 9223372036854775807]")
    device: str = _option("auto", "cpu, cuda, mps, or auto")
    dtype: str = _option(
        "bfloat16",
        "autocast type (a CPU that multiplies float32 faster keeps to that); master weights stay float32",
        choices=("bfloat16", "float32"),
    )
    compile: bool = _option(True, "use torch.compile where it works")
    log_every: float = _option(1.0, "seconds between metric rows", "[0, 1e6]")
    checkpoint_minutes: float = _option(5.0, "minutes between checkpoints", "[0, 1e6]")
    keep_checkpoints: int = _option(2, "how many checkpoints to keep", "[1, 1000000]")
    val_every: float = _option(
        0.0,
        "steps, or minutes of a run counted by minutes, between validations (0: about ten a run; below 0: none)",
        "[-1, 1e9]",
    )
    val_tokens: int = _option(
        0, "tokens of validation text to score each time (0: what takes about 2% of the run)", "[0, 1000000000]"
    )
    patience: int = _option(
        0, "end the run after so many validations in a row that are no better (0: never)", "[0, 1000000]"
    )
    track: str = _option(
        "none",
        "also write figures for a tracker, offline in the run folder (each needs the extra of its name)",
        choices=("none", "tensorboard", "trackio", "wandb", "mlflow"),
    )
    tensorboard: bool = _option(False, "also write TensorBoard events (needs the tensorboard package)")

    def __post_init__(self) -> None:
        _check_fields(self)
        if self.steps == 0 and self.minutes == 0:
            raise ConfigError("set a positive number of minutes or steps")
        if self.patience and self.val_every < 0:
            raise ConfigError("patience counts validations: leave out val_every, or set how often there is one")
        if not self.narrow_low < self.narrow_high:
            raise ConfigError("narrow_low must be below narrow_high")
        if self.order_lean and (self.block_size or self.weighting != "nelbo"):
            raise ConfigError("order_lean is for the NELBO of whole windows: leave out block_size and weighting")


@dataclass(frozen=True)
class Preset:
    """A named pair of model and training settings."""

    model: ModelConfig
    train: TrainConfig


SMALL = Preset(
    ModelConfig(layers=3, width=128, heads=2, kv_heads=2, neighbour_reach=1, shifted_output=True, value_embedding_width=64,
                value_embedding_layers=3, exclusive_attention=True),
    TrainConfig(weighting="reference", causal_share=0.6875, short_share=0.5, narrow_share=0.8, sampled_share=0.8, neuron_decay=0.95, warmdown=0.7,
                lr_floor=0.1),
)  # fmt: skip
"""The best recipe of LOG.md for minutes on two cores without matrix tiles. So little is read in them that a narrow network,
which reads twice as much as one of 5 layers x 192, is the better one; `--preset auto` widens it for longer runs."""

BEST = Preset(
    dataclasses.replace(SMALL.model, vocab_size=8192, sequence_length=1024, layers=6, width=640, heads=10, kv_heads=10,
                        value_embedding_layers=6),
    dataclasses.replace(SMALL.train, minutes=20.0, batch=512, causal_share=0.5, sampled_share=0.0),
)  # fmt: skip
"""The recipe of `small` at the challenge's scale, 8 GPUs for 20 minutes. Its size follows from the budget: (16,000,000
bytes - 183,000 of code) / 0.44 bytes a parameter, as rounding a model at its true cost takes, are 35.9 million
parameters. This shape has 35.3 with 8,192 pieces; with 1,024, `--layers 7 --value-embedding-layers 7` has 35.2."""

PRESETS: dict[str, Preset] = {
    # Trains to readable words within the minutes of a demonstration.
    "tiny": Preset(
        ModelConfig(sequence_length=128, layers=4, width=128, heads=2, kv_heads=2, neighbour_reach=1),
        TrainConfig(minutes=1.5, batch=16, causal_share=0.5),
    ),
    "small": SMALL,
    "best16mb": BEST,
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


LEARNT = ("causal_share", "block_size", "weighting")
"""Training settings that say what a model learns, and so stay as they were when it learns on."""


def fine_tuning(trained: Any) -> TrainConfig:
    """Settings to go on with from a model's weights, on other text. trained: what the model says of its training.

    What it learns stays as it was. Rates are a quarter of a new model's and fall over nearly the whole run after a short
    warm-up; no curriculum, which is for weights that know nothing. Settings that are none count as not given.
    """
    settings: dict[str, Any] = {}
    rules = {item.name: item.metadata["rule"] for item in dataclasses.fields(TrainConfig)}
    for name in (*LEARNT, "neuron_decay"):
        try:
            settings[name] = rules[name].check(name, trained[name])
        except (KeyError, TypeError, ConfigError):
            continue
    return TrainConfig(
        matrix_lr=0.005,
        embedding_lr=0.0025,
        scalar_lr=0.0025,
        warmup=0.03,
        warmdown=0.95,
        momentum_warmup=0.03,
        **settings,
    )


def from_dict(kind: type[Any], values: Any) -> Any:
    """A `ModelConfig` or `TrainConfig` from a JSON object. Raises ConfigError on unknown fields or wrong types."""
    if not isinstance(values, dict):
        raise ConfigError(f"{kind.__name__} must be a JSON object")
    known = {item.name: item.metadata["rule"] for item in dataclasses.fields(kind)}
    found: dict[str, Any] = {}
    for name, value in values.items():
        if name not in known:
            raise ConfigError(f"unknown setting {shown(name)}; known: {', '.join(known)}")
        value = known[name].check(name, value)
        found[name] = float(value) if known[name].kind is float else value
    return kind(**found)


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
        choices=SAMPLERS,
    )
    steps: int | None = _option(None, "forward passes [by sampler]", "[1, 1000000000]", metavar="K")
    temperature: float = _option(1.0, "below 1: safer words", "[0, 100]", metavar="T")
    top_p: float = _option(1.0, "draw from the most probable share P only", "(0, 1]", metavar="P")
    block: int | None = _option(None, "tokens in a block of `blocks` [what was learnt, 32]", "[1, 65536]", metavar="N")
    entropy_budget: float = _option(0.5, "doubt that a pass of `entropy` may reveal", "[0, inf]", metavar="NATS")
    remask: float = _option(0.05, "of drawn tokens that a pass of `remask` hides again", "[0, 1]", metavar="SHARE")
    order_noise: float = _option(0.0, "noise on the order of `confidence` and `margin`", "[0, 1e6]", metavar="X")
    no_repeat: int = _option(0, "no N tokens in a row occur twice", "[0, 65536]", metavar="N")

    def __post_init__(self) -> None:
        _check_fields(self)
        if self.no_repeat == 1:
            raise ConfigError("no_repeat must be 0 or at least 2 tokens, not 1")


class SamplingOptions(TypedDict, total=False):
    """The fields of `SamplingConfig` as options of a function."""

    sampler: str
    steps: int | None
    temperature: float
    top_p: float
    block: int | None
    entropy_budget: float
    remask: float
    order_noise: float
    no_repeat: int


REVEAL_OPTIONS = {"sampler", "steps", "entropy_budget", "block", "remask", "order_noise"}
"""Settings that say how masks are revealed; the others are about which tokens are drawn."""

OPTIONS: dict[str, Rule] = {
    # what is drawn
    "seed": _rule(int, f"[0, {MOST_SEED}]"),
    # prepare
    "vocab_size": _rule(int, "[262, 65535]"),
    "val_fraction": Rule(float, 0.0, 1.0, above=True, below=True),
    # demo
    "minutes": _rule(float, "(0, 1e6]"),
    # pack
    "budget": _rule(int, f"[1, {10**15}]"),
    "tolerance": Rule(float, 0.0, 10.0, above=True, below=True),
    # scores
    "tokens": _rule(int, f"[1, {10**15}]"),
    "repeats": _rule(int, f"[1, {MOST}]"),
    "stride": _rule(int, f"[1, {MOST_WINDOW}]"),
    "orders": _rule(int, f"[1, {MOST}]"),
    "order_lean": _rule(float, "[0, inf]"),
    "slack": _rule(float, "[0, 1e6]"),
    "score_block_size": Rule(int, 0, MOST_WINDOW, unit="tokens of the blocks"),
    # samples and gaps
    "n": _rule(int, f"[1, {MOST}]"),
    "length": _rule(int, f"[1, {MOST}]"),
    "answers": _rule(int, "[1, 4096]"),
    "candidates": _rule(int, "[1, 4096]"),
    "max_words": _rule(int, "[1, 4096]"),
    "port": _rule(int, "[1, 65535]"),
    **{item.name: item.metadata["rule"] for item in dataclasses.fields(SamplingConfig)},
}
"""What the options that are no field of `ModelConfig` or `TrainConfig` may be, by their names in Python."""


def checked(name: str, value: Any) -> Any:
    """The value of the option `name` of `OPTIONS`, None where it is None. Raises ConfigError."""
    return None if value is None else OPTIONS[name].check(name, value)
