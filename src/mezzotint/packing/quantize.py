"""Float weights + calibration -> integer codes and scales: GPTQ with Hessians from real masked text.

A weight matrix W [R, C] becomes codes Q and float16 scales with W ~ Q * rows[:, None] * columns[None, :]. Knows nothing
of files, of bytes or of budgets; code lengths, where a rounding weighs them, are handed in.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from mezzotint import seeding
from mezzotint.distributed import rank_and_size
from mezzotint.network.model import Denoiser, Model, shift_right
from mezzotint.objective import block_counts, block_lengths, mask_by_count
from mezzotint.packing.grid import INT6_LIMIT, Grid, round_to_octave_grid


def matrices(network: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers of `network` by module name."""
    return {name: module for name, module in network.named_modules() if isinstance(module, nn.Linear)}


@dataclass(frozen=True)
class Calibration:
    """One window of calibration text as training presented it.

    read, ids: int64 [1, T], the network's input and the text; positions: bool [1, T], what is predicted; weights: float32
    [n], the NELBO's weight of each prediction. size: tokens of the blocks that are denoised, all of them at once, or
    None; causal: each token sees those before it only.
    """

    read: Tensor
    ids: Tensor
    positions: Tensor
    weights: Tensor
    size: int | None
    causal: bool

    def logits(self, network: Denoiser) -> Tensor:
        """Logits [n, V] of `network` at the predicted positions."""
        device = network.embedding.weight.device
        read, positions = self.read.to(device), self.positions.to(device)
        if self.size is None:
            return network(read, block_size=int(self.causal), positions=positions)
        return network.logits(network.hidden_blocks(read, self.ids.to(device), self.size)[positions])


def calibration(model: Model, windows: Iterable[np.ndarray], seed: int = 0) -> list[Calibration]:
    """How `model` was trained, on these windows: masked or in blocks, and its share of them as next tokens.

    windows: int64 vectors of token ids of real text. Counts of masks are stratified over 1..T, so that all mask rates
    from nearly none to all are represented, as in the objective.
    """
    windows = list(windows)
    generator = seeding.numbered_generator(seed)
    length = max((len(window) for window in windows), default=1)
    block = model.block_size
    size = block if 1 < block < length else None
    settings = model.info.get("train")
    share = settings.get("causal_share", 0.0) if isinstance(settings, dict) else 0.0
    share = 1.0 if block == 1 else share
    causal = [int((i + 1) * share) > int(i * share) for i in range(len(windows))]
    counts = iter(block_counts(causal.count(False), length, size or length, generator) if False in causal else ())
    items = []
    for window, next_tokens in zip(windows, causal, strict=True):
        ids = torch.as_tensor(window, dtype=torch.int64)[None]
        if next_tokens:
            read = shift_right(ids, model.config.mask_id)
            everywhere = torch.ones_like(ids, dtype=torch.bool)
            items.append(Calibration(read, ids, everywhere, torch.ones(ids.shape[1]), None, True))
            continue
        lengths = block_lengths(len(window), size or length)
        whole = block_lengths(length, size or length)[: len(lengths)]
        # A last, shorter window keeps its mask rates.
        scaled = torch.minimum((next(counts)[: len(lengths)] * lengths / whole).ceil().long().clamp(min=1), lengths)
        read, positions = mask_by_count(ids, scaled[None], model.config.mask_id, generator, size)
        weights = (lengths / scaled).repeat_interleave(lengths)[positions[0]].float()
        items.append(Calibration(read, ids, positions, weights, size, False))
    return items


def calibration_hessians(model: Model, windows: Iterable[np.ndarray], seed: int = 0) -> dict[str, Tensor]:
    """Mean of x x^T over the inputs x of every linear layer, float64 [C, C], on `calibration`.

    Float32 products, float64 sums. In a process group each process takes a share of the windows; all get the result.
    """
    layers = matrices(model.network)
    sums = {name: torch.zeros(m.in_features, m.in_features, dtype=torch.float64) for name, m in layers.items()}
    seen = {name: torch.zeros((), dtype=torch.float64) for name in layers}

    def hook(name: str):
        def accumulate(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0].detach().reshape(-1, inputs[0].shape[-1]).float()
            sums[name] += (x.T @ x).double().cpu()
            seen[name] += len(x)

        return accumulate

    handles = [module.register_forward_pre_hook(hook(name)) for name, module in layers.items()]
    try:
        with torch.inference_mode():
            for _, item in _share(calibration(model, windows, seed)):
                item.logits(model.network)
    finally:
        for handle in handles:
            handle.remove()
    _add_up([*sums.values(), *seen.values()])
    return {name: total / seen[name].clamp(min=1) for name, total in sums.items()}


def _share(items: list[Calibration]) -> list[tuple[int, Calibration]]:
    """This process's items, with their numbers."""
    rank, processes = rank_and_size()
    return list(enumerate(items))[rank::processes]


def _add_up(tensors: Iterable[Tensor]) -> None:
    """Make each tensor its sum over all processes."""
    if rank_and_size()[1] > 1:
        for tensor in tensors:
            dist.all_reduce(tensor)


@dataclass(frozen=True)
class Curvature:
    """A Kronecker-factored second derivative of the NELBO for one matrix W [R, C].

    Changing W by D costs about 1/2 * sum_r rows[r] * D[r] @ inputs @ D[r] nats per token. rows float64 [R], mean 1;
    inputs float64 [C, C].
    """

    inputs: Tensor
    rows: np.ndarray


def curvature(model: Model, windows: Iterable[np.ndarray], seed: int = 0, draws: int = 1) -> dict[str, Curvature]:
    """Curvature of the NELBO in every linear layer and embedding, by module name, on `calibration`.

    The Fisher matrix of the model's own predictions (labels drawn from the model; Martens 2020, "New insights...",
    section 5) under the NELBO's weights T / k. With independent labels the gradient G [R, C] of one window's
    sum of sqrt(T / k) * -log p(label) has mean zero and the window's weighted Fisher as its covariance, with every term
    that couples positions through attention. It is kept as one Kronecker product per matrix, diag(rows) x inputs, with
    inputs = E[G^T G] and rows ~ the diagonal of E[G G^T] (Gupta et al. 2018, "Shampoo"; its trace is exact).
    Tied embeddings thus count both as inputs and as output layer. `draws` label draws per window lower the noise.
    In a process group each process takes a share of the windows; all get the result, the same up to rounding.
    """
    network = model.network
    layers = {n: m for n, m in network.named_modules() if isinstance(m, (nn.Linear, nn.Embedding))}
    inputs = {n: torch.zeros(m.weight.shape[1], m.weight.shape[1], dtype=torch.float64) for n, m in layers.items()}
    rows = {n: torch.zeros(m.weight.shape[0], dtype=torch.float64) for n, m in layers.items()}
    required = [p.requires_grad for p in network.parameters()]
    network.requires_grad_(False)
    for module in layers.values():
        module.weight.requires_grad_(True)
    tokens = torch.zeros((), dtype=torch.float64)
    try:
        for number, item in _share(calibration(model, windows, seed)):
            generator = seeding.numbered_generator((seed << 32) + number)
            logits = item.logits(network)
            weights = item.weights.to(logits.device).sqrt() / draws**0.5
            tokens += item.ids.shape[1]
            for draw in range(draws):
                noise = torch.rand(logits.shape, generator=generator).to(logits.device)
                labels = (logits.detach() - torch.log(-torch.log(noise.clamp_min(1e-20)))).argmax(-1)
                loss = (nn.functional.cross_entropy(logits, labels, reduction="none") * weights).sum()
                gradients = torch.autograd.grad(
                    loss, [m.weight for m in layers.values()], retain_graph=draw + 1 < draws
                )
                for name, gradient in zip(layers, gradients, strict=True):
                    g = gradient.float()
                    inputs[name] += (g.T @ g).double().cpu()
                    rows[name] += g.square().sum(1).double().cpu()
    finally:
        for parameter, flag in zip(network.parameters(), required, strict=True):
            parameter.requires_grad_(flag)
    _add_up([*inputs.values(), *rows.values(), tokens])
    result = {}
    for name in layers:
        row = rows[name].numpy()
        mean = row.mean()
        # Rows that hardly occur in the sample still occur in the world.
        row = (row + 0.05 * mean) / (1.05 * mean) if mean > 0 else np.ones_like(row)
        # `inputs` carries the sum over rows: per row it is a share.
        result[name] = Curvature(inputs[name] / (float(tokens) * len(row)), row)
    return result


class Divergence:
    """What replacing a model's weights costs: how far its predictions on `calibration` move, in nats per token.

    The mean over windows of sum over masks of T / k * KL(before || after): the expected rise of the NELBO if the text
    were drawn from the model's own predictions. Unlike the rise on real text it has no noise of first order in the
    change, so that a few windows do.
    """

    def __init__(self, model: Model, windows: Iterable[np.ndarray], seed: int = 0) -> None:
        self.items = calibration(model, windows, seed)
        self.tokens = sum(item.ids.shape[1] for item in self.items)
        with torch.inference_mode():
            self.before = [item.logits(model.network).cpu() for item in self.items]

    @torch.inference_mode()
    def __call__(self, model: Model) -> float:
        """Nats per token that `model` costs over the one this was made with."""
        total = 0.0
        for item, before in zip(self.items, self.before, strict=True):
            old = before.log_softmax(-1)
            new = item.logits(model.network).cpu().log_softmax(-1)
            rise = (old.exp() * (old - new)).sum(-1, dtype=torch.float64)
            total += float((rise * item.weights).sum())
        return total / self.tokens


def damped(hessian: Tensor, damping: float = 0.01) -> Tensor:
    """`hessian` [C, C] with `damping` times its mean diagonal added to the diagonal; the identity if it is zero."""
    mean = hessian.diagonal().mean()
    if not mean > 0:
        return torch.eye(len(hessian), dtype=torch.float64)
    return hessian.double() + damping * mean * torch.eye(len(hessian), dtype=torch.float64)


@dataclass(frozen=True)
class RatePenalty:
    """What a rounding pays for the bits of its code: lambda times its length (rate-distortion-optimised rounding).

    lengths: bits of code -M..M under each table, float [K, 2 M + 1]; tables: which table codes each entry, [R, C];
    rows: importance of each row's squared error, [R]; per_bit: the error one bit is worth (lambda).
    """

    lengths: np.ndarray
    tables: np.ndarray
    rows: np.ndarray
    per_bit: float


def gptq(
    weight: Tensor,
    hessian: Tensor,
    rows: np.ndarray,
    columns: np.ndarray | None = None,
    *,
    limit: int = INT6_LIMIT,
    block: int = 128,
    penalty: RatePenalty | None = None,
    ascending: bool = False,
) -> Grid:
    """Codes that make the layer's output error small: tr((W - Q) H (W - Q)^T), H = E[x x^T] or a curvature.

    GPTQ (Frantar et al. 2022, algorithm 1): columns are rounded one after the other, in `rounding_order`, and each
    column's error is spread over the columns still to come by the Cholesky factor of H^-1. With a `penalty`, each
    rounding takes the cheapest of the two neighbouring codes and zero, by its error's final cost plus per_bit times
    its code length, so the whole trades error against bits.
    weight [R, C]; hessian [C, C]; rows, columns: float16 scales [R], [C].
    """
    order = rounding_order(hessian, ascending)
    factor = inverse_factor(hessian, order).float()
    work = weight.detach().float().cpu().T[order].contiguous()  # [C, R]: one column of W per row
    scale = torch.from_numpy(rows.astype(np.float32))
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    across = torch.ones(len(work)) if columns is None else torch.from_numpy(columns.astype(np.float32))[order]
    across = torch.where(across > 0, across, torch.ones_like(across))
    if penalty is not None:
        span = penalty.lengths.shape[1]
        limit = min(limit, span // 2)
        # Bits no table codes (infinite) become merely unaffordable, so that no comparison meets inf - inf.
        bits = torch.from_numpy(np.minimum(penalty.lengths, 64.0) * penalty.per_bit).float().ravel()
        base = torch.from_numpy(penalty.tables.astype(np.int64)).T[order] * span + span // 2
        importance = torch.from_numpy(penalty.rows).float()
    codes = torch.empty_like(work)
    columns_count = len(work)
    for start in range(0, columns_count, block):
        stop = min(start + block, columns_count)
        errors = torch.empty(stop - start, work.shape[1])
        for j in range(start, stop):
            step = scale * across[j]
            x = work[j] / step
            if penalty is None:
                code = torch.clamp(torch.round(x), -limit, limit)
            else:
                low = torch.clamp(torch.floor(x), -limit, limit)
                high = torch.clamp(low + 1, -limit, limit)
                weigh = importance * (step / factor[j, j]).square()

                def cost(q: Tensor, x=x, weigh=weigh, j=j) -> Tensor:
                    return weigh * (x - q).square() + bits[base[j] + q.long()]

                low_cost, high_cost = cost(low), cost(high)
                code = torch.where(high_cost < low_cost, high, low)
                zero = torch.zeros_like(code)
                code = torch.where(cost(zero) < torch.minimum(low_cost, high_cost), zero, code)
            codes[j] = code
            error = (work[j] - code * step) / factor[j, j]
            errors[j - start] = error
            work[j + 1 : stop] -= factor[j, j + 1 : stop, None] * error
        work[stop:] -= factor[start:stop, stop:].T @ errors
    result = torch.empty_like(codes)
    result[order] = codes
    return Grid(result.T.contiguous().numpy().astype(np.int16), rows, columns)


def rounding_order(hessian: Tensor, ascending: bool = False) -> Tensor:
    """Columns by descending diagonal of the Hessian, or ascending; the reader of the codes need not know.

    On one step for all, the columns that matter most go first, while others are left to make good their errors. On
    `curved_scales` every column's error costs alike; at low rates the other way round then costs less (LOG.md).
    """
    return torch.argsort(hessian.diagonal(), descending=not ascending, stable=True)


def inverse_factor(hessian: Tensor, order: Tensor) -> Tensor:
    """The upper Cholesky factor of the inverse of the damped `hessian` with rows and columns in `order`, float64."""
    h = damped(hessian)[order][:, order]
    return torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)


def curved_scales(
    weight: np.ndarray, curvature: Curvature, step: float, limit: int
) -> tuple[np.ndarray, np.ndarray, bool]:
    """Float16 scales (rows [R], columns [C]) whose rounding errors all cost alike: about step^2 / 24 nats per weight.

    In GPTQ the error on column j ends up costing rows[r] * L_j^2 times its square, L_j being what of the input's column
    j cannot be said by the columns after it (the Cholesky factor of `inputs`). At high rate the fewest bits for a given
    total need every error to cost the same, hence a grid of step / (sqrt(rows[r]) L_j): reverse water-filling with
    the quantizer's spacing instead of its rate (Lifar et al. 2026, "WaterSIC"). Rows are widened where codes would
    pass 80% of `limit`. A matrix without curvature gets 8 steps per standard deviation of a row.

    The scales hold for one order of rounding, the third result: ascending, unless that would widen a row (it makes
    larger codes), or else descending.
    """
    if not curvature.inputs.diagonal().mean() > 0:
        rows = np.maximum(np.sqrt(np.square(weight).mean(axis=1)) / 8, np.abs(weight).max(axis=1) / (0.8 * limit))
        return round_to_octave_grid(rows, 8), np.ones(weight.shape[1], dtype=np.float16), False
    for ascending in (True, False):
        order = rounding_order(curvature.inputs, ascending)
        own = torch.empty(len(order), dtype=torch.float64)
        own[order] = 1 / inverse_factor(curvature.inputs, order).diagonal()
        columns = step / own.numpy()
        middle = float(np.exp(np.log(columns).mean()))  # keeps both vectors well inside float16
        across = round_to_octave_grid(columns / middle, 8)
        rows = middle / np.sqrt(curvature.rows)
        least = (np.abs(weight) / across.astype(np.float64)).max(axis=1) / (0.8 * limit)
        if not (least > rows).any():
            break
    return round_to_octave_grid(np.maximum(rows, least), 8), across, ascending
