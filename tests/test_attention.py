"""Attention's kernels for a GPU, and layers compiled for it, against the same thing written out; on a CPU."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import mezzotint.network.attention
from mezzotint.config import ModelConfig
from mezzotint.network.attention import flex_attention_under, noisy_block_mask
from mezzotint.network.layers import Block, Float32Products
from mezzotint.network.model import Denoiser


def test_layers_are_compiled_once_for_all_of_them(monkeypatch):
    """As a GPU has them: one layer's code for all layers, lengths and batches, and another for causal windows."""
    seen = []

    def counted(graph, inputs):
        seen.append(len(graph.graph.nodes))
        return graph.forward

    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **options: compile(function, backend=counted, **options))
    config = ModelConfig(
        vocab_size=50, sequence_length=24, layers=3, width=48, heads=3, kv_heads=3, shifted_output=True,
        depth_scaled_norm=True,
    )  # fmt: skip
    torch.manual_seed(0)
    network = Denoiser(config)
    for p in network.parameters():
        torch.nn.init.normal_(p, std=0.1)
    found = []
    for compiled in (False, True):
        network.compile_blocks(compiled)
        found.append([
            network.hidden(torch.arange(rows * length).view(rows, length) % 50, size)
            for rows, length, size in ((5, 20, 0), (7, 18, 0), (5, 20, 1), (4, 16, 1))
        ])  # fmt: skip
    torch.testing.assert_close(found[1], found[0])
    assert len(seen) == 2


def test_products_in_float32_are_not_rounded_in_between():
    """Values and gradients of float64's products of the same bfloat16 matrices; gradients come as bfloat16."""
    random = torch.Generator().manual_seed(0)
    a, b, g = (torch.randn(*shape, generator=random) for shape in ((7, 24), (9, 24), (7, 9)))
    a, b, g = (x.bfloat16() for x in (a, b, g))
    a.requires_grad_()
    b.requires_grad_()
    out = Float32Products.apply(a, b)
    exact = a.detach().double() @ b.detach().double().T
    assert out.dtype == torch.float32 and float((out.detach().double() - exact).abs().max()) < 1e-5
    out.backward(g.float())
    assert a.grad is not None and b.grad is not None
    torch.testing.assert_close(a.grad.double(), g.double() @ b.detach().double(), rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(b.grad.double(), g.double().T @ a.detach().double(), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("prefix", [0, 1])
def test_flexible_masks_are_the_dense_ones(prefix):
    config = ModelConfig(vocab_size=20, sequence_length=14, layers=1, width=8, heads=1, kv_heads=1)
    network = Denoiser(dataclasses.replace(config, shifted_output=bool(prefix)))
    dense = network.tables(14, 4).noisy_attn_mask
    assert dense is not None
    blocks = noisy_block_mask(14 + 4 * prefix, 14, 4, prefix, torch.device("cpu"))
    rows, columns = torch.arange(dense.shape[0])[:, None], torch.arange(dense.shape[1])
    assert torch.equal(blocks.mask_mod(None, None, rows, columns), dense == 0)


@pytest.mark.parametrize("prefix", [0, 1])
def test_flexible_attention_is_the_dense_one(prefix, monkeypatch):
    """As a GPU has it, compiled layers around an attention of its own, but by FlexAttention as it is written out."""
    from torch.nn.attention.flex_attention import flex_attention

    monkeypatch.setattr(mezzotint.network.attention, "compiled_flex_attention", lambda: flex_attention)
    config = ModelConfig(vocab_size=20, sequence_length=14, layers=2, width=32, heads=2, kv_heads=1)
    torch.manual_seed(0)
    network = Denoiser(dataclasses.replace(config, shifted_output=bool(prefix)))
    for p in network.parameters():
        torch.nn.init.normal_(p, std=0.2)
    ids = torch.arange(28).view(2, 14) % 20
    noisy = ids.masked_fill(ids % 3 == 0, config.mask_id)
    found = []
    for flexible in (False, True):
        network.compile_blocks(flexible)
        tables = network.tables(14, 4)
        if flexible:
            # For shapes of any size, as on a GPU, once; for the shapes as they are, tracing takes a fourth of the time.
            network.compiled_block = torch.compile(Block.forward, dynamic=bool(prefix), backend="eager")
            blocks = noisy_block_mask(14 + 4 * prefix, 14, 4, prefix, torch.device("cpu"))
            tables = tables._replace(noisy_attention=flex_attention_under(blocks))
        with torch.no_grad():  # on a CPU it has no backward pass
            found.append(network.hidden_blocks(noisy, ids, 4, tables, next_tokens=bool(prefix)))
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)
