"""Reading prepared folders: shards, streams of tokens, windows, and the bytes that tokens are charged.

Alone owns the denominator of bits per byte. Does not know how shards are written or batches are drawn.
"""

from __future__ import annotations

import bisect
import json
import mmap
import zlib
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from mezzotint.data.tokenizer import Tokenizer
from mezzotint.errors import DataError
from mezzotint.files import refuse_pointer

SHARD_MAGIC, SHARD_VERSION, HEADER_BYTES = 20_240_520, 1, 1024
SHARD_TOKENS = 100_000_000
FORMAT = 1
BLOCK_TOKENS = 1 << 19  # that one checksum covers


def _open_shard(path: Path) -> np.ndarray:
    """A shard's ids, memory-mapped uint16. Raises DataError naming it."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            header = np.frombuffer(file.read(HEADER_BYTES), dtype=np.uint8)
    except OSError as error:
        raise DataError(f"cannot read shard {path}: {error.strerror}") from error
    if len(header) < HEADER_BYTES:
        refuse_pointer(header.tobytes(), path, DataError)
        raise DataError(f"shard {path} is truncated: {size} bytes do not hold a header")
    fields = header.view("<i4")
    if fields[0] != SHARD_MAGIC:
        raise DataError(f"{path} is not a token shard (magic {fields[0]}, expected {SHARD_MAGIC})")
    if fields[1] != SHARD_VERSION:
        raise DataError(f"shard {path} has version {fields[1]}; this program reads version {SHARD_VERSION}")
    tokens = int(fields[2])
    if tokens < 0 or size != HEADER_BYTES + 2 * tokens:
        raise DataError(f"shard {path} is damaged: {size} bytes, its header says {HEADER_BYTES + 2 * tokens}")
    if tokens == 0:
        return np.zeros(0, dtype="<u2")
    ids = np.memmap(path, dtype="<u2", mode="r", offset=HEADER_BYTES, shape=(tokens,))
    if hasattr(mmap, "MADV_RANDOM"):
        # Windows are read in shuffled order; read-ahead would fetch 30 times what is used.
        ids._mmap.madvise(mmap.MADV_RANDOM)  # type: ignore[attr-defined]
    return ids


def checksums(path: Path) -> str:
    """CRC-32 of each BLOCK_TOKENS ids of a shard, 8 hexadecimal digits each. Raises DataError for a damaged shard."""
    ids = _open_shard(path)
    return "".join(f"{zlib.crc32(ids[a : a + BLOCK_TOKENS].tobytes()):08x}" for a in range(0, len(ids), BLOCK_TOKENS))


class TokenStream:
    """The shards of a split as one sequence of ids, memory-mapped. `len` is tokens; `stream[a:b]` is uint16.

    bytes: raw UTF-8 bytes of the split's text where they are known (`bytes_kind` "raw"), else the piece table's sum
    ("pieces"). Ids are checked against the vocabulary, and against their checksums (`sums`: shard -> digits) where there
    are any, as they are first read.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        tokenizer: Tokenizer,
        raw_bytes: int | None = None,
        corrections: np.ndarray | None = None,
        lost: np.ndarray | None = None,
        sums: dict[str, str] | None = None,
    ) -> None:
        self.paths = list(paths)
        self.tokenizer = tokenizer
        self._shards = [_open_shard(path) for path in self.paths]
        self._starts = np.concatenate(([0], np.cumsum([len(s) for s in self._shards]))).astype(np.int64)
        self._raw_bytes = raw_bytes
        self.bytes_kind = "pieces" if raw_bytes is None else "raw"
        self.corrections = np.zeros((0, 2), dtype=np.int64) if corrections is None else corrections
        self._lost = lost
        # Checksums not yet compared, by shard: block -> digits.
        known = [(sums or {}).get(path.name, "") for path in self.paths]
        self._unverified = [{i // 8: digits[i : i + 8] for i in range(0, len(digits), 8)} for digits in known]

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, where: slice) -> np.ndarray:
        start, stop, stride = where.indices(len(self))
        if stride != 1:
            raise ValueError("a stream is read in steps of 1")
        parts = []
        shard = int(np.searchsorted(self._starts, start, side="right")) - 1
        while start < stop:
            base = int(self._starts[shard])
            part = self._read(shard, start - base, min(stop - base, len(self._shards[shard])))
            if len(part) and int(part.max()) >= self.tokenizer.vocab_size:
                raise DataError(
                    f"shard {self.paths[shard]} has id {int(part.max())}, beyond the tokenizer's "
                    f"{self.tokenizer.vocab_size}: it was made with another tokenizer"
                )
            parts.append(part)
            start += len(part)
            shard += 1
        return np.concatenate(parts) if parts else np.zeros(0, dtype=np.uint16)

    def _read(self, shard: int, start: int, stop: int) -> np.ndarray:
        """Ids of one shard: short stretches through the map, long ones by a plain read, which has read-ahead."""
        self._verify(shard, start, stop)
        if stop - start < 1 << 20:
            return np.asarray(self._shards[shard][start:stop])
        path = self.paths[shard]
        try:
            part = np.fromfile(path, dtype="<u2", count=stop - start, offset=HEADER_BYTES + 2 * start)
        except OSError as error:
            raise DataError(f"cannot read shard {path}: {error.strerror}") from error
        if len(part) != stop - start:
            raise DataError(f"shard {path} was cut short while it was read")
        return part

    def _verify(self, shard: int, start: int, stop: int) -> None:
        unverified = self._unverified[shard]
        if not unverified:
            return
        for block in range(start // BLOCK_TOKENS, (stop - 1) // BLOCK_TOKENS + 1):
            digits = unverified.get(block)
            ids = self._shards[shard][block * BLOCK_TOKENS : (block + 1) * BLOCK_TOKENS]
            if digits is not None and f"{zlib.crc32(ids.tobytes()):08x}" != digits:
                raise DataError(f"shard {self.paths[shard]} is damaged: its ids have changed; prepare the data again")
            unverified.pop(block, None)

    def chunks(self, start: int, stop: int, size: int = 1 << 22) -> Iterator[np.ndarray]:
        """Tokens start..stop in consecutive stretches of `size`, uint16; never more than one in memory."""
        for a in range(start, stop, size):
            yield self[a : min(a + size, stop)]

    def count_bytes(self, start: int, stop: int) -> int:
        """Bytes charged to tokens start..stop: the piece table, and what it misses of a document at the document's BOS."""
        total = 0
        previous = int(self[start - 1 : start][0]) if start else None
        for ids in self.chunks(start, stop):
            total += self.tokenizer.sum_bytes(ids, previous)
            previous = int(ids[-1])
        return total + int(_inside(self.corrections, start, stop).sum())

    @cached_property
    def _silent(self) -> np.ndarray:
        """bool [V]: ids but BOS that stand for no text."""
        silent = np.array([not raw for raw in self.tokenizer.raw])
        silent[self.tokenizer.bos_id] = False
        return silent

    @property
    def known_bytes(self) -> int | None:
        """Bytes of the whole split where nobody has to count them: from data.json."""
        return self._raw_bytes

    def bytes_per_token(self, sample: int = 1 << 20) -> float:
        """Mean bytes of a token: exact where the bytes are known or few, else of about `sample` tokens spread evenly."""
        if self._raw_bytes is not None or len(self) <= sample:
            return self.bytes / max(1, len(self))
        part = sample // 64
        starts = [int(start) for start in np.linspace(0, len(self) - part, 64)]
        return sum(self.count_bytes(start, start + part) for start in starts) / (64 * part)

    @cached_property
    def bytes(self) -> int:
        """Bytes of the whole split."""
        return self._raw_bytes if self._raw_bytes is not None else self.count_bytes(0, len(self))

    def lost_bytes(self, start: int, stop: int) -> int:
        """Bytes of the text that tokens start..stop do not give back, charged to the token that was made from them.

        Counted by `prepare` (see `Tokenizer.lost_bytes`). Where nobody counted them (published shards, data of an earlier
        version): those that the piece table lacks or has too many of, at their document's BOS, and at least one for every
        other token that stands for no text.
        """
        if self._lost is not None:
            return int(_inside(self._lost, start, stop).sum())
        missing = int(np.abs(_inside(self.corrections, start, stop)).sum())
        return max(missing, sum(int(self._silent[ids].sum()) for ids in self.chunks(start, stop)))

    def windows(self, length: int, stride: int | None = None) -> Windows:
        """Consecutive windows of `length` tokens; stride: of which all but the first charge so many."""
        return Windows(self, length, stride)


class Windows(Sequence[np.ndarray]):
    """Consecutive windows that charge each token of a stream once; the last may be shorter. `windows[i]` is int64.

    They do not overlap, or with a `stride` of S < length by length - S tokens: the first charges all its tokens, each
    later one the S that follow, with as much clean context in front of them as makes a whole window.
    """

    def __init__(self, stream: TokenStream, length: int, stride: int | None = None) -> None:
        if length < 1:
            raise DataError(f"a window has at least 1 token, not {length}")
        if stride is not None and not 1 <= stride <= length:
            raise DataError(f"a stride has 1 to {length} tokens, as the window has, not {stride}")
        self.stream, self.length, self.stride = stream, length, stride or length

    @property
    def tokenizer(self) -> Tokenizer:
        """The stream's."""
        return self.stream.tokenizer

    def __len__(self) -> int:
        return min(len(self.stream), 1) + max(0, -(-(len(self.stream) - self.length) // self.stride))

    def _bounds(self, i: int) -> tuple[int, int, int]:
        """First token, first one charged, and end of window i."""
        if not 0 <= i < len(self):
            raise IndexError(i)
        first = 0 if i == 0 else self.length + (i - 1) * self.stride
        stop = min(len(self.stream), first + (self.length if i == 0 else self.stride))
        return (first if self.stride == self.length else max(0, stop - self.length)), first, stop

    def __getitem__(self, i: int) -> np.ndarray:  # type: ignore[override]
        start, _, stop = self._bounds(i)
        return self.stream[start:stop].astype(np.int64)

    def context(self, i: int) -> int:
        """How many of window i's tokens, in front, other windows charge."""
        start, first, _ = self._bounds(i)
        return first - start

    def byte_count(self, i: int) -> int:
        """Bytes charged to window i. Over all windows they sum to the stream's bytes."""
        return self.stream.count_bytes(*self._bounds(i)[1:])

    def bytes_lost(self, i: int) -> int:
        """Bytes of window i's charged text that its tokens do not give back."""
        return self.stream.lost_bytes(*self._bounds(i)[1:])


def _inside(rows: np.ndarray, start: int, stop: int) -> np.ndarray:
    """The bytes of those rows (token, bytes; in order of tokens) whose token is in start..stop."""
    return rows[bisect.bisect_left(rows[:, 0], start) : bisect.bisect_left(rows[:, 0], stop), 1]


def _rows(path: Path, total: int) -> np.ndarray:
    """Rows of (token, bytes) that sum to `total`, int64 [N, 2], memory-mapped. Raises DataError."""
    try:
        with path.open("rb") as file:
            refuse_pointer(file.read(64), path, DataError)
        rows = np.load(path, mmap_mode="r", allow_pickle=False)
        if rows.dtype != np.int64 or rows.shape[1:] != (2,):
            raise ValueError("not rows of two numbers")
        if int(rows[:, 1].sum()) != total:
            raise ValueError("not the rows of this split")
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{path} is missing or damaged; prepare the data again") from error
    return rows


class Dataset:
    """A prepared folder, or a folder of the challenge's published shards with its tokenizer beside or in it."""

    def __init__(self, folder: Path, tokenizer: Tokenizer, description: dict[str, Any]) -> None:
        self.folder, self.tokenizer, self.description = folder, tokenizer, description

    def __repr__(self) -> str:
        counts = "".join(
            f", {self.description[n]['tokens']:,} {n} tokens" for n in ("train", "val") if n in self.description
        )
        return f"Dataset({str(self.folder)!r}{counts})"

    @classmethod
    def open(cls, folder: str | Path) -> Dataset:
        """Raises DataError: no such folder, no tokenizer, another tokenizer than the one that made the shards."""
        folder = Path(folder)
        if not folder.is_dir():
            raise DataError(f"{folder} is not a data folder; make one with `mezzotint prepare`")
        description: dict[str, Any] = {}
        if (folder / "data.json").exists():
            try:
                text = (folder / "data.json").read_bytes()
                refuse_pointer(text, folder / "data.json", DataError)
                description = json.loads(text)
                wanted = description["tokenizer_sha256"]
                if description["format"] != FORMAT:
                    raise DataError(f"{folder} was prepared by another version (format {description['format']})")
                for name in ("train", "val"):
                    if type(description[name].get("lost_bytes", 0)) is not int:
                        raise TypeError("a count that is no number")
                    if any(type(description[name][key]) is not int for key in ("tokens", "bytes", "piece_bytes")):
                        raise TypeError("a count that is no number")
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                raise DataError(f"{folder / 'data.json'} cannot be read; prepare the data again") from error
            tokenizer = Tokenizer.load(folder)
            if tokenizer.sha256 != wanted:
                raise DataError(f"{folder / tokenizer.file_name} is not the tokenizer that made the shards beside it")
        else:
            tokenizer = cls._published_tokenizer(folder)
        return cls(folder, tokenizer, description)

    @staticmethod
    def _published_tokenizer(folder: Path) -> Tokenizer:
        if not any(folder.glob("*.bin")):
            raise DataError(f"{folder} holds no data.json and no shards; make it with `mezzotint prepare`")
        full = folder.resolve()
        wanted = full.name.rpartition("sp")[2]
        for place in (full, full.parent / "tokenizers", full.parent.parent / "tokenizers"):
            models = sorted(place.glob("*.model"))
            exact = [m for m in models if wanted and f"_{wanted}_" in m.name]
            if exact or len(models) == 1:
                return Tokenizer.load((exact or models)[0])
        raise DataError(f"{folder} has shards but no tokenizer; put the .model file that made them beside them")

    def split(self, name: str) -> TokenStream:
        """The `train` or `val` stream. Raises DataError when a shard is missing, foreign or damaged."""
        paths = sorted(self.folder.glob(f"{name}_*.bin")) or sorted(self.folder.glob(f"fineweb_{name}_*.bin"))
        paths = [p for p in paths if p.stem.rpartition("_")[2].isdecimal()]
        if not paths:
            raise DataError(f"{self.folder} has no {name} shards")
        for i, path in enumerate(paths):
            number = int(path.stem.rpartition("_")[2])
            first = int(paths[0].stem.rpartition("_")[2])
            if number != first + i:
                raise DataError(f"{self.folder}: {name} shard {first + i:06d} is missing")
        account = self.description.get(name, {})
        raw = account.get("bytes")
        corrections = lost = None
        if account and account.get("piece_bytes") != raw:
            corrections = _rows(self.folder / f"{name}_corrections.npy", raw - account["piece_bytes"])
        if account.get("lost_bytes"):
            lost = _rows(self.folder / f"{name}_lost.npy", account["lost_bytes"])
        elif account.get("lost_bytes", account.get("not_round_trip")) == 0:
            lost = np.zeros((0, 2), dtype=np.int64)
        stream = TokenStream(paths, self.tokenizer, raw, corrections, lost, self.description.get("checksums"))
        if account and len(stream) != account["tokens"]:
            raise DataError(
                f"{self.folder}: the {name} shards hold {len(stream)} tokens, data.json says {account['tokens']}: "
                "a shard is missing or from elsewhere"
            )
        if self.description.get("bytes_kind") == "pieces":
            stream.bytes_kind = "pieces"
        return stream
