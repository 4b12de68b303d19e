"""Masking and the NELBO: the one formula that trains and evaluates.

For a window x of T tokens, with k uniform on 1..T and S a uniform set of k positions,

    NELBO(x) = E_k E_S [ (T / k) * sum_{i in S} -log p(x_i | x outside S) ]   nats,

which is the mean over all orders of the chain-rule NLL and hence an upper bound on -log p(x)
(Uria et al. 2014, "A deep and tractable density estimator", eq. 6; Hoogeboom et al. 2022,
"Autoregressive diffusion models", eq. 4; Ou et al. 2025, "Your absorbing discrete diffusion...", eq. 3.5).

Pure functions of tensors. Knows nothing of models, files or optimizers.
"""

from __future__ import annotations

import torch
from torch import Tensor


def stratified_counts(n: int, length: int, generator: torch.Generator) -> Tensor:
    """Draw `n` mask counts, each uniform on 1..length, spread evenly: one in each n-th of the range.

    Returns int64 [n] in random order. Averages over the draw are unbiased for averages over uniform counts, at a
    lower variance than independent draws (stratified sampling; Kingma et al. 2021 use the same for diffusion times).
    """
    jitter = torch.rand(n, generator=generator, dtype=torch.float64, device=generator.device)
    strata = torch.randperm(n, generator=generator, device=generator.device)
    return ((strata + jitter) * (length / n)).long().clamp(max=length - 1) + 1


def mask_by_count(ids: Tensor, counts: Tensor, mask_id: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Replace exactly `counts[b]` uniformly chosen tokens of window b by MASK.

    ids: int64 [B, T]; counts: int64 [B], 1..T. Returns (corrupted [B, T], masked bool [B, T]).
    """
    noise = torch.rand(ids.shape, generator=generator, device=generator.device).to(ids.device)
    order = noise.argsort(dim=1)
    masked = torch.zeros_like(ids, dtype=torch.bool)
    masked.scatter_(1, order, torch.arange(ids.shape[1], device=ids.device) < counts.to(ids.device)[:, None])
    return ids.masked_fill(masked, mask_id), masked


def masked_nll(logits: Tensor, ids: Tensor, masked: Tensor) -> Tensor:
    """-log p of the true token at each masked position, in nats.

    logits: [n, V] at the n True positions of `masked` in row-major order; ids, masked: [B, T].
    Returns [B, T], zero where nothing is masked, in the logits' type.
    """
    nll = torch.nn.functional.cross_entropy(logits, ids[masked], reduction="none")
    return torch.zeros(ids.shape, dtype=nll.dtype, device=nll.device).masked_scatter(masked, nll)


def nelbo_per_window(nll: Tensor, counts: Tensor) -> Tensor:
    """The NELBO estimate of each window from one mask: (T / k) * sum of its masked NLL. [B, T], [B] -> [B] nats."""
    return nll.sum(dim=1) * (nll.shape[1] / counts)


def training_loss(nll: Tensor, counts: Tensor, weighting: str, windows: int, masked_tokens: int) -> Tensor:
    """These rows' share of the loss of a whole batch of `windows` windows with `masked_tokens` masks, nats per token.

    Shares of micro-batches or processes add up to the batch's loss. nll: [B, T]; counts: [B].
    `nelbo`: mean NELBO per token. `reference`: the seed's mean over all masked tokens of the batch, which weights a
    window by its mask rate t and so optimizes the integral of 2 t CE(t) dt instead of the integral of CE(t) dt.
    """
    if weighting == "nelbo":
        return nelbo_per_window(nll, counts).sum() / (nll.shape[1] * windows)
    if weighting == "reference":
        return nll.sum() / masked_tokens
    raise ValueError(f"unknown weighting {weighting!r}")
