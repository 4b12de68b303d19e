"""The record of a run worth keeping: a folder that says what was trained, on what, how, and what came out.

    python benchmarks/record.py RUN MODEL DATA --statement DATA.md --out records/2026-11-23_prose

RUN is the run folder, MODEL the artifact packed from it, DATA its prepared data, DATA.md a statement of where the text
came from and under what terms. Writes config.json, metrics.jsonl, train.log, commands.sh, data.md, figures.json,
samples.md and README.md; figures, samples and fills are of the reopened artifact. Folders of the machine that trained
are replaced by the words RUN and DATA.
"""

from __future__ import annotations

import dataclasses
import json
import shlex
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import new_parser, say, table

from mezzotint.config import PRESETS, ModelConfig, TrainConfig
from mezzotint.data.dataset import Dataset, Windows
from mezzotint.data.tokenizer import check_same_tokenizer
from mezzotint.errors import ArtifactError, CheckpointError, DataError, MezzotintError
from mezzotint.files import atomic_folder
from mezzotint.network.model import Model
from mezzotint.packing.artifact import BUDGET, inspect_artifact, open_artifact
from mezzotint.sampling.generate import sample
from mezzotint.sampling.infill import fill
from mezzotint.scoring import likelihood
from mezzotint.scoring.memorization import memorized
from mezzotint.scoring.statistics import Estimate
from mezzotint.training.checkpoint import read_run

FILLS = (
    "The old ____ was dark.",
    "She opened the door and ____ into the garden.",
    "There was no doubt that the ____ had been there before them.",
    "It was the best of ____, it was the worst of ____.",
    "When the rain stopped, ____. Nobody spoke on the way home.",
    "The first thing he saw was [MASK*8].",
)


def training_command(model: ModelConfig, train: TrainConfig) -> list[str]:
    """The `mezzotint train` command line with the fewest options that gives these settings."""
    best: list[str] | None = None
    for name, preset in PRESETS.items():
        words = ["mezzotint", "train", "DATA", "--out", "RUN", "--preset", name]
        for ours, theirs in ((model, preset.model), (train, preset.train)):
            for item in dataclasses.fields(ours):
                value = getattr(ours, item.name)
                if item.name == "vocab_size" or (value == getattr(theirs, item.name) and item.name != "minutes"):
                    continue  # the vocabulary is the data's; how long is always said
                option = item.name.replace("_", "-")
                words += (
                    [f"--{'' if value else 'no-'}{option}"] if isinstance(value, bool) else [f"--{option}", f"{value}"]
                )
        if best is None or len(words) < len(best):
            best = words
    assert best is not None
    return best


def measure(
    model: Model, windows: Windows, tokens: int | None, chain_tokens: int | None, seeds: Sequence[int]
) -> list[Estimate]:
    """The NELBO under each seed's masks; the exact scores, which draw nothing, once."""
    estimates = [likelihood.nelbo(model, windows, tokens=tokens, seed=seed) for seed in seeds]
    estimates.append(likelihood.chain_rule(model, windows, tokens=chain_tokens))
    if model.trained_causally:
        estimates.append(likelihood.causal(model, windows, tokens=tokens))
    if chain_tokens != tokens:  # the others on the chain's own windows too, to compare them
        estimates.append(likelihood.nelbo(model, windows, tokens=chain_tokens, seed=seeds[0]))
        if model.trained_causally:
            estimates.append(likelihood.causal(model, windows, tokens=chain_tokens))
    return estimates


def _table(estimates: Sequence[Estimate]) -> str:
    titles = ["method", "kind", "seed", "bits per byte", "standard error", "tokens", "bytes"]
    rows = []
    for e in estimates:
        error = "unknown" if e.to_dict()["stderr_bpb"] is None else e.stderr_bpb
        rows.append([e.method, e.kind, e.seed, e.bpb, error, f"{e.tokens:,}", f"{e.bytes:,}"])
    return table(titles, rows)


def _quoted(text: str) -> str:
    return "\n".join(f"> {line}" for line in text.splitlines() or [""])


def write_samples(model: Model, count: int, length: int | None, seed: int) -> str:
    """Samples and fills as Markdown, none of them chosen."""
    drawn = sample(model, count, length, seed=seed)
    parts = [f"# Samples and fills\n\nAll of seed {seed}, in order, none left out.\n\n## Text from nothing"]
    parts += [f"{i + 1}.\n\n{_quoted(text)}" for i, text in enumerate(drawn.texts)]
    parts.append("## Gaps filled")
    parts += [f"`{text}`\n\n{_quoted(fill(model, text, seed=seed))}" for text in FILLS]
    return "\n\n".join(parts) + "\n"


def _repeated(found: dict[str, Any]) -> str:
    """The memorization check in words."""
    shares = []
    for key in ("sampled", "held_out"):
        share = found[key]
        of = f"of {share['strings']:,} in {share['texts']:,} texts"
        if share["found"]:
            error = "" if share["stderr"] is None else f" ± {share['stderr']:.3%}"
            shares.append(f"{share['share']:.3%}{error} {of}")
        else:  # what can be said is how many texts may still hold one
            shares.append(f"none {of} (with 95% confidence, under {share['upper95']:.1%} of such texts hold one)")
    return f"""
## Word for word

Strings of {found["length"]} bytes that stand in the training text: in texts drawn as `mezzotint sample` draws them,
{shares[0]}; in held-out real text, {shares[1]}.
"""


_UNSEEN = """
## Other sources

The held-out text above may be other passages of the sources that the model was trained on. On text of sources that are
not in the training text at all:

"""


def _readme(
    name: str,
    contents: dict[str, Any],
    estimates: Sequence[Estimate],
    settings: dict[str, Any],
    found: dict[str, Any] | None,
    unseen: Sequence[Estimate] = (),
) -> str:
    most = max(e.tokens for e in estimates)
    bounds = [e.bpb for e in estimates if e.method == "nelbo" and e.tokens == most]
    spread = f"; over {len(bounds)} seeds {min(bounds):.4f} to {max(bounds):.4f}" if len(bounds) > 1 else ""
    config = settings["model"]
    return f"""# {name}

{contents["parameters"]:,} parameters ({config.layers} layers, {config.width} wide, {config.vocab_size:,} tokens, windows of
{config.sequence_length:,}) in {contents["bytes"]:,} of {BUDGET:,} bytes, {contents["bits_per_parameter"]:.3f} bits per parameter.
SHA-256 of the artifact: `{contents["sha256"]}`. Trained at commit `{settings.get("commit") or "unknown"}`.

NELBO {statistics.fmean(bounds):.4f} bits per byte{spread}. All figures are of the reopened artifact, on held-out text:

{_table(estimates)}

Only the NELBO draws masks, so only it has seeds. Standard errors include the choice of windows.
{_UNSEEN + _table(unseen) + chr(10) if unseen else ""}{_repeated(found) if found else ""}
`data.md` says what it was trained on, `commands.sh` how to make it again, `config.json` every setting, `metrics.jsonl` and
`train.log` what happened, `figures.json` these figures with their intervals, `samples.md` what it writes.
"""


def make_record(
    run: Path,
    artifact: Path,
    data: Path,
    out: Path,
    statement: Path,
    *,
    tokens: int | None = 131_072,
    chain_tokens: int | None = 8_192,
    seeds: Sequence[int] = (0, 1, 2),
    samples: int = 4,
    length: int | None = None,
    memorization: int = 0,
    string_bytes: int = 50,
    unseen: Path | None = None,
    say: Any = lambda line: None,
) -> dict[str, Any]:
    """Write the record folder `out`, whole or not at all; returns what figures.json holds.

    memorization: texts to draw for the share of strings of `string_bytes` found in the training text (0: none).
    unseen: prepared text of other sources, whose validation split is scored as well, under the first seed's masks.
    """
    if out.exists():
        raise ArtifactError(f"{out} is already there; records are not overwritten")
    settings, model, dataset = read_run(run), open_artifact(artifact), Dataset.open(data)
    if model.config != settings["model"]:
        raise ArtifactError(f"{artifact} was not packed from {run}: their model settings differ")
    others = None if unseen is None else Dataset.open(unseen)
    for folder, opened in ((data, dataset), (unseen, others)):
        if opened is not None:
            check_same_tokenizer(model, opened, data_name=folder)
    if not statement.is_file():
        raise DataError(f"{statement} does not exist: a record states what its model was trained on")
    for name in ("metrics.jsonl", "train.log"):
        if not (run / name).is_file():
            raise CheckpointError(f"{run} has no {name}, which a record must hold")
    say("scoring")
    windows = dataset.split("val").windows(model.config.sequence_length)
    estimates = measure(model, windows, tokens, chain_tokens, seeds)
    elsewhere: list[Estimate] = []
    if others is not None:
        say("scoring text of other sources")
        there = others.split("val").windows(model.config.sequence_length)
        elsewhere = measure(model, there, tokens, chain_tokens, seeds[:1])
    say("sampling")
    written = write_samples(model, samples, length, 0)
    found = None
    if memorization:
        found = memorized(model, dataset, samples=memorization, length=string_bytes, progress=say)
    contents = inspect_artifact(artifact)
    figures = {
        "model_sha256": contents["sha256"],
        "artifact_bytes": contents["bytes"],
        "parameters": contents["parameters"],
        "bits_per_parameter": contents["bits_per_parameter"],
        "results": [e.to_dict() for e in estimates],
        "unseen": [e.to_dict() for e in elsewhere],
        "memorization": found,
    }
    # Longest first, as one folder may lie in another.
    places = {str(Path(settings.get("data_folder") or data)): "DATA", str(data): "DATA", str(run.resolve()): "RUN"}

    def without_places(text: str) -> str:
        for place in sorted(places, key=len, reverse=True):
            text = text.replace(place, places[place])
        return text

    scoring = ["mezzotint", "score", "MODEL.mzt", "DATA", "--method"]
    some = [] if tokens is None else ["--tokens", str(tokens)]
    few = [] if chain_tokens is None else ["--tokens", str(chain_tokens)]
    lines = [
        training_command(settings["model"], settings["train"]),
        ["mezzotint", "pack", "RUN", "--out", "MODEL.mzt"],
        *([*scoring, "nelbo", *some, "--seed", str(seed)] for seed in seeds),
        [*scoring, "chain", *few],
        *([[*scoring, "causal", *some]] if any(e.method == "causal" for e in estimates) else []),
    ]
    if elsewhere:
        lines += [
            ["UNSEEN" if word == "DATA" else word for word in line] for line in lines[2:3] + lines[2 + len(seeds) :]
        ]
    with atomic_folder(out) as folder:
        for name in ("config.json", "metrics.jsonl", "train.log"):
            (folder / name).write_text(without_places((run / name).read_text("utf-8")), "utf-8")
        (folder / "commands.sh").write_text("\n".join(map(shlex.join, lines)) + "\n", "utf-8")
        (folder / "data.md").write_text(statement.read_text("utf-8"), "utf-8")
        (folder / "figures.json").write_text(json.dumps(figures, indent=1, allow_nan=False) + "\n", "utf-8")
        (folder / "samples.md").write_text(written, "utf-8")
        (folder / "README.md").write_text(_readme(out.name, contents, estimates, settings, found, elsewhere), "utf-8")
    return figures


def _tokens(text: str) -> int | None:
    return None if text == "all" else int(text.replace(",", ""))


def main(words: Sequence[str] | None = None) -> int:
    """Parse, make, print."""
    parser = new_parser(__doc__)
    parser.add_argument("run", type=Path, help="run folder")
    parser.add_argument("model", type=Path, help="the artifact packed from it")
    parser.add_argument("data", type=Path, help="the prepared data it was trained on")
    parser.add_argument("--out", type=Path, required=True, help="folder to write: records/DATE_NAME")
    parser.add_argument("--statement", type=Path, required=True, metavar="FILE.md", help="what the data is")
    parser.add_argument("--tokens", type=_tokens, default=131_072, help="for nelbo and causal, or all [131072]")
    parser.add_argument("--chain-tokens", type=_tokens, default=8_192, help="for chain, or all [8192]")
    parser.add_argument("--samples", type=int, default=4, help="texts from nothing [4]")
    parser.add_argument("--memorization", type=int, default=256, help="texts for the memorization check, or 0 [256]")
    parser.add_argument("--unseen", type=Path, metavar="DATA", help="prepared text of other sources, scored as well")
    options = parser.parse_args(words)
    try:
        figures = make_record(
            options.run, options.model, options.data, options.out, options.statement, tokens=options.tokens,
            chain_tokens=options.chain_tokens, samples=options.samples,
            memorization=options.memorization, unseen=options.unseen, say=say,
        )  # fmt: skip
    except MezzotintError as error:
        print(f"record: {error}", file=sys.stderr)
        return 2
    for row in figures["results"]:
        print(f"{row['method']:8} {row['kind']:12} seed {row['seed']}  {row['bpb']:.4f} bits per byte")
    print(options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
