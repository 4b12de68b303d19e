"""Mezzotint: masked-diffusion language models under a hard byte budget, with a number you can trust.

The public functions are here: `mezzotint.train(...)`, `mezzotint.load(model)`, `mezzotint.nelbo(...)` and the
rest of `__all__`. They are loaded when first used, so that `import mezzotint` does not import torch.
"""

from __future__ import annotations

import importlib
import inspect
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mezzotint.apps.report import report
    from mezzotint.apps.submission import submit
    from mezzotint.compression.container import compress, decompress
    from mezzotint.config import PRESETS, ModelConfig, SamplingConfig, TrainConfig, preset
    from mezzotint.data.dataset import Dataset
    from mezzotint.data.prepare import prepare
    from mezzotint.data.tokenizer import Tokenizer
    from mezzotint.errors import ArtifactError, CheckpointError, ConfigError, DataError, MezzotintError
    from mezzotint.integrations.hub import from_pretrained, push_to_hub
    from mezzotint.integrations.transformers import from_transformers
    from mezzotint.network.model import Denoiser, Model
    from mezzotint.packing.artifact import inspect_artifact, open_artifact
    from mezzotint.packing.pack import pack, store
    from mezzotint.packing.safetensors import export_folder, import_folder
    from mezzotint.pretrained import load, pretrained_models
    from mezzotint.sampling.denoise import denoise
    from mezzotint.sampling.generate import sample
    from mezzotint.sampling.infill import fill, infill
    from mezzotint.scoring.compare import compare, compare_documents
    from mezzotint.scoring.likelihood import causal, chain_rule, lower_bound, nelbo, reconstruction_score
    from mezzotint.scoring.memorization import memorized
    from mezzotint.scoring.statistics import Comparison, Estimate
    from mezzotint.training.checkpoint import load_run
    from mezzotint.training.run import train

__version__ = "0.1.0"

_HOME = {
    "ArtifactError": "errors",
    "CheckpointError": "errors",
    "Comparison": "scoring.statistics",
    "ConfigError": "errors",
    "DataError": "errors",
    "Dataset": "data.dataset",
    "Denoiser": "network.model",
    "Estimate": "scoring.statistics",
    "MezzotintError": "errors",
    "Model": "network.model",
    "ModelConfig": "config",
    "PRESETS": "config",
    "SamplingConfig": "config",
    "Tokenizer": "data.tokenizer",
    "TrainConfig": "config",
    "causal": "scoring.likelihood",
    "chain_rule": "scoring.likelihood",
    "compare": "scoring.compare",
    "compare_documents": "scoring.compare",
    "compress": "compression.container",
    "decompress": "compression.container",
    "denoise": "sampling.denoise",
    "export_folder": "packing.safetensors",
    "fill": "sampling.infill",
    "from_pretrained": "integrations.hub",
    "from_transformers": "integrations.transformers",
    "import_folder": "packing.safetensors",
    "infill": "sampling.infill",
    "inspect_artifact": "packing.artifact",
    "load": "pretrained",
    "load_run": "training.checkpoint",
    "lower_bound": "scoring.likelihood",
    "memorized": "scoring.memorization",
    "nelbo": "scoring.likelihood",
    "open_artifact": "packing.artifact",
    "pack": "packing.pack",
    "prepare": "data.prepare",
    "preset": "config",
    "push_to_hub": "integrations.hub",
    "reconstruction_score": "scoring.likelihood",
    "report": "apps.report",
    "sample": "sampling.generate",
    "pretrained_models": "pretrained",
    "store": "packing.pack",
    "submit": "apps.submission",
    "train": "training.run",
}

__all__ = [
    "PRESETS",
    "ArtifactError",
    "CheckpointError",
    "Comparison",
    "ConfigError",
    "DataError",
    "Dataset",
    "Denoiser",
    "Estimate",
    "MezzotintError",
    "Model",
    "ModelConfig",
    "SamplingConfig",
    "Tokenizer",
    "TrainConfig",
    "causal",
    "chain_rule",
    "compare",
    "compare_documents",
    "compress",
    "decompress",
    "denoise",
    "export_folder",
    "fill",
    "from_pretrained",
    "from_transformers",
    "import_folder",
    "infill",
    "inspect_artifact",
    "load",
    "load_run",
    "lower_bound",
    "memorized",
    "nelbo",
    "open_artifact",
    "pack",
    "prepare",
    "preset",
    "pretrained_models",
    "push_to_hub",
    "reconstruction_score",
    "report",
    "sample",
    "store",
    "submit",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    if inspect.isfunction(value):
        value = importlib.import_module(f"{__name__}.signatures").checked(value)
    globals()[name] = value  # later look-ups do not come here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
