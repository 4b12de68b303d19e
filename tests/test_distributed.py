"""One run on 1, 2 and 4 processes is the same run up to rounding."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from commands import mezzotint, run_command, run_together, torchrun
from corpus import metrics, prepared_words, validations

from mezzotint.config import ModelConfig, TrainConfig
from mezzotint.data.dataset import Dataset
from mezzotint.distributed import bfloat16_pays
from mezzotint.training.optim import BatchedMuon
from mezzotint.training.run import train


def train_small(data: str, out: str, settings: dict[str, Any]) -> None:
    model = ModelConfig(vocab_size=settings.pop("vocab"), sequence_length=16, layers=2, width=16, heads=2, kv_heads=1)
    config = TrainConfig(compile=False, dtype="float32", log_every=0.0, **settings)
    train(data, out, model=model, config=config)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return prepared_words(tmp_path_factory.mktemp("distributed"))


def under_torchrun(*words: str | Path) -> str:
    """Standard output of a command on two processes."""
    done = torchrun("-m", "mezzotint", *words)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def losses(data: Path, out: Path, processes: int, **settings) -> list[float]:
    settings["vocab"] = Dataset.open(data).tokenizer.vocab_size
    run_together(processes, train_small, str(data), str(out), settings)
    return [row["loss"] for row in metrics(out)]


MIXED = {"weighting": "reference", "causal_share": 0.5, "micro_batch": 1, "short_share": 0.4, "narrow_share": 0.6,
         "sampled_share": 0.3, "sampled_entries": 64}  # fmt: skip


@pytest.mark.parametrize("settings", [MIXED, {}])
def test_number_of_processes_changes_nothing(data, tmp_path, settings):
    # Rounding differs between numbers of processes, and grows from step to step the faster the weights move.
    settings = {"steps": 50, "batch": 4, "matrix_lr": 0.01, "embedding_lr": 0.003, "scalar_lr": 0.003, **settings}
    alone = losses(data, tmp_path / "p1", 1, **settings)
    assert len(alone) == 50 and alone[-1] < alone[0]
    for processes in (2, 4):
        together = losses(data, tmp_path / f"p{processes}", processes, **settings)
        np.testing.assert_allclose(together, alone, atol=1e-4)
        one, other = (validations(tmp_path / name) for name in ("p1", f"p{processes}"))
        assert [row["step"] for row in one] == [row["step"] for row in other] == list(range(5, 51, 5))
        for key in ("val_nelbo_bpb", "val_causal_bpb") if settings.get("causal_share") else ("val_nelbo_bpb",):
            np.testing.assert_allclose([row[key] for row in other], [row[key] for row in one], atol=1e-3)


def test_blocks_are_drawn_for_all_processes_together(data, tmp_path):
    """A few steps, before rounding in the optimizer grows: counts are stratified over the blocks of all processes."""
    settings = {"steps": 3, "batch": 4, "block_size": 5, "causal_share": 0.5}
    alone, together = (losses(data, tmp_path / f"p{n}", n, **settings) for n in (1, 2))
    np.testing.assert_allclose(together, alone, atol=1e-5)


def test_processes_share_packing_and_scoring(data, tmp_path):
    """The commands under torchrun: one output, the same figures, and an artifact of the same size up to rounding."""
    losses(data, tmp_path / "run", 1, steps=30, batch=4, causal_share=0.5)
    score = ("score", tmp_path / "run", data, "--tokens", "256", "--json")
    alone, together = json.loads(run_command(score).stdout), json.loads(under_torchrun(*score))
    assert together["results"][0]["bpb"] == pytest.approx(alone["results"][0]["bpb"], rel=1e-6)
    packed = []
    for n in (1, 2):
        pack = ["pack", str(tmp_path / "run"), "--out", str(tmp_path / f"{n}.mzt"), "--json"]
        packed.append(json.loads(run_together(n, mezzotint, pack).stdout))
        assert packed[-1]["verified"] and packed[-1]["artifact_bytes"] == (tmp_path / f"{n}.mzt").stat().st_size
    assert packed[1]["artifact_bytes"] == pytest.approx(packed[0]["artifact_bytes"], rel=0.02)


def update_with_muon(folder: str, world: int) -> None:
    """Three updates of seven matrices; every process leaves all of them in a file."""
    if world > 1:
        dist.init_process_group("gloo")
    random = torch.Generator().manual_seed(0)
    shapes = [(24, 16)] * 3 + [(16, 24)] * 2 + [(16, 16)] + [(40, 8)]
    weights = [torch.nn.Parameter(torch.randn(*shape, generator=random)) for shape in shapes]
    muon = BatchedMuon(weights, lr=0.02, weight_decay=0.1, momentum=0.9, adjust_lr_fn="original", neuron_decay=0.9)
    for _ in range(3):
        for p in weights:
            p.grad = torch.randn(*p.shape, generator=random)
        muon.step()
    rank = dist.get_rank() if world > 1 else 0
    torch.save(torch.cat([p.detach().flatten() for p in weights]), f"{folder}/{world}-{rank}.pt")
    if world > 1:
        dist.destroy_process_group()


def test_processes_share_the_matrices_of_muon(tmp_path):
    """The same update as one process's up to bfloat16 rounding, and to the last bit the same in both."""
    for processes in (1, 2):
        run_together(processes, update_with_muon, str(tmp_path), processes)
    alone, first, second = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("1-0", "2-0", "2-1"))
    assert torch.equal(first, second)
    # Three updates of 0.02 an element, known to bfloat16's 0.4% each after a few products.
    assert float((first - alone).abs().max()) < 0.06 * 0.05


@pytest.mark.parametrize(
    ("vendor", "flags", "pays"),
    [
        ("GenuineIntel", "avx2 avx512f avx512_bf16 amx_bf16 amx_tile", True),
        ("GenuineIntel", "avx2 avx512f avx512_bf16 avx512_fp16", False),
        ("GenuineIntel", "avx2 avx512f", False),
        ("AuthenticAMD", "avx2 avx512f avx512_bf16", True),
        ("AuthenticAMD", "avx2", False),
    ],
)
def test_where_bfloat16_pays(vendor, flags, pays, monkeypatch):
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    facts = f"processor : 0\nvendor_id : {vendor}\nflags : fpu {flags}\n"
    assert bfloat16_pays(torch.device("cpu"), facts) is pays
    assert bfloat16_pays(torch.device("cuda"), facts)
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    assert bfloat16_pays(torch.device("cpu"), facts)
