"""How likelihood falls with parameters and tokens: a grid of runs, the law fitted to it, and what it predicts.

    python benchmarks/scaling.py DATA --out DIR [--sizes 3x96 4x128 5x192 6x256] [--tokens 1000000 3000000 9000000]
                                 [--preset small] [--predict PARAMETERS:TOKENS ...] [--seed 0]
                                 [--batch WINDOWS ...] [--device auto]

Every size (LAYERSxWIDTH) is trained from scratch for every number of tokens, as a learning rate that falls to the end
of another run would give another figure, with the recipe of the preset, and scored on the same windows and masks:
NELBO (upper bound), chain and causal (exact), in bits per byte. To each of the three the law of Hoffmann et al. (2022,
"Training compute-optimal large language models", eq. 2 and section D.2) is fitted,

    L(N, D) = E + A / N^alpha + B / D^beta      N: all parameters, D: training tokens, repeated ones counted again,

and its intervals are those of a bootstrap over residuals: they hold the scatter of the runs and of the fit, but not the
choice of the text that is scored, which all runs share, nor the error of a law that bends outside the grid. Longer runs may
have larger steps (`--batch`, one for each of `--tokens`), as a step's best size grows with the run. DIR keeps
`rows.jsonl` (finished runs, which are not made again), `fit.json` and `scaling.svg`. Runs go on where they stopped.
Knows nothing of minutes: what a step costs is for `throughput.py`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from common import Book, new_parser, scores, table, trained
from scipy.optimize import least_squares

from mezzotint.config import Preset, preset
from mezzotint.data.dataset import Dataset
from mezzotint.files import atomic_write
from mezzotint.training import automatic

METRICS = {"nelbo": "NELBO (upper bound)", "chain": "chain (exact)", "causal": "causal (exact)"}
MIN_POINTS = 6  # one more than the law has constants


@dataclass(frozen=True)
class Law:
    """E + A / N^alpha + B / D^beta, in bits per byte; `log_a` and `log_b` are natural logarithms."""

    floor: float
    log_a: float
    alpha: float
    log_b: float
    beta: float

    def __call__(self, parameters: Any, tokens: Any) -> Any:
        """The law at `parameters` and `tokens`, numbers or arrays."""
        n, d = np.log(np.asarray(parameters, float)), np.log(np.asarray(tokens, float))
        return self.floor + np.exp(self.log_a - self.alpha * n) + np.exp(self.log_b - self.beta * d)


def fit(parameters: np.ndarray, tokens: np.ndarray, bits: np.ndarray, start: Law | None = None) -> Law:
    """The law of least Huber loss on log bits (Hoffmann et al. 2022, eq. 3), over several starts or from `start`.

    All arrays [runs]. Constants stay in sensible bounds: the floor between 0 and the best run, exponents within 0..2.
    Raises SystemExit with fewer runs than MIN_POINTS.
    """
    if len(bits) < MIN_POINTS:
        raise SystemExit(
            f"a law of five constants needs at least {MIN_POINTS} runs, not {len(bits)}: more sizes or tokens"
        )
    n, d = np.log(parameters), np.log(tokens)

    def law(x: np.ndarray) -> Law:
        floor, a, alpha, b, beta = x  # a, b: log of what size and tokens cost at the middle of the grid, far less tied
        return Law(float(floor), float(a + alpha * n.mean()), float(alpha), float(b + beta * d.mean()), float(beta))

    def centred(given: Law) -> np.ndarray:
        a, b = given.log_a - given.alpha * n.mean(), given.log_b - given.beta * d.mean()
        return np.array([given.floor, a, given.alpha, b, given.beta])

    low, high = np.array([0.0, -12.0, 0.0, -12.0, 0.0]), np.array([float(bits.min()), 3.0, 2.0, 3.0, 2.0])
    starts = [centred(start)] if start else [
        np.array([share * bits.min(), np.log(0.1 * bits.min()), alpha, np.log(0.1 * bits.min()), beta])
        for share in (0.5, 0.9) for alpha in (0.2, 0.6) for beta in (0.2, 0.6)
    ]  # fmt: skip
    best = None
    for x in starts:
        found = least_squares(
            lambda x: np.log(law(x)(parameters, tokens)) - np.log(bits),
            np.clip(x, low + 1e-9, high - 1e-9), bounds=(low, high), loss="huber", f_scale=0.01, max_nfev=150,
        )  # fmt: skip
        if best is None or found.cost < best.cost:
            best = found
    assert best is not None
    return law(best.x)


def bootstrap(
    law: Law, parameters: np.ndarray, tokens: np.ndarray, bits: np.ndarray, times: int, seed: int
) -> list[Law]:
    """Laws fitted to `law` with its residuals drawn anew: how far chance could have moved it.

    Residuals (of log bits) are scaled by the root of runs over degrees of freedom, as five constants fit part of the
    scatter away.
    """
    predicted = law(parameters, tokens)
    residuals = np.log(bits) - np.log(predicted)
    residuals = (residuals - residuals.mean()) * np.sqrt(len(bits) / max(1, len(bits) - 5))
    rng = np.random.default_rng(seed)
    return [
        fit(parameters, tokens, predicted * np.exp(rng.choice(residuals, len(bits))), start=law) for _ in range(times)
    ]


def interval(values: Sequence[float]) -> tuple[float, float]:
    """The middle 95% of bootstrapped figures."""
    low, high = np.quantile(np.asarray(values), (0.025, 0.975))
    return float(low), float(high)


def sized(base: Preset, size: str, tokens: int, vocab_size: int, seed: int, batch: int = 0) -> Preset:
    """The recipe of `base` for LAYERSxWIDTH and a number of tokens. batch: windows of a step (0: those of `base`)."""
    layers, width = (int(part) for part in size.split("x"))
    model = automatic.sized(base.model, layers, width, vocab_size)
    batch = batch or base.train.batch
    steps = max(1, round(tokens / (batch * model.sequence_length)))
    return Preset(model, dataclasses.replace(base.train, steps=steps, seed=seed, batch=batch))


def measure(dataset: Dataset, size: str, tokens: int, batch: int, options: argparse.Namespace) -> dict[str, Any]:
    """Train and score one point of the grid."""
    recipe = sized(preset(options.preset), size, tokens, dataset.tokenizer.vocab_size, options.seed, batch)
    # On a GPU another length of windows is another graph to compile, and halves cost what whole ones do.
    short = 0.0 if options.device == "cuda" else recipe.train.short_share
    config = dataclasses.replace(recipe.train, compile=not options.eager, device=options.device, short_share=short)
    result, model = trained(options.data, options.out / f"{size}_{tokens}_{options.seed}", Preset(recipe.model, config))
    if options.device != "auto":
        model.network.to(options.device)
    windows = dataset.split("val").windows(model.config.sequence_length)
    found = scores(model, windows, tokens=options.score_tokens, chain_tokens=options.chain_tokens)
    return {**{name: result[name] for name in ("parameters", "tokens", "seconds")}, **found}


def fitted(rows: Sequence[dict[str, Any]], predict: Sequence[tuple[float, float]], times: int) -> dict[str, Any]:
    """The law of each metric that all rows have, its intervals, and its predictions with theirs."""
    n, d = (np.array([r[key] for r in rows], float) for key in ("parameters", "tokens"))
    found: dict[str, Any] = {}
    for metric in METRICS:
        if not all(metric in r for r in rows):
            continue
        bits = np.array([r[metric]["bpb"] for r in rows])
        law = fit(n, d, bits)
        others = bootstrap(law, n, d, bits, times, seed=0)
        found[metric] = {
            "law": dataclasses.asdict(law),
            "interval95": {
                f.name: interval([getattr(o, f.name) for o in others]) for f in dataclasses.fields(Law)
            },
            "largest_residual": float(np.abs(np.log(bits) - np.log(law(n, d))).max()),
            "predictions": [
                {"parameters": p, "tokens": t, "bpb": float(law(p, t)), "interval95": interval([o(p, t) for o in others])}
                for p, t in predict
            ],
        }  # fmt: skip
    return found


def draw(rows: Sequence[dict[str, Any]], found: dict[str, Any], out: Path) -> None:
    """Bits per byte against tokens, a line of the law for each size: `out`, an SVG file."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4 * len(found), 3.6), layout="constrained")
    for axes, (metric, described) in zip(
        np.atleast_1d(figure.subplots(1, len(found), sharey=True)), found.items(), strict=True
    ):
        law = Law(**described["law"])
        for i, n in enumerate(sorted({r["parameters"] for r in rows})):
            points = sorted((r["tokens"], r[metric]["bpb"]) for r in rows if r["parameters"] == n)
            tokens = np.geomspace(points[0][0], points[-1][0], 50)
            axes.plot(tokens, law(n, tokens), color=f"C{i}", linewidth=1)
            axes.plot(*zip(*points, strict=True), "o", color=f"C{i}", label=f"{n / 1e6:.2f}M")
        axes.set(xscale="log", xlabel="training tokens", title=METRICS[metric])
    figure.axes[0].set_ylabel("bits per byte")
    figure.axes[0].legend(title="parameters", fontsize="small")
    figure.savefig(out, format="svg", metadata={"Date": None})


def _pair(text: str) -> tuple[float, float]:
    parameters, _, tokens = text.partition(":")
    return float(parameters), float(tokens)


def main(words: Sequence[str] | None = None) -> None:
    """Parse, run what is missing, fit, print."""
    parser = new_parser(__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="folder for runs, rows, the fit and the plot")
    parser.add_argument("--sizes", nargs="+", default=["3x96", "4x128", "5x192", "6x256"], metavar="LAYERSxWIDTH")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1_000_000, 3_000_000, 9_000_000])
    parser.add_argument("--preset", default="small")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--score-tokens", type=int, default=65_536, help="tokens scored by nelbo and causal [65536]")
    parser.add_argument("--chain-tokens", type=int, default=4_096, help="tokens scored by the chain rule [4096]")
    parser.add_argument("--predict", type=_pair, nargs="+", default=[], metavar="PARAMETERS:TOKENS")
    parser.add_argument("--batch", type=int, nargs="+", metavar="WINDOWS", help="of a step, one for each of --tokens")
    parser.add_argument("--device", default="auto", help="to train and score on [train: auto, score: the CPU]")
    parser.add_argument("--bootstrap", type=int, default=400, help="fits for the intervals [400]")
    parser.add_argument("--eager", action="store_true", help="train without torch.compile")
    options = parser.parse_args(words)
    dataset = Dataset.open(options.data)
    batches = options.batch or [0] * len(options.tokens)
    if len(batches) != len(options.tokens):
        raise SystemExit(f"{len(batches)} batches for {len(options.tokens)} numbers of tokens: one for each")
    book, rows = Book(options.out / "rows.jsonl"), []
    for tokens, batch in sorted(zip(options.tokens, batches, strict=True)):
        for size in options.sizes:
            key = {"size": size, "asked": tokens, "seed": options.seed, "preset": options.preset}
            key |= {"batch": batch} if batch else {}
            row = book.get(
                lambda size=size, tokens=tokens, batch=batch: measure(dataset, size, tokens, batch, options), **key
            )
            rows.append(row)
            bits = ", ".join(f"{m} {row[m]['bpb']:.3f}" for m in METRICS if m in row)
            print(f"{size}, {row['parameters']:,} parameters, {row['tokens']:,} tokens: {bits}", flush=True)
    found = fitted(rows, options.predict, options.bootstrap)
    atomic_write(options.out / "fit.json", json.dumps(found, indent=1))
    draw(rows, found, options.out / "scaling.svg")
    cells = []
    for metric, described in found.items():
        constants = [(described["law"][name], *described["interval95"][name]) for name in ("floor", "alpha", "beta")]
        cells.append([METRICS[metric], *(f"{value:.3f} ({low:.3f} to {high:.3f})" for value, low, high in constants)])
    print("\n" + table(["figure", "floor", "alpha", "beta"], cells))
    for metric, described in found.items():
        for p in described["predictions"]:
            low, high = p["interval95"]
            print(f"{METRICS[metric]} of {p['parameters']:,.0f} parameters after {p['tokens']:,.0f} tokens: {p['bpb']:.3f} ({low:.3f} to {high:.3f})")  # fmt: skip


if __name__ == "__main__":
    main()
