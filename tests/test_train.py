"""The loop, run folders and checkpoints: resume, damage, signals, micro-batches, and what a run reports."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from corpus import metrics, prepared_words, small_config, stop_at
from safetensors.torch import load_file
from torch._inductor.exc import InvalidCxxCompiler
from torch._subclasses.fake_tensor import FakeTensorMode

from mezzotint.cli.main import main
from mezzotint.config import ModelConfig, TrainConfig, preset
from mezzotint.data.dataset import Dataset
from mezzotint.data.loader import Loader
from mezzotint.errors import CheckpointError, ConfigError, Interrupted, MezzotintError
from mezzotint.network.attention import attend
from mezzotint.network.layers import Block
from mezzotint.network.model import Denoiser
from mezzotint.training import run as run_module
from mezzotint.training.checkpoint import check_checkpoint, load_run, newest_checkpoint, read_run, run_lock, stable_step
from mezzotint.training.corrupt import corrupt_batch
from mezzotint.training.optim import MovingAverage, Optimizers
from mezzotint.training.run import train
from mezzotint.training.step import Trainer
from mezzotint.training.system import try_lock

QUICK = TrainConfig(steps=12, batch=4, compile=False, dtype="float32", log_every=0.0, checkpoint_minutes=60)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return prepared_words(tmp_path_factory.mktemp("train"))


@pytest.fixture(scope="module")
def model(data) -> ModelConfig:
    return small_config(data)


def weights(run: Path) -> dict[str, torch.Tensor]:
    folder, _ = newest_checkpoint(run)
    return {
        **load_file(folder / "weights.safetensors"),
        **{f"a.{k}": v for k, v in load_file(folder / "average.safetensors").items()},
    }


def gradients_of(net: torch.nn.Module) -> torch.Tensor:
    """The gradients of all parameters in one row; every one must have one."""
    found = [p.grad for p in net.parameters()]
    assert all(g is not None for g in found)
    return torch.cat([g.flatten() for g in found if g is not None])


def test_learns_and_reports(data, model, tmp_path):
    config = dataclasses.replace(QUICK, steps=60)
    result = train(data, tmp_path / "run", model=model, config=config)
    rows = metrics(tmp_path / "run")
    assert [row["step"] for row in rows] == list(range(1, 61))
    assert np.mean([r["train_nelbo_bpb"] for r in rows[-10:]]) < 0.8 * np.mean([r["train_nelbo_bpb"] for r in rows[:5]])
    assert result["steps"] == 60 and result["tokens"] == 60 * 4 * 16
    assert result["train_nelbo_bpb"] == pytest.approx(np.mean([r["train_nelbo_bpb"] for r in rows[-6:]]))
    loaded = load_run(tmp_path / "run@last")
    assert loaded.config == model and loaded.info["steps"] == 60
    assert Path(result["final_checkpoint"]).is_dir()


def test_first_row_is_the_uniform_models_bits(data, model, tmp_path):
    """A fresh network is uniform up to small embeddings: log2 V bits per token."""
    train(data, tmp_path / "run", model=model, config=dataclasses.replace(QUICK, steps=1, batch=64))
    row = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    stream = Dataset.open(data).split("train")
    uniform = np.log2(model.vocab_size) * len(stream) / stream.bytes
    assert row["train_nelbo_bpb"] == pytest.approx(uniform, rel=0.02)


def test_a_run_may_start_with_some_mask_rates_and_says_so(data, model, tmp_path):
    config = dataclasses.replace(QUICK, narrow_share=0.5, short_share=0.25)
    result = train(data, tmp_path / "run", model=model, config=config)
    rows = metrics(tmp_path / "run")
    assert [row["train_nelbo_bpb"] is None for row in rows] == [True] * 6 + [False] * 6
    assert [row["train_narrow_bpb"] is None for row in rows] == [False] * 6 + [True] * 6
    assert [row["tokens"] for row in rows] == [64 * n for n in range(1, 13)]
    assert result["train_nelbo_bpb"] == rows[-1]["train_nelbo_bpb"]
    ids = torch.zeros(64, 200, dtype=torch.int64)
    counts = corrupt_batch(config, 0, ids, 280, (0.1, 0.6)).counts
    assert counts.min() in (21, 22) and counts.max() == 120


def test_a_run_may_start_with_next_tokens_and_says_so(data, model, tmp_path):
    config = dataclasses.replace(QUICK, causal_start=0.5, causal_share=0.25)
    train(data, tmp_path / "run", model=model, config=config)
    rows = metrics(tmp_path / "run")
    assert [row["train_causal_bpb"] is None for row in rows] == [False] * 6 + [True] * 6
    assert [row["train_nelbo_bpb"] is None for row in rows] == [True] * 6 + [False] * 6
    # The same steps as a run of next tokens alone, as far as they go.
    alone = dataclasses.replace(QUICK, causal_share=1.0)
    train(data, tmp_path / "alone", model=model, config=alone)
    other = metrics(tmp_path / "alone")
    assert [row["train_causal_bpb"] for row in rows[:6]] == [row["train_nelbo_bpb"] for row in other[:6]]
    ids = torch.arange(6 * 8).reshape(6, 8)
    assert corrupt_batch(config, 0, ids, 99, causal_share=1.0).causal.all()


def test_halves_of_windows_are_windows(data, model):
    """A step of halves has the loss and gradients of one whose windows were that short, and as many again."""
    windows = Loader(Dataset.open(data).split("train"), 16, 4, seed=0).batch(0)
    losses, gradients = [], []
    for halved in (True, False):
        torch.manual_seed(0)
        network = Denoiser(model)
        for p in network.parameters():
            torch.nn.init.normal_(p, std=0.2)
        config = dataclasses.replace(QUICK, short_share=0.5, causal_share=0.5, batch=4 if halved else 8)
        trainer = Trainer(network, config, Loader(Dataset.open(data).split("train"), 16, 4, 0), torch.device("cpu"))
        losses.append(trainer.gradients(windows if halved else windows.reshape(8, 8), 3, 0.0 if halved else 1.0))
        gradients.append(torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None]))
    assert losses[0] == losses[1] and torch.equal(*gradients)
    with pytest.raises(ConfigError, match="even"):
        odd = dataclasses.replace(model, sequence_length=15)
        Trainer(Denoiser(odd), config, Loader(Dataset.open(data).split("train"), 15, 8, 0), torch.device("cpu"))


@pytest.mark.parametrize("weighting", ["nelbo", "reference"])
def test_micro_batches_change_nothing_but_rounding(data, model, weighting):
    gradients = []
    for micro in (0, 1, 3):
        torch.manual_seed(0)
        net = Denoiser(model)
        config = dataclasses.replace(QUICK, micro_batch=micro, weighting=weighting)
        loader = Loader(Dataset.open(data).split("train"), 16, 4, 0)
        trainer = Trainer(net, config, loader, torch.device("cpu"))
        figures = trainer.gradients(loader.batch(3), 3)
        gradients.append((figures, torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None])))
    for figures, gradient in gradients[1:]:
        assert figures == pytest.approx(gradients[0][0], rel=1e-5)
        torch.testing.assert_close(gradient, gradients[0][1], atol=1e-6, rtol=1e-4)


def test_draw_of_a_step():
    ids = torch.arange(6 * 8).reshape(6, 8)
    for share, causal_rows in ((0.0, {0}), (0.5, {3}), (0.4, {2, 3}), (1.0, {6})):
        config = dataclasses.replace(QUICK, batch=6, causal_share=share)
        seen, total = set(), 0
        for step in range(200):
            batch = corrupt_batch(config, step, ids, 99)
            seen.add(int(batch.causal.sum()))
            total += int(batch.causal.sum())
            for row in range(6):
                if batch.causal[row]:
                    assert batch.masked[row].all() and batch.corrupted[row].tolist() == [99, *ids[row, :-1].tolist()]
                else:
                    assert int(batch.masked[row].sum()) == int(batch.counts[row])
                    assert torch.equal(batch.corrupted[row], ids[row].masked_fill(batch.masked[row], 99))
        assert seen == causal_rows and total / 1200 == pytest.approx(share, abs=0.03)
        again = corrupt_batch(config, 7, ids, 99)
        assert torch.equal(again.corrupted, corrupt_batch(config, 7, ids, 99).corrupted)


@pytest.mark.parametrize(("share", "counts"), [(0.4, {(1, 4), (2, 4), (3, 8), (4, 8)}), (0.5, {(2, 4), (4, 8)})])
def test_warming_up_meets_every_number_of_causal_windows(data, model, monkeypatch, share, counts):
    """Else the first step with another number would be compiled within the run's minutes."""
    config = dataclasses.replace(QUICK, causal_share=share, short_share=0.5, compile=True)
    loader = Loader(Dataset.open(data).split("train"), model.sequence_length, config.batch, 0)
    trainer = Trainer(Denoiser(model), config, loader, torch.device("cpu"))
    met = set()

    def noted(work):
        met.add((sum(len(part.ids) for part in work.passes if part.causal), work.num_windows))

    monkeypatch.setattr(trainer, "_gradients", noted)
    trainer.warm_up()
    assert met == counts


def test_what_is_not_compiled_is_not_warmed_up(data, model, monkeypatch):
    loader = Loader(Dataset.open(data).split("train"), model.sequence_length, QUICK.batch, 0)
    trainer = Trainer(Denoiser(model), QUICK, loader, torch.device("cpu"))
    monkeypatch.setattr(trainer, "_gradients", lambda work: pytest.fail("a step is made for nothing"))
    assert trainer.warm_up() is None


def test_draw_of_a_step_in_blocks():
    ids = torch.arange(6 * 8).reshape(6, 8)
    config = dataclasses.replace(QUICK, batch=6, causal_share=0.5, block_size=3)
    batch = corrupt_batch(config, 2, ids, 99)
    assert batch.size == 3 and batch.counts.shape == (6, 3) and int(batch.causal.sum()) == 3
    for row in range(6):
        if batch.causal[row]:
            assert batch.masked[row].all() and batch.corrupted[row].tolist() == [99, *ids[row, :-1].tolist()]
            assert batch.counts[row].tolist() == [3, 3, 2]
        else:
            assert [int(part.sum()) for part in batch.masked[row].split(3)] == batch.counts[row].tolist()
            assert torch.equal(batch.corrupted[row], ids[row].masked_fill(batch.masked[row], 99))
    assert torch.equal(batch.corrupted, corrupt_batch(config, 2, ids, 99).corrupted)
    alone = corrupt_batch(dataclasses.replace(config, block_size=1), 2, ids, 99)
    assert alone.causal.all() and alone.size is None  # blocks of one token are next tokens
    whole = corrupt_batch(dataclasses.replace(config, block_size=0), 2, ids, 99)
    for size in (8, 100):
        assert torch.equal(
            whole.corrupted, corrupt_batch(dataclasses.replace(config, block_size=size), 2, ids, 99).corrupted
        )
    with pytest.raises(ConfigError, match="block_size"):
        dataclasses.replace(config, block_size=-1)


@pytest.mark.parametrize("weighting", ["nelbo", "reference"])
@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("share", [0.0, 0.5])
def test_gradient_of_blocks_is_that_of_the_stated_loss(data, model, share, shifted, weighting):
    """The step's gradient against the loss written out block by block, each on a canvas of its own.

    A model with shifted outputs learns all windows both ways.
    """
    torch.manual_seed(0)
    net = Denoiser(dataclasses.replace(model, neighbour_reach=2, shifted_output=shifted))
    with torch.no_grad():
        next(p for name, p in net.named_parameters() if name == "neighbour_taps").normal_(0, 0.3)
    config = dataclasses.replace(QUICK, causal_share=share, block_size=6, weighting=weighting, micro_batch=1)
    loader = Loader(Dataset.open(data).split("train"), 16, 4, 0)
    trainer = Trainer(net, config, loader, torch.device("cpu"))
    loss, nelbo = trainer.gradients(loader.batch(3), 3)
    got = torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None])
    net.zero_grad()
    ids = torch.from_numpy(loader.batch(3))
    batch = corrupt_batch(config, 3, ids, model.mask_id, causal_share=0.0 if shifted else None)
    masked_tokens = int(batch.masked[~batch.causal].sum())
    expected, bounds = torch.zeros(()), []
    for row in range(4):
        if batch.causal[row] or (shifted and share):
            read = torch.nn.functional.pad(ids[row : row + 1, :-1], (1, 0), value=model.mask_id)
            logp = net(read, block_size=1)[0].log_softmax(-1)
            expected = expected - (share if shifted else 1) * logp[range(16), ids[row]].sum() / 64
        if batch.causal[row]:
            continue
        bounds.append(0.0)
        for start in range(0, 16, 6):
            canvas = torch.cat((ids[row, :start], batch.corrupted[row, start : start + 6]))
            logp = net(canvas[None], block_size=6)[0].log_softmax(-1)
            hidden = [i for i in range(start, len(canvas)) if batch.masked[row, i]]
            nll = -torch.stack([logp[i, ids[row, i]] for i in hidden]).sum()
            bounds[-1] += float(nll.detach()) * (len(canvas) - start) / len(hidden)
            if weighting == "nelbo":  # a mean over all windows, whichever way they are learnt
                weight = (1 - share if shifted else 1) * (len(canvas) - start) / len(hidden) / 64
            else:
                weight = (1 - share) / masked_tokens
            expected = expected + weight * nll
    expected.backward()
    torch.testing.assert_close(got, gradients_of(net), atol=1e-6, rtol=1e-4)
    assert loss == pytest.approx(float(expected.detach()), rel=1e-5)
    assert nelbo == pytest.approx(sum(bounds) / len(bounds) / 16, rel=1e-5)


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_gradient_is_that_of_the_stated_loss(data, model, share):
    """The step's gradient against the loss written out window by window."""
    torch.manual_seed(0)
    net = Denoiser(model)
    config = dataclasses.replace(QUICK, causal_share=share)
    loader = Loader(Dataset.open(data).split("train"), 16, 4, 0)
    trainer = Trainer(net, config, loader, torch.device("cpu"))
    loss, nelbo = trainer.gradients(loader.batch(3), 3)
    got = torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None])
    net.zero_grad()
    ids = torch.from_numpy(loader.batch(3))
    batch = corrupt_batch(config, 3, ids, model.mask_id)
    expected, bound, masked_rows = torch.zeros(()), 0.0, 0
    for row in range(4):
        size = int(batch.causal[row])
        logp = net(batch.corrupted[row : row + 1], block_size=size)[0].log_softmax(-1)
        nll = -torch.stack([logp[i, ids[row, i]] for i in range(16) if batch.masked[row, i]]).sum()
        term = nll / int(batch.counts[row])
        expected = expected + term / 4
        if not batch.causal[row] or share == 1:
            bound, masked_rows = bound + float(term.detach()), masked_rows + 1
    expected.backward()
    torch.testing.assert_close(got, gradients_of(net), atol=1e-6, rtol=1e-4)
    assert loss == pytest.approx(float(expected.detach()), rel=1e-5)
    assert nelbo == pytest.approx(bound / masked_rows, rel=1e-5)


@pytest.mark.parametrize(("stop", "share"), [(1, 0.0), (5, 0.5), (11, 0.3)])
def test_resume_is_bit_equal(data, model, tmp_path, stop, share):
    config = dataclasses.replace(QUICK, causal_share=share)
    whole = train(data, tmp_path / "whole", model=model, config=config)
    with pytest.raises(Interrupted, match=f"step {stop}.*--resume"):
        train(data, tmp_path / "parts", model=model, config=config, progress=stop_at(stop))
    resumed = train(data, tmp_path / "parts", model=model, config=config, resume=True)
    a, b = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    steps = [row["step"] for row in metrics(tmp_path / "parts")]
    assert steps == list(range(1, 13)) and resumed["steps"] == whole["steps"]


@pytest.mark.parametrize("block_size", [0, 4])
def test_dropout_drops_in_training_alone(model, block_size):
    torch.manual_seed(0)
    net = Denoiser(model)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.2)
    ids = torch.randint(0, 200, (4, 16))
    plain = net(ids, block_size=block_size)
    net.set_dropout(0.5)
    dropped = [net(ids, block_size=block_size) for _ in range(2)]
    assert not torch.allclose(dropped[0], plain, atol=1e-3) and not torch.allclose(*dropped, atol=1e-3)
    assert torch.equal(net.eval()(ids, block_size=block_size), plain)


def test_dropout_takes_the_stated_share_and_keeps_the_mean():
    q, k, v = (torch.randn(1, 2, 8, 4) for _ in range(3))
    torch.manual_seed(0)
    mean = torch.stack([attend(q, k, v, dropout=0.3) for _ in range(4000)]).mean(0)
    torch.testing.assert_close(mean, attend(q, k, v), atol=0.1, rtol=0)
    block = Block(ModelConfig(width=16, heads=2, kv_heads=2), 0)
    block.dropout = 0.3
    kept = block._dropped(torch.ones(1000, 100))
    assert float((kept == 0).float().mean()) == pytest.approx(0.3, abs=0.01)
    assert float(kept.mean()) == pytest.approx(1.0, abs=0.02)


def test_a_run_with_dropout_that_is_resumed_is_the_same_run(data, model, tmp_path):
    config = dataclasses.replace(QUICK, dropout=0.2, causal_share=0.5, micro_batch=1)
    train(data, tmp_path / "whole", model=model, config=config)
    train(data, tmp_path / "none", model=model, config=dataclasses.replace(config, dropout=0.0))
    with pytest.raises(Interrupted):
        train(data, tmp_path / "parts", model=model, config=config, progress=stop_at(5))
    train(data, tmp_path / "parts", model=model, config=config, resume=True)
    whole, parts, none = (weights(tmp_path / name) for name in ("whole", "parts", "none"))
    assert all(torch.equal(whole[k], parts[k]) for k in whole)
    assert any(not torch.equal(whole[k], none[k]) for k in whole)


def test_a_run_that_is_extended_is_the_longer_run(data, model, tmp_path, capsys):
    """From before its warm-down; the finished run stays as it is."""
    config = dataclasses.replace(QUICK, warmup=0.0, momentum_warmup=0.0, steps=8, val_every=-1, keep_checkpoints=1)
    train(data, tmp_path / "short", model=model, config=config)
    train(data, tmp_path / "long", model=model, config=dataclasses.replace(config, steps=12))
    assert stable_step(tmp_path / "short") == 4 and stable_step(tmp_path / "long") == 6
    before = weights(tmp_path / "short")
    words = ["train", str(tmp_path / "short"), "--extend", "--out", str(tmp_path / "more")]
    assert main([*words, "--steps", "8"]) == 0
    longer, extended = weights(tmp_path / "long"), weights(tmp_path / "more")
    assert all(torch.equal(longer[k], extended[k]) for k in longer)
    assert all(torch.equal(before[k], v) for k, v in weights(tmp_path / "short").items())
    steps = [row["step"] for row in metrics(tmp_path / "more")]
    assert steps == list(range(1, 13)) and stable_step(tmp_path / "more") == 6
    capsys.readouterr()
    for more, said in (
        (["--steps", "8"], "exists"),
        ([], "how much longer"),
        (["--minutes", "1"], "counted by steps"),
        (["--steps", "8", "--resume"], "leave out --resume"),
    ):
        assert main([*words, *more]) == 2
        assert said in capsys.readouterr().err
    (tmp_path / "short" / "stable.json").unlink()
    assert main([*words[:-1], str(tmp_path / "other"), "--steps", "8"]) == 2
    assert "before its warm-down" in capsys.readouterr().err


def test_damaged_checkpoint_is_skipped_and_said(data, model, tmp_path):
    run = tmp_path / "run"
    first = dataclasses.replace(QUICK, steps=4, checkpoint_minutes=1e-9, keep_checkpoints=3)
    train(data, run, model=model, config=first)
    folders = sorted((run / "checkpoints").iterdir())
    assert len(folders) == 3
    path = folders[-1] / "weights.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    said = []
    folder, state = newest_checkpoint(run, said.append)
    assert folder == folders[-2] and state["step"] == 3
    assert len(said) == 1 and "weights.safetensors" in said[0] and "\n" not in said[0]
    for folder in folders:
        (folder / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="no valid checkpoint"):
        load_run(run)


def test_a_run_is_not_overwritten_or_mixed(data, model, tmp_path):
    run = tmp_path / "run"
    train(data, run, model=model, config=dataclasses.replace(QUICK, steps=2))
    before = weights(run)
    with pytest.raises(CheckpointError, match="--resume"):
        train(data, run, model=model, config=QUICK)
    with pytest.raises(CheckpointError, match="another model"):
        train(data, run, model=dataclasses.replace(model, layers=1), config=QUICK, resume=True)
    assert all(torch.equal(before[k], v) for k, v in weights(run).items())


def test_bad_input(data, model, tmp_path):
    with pytest.raises(ConfigError, match="vocab"):
        train(data, tmp_path / "r", model=dataclasses.replace(model, vocab_size=77), config=QUICK)
    with pytest.raises(ConfigError, match="device"):
        train(data, tmp_path / "r", model=model, config=dataclasses.replace(QUICK, device="abacus"))
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="is a file"):
        train(data, tmp_path / "file", model=model, config=QUICK)
    for folder in (tmp_path / "nothing", tmp_path):
        with pytest.raises(CheckpointError, match="not a run folder"):
            read_run(folder)
    assert not (tmp_path / "r").exists()


def test_non_finite_loss_stops_and_names_the_step(data, model, tmp_path):
    # Weights grow about a hundredfold in each step.
    rates = {"embedding_lr": 10.0, "scalar_lr": 10.0, "matrix_lr": 10.0, "weight_decay": 10.0}
    config = dataclasses.replace(QUICK, steps=60, grad_clip=0.0, **rates)
    with pytest.raises(MezzotintError, match=r"step \d+.*windows") as caught:
        train(data, tmp_path / "run", model=model, config=config)
    assert "\n" not in str(caught.value)


def test_compile_failure_falls_back(data, model, tmp_path, monkeypatch):
    def broken(function, **options):
        def fail(*args):
            raise InvalidCxxCompiler

        return fail

    monkeypatch.setattr(torch, "compile", broken)
    said: list[str] = []
    config = dataclasses.replace(QUICK, steps=2, compile=True)
    result = train(data, tmp_path / "run", model=model, config=config, warn=said.append)
    assert result["compiled"] is False and "InvalidCxxCompiler" in said[-1]


def test_an_error_of_the_step_is_no_compilers_failure(data, model, tmp_path, monkeypatch):
    def broken(function, **options):
        def fail(*args):
            raise TypeError("our own mistake")

        return fail

    monkeypatch.setattr(torch, "compile", broken)
    with pytest.raises(TypeError, match="our own mistake"):
        train(data, tmp_path / "run", model=model, config=dataclasses.replace(QUICK, steps=2, compile=True))


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


COMPILED = dataclasses.replace(QUICK, steps=8, batch=16, compile=True, sampled_share=0.5, sampled_entries=64)


def test_a_compiled_run_on_two_threads_is_the_same_again_and_resumed(data, model, tmp_path, two_threads):
    """What is added up at an index (embeddings, masked positions) is added in one order, whatever the threads."""
    whole, again = (train(data, tmp_path / name, model=model, config=COMPILED) for name in ("whole", "again"))
    with pytest.raises(Interrupted, match="step 3"):
        train(data, tmp_path / "run", model=model, config=COMPILED, progress=stop_at(3))
    resumed = train(data, tmp_path / "run", model=model, config=COMPILED, resume=True)
    assert whole["compiled"] and again["compiled"] and resumed["compiled"]
    first, *others = (Path(run["final_checkpoint"]) for run in (whole, again, resumed))
    for name in ("weights.safetensors", "average.safetensors", "optimizer.safetensors"):
        assert {(other / name).read_bytes() for other in others} == {(first / name).read_bytes()}, name
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_finished_run_that_is_resumed_says_so_before_it_would_compile(data, model, tmp_path, monkeypatch):
    before = train(data, tmp_path / "run", model=model, config=QUICK)
    said: list[str] = []
    monkeypatch.setattr(Trainer, "warm_up", lambda trainer: said.append("compiled"))
    config = dataclasses.replace(QUICK, compile=True)
    after = train(data, tmp_path / "run", model=model, config=config, resume=True, warn=said.append)
    assert said == ["nothing to do: the run ended at step 12; give it more time or steps to go on"]
    assert after["steps"] == before["steps"] and not after["compiled"]
    assert after["final_checkpoint"] == before["final_checkpoint"] and check_checkpoint(Path(after["final_checkpoint"]))


def test_a_signal_stops_a_run_that_is_still_compiling(data, model, tmp_path, monkeypatch):
    """At once, with signs of life until then; nothing is left that the next try would trip over."""

    def compiling(self):
        signal.raise_signal(signal.SIGTERM) if said.wait(30) else None
        raise AssertionError("the signal was not obeyed")

    said, lines = threading.Event(), []

    def warn(line):
        lines.append(line)
        if len(lines) == 3:
            said.set()

    config = dataclasses.replace(QUICK, steps=2, compile=True)
    before = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        patch.setattr(run_module, "SECONDS_BETWEEN_SIGNS", 0.01)
        patch.setattr(Trainer, "warm_up", compiling)
        with pytest.raises(Interrupted, match="before a step was made; start it again"):
            train(data, tmp_path / "run", model=model, config=config, warn=warn)
    assert "compiling" in lines[0] and all("still compiling" in line for line in lines[1:3])
    assert signal.getsignal(signal.SIGTERM) == before
    assert not (tmp_path / "run" / "train.lock").exists()
    assert "ended at step 0" in (tmp_path / "run" / "train.log").read_text()
    config = dataclasses.replace(config, compile=False)
    assert train(data, tmp_path / "run", model=model, config=config)["steps"] == 2


def test_a_resumed_run_is_the_same_run_unless_told(data, model, tmp_path):
    run = tmp_path / "run"
    train(data, run, model=model, config=dataclasses.replace(QUICK, steps=2))
    described = (run / "config.json").read_text()
    other = dataclasses.replace(QUICK, steps=4, causal_share=0.25)
    with pytest.raises(ConfigError, match=r"--change causal-share=0.25"):
        train(data, run, model=model, config=other, resume=True)
    assert (run / "config.json").read_text() == described
    train(data, run, model=model, config=other, resume=True, changes=["causal_share"])
    assert json.loads((run / "config.json").read_text())["train"]["causal_share"] == 0.25
    assert f"from step 2 on: causal_share: {QUICK.causal_share} -> 0.25" in (run / "train.log").read_text()


def test_one_training_at_a_time_in_a_folder(data, model, tmp_path):
    run = tmp_path / "run"
    with run_lock(run), pytest.raises(CheckpointError, match=f"process {os.getpid()}"):
        train(data, run, model=model, config=QUICK)
    assert not run.exists(), "a folder that nothing came of is left behind"
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    run.mkdir()
    (run / "train.lock").write_text(f"{gone.pid} {socket.gethostname()}")
    train(data, run, model=model, config=dataclasses.replace(QUICK, steps=1))
    assert not (run / "train.lock").exists()
    (run / "train.lock").write_text("17 another-machine")
    with pytest.raises(CheckpointError, match="another-machine"):
        train(data, run, model=model, config=QUICK, resume=True)


def test_a_lock_is_held_by_who_holds_it_not_by_what_its_file_says(tmp_path):
    path = tmp_path / "train.lock"
    with path.open("w") as file:  # a training that has the lock and has not yet written who it is
        assert try_lock(file.fileno())
        with pytest.raises(CheckpointError, match="just starting"), run_lock(tmp_path):
            pass
    for left in ("", "?", f"{os.getppid()} {socket.gethostname()}"):  # the number of a killed one is another's now
        path.write_text(left)
        with run_lock(tmp_path):
            assert path.read_text() == f"{os.getpid()} {socket.gethostname()}"
            with pytest.raises(CheckpointError, match=f"process {os.getpid()}"), run_lock(tmp_path):
                pass
        assert not path.exists()


def test_a_killed_training_leaves_no_lock(tmp_path):
    script = "import pathlib, sys; from mezzotint.training.checkpoint import run_lock\n"
    script += "with run_lock(pathlib.Path(sys.argv[1])): print('holds', flush=True); sys.stdin.read()"
    words = [sys.executable, "-c", script, str(tmp_path)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None and holder.stdout.readline().strip() == b"holds"
        with pytest.raises(CheckpointError, match=f"process {holder.pid} on"), run_lock(tmp_path):
            pass
        holder.kill()
    with run_lock(tmp_path):
        pass


def test_files_follow_the_umask(data, model, tmp_path):
    made = train(data, tmp_path / "run", model=model, config=dataclasses.replace(QUICK, steps=1))
    for path in Path(made["final_checkpoint"]).iterdir():
        assert path.stat().st_mode & 0o044 or os.name == "nt", path.name


def test_tensorboard_events(data, model, tmp_path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    train(data, tmp_path / "r", model=model, config=dataclasses.replace(QUICK, steps=3, tensorboard=True))
    accumulator = events.EventAccumulator(str(tmp_path / "r" / "tensorboard"))
    accumulator.Reload()
    rows = metrics(tmp_path / "r")
    seen = accumulator.Scalars("train_nelbo_bpb")
    assert [e.step for e in seen] == [1, 2, 3]
    assert [e.value for e in seen] == pytest.approx([r["train_nelbo_bpb"] for r in rows], rel=1e-5)


def test_runs_outside_the_main_thread(data, model, tmp_path):
    results: list[dict] = []
    config = dataclasses.replace(QUICK, steps=2)
    thread = threading.Thread(target=lambda: results.append(train(data, tmp_path / "r", model=model, config=config)))
    thread.start()
    thread.join()
    assert results[0]["steps"] == 2


def test_minutes_end_the_run(data, model, tmp_path):
    result = train(data, tmp_path / "r", model=model, config=dataclasses.replace(QUICK, steps=0, minutes=0.02))
    assert 1.1 < result["seconds"] < 6 and result["steps"] > 1


def test_a_gpu_step_stays_on_its_device_and_in_its_types():
    """The reference preset's step without a GPU: on the meta device, where a stray CPU tensor is an error, and under
    fake tensors for the share of a GPU, where autocast gives the types."""
    settings = preset("reference")
    with torch.device("meta"):
        network = Denoiser(settings.model)
    ids = torch.zeros(2, 2048, dtype=torch.int64, device="meta")
    for hidden in (network.hidden(ids), network.hidden(ids, 1), network.hidden_blocks(ids, ids, 16)):
        logits = network.logits(hidden)
        assert logits.device.type == "meta" and logits.shape == (2, 2048, 1024)
        logits.sum().backward()
    assert all(p.grad is not None and p.grad.device.type == "meta" for p in network.parameters())
    optimizers, average = Optimizers(network, settings.train), MovingAverage(network, 0.02)
    optimizers.schedule(0.5)
    optimizers.step()
    average.update(1)
    kept = [t for t in optimizers.state_tensors().values() if t.numel() > 1]  # AdamW counts its steps on the CPU
    assert kept and all(t.device.type == "meta" for t in (*kept, *average.average.values()))

    with FakeTensorMode(), torch.autocast("cpu", torch.bfloat16):
        network = Denoiser(settings.model)
        ids = torch.zeros(48, 2048, dtype=torch.int64)
        seen = []
        for module in network.modules():
            if isinstance(module, torch.nn.Linear):
                module.register_forward_hook(lambda m, i, out: seen.append((m.weight.dtype, out.dtype)))
        logits = network.logits(network.hidden(ids))
    assert logits.shape == (48, 2048, 1024) and logits.dtype == torch.float32
    assert seen and set(seen) == {(torch.float32, torch.bfloat16)}
