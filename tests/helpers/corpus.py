"""Small texts, shards and a tokenizer for the tests of the data rooms."""

from __future__ import annotations

import functools
import io
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece

from mezzotint.config import ModelConfig
from mezzotint.data.dataset import Dataset
from mezzotint.data.prepare import prepare
from mezzotint.data.tokenizer import Tokenizer, train_tokenizer
from mezzotint.progress import Progress

SHARED = Path(os.environ.get("MEZZOTINT_SHARED", Path(__file__).resolve().parents[3] / "shared")) / "data"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="the development corpus is not here")

TEXTS = [
    "The plate is dark. The burnisher draws the light out of it, slowly.",
    "  leading spaces, trailing ones  ",
    "line one\nline two\r\n\n\ttabbed — naïve café 漢字 🎨",
    "12345 67890",
    "\u2581 is the mark of a space",
    "the plate the plate the plate " * 20,
]


@functools.cache
def small_tokenizer() -> Tokenizer:
    """340 pieces, trained as `prepare` does."""
    return train_tokenizer(TEXTS * 3, 340)


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    return path


def prepared_words(folder: Path) -> Path:
    """Sixty texts of a few words, prepared in `folder`: enough to train on for some steps."""
    words = ["the", "old", "plate", "was", "dark", "until", "a", "burnisher", "drew", "light", "out", "slowly"]
    rng = np.random.default_rng(0)
    lines = [json.dumps({"text": " ".join(rng.choice(words, 60))}) for _ in range(60)]
    (folder / "corpus.jsonl").write_text("\n".join(lines))
    prepare([folder / "corpus.jsonl"], folder / "data", vocab_size=280, val_fraction=0.1)
    return folder / "data"


def small_config(data: Path, **more: int) -> ModelConfig:
    """The settings of a network that trains on `data` in seconds."""
    sizes = {"sequence_length": 16, "layers": 2, "width": 16, "heads": 2, "kv_heads": 1, **more}
    return ModelConfig(vocab_size=Dataset.open(data).tokenizer.vocab_size, **sizes)


def stop_at(step: int) -> Callable[[Progress], None]:
    """What interrupts a run at a step, when it is told of its progress."""

    def interrupt(told: Progress) -> None:
        if told.figures["step"] == step:
            os.kill(os.getpid(), signal.SIGTERM)

    return interrupt


def metrics(run: Path) -> list[dict[str, Any]]:
    """The rows of a run's metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def validations(run: Path) -> list[dict[str, Any]]:
    """Those of them that have the figures of a validation."""
    return [row for row in metrics(run) if "val_nelbo_bpb" in row]


def write_shard(path: Path, ids: np.ndarray, magic: int = 20240520, version: int = 1, count: int | None = None) -> Path:
    header = np.zeros(256, dtype="<i4")
    header[:3] = magic, version, len(ids) if count is None else count
    path.write_bytes(header.tobytes() + ids.astype("<u2").tobytes())
    return path


def sentencepiece_tokenizer(texts: list[str], vocab_size: int, **options: Any) -> Tokenizer:
    """A BPE tokenizer with SentencePiece's own defaults but for `options`."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=model,
        vocab_size=vocab_size,
        model_type="bpe",
        minloglevel=2,
        **options,
    )
    return Tokenizer.from_bytes(model.getvalue())


PADDED = {"hard_vocab_limit": False, "pad_id": 0, "bos_id": 1, "eos_id": 2, "unk_id": 3}
"""As the challenge's tokenizers are trained."""


@functools.cache
def small_lossy_tokenizer() -> Tokenizer:
    """Knows no Chinese, has no bytes, and drops spaces that follow spaces."""
    return sentencepiece_tokenizer(["the plate is dark, plain and dark; the plate is the plate"] * 3, 60, **PADDED)


def hugging_face_tokenizer(kind: str, texts: list[str]) -> Tokenizer:
    """A small one trained by the library itself: `wordpiece` (lower-casing), `bytes` (byte-level BPE) or `unigram` (NFKC)."""
    tokenizers = pytest.importorskip("tokenizers")
    models, trainers, pre = tokenizers.models, tokenizers.trainers, tokenizers.pre_tokenizers
    if kind == "wordpiece":
        made = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
        made.normalizer, made.pre_tokenizer = tokenizers.normalizers.BertNormalizer(), pre.BertPreTokenizer()
        made.decoder = tokenizers.decoders.WordPiece()
        trainer = trainers.WordPieceTrainer(vocab_size=1000, special_tokens=["[UNK]", "[CLS]"], show_progress=False)
    elif kind == "bytes":
        made = tokenizers.Tokenizer(models.BPE())
        made.pre_tokenizer, made.decoder = pre.ByteLevel(add_prefix_space=False), tokenizers.decoders.ByteLevel()
        alphabet = pre.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=600, special_tokens=["<s>"], initial_alphabet=alphabet, show_progress=False
        )
    else:
        made = tokenizers.Tokenizer(models.Unigram())
        made.normalizer, made.pre_tokenizer = tokenizers.normalizers.NFKC(), pre.Metaspace()
        made.decoder = tokenizers.decoders.Metaspace()
        trainer = trainers.UnigramTrainer(
            vocab_size=400, special_tokens=["<s>", "<unk>"], unk_token="<unk>", show_progress=False
        )
    made.train_from_iterator(texts, trainer)
    return Tokenizer.from_bytes(made.to_str().encode())
