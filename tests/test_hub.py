"""Models on their way to and from the Hub: files, card and metadata, without a network."""

from __future__ import annotations

import hashlib
import shutil
import time
from pathlib import Path

import pytest

import mezzotint
from mezzotint.errors import ArtifactError, MezzotintError
from mezzotint.scoring.statistics import Estimate

huggingface_hub = pytest.importorskip("huggingface_hub")
yaml = pytest.importorskip("yaml")

from mezzotint.integrations import hub  # noqa: E402

FIGURES = [
    Estimate("nelbo", "upper bound", 2.25, 0.0125, 4.2, 1000, 2700, 1.0, 8, 3),
    {"method": "chain", "kind": "exact", "bpb": 2.0, "stderr_bpb": None, "tokens": 64, "bytes": 170, "seed": 0},
]


def same_weights(one: mezzotint.Model, two: mezzotint.Model) -> bool:
    theirs = two.network.state_dict()
    return all(value.equal(theirs[name]) for name, value in one.network.state_dict().items())


def metadata(readme: Path) -> dict:
    """The card's YAML block, read by a YAML parser alone."""
    return yaml.safe_load(readme.read_text().split("---\n")[1])


def test_saved_folder_holds_artifact_weights_and_card(trained, tmp_path):
    made = hub.HubModel(trained.artifact, FIGURES, name="Plate", statement="Thirteen words.", dataset="plates")
    made.save_pretrained(tmp_path / "m")
    names = {p.name for p in (tmp_path / "m").iterdir()}
    assert names == {"model.mzt", "model.safetensors", "config.json", "tokenizer.model", "README.md"}
    assert (tmp_path / "m" / "model.mzt").read_bytes() == trained.artifact.read_bytes()
    model = mezzotint.from_pretrained(tmp_path / "m")
    assert same_weights(model, mezzotint.open_artifact(trained.artifact))
    assert same_weights(model, mezzotint.import_folder(tmp_path / "m"))
    card = (tmp_path / "m" / "README.md").read_text()
    assert hashlib.sha256(trained.artifact.read_bytes()).hexdigest() in card
    assert "| nelbo | upper bound | 2.2500 | 0.0125 | 1,000 |" in card
    assert "| chain | exact | 2.0000 | unknown | 64 |" in card and "Thirteen words." in card


def test_card_metadata_has_each_figure_with_kind_and_error(trained, tmp_path):
    hub.HubModel(trained.artifact, FIGURES, name="Plate", dataset="plates").save_pretrained(tmp_path)
    data = metadata(tmp_path / "README.md")
    assert (
        data["license"] == "apache-2.0" and data["library_name"] == "mezzotint" and "masked-diffusion" in data["tags"]
    )
    (entry,) = data["model-index"]
    metrics = [metric for result in entry["results"] for metric in result["metrics"]]
    assert [(m["value"], m["args"]["kind"], m["args"]["standard_error"]) for m in metrics] == [
        (2.25, "upper bound", 0.0125),
        (2.0, "exact", "unknown"),
    ]
    assert {result["dataset"]["name"] for result in entry["results"]} == {"plates"}
    assert huggingface_hub.ModelCard.load(tmp_path / "README.md").data.eval_results[0].metric_value == 2.25


def test_without_figures_the_card_says_so(trained, tmp_path):
    hub.HubModel(trained.artifact).save_pretrained(tmp_path)
    assert "model-index" not in metadata(tmp_path / "README.md")
    assert "None were given" in (tmp_path / "README.md").read_text()


@pytest.fixture
def fake_hub(monkeypatch, tmp_path) -> Path:
    """A Hub that is a folder: what is uploaded to it can be downloaded from it."""
    root = tmp_path / "hub"

    def create_repo(self, repo_id, **kwargs):
        (root / repo_id).mkdir(parents=True, exist_ok=True)
        return huggingface_hub.RepoUrl(f"https://huggingface.co/{repo_id}")

    def upload_folder(self, *, repo_id, folder_path, commit_message, **kwargs):
        shutil.copytree(folder_path, root / repo_id, dirs_exist_ok=True)
        return f"https://huggingface.co/{repo_id}/commit/{commit_message}"

    def download(repo_id, filename, **kwargs):
        if not (root / repo_id / filename).is_file():
            raise huggingface_hub.errors.LocalEntryNotFoundError(f"{repo_id} has no {filename}\nmore words")
        return str(root / repo_id / filename)

    monkeypatch.setattr("mezzotint.integrations.hub.reachable", lambda: True)
    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", create_repo)
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", upload_folder)
    monkeypatch.setattr(hub, "hf_hub_download", download)
    monkeypatch.setattr(huggingface_hub.hub_mixin, "hf_hub_download", download)
    return root


def test_pushed_and_fetched(trained, fake_hub):
    address = mezzotint.push_to_hub(trained.artifact, "someone/plate", FIGURES, commit_message="first", name="Plate")
    assert address.endswith("someone/plate/commit/first")
    assert 'from_pretrained("someone/plate")' in (fake_hub / "someone" / "plate" / "README.md").read_text()
    model = mezzotint.from_pretrained("someone/plate")
    assert model.sha256 == hashlib.sha256(trained.artifact.read_bytes()).hexdigest()
    text = "the old ____ was dark"
    assert mezzotint.fill(model, text, seed=1) == mezzotint.fill(mezzotint.load(trained.artifact), text, seed=1)


def test_what_cannot_be_had_is_one_line(trained, fake_hub, tmp_path):
    with pytest.raises(MezzotintError) as refused:
        mezzotint.from_pretrained("someone/nothing")
    assert "someone/nothing" in str(refused.value) and "\n" not in str(refused.value)
    with pytest.raises(MezzotintError):
        mezzotint.push_to_hub(trained.artifact, "not a name/at all/ever")
    with pytest.raises(ArtifactError, match="no such artifact"):
        mezzotint.push_to_hub(tmp_path / "none.mzt", "someone/plate")
    assert not (fake_hub / "someone").exists()


def test_without_a_network_is_one_line_at_once(trained, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    started = time.monotonic()
    for call in (
        lambda: mezzotint.from_pretrained("someone/nothing", cache_dir=tmp_path),
        lambda: mezzotint.push_to_hub(trained.artifact, "someone/plate"),
    ):
        with pytest.raises(MezzotintError, match="cannot be reached") as refused:
            call()
        assert "\n" not in str(refused.value)
    assert time.monotonic() - started < 10
