"""The same seeds give the same tokens, masks, losses and likelihoods as ever: figures kept since before the code was moved.

Networks are float64 and their weights exact (`toy.eighths`), so that the figures are those of any machine. Packed bytes
are held by the golden files of `test_artifact.py`.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import pytest
import torch
from toy import ToyText, ToyWindows, eighths

from mezzotint.config import SAMPLERS, ModelConfig, TrainConfig
from mezzotint.network.model import Cache, Denoiser, Model
from mezzotint.sampling.denoise import denoise
from mezzotint.scoring.likelihood import causal, chain_rule, nelbo
from mezzotint.training import step

PLAIN = {"vocab_size": 39, "sequence_length": 24, "layers": 3, "width": 16, "heads": 4, "kv_heads": 2, "mlp_ratio": 2.0}
RICH = {
    "bigram_buckets": 50, "bigram_width": 8, "value_embedding_width": 8, "value_embedding_layers": 2, "unet_skips": True,
    "channel_scales": True, "exclusive_attention": True, "neighbour_reach": 2, "shifted_output": True,
    "embedding_mix": True, "rotary_dims": 2,
}  # fmt: skip
CAUSAL_TOO, IN_BLOCKS = {"train": {"causal_share": 0.5}}, {"train": {"block_size": 4}}


def model(info: dict[str, Any], **changes: Any) -> Model:
    config = ModelConfig(**{**PLAIN, **changes})
    tokenizer: Any = ToyText()
    return Model(config, tokenizer, eighths(Denoiser(config)), info, sha256="eighths")


def ids(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 39, (rows, length)))


def digest(*tensors: torch.Tensor) -> str:
    return hashlib.sha256(b"".join(t.to(torch.int64).numpy().astype("<i8").tobytes() for t in tensors)).hexdigest()[:12]


HIDDEN = {
    "plain": [-11.25218620835311, -17.151926985372274, -10.603603195512985, 9.664496135322477],
    "rich": [-7.4842171051654915, -46.76260197088611, 28.0340489326539, -60.59437643542952],
}


@pytest.mark.parametrize("changes", [{}, RICH], ids=["plain", "rich"])
def test_networks(changes):
    """Weighted sums of hidden states: whole windows, causal, blocks, and blocks from a cache."""
    net = model({}, **changes).network
    noisy, clean = ids(2, 23).masked_fill(ids(2, 23, 1) % 3 == 0, 39), ids(2, 23)
    cache = Cache(net, 2, 23)
    states = [net.hidden(noisy), net.hidden(noisy, 1), net.hidden_blocks(noisy, clean, 5)]
    states.append(torch.cat((cache.hidden(clean[:, :10], 5, 10), cache.hidden(noisy[:, 10:], 5, 0)), dim=1))
    weight = torch.arange(23 * 16).view(23, 16) % 7 - 3.0
    found = [float((state * weight).detach().sum()) for state in states]
    assert found == pytest.approx(HIDDEN["rich" if changes else "plain"], rel=1e-9)


TOKENS = {
    "ancestral": "227f26c3ba7a",
    "confidence": "f06484c5ffdb",
    "margin": "661263fae4ab",
    "entropy": "b4a970de25c3",
    "blocks": "577e73ddc1b8",
    "remask": "9cfb1618ef5a",
}


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_tokens(sampler):
    """Drawn ids, of a canvas given at both ends, over attention patterns and options."""
    found = []
    for info, attention in (({}, None), (CAUSAL_TOO, "causal"), (IN_BLOCKS, "block(4)")):
        drawn = model(info, **RICH)
        canvas = ids(3, 23)
        canvas[:, 4:18] = 39
        for options in ({}, {"steps": 6, "temperature": 0.8, "top_p": 0.9, "no_repeat": 2}):
            result = denoise(
                drawn, canvas, seed=3, sampler=sampler, attention=attention, allowed=torch.ones(39, dtype=torch.bool),
                stop_id=0, **options,
            )  # fmt: skip
            found.append(result.ids)
    assert digest(*found) == TOKENS[sampler]


LOSSES = {
    "masks": [4.315702438354492, 4.315702400672381, 6.435862889769466],
    "both": [4.349029779434204, 4.1698225704645004, 10.915178375570568],
    "blocks": [4.437026500701904, 4.415397822622506, 3.69936863345779],
    "curriculum": [4.728685110807419, 4.685120949515072, 8.3927483458298],
}


class Rows:
    """A loader of one batch."""

    def batch(self, step: int) -> np.ndarray:
        return ids(8, 24, step).numpy()


@pytest.mark.parametrize("name", ["masks", "both", "blocks", "curriculum"])
def test_losses(name):
    """Loss, NELBO and the gradient's norm of a step; which windows and positions are masked is in them."""
    settings: dict[str, Any] = {
        "masks": {}, "both": {"causal_share": 0.5}, "blocks": {"block_size": 4, "causal_share": 0.3},
        "curriculum": {"short_share": 0.5, "narrow_share": 0.6, "weighting": "reference", "micro_batch": 3},
    }[name]  # fmt: skip
    network = model({}, **RICH).network.train()
    loader: Any = Rows()
    trainer = step.Trainer(network, TrainConfig(batch=8, compile=False, **settings), loader, torch.device("cpu"))
    loss, bound = trainer.gradients(loader.batch(0), 5, progress=0.2)
    norm = torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None]).norm()
    assert [loss, bound, float(norm)] == pytest.approx(LOSSES[name], rel=1e-5)


SCORES = {"nelbo": 4.764499889663329, "chain_rule": 4.609035315513611, "causal": 4.462518479824066}


@pytest.mark.parametrize("score", [nelbo, chain_rule, causal])
def test_likelihoods(score):
    whole, windows = model(CAUSAL_TOO, **RICH), ToyWindows(ids(1, 100).numpy()[0], 24, ToyText())
    estimate = score(whole, windows)
    assert estimate.nats_per_token == pytest.approx(SCORES[score.__name__], rel=1e-6)  # logits are float32
