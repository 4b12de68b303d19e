"""Mask counts, masks and the loss: what they are distributed as, and what the loss estimates."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from mezzotint.objective import (
    block_counts,
    block_lengths,
    mask_by_count,
    masked_nll,
    nelbo_per_window,
    stratified_counts,
    training_loss,
)

MASK = 3


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(("n", "length"), [(1, 5), (4, 4), (7, 3), (5, 16), (64, 10)])
def test_counts_are_spread_evenly(n, length):
    """Every n-th of 1..length gets one count, so a sorted draw stays within its stratum."""
    for seed in range(20):
        counts = stratified_counts(n, length, generator(seed)).sort().values
        assert counts.min() >= 1 and counts.max() <= length
        for i, k in enumerate(counts.tolist()):
            assert math.floor(i * length / n) + 1 <= k <= math.ceil((i + 1) * length / n)


def test_each_count_is_uniform():
    """Marginally uniform at every place of the draw: chi-square at 4 degrees of freedom, 0.1% level."""
    draws = torch.stack([stratified_counts(3, 5, generator(seed)) for seed in range(6000)])
    for place in range(3):
        observed = torch.bincount(draws[:, place] - 1, minlength=5).double()
        assert float(((observed - 1200) ** 2 / 1200).sum()) < 18.5


def test_masks_have_their_counts_and_are_uniform_sets():
    seen: dict[tuple[int, ...], int] = {}
    ids = torch.tensor([[0, 1, 2, 0]]).repeat(6000, 1)
    corrupted, masked = mask_by_count(ids, torch.full((6000,), 2), MASK, generator())
    assert torch.equal(masked.sum(1), torch.full((6000,), 2))
    assert torch.equal(corrupted, torch.where(masked, MASK, ids))
    for row in masked:
        key = tuple(row.nonzero()[:, 0].tolist())
        seen[key] = seen.get(key, 0) + 1
    assert set(seen) == set(itertools.combinations(range(4), 2))
    assert sum((n - 1000) ** 2 / 1000 for n in seen.values()) < 20.6  # 5 degrees of freedom, 0.1% level


@pytest.mark.parametrize(
    ("length", "size", "lengths"), [(7, 3, [3, 3, 1]), (6, 3, [3, 3]), (3, 5, [3]), (2, 1, [1, 1])]
)
def test_blocks_have_their_counts(length, size, lengths):
    assert block_lengths(length, size).tolist() == lengths
    ids = torch.arange(length).repeat(50, 1)
    counts = block_counts(50, length, size, generator())
    corrupted, masked = mask_by_count(ids, counts, 99, generator(1), size)
    assert torch.equal(corrupted, ids.masked_fill(masked, 99))
    assert torch.equal(torch.stack([part.sum(1) for part in masked.split(size, dim=1)], dim=1), counts)
    for tokens in set(lengths):  # stratified over all blocks of a length: no count is more than one draw ahead
        seen = torch.bincount(counts[:, torch.tensor(lengths) == tokens].flatten(), minlength=tokens + 1)[1:]
        assert len(seen) == tokens and int(seen.max() - seen.min()) <= 2


def test_sets_of_a_block_are_uniform_and_independent_of_the_next():
    seen: dict[tuple[int, ...], int] = {}
    _, masked = mask_by_count(torch.zeros(6000, 5, dtype=torch.int64), torch.tensor([[2, 1]] * 6000), 9, generator(), 3)
    for row in masked:
        key = tuple(row.nonzero()[:, 0].tolist())
        seen[key] = seen.get(key, 0) + 1
    assert set(seen) == {(*a, b) for a in itertools.combinations(range(3), 2) for b in (3, 4)}
    assert sum((n - 1000) ** 2 / 1000 for n in seen.values()) < 20.6  # 5 degrees of freedom, 0.1% level


def test_blocks_weigh_by_their_own_rates():
    nll = torch.tensor([[1.0, 0.0, 2.0, 3.0, 4.0]])
    counts = torch.tensor([[1, 2, 1]])
    assert float(nelbo_per_window(nll, counts, 2)) == 1.0 * 2 / 1 + 5.0 * 2 / 2 + 4.0
    assert float(nelbo_per_window(nll, torch.tensor([[4]]), 5)) == float(nelbo_per_window(nll, torch.tensor([4])))
    assert float(training_loss(nll, counts, "nelbo", 3, 7, 2)) == pytest.approx(11 / 15)
    assert float(training_loss(nll, counts, "reference", 3, 7, 2)) == pytest.approx(10 / 7)


def test_masked_nll_puts_each_figure_at_its_place():
    ids = torch.tensor([[0, 1, 2], [2, 1, 0]])
    masked = torch.tensor([[True, False, True], [False, True, False]])
    logits = torch.randn(3, 3, generator=generator())
    expected = torch.zeros(2, 3)
    for row, (b, t) in enumerate(masked.nonzero().tolist()):
        expected[b, t] = -torch.log(logits[row].exp()[ids[b, t]] / logits[row].exp().sum())
    torch.testing.assert_close(masked_nll(logits, ids, masked), expected)


@pytest.mark.parametrize("weighting", ["nelbo", "reference"])
def test_shares_of_micro_batches_add_up(weighting):
    nll = torch.rand(6, 5, generator=generator())
    counts = torch.tensor([1, 2, 3, 4, 5, 5])
    whole = training_loss(nll, counts, weighting, 6, 20)
    parts = [training_loss(nll[i : i + 2], counts[i : i + 2], weighting, 6, 20) for i in (0, 2, 4)]
    torch.testing.assert_close(sum(parts), whole)


def test_what_each_weighting_optimizes():
    """With CE(t) = t, the NELBO is the integral of t, 1/2; the reference's loss is the integral of 2 t * t, 2/3."""
    length = 1000
    counts = stratified_counts(2000, length, generator())
    masked = torch.arange(length) < counts[:, None]
    nll = (counts[:, None] / length) * masked
    total = int(counts.sum())
    assert float(nelbo_per_window(nll, counts).mean()) / length == pytest.approx(1 / 2, abs=2e-3)
    assert float(training_loss(nll, counts, "nelbo", 2000, total)) == pytest.approx(1 / 2, abs=2e-3)
    assert float(training_loss(nll, counts, "reference", 2000, total)) == pytest.approx(2 / 3, abs=2e-3)
