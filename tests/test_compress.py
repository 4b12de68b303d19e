"""Whatever goes in comes out, on every machine from the same bytes, or an error says why not."""

from __future__ import annotations

import contextlib
import io
import json
import lzma
import os
import threading
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from reference_decoder import decode as reference_decode
from toy import FoldingText, ToyText, ToyWindows, eighths

from mezzotint.compression import coder, container, version1
from mezzotint.compression.blocks import FRAME_BYTES, Reader, frames
from mezzotint.compression.container import compress, compress_file, decompress, decompress_file
from mezzotint.compression.exact import ExactNetwork
from mezzotint.config import ModelConfig
from mezzotint.errors import ConfigError, DataError
from mezzotint.network.model import Denoiser, Model
from mezzotint.scoring.likelihood import causal

GOLDEN = Path(__file__).parent / "golden"
WORDS = "the quick brown fox jumps over the lazy dog and then the dog sleeps until 1999"
ALL_PARTS = {
    "activation": "leaky_relu2",
    "depth_scaled_norm": True,
    "exclusive_attention": True,
    "unet_skips": True,
    "embedding_mix": True,
    "channel_scales": True,
    "neighbour_reach": 2,
    "shifted_output": True,
    "bigram_buckets": 16,
    "bigram_width": 8,
    "value_embedding_width": 8,
    "rotary_dims": 4,
    "layers": 4,
}


def tiny(tokenizer: ToyText, length: int = 16, **options) -> Model:
    """A real network whose weights are small eighths, the same on every machine, taught to prefer nothing."""
    shape = {"layers": 2, "width": 32, "heads": 4, "kv_heads": 2, **options}
    config = ModelConfig(vocab_size=tokenizer.vocab_size, sequence_length=length, **shape)
    network = eighths(Denoiser(config))
    with torch.no_grad():
        network.embedding.weight.mul_(0.25)
    return Model(config, tokenizer, network, {"train": {"causal_share": 0.5}}, "5a" * 32)


MODEL, FOLDING = tiny(ToyText()), tiny(FoldingText(), layers=1)
EVERY = tiny(FoldingText(), **ALL_PARTS)


def predictable(draw: int = 0, size: int = 4000, model: Model = MODEL) -> bytes:
    """Text that a model itself draws, so that it predicts it well."""
    random = np.random.default_rng(draw)

    class Drawing(coder.Decoder):
        def __init__(self) -> None:
            pass

        def peek(self) -> int:
            return int(random.integers(coder.TOTAL))

        def take(self, start: int, frequency: int) -> None:
            pass

    streams = coder.Streams(size, min(size, 64))
    ids = coder.decode_tokens(container._Network(model).exact, streams, Drawing(), lambda share: None)
    return model.tokenizer.decode_bytes(np.where(ids < 3, 4, ids).tolist())


pieces = st.one_of(
    st.binary(max_size=60),
    st.text(max_size=60).map(lambda t: t.encode("utf-8", "surrogatepass")),
    st.text(alphabet=ToyText.alphabet + "A\u00e9\u4e2d", max_size=200).map(str.encode),
    st.sampled_from([WORDS.encode(), b"  ", b"\n\n", b"\x00" * 40, b"\xff", b"\xe4\xb8", "\ufeffbom".encode()]),
)
anything = st.lists(pieces, max_size=8).map(b"".join)


def forced(data: bytes, model: Model) -> bytes | None:
    """`data` through the modelled form even where another is smaller; None where there is no text in it."""
    network = container._Network(model)
    found = container._modelled(data, network, 1 << 40, lambda share: None)
    if found is None:
        return None
    reader = Reader(io.BytesIO(container._body(len(data), found[1])))
    return container._block(container.MODELLED, reader, network, 2, lambda share: None)


class TestRoundTrip:
    @settings(max_examples=1000, deadline=None, suppress_health_check=list(HealthCheck))
    @given(data=anything, model=st.sampled_from([MODEL, FOLDING]))
    def test_any_bytes(self, data, model):
        blob = compress(data, model)
        assert decompress(blob, model) == data
        assert len(blob) <= len(data) + 64

    @settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
    @given(data=anything, model=st.sampled_from([MODEL, FOLDING, EVERY]))
    def test_any_bytes_when_modelling_is_forced(self, data, model):
        """Short inputs are smaller as they are; here the modelled form is used even so."""
        text = b"plain text that goes on\nfor a while " * 3
        for whole in (data, text + data + text + b"\xff" * 40 + data + text):
            assert not whole or forced(whole, model) in (whole, None)

    @pytest.mark.parametrize("data", [b"", b"\0", b"a", b"A", b"a" * 15, b"a" * 16, b"a" * 17, bytes(range(256)) * 9])
    def test_edges(self, data):
        assert decompress(compress(data, MODEL), MODEL) == data

    @pytest.mark.parametrize("streams", [1, 2, 3, 7, 64])
    @pytest.mark.parametrize("count", [64, 65, 101])
    def test_streams_side_by_side(self, streams, count):
        exact = container._Network(EVERY).exact
        tokens = np.random.default_rng(count).integers(0, EVERY.config.vocab_size, count)
        encoder, cut = coder.Encoder(), coder.Streams(count, streams)
        bits = coder.encode_tokens(exact, tokens, cut, encoder, lambda share: None)
        data = encoder.finish()
        assert 8 * len(data) < bits * 1.001 + 100
        decoder = coder.Decoder(data)
        assert (coder.decode_tokens(exact, cut, decoder, lambda share: None) == tokens).all()
        decoder.finish()

    @pytest.mark.parametrize(("length", "most"), [(16, 100), (15, 100), (1, 5), (2, 9), (3, 10), (16, 7)])
    def test_half_a_window_of_context(self, length, most, monkeypatch):
        """What is in view where each token is predicted, by the encoder and by the decoder."""
        model = tiny(ToyText(), length)
        exact, half = container._Network(model).exact, max(1, length // 2)
        tokens = np.random.default_rng(0).integers(3, model.config.vocab_size, most)
        places: list[int] = []
        real = ExactNetwork.hidden

        def hidden(network, ids, cache, skip=0):
            places.extend(range(cache.kept, cache.kept + ids.shape[1]))
            return real(network, ids, cache, skip)

        monkeypatch.setattr(ExactNetwork, "hidden", hidden)
        encoder = coder.Encoder()
        coder.encode_tokens(exact, tokens, coder.Streams(most, 1), encoder, lambda share: None)
        assert len(places) == most and max(places) < max(2, length)  # each input is read once
        assert all(place >= min(at, half) for at, place in enumerate(places))
        encoded, places[:] = list(places), []
        decoder = coder.Decoder(encoder.finish())
        found = coder.decode_tokens(exact, coder.Streams(most, 1), decoder, lambda share: None)
        assert (found == tokens).all() and places == encoded

    def test_many_frames(self, monkeypatch):
        """Cuts fall inside words and characters; nothing is lost or doubled."""
        monkeypatch.setattr("mezzotint.compression.blocks.FRAME_BYTES", 5000)
        text = (WORDS + " \u4e2d\u6587 ").encode() * 60
        binary = np.random.default_rng(0).integers(0, 256, 20_000).astype(np.uint8).tobytes()
        data = text[:5_001] + binary + b"\x80" * 9000 + text
        assert b"".join(frames(io.BytesIO(data))) == data
        assert decompress(compress(data, MODEL), MODEL) == data

    def test_kinds_of_whitespace(self):
        random = np.random.default_rng(0)
        folded = [bytes(random.choice(list(b"ab .A9\xc3"), 200).tolist()) for _ in range(3)]
        spaces = sum(text.count(b" ") for text in folded)
        for number in (1, 2, 5):
            kinds = random.integers(0, number, spaces).tolist()
            encoder = coder.Encoder()
            coder.encode_runs(folded, kinds, number, encoder)
            decoder = coder.Decoder(encoder.finish())
            assert coder.decode_runs(folded, number, decoder) == kinds
            decoder.finish()


class TestFiles:
    def test_files(self, tmp_path):
        source, packed, back = tmp_path / "a.txt", tmp_path / "a.mzz", tmp_path / "b.txt"
        source.write_bytes(predictable())
        seen = []
        report = compress_file(
            source, packed, MODEL, check=True, progress=lambda told: seen.append((told.done, told.total))
        )
        assert report.output_bytes == packed.stat().st_size and report.input_bytes == source.stat().st_size
        assert report.checked and (report.input_bytes, report.input_bytes) in seen
        assert decompress_file(packed, back, MODEL) == report.input_bytes
        assert back.read_bytes() == source.read_bytes()
        assert sorted(p.name for p in tmp_path.iterdir()) == ["a.mzz", "a.txt", "b.txt"]

    def test_check_notices_a_file_that_does_not_restore(self, tmp_path, monkeypatch):
        (tmp_path / "a.txt").write_bytes(predictable())
        real = container.encode_tokens
        monkeypatch.setattr(container, "encode_tokens", lambda net, ids, *rest: real(net, ids[::-1], *rest))
        with pytest.raises(DataError):
            compress_file(tmp_path / "a.txt", tmp_path / "a.mzz", MODEL, check=True)
        assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]

    def test_standard_input_and_output(self, tmp_path, monkeypatch):
        data = WORDS.encode() * 3

        class Standard:
            def __init__(self, content: bytes = b"") -> None:
                self.buffer = io.BytesIO(content)

        out = Standard()
        monkeypatch.setattr("sys.stdin", Standard(data))
        monkeypatch.setattr("sys.stdout", out)
        compress_file(Path("-"), Path("-"), MODEL, check=True)
        monkeypatch.setattr("sys.stdin", Standard(out.buffer.getvalue()))
        decompress_file(Path("-"), tmp_path / "b", MODEL)
        assert (tmp_path / "b").read_bytes() == data

    def test_links_and_pipes_are_written_through(self, tmp_path):
        (tmp_path / "a.txt").write_bytes(WORDS.encode())
        (tmp_path / "link").symlink_to(tmp_path / "real.mzz")
        compress_file(tmp_path / "a.txt", tmp_path / "link", MODEL)
        assert (tmp_path / "link").is_symlink()
        assert decompress((tmp_path / "real.mzz").read_bytes(), MODEL) == WORDS.encode()
        os.mkfifo(tmp_path / "pipe")
        read: list[bytes] = []
        reader = threading.Thread(target=lambda: read.append((tmp_path / "pipe").read_bytes()))
        reader.start()
        compress_file(tmp_path / "a.txt", tmp_path / "pipe", MODEL)
        reader.join()
        assert decompress(read[0], MODEL) == WORDS.encode() and (tmp_path / "pipe").is_fifo()
        compress_file(tmp_path / "a.txt", Path(os.devnull), MODEL)
        assert Path(os.devnull).is_char_device()

    def test_memory_does_not_grow_with_the_file(self, monkeypatch):
        monkeypatch.setattr(container, "squeeze", lambda data: data)  # noise: neither wins, and both take their time
        monkeypatch.setattr(container, "_modelled", lambda *rest: None)

        class Noise(io.RawIOBase):
            def __init__(self, size: int) -> None:
                self.left, self.random = size, np.random.default_rng(0)

            def read(self, size: int = -1) -> bytes:
                size = min(size, self.left)
                self.left -= size
                return self.random.bytes(size)

        peaks = []
        for size in (36 << 20, 72 << 20):
            tracemalloc.start()
            container.compress_stream(Noise(size), container._Compare(), MODEL)  # type: ignore[arg-type]
            peaks.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
        assert peaks[1] < 1.2 * peaks[0]


class TestSize:
    def test_is_the_causal_figure(self):
        """The coder's bits are those of `causal`, where no token has context from before its window in either."""
        model = tiny(ToyText(), 24)
        letters = np.random.default_rng(0).integers(1, len(ToyText.alphabet), 24)
        bits = nats = 0.0
        for shift in range(24):
            ids = np.roll(letters, shift) + 2
            windows = ToyWindows(ids, 24, model.tokenizer)
            nats += causal(model, windows).bpb * 24
            bits += coder.encode_tokens(
                container._Network(model).exact, ids, coder.Streams(24, 1), coder.Encoder(), lambda share: None
            )
        assert bits == pytest.approx(nats, rel=0.005)

    def test_text_is_modelled_and_noise_is_not(self):
        data = predictable()
        noise = np.random.default_rng(0).integers(128, 256, 3000).astype(np.uint8).tobytes()
        mixed = data + noise + predictable(1)
        target = io.BytesIO()
        report = container.compress_stream(io.BytesIO(mixed), target, MODEL)
        assert decompress(target.getvalue(), MODEL) == mixed
        assert 2990 <= report.rest_bytes < 3200 and report.tokens > 7500
        assert len(compress(data, MODEL)) < len(lzma.compress(data))
        assert report.output_bytes == len(target.getvalue())

    def test_a_probe_spares_what_lzma_wins(self, monkeypatch):
        """Repetitive text: the model reads a few thousand tokens of it, whatever its length."""
        passed = []
        real = ExactNetwork.intervals

        def counting(network, hidden, tokens):
            passed.append(len(tokens))
            return real(network, hidden, tokens)

        monkeypatch.setattr(ExactNetwork, "intervals", counting)
        data = WORDS.encode() * 500
        blob = compress(data, MODEL)
        assert sum(passed) <= 2048 and len(blob) < 500 and decompress(blob, MODEL) == data

    def test_never_more_than_64_bytes_larger(self, monkeypatch):
        monkeypatch.setattr(container, "MOST_STORED", FRAME_BYTES + 1)
        monkeypatch.setattr(container, "squeeze", lambda data: data)
        monkeypatch.setattr(container, "_modelled", lambda *rest: None)
        data = np.random.default_rng(0).bytes(11 * FRAME_BYTES)
        blob = compress(data, MODEL)
        assert len(blob) <= len(data) + 64 and decompress(blob, MODEL) == data
        with pytest.raises(DataError, match="cut short"):
            decompress(blob[:-1], MODEL)


class TestGolden:
    """Bytes that every machine writes, and that a decoder written from FORMAT.md alone reads."""

    CASES = json.loads((GOLDEN / "mzz.json").read_text()) if (GOLDEN / "mzz.json").exists() else {}

    @pytest.mark.parametrize("name", sorted(CASES))
    def test_is_what_is_written_and_restored(self, name):
        case = self.CASES[name]
        model, data = GOLDEN_MODELS[case["model"]], golden_inputs()[name]
        blob = (GOLDEN / f"{name}.mzz").read_bytes()
        assert compress(data, model) == blob
        assert ("text" in case) == (blob[4:5] == bytes([container.MODEL]))
        assert decompress(blob, model) == data

    @pytest.mark.parametrize("name", sorted(CASES))
    def test_the_reference_decoder_restores_it(self, name):
        blob = (GOLDEN / f"{name}.mzz").read_bytes()
        assert decoded(blob, GOLDEN_MODELS[self.CASES[name]["model"]]) == golden_inputs()[name]

    @pytest.mark.parametrize("name", sorted(name for name, case in CASES.items() if "text" in case))
    def test_files_of_arithmetic_1_are_restored(self, name):
        """By the package and by the reference decoder."""
        model, blob = GOLDEN_MODELS[self.CASES[name]["model"]], (GOLDEN / "arithmetic1" / f"{name}.mzz").read_bytes()
        assert blob[37] == 1 and decompress(blob, model) == golden_inputs()[name] == decoded(blob, model)

    def test_there_is_one_of_each_kind(self):
        assert set(self.CASES) == {"empty", "stored", "lzma", "plain", "streams", "folding", "every"}


GOLDEN_MODELS = {"plain": MODEL, "folding": FOLDING, "every": EVERY}


def decoded(blob: bytes, model: Model) -> bytes:
    """What the reference decoder restores."""
    weights = {k: v.float().numpy() for k, v in model.network.state_dict().items()}
    config = {field: getattr(model.config, field) for field in model.config.__dataclass_fields__}
    return reference_decode(blob, config, weights, model.tokenizer.decode_bytes, model.sha256)


def golden_inputs() -> dict[str, bytes]:
    """What the golden files hold. Texts that a model once drew are kept beside them."""
    drawn = {name: case["text"].encode() for name, case in TestGolden.CASES.items() if "text" in case}
    return {"empty": b"", "stored": np.random.default_rng(0).bytes(300), "lzma": WORDS.encode() * 20, **drawn}


class TestErrors:
    DATA = predictable(size=600)
    BLOB = compress(DATA, MODEL)

    def check(self, blob: bytes, message: str, model: Model = MODEL) -> None:
        with pytest.raises(DataError, match=message) as caught:
            decompress(blob, model)
        assert "\n" not in str(caught.value)

    def test_the_blob_is_modelled(self):
        assert self.BLOB[4] == container.MODEL

    def test_foreign_newer_and_another_model(self):
        blob = self.BLOB
        self.check(b"", "not a compressed file")
        self.check(b"PK\3\4" + blob, "not a compressed file")
        self.check(b"MZZ9" + blob[4:], "newer version")
        other = Model(MODEL.config, MODEL.tokenizer, MODEL.network, MODEL.info, "00" * 32)
        self.check(blob, "another model: .* begins with 5a5a5a5a5a5a", other)
        self.check(blob[:37] + b"\x03" + blob[38:], "arithmetic 3: upgrade")
        self.check(blob[:37] + b"\x00" + blob[38:], "arithmetic 0: upgrade")
        self.check(blob[:37] + b"\x01" + blob[38:], "damaged")

    def test_every_truncation_and_something_after_the_end(self):
        for length in range(4, len(self.BLOB), 7):
            self.check(self.BLOB[:length], "cut short|damaged")
        self.check(self.BLOB + b"x", "follows its end")

    def test_flipped_bits(self):
        random = np.random.default_rng(0)
        for at in random.choice(len(self.BLOB), 150, replace=False):
            broken = bytearray(self.BLOB)
            broken[at] ^= 1 << random.integers(8)
            with pytest.raises(DataError):
                decompress(bytes(broken), MODEL)

    def test_damage_below_the_checksums(self):
        """Bodies with a good CRC and any content: one error, or other bytes that the last checksum refuses."""
        random = np.random.default_rng(0)
        network, data = container._Network(MODEL), self.DATA[:120]
        body = container._modelled(data, network, 1 << 40, lambda share: None)[1]  # type: ignore[index]
        for _ in range(60):
            broken = bytearray(body)
            broken[random.integers(len(broken))] = random.integers(256)
            reader = Reader(io.BytesIO(container._body(len(data), bytes(broken))))
            with contextlib.suppress(DataError):
                container._block(container.MODELLED, reader, network, 2, lambda share: None)

    def test_failure_leaves_no_file(self, tmp_path):
        source = tmp_path / "bad.mzz"
        source.write_bytes(self.BLOB[:-1])
        with pytest.raises(DataError, match="cut short"):
            decompress_file(source, tmp_path / "out", MODEL)
        with pytest.raises(DataError, match="cannot read"):
            decompress_file(tmp_path / "missing", tmp_path / "out", MODEL)
        with pytest.raises(DataError, match="cannot write"):
            decompress_file(source, tmp_path / "no" / "out", MODEL)
        assert [p.name for p in tmp_path.iterdir()] == ["bad.mzz"]

    def test_a_model_that_never_learnt_next_tokens(self):
        untaught = Model(MODEL.config, MODEL.tokenizer, MODEL.network, {}, MODEL.sha256)
        with pytest.raises(ConfigError, match="next tokens"):
            compress(b"abc", untaught)


class TestVersion1:
    """Files that the package wrote before."""

    BLOB = (GOLDEN / "version1.mzz").read_bytes() if (GOLDEN / "version1.mzz").exists() else b""

    def test_opens_where_the_arithmetic_is_alike(self):
        try:
            assert decompress(self.BLOB, MODEL) == golden_inputs()["plain"]
        except DataError as error:
            assert "rounds differently" in str(error)

    @pytest.mark.parametrize(
        ("rows", "threads", "message"), [(4096, 1, "windows at once|damaged"), (8, 4096, "threads")]
    )
    def test_headers_are_not_believed(self, rows, threads, message):
        head = (
            self.BLOB[:20] + bytes([9]) + b"next full" + container.varint(rows) + container.varint(threads) + bytes(8)
        )
        long = tiny(ToyText(), 64)
        with pytest.raises(DataError, match=message):
            decompress(head, long)

    def test_threads_are_put_back(self):
        before = torch.get_num_threads()
        with contextlib.suppress(DataError):
            decompress(self.BLOB, MODEL)
        assert torch.get_num_threads() == before

    def test_integer_probabilities(self):
        logits = torch.from_numpy(np.random.default_rng(0).normal(0, 9, (50, 300)))
        weights = version1.integer_probabilities(logits).astype(np.float64)
        assert (weights >= 1).all() and (weights.sum(axis=1) == 1 << 24).all()
        assert np.abs(weights / (1 << 24) - logits.softmax(dim=1).numpy()).max() < 1e-4
