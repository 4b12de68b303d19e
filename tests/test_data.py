"""Sources, tokenizers, byte accounts, shards, windows and the loader's order."""

from __future__ import annotations

import errno
import hashlib
import http.server
import io
import json
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

import mezzotint.data.prepare as prepare_module
from mezzotint.data.dataset import HEADER_BYTES, Dataset, TokenStream
from mezzotint.data.loader import Loader, Prefetch, permute
from mezzotint.data.prepare import prepare
from mezzotint.data.sources import documents
from mezzotint.data.tokenizer import Tokenizer, train_tokenizer
from mezzotint.errors import DataError

SHARED = Path(os.environ.get("MEZZOTINT_SHARED", Path(__file__).resolve().parents[2] / "shared")) / "data"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="the development corpus is not here")

TEXTS = [
    "The plate is dark. The burnisher draws the light out of it, slowly.",
    "  leading spaces, trailing ones  ",
    "line one\nline two\r\n\n\ttabbed — naïve café 漢字 🎨",
    "12345 67890",
    "\u2581 is the mark of a space",
    "the plate the plate the plate " * 20,
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(TEXTS * 3, 340)


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    return path


def write_shard(path: Path, ids: np.ndarray, magic: int = 20240520, version: int = 1, count: int | None = None) -> Path:
    header = np.zeros(256, dtype="<i4")
    header[:3] = magic, version, len(ids) if count is None else count
    path.write_bytes(header.tobytes() + ids.astype("<u2").tobytes())
    return path


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_jsonl(folder / "c.jsonl", [f"{t} {i}" for i in range(10) for t in TEXTS])
    prepare([folder / "c.jsonl"], folder / "out", vocab_size=340, val_fraction=0.2)
    assert (folder / "out" / "train_corrections.npy").exists()  # one of the texts holds U+2581
    return folder / "out"


# --- tokenizer --------------------------------------------------------------------------------------------------------


def naive_bytes(tokenizer: Tokenizer, ids: list[int], previous: int | None) -> list[int]:
    """The challenge's rule token by token, from its description."""
    counts = []
    silent_before = previous is None or previous in tokenizer.control_ids
    for i in ids:
        piece = tokenizer.piece(i)
        if i in tokenizer.control_ids:
            counts.append(0)
        elif piece.startswith("<0x") and piece.endswith(">") and len(piece) == 6:
            counts.append(1)
        elif piece.startswith("\u2581"):
            counts.append(len(piece[1:].replace("\u2581", " ").encode()) + (0 if silent_before else 1))
        else:
            counts.append(len(piece.replace("\u2581", " ").encode()))
        silent_before = i in tokenizer.control_ids
    return counts


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=40))
def test_own_tokenizer_round_trips_text_and_bytes(text):
    tokenizer = _cached_tokenizer()
    if "\u2581" in text:  # SentencePiece's own space mark reads back as a space
        return
    ids = tokenizer.encode(text)
    assert tokenizer.decode_bytes(ids) == text.encode()
    assert tokenizer.decode(ids) == text
    with_bos = np.array([tokenizer.bos_id, *ids])
    assert int(tokenizer.byte_counts(with_bos).sum()) == len(text.encode())


def _cached_tokenizer(cache: list[Tokenizer] = []) -> Tokenizer:  # noqa: B006
    if not cache:
        cache.append(train_tokenizer(TEXTS * 3, 340))
    return cache[0]


def test_byte_counts_against_the_rule(tokenizer):
    rng = np.random.default_rng(0)
    for previous in (None, tokenizer.bos_id, 330):
        ids = rng.integers(0, tokenizer.vocab_size, 400)
        assert tokenizer.byte_counts(ids, previous).tolist() == naive_bytes(tokenizer, ids.tolist(), previous)


def test_byte_counts_are_those_of_the_scored_token(tokenizer):
    """A token's own bytes, wherever the sequence is cut: the fault of counting the next token's would show here."""
    ids = np.array([tokenizer.bos_id, *tokenizer.encode(TEXTS[0])])
    whole = tokenizer.byte_counts(ids)
    for cut in range(1, len(ids)):
        parts = [tokenizer.byte_counts(ids[:cut]), tokenizer.byte_counts(ids[cut:], int(ids[cut - 1]))]
        assert np.array_equal(np.concatenate(parts), whole)
    for i in range(1, len(ids)):
        assert whole[i] == len(tokenizer.decode_bytes(ids[: i + 1])) - len(tokenizer.decode_bytes(ids[:i]))


def test_sums_are_those_of_the_counts(tokenizer):
    rng = np.random.default_rng(1)
    for previous in (None, tokenizer.bos_id, 330):
        for size in (0, 1, 2, 500):
            ids = rng.integers(0, tokenizer.vocab_size, size).astype(np.uint16)
            ids[rng.random(size) < 0.3] = tokenizer.bos_id
            assert tokenizer.sum_bytes(ids, previous) == int(tokenizer.byte_counts(ids, previous).sum())


OFFICIAL = [SHARED / "tokenizers" / f"fineweb_{n}_bpe.model" for n in (1024, 8192)]


def tokenizers() -> list[Tokenizer]:
    return [_cached_tokenizer(), *(Tokenizer.load(p) for p in OFFICIAL if p.exists())]


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.sampled_from(["the plate", " ", "  ", "\n", " a", "b ", "é", "漢", "12", ".", "x y z"]), max_size=40)
)
def test_parts_of_a_text_have_the_ids_of_the_whole(words):
    text = "".join(words)
    for tokenizer in tokenizers():
        parts = list(tokenizer.cut(text, 5))
        assert "".join(parts) == text
        ids = tokenizer.encode_batch(parts, [i > 0 for i in range(len(parts))])
        assert [i for part in ids for i in part] == tokenizer.encode(text)


def test_a_text_is_cut_only_where_pieces_allow_it(tokenizer):
    assert list(tokenizer.cut("one two three", 4)) == ["one two", " three"]
    assert list(tokenizer.cut("one  two-3 4\nfive", 4)) == ["one  two-3 4\nfive"]
    suffixed = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS * 3),
        model_writer=suffixed,
        vocab_size=330,
        model_type="bpe",
        byte_fallback=True,
        treat_whitespace_as_suffix=True,
        minloglevel=2,
    )
    assert list(Tokenizer.from_bytes(suffixed.getvalue()).cut("one two three", 4)) == ["one two three"]


@needs_shared
@pytest.mark.parametrize("path", OFFICIAL, ids=lambda p: p.name)
def test_byte_counts_against_the_challenge_on_its_tokenizers(path):
    """The challenge's piece table, from its description, with SentencePiece's own answers."""
    official = sentencepiece.SentencePieceProcessor(model_file=str(path))
    tokenizer = Tokenizer.load(path)
    for i in range(official.get_piece_size()):
        silent = official.is_control(i) or official.is_unknown(i) or official.is_unused(i)
        piece = official.id_to_piece(i)
        bare = 0 if silent else 1 if official.is_byte(i) else len(piece.removeprefix("\u2581").encode())
        space = not silent and piece.startswith("\u2581")
        assert tokenizer.byte_counts(np.array([i])).tolist() == [bare]
        after_text = tokenizer.encode("a")[0]
        assert tokenizer.byte_counts(np.array([i]), after_text).tolist() == [bare + space]


def test_tokenizer_training_is_deterministic(tokenizer):
    assert train_tokenizer(TEXTS * 3, 340).sha256 == tokenizer.sha256


def test_bad_tokenizers(tmp_path):
    (tmp_path / "x.model").write_bytes(b"no model" * 10)
    with pytest.raises(DataError, match=r"x\.model.*SentencePiece"):
        Tokenizer.load(tmp_path / "x.model")
    with pytest.raises(DataError, match="cannot read tokenizer"):
        Tokenizer.load(tmp_path / "none.model")
    for size, texts in ((5000, ["short"]), (100, ["short"])):
        with pytest.raises(DataError, match=r"--vocab-size \d+") as caught:
            train_tokenizer(texts, size)
        assert "\n" not in str(caught.value)
        advised = int(re.findall(r"--vocab-size (\d+)", str(caught.value))[0])
        assert train_tokenizer(texts, advised).vocab_size == advised  # the advice works
    with pytest.raises(DataError, match="no text"):
        train_tokenizer([], 300)


# --- sources ----------------------------------------------------------------------------------------------------------


def test_every_kind_of_source(tmp_path):
    (tmp_path / "a.txt").write_text(TEXTS[0])
    write_jsonl(tmp_path / "b.jsonl", TEXTS[1:3])
    (tmp_path / "deep").mkdir()
    pq.write_table(pa.table({"text": [*TEXTS[3:5], None, ""], "n": [1, 2, 3, 4]}), tmp_path / "deep" / "c.parquet")
    (tmp_path / "ignored.md").write_text("no")
    assert list(documents(tmp_path)) == TEXTS[:5]
    assert list(documents(tmp_path / "deep" / "c.parquet")) == TEXTS[3:5]


def test_parquet_text_that_is_not_utf8(tmp_path):
    offsets = pa.py_buffer(np.array([0, 2], dtype=np.int32))
    column = pa.Array.from_buffers(pa.string(), 1, [None, offsets, pa.py_buffer(b"\xff\xfe")])
    pq.write_table(pa.table({"text": column}), tmp_path / "x.parquet")
    with pytest.raises(DataError, match=r"x\.parquet.*not UTF-8"):
        list(documents(tmp_path / "x.parquet"))


def test_suffixes_in_capitals(tmp_path):
    (tmp_path / "A.TXT").write_text("hello")
    assert list(documents(tmp_path)) == list(documents(tmp_path / "A.TXT")) == ["hello"]


def test_stdlib_is_python_source():
    texts = list(documents("stdlib"))
    assert len(texts) > 300 and any("class JSONDecoder" in t for t in texts)
    assert texts[:20] == list(documents("stdlib"))[:20]


def bad(tmp_path: Path, name: str, content: bytes) -> Path:
    (tmp_path / name).write_bytes(content)
    return tmp_path / name


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.txt", b"\xff\xfe\x00", "not UTF-8"),
        ("x.jsonl", b'{"text": "a"}\nnot json\n', "line 2"),
        ("x.jsonl", b'{"words": "a"}\n', "line 1"),
        ("x.jsonl", b'{"text": "\\ud800"}\n', "line 1"),
        ("x.jsonl", b'{"text": 3}\n', "line 1"),
        ("x.jsonl", b"[" * 200_000 + b"\n", "line 1"),
        ("x.parquet", b"PAR1 not really", "Parquet"),
        ("x.txt", b"", "every document is empty"),
        ("x.doc", b"words", "unknown kind"),
    ],
)
def test_bad_sources(tmp_path, name, content, message):
    path = bad(tmp_path, name, content)
    with pytest.raises(DataError, match=message) as caught:
        prepare([path], tmp_path / "out", vocab_size=340)
    assert "\n" not in str(caught.value) and name in str(caught.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == [name]


def test_bad_requests(tmp_path):
    source = write_jsonl(tmp_path / "c.jsonl", TEXTS * 3)
    (tmp_path / "empty").mkdir()
    cases = [
        (dict(sources=[]), "no source"),
        (dict(sources=[tmp_path / "none.txt"]), "does not exist"),
        (dict(sources=[tmp_path / "empty"]), "holds no"),
        (dict(sources=[source], val_fraction=1.5), "val-fraction"),
        (dict(sources=[source], vocab_size=70_000), "65,535"),
        (dict(sources=[source], vocab_size=340, tokenizer="x"), "not both"),
        (dict(sources=[source], vocab_size=340, val=[tmp_path / "empty"]), "holds no"),
        (dict(sources=["fineweb:sp1024", source]), "alone"),
        (dict(sources=["fineweb:sp1024:x"]), "write fineweb"),
    ]
    for arguments, message in cases:
        with pytest.raises(DataError, match=message):
            prepare(out=tmp_path / "out", **arguments)
    table = pa.table({"body": ["a"]})
    pq.write_table(table, tmp_path / "t.parquet")
    with pytest.raises(DataError, match="no column"):
        prepare([tmp_path / "t.parquet"], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(DataError, match="exists"):
        prepare([source], tmp_path, vocab_size=340)


# --- prepare and accounts ---------------------------------------------------------------------------------------------


def test_prepare_accounts_for_every_byte(tmp_path):
    train, val = TEXTS[:4] * 5, TEXTS[4:]
    write_jsonl(tmp_path / "t.jsonl", train)
    write_jsonl(tmp_path / "v.jsonl", val)
    report = prepare([tmp_path / "t.jsonl"], tmp_path / "out", vocab_size=340, val=[tmp_path / "v.jsonl"])
    for split, texts in (("train", train), ("val", val)):
        assert report[split]["documents"] == len(texts)
        assert report[split]["bytes"] == sum(len(t.encode()) for t in texts)
    assert report["train"]["not_round_trip"] == 0 and report["train"]["piece_bytes"] == report["train"]["bytes"]
    assert report["val"]["not_round_trip"] == 1  # the one with U+2581, which reads back as a space: 2 bytes short
    assert report["val"]["bytes"] - report["val"]["piece_bytes"] == 2
    dataset = Dataset.open(tmp_path / "out")
    for split, texts in (("train", train), ("val", val)):
        stream = dataset.split(split)
        ids = stream[0 : len(stream)].astype(int)
        assert int((ids == dataset.tokenizer.bos_id).sum()) == len(texts) and ids[0] == dataset.tokenizer.bos_id
        for length in (7, 64, 10_000):
            windows = stream.windows(length)
            assert np.array_equal(np.concatenate([windows[i] for i in range(len(windows))]), ids)
            assert sum(windows.byte_count(i) for i in range(len(windows))) == stream.bytes == report[split]["bytes"]
    starts = np.flatnonzero(ids == dataset.tokenizer.bos_id)
    assert dataset.tokenizer.decode(ids[starts[1] :].tolist()) == val[1]
    described = json.loads((tmp_path / "out" / "data.json").read_text())
    assert described["tokenizer_sha256"] == hashlib.sha256((tmp_path / "out/tokenizer.model").read_bytes()).hexdigest()
    assert str(tmp_path) not in json.dumps(described)


def test_prepare_is_deterministic_and_splits_by_seed(tmp_path):
    source = write_jsonl(tmp_path / "c.jsonl", [f"{t} {i}" for i in range(10) for t in TEXTS])
    hashes = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        prepare([source], tmp_path / name, vocab_size=340, val_fraction=0.1, seed=seed)
        files = sorted(p for p in (tmp_path / name).glob("*.bin"))
        hashes.append([hashlib.sha256(p.read_bytes()).hexdigest() for p in files])
    assert hashes[0] == hashes[1] != hashes[2]


def test_single_document_is_cut(tmp_path):
    (tmp_path / "book.txt").write_text(
        "\n\n".join(f"Paragraph {i} of the book: {i * 7919} words. " * 3 for i in range(200))
    )
    report = prepare([tmp_path / "book.txt"], tmp_path / "out", vocab_size=340, val_fraction=0.1)
    total = (tmp_path / "book.txt").stat().st_size
    assert report["train"]["bytes"] + report["val"]["bytes"] == total
    assert 0.05 * total < report["val"]["bytes"] < 0.15 * total


def test_shards_are_cut_at_their_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_module, "SHARD_TOKENS", 100)
    source = write_jsonl(tmp_path / "c.jsonl", TEXTS * 4)
    report = prepare([source], tmp_path / "out", vocab_size=340, val_fraction=0.1)
    shards = sorted((tmp_path / "out").glob("train_*.bin"))
    assert len(shards) == -(-report["train"]["tokens"] // 100) > 2
    assert all(p.stat().st_size == HEADER_BYTES + 200 for p in shards[:-1])
    stream = Dataset.open(tmp_path / "out").split("train")
    whole = np.concatenate([np.fromfile(p, dtype="<u2", offset=HEADER_BYTES) for p in shards])
    for a, b in ((0, len(whole)), (95, 105), (100, 200), (150, 350)):
        assert np.array_equal(stream[a:b], whole[a:b])


def test_long_documents_are_written_as_short_ones(tmp_path, monkeypatch):
    """Encoding in parts changes no file and no count, on text that the tokenizer spoils as well."""
    texts = [" ".join(TEXTS) + f" {i}" for i in range(12)]
    texts[3] += " and a mark \u2581 within"
    source = write_jsonl(tmp_path / "c.jsonl", texts)
    reports = []
    for name, limit in (("whole", 1 << 20), ("parts", 7)):
        monkeypatch.setattr(prepare_module, "LONG_TEXT", limit)
        reports.append(prepare([source], tmp_path / name, vocab_size=340, val_fraction=0.2))
    assert reports[0] == reports[1] and reports[0]["train"]["bytes"] != reports[0]["train"]["piece_bytes"]
    names = sorted(p.name for p in (tmp_path / "whole").iterdir())
    assert names == sorted(p.name for p in (tmp_path / "parts").iterdir()) and "train_corrections.npy" in names
    for name in names:
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "parts" / name).read_bytes()


def test_memory_does_not_grow_with_a_document(tmp_path):
    """A text of 16 million characters costs far less than the 50 bytes each that encoding it whole would take."""
    (tmp_path / "c.txt").write_text("the plate is dark and the burnisher draws light out of it\n" * 280_000)
    code = (
        "import resource, sys\nfrom mezzotint.data.prepare import prepare\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "prepare([sys.argv[1] + '/c.txt'], sys.argv[1] + '/out', tokenizer=sys.argv[1] + '/t.model')\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    (tmp_path / "t.model").write_bytes(_cached_tokenizer().serialized)
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 500_000  # kB


def test_tokenizer_sample_is_spread_over_the_texts():
    texts = [f"{i:04d}" + "x" * 5996 for i in range(100)]
    sample = list(prepare_module._sample(texts, 100_000, sum(map(len, texts))))
    assert 96_000 <= sum(map(len, sample)) <= 104_000
    begins = [int(part[:4]) for part in sample if part[:4].isdigit()]
    assert min(begins) < 10 and max(begins) >= 90
    assert "".join(prepare_module._sample(texts, 1 << 30, 600_000)) == "".join(texts)


def test_val_and_val_fraction_exclude_each_other(tmp_path):
    source = write_jsonl(tmp_path / "c.jsonl", TEXTS)
    with pytest.raises(DataError, match="not both"):
        prepare([source], tmp_path / "out", vocab_size=340, val=[source], val_fraction=0.5)


def test_full_disk_leaves_nothing(tmp_path, monkeypatch):
    source = write_jsonl(tmp_path / "c.jsonl", TEXTS * 4)

    def full(self, ids):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(prepare_module._ShardWriter, "append", full)
    with pytest.raises(DataError, match="disk is full"):
        prepare([source], tmp_path / "out", vocab_size=340)
    assert [p.name for p in tmp_path.iterdir()] == ["c.jsonl"]


@needs_shared
def test_official_tokenizer_on_prose(tmp_path):
    """Both byte accounts of the validation prose, with the challenge's tokenizer, by two routes."""
    texts = pq.read_table(SHARED / "prose" / "val.parquet").column("text").to_pylist()
    raw = sum(len(t.encode()) for t in texts)
    source = [SHARED / "prose" / "val.parquet"]
    report = prepare(source, tmp_path / "d", tokenizer=SHARED / "tokenizers" / "fineweb_1024_bpe.model", val=source)
    account = report["val"]
    assert account["documents"] == 327 and account["bytes"] == raw == 1_647_844
    tokenizer = Dataset.open(tmp_path / "d").tokenizer
    agree = 0
    for text in texts:
        ids = np.array([tokenizer.bos_id, *tokenizer.encode(text)])
        decoded = tokenizer.decode_bytes(ids)
        # The piece table counts exactly the bytes that the ids decode to, for every document.
        assert int(tokenizer.byte_counts(ids).sum()) == len(decoded)
        agree += decoded == text.encode()
    assert account["not_round_trip"] == len(texts) - agree
    # The tokenizer turns line breaks into spaces and drops runs; that is all by which the accounts differ.
    assert abs(account["piece_bytes"] - raw) / raw < 5e-4
    windows = Dataset.open(tmp_path / "d").split("val").windows(256)
    assert sum(windows.byte_count(i) for i in range(len(windows))) == raw


# --- shards -----------------------------------------------------------------------------------------------------------


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


# --- the challenge's published shards ---------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path, tokenizer, monkeypatch):
    """A server of the hub's file endpoints over a local tree, for the real huggingface_hub client."""
    pytest.importorskip("huggingface_hub")
    tree = tmp_path / "tree" / "datasets"
    (tree / "datasets" / "fineweb10B_sp300").mkdir(parents=True)
    (tree / "tokenizers").mkdir()
    (tree / "tokenizers" / "fineweb_300_bpe.model").write_bytes(tokenizer.serialized)
    ids = np.concatenate([[tokenizer.bos_id, *tokenizer.encode(t)] for t in TEXTS])
    for i, split in enumerate(("train_000000", "train_000001", "val_000000")):
        write_shard(tree / "datasets" / "fineweb10B_sp300" / f"fineweb_{split}.bin", np.roll(ids, i))
    manifest = {
        "datasets": [
            {"name": "fineweb10B_sp300", "tokenizer_name": "sp_bpe_300", "stats": {"files_train": 2, "files_val": 1}}
        ],
        "tokenizers": [{"name": "sp_bpe_300", "model_path": "tokenizers/fineweb_300_bpe.model"}],
    }
    (tree / "manifest.json").write_text(json.dumps(manifest))

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.reply(False)

        def do_GET(self):
            self.reply(True)

        def reply(self, body: bool):
            prefix = "/datasets/willdepueoai/parameter-golf/resolve/main/"
            path = tree.parent / self.path.removeprefix(prefix).split("?")[0]
            if not self.path.startswith(prefix) or not path.is_file():
                self.send_response(404)
                self.send_header("X-Error-Code", "EntryNotFound")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            content = path.read_bytes()
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
            self.send_header("X-Repo-Commit", "0" * 40)
            self.end_headers()
            if body:
                self.wfile.write(content)

        def log_message(self, *words):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    # The client reads its endpoint when it is imported, so the test runs it in a process of its own.
    environment = {
        **{k: v for k, v in os.environ.items() if "proxy" not in k.lower()},
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HOME": str(tmp_path / "cache"),
        "HF_HUB_DISABLE_XET": "1",
        "NO_PROXY": "127.0.0.1",
    }

    def run(source: str) -> subprocess.CompletedProcess[str]:
        code = (
            "import json, sys\nfrom mezzotint.data.prepare import prepare\nfrom mezzotint.errors import DataError\n"
            "try: print(json.dumps(prepare([sys.argv[1]], sys.argv[2])))\n"
            "except DataError as error: sys.exit(f'DataError: {error}')"
        )
        words = [sys.executable, "-c", code, source, str(tmp_path / "out")]
        return subprocess.run(words, capture_output=True, text=True, env=environment, timeout=120)

    yield run, tree, tmp_path / "out"
    server.shutdown()


def test_published_shards(hub, tokenizer):
    run, _, out = hub
    done = run("fineweb:sp300:1")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    raw = sum(len(t.encode()) for t in TEXTS) - 2  # U+2581 reads as a space
    assert report["train"]["documents"] == len(TEXTS) and report["train"]["bytes"] == raw
    assert sorted(p.name for p in out.glob("*.bin")) == ["fineweb_train_000000.bin", "fineweb_val_000000.bin"]
    stream = Dataset.open(out).split("train")
    assert stream.bytes == raw and stream.bytes_kind == "pieces"
    # The same shards without data.json, as published: the bytes come from the piece table.
    (out / "data.json").unlink()
    assert Dataset.open(out).split("train").bytes == raw


def test_published_shards_that_are_missing(hub):
    run, tree, out = hub
    (tree / "datasets" / "fineweb10B_sp300" / "fineweb_train_000001.bin").unlink()
    done = run("fineweb:sp300")
    assert done.returncode == 1 and "fineweb_train_000001.bin" in done.stderr and not out.exists()
    assert "no fineweb10B_sp77" in run("fineweb:sp77").stderr
    assert "has 2 training shards" in run("fineweb:sp300:3").stderr


def test_an_unreachable_hub_is_one_line(tmp_path):
    code = (
        "import sys\nfrom mezzotint.data.prepare import prepare\nfrom mezzotint.errors import DataError\n"
        "try: prepare(['fineweb:sp1024'], sys.argv[1])\nexcept DataError as error: print(error)"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "out")], capture_output=True, text=True, env=environment, check=True
    )
    assert done.stdout.count("\n") == 1 and "manifest.json" in done.stdout and not (tmp_path / "out").exists()


# --- the loader -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 3, 17, 64, 1000])
def test_permute_is_a_permutation(size):
    orders = [permute(np.arange(size), size, key) for key in range(3)]
    for order in orders:
        assert sorted(order.tolist()) == list(range(size))
    if size >= 17:
        assert not np.array_equal(orders[0], orders[1])
        assert abs(np.corrcoef(np.arange(size), orders[0])[0, 1]) < 0.6


@pytest.fixture
def stream(tmp_path, tokenizer) -> TokenStream:
    return TokenStream([write_shard(tmp_path / "train_000000.bin", np.arange(103) % 330)], tokenizer)


def test_each_epoch_takes_every_window_once(stream):
    loader = Loader(stream, 10, 3, seed=5)
    rows = np.concatenate([loader.starts(step) for step in range(loader.epoch_windows * 2)])
    phases = []
    for epoch in range(6):
        starts = np.sort(rows[epoch * loader.epoch_windows : (epoch + 1) * loader.epoch_windows])
        assert np.array_equal(np.diff(starts), np.full(loader.epoch_windows - 1, 10))
        assert starts[0] >= 0 and starts[-1] + 10 <= 103
        phases.append(int(starts[0]))
    assert len(set(phases)) > 1
    assert np.array_equal(loader.batch(0)[0], (np.arange(10) + loader.starts(0)[0]) % 330)


def test_order_does_not_depend_on_processes(stream):
    whole = Loader(stream, 10, 4, seed=1)
    for world in (2, 4):
        parts = [Loader(stream, 10, 4, seed=1, rank=r, world_size=world) for r in range(world)]
        for step in range(12):
            assert np.array_equal(np.concatenate([p.batch(step) for p in parts]), whole.batch(step))


def test_loader_refuses_what_it_cannot_do(stream):
    with pytest.raises(DataError, match="fewer than one window"):
        Loader(stream, 104, 1, seed=0)
    with pytest.raises(DataError, match="cannot be shared"):
        Loader(stream, 10, 3, seed=0, world_size=2)
    with pytest.raises(DataError, match="batch was 4"):
        Loader(stream, 10, 3, seed=0).load_state_dict(Loader(stream, 10, 4, seed=0).state_dict())


def test_short_stream_wraps(stream):
    batch = Loader(stream, 100, 16, seed=0).batch(3)
    assert batch.shape == (16, 100)


def test_prefetch_gives_the_same_batches_and_errors(stream, tokenizer, tmp_path):
    loader = Loader(stream, 10, 3, seed=0)
    ahead = Prefetch(loader)
    for step in (0, 1, 2, 7, 8, 3, 4):
        assert np.array_equal(ahead.batch(step), loader.batch(step))
    ahead.close()
    foreign = TokenStream([write_shard(tmp_path / "x_000000.bin", np.full(50, 60_000))], tokenizer)
    failing = Prefetch(Loader(foreign, 10, 2, seed=0))
    with pytest.raises(DataError, match="60000"):
        failing.batch(0)
    failing.close()
    with pytest.raises(RuntimeError):  # rather than waiting for ever
        ahead.batch(9)
