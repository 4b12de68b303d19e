"""What can be said of a command line of lm-evaluation-harness before the harness is imported and reads its 14,000 task files.

That takes many seconds. Refused are settings that the model does not have, models and tasks that are nowhere, and, without
a network, a task whose dataset is in no cache. Knows the words of the command and the text of task files, not what the
harness makes of them.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mezzotint.errors import ConfigError, MezzotintError
from mezzotint.integrations.network import reachable

SETTINGS = (
    "path", "model", "attention", "batch_size", "device", "max_batch_size", "max_gen_toks", "seed", "objective",
    "trust_remote_code",
)  # fmt: skip
LISTS = ("list", "groups", "subtasks", "tags", "list_groups", "list_subtasks", "list_tags")
NO_MODEL = "name one model: path=MODEL.mzt or path=RUN"


def check_settings(settings: Mapping[str, Any]) -> None:
    """Raise ConfigError for a setting that the harness model does not have, or a word that is no attention."""
    if unknown := settings.keys() - set(SETTINGS):
        known = ", ".join(name for name in SETTINGS if name not in ("model", "max_batch_size"))
        raise ConfigError(f"the harness model has no setting {', '.join(sorted(unknown))}; it has {known}")
    if (attention := settings.get("attention", "full")) not in ("full", "causal"):
        raise ConfigError(f"attention must be full or causal, not {attention!r}")


@contextlib.contextmanager
def one_line() -> Iterator[None]:
    """End the process with one line on standard error and status 2 for what a user can mend."""
    try:
        yield
    except MezzotintError as error:
        reason = str(error)
    except (ConnectionError, FileNotFoundError) as error:
        reason = f"{' '.join(str(error).split())[:200]}: the Hub cannot be reached, or has no such thing"
    except ValueError as error:
        if not str(error).startswith("Tasks not found"):
            raise
        reason = f"{error}; `--tasks list` shows what there is"
    else:
        return
    print(f"mezzotint: {reason}", file=sys.stderr)
    raise SystemExit(2)


def check_arguments(words: Sequence[str]) -> None:
    """Raise MezzotintError for settings, a model or tasks with which the command cannot go well.

    words: of the harness's command line. What the harness itself will complain of is left to it.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--model", default="mezzotint")
    parser.add_argument("--tasks", "-t", nargs="+", default=[])
    parser.add_argument("--model_args", "-a", nargs="+", default=[])
    parser.add_argument("--include_path", default=None)
    parser.add_argument("--config", "-C", default=None)
    try:
        found, _ = parser.parse_known_args(list(words))
    except argparse.ArgumentError:
        return
    settings = None
    if found.model == "mezzotint":
        pairs = [pair for text in found.model_args for pair in text.split(",")]
        if all("=" in pair for pair in pairs):  # else it is JSON
            settings = dict(pair.split("=", 1) for pair in pairs)
            check_settings(settings)
            if "path" in settings:
                check_path(settings["path"])
    names = [name.strip() for text in found.tasks for name in text.split(",")]
    check_tasks([name for name in names if re.fullmatch(r"[\w-]+", name) and name not in LISTS], found.include_path)
    scores = found.tasks and words[0] != "validate" and not found.config
    if scores and settings is not None and "path" not in settings:
        raise ConfigError(NO_MODEL)


def check_path(path: str) -> None:
    """Raise MezzotintError where a model is not there, or cannot be fetched."""
    from mezzotint.pretrained import load, pretrained_models
    from mezzotint.training.checkpoint import split_run

    if path.startswith("hf:"):
        missing = not reachable()
    else:
        missing = path not in pretrained_models() and not split_run(Path(path))[0].exists()
    if missing:
        load(path)  # which says why


def task_files(folders: Sequence[Path]) -> Iterator[bytes]:
    """The text of every YAML file in folders, at any depth."""
    for folder in folders:
        for at, _, files in os.walk(folder):
            for file in files:
                if file.endswith(".yaml"):
                    yield Path(at, file).read_bytes()


def check_tasks(names: Sequence[str], include_path: str | None = None) -> None:
    """Raise ConfigError for a name that stands in no task file, or whose dataset is neither here nor can be fetched.

    names: of tasks, groups and tags; neither patterns nor paths.
    """
    harness = find_spec("lm_eval")
    if harness is None:
        return
    folders = [Path(folder) / "tasks" for folder in harness.submodule_search_locations or ()]
    folders += [Path(include_path)] if include_path else []
    sought = {name.encode(): name for name in names if not Path(name).is_dir()}
    if not sought:
        return
    pattern = re.compile(rb"(?<![\w-])(" + b"|".join(map(re.escape, sought)) + rb")(?![\w-])")
    missing = dict(sought)
    datasets: dict[str, str] = {}
    for text in task_files(folders):
        for name in set(pattern.findall(text)):
            missing.pop(name, None)
            if re.search(rb"(?m)^task:\s*['\"]?" + re.escape(name) + rb"['\"]?\s*$", text):
                dataset = re.search(rb"(?m)^dataset_path:\s*['\"]?([\w.-]+/[\w.-]+)['\"]?\s*$", text)
                if dataset:
                    datasets[sought[name]] = dataset[1].decode()
        if not missing and len(datasets) == len(sought):
            break
    if missing:
        raise ConfigError(f"Tasks not found: {', '.join(missing.values())}; `--tasks list` shows what there is")
    absent = [name for name, dataset in datasets.items() if not (Path(dataset).exists() or in_a_cache(dataset))]
    if absent and not reachable():
        wanted = ", ".join(f"{datasets[name]} of task {name}" for name in absent)
        raise ConfigError(f"{wanted}: the Hub cannot be reached, and the dataset is in no cache of this machine")


def in_a_cache(dataset: str) -> bool:
    """Whether a cache of the Hub has a dataset OWNER/NAME, or one of `datasets`, which spells names its own way, of OWNER."""
    home = os.environ.get("HF_HOME") or os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    hub = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE") or os.path.join(home, "hub")
    own = os.environ.get("HF_DATASETS_CACHE") or os.path.join(home, "datasets")
    owner, name = dataset.split("/")
    folders = [*Path(hub).expanduser().glob("datasets--*"), *Path(own).expanduser().glob("*___*")]
    found = {folder.name.lower() for folder in folders}
    return f"datasets--{owner}--{name}".lower() in found or any(f.startswith(f"{owner}___".lower()) for f in found)
