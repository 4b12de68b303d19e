"""Times the six most common ways to use Mezzotint, each from a clean environment without the repository.

    python benchmarks/user_paths.py [--quick] [--only PATH ...] [--wheel FILE.whl] [--json FILE]

install (a new virtual environment and `pip install` of the wheel), demo, train (a text file of one's own to a packed
model), fill, compress (and back), submit. Every command runs in the new environment, in a folder of its own, with
nothing of the repository in reach. `--quick` takes the dependencies from the running environment instead of the index
and trains for seconds: it times nothing that matters, it shows that the ways are open. pip's own environment variables
count: PIP_EXTRA_INDEX_URL chooses where PyTorch comes from.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import tempfile
import time
import venv
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import new_parser, say, table, write_json

ROOT = Path(__file__).resolve().parent.parent
PATHS = ("install", "demo", "train", "fill", "compress", "submit")
TEXT = (
    "The plate is first roughened all over, so that it would print a deep and even black. Whatever is to be light is "
    "then scraped and burnished, and the picture comes out of the dark by degrees.\n"
)


@dataclass
class Home:
    """A folder with a virtual environment of its own, and the commands in it."""

    folder: Path
    quick: bool

    @property
    def python(self) -> Path:
        """The environment's interpreter."""
        scripts = "Scripts" if os.name == "nt" else "bin"
        return self.folder / "env" / scripts / "python"

    def run(self, *words: str | Path) -> str:
        """A command's standard output; raises RuntimeError with its last words if it fails."""
        environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
        done = subprocess.run([str(w) for w in words], capture_output=True, text=True, cwd=self.folder, env=environment)
        if done.returncode:
            raise RuntimeError(f"{' '.join(map(str, words[:4]))} ...: {(done.stderr or done.stdout).strip()[-600:]}")
        return done.stdout

    def mezzotint(self, *words: str | Path) -> str:
        """`mezzotint WORDS` in the environment."""
        return self.run(self.python.parent / "mezzotint", *words)


def build_wheel(folder: Path, quick: bool) -> Path:
    """The repository's wheel, built into `folder`; with the running environment's setuptools if `quick`."""
    words = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", folder, ROOT]
    words += ["--no-build-isolation"] if quick else []
    subprocess.run([str(w) for w in words], check=True)
    return next(folder.glob("mezzotint-*.whl"))


def install(home: Home, wheel: Path) -> str:
    """A new environment with the wheel and what it depends on."""
    venv.create(home.folder / "env", with_pip=True)
    words = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    if home.quick:
        # The running environment's packages behind the new one's own; a .pth file follows no other .pth, so an
        # editable install of this repository stays out of reach.
        paths = home.run(home.python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])").strip()
        (Path(paths) / "borrowed.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
        words += ["--no-deps", "--no-index", "--ignore-installed"]
    home.run(home.python, *words, wheel)
    place = home.run(home.python, "-c", "import mezzotint; print(mezzotint.__file__)").strip()
    if not Path(place).is_relative_to(home.folder.resolve()):
        raise RuntimeError(f"the package was imported from {place}, not from the new environment")
    return home.mezzotint("--version").strip()


def demo(home: Home) -> str:
    """`mezzotint demo` to its end."""
    made = json.loads(home.mezzotint("demo", "--minutes", "0.05" if home.quick else "2", "--out", "demo", "--json"))
    best = made["score"]["results"][0]
    return f"{best['bpb']:.3f} bits per byte ({best['kind']}), {made['pack']['artifact_bytes']:,} bytes"


def train(home: Home) -> str:
    """A text file of one's own to a packed model."""
    (home.folder / "mine.txt").write_text(TEXT * (200 if home.quick else 20_000))
    home.mezzotint("prepare", "mine.txt", "--out", "data", *(["--vocab-size", "320"] if home.quick else []))
    length = ["--steps", "3", "--batch", "4"] if home.quick else ["--minutes", "2"]
    home.mezzotint("train", "data", "--out", "run", "--preset", "tiny", "--no-compile", *length)
    packed = json.loads(home.mezzotint("pack", "run", "--out", "mine.mzt", "--json"))
    return f"{packed['artifact_bytes']:,} bytes, verified {packed['verified']}"


def _model(home: Home) -> list[str]:
    """The shipped model (by naming none) where there is one, else the one trained above, made if need be."""
    if home.run(home.python, "-c", "import mezzotint; print(*mezzotint.pretrained_models())").split():
        return []
    if not (home.folder / "mine.mzt").exists():
        train(home)
    return ["mine.mzt"]


def fill(home: Home) -> str:
    """One gap in a sentence."""
    model = _model(home)
    started = time.monotonic()
    text = home.mezzotint("fill", *model, "The plate is first ____ all over.").strip()
    return f"{text!r} in {time.monotonic() - started:.1f} s"


def compress(home: Home) -> str:
    """A file, and back."""
    model = [word for name in _model(home) for word in ("--model", name)]
    (home.folder / "a.txt").write_text(TEXT * (2 if home.quick else 20))
    before = (home.folder / "a.txt").read_bytes()
    home.mezzotint("compress", "a.txt", "-o", "a.mzz", *model)
    home.mezzotint("decompress", "a.mzz", "-o", "b.txt", *model)
    if (home.folder / "b.txt").read_bytes() != before:
        raise RuntimeError("the file did not come back as it was")
    return f"{len(before):,} -> {(home.folder / 'a.mzz').stat().st_size:,} bytes and back"


def submit(home: Home) -> str:
    """The challenge's record folder of the model trained above."""
    if not (home.folder / "mine.mzt").exists():
        train(home)
    tokens = ["--tokens", "512"] if home.quick else ["--tokens", "32768"]
    made = json.loads(home.mezzotint("submit", "run", "mine.mzt", "--out", "record", *tokens, "--json"))
    return f"{made['total_bytes']:,} bytes with code, {made['val_bpb']:.3f} bits per byte ({made['val_bpb_kind']})"


def walk(paths: list[str], quick: bool, wheel: Path | None, say: Callable[[str], None]) -> list[dict[str, Any]]:
    """Go each of `paths` in order after an install; a row with `path`, `seconds`, `found`, `ok` for each."""
    rows = []
    with tempfile.TemporaryDirectory() as name:
        home = Home(Path(name).resolve() / "home", quick)
        home.folder.mkdir()
        if wheel is None:
            say("building the wheel")
            wheel = build_wheel(Path(name), quick)
        for path in PATHS:
            if path not in paths and path != "install":
                continue
            say(path)
            started = time.monotonic()
            try:
                found = install(home, wheel) if path == "install" else globals()[path](home)
                ok = True
            except RuntimeError as error:
                found, ok = " ".join(str(error).split()), False
            rows.append({"path": path, "seconds": time.monotonic() - started, "found": found, "ok": ok})
            if path == "install" and not ok:
                break
    return rows


def main(words: Sequence[str] | None = None) -> int:
    """Parse, walk, print."""
    parser = new_parser(__doc__)
    parser.add_argument("--quick", action="store_true", help="borrow dependencies, train for seconds")
    parser.add_argument("--only", nargs="+", choices=PATHS, default=list(PATHS), help="go only these (and install)")
    parser.add_argument("--wheel", type=Path, help="use this wheel instead of building one")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures here")
    options = parser.parse_args(words)
    rows = walk(options.only, options.quick, options.wheel, say)
    cells = [[r["path"], f"{r['seconds']:.1f}", ("" if r["ok"] else "FAILED: ") + r["found"]] for r in rows]
    print(table(["path", "seconds", "found"], cells))
    write_json(options.json, rows)
    return 0 if all(row["ok"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
