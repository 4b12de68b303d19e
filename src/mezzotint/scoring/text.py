"""How likely one text is, for whoever waits for it: work that can be stopped between forward passes.

Another draw of masks than `likelihood.nelbo` of the same text: windows are the text's own, and their masks its rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mezzotint import seeding
from mezzotint.network.model import Model
from mezzotint.objective import mask_by_count, nelbo_per_window, stratified_counts
from mezzotint.scoring.kinds import kind_of
from mezzotint.scoring.plan import MaskedWindow, masked_window_nll

LIKELIHOOD_MASKS = 32
ROWS = 8  # masks of a forward pass


@dataclass(frozen=True)
class TextLikelihood:
    """How likely a text is: the NELBO over random masks, an upper bound on its code length.

    bits_per_byte, stderr: of the whole text, None for a text of nothing. bytes: of its UTF-8. masks: drawn per window.
    bytes_lost: those that its tokens do not give back; where there are any, the figure is no code length.
    """

    bits_per_byte: float | None
    stderr: float | None
    bytes: int
    tokens: int
    masks: int
    bytes_lost: int = 0

    def to_dict(self) -> dict[str, Any]:
        """JSON object."""
        return {
            "bits_per_byte": self.bits_per_byte,
            "stderr": self.stderr,
            "kind": kind_of("nelbo", self.bytes_lost),
            "bytes": self.bytes,
            "tokens": self.tokens,
            "masks": self.masks,
        }


def text_likelihood(
    model: Model, text: str, *, masks: int = LIKELIHOOD_MASKS, seed: int = 0, check: Callable[[], None] | None = None
) -> TextLikelihood:
    """The NELBO of a text in bits per byte of its UTF-8, from `masks` masks of each window, counts stratified.

    BOS is given, not charged: it is not part of the text. Windows do not overlap. The standard error is that of the
    mean over masks. check() is called between forward passes and may raise to stop.
    """
    ids = model.tokenizer.encode(text)
    size = len(text.encode())
    if not ids or not size:
        return TextLikelihood(None, None, size, len(ids), 0)
    window = model.config.sequence_length - 1
    mean = variance = 0.0
    for k, start in enumerate(range(0, len(ids), window)):
        # What is before a window's text is BOS at its start, and else the id before it.
        before = model.tokenizer.bos_id if start == 0 else ids[start - 1]
        part = torch.tensor([before, *ids[start : start + window]])
        generator = seeding.generator(seed, k)
        counts = stratified_counts(masks, len(part) - 1, generator)
        _, masked = mask_by_count(part[1:].expand(masks, -1), counts, model.config.mask_id, generator)
        masked = torch.nn.functional.pad(masked, (1, 0))
        each = nelbo_per_window(_nll(model, part, masked, check or (lambda: None))[:, 1:], counts).numpy()
        mean += float(each.mean())
        variance += float(each.var(ddof=1)) / masks
    scale = 1 / (size * math.log(2))
    lost = int(model.tokenizer.lost_bytes(text).sum())
    return TextLikelihood(mean * scale, float(np.sqrt(variance)) * scale, size, len(ids), masks, lost)


def _nll(model: Model, ids: Tensor, masked: Tensor, check: Callable[[], None]) -> Tensor:
    """Nats at the masked positions of a window, float64 [masks, T]. ids: [T]; masked: bool [masks, T]."""
    rows = []
    found = masked_window_nll(model, (MaskedWindow(ids, row, row) for row in masked), batch=ROWS)
    for number in range(len(masked)):
        if number % ROWS == 0:  # a forward pass comes next
            check()
        rows.append(next(found))
    return torch.from_numpy(np.stack(rows))
