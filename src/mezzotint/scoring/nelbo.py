"""Bounds from masks and orders: the NELBO, its tighter relatives, and the control variate that steadies it.

Knows how to compute them, not what they prove (`kinds`).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mezzotint import seeding
from mezzotint.config import OPTIONS
from mezzotint.data.dataset import Windows
from mezzotint.data.texts import TextWindows
from mezzotint.errors import DataError, shown
from mezzotint.network.model import Model
from mezzotint.objective import block_lengths, lean_mask, mask_by_count, nelbo_per_window, stratified_counts
from mezzotint.scoring.chain import causal_matrix, revealed_nats
from mezzotint.scoring.plan import MaskedWindow, Scoring, masked_window_nll


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


def nelbo_mask(
    ids: Tensor, window: int, count: int | Tensor, key: tuple[int, int], size: int | None = None, context: int = 0
) -> MaskedWindow:
    """The mask of a window in a repeat: `count` positions that depend on key = (seed, repeat) and window alone.

    With `size`, `count` of each of its blocks, int64 [blocks]. The first `context` ids are never masked.
    """
    counts = torch.as_tensor(count).view(1, -1)
    draw = seeding.generator(*key, 1 + window)
    _, masked = mask_by_count(ids[None, context:], counts, -1, draw, size)
    masked = torch.nn.functional.pad(masked[0], (context, 0))
    return MaskedWindow(ids, masked, masked)


def nelbo_masks(plan: Scoring, repeat: int) -> Iterator[tuple[MaskedWindow, int]]:
    """The masks of one repeat: (mask, k) for each chosen window in turn."""
    counts = nelbo_counts(plan.lengths, plan.seed, repeat).tolist()
    for n, count in enumerate(counts):
        yield nelbo_mask(plan.ids(n), plan.chosen[n], count, (plan.seed, repeat), None, plan.context(n)), count


def token_surprisal(windows: Windows | TextWindows, chosen: Sequence[int], vocab_size: int) -> np.ndarray:
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
        fit = ~mine & (spread > 1e-9 * spread.max())  # what rounding alone makes of equal guesses is no spread
        if not fit.any():
            continue
        # Everything that enters beta comes from the other half. A window weighs by the root of its tokens' spread,
        # between one vote each and a vote a token; the ridge, worth half a window, steadies fits to very few.
        weight = 1 / np.sqrt(spread[fit] * spread[fit].mean())
        normal = (basis[fit] * (spread[fit] * weight)[:, None]).T @ basis[fit] + 0.5 * np.eye(3)
        beta = np.linalg.solve(normal, basis[fit].T @ (covariance[fit] * weight))
        out[mine] -= basis[mine] @ beta * control[mine]
    return out


def nelbo_size(model: Model, plan: Scoring, asked: int | None) -> int | None:
    """Tokens of a block, None for whole windows: as asked, or what the model was trained on; 1 is next tokens.

    Blocks are not read behind context: with a stride the NELBO of such a model is that of whole windows. Raises DataError
    where they are asked for there, and for fewer than 0 tokens.
    """
    size = model.block_size if asked is None else asked
    if size < 0:
        raise DataError(f"blocks have at least 1 token, or 0 for whole windows, not {size}")
    if size > 1 and plan.has_context:
        if asked is not None:
            raise DataError("blocks are not read with a stride: leave out the stride or the block size")
        return None
    return size if 0 < size < model.config.sequence_length else None


def nelbo_matrix(model: Model, plan: Scoring, size: int | None) -> tuple[np.ndarray, str, str]:
    """NELBO estimates in nats, float64 [repeats, windows], their method's name and its family (`kind_of`).

    size: tokens of a block, None for whole windows; 1 is next tokens, of one repeat. Raises DataError for fewer than 2
    repeats otherwise.
    """
    if size == 1:
        return causal_matrix(model, plan), "nelbo block(1)", "causal"
    if plan.repeats < 2:
        raise DataError("a standard error needs at least 2 repeats")
    settings = {"method": "nelbo", "repeats": plan.repeats, "seed": plan.seed, **({"block_size": size} if size else {})}
    n = len(plan.chosen)
    lengths = plan.lengths
    counts = [nelbo_block_counts(lengths, plan.seed, r, size) for r in range(plan.repeats)]
    surprisal = token_surprisal(plan.windows, plan.chosen, model.config.vocab_size)
    rows: deque[MaskedWindow] = deque()

    def draw(todo: Sequence[int]) -> Iterator[MaskedWindow]:
        for unit in todo:
            r, w = divmod(unit, n)
            rows.append(nelbo_mask(plan.ids(w), plan.chosen[w], counts[r][w], (plan.seed, r), size, plan.context(w)))
            yield rows[-1]

    with plan.book(model, settings, plan.repeats * n, columns=4) as book:
        todo = book.mine()
        found = masked_window_nll(model, draw(todo), batch=plan.batch, given_blocks=size)
        for done, (unit, nll) in enumerate(zip(todo, found, strict=True), 1):
            r, w = divmod(unit, n)
            context = plan.context(w)
            row = rows.popleft()
            guess, masked = surprisal[row.ids.numpy()[context:]], row.masked.numpy()[context:]
            book.record(unit, *_controlled(nll[context:], guess, masked, counts[r][w], size))
            plan.tell(done, len(todo))
    nats, control, spread, covariance = book.result().T.reshape(4, plan.repeats, n)
    rates = np.array([[int(k.sum()) for k in row] for row in counts]) / np.array(lengths)
    nats = np.stack([apply_control(*row) for row in zip(nats, control, spread, covariance, rates, strict=True)])
    return nats, f"nelbo block({size})" if size else "nelbo", "nelbo"


def _controlled(
    nll: np.ndarray, guess: np.ndarray, masked: np.ndarray, counts: Tensor, size: int | None
) -> tuple[float, float, float, float]:
    """A window's NELBO estimate, control, spread and covariance for `apply_control`."""
    k = counts.double()

    def weighted(values: np.ndarray) -> float:
        return nelbo_per_window(torch.from_numpy(values)[None], k[None] if size else k, size).item()

    a, y = guess[masked], nll[masked]
    if not np.isfinite(y).all():  # no probability at all: nothing to steady
        return float(y.sum()), 0.0, 0.0, 0.0
    a = a - a.mean()
    if np.abs(a).max() <= 1e-9 * np.abs(guess).max():
        a[:] = 0.0  # what rounding leaves of equal guesses is no spread: dividing by it has no bound
    return weighted(nll), weighted(guess * masked) - guess.sum(), float(a @ a), float(a @ y)


def lean_matrix(model: Model, plan: Scoring, lean: float) -> np.ndarray:
    """Mean code lengths over orders that lean to the left, in nats, float64 [repeats, windows]: see `lean_mask`.

    Raises DataError for fewer than 2 repeats, or a lean below 0.
    """
    if not lean >= 0:
        raise DataError(f"orders lean to the left by 0 or more, not by {lean}")
    if plan.repeats < 2:
        raise DataError("a standard error needs at least 2 repeats")
    n, lengths = len(plan.chosen), plan.lengths
    counts = [nelbo_counts(lengths, plan.seed, r).tolist() for r in range(plan.repeats)]
    chances: deque[np.ndarray] = deque()

    def draw(todo: Sequence[int]) -> Iterator[MaskedWindow]:
        for unit in todo:
            r, w = divmod(unit, n)
            random = seeding.generator(plan.seed, r, 1 + plan.chosen[w])
            masked, chance = lean_mask(lengths[w], counts[r][w], lean, random)
            chances.append(chance.numpy() * lengths[w])
            masked = torch.nn.functional.pad(masked, (plan.context(w), 0))
            yield MaskedWindow(plan.ids(w), masked, masked)

    settings = {"method": "nelbo", "repeats": plan.repeats, "seed": plan.seed, "order_lean": str(lean)}
    with plan.book(model, settings, plan.repeats * n) as book:
        todo = book.mine()
        for done, (unit, nll) in enumerate(
            zip(todo, masked_window_nll(model, draw(todo), batch=plan.batch), strict=True), 1
        ):
            weights = chances.popleft()
            charged = nll[len(nll) - len(weights) :]
            book.record(unit, float((weights[weights > 0] * charged[weights > 0]).sum()))
            plan.tell(done, len(todo))
    return book.result().T.reshape(plan.repeats, n)


def orders_matrix(model: Model, plan: Scoring, orders: int, lean: float = 0.0) -> np.ndarray:
    """-log of the mean of p(x | order) over `orders` random orders, in nats, float64 [repeats, windows].

    A forward pass per token and order. Its expectation is above -log p of the mixture over all orders, and falls to it
    as `orders` grow (Burda et al. 2016, "Importance weighted autoencoders", theorem 1, with the law of the orders as
    proposal; with lean, the mixture is that of the leaning law). Raises DataError as `lean_matrix` does, and for no orders.
    """
    return _over_orders(model, plan, _Orders("orders", orders, orders, lean), lambda nats: _mean_nats(nats).item())


def lower_matrix(model: Model, plan: Scoring, orders: int, lean: float, slack: float) -> np.ndarray:
    """Lower bounds on -log p of the mixture over orders, in nats, float64 [repeats, windows].

    For any number q > 0, log p <= log q + p / q - 1: the logarithm lies below its tangent at q (TUBE, Ivanov et al. 2026,
    "Tangent upper bound on evidence"). q is exp(slack) times the mean of p(x | order) over `orders` orders, and p / q is
    estimated by that mean over as many others. These do not depend on q and have mean p, so that the expectation is at most
    -log p for any slack. Both halves take either part, and the mean of the two is returned. slack costs slack - 1 +
    exp(-slack) where q was p, and saves the estimate from the rare orders that carry most of p: with p / q far above 1 the
    tangent is far below. A forward pass per token and order, of 2 * orders. Raises DataError as `orders_matrix` does, and for a
    slack below 0.
    """
    if not 0 <= slack < math.inf:
        raise DataError(f"the slack of a lower bound is a number of nats, 0 or more, not {slack}")

    def bound(nats: Tensor) -> float:
        first, second = _mean_nats(nats[:orders]), _mean_nats(nats[orders:])
        # q is above 0, even where no order that was drawn gives the text a chance.
        pairs = ((first.clamp_max(LEAST_TANGENT) - slack, second), (second.clamp_max(LEAST_TANGENT) - slack, first))
        return float(sum(q + 1 - torch.exp(q - p) for q, p in pairs)) / 2

    return _over_orders(model, plan, _Orders(f"lower {slack}", orders, 2 * orders, lean), bound)


LEAST_TANGENT = 1e6  # nats


def _mean_nats(nats: Tensor) -> Tensor:
    """-log of the mean of exp(-nats)."""
    return math.log(len(nats)) - torch.logsumexp(-nats, 0)


@dataclass(frozen=True)
class _Orders:
    """Random orders of a figure. asked: as its caller said; drawn: of a window in a repeat; lean: see `lean_mask`."""

    method: str
    asked: int
    drawn: int
    lean: float

    def __post_init__(self) -> None:
        if self.asked < 1:
            raise DataError(f"a bound needs at least 1 order, not {shown(self.asked)}")
        OPTIONS["orders"].check("orders", self.asked, DataError)
        if not self.lean >= 0:
            raise DataError(f"orders lean to the left by 0 or more, not by {self.lean}")

    def order(self, length: int, random: torch.Generator) -> list[np.ndarray]:
        """One of them, of a window of `length` tokens: a position a group."""
        place = torch.arange(length, dtype=torch.float64)
        noise = torch.rand(length, generator=random, dtype=torch.float64).clamp_min(1e-300)
        score = -place if math.isinf(self.lean) else -self.lean * place / length - torch.log(-torch.log(noise))
        return [np.array([i]) for i in score.argsort(descending=True).tolist()]


def _over_orders(model: Model, plan: Scoring, orders: _Orders, figure: Callable[[Tensor], float]) -> np.ndarray:
    """`figure` of -log p(x | order), float64 [drawn], for every repeat and window: float64 [repeats, windows]."""
    if plan.repeats < 2:
        raise DataError("a standard error needs at least 2 repeats")
    n, lengths = len(plan.chosen), plan.lengths

    def order(unit: int, k: int) -> list[np.ndarray]:
        r, w = divmod(unit, n)
        return orders.order(lengths[w], seeding.generator(plan.seed, r, 1 + plan.chosen[w], k))

    settings = {"method": orders.method, "repeats": plan.repeats, "seed": plan.seed, "orders": orders.asked,
                "order_lean": str(orders.lean)}  # fmt: skip
    with plan.book(model, settings, plan.repeats * n) as book:
        todo = book.mine()
        jobs = [(unit % n, order(unit, k)) for unit in todo for k in range(orders.drawn)]
        found = revealed_nats(model, plan, jobs)
        for unit in todo:
            book.record(unit, figure(torch.tensor([next(found) for _ in range(orders.drawn)], dtype=torch.float64)))
    return book.result().T.reshape(plan.repeats, n)
