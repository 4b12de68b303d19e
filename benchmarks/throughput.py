"""Where a training step's time goes: tokens/s and model FLOP/s beside this machine's measured matrix-product rate.

    python benchmarks/throughput.py [--preset small] [--vocab-size N] [--rounds 5] [--steps 8] [--json FILE]

Rows, all with one shape and batch, timed in turns within one run: the preset's step; the same without causal windows;
and the reference's step (the output layer at every position, PyTorch's own attention kernel and Muon).

Model FLOPs are those that the mathematics needs, forward and backward: matrices, attention over the positions that see
each other (half for causal windows), and the output layer at predicted positions. The optimizer's are not among them.
The peak is the best rate of a few products in bfloat16 and in float32, the model's own shapes among them.
"""

from __future__ import annotations

import dataclasses
import itertools
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import new_parser, table, write_json
from torch import Tensor
from torch.nn import functional

import mezzotint.network.model
from mezzotint.config import ModelConfig, TrainConfig, preset
from mezzotint.network.model import Denoiser, count_parameters
from mezzotint.training.step import MaskedLoss, Trainer


class RandomWindows:
    """A loader of random ids: what a step costs does not depend on the text."""

    def __init__(self, model: ModelConfig, batch: int) -> None:
        self.ids = np.random.default_rng(0).integers(0, model.vocab_size, (batch, model.sequence_length))

    def batch(self, step: int) -> np.ndarray:
        return self.ids

    def token_counts(self, vocab_size: int) -> np.ndarray:
        return np.ones(vocab_size, dtype=np.int64)


class EveryPosition(MaskedLoss):
    """The reference's way: logits of all positions, of which the masked ones are kept."""

    def forward(self, corrupted: Tensor, ids: Tensor, predicted: Tensor | None, block_size: int, *_: object) -> Tensor:
        tables = self.network.tables(ids.shape[1], block_size)
        logits = self.network.logits(self.hidden(corrupted, block_size, tables))
        nll = functional.cross_entropy(logits.flatten(0, 1), ids.flatten(), reduction="none").view(ids.shape)
        if predicted is None:
            return nll
        masked = torch.zeros(ids.numel(), dtype=torch.bool).index_fill(0, predicted, True)
        return nll * masked.view(ids.shape)


def kernel_attention(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, causal: bool = False, dropout: float = 0.0
) -> Tensor:
    """PyTorch's fused kernel in place of `model.attend`."""
    if dropout:
        raise ValueError("the rows are timed without dropout")
    grouped = q.shape[1] != k.shape[1]
    attn_mask = None if attn_mask is None or causal else attn_mask.to(q.dtype)
    return functional.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, is_causal=causal, enable_gqa=grouped)


def model_flops(model: ModelConfig, config: TrainConfig, network: Denoiser) -> float:
    """Floating-point operations that one step needs, forward and backward (6 per weight and token)."""
    tokens, length = config.batch * model.sequence_length, model.sequence_length
    matrices = sum(m.weight.numel() for m in network.modules() if isinstance(m, torch.nn.Linear))
    causal = config.causal_share
    predicted = causal + (1 - causal) * (length + 1) / (2 * length)  # share of positions
    attention = 2 * model.layers * length * model.width * (1 - causal / 2)
    entries = min(model.vocab_size, config.sampled_entries) if config.sampled_share else model.vocab_size
    return 6 * tokens * (matrices + attention + predicted * entries * model.width)


def peak(model: ModelConfig, tokens: int, seconds: float = 0.25) -> float:
    """Best matrix-product rate in FLOP/s, of either type, over large squares and the shapes of the model's layers."""
    best = 0.0
    width, hidden = model.width, model.mlp_width
    shapes = ((2048, 2048, 2048), (4096, 1024, 1024), (tokens, width, hidden), (tokens, hidden, width))
    for (m, k, n), dtype in itertools.product(shapes, (torch.bfloat16, torch.float32)):
        a, b = torch.randn(m, k, dtype=dtype), torch.randn(n, k, dtype=dtype)
        functional.linear(a, b)
        rates, until = [], time.perf_counter() + seconds
        while time.perf_counter() < until:
            started = time.perf_counter()
            functional.linear(a, b)
            rates.append(2 * m * k * n / (time.perf_counter() - started))
        best = max(best, statistics.median(rates))
    return best


def main(words: Sequence[str] | None = None) -> None:
    """Parse, time, print."""
    parser = new_parser(__doc__)
    parser.add_argument("--preset", default="small")
    parser.add_argument("--vocab-size", type=int, default=0, help="pieces [the preset's]")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each row [5]")
    parser.add_argument("--steps", type=int, default=8, help="steps in a turn [8]")
    parser.add_argument("--eager", action="store_true", help="without torch.compile")
    parser.add_argument("--json", type=Path, help="also write the rows here")
    options = parser.parse_args(words)
    chosen = preset(options.preset)
    model = dataclasses.replace(chosen.model, vocab_size=options.vocab_size or chosen.model.vocab_size)
    # The end of a run: whole windows, all mask rates, the whole softmax.
    base = dataclasses.replace(
        chosen.train, steps=1000, short_share=0.0, narrow_share=0.0, sampled_share=0.0, compile=not options.eager
    )
    is_sampled = chosen.train.sampled_share and chosen.train.sampled_entries < model.vocab_size
    sampled = {"config": dataclasses.replace(base, sampled_share=1.0), "reference": False}
    rows: list[dict[str, Any]] = [
        {"step": f"{options.preset}, as trained", "config": base, "reference": False},
        *([{"step": "with a sampled softmax", **sampled}] if is_sampled else []),
        {"step": "masked windows only", "config": dataclasses.replace(base, causal_share=0.0), "reference": False},
        {"step": "the reference's", "config": dataclasses.replace(base, causal_share=0.0), "reference": True},
    ]
    own_attention = mezzotint.network.model.attend
    try:
        for row in rows:
            torch.manual_seed(0)
            mezzotint.network.model.attend = kernel_attention if row["reference"] else own_attention
            network = Denoiser(model)
            trainer = Trainer(network, row["config"], RandomWindows(model, base.batch), torch.device("cpu"))  # type: ignore[arg-type]
            if row["reference"]:
                trainer.loss = EveryPosition(network, row["config"].compile)
                ours = trainer.optimizers.muon
                group = ours.param_groups[0]
                keep = {k: group[k] for k in ("lr", "weight_decay", "momentum", "adjust_lr_fn")}
                trainer.optimizers.muon = torch.optim.Muon(group["params"], **keep)  # type: ignore[assignment]
            trainer.warm_up()
            row.update(trainer=trainer, times=[], flops=model_flops(model, row["config"], network))
            for _ in range(2):
                trainer.run_step(0.3)
        peaks = []
        for _ in range(options.rounds):
            peaks.append(peak(model, base.batch * model.sequence_length))
            for row in rows:
                # What is compiled depends on which attention it finds.
                mezzotint.network.model.attend = kernel_attention if row["reference"] else own_attention
                started = time.perf_counter()
                for _ in range(options.steps):
                    row["trainer"].run_step(0.3)
                row["times"].append((time.perf_counter() - started) / options.steps)
    finally:
        mezzotint.network.model.attend = own_attention
    best = statistics.median(peaks)
    tokens = base.batch * model.sequence_length
    print(f"{count_parameters(rows[0]['trainer'].network):,} parameters, batch {base.batch} x {model.sequence_length}, "
          f"{torch.get_num_threads()} threads; measured peak {best / 1e9:.0f} GFLOP/s\n")  # fmt: skip
    out, cells = [], []
    for row in rows:
        seconds = statistics.median(row["times"])
        rate = row["flops"] / seconds
        figures = [f"{1000 * seconds:.0f}", f"{tokens / seconds:,.0f}", f"{rate / 1e9:.0f}", f"{rate / best:.0%}"]
        cells.append([row["step"], *figures])
        out.append({"step": row["step"], "ms": 1000 * seconds, "tokens_per_second": tokens / seconds,
                    "model_flops_per_second": rate, "peak_flops_per_second": best, "share": rate / best})  # fmt: skip
    print(table(["step", "ms", "tokens/s", "model GFLOP/s", "of the peak"], cells))
    write_json(options.json, out)


if __name__ == "__main__":
    main()
