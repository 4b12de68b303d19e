"""The HTML report of a run: loss curve, cross-entropy against mask rate, bytes per tensor, scores, samples, gaps.

One self-contained file with inline SVG; it loads nothing, and a content policy in it forbids that it could. Knows how
to draw and lay out; scores, samples and artifact tables come from the modules that own them.
"""

from __future__ import annotations

import dataclasses
import importlib.resources
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

import mezzotint
from mezzotint.apps.charts import bytes_chart, comparison, loss_chart, rate_chart, read_metrics
from mezzotint.config import ModelConfig, TrainConfig
from mezzotint.data.dataset import Dataset, Windows
from mezzotint.data.tokenizer import check_same_tokenizer
from mezzotint.files import atomic_write
from mezzotint.network.model import Model, count_parameters
from mezzotint.packing.artifact import BUDGET, inspect_artifact, open_artifact
from mezzotint.progress import OnProgress, Progress, silent
from mezzotint.sampling.denoise import denoise
from mezzotint.sampling.generate import sample
from mezzotint.scoring import kinds, likelihood
from mezzotint.scoring.rates import RateBin, mask_rate_curve
from mezzotint.scoring.statistics import Estimate
from mezzotint.training.checkpoint import load_run, read_run, split_run


def _clean(text: str) -> str:
    """Control characters, which a page cannot show, as U+FFFD."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f]", "\ufffd", text)


def _text(model: Model, ids: Any) -> bytes:
    return model.tokenizer.decode_bytes([int(i) for i in ids])


def filled_gaps(model: Model, windows: Windows, count: int = 2, seed: int = 0) -> list[dict[str, str]]:
    """Fill a hidden stretch (an eighth, at least 4 tokens) in the middle of `count` evenly spaced windows.

    Returns `before`, `filled`, `after`, `original` for each, with the windows cut to a readable length.
    """
    gaps = []
    full = [i for i in range(len(windows)) if len(windows[i]) >= 16]
    for j in range(min(count, len(full))):
        ids = np.asarray(windows[full[(2 * j + 1) * len(full) // (2 * count)]])[:160]
        start = len(ids) // 2 - max(2, len(ids) // 16)
        stop = start + max(4, len(ids) // 8)
        canvas = torch.from_numpy(ids.astype(np.int64))[None].clone()
        canvas[0, start:stop] = model.config.mask_id
        done = denoise(model, canvas, seed=seed + j).ids[0].cpu().numpy()
        # Ids are decoded from the window's start and cut by length: a piece's leading space depends on its left.
        head, original = len(_text(model, ids[:start])), len(_text(model, ids[:stop]))
        filled = len(_text(model, done[:stop]))
        parts = {
            "before": _text(model, ids)[:head],
            "filled": _text(model, done)[head:filled],
            "after": _text(model, ids)[original:],
            "original": _text(model, ids)[head:original],
        }
        gaps.append({name: _clean(part.decode("utf-8", "replace")) for name, part in parts.items()})
    return gaps


def _settings(name: str, config: ModelConfig | TrainConfig) -> dict[str, Any]:
    rows = [(f.name, getattr(config, f.name), f.metadata.get("help", "")) for f in dataclasses.fields(config)]
    return {"name": name, "rows": rows}


def _tensor_table(contents: dict[str, Any]) -> dict[str, Any]:
    rows = [
        (t["name"], " × ".join(map(str, t["shape"])), t["codec"], f"{t['bytes']:,}", f"{t['bits_per_weight']:.2f}",
         f"{100 * t['zeros']:.1f}%")
        for t in contents["tensors"]
    ]  # fmt: skip
    rows += [(name, "", "", f"{size:,}", "", "") for name, size in contents["sections"].items()]
    heads = ("tensor or section", "shape", "codec", "bytes", "bits per weight", "zeros")
    return {"summary": f"All {len(contents['tensors'])} tensors", "heads": heads, "rows": rows}


def _duration(seconds: float) -> str:
    return f"{seconds / 60:.1f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"


@dataclass
class _Shown:
    """What a report shows. rows: of metrics.jsonl; contents: of the artifact, if there is one; sampling: how texts were drawn."""

    model: Model
    rows: list[dict[str, Any]]
    contents: dict[str, Any] | None
    estimates: list[Estimate]
    curve: list[RateBin] = field(default_factory=list)
    gaps: list[dict[str, str]] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    sampling: str = ""

    @property
    def bound(self) -> Estimate | None:
        """The NELBO, where it is a bound."""
        bounds = (e for e in self.estimates if e.method.startswith("nelbo") and e.kind == kinds.UPPER_BOUND)
        return next(bounds, None)


def _measure(shown: _Shown, dataset: Dataset, tokens: int | None, seed: int, tell: OnProgress) -> None:
    """Add what validation text shows: the NELBO unless it is there, the mask-rate curve and filled gaps."""
    model = shown.model
    check_same_tokenizer(model, dataset)
    windows = dataset.split("val").windows(model.config.sequence_length)
    if not any(e.method.startswith("nelbo") for e in shown.estimates):
        tell(Progress("scoring"))
        shown.estimates.insert(0, likelihood.nelbo(model, windows, tokens=tokens, seed=seed))
    if not model.block_size:  # a model of blocks has not learnt masks that see both sides
        tell(Progress("measuring cross-entropy against mask rate"))
        shown.curve = mask_rate_curve(model, windows, tokens=tokens, repeats=4, seed=seed)
        tell(Progress("filling gaps"))
        shown.gaps = filled_gaps(model, windows, seed=seed)


def _tiles(shown: _Shown) -> list[dict[str, str]]:
    """The figures at the top of the page."""
    contents, tiles = shown.contents, []
    if shown.bound is not None:
        tiles.append((f"≤ {shown.bound.bpb:.3f}", "bits per byte of validation text (NELBO)"))
    exact = next((e for e in shown.estimates if e.kind == kinds.EXACT), None)
    if exact is not None:
        tiles.append((f"{exact.bpb:.3f}", f"bits per byte, exact ({exact.method})"))
    if contents is not None:
        tiles.append((f"{contents['bytes']:,}", f"bytes in the artifact, of {BUDGET:,} allowed"))
    tiles.append((f"{count_parameters(shown.model.network):,}", "parameters"))
    if contents is not None:
        tiles.append((f"{contents['bits_per_parameter']:.2f}", "bits per parameter, everything counted"))
    if shown.rows:
        last = shown.rows[-1]
        tiles.append((f"{last['step']:,}", f"steps in {_duration(float(last.get('seconds', 0)))}"))
        tiles.append((f"{last.get('tokens', 0):,}", "tokens read"))
    return [{"value": value, "label": label} for value, label in tiles]


def _score(e: Estimate) -> dict[str, Any]:
    """A row of the table of scores."""
    comparable, sentence = comparison(e.kind)
    error = f"{e.stderr_bpb:.4f}" if math.isfinite(e.stderr_bpb) else "unknown"
    return {"method": e.method, "kind": e.kind, "bpb": f"{e.bpb:.4f}", "stderr": error, "tokens": f"{e.tokens:,}",
            "comparable": comparable, "comparison": sentence}  # fmt: skip


def _charts(shown: _Shown) -> list[dict[str, Any]]:
    """Title, note, SVG and table of each chart that there are figures for."""
    from markupsafe import Markup

    curve, contents = shown.curve, shown.contents
    charts = []
    if any(isinstance(r.get("train_nelbo_bpb"), (int, float)) for r in shown.rows):
        charts.append({
            "title": "Loss",
            "note": "The curve is the NELBO of the masked windows of each step: the same quantity as the score below, on "
            "training text.",
            "svg": Markup(loss_chart(shown.rows, shown.bound)),
        })  # fmt: skip
    if curve:
        mean = sum(b.bpb for b in curve) / len(curve)
        charts.append({
            "title": "Cross-entropy against mask rate",
            "note": f"How hard a hidden token is when so much of its window is hidden. The mean height, {mean:.3f} bits "
            "per byte, is the NELBO, but for chance in the masks drawn; whiskers are 95% intervals.",
            "svg": Markup(rate_chart(curve)),
            "table": {
                "summary": "The numbers",
                "heads": ("share hidden", "bits per byte", "± standard error", "nats per token", "masks"),
                "rows": [(f"{b.low:.0%} to {b.high:.0%}", f"{b.bpb:.4f}", f"{b.stderr_bpb:.4f}",
                          f"{b.nats_per_token:.4f}", b.masks) for b in curve],
            },
        })  # fmt: skip
    if contents is not None:
        charts.append({
            "title": "Bytes per tensor",
            "note": f"All {contents['bytes']:,} bytes of the artifact, layer by layer.",
            "svg": Markup(bytes_chart(contents)),
            "table": _tensor_table(contents),
        })  # fmt: skip
    return charts


def _provenance(weights: str, contents: dict[str, Any] | None, commit: str | None) -> list[str]:
    lines = [f"Weights: {weights}."]
    if contents is not None:
        lines.append(f"SHA-256 of the artifact: {contents['sha256']}")
    if commit:
        lines.append(f"Trained at commit {commit}")
    return lines


def _template() -> Any:
    import jinja2

    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    return environment.from_string(
        importlib.resources.files("mezzotint.apps").joinpath("report.html").read_text("utf-8")
    )


def report(
    run: Path | str,
    out: Path | str,
    *,
    artifact: Path | str | None = None,
    dataset: Dataset | None = None,
    estimates: Sequence[Estimate] = (),
    tokens: int | None = 32_768,
    samples: int = 3,
    seed: int = 0,
    progress: OnProgress | None = None,
) -> dict[str, Any]:
    """Write the report of a run folder to `out`, one HTML file.

    artifact: the packed model; adds the bytes per tensor, and the figures and texts are then the artifact's rather than
    the run's. dataset: adds validation figures, the mask-rate chart and filled gaps; its NELBO is scored on about
    `tokens` tokens unless `estimates` already holds one. samples: texts from nothing (0: none). seed: of
    masks and samples. progress: told in words.

    Returns `file`, `bytes`, `sections` (the titles of what is in it). Raises CheckpointError, ArtifactError, DataError
    and OSError; `out` is then untouched.
    """
    tell = progress or silent
    run, out = Path(run), Path(out)
    run_config = read_run(run)
    rows = read_metrics(split_run(run)[0])
    contents = inspect_artifact(Path(artifact)) if artifact is not None else None
    model = open_artifact(artifact) if artifact is not None else load_run(run)
    shown = _Shown(model, rows, contents, list(estimates))
    if dataset is not None:
        _measure(shown, dataset, tokens, seed, tell)
    if samples:
        tell(Progress("sampling"))
        drawn = sample(model, samples, seed=seed)
        shown.texts = [_clean(text) for text in drawn.texts]
        shown.sampling = f"{drawn.forward_passes} forward passes, seed {seed}"
    charts = _charts(shown)
    weights = Path(artifact).name if artifact is not None else "the averaged weights of the run"
    page = _template().render(
        title=run.resolve().name or "run",
        summary=f"A masked-diffusion language model: {model.config.layers} layers, {model.config.width} wide, "
        f"{model.config.vocab_size:,} tokens, windows of {model.config.sequence_length:,}.",
        tiles=_tiles(shown),
        scores=[_score(estimate) for estimate in shown.estimates],
        charts=charts,
        gaps=shown.gaps,
        samples=shown.texts,
        sampling=shown.sampling,
        settings=[_settings("Model", model.config), _settings("Training", run_config["train"])],
        version=mezzotint.__version__,
        provenance=_provenance(weights, contents, run_config.get("commit")),
    )
    tell(Progress("writing"))
    atomic_write(out, page)
    titles = [c["title"] for c in charts] + (["Scores"] if shown.estimates else [])
    titles += (["Filled gaps"] if shown.gaps else []) + (["Samples"] if shown.texts else [])
    return {"file": str(out), "bytes": len(page.encode()), "sections": titles}
