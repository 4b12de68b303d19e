"""Is one model better than another? Differences that are paired, by window and mask or by document.

Does not know how a side's figure is computed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np

from mezzotint.data.dataset import Windows
from mezzotint.data.texts import TextWindows
from mezzotint.errors import DataError
from mezzotint.network.model import Model
from mezzotint.progress import OnProgress, Progress, silent
from mezzotint.scoring.chain import causal_matrix, chain_matrix
from mezzotint.scoring.nelbo import nelbo_matrix, nelbo_size
from mezzotint.scoring.plan import Scoring
from mezzotint.scoring.statistics import Comparison, Estimate, assemble, student_t_tail


def compare(
    a: Model,
    b: Model,
    windows: Windows,
    *,
    method: str = "nelbo",
    tokens: int | None = None,
    repeats: int = 8,
    seed: int = 0,
    batch: int | None = None,
    progress: OnProgress | None = None,
) -> Comparison:
    """Is model `b` better or worse than model `a` on these windows? Paired: both see the same windows and masks.

    What a mask or window costs both models alike drops out of the difference, so its error is far below that of the
    two figures. method: `nelbo` or `chain` (left to right; exact on the windows scored). Over all windows the error
    is that of the masks; over a subset (`tokens`) that from the choice of windows is added, and the answer is about
    all of them. repeats, seed, batch, progress: see `nelbo`. The NELBO is that of the blocks each model was trained on; masks are the same where the blocks are.
    Raises DataError when the models' tokenizers differ, for an unknown method, or as `nelbo` does.
    """
    if a.tokenizer.sha256 != b.tokenizer.sha256 or a.config.vocab_size != b.config.vocab_size:
        raise DataError("the models have different tokenizers: their masks cannot be paired; compare them by document")
    matrices: list[np.ndarray] = []
    estimates: list[Estimate] = []
    for turn, model in enumerate((a, b)):
        plan = Scoring.make(
            model, windows, tokens=tokens, progress=_half(turn, progress), repeats=repeats, seed=seed, batch=batch
        )
        nats, estimate = _scored(model, plan, method)
        matrices.append(nats)
        estimates.append(estimate)
    _check_finite(estimates)
    difference = assemble(plan, method, "pseudo", matrices[1] - matrices[0], 0)
    return _comparison(difference, estimates)


def _half(turn: int, progress: OnProgress | None) -> OnProgress:
    """What tells of one side's passes (turn: 0 or 1), told on as passes of both."""
    tell = progress or silent
    return lambda side: tell(Progress.nth("pass", turn * side.total + side.done, 2 * side.total))


def _scored(model: Model, plan: Scoring, method: str) -> tuple[np.ndarray, Estimate]:
    """Nats [repeats or 1, windows] and the figure of one side."""
    if method == "nelbo":
        nats, name, family = nelbo_matrix(model, plan, nelbo_size(model, plan, None))
        passes = nats.size
    elif method == "chain":
        nats, passes = chain_matrix(model, plan, "left", "full")
        name = family = method
    elif method == "causal":
        nats, name, family = causal_matrix(model, plan), method, method
        passes = len(plan.chosen)
    else:
        raise DataError(f"unknown method {method!r}: models are compared by nelbo or chain")
    return nats, assemble(plan, name, family, nats, passes)


def _check_finite(sides: Sequence[Estimate]) -> None:
    for name, side in zip("AB", sides, strict=True):
        if not math.isfinite(side.bpb):
            raise DataError(f"model {name} gives some of the text no probability at all: the difference is no number")


def _comparison(difference: Estimate, sides: Sequence[Estimate]) -> Comparison:
    if difference.stderr_bpb:
        p_value = student_t_tail(difference.bpb / difference.stderr_bpb, difference.degrees_of_freedom)
    else:
        p_value = float(difference.bpb == 0)
    return Comparison(
        difference_bpb=difference.bpb,
        stderr_bpb=difference.stderr_bpb,
        p_value=p_value,
        degrees_of_freedom=difference.degrees_of_freedom,
        mask_stderr_bpb=difference.mask_stderr_bpb,
        window_stderr_bpb=difference.window_stderr_bpb,
        a=sides[0],
        b=sides[1],
    )


def compare_documents(
    a: Model,
    b: Model,
    texts: Iterable[str],
    *,
    method: str = "nelbo",
    stride: int | None = None,
    repeats: int = 8,
    seed: int = 0,
    batch: int | None = None,
    progress: OnProgress | None = None,
) -> Comparison:
    """Is model `b` better or worse than model `a` on these documents? For models of different tokenizers.

    texts: the documents. stride: tokens by which windows of a long document move on, see `TextWindows`. repeats, seed, batch,
    progress: see `nelbo`. Both figures are bits per byte of the same text, each document scored apart behind a BOS that is given. method:
    `nelbo`, which is next tokens for a model of next tokens, or `chain-or-causal`, exact for both sides. The documents
    are a sample of all there might be: the standard error is that of the ratio of their differences to their bytes
    (Cochran 1977, eq. 6.13, without the finite-population factor), by Student's t, and masks are in it.
    Raises DataError for fewer than 2 documents with a token.
    """
    documents = list(texts)
    parts: list[np.ndarray] = []
    estimates: list[Estimate] = []
    for turn, model in enumerate((a, b)):
        one = ["chain", "causal"][model.block_size == 1] if method == "chain-or-causal" else method
        nats_of = np.zeros(len(documents))
        windows = TextWindows(documents, model.tokenizer, model.config.sequence_length, stride)
        plan = Scoring.make(
            model, windows, tokens=None, progress=_half(turn, progress), repeats=repeats, seed=seed, batch=batch
        )
        nats, estimate = _scored(model, plan, one)
        np.add.at(nats_of, [windows.document(i) for i in plan.chosen], nats.mean(axis=0))
        parts.append(nats_of)
        estimates.append(estimate)
    sizes = np.array([len(text.encode()) for text in documents], dtype=np.float64)
    kept = sizes > 0
    n = int(kept.sum())
    if n < 2:
        raise DataError("a comparison by document needs at least 2 documents")
    if any(e.bytes != sizes.sum() for e in estimates):
        raise DataError("a document has no token for one of the models: leave it out")
    _check_finite(estimates)
    difference, total = (parts[1] - parts[0])[kept], float(sizes.sum())
    residual = difference - difference.sum() / total * sizes[kept]
    error = math.sqrt(n / (n - 1) * float(residual @ residual)) / total / math.log(2)
    bpb = float(difference.sum()) / total / math.log(2)
    p_value = student_t_tail(bpb / error, n - 1) if error else float(bpb == 0)
    return Comparison(bpb, error, p_value, n - 1, math.nan, error, estimates[0], estimates[1])
