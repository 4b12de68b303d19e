"""Exported folders: exact both ways, readable by other software, and refused when anything is wrong."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import safetensors.torch
import torch

import mezzotint
from mezzotint.errors import ArtifactError
from mezzotint.packing.safetensors import export_folder, import_folder


@pytest.fixture
def exported(trained, tmp_path):
    export_folder(mezzotint.open_artifact(trained.artifact), tmp_path / "exported")
    return tmp_path / "exported"


def test_round_trip_is_exact(trained, exported, tmp_path):
    """Artifact, folder, artifact: every weight bit for bit, and the same answers."""
    first = mezzotint.open_artifact(trained.artifact)
    figures = mezzotint.store(import_folder(exported), tmp_path / "again.mzt")
    assert figures["artifact_bytes"] == (tmp_path / "again.mzt").stat().st_size and figures["verified"]
    again = mezzotint.open_artifact(tmp_path / "again.mzt")
    state = first.network.state_dict()
    assert list(again.network.state_dict()) == list(state)
    for name, value in again.network.state_dict().items():
        assert value.numpy().tobytes() == state[name].numpy().tobytes(), name
    assert again.config == first.config and again.info == first.info
    assert again.tokenizer.serialized == first.tokenizer.serialized
    ids = torch.arange(32)[None]
    assert again.logits(ids).equal(first.logits(ids))


def test_a_runs_own_weights_survive_too(trained, tmp_path):
    """Weights that are on no grid and in no half precision."""
    model = mezzotint.load_run(trained.run)
    export_folder(model, tmp_path / "e")
    mezzotint.store(mezzotint.import_folder(tmp_path / "e"), tmp_path / "m.mzt")
    stored = mezzotint.open_artifact(tmp_path / "m.mzt").network.state_dict()
    assert all(stored[name].equal(value) for name, value in model.network.state_dict().items())
    codecs = {row["codec"] for row in mezzotint.inspect_artifact(tmp_path / "m.mzt")["tensors"]}
    assert "float32" in codecs and codecs <= {"float32", "float16"}


def test_other_software_reads_it(trained, exported):
    """The safetensors library and a JSON reader are enough to rebuild the network."""
    described = json.loads((exported / "config.json").read_text())
    network = mezzotint.Denoiser(mezzotint.ModelConfig(**described["model"]))
    network.load_state_dict(safetensors.torch.load_file(exported / "model.safetensors"))
    ids = torch.arange(8)[None]
    expected = mezzotint.open_artifact(trained.artifact).logits(ids)
    with torch.inference_mode():
        assert network.eval()(ids).equal(expected)
    assert (exported / "tokenizer.model").read_bytes() == (trained.run / "tokenizer.model").read_bytes()


def test_an_export_replaces_only_an_export(trained, exported, tmp_path):
    model = mezzotint.open_artifact(trained.artifact)
    export_folder(model, exported)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(ArtifactError, match="other files"):
        export_folder(model, tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"


def _rewrite(path, change):
    state = safetensors.torch.load_file(path)
    change(state)
    safetensors.torch.save_file(state, path)


SPOILED = {
    "missing": (lambda f: (f / "config.json").unlink(), "no config.json"),
    "no json": (lambda f: (f / "config.json").write_text("{"), "does not describe"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "model.safetensors"),
    "cut weights": (lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:999]), "spoiled"),
    "no tensor": (lambda f: _rewrite(f / "model.safetensors", lambda s: s.pop("blocks.1.mlp.up.weight")), "mlp.up.weight is missing"),
    "odd tensor": (
        lambda f: _rewrite(f / "model.safetensors", lambda s: s.update(extra=torch.zeros(1))),
        "extra is missing, unknown",
    ),
    "nan": (
        lambda f: _rewrite(f / "model.safetensors", lambda s: s["embedding.weight"].fill_(np.nan)),
        "finite",
    ),
    "other tokenizer": (
        lambda f: (f / "config.json").write_text((f / "config.json").read_text().replace('vocab_size": 290', 'vocab_size": 280')),
        "tokenizer of 290",
    ),
    "no rotation": (
        lambda f: (f / "config.json").write_text((f / "config.json").read_text().replace('rotary_base": 10000.0', 'rotary_base": 0.0')),
        "rotary_base must be a number from 1",
    ),
    "long windows": (
        lambda f: (f / "config.json").write_text((f / "config.json").read_text().replace('sequence_length": 32', f'sequence_length": {1 << 24}')),
        "sequence_length must be",
    ),
    "a long description": (lambda f: (f / "config.json").write_text(" " * (1 << 20) + "{}"), "more than 1,048,576 bytes"),
    "float64": (
        lambda f: _rewrite(f / "model.safetensors", lambda s: s.update({"embedding.weight": s["embedding.weight"].double()})),
        "is not of finite float32, bfloat16 or float16",
    ),
    "huge": (
        lambda f: (f / "config.json").write_text((f / "config.json").read_text().replace('width": 32', 'width": 65536')),
        "channels",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SPOILED)
def test_spoiled_folders_are_refused_in_one_line(name, exported, tmp_path):
    spoil, contains = SPOILED[name]
    shutil.copytree(exported, tmp_path / "spoiled")
    spoil(tmp_path / "spoiled")
    with pytest.raises(ArtifactError, match=contains) as refused:
        import_folder(tmp_path / "spoiled")
    assert "spoiled" in str(refused.value)


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_weights_of_half_precision_are_taken_as_they_are(kind, exported, tmp_path):
    """Other software stores 16 bits: both kinds are float32 numbers."""
    folder = tmp_path / "half"
    shutil.copytree(exported, folder)
    _rewrite(folder / "model.safetensors", lambda s: s.update({name: t.to(kind) for name, t in s.items()}))
    state = safetensors.torch.load_file(folder / "model.safetensors")
    network = import_folder(folder).network
    for name, value in network.state_dict().items():
        assert value.dtype == torch.float32 and torch.equal(value, state[name].float())
    assert mezzotint.store(import_folder(folder), tmp_path / "m.mzt")["verified"]
