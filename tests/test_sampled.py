"""The sampled softmax beside its formula, its mean over all draws, and in a run."""

from __future__ import annotations

import dataclasses
import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from corpus import metrics, prepared_words, small_config, write_shard

from mezzotint.config import ModelConfig, TrainConfig
from mezzotint.data import loader
from mezzotint.data.dataset import Dataset, TokenStream
from mezzotint.network.model import Denoiser
from mezzotint.training.run import train
from mezzotint.training.sampled import Entries, draw_entries, entry_chances, sampled_nll
from mezzotint.training.step import Trainer

QUICK = TrainConfig(steps=12, batch=4, compile=False, dtype="float32", log_every=0.0, checkpoint_minutes=60)
SAMPLED = dataclasses.replace(QUICK, sampled_share=0.5, sampled_entries=64, causal_share=0.5)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return prepared_words(tmp_path_factory.mktemp("sampled"))


@pytest.fixture(scope="module")
def model(data) -> ModelConfig:
    return small_config(data)


def entries_of(ids: list[int], weights: list[float], vocab_size: int) -> Entries:
    place = torch.tensor([ids.index(i) if i in ids else -1 for i in range(vocab_size)])
    return Entries(torch.tensor(ids), place, torch.tensor(weights).log())


def plainly(rows, table, targets, entries: Entries, cap: float) -> torch.Tensor:
    """The same, a row and an entry at a time."""
    nll = []
    for row, target in zip(rows, targets.tolist(), strict=True):
        logit = [cap * torch.tanh(row @ entry / cap) for entry in table]
        others = [
            weight + logit[i]
            for i, weight in zip(entries.ids.tolist(), entries.log_weight.double(), strict=True)
            if i != target
        ]
        nll.append(torch.stack([*others, logit[target]]).logsumexp(0) - logit[target])
    return torch.stack(nll)


@pytest.mark.parametrize("cap", [0.5, 30.0, 500.0])
@pytest.mark.parametrize("compiled", [False, True])
def test_as_written_plainly(cap, compiled):
    """Loss and gradients, of targets among the entries and of others."""
    generator = torch.Generator().manual_seed(0)
    rows, table = torch.randn(9, 12, generator=generator) * 2, torch.randn(11, 12, generator=generator)
    targets, g = torch.tensor([0, 7, 3, 10, 5, 5, 1, 2, 9]), torch.rand(9, generator=generator)
    entries = entries_of([7, 0, 3, 10, 4], [1.0, 1.0, 3.0, 3.0, 3.0], 11)
    ours = torch.compile(sampled_nll, backend="eager", dynamic=True) if compiled else sampled_nll
    x, t = rows.clone().requires_grad_(), table.clone().requires_grad_()
    nll = ours(x, t, targets, entries, cap)
    exact, plain = rows.double().requires_grad_(), table.double().requires_grad_()
    want = plainly(exact, plain, targets, entries, cap)
    assert nll.dtype == torch.float32
    found = [nll, *torch.autograd.grad((nll * g).sum(), (x, t))]
    for one, other in zip(found, [want, *torch.autograd.grad((want * g).sum(), (exact, plain))], strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-4 * float(other.detach().abs().max()))


@pytest.mark.parametrize("target", [0, 4])
def test_the_mean_over_all_draws_is_the_sum_over_the_vocabulary(target):
    """1 / p, which is the sum over exp(logit), for a target that is always among the entries and for one that is drawn."""
    generator = torch.Generator().manual_seed(1)
    row, table = torch.randn(1, 8, generator=generator), torch.randn(6, 8, generator=generator)
    found = [
        sampled_nll(row, table, torch.tensor([target]), entries_of([0, 1, *drawn], [1.0, 1.0, 2.0, 2.0], 6), 30.0)
        for drawn in itertools.combinations([2, 3, 4, 5], 2)
    ]
    logits = 30 * torch.tanh(table @ row[0] / 30)
    exact = float(torch.nn.functional.cross_entropy(logits[None], torch.tensor([target])))
    assert float(torch.cat(found).double().exp().mean()) == pytest.approx(math.exp(exact), rel=1e-5)
    assert len({round(float(nll), 4) for nll in found}) > 1


def test_entries_are_drawn_by_their_chances_as_many_each_step():
    counts = np.array([0, 900, 3, 40, 900, 7, 0, 12, 400, 1] * 5)
    chances = entry_chances(counts, 20)
    assert float(chances.sum()) == pytest.approx(20) and float(chances.max()) == 1
    certain = chances == 1
    assert certain.tolist() == [count >= 400 for count in counts]
    roots = torch.from_numpy(np.sqrt(counts + 1.0))
    assert (chances / roots)[~certain].std() < 1e-12
    one, again, other = (draw_entries(chances, 7, step) for step in (4, 4, 5))
    assert torch.equal(one.ids, again.ids) and not torch.equal(one.ids, other.ids)
    assert len(set(one.ids.tolist())) == len(one.ids) == 20 and set(certain.nonzero()[:, 0].tolist()) <= set(
        one.ids.tolist()
    )
    torch.testing.assert_close(one.log_weight.double().exp(), 1 / chances[one.ids], rtol=1e-6, atol=0)
    assert torch.equal(one.place[one.ids], torch.arange(20)) and int((one.place < 0).sum()) == 30
    drawn = torch.stack([draw_entries(chances, 0, step).place >= 0 for step in range(1000)]).double().mean(0)
    assert ((drawn - chances).abs() <= 5 * (chances * (1 - chances) / 1000).sqrt()).all()


@pytest.mark.parametrize("entries", [1, 2, 7])
def test_chances_of_few_entries(entries):
    """As many as asked for, of a vocabulary with one more than these and of equal counts."""
    for counts in (np.zeros(8, dtype=np.int64), np.array([10**9, 1, 1, 1, 1, 1, 1, 0])):
        chances = entry_chances(counts, entries)
        assert float(chances.sum()) == pytest.approx(entries) and chances.max() <= 1 and chances.min() > 0
        assert {len(draw_entries(chances, 0, step).ids) for step in range(50)} == {entries}


def test_tokens_are_counted_all_over_the_text(data, tmp_path):
    """All of a short text; of a long one so many, from its beginning to its end."""
    dataset = Dataset.open(data)
    stream, vocab_size = dataset.split("train"), dataset.tokenizer.vocab_size
    assert loader.COUNTED // loader.STRETCHES < len(stream) < loader.COUNTED
    found = loader.Loader(stream, 16, 4, seed=0).token_counts(vocab_size)
    assert np.array_equal(found, np.bincount(stream[:], minlength=vocab_size))
    long = np.repeat(np.arange(1, 51), 40_000)
    spread = TokenStream([write_shard(tmp_path / "train_000000.bin", long)], dataset.tokenizer)
    counts = loader.Loader(spread, 16, 4, seed=0).token_counts(vocab_size)
    assert counts.sum() == loader.COUNTED and counts[1:51].min() > 0 and counts[51:].sum() == 0


def test_a_run_may_start_with_a_sampled_softmax_and_says_so(data, model, tmp_path):
    train(data, tmp_path / "run", model=model, config=SAMPLED)
    rows = metrics(tmp_path / "run")
    assert [row["train_sampled_bpb"] is None for row in rows] == [False] * 6 + [True] * 6
    assert [row["train_nelbo_bpb"] is None for row in rows] == [True] * 6 + [False] * 6


def test_a_vocabulary_no_larger_is_not_sampled(data, model, tmp_path):
    """The run is the one without the setting."""
    found = []
    for name, settings in (("with", {"sampled_share": 0.5, "sampled_entries": model.vocab_size}), ("without", {})):
        config = dataclasses.replace(QUICK, causal_share=0.5, **settings)
        train(data, tmp_path / name, model=model, config=config)
        found.append([(row["train_nelbo_bpb"], row["loss"]) for row in metrics(tmp_path / name)])
    assert found[0] == found[1]


def test_all_passes_of_a_step_have_the_same_entries(data, model):
    """A step in micro-batches has the loss and the gradients of one in a single pass."""
    losses, gradients = [], []
    for micro in (0, 1):
        torch.manual_seed(0)
        network = Denoiser(model)
        for p in network.parameters():
            torch.nn.init.normal_(p, std=0.2)
        config = dataclasses.replace(SAMPLED, micro_batch=micro)
        order = loader.Loader(Dataset.open(data).split("train"), 16, 4, seed=0)
        trainer = Trainer(network, config, order, torch.device("cpu"))
        losses.append(trainer.gradients(order.batch(0), 0, progress=0.0)[0])
        gradients.append(torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None]))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-5)


def test_a_trainer_that_learns_by_it_scores_better_by_the_whole_softmax(data, model, tmp_path):
    """A whole run with it: validation, which is over the whole vocabulary, falls while it lasts."""
    config = dataclasses.replace(SAMPLED, steps=60, sampled_share=1.0, val_every=10)
    train(data, tmp_path / "run", model=model, config=config)
    seen = [row["val_nelbo_bpb"] for row in metrics(tmp_path / "run") if row.get("val_nelbo_bpb") is not None]
    assert len(seen) >= 3 and seen[-1] < 0.9 * seen[0]
