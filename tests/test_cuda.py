"""What runs on a GPU gives what the CPU gives: a step, a run, scores and samples. Skipped where there is none.

Needs nothing but PyTorch, sentencepiece and safetensors besides the package, so that a bare machine with a GPU will do.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
import toy
from corpus import metrics, prepared_words, small_config, small_tokenizer, stop_at

from mezzotint.config import ModelConfig, TrainConfig, preset
from mezzotint.errors import Interrupted, MezzotintError
from mezzotint.network.model import Denoiser, Model
from mezzotint.sampling.denoise import denoise
from mezzotint.sampling.generate import sample
from mezzotint.scoring.likelihood import causal, nelbo
from mezzotint.training.checkpoint import load_run
from mezzotint.training.run import train
from mezzotint.training.step import Trainer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
GPU = torch.device("cuda")
CPU = torch.device("cpu")
QUICK = TrainConfig(
    steps=20, batch=4, compile=False, dtype="float32", log_every=0.0, checkpoint_minutes=60, device="cuda"
)


class Windows:
    """A loader of random ids."""

    def __init__(self, model: ModelConfig, batch: int) -> None:
        self.ids = np.random.default_rng(0).integers(0, model.vocab_size, (batch, model.sequence_length))

    def batch(self, step: int) -> np.ndarray:
        return self.ids

    def starts(self, step: int) -> np.ndarray:
        return np.zeros(len(self.ids), dtype=np.int64)

    def token_counts(self, vocab_size: int) -> np.ndarray:
        return np.bincount(self.ids.ravel(), minlength=vocab_size)


def trainer_on(device: torch.device, model: ModelConfig, config: TrainConfig) -> Trainer:
    """The same weights on any device, none of them zero."""
    torch.manual_seed(0)
    network = Denoiser(model)
    with torch.no_grad():
        for p in network.parameters():
            if p.dim() > 1:
                p.normal_(0, 0.1)
    return Trainer(network.to(device), config, Windows(model, config.batch), device)  # type: ignore[arg-type]


def weights_of(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: p.detach().double().cpu() for name, p in trainer.network.named_parameters()}


SHAPES = {"whole": {}, "blocks": {"block_size": 16}, "shifted": {"block_size": 16}}


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_step_is_the_cpus(shape, compiled):
    """Gradients and weights after a step of `tiny`.

    float32 rounds to 6e-8. The longest sums are over the 2,048 tokens of a batch, whose rounding grows as its root, 45
    times that; some ten sums follow one another, forward and backward: 3e-5, of which 2e-4 leaves room. Muon iterates in
    bfloat16, which rounds to 4e-3, so that an update is known to some per cent of itself.
    """
    chosen = preset("tiny")
    model = dataclasses.replace(chosen.model, vocab_size=300, shifted_output=shape == "shifted")
    config = dataclasses.replace(chosen.train, steps=100, dtype="float32", compile=False, **SHAPES[shape])
    one = trainer_on(CPU, model, config)
    other = trainer_on(GPU, model, dataclasses.replace(config, compile=compiled))
    before = weights_of(one)
    windows = Windows(model, config.batch).batch(0)
    figures = [trainer.gradients(windows, 0, 0.5) for trainer in (one, other)]
    assert [float(x) for x in figures[1]] == pytest.approx([float(x) for x in figures[0]], rel=1e-5)
    for (name, p), q in zip(one.network.named_parameters(), other.network.parameters(), strict=True):
        assert p.grad is not None and q.grad is not None, name
        error = (q.grad.cpu() - p.grad).norm() / p.grad.norm().clamp(min=1e-6)
        assert float(error) < 2e-4, name
    for trainer in (one, other):
        trainer.network.zero_grad(set_to_none=True)
        trainer.run_step(0.5)
    after, there = weights_of(one), weights_of(other)
    for name, value in after.items():
        moved = (value - before[name]).norm()
        assert float((there[name] - value).norm() / moved.clamp(min=1e-9)) < 0.1, name


def test_a_compiled_bfloat16_step_is_near_the_float32_one():
    """bfloat16 rounds activations to 4e-3, at random: far less on a mean over a thousand tokens."""
    chosen = preset("tiny")
    model = dataclasses.replace(chosen.model, vocab_size=300)
    config = dataclasses.replace(chosen.train, steps=100, dtype="bfloat16")
    windows = Windows(model, config.batch).batch(0)
    rough = trainer_on(GPU, model, config).gradients(windows, 0, 0.5)
    fine = trainer_on(CPU, model, dataclasses.replace(config, dtype="float32", compile=False))
    assert [float(x) for x in rough] == pytest.approx([float(x) for x in fine.gradients(windows, 0, 0.5)], rel=1e-2)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return prepared_words(tmp_path_factory.mktemp("cuda"))


def test_a_run_goes_on_from_its_checkpoint(data, tmp_path):
    """Sums at an index come in any order on a GPU, so a resumed run is the same up to rounding."""
    model = small_config(data, sequence_length=32, width=32)
    config = dataclasses.replace(QUICK, causal_share=0.5, matrix_lr=0.01, embedding_lr=0.003, scalar_lr=0.003)
    train(data, tmp_path / "whole", model=model, config=config)
    with pytest.raises(Interrupted, match="--resume"):
        train(data, tmp_path / "parts", model=model, config=config, progress=stop_at(9))
    result = train(data, tmp_path / "parts", model=model, config=config, resume=True)
    assert result["steps"] == 20
    runs = []
    for name in ("whole", "parts"):
        rows = metrics(tmp_path / name)
        assert [row["step"] for row in rows] == list(range(1, 21))
        runs.append([row["loss"] for row in rows])
    np.testing.assert_allclose(runs[1], runs[0], rtol=2e-3)
    assert runs[0][-1] < runs[0][0]
    assert load_run(tmp_path / "parts").info["steps"] == 20


@pytest.fixture(scope="module")
def pair() -> tuple[Model, Model]:
    """One float64 model on the CPU and on the GPU: rounding cannot change which token is drawn."""
    tokenizer = small_tokenizer()
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size, sequence_length=32, layers=2, width=32, heads=2, kv_heads=1, neighbour_reach=1
    )
    info = {"train": {"causal_share": 0.5}}
    return tuple(  # type: ignore[return-value]
        Model(config, tokenizer, toy.eighths(Denoiser(config), most=1).to(device), dict(info)) for device in (CPU, GPU)
    )


def test_scores_are_the_cpus(pair, data):
    ids = np.random.default_rng(1).integers(0, pair[0].config.vocab_size, 200)
    windows = toy.ToyWindows(ids, 32, pair[0].tokenizer)
    for score in (nelbo, causal):
        here, there = (score(model, windows) for model in pair)  # type: ignore[arg-type]
        assert there.bpb == pytest.approx(here.bpb, rel=1e-6)


@pytest.mark.parametrize("settings", [{}, {"sampler": "ancestral"}, {"sampler": "confidence", "steps": 4}])
def test_samples_are_the_cpus(pair, settings):
    texts = [sample(model, 3, 12, prompt="The plate", seed=4, **settings).texts for model in pair]
    assert texts[0] == texts[1]


def test_a_canvas_is_filled_as_on_the_cpu(pair):
    canvas = torch.randint(0, pair[0].config.vocab_size, (3, 32), generator=torch.Generator().manual_seed(2))
    canvas[:, 8:20] = pair[0].config.mask_id
    here, there = (denoise(model, canvas, seed=1) for model in pair)
    assert torch.equal(here.ids, there.ids)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_step_waits_for_nothing(compiled):
    """With the figures on their way and masks made ahead, the host runs on: CUDA itself refuses any wait."""
    model = dataclasses.replace(preset("tiny").model, vocab_size=300)
    for size, sampled in ((0, 0.0), (16, 0.0), (0, 1.0)):
        config = dataclasses.replace(QUICK, steps=100, batch=8, causal_share=0.5, block_size=size, dtype="bfloat16")
        config = dataclasses.replace(config, compile=compiled, sampled_share=sampled, sampled_entries=64)
        trainer = trainer_on(GPU, model, config)
        for _ in range(3):
            trainer.run_step(0.5)
        torch.cuda.set_sync_debug_mode("error")
        try:
            figures = [trainer.run_step(0.5) for _ in range(3)]
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert all(np.isfinite(seen["loss"]) and np.isfinite(seen["grad_norm"]) for seen in figures)
        trainer.settle()


def test_a_step_that_is_not_finite_is_named_before_anything_is_saved():
    model = dataclasses.replace(preset("tiny").model, vocab_size=300)
    trainer = trainer_on(GPU, model, dataclasses.replace(QUICK, steps=100))
    trainer.run_step(0.5)
    with torch.no_grad():
        next(trainer.network.parameters()).fill_(torch.nan)
    with pytest.raises(MezzotintError, match=r"step 1: loss nan .* not finite, on the windows"):
        for _ in range(3):
            trainer.run_step(0.5)
        trainer.settle()
