"""One `denoise(canvas)` under generation, prompts, gaps and suffixes: the network asked pass after pass until no mask is left.

A canvas is ids with MASK where text is wanted; what is not MASK is never touched. Which masks are revealed when is
`samplers`' knowledge. Does not know of text, only of ids.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mezzotint import seeding
from mezzotint.config import SamplingConfig, SamplingOptions, parse_attention
from mezzotint.errors import MezzotintError
from mezzotint.network.model import TOKENS_PER_FORWARD, Cache, Model, cacheable, shift_right
from mezzotint.sampling.samplers import SAMPLERS, Canvas

if TYPE_CHECKING:
    from typing_extensions import Unpack


OnStep = Callable[[int, Tensor, Tensor], None]
"""Called after each pass with (pass number from 1, ids [B, T], confidence [B, T]); raise in it to stop."""


@dataclass(frozen=True)
class Denoised:
    """A canvas with its masks revealed.

    ids: int64 [B, T]. confidence: float32 [B, T], the model's probability of each revealed token in the pass that
    revealed it; 1 where the canvas was given, 0 where a mask is left (no target, or behind an end of text).
    nats: float64 [B], -log of the product of those probabilities. forward_passes: how often the network ran (the
    rows of one batch run together).
    """

    ids: Tensor
    confidence: Tensor
    nats: Tensor
    forward_passes: int


class _Network:
    """Answers about canvases of `rows` rows while they are revealed.

    keep: rows are revealed block after block of what the block size says, so that the keys and values of finished blocks
    can be kept and only the current block is computed.
    """

    def __init__(self, model: Model, rows: int, length: int, block_size: int, keep: bool) -> None:
        self.model, self.block_size, self.length = model, block_size, length
        self.size = block_size or length
        self.causal = block_size == 1
        kept = keep and self.size < length and cacheable(model.network)
        self.cache = Cache(model.network, rows, length) if kept else None

    def logits(self, ids: Tensor, positions: Tensor) -> Tensor:
        """Logits [n, V] at `positions` (bool [B, T], n of them), row-major. ids: int64 [B, T]."""
        rows = positions.any(1).nonzero()[:, 0]
        canvas = ids[rows]
        if self.causal:  # next tokens are learnt, and scored, with the input shifted right behind one MASK
            canvas = shift_right(canvas, self.model.config.mask_id)
        with torch.inference_mode():
            if self.cache is None:
                device = self.model.device
                return self.model.logits(
                    canvas.to(device), block_size=self.block_size, positions=positions[rows].to(device)
                )
            return self._cached(self.cache, canvas, rows.tolist(), positions[rows])

    def _cached(self, cache: Cache, canvas: Tensor, rows: list[int], positions: Tensor) -> Tensor:
        """As `logits`, of some rows only. Rows that have come equally far run together."""
        starts = (positions.to(torch.uint8).argmax(1) // self.size * self.size).tolist()
        together: dict[tuple[int, int], list[int]] = {}
        for i, (row, start) in enumerate(zip(rows, starts, strict=True)):
            together.setdefault((cache.kept[row], start), []).append(i)
        counts = positions.sum(1).tolist()
        parts: dict[int, Tensor] = {}
        for (kept, start), members in together.items():
            numbers = [rows[i] for i in members]
            stop = min(start + self.size, self.length)
            final = stop if self.causal else start
            hidden = cache.hidden(
                canvas[members, kept:stop],
                self.size,
                keep=final - kept,
                rows=None if numbers == list(range(len(cache.kept))) else numbers,
            )
            logits = self.model.network.logits(hidden[positions[members, kept:stop].to(hidden.device)])
            parts |= zip(members, logits.split([counts[i] for i in members]), strict=True)
        return torch.cat([parts[i] for i in range(len(rows))])


def denoise(
    model: Model,
    canvas: Tensor,
    *,
    seed: int = 0,
    target: Tensor | None = None,
    allowed: Tensor | None = None,
    only: Mapping[tuple[int, int], Tensor] | None = None,
    stop_id: int | None = None,
    first_row: int = 0,
    attention: str | None = None,
    on_step: OnStep | None = None,
    **settings: Unpack[SamplingOptions],
) -> Denoised:
    """Reveal the masks of a canvas.

    canvas: int64 [B, T], MASK (`model.config.mask_id`) where text is wanted; every other id comes back as it was.
    target: bool [B, T], the masks to reveal (default: all); the others stay, as text that may be anything.
    allowed: bool [V], tokens that may be drawn (default: those that stand for text, `tokenizer.is_text`).
    only: further limits, (row, position) -> bool [V].
    stop_id: a drawn token that ends the text; masks behind the first one stay masked.
    first_row: number of the canvas's first row, for a seed's rows drawn in several calls.
    attention: what a position attends to, `full`, `causal` or `block(k)`. Default: `full`, but for `blocks` on a model that
    was trained in blocks these blocks, from left to right; keys and values of finished ones are then kept.
    on_step(pass, ids, confidence): called after each pass with the canvas and the probability of each drawn id, both [B, T].
    settings: the fields of `SamplingConfig`.

    Decided positions never pass the output layer. Deterministic in (seed, row) up to rounding for any batch.
    Raises ConfigError for bad settings, MezzotintError where no token may stand at a position.
    """
    config = SamplingConfig(**settings)
    mask_id = model.config.mask_id
    ids = canvas.to("cpu", torch.int64).clone()
    length = ids.shape[1]
    if attention is None:
        block_size = model.block_size if config.sampler == "blocks" else 0
    else:
        block_size = parse_attention(attention)
    size = block_size or length
    masked = ids == mask_id
    if target is not None:
        masked &= target.to("cpu")
    permitted: Tensor = model.tokenizer.is_text if allowed is None else allowed
    only = only or {}
    for (_, position), tokens in only.items():
        if not (tokens & permitted).any():
            raise MezzotintError(f"no token may stand at position {position}: loosen the limits on it")
    at_once = max(1, TOKENS_PER_FORWARD // max(1, length))
    # Keys and values are kept for as many rows at a time as a batch has, so not where all are watched together.
    keep = config.sampler == "blocks" and size < length and (on_step is None or len(ids) <= at_once)
    parts: list[Canvas] = []
    running: list[Iterator[None]] = []
    for start in range(0, len(ids), at_once):
        rows = slice(start, min(start + at_once, len(ids)))
        limits = {(r - start, p): t for (r, p), t in only.items() if start <= r < rows.stop}
        generators = [seeding.generator(seed, first_row + r) for r in range(start, rows.stop)]
        part = Canvas(ids[rows], masked[rows], mask_id, config, generators, permitted, limits, stop_id, size)
        parts.append(part)
        running.append(_passes(model, part, block_size, keep))
    if on_step is None:
        passes = max((sum(1 for _ in part) for part in running), default=0)
    else:
        passes = 0
        for _ in itertools.zip_longest(*running):
            passes += 1
            on_step(passes, ids.clone(), torch.cat([part.confidence for part in parts]))
    if not parts:
        return Denoised(ids, torch.zeros(ids.shape), torch.zeros(0, dtype=torch.float64), 0)
    confidence, nats = (torch.cat([getattr(part, name) for part in parts]) for name in ("confidence", "nats"))
    return Denoised(ids, confidence, nats.sum(1), passes)


def _passes(model: Model, canvas: Canvas, block_size: int, keep: bool) -> Iterator[None]:
    """Reveal a canvas; yields after each pass."""
    sampler = SAMPLERS[canvas.config.sampler]
    network: _Network | None = None
    while canvas.masked.any():
        rows, length = canvas.ids.shape
        network = network or _Network(model, rows, length, block_size, keep)
        positions = sampler.select_positions(canvas)
        canvas.commit(positions, network.logits(canvas.ids, positions))
        yield
