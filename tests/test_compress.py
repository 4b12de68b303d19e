"""Whatever goes in comes out, at the size that the model's likelihood promises, or an error says why not."""

import contextlib
import io
import lzma
import math

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from toy import FoldingText, NeighbourModel, ToyText, ToyWindows, eighths

from mezzotint.compression import coder, container
from mezzotint.compression.coder import integer_probabilities
from mezzotint.compression.container import compress, compress_file, decompress, decompress_file
from mezzotint.config import ModelConfig
from mezzotint.errors import DataError
from mezzotint.model import Cache, Denoiser, Model
from mezzotint.scoring.likelihood import causal, chain_rule

MODEL = NeighbourModel(ToyText(), 16)
FOLDING = NeighbourModel(FoldingText(), 16)
WORDS = "the quick brown fox jumps over the lazy dog and then the dog sleeps until 1999"

pieces = st.one_of(
    st.binary(max_size=60),
    st.text(max_size=60).map(lambda t: t.encode("utf-8", "surrogatepass")),
    st.text(alphabet=ToyText.alphabet + "A\u00e9\u4e2d", max_size=200).map(str.encode),
    st.sampled_from([WORDS.encode(), b"  ", b"\n\n", b"\x00" * 40, b"\xff", b"\xe4\xb8", "\ufeffbom".encode()]),
)
anything = st.lists(pieces, max_size=8).map(b"".join)


class TestRoundTrip:
    @settings(max_examples=1000, deadline=None, suppress_health_check=list(HealthCheck))
    @given(
        data=anything,
        order=st.sampled_from(["left", "block(4)", "spread(4)", "random(3)"]),
        model=st.sampled_from([MODEL, FOLDING]),
    )
    def test_any_bytes(self, data, order, model):
        assert decompress(compress(data, model, order=order, rows=3), model) == data

    @settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
    @given(data=anything, model=st.sampled_from([MODEL, FOLDING]))
    def test_any_bytes_when_modelling_is_forced(self, data, model):
        """Short inputs are smaller as they are; here the modelled form is used even so."""
        text = b"plain text that goes on\nfor a while " * 3
        code = coder._Code("spread(2)", "full", 3)
        for whole in (data, data + text, text + data + text, data + text + b"\xff" * 40 + data + text):
            if not whole:
                continue
            frame = container._modelled(whole, model, code, lambda share: None)
            if frame is not None:
                assert (
                    container._decode_frame(container.MODELLED, frame.body, len(whole), model, code, lambda share: None)
                    == whole
                )

    @pytest.mark.parametrize("data", [b"", b"\0", b"a", b"A", b"a" * 15, b"a" * 16, b"a" * 17, bytes(range(256)) * 9])
    def test_edges(self, data):
        assert decompress(compress(data, MODEL), MODEL) == data

    def test_attention(self):
        data = WORDS.encode() * 3
        for attention in ("full", "causal", "block(4)"):
            assert decompress(compress(data, MODEL, attention=attention), MODEL) == data

    def test_many_frames(self, monkeypatch):
        """Cuts fall inside words and characters; nothing is lost or doubled."""
        monkeypatch.setattr(container, "FRAME_BYTES", 5000)
        text = (WORDS + " \u4e2d\u6587 ").encode() * 300
        binary = np.random.default_rng(0).integers(0, 256, 20_000).astype(np.uint8).tobytes()
        data = text[:17_001] + binary + b"\x80" * 9000 + text
        assert b"".join(container._frames(io.BytesIO(data))) == data
        assert decompress(compress(data, MODEL, order="spread(2)"), MODEL) == data

    def test_files(self, tmp_path):
        source, packed, back = tmp_path / "a.txt", tmp_path / "a.mzz", tmp_path / "b.txt"
        source.write_bytes(WORDS.encode() * 20)
        seen = []
        report = compress_file(source, packed, MODEL, progress=lambda done, total: seen.append((done, total)))
        assert report.output_bytes == packed.stat().st_size and report.input_bytes == source.stat().st_size
        assert seen[-1] == (report.input_bytes, report.input_bytes) and seen == sorted(seen)
        assert decompress_file(packed, back, MODEL) == report.input_bytes
        assert back.read_bytes() == source.read_bytes()
        assert sorted(p.name for p in tmp_path.iterdir()) == ["a.mzz", "a.txt", "b.txt"]


def trained_like(draw: int = 0) -> tuple[NeighbourModel, bytes]:
    """A model that predicts its own text well from left to right, and 4,000 characters of it."""
    model = NeighbourModel(ToyText(), 16, seed=5, scale=2.0)
    random = np.random.default_rng(draw)
    text, last = "", 0
    while len(text) < 4000:
        weights = np.exp((model.left[last] + model.right[model.config.mask_id])[2:].double().numpy())
        last = 2 + int(random.choice(len(weights), p=weights / weights.sum()))
        if ToyText.alphabet[last - 2] != " " or not text.endswith(" "):
            text += ToyText.alphabet[last - 2]
    return model, text.encode()


class TestSize:
    @pytest.mark.parametrize("order", ["left", "block(4)", "spread(4)", "random(1)"])
    def test_is_the_chain_figure(self, order):
        """The coder's bits are those of `chain_rule` on the same windows, and the file is that plus a little."""
        model = NeighbourModel(ToyText(), 16, scale=0.2)
        letters = np.random.default_rng(0).integers(1, len(ToyText.alphabet) - 1, 4001)
        data = "".join(ToyText.alphabet[i] for i in letters).encode()
        target = io.BytesIO()
        report = container.compress_stream(io.BytesIO(data), target, model, order=order)
        ids = np.array([0, *model.tokenizer.encode(data.decode())])
        estimate = chain_rule(model, ToyWindows(ids, 16, model.tokenizer), order=order)
        chain_bits = estimate.bpb * len(data)
        assert report.tokens == len(ids) and report.forward_passes == estimate.forward_passes
        assert report.model_bits == pytest.approx(chain_bits, rel=1e-4)
        assert 8 * len(target.getvalue()) < chain_bits * 1.0005 + 8 * 140
        assert report.output_bytes == len(target.getvalue())

    def test_left_to_right_suits_a_left_to_right_text(self):
        model, data = trained_like()
        assert len(compress(data, model)) < len(lzma.compress(data)) * 0.8

    def test_hardly_ever_larger_than_the_input(self):
        data = np.random.default_rng(0).integers(0, 256, 50_000).astype(np.uint8).tobytes()
        assert len(compress(data, MODEL)) < len(data) + 150

    def test_mixed_input_keeps_the_text_modelled(self):
        model, data = trained_like()
        noise = np.random.default_rng(0).integers(128, 256, 3000).astype(np.uint8).tobytes()
        mixed = data + noise + trained_like(1)[1]
        target = io.BytesIO()
        report = container.compress_stream(io.BytesIO(mixed), target, model)
        assert decompress(target.getvalue(), model) == mixed
        assert 3000 <= report.rest_bytes < 3200 and report.tokens > 7500


def everything(**options) -> Model:
    """A real network with every part of the architecture, and weights far from their initial zeros."""
    tokenizer = ToyText()
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size,
        sequence_length=24,
        layers=4,
        width=32,
        heads=4,
        kv_heads=2,
        rotary_dims=4,
        embedding_std=1.0,
        **options,
    )
    return Model(config, tokenizer, eighths(Denoiser(config)), {"train": {"causal_share": 0.5}})


ALL_PARTS = {
    "activation": "leaky_relu2",
    "depth_scaled_norm": True,
    "exclusive_attention": True,
    "unet_skips": True,
    "embedding_mix": True,
    "channel_scales": True,
    "neighbour_reach": 2,
    "bigram_buckets": 16,
    "bigram_width": 8,
    "value_embedding_width": 8,
}


class TestNextToken:
    @pytest.mark.parametrize("options", [{}, ALL_PARTS], ids=["plain", "all parts"])
    def test_is_the_causal_network(self, options):
        model = everything(**options)
        ids = torch.randint(0, model.config.vocab_size + 1, (3, 24), generator=torch.Generator().manual_seed(1))
        whole = model.logits(ids, block_size=1)
        cache = Cache(model.network, 3, 24)
        steps = torch.stack([coder.next_logits(cache, column) for column in ids.T], dim=1)
        assert torch.allclose(steps, whole, atol=1e-5)
        assert whole.std() > 0.1

    def test_compresses_to_the_causal_figure_by_default(self):
        model = everything(**ALL_PARTS)
        with torch.no_grad():
            model.network.embedding.weight.mul_(0.1)  # no token may cost more than the 24 bits that the coder has
        letters = np.random.default_rng(0).integers(1, len(ToyText.alphabet), 1000)
        data = "".join(ToyText.alphabet[i] for i in letters).encode()
        session = coder._Coder(model, coder._Code("next", "full", 7), None)
        ids = np.array([0, *model.tokenizer.encode(data.decode())])
        session.run(len(ids), ids, lambda share: None)
        figure = causal(model, ToyWindows(ids, 24, model.tokenizer))
        assert session.bits == pytest.approx(figure.bpb * len(data), rel=1e-4)
        assert session.passes == figure.forward_passes
        assert 8 * len(session.words()) <= session.bits * 1.0005 + 64
        decoder = coder._Coder(model, session.code, np.frombuffer(session.words(), dtype="<u4").astype(np.uint32))
        assert (decoder.run(len(ids), None, lambda share: None) == ids).all()

    def test_round_trip(self):
        model = everything()
        for data in (b"", b"a", WORDS.encode() * 9, WORDS.encode() + bytes(range(256))):
            blob = compress(data, model)
            assert decompress(blob, model) == data
            assert b"next full" in blob[:40]


class TestProbabilities:
    @settings(max_examples=200, deadline=None)
    @given(
        st.lists(st.lists(st.floats(-1e4, 1e4), min_size=5, max_size=5), min_size=1, max_size=4),
    )
    def test_integers_that_sum_exactly(self, rows):
        logits = torch.tensor(rows, dtype=torch.float32)
        weights = integer_probabilities(logits)
        assert (weights.astype(np.int64) == weights).all() and (weights >= 1).all()
        assert (weights.astype(np.float64).sum(axis=1) == 2**24).all()
        exact = logits.double().softmax(dim=1).numpy()
        assert np.abs(weights / 2**24 - exact).max() < 2e-6

    def test_cost_of_rounding(self):
        logits = torch.randn(200, 1024, generator=torch.Generator().manual_seed(0)) * 4
        exact = logits.double().softmax(dim=1).numpy()
        rounded = integer_probabilities(logits).astype(np.float64) / 2**24
        loss = (exact * np.log2(exact / rounded)).sum(axis=1)
        assert 0 <= loss.max() < 1e-3


class TestErrors:
    DATA = (WORDS * 4).encode()

    def check(self, blob: bytes, message: str, model=MODEL) -> None:
        with pytest.raises(DataError, match=message) as caught:
            decompress(blob, model)
        assert "\n" not in str(caught.value)

    def test_foreign_newer_and_another_model(self):
        blob = compress(self.DATA, MODEL)
        self.check(b"", "not a compressed file")
        self.check(b"PK\3\4" + blob, "not a compressed file")
        self.check(b"MZZ2" + blob[4:], "another version")
        self.check(blob, "another model", NeighbourModel(ToyText(), 16, seed=9))

    def test_other_arithmetic_is_noticed_at_once(self):
        blob = compress(self.DATA, MODEL)
        other = NeighbourModel(ToyText(), 16)
        other.left *= 1 + 1e-6
        self.check(blob, "rounds differently", other)

    def test_every_truncation(self):
        blob = compress(self.DATA, MODEL, order="spread(2)")
        for length in range(4, len(blob), 3):
            self.check(blob[:length], "cut short|not a compressed|another version")
        self.check(blob + b"x", "checksum")

    def test_every_flipped_bit(self):
        blob = compress(self.DATA, MODEL, order="spread(2)")
        random = np.random.default_rng(0)
        for at in range(len(blob)):
            broken = bytearray(blob)
            broken[at] ^= 1 << random.integers(8)
            with contextlib.suppress(DataError):
                assert decompress(bytes(broken), MODEL) == self.DATA  # the thread count may change nothing

    def test_failure_leaves_no_file(self, tmp_path):
        source = tmp_path / "bad.mzz"
        source.write_bytes(compress(self.DATA, MODEL)[:-1])
        with pytest.raises(DataError, match="cut short"):
            decompress_file(source, tmp_path / "out", MODEL)
        with pytest.raises(DataError, match="cannot read"):
            decompress_file(tmp_path / "missing", tmp_path / "out", MODEL)
        with pytest.raises(DataError, match="cannot write"):
            decompress_file(source, tmp_path / "no" / "out", MODEL)
        assert [p.name for p in tmp_path.iterdir()] == ["bad.mzz"]

    def test_unknown_order(self):
        with pytest.raises(DataError, match="unknown order"):
            compress(b"abc", MODEL, order="best-first")

    def test_threads_are_put_back(self):
        blob = compress(self.DATA, MODEL)
        before = torch.get_num_threads()
        decompress(blob, MODEL)
        assert torch.get_num_threads() == before


def test_model_bits_of_uniform_text():
    model = NeighbourModel(ToyText(), 16, scale=0.0)
    target = io.BytesIO()
    report = container.compress_stream(io.BytesIO(WORDS.encode() * 50), target, model)
    assert report.model_bits == pytest.approx(report.tokens * math.log2(model.config.vocab_size), rel=1e-3)
