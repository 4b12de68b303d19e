"""The challenge's record folder: README.md, submission.json, train.log, the artifact and two self-contained scripts.

`train_gpt.py` trains, packs and scores again what the record holds; `score.py` reopens the artifact and scores it. Both
carry the modules of this package that they need, compressed, and run where Mezzotint is not installed. The challenge
counts code and artifact together, in decimal bytes; both scripts are counted here. Knows nothing of plots or arguments.

The fields of submission.json are those of the challenge's records (github.com/openai/parameter-golf): author,
github_id, name, blurb, date, track, val_loss in nats per token, val_bpb, bytes_total, bytes_code; besides them the
kind of val_bpb, its standard error and its tokens, which a diffusion model's figure is worth little without.
"""

from __future__ import annotations

import ast
import base64
import importlib.util
import json
import lzma
import math
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mezzotint.config import to_dict
from mezzotint.data.dataset import Dataset
from mezzotint.data.tokenizer import check_same_tokenizer
from mezzotint.errors import ArtifactError, CheckpointError, DataError, MezzotintError
from mezzotint.files import atomic_folder, writing
from mezzotint.network.model import Model, count_parameters
from mezzotint.packing.artifact import BUDGET, open_artifact
from mezzotint.progress import OnProgress, Progress, silent
from mezzotint.scoring import kinds, likelihood
from mezzotint.scoring.statistics import Estimate
from mezzotint.training.checkpoint import read_run

TRAIN_SCRIPT, SCORE_SCRIPT, ARTIFACT = "train_gpt.py", "score.py", "model.mzt"
TRACK = "track_non_record_16mb"
_LOADER = '''\
#!/usr/bin/env python3
"""{doc}

Self-contained: it needs {needs} and nothing else; no network, no Mezzotint.
Its modules are in SOURCES, compressed; `python {script} --source FOLDER` writes them out to be read.
"""

import argparse, base64, importlib.abc, importlib.util, json, lzma, os, sys
from pathlib import Path

SOURCES = """\\
{sources}
"""
SOURCES = json.loads(lzma.decompress(base64.b85decode(SOURCES.replace("\\n", ""))))


class Embedded(importlib.abc.MetaPathFinder, importlib.abc.InspectLoader):
    """Imports `mezzotint` and its modules from SOURCES."""

    def find_spec(self, name, path=None, target=None):
        if name in SOURCES:
            spec = importlib.util.spec_from_loader(name, self, is_package=any(n.startswith(name + ".") for n in SOURCES))
            spec.origin, spec.has_location = f"{{__file__}}/{{name}}", True
            return spec

    def get_source(self, name):
        return SOURCES[name]


sys.meta_path.insert(0, Embedded())
'''


_TRAIN_MAIN = """
RUN = json.loads({run})


def main():
    parser = argparse.ArgumentParser(description="Train, pack under 16,000,000 bytes with this code, reopen, score.")
    parser.add_argument("--data", type=Path, help="prepared folder, or published shards with their tokenizer")
    parser.add_argument("--out", type=Path, default=Path("out"), help="where the run and the artifact go")
    parser.add_argument("--minutes", type=float, help="train for so long instead of as the record was")
    parser.add_argument("--steps", type=int, help="train for so many steps instead")
    parser.add_argument("--device", help="cpu, cuda, mps or auto")
    parser.add_argument("--tokens", type=int, help="score about so many validation tokens (default: all)")
    parser.add_argument("--source", type=Path, help="only write this script's modules to a folder")
    options = parser.parse_args()
    if options.source:
        return write_source(options.source)
    if not options.data:
        parser.error("--data is needed")
    from mezzotint.config import ModelConfig, TrainConfig, from_dict
    from mezzotint.data.dataset import Dataset
    from mezzotint.packing.artifact import open_artifact
    from mezzotint.packing.pack import pack
    from mezzotint.scoring.likelihood import nelbo
    from mezzotint.training.checkpoint import load_run
    from mezzotint.training.run import train

    settings = dict(RUN["train"])
    if options.minutes is not None:
        settings.update(minutes=options.minutes, steps=0)
    if options.steps is not None:
        settings.update(steps=options.steps)
    if options.device:
        settings.update(device=options.device)
    model = from_dict(ModelConfig, RUN["model"])
    run, artifact = options.out / "run", options.out / "{artifact}"

    def show(progress):
        row = progress.figures
        print(f"step {{row['step']}} loss {{row['loss']:.4f}} {{row['seconds']:.0f}} s", flush=True)

    figures = train(options.data, run, model=model, config=from_dict(TrainConfig, settings), progress=show)
    if os.environ.get("RANK", "0") != "0":
        return
    data = Dataset.open(options.data)
    here = Path(__file__).resolve().parent
    code = [here / name for name in ({scripts}) if (here / name).is_file()]
    figures["pack"] = pack(load_run(run), data.split("train"), artifact, code=code)
    opened = open_artifact(artifact)
    windows = data.split("val").windows(model.sequence_length)
    figures["score"] = nelbo(opened, windows, tokens=options.tokens).to_dict()
    print(json.dumps(figures))
"""


_SCORE_MAIN = """

def main():
    parser = argparse.ArgumentParser(description="Reopen the artifact and score it on validation text.")
    parser.add_argument("--data", type=Path, help="prepared folder, or published shards with their tokenizer")
    parser.add_argument("--model", type=Path, default=Path(__file__).resolve().parent / "{artifact}")
    parser.add_argument("--method", choices=("nelbo", "chain", "reconstruction"), default="nelbo")
    parser.add_argument("--tokens", type=int, help="score about so many tokens (default: all)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--source", type=Path, help="only write this script's modules to a folder")
    options = parser.parse_args()
    if options.source:
        return write_source(options.source)
    if not options.data:
        parser.error("--data is needed")
    from mezzotint.packing.artifact import open_artifact
    from mezzotint.data.dataset import Dataset
    from mezzotint.scoring.likelihood import chain_rule, nelbo, reconstruction_score

    methods = {{"nelbo": nelbo, "chain": chain_rule, "reconstruction": reconstruction_score}}
    model, data = open_artifact(options.model), Dataset.open(options.data)
    if model.tokenizer.sha256 != data.tokenizer.sha256:
        sys.exit("error: this data was prepared with another tokenizer than the model's")
    model.network.to(options.device)
    windows = data.split("val").windows(model.config.sequence_length)
    estimate = methods[options.method](model, windows, tokens=options.tokens, seed=options.seed)
    print(json.dumps({{"results": [estimate.to_dict()], "model_sha256": model.sha256}}))
"""


_END = """

def write_source(folder):
    for name, text in SOURCES.items():
        package = any(n.startswith(name + ".") for n in SOURCES)
        path = folder / (name.replace(".", "/") + ("/__init__.py" if package else ".py"))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


if __name__ == "__main__":
    main()
"""


def _source(name: str) -> str | None:
    """Source text of a module, without importing it; None if there is no such module."""
    try:
        spec = importlib.util.find_spec(name)
    except ModuleNotFoundError:  # a name in a module that is no folder
        return None
    if spec is None or spec.loader is None or not hasattr(spec.loader, "get_source"):
        return None
    return spec.loader.get_source(name)  # type: ignore[attr-defined]


def _imported(tree: ast.AST) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
            names.update(f"{node.module}.{alias.name}" for alias in node.names)  # a module of that folder, perhaps
    return names


def module_sources(roots: Sequence[str]) -> dict[str, str]:
    """Source text of the named modules of this package and of all its modules that they import, in a fixed order."""
    sources: dict[str, str] = {}
    waiting = [f"mezzotint.{root}" for root in roots]
    while waiting:
        name = waiting.pop()
        if name in sources:
            continue
        text = _source(name)
        if text is None:
            continue  # `from mezzotint import NAME` of a name that is no module
        sources[name] = text
        waiting += [name.rpartition(".")[0]] if name.count(".") > 1 else []  # its folder
        waiting += [n for n in _imported(ast.parse(text)) if n.startswith("mezzotint.")]
    init = f'"""Modules of Mezzotint that a record needs."""\n\n__version__ = {_version()!r}\n'
    return {"mezzotint": init, **dict(sorted(sources.items()))}


def _version() -> str:
    import mezzotint

    return mezzotint.__version__


def _needs(sources: dict[str, str]) -> list[str]:
    """Packages outside the standard library that modules import at their top level, PyPI's names."""
    import sys

    found: set[str] = set()
    for text in sources.values():
        for node in ast.parse(text).body:
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                found |= {name.partition(".")[0] for name in _imported(node)}
    return sorted(name for name in found if name not in sys.stdlib_module_names and name != "mezzotint")


def _script(name: str, doc: str, roots: Sequence[str], body: str) -> str:
    sources = module_sources(roots)
    packed = lzma.compress(json.dumps(sources).encode(), format=lzma.FORMAT_ALONE, preset=9 | lzma.PRESET_EXTREME)
    text = base64.b85encode(packed).decode()
    lines = "\n".join(text[i : i + 4000] for i in range(0, len(text), 4000))
    needs = _needs(sources)
    words = ", ".join(needs[:-1]) + (" and " if len(needs) > 1 else "") + needs[-1]
    return _LOADER.format(doc=doc, needs=words, script=name, sources=lines) + body + _END


def scripts(run: Path | str) -> dict[str, str]:
    """The two scripts of a run's record, name -> text. They depend on the run's settings, not on its weights."""
    run_config = read_run(Path(run))
    settings = json.dumps({"model": to_dict(run_config["model"]), "train": to_dict(run_config["train"])})
    train = _TRAIN_MAIN.format(run=repr(settings), artifact=ARTIFACT, scripts=f'"{TRAIN_SCRIPT}", "{SCORE_SCRIPT}"')
    score = _SCORE_MAIN.format(artifact=ARTIFACT)
    return {
        TRAIN_SCRIPT: _script(
            TRAIN_SCRIPT,
            "Trains the model of this record, packs it with this code under 16,000,000 bytes and scores the artifact.",
            ("training.run", "packing.pack", "scoring.likelihood"),
            train,
        ),
        SCORE_SCRIPT: _script(
            SCORE_SCRIPT,
            "Reopens the artifact of this record, checks it and scores it on validation text.",
            ("packing.artifact", "scoring.likelihood"),
            score,
        ),
    }


def code_bytes(run: Path | str) -> int:
    """Bytes of code that a record of this run will count: what `pack` must leave free under the budget."""
    return sum(len(text.encode()) for text in scripts(run).values())


_KINDS = {
    kinds.EXACT: "exact code length of a normalised distribution",
    kinds.UPPER_BOUND: "upper bound on the code length (NELBO)",
    kinds.NOT_A_BOUND: "not a bound on anything; only for comparison with scores computed alike",
    kinds.NO_CODE_LENGTH: "not a code length: the tokens do not give the text back",
}


def _readme(
    name: str,
    blurb: str,
    model: Model,
    estimates: Sequence[Estimate],
    sizes: dict[str, int],
    run_config: dict[str, Any],
) -> str:
    rows = []
    for e in estimates:
        error = f"{e.stderr_bpb:.5f}" if math.isfinite(e.stderr_bpb) else "unknown"
        rows.append(f"| {e.method} | {e.kind} | {e.bpb:.5f} | {error} | {e.nats_per_token:.5f} | {e.tokens:,} |")
    kinds = [f"- **{kind}**: {words}." for kind, words in _KINDS.items() if any(e.kind == kind for e in estimates)]
    config = model.config
    settings = "\n".join(
        f"- {label}: " + ", ".join(f"`{key}={value}`" for key, value in to_dict(run_config[part]).items())
        for label, part in (("Model", "model"), ("Training", "train"))
    )
    commit = f"\nTrained at commit `{run_config['commit']}`.\n" if run_config.get("commit") else ""
    return f"""# {name}

{blurb}

A masked-diffusion language model of {count_parameters(model.network):,} parameters: {config.layers} layers, {config.width}
wide, {config.vocab_size:,} tokens, windows of {config.sequence_length:,}; time-independent, bidirectional attention.

## Score

Scored on the reopened artifact, on validation text.

| method | kind | bits per byte | standard error | nats per token | tokens |
| --- | --- | ---: | ---: | ---: | ---: |
{chr(10).join(rows)}

{chr(10).join(kinds)}

`val_bpb` in submission.json is the first row, and `val_bpb_kind` says what it is.

## Bytes

| | bytes |
| --- | ---: |
| `{ARTIFACT}` | {sizes["artifact"]:,} |
| `{TRAIN_SCRIPT}` | {sizes[TRAIN_SCRIPT]:,} |
| `{SCORE_SCRIPT}` | {sizes[SCORE_SCRIPT]:,} |
| **total** | **{sizes["total"]:,}** of {BUDGET:,} |

## Run it

The scripts need the packages in requirements.txt; they carry all other code, and `--source FOLDER` writes it out.

```bash
pip install -r requirements.txt
python {SCORE_SCRIPT} --data DATA                 # reopens the artifact, prints its score as JSON
python {TRAIN_SCRIPT} --data DATA --out out       # trains again, packs, reopens, scores
torchrun --standalone --nproc_per_node=8 {TRAIN_SCRIPT} --data DATA --out out
```

DATA is a folder of the challenge's shards with their tokenizer.

## Settings

{settings}
{commit}"""


def _checked(run: Path, artifact: Path, out: Path) -> tuple[dict[str, Any], Model]:
    """The run's settings and the artifact's model, if they belong together and `out` may be written."""
    if out.exists() and not out.is_dir():
        raise ArtifactError(f"{out} is a file; name a folder for the record")
    if out.is_dir() and any(out.iterdir()) and not (out / "submission.json").is_file():
        raise ArtifactError(f"{out} holds other files; name a new or empty folder for the record")
    run_config = read_run(run)
    model = open_artifact(artifact)
    if not (run / "train.log").is_file():
        raise CheckpointError(f"{run} has no train.log, which a record must hold")
    if model.config != run_config["model"]:
        raise ArtifactError(f"{artifact} was not packed from {run}: their model settings differ")
    if model.info.get("train") not in (None, to_dict(run_config["train"])):
        raise ArtifactError(f"{artifact} was not packed from {run}: their training settings differ")
    return run_config, model


def _counted(artifact: Path, texts: dict[str, str]) -> dict[str, int]:
    """Bytes of the artifact, of each script, of the `code` and in `total`. Raises ArtifactError over the budget."""
    sizes = {"artifact": artifact.stat().st_size, **{script: len(text.encode()) for script, text in texts.items()}}
    code = sizes["code"] = sizes[TRAIN_SCRIPT] + sizes[SCORE_SCRIPT]
    sizes["total"] = sizes["artifact"] + code
    if sizes["total"] > BUDGET:
        raise ArtifactError(
            f"artifact {sizes['artifact']:,} + code {code:,} = {sizes['total']:,} bytes, over {BUDGET:,}: pack again with "
            f"--budget {BUDGET - code}"
        )
    return sizes


def _score_fields(best: Estimate, sizes: dict[str, int]) -> dict[str, Any]:
    """Fields of submission.json that are measured."""
    return {
        "val_loss": best.nats_per_token,
        "val_bpb": best.bpb,
        "val_bpb_kind": best.kind,
        "val_bpb_stderr": best.stderr_bpb if math.isfinite(best.stderr_bpb) else None,
        "val_tokens": best.tokens,
        "bytes_total": sizes["total"],
        "bytes_code": sizes["code"],
    }


def _without_place(log: str, run_config: dict[str, Any]) -> str:
    """The log as it is, but for where the data lay on the machine that trained."""
    place = json.dumps(run_config.get("data_folder") or "")
    return log.replace(place, '"DATA"') if len(place) > 2 else log


def submit(
    run: Path | str,
    artifact: Path | str,
    out: Path | str,
    *,
    dataset: Dataset | None = None,
    estimates: Sequence[Estimate] = (),
    tokens: int | None = None,
    name: str | None = None,
    author: str = "",
    github_id: str = "",
    blurb: str = "",
    track: str = TRACK,
    date: str | None = None,
    seed: int = 0,
    progress: OnProgress | None = None,
) -> dict[str, Any]:
    """Write the record folder of a run and its artifact to `out`, whole or not at all.

    The score is the first of `estimates` if there are any, else the artifact's NELBO on `dataset`'s validation split
    (about `tokens` tokens; all by default). date: ISO 8601 (default: now, UTC). name, author,
    github_id, blurb, track: as the challenge's submission.json has them. seed: of the masks. progress: told in words.

    Returns `folder`, `artifact_bytes`, `code_bytes`, `total_bytes`, `budget_bytes`, `val_bpb`, `val_bpb_kind`, `files`.
    Raises ArtifactError if artifact and scripts exceed the challenge's budget (naming the budget to pack with), and
    CheckpointError, ArtifactError or DataError if run, artifact and data do not belong together.
    """
    tell = progress or silent
    run, artifact, out = Path(run), Path(artifact), Path(out)
    run_config, model = _checked(run, artifact, out)
    texts = scripts(run)
    sizes = _counted(artifact, texts)
    estimates = list(estimates)
    if not estimates:
        if dataset is None:
            raise DataError("a record needs a score: give the data to score the artifact on")
        check_same_tokenizer(model, dataset)
        tell(Progress("scoring the artifact"))
        windows = dataset.split("val").windows(model.config.sequence_length)
        estimates = [likelihood.nelbo(model, windows, tokens=tokens, seed=seed)]
    best = estimates[0]
    name = name or f"Mezzotint: masked diffusion, {model.config.layers}x{model.config.width}"
    blurb = blurb or (
        "Masked-diffusion language model with count-stratified NELBO training, GPTQ int6 and range-coded weights; val_bpb "
        f"is of the kind: {best.kind}."
    )
    fields = {
        "author": author,
        "github_id": github_id,
        "name": name,
        "blurb": blurb,
        "date": date or time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "track": track,
        **_score_fields(best, sizes),
    }
    tell(Progress("writing the record"))
    with writing(out, MezzotintError), atomic_folder(out) as folder:
        shutil.copyfile(artifact, folder / ARTIFACT)
        log = _without_place((run / "train.log").read_text("utf-8"), run_config)
        (folder / "train.log").write_text(log, "utf-8")
        for script, text in texts.items():
            (folder / script).write_bytes(text.encode())
        needs = _needs(module_sources(("training.run", "packing.pack", "scoring.likelihood")))
        (folder / "requirements.txt").write_text("".join(f"{line}\n" for line in needs))
        (folder / "submission.json").write_text(json.dumps(fields, indent=2, ensure_ascii=False) + "\n", "utf-8")
        (folder / "README.md").write_text(_readme(name, blurb, model, estimates, sizes, run_config), "utf-8")
        files = sorted(path.name for path in folder.iterdir())
    return {
        "folder": str(out),
        "artifact_bytes": sizes["artifact"],
        "code_bytes": sizes["code"],
        "total_bytes": sizes["total"],
        "budget_bytes": BUDGET,
        "val_bpb": best.bpb,
        "val_bpb_kind": best.kind,
        "files": files,
    }
