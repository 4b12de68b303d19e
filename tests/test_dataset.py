"""Shards, windows and their bytes, and damage to them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from corpus import TEXTS, small_lossy_tokenizer, small_tokenizer, write_jsonl, write_shard

import mezzotint.data.dataset as dataset_module
from mezzotint.data.dataset import HEADER_BYTES, Dataset, TokenStream, checksums
from mezzotint.data.prepare import prepare
from mezzotint.data.tokenizer import Tokenizer, check_same_tokenizer, train_tokenizer
from mezzotint.errors import DataError


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return small_tokenizer()


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_jsonl(folder / "c.jsonl", [f"{t} {i}" for i in range(10) for t in TEXTS])
    prepare([folder / "c.jsonl"], folder / "out", vocab_size=340, val_fraction=0.2)
    assert (folder / "out" / "train_corrections.npy").exists()  # one of the texts holds U+2581
    return folder / "out"


def damage(folder: Path, change) -> Path:
    copy = folder.parent / f"damaged_{time.monotonic_ns()}"
    subprocess.run(["cp", "-r", str(folder), str(copy)], check=True)
    change(copy)
    return copy


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: (f / "val_000000.bin").write_bytes(b"short"), "val_000000.bin is truncated"),
        (lambda f: os.truncate(f / "val_000000.bin", HEADER_BYTES + 10), "val_000000.bin is damaged"),
        (lambda f: write_shard(f / "val_000000.bin", np.zeros(5), magic=1), "not a token shard"),
        (lambda f: write_shard(f / "val_000000.bin", np.zeros(5), version=2), "version 2"),
        (lambda f: write_shard(f / "val_000000.bin", np.zeros(5), count=-1), "damaged"),
        (lambda f: write_shard(f / "val_000000.bin", np.zeros(5)), "data.json says"),
        (lambda f: (f / "val_000000.bin").unlink(), "no val shards"),
        (
            lambda f: (
                (f / "val_000000.bin").rename(f / "val_000001.bin") and write_shard(f / "val_000003.bin", np.zeros(2))
            ),
            "000002 is missing",
        ),
        (lambda f: (f / "tokenizer.model").unlink(), "cannot read tokenizer"),
        (lambda f: (f / "data.json").write_text("{"), "cannot be read"),
        (lambda f: (f / "tokenizer.model").write_bytes(train_tokenizer(TEXTS, 330).serialized), "not the tokenizer"),
    ],
)
def test_damaged_folders(prepared, change, message):
    with pytest.raises(DataError, match=message) as caught:
        Dataset.open(damage(prepared, change)).split("val")
    assert "\n" not in str(caught.value)


def change_account(folder: Path, **changes) -> None:
    described = json.loads((folder / "data.json").read_text())
    described["train"].update(changes)
    (folder / "data.json").write_text(json.dumps(described))


@pytest.mark.parametrize(
    "change",
    [
        lambda f: change_account(f, tokens="many"),
        lambda f: change_account(f, bytes=None),
        lambda f: (f / "data.json").write_text("[1]"),
        lambda f: (f / "data.json").write_text(json.dumps({**json.loads((f / "data.json").read_text()), "train": 5})),
        lambda f: (f / "train_corrections.npy").unlink(),
        lambda f: (f / "train_corrections.npy").write_bytes(b""),
        lambda f: np.save(f / "train_corrections.npy", np.zeros(3, dtype=np.int64)),
        lambda f: np.save(f / "train_corrections.npy", np.array([[0, 1_000_000]])),
        lambda f: np.save(f / "train_corrections.npy", np.array([[0, 1]], dtype=object), allow_pickle=True),
    ],
)
def test_damaged_accounts(prepared, change):
    with pytest.raises(DataError, match=r"prepare the data again") as caught:
        Dataset.open(damage(prepared, change)).split("train")
    assert "\n" not in str(caught.value)


def test_long_reads_are_those_of_the_map(tmp_path, tokenizer):
    """Stretches of a million tokens and more are read another way; both give the same ids and the same errors."""
    ids = np.random.default_rng(0).integers(0, tokenizer.vocab_size, 1_500_000)
    paths = [write_shard(tmp_path / f"train_{i:06d}.bin", part) for i, part in enumerate(np.split(ids, [1_200_000]))]
    stream = TokenStream(paths, tokenizer)
    assert np.array_equal(stream[1:], ids[1:]) and np.array_equal(np.concatenate([*stream.chunks(5, 9, 3)]), ids[5:9])
    assert stream.count_bytes(3, len(ids)) == int(tokenizer.byte_counts(ids[3:], int(ids[2])).sum())
    os.truncate(paths[0], HEADER_BYTES + 100)
    with pytest.raises(DataError, match=r"train_000000\.bin was cut short"):
        stream[0:1_200_000]


def test_foreign_ids_are_found_when_read(tmp_path, tokenizer):
    path = write_shard(tmp_path / "val_000000.bin", np.array([1, 2, 60_000]))
    stream = TokenStream([path], tokenizer)
    assert stream[0:2].tolist() == [1, 2]
    with pytest.raises(DataError, match="60000"):
        stream[0:3]


def test_not_a_data_folder(tmp_path):
    for folder, message in ((tmp_path / "none", "not a data folder"), (tmp_path, "no data.json")):
        with pytest.raises(DataError, match=message):
            Dataset.open(folder)


def test_challenge_scale_opens_quickly_and_small(tmp_path, tokenizer):
    """100 sparse shards of 100M tokens: opened, read at both ends and shuffled in seconds, in flat memory."""
    header = np.zeros(256, dtype="<i4")
    header[:3] = 20240520, 1, 100_000_000
    for i in range(100):
        with (tmp_path / f"fineweb_train_{i:06d}.bin").open("wb") as file:
            file.write(header.tobytes())
            file.truncate(HEADER_BYTES + 200_000_000)
    (tmp_path / "t.model").write_bytes(tokenizer.serialized)
    code = (
        "import resource, sys, time\n"
        "from mezzotint.data.dataset import Dataset\nfrom mezzotint.data.loader import Loader\n"
        "start = time.time()\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "stream = Dataset.open(sys.argv[1]).split('train'); loader = Loader(stream, 2048, 64, 0)\n"
        "stream.bytes_per_token(); opened = time.time() - start\n"
        "for step in range(50): loader.batch(step * 1000)\n"
        "print(len(stream), opened, time.time() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    out = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True).stdout
    tokens, opened, seconds, grown = (float(x) for x in out.split())
    assert tokens == 1e10 and opened < 3 and seconds < 20 and grown < 100_000  # kB


def test_mean_bytes_of_a_token_from_a_sample(tmp_path, tokenizer):
    """Where nobody has counted the bytes: near the whole's figure, from a part of it."""
    ids = np.array([*tokenizer.encode(" ".join(TEXTS))] * 400)
    write_shard(tmp_path / "fineweb_train_000000.bin", ids)
    (tmp_path / "t.model").write_bytes(tokenizer.serialized)
    stream = Dataset.open(tmp_path).split("train")
    assert stream.known_bytes is None
    assert stream.bytes_per_token(sample=len(ids) // 4) == pytest.approx(stream.bytes / len(stream), rel=0.1)
    assert stream.bytes_per_token() == stream.bytes / len(stream)


def test_published_layout_finds_its_tokenizer(tmp_path, tokenizer, monkeypatch):
    """datasets/NAME beside tokenizers/, with several tokenizers, from outside and from within."""
    folder = tmp_path / "datasets" / "fineweb10B_sp300"
    folder.mkdir(parents=True)
    (tmp_path / "tokenizers").mkdir()
    ids = np.array([tokenizer.bos_id, *tokenizer.encode(TEXTS[0])])
    write_shard(folder / "fineweb_train_000000.bin", ids)
    with pytest.raises(DataError, match="no tokenizer"):
        Dataset.open(folder)
    (tmp_path / "tokenizers" / "fineweb_300_bpe.model").write_bytes(tokenizer.serialized)
    (tmp_path / "tokenizers" / "fineweb_330_bpe.model").write_bytes(train_tokenizer(TEXTS, 330).serialized)
    monkeypatch.chdir(folder)
    for place in (folder, "."):
        dataset = Dataset.open(place)
        assert dataset.tokenizer.sha256 == tokenizer.sha256
        assert dataset.split("train").bytes == len(TEXTS[0].encode())


def test_flipped_bits_are_found_when_they_are_read(prepared):
    """Valid ids in valid places: only the checksum can tell. What is not read is not checked."""

    def flip(folder: Path) -> None:
        path = folder / "train_000000.bin"
        data = bytearray(path.read_bytes())
        for at in range(HEADER_BYTES + 20, min(len(data), HEADER_BYTES + 6_020), 2):
            data[at] ^= 1
        path.write_bytes(data)

    damaged = Dataset.open(damage(prepared, flip)).split("train")  # opening reads no ids
    assert Dataset.open(prepared).split("train")[0:30].max() < 340
    for _ in range(2):  # a refusal is not forgotten
        with pytest.raises(DataError, match=r"train_000000\.bin is damaged: its ids have changed"):
            damaged[0:3]


def test_checksums_are_of_blocks(tmp_path, tokenizer, monkeypatch):
    """Damage in one block leaves the others readable, through the map and by long reads."""
    monkeypatch.setattr(dataset_module, "BLOCK_TOKENS", 100)
    ids = np.arange(1030) % 300
    path = write_shard(tmp_path / "train_000000.bin", ids)
    sums = {path.name: checksums(path)}
    assert len(sums[path.name]) == 11 * 8
    write_shard(path, np.where(np.arange(1030) == 512, 7, ids))
    stream = TokenStream([path], tokenizer, sums=sums)
    assert np.array_equal(stream[0:500], ids[:500]) and np.array_equal(stream[600:1030], ids[600:])
    for start, stop in ((512, 513), (590, 601), (0, 1030)):
        with pytest.raises(DataError, match="ids have changed"):
            stream[start:stop]


def test_lost_bytes_of_windows(tmp_path):
    """Every window says what its own tokens lose; over all windows it is what the account says."""
    lossy = small_lossy_tokenizer()
    texts = ["the plate is dark", "the  plate 漢字 is", "漢字", "plain the plate"]
    write_jsonl(tmp_path / "c.jsonl", texts)
    (tmp_path / "t.model").write_bytes(lossy.serialized)
    report = prepare([tmp_path / "c.jsonl"], tmp_path / "d", tokenizer=tmp_path / "t.model", val=[tmp_path / "c.jsonl"])
    # One space of two, 6 bytes of Chinese in each of two documents, and the space behind an unknown piece.
    assert report["val"]["lost_bytes"] == 14 and report["val"]["not_round_trip"] == 2
    dataset = Dataset.open(tmp_path / "d")
    stream = dataset.split("val")
    for length in (1, 3, 1000):
        windows = stream.windows(length)
        assert sum(windows.bytes_lost(i) for i in range(len(windows))) == 14
    unknown = np.flatnonzero(stream[0 : len(stream)] == 3)
    assert [stream.lost_bytes(int(i), int(i) + 1) for i in unknown] == [6, 6]
    described = json.loads((tmp_path / "d" / "data.json").read_text())
    described["val"].pop("lost_bytes")
    (tmp_path / "d" / "data.json").write_text(json.dumps(described))
    rough = Dataset.open(tmp_path / "d").split("val")  # nobody counted them
    assert rough.lost_bytes(0, len(rough)) > 0


def test_pairs_are_checked():
    class Has:
        def __init__(self, tokenizer):
            self.tokenizer = tokenizer

    check_same_tokenizer(Has(small_tokenizer()), Has(small_tokenizer()))
    with pytest.raises(DataError, match=r"mine was prepared with another tokenizer than m\.mzt: .*--tokenizer"):
        check_same_tokenizer(Has(small_tokenizer()), Has(small_lossy_tokenizer()), "m.mzt", "mine")
