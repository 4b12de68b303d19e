"""Models small enough to enumerate: every mask, every order and every text can be written out and summed exactly.

They offer what scoring uses of a `Model` and of `Windows`. The enumerations here are deliberately plain loops that
share no code with the package. Where a test needs a real network, `eighths` gives it weights that are the same on
every machine.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch

from mezzotint.network.model import Model

Network = TypeVar("Network", bound=torch.nn.Module)


@dataclass(frozen=True)
class ToyConfig:
    """The two numbers that scoring reads."""

    vocab_size: int
    sequence_length: int

    @property
    def mask_id(self) -> int:
        return self.vocab_size


class ToyTokenizer:
    """Ids stand for 1 to 3 bytes; id 0 is BOS and stands for none."""

    bos_id = 0

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self.sha256 = "toy"

    def byte_counts(self, ids: np.ndarray, previous: int | None = None) -> np.ndarray:
        ids = np.asarray(ids)
        return np.where(ids == 0, 0, 1 + ids % 3)


def eighths(network: Network, seed: int = 0, most: int = 4) -> Network:
    """The network in float64 with every parameter set to eighths, up to most/8 in size, from a seed.

    What initialisation gives depends on the processor (LAPACK's orthogonal matrices, the vector units' logarithms);
    these are the same numbers everywhere, and exact. Parameters that start at one number each, such as gains of 1 and
    taps of 0, end within an eighth or more of it, never at it. Float64 leaves 1e-12 for sums in another order.
    """
    random = np.random.default_rng(seed)
    with torch.no_grad():
        for p in network.parameters():
            eighths = random.integers(-most, most + 1, p.shape)
            if bool((p == p.flatten()[0]).all()):
                p.add_(torch.tensor(np.where(eighths == 0, 1, eighths) / 8))
            else:
                p.copy_(torch.tensor(eighths / 8))
    return network.double().eval()


class Blocks:
    """`Model.block_logits` by `logits`, a canvas [clean blocks before, noisy block] at a time."""

    block_size, trained_causally = Model.block_size, Model.trained_causally  # what `info` says

    def block_logits(
        self: Any, noisy: torch.Tensor, clean: torch.Tensor, size: int, *, positions: torch.Tensor
    ) -> torch.Tensor:
        rows, calls = self.rows + noisy.shape[0], self.calls + 1
        out = []
        for start in range(0, noisy.shape[1], size):
            canvas = clean.clone()
            canvas[:, start:] = self.config.mask_id
            canvas[:, start : start + size] = noisy[:, start : start + size]
            out.append(self.logits(canvas, block_size=size)[:, start : start + size])
        self.rows, self.calls = rows, calls
        return torch.cat(out, dim=1)[positions]


class TableModel(Blocks):
    """Independent random logits for every canvas: a denoiser whose conditionals agree with nothing.

    Whatever is proved on it holds without any help from the model. float64, so that 1e-9 means something.
    """

    def __init__(self, vocab_size: int, length: int, seed: int = 0, scale: float = 1.5) -> None:
        self.config = ToyConfig(vocab_size, length)
        self.tokenizer = ToyTokenizer(vocab_size)
        self.device = torch.device("cpu")
        self.sha256 = f"toy-{vocab_size}-{length}-{seed}"
        self.seed, self.scale = seed, scale
        self.tables: dict[int, torch.Tensor] = {}
        self.calls = 0
        self.rows = 0
        self.info: dict = {}

    def table(self, length: int) -> torch.Tensor:
        if length not in self.tables:
            v = self.config.vocab_size
            random = np.random.default_rng((self.seed, length))
            values = random.normal(0.0, self.scale, size=((v + 1) ** length, length, v))
            self.tables[length] = torch.from_numpy(values)
        return self.tables[length]

    def logits(self, ids: torch.Tensor, *, block_size: int = 0, positions: torch.Tensor | None = None) -> torch.Tensor:
        self.calls += 1
        self.rows += ids.shape[0]
        base = self.config.vocab_size + 1
        length = ids.shape[1]
        if block_size:
            # What is right of a position's block must not matter: look up with everything after it set to MASK.
            size = block_size
            out = torch.empty(*ids.shape, self.config.vocab_size, dtype=torch.float64)
            for i in range(length):
                seen = ids.clone()
                seen[:, (i // size + 1) * size :] = self.config.mask_id
                out[:, i] = self._lookup(seen, base, length)[:, i]
        else:
            out = self._lookup(ids, base, length)
        return out if positions is None else out[positions]

    def _lookup(self, ids: torch.Tensor, base: int, length: int) -> torch.Tensor:
        key = torch.zeros(ids.shape[0], dtype=torch.long)
        for i in range(length):
            key = key * base + ids[:, i]
        return self.table(length)[key]


class UniformModel(TableModel):
    """Every token equally likely everywhere, at any length."""

    def logits(self, ids: torch.Tensor, *, block_size: int = 0, positions: torch.Tensor | None = None) -> torch.Tensor:
        self.calls += 1
        self.rows += ids.shape[0]
        out = torch.zeros(*ids.shape, self.config.vocab_size, dtype=torch.float64)
        return out if positions is None else out[positions]


class ToyWindows:
    """Windows over a given sequence of ids, the last one may be shorter: (start, first charged, stop) of each, by hand."""

    def __init__(self, ids: np.ndarray, length: int, tokenizer: ToyTokenizer, stride: int | None = None) -> None:
        self.ids = np.asarray(ids, dtype=np.int64)
        self.length = length
        self.tokenizer = tokenizer
        ends = [*range(length, len(self.ids), stride or length), len(self.ids)] if len(self.ids) else []
        firsts = [0, *ends[:-1]]
        self.bounds = [(max(0, b - length) if stride else a, a, b) for a, b in zip(firsts, ends, strict=False)]
        self.lost = 0  # bytes of each window

    def __len__(self) -> int:
        return len(self.bounds)

    def __getitem__(self, i: int) -> np.ndarray:
        start, _, stop = self.bounds[i]
        return self.ids[start:stop]

    def context(self, i: int) -> int:
        return self.bounds[i][1] - self.bounds[i][0]

    def byte_count(self, i: int) -> int:
        return int(self.tokenizer.byte_counts(self[i])[self.context(i) :].sum())

    def bytes_lost(self, i: int) -> int:
        return self.lost


def toy_windows(model: TableModel, tokens: int, seed: int = 0) -> ToyWindows:
    """Random ids in windows of the model's length."""
    ids = np.random.default_rng(seed).integers(0, model.config.vocab_size, size=tokens)
    return ToyWindows(ids, model.config.sequence_length, model.tokenizer)


def conditional_nll(model: TableModel, x: tuple[int, ...], hidden: set[int], i: int) -> float:
    """-log p(x_i | the tokens outside `hidden`), in nats, one canvas at a time."""
    canvas = [model.config.mask_id if j in hidden else x[j] for j in range(len(x))]
    row = model.logits(torch.tensor([canvas]))[0, i].tolist()
    top = max(row)
    return top + math.log(sum(math.exp(value - top) for value in row)) - row[x[i]]


def enumerated_nelbo(model: TableModel, x: tuple[int, ...]) -> float:
    """The NELBO of x in nats by its definition: the mean over every k and every set of k positions."""
    length = len(x)
    total = 0.0
    for k in range(1, length + 1):
        sets = list(itertools.combinations(range(length), k))
        for hidden in sets:
            nll = sum(conditional_nll(model, x, set(hidden), i) for i in hidden)
            total += length / k * nll / len(sets) / length
    return total


def block_nll(model: TableModel, x: tuple[int, ...], hidden: set[int], i: int, size: int) -> float:
    """-log p(x_i | the blocks before i's, the tokens of its own outside `hidden`), in nats."""
    stop = min((i // size + 1) * size, len(x))
    return conditional_nll(model, x, (hidden & set(range(i // size * size, stop))) | set(range(stop, len(x))), i)


def enumerated_block_nelbo(model: TableModel, x: tuple[int, ...], size: int) -> float:
    """The NELBO of x in blocks, in nats: for each block the mean over every count and every set of its positions."""
    total = 0.0
    for start in range(0, len(x), size):
        block = range(start, min(start + size, len(x)))
        for n in range(1, len(block) + 1):
            sets = list(itertools.combinations(block, n))
            for hidden in sets:
                nll = sum(block_nll(model, x, set(hidden), i, size) for i in hidden)
                total += len(block) / n * nll / len(sets) / len(block)
    return total


def order_nll(model: TableModel, x: tuple[int, ...], order: tuple[int, ...]) -> float:
    """Chain-rule NLL of x in nats when its tokens are revealed in `order`."""
    hidden = set(range(len(x)))
    total = 0.0
    for i in order:
        total += conditional_nll(model, x, hidden, i)
        hidden.remove(i)
    return total


def enumerated_orders(model: TableModel, x: tuple[int, ...]) -> float:
    """Mean chain-rule NLL of x in nats over all orders."""
    orders = list(itertools.permutations(range(len(x))))
    return sum(order_nll(model, x, order) for order in orders) / len(orders)


def split_nelbo(model: TableModel, windows: ToyWindows) -> tuple[float, int]:
    """(NELBO in nats, bytes) of all windows, enumerated."""
    nats = sum(enumerated_nelbo(model, tuple(int(t) for t in windows[i])) for i in range(len(windows)))
    return nats, sum(windows.byte_count(i) for i in range(len(windows)))


class ToyText(ToyTokenizer):
    """Lowercase letters, digits and spaces one by one; loses everything else, and runs of spaces, as real ones do."""

    alphabet = " abcdefghijklmnopqrstuvwxyz0123456789\n"
    unk_id = 1

    def __init__(self) -> None:
        super().__init__(2 + len(self.alphabet))

    def encode(self, text: str) -> list[int]:
        while "  " in text:
            text = text.replace("  ", " ")
        return [self.alphabet.find(c) + 2 if c in self.alphabet else self.unk_id for c in text.lower()]

    def decode_bytes(self, ids: list[int]) -> bytes:
        return b"".join(b"?" if i < 2 else self.alphabet[i - 2].encode() for i in ids)

    def decode(self, ids: list[int]) -> str:
        return self.decode_bytes(ids).decode()

    def byte_counts(self, ids: np.ndarray, previous: int | None = None) -> np.ndarray:
        return (np.asarray(ids) != 0).astype(int)


class FoldingText(ToyText):
    """As above, and line ends become spaces and spaces at the ends are lost, as SentencePiece does by default."""

    def encode(self, text: str) -> list[int]:
        return super().encode(" ".join(text.split()))


class NeighbourModel(Blocks):
    """Logits from a position's two neighbours by fixed random tables: quick at any length, float32, position-free."""

    def __init__(self, tokenizer: ToyTokenizer, length: int, seed: int = 0, scale: float = 1.0) -> None:
        self.config = ToyConfig(tokenizer.vocab_size, length)
        self.tokenizer = tokenizer
        self.device = torch.device("cpu")
        self.sha256 = f"{seed:064x}"
        self.info: dict = {}
        v = tokenizer.vocab_size
        random = np.random.default_rng(seed)
        self.left = torch.from_numpy(random.normal(0, scale, (v + 1, v)).astype(np.float32))
        self.right = torch.from_numpy(random.normal(0, scale, (v + 1, v)).astype(np.float32))
        self.rows = self.calls = 0

    def logits(self, ids: torch.Tensor, *, block_size: int = 0, positions: torch.Tensor | None = None) -> torch.Tensor:
        self.rows += ids.shape[0]
        edge = torch.nn.functional.pad(ids, (1, 1), value=self.config.mask_id)
        right = edge[:, 2:].clone()
        if block_size:
            size = block_size
            right[:, size - 1 :: size] = self.config.mask_id
        out = self.left[edge[:, :-2]] + self.right[right]
        return out if positions is None else out[positions]
