"""Likelihood of a model on windows of tokens: what is exact, what is a bound, what is neither, and how sure.

Scores anything that maps a canvas to logits (`Model.logits`), so a network in training and a reopened artifact are
scored alike. Does not know how models are trained or stored, or where windows come from. Bits per byte divide by the
bytes that `data` charges to the windows. Sums are float64.

Two things can be random in a score. Masks: the NELBO draws them. Windows: with `tokens` only some windows are scored;
they are evenly spaced and the same for every method and seed, so figures on the same `tokens` compare window by
window. `Estimate` reports both errors apart and together.
"""

from __future__ import annotations

import dataclasses
import math
import re
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mezzotint import seeding
from mezzotint.config import parse_attention
from mezzotint.data.dataset import Windows
from mezzotint.errors import DataError
from mezzotint.model import TOKENS_PER_FORWARD, Model
from mezzotint.objective import block_lengths, mask_by_count, masked_nll, nelbo_per_window, stratified_counts
from mezzotint.scoring.journal import Journal
from mezzotint.scoring.statistics import (
    EXACT,
    NOT_A_BOUND,
    UPPER_BOUND,
    Comparison,
    Estimate,
    _estimate,
    student_t_tail,
)

Progress = Callable[[int, int], None]
"""Called with (forward passes done, forward passes in all)."""


RECONSTRUCTION_RATES = (0.1, 0.3, 0.5, 0.7, 0.9)


def choose_windows(windows: Windows, tokens: int | None) -> list[int]:
    """Indices of the windows to score: all, or as many evenly spaced ones as hold `tokens` tokens.

    Depends on nothing but the two arguments. Raises DataError when there is nothing to score.
    """
    total = len(windows)
    if total == 0:
        raise DataError("nothing to score: the split has no tokens")
    if tokens is None:
        return list(range(total))
    if tokens < 1:
        raise DataError(f"cannot score {tokens} tokens: ask for at least 1")
    wanted = -(-tokens // len(windows[0]))
    if wanted >= total:
        return list(range(total))
    return [(2 * j + 1) * total // (2 * wanted) for j in range(wanted)]


@dataclass(frozen=True)
class Pass:
    """One row of a forward batch: the ids, what is hidden, and what of that is scored (bool, all [T])."""

    ids: Tensor
    hidden: Tensor
    scored: Tensor


def run_passes(
    model: Model, passes: Iterable[Pass], *, block_size: int = 0, batch: int | None = None, size: int | None = None
) -> Iterator[np.ndarray]:
    """Run canvases through the network, many at a time, and yield the NLL of each pass in order.

    Yields float64 [T]: nats at the scored positions, 0 elsewhere. `batch` is rows at a time (default: what holds
    16,384 tokens); it changes speed and memory, not the figures. size: predict in blocks of so many tokens, each from
    what a pass shows of it and from the true tokens of the blocks before it.
    """
    pending: list[Pass] = []
    tokens_per_forward = TOKENS_PER_FORWARD // 2 if size else TOKENS_PER_FORWARD  # windows are doubled for blocks

    def flush() -> Iterator[np.ndarray]:
        if not pending:
            return
        ids = torch.stack([p.ids for p in pending]).to(model.device)
        hidden = torch.stack([p.hidden for p in pending]).to(model.device)
        scored = torch.stack([p.scored for p in pending]).to(model.device)
        with torch.inference_mode():
            canvas = ids.masked_fill(hidden, model.config.mask_id)
            if size:
                logits = model.block_logits(canvas, ids, size, positions=scored)
            else:
                logits = model.logits(canvas, block_size=block_size, positions=scored)
            nll = masked_nll(logits, ids, scored).double().cpu().numpy()
        pending.clear()
        yield from nll

    for item in passes:
        if pending and (
            len(pending) >= (batch or max(1, tokens_per_forward // len(item.ids)))
            or len(item.ids) != len(pending[0].ids)
        ):
            yield from flush()
        pending.append(item)
    yield from flush()


def _tensor(windows: Windows, i: int) -> Tensor:
    return torch.from_numpy(np.array(windows[i], dtype=np.int64))


def nelbo_counts(lengths: Sequence[int], seed: int, repeat: int) -> Tensor:
    """Mask counts of one repeat, int64 [windows]: stratified over the windows of each length."""
    draw = seeding.generator(seed, repeat)
    counts = torch.zeros(len(lengths), dtype=torch.long)
    for length in sorted(set(lengths), reverse=True):
        rows = torch.tensor([n for n, size in enumerate(lengths) if size == length])
        counts[rows] = stratified_counts(len(rows), length, draw)
    return counts


def nelbo_block_counts(lengths: Sequence[int], seed: int, repeat: int, size: int | None) -> Sequence[Tensor]:
    """Mask counts of one repeat, int64 [blocks] for each window: stratified over all blocks of each length.

    size: tokens of a block (None: the window is one).
    """
    blocks = [block_lengths(length, size or length) for length in lengths]
    return nelbo_counts(torch.cat(blocks).tolist(), seed, repeat).split([len(b) for b in blocks])


def nelbo_pass(
    ids: Tensor, window: int, count: int | Tensor, mask_id: int, seed: int, repeat: int, size: int | None = None
) -> Pass:
    """The mask of a window in a repeat: `count` positions that depend on seed, repeat and window alone.

    With `size`, `count` of each of its blocks, int64 [blocks].
    """
    counts = torch.as_tensor(count).view(1, -1)
    _, masked = mask_by_count(ids[None], counts, mask_id, seeding.generator(seed, repeat, 1 + window), size)
    return Pass(ids, masked[0], masked[0])


def nelbo_passes(
    windows: Windows, chosen: Sequence[int], mask_id: int, seed: int, repeat: int
) -> Iterator[tuple[Pass, int]]:
    """The masks of one repeat: (pass, k) for each chosen window in turn."""
    counts = nelbo_counts([len(windows[i]) for i in chosen], seed, repeat).tolist()
    for i, count in zip(chosen, counts, strict=True):
        yield nelbo_pass(_tensor(windows, i), i, count, mask_id, seed, repeat), count


def token_surprisal(windows: Windows, chosen: Sequence[int], vocab_size: int) -> np.ndarray:
    """-log of each token's frequency in the chosen windows, in nats, float64 [V]: a rough guess at its difficulty."""
    counts = np.full(vocab_size, 0.5)
    for i in chosen:
        counts += np.bincount(windows[i], minlength=vocab_size)
    return -np.log(counts / counts.sum())


def apply_control(
    nats: np.ndarray, control: np.ndarray, spread: np.ndarray, covariance: np.ndarray, rate: np.ndarray
) -> np.ndarray:
    """One repeat's NELBO estimates with the luck of the draw taken out; all arrays float64 [windows].

    A mask that happens to hide rare tokens costs more. With a_i any guess at the difficulty of token i that does not
    look at the mask, `control` = (T/k) sum_{i in S} a_i - sum_i a_i has mean 0 over S for every k (for blocks: the sum
    of that over blocks), so subtracting beta * control changes the variance and not the mean, provided that beta does not depend on S. beta is a quadratic
    in the mask rate k/T, fitted to the tokens of the other half of the windows (even or odd), whose masks are
    independent: `spread` is sum_{i in S} (a_i - mean)^2 and `covariance` the like with the tokens' NLL.
    (Control variates with cross-fitting; Owen 2013, "Monte Carlo theory, methods and examples", sections 8.9, 8.10.)
    """
    basis = np.stack((np.ones_like(rate), rate, rate**2), axis=1)
    out = nats.copy()
    for half in (0, 1):
        mine = np.arange(len(nats)) % 2 == half
        fit = ~mine & (spread > 0)
        if not fit.any():
            continue
        # Everything that enters beta comes from the other half. A window weighs by the root of its tokens' spread,
        # between one vote each and a vote a token; the ridge, worth half a window, steadies fits to very few.
        weight = 1 / np.sqrt(spread[fit] * spread[fit].mean())
        normal = (basis[fit] * (spread[fit] * weight)[:, None]).T @ basis[fit] + 0.5 * np.eye(3)
        beta = np.linalg.solve(normal, basis[fit].T @ (covariance[fit] * weight))
        out[mine] -= basis[mine] @ beta * control[mine]
    return out


def _nelbo_matrix(
    model: Model,
    windows: Windows,
    chosen: Sequence[int],
    repeats: int,
    seed: int,
    batch: int | None,
    book: Journal,
    tick: Progress,
    size: int | None,
) -> np.ndarray:
    """NELBO estimates in nats, float64 [repeats, windows]. size: tokens of a block, None for whole windows."""
    n = len(chosen)
    lengths = [len(windows[i]) for i in chosen]
    counts = [nelbo_block_counts(lengths, seed, r, size) for r in range(repeats)]
    surprisal = token_surprisal(windows, chosen, model.config.vocab_size)
    todo = book.mine()
    made: deque[Pass] = deque()

    def passes() -> Iterator[Pass]:
        for unit in todo:
            r, w = divmod(unit, n)
            ids, mask_id = _tensor(windows, chosen[w]), model.config.mask_id
            item = nelbo_pass(ids, chosen[w], counts[r][w], mask_id, seed, r, size)
            made.append(item)
            yield item

    for done, (unit, nll) in enumerate(zip(todo, run_passes(model, passes(), batch=batch, size=size), strict=True)):
        r, w = divmod(unit, n)
        k = counts[r][w].double()
        item = made.popleft()
        guess, hidden = surprisal[item.ids.numpy()], item.hidden.numpy()

        def weighted(values: np.ndarray, k: Tensor = k) -> float:
            return nelbo_per_window(torch.from_numpy(values)[None], k[None] if size else k, size).item()

        control = weighted(guess * hidden) - guess.sum()
        a, y = guess[hidden], nll[hidden]
        a = a - a.mean()
        book.record(unit, weighted(nll), control, a @ a, a @ y)
        tick(done + 1, len(todo))
    nats, control, spread, covariance = book.result().T.reshape(4, repeats, n)
    rates = np.array([[int(k.sum()) for k in row] for row in counts]) / np.array(lengths)
    return np.stack([apply_control(*row) for row in zip(nats, control, spread, covariance, rates, strict=True)])


def nelbo(
    model: Model,
    windows: Windows,
    *,
    tokens: int | None = None,
    repeats: int = 8,
    seed: int = 0,
    batch: int | None = None,
    journal: Path | None = None,
    progress: Progress | None = None,
    block_size: int | None = None,
) -> Estimate:
    """The NELBO of the windows: an upper bound on -log p, estimated without bias.

    block_size: tokens of the blocks that are denoised from left to right, each given the true blocks before it; 0:
    whole windows; default: what the model was trained on. 1 is `causal`, which is exact.

    Each repeat is one mask per window with the counts k stratified over the windows, less a control variate for how
    difficult the hidden tokens are (`apply_control`). Repeats are independent, and the mask error is that of their
    mean, with repeats - 1 degrees of freedom (`Estimate.interval` uses Student's t). Over all windows that is the
    whole error; over a subset the error from the choice of windows is added.
    Deterministic in `seed`, up to rounding for any `batch`. Costs repeats * windows forward passes, of twice the length
    for blocks. `journal` and torchrun: see `Journal`; neither is for block size 1.
    Raises DataError if there is nothing to score, fewer than 2 repeats, or a block size below 0.
    """
    started = time.perf_counter()
    size = _nelbo_size(model, block_size)
    if size == 1:
        if journal is not None:
            raise DataError("blocks of 1 token take a single pass, which needs no journal: leave it out")
        exact = causal(model, windows, tokens=tokens, seed=seed, batch=batch, progress=progress)
        return dataclasses.replace(exact, method="nelbo block(1)")
    chosen = choose_windows(windows, tokens)
    book = _nelbo_book(model, windows, chosen, tokens, repeats, seed, journal, size)
    nats = _nelbo_matrix(model, windows, chosen, repeats, seed, batch, book, progress or _silent, size)
    method = f"nelbo block({size})" if size else "nelbo"
    return _estimate(method, UPPER_BOUND, windows, chosen, nats, started, nats.size, seed)


def _nelbo_size(model: Model, asked: int | None) -> int | None:
    """Tokens of a block, None for whole windows."""
    size = model.block_size if asked is None else asked
    if size < 0:
        raise DataError(f"blocks have at least 1 token, or 0 for whole windows, not {size}")
    return size if 0 < size < model.config.sequence_length else None


def nelbo_by_window(
    model: Model, windows: Windows, *, tokens: int | None = None, repeats: int = 2, seed: int = 0
) -> np.ndarray:
    """Each window's share of `nelbo`, float64 [windows]: their mean is the figure, in bits per byte.

    For differences between models of one tokenizer: the same arguments give the same windows and masks. Raises as
    `nelbo` does.
    """
    chosen = choose_windows(windows, tokens)
    nats, _, _ = _own_nelbo(model, windows, chosen, tokens, repeats, seed, None, _silent)
    mean_bytes = float(np.mean([windows.byte_count(i) for i in chosen]))
    if mean_bytes == 0:
        raise DataError("the windows to score stand for no bytes of text: nothing to divide by")
    return nats.mean(axis=0) / math.log(2) / mean_bytes


def _own_nelbo(
    model: Model,
    windows: Windows,
    chosen: Sequence[int],
    tokens: int | None,
    repeats: int,
    seed: int,
    batch: int | None,
    progress: Callable[[int, int], None],
) -> tuple[np.ndarray, str, str]:
    """Nats [repeats or 1, windows], kind and name of the NELBO of the blocks that `model` was trained on."""
    size = _nelbo_size(model, None)
    if size == 1:
        return _causal_matrix(model, windows, chosen, batch, progress), EXACT, "nelbo block(1)"
    book = _nelbo_book(model, windows, chosen, tokens, repeats, seed, None, size)
    nats = _nelbo_matrix(model, windows, chosen, repeats, seed, batch, book, progress, size)
    return nats, UPPER_BOUND, f"nelbo block({size})" if size else "nelbo"


def _silent(done: int, total: int) -> None:
    pass


def _nelbo_book(
    model: Model,
    windows: Windows,
    chosen: Sequence[int],
    tokens: int | None,
    repeats: int,
    seed: int,
    journal: Path | None,
    size: int | None,
) -> Journal:
    if repeats < 2:
        raise DataError("a standard error needs at least 2 repeats")
    settings = {"method": "nelbo", "tokens": tokens, "repeats": repeats, "seed": seed}
    if size:
        settings["block_size"] = size
    return Journal(journal, model, windows, settings, repeats * len(chosen), columns=4)


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
    progress: Progress | None = None,
) -> Comparison:
    """Is model `b` better or worse than model `a` on these windows? Paired: both see the same windows and masks.

    What a mask or window costs both models alike drops out of the difference, so its error is far below that of the
    two figures. method: `nelbo` or `chain` (left to right; exact on the windows scored). Over all windows the error
    is that of the masks; over a subset (`tokens`) that from the choice of windows is added, and the answer is about
    all of them. The NELBO is that of the blocks each model was trained on; masks are the same where the blocks are.
    Raises DataError when the models' tokenizers differ, for an unknown method, or as `nelbo` does.
    """
    if a.tokenizer.sha256 != b.tokenizer.sha256 or a.config.vocab_size != b.config.vocab_size:
        raise DataError("the models have different tokenizers: their masks cannot be paired")
    started = time.perf_counter()
    chosen = choose_windows(windows, tokens)
    matrices: list[np.ndarray] = []
    estimates: list[Estimate] = []
    for turn, model in enumerate((a, b)):

        def tick(done: int, total: int, turn: int = turn) -> None:
            if progress:
                progress(turn * total + done, 2 * total)

        if method == "nelbo":
            nats, kind, name = _own_nelbo(model, windows, chosen, tokens, repeats, seed, batch, tick)
            passes = nats.size
        elif method == "chain":
            book = Journal(None, model, windows, {}, len(chosen))
            nats, passes = _chain_matrix(model, windows, chosen, "left", 0, batch, book, tick)
            kind, name = EXACT, method
        else:
            raise DataError(f"unknown method {method!r}: models are compared by nelbo or chain")
        matrices.append(nats)
        estimates.append(_estimate(name, kind, windows, chosen, nats, started, passes, seed))
        started = time.perf_counter()
    difference = _estimate(method, NOT_A_BOUND, windows, chosen, matrices[1] - matrices[0], started, 0, seed)
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
        a=estimates[0],
        b=estimates[1],
    )


def reveal_order(order: str, length: int) -> list[np.ndarray]:
    """The positions of a window of `length` tokens in the order they are revealed, as groups revealed together.

    Tokens of a group are predicted at once from the groups before, each by its own conditional, so any order makes an
    exact code: the groups depend on the length alone, never on a token, a probability or the rest of the batch.

    `left`: one by one from left to right. `random(s)`: one by one in the s-th fixed random order. `block(k)`: from
    left to right, k neighbours at once. `spread(n)`: n groups of about equal size whose positions lie far apart
    (bit-reversed), so that what is predicted together depends on one another as little as may be.
    Raises DataError for any other word.
    """
    match = re.fullmatch(r"(left|random|block|spread)(?:\((\d+)\))?", order)
    name, number = (match[1], match[2]) if match else (None, None)
    if name == "left" and number is None:
        return [np.array([i]) for i in range(length)]
    if name == "random" and number is not None:
        shuffled = np.random.Generator(np.random.PCG64([int(number), length])).permutation(length)
        return [np.array([i]) for i in shuffled]
    if name == "block" and number is not None and int(number) >= 1:
        return [np.arange(i, min(i + int(number), length)) for i in range(0, length, int(number))]
    if name == "spread" and number is not None and int(number) >= 1:
        bits = max(1, (length - 1).bit_length())
        reversed_bits = [int(format(i, f"0{bits}b")[::-1], 2) for i in range(1 << bits)]
        positions = np.array([i for i in reversed_bits if i < length])
        return [np.sort(group) for group in np.array_split(positions, min(int(number), length))]
    raise DataError(f"unknown order {order!r}: use left, random(seed), block(size) or spread(passes)")


def canvas_length(block_size: int, length: int, last: int) -> int:
    """How much of a window of `length` tokens the network must be given to predict positions up to `last`.

    What a position cannot see cannot matter: under `causal` or `block(k)` the canvas ends with the last block.
    """
    size = block_size or length
    return min(length, (last // size + 1) * size)


def chain_rule(
    model: Model,
    windows: Windows,
    *,
    tokens: int | None = None,
    order: str = "left",
    attention: str = "full",
    seed: int = 0,
    batch: int | None = None,
    journal: Path | None = None,
    progress: Progress | None = None,
) -> Estimate:
    """Exact code length of the windows, each revealed in `order` (see `reveal_order`).

    chain(x, order) = sum_i -log p(x_i | the groups before i's, the rest masked): a normalised distribution over
    windows, which `compress` turns into a file of this size. One forward pass per group, so T for a window of T
    tokens from left to right. With `block(k)` attention, an order that finishes each block before the next (`left`,
    or `block(k)`, a block in a single pass) takes all blocks at once: k passes from left to right, over the doubled
    window of `Denoiser.hidden_blocks`. For other orders only the part of the canvas that can be seen is computed.
    `causal` is `block(1)`, where a token is predicted at a MASK of its own, unlike in the function `causal`. No masks are drawn, so over all windows the error is 0; `seed` is only recorded.
    `journal` and torchrun: see `Journal`. Raises DataError if there is nothing to score.
    """
    started = time.perf_counter()
    chosen = choose_windows(windows, tokens)
    settings = {"method": "chain", "order": order, "visibility": attention, "tokens": tokens}
    book = Journal(journal, model, windows, settings, len(chosen))
    nats, total = _chain_matrix(
        model, windows, chosen, order, parse_attention(attention), batch, book, progress or _silent
    )
    method = "chain" if (order, attention) == ("left", "full") else f"chain {order} {attention}"
    return _estimate(method, EXACT, windows, chosen, nats, started, total, seed)


def _chain_matrix(
    model: Model,
    windows: Windows,
    chosen: Sequence[int],
    order: str,
    block_size: int,
    batch: int | None,
    book: Journal,
    tick: Progress,
) -> tuple[np.ndarray, int]:
    """(nats, float64 [1, windows], forward passes in all)."""
    orders = {length: reveal_order(order, length) for length in {len(windows[i]) for i in chosen}}
    size: int | None = block_size or max(orders)
    merged = {length: merge_blocks(groups, size) for length, groups in orders.items()} if size < max(orders) else {}
    if merged and all(merged.values()):
        orders, block_size = merged, 0
    else:
        size = None
    rows = batch or max(1, TOKENS_PER_FORWARD // max(orders) // (2 if size else 1))
    todo = book.mine()
    share = sum(len(orders[len(windows[chosen[n]])]) for n in todo)
    done = 0
    for start in range(0, len(todo), rows):
        # Step by step over a set of windows, so that the rows of a batch have one canvas length.
        group = todo[start : start + rows]
        nats = dict.fromkeys(group, 0.0)
        owners: deque[int] = deque()
        passes = _chain_passes(windows, chosen, group, orders, block_size, owners)
        for nll in run_passes(model, passes, block_size=block_size, batch=batch, size=size):
            nats[owners.popleft()] += float(nll.sum())
            done += 1
            tick(done, share)
        for n, value in nats.items():
            book.record(n, value)
    return book.result().T, sum(len(orders[len(windows[i])]) for i in chosen)


def merge_blocks(groups: Sequence[np.ndarray], size: int) -> list[np.ndarray]:
    """The n-th groups of all blocks of `size` positions together, for every n: what can be predicted at once when each
    block is predicted from the true ones before it. Empty for an order that does not finish each block before the next.
    """
    owners = [int(group.min()) // size for group in groups]
    if owners != sorted(owners) or any(int(g.max()) // size != owner for g, owner in zip(groups, owners, strict=True)):
        return []
    together: list[list[np.ndarray]] = []
    for n, (group, owner) in enumerate(zip(groups, owners, strict=True)):
        place = n - owners.index(owner)
        together += [[]] * (place == len(together))
        together[place] = [*together[place], group]
    return [np.concatenate(parts) for parts in together]


def _chain_passes(
    windows: Windows,
    chosen: Sequence[int],
    group: Sequence[int],
    orders: Mapping[int, Sequence[np.ndarray]],
    block_size: int,
    owners: deque[int],
) -> Iterator[Pass]:
    """Every step of every window in `group`; appends to `owners` which window each pass belongs to."""
    texts = {n: _tensor(windows, chosen[n]) for n in group}
    hidden = {n: torch.ones(len(ids), dtype=torch.bool) for n, ids in texts.items()}
    for step in range(max(len(orders[len(ids)]) for ids in texts.values())):
        for n, ids in texts.items():
            groups = orders[len(ids)]
            if step >= len(groups):
                continue
            positions = torch.from_numpy(groups[step])
            length = canvas_length(block_size, len(ids), int(groups[step].max()))
            scored = torch.zeros(len(ids), dtype=torch.bool)
            scored[positions] = True
            owners.append(n)
            yield Pass(ids[:length], hidden[n][:length].clone(), scored[:length])
            hidden[n][positions] = False


def causal(
    model: Model,
    windows: Windows,
    *,
    tokens: int | None = None,
    seed: int = 0,
    batch: int | None = None,
    progress: Progress | None = None,
) -> Estimate:
    """Exact next-token code length of a model trained with causal attention: one forward pass per window.

    The input is the window shifted right behind one MASK, so that the output at position i, which sees x_<i, predicts
    x_i. A normalised distribution for any weights, but a poor one for weights never trained this way.
    """
    started = time.perf_counter()
    chosen = choose_windows(windows, tokens)
    nats = _causal_matrix(model, windows, chosen, batch, progress or _silent)
    return _estimate("causal", EXACT, windows, chosen, nats, started, len(chosen), seed)


def _causal_matrix(
    model: Model, windows: Windows, chosen: Sequence[int], batch: int | None, tick: Progress
) -> np.ndarray:
    """Next-token code lengths in nats, float64 [1, windows]."""
    nats = np.zeros((1, len(chosen)))
    rows = batch or max(1, TOKENS_PER_FORWARD // max(len(windows[i]) for i in chosen))
    groups: list[list[int]] = []
    for n, i in enumerate(chosen):
        if not groups or len(groups[-1]) >= rows or len(windows[chosen[groups[-1][0]]]) != len(windows[i]):
            groups.append([])
        groups[-1].append(n)
    done = 0
    for group in groups:
        ids = torch.stack([_tensor(windows, chosen[n]) for n in group]).to(model.device)
        everything = torch.ones_like(ids, dtype=torch.bool)
        shifted = torch.nn.functional.pad(ids[:, :-1], (1, 0), value=model.config.mask_id)
        with torch.inference_mode():
            logits = model.logits(shifted, block_size=1, positions=everything)
            nats[0, group] = masked_nll(logits, ids, everything).double().sum(dim=1).cpu().numpy()
        done += len(group)
        tick(done, len(chosen))
    return nats


def reconstruction_score(
    model: Model,
    windows: Windows,
    *,
    tokens: int | None = None,
    seed: int = 0,
    batch: int | None = None,
    progress: Progress | None = None,
) -> Estimate:
    """The reference's score, as the reference computes it: (1/5) sum over t of CE(t) / t. Not a bound on anything.

    Each token is masked with probability t, CE(t) is the mean over all masked tokens in nats per token, and the bytes
    are those of the tokens shifted by one, as for a next-token model. A uniform model scores 3.5746 log V nats per
    token where its true figure is log V. The error covers masks and the choice of windows.
    """
    started = time.perf_counter()
    chosen = choose_windows(windows, tokens)
    rates = RECONSTRUCTION_RATES
    sums = np.zeros((len(rates), len(chosen)))
    counts = np.zeros((len(rates), len(chosen)))

    def passes() -> Iterator[Pass]:
        for r, rate in enumerate(rates):
            for n, i in enumerate(chosen):
                ids = _tensor(windows, i)
                masked = torch.rand(len(ids), generator=seeding.generator(seed, r, 1 + i), dtype=torch.float64) < rate
                counts[r, n] = int(masked.sum())
                yield Pass(ids, masked, masked)

    for done, nll in enumerate(run_passes(model, passes(), batch=batch)):
        sums[divmod(done, len(chosen))] = nll.sum()
        if progress:
            progress(done + 1, sums.size)

    size = shifted = 0
    for i in chosen:
        ids = np.asarray(windows[i])
        size += len(ids)
        following = np.asarray(windows[i + 1])[:1] if i + 1 < len(windows) else ids[:0]
        target = np.concatenate((ids[1:], following))
        if len(target):
            shifted += int(model.tokenizer.byte_counts(target, int(ids[0])).sum())
    if shifted == 0:
        raise DataError("the windows to score stand for no bytes of text: nothing to divide by")

    masked_tokens = np.maximum(counts.sum(axis=1), 1)
    ce = sums.sum(axis=1) / masked_tokens
    weight = 1 / (len(rates) * np.array(rates))
    score = float(weight @ ce)
    residual = (weight / masked_tokens) @ (sums - ce[:, None] * counts)
    n = len(chosen)
    error = math.sqrt(n / (n - 1) * float(residual @ residual)) if n > 1 else math.inf
    scale = size / shifted / math.log(2)
    return Estimate(
        method="reconstruction",
        kind=NOT_A_BOUND,
        bpb=score * scale,
        stderr_bpb=error * scale,
        nats_per_token=score,
        tokens=size,
        bytes=shifted,
        seconds=time.perf_counter() - started,
        forward_passes=sums.size,
        seed=seed,
        mask_stderr_bpb=math.nan,
        window_stderr_bpb=math.nan,
        degrees_of_freedom=max(n - 1, 1),
    )
