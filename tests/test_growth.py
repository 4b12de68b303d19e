"""What each request takes when its input doubles: no more than about double, and where it says so, no more at all.

Counted in positions that go through a layer of the network, and in bytes that Python allocates: neither depends on the
machine. docs/limits.md states the bounds.
"""

from __future__ import annotations

import gzip
import io
import itertools
import json
import shutil
import tracemalloc

import numpy as np
import pytest
import torch
from test_sample import own_tokenizer, random_model

import mezzotint
from mezzotint.compression.container import compress_stream, decompress_stream
from mezzotint.compression.exact import ExactNetwork
from mezzotint.data import sources
from mezzotint.data.texts import TextWindows
from mezzotint.data.tokenizer import Tokenizer
from mezzotint.errors import CheckpointError, ConfigError, DataError, MezzotintError
from mezzotint.network.layers import Attention
from mezzotint.network.model import Denoiser, Model
from mezzotint.sampling.draft import parse_gaps
from mezzotint.training.system import peak_memory_bytes

ABOUT_DOUBLE = 2.5  # twice the square would be 4


@pytest.fixture
def positions(monkeypatch):
    """Positions that have gone through a layer of any network, each batch's anew."""
    count = [0]
    whole = Attention.forward

    def counted(self, x, *words, **more):
        count[0] += x.shape[0] * x.shape[1]
        return whole(self, x, *words, **more)

    monkeypatch.setattr(Attention, "forward", counted)

    def during(call) -> int:
        count[0] = 0
        call()
        return count[0]

    return during


def grows(cost, sizes, at_most: float) -> list[int]:
    """What each size costs; each is at most so many times the one before, and what is last not that of nothing."""
    costs = [cost(n) for n in sizes]
    assert all(b <= at_most * a for a, b in itertools.pairwise(costs)) and costs[-1] > 0, costs
    return costs


def causal_model(window: int = 64) -> Model:
    model = random_model(window=window)
    torch.manual_seed(0)
    network = Denoiser(model.config).eval()
    return Model(model.config, model.tokenizer, network, {"train": {"causal_share": 0.5}})


@pytest.mark.parametrize("make", [random_model, causal_model])
@pytest.mark.parametrize(
    "text",
    [
        lambda n: "a" * n + "____ b",
        lambda n: "the ____" + "z" * n,
        lambda n: "\u5c4b" * n + "____\u3002",
        lambda n: "the old house " * n + "____ stood",
        lambda n: "a ____ b" + " \u0301" * n,
    ],
    ids=["long word before", "long word behind", "no spaces", "long text", "marks"],
)
def test_a_gap_costs_the_same_beside_any_text(make, text, positions):
    model = make()
    grows(lambda n: positions(lambda: mezzotint.fill(model, text(n))), (200, 400, 800), 1.1)


@pytest.mark.parametrize("make", [random_model, causal_model])
def test_gaps_cost_in_proportion_to_their_number(make, positions):
    model = make()
    for between in (" the ", " the old house stood at the end of the road and then some more of it "):
        grows(
            lambda n, b=between: positions(lambda: mezzotint.fill(model, ("____" + b) * n)), (6, 12, 24), ABOUT_DOUBLE
        )


def test_samples_cost_in_proportion_to_their_length_and_number(positions):
    model = causal_model()
    grows(lambda n: positions(lambda: mezzotint.sample(model, n, 16)), (4, 8, 16), ABOUT_DOUBLE)
    grows(lambda n: positions(lambda: mezzotint.sample(model, 1, n)), (128, 256, 512), ABOUT_DOUBLE)
    for words in ({"n": 1 << 24}, {"length": 1 << 24}, {"n": 1 << 13, "length": 1 << 12}):
        with pytest.raises(ConfigError, match="ask for fewer"):
            mezzotint.sample(model, **words)


@pytest.mark.parametrize("score", [mezzotint.nelbo, mezzotint.causal, mezzotint.chain_rule])
def test_scores_cost_in_proportion_to_the_text(score, positions):
    model = causal_model()

    def cost(n: int) -> int:
        windows = TextWindows(["the old house " * n], model.tokenizer, 64)
        return positions(lambda: score(model, windows))

    grows(cost, (40, 80, 160), ABOUT_DOUBLE)


def allocated(call) -> int:
    """The most bytes that Python held during the call."""
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


class TestSources:
    """A document at a time; of a long file of text, a stretch at a time."""

    def drained(self, path) -> None:
        for text in sources.long_documents(path):
            for _ in (text,) if isinstance(text, str) else text:
                pass

    @pytest.mark.parametrize("name", ["t.txt", "t.txt.gz", "t.jsonl", "t.csv", "folder"])
    def test_memory_does_not_grow_with_the_number_of_documents(self, name, tmp_path, monkeypatch):
        monkeypatch.setattr(sources, "LONG", 10_000)
        monkeypatch.setattr(sources, "CHUNK", 5_000)
        line = "the old house stood at the end " * 4

        def cost(n: int) -> int:
            path = tmp_path / str(n) / name
            path.parent.mkdir()
            if name == "folder":
                path.mkdir()
                for i in range(n // 100):
                    (path / f"{i:05d}.txt").write_text(line * 50)
            elif name == "t.jsonl":
                path.write_text(f"{json.dumps({'text': line})}\n" * n)
            elif name == "t.csv":
                path.write_text("text\n" + f'"{line}"\n' * n)
            elif name == "t.txt.gz":
                path.write_bytes(gzip.compress((line * n).encode()))
            else:
                path.write_text(line * n)
            self.drained(path)  # what is imported at first use
            return allocated(lambda: self.drained(path))

        grows(cost, (2_000, 4_000, 8_000), 1.5)

    def test_a_line_costs_in_proportion_to_its_length(self, tmp_path):
        def cost(n: int) -> int:
            (tmp_path / "t.jsonl").write_text(json.dumps({"text": "a" * n}))
            return allocated(lambda: self.drained(tmp_path / "t.jsonl"))

        grows(cost, (1 << 20, 1 << 21, 1 << 22), ABOUT_DOUBLE)


@pytest.mark.parametrize("change", [{"width": 65_536, "mlp_ratio": 1.0}, {"layers": 256}, {"bigram_buckets": 1 << 24}])
def test_a_run_folder_takes_what_its_weights_take(change, trained, tmp_path):
    """Whatever its config.json says of them."""
    shutil.copytree(trained.run, tmp_path / "run")
    described = json.loads((tmp_path / "run" / "config.json").read_text())
    described["model"] |= change
    (tmp_path / "run" / "config.json").write_text(json.dumps(described))
    before = peak_memory_bytes()
    with pytest.raises(CheckpointError, match="does not fit"):
        mezzotint.load_run(tmp_path / "run")
    assert peak_memory_bytes() < before + (256 << 20)


def test_reading_gaps_takes_memory_in_proportion_to_the_text():
    for text in ("____ ", "\\____ ", "[MASK*2]", "_", "[MASK*"):
        grows(lambda n, t=text: allocated(lambda: parse_gaps(t * n)), (2_000, 4_000, 8_000), ABOUT_DOUBLE)


def test_a_tokenizer_takes_memory_in_proportion_to_its_file():
    raw = own_tokenizer().serialized
    Tokenizer.from_bytes(raw)
    with pytest.raises(DataError, match="pieces"):
        Tokenizer.from_bytes(raw + b"\x0a\x00" * 2_000_000)
    with pytest.raises(DataError, match="MiB"):
        Tokenizer.from_bytes(raw + bytes(17 << 20))


def test_compression_costs_in_proportion_to_the_bytes(monkeypatch):
    """Counted in tokens that go through the exact network."""
    model, rng = causal_model(), np.random.default_rng(0)
    words = np.array(["the", "old", "house", "stood", "at", "the", "end", "of", "a", "road"])
    counted, whole = [0], ExactNetwork.hidden

    def hidden(self, ids, *given, **more):
        counted[0] += ids.size
        return whole(self, ids, *given, **more)

    monkeypatch.setattr(ExactNetwork, "hidden", hidden)

    def cost(n: int) -> int:
        counted[0] = 0
        compress_stream(io.BytesIO(" ".join(rng.choice(words, n)).encode()), io.BytesIO(), model)
        return counted[0]

    grows(cost, (300, 600, 1_200), ABOUT_DOUBLE)


def test_a_compressed_file_takes_what_its_size_allows():
    """Counts in a header that the file is too short for are refused before anything is made for them."""
    model = causal_model()
    packed = io.BytesIO()
    compress_stream(io.BytesIO(b"the old house stood at the end of the road. " * 40), packed, model)
    data = packed.getvalue()
    rng = np.random.default_rng(0)
    for _ in range(60):
        bad = bytearray(data)
        for place in rng.integers(4, min(len(bad), 60), 3):
            bad[place] = int(rng.choice([0, 0x7F, 0x80, 0xFF]))

        def attempt(bad=bad) -> None:
            try:
                decompress_stream(io.BytesIO(bytes(bad)), io.BytesIO(), model)
            except MezzotintError as error:
                assert "\n" not in str(error)

        assert allocated(attempt) < 64 << 20
