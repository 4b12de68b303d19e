"""The output layer by stretches of rows, beside the two lines that say what it computes."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from mezzotint.training import output
from mezzotint.training.output import capped_nll


@pytest.mark.parametrize("n", [1, 40, 100])
@pytest.mark.parametrize("cap", [0.5, 30.0, 500.0])
def test_as_written_plainly(n, cap, monkeypatch):
    """Loss and gradients, over one stretch, whole stretches and a shorter last one."""
    monkeypatch.setattr(output, "LOGITS_TOGETHER", 20 * 57)
    generator = torch.Generator().manual_seed(n)
    rows = torch.randn(n, 24, generator=generator) * 3
    table = torch.randn(57, 24, generator=generator)
    targets, g = torch.randint(0, 57, (n,), generator=generator), torch.rand(n, generator=generator)
    found, want = [], []
    for results, dtype in ((found, torch.float32), (want, torch.float64)):
        x, t = rows.to(dtype).requires_grad_(), table.to(dtype).requires_grad_()
        if dtype == torch.float32:
            nll = capped_nll(x, t, targets, cap)
        else:
            nll = functional.cross_entropy(cap * torch.tanh(x @ t.T / cap), targets, reduction="none")
        results += [nll, *torch.autograd.grad((nll * g).sum(), (x, t))]
    for ours, plain in zip(found, want, strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours.double(), plain, rtol=1e-4, atol=1e-4 * float(plain.detach().abs().max()))


def test_autocast_decides_on_the_products():
    generator = torch.Generator().manual_seed(0)
    rows, table = torch.randn(30, 16, generator=generator), torch.randn(40, 16, generator=generator)
    targets = torch.randint(0, 40, (30,), generator=generator)
    exact = capped_nll(rows, table, targets, 30.0)
    with torch.autocast("cpu", torch.bfloat16):
        rough = capped_nll(rows, table, targets, 30.0)
    assert not torch.equal(rough, exact)
    torch.testing.assert_close(rough, exact, rtol=0.05, atol=0.1)


@pytest.mark.parametrize("cap", [0.5, 30.0, 60.0])
def test_compiled_code_has_the_same_loss(cap, monkeypatch):
    """By its own function, of products far beyond the cap too, with gradients, against float64."""
    stretches = []
    monkeypatch.setattr(output.CappedCrossEntropy, "apply", lambda *inputs: stretches.append(inputs))
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(7, 24, generator=generator) * 3
    rows[0], rows[1] = rows[0] * 1e4, 0.0
    table = torch.randn(11, 24, generator=generator)
    targets, g = torch.randint(0, 11, (7,), generator=generator), torch.rand(7, generator=generator)
    x, t = rows.clone().requires_grad_(), table.clone().requires_grad_()
    nll = torch.compile(capped_nll, backend="eager", dynamic=True)(x, t, targets, cap)
    exact, entries = rows.double().requires_grad_(), table.double().requires_grad_()
    want = functional.cross_entropy(cap * torch.tanh(exact @ entries.T / cap), targets, reduction="none")
    assert not stretches and nll.dtype == torch.float32
    torch.testing.assert_close(nll.double(), want, rtol=1e-4, atol=1e-4)
    for ours, plain in zip(
        torch.autograd.grad((nll * g).sum(), (x, t)),
        torch.autograd.grad((want * g).sum(), (exact, entries)),
        strict=True,
    ):
        torch.testing.assert_close(ours.double(), plain, rtol=1e-4, atol=1e-4 * float(plain.abs().max()))
