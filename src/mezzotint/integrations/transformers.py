"""Models of the transformers library as models to score (extra `transformers`): masked, shifted masked, and causal ones.

No code of a repository is run unless it is asked for, and no pickle is read. MASK and special tokens get no probability:
what is left is renormalised. Knows nothing of how figures are made.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mezzotint.data.tokenizer import Tokenizer
from mezzotint.errors import CheckpointError, ConfigError, DataError
from mezzotint.integrations.network import reachable

try:
    import transformers
except ImportError as error:
    raise ConfigError("models of transformers need it: pip install 'mezzotint[transformers]'") from error

OBJECTIVES = ("masked", "masked_shifted", "causal")
HUB = "hf:"
LONGEST = 4096  # tokens of a window, whatever more a model may say it takes
ExtraInputs = Callable[[Tensor, Tensor], dict[str, Tensor]]
"""(ids [B, T], masked bool [B, T]) -> more keyword inputs of a model's forward: a time, a noise level."""


@dataclass(frozen=True)
class ForeignConfig:
    """What scoring reads of a config. mask_id is one past the vocabulary, as everywhere in this package."""

    vocab_size: int
    sequence_length: int

    @property
    def mask_id(self) -> int:
        return self.vocab_size


class ForeignModel:
    """A model of transformers with the face of `Model`: config, tokenizer, network, `logits`.

    objective: `masked`, output i is for position i; `masked_shifted`, output i - 1 is (Gong et al. 2025; Dream);
    `causal`, next tokens. Made by `from_transformers`.
    """

    sha256: str | None = None

    def __init__(self, network: Any, tokenizer: Tokenizer, config: ForeignConfig, objective: str) -> None:
        self.network: nn.Module = network
        self.tokenizer, self.config, self.objective = tokenizer, config, objective
        self.info: dict[str, Any] = {}
        self.mask_token: int | None = None
        self.suffix: list[int] = []  # ids behind every window, as in training
        self.banned = torch.zeros(0, dtype=torch.int64)
        self.extra_inputs: ExtraInputs | None = None

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.network.parameters()).device

    @property
    def block_size(self) -> int:
        """1 for a causal model, 0 for the others."""
        return int(self.trained_causally)

    @property
    def trained_causally(self) -> bool:
        """Whether it predicts next tokens."""
        return self.objective == "causal"

    @torch.inference_mode()
    def logits(self, ids: Tensor, *, block_size: int = 0, positions: Tensor | None = None) -> Tensor:
        """As `Model.logits`, float32; -inf for what has no probability. The first position is BOS and predicts nothing.

        Raises DataError for attention that the model does not have.
        """
        causal = self.objective == "causal"
        if causal != (block_size == 1) or block_size > 1:
            fits = "causal, or sample" if causal else "nelbo, or chain with attention over the whole window"
            raise DataError(f"the model's objective is {self.objective}: what fits is {fits}")
        ids = ids.to(self.device)
        if positions is None:
            positions = torch.ones_like(ids, dtype=torch.bool)
        positions = positions.to(self.device)
        shifted = self.objective != "masked"
        if shifted and bool(positions[:, 0].any()):
            raise DataError("the model predicts nothing for a window's first position: score texts, whose BOS is given")
        # A causal caller has shifted the window behind one MASK already, which the model does not read.
        out = self._forward(ids[:, 1:] if causal else ids)
        if causal:
            out = torch.nn.functional.pad(out, (0, 0, 1, 0))
        elif shifted:
            out = torch.nn.functional.pad(out[:, :-1], (0, 0, 1, 0))
        out = out[positions][:, : self.config.vocab_size].float()
        return out.index_fill(1, self.banned.to(out.device), -torch.inf)

    def _forward(self, ids: Tensor) -> Tensor:
        """The network's own logits, [B, T, its vocabulary]."""
        masked = ids == self.config.mask_id
        # Masks of a causal model stand behind all that is asked about, where nothing sees them.
        canvas = ids.masked_fill(masked, self.tokenizer.bos_id if self.mask_token is None else self.mask_token)
        more = self.extra_inputs(canvas, masked) if self.extra_inputs else {}
        if self.suffix:
            end = torch.tensor(self.suffix, device=ids.device).expand(len(ids), -1)
            canvas = torch.cat((canvas, end), dim=1)
        found = self.network(input_ids=canvas, attention_mask=torch.ones_like(canvas), **more)
        return found.logits[:, : ids.shape[1]]

    def block_logits(self, noisy: Tensor, clean: Tensor, size: int, *, positions: Tensor) -> Tensor:
        """Raises DataError: such a model has no blocks."""
        raise DataError("a model of transformers has no blocks: leave out the block size")


def from_transformers(
    model: Any,
    tokenizer: Any,
    objective: str | None = None,
    *,
    window: int | None = None,
    extra_inputs: ExtraInputs | None = None,
) -> ForeignModel:
    """Wrap a model and a fast tokenizer of transformers, to be scored like any other.

    objective: `masked`, `masked_shifted` or `causal`; where not given, what the model's class name says (ForMaskedLM,
    ForCausalLM). window: tokens of a window, BOS among them [what the model takes, at most 4,096].
    extra_inputs: what the model's forward takes besides ids, by name, made from the canvas and what of it is masked [B, T].
    Raises ConfigError: the objective cannot be told, no MASK, a tokenizer that does not fit.
    """
    objective = objective or _objective([type(model).__name__])
    if objective not in OBJECTIVES:
        raise ConfigError(f"unknown objective {objective!r}: use {', '.join(OBJECTIVES)}")
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ConfigError(
            "the tokenizer is not a fast one of Hugging Face tokenizers: bytes cannot be counted by offsets"
        )
    own = Tokenizer.from_bytes(backend.to_str().encode())
    mask = getattr(tokenizer, "mask_token_id", None)
    if objective != "causal" and mask is None:
        raise ConfigError(f"the tokenizer has no MASK token, which the objective {objective} needs")
    outputs = int(getattr(model.config, "vocab_size", 0))
    if own.vocab_size > outputs:
        raise ConfigError(f"tokenizer and model do not fit: {own.vocab_size} tokens, {outputs} outputs")
    end = getattr(tokenizer, "sep_token_id", None)
    suffix = [end] if objective == "masked" and end is not None else []
    most = min(LONGEST, _positions(model.config) - len(suffix))
    if window is not None and not 2 <= window <= most:
        raise ConfigError(f"a window of this model has 2 to {most} tokens, not {window}")
    wrapped = ForeignModel(model.eval(), own, ForeignConfig(own.vocab_size, window or most), objective)
    # An unknown piece keeps its probability: text that has one is charged for it, and its figure says what is lost.
    banned = own.control_ids - ({tokenizer.unk_token_id} - {own.bos_id})
    wrapped.banned = torch.tensor(sorted(banned | ({mask} if mask is not None else set())), dtype=torch.int64)
    wrapped.mask_token, wrapped.suffix, wrapped.extra_inputs = mask, suffix, extra_inputs
    return wrapped


def load_transformers(
    name: str | Path, objective: str | None = None, *, trust_remote_code: bool = False
) -> ForeignModel:
    """The model of a repository on the Hub, `hf:OWNER/NAME`, or of a local folder. Weights are safetensors only.

    Raises CheckpointError if it cannot be had, ConfigError as `from_transformers` does.
    """
    where = str(name).removeprefix(HUB)
    local = Path(where).is_dir() or not reachable()
    options = {"trust_remote_code": trust_remote_code, "local_files_only": local}
    try:
        with _quiet():
            config = transformers.AutoConfig.from_pretrained(where, **options)
            objective = objective or _objective(getattr(config, "architectures", None) or [])
            kind = transformers.AutoModelForCausalLM if objective == "causal" else transformers.AutoModelForMaskedLM
            tokenizer = transformers.AutoTokenizer.from_pretrained(where, use_fast=True, **options)
            model = kind.from_pretrained(where, use_safetensors=True, dtype=torch.float32, **options)
    except ConfigError:
        raise
    except Exception as error:  # the library raises what its parts do
        reason = " ".join(str(error).split()).partition(". ")[0][:200] or type(error).__name__
        away = " (the Hub cannot be reached)" if local and not Path(where).is_dir() else ""
        raise CheckpointError(f"no model could be had from {name}{away}: {reason}") from error
    return from_transformers(model, tokenizer, objective)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The library's bars and warnings are not this package's output."""
    log = transformers.utils.logging
    level, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(level)
        if bars:
            log.enable_progress_bar()


def _objective(architectures: list[str]) -> str:
    for name in architectures:
        if name.endswith("ForMaskedLM"):
            return "masked"
        if name.endswith(("ForCausalLM", "LMHeadModel")):
            return "causal"
    raise ConfigError(
        f"the model's objective cannot be told from {', '.join(architectures) or 'its config'}: "
        f"say which of {', '.join(OBJECTIVES)} it is"
    )


def _positions(config: Any) -> int:
    """Positions that a model takes; RoBERTa's table holds those up to its padding id besides."""
    most = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None) or LONGEST
    offset = (config.pad_token_id or 0) + 1 if "roberta" in str(getattr(config, "model_type", "")) else 0
    return int(most) - offset
