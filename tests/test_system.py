"""Where the system is another: Unix-only modules hidden, folders that cannot be synced, paths with odd names."""

from __future__ import annotations

import os
import subprocess
import sys

from mezzotint.training import system

SCRIPT = """
import sys
for name in ("resource", "fcntl", "pwd", "grp", "termios", "tty", "pty"):
    sys.modules[name] = None  # `import name` now fails, as on Windows
import os, pathlib
whole = os.open
def no_folders(path, flags, *more, **options):
    if os.path.isdir(path):
        raise PermissionError(13, "Permission denied")
    return whole(path, flags, *more, **options)
os.open = no_folders
import mezzotint
home = pathlib.Path(sys.argv[1])
(home / "text.txt").write_text("the old plate was dark until a burnisher drew the light out of it\\n" * 200, "utf-8")
mezzotint.prepare([home / "text.txt"], home / "data", vocab_size=290, val_fraction=0.1)
vocab = mezzotint.Dataset.open(home / "data").tokenizer.vocab_size
model = mezzotint.ModelConfig(vocab_size=vocab, sequence_length=16, layers=1, width=16, heads=2, kv_heads=1)
config = mezzotint.TrainConfig(steps=2, batch=2, compile=False, dtype="float32", device="cpu", log_every=0.0)
mezzotint.train(home / "data", home / "run", model=model, config=config)
data = mezzotint.Dataset.open(home / "data")
mezzotint.pack(mezzotint.load_run(home / "run"), data.split("train"), home / "model.mzt")
opened = mezzotint.open_artifact(home / "model.mzt")
assert mezzotint.nelbo(opened, data.split("val").windows(16)).bpb > 0
assert mezzotint.fill(opened, "the ____ plate")
"""


def test_the_main_path_without_unix(tmp_path):
    home = tmp_path / ("with spaces, ümläut 中" + ("" if os.name == "nt" else " and \\"))
    home.mkdir()
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(home)], capture_output=True, text=True, env=environment, timeout=200
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_memory_is_measured_or_said_to_be_unknown(monkeypatch):
    assert os.name == "nt" or system.peak_memory_bytes() > 1 << 20
    monkeypatch.setattr(system, "resource", None)
    assert system.peak_memory_bytes() == 0
