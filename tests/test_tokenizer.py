"""What ids stand for: text, bytes, pieces; both backends."""

from __future__ import annotations

import re

import numpy as np
import pytest
import sentencepiece
from corpus import (
    SHARED,
    TEXTS,
    hugging_face_tokenizer,
    needs_shared,
    sentencepiece_tokenizer,
    small_lossy_tokenizer,
    small_tokenizer,
    write_jsonl,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from mezzotint.data.dataset import Dataset
from mezzotint.data.prepare import prepare
from mezzotint.data.tokenizer import Tokenizer, _pieces, _wire, train_tokenizer
from mezzotint.errors import DataError


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return small_tokenizer()


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
    tokenizer = small_tokenizer()
    if "\u2581" in text:  # SentencePiece's own space mark reads back as a space
        return
    ids = tokenizer.encode(text)
    assert tokenizer.decode_bytes(ids) == text.encode()
    assert tokenizer.decode(ids) == text
    with_bos = np.array([tokenizer.bos_id, *ids])
    assert int(tokenizer.byte_counts(with_bos).sum()) == len(text.encode())


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
    return [small_tokenizer(), *(Tokenizer.load(p) for p in OFFICIAL if p.exists())]


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
    suffixed = sentencepiece_tokenizer(TEXTS * 3, 330, byte_fallback=True, treat_whitespace_as_suffix=True)
    assert list(suffixed.cut("one two three", 4)) == ["one two three"]


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


# --- lost bytes, and the second backend -------------------------------------------------------------------------------


def test_lost_bytes_by_hand():
    """Unknown pieces lose what they were made from and the space behind them, dropped white space what was dropped, normalisation what changed."""
    lossy = small_lossy_tokenizer()
    cases = {"the plate": 0, "the  plate": 1, "漢字": 6, "the 漢 plate": 4, "the plate  ": 2, " the": 1, "ﬁ": 3}
    for text, lost in cases.items():
        assert int(lossy.lost_bytes(text).sum()) == lost, text
        assert len(lossy.lost_bytes(text)) == len(lossy.encode(text))
    own = small_tokenizer()
    assert own.lost_bytes("漢字  the\n").sum() == 0 and own.lost_bytes("a\u2581").sum() == 3
    assert own.lost_bytes(" a\u2581b", goes_on=True).tolist()[-2:].count(3) == 1


@given(
    st.text(alphabet="ab (\x12\x10\x28\u2581 \u00e9\ufb01\u5929\U0001f600", max_size=300),
    st.sampled_from([0, 200, 17_000]),
)
@settings(max_examples=30, deadline=None)
def test_pieces_are_read_as_by_a_parser_of_every_message(text, before):
    """Ids and ends, of one to three bytes each, against the reader that checks everything."""
    processor = small_lossy_tokenizer()._processor
    message = processor.encode("the " * (before // 4) + text, out_type="serialized_proto")
    pieces = [dict(_wire(piece)) for field, piece in _wire(message) if field == 2]
    assert _pieces(message) == ([p.get(2, 0) for p in pieces], [p.get(5, 0) for p in pieces])


def documents_of_every_kind() -> list[str]:
    """1,000 short documents: prose, code and Chinese, with capitals, accents, odd spaces and characters not trained on."""
    random = np.random.default_rng(0)
    prose = [
        "The",
        "Captain",
        "of",
        "the",
        "naïve",
        "ship,",
        "whether",
        "she",
        "Went",
        "or",
        "not:",
        "3,141",
        "times…",
        "ﬁne\tcafé",
        "“so”",
    ]
    code = [
        "def",
        "f(x):\n",
        "",
        "",
        "",
        "return",
        "{x!r:",
        "[1,",
        "2]}",
        "",
        "#",
        "<s>",
        "[CLS]\r\n\tif",
        "x",
        "<=",
        "3:\n",
    ]
    chinese = list("天地玄黄宇宙洪荒日月盈昃辰宿列张，。！ 𠮷🎨")
    made = []
    for i in range(1000):
        words, mark = ((prose, " "), (code, " "), (chinese, ""))[i % 3]
        made.append(mark.join(random.choice(words, 12)))
    return made


@pytest.mark.parametrize("kind", ["wordpiece", "bytes", "unigram"])
def test_bytes_of_hugging_face_tokenizers(kind, tmp_path):
    """Bytes by offsets are those of the text; what does not come back is reported, by the document and by the byte."""
    texts = documents_of_every_kind()
    tokenizer = hugging_face_tokenizer(kind, texts[:600])
    (tmp_path / "tokenizer.json").write_bytes(tokenizer.serialized)
    changed = 0
    for text in texts:
        ids, counts = tokenizer.original_bytes(text)
        assert ids == tokenizer.encode(text) and tokenizer.bos_id not in ids
        assert int(counts.sum()) == len(text.encode()) and (counts >= 0).all()
        back = tokenizer.decode_bytes(ids)
        assert int(tokenizer.byte_counts(np.array([tokenizer.bos_id, *ids])).sum()) == len(back)
        lost = tokenizer.lost_bytes(text)
        assert (lost.sum() == 0) == (back == text.encode())
        changed += back != text.encode()
        parts = list(tokenizer.cut(text, 5))
        assert [i for p in tokenizer.encode_batch(parts, [n > 0 for n in range(len(parts))]) for i in p] == ids
    assert changed == 0 if kind == "bytes" else changed > 300
    write_jsonl(tmp_path / "c.jsonl", texts)
    report = prepare([tmp_path / "c.jsonl"], tmp_path / "d", tokenizer=tmp_path / "tokenizer.json")
    total = sum(report[split]["bytes"] for split in ("train", "val"))
    assert total == sum(len(text.encode()) for text in texts)
    assert sum(report[split]["not_round_trip"] for split in ("train", "val")) == changed
    assert sum(report[s]["lost_bytes"] for s in ("train", "val")) == sum(tokenizer.lost_bytes(t).sum() for t in texts)
    stream = Dataset.open(tmp_path / "d").split("train")
    assert stream.tokenizer.sha256 == tokenizer.sha256 and stream.count_bytes(0, len(stream)) == stream.bytes


def test_continuations_and_broken_characters_of_byte_level_bpe():
    tokenizer = hugging_face_tokenizer("bytes", TEXTS)
    assert tokenizer.text_of(tokenizer.encode_continuation(" the plate")) == " the plate"
    byte = {raw: i for i, raw in enumerate(tokenizer.raw) if len(raw) == 1}
    ids = [byte[b"\xc3"], byte[b"a"], byte[b"\xc3"], byte[b"\xa9"], tokenizer.vocab_size]
    assert tokenizer.invalid_utf8(ids) == [0]
    assert tokenizer.text_of(ids[2:]) == "é" and not tokenizer.is_text[tokenizer.bos_id]


def test_tokenizers_are_read_within_bounds(tmp_path):
    """What would cost a parser much is refused before it is parsed; what is no tokenizer is said in one line."""
    cases = {
        b"": "is empty",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n": "Git LFS pointer",
        b"\x0a\x00" * (8 << 20): "more than",
        bytes((16 << 20) + 1): "larger than 16 MiB",
        b"{": "not a tokenizer.json",
        b'{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}': "no special piece|not a tokenizer",
        b'{"model": {"vocab": 3}}': "not a tokenizer.json",
        b"[" * 100_000: "not a SentencePiece",
    }
    cases[b"{" + b'"a",' * 3_000_000] = "more than"
    cases[b"{" + b"[]," * 1_300_000] = "more than"
    for number, (content, message) in enumerate(cases.items()):
        path = tmp_path / f"{number}.model"
        path.write_bytes(content)
        with pytest.raises(DataError, match=message) as caught:
            Tokenizer.load(path)
        assert "\n" not in str(caught.value) and path.name in str(caught.value)
    with pytest.raises(DataError, match="more than 100 pieces"):
        Tokenizer.from_bytes(hugging_face_tokenizer("bytes", TEXTS).serialized, most_pieces=100)


def test_the_space_is_always_a_piece():
    """In text with hardly any spaces it would be too rare to be kept, and come back as U+2581."""
    tokenizer = train_tokenizer(["天地玄黄宇宙洪荒" * 2000, "a b"], 280)
    assert tokenizer.decode(tokenizer.encode("天 地  a b")) == "天 地  a b"


def test_what_a_text_cannot_fill_is_said():
    with pytest.raises(DataError, match="too few different words"):
        train_tokenizer(["the plate " * 5000], 1024)
    for size in (1, 2):
        with pytest.raises(DataError, match="256 bytes"):
            train_tokenizer(TEXTS, size)
