"""`mezzotint compress` beside general-purpose compressors, on files of many kinds, and on many kinds of machine.

    python benchmarks/compression.py files --text PARQUET [--json FILE]      sizes and times, every file restored
    python benchmarks/compression.py matrix --interpreters PYTHON... [--json FILE]   the same bytes everywhere?

files: the first bytes of TEXT's documents, joined by newlines, and ten other files: source code, Markdown, CSV, JSON, a
PNG, a .gz, Chinese, UTF-16, CRLF and an empty one. Beside xz -9e, zstd -19 and brotli -q 11. Times are processor
seconds of one thread.

matrix: each combination of threads, ATEN_CPU_CAPABILITY, ONEDNN_MAX_CPU_ISA, MKL_CBWR and interpreter (its own torch,
NumPy and Python) compresses a text by the model, restores what the first combination wrote, and prints the SHA-256 of
its own file. All equal: every file is restored under every other combination, as it is the same file.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import hashlib
import io
import itertools
import json
import os
import resource
import struct
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from common import compressors, new_parser, table, write_json

ROOT = Path(__file__).resolve().parent.parent
CHINESE = (
    "\u4eba\u4eba\u751f\u800c\u81ea\u7531\uff0c\u5728\u5c0a\u4e25\u548c\u6743\u5229\u4e0a\u4e00\u5f8b\u5e73\u7b49\u3002"
)
SETTINGS: dict[str, tuple[str, ...]] = {
    "OMP_NUM_THREADS": ("1", "2"),
    "ATEN_CPU_CAPABILITY": ("default", "avx2", "avx512"),
    "ONEDNN_MAX_CPU_ISA": ("SSE41", "AVX2", ""),
    "MKL_CBWR": ("COMPATIBLE", ""),
}
COLUMN = """
import hashlib, sys, torch, numpy, mezzotint
text, first = open(sys.argv[1], "rb").read(), open(sys.argv[2], "rb").read()
model = mezzotint.load(sys.argv[3] or None)
blob = mezzotint.compress(text, model)
assert blob[4] == 3, "the text is not coded by the model"
assert mezzotint.decompress(first or blob, model) == text
if not first:
    open(sys.argv[2], "wb").write(blob)
print(hashlib.sha256(blob).hexdigest(), sys.version.split()[0], torch.__version__, numpy.__version__)
"""


def png(width: int = 256, height: int = 192) -> bytes:
    """A photograph's stand-in: smooth colours with noise, as a PNG."""
    import numpy as np

    y, x = np.mgrid[:height, :width]
    pixels = np.stack((x, y, x + y), axis=2) // 2 + np.random.default_rng(0).integers(0, 24, (height, width, 3))
    rows = b"".join(b"\0" + row.astype("u1").tobytes() for row in pixels)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows, 9)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


def files(prose: bytes) -> dict[str, bytes]:
    """Name -> content."""
    source = b"".join(path.read_bytes() for path in sorted((ROOT / "src/mezzotint/data").glob("*.py")))
    table = io.StringIO()
    writer = csv.writer(table)
    for word, n in itertools.islice(((w, len(w)) for w in prose.decode().split()), 4000):
        writer.writerow([word, n, n * n, f"{n / 7:.3f}"])
    records = [{"id": i, "text": line, "size": len(line)} for i, line in enumerate(prose.decode().split("\n")[:120])]
    return {
        "prose": prose,
        "source code": source[:60_000],
        "Markdown": (ROOT / "LOG.md").read_bytes()[:60_000],
        "CSV": table.getvalue().encode(),
        "JSON": json.dumps(records, indent=1).encode()[:60_000],
        "PNG": png(),
        ".gz": gzip.compress(prose[:100_000], mtime=0),
        "Chinese": (CHINESE * 200).encode(),
        "UTF-16": prose[:30_000].decode("utf-8", "ignore").encode("utf-16"),
        "CRLF": prose[:60_000].replace(b"\n", b"\r\n"),
        "empty": b"",
    }


def run_files(args: argparse.Namespace) -> list[dict[str, Any]]:
    """One row a file."""
    import torch

    import mezzotint
    from mezzotint.data.sources import documents

    torch.set_num_threads(1)
    prose = "\n".join(documents(args.text)).encode()[: args.bytes].decode("utf-8", "ignore").encode()
    model, rivals, rows = mezzotint.load(args.model), compressors(), []
    for name, data in files(prose).items():
        started = time.process_time()
        blob = mezzotint.compress(data, model)
        encoded = time.process_time()
        same = mezzotint.decompress(blob, model) == data
        decoded = time.process_time()
        row: dict[str, Any] = {"file": name, "bytes": len(data), "mezzotint": len(blob)}
        row |= {rival: len(squeeze(data)) for rival, squeeze in rivals.items()}
        row |= {"restored": same, "seconds": round(encoded - started, 2), "seconds back": round(decoded - encoded, 2)}
        rows.append(row)
        print(f"{name}: {len(data):,} -> {len(blob):,} bytes", flush=True)
    print(table(list(rows[0]), [[f"{v:,}" if type(v) is int else v for v in row.values()] for row in rows]))
    print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MB")
    return rows


def run_matrix(args: argparse.Namespace) -> list[dict[str, Any]]:
    """One row a combination."""
    with tempfile.TemporaryDirectory() as folder:
        text, first = Path(folder, "text"), Path(folder, "first.mzz")
        text.write_bytes((ROOT / "README.md").read_bytes()[: args.bytes])
        first.touch()

        def column(chosen: dict[str, str], interpreter: str) -> dict[str, Any]:
            environment = {k: v for k, v in os.environ.items() if k not in SETTINGS}
            environment |= {k: v for k, v in chosen.items() if v} | {"PYTHONPATH": str(ROOT / "src")}
            command = [interpreter, "-c", COLUMN, str(text), str(first), args.model or ""]
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
            printed = done.stdout.split() or ["failed", done.stderr.strip().split("\n")[-1]]
            row = {**chosen, "sha256": printed[0], "versions": " ".join(printed[1:])}
            print(*row.values(), flush=True)
            return row

        combinations = [
            (dict(zip(SETTINGS, values, strict=True)), interpreter)
            for *values, interpreter in itertools.product(*SETTINGS.values(), args.interpreters)
        ]
        rows = [column(*combinations[0])]
        with ThreadPoolExecutor(args.jobs) as pool:
            rows += pool.map(column, *zip(*combinations[1:], strict=True))
    digests = {row["sha256"] for row in rows}
    failed = sum(row["sha256"] == "failed" for row in rows)
    print(f"{len(rows)} combinations, {len(digests)} different files, {failed} failed")
    return rows


def main(words: Sequence[str] | None = None) -> None:
    """Parse, run, write."""
    parser = new_parser(__doc__)
    parser.add_argument("part", choices=["files", "matrix"])
    parser.add_argument("--text", type=Path, help="Parquet or text whose first bytes are the prose")
    parser.add_argument("--bytes", type=int, default=0, help="of prose [300,000], or of the matrix's text [1,200]")
    parser.add_argument("--model", help="model to use [the shipped prose]")
    parser.add_argument("--interpreters", nargs="+", default=[sys.executable], help="Pythons of the matrix")
    parser.add_argument("--jobs", type=int, default=1, help="combinations of the matrix that run at a time")
    parser.add_argument("--json", type=Path, help="also write the rows here")
    args = parser.parse_args(words)
    args.bytes = args.bytes or (300_000 if args.part == "files" else 1_200)
    rows = run_files(args) if args.part == "files" else run_matrix(args)
    model = Path(args.model or ROOT / "src/mezzotint/models/prose.mzt")
    digest = hashlib.sha256(model.read_bytes()).hexdigest() if model.is_file() else None
    command = f"python benchmarks/compression.py {args.part}"
    write_json(args.json, {"command": command, "model_sha256": digest, "rows": rows})


if __name__ == "__main__":
    main()
