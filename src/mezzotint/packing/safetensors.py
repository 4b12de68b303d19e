"""A model as files that other software reads: weights in safetensors, config.json, and the tokenizer's own file.

Knows no training, no hub and no figures. Nothing is lost either way: a folder holds every weight of a model in
float32, and reading it gives the same bits back.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.numpy import save_file
from safetensors.torch import load_file

from mezzotint.config import to_dict
from mezzotint.data.tokenizer import Tokenizer
from mezzotint.errors import ArtifactError, DataError
from mezzotint.files import atomic_folder, refuse_pointer, writing
from mezzotint.network.model import Model
from mezzotint.packing.artifact import MAX_HEADER, checked_network, layout, with_values

WEIGHTS, CONFIG = "model.safetensors", "config.json"
VERSION = 1
FILES = (WEIGHTS, CONFIG, "tokenizer.model", "tokenizer.json")
"""What may be in a folder of this form."""
FLOATS = (torch.float32, torch.bfloat16, torch.float16)  # each is exact as float32


def is_exported(folder: Path) -> bool:
    """Whether `folder` looks like one that `export_folder` wrote."""
    return (folder / WEIGHTS).is_file() and (folder / CONFIG).is_file()


def write_files(model: Model, folder: Path) -> list[str]:
    """Write the three files into `folder`, which exists; their names."""
    state = {name: t.detach().float().cpu().contiguous().numpy() for name, t in model.network.state_dict().items()}
    save_file(state, folder / WEIGHTS, metadata={"format": "np", "mezzotint": str(VERSION)})
    content = {
        "library_name": "mezzotint",
        "mezzotint_version": VERSION,
        "model": to_dict(model.config),
        "info": model.info,
        "artifact_sha256": model.sha256,
    }
    (folder / CONFIG).write_text(json.dumps(content, indent=1, sort_keys=True, allow_nan=False) + "\n", "utf-8")
    (folder / model.tokenizer.file_name).write_bytes(model.tokenizer.serialized)
    return [WEIGHTS, CONFIG, model.tokenizer.file_name]


def export_folder(model: Model, out: Path | str) -> dict[str, Any]:
    """Write `model` to the folder `out`, whole or not at all: `folder`, `bytes`, `files`.

    Raises ArtifactError where `out` holds anything but an earlier export.
    """
    out = Path(out)
    if out.exists() and not (out.is_dir() and (is_exported(out) or not any(out.iterdir()))):
        raise ArtifactError(f"{out} holds other files; name a new or empty folder for the export")
    with writing(out, ArtifactError), atomic_folder(out) as folder:
        files = write_files(model, folder)
        size = sum((folder / name).stat().st_size for name in files)
    return {"folder": str(out), "bytes": size, "files": files}


def import_folder(folder: Path | str) -> Model:
    """The model in a folder that `export_folder` wrote, or that other software wrote in the same form.

    Raises ArtifactError for anything missing, damaged, or that does not fit together.
    """
    folder = Path(folder)
    try:
        with (folder / CONFIG).open("rb") as file:
            text = file.read(MAX_HEADER + 1)
        if len(text) > MAX_HEADER:
            raise ValueError(f"it has more than {MAX_HEADER:,} bytes")
        refuse_pointer(text, folder / CONFIG, ArtifactError)
        content = json.loads(text)
        version, settings, info = content["mezzotint_version"], content["model"], content.get("info", {})
        if not isinstance(info, dict):
            raise ValueError("info is not an object")
    except FileNotFoundError as error:
        raise ArtifactError(f"{folder} is not an exported model: it has no {CONFIG}") from error
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ArtifactError(f"{folder / CONFIG} does not describe a Mezzotint model ({error})") from error
    if version != VERSION:
        raise ArtifactError(
            f"{folder / CONFIG} is of version {version!r}, not {VERSION}: use the Mezzotint that wrote it"
        )
    try:
        network = checked_network({"config": settings}, (folder / WEIGHTS).stat().st_size)
        with (folder / WEIGHTS).open("rb") as start:
            refuse_pointer(start.read(64), WEIGHTS, ArtifactError)
        state = load_file(folder / WEIGHTS)
        tokenizer = Tokenizer.load(folder)
    except (OSError, SafetensorError, DataError, ArtifactError) as error:
        raise ArtifactError(f"{folder}: {error}") from error
    if tokenizer.vocab_size != network.config.vocab_size:
        raise ArtifactError(
            f"{folder}: a tokenizer of {tokenizer.vocab_size:,} tokens in a model of {network.config.vocab_size:,}"
        )
    shapes = layout(network)
    if {name: tuple(value.shape) for name, value in state.items()} != shapes:
        wrong = sorted(
            name for name in {*state, *shapes} if name not in state or tuple(state[name].shape) != shapes.get(name)
        )
        raise ArtifactError(f"{folder / WEIGHTS} does not fit {CONFIG}: {wrong[0]} is missing, unknown or misshapen")
    for name, value in state.items():
        if value.dtype not in FLOATS or not torch.isfinite(value).all():
            raise ArtifactError(f"{folder / WEIGHTS}: {name} is not of finite float32, bfloat16 or float16 numbers")
    with_values(network, {name: state[name].float().numpy() for name in shapes})
    return Model(network.config, tokenizer, network, info)
