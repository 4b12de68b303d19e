"""Data folders and their accounts of bytes; the published shards."""

from __future__ import annotations

import errno
import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from corpus import SHARED, TEXTS, needs_shared, small_tokenizer, write_jsonl, write_shard
from hypothesis import given, settings
from hypothesis import strategies as st

import mezzotint.data.prepare as prepare_module
import mezzotint.data.sources as sources_module
from mezzotint.data.dataset import HEADER_BYTES, Dataset
from mezzotint.data.prepare import prepare
from mezzotint.data.tokenizer import Tokenizer
from mezzotint.errors import DataError


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return small_tokenizer()


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
    (tmp_path / "t.model").write_bytes(small_tokenizer().serialized)
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


@pytest.mark.parametrize(("source", "named"), [("fineweb:sp1024", "manifest.json"), ("hf:nobody/nothing", "hf:nobody")])
@pytest.mark.parametrize(
    "away", [{"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}], ids=["offline", "silent"]
)
def test_an_unreachable_hub_is_one_line(tmp_path, source, named, away):
    """Without the client's own attempts, one after another."""
    if source.startswith("hf:"):
        pytest.importorskip("datasets")
    code = (
        "import sys\nfrom mezzotint.data.prepare import prepare\nfrom mezzotint.errors import DataError\n"
        "try: prepare([sys.argv[2]], sys.argv[1])\nexcept DataError as error: print(error)"
    )
    environment = {**os.environ, "HF_HOME": str(tmp_path / "cache"), **away}
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "out"), source], capture_output=True, text=True, env=environment,
        check=True,
    )  # fmt: skip
    assert done.stdout.count("\n") == 1 and named in done.stdout and "cannot be reached" in done.stdout
    assert "Retrying" not in done.stderr and not (tmp_path / "out").exists()


# --- what goes in, and what is left -----------------------------------------------------------------------------------


def test_skipped_files_are_in_the_report(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    write_jsonl(folder / "a.jsonl", TEXTS)
    (folder / "b.png").write_bytes(b"no")
    (folder / ".c.txt").write_text("no")
    report = prepare([folder], tmp_path / "out", vocab_size=340)
    assert report["files"] == {"read": 1, "skipped": {"hidden": 1, "other types": 1}, "empty_documents": 0}
    assert json.loads((tmp_path / "out" / "data.json").read_text())["files"] == report["files"]


def run_prepare(tmp_path: Path, code: str, **options) -> subprocess.CompletedProcess[bytes]:
    code = f"import sys\nfrom mezzotint.data.prepare import prepare\n{code}"
    return subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, timeout=60, **options)


def test_standard_input_is_a_source(tmp_path):
    text = "\n".join(TEXTS) + "\r\nlast line"
    done = run_prepare(tmp_path, "prepare(['-'], sys.argv[1] + '/out', vocab_size=330)", input=text.encode())
    assert done.returncode == 0, done.stderr
    described = json.loads((tmp_path / "out" / "data.json").read_text())
    assert described["train"]["bytes"] + described["val"]["bytes"] == len(text.encode())
    assert described["sources"] == ["-"]
    with pytest.raises(DataError, match="once"):
        prepare(["-", "-"], tmp_path / "again")


@pytest.mark.skipif(os.name == "nt", reason="no SIGTERM there")
def test_sigterm_leaves_nothing(tmp_path):
    """Stopped in the middle of writing: no folder, no hidden one, one line."""
    write_jsonl(tmp_path / "c.jsonl", TEXTS * 4)
    code = (
        "import os, signal\nimport mezzotint.data.prepare as module\nfrom mezzotint.errors import Interrupted\n"
        "whole = module._ShardWriter.append\n"
        "def append(self, ids):\n    whole(self, ids)\n    os.kill(os.getpid(), signal.SIGTERM)\n"
        "module._ShardWriter.append = append\n"
        "try: prepare([sys.argv[1] + '/c.jsonl'], sys.argv[1] + '/out', vocab_size=340)\n"
        "except Interrupted as error: print(error)\n"
        "assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL"
    )
    done = run_prepare(tmp_path, code)
    assert done.stdout == b"stopped by SIGTERM; nothing was written\n", done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["c.jsonl"]


@pytest.mark.skipif(os.name == "nt", reason="no SIGTERM there")
def test_sigterm_while_standard_input_is_kept_leaves_nothing(tmp_path):
    """Stopped before anything is written: the file that keeps standard input is taken away as well."""
    code = (
        "import os, signal\nimport mezzotint.data.prepare as module\nfrom mezzotint.errors import Interrupted\n"
        "import tempfile\ntempfile.tempdir = sys.argv[1]\nwhole = module._sample\n"
        "def sample(*words):\n    os.kill(os.getpid(), signal.SIGTERM)\n    yield from whole(*words)\n"
        "module._sample = sample\n"
        "try: prepare(['-'], sys.argv[1] + '/out', vocab_size=340)\n"
        "except Interrupted as error: print(error)\n"
    )
    done = run_prepare(tmp_path, code, input=("\n".join(TEXTS) * 40).encode())
    assert done.stdout == b"stopped by SIGTERM; nothing was written\n", done.stderr
    assert not list(tmp_path.iterdir())


def test_a_tokenizer_from_where_it_is(tmp_path, tokenizer):
    """Itself, its file under any name, or the folder that holds it."""
    source = write_jsonl(tmp_path / "c.jsonl", TEXTS * 3)
    run = tmp_path / "run"
    run.mkdir()
    (run / "tokenizer.model").write_bytes(tokenizer.serialized)
    for i, named in enumerate((tokenizer, run, run / "tokenizer.model")):
        prepare([source], tmp_path / str(i), tokenizer=named)
        assert Dataset.open(tmp_path / str(i)).tokenizer.sha256 == tokenizer.sha256
    with pytest.raises(DataError, match="cannot read tokenizer"):
        prepare([source], tmp_path / "out", tokenizer=tmp_path / "0" / "nothing")


def test_progress_says_bytes_and_time_left(tmp_path):
    source = write_jsonl(tmp_path / "c.jsonl", ["the plate is dark"] * 600 + TEXTS)
    said: list[str] = []
    prepare(
        [source],
        tmp_path / "out",
        vocab_size=340,
        progress=lambda told: said.append(f"{told.text.partition(': ')[0]} {told.done}"),
    )
    assert any(line.startswith("reading (") and line.endswith("MB) 256") for line in said)
    assert any(line.startswith("encoding (") and "s left)" in line for line in said)


@pytest.mark.parametrize("size", [1, 2, 100, 70_000])
def test_sizes_that_no_vocabulary_has(tmp_path, size):
    source = write_jsonl(tmp_path / "c.jsonl", TEXTS)
    with pytest.raises(DataError, match=f"--vocab-size must lie between 262 .* and 65,535, not {size}"):
        prepare([source], tmp_path / "out", vocab_size=size)


@pytest.mark.parametrize(
    ("size", "tried"),
    [
        (3_932_160, [16384, 8192, 4096, 2048, 1024, 512, 384]),
        (3_932_159, [8192, 4096, 2048, 1024, 512, 384]),
        (1_966_080, [8192, 4096, 2048, 1024, 512, 384]),
        (1_966_079, [4096, 2048, 1024, 512, 384]),
        (983_040, [4096, 2048, 1024, 512, 384]),
        (983_039, [2048, 1024, 512, 384]),
        (300, [1024, 512, 384]),
    ],
)
def test_default_vocabulary_grows_with_the_text(tmp_path, monkeypatch, size, tried):
    """The largest that the text is long enough for; then smaller ones, as long as the text cannot fill them."""
    (tmp_path / "t.txt").write_text("x" * size)
    asked = []

    def train(texts, pieces):
        asked.append(pieces)
        raise DataError("too short")

    monkeypatch.setattr(prepare_module, "train_tokenizer", train)
    with pytest.raises(DataError, match="too short"):
        prepare([tmp_path / "t.txt"], tmp_path / "out")
    assert asked == tried


def test_a_small_text_gets_a_vocabulary_that_it_can_fill(tmp_path):
    write_jsonl(tmp_path / "t.jsonl", TEXTS)
    assert prepare([tmp_path / "t.jsonl"], tmp_path / "out")["vocab_size"] in (384, 512, 1024)


# --- one long document ------------------------------------------------------------------------------------------------


def in_stretches(text: str, sizes: list[int]) -> list[str]:
    parts, start = [], 0
    for size in sizes:
        parts.append(text[start : start + size])
        start += size
    return [*parts, text[start:]]


STRETCHED = st.tuples(st.text("ab \n\u00e9", max_size=60), st.lists(st.integers(0, 9), max_size=12))


@given(STRETCHED, st.integers(1, 12))
@settings(max_examples=300, deadline=None)
def test_a_text_in_stretches_is_cut_like_the_whole(tokenizer, stretched, limit):
    text, sizes = stretched
    parts = in_stretches(text, sizes)
    assert list(tokenizer.cut(parts, limit)) == list(tokenizer.cut(text, limit))
    assert list(prepare_module._passages(parts, limit)) == [text[i : i + limit] for i in range(0, len(text), limit)]


@given(STRETCHED, st.floats(0.01, 0.99))
@settings(max_examples=300, deadline=None)
def test_halves_of_a_text_in_stretches(stretched, fraction):
    """As by its definition: the first boundary of the best kind from the place on, else the last one before."""
    text, sizes = stretched
    target = int(len(text) * (1 - fraction))
    place = target
    for mark in ("\n\n", "\n", " "):
        at = text.find(mark, target)
        at = at if at >= 0 else text.rfind(mark, 0, target)
        if at > 0 and text[at + len(mark) :].strip():
            place = at + len(mark)
            break
    if not 0 < place < len(text):
        with pytest.raises(DataError, match="too short to split"):
            prepare_module._halves(in_stretches(text, sizes), fraction)
        return
    first, last = prepare_module._halves(in_stretches(text, sizes), fraction)
    assert ("".join(first), "".join(last)) == (text[:place], text[place:])


@pytest.mark.parametrize("more", [False, True])
def test_a_long_document_in_stretches_gives_the_same_folder(more, tmp_path, monkeypatch, tokenizer):
    rng = np.random.default_rng(0)
    words = [w for text in TEXTS for w in text.split()] + ["\n\n", "\u00e9t\u00e9", "1,000"]
    (tmp_path / "long.txt").write_text("\ufeff" + " ".join(rng.choice(words, 4000)), "utf-8")
    sources = [tmp_path / "long.txt"] + ([write_jsonl(tmp_path / "c.jsonl", TEXTS)] if more else [])
    for name, long in (("whole", 10**9), ("stretches", 500)):
        monkeypatch.setattr(prepare_module, "LONG_TEXT", 1000)
        monkeypatch.setattr(sources_module, "LONG", long)
        monkeypatch.setattr(sources_module, "CHUNK", 333)
        prepare(sources, tmp_path / name / "given", tokenizer=tokenizer)
        prepare(sources, tmp_path / name / "trained", vocab_size=340)
    for path in sorted(p for p in (tmp_path / "whole").rglob("*") if p.is_file()):
        assert path.read_bytes() == (tmp_path / "stretches" / path.relative_to(tmp_path / "whole")).read_bytes(), path


def test_what_cannot_be_cut_is_not_held(tokenizer, monkeypatch):
    from mezzotint.data import tokenizer as tokenizer_module

    monkeypatch.setattr(tokenizer_module, "MOST_UNCUT", 1000)
    taken = []

    def endless():
        while True:
            taken.append(1)
            yield "\u5c4b" * 100

    with pytest.raises(DataError, match="break it into several documents"):
        list(tokenizer.cut(endless(), 50))
    assert len(taken) == 11
