"""Masks keyed by seed, step and row: the same for any number of processes, uniform, and without a device's figures."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mezzotint import seeding
from mezzotint.config import ModelConfig, TrainConfig
from mezzotint.data.loader import Prefetch
from mezzotint.network.model import Denoiser
from mezzotint.objective import mask_by_noise
from mezzotint.training.corrupt import Stage, corrupt_batch, prepare_step, stage_at
from mezzotint.training.step import Trainer

MODEL = ModelConfig(vocab_size=50, sequence_length=32, layers=2, width=16, heads=2, kv_heads=1, shifted_output=True)
QUICK = TrainConfig(steps=10, batch=12, compile=False, dtype="float32", causal_share=0.5)
WHOLE = Stage(False, (0.0, 1.0), 0.5)


class Windows:
    """A loader of random ids, which differ from step to step."""

    def __init__(self, rows: int = 12) -> None:
        self.rows = rows

    def batch(self, step: int) -> np.ndarray:
        return np.random.default_rng(step).integers(0, MODEL.vocab_size, (self.rows, MODEL.sequence_length))

    def starts(self, step: int) -> np.ndarray:
        return np.zeros(self.rows, dtype=np.int64)

    def token_counts(self, vocab_size: int) -> np.ndarray:
        return np.arange(vocab_size)


def test_noise_depends_on_seed_step_and_row_alone():
    some = seeding.row_noise(3, 5, [7, 2, 9], 40)
    assert np.array_equal(some[1], seeding.row_noise(3, 5, [2], 40)[0])
    assert np.array_equal(some[0, :10], seeding.row_noise(3, 5, [7], 10)[0])
    every = [seeding.row_noise(s, t, [r], 40)[0] for s, t, r in itertools.product((-1, 0, 1), (0, 1), (0, 1))]
    assert len({row.tobytes() for row in every}) == len(every)
    many = seeding.row_noise(0, 0, range(500), 200)
    # The mean of 100,000 uniform numbers is 0.5 within 0.0009 (one standard error).
    assert abs(many.mean() - 0.5) < 0.005 and abs((many < 0.1).mean() - 0.1) < 0.005 and many.max() < 1


def test_all_sets_of_two_in_five_are_as_likely():
    noise = torch.from_numpy(seeding.row_noise(1, 4, range(6000), 5))
    _, masked = mask_by_noise(torch.zeros(6000, 5, dtype=torch.int64), noise, torch.full((6000,), 2), 9)
    found = (masked.long() * torch.tensor([1, 2, 4, 8, 16])).sum(1).bincount(minlength=32)
    pairs = [int(found[sum(1 << i for i in pair)]) for pair in itertools.combinations(range(5), 2)]
    assert sum(pairs) == 6000 and max(abs(n - 600) for n in pairs) < 5 * 24


@pytest.mark.parametrize("size", [0, 5])
def test_any_number_of_processes_draws_the_same(size):
    config = dataclasses.replace(QUICK, block_size=size)
    ids = torch.from_numpy(Windows().batch(3))
    whole = corrupt_batch(config, 3, ids, MODEL.mask_id)
    for world in (2, 3, 4):
        rows = 12 // world
        for rank in range(world):
            own = slice(rank * rows, (rank + 1) * rows)
            part = corrupt_batch(config, 3, ids[own], MODEL.mask_id, first_row=rank * rows, num_windows=12)
            assert torch.equal(part.corrupted, whole.corrupted[own]) and torch.equal(part.masked, whole.masked[own])
            assert torch.equal(part.counts, whole.counts) and torch.equal(part.causal, whole.causal)


def test_counts_stay_strata_of_the_whole_batch():
    """One count in each n-th of 1..T, whatever the process: 12 windows of 120 tokens, ten counts apart."""
    ids = torch.zeros(12, 120, dtype=torch.int64)
    for step in range(20):
        counts = corrupt_batch(dataclasses.replace(QUICK, causal_share=0.0), step, ids, 9).counts.sort().values
        assert ((counts - 1) // 10).tolist() == list(range(12))


def test_the_next_step_is_made_ahead_and_made_again_where_the_stage_changed():
    made = []

    def prepare(windows, step, stage):
        made.append((step, stage))
        return prepare_step(QUICK, windows, step, stage, MODEL.mask_id)

    ahead = Prefetch(Windows(), prepare)  # type: ignore[arg-type]
    halves = Stage(True, (0.1, 0.6), 0.5)
    for step, stage in enumerate((halves, halves, WHOLE, WHOLE)):
        work = ahead.batch(step, stage)
        assert work.stage == stage and work.step == step and work.length == (16 if stage.halved else 32)
    ahead.close()
    assert made[:2] == [(0, halves), (1, halves)] and (2, WHOLE) in made[2:]


def test_stages_of_a_run():
    config = dataclasses.replace(QUICK, short_share=0.2, narrow_share=0.4, causal_start=0.1, sampled_share=0.3)
    assert stage_at(config, 0.05) == Stage(True, (0.1, 0.6), 1.0, sampled=True)
    assert stage_at(config, 0.3) == Stage(False, (0.1, 0.6), 0.5)
    assert stage_at(config, 0.4) == WHOLE


@pytest.mark.parametrize("size", [0, 8])
def test_filling_up_changes_nothing(size):
    """Shapes of a few sizes for the sake of a GPU, the same loss and gradients."""
    config = dataclasses.replace(QUICK, block_size=size, micro_batch=2)
    found = []
    for rounded in (False, True):
        torch.manual_seed(0)
        network = Denoiser(MODEL)
        for p in network.parameters():
            torch.nn.init.normal_(p, std=0.2)
        trainer = Trainer(network, config, Windows(), torch.device("cpu"))  # type: ignore[arg-type]
        work = prepare_step(
            config, Windows().batch(0), 0, WHOLE, MODEL.mask_id, shifted_output=True, rounded=rounded
        )  # fmt: skip
        sizes = {len(p.predicted) for p in work.passes if p.predicted is not None}
        assert not rounded or all(n % 4 == 0 for n in sizes)
        figures = trainer._gradients(work)
        found.append((figures, [p.grad for p in network.parameters() if p.grad is not None]))
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-7)


class Waits(TorchDispatchMode):
    """Notes what would wait for a device: shapes that depend on contents, and figures that go to the host."""

    def __init__(self) -> None:
        super().__init__()
        self.operations, self.waits = 0, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.operations += 1
        name, on_device = str(function), any(isinstance(a, torch.Tensor) and a.device.type != "cpu" for a in args)
        if on_device and any(word in name for word in ("_local_scalar_dense", "nonzero", "masked_select", "unique")):
            self.waits.append(name)
        result = function(*args, **(kwargs or {}))
        if on_device and "copy" in name and isinstance(result, torch.Tensor) and result.device.type == "cpu":
            self.waits.append(name)
        return result


@pytest.mark.parametrize(("size", "sampled"), [(0, False), (8, False), (0, True)])
def test_a_step_waits_for_no_device(size, sampled, monkeypatch):
    """A whole step on the meta device, whose tensors hold nothing: what needs a figure on the host fails, or is counted."""
    monkeypatch.setattr(torch, "autocast", lambda *a, **k: contextlib.nullcontext())  # which knows no meta device
    device = torch.device("meta")
    with device:
        network = Denoiser(dataclasses.replace(MODEL, neighbour_reach=1, value_embedding_width=8))
    config = dataclasses.replace(
        QUICK, block_size=size, micro_batch=3, neuron_decay=0.9, sampled_share=0.5, sampled_entries=20
    )
    trainer = Trainer(network, config, Windows(), device)  # type: ignore[arg-type]
    work = trainer._prepare(Windows().batch(0), 0, dataclasses.replace(WHOLE, sampled=sampled))
    assert (work.entries is not None) == sampled
    with Waits() as seen:
        figures = trainer._gradients(work)
        norm = torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        trainer.optimizers.schedule(0.5)
        trainer.optimizers.step()
        trainer.average.update(1)
    assert seen.operations > 500 and not seen.waits
    assert figures.device == norm.device == device
    with Waits() as seen, contextlib.suppress(RuntimeError):
        float(norm)
    assert seen.waits, "the count would not have noticed"
