"""GPTQ against a naive re-solve per column, and what Hessians are made of."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mezzotint.packing import quantize
from mezzotint.packing.grid import Grid, round_to_grid, round_to_octave_grid, row_scales


def problem(rows: int = 12, columns: int = 20, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight matrix and a Hessian with correlated inputs of very different strength."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    mix = torch.randn(columns, columns, generator=generator) * torch.logspace(-1, 0.5, columns)
    inputs = torch.randn(400, columns, generator=generator) @ mix
    return weight, (inputs.T @ inputs / 400).double()


def output_error(weight: torch.Tensor, grid: Grid, hessian: torch.Tensor) -> float:
    delta = weight.double() - torch.from_numpy(grid.values()).double()
    return float(torch.trace(delta @ hessian @ delta.T))


def naive_gptq(
    weight: torch.Tensor, hessian: torch.Tensor, rows: np.ndarray, limit: int, descending: bool = True
) -> np.ndarray:
    """Round one column at a time; after each, re-solve the least-squares problem over all columns still free.

    With F the free columns and the error e on the column just fixed, minimising the quadratic form over the free
    weights gives w_F -= e * H_FF^-1 H_Fj. No Cholesky factor, no inverse of the whole, no lazy updates.
    """
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=torch.float64)
    order = torch.argsort(hessian.diagonal(), descending=descending).tolist()
    target, codes = weight.double().clone(), np.zeros(weight.shape, dtype=np.int16)
    scale = torch.from_numpy(rows.astype(np.float64))
    work = target.clone()
    for position, j in enumerate(order):
        codes[:, j] = torch.clamp(torch.round(work[:, j] / scale), -limit, limit).numpy().astype(np.int16)
        error = work[:, j] - torch.from_numpy(codes[:, j].astype(np.float64)) * scale
        free = order[position + 1 :]
        if free:
            shift = torch.linalg.solve(damped[free][:, free], damped[free, j])
            work[:, free] += error[:, None] * shift[None, :]
    return codes


@pytest.mark.parametrize("ascending", [False, True])
@pytest.mark.parametrize("block", [4, 7, 128])
def test_gptq_equals_naive_re_solve(block: int, ascending: bool) -> None:
    weight, hessian = problem()
    rows = row_scales(weight.numpy(), hessian.diagonal().numpy(), 7)
    grid = quantize.gptq(weight, hessian, rows, limit=7, block=block, ascending=ascending)
    np.testing.assert_array_equal(grid.codes, naive_gptq(weight, hessian, rows, 7, descending=not ascending))


def test_curved_scales_cost_as_said_in_either_order() -> None:
    """Rounding on them costs about step^2 / 24 per weight; where codes grow near the limit the order changes."""
    weight, hessian = problem(rows=60, columns=40)
    rows = np.linspace(0.5, 1.5, 60)
    step = 0.02
    for limit, expected in ((20_000, True), (200, False)):
        *scales, ascending = quantize.curved_scales(weight.numpy(), quantize.Curvature(hessian, rows), step, limit)
        assert ascending is expected
        if not expected:
            continue
        grid = quantize.gptq(weight, hessian, *scales, limit=limit, ascending=ascending)
        delta = weight.double() - torch.from_numpy(grid.values()).double()
        cost = 0.5 * float((torch.from_numpy(rows) * ((delta @ quantize.damped(hessian, 0.01)) * delta).sum(1)).sum())
        assert cost == pytest.approx(weight.numel() * step**2 / 24, rel=0.1)


def test_gptq_beats_plain_rounding_in_output_error() -> None:
    for seed in range(5):
        weight, hessian = problem(seed=seed)
        rows = row_scales(weight.numpy(), hessian.diagonal().numpy(), 31)
        plain = round_to_grid(weight.numpy(), rows, 31)
        assert output_error(weight, quantize.gptq(weight, hessian, rows), hessian) < 0.8 * output_error(
            weight, plain, hessian
        )


def test_codes_stay_within_the_limit_and_zero_rows_stay_zero() -> None:
    weight, hessian = problem()
    weight[3] = 0
    weight[5] *= 1e4
    rows = row_scales(weight.numpy(), hessian.diagonal().numpy(), 31)
    grid = quantize.gptq(weight, hessian, rows)
    assert np.abs(grid.codes).max() <= 31
    assert not grid.values()[3].any()
    assert np.isfinite(grid.values()).all()


def test_gptq_survives_dead_and_missing_inputs() -> None:
    weight, hessian = problem()
    hessian[4], hessian[:, 4] = 0, 0
    rows = row_scales(weight.numpy(), hessian.diagonal().numpy(), 31)
    assert np.isfinite(quantize.gptq(weight, hessian, rows).values()).all()
    assert np.isfinite(quantize.gptq(weight, torch.zeros_like(hessian), rows).values()).all()


def test_row_scales_beat_the_largest_magnitude() -> None:
    """With few codes, clipping a heavy tail is worth it; the search must find at least as good a scale."""
    rng = np.random.default_rng(0)
    weight = rng.standard_t(3, (30, 200)).astype(np.float32)
    ones = np.ones(200)
    largest = (np.abs(weight).max(axis=1) / 7).astype(np.float16)

    def error(rows: np.ndarray) -> float:
        return float(np.square(round_to_grid(weight, rows, 7).values() - weight).sum())

    assert error(row_scales(weight, ones, 7)) < 0.8 * error(largest)


def test_snapped_scales_are_close_and_few() -> None:
    scales = np.exp(np.random.default_rng(0).uniform(-4, 1, 2_000))
    snapped = round_to_octave_grid(scales)
    assert np.abs(snapped.astype(np.float64) / scales - 1).max() < 0.025
    assert len(np.unique(snapped)) < 130
    assert round_to_octave_grid(np.zeros(3)).tolist() == [0, 0, 0]
