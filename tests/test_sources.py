"""Documents from every kind of source."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from corpus import TEXTS, write_jsonl

from mezzotint.data.prepare import prepare
from mezzotint.data.sources import Account, documents, files_in_words
from mezzotint.errors import DataError


def test_every_kind_of_source(tmp_path):
    (tmp_path / "a.txt").write_text(TEXTS[0])
    write_jsonl(tmp_path / "b.jsonl", TEXTS[1:3])
    (tmp_path / "deep").mkdir()
    pq.write_table(pa.table({"text": [*TEXTS[3:5], None, ""], "n": [1, 2, 3, 4]}), tmp_path / "deep" / "c.parquet")
    (tmp_path / "ignored.bin").write_text("no")
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
        ("x.txt", b"\xff\xfe\x00", "not UTF-16 text: byte 2"),
        ("x.txt", b"ab\xff", "not UTF-8 text: byte 2"),
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
        (dict(sources=["fineweb:sp1024:\u00b2"]), "write fineweb"),
        (dict(sources=["fineweb:sp1024:" + "9" * 5000]), "write fineweb"),
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


# --- every kind, and hostile ones -------------------------------------------------------------------------------------

ODD = ["naïve 漢字 🎨", "a\r\nb\rc\n", 'quotes " and, commas\tand tabs', "NUL \x00 inside", "\ufeffmark inside"]


def records(texts) -> str:
    return "".join(json.dumps({"n": 1, "text": t, "a": {"b": t}}, ensure_ascii=False) + "\n" for t in texts)


def table_of(texts, delimiter: str) -> str:
    rows = io.StringIO()
    writer = csv.writer(rows, delimiter=delimiter, lineterminator="\n")
    writer.writerows([["n", "text"], *(["1", t] for t in texts)])
    return rows.getvalue()


@pytest.mark.parametrize("name", ["x.jsonl", "x.jsonl.gz", "x.jsonl.zst", "x.csv", "x.tsv", "x.csv.gz"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16-le", "utf-16-be"])
def test_records_and_tables_exactly(tmp_path, name, encoding):
    odd = ODD if "json" in name else [t for t in ODD if "\x00" not in t]  # Python 3.10's csv refuses NUL
    content = records(odd) if "json" in name else table_of(odd, "\t" if "tsv" in name else ",")
    mark = "\ufeff" if encoding.startswith("utf-16") else ""
    raw = (mark + content).encode(encoding)
    if name.endswith("zst"):
        raw = pa.compress(raw, codec="zstd", asbytes=True)
    bad(tmp_path, name, gzip.compress(raw) if name.endswith("gz") else raw)
    assert list(documents(tmp_path / name)) == odd


def test_texts_and_code_exactly(tmp_path):
    for i, (suffix, text) in enumerate(zip((".txt", ".md", ".py", ".rs", ".html"), ODD, strict=True)):
        bad(tmp_path, f"{i}{suffix}", text.encode())
    bad(tmp_path, "5.txt", "utf-16: é\r\n".encode("utf-16"))
    assert list(documents(tmp_path)) == [*ODD[:4], "mark inside", "utf-16: é\r\n"]


def test_fields_inside_fields(tmp_path):
    bad(tmp_path, "x.jsonl", records(ODD).encode())
    assert list(documents(tmp_path / "x.jsonl", "a.b")) == ODD
    rows = [{"b": "one", "c": 1}, None, {"b": None, "c": 2}, {"b": "two", "c": 3}]
    pq.write_table(pa.table({"a": rows}), tmp_path / "x.parquet")
    account = Account()
    assert list(documents(tmp_path / "x.parquet", "a.b", account)) == ["one", "two"] and account.empty == 2
    for source in ("x.jsonl", "x.parquet"):
        with pytest.raises(DataError, match=r"a\.z|field 'z'"):
            list(documents(tmp_path / source, "a.z"))


def test_nothing_is_nothing_in_every_kind(tmp_path):
    """JSON null and Parquet null alike: no document, and counted."""
    bad(tmp_path, "x.jsonl", b'{"text": null}\n{"text": ""}\n{"text": "a"}\n')
    pq.write_table(pa.table({"text": [None, "", "a"]}), tmp_path / "y.parquet")
    for name in ("x.jsonl", "y.parquet"):
        account = Account()
        assert list(documents(tmp_path / name, account=account)) == ["a"] and account.empty == 2


@pytest.mark.parametrize(
    "column",
    [
        pa.array(ODD, pa.large_string()),
        pa.array(ODD).dictionary_encode(),
        pa.array([ODD[:2], [], None, ODD[2:]], pa.list_(pa.string())),
        pa.array([ODD], pa.large_list(pa.large_string())),
    ],
    ids=lambda c: str(c.type)[:20],
)
def test_kinds_of_parquet_columns(tmp_path, column):
    pq.write_table(pa.table({"text": column}), tmp_path / "x.parquet")
    assert list(documents(tmp_path / "x.parquet")) == ODD


def test_a_dataset_of_the_hub(tmp_path, monkeypatch):
    """A local folder stands for the Hub's: the library reads both alike."""
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    write_jsonl(tmp_path / "train.jsonl", ODD)
    write_jsonl(tmp_path / "test.jsonl", ["held out"])
    assert list(documents(f"hf:{tmp_path}")) == ODD
    assert list(documents(f"hf:{tmp_path}:test")) == ["held out"]
    for source in (f"hf:{tmp_path}::nothing", "hf:", f"hf:{tmp_path}/missing", "hf:a:b:c:d"):
        with pytest.raises(DataError) as caught:
            list(documents(source))
        assert "\n" not in str(caught.value) and source[:10] in str(caught.value)
    with pytest.raises(DataError, match='no column "body"'):
        list(documents(f"hf:{tmp_path}", "body"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jsonl.gz", gzip.compress(b'{"text": "abc"}\n' * 1000, mtime=0)[:-20], "x.jsonl.gz.*damaged"),
        ("x.jsonl.gz", b"nothing packed", "x.jsonl.gz.*damaged"),
        ("x.jsonl.zst", pa.compress(b'{"text": "abc"}\n' * 1000, codec="zstd", asbytes=True)[:-9], "zst.*damaged"),
        ("x.txt", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer"),
        ("x.parquet", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer"),
        ("x.txt", "é".encode() * 600_000 + b"\xe9t\xe9", "byte 1200000 breaks"),
        ("x.txt", "\ufeffab".encode("utf-16-le") + b"\x00\xd8\x00\x00", "UTF-16 text: byte 6"),
        ("x.csv", b"text,n\nabc,1\nabc\n", "line 3: 1 fields"),
        ("x.csv", b"body\nabc\n", 'no column "text"'),
        ("x.csv", b'text\n"never closed', "line 2"),
        ("x.jsonl", b'{"text": "a", "text": ["b"]}\n', "line 1"),
        ("x.jsonl", b'\xef\xbb\xbf{"text": "\\ud83d"}\n', "line 1"),
    ],
)
def test_broken_files_are_one_line(tmp_path, name, content, message):
    with pytest.raises(DataError, match=message) as caught:
        list(documents(bad(tmp_path, name, content)))
    assert "\n" not in str(caught.value) and name in str(caught.value)


def test_a_folder_says_what_it_left_out(tmp_path):
    bad(tmp_path, "a.txt", b"read")
    bad(tmp_path, ".hidden.txt", b"no")
    (tmp_path / ".git").mkdir()
    bad(tmp_path / ".git", "b.txt", b"no")
    bad(tmp_path, "picture.png", b"no")
    (tmp_path / "linked").symlink_to(tmp_path / ".git")
    (tmp_path / "gone.txt").symlink_to(tmp_path / "nowhere")
    (tmp_path / "alias.txt").symlink_to(tmp_path / "a.txt")
    os.mkfifo(tmp_path / "pipe.txt")  # opening one would wait for ever
    account = Account()
    assert list(documents(tmp_path, account=account)) == ["read", "read"]
    assert account.to_dict() == {
        "read": 2,
        "skipped": {
            "broken links": 1, "hidden": 2, "links to folders": 1, "not regular files": 1, "other types": 1,
        },
        "empty_documents": 0,
    }  # fmt: skip


def test_an_unreadable_file_in_a_folder(tmp_path, monkeypatch):
    bad(tmp_path, "a.txt", b"read")
    bad(tmp_path, "b.txt", b"secret")
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "b.txt")  # root may read everything
    account = Account()
    assert list(documents(tmp_path, account=account)) == ["read"] and account.skipped == {"unreadable": 1}


def test_work_is_that_of_the_bytes_however_long_a_line(tmp_path):
    """One line of 16 MB against 4 MB of it: four times the work, not sixteen."""

    def seconds(megabytes: int) -> float:
        path = bad(tmp_path, "x.jsonl", b'{"text": "' + b"x" * (megabytes << 20) + b'"}')
        started = time.process_time()
        assert [len(text) for text in documents(path)] == [megabytes << 20]
        return time.process_time() - started

    seconds(4)
    assert min(seconds(16) for _ in range(3)) < 10 * min(seconds(4) for _ in range(3)) + 0.05


def test_memory_does_not_grow_with_the_number_of_files(tmp_path):
    """Four times the files, the same memory but for their names."""
    code = (
        "import sys, tracemalloc\nfrom mezzotint.data.sources import documents\n"
        "sum(map(len, documents(sys.argv[1])))\ntracemalloc.start()\n"
        "print(sum(map(len, documents(sys.argv[1]))), tracemalloc.get_traced_memory()[1])"
    )
    peaks = []
    for count in (250, 1000):
        folder = tmp_path / str(count)
        folder.mkdir()
        for i in range(count):
            bad(folder, f"{i}.txt", b"x" * 20_000)
        done = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=True)
        size, peak = map(int, done.stdout.split())
        assert size == count * 20_000
        peaks.append(peak)
    assert peaks[1] - peaks[0] < 750 * 2_000  # a name's share, a tenth of a file


# --- files of a folder that are no text -------------------------------------------------------------------------------


def folder_with_other_text(tmp_path: Path) -> Path:
    """One good file, and of each kind that is read as text one with a byte that is not UTF-8 behind good lines."""
    folder = tmp_path / "texts"
    (folder / "old").mkdir(parents=True)
    bad(folder, "a.txt", b"Ein gutes Wort, und noch eins dazu.\n" * 40)
    bad(folder / "old", "latin.txt", "ab é".encode("latin-1"))
    bad(folder, "x.jsonl", b'{"text": "first"}\n{"text": "\xe9"}\n')
    bad(folder, "x.csv", b"text\nfirst\n\xe9\n")
    bad(folder, "x.md", "\ufeffab".encode("utf-16-le") + b"\x00\xd8\x00\x00")
    return folder


BROKEN = {"texts/old/latin.txt": 3, "texts/x.csv": 11, "texts/x.jsonl": 28, "texts/x.md": 6}


def test_files_of_a_folder_that_are_no_text_are_left_out_whole_and_named(tmp_path):
    folder, account = folder_with_other_text(tmp_path), Account()
    assert list(documents(folder, account=account)) == ["Ein gutes Wort, und noch eins dazu.\n" * 40]
    assert account.to_dict() == {
        "read": 1, "skipped": {"not UTF-8": 4}, "empty_documents": 0, "not_utf8": BROKEN,
    }  # fmt: skip
    for name, byte in BROKEN.items():  # a file given by its name still is an error
        with pytest.raises(DataError, match=f"text: byte {byte} breaks it"):
            list(documents(tmp_path / name))


def test_the_account_in_words_names_a_few():
    account = Account(
        3, skipped=Counter({"hidden": 2, "not UTF-8": 7}), not_utf8={f"a/{i}.txt": 1000 * i for i in range(7)}
    )
    assert files_in_words((account + Account(1, empty=1)).to_dict()) == (
        "files read: 4; skipped: 2 hidden, 7 not UTF-8 (a/0.txt at byte 0, a/1.txt at byte 1,000, a/2.txt at byte 2,000, "
        "a/3.txt at byte 3,000, a/4.txt at byte 4,000 and 2 more); empty documents: 1"
    )


def test_a_folder_of_nothing_but_other_text_says_where_the_first_breaks(tmp_path):
    bad(tmp_path, "a.txt", b"ab\xff")
    bad(tmp_path, "b.txt", b"\xff")
    with pytest.raises(DataError, match=r"a\.txt is not UTF-8 text: byte 2"):
        list(documents(tmp_path))


def test_prepare_goes_on_without_what_is_no_text(tmp_path):
    """Once with the others' account, and from a validation folder too."""
    folder = folder_with_other_text(tmp_path)
    held = tmp_path / "held"
    held.mkdir()
    bad(held, "a.txt", b"Ein gutes Wort.\n" * 9)
    bad(held, "b.txt", b"\xff")
    report = prepare([folder], tmp_path / "out", vocab_size=290, val=[held])
    assert report["files"] == {
        "read": 2, "skipped": {"not UTF-8": 5}, "empty_documents": 0, "not_utf8": BROKEN | {"held/b.txt": 0},
    }  # fmt: skip
    assert report["train"]["documents"] == report["val"]["documents"] == 1
