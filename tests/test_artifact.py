"""Artifacts: round trips, budgets, determinism, golden bytes, and files made to do harm."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import io
import json
import lzma
import os
import time
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import torch

from mezzotint.config import ModelConfig, preset, to_dict
from mezzotint.data.tokenizer import Tokenizer
from mezzotint.errors import ArtifactError
from mezzotint.network.model import Denoiser, Model, count_parameters
from mezzotint.packing import artifact, entropy, grid, pack, quantize
from mezzotint.training.system import peak_memory_bytes

GOLDEN = Path(__file__).parent / "golden"
TEXT = Path(__file__).read_text()


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    buffer = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT.splitlines()), model_writer=buffer, vocab_size=420, model_type="bpe",
        byte_fallback=True, minloglevel=2, num_threads=1,
    )  # fmt: skip
    return Tokenizer.from_bytes(buffer.getvalue())


class Stream:
    """The part of a TokenStream that packing uses."""

    def __init__(self, ids: list[int]) -> None:
        self.ids = np.array(ids, dtype=np.uint16)

    def __len__(self) -> int:
        return len(self.ids)

    def windows(self, length: int) -> list[np.ndarray]:
        return [self.ids[i : i + length].astype(np.int64) for i in range(0, len(self.ids), length)]


@pytest.fixture(scope="module")
def text(tokenizer: Tokenizer) -> Stream:
    return Stream(tokenizer.encode(TEXT))


def make(tokenizer: Tokenizer, seed: int = 0, **changes) -> Model:
    """A model whose every matrix matters: random weights where training would start from zero."""
    options = {"sequence_length": 64, "layers": 2, "width": 32, "heads": 2, "kv_heads": 1, **changes}
    config = ModelConfig(vocab_size=tokenizer.vocab_size, **options)
    torch.manual_seed(seed)
    network = Denoiser(config).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            if not parameter.any():
                parameter.normal_(std=0.1)
        network.embedding.weight.normal_(std=0.5)
    return Model(config, tokenizer, network, {"commit": "abc", "steps": 7})


@pytest.fixture(scope="module")
def model(tokenizer: Tokenizer) -> Model:
    return make(tokenizer, unet_skips=True, channel_scales=True, bigram_buckets=50, value_embedding_width=8)


@pytest.fixture(scope="module")
def packed(model: Model, text: Stream, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("packed") / "model.mzt"
    pack.pack(model, text, out)
    return out


@pytest.mark.parametrize("codec", pack.PACK_CODECS)
def test_pack_and_open(model: Model, text: Stream, tmp_path: Path, codec: str) -> None:
    out = tmp_path / "model.mzt"
    result = pack.pack(model, text, out, codec=codec, tolerance=1e-4)
    assert result["verified"] is True
    assert result["artifact_bytes"] == out.stat().st_size == result["total_bytes"]
    opened = artifact.open_artifact(out)
    assert opened.config == model.config
    assert opened.tokenizer.serialized == model.tokenizer.serialized
    assert opened.info == model.info
    assert opened.sha256 == hashlib.sha256(out.read_bytes()).hexdigest()
    ids = torch.arange(40)[None] % 200
    error = (opened.logits(ids) - model.logits(ids)).square().mean() / model.logits(ids).var()
    assert error < 0.05
    assert torch.equal(opened.logits(ids), artifact.open_artifact(out).logits(ids))


@pytest.mark.parametrize("tolerance", [3e-4, 1e-2])
def test_packing_costs_what_was_tolerated(model: Model, text: Stream, tmp_path: Path, tolerance: float) -> None:
    """The divergence on text that neither quantized nor measured is near the tolerance, and so is the reported cost."""
    out = tmp_path / "model.mzt"
    result = pack.pack(model, Stream(list(text.ids[: len(text) // 2])), out, tolerance=tolerance)
    assert 0.7 * tolerance < result["cost_nats_per_token"] < 1.4 * tolerance
    fresh = quantize.Divergence(model, Stream(list(text.ids[len(text) // 2 :])).windows(64), seed=9)
    assert 0.4 * tolerance < fresh(artifact.open_artifact(out)) < 2 * tolerance


def test_divergence_is_the_expected_rise_of_the_nelbo(model: Model, text: Stream, packed: Path) -> None:
    """Against a plain sum over every mask count's windows with labels drawn from the model."""
    opened = artifact.open_artifact(packed)
    windows = text.windows(64)[:12]
    divergence = quantize.Divergence(model, windows, seed=3)
    assert divergence(model) == 0
    plain = 0.0
    for item, before in zip(divergence.items, divergence.before, strict=True):
        hidden = item.positions[0].nonzero().ravel().tolist()
        assert (item.weights == 64 / len(hidden)).all()
        assert (item.read[0, hidden] == model.config.mask_id).all()
        old, new = before.double().softmax(-1), opened.logits(item.read)[0, hidden].double().softmax(-1)
        plain += float(item.weights[0]) * float((old * (old / new).log()).sum()) / (64 * len(windows))
    assert divergence(opened) == pytest.approx(plain, rel=1e-3)


def test_calibration_is_as_training_was(model: Model, text: Stream) -> None:
    """A share of next tokens, blocks given the clean ones before, and weights that make each window's T."""
    windows = [*text.windows(64)[:8], np.arange(37) % 200]
    settings = {"train": {"causal_share": 0.5}}, {"train": {"block_size": 16}}, {"train": {"causal_share": 1.0}}, {}
    for info, expected in zip(settings, (4, 0, 9, 0), strict=True):
        items = quantize.calibration(dataclasses.replace(model, info=info), windows, seed=1)
        assert sum(item.causal for item in items) == expected
        for item, window in zip(items, windows, strict=True):
            assert item.ids[0].tolist() == list(window)
            assert float(item.weights.sum()) == pytest.approx(len(window))
            if item.causal:
                assert item.read[0].tolist() == [model.config.mask_id, *window[:-1]]
                expected_logits = model.logits(item.read, block_size=1)[0]
            elif item.size is None:
                expected_logits = model.logits(item.read)[0][item.positions[0]]
            else:
                clean, rows = torch.tensor(window)[None], []
                for start in range(0, len(window), 16):
                    seen = torch.cat((clean[:, :start], item.read[:, start:]), dim=1)
                    rows.append(model.logits(seen, block_size=16)[0, start : start + 16])
                expected_logits = torch.cat(rows)[item.positions[0]]
            with torch.no_grad():
                torch.testing.assert_close(item.logits(model.network), expected_logits, atol=1e-4, rtol=1e-4)


def test_packing_twice_gives_the_same_bytes(model: Model, text: Stream, packed: Path, tmp_path: Path) -> None:
    pack.pack(model, text, tmp_path / "again.mzt")
    assert (tmp_path / "again.mzt").read_bytes() == packed.read_bytes()


def test_weights_are_the_codes_times_the_scales(tokenizer: Tokenizer, text: Stream, tmp_path: Path) -> None:
    """Every opened weight of an int6 matrix is one of 63 multiples of its row's scale."""
    out = tmp_path / "model.mzt"
    pack.pack(make(tokenizer), text, out, codec="int6")
    for name, module in quantize.matrices(artifact.open_artifact(out).network).items():
        weight = module.weight.numpy()
        for row in weight:
            levels = np.unique(np.abs(row[row != 0]))
            assert len(levels) <= 31, name
            ratio = levels / levels.min() if len(levels) else levels
            scale = (
                next(k for k in range(1, 32) if np.allclose(ratio * k, np.rint(ratio * k), atol=1e-3))
                if len(levels)
                else 1
            )
            assert np.rint(ratio * scale).max(initial=0) <= 31


@pytest.mark.parametrize("codec", ["mezzotint", "int6"])
def test_a_tighter_budget_is_met_and_damage_grows(tokenizer: Tokenizer, text: Stream, tmp_path: Path, codec: str):
    model = make(tokenizer, width=64, layers=3)
    ids = torch.from_numpy(text.windows(64)[3])[None]

    def damage(path: Path) -> float:
        opened = artifact.open_artifact(path)
        return float((opened.logits(ids) - model.logits(ids)).square().mean())

    free = pack.pack(model, text, tmp_path / "free.mzt", codec=codec, tolerance=1e-4)
    code = tmp_path / "code.py"
    code.write_text("#" * 500)
    with pytest.raises(ArtifactError, match="smallest reachable size is") as caught:
        pack.pack(model, text, tmp_path / "tight.mzt", codec=codec, budget=10_000, code=[code], tolerance=1e-4)
    smallest = int(str(caught.value).split("size is ")[1].split(" bytes")[0].replace(",", ""))
    budget = (9 * (free["artifact_bytes"] + 500) + smallest) // 10
    tight = pack.pack(model, text, tmp_path / "tight.mzt", codec=codec, budget=budget, code=[code], tolerance=1e-4)
    assert tight["code_bytes"] == 500
    assert tight["total_bytes"] == (tmp_path / "tight.mzt").stat().st_size + 500 <= budget
    assert tight["total_bytes"] > 0.95 * budget
    assert (tight["pruned_codes"] > 0) == (codec != "mezzotint")
    assert damage(tmp_path / "tight.mzt") > damage(tmp_path / "free.mzt")


def test_refuses_with_the_smallest_reachable_size(model: Model, text: Stream, tmp_path: Path) -> None:
    out = tmp_path / "model.mzt"
    with pytest.raises(ArtifactError, match="smallest reachable size is") as caught:
        pack.pack(model, text, out, budget=5_000)
    assert not list(tmp_path.iterdir())
    smallest = int(str(caught.value).split("size is ")[1].split(" bytes")[0].replace(",", ""))
    assert pack.pack(model, text, out, budget=smallest)["total_bytes"] <= smallest


def test_refuses_without_text(model: Model, tmp_path: Path) -> None:
    for nothing in (None, Stream([])):
        with pytest.raises(ArtifactError, match="training data"):
            pack.pack(model, nothing, tmp_path / "model.mzt")
    assert not list(tmp_path.iterdir())


def test_refuses_bad_requests(model: Model, text: Stream, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="codec"):
        pack.pack(model, text, tmp_path / "m.mzt", codec="zip")
    with pytest.raises(ArtifactError, match="no such code file"):
        pack.pack(model, text, tmp_path / "m.mzt", code=[tmp_path / "none.py"])
    with pytest.raises(ArtifactError, match="no such folder"):
        pack.pack(model, text, tmp_path / "none" / "m.mzt")


def test_refuses_a_diverged_model(tokenizer: Tokenizer, text: Stream, tmp_path: Path) -> None:
    model = make(tokenizer)
    with torch.no_grad():
        model.network.embedding.weight[0, 0] = float("nan")
    with pytest.raises(ArtifactError, match="not finite"):
        pack.pack(model, text, tmp_path / "m.mzt", codec="int6")


def test_a_full_disk_is_one_line_and_leaves_nothing(
    model: Model, text: Stream, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(ArtifactError, match="no space left") as caught:
        pack.pack(model, text, tmp_path / "m.mzt", codec="int6")
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_file_that_would_not_open_again_is_not_kept(model: Model, tmp_path: Path) -> None:
    """Weights of nearly no information would make a file too small for its parameters."""
    empty = {name: np.zeros_like(value) for name, value in pack.weights_of(model).items()}
    network = artifact.shapes_only(dataclasses.replace(model.config, bigram_buckets=200_000))
    artifact.with_values(network, {**empty, "bigram.embedding.weight": np.zeros((200_000, 128), dtype=np.float32)})
    with pytest.raises(ArtifactError, match="parameters in"):
        pack.store(Model(network.config, model.tokenizer, network), tmp_path / "m.mzt")
    assert not list(tmp_path.iterdir())


def test_hessians_weigh_real_masked_text(tokenizer: Tokenizer, text: Stream) -> None:
    """The Hessian of the first matrices is the second moment of normalised inputs: its trace is the width."""
    model = make(tokenizer)
    hessians = quantize.calibration_hessians(model, text.windows(64)[:8])
    query = hessians["blocks.0.attention.query"]
    assert query.shape == (32, 32)
    torch.testing.assert_close(float(query.trace()), 32.0, atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(query, query.T)


def test_curvature_predicts_the_cost_of_noise(tokenizer: Tokenizer, text: Stream) -> None:
    """The Kronecker factors against brute force: the mean KL divergence that small random weight noise causes."""
    model = make(tokenizer)
    windows = text.windows(64)[:24]
    curvature = quantize.curvature(model, windows, draws=8)
    generator = torch.Generator().manual_seed(0)
    ids = torch.from_numpy(np.stack(windows))
    from mezzotint.objective import mask_by_count, stratified_counts

    counts = stratified_counts(len(ids), 64, generator)
    corrupted, masked = mask_by_count(ids, counts, model.config.mask_id, generator)
    weight = (64 / counts.double())[:, None].expand(masked.shape)[masked]
    before = model.logits(corrupted, positions=masked).double().log_softmax(-1)
    for name in ("blocks.0.attention.value", "blocks.1.mlp.up", "blocks.1.mlp.down", "embedding"):
        module = model.network.get_submodule(name)
        assert isinstance(module.weight, torch.Tensor)
        saved = module.weight.detach().clone()
        costs = []
        for _ in range(6):
            noise = torch.randn(saved.shape, generator=generator) * 0.01 * saved.std()
            with torch.no_grad():
                module.weight.copy_(saved + noise)
            after = model.logits(corrupted, positions=masked).double().log_softmax(-1)
            divergence = (before.exp() * (before - after)).sum(-1)
            costs.append(float((divergence * weight).sum()) / ids.numel())
        with torch.no_grad():
            module.weight.copy_(saved)
        item = curvature[name]
        predicted = 0.5 * float(item.inputs.trace()) * item.rows.sum() * (0.01 * float(saved.std())) ** 2
        assert predicted == pytest.approx(np.mean(costs), rel=0.35), name


def test_inspect_adds_up(model: Model, packed: Path) -> None:
    found = artifact.inspect_artifact(packed)
    assert found["bytes"] == packed.stat().st_size
    assert sum(t["bytes"] for t in found["tensors"]) + sum(found["sections"].values()) == found["bytes"]
    assert found["parameters"] == sum(p.numel() for p in model.network.parameters())
    assert all(found["checks"].values())
    assert {t["name"]: tuple(t["shape"]) for t in found["tensors"]} == artifact.layout(model.network)
    json.dumps(found)


def test_sweep_trades_bytes_for_error(tokenizer: Tokenizer, text: Stream) -> None:
    model = make(tokenizer)
    ids = torch.from_numpy(np.stack(text.windows(64)[:4]))
    clean = model.logits(ids)

    def score(candidate: Model) -> np.ndarray:
        return (candidate.logits(ids) - clean).square().mean(dim=(1, 2)).numpy()

    points = pack.sweep(model, text, score, tolerances=(1e-4, 1e-2))
    assert points[0]["bytes"] > points[1]["bytes"]
    assert points[0]["cost_bpb"] < points[1]["cost_bpb"]


def test_reference_preset_with_random_weights_fits(tmp_path: Path) -> None:
    """Two of the reference preset's eleven layers, calibrated on real text, within their share of 16,000,000 bytes.

    Layers are alike, and what there is once (header, tokenizer, embeddings) weighs more among two, so bytes per
    parameter that fit here fit there.
    """
    buffer = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter((TEXT + Path(artifact.__file__).read_text()).splitlines()), model_writer=buffer,
        vocab_size=1024, model_type="bpe", byte_fallback=True, minloglevel=2, num_threads=1, hard_vocab_limit=False,
    )  # fmt: skip
    tokenizer = Tokenizer.from_bytes(buffer.getvalue())
    options = to_dict(preset("reference").model) | {"vocab_size": tokenizer.vocab_size}
    with torch.device("meta"):
        whole = count_parameters(Denoiser(ModelConfig(**options)))
    torch.manual_seed(0)
    config = ModelConfig(**{**options, "layers": 2})
    model = Model(config, tokenizer, Denoiser(config).eval())
    budget = artifact.BUDGET * count_parameters(model.network) // whole
    stream = Stream(tokenizer.encode(TEXT)[:600])
    result = pack.pack(model, stream, tmp_path / "m.mzt", calibration_tokens=600, budget=budget)
    assert result["verified"] and result["total_bytes"] <= budget < artifact.BUDGET // 3


# --- golden -----------------------------------------------------------------------------------------------------


def test_golden_file_opens_to_the_same_weights() -> None:
    """A version 1 file written once: its weights, to the last bit, for ever."""
    expected = json.loads((GOLDEN / "v1.json").read_text())
    opened = artifact.open_artifact(GOLDEN / "v1.mzt")
    assert opened.sha256 == expected["sha256"]
    assert opened.info == expected["info"]
    found = {
        name: hashlib.sha256(value.numpy().astype("<f4").tobytes()).hexdigest()
        for name, value in opened.network.state_dict().items()
    }
    assert found == expected["tensors"]


# --- hostile ----------------------------------------------------------------------------------------------------


def resealed(body: bytes) -> bytes:
    return body + hashlib.sha256(body).digest()


def with_header(data: bytes, change) -> bytes:
    """The file with its header's JSON changed by `change(header)` and a right checksum."""
    _, version, stored, _ = artifact.PREFIX.unpack(data[: artifact.PREFIX.size])
    start = artifact.PREFIX.size
    header = json.loads(zlib.decompress(data[start : start + stored]))
    text = change(header)
    text = json.dumps(header).encode() if text is None else text
    packed = zlib.compress(text)
    prefix = artifact.PREFIX.pack(artifact.MAGIC, version, len(packed), len(text))
    return resealed(prefix + packed + data[start + stored : -32])


def refused(tmp_path: Path, data: bytes) -> str:
    path = tmp_path / "bad.mzt"
    path.write_bytes(data)
    begin = time.process_time()
    with pytest.raises(ArtifactError) as caught:
        artifact.open_artifact(path)
    assert time.process_time() - begin < 2
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1_000
    return str(caught.value)


def test_missing_foreign_and_newer_files(tmp_path: Path, packed: Path) -> None:
    with pytest.raises(ArtifactError, match="no such artifact"):
        artifact.open_artifact(tmp_path / "none.mzt")
    with pytest.raises(ArtifactError):
        artifact.open_artifact(tmp_path)
    assert "not a Mezzotint artifact" in refused(tmp_path, b"PK\x03\x04" + bytes(100))
    assert "not a Mezzotint artifact" in refused(tmp_path, b"")
    data = bytearray(packed.read_bytes())
    data[8] = 2
    assert "upgrade" in refused(tmp_path, bytes(data))


def test_truncated_and_flipped_files(tmp_path: Path, packed: Path) -> None:
    data = packed.read_bytes()
    rng = np.random.default_rng(0)
    for cut in (0, 7, 8, 17, 18, 19, 50, len(data) - 33, len(data) - 1, *rng.integers(0, len(data), 20)):
        refused(tmp_path, data[:cut])
    refused(tmp_path, data + b"\0")
    for position in rng.integers(0, len(data), 60):
        bad = bytearray(data)
        bad[position] ^= 1 << rng.integers(8)
        refused(tmp_path, bytes(bad))


HEADERS = {
    "duplicate tensors": lambda h: h["tensors"].__setitem__(1, h["tensors"][0]),
    "missing tensor": lambda h: h["tensors"].pop(),
    "renamed tensor": lambda h: h["tensors"][0].__setitem__(0, "x"),
    "unknown codec": lambda h: h["tensors"][0].__setitem__(1, "pickle"),
    "bank out of range": lambda h: h["tensors"][0].__setitem__(2, 99),
    "grid without a bank": lambda h: next(r for r in h["tensors"] if "grid" in r[1]).__setitem__(2, -1),
    "negative length": lambda h: h["tensors"][0].__setitem__(3, -4),
    "huge length": lambda h: h["tensors"][0].__setitem__(3, 1 << 60),
    "fractional length": lambda h: h["tensors"][0].__setitem__(3, 1.5),
    "boolean length": lambda h: h["tensors"][0].__setitem__(3, True),
    "overlapping tensors": lambda h: h["tensors"][0].__setitem__(3, h["tensors"][0][3] - 4),
    "grid for a vector": lambda h: next(r for r in h["tensors"] if r[1] == "float16").__setitem__(1, "grid"),
    "float32 bomb": lambda h: h["tensors"][0].__setitem__(1, "float32"),
    "wide config": lambda h: h["config"].__setitem__("width", 1 << 40),
    "wide config within bounds": lambda h: h["config"].__setitem__("width", 1 << 16),
    "astronomic config": lambda h: h["config"].__setitem__("width", 10**400),
    "deep config": lambda h: h["config"].__setitem__("layers", 10**9),
    "long bigram": lambda h: h["config"].__setitem__("bigram_buckets", 1 << 62),
    "fat mlp": lambda h: h["config"].__setitem__("mlp_ratio", 1e300),
    "no heads": lambda h: h["config"].__setitem__("heads", 0),
    "no rotation": lambda h: h["config"].__setitem__("rotary_base", 0.0),
    "a rotation that overflows": lambda h: h["config"].__setitem__("rotary_base", 1e-300),
    "a softcap that overflows": lambda h: h["config"].__setitem__("softcap", 1e-300),
    "long windows": lambda h: h["config"].__setitem__("sequence_length", 1 << 24),
    "windows a little too long": lambda h: h["config"].__setitem__("sequence_length", (1 << 16) + 1),
    "unknown setting": lambda h: h["config"].__setitem__("evil", 1),
    "text for a number": lambda h: h["config"].__setitem__("width", "64"),
    "config is a list": lambda h: h.__setitem__("config", []),
    "info is a list": lambda h: h.__setitem__("info", []),
    "other vocabulary": lambda h: h["config"].__setitem__("vocab_size", 419),
    "tokenizer bomb": lambda h: h["tokenizer"].__setitem__(1, 1 << 40),
    "tokenizer too short": lambda h: h["tokenizer"].__setitem__(1, 10),
    "tokenizer sizes": lambda h: h.__setitem__("tokenizer", 3),
    "banks": lambda h: h.__setitem__("banks", [1 << 50]),
    "no MLP": lambda h: h["config"].__setitem__("mlp_ratio", 1e-9),
    "long text for a number": lambda h: h["config"].__setitem__("width", "9" * 500_000),
    "many banks": lambda h: h.__setitem__("banks", [0] * 1000),
    "no table": lambda h: h.__setitem__("tensors", None),
    "coding": lambda h: h.__setitem__("coding", "zip"),
    "lzma coding of range data": lambda h: h.update(coding="lzma", stored=100),
    "lzma coding without a size": lambda h: h.update(coding="lzma"),
    "missing field": lambda h: h.pop("banks") and None,
    "extra field": lambda h: h.__setitem__("more", 1),
    "not an object": lambda h: b"[1, 2]",
    "not json": lambda h: b"{",
    "not text": lambda h: b"\xff\xfe",
    "nan": lambda h: b'{"config": NaN}',
    "infinity": lambda h: json.dumps(h).replace('"rotary_base": 10000.0', '"rotary_base": 1e999').encode(),
    "a name twice": lambda h: json.dumps(h).replace("{", '{"info": {}, ', 1).encode(),
    "deep nesting": lambda h: b"[" * 200_000,
    "long number": lambda h: b"1" * 100_000,
    "long header": lambda h: b" " * (artifact.MAX_HEADER + 1),
}


@pytest.mark.parametrize("name", HEADERS)
def test_hostile_headers(tmp_path: Path, packed: Path, name: str) -> None:
    def change(header):
        result = HEADERS[name](header)
        return result if isinstance(result, bytes) else None

    refused(tmp_path, with_header(packed.read_bytes(), change))


def test_zlib_bomb_is_not_inflated(tmp_path: Path) -> None:
    bomb = zlib.compress(bytes(200 << 20), 9)
    before = peak_memory_bytes()
    for claimed in (1000, artifact.MAX_HEADER, (1 << 32) - 1):
        refused(tmp_path, resealed(artifact.PREFIX.pack(artifact.MAGIC, 1, len(bomb), claimed) + bomb))
    assert peak_memory_bytes() - before < 100_000 << 10


@pytest.mark.parametrize("field", [b"\x0a\x00", b"\x12\x00", b"\xf8\x7f\x01"])
def test_tokenizer_of_many_empty_fields_is_refused(tmp_path: Path, packed: Path, tokenizer: Tokenizer, field: bytes):
    """2 MiB of them, alone and inside a message, would take their parser 70 and more."""
    data = packed.read_bytes()
    _, _, stored, _ = artifact.PREFIX.unpack(data[: artifact.PREFIX.size])
    start = artifact.PREFIX.size + stored
    many = field * (1 << 20)
    length = bytes([len(many) >> shift & 127 | 128 * (shift < 21) for shift in range(0, 28, 7)])
    for raw in (tokenizer.serialized + many, tokenizer.serialized + b"\x12" + length + many):
        packed_raw = lzma.compress(raw, format=lzma.FORMAT_RAW, filters=artifact.TOKENIZER_FILTERS)
        sizes = {}

        def change(header, raw=raw, packed_raw=packed_raw, sizes=sizes):
            sizes["old"], header["tokenizer"] = header["tokenizer"][0], [len(packed_raw), len(raw)]

        with_header(data, change)
        swapped = data[:start] + packed_raw + data[start + sizes["old"] :]
        assert "pieces)" in refused(tmp_path, with_header(swapped, change))


def test_reading_takes_no_second_copy_of_a_tensor(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NumPy's memory at its peak over the tensors' own, where one tensor of 4 million numbers is nearly all there is."""
    monkeypatch.setattr(entropy, "BLOCK", 1 << 17)
    model = make(tokenizer, bigram_buckets=4_000, bigram_width=1_000)
    zeros = {n: np.zeros_like(v) for n, v in pack.weights_of(model).items()}
    kinds = {
        "float16": lambda v: v.astype(np.float16),
        "grid": lambda v: grid.Grid(v.astype(np.int16), np.ones(len(v), np.float16), np.ones(v.shape[1], np.float16)),
    }
    for coding in (artifact.RANGE, artifact.LZMA):
        for kind, convert in kinds.items():
            tensors = {n: convert(v) if v.ndim == 2 else v.astype(np.float16) for n, v in zeros.items()}
            (tmp_path / "m.mzt").write_bytes(artifact.Writer(model, coding).write(tensors))
            artifact.open_artifact(tmp_path / "m.mzt")
            tracemalloc.start()
            opened = artifact.open_artifact(tmp_path / "m.mzt")
            _, peak = tracemalloc.get_traced_memory()
            tracemalloc.stop()
            need = 4 * sum(p.numel() for p in opened.network.parameters())
            dictionary = (64 << 20) if coding == artifact.LZMA else 0
            assert peak - need < dictionary + 8_000_000, (coding, kind)  # the tensor is 16,000,000 bytes


def mutations(data: bytes, count: int, seed: int):
    """Damaged files with right checksums, so that everything behind the checksum is reached."""
    rng = np.random.default_rng(seed)
    body = data[:-32]
    for _ in range(count):
        bad = bytearray(body)
        kind = rng.integers(4)
        if kind == 0:
            for _ in range(rng.integers(1, 6)):
                bad[rng.integers(len(bad))] = rng.integers(256)
        elif kind == 1:
            bad = bad[: rng.integers(len(bad))]
        elif kind == 2:
            start = rng.integers(len(bad))
            bad[start:start] = rng.bytes(rng.integers(1, 40))
        else:
            start, stop = sorted(rng.integers(0, len(bad), 2))
            bad[start : min(stop, start + 64)] = rng.bytes(min(stop, start + 64) - start)
        yield resealed(bytes(bad))


@pytest.mark.parametrize("codec", ["mezzotint", "reference"])
def test_fuzz_with_right_checksums(tokenizer: Tokenizer, text: Stream, tmp_path: Path, codec: str) -> None:
    """ArtifactError or a model of finite weights, nothing else. FUZZ_FILES sets how many files (default 300)."""
    out = tmp_path / "model.mzt"
    pack.pack(make(tokenizer), text, out, codec=codec)
    data, bad = out.read_bytes(), tmp_path / "bad.mzt"
    artifact.open_artifact(out)
    memory = peak_memory_bytes()
    refusals = 0
    for number, mutated in enumerate(mutations(data, int(os.environ.get("FUZZ_FILES", "300")), seed=1)):
        bad.write_bytes(mutated)
        begin = time.process_time()
        try:
            opened = artifact.open_artifact(bad)
            assert all(torch.isfinite(p).all() for p in opened.network.parameters())
        except ArtifactError as error:
            refusals += 1
            assert "\n" not in str(error)
        assert time.process_time() - begin < 2, number
    assert refusals > 100
    grown = peak_memory_bytes() - memory
    assert grown < 256 << 20


def test_all_tensors_of_a_bank_with_empty_tables_are_refused(tmp_path: Path, packed: Path) -> None:
    """A bank whose tables are all empty decodes; using it must be refused."""
    encoder = entropy.Encoder()
    entropy.Bank(np.zeros((3, 5), dtype=np.uint8)).write(encoder)
    empty = encoder.finish()
    data = packed.read_bytes()
    sizes = {}

    def swap(header):
        sizes["banks"], sizes["tokenizer"] = list(header["banks"]), header["tokenizer"][0]
        header["banks"] = [len(empty)] * len(header["banks"])

    changed = with_header(data, swap)
    _, _, stored, _ = artifact.PREFIX.unpack(changed[: artifact.PREFIX.size])
    start = artifact.PREFIX.size + stored + sizes["tokenizer"]
    body = changed[:start] + empty * len(sizes["banks"]) + changed[start + sum(sizes["banks"]) : -32]
    assert "empty probability table" in refused(tmp_path, resealed(body))
