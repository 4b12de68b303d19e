"""The HTML report of a run: loss curve, cross-entropy against mask rate, bytes per tensor, scores, samples, gaps.

One self-contained file with inline SVG; it loads nothing, and a content policy in it forbids that it could. Knows how
to draw and lay out; scores, samples and artifact tables come from the modules that own them.
"""

from __future__ import annotations

import dataclasses
import importlib.resources
import io
import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import mezzotint
from mezzotint import evaluate
from mezzotint.artifact import BUDGET, inspect_artifact, open_artifact
from mezzotint.config import ModelConfig, TrainConfig
from mezzotint.data import Dataset, Windows
from mezzotint.errors import CheckpointError, DataError
from mezzotint.evaluate import Estimate
from mezzotint.files import atomic_write
from mezzotint.model import Model, count_parameters
from mezzotint.sample import denoise, sample
from mezzotint.train import load_run, read_run

Progress = Callable[[str], None]

# Colours that stand for the page's CSS variables, so that the charts follow the reader's light or dark scheme.
INK, MUTED, GRID = "#010203", "#040506", "#070809"
SERIES = tuple(f"#0a0b{12 + i:02x}" for i in range(7))
_VARIABLES = {INK: "ink", MUTED: "muted", GRID: "grid", **{color: f"s{i}" for i, color in enumerate(SERIES)}}


def comparison(kind: str) -> tuple[bool, str]:
    """Whether a figure of this kind may stand beside an autoregressive model's bits per byte, and in what words."""
    if kind == evaluate.EXACT:
        return True, "yes"
    if kind == evaluate.UPPER_BOUND:
        return True, "yes, as a bound from above"
    return False, "no"


@dataclass(frozen=True)
class RateBin:
    """Mean cross-entropy over masks whose rate lies in (low, high]. bpb is scaled so that the bins' mean is the NELBO
    where bins hold equally many mask counts."""

    low: float
    high: float
    nats_per_token: float
    bpb: float
    stderr_bpb: float
    masks: int


def mask_rate_curve(
    model: Model,
    windows: Windows,
    *,
    tokens: int | None = None,
    bins: int = 10,
    repeats: int = 8,
    seed: int = 0,
) -> list[RateBin]:
    """Cross-entropy of a hidden token, by the share of its window that is hidden: the NELBO's integrand.

    NELBO per token = E_k[mean masked NLL at k of T] (objective.py), so the curve's area is the NELBO. Masks are those
    that `evaluate.nelbo` draws for the same seed. Empty bins are left out. Raises DataError if there is nothing to
    score.
    """
    chosen = evaluate.choose_windows(windows, tokens)
    rates: list[float] = []

    def passes() -> Any:
        for repeat in range(repeats):
            for item, k in evaluate.nelbo_passes(windows, chosen, model.config.mask_id, seed, repeat):
                rates.append(k / len(item.ids))
                yield item

    means = [float(nll.sum()) for nll in evaluate.run_passes(model, passes())]
    lengths = np.array([len(windows[i]) for i in chosen] * repeats)
    share = np.array(rates)
    nats = np.array(means) / np.rint(share * lengths)
    size = sum(windows.byte_count(i) for i in chosen)
    if size == 0:
        raise DataError("the windows to score stand for no bytes of text: nothing to divide by")
    scale = len(chosen) * float(lengths.mean()) / size / math.log(2)
    found = []
    for b in range(bins):
        inside = nats[(share > b / bins) & (share <= (b + 1) / bins)]
        if len(inside):
            error = float(inside.std(ddof=1)) / math.sqrt(len(inside)) if len(inside) > 1 else math.nan
            mean = float(inside.mean())
            found.append(RateBin(b / bins, (b + 1) / bins, mean, mean * scale, error * scale, len(inside)))
    return found


# --- the run's own files --------------------------------------------------------------------------------------------


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """Rows of metrics.jsonl; a last line cut short by a crash is left out. Raises CheckpointError if it is missing."""
    try:
        lines = (Path(run) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise CheckpointError(f"{run} has no metrics.jsonl to draw ({error.strerror}); is it a run folder?") from error
    rows = []
    for number, line in enumerate(lines):
        try:
            row = json.loads(line)
            if not isinstance(row, dict) or not isinstance(row.get("step"), int):
                raise ValueError
        except ValueError as error:
            if number == len(lines) - 1:
                break
            raise CheckpointError(f"{run}/metrics.jsonl, line {number + 1}, is not a metrics row") from error
        rows.append(row)
    return rows


# --- charts ---------------------------------------------------------------------------------------------------------


def _figure(width: float, height: float) -> tuple[Any, Any]:
    from matplotlib.figure import Figure  # not pyplot: no window system, no global state

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.tick_params(colors=MUTED, length=0, labelsize=9)
    for side in axes.spines.values():
        side.set_visible(False)
    axes.grid(color=GRID, linewidth=1)
    axes.set_axisbelow(True)
    return figure, axes


def _svg(figure: Any, name: str) -> str:
    """The figure as an SVG element: text as text, colours as CSS variables, no prologue, no metadata."""
    from matplotlib import rc_context

    out = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = out.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"font-family: [^;\"]*(?:'[^']*'[^;\"]*)*", "font-family: system-ui, sans-serif", text)
    text = re.sub(r"(font: [^;\"]*?px) [^;\"]*", r"\1 system-ui, sans-serif", text)
    for color, variable in _VARIABLES.items():
        text = text.replace(color, f"var(--{variable})")
    # ids are the same in every matplotlib figure; several figures share this page
    text = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', text)
    return re.sub(r'(href="#|url\(#)', rf"\g<1>{name}-", text)


def loss_chart(rows: Sequence[dict[str, Any]], validation: Estimate | None = None) -> str:
    """Training NELBO against step: each logged mean, a running mean, and the final validation NELBO. SVG.

    Steps that drew some mask rates only show the mean cross-entropy of those, steps of next tokens only that of these.
    """
    drawn = [r for r in rows if isinstance(r.get("train_nelbo_bpb"), (int, float))]
    steps = np.array([r["step"] for r in drawn], dtype=float)
    values = np.array([r["train_nelbo_bpb"] for r in drawn], dtype=float)
    smooth = np.empty_like(values)
    half = max(1, len(values) // 40)
    for i in range(len(values)):
        smooth[i] = values[max(0, i - half) : i + half + 1].mean()
    figure, axes = _figure(8.6, 3.3)
    axes.plot(steps, values, ".", color=SERIES[1], markersize=4, alpha=0.6, label="training text, mean since last row")
    axes.plot(steps, smooth, color=SERIES[0], linewidth=2, label="running mean")
    for key, label in (("train_narrow_bpb", "narrowed mask rates"), ("train_causal_bpb", "next tokens only")):
        other = [r for r in rows if isinstance(r.get(key), (int, float))]
        if other:
            axes.plot([r["step"] for r in other], [r[key] for r in other], ".", color=MUTED, markersize=3,
                      alpha=0.5, label=f"training text, {label}")  # fmt: skip
    scored = [r for r in rows if isinstance(r.get("val_nelbo_bpb"), (int, float))]
    if scored:
        axes.plot([r["step"] for r in scored], [r["val_nelbo_bpb"] for r in scored], "o-", color=SERIES[2],
                  markersize=4, label="validation text")  # fmt: skip
    if validation is not None:
        axes.axhline(validation.bpb, color=SERIES[2], linewidth=1.4, linestyle=(0, (4, 3)),
                     label=f"validation NELBO, {validation.bpb:.3f}")  # fmt: skip
    axes.set_xlabel("step", color=MUTED)
    axes.set_ylabel("bits per byte", color=MUTED)
    if len(values) > 20:  # the first steps are far above all that follows; do not let them flatten the rest
        low = float(min(values.min(), validation.bpb if validation else math.inf))
        high = float(values[len(values) // 20 :].max())
        axes.set_ylim(low - 0.06 * (high - low), high + 0.06 * (high - low))
    axes.legend(frameon=False, labelcolor=INK, fontsize=9, loc="upper right")
    return _svg(figure, "loss")


def sweep_chart(points: Sequence[dict[str, float]]) -> bytes:
    """Artifact bytes against NELBO of a sweep, with the standard errors of the differences to the unpacked model. PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 4.5), layout="constrained")
    axes = figure.add_subplot()
    sizes = [p["bytes"] / 1e6 for p in points]
    error = [p["cost_stderr_bpb"] for p in points]
    axes.errorbar(sizes, [p["nelbo_bpb"] for p in points], yerr=error, marker="o", capsize=3, label="packed")
    unpacked = points[0]["nelbo_bpb"] - points[0]["cost_bpb"]
    axes.axhline(unpacked, color="grey", linestyle="--", label=f"unpacked, {unpacked:.4f}")
    axes.set(xlabel="artifact, millions of bytes", ylabel="validation NELBO, bits per byte")
    axes.legend(frameon=False)
    axes.grid(alpha=0.3)
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=150, metadata={"Software": None})
    return out.getvalue()


def rate_chart(curve: Sequence[RateBin]) -> str:
    """Cross-entropy against mask rate, in bits per byte; the shaded area's mean height is the NELBO. SVG."""
    figure, axes = _figure(8.6, 3.0)
    middle = [(b.low + b.high) / 2 for b in curve]
    height = [b.bpb for b in curve]
    widths = [0.94 * (b.high - b.low) for b in curve]
    axes.bar(middle, height, width=widths, color=SERIES[3], alpha=0.55, linewidth=0)
    errors = [1.96 * b.stderr_bpb if math.isfinite(b.stderr_bpb) else 0.0 for b in curve]
    axes.errorbar(middle, height, yerr=errors, color=SERIES[2], fmt="o-", markersize=4, linewidth=1.8, capsize=0)
    axes.set_xlim(0, 1)
    axes.set_ylim(0, max(h + e for h, e in zip(height, errors, strict=True)) * 1.08)
    axes.set_xticks([i / 10 for i in range(11)], [f"{10 * i}%" for i in range(11)])
    axes.set_xlabel("share of the window that is hidden", color=MUTED)
    axes.set_ylabel("bits per byte of hidden text", color=MUTED)
    return _svg(figure, "rate")


_PARTS = ("attention.query", "attention.key", "attention.value", "attention.output", "mlp.up", "mlp.down")


def bytes_by_group(looked: dict[str, Any]) -> dict[str, dict[str, int]]:
    """An artifact's bytes by place and part: {place: {part: bytes}}, every byte of the file exactly once.

    Places are `embedding`s, `layer i`, `other tensors` and `file` (header, tokenizer, tables, digest). Where tensors
    are compressed together, their bytes are shares of the common stream.
    """
    tensors = looked["tensors"]
    sections = dict(looked["sections"])
    stored = sections.pop("LZMA stream", None)
    scale = 1.0 if stored is None else stored / max(1, sum(t["bytes"] for t in tensors))
    places: dict[str, dict[str, int]] = {}
    for tensor in tensors:
        name = tensor["name"].removesuffix(".weight")
        found = re.fullmatch(r"blocks\.(\d+)\.(.+)", name)
        if found:
            place, part = f"layer {int(found[1]) + 1}", found[2] if found[2] in _PARTS else "rest"
        elif "embedding" in name:
            place, part = "embeddings", "rest"
        else:
            place, part = "other tensors", "rest"
        group = places.setdefault(place, {})
        group[part] = group.get(part, 0) + round(tensor["bytes"] * scale)
    places["file"] = {"rest": looked["bytes"] - sum(sum(parts.values()) for parts in places.values())}
    return places


def bytes_chart(looked: dict[str, Any]) -> str:
    """Where an artifact's bytes are: one stacked bar for each layer and other place. SVG."""
    places = bytes_by_group(looked)
    labels = {"file": "header, tokenizer, tables"}
    names = list(places)
    figure, axes = _figure(8.6, 0.9 + 0.3 * len(names))
    left = np.zeros(len(names))
    for i, part in enumerate((*_PARTS, "rest")):
        sizes = np.array([places[name].get(part, 0) for name in names], dtype=float)
        if sizes.any():
            label = "everything else" if part == "rest" else part.replace(".", " ")
            axes.barh(range(len(names)), sizes, left=left, color=SERIES[i], height=0.74, label=label, linewidth=0)
            left += sizes
    for i, total in enumerate(left):
        axes.annotate(
            f"{int(total):,}", (total, i), (4, 0), textcoords="offset points", va="center", color=MUTED, fontsize=9
        )
    axes.set_yticks(range(len(names)), [labels.get(name, name) for name in names])
    axes.tick_params(axis="y", labelcolor=INK)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set_xlim(0, float(left.max()) * 1.12)
    axes.xaxis.set_major_formatter(lambda value, _: f"{int(value):,}")
    axes.set_xlabel("bytes", color=MUTED)
    figure.legend(frameon=False, labelcolor=INK, fontsize=9, loc="outside upper center", ncols=7, handlelength=0.9,
                  columnspacing=1.1)  # fmt: skip
    return _svg(figure, "bytes")


# --- the page -------------------------------------------------------------------------------------------------------


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


def _tensor_table(looked: dict[str, Any]) -> dict[str, Any]:
    rows = [
        (t["name"], " × ".join(map(str, t["shape"])), t["codec"], f"{t['bytes']:,}", f"{t['bits_per_weight']:.2f}",
         f"{100 * t['zeros']:.1f}%")
        for t in looked["tensors"]
    ]  # fmt: skip
    rows += [(name, "", "", f"{size:,}", "", "") for name, size in looked["sections"].items()]
    heads = ("tensor or section", "shape", "codec", "bytes", "bits per weight", "zeros")
    return {"summary": f"All {len(looked['tensors'])} tensors", "heads": heads, "rows": rows}


def _duration(seconds: float) -> str:
    return f"{seconds / 60:.1f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"


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
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write the report of a run folder to `out`, one HTML file.

    artifact: the packed model; adds the bytes per tensor, and the figures and texts are then the artifact's rather than
    the run's. dataset: adds validation figures, the mask-rate chart and filled gaps; its NELBO is scored on about
    `tokens` tokens unless `estimates` already holds one. samples: texts from nothing (0: none).

    Returns `file`, `bytes`, `sections` (the titles of what is in it). Raises CheckpointError, ArtifactError, DataError
    and OSError; `out` is then untouched.
    """
    import jinja2
    from markupsafe import Markup

    say = progress or (lambda _: None)
    run, out = Path(run), Path(out)
    described = read_run(run)
    rows = read_metrics(run)
    looked = inspect_artifact(Path(artifact)) if artifact is not None else None
    model = open_artifact(artifact) if artifact is not None else load_run(run)
    estimates = list(estimates)
    curve: list[RateBin] = []
    gaps: list[dict[str, str]] = []
    if dataset is not None:
        if dataset.tokenizer.sha256 != model.tokenizer.sha256:
            raise DataError("this data was prepared with another tokenizer than the model's: use the run's own data")
        windows = dataset.split("val").windows(model.config.sequence_length)
        if not any(e.method.startswith("nelbo") for e in estimates):
            say("scoring")
            estimates.insert(0, evaluate.nelbo(model, windows, tokens=tokens, seed=seed))
        if not model.trained_block_size:  # a model of blocks has not learnt masks that see both sides
            say("measuring cross-entropy against mask rate")
            curve = mask_rate_curve(model, windows, tokens=tokens, repeats=4, seed=seed)
            say("filling gaps")
            gaps = filled_gaps(model, windows, seed=seed)
    texts: list[str] = []
    sampling = ""
    if samples:
        say("sampling")
        drawn = sample(model, samples, seed=seed)
        texts = [_clean(text) for text in drawn.texts]
        sampling = f"{drawn.forward_passes} forward passes, seed {seed}"

    bound = next((e for e in estimates if e.method.startswith("nelbo") and e.kind == evaluate.UPPER_BOUND), None)
    parameters = count_parameters(model.network)
    last = rows[-1] if rows else {}
    tiles = []
    if bound is not None:
        tiles.append({"value": f"≤ {bound.bpb:.3f}", "label": "bits per byte of validation text (NELBO)"})
    exact = next((e for e in estimates if e.kind == evaluate.EXACT), None)
    if exact is not None:
        tiles.append({"value": f"{exact.bpb:.3f}", "label": f"bits per byte, exact ({exact.method})"})
    if looked is not None:
        tiles.append({"value": f"{looked['bytes']:,}", "label": f"bytes in the artifact, of {BUDGET:,} allowed"})
    tiles.append({"value": f"{parameters:,}", "label": "parameters"})
    if looked is not None:
        tiles.append(
            {"value": f"{looked['bits_per_parameter']:.2f}", "label": "bits per parameter, everything counted"}
        )
    if last:
        tiles.append({"value": f"{last['step']:,}", "label": f"steps in {_duration(float(last.get('seconds', 0)))}"})
        tiles.append({"value": f"{last.get('tokens', 0):,}", "label": "tokens read"})

    scores = []
    for e in estimates:
        comparable, words = comparison(e.kind)
        error = f"{e.stderr_bpb:.4f}" if math.isfinite(e.stderr_bpb) else "unknown"
        scores.append({"method": e.method, "kind": e.kind, "bpb": f"{e.bpb:.4f}", "stderr": error,
                       "tokens": f"{e.tokens:,}", "comparable": comparable, "comparison": words})  # fmt: skip

    charts = []
    if any(isinstance(r.get("train_nelbo_bpb"), (int, float)) for r in rows):
        charts.append({
            "title": "Loss",
            "note": "The curve is the NELBO of the masked windows of each step: the same quantity as the score below, on "
            "training text.",
            "svg": Markup(loss_chart(rows, bound)),
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
    if looked is not None:
        charts.append({
            "title": "Bytes per tensor",
            "note": f"All {looked['bytes']:,} bytes of the artifact, layer by layer.",
            "svg": Markup(bytes_chart(looked)),
            "table": _tensor_table(looked),
        })  # fmt: skip

    provenance = [f"Weights: {Path(artifact).name if artifact is not None else 'the averaged weights of the run'}."]
    if looked is not None:
        provenance.append(f"SHA-256 of the artifact: {looked['sha256']}")
    if described.get("commit"):
        provenance.append(f"Trained at commit {described['commit']}")
    config = model.config
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    template = environment.from_string(
        importlib.resources.files("mezzotint").joinpath("report.html").read_text("utf-8")
    )
    page = template.render(
        title=run.resolve().name or "run",
        summary=f"A masked-diffusion language model: {config.layers} layers, {config.width} wide, "
        f"{config.vocab_size:,} tokens, windows of {config.sequence_length:,}.",
        tiles=tiles,
        scores=scores,
        charts=charts,
        gaps=gaps,
        samples=texts,
        sampling=sampling,
        settings=[_settings("Model", config), _settings("Training", described["train"])],
        version=mezzotint.__version__,
        provenance=provenance,
    )
    say("writing")
    atomic_write(out, page)
    titles = [c["title"] for c in charts] + (["Scores"] if scores else [])
    titles += (["Filled gaps"] if gaps else []) + (["Samples"] if texts else [])
    return {"file": str(out), "bytes": len(page.encode()), "sections": titles}
