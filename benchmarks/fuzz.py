"""Files made to do harm: what opening thousands of damaged and hostile artifacts ends in, and what it takes.

    python benchmarks/fuzz.py --files 20000 [--seed 0] [--keep FOLDER] [ARTIFACT ...]

Each file must end in an ArtifactError of one line, or in a model of finite weights where its damage happened to leave a
valid file under a right checksum; files whose checksum was not put right must all be refused. Limits: 2 seconds of
processor time (for files that describe more than 8 million parameters, what an honest file of as many may take: 0.25
seconds per million), more where the processor is slower than the one they were set on, and 256 MiB of memory over four
bytes for each parameter the file's config describes, if that config passes. Memory is the process's peak since the file
was begun, over what it held before the first file. A file that breaks a rule is kept in FOLDER; one that kills the
process is left there as at_hand.mzt. Exit status 1 if there are any.

Hand-made files come first: wrong lengths, bombs of every stage (header, tokenizer, tables, range-coded and LZMA-coded
tensors), and the largest models that files of their size may describe, right up to their last tensor. The others are
small artifacts of each codec, or the ARTIFACTs given, damaged at random: bytes, cuts, header fields, tensor lengths
that overlap, duplicate names, the tokenizer under its compression, the LZMA stream's content, streams of other tensors.
Knows of the format what FORMAT.md says.
"""

from __future__ import annotations

import contextlib
import copy
import ctypes
import faulthandler
import gc
import hashlib
import io
import json
import lzma
import struct
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import sentencepiece
import torch
from common import Findings, end, memory_of, new_parser, say, table

from mezzotint.config import ModelConfig, to_dict
from mezzotint.data.tokenizer import Tokenizer
from mezzotint.errors import ArtifactError
from mezzotint.network.model import Denoiser, Model, count_parameters
from mezzotint.packing import artifact, entropy, pack

SECONDS, SECONDS_PER_MILLION = 2.0, 0.25
LOOP = 0.035  # seconds of `slowness`'s loop where these limits hold as they are: half of an Intel server's at 2.5 GHz
MEMORY = 256 << 20
TEXT = Path(__file__).read_text()
Header = dict[str, Any]


# ------------------------------------------------------------------------------------------------------ the parts


@dataclass
class Parts:
    """An artifact taken apart: the header, the tokenizer as stored, and all sections after it."""

    header: Header
    tokenizer: bytes
    rest: bytes

    @staticmethod
    def of(data: bytes) -> Parts:
        _, _, stored, _ = artifact.PREFIX.unpack(data[: artifact.PREFIX.size])
        start = artifact.PREFIX.size
        header = json.loads(zlib.decompress(data[start : start + stored]))
        middle = start + stored + header["tokenizer"][0]
        return Parts(header, data[start + stored : middle], data[middle:-32])

    def file(self, text: bytes | None = None, claimed: int | None = None) -> bytes:
        """The file with a right checksum; text: the header's instead of its JSON; claimed: its length."""
        text = json.dumps(self.header).encode() if text is None else text
        stored = zlib.compress(text, 1)
        length = len(text) if claimed is None else claimed
        prefix = artifact.PREFIX.pack(artifact.MAGIC, artifact.VERSION, len(stored), length)
        return sealed(prefix + stored + self.tokenizer + self.rest)


def sealed(body: bytes) -> bytes:
    """`body` with its checksum."""
    return body + hashlib.sha256(body).digest()


def packed_tokenizer(raw: bytes) -> bytes:
    quick = [{**artifact.TOKENIZER_FILTERS[0], "preset": 0}]
    return lzma.compress(raw, format=lzma.FORMAT_RAW, filters=quick)


def small_tokenizer() -> Tokenizer:
    buffer = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT.splitlines()), model_writer=buffer, vocab_size=400, model_type="bpe",
        byte_fallback=True, minloglevel=2, num_threads=1, normalization_rule_name="identity",
    )  # fmt: skip
    return Tokenizer.from_bytes(buffer.getvalue())


class _Windows:
    """The part of a TokenStream that packing uses."""

    def __init__(self, ids: list[int]) -> None:
        self.ids = np.array(ids, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.ids)

    def windows(self, length: int) -> list[np.ndarray]:
        return [self.ids[i : i + length] for i in range(0, len(self.ids), length)]


def small_artifacts(tokenizer: Tokenizer, folder: Path) -> dict[str, bytes]:
    """A small model of random weights under every codec."""
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size, sequence_length=64, layers=2, width=32, heads=2, kv_heads=1, unet_skips=True,
        bigram_buckets=50, bigram_width=8, value_embedding_width=8, neighbour_reach=1,
    )  # fmt: skip
    torch.manual_seed(0)
    network = Denoiser(config).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(std=0.3)
    model = Model(config, tokenizer, network, {"steps": 1})
    made = {}
    for codec in pack.PACK_CODECS:
        pack.pack(model, _Windows(tokenizer.encode(TEXT)), folder / "base.mzt", codec=codec)  # type: ignore[arg-type]
        made[codec] = (folder / "base.mzt").read_bytes()
    pack.store(model, folder / "base.mzt")
    made["stored"] = (folder / "base.mzt").read_bytes()
    (folder / "base.mzt").unlink()
    return made


# ---------------------------------------------------------------------------------------------------- made by hand


def varint(value: int) -> bytes:
    out = b""
    while value > 127:
        out += bytes([value & 127 | 128])
        value >>= 7
    return out + bytes([value])


def _plane(shape: tuple[int, ...], codec: str) -> bytes:
    """A stream of a tensor of zeros in about as few bytes as the format allows."""
    encoder = entropy.Encoder()
    if codec == artifact.FLOAT16:
        entropy.write_words(encoder, np.zeros(int(np.prod(shape)), dtype=np.uint16))
        return encoder.finish()
    rows, columns = shape
    entropy.write_words(encoder, np.full(rows, 0x3C00, dtype=np.uint16))
    if codec == artifact.GRID_COLUMNS:
        entropy.write_words(encoder, np.full(columns, 0x3C00, dtype=np.uint16))
    classes = entropy.Classes(np.zeros(rows, np.int64), np.zeros(columns, np.int64))
    bank = entropy.Bank(np.array([[192, 1]], dtype=np.uint8))
    entropy.write_plane(encoder, np.broadcast_to(np.zeros(1, np.int16), shape), classes, bank)
    return encoder.finish()


def described(tokenizer: Tokenizer, config: ModelConfig, codec: str, coding: str, pad: int) -> bytes:
    """A file of about `pad` bytes more than it needs that is right but for its end: the last tensor is cut."""
    bank = entropy.Encoder()
    entropy.Bank(np.array([[192, 1]], dtype=np.uint8)).write(bank)
    table, sections, content = [], [bank.finish()], lzma.LZMACompressor(preset=0)
    stream = b""
    for name, shape in artifact.layout(artifact.shapes_only(config)).items():
        own = codec if len(shape) == 2 or codec == artifact.FLOAT32 else artifact.FLOAT16
        size = int(np.prod(shape, dtype=np.int64))
        number = 0 if own.startswith("grid") else -1
        if coding == artifact.RANGE:
            sections.append(bytes(4 * size) if own == artifact.FLOAT32 else _plane(shape, own))
            table.append([name, own, number, len(sections[-1])])
            continue
        scales = {artifact.GRID: sum(shape[:1]), artifact.GRID_COLUMNS: sum(shape)}.get(own, 0)
        count = 2 * scales + size * {artifact.FLOAT16: 2, artifact.FLOAT32: 4}.get(own, 1)
        table.append([name, own, -1, count])
        for start in range(0, count, 1 << 20):
            stream += content.compress(bytes(min(1 << 20, count - start)))
    header: Header = {
        "config": to_dict(config), "info": {"pad": np.random.default_rng(0).bytes(pad).hex()},
        "coding": coding, "tensors": table, "banks": [len(sections[0])],
    }  # fmt: skip
    if coding == artifact.LZMA:
        sections = [stream + content.flush()]
        header |= {"banks": [], "stored": len(sections[0]) - 4}
    else:
        table[-1][3] = 0
        sections[-1] = b""
    stored = packed_tokenizer(tokenizer.serialized)
    header["tokenizer"] = [len(stored), len(tokenizer.serialized)]
    text = json.dumps(header).encode()
    return Parts(header, stored, b"".join(sections)).file(text)


def largest(tokenizer: Tokenizer, pad: int) -> Iterator[tuple[str, bytes]]:
    """The largest models that files of about `pad` bytes may describe: tall, wide and deep, under every codec."""
    room = (1 << 20) + 64 * pad
    base = {"vocab_size": tokenizer.vocab_size, "width": 32, "heads": 2, "kv_heads": 1, "sequence_length": 64}
    shapes = {
        "tall": ModelConfig(**base, layers=1, bigram_buckets=min(1 << 24, room - 100_000), bigram_width=1),
        "wide": ModelConfig(**base, layers=1, bigram_buckets=max(2, room // 65_536 - 34), bigram_width=65_536),
        "deep": ModelConfig(**base | {"width": 4 * int((room / 256 / 11) ** 0.5 / 4)}, layers=256, mlp_ratio=4.0),
    }
    for shape, config in shapes.items():
        for codec in (artifact.GRID, artifact.GRID_COLUMNS, artifact.FLOAT16):
            yield f"{shape} {codec}", described(tokenizer, config, codec, artifact.RANGE, pad)
        for codec in (artifact.GRID_COLUMNS, artifact.FLOAT16, artifact.FLOAT32):
            yield f"{shape} {codec} lzma", described(tokenizer, config, codec, artifact.LZMA, pad)


def tokenizer_bombs(raw: bytes) -> Iterator[tuple[str, bytes]]:
    """Tokenizers of up to 16 MiB that compress to nothing and cost their parser much."""
    room = artifact.MAX_BYTES - len(raw) - 16
    pairs = b"\x0a\x00" * (room // 2)
    yield "empty pieces", raw + pairs
    yield "repeated settings", raw + b"\x12" + varint(len(pairs)) + pairs
    yield "self tests", raw + b"\x22" + varint(len(pairs)) + pairs
    yield "unknown fields", raw + b"\xf8\x7f\x01" * (room // 3)
    pieces = (b"x%d" % i for i in range(1_400_000))
    many = b"".join(b"\x0a" + varint(len(p) + 2) + b"\x0a" + varint(len(p)) + p for p in pieces)
    yield "many pieces", (raw + many)[: len(raw) + room]
    piece = b"\x0a" + varint(room - 16) + b"x" * (room - 16)
    yield "long piece", raw + b"\x0a" + varint(len(piece)) + piece
    charsmap = struct.pack("<I", room - 64) + bytes(room - 64)
    yield "long table", raw + b"\x1a" + varint(len(charsmap) + 5) + b"\x12" + varint(len(charsmap)) + charsmap
    yield "zeros", bytes(room)


def by_hand(base: bytes, coded: bytes, tokenizer: Tokenizer, pads: tuple[int, ...]) -> Iterator[tuple[str, bytes]]:
    """Hostile files built on `base` (range coded) and `coded` (LZMA coded): their names and bytes."""
    bomb = zlib.compress(bytes(200 << 20), 1)
    for claimed in (1_000, artifact.MAX_HEADER, (1 << 32) - 1):
        yield (
            f"zlib bomb, {claimed} claimed",
            sealed(artifact.PREFIX.pack(artifact.MAGIC, 1, len(bomb), claimed) + bomb),
        )
    whole = Parts.of(base)
    for text in (b"[" * artifact.MAX_HEADER, b"1" * artifact.MAX_HEADER, b"[" + b"{}," * 340_000 + b"{}]",
                 b'{"info":[' + b"[]," * 340_000 + b"[]]}", b'{"config":{"width":1e999}}',
                 b'{"info":{},"info":{}}'):  # fmt: skip
        yield f"header {text[:20]!r}", whole.file(text)
    yield "header longer than said", whole.file(claimed=10)
    yield "no header", sealed(artifact.PREFIX.pack(artifact.MAGIC, 1, 0, 0))

    changes: dict[str, Callable[[Header], Any]] = {
        "duplicate names": lambda h: h["tensors"].__setitem__(1, h["tensors"][0]),
        "overlapping tensors": lambda h: h["tensors"][0].__setitem__(3, h["tensors"][0][3] - 4),
        "overlapping tensors, same sum": lambda h: (
            h["tensors"][0].__setitem__(3, h["tensors"][0][3] - 4), h["tensors"][1].__setitem__(3, h["tensors"][1][3] + 4)
        ),
        "huge length": lambda h: h["tensors"][0].__setitem__(3, 1 << 62),
        "no MLP": lambda h: h["config"].__setitem__("mlp_ratio", 1e-9),
        "no bigrams' width": lambda h: h["config"].__setitem__("bigram_width", 0),
        "far neighbours": lambda h: h["config"].__setitem__("neighbour_reach", 1 << 62),
        "long text for a number": lambda h: h["config"].__setitem__("width", "9" * 500_000),
    }  # fmt: skip
    for name, change in changes.items():
        parts = Parts.of(base)
        change(parts.header)
        yield name, parts.file()
    for name, raw in tokenizer_bombs(tokenizer.serialized):
        parts = Parts.of(base)
        parts.tokenizer = packed_tokenizer(raw)
        parts.header["tokenizer"] = [len(parts.tokenizer), len(raw)]
        yield f"tokenizer: {name}", parts.file()
        parts.header["tokenizer"][1] = len(tokenizer.serialized)
        yield f"tokenizer: {name}, length denied", parts.file()
    for preset in (0, 1):
        parts = Parts.of(coded)
        parts.rest = lzma.compress(bytes(300 << 20), preset=preset)
        parts.header["stored"] = len(parts.rest)
        yield f"lzma bomb {preset}", parts.file()
    parts = Parts.of(coded)
    stream = bytearray(parts.rest)
    block = slice(12, 12 + 4 * stream[12])  # the first block's header, up to its checksum
    stream[stream.index(b"\x21\x01", 12) + 2] = 40
    stream[block.stop : block.stop + 4] = struct.pack("<I", zlib.crc32(stream[block]))
    parts.rest = bytes(stream)
    yield "lzma dictionary of 4 GiB", parts.file()
    for pad in pads:
        for name, data in largest(tokenizer, pad):
            yield f"{name}, {pad:,} bytes", data


# --------------------------------------------------------------------------------------------------------- mutants

HOSTILE: tuple[Any, ...] = (
    None, True, -1, 0, 1, 3, 255, 1 << 16, (1 << 31) - 1, 1 << 32, 1 << 63, 1 << 64, 10**400, 1e308, 1e-308, 1.5, "", "x",
    "\ud800\n\x1b[2J", "9" * 5_000, [], {}, [0] * 1_000, [[]], float("nan"), float("inf"),
)  # fmt: skip


def _places(node: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) in a JSON value."""
    keys = list(node) if isinstance(node, dict) else list(range(len(node))) if isinstance(node, list) else []
    return [place for key in keys for place in ((node, key), *_places(node[key]))]


def damage(data: bytes, rng: np.random.Generator) -> bytes:
    """Bytes changed, cut out, put in, repeated or cut off."""
    bad = bytearray(data)
    for _ in range(rng.integers(1, 4)):
        start = int(rng.integers(len(bad) + 1))
        length = int(2 ** rng.uniform(0, 12))
        kind = rng.integers(7)
        if kind == 0 and start < len(bad):
            bad[start] ^= 1 << rng.integers(8)
        elif kind == 1:
            bad[start : start + length] = rng.bytes(len(bad[start : start + length]))
        elif kind == 2:
            bad[start : start + length] = bytes([rng.choice([0, 255])]) * len(bad[start : start + length])
        elif kind == 3:
            del bad[start : start + length]
        elif kind == 4:
            bad[start:start] = rng.bytes(length)
        elif kind == 5:
            bad[start:start] = bad[start : start + length]
        else:
            del bad[start:]
    return bytes(bad)


def mutant(base: bytes, rng: np.random.Generator) -> tuple[str, bytes]:
    """One damaged file and what was done to it."""
    kind = str(rng.choice(["bytes", "resealed", "header", "lengths", "names", "text", "tokenizer", "content"]))
    parts = Parts.of(base)
    header = parts.header = copy.deepcopy(parts.header)
    table = header["tensors"]
    one, other = (int(i) for i in rng.integers(len(table), size=2))
    if kind == "bytes":
        bad = damage(base, rng)
        return kind, bad if bad != base else base[:-1]
    if kind == "resealed":
        return kind, sealed(damage(base[:-32], rng))
    if kind == "header":
        for _ in range(rng.integers(1, 3)):
            top = str(rng.choice(list(header)))
            places = [(header, top), *_places(header[top])]
            node, key = places[int(rng.integers(len(places)))]
            old = node[key]
            choice = int(rng.integers(len(HOSTILE) + 5))
            if choice < len(HOSTILE):
                node[key] = HOSTILE[choice]
            elif choice == len(HOSTILE):
                del node[key]
            elif choice == len(HOSTILE) + 1 and isinstance(node, list):
                node.insert(key, copy.deepcopy(old))
            elif isinstance(old, (int, float)):
                node[key] = old + int(rng.integers(-8, 9)) if rng.integers(2) else old * 2
        return kind, parts.file()
    if kind == "lengths":
        shift = int(rng.choice([4, 8, 64, 1 << 20, -4, -64]))
        table[one][3] -= shift
        if rng.integers(2):
            table[other][3] += shift
        return kind, parts.file()
    if kind == "names":
        what = int(rng.integers(5))
        if what == 0:
            table[one][0] = table[other][0]
        elif what == 1:
            table[one], table[other] = table[other], table[one]
        elif what == 2:
            table.insert(one, list(table[other]))
        elif what == 3:
            table[one][1] = str(rng.choice(artifact.CODECS))
        else:
            table[one][2] = int(rng.integers(-2, 4))
        return kind, parts.file()
    if kind == "text":
        return kind, parts.file(damage(json.dumps(header).encode(), rng))
    if kind == "tokenizer":
        stored, length = parts.tokenizer, header["tokenizer"][1]
        raw = lzma.decompress(stored, format=lzma.FORMAT_RAW, filters=artifact.TOKENIZER_FILTERS)[:length]
        raw = damage(raw, rng)
        parts.tokenizer = packed_tokenizer(raw)
        header["tokenizer"] = [len(parts.tokenizer), len(raw)]
        return kind, parts.file()
    if header["coding"] == artifact.LZMA:
        parts.rest = lzma.compress(damage(lzma.decompress(parts.rest), rng), preset=int(rng.integers(0, 3)))
        header["stored"] = len(parts.rest)
        return kind, parts.file()
    # One section takes another's bytes, random words, or nothing; all lengths are right.
    sizes = [*header["banks"], *(row[3] for row in table)]
    ends = np.cumsum(sizes)
    pieces = [parts.rest[end - size : end] for end, size in zip(ends, sizes, strict=True)]
    at = int(rng.integers(len(pieces)))
    choice = int(rng.integers(4))
    words = 4 * int(rng.integers(0, 300))
    pieces[at] = [pieces[int(rng.integers(len(pieces)))], rng.bytes(words), bytes(words), b""][choice]
    banks = len(header["banks"])
    header["banks"] = [len(piece) for piece in pieces[:banks]]
    for row, piece in zip(table, pieces[banks:], strict=True):
        row[3] = len(piece)
    parts.rest = b"".join(pieces)
    return kind, parts.file()


# ------------------------------------------------------------------------------------------------------- the trial


@dataclass
class Row:
    """What became of the files of one kind."""

    files: int = 0
    refused: int = 0
    opened: int = 0
    seconds: float = 0.0  # the most processor time a file took
    memory: int = 0  # the most bytes of memory over the config's need
    slowest: str = ""
    largest: str = ""


class Report(Findings[Row]):
    """What became of all files; failures: one line per broken rule."""

    def table(self) -> str:
        total = Row()
        cells = []
        for name, row in [*self.rows.items(), ("all", total)]:
            memory = f"{max(0, row.memory) / (1 << 20):.0f} {row.largest}"
            counts = (f"{n:,}" for n in (row.files, row.refused, row.opened))
            cells.append([name, *counts, f"{row.seconds:.2f} {row.slowest}", memory])
            total.files, total.refused, total.opened = (
                total.files + row.files, total.refused + row.refused, total.opened + row.opened
            )  # fmt: skip
            total.seconds, total.memory = max(total.seconds, row.seconds), max(total.memory, row.memory)
        titles = ["kind", "files", "refused", "opened", "most seconds", "most MiB over the need"]
        return table(titles, cells)


def _forget_peak() -> None:
    """Start `VmHWM` anew, from what is in use: memory that malloc has kept would hide what a file takes."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def slowness() -> float:
    """How many times as long as LOOP a loop takes here and now: below 1 on a fast processor, whose limits stay."""
    begin = time.process_time()
    sum(i * i for i in range(400_000))
    return (time.process_time() - begin) / LOOP


class Trial:
    """Opens files one after another and notes what they end in."""

    def __init__(self, folder: Path, keep: Path) -> None:
        self.path = folder / "at_hand.mzt"
        self.keep = keep
        self.report = Report()
        self.need = 0
        gc.collect()
        _forget_peak()
        self.before = memory_of("VmRSS")

    def _checked(self, original: Callable[[Header, int], Denoiser]) -> Callable[[Header, int], Denoiser]:
        def check(header: Header, size: int) -> Denoiser:
            network = original(header, size)
            self.need = 4 * count_parameters(network)
            return network

        return check

    def __call__(self, kind: str, name: str, data: bytes) -> None:
        """Open one file. kind: a row of the report; name: what to call it there."""
        self.path.write_bytes(data)
        size, self.need = len(data), 0
        del data
        row = self.report.rows.setdefault(kind, Row())
        row.files += 1
        broken = []
        _forget_peak()
        begin = time.process_time()
        try:
            with mock.patch.object(artifact, "checked_network", self._checked(artifact.checked_network)):
                model = artifact.open_artifact(self.path)
            row.opened += 1
            seconds = time.process_time() - begin
            if kind in ("bytes", "by hand"):
                broken.append("was opened")
            if not all(torch.isfinite(p).all() for p in model.network.parameters()):
                broken.append("gave weights that are not finite")
            del model
        except ArtifactError as error:
            seconds = time.process_time() - begin
            row.refused += 1
            if "\n" in str(error) or not str(error).isprintable() or len(str(error)) > 1_000:
                broken.append(f"gave no good line of text: {str(error)[:200]!r}")
        except BaseException as error:
            if isinstance(error, (KeyboardInterrupt, SystemExit)):
                raise
            seconds = time.process_time() - begin
            broken.append(f"raised {type(error).__name__}: {str(error)[:200]!r}")
        memory = memory_of("VmHWM") - self.before - self.need
        allowed = max(SECONDS, SECONDS_PER_MILLION * self.need / 4e6)
        if seconds > allowed and seconds > allowed * slowness():
            broken.append(f"took {seconds:.1f} s")
        if memory > MEMORY:
            broken.append(f"took {memory / (1 << 20):.0f} MiB over its need of {self.need / (1 << 20):.0f}")
        if seconds > row.seconds:
            row.seconds, row.slowest = seconds, f"({name}, {size:,} bytes, {self.need // 4:,} parameters)"
        if memory > row.memory:
            row.memory, row.largest = memory, f"({name}, {size:,} bytes, {self.need // 4:,} parameters)"
        if broken:
            self.keep.mkdir(parents=True, exist_ok=True)
            kept = self.keep / f"{len(self.report.failures):05d}.mzt"
            kept.write_bytes(self.path.read_bytes())
            self.report.failures.append(f"{kept}: {kind}, {name}: {'; '.join(broken)}")


def fuzz(
    files: int,
    keep: Path,
    *,
    seed: int = 0,
    bases: dict[str, bytes] | None = None,
    pads: tuple[int, ...] = (100_000, 510_000),
    progress: Callable[[str], None] | None = None,
) -> Report:
    """Open `files` hostile files, the hand-made ones among them, and report. keep: folder for files that break a rule.

    bases: files to damage besides small ones of every codec; pads: sizes of the files that describe large models.
    """
    rng = np.random.default_rng(seed)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        tokenizer = small_tokenizer()
        small = small_artifacts(tokenizer, folder)
        everything = {**small, **(bases or {})}
        for data in everything.values():  # they open, and what is loaded at first use is loaded
            (folder / "base.mzt").write_bytes(data)
            artifact.open_artifact(folder / "base.mzt")
        trial = Trial(keep if progress else folder, keep)
        for name, data in by_hand(small["mezzotint"], small["reference"], tokenizer, pads):
            trial("by hand", name, data)
            del data
        done = sum(row.files for row in trial.report.rows.values())
        names = list(everything)
        for number in range(done, files):
            base = names[number % len(names)]
            kind, data = mutant(everything[base], rng)
            trial(kind, f"{base} {number}", data)
            if progress and number % 1_000 == 0:
                progress(f"{number:,} files, {len(trial.report.failures)} failures")
    return trial.report


def main(words: Sequence[str] | None = None) -> None:
    """Parse, open, report."""
    parser = new_parser(__doc__)
    parser.add_argument("artifacts", nargs="*", type=Path, help="more artifacts to damage (large ones take long)")
    parser.add_argument("--files", type=int, default=20_000, help="files in all [20000]")
    parser.add_argument("--seed", type=int, default=0, help="of the damage [0]")
    parser.add_argument("--keep", type=Path, default=Path("fuzz"), help="folder for files that break a rule [fuzz]")
    options = parser.parse_args(words)
    torch.set_num_threads(1)
    faulthandler.enable()
    options.keep.mkdir(parents=True, exist_ok=True)
    begin = time.process_time()
    report = fuzz(
        options.files, options.keep, seed=options.seed, bases={p.name: p.read_bytes() for p in options.artifacts},
        progress=say,
    )  # fmt: skip
    (options.keep / "at_hand.mzt").unlink(missing_ok=True)
    end(report, f"{len(report.failures)} broken rules, {time.process_time() - begin:.0f} s of processor time")


if __name__ == "__main__":
    main()
