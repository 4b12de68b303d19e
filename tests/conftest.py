"""Settings and costly things shared by all tests."""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

# The suite runs beside others on small machines; one thread per process is the quickest there.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest


@dataclass(frozen=True)
class Trained:
    """A small corpus prepared, a model of 2 layers trained on it for a few steps, and its artifact."""

    data: Path
    run: Path
    artifact: Path


@pytest.fixture(scope="session")
def trained(tmp_path_factory) -> Trained:
    """Made by the library once; tests must not change it."""
    import mezzotint

    folder = tmp_path_factory.mktemp("trained")
    rng = np.random.default_rng(1)
    words = ["the", "old", "plate", "was", "dark", "until", "a", "burnisher", "drew", "light", "out", "of", "it"]
    texts = folder / "texts"
    texts.mkdir()
    for i in range(60):
        (texts / f"{i}.txt").write_text(" ".join(rng.choice(words, 80)) + ".\n")
    mezzotint.prepare([texts], folder / "data", vocab_size=290, val_fraction=0.2)
    model = mezzotint.ModelConfig(vocab_size=290, sequence_length=32, layers=2, width=32, heads=2, kv_heads=2)
    config = mezzotint.TrainConfig(
        steps=30, batch=4, compile=False, log_every=0.0, dtype="float32", device="cpu", val_every=-1.0
    )
    mezzotint.train(folder / "data", folder / "run", model=model, config=config)
    stream = mezzotint.Dataset.open(folder / "data").split("train")
    mezzotint.pack(mezzotint.load_run(folder / "run"), stream, folder / "model.mzt")
    return Trained(folder / "data", folder / "run", folder / "model.mzt")


@pytest.fixture(scope="module")
def browser():
    """Chromium without a screen; skips where there is none."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("needs Chromium")
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser
        browser.close()
