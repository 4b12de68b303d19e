"""Documents from files of text, tables and records, from folders of them, from the Hugging Face Hub and standard input.

A document's characters are those of the file: line ends stay, a byte-order mark is no text. Knows nothing of tokenizers
or shards.
"""

from __future__ import annotations

import codecs
import collections
import contextlib
import csv
import json
import os
import stat
import sys
import sysconfig
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow
import pyarrow.parquet

from mezzotint.errors import DataError
from mezzotint.extras import extra
from mezzotint.files import refuse_pointer

CHUNK = 1 << 20  # bytes read at once
LONG = 32_000_000  # characters of a file of text from which it is not held whole
CODE = (
    ".py .pyi .js .jsx .mjs .ts .tsx .c .h .cc .cpp .cxx .hpp .cu .rs .go .java .kt .scala .swift .m .rb .php .pl .lua .r .jl .hs "
    ".ml .clj .ex .erl .sh .bash .ps1 .sql .html .css .scss .tex .rst .cs .fs .vb .zig .nim .dart .asm .cmake"
)
TEXT_SUFFIXES = frozenset([".txt", ".md", *CODE.split()])
TABLES = {".csv": ",", ".tsv": "\t"}
PACKED = {".gz": "gzip", ".zst": "zstd"}
MARKS = ((codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF16_LE, "utf-16-le"), (codecs.BOM_UTF16_BE, "utf-16-be"))
NOT_UTF8 = "not UTF-8"
NAMED = 5  # files that are no text and are named in a line
KINDS = "text (.txt, .md, source code), .jsonl, .csv, .tsv (each also .gz or .zst) or .parquet"


@dataclass
class Account:
    """What was read of the sources. files: how many were read; skipped: why others were not -> how many; size: their bytes.

    empty: documents without text (an empty file, a null or empty field), which are left out. not_utf8: skipped files that
    are no text, by their names in their folders -> the first byte that breaks it.
    """

    files: int = 0
    size: int = 0
    empty: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    not_utf8: dict[str, int] = field(default_factory=dict)

    def __add__(self, other: Account) -> Account:
        return Account(
            self.files + other.files,
            self.size + other.size,
            self.empty + other.empty,
            self.skipped + other.skipped,
            self.not_utf8 | other.not_utf8,
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON object; `not_utf8` only where there are such files."""
        found = {"read": self.files, "skipped": dict(sorted(self.skipped.items())), "empty_documents": self.empty}
        return found | ({"not_utf8": self.not_utf8} if self.not_utf8 else {})


def files_in_words(account: Mapping[str, Any]) -> str:
    """One line of what `Account.to_dict` has: how many files were read, what was skipped and why."""
    broken = list(account.get("not_utf8", {}).items())
    names = ", ".join(f"{name} at byte {byte:,}" for name, byte in broken[:NAMED])
    more = f" and {len(broken) - NAMED:,} more" if len(broken) > NAMED else ""
    skipped = ", ".join(
        f"{count:,} {why}" + (f" ({names}{more})" if why == NOT_UTF8 else "")
        for why, count in account["skipped"].items()
    )
    return (
        f"files read: {account['read']:,}; skipped: {skipped or 'none'}; "
        f"empty documents: {account['empty_documents']:,}"
    )


class NotText(DataError):
    """A file's bytes are no text. byte: the first that breaks it."""

    def __init__(self, message: str, byte: int) -> None:
        super().__init__(message)
        self.byte = byte


@contextlib.contextmanager
def _open(path: Path) -> Iterator[BinaryIO]:
    """A file's bytes, unpacked where its name says that they are packed. Raises DataError naming the file."""
    packing = PACKED.get(path.suffix.lower())
    try:
        with path.open("rb") as file:
            yield pyarrow.CompressedInputStream(file, packing) if packing else file
    except (OSError, pyarrow.ArrowException) as error:
        reason = str(error).splitlines()[0] if not getattr(error, "strerror", None) else error.strerror  # type: ignore[union-attr]
        raise DataError(f"cannot read {path}: {reason}{'; the file is damaged' if packing else ''}") from error


def _characters(file: BinaryIO, path: Path) -> Iterator[str]:
    """The characters of a UTF-8 file, or of one whose byte-order mark says UTF-16, in stretches.

    Raises NotText naming the first byte that is neither.
    """
    data = file.read(CHUNK)
    refuse_pointer(data, path, DataError)
    mark, encoding = next(((m, e) for m, e in MARKS if data.startswith(m)), (b"", "utf-8"))
    decoder = codecs.getincrementaldecoder(encoding)()
    data, at = data[len(mark) :], len(mark)
    while True:
        waiting = len(decoder.getstate()[0])
        try:
            yield decoder.decode(data, final=not data)
        except UnicodeDecodeError as error:
            name = "UTF-8" if encoding == "utf-8" else "UTF-16"
            byte = at - waiting + error.start
            raise NotText(
                f"{path} is not {name} text: byte {byte} breaks it; convert it to UTF-8 first", byte
            ) from error
        if not data:
            return
        at += len(data)
        data = file.read(CHUNK)


def _lines(characters: Iterable[str]) -> Iterator[str]:
    """Lines with their ends; only a line feed ends one. The work is that of the text's length, however long a line."""
    begun: list[str] = []
    for text in characters:
        *whole, rest = text.split("\n")
        for line in whole:
            begun.append(line)
            yield "".join(begun) + "\n"
            begun = []
        begun.append(rest)
    if last := "".join(begun):
        yield last


class LongText:
    """A document that is not held whole: its characters in stretches, read from its file whenever they are asked for."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __iter__(self) -> Iterator[str]:
        with _open(self.path) as file:
            yield from _characters(file, self.path)


def _text(path: Path, _: str) -> Iterator[str | LongText | None]:
    with _open(path) as file:
        begun, size = [], 0
        for stretch in _characters(file, path):
            begun.append(stretch)
            size += len(stretch)
            if size > LONG:
                begun.clear()
                break
    yield LongText(path) if size > LONG else "".join(begun)


def _jsonl(path: Path, name: str) -> Iterator[str | None]:
    with _open(path) as file:
        for number, line in enumerate(_lines(_characters(file, path)), 1):
            if not line.strip():
                continue
            try:
                value = json.loads(line)
                for key in name.split("."):
                    value = value[key]
                if value is not None:
                    value.encode()  # lone surrogates can be written in JSON but are no text
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                raise DataError(f'{path}, line {number}: expected a JSON object with a string "{name}"') from error
            yield value


def _table(path: Path, name: str) -> Iterator[str | None]:
    suffix = _kind(path)
    with _open(path) as file:
        csv.field_size_limit(sys.maxsize if sys.maxsize < 1 << 32 else 1 << 31)
        rows = csv.reader(_lines(_characters(file, path)), delimiter=TABLES[suffix], strict=True)
        try:
            names = next(rows, [])
            if name not in names:
                raise DataError(f'{path} has no column "{name}" (it has {", ".join(names)[:200]})')
            column = names.index(name)
            for row in rows:
                if row and len(row) != len(names):
                    raise DataError(
                        f"{path}, line {rows.line_num}: {len(row)} fields, the first line names {len(names)}"
                    )
                if row:
                    yield row[column]
        except csv.Error as error:
            raise DataError(f"{path}, line {rows.line_num}: {error}") from error


def _parquet(path: Path, name: str) -> Iterator[str | None]:
    try:
        with path.open("rb") as start:
            refuse_pointer(start.read(64), path, DataError)
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if name not in names and name.split(".")[0] not in names:
                raise DataError(f'{path} has no column "{name}" (it has {", ".join(names)})')
            for batch in file.iter_batches(batch_size=256, columns=[name if name in names else name.split(".")[0]]):
                for value in batch.column(0).to_pylist():
                    yield from _strings(value, [] if name in names else name.split(".")[1:], f'{path}: column "{name}"')
    except UnicodeDecodeError as error:
        raise DataError(f'{path}: column "{name}" is not UTF-8 text; convert it first') from error
    except OSError as error:
        raise DataError(f"cannot read {path}: {str(error).splitlines()[0]}") from error
    except pyarrow.ArrowException as error:
        raise DataError(f"{path} is not a readable Parquet file: {str(error).splitlines()[0]}") from error


def _strings(value: Any, keys: Sequence[str], where: str) -> Iterator[str | None]:
    """The string at `keys` inside a record; each string of a list is a document of its own. Null is no text."""
    for key in keys:
        if value is not None and not (isinstance(value, dict) and key in value):
            raise DataError(f"{where} has no field {key!r}")
        value = value[key] if value is not None else None
    for text in value if isinstance(value, list) else [value]:
        if text is not None and not isinstance(text, str):
            raise DataError(f"{where} holds {type(text).__name__}, not strings")
        yield text


def _kind(path: Path) -> str:
    """The suffix that says what a file holds, "" where it is of no known kind."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in PACKED:
        suffixes.pop()
        return suffixes[-1] if suffixes and suffixes[-1] in READERS and suffixes[-1] != ".parquet" else ""
    return suffixes[-1] if suffixes and suffixes[-1] in READERS else ""


READERS: dict[str, Callable[[Path, str], Iterator[str | LongText | None]]] = {
    **dict.fromkeys(TEXT_SUFFIXES, _text),
    **dict.fromkeys(TABLES, _table),
    ".jsonl": _jsonl,
    ".parquet": _parquet,
}
"""Suffix -> reader (path, text field) -> texts, None where there is none. A new kind of file is a row here."""


def _stdlib_files() -> list[Path]:
    """The running Python's own library modules, in order, without tests, caches and installed packages."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skip = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__", "turtledemo"}
    files = []
    for folder, inner, names in os.walk(root):
        inner[:] = [name for name in inner if name not in skip]
        files += [Path(folder, name) for name in names if name.endswith(".py")]
    return sorted(files, key=lambda p: p.relative_to(root).as_posix())


def _folder_files(folder: Path, account: Account) -> list[Path]:
    """The files of known kinds below a folder, in order; what is left out goes to the account."""
    files = []

    def unreadable(_: OSError) -> None:
        account.skipped["unreadable"] += 1

    for here, inner, names in os.walk(folder, onerror=unreadable):
        account.skipped["hidden"] += sum(name.startswith(".") for name in [*inner, *names])
        account.skipped["links to folders"] += sum(Path(here, n).is_symlink() for n in inner if not n.startswith("."))
        inner[:] = [name for name in inner if not name.startswith(".")]
        for name in names:
            path = Path(here, name)
            if name.startswith("."):
                continue
            if not _kind(path):
                account.skipped["other types"] += 1
            elif not path.exists():
                account.skipped["broken links"] += 1
            elif not stat.S_ISREG(path.stat().st_mode):
                account.skipped["not regular files"] += 1
            elif not os.access(path, os.R_OK):
                account.skipped["unreadable"] += 1
            else:
                files.append(path)
    account.skipped += Counter()  # drops the zeros
    return sorted(files)


def _texts_of(folder: Path, files: Sequence[Path], account: Account) -> Iterator[Path]:
    """The files of a folder but those that are no text, which go to the account. Raises NotText if none is left."""
    first, kept = None, 0
    for path in files:
        try:
            if _kind(path) != ".parquet":  # its strings are UTF-8, or it is damaged
                with _open(path) as file:
                    collections.deque(_characters(file, path), maxlen=0)
        except NotText as error:
            first = first or error
            account.skipped[NOT_UTF8] += 1
            account.not_utf8[f"{folder.resolve().name}/{path.relative_to(folder).as_posix()}"] = error.byte
            continue
        kept += 1
        yield path
    if first is not None and not kept:
        raise first


def _source_files(source: str | Path, account: Account) -> Iterable[Path]:
    """The files a source stands for. Raises DataError if there are none."""
    path = Path(source)
    if path.is_dir():
        files = _folder_files(path, account)
        if not files:
            left = ", ".join(f"{n} {why}" for why, n in account.skipped.items())
            raise DataError(f"{path} holds no file of {KINDS}" + (f"; skipped: {left}" if left else ""))
        return _texts_of(path, files, account)
    if not path.exists():
        raise DataError(f"{source} does not exist; give a file, a folder, -, stdlib, hf:OWNER/NAME or fineweb:sp1024")
    if not _kind(path):
        raise DataError(f"{path}: unknown kind of file; use {KINDS}")
    return [path]


def _hub(source: str, name: str) -> Iterator[str | None]:
    """The texts of `hf:OWNER/NAME[:CONFIG][:SPLIT]` (or `hf:FOLDER...`), read as a stream through `datasets`."""
    place, *rest = source.removeprefix("hf:").split(":")
    if not place or len(rest) > 2:
        raise DataError(f"{source!r}: write hf:OWNER/NAME, hf:OWNER/NAME:CONFIG or hf:OWNER/NAME:CONFIG:SPLIT")
    if len(rest) == 1 and rest[0] in ("train", "validation", "test"):
        rest = ["", *rest]
    config, split = [*rest, "", ""][:2]
    for row in extra("datasets").rows(source, place, config or None, split or "train"):
        found = [] if name in row else name.split(".")
        if found and found[0] not in row:
            raise DataError(f'{source} has no column "{name}" (it has {", ".join(map(str, row))})')
        yield from _strings(row if found else row[name], found, f'{source}: column "{name}"')


def documents(source: str | Path, text_field: str = "text", account: Account | None = None) -> Iterator[str]:
    """The non-empty documents of a source, each whole, as `long_documents` says. Raises DataError."""
    for text in long_documents(source, text_field, account):
        yield text if isinstance(text, str) else "".join(text)


def long_documents(
    source: str | Path, text_field: str = "text", account: Account | None = None
) -> Iterator[str | LongText]:
    """The non-empty documents of a source, a long file of text in stretches. Raises DataError.

    Memory: LONG characters, or the longest line of records, row of a table or 256 rows of Parquet, whichever is more.

    source: a file, a folder of them (those that are not UTF-8 are skipped), `stdlib`, or `hf:OWNER/NAME[:CONFIG][:SPLIT]`.
    text_field: the column or JSON key that holds the text, `a.b` for key b inside a. account: is told what was read and
    what was skipped.
    """
    account = account if account is not None else Account()
    if str(source).startswith("hf:"):
        for text in _hub(str(source), text_field):
            account.empty += not text
            if text:
                yield text
    elif str(source) == "stdlib":
        for path in _stdlib_files():
            with contextlib.suppress(UnicodeDecodeError, OSError):
                text = path.read_bytes().decode("utf-8")
                account.files += 1
                if text:
                    yield text
    else:
        for path in _source_files(source, account):
            account.files += 1
            for text in READERS[_kind(path)](path, text_field):
                account.empty += not text
                if text:
                    yield text
            account.size += path.stat().st_size
