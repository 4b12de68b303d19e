"""Roles of parameters, the schedule, the moving average, and optimizer state without pickle."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from mezzotint.config import PRESETS, ModelConfig, TrainConfig
from mezzotint.network.model import Denoiser
from mezzotint.training.optim import (
    BatchedMuon,
    MovingAverage,
    Optimizers,
    _newton_schulz_of_gram,
    learning_rate_scale,
    split_parameters,
)

MODEL = ModelConfig(vocab_size=11, sequence_length=8, layers=2, width=16, heads=2, kv_heads=1, neighbour_reach=1)


def test_every_parameter_has_one_role():
    with torch.device("meta"):
        net = Denoiser(PRESETS["reference"].model)
    roles = split_parameters(net)
    named = [name for role in roles.values() for name in role]
    assert sorted(named) == sorted(name for name, _ in net.named_parameters())
    assert all(p.ndim == 2 for p in roles["matrix"].values())
    assert set(roles["embedding"]) == {
        "embedding.weight",
        "bigram.embedding.weight",
        "value_embedding.embedding.weight",
    }
    assert len(roles["matrix"]) == 11 * 6 + 2


def test_schedule_is_a_trapezoid():
    scales = [learning_rate_scale(i / 100, 0.1, 0.5) for i in range(101)]
    assert 0 < scales[0] < 0.02 and scales[10] == scales[50] == 1 and scales[75] == pytest.approx(0.5)
    assert scales[100] == 0
    assert learning_rate_scale(0, 0, 0) == 1
    assert [learning_rate_scale(p, 0, 0.5, 0.2) for p in (0.5, 0.75, 1)] == pytest.approx([1, 0.6, 0.2])


def test_moving_average_against_the_recursion():
    net = torch.nn.Linear(1, 1, bias=False)
    average = MovingAverage(net, 0.1)
    expected = float(net.weight.detach())
    for step in range(1, 50):
        with torch.no_grad():
            net.weight.fill_(float(step))
        average.update(step)
        expected += (step - expected) / (1 + 0.1 * step)
    assert float(average.average["weight"]) == pytest.approx(expected, rel=1e-5)


def test_moving_average_is_float32_and_does_not_freeze():
    net = torch.nn.Linear(1, 1, bias=False).to(torch.bfloat16)
    with torch.no_grad():
        net.weight.fill_(1.0)
    average = MovingAverage(net, 1.0)
    with torch.no_grad():
        net.weight.fill_(1.0078125)  # one bfloat16 step up
    for step in range(1, 40_000, 400):
        average.update(step)
    assert average.average["weight"].dtype == torch.float32
    assert 1.0 < float(average.average["weight"]) < 1.0078125


def test_batched_muon_is_the_librarys():
    """Same update as torch.optim.Muon, on matrices of several shapes, up to bfloat16 rounding."""
    torch.manual_seed(0)
    shapes = [(16, 16), (16, 16), (64, 16), (16, 64), (8, 16)]
    first = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    second = [torch.nn.Parameter(p.detach().clone()) for p in first]
    settings = {"lr": 0.02, "weight_decay": 0.04, "momentum": 0.9, "adjust_lr_fn": "original"}
    ours, theirs = BatchedMuon(first, **settings), torch.optim.Muon(second, **settings)
    start = [p.detach().clone() for p in first]
    for _ in range(4):
        for p, q in zip(first, second, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        ours.step()
        theirs.step()
    for p, q, s in zip(first, second, start, strict=True):
        moved = float((q - s).detach().norm())
        assert float((p - q).detach().norm()) < 0.03 * moved


def test_levelled_neurons_against_loops():
    """NorMuon's second moments by plain loops over neurons, around the library's Muon."""
    torch.manual_seed(0)
    shapes = [(16, 16), (48, 16), (16, 48)]
    ours = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    settings = {"lr": 0.02, "weight_decay": 0.0, "momentum": 0.9, "adjust_lr_fn": "original"}
    levelled, plain = BatchedMuon(ours, neuron_decay=0.8, **settings), torch.optim.Muon(theirs, **settings)
    power = [[0.0] * shape[0] for shape in shapes]
    for _ in range(5):
        gradients = [torch.randn(shape) * torch.logspace(-2, 0, shape[0])[:, None] for shape in shapes]
        before = [p.detach().clone() for p in theirs]
        start = [p.detach().clone() for p in ours]
        for p, q, g in zip(ours, theirs, gradients, strict=True):
            p.grad, q.grad = g.clone(), g.clone()
        levelled.step()
        plain.step()
        for m, (p, q) in enumerate(zip(ours, theirs, strict=True)):
            update = (q - before[m]).detach() / 0.02
            expected = torch.empty_like(update)
            for row in range(len(update)):
                power[m][row] = 0.8 * power[m][row] + 0.2 * float((update[row] ** 2).mean())
                expected[row] = update[row] / power[m][row] ** 0.5
            expected *= update.norm() / expected.norm()
            moved = (p.detach() - start[m]) / 0.02
            assert float((moved - expected).norm()) < 0.03 * float(expected.norm())
            assert float((moved - update).norm()) > 0.05 * float(update.norm())  # it is not plain Muon


def test_levelling_survives_matrices_without_gradient():
    """At the first step the matrices behind zero-initialised outputs have gradients of zero."""
    p = torch.nn.Parameter(torch.randn(8, 8))
    muon = BatchedMuon([p], neuron_decay=0.95, lr=0.02, weight_decay=0.0)
    before = p.detach().clone()
    p.grad = torch.zeros_like(p)
    muon.step()
    assert torch.equal(p.detach(), before)
    p.grad = torch.randn_like(p)
    muon.step()
    assert p.isfinite().all() and not torch.equal(p.detach(), before)


def run(steps: int, net: Denoiser, optimizers: Optimizers, start: int = 0) -> None:
    for step in range(start, start + steps):
        torch.manual_seed(step)
        net(torch.randint(0, 12, (2, 8))).square().mean().backward()
        optimizers.schedule(step / 10)
        optimizers.step()


def test_state_round_trip_is_bit_equal():
    config = dataclasses.replace(TrainConfig(), warmdown=0.5, neuron_decay=0.95)
    nets = []
    for split in (False, True):
        torch.manual_seed(0)
        net = Denoiser(MODEL)
        optimizers = Optimizers(net, config)
        run(5, net, optimizers)
        if split:
            tensors = {k: v.clone() for k, v in optimizers.state_tensors().items()}
            assert all(isinstance(v, torch.Tensor) for v in tensors.values())
            optimizers = Optimizers(net, config)
            optimizers.load_state_tensors(tensors)
        run(5, net, optimizers, 5)
        nets.append(net)
    for a, b in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        assert torch.equal(a, b)


def test_state_of_another_model_is_refused():
    optimizers = Optimizers(Denoiser(MODEL), TrainConfig())
    with pytest.raises(KeyError):
        optimizers.load_state_tensors({"nothing.weight/momentum_buffer": torch.zeros(2, 2)})


@pytest.mark.parametrize("shape", [(3, 24, 24), (2, 24, 32), (2, 24, 96), (1, 1, 7)])
@pytest.mark.parametrize("steps", [1, 5])
def test_newton_schulz_on_the_smaller_side(shape, steps):
    """As the iteration in float64; singular values fall over four decades."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = x * torch.logspace(0, -4, shape[2], dtype=torch.float64)
    a, b, c = coefficients = (3.4445, -4.775, 2.0315)
    want = x / x.norm(dim=(1, 2), keepdim=True)
    for _ in range(steps):
        gram = want @ want.mT
        want = a * want + (b * gram + c * gram @ gram) @ want
    found = _newton_schulz_of_gram(x.float(), coefficients, steps, 1e-7).double()
    assert float((found - want).norm() / want.norm()) < 1e-3
