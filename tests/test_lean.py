"""Training masks of orders that lean to the left: their law, and the loss, against plain loops."""

from __future__ import annotations

import collections
import itertools
import math

import numpy as np
import pytest
import torch
from test_bounds import law
from toy import eighths

from mezzotint.config import ModelConfig, TrainConfig
from mezzotint.errors import ConfigError
from mezzotint.network.model import Denoiser
from mezzotint.objective import lean_weights, nelbo_per_window
from mezzotint.training.corrupt import corrupt_batch, prepare_step, stage_at

LEAN, T, MASK = 2.5, 3, 9


def chances(masked, lean):
    """Each masked position's chance to be next, by the definition."""
    weights = [math.exp(-lean * i / len(masked)) if m else 0.0 for i, m in enumerate(masked)]
    return [w / sum(weights) for w in weights]


def test_masks_have_the_law_of_the_orders():
    config = TrainConfig(order_lean=LEAN, seed=3)
    n = 6000
    batch = corrupt_batch(config, 5, torch.zeros(n, T, dtype=torch.int64), MASK)
    assert bool(((batch.corrupted == MASK) == batch.masked).all()) and bool((batch.masked.sum(1) == batch.counts).all())
    orders = list(itertools.permutations(range(T)))
    for count in (1, 2):
        rows = batch.masked[batch.counts == count]
        found = collections.Counter(tuple(row) for row in rows.tolist())
        for masked in {tuple(i in s for i in range(T)) for s in itertools.combinations(range(T), count)}:
            want = sum(law(o, LEAN) for o in orders if all(masked[i] for i in o[T - count :]))
            assert abs(found[masked] / len(rows) - want) < 4.5 * math.sqrt(want * (1 - want) / len(rows))


def test_weights_are_the_chances_to_be_next():
    masked = torch.tensor([[True, False, True], [True, True, True], [False, False, True]])
    want = [[sum(row) * c for c in chances(row, LEAN)] for row in masked.tolist()]
    assert torch.allclose(lean_weights(masked, LEAN), torch.tensor(want), atol=1e-6)
    assert torch.equal(lean_weights(masked, 0.0), masked.float())
    # The mean of the weighted NELBO over counts and masks is the mean over orders of the chain: here of any table of NLL.
    random, mean, want = np.random.default_rng(0), 0.0, 0.0
    table = {s: random.random(T) for k in range(1, T + 1) for s in itertools.combinations(range(T), k)}
    for order in itertools.permutations(range(T)):
        for count in range(1, T + 1):
            hidden = tuple(sorted(order[T - count :]))
            rows = torch.tensor([[i in hidden for i in range(T)]])
            nll = torch.from_numpy(table[hidden]) * rows * lean_weights(rows, LEAN).double()
            mean += law(order, LEAN) / T * nelbo_per_window(nll, torch.tensor([count])).item()
            want += law(order, LEAN) * table[hidden][order[T - count]]
    assert mean == pytest.approx(want, abs=1e-6)


def test_the_loss_is_that_of_a_plain_loop_and_a_step_learns():
    from mezzotint.training.step import Trainer

    model = ModelConfig(vocab_size=9, sequence_length=6, layers=1, width=16, heads=2, kv_heads=1, embedding_std=1.0)
    config = TrainConfig(
        steps=3, batch=4, order_lean=LEAN, causal_share=0.25, device="cpu", dtype="float32", compile=False
    )
    windows = np.random.default_rng(1).integers(0, 9, (4, 6))

    class Loader:
        def starts(self, step):
            return []

        def batch(self, step):
            return windows

    network = eighths(Denoiser(model)).float().train()
    trainer = Trainer(network, config, Loader(), torch.device("cpu"))
    loss, nelbo = trainer.gradients(windows, 2)
    total = bound = 0.0
    for part in prepare_step(config, windows, 2, stage_at(config, 1.0), 9).passes:
        with torch.no_grad():
            logits = network(part.corrupted, block_size=int(part.causal)).double().log_softmax(2)
        for row, ids in enumerate(part.ids.tolist()):
            nll = [-float(logits[row, i, t]) for i, t in enumerate(ids)]
            if part.causal:
                total += sum(nll)
                continue
            share = chances((part.corrupted[row] == 9).tolist(), LEAN)
            bound += 6 * sum(c * v for c, v in zip(share, nll, strict=True))
    assert nelbo == pytest.approx(bound / (3 * 6), rel=1e-4)
    assert loss == pytest.approx((total + bound) / (4 * 6), rel=1e-4)
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in network.parameters())


def test_lean_0_is_as_before_and_what_does_not_go_with_it():
    ids = torch.arange(12).view(4, 3) % 5
    plain, zero = TrainConfig(seed=1), TrainConfig(seed=1, order_lean=0.0)
    assert torch.equal(corrupt_batch(plain, 0, ids, MASK).masked, corrupt_batch(zero, 0, ids, MASK).masked)
    assert all(p.weights is None for p in prepare_step(zero, ids.numpy(), 0, stage_at(zero, 1.0), MASK).passes)
    for more in ({"block_size": 4}, {"weighting": "reference"}):
        with pytest.raises(ConfigError, match="order_lean"):
            TrainConfig(order_lean=1.0, **more)
    for lean in (-1.0, math.nan, math.inf):
        with pytest.raises(ConfigError, match="order"):
            TrainConfig(order_lean=lean)
