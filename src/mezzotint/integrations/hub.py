"""Models on the Hugging Face Hub (extra `hub`): an artifact, the same weights as safetensors, and a model card.

Built on huggingface_hub's own mixin, which does all talking to the Hub. Knows nothing of how figures are measured; it
puts the ones it is given on the card, each with its kind and its standard error.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mezzotint.errors import ConfigError, MezzotintError
from mezzotint.integrations.card import Figure, results, table
from mezzotint.integrations.network import reachable
from mezzotint.network.model import Model, count_parameters
from mezzotint.packing import safetensors
from mezzotint.packing.artifact import inspect_artifact, open_artifact

try:
    from huggingface_hub import ModelCard, ModelCardData, ModelHubMixin, hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HFValidationError, HTTPError
except ImportError as error:
    raise ConfigError("the Hub's client is not installed: pip install 'mezzotint[hub]'") from error


ARTIFACT = "model.mzt"
# What the client raises when the Hub refuses or cannot be reached; HTTPError is its HTTP library's, which has changed.
REFUSALS = (EntryNotFoundError, HFValidationError, HTTPError, OSError)


_CARD = """\
---
{{ card_data }}
---

# {{ name }}

{{ summary }}

A masked-diffusion language model made with [Mezzotint]: it fills gaps anywhere in a text and writes text from nothing.
{{ description }}

[Mezzotint]: https://pypi.org/project/mezzotint/

```python
import mezzotint

model = mezzotint.from_pretrained("{{ repo_id }}")
print(mezzotint.fill(model, "The old ____ was dark.", seed=0))
```

## Figures

{{ figures }}

All are of the reopened `model.mzt`, in bits per byte of the original UTF-8 text. `exact` is a code length, which may
stand beside an autoregressive model's; an `upper bound` is one from above; what is `not a bound` is no likelihood.

## Files

- `model.mzt`: the model as it is used, quantized and coded, {{ artifact_bytes }} bytes, SHA-256 `{{ sha256 }}`.
- `model.safetensors`, `config.json`, `tokenizer.model`: the same weights in float32, for other software.
{% if statement %}
## Training data

{{ statement }}
{% endif %}"""


class HubModel(ModelHubMixin, library_name="mezzotint", tags=["masked-diffusion", "text-infilling"]):
    """An artifact on its way to or from the Hub; `model` is the model in it.

    artifact: the `.mzt` file. figures: what the card says of it, measured on `dataset`'s `split`. name, summary,
    statement (Markdown about the training data), license and language are the card's.
    """

    def __init__(
        self,
        artifact: Path | str,
        figures: Sequence[Figure] = (),
        *,
        name: str = "Mezzotint model",
        summary: str = "",
        statement: str = "",
        dataset: str = "held-out text",
        split: str = "validation",
        license: str = "apache-2.0",
        language: str = "en",
    ) -> None:
        self._hub_mixin_config = None  # config.json is written here, with the weights it belongs to
        self.artifact = Path(artifact)
        self.model = open_artifact(self.artifact)
        self.figures, self.dataset, self.split = list(figures), dataset, split
        self.name, self.summary, self.statement = name, summary, statement
        self.license, self.language = license, language

    def _save_pretrained(self, save_directory: Path) -> None:
        shutil.copyfile(self.artifact, save_directory / ARTIFACT)
        safetensors.write_files(self.model, save_directory)

    @classmethod
    def _from_pretrained(
        cls,
        *,
        model_id: str,
        revision: str | None,
        cache_dir: str | Path | None,
        force_download: bool,
        local_files_only: bool,
        token: str | bool | None,
        **kwargs: Any,
    ) -> HubModel:
        kwargs.pop("proxies", None)  # older clients pass these two; no download takes them any more
        kwargs.pop("resume_download", None)
        if Path(model_id).is_dir():
            return cls(Path(model_id) / ARTIFACT, **kwargs)
        path = hf_hub_download(
            repo_id=model_id,
            filename=ARTIFACT,
            revision=revision,
            cache_dir=cache_dir,
            force_download=force_download,
            local_files_only=local_files_only,
            token=token,
        )
        return cls(path, **kwargs)

    def generate_model_card(self, *args: Any, repo_id: str = "OWNER/NAME", **kwargs: Any) -> ModelCard:
        """The card: figures in its metadata as a model-index, and in a table."""
        contents = inspect_artifact(self.artifact)
        config, info = self.model.config, self.model.info
        steps = f", trained for {info['steps']:,} steps" if isinstance(info.get("steps"), int) else ""
        data = ModelCardData(
            license=self.license,
            language=self.language,
            library_name="mezzotint",
            pipeline_tag="text-generation",
            tags=self._hub_mixin_info.model_card_data.tags,
            model_name=self.name,
            eval_results=results(self.figures, self.dataset, self.split) or None,
        )
        return ModelCard.from_template(
            card_data=data,
            template_str=_CARD,
            name=self.name,
            summary=self.summary,
            statement=self.statement,
            repo_id=repo_id,
            description=f"{count_parameters(self.model.network):,} parameters: {config.layers} layers, {config.width} wide, "
            f"{config.vocab_size:,} tokens, windows of {config.sequence_length:,}{steps}.",
            figures=table(self.figures),
            artifact_bytes=f"{contents['bytes']:,}",
            sha256=contents["sha256"],
        )


def push_to_hub(
    artifact: Path | str,
    repo_id: str,
    figures: Sequence[Figure] = (),
    *,
    private: bool | None = None,
    token: str | None = None,
    branch: str | None = None,
    create_pr: bool | None = None,
    commit_message: str = "Upload a Mezzotint model",
    **card: Any,
) -> str:
    """Upload an artifact with its card to the repository `repo_id`, made if need be; returns the commit's address.

    figures: for the card's metadata (`integrations.card`). private: a repository that is made is for its owner alone. token,
    branch, create_pr, commit_message: as huggingface_hub takes them. card: the other settings of `HubModel`. Raises ArtifactError for the file, MezzotintError if the Hub refuses.
    """
    hub = HubModel(artifact, figures, **card)
    if not reachable():
        raise MezzotintError(f"the Hub cannot be reached, so {repo_id} was not uploaded: try again with a network")
    try:
        return hub.push_to_hub(
            repo_id,
            private=private,
            token=token,
            branch=branch,
            create_pr=create_pr,
            commit_message=commit_message,
            model_card_kwargs={"repo_id": repo_id},
        )
    except REFUSALS as error:
        raise MezzotintError(f"the Hub did not take {repo_id}: {_first_line(error)}") from error


def from_pretrained(
    repo_id: Path | str,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: Path | str | None = None,
    force_download: bool = False,
    local_files_only: bool = False,
) -> Model:
    """The model in a repository on the Hub, or in a local folder of the same form.

    repo_id: OWNER/NAME, or the folder. revision: a branch, tag or commit; token, cache_dir, force_download, local_files_only:
    as huggingface_hub takes them.
    Raises ArtifactError for what is in the file, MezzotintError if it cannot be had.
    """
    local = local_files_only or (not Path(repo_id).is_dir() and not reachable())
    away = " (the Hub cannot be reached)" if local and not local_files_only else ""
    try:
        return HubModel.from_pretrained(
            repo_id,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            force_download=force_download,
            local_files_only=local,
        ).model
    except REFUSALS as error:
        raise MezzotintError(f"no Mezzotint model could be had from {repo_id}{away}: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
