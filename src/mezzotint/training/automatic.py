"""What suits a text and a length of training: `--preset auto`, by tables that benchmarks made.

Knows counts of tokens and about how fast a device is; nothing of losses, steps or files.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from mezzotint.config import Preset, TrainConfig, preset

HEAD_WIDTH = 64


@dataclass(frozen=True)
class Shape:
    """A size of network, and from how many tokens read on it is the best one. batch: windows a step that suit it."""

    layers: int
    width: int
    least_tokens: float
    batch: int

    def parameters(self, vocab_size: int) -> int:
        """Learned numbers, but for some gains: matrices, token embedding and value embedding."""
        value_width = preset("small").model.value_embedding_width
        embeddings = (vocab_size + 1) * (self.width + value_width) + value_width * self.width
        return 12 * self.layers * self.width**2 + embeddings

    def suited(self, base: Preset, vocab_size: int) -> Preset:
        """`base` with this size."""
        heads = self.width // HEAD_WIDTH
        model = dataclasses.replace(
            base.model, vocab_size=vocab_size, layers=self.layers, width=self.width, heads=heads, kv_heads=heads,
            value_embedding_layers=self.layers,
        )  # fmt: skip
        return Preset(model, dataclasses.replace(base.train, batch=self.batch))


SHAPES = (
    Shape(3, 128, 0, 16),
    Shape(5, 192, 12e6, 16),
    Shape(6, 256, 60e6, 64),
    Shape(6, 384, 150e6, 64),
)
"""From small to large. Measured: LOG.md, "narrower", and records/2026-11-27_scaling."""
PRODUCTS_A_SECOND = {"cpu": 2.5e10, "cuda": 1.5e13}
"""Parameters times tokens, where a run is counted by minutes: two cores, and one H100 with 64 windows a step."""
READ_OFTEN = 15.0
"""How often a text is read before dropout pays."""
DROPOUT = 0.1


def tokens_read(shape: Shape, vocab_size: int, train: TrainConfig, device: str) -> float:
    """Tokens that a run of this shape reads, by its steps or, about, by its minutes. device: `cpu`, `cuda` or `mps`."""
    if train.steps:
        return float(train.steps * shape.batch * preset("small").model.sequence_length)
    rate = PRODUCTS_A_SECOND.get(device, PRODUCTS_A_SECOND["cpu"])
    return 60 * train.minutes * rate / shape.parameters(vocab_size)


def automatic(text_tokens: int, vocab_size: int, train: TrainConfig, device: str = "cpu") -> Preset:
    """The recipe of `small` in the size that suits a run's length, with dropout where the text is read often.

    text_tokens: of the training text; 0: unknown. train: how long the run is. device: its type, as of torch.
    """
    reads = [(shape, tokens_read(shape, vocab_size, train, device)) for shape in SHAPES]
    shape, read = [(shape, read) for shape, read in reads if read >= shape.least_tokens][-1]
    found = shape.suited(preset("small"), vocab_size)
    often = text_tokens > 0 and read >= READ_OFTEN * text_tokens
    return Preset(found.model, dataclasses.replace(found.train, dropout=DROPOUT if often else 0.0))
