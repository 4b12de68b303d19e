"""Raw texts as windows: every byte of every document charged once, whatever the tokenizer does to it."""

from __future__ import annotations

import json

import numpy as np
import pytest

pytest.importorskip("tokenizers", reason="needs the extra transformers")

from test_tokenizer import documents_of_every_kind, hugging_face_tokenizer, small_lossy_tokenizer, small_tokenizer

from mezzotint.data.texts import TextWindows
from mezzotint.errors import DataError


def made(name):
    if name.startswith("sentencepiece"):
        return small_tokenizer() if "fallback" in name else small_lossy_tokenizer()
    return hugging_face_tokenizer(name, documents_of_every_kind()[:600])


@pytest.mark.parametrize(
    "name", ["sentencepiece with byte fallback", "sentencepiece that normalises", "wordpiece", "bytes", "unigram"]
)
def test_bytes_of_a_thousand_documents_add_up_or_are_reported(name):
    """Prose, code and Chinese; windows of 12 tokens that do not overlap, and with strides."""
    tokenizer, every = made(name), [*documents_of_every_kind(), "", "\u0000"]
    for stride in (None, 5, 11):
        check(tokenizer, every if stride is None else every[::20], stride, lossless="byte" in name)


def check(tokenizer, texts, stride, lossless):
    size = sum(len(text.encode()) for text in texts)
    changed = {n for n, text in enumerate(texts) if tokenizer.decode_bytes(tokenizer.encode(text)) != text.encode()}
    silent = {n for n, text in enumerate(texts) if text and not tokenizer.encode(text)}
    windows = TextWindows(texts, tokenizer, 12, stride)
    found = windows.account()
    charged = sum(windows.byte_count(i) for i in range(len(windows)))
    lost = sum(windows.bytes_lost(i) for i in range(len(windows)))
    assert charged + found["bytes_left_out"] == size and charged == found["bytes"]
    assert lost == found["bytes_lost"] and (lost > 0) == bool(changed - silent)
    assert found["documents_lost"] == len(changed - silent) and found["documents_left_out"] == len(silent)
    assert found["documents"] + found["documents_left_out"] + found["empty_documents"] == len(texts)
    tokens = [windows[i][windows.context(i) :] for i in range(len(windows))]
    assert np.concatenate(tokens).tolist() == [t for text in texts for t in tokenizer.encode(text)]
    assert all(windows[i][0] == tokenizer.bos_id and len(windows[i]) <= 12 for i in range(len(windows)))
    if lossless:
        assert not changed and lost == 0
    else:
        assert len(changed) > 0.3 * len(texts)


def test_windows_that_cannot_be():
    for length, stride in ((1, None), (8, 0), (8, 8)):
        with pytest.raises(DataError):
            TextWindows(["a"], small_tokenizer(), length, stride)


def test_score_says_what_the_tokenizer_lost(tmp_path, capsys):
    pytest.importorskip("transformers")
    from test_transformers import small, tokenizer

    from mezzotint.cli.main import main

    small("bert").save_pretrained(tmp_path / "bert")
    tokenizer().save_pretrained(tmp_path / "bert")
    text = tmp_path / "texts.jsonl"
    text.write_text("".join(json.dumps({"text": t}) + "\n" for t in ("abc", "abX", "cc\u00e9")))
    assert main(["score", str(tmp_path / "bert"), str(text), "--method", "chain", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (
        found["text"]["documents_lost"] == 2 and found["text"]["bytes_lost"] == found["results"][0]["bytes_lost"] == 3
    )
    assert found["results"][0]["kind"] == "not a code length"
    assert main(["score", str(tmp_path / "bert"), str(text), "--method", "chain"]) == 0
    assert "changes 2 of 3 documents (3 of 10 bytes lost)" in capsys.readouterr().out
