"""An estimate of a training step's time on H100s from floating-point operations and bytes; nothing is measured.

    python benchmarks/h100_estimate.py [--preset reference] [--gpus 8] [--utilisation 0.4]

The challenge entry took 103.5 ms for a step of 786,432 tokens on 8 H100s with FlashAttention 3. What is counted, for one
GPU's share of the batch:

products    matrices, attention and output layer, forward and backward, at `--utilisation` of 989 TFLOP/s (dense bfloat16);
            40% is what well-kept training code reaches at widths of 512, which are too narrow for more
traffic     what lies between the products (norms, rotations, activations, residuals), through HBM at 3.35 TB/s: in
            bfloat16, read and written once by a fused kernel forward and twice backward
Muon        Newton-Schulz on every matrix, five iterations, which each GPU repeats for itself
weights     optimizer and average: float32 master weights, gradients and states read and written once
gradients   an all-reduce of float32 gradients over NVLink at 450 GB/s each way, of which half hides behind the backward pass

One forward pass has at most 48 windows of 2,048 tokens on a GPU: the activations of the whole share fit 80 GB.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from common import new_parser, table
from throughput import model_flops

from mezzotint.config import PRESETS, preset
from mezzotint.model import Denoiser, count_parameters

FLOPS, HBM, NVLINK = 989e12, 3.35e12, 450e9


def estimate(name: str, gpus: int, utilisation: float) -> dict[str, float]:
    """Seconds of each part of a step."""
    chosen = preset(name)
    model, config = chosen.model, chosen.train
    with torch.device("meta"):
        network = Denoiser(model)
    weights = count_parameters(network)
    tokens = config.batch * model.sequence_length / gpus
    products = model_flops(model, config, network) / gpus
    # Per token and layer: residual and norm in and out twice, queries, keys, values and output, the MLP's hidden units.
    touched = model.layers * (8 * model.width + 4 * model.width + 4 * model.mlp_width) + 4 * model.vocab_size
    muon = 0.0
    for module in network.modules():
        if isinstance(module, torch.nn.Linear):
            small, large = sorted(module.weight.shape)
            muon += 5 * (2 * small * small * large * 2 + 2 * small**3)
    return {
        "products": products / (utilisation * FLOPS),
        "traffic": 3 * 2 * touched * tokens / HBM,
        "Muon": muon / (utilisation * FLOPS),
        "weights": weights * 4 * 10 / HBM,
        "gradients": 0.5 * 2 * (gpus - 1) / gpus * weights * 4 / NVLINK,
    }


def main(words: Sequence[str] | None = None) -> None:
    """Parse, estimate, print."""
    parser = new_parser(__doc__)
    parser.add_argument("--preset", default="reference", choices=PRESETS)
    parser.add_argument("--gpus", type=int, default=8)
    parser.add_argument("--utilisation", type=float, default=0.4, help="share of the peak that products reach [0.4]")
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
