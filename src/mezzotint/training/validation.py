"""Validation while training: the averaged weights on a fixed part of the validation text, with fixed masks.

The formula is `objective`'s, which scoring uses too. Draws nothing from torch's global generator, so that a run is the
same with and without it. Knows windows, masks and when a validation is due; does not know what is done with the figures.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from mezzotint import seeding
from mezzotint.config import TrainConfig, to_dict
from mezzotint.data.dataset import TokenStream
from mezzotint.errors import DataError
from mezzotint.network.model import Denoiser, Model, shift_right
from mezzotint.objective import block_counts, mask_by_count, masked_nll, nelbo_per_window
from mezzotint.training.listeners import Listener, Step
from mezzotint.training.step import Trainer

VALIDATIONS = 10
"""Validations of a run where nobody asks for another number."""
MOST_TIME = 0.03
"""Share of a run's time that validations may take where nobody asks for their number."""
TEXT_SHARE = 0.03
"""Tokens through the network in all validations, as a share of those trained on: about 2% of the run's time."""
FEWEST_WINDOWS, MOST_TOKENS = 16, 262_144
"""Limits of a validation whose size nobody asks for: fewer windows say too little to choose a checkpoint by."""
TOKENS_PER_PASS = 4096


@dataclass(frozen=True)
class ValidationSet:
    """Windows and what is masked in them: a function of the text, the window, the block size and the number of tokens.

    ids, corrupted, masked: [N, T]. counts: int64 [N], or with blocks of `size` tokens [N, blocks]. bytes: of the text.
    """

    ids: Tensor
    corrupted: Tensor
    masked: Tensor
    counts: Tensor
    size: int | None
    bytes: int

    @classmethod
    def draw(cls, stream: TokenStream, model: Model, tokens: int) -> ValidationSet:
        """About `tokens` tokens in whole windows, evenly spread. Raises DataError if the text is empty."""
        windows = stream.windows(model.config.sequence_length)
        total = max(1, len(stream) // windows.length)  # a last window may be shorter; it counts if it is the only one
        if len(stream) == 0:
            raise DataError("nothing to validate on: the split has no tokens")
        n = max(1, min(total, tokens // windows.length))
        chosen = [(2 * j + 1) * total // (2 * n) for j in range(n)]
        ids = torch.from_numpy(np.stack([windows[i] for i in chosen]))
        length = ids.shape[1]
        size = model.block_size if 1 < model.block_size < length else None
        generator = seeding.generator("validation masks")
        counts = block_counts(n, length, size or length, generator)
        corrupted, masked = mask_by_count(ids, counts, model.config.mask_id, generator, size)
        size_in_bytes = sum(windows.byte_count(i) for i in chosen)
        if size_in_bytes == 0:
            raise DataError("the validation text stands for no bytes: nothing to divide by")
        return cls(ids, corrupted, masked, counts if size else counts[:, 0], size, size_in_bytes)

    def nats(self, model: Model, rank: int = 0, world: int = 1) -> np.ndarray:
        """NELBO and causal code length of each window, float64 [2, N]; 0 where other processes compute them.

        Windows go through the network in the same groups whatever the number of processes. What the model was not
        trained for is 0; for one that learnt next tokens only both are its code length.
        """
        found = np.zeros((2, len(self.ids)))
        rows = max(1, TOKENS_PER_PASS // self.ids.shape[1])
        for number, start in enumerate(range(0, len(self.ids), rows)):
            if number % world == rank:
                part = slice(start, start + rows)
                if model.trained_causally:
                    found[1, part] = self._causal(model, part)
                found[0, part] = found[1, part] if model.block_size == 1 else self._nelbo(model, part)
        return found

    def _nelbo(self, model: Model, part: slice) -> np.ndarray:
        ids, corrupted, masked, counts = (
            t[part].to(model.device) for t in (self.ids, self.corrupted, self.masked, self.counts)
        )
        if self.size:
            logits = model.block_logits(corrupted, ids, self.size, positions=masked)
        else:
            logits = model.logits(corrupted, positions=masked)
        nll = masked_nll(logits, ids, masked).double()
        return nelbo_per_window(nll, counts, self.size).cpu().numpy()

    def _causal(self, model: Model, part: slice) -> np.ndarray:
        ids = self.ids[part].to(model.device)
        every = torch.ones_like(ids, dtype=torch.bool)
        logits = model.logits(shift_right(ids, model.config.mask_id), block_size=1, positions=every)
        return masked_nll(logits, ids, every).double().sum(dim=1).cpu().numpy()


@dataclass(frozen=True)
class Validated:
    """Figures of one validation, in bits per byte. tokens: how many were scored.

    causal_bpb: None where next tokens were not learnt. objective_bpb: what checkpoints are ranked by, the mean of both
    figures with the weights that training gives them (the causal share).
    """

    step: int
    nelbo_bpb: float
    causal_bpb: float | None
    objective_bpb: float
    tokens: int

    def figures(self) -> dict[str, float | None]:
        """Both figures by their names in metrics.jsonl."""
        return {"val_nelbo_bpb": self.nelbo_bpb, "val_causal_bpb": self.causal_bpb}

    def row(self) -> dict[str, Any]:
        """As metrics.jsonl holds it."""
        return {**self.figures(), "val_tokens": self.tokens}


class Validation(Listener):
    """Says when a validation is due, makes it, and remembers the best.

    Every process has one; all come to the same figures. history: the validations of the run so far, oldest first.
    stream: None where there is no validation text; then none is ever due. note: takes a line for train.log.
    from_model: whether the run begins with a model's weights; then its first step is followed by a validation, so that
    the best checkpoint is hardly worse than that model.
    """

    def __init__(
        self,
        trainer: Trainer,
        stream: TokenStream | None,
        history: Sequence[Validated],
        note: Callable[[str], None],
        from_model: bool = False,
    ) -> None:
        self.trainer, self.stream, self.note, self.from_model = trainer, stream, note, from_model
        config = trainer.config
        with torch.device("meta"):
            network = Denoiser(trainer.network.config)
        # No copy: the average is updated in place, and this network reads it where it is.
        network.load_state_dict(trainer.average.average, assign=True)
        tokenizer = trainer.loader.stream.tokenizer
        self.model = Model(network.config, tokenizer, network.eval(), {"train": to_dict(config)})
        self.history = list(history)
        self.drawn: ValidationSet | None = None
        self.spent = self.longest = 0.0
        self.periods = self._periods(trainer.seconds)

    @property
    def best(self) -> Validated | None:
        """The validation with the lowest `objective_bpb`, the earliest of equal ones."""
        return min(self.history, key=lambda v: (v.objective_bpb, v.step), default=None)

    @property
    def gave_up(self) -> bool:
        """Whether the last `patience` validations were all no better than the best before them."""
        patience, best = self.trainer.config.patience, self.best
        if not patience or best is None:
            return False
        return sum(v.step > best.step for v in self.history) >= patience

    def due_after_next_step(self, seconds: float) -> bool:
        """Whether the step that comes next is to be followed by a validation. Of the first process the word counts.

        seconds: of training so far. A run counted by steps validates at the same steps whatever the clock says.
        """
        config = self.trainer.config
        if self.stream is None or config.val_every < 0:
            return False
        if self.from_model and self.trainer.step == 0:
            return True
        if config.steps:
            step = self.trainer.step + 1
            every = Fraction(config.val_every) if config.val_every else Fraction(config.steps, VALIDATIONS)
            return step // every > (step - 1) // every or step == config.steps
        before, self.periods = self.periods, self._periods(seconds)
        if config.val_every == 0 and self.spent + 2 * self.longest > MOST_TIME * config.minutes * 60:
            return False  # the last validation, at the run's end, must find its time too
        return self.periods > before

    def _periods(self, seconds: float) -> int:
        config = self.trainer.config
        return int(seconds / 60 / (config.val_every or config.minutes / VALIDATIONS)) if config.minutes else 0

    def on_step(self, step: Step) -> None:
        if step.validate:
            self._tell(step)

    def on_end(self, step: Step) -> None:
        wanted = self.stream is not None and self.trainer.config.val_every >= 0 and self.trainer.step > 0
        if wanted and not (self.history and self.history[-1].step == self.trainer.step):
            self._tell(step)

    def _tell(self, step: Step) -> None:
        before = self.best
        made = self.validate(step.progress)
        step.validation = made.row()
        step.better = before is None or made.objective_bpb < before.objective_bpb
        figures = ", ".join(f"{name} {value:.4f}" for name, value in made.figures().items() if value is not None)
        self.note(f"validation at step {made.step}: {figures}{', the best so far' if step.better else ''}")

    def tokens(self, progress: float) -> int:
        """How much text to score: as asked, or as before, or what takes about 2% of a run that is so far now."""
        config = self.trainer.config
        if config.val_tokens or self.history:
            return config.val_tokens or self.history[-1].tokens
        per_step = config.batch * self.trainer.network.config.sequence_length
        planned = config.steps or self.trainer.step / max(progress, 1e-9)
        passes = 1 if self.model.block_size == 1 or not self.model.trained_causally else 2
        least = FEWEST_WINDOWS * self.model.config.sequence_length
        return max(least, min(MOST_TOKENS, int(planned * per_step * TEXT_SHARE / VALIDATIONS / passes)))

    def validate(self, progress: float) -> Validated:
        """Score the averaged weights as they are now. All processes must call it together."""
        started = time.perf_counter()
        trainer, config = self.trainer, self.trainer.config
        if self.drawn is None:
            assert self.stream is not None
            self.drawn = ValidationSet.draw(self.stream, self.model, self.tokens(progress))
        half = trainer.device.type == "cuda" and config.dtype == "bfloat16"
        with torch.autocast(trainer.device.type, torch.bfloat16, enabled=half):
            nats = self.drawn.nats(self.model, trainer.rank, trainer.world)
        if trainer.world > 1:  # each window's figure from one process, and zeros from the others
            shared = torch.from_numpy(nats).to(trainer.device if trainer.device.type == "cuda" else "cpu")
            dist.all_reduce(shared)
            nats = shared.cpu().numpy()
        nelbo, causal = (float(part.sum()) / self.drawn.bytes / math.log(2) for part in nats)
        made = validated(config, trainer.step, nelbo, causal if self.model.trained_causally else None,
                         self.drawn.ids.numel())  # fmt: skip
        self.history.append(made)
        took = time.perf_counter() - started
        self.spent, self.longest = self.spent + took, max(self.longest, took)
        return made


def validated(config: TrainConfig, step: int, nelbo: float, causal: float | None, tokens: int) -> Validated:
    """The figures with the mean that checkpoints are ranked by."""
    share = 0.0 if causal is None else config.causal_share
    return Validated(step, nelbo, causal, (1 - share) * nelbo + share * (causal or 0.0), tokens)


def past_validations(rows: Sequence[dict[str, Any]], config: TrainConfig) -> list[Validated]:
    """The validations that rows of metrics.jsonl tell of, oldest first."""
    return [
        validated(config, row["step"], row["val_nelbo_bpb"], row.get("val_causal_bpb"), row["val_tokens"])
        for row in rows
        if isinstance(row.get("val_nelbo_bpb"), float) and isinstance(row.get("val_tokens"), int)
    ]
