"""The `.mzt` file: pack a model under a byte budget, open one, look into one. FORMAT.md has the bytes.

Sole owner of the 16,000,000 and of the file format. Reading trusts nothing: every length is checked against the
config before memory is taken, and whatever is wrong ends in one `ArtifactError`. No pickle, no code. Knows nothing of
training or of likelihoods.
"""

from __future__ import annotations

import hashlib
import json
import lzma
import math
import struct
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch.overrides import TorchFunctionMode

from mezzotint import config as configuration
from mezzotint.config import ModelConfig
from mezzotint.data.tokenizer import MAX_BYTES, Tokenizer
from mezzotint.errors import ArtifactError, MezzotintError
from mezzotint.files import refuse_pointer
from mezzotint.network.model import Denoiser, Model, count_parameters
from mezzotint.packing import entropy
from mezzotint.packing.grid import Grid

BUDGET = 16_000_000  # decimal bytes of artifact and code together: the challenge's limit
MAGIC = b"\x8fMZT\r\n\x1a\n"  # a byte above 127 and both line ends: a text-mode transfer is noticed
VERSION = 1
PREFIX = struct.Struct("<8sHII")  # magic, version, stored header bytes, header bytes
DIGEST = 32
MAX_HEADER = 1 << 20
FREE_PARAMETERS = 1 << 20  # a file may describe this many parameters plus PARAMETERS_PER_BYTE for each of its bytes,
PARAMETERS_PER_BYTE = 64  # so that a small file cannot ask for much memory
LZMA_MEMORY = 128 << 20
LONGEST = 500  # characters of an error's text
TOKENIZER_FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "lc": 1, "lp": 2, "pb": 2,
                      "dict_size": 1 << 20}]  # fmt: skip


GRID, GRID_COLUMNS, FLOAT16, FLOAT32 = "grid", "grid+columns", "float16", "float32"
CODECS = (GRID, GRID_COLUMNS, FLOAT16, FLOAT32)
RANGE, LZMA = "range", "lzma"


class _NoValues(TorchFunctionMode):
    """On the meta device: nothing is drawn, as the shapes' only draws would import torch's compiler, which takes seconds."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in ("normal_", "uniform_", "kaiming_uniform_"):
            return args[0] if args else (kwargs or {})["tensor"]
        return func(*args, **(kwargs or {}))


def shapes_only(config: ModelConfig) -> Denoiser:
    """The network without memory for its weights."""
    with torch.device("meta"), _NoValues():
        return Denoiser(config)


def layout(network: Denoiser) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a network's tensors, in file order."""
    return {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}


def with_values(network: Denoiser, values: Mapping[str, np.ndarray]) -> Denoiser:
    """The network with these float32 values, in eval mode; no memory is taken but theirs."""
    network.load_state_dict({name: torch.from_numpy(value) for name, value in values.items()}, assign=True)
    return network.eval().requires_grad_(False)


def values_of(tensor: Grid | np.ndarray) -> np.ndarray:
    """The weights that a packed tensor stands for, float32 of its shape."""
    return tensor.values() if isinstance(tensor, Grid) else tensor.astype(np.float32)


def _codec(tensor: Grid | np.ndarray) -> str:
    if isinstance(tensor, Grid):
        return GRID if tensor.columns is None else GRID_COLUMNS
    return FLOAT16 if tensor.dtype == np.float16 else FLOAT32


def table_banks(tensors: Mapping[str, Grid | np.ndarray]) -> list[list[str]]:
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
    for number, names in enumerate(table_banks(tensors)):
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


def raw_parts(tensor: Grid | np.ndarray) -> list[bytes]:
    """Little-endian bytes of a packed tensor, uncompressed: float16 scales of rows and columns, int8 codes; or floats."""
    if isinstance(tensor, Grid):
        scales = [tensor.rows] if tensor.columns is None else [tensor.rows, tensor.columns]
        return [s.astype("<f2").tobytes() for s in scales] + [tensor.codes.astype(np.int8).tobytes()]
    return [tensor.astype("<f2" if tensor.dtype == np.float16 else "<f4").tobytes()]


def _encode_lzma(tensors: Mapping[str, Grid | np.ndarray]) -> tuple[dict[str, Any], list[bytes]]:
    """The reference's coding: int8 codes and scales of all tensors in one LZMA stream of preset 9."""
    parts = {name: b"".join(raw_parts(tensor)) for name, tensor in tensors.items()}
    data = lzma.compress(b"".join(parts.values()), format=lzma.FORMAT_XZ, preset=9)
    table = [[name, _codec(tensors[name]), -1, len(part)] for name, part in parts.items()]
    return {"coding": LZMA, "banks": [], "tensors": table, "stored": len(data)}, [data]


class Writer:
    """Turns packed tensors of one model into file bytes, remembering what carries over from one call to the next.

    coding: `RANGE` or `LZMA`. classes: of each tensor's rows and columns, None before the first call. tokenizer: bytes
    of the compressed tokenizer.
    """

    def __init__(self, model: Model, coding: str) -> None:
        self.model = model
        self.coding = coding
        self.classes: dict[str, entropy.Classes] | None = None
        self.code_bits = 0.0
        raw = model.tokenizer.serialized
        self.tokenizer = lzma.compress(raw, format=lzma.FORMAT_RAW, filters=TOKENIZER_FILTERS)

    def write(self, tensors: Mapping[str, Grid | np.ndarray]) -> bytes:
        """The whole file. Afterwards `classes` and `code_bits` (ideal bits of the codes) are those of these tensors.

        Raises ArtifactError for an info that does not fit the header.
        """
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
    """Everything read from a file. The network has no memory for its weights yet."""

    network: Denoiser
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
        refuse_pointer(start + file.read(64), "this", ArtifactError)
        raise ArtifactError("not a Mezzotint artifact (wrong first bytes)")
    _, version, stored, length = PREFIX.unpack(start)
    if version > VERSION:
        raise ArtifactError(f"format version {version} is newer than {VERSION}, the newest known: upgrade Mezzotint")
    if version != VERSION:
        raise ArtifactError(f"damaged artifact: there is no format version {version}")
    size = path.stat().st_size
    if size < PREFIX.size + DIGEST:
        raise ArtifactError("damaged artifact: the file is cut short")
    digest = hashlib.sha256(start)
    left = size - PREFIX.size - DIGEST
    while left:
        chunk = file.read(min(left, 1 << 20))
        if not chunk:
            raise ArtifactError("damaged artifact: the file is cut short")
        digest.update(chunk)
        left -= len(chunk)
    end, whole = file.read(DIGEST), digest.copy()
    whole.update(end)
    if end != digest.digest():
        raise ArtifactError("damaged artifact: the checksum does not match; fetch or pack it again")

    file.seek(PREFIX.size)
    reader = _Reader(file, size - PREFIX.size - DIGEST)
    header = _header(reader.take(stored, "the header"), length)
    network = checked_network(header, size)
    config = network.config
    info = header["info"]
    if not isinstance(info, dict):
        raise ArtifactError("damaged artifact: info is not an object")
    tokenizer = _tokenizer(reader, header, config)
    sections = {"prefix and digest": PREFIX.size + DIGEST, "header": stored, "tokenizer": header["tokenizer"][0]}
    values: dict[str, np.ndarray] = {}
    table: list[dict[str, Any]] = []
    for name, shape, codec, count, array in _tensors(reader, header, layout(network), sections):
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
    return Opened(network, info, tokenizer, values, table, sections, whole.hexdigest(), size)


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


def checked_network(header: dict[str, Any], size: int) -> Denoiser:
    """The network of the config in `header`, without memory for its weights, if a file of `size` bytes can be a model of it.

    Raises ArtifactError.
    """
    try:
        network = shapes_only(configuration.from_dict(ModelConfig, header["config"]))
        parameters = count_parameters(network)
    except ArtifactError:
        raise
    except MezzotintError as error:
        raise ArtifactError(f"damaged artifact: {error}") from error
    except Exception as error:  # the config's own arithmetic on hostile numbers
        raise ArtifactError(f"damaged artifact: its config does not make a model ({type(error).__name__})") from error
    if parameters > FREE_PARAMETERS + PARAMETERS_PER_BYTE * size:
        raise ArtifactError(f"damaged artifact: {parameters:,} parameters in {size:,} bytes")
    return network


def _tokenizer(reader: _Reader, header: dict[str, Any], config: ModelConfig) -> Tokenizer:
    sizes = header["tokenizer"]
    if not (isinstance(sizes, list) and len(sizes) == 2 and all(type(n) is int for n in sizes)):
        raise ArtifactError("damaged artifact: the tokenizer's sizes")
    stored, length = reader.take(sizes[0], "the tokenizer"), sizes[1]
    if not 0 < length <= MAX_BYTES:
        raise ArtifactError(f"damaged artifact: a tokenizer of {length:,} bytes")
    try:
        inflater = lzma.LZMADecompressor(format=lzma.FORMAT_RAW, filters=TOKENIZER_FILTERS)
        raw = inflater.decompress(stored, length + 1)
        if len(raw) != length or not inflater.eof or inflater.unused_data:
            raise ArtifactError("damaged artifact: the tokenizer has the wrong length")
        tokenizer = Tokenizer.from_bytes(raw, most_pieces=config.vocab_size)
        if tokenizer.vocab_size != config.vocab_size:
            raise ArtifactError(
                f"damaged artifact: a tokenizer of {tokenizer.vocab_size:,} tokens in a model of {config.vocab_size:,}"
            )
    except ArtifactError:
        raise
    except Exception as error:
        raise ArtifactError(f"damaged artifact: the tokenizer cannot be read ({error})") from error
    return tokenizer


def _tensors(
    reader: _Reader, header: dict[str, Any], shapes: dict[str, tuple[int, ...]], sections: dict[str, int]
) -> Iterator[tuple[str, tuple[int, ...], str, int, np.ndarray]]:
    """Every tensor in file order: name, shape, codec, bytes, values."""
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
    """The model in the `.mzt` file `path`, on the CPU, in float32, exactly as it was when packed.

    Raises ArtifactError, whatever the file holds: missing, damaged, hostile, or of a newer version.
    """
    opened = _read(Path(path))
    try:
        network = with_values(opened.network, opened.values)
    except Exception as error:
        raise ArtifactError(f"{path}: damaged artifact: its tensors do not make a model") from error
    return Model(network.config, opened.tokenizer, network, opened.info, opened.sha256)


def inspect_artifact(path: Path | str) -> dict[str, Any]:
    """What is in the `.mzt` file `path`. Everything is decoded and checked on the way. Raises ArtifactError.

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
        "config": configuration.to_dict(opened.network.config),
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


def compact_floats(value: np.ndarray) -> np.ndarray:
    """Small tensors: float16, or float32 where float16 would overflow."""
    return value.astype(np.float16 if np.abs(value).max(initial=0) <= 65_000 else np.float32)
