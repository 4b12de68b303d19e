"""Self-speculation against plain drawing: the same distribution, the same greedy text."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from test_sample import block_model, chi_square

from mezzotint import seeding
from mezzotint.config import SamplingConfig
from mezzotint.errors import ConfigError
from mezzotint.sampling.denoise import denoise
from mezzotint.sampling.generate import sample
from mezzotint.sampling.samplers import probabilities
from mezzotint.sampling.speculate import accept, speculate


def test_accepted_tokens_are_distributed_as_drawn_one_by_one():
    """Two drafted tokens: the joint of the first two tokens kept must be p(x) p(y | x), whatever q is."""
    generator = torch.Generator().manual_seed(0)
    first = torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64)
    second = torch.tensor([[0.1, 0.2, 0.7], [0.5, 0.25, 0.25], [0.05, 0.9, 0.05]], dtype=torch.float64)
    q = torch.tensor([[0.2, 0.5, 0.3], [0.4, 0.3, 0.3]], dtype=torch.float64)
    n, counts = 6000, Counter()
    for _ in range(n):
        drafted = torch.stack([torch.multinomial(row, 1, generator=generator)[0] for row in q])
        p = torch.stack((first, second[drafted[0]], torch.ones(3, dtype=torch.float64) / 3))
        kept = accept(p, q, drafted, generator)
        if len(kept) == 1:  # drawn one by one from there on
            kept += torch.multinomial(second[kept[0]], 1, generator=generator).tolist()
        counts[tuple(kept[:2])] += 1
    expected = {(x, y): float(first[x] * second[x, y]) for x in range(3) for y in range(3)}
    assert chi_square(counts, expected, n) < 26.12  # 99.9% of chi-square with 8 degrees of freedom
    drafts = {(x, y): float(q[0, x] * q[1, y]) for x in range(3) for y in range(3)}
    assert chi_square(counts, drafts, n) > 26.12


@pytest.mark.parametrize("drafted", [1, 3])
def test_texts_of_a_network_are_distributed_as_its_next_tokens(drafted):
    model = block_model(1)
    allowed = torch.zeros(model.config.vocab_size, dtype=torch.bool)
    allowed[[10, 11, 12]] = True
    config, n, counts = SamplingConfig(), 800, Counter()
    for row in range(n):
        found = speculate(
            model, [1, 20], 2, drafted, config=config, generator=seeding.generator(1, row), allowed=allowed
        )
        counts[tuple(found.tokens)] += 1
        assert len(found.tokens) == 2
    expected = {}
    for x in (10, 11, 12):
        shifted = torch.tensor([[model.config.mask_id, 1, 20, x]])
        p = model.logits(shifted, block_size=1)[0].double().masked_fill(~allowed, -torch.inf).softmax(-1)
        expected |= {(x, y): float(p[2, x] * p[3, y]) for y in (10, 11, 12)}
    assert sum(expected.values()) == pytest.approx(1)
    expected = {pair: p for pair, p in expected.items() if p > 1e-4}
    assert chi_square(counts, expected, n) < 26.12


def test_greedy_speculation_is_greedy_next_tokens():
    model = block_model(1)
    allowed = model.tokenizer.is_text
    canvas = torch.full((1, 22), model.config.mask_id)
    canvas[0, :2] = torch.tensor([1, 20])
    plain = denoise(model, canvas, sampler="blocks", attention="causal", temperature=0.0, allowed=allowed).ids[0, 2:]
    for drafted in (1, 4, 40):
        found = speculate(
            model, [1, 20], 20, drafted, config=SamplingConfig(temperature=0.0), generator=seeding.generator(0),
            allowed=allowed,
        )  # fmt: skip
        assert found.tokens == plain.tolist() and found.checks <= 20
    assert sample(model, 3, 12, seed=1, speculate=2).texts[:2] == sample(model, 2, 12, seed=1, speculate=2).texts


def test_probabilities_are_those_drawn_from():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]], dtype=torch.float64).log()
    assert probabilities(logits, 1.0, 0.7)[0].tolist() == pytest.approx([0.625, 0.375, 0, 0])
    assert probabilities(logits, 0.0, 1.0)[0].tolist() == [1, 0, 0, 0]
    assert probabilities(logits, 1.0, 1.0)[0].tolist() == pytest.approx([0.5, 0.3, 0.15, 0.05])


def test_what_cannot_be_speculated_is_refused():
    for model, options in (
        (block_model(0), {}),
        (block_model(1), {"sampler": "entropy"}),
        (block_model(1), {"length": 500}),
        (block_model(1), {"speculate": -1}),
    ):
        with pytest.raises(ConfigError):
            sample(model, 1, **{"speculate": 2, **options})
