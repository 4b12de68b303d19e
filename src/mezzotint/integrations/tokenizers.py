"""A `tokenizer.json` of Hugging Face `tokenizers` as a `Tokenizer`: the bytes of its pieces, from the file's own parts.

Knows nothing of shards or models.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from functools import cached_property
from typing import Any

import numpy as np

from mezzotint.data.tokenizer import MAX_PIECES, SPACE, Tokenizer
from mezzotint.errors import DataError

try:
    import tokenizers
except ImportError as error:
    raise DataError("a tokenizer.json needs tokenizers: pip install 'mezzotint[transformers]'") from error

STARTS = ("<s>", "<bos>", "<|begin_of_text|>", "[BOS]", "[CLS]", "<cls>", "<|startoftext|>", "<|endoftext|>")
"""Special pieces of a Hugging Face tokenizer that may begin a document, the first that there is."""


class HuggingFaceTokenizer(Tokenizer):
    """A `tokenizer.json` of Hugging Face `tokenizers`: byte-level BPE, BPE or Unigram with word marks, WordPiece.

    Special pieces written out in a text are text. Raises DataError: no such file, or no piece to begin a document with.
    """

    file_name = "tokenizer.json"

    def __init__(self, serialized: bytes, most_pieces: int = MAX_PIECES) -> None:
        try:
            # Some 60 bytes of memory for each list and string, of which vocabularies and merges have a few for each piece.
            if sum(map(serialized.count, (b"[", b"{"))) > 4 * MAX_PIECES or serialized.count(b'"') > 16 * MAX_PIECES:
                raise DataError(f"the tokenizer has more than {MAX_PIECES:,} pieces")
            definition = json.loads(serialized)
            if len(definition["model"]["vocab"]) + len(definition.get("added_tokens") or ()) > most_pieces:
                raise DataError(f"the tokenizer has more than {most_pieces:,} pieces")
            self._tokenizer = tokenizers.Tokenizer.from_buffer(serialized)
            self._tokenizer.encode_special_tokens = True
            self._tokenizer.no_truncation()
            self._tokenizer.no_padding()
        except DataError:
            raise
        except BaseException as error:  # the Rust library's panics are no Exceptions
            if isinstance(error, (KeyboardInterrupt, SystemExit)):
                raise
            raise DataError("not a tokenizer.json of Hugging Face tokenizers") from error
        self.serialized = serialized
        self.sha256 = hashlib.sha256(serialized).hexdigest()
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values(), default=-1) + 1
        if self.vocab_size > most_pieces:
            raise DataError(f"the tokenizer has more than {most_pieces:,} pieces")
        added = self._tokenizer.get_added_tokens_decoder()
        special = {i for i, token in added.items() if token.special}
        self.bos_id = next((vocabulary[name] for name in STARTS if vocabulary.get(name) in special), -1)
        if self.bos_id < 0:
            raise DataError(f"the tokenizer has no special piece that begins a document (one of {', '.join(STARTS)})")
        self._pieces = [""] * self.vocab_size
        unknown = vocabulary.get(definition["model"].get("unk_token"), definition["model"].get("unk_id"))
        self._fallback: int = self.bos_id if unknown is None else unknown
        self._special = special - {self._fallback}
        silent = special | {self._fallback}
        for piece, i in vocabulary.items():
            self._pieces[i] = piece
        kind = _piece_kind(definition)
        self.raw = [
            b"" if i in silent else piece.encode() if i in added else kind(piece)
            for i, piece in enumerate(self._pieces)
        ]
        # Whether the tokenizer puts a space before a text that has none: only then is one dropped at the start.
        adds = self.text_of(self.encode("a")).startswith(" ")
        self.leading = np.array(
            [adds and r.startswith(b" ") and i not in added for i, r in enumerate(self.raw)], dtype=bool
        )
        self._bytes = [
            bool(re.fullmatch("<0x[0-9A-F]{2}>", p)) and len(r) == 1
            for p, r in zip(self._pieces, self.raw, strict=True)
        ]

    @cached_property
    def _single_bytes(self) -> list[bool]:
        return self._bytes

    def encode(self, text: str) -> list[int]:
        return self._no_special(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def _no_special(self, ids: list[int]) -> list[int]:
        """Special ids that a text's own characters spelled (some vocabularies list them as pieces) are unknown text."""
        return ids if self._special.isdisjoint(ids) else [self._fallback if i in self._special else i for i in ids]

    def _encode_all(self, texts: list[str]) -> list[list[int]]:
        return [self._no_special(found.ids) for found in self._tokenizer.encode_batch(texts, add_special_tokens=False)]

    def piece(self, id: int) -> str:
        return self._pieces[id]

    def _spans(self, text: str) -> tuple[list[int], list[int]]:
        found = self._tokenizer.encode(text, add_special_tokens=False)
        ends = np.maximum.accumulate([end for _, end in found.offsets]) if found.ids else np.zeros(0, dtype=np.int64)
        size = np.array([len(c.encode()) for c in text], dtype=np.int64)
        return self._no_special(found.ids), np.concatenate(([0], np.cumsum(size)))[ends].tolist()


def _piece_kind(definition: dict[str, Any]) -> Callable[[str], bytes]:
    """How a piece of this tokenizer.json spells its bytes, from the file's own parts."""
    parts: list[dict[str, Any]] = []
    for name in ("pre_tokenizer", "decoder"):
        whole = definition.get(name) or {}
        parts += [whole, *whole.get("pretokenizers", ()), *whole.get("decoders", ())]
    kinds = {part.get("type") for part in parts}
    if "ByteLevel" in kinds:
        return _byte_level
    if definition["model"].get("type") == "WordPiece":
        prefix = definition["model"].get("continuing_subword_prefix", "##")
        return lambda piece: (piece.removeprefix(prefix) if piece.startswith(prefix) else " " + piece).encode()
    single = re.compile("<0x([0-9A-F]{2})>") if definition["model"].get("byte_fallback") else re.compile("(?!)")

    def marked(piece: str) -> bytes:
        byte = single.fullmatch(piece)
        return bytes.fromhex(byte[1]) if byte else piece.replace(SPACE, " ").encode()

    return marked


def _byte_level(piece: str) -> bytes:
    """The bytes of a byte-level piece, whose characters stand for one byte each (Radford et al. 2019, GPT-2)."""
    return bytes(_BYTE_OF[c] for c in piece) if all(c in _BYTE_OF for c in piece) else piece.encode()


_PRINTED = [*range(33, 127), *range(161, 173), *range(174, 256)]  # bytes that are written as their own character
_BYTE_OF = {chr(b): b for b in _PRINTED}
_BYTE_OF |= {chr(256 + n): b for n, b in enumerate(b for b in range(256) if b not in _PRINTED)}
