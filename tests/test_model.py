"""The denoiser: shapes, the reference's parameter count, visibility, and a second plain implementation."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from toy import eighths

from mezzotint.config import PRESETS, ModelConfig, parse_attention
from mezzotint.errors import ConfigError
from mezzotint.network import model as model_module
from mezzotint.network.layers import rotate, short_conv
from mezzotint.network.model import (
    Cache,
    Denoiser,
    Model,
    additive_mask,
    attend,
    block_mask,
    count_parameters,
)

PLAIN = ModelConfig(vocab_size=11, sequence_length=12, layers=3, width=16, heads=4, kv_heads=2, mlp_ratio=2.0)
RICH = dataclasses.replace(
    PLAIN,
    activation="leaky_relu2",
    rotary_dims=2,
    depth_scaled_norm=True,
    exclusive_attention=True,
    unet_skips=True,
    embedding_mix=True,
    channel_scales=True,
    neighbour_reach=2,
    bigram_buckets=7,
    bigram_width=4,
    value_embedding_width=4,
)
SHIFTED = dataclasses.replace(RICH, shifted_output=True)
# Networks here are float64, and what they sum in another order differs by 1e-14; of the logits, the rotation's angles
# and, compiled, the attention scores float32 is left, and 2e-6.
EXACT = {"atol": 1e-10, "rtol": 1e-10}
ROUNDED = {"atol": 2e-5, "rtol": 1e-5}


def build(config: ModelConfig, seed: int = 0) -> Denoiser:
    """A network all of whose parameters matter, in float64: sums in another order differ by rounding alone."""
    return eighths(Denoiser(config), seed)


def test_reference_has_the_seeds_parameter_count():
    with torch.device("meta"):
        assert count_parameters(Denoiser(PRESETS["reference"].model)) == 26_993_884


def test_small_is_within_its_size():
    with torch.device("meta"):
        assert count_parameters(Denoiser(PRESETS["small"].model)) <= 5_300_000


@pytest.mark.parametrize("changed", [{}, {"vocab_size": 1024, "layers": 7, "value_embedding_layers": 7}])
def test_best16mb_has_the_size_that_its_comment_derives(changed):
    """Within the challenge's bytes at 0.44 bytes a parameter, and not far below."""
    with torch.device("meta"):
        parameters = count_parameters(Denoiser(dataclasses.replace(PRESETS["best16mb"].model, **changed)))
    assert 15_500_000 < 0.44 * parameters + 183_000 < 16_000_000


def rms(x: torch.Tensor) -> torch.Tensor:
    return x / (x.square().mean(-1, keepdim=True) + torch.finfo(x.dtype).eps).sqrt()


def naive_logits(net: Denoiser, ids: list[int], free: int) -> torch.Tensor:
    """The same network position by position and head by head, for one window, from reference.md's description.

    Inputs from `free` on see one another, those before it only what is left of them.
    """

    def sees(n: int, m: int) -> bool:
        return m <= n or n >= free

    c, w = net.config, dict(net.named_parameters())
    length, d = len(ids), net.config.head_width
    x = torch.stack([w["embedding.weight"][i] for i in ids])
    if c.bigram_buckets:
        rows = []
        for n, own in enumerate(ids):
            b = ((36313 * own) ^ (27191 * ids[n - 1])) % (c.bigram_buckets - 1) if n else c.bigram_buckets - 1
            rows.append(w["bigram.project.weight"] @ w["bigram.embedding.weight"][b] * w["bigram.scale"])
        x = x + torch.stack(rows)
    if c.neighbour_reach:
        r = c.neighbour_reach
        mixed = x.clone()
        for n in range(length):
            for m in range(max(0, n - r), min(length, n + r + 1)):
                if sees(n, m):
                    mixed[n] = mixed[n] + w["neighbour_taps"][r + m - n] * x[m]
        x = mixed
    x = x0 = rms(x)
    skips = []
    for i in range(c.layers):
        p = {k.removeprefix(f"blocks.{i}."): v for k, v in w.items() if k.startswith(f"blocks.{i}.")}
        if c.unet_skips and i >= c.layers // 2 and skips:
            x = x + w["skip_scales"][i - c.layers // 2] * skips.pop()
        if c.embedding_mix:
            x = p["embedding_mix"][0] * x + p["embedding_mix"][1] * x0
        scale = 1 / math.sqrt(i + 1) if c.depth_scaled_norm else 1.0
        h = rms(x) * scale
        q = (h @ p["attention.query.weight"].T).view(length, c.heads, d)
        k = (h @ p["attention.key.weight"].T).view(length, c.kv_heads, d)
        v = h @ p["attention.value.weight"].T
        late = i - (c.layers - c.value_embedding_layers)
        if c.value_embedding_width and late >= 0:
            e = torch.stack([w["value_embedding.embedding.weight"][t] for t in ids])
            v = (
                v
                + e
                @ w["value_embedding.project.weight"].T
                * w["value_embedding.scale"]
                * w["value_embedding.layer_scales"][late]
            )
        v = v.view(length, c.kv_heads, d)
        q, k = rms(q), rms(k)
        channels = c.rotary_dims or d

        def turn(x: torch.Tensor, channels: int = channels) -> torch.Tensor:
            out = x.clone()
            for n in range(length):
                for j in range(channels // 2):
                    angle = n * c.rotary_base ** (-2 * j / channels)
                    a, b = x[n, :, j], x[n, :, j + channels // 2]
                    out[n, :, j] = a * math.cos(angle) + b * math.sin(angle)
                    out[n, :, j + channels // 2] = b * math.cos(angle) - a * math.sin(angle)
            return out

        q, k = turn(q) * p["attention.query_gain"][:, None], turn(k)
        y = torch.zeros(length, c.heads, d, dtype=x.dtype)
        for head in range(c.heads):
            kv = head // (c.heads // c.kv_heads)
            for n in range(length):
                seen = [m for m in range(length) if sees(n, m)]
                weights = torch.softmax(torch.stack([q[n, head] @ k[m, kv] / math.sqrt(d) for m in seen]), 0)
                out = sum(a * v[m, kv] for a, m in zip(weights, seen, strict=True))
                if c.exclusive_attention:
                    unit = v[n, kv] / v[n, kv].norm()
                    out = out - (out @ unit) * unit
                y[n, head] = out
        a = y.view(length, -1) @ p["attention.output.weight"].T
        x = x + a * (p["attention_scale"] if c.channel_scales else 1.0)
        h = rms(x) * scale @ p["mlp.up.weight"].T
        h = torch.where(h > 0, h, h * (0.5 if c.activation == "leaky_relu2" else 0.0)).square()
        x = x + h @ p["mlp.down.weight"].T * (p["mlp_scale"] if c.channel_scales else 1.0)
        if c.unet_skips and i < c.layers // 2:
            skips.append(x)
    raw = rms(x) @ w["embedding.weight"][: c.vocab_size].T
    return c.softcap * torch.tanh(raw / c.softcap)


def naive_windows(net: Denoiser, ids: list[int], size: int) -> torch.Tensor:
    """`naive_logits` block after block, each as the end of a window of its own."""
    lead = [net.config.mask_id] if net.config.shifted_output and size > 1 else []
    parts = []
    for start in range(0, len(ids), size):
        canvas = lead + ids[: start + size]
        parts.append(naive_logits(net, canvas, start)[start : len(canvas) - len(lead)])
    return torch.cat(parts)


@pytest.mark.parametrize("config", [PLAIN, RICH, SHIFTED], ids=["plain", "rich", "shifted"])
@pytest.mark.parametrize("size", [1, 4, 5, 12])
def test_equals_a_plain_second_implementation(config, size):
    net = build(config)
    ids = torch.randint(0, config.vocab_size + 1, (2, 12), generator=torch.Generator().manual_seed(1))
    words = {1: ["causal", "block(1)"], 12: ["full", "block(12)", "block(20)"]}.get(size, [f"block({size})"])
    with torch.no_grad():
        expected = torch.stack([naive_windows(net, row.tolist(), size) for row in ids])
        for word in words:
            torch.testing.assert_close(net(ids, block_size=parse_attention(word)), expected.float(), **ROUNDED)


@pytest.mark.parametrize("size", [1, 3])
def test_nothing_leaks_from_what_cannot_be_seen(size):
    net = build(RICH)
    ids = torch.randint(0, 11, (1, 12), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        before = net(ids, block_size=size)
        for changed in range(12):
            other = ids.clone()
            other[0, changed] = (other[0, changed] + 1) % 11
            same = net(other, block_size=size)
            start = changed // size * size
            torch.testing.assert_close(same[:, :start], before[:, :start], atol=0, rtol=0)
            assert not torch.equal(same[:, start:], before[:, start:])


def test_positions_select_rows_of_the_output():
    net = build(RICH)
    ids = torch.randint(0, 12, (3, 7), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        torch.testing.assert_close(net(ids, positions=ids == 11), net(ids)[ids == 11], **ROUNDED)


@pytest.mark.parametrize("size", [0, 1, 3])
def test_rows_that_go_through_in_parts_have_the_same_logits(size, monkeypatch):
    model, seen = Model(RICH, None, build(RICH)), []  # pyright: ignore[reportArgumentType]
    ids = torch.randint(0, 12, (5, 7), generator=torch.Generator().manual_seed(4))
    some = ids == 11
    some[0] = some[4] = False  # a part may have nothing that is asked for
    whole = model.network(ids, block_size=size).detach()
    model.network.blocks[0].register_forward_pre_hook(lambda _, given: seen.append(len(given[0])))
    monkeypatch.setattr(model_module, "TOKENS_IN_CACHE", 2 * 7)
    torch.testing.assert_close(model.logits(ids, block_size=size), whole, **ROUNDED)
    torch.testing.assert_close(model.logits(ids, block_size=size, positions=some), whole[some], **ROUNDED)
    assert seen == [2, 2, 1] * 2


def test_logits_are_capped_and_exclude_mask():
    net = build(PLAIN)
    with torch.no_grad():
        net.embedding.weight.mul_(1e4)
        logits = net(torch.zeros(1, 4, dtype=torch.int64))
    assert logits.shape == (1, 4, 11) and logits.dtype == torch.float32
    assert float(logits.abs().max()) <= 30.0


def test_fresh_network_is_nearly_uniform():
    """The last state has a norm of 4 (16 numbers around 1), so no logit is beyond 4 norms of an embedding."""
    network = Denoiser(RICH)
    with torch.no_grad():
        logp = network(torch.full((1, 12), 11)).log_softmax(-1)
        most = 4 * float(network.embedding.weight.norm(dim=1).max())
    assert most < 0.5
    assert float((logp + math.log(11)).abs().max()) <= 2 * most


def test_compiled_attention_equals_the_library_kernel(monkeypatch):
    net = build(RICH)
    ids = torch.randint(0, 12, (2, 12), generator=torch.Generator().manual_seed(4))
    for size in (0, 1, 5):
        with torch.no_grad():
            monkeypatch.setattr(torch.compiler, "is_compiling", lambda: False)
            eager = net(ids, block_size=size)
            monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
            torch.testing.assert_close(net(ids, block_size=size), eager, **ROUNDED)


def block_by_block(net: Denoiser, noisy: torch.Tensor, clean: torch.Tensor, size: int) -> torch.Tensor:
    """`hidden_blocks` by the ordinary forward, one canvas [clean blocks before, noisy block] for each block."""
    parts = []
    for start in range(0, noisy.shape[1], size):
        canvas = torch.cat((clean[:, :start], noisy[:, start : start + size]), dim=1)
        parts.append(net.hidden(canvas, size)[:, start:])
    return torch.cat(parts, dim=1)


@pytest.mark.parametrize("compiling", [False, True])
@pytest.mark.parametrize("config", [PLAIN, RICH, SHIFTED], ids=["plain", "rich", "shifted"])
@pytest.mark.parametrize("size", [1, 2, 3, 5, 11, 12, 20])
def test_all_blocks_at_once_equal_one_block_after_another(config, size, compiling, monkeypatch):
    net = build(config)
    random = torch.Generator().manual_seed(5)
    clean = torch.randint(0, 11, (2, 12), generator=random)
    noisy = clean.masked_fill(torch.rand(2, 12, generator=random) < 0.6, 11)
    with torch.no_grad():
        expected = block_by_block(net, noisy, clean, size)
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
        torch.testing.assert_close(net.hidden_blocks(noisy, clean, size), expected, **(ROUNDED if compiling else EXACT))
        if size < 12:  # what stands in the noisy blocks before does not matter, what stands in the clean ones does
            assert not torch.allclose(net.hidden(noisy, size)[:, -1], expected[:, -1], atol=1e-3)


@pytest.mark.parametrize("config", [RICH, SHIFTED], ids=["rich", "shifted"])
@pytest.mark.parametrize("size", [1, 3, 4, 5])
def test_kept_keys_and_values_change_nothing(size, config):
    """Several blocks kept at once, a block seen twice before it is, rows that go on at different times."""
    net = build(config)
    ids = torch.randint(0, 12, (3, 12), generator=torch.Generator().manual_seed(6))
    cache = Cache(net, 3, 12)
    with torch.no_grad():
        whole = net.hidden(ids, size)
        first = min(2 * size, 12)
        other = (ids[:, :first] + 1) % 12
        cache.hidden(other, size, keep=0)
        torch.testing.assert_close(cache.hidden(ids[:, :first], size, keep=size), whole[:, :first], **EXACT)
        for start in range(size, 12, size):
            for rows in ([2, 0], [1]):
                here = ids[rows, start : start + size]
                got = cache.hidden(here, size, keep=here.shape[1], rows=rows)
                torch.testing.assert_close(got, whole[rows, start : start + size], **EXACT)


def test_what_a_model_was_trained_on():
    def model(train):
        return Model(PLAIN, None, None, {"train": train})

    assert Model(PLAIN, None, None).block_size == 0 == model({"causal_share": 0.5}).block_size
    assert model({"causal_share": 1.0, "block_size": 0}).block_size == 1
    assert model({"causal_share": 0.5, "block_size": 4}).block_size == 4
    assert model({"causal_share": 0.5}).trained_causally and model({"block_size": 1}).trained_causally
    assert not any(model(train).trained_causally for train in ({}, [4], {"causal_share": "x"}))
    assert model([4]).block_size == 0 == model({"block_size": "4"}).block_size


def test_neighbours_of_one_position_window():
    x, taps = torch.arange(4.0).view(1, 1, 4), torch.arange(12.0).view(3, 4)
    assert torch.equal(short_conv(x, taps), x * taps[1])


@pytest.mark.parametrize("word", ["", "block(0)", "block(x)", "left", "block(-1)", "block(²)", f"block({'9' * 30})"])
def test_unknown_attention(word):
    with pytest.raises(ConfigError, match="attention"):
        parse_attention(word)


def test_bad_shapes():
    for change in ({"heads": 3}, {"kv_heads": 3}, {"rotary_dims": 3}, {"width": 0}, {"activation": "gelu"}):
        with pytest.raises(ConfigError):
            dataclasses.replace(PLAIN, **change)


def test_shifted_output_reads_one_mask_more():
    """Token i comes from the state before it; a causal window, which its caller has shifted, is read as ever."""
    network = build(SHIFTED)
    plain = build(RICH)
    plain.load_state_dict(network.state_dict())
    ids = torch.randint(0, 12, (3, 12), generator=torch.Generator().manual_seed(1))
    longer = torch.cat((torch.full((3, 1), RICH.mask_id), ids), dim=1)
    expected = plain(longer)[:, :-1]
    torch.testing.assert_close(network(ids), expected, **ROUNDED)
    positions = ids % 2 == 0
    torch.testing.assert_close(network(ids, positions=positions), expected[positions], **ROUNDED)
    torch.testing.assert_close(network(ids, block_size=1), plain(ids, block_size=1), **ROUNDED)
    assert not torch.allclose(network(ids), plain(ids))


@pytest.mark.parametrize(("size", "length"), [(None, 10), (3, 10), (1, 10), (1, 11), (1, 1)])
def test_attention_by_products_is_attention(size, length, monkeypatch):
    """What compiled training on a CPU uses, written-out gradients too, against PyTorch's kernel in float64."""
    place = torch.arange(length)
    mask = None if size is None else additive_mask(block_mask(place, place, size)).double()
    found = []
    for compiling in (False, True):
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda compiling=compiling: compiling)
        torch.manual_seed(0)
        q, k, v = (torch.randn(2, h, length, 8, dtype=torch.float64, requires_grad=True) for h in (4, 2, 2))
        out = attend(q, k, v, mask, causal=size == 1)
        out.backward(torch.randn(out.shape, dtype=torch.float64))
        found.append((out.detach(), q.grad, k.grad, v.grad))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=5e-6, rtol=5e-6)  # scores are float32 in both


def test_rotation_of_whole_heads_is_that_of_their_first_channels():
    """The two ways of `rotate` agree: the one for whole heads, and the one that leaves channels as they are."""
    torch.manual_seed(0)
    x, angle = torch.randn(2, 5, 3, 8), torch.randn(5, 1, 4)
    more = torch.cat((x, torch.ones(2, 5, 3, 2)), dim=-1)
    both = rotate(more, angle.cos(), angle.sin())
    assert torch.equal(both[..., :8], rotate(x, angle.cos(), angle.sin())) and (both[..., 8:] == 1).all()
