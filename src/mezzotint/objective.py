"""Masking and the NELBO: the one formula that trains and evaluates.

For a window x of T tokens, with k uniform on 1..T and S a uniform set of k positions,

    NELBO(x) = E_k E_S [ (T / k) * sum_{i in S} -log p(x_i | x outside S) ]   nats,

which is the mean over all orders of the chain-rule NLL and hence an upper bound on -log p(x)
(Uria et al. 2014, "A deep and tractable density estimator", eq. 6; Hoogeboom et al. 2022,
"Autoregressive diffusion models", eq. 4; Ou et al. 2025, "Your absorbing discrete diffusion...", eq. 3.5).

Block diffusion (Arriola et al. 2025, "Block diffusion", eq. 8, with counts in place of their continuous time) does the
same within blocks of k tokens, from left to right. Block b of k_b tokens (k, but for a shorter last one) is denoised
given the clean blocks before it:

    NELBO_k(x) = sum_b E_{n uniform on 1..k_b} E_S [ (k_b / n) * sum_{i in S} -log p(x_i | blocks < b, b outside S) ]

with S a uniform set of n positions of block b. NELBO_T is the above; NELBO_1 is the exact autoregressive code length.
Counts are int64 [B] for whole windows and [B, blocks] for blocks of `size` tokens.

Pure functions of tensors. Knows nothing of models, files or optimizers.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def stratified_counts(
    n: int, length: int, generator: torch.Generator, rates: tuple[float, float] = (0.0, 1.0)
) -> Tensor:
    """Draw `n` mask counts, each uniform on 1..length, spread evenly: one in each n-th of the range.

    rates: the part of the range to draw from, as shares of `length`; only the whole range gives the NELBO.

    Returns int64 [n] in random order. Averages over the draw are unbiased for averages over uniform counts, at a
    lower variance than independent draws (stratified sampling; Kingma et al. 2021 use the same for diffusion times).
    """
    jitter = torch.rand(n, generator=generator, dtype=torch.float64, device=generator.device)
    strata = torch.randperm(n, generator=generator, device=generator.device)
    low, high = rates
    places = (strata + jitter) * ((high - low) * length / n) + low * length
    return places.long().clamp(max=length - 1) + 1


def block_lengths(length: int, size: int, device: torch.device | None = None) -> Tensor:
    """Tokens of each block of a window of `length`: `size`, but for a shorter last one. int64 [blocks]."""
    return (length - torch.arange(0, length, size, device=device)).clamp(max=size)


def block_counts(
    rows: int, length: int, size: int, generator: torch.Generator, rates: tuple[float, float] = (0.0, 1.0)
) -> Tensor:
    """Mask counts of all blocks of `rows` windows, int64 [rows, blocks]: stratified over the blocks of each length."""
    lengths = block_lengths(length, size)
    counts = torch.zeros(rows, len(lengths), dtype=torch.int64)
    for tokens in sorted(set(lengths.tolist()), reverse=True):
        of_length = lengths == tokens
        n = rows * int(of_length.sum())
        counts[:, of_length] = stratified_counts(n, tokens, generator, rates).view(rows, -1)
    return counts


def mask_by_count(
    ids: Tensor, counts: Tensor, mask_id: int, generator: torch.Generator, size: int | None = None
) -> tuple[Tensor, Tensor]:
    """Replace exactly `counts[b]` uniformly chosen tokens of window b by MASK, or `counts[b, j]` of its block j.

    ids: int64 [B, T]; counts: int64 [B], 1..T, or with `size` [B, blocks]. Returns (corrupted [B, T], masked bool
    [B, T]).
    """
    noise = torch.rand(ids.shape, generator=generator, device=generator.device).to(ids.device)
    return mask_by_noise(ids, noise, counts, mask_id, size)


def mask_by_noise(
    ids: Tensor, noise: Tensor, counts: Tensor, mask_id: int, size: int | None = None
) -> tuple[Tensor, Tensor]:
    """As `mask_by_count`: the tokens with the least of the independent uniform numbers `noise`, [B, T], are masked."""
    rows, length = ids.shape
    size = size or length
    blocks = -(-length // size)
    # What fills up a last block comes last in its order, and so is never among the first `count` of it.
    noise = torch.nn.functional.pad(noise, (0, blocks * size - length), value=2.0).view(rows, blocks, size)
    first = torch.arange(size, device=ids.device) < counts.to(ids.device).view(rows, blocks, 1)
    masked = torch.zeros_like(first).scatter_(2, noise.argsort(dim=2), first).view(rows, -1)[:, :length]
    return ids.masked_fill(masked, mask_id), masked


def lean_noise(noise: Tensor, lean: float) -> Tensor:
    """Independent uniform numbers in 0..1, [B, T], as numbers whose least are the last of an order that leans to the left.

    Masks by these (`mask_by_noise`) have the law of `lean_mask`. float64 [B, T].
    """
    place = torch.arange(noise.shape[1], dtype=torch.float64)
    return -lean * place / noise.shape[1] - torch.log(-torch.log(noise.double().clamp_min(1e-300)))


def lean_weights(masked: Tensor, lean: float) -> Tensor:
    """What the NLL of each masked token weighs in the NELBO of leaning orders, float32 [B, T]; 0 where nothing is masked.

    The number of masks times the token's chance to be next, so that `nelbo_per_window` of weighted NLL is T * sum_i chance_i
    * NLL_i, see `lean_mask`. All are 1 for lean 0. masked: bool [B, T], some in each row.
    """
    place = torch.arange(masked.shape[1], dtype=torch.float64)
    chance = (-lean * place / masked.shape[1]).expand(masked.shape).masked_fill(~masked, -torch.inf).softmax(1)
    return (chance * masked.sum(1, keepdim=True)).float()


def lean_mask(length: int, count: int, lean: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The last `count` of `length` positions in an order with a lean to the left, and their chances to be next.

    Orders have the law of Plackett and Luce: the next position is drawn from those left in proportion to
    exp(-lean * i / length). lean 0 is a uniform order, infinity left to right. Returns masked bool [T], and float64 [T]
    that sums to 1 over the masked positions. For count uniform on 1..T, the mean of T * sum_i chance_i * -log p(x_i | x
    outside the mask) is the mean chain-rule NLL over the law: an upper bound on -log of the mixture, for any lean >= 0.
    """
    place = torch.arange(length, dtype=torch.float64)
    if math.isinf(lean):
        masked = place >= length - count
        return masked, (place == length - count).double()
    weight = -lean * place / length
    noise = torch.rand(length, generator=generator, dtype=torch.float64).clamp_min(1e-300)
    order = (weight - torch.log(-torch.log(noise))).argsort(descending=True)  # Gumbel: draws without replacement
    masked = torch.zeros(length, dtype=torch.bool)
    masked[order[length - count :]] = True
    return masked, weight.masked_fill(~masked, -torch.inf).softmax(0)


def masked_nll(logits: Tensor, ids: Tensor, masked: Tensor) -> Tensor:
    """-log p of the true token at each masked position, in nats.

    logits: [n, V] at the n True positions of `masked` in row-major order; ids, masked: [B, T].
    Returns [B, T], zero where nothing is masked, in the logits' type.
    """
    return scatter_to(masked, token_nll(logits, ids[masked]))


def token_nll(logits: Tensor, targets: Tensor) -> Tensor:
    """-log p of each target, in nats. logits: [n, V]; targets: int64 [n]. Returns [n] in the logits' type."""
    return torch.nn.functional.cross_entropy(logits, targets, reduction="none")


def scatter_to(positions: Tensor, values: Tensor, rest: float = 0) -> Tensor:
    """[n] values at the n True `positions` (bool [B, T]), row-major, and `rest` elsewhere: [B, T]."""
    return torch.full(positions.shape, rest, dtype=values.dtype, device=values.device).masked_scatter(positions, values)


def nelbo_per_window(nll: Tensor, counts: Tensor, size: int | None = None) -> Tensor:
    """The NELBO estimate of each window from one mask: (T / k) * sum of its masked NLL. [B, T], [B] -> [B] nats.

    With `size`, that of blocks: the sum over blocks of (k_b / n) * sum of the block's masked NLL; counts [B, blocks].
    """
    length = nll.shape[1]
    if size is None:
        return nll.sum(dim=1) * (length / counts)
    lengths = block_lengths(length, size, nll.device)
    filled = torch.nn.functional.pad(nll, (0, len(lengths) * size - length))
    return (filled.unflatten(1, (-1, size)).sum(dim=2) * (lengths / counts)).sum(dim=1)


def training_loss(
    nll: Tensor, counts: Tensor, weighting: str, windows: int, masked_tokens: int, size: int | None = None
) -> Tensor:
    """These rows' share of the loss of a whole batch of `windows` windows with `masked_tokens` masks, nats per token.

    Shares of micro-batches or processes add up to the batch's loss. nll: [B, T]; counts: [B], or with `size` [B,
    blocks]. `nelbo`: mean NELBO per token. `reference`: the seed's mean over all masked tokens of the batch, which
    weights a window by its mask rate t and so optimizes the integral of 2 t CE(t) dt instead of the integral of
    CE(t) dt.
    """
    if weighting == "nelbo":
        return nelbo_per_window(nll, counts, size).sum() / (nll.shape[1] * windows)
    if weighting == "reference":
        return nll.sum() / masked_tokens
    raise ValueError(f"unknown weighting {weighting!r}")
