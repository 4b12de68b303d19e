"""Models of transformers, built small from their config classes, against naive loops over their own logits."""

import itertools
import json
import math
import types
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")

import transformers
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers
from toy import eighths

from mezzotint import load
from mezzotint.cli.main import main
from mezzotint.config import ModelConfig
from mezzotint.data.texts import TextWindows
from mezzotint.data.tokenizer import Tokenizer
from mezzotint.errors import CheckpointError, ConfigError, DataError, MezzotintError
from mezzotint.integrations.transformers import from_transformers, load_transformers
from mezzotint.network.model import Denoiser, Model
from mezzotint.packing.safetensors import export_folder, import_folder
from mezzotint.sampling.denoise import denoise
from mezzotint.sampling.generate import sample
from mezzotint.sampling.infill import infill
from mezzotint.scoring.compare import compare_documents
from mezzotint.scoring.likelihood import causal, chain_rule, nelbo
from mezzotint.scoring.plan import MaskedWindow, masked_window_nll

TEXTS = ["abcab", "bca", "ccabba"]
SPECIAL = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]"]


def backend_of(letters):
    vocabulary = {p: i for i, p in enumerate([*SPECIAL, *letters])}
    backend = Backend(models.BPE(vocabulary, [], unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return backend


def own_tokenizer(letters):
    """The same as this package's own."""
    backend = backend_of(letters)
    backend.add_special_tokens(SPECIAL)
    return Tokenizer.from_bytes(backend.to_str().encode())


def tokenizer(letters="abc"):
    backend = backend_of(letters)
    names = {n: f"[{n[:3].upper()}]" for n in ("pad_token", "cls_token", "sep_token", "unk_token")}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, mask_token="[MASK]", **names)


def small(kind, vocab=8):
    common: dict[str, Any] = {
        "vocab_size": vocab,
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "pad_token_id": 0,
    }
    torch.manual_seed(0)
    if kind == "bert":
        made = transformers.BertForMaskedLM(
            transformers.BertConfig(**common, intermediate_size=16, max_position_embeddings=12)
        )
    elif kind == "roberta":
        made = transformers.RobertaForMaskedLM(
            transformers.RobertaConfig(**common, intermediate_size=16, max_position_embeddings=13)
        )
    elif kind == "modernbert":
        made = transformers.ModernBertForMaskedLM(
            transformers.ModernBertConfig(
                **common,
                intermediate_size=16,
                max_position_embeddings=12,
                bos_token_id=1,
                eos_token_id=2,
                cls_token_id=1,
                sep_token_id=2,
                attn_implementation="eager",
            )
        )
    elif kind == "llama":
        made = transformers.LlamaForCausalLM(
            transformers.LlamaConfig(
                **common, num_key_value_heads=1, intermediate_size=16, max_position_embeddings=12, bos_token_id=1,
                eos_token_id=2,
            )
        )  # fmt: skip
    else:
        made = transformers.GPT2LMHeadModel(
            transformers.GPT2Config(
                vocab_size=vocab, n_embd=16, n_layer=1, n_head=2, n_positions=12, bos_token_id=1, eos_token_id=2
            )
        )
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.linspace(-0.4, 0.4, parameter.numel()).view_as(parameter).sin())
    return made.eval()


def log_p(logits):
    """Renormalised over the letters, ids 5 to 7, and the unknown piece, 3."""
    allowed = torch.full_like(logits, -torch.inf)
    allowed[[3, 5, 6, 7]] = logits[[3, 5, 6, 7]]
    return allowed.double().log_softmax(0)


def naive_chain(network, ids, shift=0, suffix=(2,)):
    """Left to right over `model(**inputs).logits`, one canvas at a time."""
    total = 0.0
    for i in range(len(ids)):
        canvas = [1, *ids[:i], *[4] * (len(ids) - i), *suffix]
        logits = network(input_ids=torch.tensor([canvas])).logits[0, 1 + i - shift]
        total -= float(log_p(logits)[ids[i]])
    return total


@pytest.mark.parametrize("kind", ["bert", "roberta", "modernbert"])
@torch.inference_mode()
def test_masked_models_agree_with_a_naive_loop(kind):
    network = small(kind)
    model = from_transformers(network, tokenizer())
    windows = TextWindows(TEXTS, model.tokenizer, model.config.sequence_length)
    ids = [model.tokenizer.encode(text) for text in TEXTS]
    found = chain_rule(model, windows)
    assert found.nats_per_token * found.tokens == pytest.approx(sum(naive_chain(network, x) for x in ids), abs=1e-5)
    assert (found.kind, found.bytes, found.bytes_lost) == ("exact", sum(map(len, TEXTS)), 0)
    # The NELBO of three letters, by every set of them.
    x, total = ids[1], 0.0
    for k in (1, 2, 3):
        sets = list(itertools.combinations(range(3), k))
        for masked in sets:
            canvas = torch.tensor([[1, *[4 if i in masked else t for i, t in enumerate(x)], 2]])
            logits = network(input_ids=canvas).logits[0]
            total -= sum(float(log_p(logits[1 + i])[x[i]]) for i in masked) / k / len(sets)
    bound = nelbo(model, TextWindows(TEXTS[1:2], model.tokenizer, 8), repeats=400)
    assert abs(bound.bpb * 3 * math.log(2) - total) < 4 * bound.stderr_bpb * 3 * math.log(2) + 1e-5
    assert bound.kind == "upper bound"


@torch.inference_mode()
def test_shifted_outputs_and_extra_inputs():
    network = small("bert")
    seen = []

    def share(ids, masked):
        seen.append(float(masked.double().mean()))
        return {"token_type_ids": torch.zeros(ids.shape[0], ids.shape[1], dtype=torch.int64)}

    model = from_transformers(network, tokenizer(), "masked_shifted", extra_inputs=share)
    found = chain_rule(model, TextWindows(TEXTS, model.tokenizer, 12))
    want = sum(naive_chain(network, model.tokenizer.encode(t), shift=1, suffix=()) for t in TEXTS)
    assert found.nats_per_token * found.tokens == pytest.approx(want, abs=1e-5) and max(seen) > 0


@pytest.mark.parametrize("kind", ["bert", "roberta", "modernbert"])
@torch.inference_mode()
def test_every_mask_agrees_with_a_naive_loop(kind):
    """What the NELBO is made of, for every set of masks of every text, to 1e-5 nats."""
    network = small(kind)
    model = from_transformers(network, tokenizer())
    for text in ("abca", "cb"):
        x = model.tokenizer.encode(text)
        sets = [s for k in range(1, len(x) + 1) for s in itertools.combinations(range(len(x)), k)]
        ids = torch.tensor([model.tokenizer.bos_id, *x])
        masks = [torch.tensor([False, *(i in s for i in range(len(x)))]) for s in sets]
        found = masked_window_nll(model, [MaskedWindow(ids, masked, masked) for masked in masks], batch=3)
        for masked, nll in zip(sets, found, strict=True):
            canvas = torch.tensor([[1, *(4 if i in masked else t for i, t in enumerate(x)), 2]])
            logits = network(input_ids=canvas).logits[0]
            want = [-float(log_p(logits[1 + i])[x[i]]) if i in masked else 0.0 for i in range(len(x))]
            assert nll.tolist() == pytest.approx([0.0, *want], abs=1e-5)


@pytest.mark.parametrize("kind", ["bert", "modernbert", "gpt2", "llama"])
def test_enumeration_sums_to_one(kind):
    """A vocabulary of 5 (a to d, and one unknown piece) and windows of 3: exact figures sum to 1, bounds to less."""
    model = from_transformers(small(kind, vocab=9), tokenizer("abcd"))
    exact = causal if model.trained_causally else chain_rule
    sums = {exact: 0.0, nelbo: 0.0}
    for x in itertools.product("abcdX", repeat=3):
        windows = TextWindows(["".join(x)], model.tokenizer, 8)
        for score in sums:
            sums[score] += math.exp(-3 * score(model, windows).nats_per_token)
    assert sums[exact] == pytest.approx(1, abs=1e-6)
    assert sums[nelbo] == pytest.approx(1, abs=1e-6) if model.trained_causally else sums[nelbo] < 1.05


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@torch.inference_mode()
def test_causal_agrees_and_sums_to_one(kind):
    network = small(kind)
    model = from_transformers(network, tokenizer())
    total = 0.0
    for x in itertools.product((3, 5, 6, 7), repeat=3):
        out = network(input_ids=torch.tensor([[1, *x]])).logits[0]
        want = -sum(float(log_p(out[i])[x[i]]) for i in range(3))
        total += math.exp(-want)
        if 3 not in x:
            text = "".join(SPECIAL[i] if i < 5 else "abc"[i - 5] for i in x)
            found = causal(model, TextWindows([text], model.tokenizer, 12))
            assert found.nats_per_token * 3 == pytest.approx(want, abs=1e-5) and found.kind == "exact"
            assert nelbo(model, TextWindows([text], model.tokenizer, 12)).bpb == found.bpb
    assert total == pytest.approx(1, abs=1e-6)
    with pytest.raises(DataError, match="causal"):
        chain_rule(model, TextWindows(TEXTS, model.tokenizer, 12))


def test_unknown_letters_are_no_code_length():
    model = from_transformers(small("bert"), tokenizer())
    found = chain_rule(model, TextWindows(["abxyz"], model.tokenizer, 12))
    assert found.kind == "not a code length" and found.bytes_lost == 3 and math.isfinite(found.bpb)


def test_folders_are_loaded_offline_and_compared_by_document(tmp_path):
    for kind, names in (("bert", "abc"), ("gpt2", "cab")):
        small(kind).save_pretrained(tmp_path / kind)
        tokenizer(names).save_pretrained(tmp_path / kind)
    a, b = load(tmp_path / "bert"), load(f"hf:{tmp_path / 'gpt2'}")
    assert (a.block_size, b.block_size) == (0, 1)
    assert a.tokenizer.sha256 != b.tokenizer.sha256
    texts = TEXTS * 5
    found = compare_documents(a, b, texts, method="chain-or-causal")
    one = chain_rule(a, TextWindows(texts, a.tokenizer, a.config.sequence_length)).bpb
    two = causal(b, TextWindows(texts, b.tokenizer, b.config.sequence_length)).bpb
    assert found.difference_bpb == pytest.approx(two - one, abs=1e-9)
    assert found.stderr_bpb > 0 and 0 <= found.p_value <= 1 and found.degrees_of_freedom == 14


class Wrapped(torch.nn.Module):
    """An exported folder behind the face of a model of transformers: one more output, for the tokenizer's MASK."""

    def __init__(self, network):
        super().__init__()
        self.network = network
        vocab = network.config.vocab_size + 1
        self.config = types.SimpleNamespace(vocab_size=vocab, max_position_embeddings=network.config.sequence_length)

    def forward(self, input_ids, attention_mask):
        assert bool(attention_mask.all())
        return types.SimpleNamespace(logits=torch.nn.functional.pad(self.network(input_ids), (0, 1)))


def test_an_exported_folder_as_a_foreign_model_has_the_native_figures(tmp_path):
    """Natively control pieces may have some probability, too; where they have none, the figures are the same."""
    own = own_tokenizer("abc")
    config = ModelConfig(
        vocab_size=own.vocab_size, sequence_length=12, layers=1, width=16, heads=2, kv_heads=1, embedding_std=1.0
    )
    native = Model(config, own, eighths(Denoiser(config)).float())
    export_folder(native, tmp_path / "folder")
    names = {"unk_token": "[UNK]", "cls_token": "[CLS]", "mask_token": "<mask>"}
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "folder" / "tokenizer.json"), **names)
    foreign = from_transformers(Wrapped(import_folder(tmp_path / "folder").network), theirs, "masked")
    assert (theirs.mask_token_id, foreign.tokenizer.vocab_size) == (own.vocab_size, own.vocab_size + 1)

    class Renormalised(Model):
        def logits(self, ids, **more):
            return super().logits(ids, **more).index_fill(1, torch.tensor([0, 1, 2, 4]), -torch.inf)

    same = Renormalised(config, own, native.network)
    ours = TextWindows(TEXTS, own, 12)
    wrapped = TextWindows(TEXTS, foreign.tokenizer, 12)
    for score, more in ((nelbo, {}), (chain_rule, {}), (nelbo, {"orders": 2}), (nelbo, {"order_lean": 4.0})):
        there, here, whole = score(foreign, wrapped, **more), score(same, ours, **more), score(native, ours, **more)
        assert (there.bytes, there.tokens, there.kind) == (here.bytes, here.tokens, here.kind)
        assert there.bpb == pytest.approx(here.bpb, abs=1e-6) and there.bpb < whole.bpb


class TestWriting:
    """Foreign models write and fill where their objective allows it."""

    @pytest.mark.parametrize(
        ("kind", "objective"), [("bert", "masked"), ("roberta", "masked"), ("bert", "masked_shifted")]
    )
    def test_masked_models_write_and_fill(self, kind, objective):
        model = from_transformers(small(kind), tokenizer(), objective)
        for length in (5, 17):  # within a window, and beyond it
            texts = sample(model, 2, length, seed=1, prompt="ab").texts
            assert [len(text) for text in texts] == [2 + length] * 2
            assert all(text.startswith("ab") and set(text) <= set("abc") for text in texts)
        assert sample(model, 1, 5, seed=1).texts == sample(model, 2, 5, seed=1).texts[:1]
        for options in ({}, {"temperature": 1.0}, {"sampler": "entropy"}):
            filled = infill(model, "ab[MASK*2]ca____b", 3, **options)
            assert filled.text.startswith("ab") and "ca" in filled.text[4:] and filled.text.endswith("b")
            assert filled.gaps[0].tokens == 2 and set(filled.text) <= set("abc")

    def test_the_surest_first_is_what_the_network_says(self):
        network = small("bert")
        model = from_transformers(network, tokenizer())
        x, hidden = [1, 5, 4, 7, 4, 2], {2, 4}
        while hidden:
            logits = network(input_ids=torch.tensor([x])).logits[0]
            allowed = {i: logits.detach()[i, [3, 5, 6, 7]].double().log_softmax(0)[1:] for i in hidden}
            i = max(hidden, key=lambda i: float(allowed[i].max()))
            x[i] = 5 + int(allowed[i].argmax())
            hidden.remove(i)
        canvas = torch.tensor([[1, 5, 8, 7, 8]])
        assert denoise(model, canvas, temperature=0.0, steps=2).ids[0].tolist() == x[:-1]

    def test_causal_models_write_by_next_tokens_and_do_not_fill(self):
        network = small("gpt2")
        model = from_transformers(network, tokenizer())
        ids = [1, 5]
        for _ in range(6):
            ids.append(5 + int(network(input_ids=torch.tensor([ids])).logits[0, -1, 5:8].argmax()))
        letters = "".join("abc"[i - 5] for i in ids[1:])
        assert sample(model, 1, 6, prompt="a", temperature=0.0).texts == [letters]
        with pytest.raises(ConfigError, match="next tokens only"):
            infill(model, "a____b")
        with pytest.raises(ConfigError, match="speculate"):
            sample(model, 1, 4, speculate=2)
        with pytest.raises(DataError, match="objective is causal"):
            sample(model, 1, 4, sampler="entropy", attention="full")

    def test_commands_take_folders(self, tmp_path, capsys):
        for kind in ("bert", "gpt2"):
            small(kind).save_pretrained(tmp_path / kind)
            tokenizer().save_pretrained(tmp_path / kind)
        bert, gpt2 = str(tmp_path / "bert"), str(tmp_path / "gpt2")

        def call(*words):
            status = main(words)
            out = capsys.readouterr()
            return status, out.out, out.err

        assert call("sample", bert, "--length", "4", "--json")[0] == 0
        assert call("sample", gpt2, "--length", "4", "--json")[0] == 0
        status, out, _ = call("fill", bert, "ab____c", "--json")
        assert status == 0 and json.loads(out)["text"].startswith("ab")
        status, out, _ = call("fill", bert, "ab____c", "--objective", "masked_shifted", "--json")
        assert status == 0 and json.loads(out)["text"].endswith("c")
        (tmp_path / "export").mkdir()
        for words, message in (
            (("fill", gpt2, "ab____c"), "next tokens only"),
            (("serve", gpt2), "next tokens only"),
            (("sample", "prose", "--objective", "masked"), "transformers"),
            (("export", bert, "--out", str(tmp_path / "export" / "x")), "transformers"),
            (("compress", __file__, "--model", gpt2, "--out", str(tmp_path / "x")), "transformers"),
        ):
            status, out, err = call(*words)
            assert (status, out) == (2, "") and err.count("\n") == 1 and message in err

    def test_the_page_fills(self):
        testclient = pytest.importorskip("starlette.testclient", reason="needs the extra serve")
        from mezzotint.apps.serve import create_app

        model = from_transformers(small("bert"), tokenizer())
        client = testclient.TestClient(create_app(model, hosts=("*",)))
        assert client.get("/api/model").json()["window"] == 11
        done = client.post("/api/fill", json={"text": "ab____c"})
        assert done.status_code == 200 and "event: done" in done.text
        done = client.post("/api/likelihood", json={"text": "abcca"})
        assert "event: done" in done.text and '"kind": "upper bound"' in done.text
        done = client.post("/api/likelihood", json={"text": "abx"})
        assert '"kind": "not a code length"' in done.text
        with pytest.raises(ConfigError, match="next tokens only"):
            create_app(from_transformers(small("gpt2"), tokenizer()))


class TestBadInput:
    def test_one_line(self, tmp_path, monkeypatch):
        network = small("bert")
        with pytest.raises(ConfigError, match="objective"):
            from_transformers(network, tokenizer(), "diffusion")
        bare = tokenizer()
        bare.mask_token = None
        with pytest.raises(ConfigError, match="MASK"):
            from_transformers(network, bare)
        with pytest.raises(ConfigError, match="do not fit"):
            from_transformers(network, tokenizer("abcdefgh"))
        with pytest.raises(ConfigError, match="cannot be told"):
            from_transformers(network.bert, tokenizer())
        tokenizer().save_pretrained(tmp_path / "pickle")
        network.config.architectures = ["BertForMaskedLM"]
        network.config.save_pretrained(tmp_path / "pickle")
        torch.save(network.state_dict(), tmp_path / "pickle" / "pytorch_model.bin")
        with pytest.raises(CheckpointError) as caught:
            load_transformers(tmp_path / "pickle")
        assert "\n" not in str(caught.value)

    def test_without_a_network(self, monkeypatch, tmp_path):
        monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
        monkeypatch.setenv("HF_HOME", str(tmp_path))
        with pytest.raises(MezzotintError, match="cannot be reached"):
            load("hf:nobody/nothing")


def test_bytes_add_up_whatever_the_stride():
    own = from_transformers(small("bert"), tokenizer()).tokenizer
    for stride in (None, 1, 3):
        windows = TextWindows([*TEXTS, "", "ab \u4e2d"], own, 5, stride)
        assert sum(windows.byte_count(i) for i in range(len(windows))) == sum(map(len, TEXTS)) + 6
        charged = np.concatenate([windows[i][windows.context(i) :] for i in range(len(windows))])
        assert charged.tolist() == [t for text in [*TEXTS, "ab \u4e2d"] for t in own.encode(text)]
