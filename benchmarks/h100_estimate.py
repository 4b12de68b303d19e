"""An estimate of a training step's time on H100s from rates measured on one and operations and bytes counted.

    python benchmarks/h100_estimate.py [--preset reference] [--gpus 8] [--utilisation 0.6]

The challenge entry took 103.5 ms for a step of 786,432 tokens on 8 H100s with FlashAttention 3. What is counted, for one
GPU's share of the batch; LOG.md has the rates, of 2026-11-26, under "one H100":

matrices    forward and backward, at `--utilisation` of the 774 TFLOP/s that large bfloat16 products reached; the share is an
            assumption, for widths of 512 and 640
attention   forward and backward, at the rate of PyTorch's fastest kernel at windows of 2,048 or 1,024 tokens
output      output layer, softcap and cross-entropy at predicted positions, at the rate of compiled code
traffic     what lies between the products (norms, rotations, activations, residuals) at the 2.99 TB/s of a copy: in
            bfloat16, read and written once by a fused kernel forward and twice backward
Muon        Newton-Schulz, five iterations, shared by the GPUs, and its updates gathered over NVLink at 450 GB/s each way
weights     optimizer, clipping and average: float32 master weights, gradients and states read and written once
gradients   an all-reduce of float32 gradients over NVLink, of which half hides behind the backward pass

Masks and windows are made beside the step before and cost no time of their own. Launches are not counted: a step of this
size keeps a GPU busy for longer than Python takes to launch it. One forward pass has at most 48 windows of 2,048 tokens on
a GPU: the activations of the whole share fit 80 GB.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from common import new_parser, table

from mezzotint.config import PRESETS, preset
from mezzotint.network.model import Denoiser, count_parameters

FLOPS = 989e12
"""What the maker states for dense bfloat16 products."""
PRODUCTS, HBM, NVLINK = 774e12, 2.99e12, 450e9
ATTENTION = {2048: 261e12, 1024: 138e12}
"""Model FLOP/s of attention forward and backward, by tokens of a window (1,024: half of the windows causal)."""
OUTPUT = {1024: 164e12, 8192: 272e12}
"""FLOP/s of the output layer with all that follows it, by pieces of the vocabulary."""


def nearest(rates: dict[int, float], size: int) -> float:
    """The rate that was measured at the size nearest to `size`."""
    return rates[min(rates, key=lambda measured: abs(measured - size))]


def estimate(name: str, gpus: int, utilisation: float) -> dict[str, float]:
    """Seconds of each part of a step."""
    chosen = preset(name)
    model, config = chosen.model, chosen.train
    with torch.device("meta"):
        network = Denoiser(model)
    weights = count_parameters(network)
    linear = [module.weight for module in network.modules() if isinstance(module, torch.nn.Linear)]
    matrix_weights = sum(w.numel() for w in linear)
    length, causal = model.sequence_length, config.causal_share
    tokens = config.batch * length / gpus
    predicted = tokens * (causal + (1 - causal) * (length + 1) / (2 * length))
    # Per token and layer: residual and norm in and out twice, queries, keys, values and output, the MLP's hidden units.
    touched = model.layers * (8 * model.width + 4 * model.width + 4 * model.mlp_width)
    muon = 0.0
    for weight in linear:
        small, large = sorted(weight.shape)
        muon += 5 * (2 * small * small * large * 2 + 2 * small**3)
    others = (gpus - 1) / gpus
    return {
        "matrices": 6 * tokens * matrix_weights / (utilisation * PRODUCTS),
        "attention": 12 * tokens * model.layers * length * model.width * (1 - causal / 2) / nearest(ATTENTION, length),
        "output": 6 * predicted * model.vocab_size * model.width / nearest(OUTPUT, model.vocab_size),
        "traffic": 3 * 2 * touched * tokens / HBM,
        "Muon": muon / gpus / (utilisation * PRODUCTS) + others * matrix_weights * 2 / NVLINK,
        "weights": weights * 4 * 11 / HBM,
        "gradients": 0.5 * 2 * others * weights * 4 / NVLINK,
    }


def main(words: Sequence[str] | None = None) -> None:
    """Parse, estimate, print."""
    parser = new_parser(__doc__)
    parser.add_argument("--preset", default="reference", choices=PRESETS)
    parser.add_argument("--gpus", type=int, default=8)
    parser.add_argument("--utilisation", type=float, default=0.6, help="share of 774 TFLOP/s for matrices [0.6]")
    options = parser.parse_args(words)
    chosen = preset(options.preset)
    tokens = chosen.train.batch * chosen.model.sequence_length
    parts = estimate(options.preset, options.gpus, options.utilisation)
    total = sum(parts.values())
    print(f"{options.preset}: {tokens:,} tokens a step on {options.gpus} H100s, estimated\n")
    print(table(["part", "ms"], [[n, f"{1000 * s:.1f}"] for n, s in [*parts.items(), ("in all", total)]]))
    print(f"\n{tokens / total / 1e6:.1f} million tokens/s. The challenge entry: 103.5 ms, 7.6 million tokens/s.")


if __name__ == "__main__":
    main()
