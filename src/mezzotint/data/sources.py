"""Documents from text files, JSONL, Parquet, folders, and the running Python's own library.

Knows nothing of tokenizers or shards.
"""

from __future__ import annotations

import contextlib
import json
import os
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow
import pyarrow.parquet

from mezzotint.errors import DataError


def _read_text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text (byte {error.start}); convert it first") from error
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error


def _jsonl_documents(path: Path) -> Iterator[str]:
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    text = json.loads(line)["text"]
                    text.encode()  # lone surrogates can be written in JSON but are no text
                except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                    raise DataError(f'{path}, line {number}: expected a JSON object with a string "text"') from error
                yield text
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error


def _parquet_documents(path: Path) -> Iterator[str]:
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            if "text" not in file.schema_arrow.names:
                raise DataError(f'{path} has no column "text" (it has {", ".join(file.schema_arrow.names)})')
            for batch in file.iter_batches(batch_size=256, columns=["text"]):
                for text in batch.column(0).to_pylist():
                    if text is not None and not isinstance(text, str):
                        raise DataError(f'{path}: column "text" holds {type(text).__name__}, not strings')
                    if text:
                        yield text
    except UnicodeDecodeError as error:
        raise DataError(f'{path}: column "text" is not UTF-8 text; convert it first') from error
    except OSError as error:
        raise DataError(f"cannot read {path}: {str(error).splitlines()[0]}") from error
    except pyarrow.ArrowException as error:
        raise DataError(f"{path} is not a readable Parquet file: {str(error).splitlines()[0]}") from error


READERS: dict[str, Callable[[Path], Iterator[str]]] = {
    ".txt": lambda path: iter([_read_text(path)]),
    ".jsonl": _jsonl_documents,
    ".parquet": _parquet_documents,
}


def _stdlib_files() -> list[Path]:
    """The running Python's own library modules, in order, without tests, caches and installed packages."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skip = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__", "turtledemo"}
    files = []
    for folder, inner, names in os.walk(root):
        inner[:] = [name for name in inner if name not in skip]
        files += [Path(folder, name) for name in names if name.endswith(".py")]
    return sorted(files, key=lambda p: p.relative_to(root).as_posix())


def _source_files(source: str | Path) -> list[Path]:
    """The files a source stands for. Raises DataError if there are none."""
    path = Path(source)
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.suffix.lower() in READERS and p.is_file())
        if not files:
            raise DataError(f"{path} holds no .txt, .jsonl or .parquet file")
        return files
    if not path.exists():
        raise DataError(f"{source} does not exist; give a file, a folder, stdlib or fineweb:sp1024")
    if path.suffix.lower() not in READERS:
        raise DataError(f"{path}: unknown kind of file; use .txt, .jsonl or .parquet")
    return [path]


def documents(source: str | Path) -> Iterator[str]:
    """The non-empty documents of a source: a file, a folder of them, or `stdlib`. Raises DataError."""
    if str(source) == "stdlib":
        for path in _stdlib_files():
            with contextlib.suppress(UnicodeDecodeError, OSError):
                text = path.read_bytes().decode("utf-8")
                if text:
                    yield text
        return
    for path in _source_files(source):
        yield from (text for text in READERS[path.suffix.lower()](path) if text)
