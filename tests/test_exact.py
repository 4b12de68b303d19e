"""Arithmetic that gives the same bits everywhere: against plain loops, exact integers and the float network."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from test_compress import ALL_PARTS, EVERY, MODEL, tiny
from toy import ToyText

import mezzotint
from mezzotint.compression import exact
from mezzotint.compression.exact import Cache, ExactNetwork
from mezzotint.errors import MezzotintError
from mezzotint.network.model import Model

F = np.float32


class TestTables:
    def test_exponentials_tanh_and_rotations_are_the_nearest_integers(self):
        table = exact.exp_table(32, 4096)
        assert table[-1] == 0 and table[-2] > 0
        assert np.abs(table - 4096 * np.exp(-np.arange(len(table)) / 32)).max() <= 0.5 + 1e-9
        cap = exact.cap_table(3.0)
        assert np.abs(cap - 192 * np.tanh(np.arange(len(cap)) / 192)).max() <= 0.5 + 1e-9
        cos, sin = exact.rotary_tables(50, 8, 100.0)
        angle = np.arange(50)[:, None] * 100.0 ** (-np.arange(4) / 4)
        assert np.abs(cos - np.cos(angle)).max() <= 2**-16 + 1e-9
        assert np.abs(sin - np.sin(angle)).max() <= 2**-16 + 1e-9
        assert (cos * 32768 == np.rint(cos * 32768)).all()

    def test_hostile_settings_take_bounded_work(self):
        assert len(exact.cap_table(1e30)) == (1 << 20) + 1
        assert len(exact.cap_table(1e-30)) == 2

    @pytest.mark.parametrize("n", [1, 2, 3, 5, 8, 13, 224])
    def test_fold_has_the_stated_order(self, n):
        x = np.random.default_rng(n).normal(size=(3, n)).astype(F)
        for row, found in zip(x, exact.fold(x)[:, 0], strict=True):
            values = list(row)
            while len(values) > 1:
                half = (len(values) + 1) // 2
                values = [v + values[half + i] if half + i < len(values) else v for i, v in enumerate(values[:half])]
            assert values[0] == found


class TestMatrix:
    @pytest.mark.parametrize(("rows", "columns"), [(5, 7), (40, 224), (3, 5000)])
    def test_every_kernel_gives_the_exact_sums(self, rows, columns):
        random = np.random.default_rng(0)
        matrix = exact._Matrix(random.normal(size=(rows, columns)).astype(F))
        x = random.integers(-127, 128, (9, columns))
        x[0] = 127 * np.sign(matrix.codes[:, 0])  # the largest sum there is
        sums = (x @ matrix.codes.astype(np.int64)).astype(F)
        assert (matrix(x.astype(F)) == sums).all()
        matrix.short = None
        assert (matrix(x.astype(F)) == sums).all()
        assert (matrix.kind is np.float64) == (127 * np.abs(matrix.codes).sum(axis=0).max() >= 1 << 24)

    def test_a_kernel_that_is_not_exact_is_left_alone(self, monkeypatch):
        def saturating(a, b):
            return (a.int() @ b.int()).clamp(-30_000, 30_000)

        weight = np.full((4, 200), 1.0, F)
        monkeypatch.setattr(torch, "_int_mm", saturating)
        assert exact._Matrix(weight).short is None
        monkeypatch.delattr(torch, "_int_mm")
        assert exact._Matrix(weight).short is None

    def test_rows_of_zeros(self):
        matrix = exact._Matrix(np.zeros((3, 4), F))
        assert (matrix(np.ones((2, 4), F)) * matrix.scale == 0).all()


def ids(model: Model, rows: int, length: int) -> np.ndarray:
    out = np.random.default_rng(0).integers(0, model.config.vocab_size, (rows, length))
    out[:, 0] = model.config.mask_id
    return out


class TestNetwork:
    @pytest.mark.parametrize("model", [MODEL, EVERY], ids=["plain", "every part"])
    def test_whole_windows_steps_and_batches_give_the_same_bits(self, model):
        network, given = ExactNetwork(model), ids(model, 3, 16)
        whole = network.hidden(given, Cache(network, 3, 16))
        one = np.concatenate([network.hidden(row[None], Cache(network, 1, 16)) for row in given])
        cache = Cache(network, 3, 16)
        parts = [network.hidden(given[:, :5], cache, 2)]
        parts += [network.hidden(given[:, i : i + 1], cache) for i in range(5, 16)]
        assert (whole == one).all() and (whole[:, 2:] == np.concatenate(parts, axis=1)).all()

    @pytest.mark.parametrize("model", [MODEL, EVERY], ids=["plain", "every part"])
    def test_slower_kernels_give_the_same_bits(self, model, monkeypatch):
        given = ids(model, 2, 16)
        network = ExactNetwork(model)
        fast = network.frequencies(network.hidden(given, Cache(network, 2, 16))[:, -1])
        monkeypatch.delattr(torch, "_int_mm")
        monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "medium")
        slow = ExactNetwork(model)
        assert (fast == slow.frequencies(slow.hidden(given, Cache(slow, 2, 16))[:, -1])).all()

    @pytest.mark.parametrize("model", [MODEL, EVERY], ids=["plain", "every part"])
    def test_calls_for_few_and_for_many_numbers_give_the_same_bits(self, model, monkeypatch):
        network, given = ExactNetwork(model), ids(model, 3, 16)
        few = network.hidden(given, Cache(network, 3, 16), 5)
        monkeypatch.setattr(exact, "FEW", 0)
        assert (few == network.hidden(given, Cache(network, 3, 16), 5)).all()

    @pytest.mark.parametrize("options", [{}, *({name: value} for name, value in ALL_PARTS.items()), ALL_PARTS])
    def test_is_the_float_network(self, options):
        if "bigram_width" in options and len(options) == 1:
            return
        model = tiny(ToyText(), 16, **options)
        given = ids(model, 4, 16)
        network = ExactNetwork(model)
        found = network.frequencies(network.hidden(given, Cache(network, 4, 16)).reshape(64, -1)) / exact.TOTAL
        float_p = model.logits(torch.from_numpy(given), block_size=1).double().softmax(-1).reshape(64, -1).numpy()
        assert (found >= 2.0**-24).all() and (found.sum(axis=1) == 1).all()
        divergence = (float_p * np.log(float_p / found)).sum(axis=1).mean()
        entropy = -(float_p * np.log(float_p)).sum(axis=1).mean()
        assert divergence < 0.005 * entropy, (divergence, entropy)

    def test_shipped_model_loses_a_thousandth(self):
        model = mezzotint.load()
        text = "It was the best of times, it was the worst of times. " * 2 + "The old man had nothing to say to her."
        tokens = np.array([model.tokenizer.bos_id, *model.tokenizer.encode(text)])
        given = np.concatenate(([model.config.mask_id], tokens[:-1]))[None]
        network = ExactNetwork(model)
        found = network.frequencies(network.hidden(given, Cache(network, 1, len(tokens)))[0])
        bits = np.log2(exact.TOTAL / found[np.arange(len(tokens)), tokens]).sum()
        float_logits = model.logits(torch.from_numpy(given), block_size=1)[0].double()
        expected = float(torch.nn.functional.cross_entropy(float_logits, torch.from_numpy(tokens), reduction="sum"))
        assert bits == pytest.approx(expected / math.log(2), rel=0.01)


class TestRefusals:
    @pytest.mark.parametrize(
        ("change", "message"),
        [({"rotary_base": 0.5}, "rotary_base of at least 1"), ({"rotary_base": math.nan}, "rotary_base")],
    )
    def test_configs(self, change, message):
        config = dataclasses.replace(MODEL.config)
        for name, value in change.items():  # which the config itself would refuse
            object.__setattr__(config, name, value)
        model = dataclasses.replace(MODEL, config=config)
        with pytest.raises(MezzotintError, match=message):
            ExactNetwork(model)

    @pytest.mark.parametrize("value", [1e5, math.inf, math.nan])
    def test_weights(self, value):
        model = tiny(ToyText())
        with torch.no_grad():
            model.network.blocks[0].attention.query_gain[0] = value
        with pytest.raises(MezzotintError, match="weights are at most"):
            ExactNetwork(model)
