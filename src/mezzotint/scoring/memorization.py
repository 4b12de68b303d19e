"""How much of what a model writes stands in its training text word for word.

The measure: of all strings of so many bytes in sampled texts, the share found verbatim in the training split, beside
the same share for real text that was held out, which says how much of any text stands there anyway. Both are compared
as the tokenizer decodes them, which is how a model sees text. Knows nothing of why a string was repeated.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from mezzotint.config import SamplingOptions
from mezzotint.data.dataset import Dataset, TokenStream
from mezzotint.data.tokenizer import check_same_tokenizer
from mezzotint.errors import ConfigError, DataError
from mezzotint.network.model import Model
from mezzotint.progress import OnProgress, Progress, silent
from mezzotint.sampling.generate import sample

if TYPE_CHECKING:
    from typing_extensions import Unpack


BASE = np.uint64(0x9E3779B97F4A7C15)  # odd, so that its powers have inverses modulo 2**64
CHUNK = 1 << 20


@dataclass(frozen=True)
class Share:
    """Of `strings` strings in `texts` texts, how many stand in a text that was searched.

    stderr: standard error of the share over texts, as the strings of one text are not independent; nan for one text.
    upper95: what the share is at most, with 95% confidence. Where nothing was found, from the texts alone: were a share q
    of all texts to hold such a string, none of n would with probability (1 - q)^n.
    example: the first string that was found, if any.
    """

    texts: int
    strings: int
    found: int
    share: float
    stderr: float
    example: str

    @property
    def upper95(self) -> float:
        """See above; nan where the standard error is unknown."""
        return min(1.0, self.share + 1.645 * self.stderr) if self.found else 1 - 0.05 ** (1 / self.texts)

    def to_dict(self) -> dict[str, Any]:
        """JSON object."""
        known = {name: value if math.isfinite(value) else None
                 for name, value in (("stderr", self.stderr), ("upper95", self.upper95))}  # fmt: skip
        return {**asdict(self), **known}


def _hashes(text: np.ndarray, length: int) -> np.ndarray:
    """A 64-bit hash of every stretch of `length` bytes. text: uint8 [n]. Returns uint64 [n - length + 1]."""
    powers = np.full(len(text) + 1, BASE, dtype=np.uint64)
    powers[0] = 1
    powers = np.cumprod(powers, dtype=np.uint64)
    sums = np.zeros(len(text) + 1, dtype=np.uint64)
    np.cumsum((text.astype(np.uint64) + np.uint64(1)) * powers[:-1], out=sums[1:])
    # The stretch at i is weighted by powers from i on: divide by that power to compare it with others.
    inverse = np.full(max(1, len(text) - length + 1), pow(int(BASE), -1, 1 << 64), dtype=np.uint64)
    inverse[0] = 1
    # Low bits of such a sum see only low bits of bytes; the others see all.
    return ((sums[length:] - sums[:-length]) * np.cumprod(inverse, dtype=np.uint64)) >> np.uint64(16)


def find_strings(strings: Iterable[bytes], text: Iterable[bytes], length: int) -> set[bytes]:
    """Which of `strings`, each of `length` bytes, occur in any of the parts of `text`. Exact: hashes only preselect."""
    wanted = {s for s in strings if len(s) == length}
    if not wanted:
        return set()
    joined = np.frombuffer(b"".join(wanted), dtype=np.uint8).reshape(-1, length)
    powers = np.array([pow(int(BASE), j, 1 << 64) for j in range(length)], dtype=np.uint64)
    keys = np.unique(((joined.astype(np.uint64) + np.uint64(1)) * powers).sum(axis=1, dtype=np.uint64) >> np.uint64(16))
    found: set[bytes] = set()
    for part in text:
        for start in range(0, max(0, len(part) - length + 1), CHUNK):
            piece = part[start : start + CHUNK + length - 1]
            hashes = _hashes(np.frombuffer(piece, dtype=np.uint8), length)
            at = np.minimum(np.searchsorted(keys, hashes), len(keys) - 1)
            for i in np.flatnonzero(keys[at] == hashes).tolist():
                candidate = piece[i : i + length]
                if candidate in wanted:
                    found.add(candidate)
    return found


def stream_text(stream: TokenStream, length: int) -> Iterator[bytes]:
    """A split's text as it decodes, in parts that overlap by more than `length` bytes, a zero byte between documents."""
    bos = stream.tokenizer.bos_id
    for start in range(0, len(stream), CHUNK):
        ids = stream[max(0, start - length) : start + CHUNK]  # a token has at least a byte, but for BOS
        ends = np.flatnonzero(ids == bos).tolist()
        edges = [0, *ends, len(ids)]
        parts = [ids[a:b] for a, b in itertools.pairwise(edges)]
        yield b"\0".join(stream.tokenizer.decode_bytes(part) for part in parts)


def _share(texts: Sequence[bytes], found: set[bytes], length: int) -> Share:
    counts = [(max(0, len(t) - length + 1), sum(s in found for s in _strings(t, length))) for t in texts]
    counts = [(n, hits) for n, hits in counts if n]
    strings, hits = sum(n for n, _ in counts), sum(hits for _, hits in counts)
    share = hits / strings
    # The linear approximation of a ratio's error, with texts as the independent units.
    stderr = math.nan
    if len(counts) > 1:
        residuals = sum((h - share * n) ** 2 for n, h in counts)
        stderr = math.sqrt(residuals * len(counts) / (len(counts) - 1)) / strings
    example = next((s for t in texts for s in _strings(t, length) if s in found), b"")
    return Share(len(counts), strings, hits, share, stderr, example.decode("utf-8", "replace"))


def _strings(text: bytes, length: int) -> Iterator[bytes]:
    return (text[i : i + length] for i in range(len(text) - length + 1))


def held_out_texts(dataset: Dataset, count: int, tokens: int) -> list[bytes]:
    """`count` stretches of at most `tokens` tokens of held-out text, evenly spread; each from one document."""
    stream = dataset.split("val")
    texts = []
    for j in range(count):
        start = (2 * j + 1) * len(stream) // (2 * count)
        ids = stream[start : start + tokens]
        documents = np.split(ids, np.flatnonzero(ids == stream.tokenizer.bos_id))
        texts.append(stream.tokenizer.decode_bytes(max(documents, key=len)))
    return texts


def memorized(
    model: Model,
    dataset: Dataset,
    *,
    samples: int = 32,
    held_out: int = 256,
    tokens: int | None = None,
    length: int = 50,
    seed: int = 0,
    batch: int = 8,
    progress: OnProgress | None = None,
    **settings: Unpack[SamplingOptions],
) -> dict[str, Any]:
    """Shares of the strings of `length` bytes that stand in `dataset`'s training split: of sampled and of held-out text.

    model: writes the texts, `batch` at a time, from `seed` on. samples: texts drawn, each of at most `tokens` tokens (default: the window); held_out: stretches of real text, which
    cost little. progress: told of texts drawn. settings: the fields of `SamplingConfig`. Returns `length`, `seed`, `sampled` and `held_out` (each `Share.to_dict()`), and
    `ratio` of the two shares, None where held-out text has nothing in common with the training text.
    Raises DataError where tokenizers differ or no text is as long as a string, ConfigError for bad numbers.
    """
    tell = progress or silent
    if length < 8 or min(samples, held_out, batch) < 1:
        raise ConfigError("strings have at least 8 bytes, and there is at least 1 text of each kind")
    check_same_tokenizer(model, dataset)
    tokens = tokens or model.config.sequence_length
    written: list[bytes] = []
    for first in range(0, samples, batch):
        tell(Progress(f"sampling: {first} of {samples}", first, samples))
        count = min(batch, samples - first)
        # Every batch draws from a seed of its own, a fixed distance from the others.
        drawn = sample(model, count, max(1, tokens - 1), seed=seed + 1_000_003 * first, **settings)
        written += [text.encode() for text in drawn.texts]
    real = held_out_texts(dataset, held_out, tokens)
    if not any(len(t) >= length for t in written) or not any(len(t) >= length for t in real):
        raise DataError(f"no text of {length} bytes to look for: ask for longer or more samples")
    tell(Progress("searching the training text"))
    wanted = {s for text in (*written, *real) for s in _strings(text, length)}
    found = find_strings(wanted, stream_text(dataset.split("train"), length + 1), length)
    ours, theirs = _share(written, found, length), _share(real, found, length)
    return {
        "length": length,
        "seed": seed,
        "sampled": ours.to_dict(),
        "held_out": theirs.to_dict(),
        "ratio": ours.share / theirs.share if theirs.share else None,
    }
