"""Mezzotint: masked-diffusion language models under a hard byte budget, with a number you can trust.

The public functions are here: `mezzotint.train(...)`, `mezzotint.load(model)`, `mezzotint.nelbo(...)` and the
rest of `__all__`. They are loaded when first used, so that `import mezzotint` does not import torch.

`train` and `sample` are each both a module and the function of the same name in it. Whichever is imported first,
`mezzotint.sample` is one object that is the module and can be called: the import system binds a submodule on its
package, and the package makes these two callable as it does.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mezzotint.artifact import inspect_artifact, open_artifact, pack, store
    from mezzotint.config import PRESETS, ModelConfig, TrainConfig, preset
    from mezzotint.data import Dataset, Tokenizer, prepare
    from mezzotint.errors import ArtifactError, CheckpointError, ConfigError, DataError, MezzotintError
    from mezzotint.evaluate import Comparison, Estimate, causal, chain_rule, compare, nelbo, reconstruction_score
    from mezzotint.exchange import export_folder, import_folder
    from mezzotint.hub import from_pretrained, push_to_hub
    from mezzotint.memorization import memorized
    from mezzotint.model import Denoiser, Model
    from mezzotint.report import report
    from mezzotint.sample import denoise, fill, sample
    from mezzotint.shipped import load, shipped_models
    from mezzotint.submission import submit
    from mezzotint.train import load_run, train

__version__ = "0.1.0"

_HOME = {
    "ArtifactError": "errors",
    "CheckpointError": "errors",
    "Comparison": "evaluate",
    "ConfigError": "errors",
    "DataError": "errors",
    "Dataset": "data",
    "Denoiser": "model",
    "Estimate": "evaluate",
    "MezzotintError": "errors",
    "Model": "model",
    "ModelConfig": "config",
    "PRESETS": "config",
    "Tokenizer": "data",
    "TrainConfig": "config",
    "causal": "evaluate",
    "chain_rule": "evaluate",
    "compare": "evaluate",
    "denoise": "sample",
    "export_folder": "exchange",
    "fill": "sample",
    "from_pretrained": "hub",
    "import_folder": "exchange",
    "inspect_artifact": "artifact",
    "load": "shipped",
    "load_run": "train",
    "memorized": "memorization",
    "nelbo": "evaluate",
    "open_artifact": "artifact",
    "pack": "artifact",
    "prepare": "data",
    "preset": "config",
    "push_to_hub": "hub",
    "reconstruction_score": "evaluate",
    "report": "report",
    "sample": "sample",
    "shipped_models": "shipped",
    "store": "artifact",
    "submit": "submission",
    "train": "train",
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
    "Tokenizer",
    "TrainConfig",
    "causal",
    "chain_rule",
    "compare",
    "denoise",
    "export_folder",
    "fill",
    "from_pretrained",
    "import_folder",
    "inspect_artifact",
    "load",
    "load_run",
    "memorized",
    "nelbo",
    "open_artifact",
    "pack",
    "prepare",
    "preset",
    "push_to_hub",
    "reconstruction_score",
    "report",
    "sample",
    "shipped_models",
    "store",
    "submit",
    "train",
]


class _CallableModule(ModuleType):
    """A module whose call is a call of the function in it that has its name."""

    @property
    def __wrapped__(self) -> Any:  # lets inspect.signature() and help() find the function
        return self.__dict__[self.__name__.rpartition(".")[2]]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.__wrapped__(*args, **kwargs)


class _Package(ModuleType):
    """This package: gives its submodules that share a public function's name the power to be called."""

    def __setattr__(self, name: str, value: Any) -> None:
        if type(value) is ModuleType and _HOME.get(name) == name:
            value.__class__ = _CallableModule
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f"{__name__}.{_HOME[name]}")
    value = module if _HOME[name] == name else getattr(module, name)
    globals()[name] = value  # later look-ups do not come here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
