"""What suits a text and a length of training: `--preset auto`, by tables that benchmarks made.

Knows counts of tokens and about how fast a device is; nothing of losses, steps or files.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from mezzotint.config import ModelConfig, Preset, TrainConfig, preset

HEAD_WIDTH = 64
"""Of the heads of every size whose width it divides; others have two."""


def sized(base: ModelConfig, layers: int, width: int, vocab_size: int) -> ModelConfig:
    """`base` with another size. Where all of its layers add the value embedding, all do; else as many as did, if there are."""
    heads = width // HEAD_WIDTH if width % HEAD_WIDTH == 0 else 2
    late = layers if base.value_embedding_layers >= base.layers else min(base.value_embedding_layers, layers)
    return dataclasses.replace(
        base,
        vocab_size=vocab_size,
        layers=layers,
        width=width,
        heads=heads,
        kv_heads=heads,
        value_embedding_layers=late,
    )


@dataclass(frozen=True)
class Shape:
    """A size of network, and from how many tokens read on it is the best one."""

    layers: int
    width: int
    least_tokens: float

    def parameters(self, vocab_size: int) -> int:
        """Learned numbers, but for some gains: matrices, token embedding and value embedding."""
        value_width = preset("small").model.value_embedding_width
        embeddings = (vocab_size + 1) * (self.width + value_width) + value_width * self.width
        return 12 * self.layers * self.width**2 + embeddings


SHAPES = (
    Shape(3, 128, 0),
    Shape(5, 192, 12e6),
    Shape(6, 256, 35e6),
    Shape(6, 384, 75e6),
)
"""From small to large. The first two are as good as each other after 20 minutes by the clock (LOG.md, "narrower"); the others
come in where, for the same parameters times tokens, the law of `records/2026-11-27_scaling` has them equal to the one before."""
PRODUCTS_A_SECOND = {"cpu": 2.5e10, "cuda": 1.5e13}
"""Parameters times tokens, where a run is counted by minutes: two cores, and one H100. Of a vocabulary only the entries count that a
step's softmax is over."""
GPU_BATCH = 64
"""Windows a step on CUDA, which fewer do not keep busy; elsewhere the preset's."""
READ_OFTEN = 15.0
"""How often a text is read before dropout pays: at 11 readings its gain is that of the time it takes, at 43 it is far more
(LOG.md, "read many times")."""
DROPOUT = 0.1
MOST_READINGS, MOST_TOKENS = 20.0, 2_000_000
"""How often a text is worth reading, or how many tokens where that is more: longer runs were best after 17 readings, and no better there
than runs that ended with their warm-down by then (LOG.md, "how often a text is worth reading"). With 16 windows a step: not for GPU_BATCH,
of which so many readings would be few steps."""


def automatic(
    text_tokens: int, vocab_size: int, train: TrainConfig, device: str = "cpu", batch: int | None = None
) -> Preset:
    """The recipe of `small` in the size that suits a run's length, with dropout where the text is read often.

    text_tokens: of the training text; 0: unknown. train: how long the run is, in steps or minutes. device: its type, as of
    torch. batch: windows a step; None: what suits the device. What is returned has steps where the minutes, by what is known
    of the device, are for far more readings than MOST_READINGS.
    """
    base = preset("small")
    batch = batch or (GPU_BATCH if device == "cuda" else base.train.batch)
    # On CUDA the output layer is little of a step, and a sampled softmax was not tried.
    sampled = 0.0 if device == "cuda" else base.train.sampled_share
    rate = PRODUCTS_A_SECOND.get(device, PRODUCTS_A_SECOND["cpu"])

    def read(shape: Shape) -> float:
        """Tokens that the run reads with this shape."""
        if train.steps:
            return float(train.steps * batch * base.model.sequence_length)
        entries = min(vocab_size, base.train.sampled_entries)
        each = sampled / shape.parameters(entries) + (1 - sampled) / shape.parameters(vocab_size)
        return 60 * train.minutes * rate * each

    # Minutes are tokens by a guess only: twice as many, so that a slower machine does not take longer than asked.
    most = max(MOST_READINGS * text_tokens, MOST_TOKENS) if text_tokens > 0 else math.inf
    bounded = device != "cuda" and not train.steps and read(SHAPES[0]) >= 2 * most
    shape = [shape for shape in SHAPES if (most if bounded else read(shape)) >= shape.least_tokens][-1]
    often = bounded or read(shape) >= READ_OFTEN * text_tokens > 0
    steps = math.ceil(most / batch / base.model.sequence_length) if bounded else 0
    settings = dataclasses.replace(
        base.train, batch=batch, steps=steps, dropout=DROPOUT if often else 0.0, sampled_share=sampled
    )
    return Preset(sized(base.model, shape.layers, shape.width, vocab_size), settings)
