"""The charts of a report, as SVG.

Knows nothing of the page they stand on.
"""

from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mezzotint.errors import CheckpointError
from mezzotint.scoring import kinds
from mezzotint.scoring.rates import RateBin
from mezzotint.scoring.statistics import Estimate

# Colours that stand for the page's CSS variables, so that the charts follow the reader's light or dark scheme.
INK, MUTED, GRID = "#010203", "#040506", "#070809"
SERIES = tuple(f"#0a0b{12 + i:02x}" for i in range(7))
_VARIABLES = {INK: "ink", MUTED: "muted", GRID: "grid", **{color: f"s{i}" for i, color in enumerate(SERIES)}}


def comparison(kind: str) -> tuple[bool, str]:
    """Whether a figure of this kind may stand beside an autoregressive model's bits per byte, and in what words."""
    if kind == kinds.EXACT:
        return True, "yes"
    if kind == kinds.UPPER_BOUND:
        return True, "yes, as a bound from above"
    return False, "no"


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

    Steps that drew some mask rates only show the mean cross-entropy of those, steps of next tokens only that of these, steps
    of a sampled softmax what that gives.
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
    for key, label in (
        ("train_narrow_bpb", "narrowed mask rates"),
        ("train_sampled_bpb", "sampled softmax"),
        ("train_causal_bpb", "next tokens only"),
    ):
        other = [r for r in rows if isinstance(r.get(key), (int, float))]
        if other:
            axes.plot([r["step"] for r in other], [r[key] for r in other], ".", color=MUTED, markersize=3,
                      alpha=0.5, label=f"training text, {label}")  # fmt: skip
    for key, label, style in (
        ("val_nelbo_bpb", "validation text", "o-"),
        ("val_causal_bpb", "validation text, next tokens", "s--"),
    ):
        scored = [r for r in rows if isinstance(r.get(key), (int, float))]
        if scored:
            axes.plot([r["step"] for r in scored], [r[key] for r in scored], style, color=SERIES[2],
                      markersize=4, label=label)  # fmt: skip
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


def bytes_by_group(contents: dict[str, Any]) -> dict[str, dict[str, int]]:
    """An artifact's bytes by place and part: {place: {part: bytes}}, every byte of the file exactly once.

    Places are `embedding`s, `layer i`, `other tensors` and `file` (header, tokenizer, tables, digest). Where tensors
    are compressed together, their bytes are shares of the common stream.
    """
    tensors = contents["tensors"]
    sections = dict(contents["sections"])
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
    places["file"] = {"rest": contents["bytes"] - sum(sum(parts.values()) for parts in places.values())}
    return places


def bytes_chart(contents: dict[str, Any]) -> str:
    """Where an artifact's bytes are: one stacked bar for each layer and other place. SVG."""
    places = bytes_by_group(contents)
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
