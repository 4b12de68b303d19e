"""Plays the challenge's judge on a folder that `mezzotint submit` made.

    python benchmarks/judge.py RECORD --data DATA [--tokens N] [--python PATH]

Counts the bytes by the rule (artifact and code together, decimal, at most 16,000,000) and compares them with the
record's own count; then runs the record's scorer as a judge would, in a fresh folder, isolated, with no network and
with nothing importable that the record does not ask for, and compares its figure with the one reported. Without
network means in a network namespace of its own where `unshare` may make one, else with sockets refused in the process;
the table says which. Exit status 1 if anything does not hold.
"""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import new_parser, table

LIMIT = 16_000_000
CODE = (".py", ".sh", ".c", ".cc", ".cpp", ".cu", ".h", ".pyx", ".rs", ".so")
# What the package may use besides, none of which a record's scorer may lean on unless its requirements say so.
EXTRAS = (
    "mezzotint", "huggingface_hub", "jinja2", "lm_eval", "matplotlib", "pyarrow", "rich", "starlette", "tensorboard",
    "transformers", "uvicorn",
)  # fmt: skip

GUARD = """\
import importlib.abc, runpy, sys

blocked, sockets = set(sys.argv[1].split(",")), sys.argv[2] == "refuse"


class Guard(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in blocked:
            raise ModuleNotFoundError(f"{name} is not in the record's requirements", name=name)


sys.meta_path.insert(0, Guard())
if sockets:
    def audit(event, arguments):
        if event in ("socket.connect", "socket.getaddrinfo", "socket.sendto", "socket.bind"):
            raise PermissionError(f"the judge allows no network: {event}")

    sys.addaudithook(audit)
sys.argv = sys.argv[3:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def without_network() -> list[str]:
    """The command prefix that takes the network away, empty where the kernel does not allow one."""
    tool = shutil.which("unshare")
    for words in ([tool, "-n"], [tool, "-rn"]) if tool else ():
        if subprocess.run([*words, "true"], capture_output=True).returncode == 0:
            return [str(word) for word in words]
    return []


def requirements(record: Path) -> set[str]:
    """Import names in requirements.txt."""
    path = record / "requirements.txt"
    lines = path.read_text("utf-8").splitlines() if path.is_file() else []
    names = (re.split(r"[\s<>=!~;\[]", line.strip(), maxsplit=1)[0] for line in lines)
    return {name.replace("-", "_").lower() for name in names if name and not name.startswith("#")}


def count_bytes(record: Path) -> dict[str, int]:
    """Artifact bytes, code bytes and their sum, of the files themselves."""
    files = [p for p in sorted(record.rglob("*")) if p.is_file()]
    artifact = sum(p.stat().st_size for p in files if p.suffix == ".mzt")
    code = sum(p.stat().st_size for p in files if p.suffix in CODE)
    return {"artifact": artifact, "code": code, "total": artifact + code}


def run_scorer(record: Path, data: Path, tokens: int | None, python: str = sys.executable) -> dict[str, Any]:
    """The JSON that the record's scorer prints, and how the network was taken away.

    Raises RuntimeError with the scorer's last words if it fails.
    """
    prefix = without_network()
    blocked = ",".join(name for name in EXTRAS if name not in requirements(record))
    words = [str((record / "score.py").resolve()), "--data", str(data.resolve())]
    words += [] if tokens is None else ["--tokens", str(tokens)]
    command = [*prefix, python, "-I", "-c", GUARD, blocked, "leave" if prefix else "refuse", *words]
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    if done.returncode:
        raise RuntimeError(f"the scorer failed: {done.stderr.strip()[-2000:]}")
    return {"network": "own namespace" if prefix else "sockets refused", **json.loads(done.stdout)}


def judge(
    record: Path, data: Path, tokens: int | None = None, python: str = sys.executable
) -> list[tuple[str, str, bool]]:
    """(what, finding, whether it holds) for each thing a judge looks at.

    tokens: score so many instead of as many as the record did; the figures are then compared by their standard errors.
    """
    fields = json.loads((record / "submission.json").read_text("utf-8"))
    counted = count_bytes(record)
    rows = [
        ("bytes", f"{counted['total']:,} of {LIMIT:,} ({counted['artifact']:,} artifact, {counted['code']:,} code)",
         counted["total"] <= LIMIT),
        ("bytes reported", f"{fields['bytes_total']:,} ({fields['bytes_code']:,} code)",
         (fields["bytes_total"], fields["bytes_code"]) == (counted["total"], counted["code"])),
    ]  # fmt: skip
    result = run_scorer(record, data, tokens or fields.get("val_tokens"), python)
    scored = result["results"][0]
    ours, theirs = scored["bpb"], fields["val_bpb"]
    if scored["tokens"] == fields.get("val_tokens"):
        allowed = 1e-5 * theirs  # the same windows and masks: only rounding differs between machines
    else:
        errors = (scored.get("stderr_bpb") or 0.0, fields.get("val_bpb_stderr") or 0.0)  # unknown: exact or no match
        allowed = 3 * math.hypot(*errors)
    rows += [
        ("scorer ran", f"isolated, network: {result['network']}", True),
        ("kind", f"{scored['kind']}; reported {fields['val_bpb_kind']}", scored["kind"] == fields["val_bpb_kind"]),
        ("figure", f"{ours:.6f} on {scored['tokens']:,} tokens; reported {theirs:.6f} "
         f"(difference {ours - theirs:+.2e}, allowed {allowed:.1e})", abs(ours - theirs) <= allowed),
    ]  # fmt: skip
    return rows


def main(words: Sequence[str] | None = None) -> int:
    """Parse, judge, print."""
    parser = new_parser(__doc__)
    parser.add_argument("record", type=Path, help="folder that `mezzotint submit` made")
    parser.add_argument("--data", type=Path, required=True, help="the data to score on")
    parser.add_argument("--tokens", type=int, help="score so many tokens [as many as the record did]")
    parser.add_argument(
        "--python", default=sys.executable, help="interpreter with the record's requirements [this one]"
    )
    options = parser.parse_args(words)
    try:
        rows = judge(options.record, options.data, options.tokens, options.python)
    except (OSError, RuntimeError, ValueError, KeyError) as error:
        print(f"judge: {type(error).__name__}: {error}", file=sys.stderr)
        return 1
    print(table(["what", "finding", "holds"], [[*row[:2], "yes" if row[2] else "NO"] for row in rows]))
    return 0 if all(holds for *_, holds in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
