"""A model card's figures (extra `hub`): in its metadata, as a model-index that the Hub reads, and in a table for people.

Each figure carries its kind, standard error, tokens and bytes. Knows nothing of how figures are measured.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mezzotint.errors import ConfigError, DataError
from mezzotint.files import atomic_write
from mezzotint.scoring.statistics import Estimate

try:
    from huggingface_hub import EvalResult, ModelCard, ModelCardData
except ImportError as error:
    raise ConfigError("model cards are written by the Hub's client: pip install 'mezzotint[hub]'") from error


Figure = Estimate | Mapping[str, Any]
"""An Estimate, or one of the `results` that `mezzotint score --json` prints."""
METRIC = "bits_per_byte"
BEGIN, END = "<!-- figures of mezzotint -->", "<!-- end of figures -->"
NOTE = """\
Bits per byte of the original UTF-8 text, measured with [Mezzotint](https://pypi.org/project/mezzotint/). `exact` is a code
length; an `upper bound` and a `lower bound` are those of one from above and below; what is `not a bound` is no likelihood,
and `not a code length` is a figure of text that the tokenizer changed.
"""


def _plain(figure: Figure) -> dict[str, Any]:
    return figure.to_dict() if isinstance(figure, Estimate) else dict(figure)


def _known(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def results(
    figures: Sequence[Figure], dataset: str, split: str, conditions: Mapping[str, Any] | None = None
) -> list[EvalResult]:
    """The model card's model-index: a metric each, with what makes it comparable as its arguments.

    conditions: more arguments, such as the window. Raises DataError for a figure that is no number.
    """
    found = []
    for figure in map(_plain, figures):
        if not _known(figure["bpb"]):
            raise DataError(f"the figure of {figure['method']} is no number: it does not go on a model card")
        arguments = {
            "method": figure["method"],
            "kind": figure["kind"],
            "standard_error": figure["stderr_bpb"] if _known(figure.get("stderr_bpb")) else "unknown",
            **{key: figure[key] for key in ("tokens", "bytes", "bytes_lost", "seed") if key in figure},
            **(conditions or {}),
        }
        found.append(
            EvalResult(
                task_type="text-generation",
                # The client takes data sets of one type and split for the same, whatever their names.
                dataset_type=re.sub("[^a-z0-9._/-]+", "-", dataset.lower()).strip("-") or "text",
                dataset_name=dataset,
                dataset_split=split,
                metric_type=METRIC,
                metric_name=f"{figure['method']}, bits per byte ({figure['kind']})",
                metric_value=figure["bpb"],
                metric_args=arguments,
            )
        )
    return found


def table(figures: Sequence[Figure]) -> str:
    """The figures as Markdown."""
    if not figures:
        return "None were given with this upload."
    rows = ["| method | kind | bits per byte | standard error | tokens |", "| --- | --- | ---: | ---: | ---: |"]
    for figure in map(_plain, figures):
        error = f"{figure['stderr_bpb']:.4f}" if _known(figure.get("stderr_bpb")) else "unknown"
        rows.append(f"| {figure['method']} | {figure['kind']} | {figure['bpb']:.4f} | {error} | {figure['tokens']:,} |")
    return "\n".join(rows)


def _by_dataset(known: Sequence[EvalResult]) -> str:
    """All figures of this package on a card as Markdown, a table each data set."""
    parts = []
    for title in dict.fromkeys((r.dataset_name, r.dataset_split) for r in known):
        rows = [
            {"method": a["method"], "kind": a["kind"], "bpb": r.metric_value, "stderr_bpb": a["standard_error"],
             "tokens": a["tokens"]}
            for r in known if (r.dataset_name, r.dataset_split) == title and (a := r.metric_args)
        ]  # fmt: skip
        parts.append(f"### {title[0]}, {title[1]}\n\n{table(rows)}\n")
    return "\n".join(parts)


def _ours(result: EvalResult) -> bool:
    arguments = result.metric_args or {}
    return result.metric_type == METRIC and {"method", "kind", "standard_error", "tokens"} <= arguments.keys()


def _measured(result: EvalResult) -> tuple[Any, ...]:
    """What a figure is of: a later one of the same replaces it."""
    arguments = result.metric_args or {}
    return result.dataset_name, result.dataset_split, arguments.get("method"), arguments.get("stride")


def read_card(path: Path | str, name: str, library: str) -> ModelCard:
    """The card of `path`, a fresh one where there is none. name, library: of a fresh one. Raises DataError."""
    try:
        text = Path(path).read_bytes().decode() if Path(path).exists() else f"# {name}\n"
        if not text.startswith("---"):
            text = f"---\nlibrary_name: {library}\n---\n\n{text}"
        return ModelCard(text)
    except Exception as error:  # the client raises what its YAML parser does
        reason = " ".join(str(error).split())[:160]
        raise DataError(f"{path} is no model card whose metadata can be read: {reason}") from error


def write_figures(
    path: Path | str,
    figures: Sequence[Figure],
    *,
    dataset: str = "held-out text",
    split: str = "validation",
    conditions: Mapping[str, Any] | None = None,
    name: str = "model",
    library: str = "mezzotint",
) -> None:
    """Put figures into the model card `path`, a README.md with metadata, which is made if it is not there.

    Figures of the same method on the same data set and split, with the same `stride` in their conditions, are replaced; all
    else on the card stays, other people's results among it. conditions: see `results`. name, library: of a card that has
    none. Raises DataError if the card cannot be read or a figure is no number; the card is then as it was.
    """
    fresh = results(figures, dataset, split, conditions)
    card = read_card(path, name, library)
    data: ModelCardData = card.data  # type: ignore[assignment]
    replaced = {_measured(result) for result in fresh}
    kept = [r for r in data.eval_results or [] if not (_ours(r) and _measured(r) in replaced)]
    data.eval_results = [*kept, *fresh]
    data.model_name = data.model_name or name
    section = f"{BEGIN}\n## Likelihood\n\n{_by_dataset([r for r in data.eval_results if _ours(r)])}\n{NOTE}{END}"
    body = card.text
    old = re.compile(f"{re.escape(BEGIN)}.*?{re.escape(END)}", re.DOTALL)
    body = old.sub(lambda _: section, body, count=1) if old.search(body) else f"{body.rstrip()}\n\n{section}\n"
    card.text = body
    atomic_write(Path(path), str(card))
