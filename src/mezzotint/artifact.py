"""The `.mzt` file: pack a model under a byte budget, open one, look into one. FORMAT.md has the bytes.

Sole owner of the 16,000,000 and of the file format. Reading trusts nothing: every length is checked against the
config before memory is taken, and whatever is wrong ends in one `ArtifactError`. No pickle, no code. Knows nothing of
training or of likelihoods.
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import lzma
import math
import struct
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from mezzotint import config as configuration
from mezzotint import entropy, quantize
from mezzotint.config import ModelConfig
from mezzotint.data import Tokenizer, TokenStream
from mezzotint.errors import ArtifactError, MezzotintError
from mezzotint.files import atomic_write
from mezzotint.model import Denoiser, Model, count_parameters
from mezzotint.quantize import Grid
from mezzotint.train import process

BUDGET = 16_000_000  # decimal bytes of artifact and code together: the challenge's limit
MAGIC = b"\x8fMZT\r\n\x1a\n"  # a byte above 127 and both line ends: a text-mode transfer is noticed
VERSION = 1
PREFIX = struct.Struct("<8sHII")  # magic, version, stored header bytes, header bytes
DIGEST = 32

MAX_HEADER = 1 << 20
MAX_TOKENIZER = 16 << 20
MAX_LAYERS = 256
MAX_WIDTH = 1 << 16
FREE_PARAMETERS = 1 << 20  # a file may describe this many parameters plus PARAMETERS_PER_BYTE for each of its bytes,
PARAMETERS_PER_BYTE = 64  # so that a small file cannot ask for much memory
LZMA_MEMORY = 128 << 20
FREE_FIELDS = 1 << 14  # of a tokenizer's protocol buffer, besides 5 for each token
LONGEST = 500  # characters of an error's text
TOKENIZER_FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "lc": 1, "lp": 2, "pb": 2,
                      "dict_size": 1 << 20}]  # fmt: skip

GRID, GRID_COLUMNS, FLOAT16, FLOAT32 = "grid", "grid+columns", "float16", "float32"
CODECS = (GRID, GRID_COLUMNS, FLOAT16, FLOAT32)
RANGE, LZMA = "range", "lzma"

PACK_CODECS = ("mezzotint", "int6", "reference")
TOLERANCE = 0.001  # nats per token of measured cost: 0.0005 bits per byte at 2.7 bytes a token
CALIBRATION_TOKENS = 65_536
CHECK_TOKENS = 8_192  # calibration text on which the cost is measured
BIT_PRICE = 0.03  # lambda over step^2. ln 2 / 6 = 0.116 follows from D = step^2 / 12, but costs 5% more bytes (LOG.md)
PRICED_PASSES = 1
SETTLING = 4  # attempts at most to meet the tolerance
COARSEST = 64.0  # the coarsest step tried for a budget, over the finest

Progress = Callable[[str], None]


# ---------------------------------------------------------------------------------------------------- the tensors


def layout(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a model's tensors, in file order. No memory is taken for them."""
    with torch.device("meta"):
        network = Denoiser(config)
    return {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}


def network_of(config: ModelConfig, values: Mapping[str, np.ndarray]) -> Denoiser:
    """The network with these float32 values, in eval mode; no memory is taken but theirs."""
    with torch.device("meta"):
        network = Denoiser(config)
    network.load_state_dict({name: torch.from_numpy(value) for name, value in values.items()}, assign=True)
    return network.eval().requires_grad_(False)


def _values(tensor: Grid | np.ndarray) -> np.ndarray:
    """What a packed tensor stands for, float32."""
    return tensor.values() if isinstance(tensor, Grid) else tensor.astype(np.float32)


def _codec(tensor: Grid | np.ndarray) -> str:
    if isinstance(tensor, Grid):
        return GRID if tensor.columns is None else GRID_COLUMNS
    return FLOAT16 if tensor.dtype == np.float16 else FLOAT32


@dataclass
class Coded:
    """All of a model as sections of bytes, and what is known of their sizes."""

    header: dict[str, Any]
    sections: list[bytes]
    code_bits: float
    codes: int


def _banks(tensors: Mapping[str, Grid | np.ndarray]) -> list[list[str]]:
    """Which quantized tensors share probability tables: embeddings (wide alphabets) and matrices form one bank each."""
    names = [name for name, tensor in tensors.items() if isinstance(tensor, Grid)]
    groups = [[n for n in names if n.endswith("embedding.weight") == embedding] for embedding in (True, False)]
    return [group for group in groups if group]


def _encode_range(
    tensors: Mapping[str, Grid | np.ndarray], start: dict[str, entropy.Classes] | None, rounds: int
) -> tuple[dict[str, Any], list[bytes], dict[str, entropy.Classes], float]:
    """Range-code tensors: (header entries, sections, the classes found, ideal bits of the codes)."""
    sections: list[bytes] = []
    streams: dict[str, tuple[int, bytes]] = {}
    found: dict[str, entropy.Classes] = {}
    bits = 0.0
    for number, names in enumerate(_banks(tensors)):
        grids = [tensors[name] for name in names]
        planes = [grid.codes for grid in grids if isinstance(grid, Grid)]
        begin = [start[name] for name in names] if start is not None else None
        bank, classes = entropy.fit(planes, rounds=rounds, start=begin)
        encoder = entropy.Encoder()
        bank.write(encoder)
        sections.append(encoder.finish())
        for name, grid, item in zip(names, grids, classes, strict=True):
            assert isinstance(grid, Grid)
            encoder = entropy.Encoder()
            entropy.write_words(encoder, grid.rows.view(np.uint16))
            if grid.columns is not None:
                entropy.write_words(encoder, grid.columns.view(np.uint16))
            entropy.write_plane(encoder, grid.codes, item, bank)
            streams[name] = number, encoder.finish()
            found[name] = item
            bits += entropy.plane_bits(grid.codes, item, bank)
    table = []
    bank_sizes = [len(section) for section in sections]
    for name, tensor in tensors.items():
        codec = _codec(tensor)
        if isinstance(tensor, Grid):
            bank_number, data = streams[name]
        elif codec == FLOAT16:
            encoder = entropy.Encoder()
            entropy.write_words(encoder, tensor.ravel().view(np.uint16))
            bank_number, data = -1, encoder.finish()
        else:
            bank_number, data = -1, tensor.astype("<f4").tobytes()
        table.append([name, codec, bank_number, len(data)])
        sections.append(data)
    return {"coding": RANGE, "banks": bank_sizes, "tensors": table}, sections, found, bits


def _raw_parts(tensor: Grid | np.ndarray) -> list[bytes]:
    if isinstance(tensor, Grid):
        scales = [tensor.rows] if tensor.columns is None else [tensor.rows, tensor.columns]
        return [s.astype("<f2").tobytes() for s in scales] + [tensor.codes.astype(np.int8).tobytes()]
    return [tensor.astype("<f2" if tensor.dtype == np.float16 else "<f4").tobytes()]


def _encode_lzma(tensors: Mapping[str, Grid | np.ndarray]) -> tuple[dict[str, Any], list[bytes]]:
    """The reference's coding: int8 codes and scales of all tensors in one LZMA stream of preset 9."""
    parts = {name: b"".join(_raw_parts(tensor)) for name, tensor in tensors.items()}
    data = lzma.compress(b"".join(parts.values()), format=lzma.FORMAT_XZ, preset=9)
    table = [[name, _codec(tensors[name]), -1, len(part)] for name, part in parts.items()]
    return {"coding": LZMA, "banks": [], "tensors": table, "stored": len(data)}, [data]


class _Writer:
    """Turns packed tensors of one model into file bytes, remembering what carries over between attempts."""

    def __init__(self, model: Model, coding: str) -> None:
        self.model = model
        self.coding = coding
        self.classes: dict[str, entropy.Classes] | None = None
        self.code_bits = 0.0
        raw = model.tokenizer.serialized
        self.tokenizer = lzma.compress(raw, format=lzma.FORMAT_RAW, filters=TOKENIZER_FILTERS)

    def write(self, tensors: Mapping[str, Grid | np.ndarray]) -> bytes:
        """The whole file."""
        if self.coding == RANGE:
            # Later attempts differ little from the first: two rounds from its classes settle.
            rounds = 4 if self.classes is None else 2
            entries, sections, self.classes, self.code_bits = _encode_range(tensors, self.classes, rounds)
        else:
            entries, sections = _encode_lzma(tensors)
            self.code_bits = 8.0 * len(sections[0])
        header = {
            "config": configuration.to_dict(self.model.config),
            "info": self.model.info,
            "tokenizer": [len(self.tokenizer), len(self.model.tokenizer.serialized)],
            **entries,
        }
        text = json.dumps(header, separators=(",", ":"), sort_keys=True, allow_nan=False).encode()
        if len(text) > MAX_HEADER:
            raise ArtifactError(f"the run's description takes {len(text):,} bytes; shorten its info to fit the header")
        stored = zlib.compress(text, 9)
        body = b"".join([PREFIX.pack(MAGIC, VERSION, len(stored), len(text)), stored, self.tokenizer, *sections])
        return body + hashlib.sha256(body).digest()


# -------------------------------------------------------------------------------------------------------- reading


class _Reader:
    """Hands out a file's bytes in order, never more than are there."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self.file = file
        self.left = size

    def take(self, count: Any, what: str) -> bytes:
        if not isinstance(count, int) or isinstance(count, bool) or not 0 <= count <= self.left:
            raise ArtifactError(f"damaged artifact: {what} reaches past the end of the file")
        data = self.file.read(count)
        if len(data) != count:
            raise ArtifactError(f"damaged artifact: the file ends inside {what}")
        self.left -= count
        return data


def _finite(word: str) -> float:
    """A number of a header's JSON: `NaN` and `1e999` are none."""
    value = float(word)
    if not math.isfinite(value):
        raise ValueError("a number is not finite")
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of a header's JSON."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name occurs twice in an object")
    return found


@dataclass
class Opened:
    """Everything read from a file."""

    config: ModelConfig
    info: dict[str, Any]
    tokenizer: Tokenizer
    values: dict[str, np.ndarray]
    table: list[dict[str, Any]]
    sections: dict[str, int]
    sha256: str
    size: int


def _read(path: Path, keep_values: bool = True) -> Opened:
    path = Path(path)
    try:
        if not path.is_file():
            raise ArtifactError(f"{path}: no such artifact; `mezzotint pack` writes one")
        with path.open("rb") as file:
            return _read_file(path, file, keep_values)
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be read ({error.strerror or error})") from error
    except MemoryError as error:
        raise ArtifactError(f"{path}: cannot be read (its model needs more memory than there is)") from error
    except ArtifactError as error:
        if str(error).startswith(str(path)):
            raise
        text = str(error)  # may quote the file
        raise ArtifactError(f"{path}: {text if len(text) <= LONGEST else text[:LONGEST] + '...'}") from error


def _read_file(path: Path, file: BinaryIO, keep_values: bool) -> Opened:
    start = file.read(PREFIX.size)
    if len(start) < PREFIX.size or start[:8] != MAGIC:
        raise ArtifactError("not a Mezzotint artifact (wrong first bytes)")
    _, version, stored, length = PREFIX.unpack(start)
    if version > VERSION:
        raise ArtifactError(f"format version {version} is newer than {VERSION}, the newest known: upgrade Mezzotint")
    if version != VERSION:
        raise ArtifactError(f"damaged artifact: there is no format version {version}")
    size = path.stat().st_size
    if size < PREFIX.size + DIGEST:
        raise ArtifactError("damaged artifact: the file is cut short")
    digest, whole = hashlib.sha256(start), hashlib.sha256(start)
    left = size - PREFIX.size - DIGEST
    while left:
        chunk = file.read(min(left, 1 << 20))
        if not chunk:
            raise ArtifactError("damaged artifact: the file is cut short")
        digest.update(chunk)
        whole.update(chunk)
        left -= len(chunk)
    end = file.read(DIGEST)
    whole.update(end)
    if end != digest.digest():
        raise ArtifactError("damaged artifact: the checksum does not match; fetch or pack it again")

    file.seek(PREFIX.size)
    reader = _Reader(file, size - PREFIX.size - DIGEST)
    header = _header(reader.take(stored, "the header"), length)
    config = checked_config(header, size)
    info = header["info"]
    if not isinstance(info, dict):
        raise ArtifactError("damaged artifact: info is not an object")
    tokenizer = _tokenizer(reader, header, config)
    sections = {"prefix and digest": PREFIX.size + DIGEST, "header": stored, "tokenizer": header["tokenizer"][0]}
    values: dict[str, np.ndarray] = {}
    table: list[dict[str, Any]] = []
    for name, shape, codec, count, array in _tensors(reader, header, config, sections):
        # No array of the tensor's size is made for these checks.
        if not (np.isfinite(array.min(initial=0)) and np.isfinite(array.max(initial=0))):
            raise ArtifactError(f"damaged artifact: {name} holds numbers that are not finite")
        table.append({
            "name": name, "shape": list(shape), "codec": codec, "bytes": count,
            "bits_per_weight": 8 * count / max(1, array.size), "zeros": (array.size - np.count_nonzero(array)) / max(1, array.size),
        })  # fmt: skip
        if keep_values:
            values[name] = array
    if reader.left:
        raise ArtifactError(f"damaged artifact: {reader.left:,} bytes too many")
    return Opened(config, info, tokenizer, values, table, sections, whole.hexdigest(), size)


def _header(stored: bytes, length: int) -> dict[str, Any]:
    if length > MAX_HEADER:
        raise ArtifactError(f"damaged artifact: a header of {length:,} bytes")
    try:
        inflater = zlib.decompressobj()
        text = inflater.decompress(stored, length + 1)
        if len(text) != length or not inflater.eof or inflater.unused_data:
            raise ValueError("wrong length")
        header = json.loads(text, parse_constant=_finite, parse_float=_finite, object_pairs_hook=_object)
    except (zlib.error, ValueError, RecursionError) as error:
        raise ArtifactError(f"damaged artifact: the header cannot be read ({error})") from error
    known = {"config", "info", "tokenizer", "coding", "banks", "tensors"}
    if not isinstance(header, dict) or not known <= header.keys() <= known | {"stored"}:
        raise ArtifactError("damaged artifact: the header has the wrong fields")
    return header


def checked_config(header: dict[str, Any], size: int) -> ModelConfig:
    """The config in `header`, if a file of `size` bytes can be a model of it. Raises ArtifactError."""
    try:
        config = configuration.from_dict(ModelConfig, header["config"])
        wide = max(config.width, config.heads * 2, config.mlp_width, config.bigram_width, config.value_embedding_width)
        if config.layers > MAX_LAYERS or wide > MAX_WIDTH or config.value_embedding_layers > MAX_LAYERS:
            raise ArtifactError(f"damaged artifact: more than {MAX_LAYERS} layers or {MAX_WIDTH:,} channels")
        if config.bigram_buckets > 1 << 24 or config.sequence_length > 1 << 24:
            raise ArtifactError("damaged artifact: the config's sizes are out of bounds")
        with torch.device("meta"):
            parameters = count_parameters(Denoiser(config))
    except ArtifactError:
        raise
    except MezzotintError as error:
        raise ArtifactError(f"damaged artifact: {error}") from error
    except Exception as error:  # the config's own arithmetic on hostile numbers
        raise ArtifactError(f"damaged artifact: its config does not make a model ({type(error).__name__})") from error
    if parameters > FREE_PARAMETERS + PARAMETERS_PER_BYTE * size:
        raise ArtifactError(f"damaged artifact: {parameters:,} parameters in {size:,} bytes")
    return config


def _tokenizer(reader: _Reader, header: dict[str, Any], config: ModelConfig) -> Tokenizer:
    sizes = header["tokenizer"]
    if not (isinstance(sizes, list) and len(sizes) == 2 and all(type(n) is int for n in sizes)):
        raise ArtifactError("damaged artifact: the tokenizer's sizes")
    stored, length = reader.take(sizes[0], "the tokenizer"), sizes[1]
    if not 0 < length <= MAX_TOKENIZER:
        raise ArtifactError(f"damaged artifact: a tokenizer of {length:,} bytes")
    try:
        inflater = lzma.LZMADecompressor(format=lzma.FORMAT_RAW, filters=TOKENIZER_FILTERS)
        raw = inflater.decompress(stored, length + 1)
        if len(raw) != length or not inflater.eof or inflater.unused_data:
            raise ArtifactError("damaged artifact: the tokenizer has the wrong length")
        if _fields(raw, most := FREE_FIELDS + 5 * config.vocab_size) > most:
            raise ArtifactError(f"damaged artifact: a tokenizer of more than {config.vocab_size:,} tokens")
        tokenizer = Tokenizer(raw)
        if tokenizer.vocab_size != config.vocab_size:
            raise ArtifactError(
                f"damaged artifact: a tokenizer of {tokenizer.vocab_size:,} tokens in a model of {config.vocab_size:,}"
            )
    except ArtifactError:
        raise
    except Exception as error:
        raise ArtifactError(f"damaged artifact: the tokenizer cannot be read ({error})") from error
    return tokenizer


def _fields(raw: bytes, most: int) -> int:
    """Fields of the protocol buffer `raw` and of the messages right in it; counting ends above `most`.

    Even an empty field costs its parser some 60 bytes of memory, so that 16 MiB of them would take 600. Raises
    ValueError where a parser would have to give up.
    """
    at = count = 0

    def number(stop: int) -> int:
        nonlocal at
        value = 0
        for shift in range(0, 70, 7):
            if at >= stop:
                break
            byte = raw[at]
            at += 1
            value |= (byte & 127) << shift
            if byte < 128:
                return value
        raise ValueError("a number does not end")

    def message(stop: int, outer: bool) -> None:
        nonlocal at, count
        while at < stop and count <= most:
            count += 1
            field, kind = divmod(number(stop), 8)
            if kind == 0:
                number(stop)
                continue
            if kind not in (1, 2, 5):
                raise ValueError("a field of an unknown kind")
            length = number(stop) if kind == 2 else 8 if kind == 1 else 4
            end = at + length
            if end > stop:
                raise ValueError("a field reaches past the end")
            if kind == 2 and outer and field <= 5:  # the messages of a SentencePiece model
                message(end, False)
            at = end

    message(len(raw), True)
    return count


def _tensors(
    reader: _Reader, header: dict[str, Any], config: ModelConfig, sections: dict[str, int]
) -> Iterator[tuple[str, tuple[int, ...], str, int, np.ndarray]]:
    """Every tensor in file order: name, shape, codec, bytes, values."""
    shapes = layout(config)
    table, banks = header["tensors"], header["banks"]
    if not isinstance(table, list) or not isinstance(banks, list) or len(banks) > 16:
        raise ArtifactError("damaged artifact: the tensor table is not a list")
    rows_ok = all(
        isinstance(row, list) and len(row) == 4 and isinstance(row[0], str) and row[1] in CODECS
        and type(row[2]) is int and type(row[3]) is int and row[3] >= 0
        for row in table
    )  # fmt: skip
    if not rows_ok or [row[0] for row in table] != list(shapes):
        raise ArtifactError("damaged artifact: the tensor table does not match the config")
    for name, codec, bank, _ in table:
        banked = codec in (GRID, GRID_COLUMNS) and header["coding"] == RANGE
        if not (0 <= bank < len(banks) if banked else bank == -1):
            raise ArtifactError(f"damaged artifact: {name} has no such table bank")
        if codec in (GRID, GRID_COLUMNS) and len(shapes[name]) != 2:
            raise ArtifactError(f"damaged artifact: {name} is no matrix")
    if header["coding"] == RANGE:
        yield from _range_tensors(reader, shapes, table, banks, sections)
    elif header["coding"] == LZMA:
        yield from _lzma_tensors(reader, shapes, table, header.get("stored"), sections)
    else:
        raise ArtifactError("damaged artifact: an unknown coding")


def _range_tensors(
    reader: _Reader, shapes: dict[str, tuple[int, ...]], table: list[Any], sizes: list[Any], sections: dict[str, int]
) -> Iterator[tuple[str, tuple[int, ...], str, int, np.ndarray]]:
    try:
        banks = []
        for number, size in enumerate(sizes):
            decoder = entropy.Decoder(reader.take(size, "a table bank"))
            banks.append(entropy.Bank.read(decoder))
            decoder.finish()
            sections[f"tables {number}"] = size
    except entropy.StreamError as error:
        raise ArtifactError(f"damaged artifact: {error} (in a table bank)") from error
    for name, codec, number, count in table:
        shape = shapes[name]
        size = int(np.prod(shape, dtype=np.int64))
        data = reader.take(count, name)
        try:
            if codec == FLOAT32:
                if count != 4 * size:
                    raise entropy.StreamError("the wrong number of bytes")
                values = np.frombuffer(data, dtype="<f4").astype(np.float32).reshape(shape)
            else:
                decoder = entropy.Decoder(data)
                if codec == FLOAT16:
                    words = entropy.read_words(decoder, size)
                    values = words.view(np.float32)  # in place: what is taken beyond the values is a block at a time
                    for start in range(0, size, entropy.BLOCK):
                        part = slice(start, start + entropy.BLOCK)
                        values[part] = _halves(words[part])
                    values = values.reshape(shape)
                else:
                    rows = _halves(entropy.read_words(decoder, shape[0]))
                    columns = _halves(entropy.read_words(decoder, shape[1])) if codec == GRID_COLUMNS else None
                    values = np.empty(shape, dtype=np.float32)
                    for block, codes in entropy.read_blocks(decoder, (shape[0], shape[1]), banks[number]):
                        values[block] = _scaled(codes, rows[block], columns)
                decoder.finish()
        except entropy.StreamError as error:
            raise ArtifactError(f"damaged artifact: {error} (in {name})") from error
        yield name, shape, codec, count, values


def _halves(words: np.ndarray) -> np.ndarray:
    """Float16 numbers of bit patterns."""
    return words.astype(np.uint16).view(np.float16)


def _scaled(codes: np.ndarray, rows: np.ndarray, columns: np.ndarray | None) -> np.ndarray:
    """`Grid.values` of scales that may be anything; what is not finite is refused later."""
    with np.errstate(invalid="ignore", over="ignore"):
        return Grid(codes, rows, columns).values()


def _lzma_tensors(
    reader: _Reader, shapes: dict[str, tuple[int, ...]], table: list[Any], stored: Any, sections: dict[str, int]
) -> Iterator[tuple[str, tuple[int, ...], str, int, np.ndarray]]:
    sections["LZMA stream"] = stored
    data = reader.take(stored, "the LZMA stream")
    offset = 0

    try:
        inflater = lzma.LZMADecompressor(format=lzma.FORMAT_XZ, memlimit=LZMA_MEMORY)

        def take(dtype: str, count: int) -> np.ndarray:
            nonlocal data
            length = count * np.dtype(dtype).itemsize
            parts = bytearray()
            while len(parts) < length:
                piece = inflater.decompress(data, length - len(parts))
                data = b""
                if not piece and (inflater.eof or inflater.needs_input):
                    raise ArtifactError("damaged artifact: the LZMA stream is too short")
                parts += piece
            nonlocal offset
            offset += length
            return np.frombuffer(parts, dtype=dtype)

        for name, codec, _, count in table:
            shape, before = shapes[name], offset
            values = np.empty(shape, dtype=np.float32)
            if codec in (GRID, GRID_COLUMNS):
                rows = take("<f2", shape[0])
                columns = take("<f2", shape[1]) if codec == GRID_COLUMNS else None
                step = max(1, entropy.BLOCK // max(1, shape[1]))
                for start in range(0, shape[0], step):
                    part = values[start : start + step]
                    codes = take("i1", part.size).reshape(part.shape)
                    part[:] = _scaled(codes, rows[start : start + step], columns)
            else:
                flat = values.reshape(-1)
                for start in range(0, len(flat), entropy.BLOCK):
                    part = flat[start : start + entropy.BLOCK]
                    part[:] = take("<f2" if codec == FLOAT16 else "<f4", len(part))
            if offset - before != count:
                raise ArtifactError(f"damaged artifact: {name} has the wrong number of bytes")
            yield name, shape, codec, count, values
        rest = b"" if inflater.eof else inflater.decompress(data, 1)
        if rest or not inflater.eof or inflater.unused_data:
            raise ArtifactError("damaged artifact: the LZMA stream is too long")
    except (lzma.LZMAError, EOFError) as error:
        raise ArtifactError(f"damaged artifact: the LZMA stream does not decode ({error})") from error


def open_artifact(path: Path | str) -> Model:
    """The model in a `.mzt` file, on the CPU, in float32, exactly as it was when packed.

    Raises ArtifactError, whatever the file holds: missing, damaged, hostile, or of a newer version.
    """
    opened = _read(Path(path))
    try:
        network = network_of(opened.config, opened.values)
    except Exception as error:
        raise ArtifactError(f"{path}: damaged artifact: its tensors do not make a model") from error
    return Model(opened.config, opened.tokenizer, network, opened.info, opened.sha256)


def inspect_artifact(path: Path | str) -> dict[str, Any]:
    """What is in a `.mzt` file. Everything is decoded and checked on the way. Raises ArtifactError.

    Keys: `file`, `sha256`, `version`, `bytes`, `parameters`, `bits_per_parameter`, `config`, `info`, `tokenizer`
    (`tokens`, `bytes`, `sha256`), `tensors` (each `name`, `shape`, `codec`, `bytes`, `bits_per_weight`, `zeros`: the
    share of zero weights), `sections` (bytes that are not a tensor's own) and `checks` (name -> true).
    In an artifact of `--codec reference` a tensor's bytes are those before LZMA, which codes all tensors as one.
    """
    opened = _read(Path(path), keep_values=False)
    parameters = sum(int(np.prod(row["shape"], dtype=np.int64)) for row in opened.table)
    return {
        "file": str(path),
        "sha256": opened.sha256,
        "version": VERSION,
        "bytes": opened.size,
        "parameters": parameters,
        "bits_per_parameter": 8 * opened.size / parameters,
        "config": configuration.to_dict(opened.config),
        "info": opened.info,
        "tokenizer": {
            "tokens": opened.tokenizer.vocab_size,
            "bytes": len(opened.tokenizer.serialized),
            "sha256": opened.tokenizer.sha256,
        },
        "tensors": opened.table,
        "sections": opened.sections,
        # Reached only if each of them held; a failure has raised.
        "checks": {"checksum": True, "tokenizer": True, "shapes match config": True, "streams decode": True,
                   "weights finite": True},
    }  # fmt: skip


# -------------------------------------------------------------------------------------------------------- packing


def _floats(value: np.ndarray) -> np.ndarray:
    """Small tensors: float16, or float32 where float16 would overflow."""
    return value.astype(np.float16 if np.abs(value).max(initial=0) <= 65_000 else np.float32)


def _state(model: Model) -> dict[str, np.ndarray]:
    state = {name: t.detach().float().cpu().numpy() for name, t in model.network.state_dict().items()}
    for name, value in state.items():
        if not np.isfinite(value).all():
            raise ArtifactError(f"{name} holds numbers that are not finite: the run has diverged; train it again")
    return state


def calibration_windows(model: Model, calibration: TokenStream | None, tokens: int) -> list[np.ndarray]:
    """About `tokens` tokens of windows spread evenly over a stream. Raises ArtifactError if there is no text."""
    if calibration is None or len(calibration) == 0:
        raise ArtifactError("packing needs the run's training data for calibration; give its folder (random ids would "
                            "make a worse artifact)")  # fmt: skip
    windows = calibration.windows(model.config.sequence_length)
    count = min(len(windows), max(1, tokens // model.config.sequence_length))
    return [np.asarray(windows[int(i)]) for i in np.linspace(0, len(windows) - 1, count)]


def _calibration(
    model: Model, calibration: TokenStream | None, tokens: int
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Windows to quantize by, and windows between them to measure on (the same ones if there is a single window)."""
    windows = calibration_windows(model, calibration, tokens + CHECK_TOKENS)
    every = max(2, (tokens + CHECK_TOKENS) // CHECK_TOKENS)
    check = windows[every // 2 :: every] or windows
    rest = [w for i, w in enumerate(windows) if i % every != every // 2]
    return rest or windows, check


@dataclass(frozen=True)
class _Attempt:
    """One way to pack a model: the file's bytes, what its tensors stand for, and what it took."""

    data: bytes
    tensors: dict[str, Grid | np.ndarray]
    code_bits: float
    pruned: int
    step: float = 0.0


class _Cost:
    """What an attempt costs in likelihood, measured on masked text: nats per token."""

    def __init__(self, model: Model, windows: list[np.ndarray], seed: int) -> None:
        self.model = model
        self.divergence = quantize.Divergence(model, windows, seed + 1)

    def __call__(self, attempt: _Attempt) -> float:
        return self.divergence(_replaced(self.model, attempt))


def _replaced(model: Model, attempt: _Attempt) -> Model:
    """`model` with the weights that the attempt's bytes stand for."""
    network = network_of(model.config, {name: _values(tensor) for name, tensor in attempt.tensors.items()})
    return dataclasses.replace(model, network=network.to(model.device))


class _Rate:
    """Rate-distortion quantization: GPTQ on curvature grids whose roundings pay for their bits. One knob, the step."""

    def __init__(
        self, model: Model, windows: list[np.ndarray], seed: int, tolerance: float, cost: _Cost, say: Progress
    ) -> None:
        say(f"curvature from {sum(map(len, windows)):,} tokens")
        self.curvature = quantize.curvature(model, windows, seed)
        self.state = _state(model)
        self.writer = _Writer(model, RANGE)
        self.tolerance = tolerance
        self.cost = cost
        self.say = say
        weights = sum(v.size for n, v in self.state.items() if n.removesuffix(".weight") in self.curvature)
        # By the curvature. The cost measured has been 1.5 to 12 times as much.
        self.predicted = math.sqrt(24 * tolerance / weights)

    def attempt(self, step: float) -> _Attempt:
        """Pack at one step: plain GPTQ, then GPTQ under the code lengths that the codes before it gave."""
        scales: dict[str, tuple[np.ndarray, np.ndarray, bool]] = {}
        tensors: dict[str, Grid | np.ndarray] = {}
        for name, value in self.state.items():
            module = name.removesuffix(".weight")
            if module in self.curvature:
                scales[name] = quantize.curved_scales(value, self.curvature[module], step, entropy.MAX_MAGNITUDE)
            tensors[name] = _floats(value)
        models: dict[str, tuple[np.ndarray, entropy.Classes]] = {}
        for _ in range(1 + PRICED_PASSES):
            for name, (rows, columns, ascending) in scales.items():
                curvature = self.curvature[name.removesuffix(".weight")]
                price = None
                if models:
                    lengths, classes = models[name]
                    price = quantize.Price(lengths, classes.tables(len(lengths)), curvature.rows, BIT_PRICE * step**2)
                tensors[name] = quantize.gptq(
                    torch.from_numpy(self.state[name]), curvature.inputs, rows, columns,
                    limit=entropy.MAX_MAGNITUDE, price=price, ascending=ascending,
                )  # fmt: skip
            models = {}
            for names in _banks(tensors):
                planes = [grid.codes for name in names if isinstance(grid := tensors[name], Grid)]
                bank, classes_of = entropy.fit(planes)
                lengths = bank.lengths()
                models.update({n: (lengths, c) for n, c in zip(names, classes_of, strict=True)})
        self.writer.classes = {name: classes for name, (_, classes) in models.items()}
        data = self.writer.write(tensors)
        self.say(f"{len(data):,} bytes at step {step:.3g}")
        return _Attempt(data, tensors, self.writer.code_bits, 0, step)

    def settle(self, limit: int | None = None) -> _Attempt:
        """An attempt that costs about the tolerance by measurement; the first larger than `limit` bytes ends the search.

        The cost goes with the square of the step or a little more, so that few attempts do.
        """
        step, best, nearest = self.predicted, None, math.inf
        for _ in range(SETTLING):
            attempt = self.attempt(step)
            if limit is not None and len(attempt.data) > limit:
                return attempt
            ratio = max(self.cost(attempt) / self.tolerance, 1e-9)
            self.say(f"measured cost: {ratio * self.tolerance:.2g} nats per token")
            if abs(math.log(ratio)) < nearest:
                best, nearest = attempt, abs(math.log(ratio))
            if 0.8 <= ratio <= 1.1:
                break
            step *= min(8.0, max(0.125, ratio**-0.5))
        assert best is not None
        return best

    def fit(self, limit: int) -> tuple[_Attempt | None, int]:
        """The finest attempt found of at most `limit` bytes, if any, and the smallest size seen.

        Size falls smoothly with the logarithm of the step, so false position with a bisection every third time gets
        within 0.3% of the limit in few attempts.
        """
        first = self.settle(limit)
        if len(first.data) <= limit:
            return first, len(first.data)
        fine, coarse = 0.0, math.log(COARSEST)
        last = self.attempt(first.step * COARSEST)
        if len(last.data) > limit:
            return None, len(last.data)
        fine_size, best = len(first.data), last
        for number in range(8):
            if limit - len(best.data) <= 0.003 * limit or coarse - fine < 0.002:
                break
            # Logarithms of sizes are closer to straight lines than sizes are.
            top, bottom = math.log(fine_size), math.log(len(best.data))
            share = (top - math.log(limit * 0.9985)) / max(1e-9, top - bottom)
            share = 0.5 if number % 3 == 2 else min(0.97, max(0.03, share))
            middle = fine + (coarse - fine) * share
            tried = self.attempt(first.step * math.exp(middle))
            if len(tried.data) <= limit:
                coarse, best = middle, tried
            else:
                fine, fine_size = middle, len(tried.data)
        return best, len(last.data)


class _Pruned:
    """int6 codes on a row grid, made to fit by zeroing the codes of +-1 whose loss does the least damage."""

    def __init__(self, model: Model, windows: list[np.ndarray], seed: int, codec: str, say: Progress) -> None:
        say(f"Hessians from {sum(map(len, windows)):,} tokens")
        hessians = quantize.calibration_hessians(model, windows, seed)
        self.say = say
        self.tensors: dict[str, Grid | np.ndarray] = {}
        self.where: dict[str, np.ndarray] = {}
        costs = []
        for name, value in _state(model).items():
            hessian = hessians.get(name.removesuffix(".weight"))
            grid, damage = (_int6 if codec == "int6" else _reference)(name, value, hessian)
            self.tensors[name] = grid
            if damage is not None and isinstance(grid, Grid):
                self.where[name] = np.flatnonzero(np.abs(grid.codes).ravel() == 1)
                costs.append(damage.ravel()[self.where[name]])
        self.costs = np.concatenate(costs) if costs else np.zeros(0, dtype=np.float32)
        self.order = np.argsort(self.costs, kind="stable")
        self.writer = _Writer(model, RANGE if codec == "int6" else LZMA)

    def attempt(self, count: int) -> _Attempt:
        """Pack with the `count` cheapest codes of +-1 zeroed."""
        gone = np.zeros(len(self.costs), dtype=bool)
        gone[self.order[:count]] = True
        tensors = dict(self.tensors)
        start = 0
        for name, where in self.where.items():
            stop = start + len(where)
            grid = tensors[name]
            if gone[start:stop].any() and isinstance(grid, Grid):
                codes = grid.codes.copy()
                codes.ravel()[where[gone[start:stop]]] = 0
                tensors[name] = dataclasses.replace(grid, codes=codes)
            start = stop
        data = self.writer.write(tensors)
        self.say(f"{len(data):,} bytes with {count:,} codes of +-1 dropped")
        return _Attempt(data, tensors, self.writer.code_bits, count)

    def fit(self, limit: int) -> tuple[_Attempt | None, int]:
        """About the fewest codes dropped that fit `limit` bytes, if any do, and the smallest size seen.

        Size falls almost linearly with the count, so interpolation safeguarded by bisection takes few attempts.
        """
        first = self.attempt(0)
        if len(first.data) <= limit:
            return first, len(first.data)
        best = self.attempt(len(self.costs))
        smallest = len(best.data)
        if smallest > limit:
            return None, smallest
        low, low_size, high = 0, len(first.data), len(self.costs)
        for number in range(12):
            if high - low <= 1 or limit - len(best.data) <= limit // 2000:
                break
            share = (low_size - limit * 0.9998) / max(1, low_size - len(best.data))
            middle = low + int((high - low) * (min(0.95, max(0.05, share)) if number % 3 < 2 else 0.5))
            tried = self.attempt(min(high - 1, max(low + 1, middle)))
            if len(tried.data) <= limit:
                high, best = tried.pruned, tried
            else:
                low, low_size = tried.pruned, len(tried.data)
        return best, smallest


def _int6(name: str, value: np.ndarray, hessian: torch.Tensor | None) -> tuple[Grid | np.ndarray, np.ndarray | None]:
    """One tensor under int6 GPTQ (int8 embeddings), and what zeroing each entry costs: scale^2 times H's diagonal."""
    if hessian is not None:
        diagonal = hessian.diagonal().numpy()
        weigh = diagonal if diagonal.sum() > 0 else np.ones_like(diagonal)
        rows = quantize.row_scales(value, weigh, quantize.INT6_LIMIT)
        damage = np.square(rows.astype(np.float64))[:, None] * weigh[None, :]
        return quantize.gptq(torch.from_numpy(value), hessian, rows), damage.astype(np.float32)
    if name.endswith("embedding.weight"):
        rows = quantize.row_scales(value, np.ones(value.shape[1]), quantize.INT8_LIMIT)
        return quantize.round_to_grid(value, rows, quantize.INT8_LIMIT), None
    return _floats(value), None


def _reference(
    name: str, value: np.ndarray, hessian: torch.Tensor | None
) -> tuple[Grid | np.ndarray, np.ndarray | None]:
    """One tensor as the seed packs it, and its damage: squared row scale. Hessians are from real text, though."""
    if value.size <= 65_536 or value.ndim != 2:
        return _floats(value), None
    if hessian is not None:
        rows = quantize.percentile_scales(value, quantize.INT6_LIMIT)
        damage = np.broadcast_to(np.square(rows.astype(np.float32))[:, None], value.shape)
        return quantize.gptq(torch.from_numpy(value), hessian, rows), damage
    rows = (np.abs(value).max(axis=1) / quantize.INT8_LIMIT).astype(np.float16)
    return quantize.round_to_grid(value, rows, quantize.INT8_LIMIT), None


def pack(
    model: Model,
    calibration: TokenStream | None,
    out: Path | str,
    *,
    budget: int = BUDGET,
    code: Sequence[Path | str] = (),
    codec: str = "mezzotint",
    tolerance: float = TOLERANCE,
    calibration_tokens: int = CALIBRATION_TOKENS,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Quantize, code and write `model` to `out` so that the file and the `code` files fit `budget` decimal bytes.

    calibration: the training split's tokens; masked text from it gives curvature and Hessians. codec: `mezzotint`
    (rate-distortion GPTQ), `int6` (GPTQ to int6 on a row grid, range-coded, +-1 dropping) or `reference` (the seed's
    quantization and LZMA). tolerance (`mezzotint` only): the cost in nats per token below which bytes are not worth
    spending, so that an artifact need not fill its budget; measured (`quantize.Divergence`) on text between the
    calibration's. The written file is reopened and every weight compared before this returns.

    Returns `artifact_bytes`, `code_bytes`, `total_bytes`, `budget_bytes`, `parameters`, `bits_per_parameter` (of the
    artifact), `pruned_codes`, `entropy_bits_per_code` (ideal code length per quantized weight; for `reference` the
    LZMA stream's), `cost_nats_per_token` (measured as above), `verified`. In a process group all processes share the calibration; the first alone goes on and
    writes, the others return {}. Raises ArtifactError if there is no calibration text, if the budget cannot be met
    (naming the smallest reachable size) or if the file cannot be written; `out` is then untouched.
    """
    say = progress or (lambda _: None)
    out = Path(out)
    if codec not in PACK_CODECS:
        raise ArtifactError(f"unknown codec {codec!r}; known: {', '.join(PACK_CODECS)}")
    if not 0 < tolerance < 10:
        raise ArtifactError(f"tolerance is a small positive number of nats per token, not {tolerance!r}")
    code_bytes = 0
    for item in code:
        if not Path(item).is_file():
            raise ArtifactError(f"{item}: no such code file to count")
        code_bytes += Path(item).stat().st_size
    if not out.parent.is_dir():
        raise ArtifactError(f"{out.parent}: no such folder to write {out.name} to")
    windows, check = _calibration(model, calibration, calibration_tokens)
    cost = _Cost(model, check, seed)
    packer = (
        _Rate(model, windows, seed, tolerance, cost, say)
        if codec == "mezzotint"
        else _Pruned(model, windows, seed, codec, say)
    )
    if process()[0] > 0:
        return {}
    attempt, smallest = packer.fit(budget - code_bytes)
    if attempt is None:
        raise ArtifactError(f"a budget of {budget:,} bytes cannot be met: the smallest reachable size is "
                            f"{smallest + code_bytes:,} bytes ({code_bytes:,} of them code)")  # fmt: skip
    _write_verified(out, attempt.data, attempt.tensors)
    return _report(model, attempt, code_bytes, budget, cost(attempt))


def store(model: Model, out: Path | str) -> dict[str, Any]:
    """Write `model` to `out` as it is, unquantized: every weight in float16 where that is exact, else in float32.

    Returns what `pack` returns. Raises ArtifactError if the file cannot be written; `out` is then untouched.
    """
    out = Path(out)
    if not out.parent.is_dir():
        raise ArtifactError(f"{out.parent}: no such folder to write {out.name} to")
    tensors: dict[str, Grid | np.ndarray] = {}
    for name, value in _state(model).items():
        with np.errstate(over="ignore"):
            half = value.astype(np.float16)
        tensors[name] = half if half.astype(np.float32).tobytes() == value.tobytes() else value
    data = _Writer(model, RANGE).write(tensors)
    _write_verified(out, data, tensors)
    return _report(model, _Attempt(data, tensors, 0.0, 0), 0, BUDGET, 0.0)


def _report(model: Model, attempt: _Attempt, code_bytes: int, budget: int, cost: float) -> dict[str, Any]:
    parameters = count_parameters(model.network)
    codes = sum(tensor.codes.size for tensor in attempt.tensors.values() if isinstance(tensor, Grid))
    return {
        "artifact_bytes": len(attempt.data),
        "code_bytes": code_bytes,
        "total_bytes": len(attempt.data) + code_bytes,
        "budget_bytes": budget,
        "parameters": parameters,
        "bits_per_parameter": 8 * len(attempt.data) / parameters,
        "pruned_codes": attempt.pruned,
        "entropy_bits_per_code": attempt.code_bits / max(1, codes),
        "cost_nats_per_token": cost,
        "verified": True,
    }


def sweep(
    model: Model,
    calibration: TokenStream | None,
    score: Callable[[Model], np.ndarray],
    *,
    tolerances: Sequence[float] = (0.0003, 0.001, 0.003, 0.01, 0.03, 0.1),
    calibration_tokens: int = CALIBRATION_TOKENS,
    seed: int = 0,
    progress: Progress | None = None,
) -> list[dict[str, float]]:
    """Bytes against likelihood: pack at each tolerance and score what the file's bytes stand for.

    score: bits per byte of each of a fixed set of windows under fixed masks, so that differences to the unpacked model
    pair up. The first point costs about the first of `tolerances` (increasing; nats per token) by measurement, the
    others' steps follow from its. Returns one dict per tolerance: `tolerance`, `bytes`, `bits_per_parameter`,
    `cost_nats_per_token` (measured as by `pack`, on calibration text), `nelbo_bpb`, `cost_bpb` (over the unpacked
    model) and `cost_stderr_bpb`.
    """
    say = progress or (lambda _: None)
    windows, check = _calibration(model, calibration, calibration_tokens)
    before = np.asarray(score(model), dtype=np.float64)
    measured = _Cost(model, check, seed)
    packer = _Rate(model, windows, seed, tolerances[0], measured, say)
    points = []
    first = packer.settle()
    for tolerance in tolerances:
        attempt = first
        if tolerance != tolerances[0]:
            attempt = packer.attempt(first.step * math.sqrt(tolerance / tolerances[0]))
        after = np.asarray(score(_replaced(model, attempt)), dtype=np.float64)
        cost = after - before
        points.append({
            "tolerance": tolerance, "bytes": len(attempt.data),
            "bits_per_parameter": 8 * len(attempt.data) / count_parameters(model.network),
            "cost_nats_per_token": measured(attempt),
            "nelbo_bpb": float(after.mean()), "cost_bpb": float(cost.mean()),
            "cost_stderr_bpb": float(cost.std(ddof=1) / math.sqrt(len(cost))),
        })  # fmt: skip
        say(f"{len(attempt.data):,} bytes: {points[-1]['cost_bpb']:+.5f} bits per byte")
    return points


def _write_verified(out: Path, data: bytes, tensors: Mapping[str, Grid | np.ndarray]) -> None:
    """Write atomically, reopen, compare every weight bit for bit. Raises ArtifactError and leaves nothing if not."""
    try:
        atomic_write(out, data)
    except OSError as error:
        reason = "no space left on the disk" if error.errno in (errno.ENOSPC, errno.EDQUOT) else error.strerror
        raise ArtifactError(f"cannot write {out}: {reason}") from error
    try:
        state = open_artifact(out).network.state_dict()
    except ArtifactError:
        out.unlink(missing_ok=True)
        raise
    for name, tensor in tensors.items():
        if state[name].numpy().tobytes() != _values(tensor).tobytes():
            out.unlink(missing_ok=True)
            raise ArtifactError(f"{out}: {name} did not come back as written; nothing was kept")
