"""The network's next-token probabilities in arithmetic that gives the same bits on every machine.

FORMAT.md, "Exact arithmetic, versions 1 and 2", is the specification; this is one way to compute it. Why it is exact:

- A matrix product has integers on both sides (weights of at most 63, inputs of at most 127 in size), and all its partial
  sums stay below 2^24 in float32, 2^53 in float64 or 2^31 in int32. So no order of summation, no fused multiply-add and
  no kernel can change it, and whichever kernel is fastest may be taken. `_Matrix` checks both the bound and the kernel.
- Everything else is one IEEE 754 operation at a time on float32 arrays (add, multiply, divide, square root, compare,
  round half to even), each rounded correctly by definition. Each is an array operation of its own, of NumPy or torch,
  never a compiler's that might contract them. Divisions are NumPy's: torch may multiply by a reciprocal instead.
- Sums of floats have a stated order, `fold`. Sums of integers need none.
- exp, tanh, cos and sin are tables of integers made by Python's integers, never by a math library.

Knows nothing of text, files or entropy coding.
"""

from __future__ import annotations

import math
from decimal import Decimal, localcontext
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from mezzotint.config import ModelConfig
from mezzotint.errors import MezzotintError
from mezzotint.network.model import Model

TOTAL = 1 << 24
"""What the integer probabilities of one token sum to."""
INPUT, WEIGHT = (
    127,
    63,
)  # with weights of at most 63 even processors that add pairs of products in 16 bits cannot saturate
UNIT = np.float32(128)  # a normalised query or key channel of 1
VALUE = 2047  # the largest value channel
SHARE = np.float32(4096)  # what the attention weights of a query come to, up to rounding
SCORE_STEP, LOGIT_STEP = 32, 64  # steps of attention scores and of logits per nat
WINDOW = 4096  # the most tokens of a window; float32 holds the sums of its attention
ROWS = 64  # queries that go through attention together
EPSILON = np.float32(2.0**-23)
TINY = np.float32(2.0**-80)
F32 = np.float32
BIAS_FLOATS = 1 << 23  # the most that is kept of the values' biases, all made before
LARGEST = 1 << 14  # in size, of a weight
NARROW = 64  # columns from which on `fold` adds rows of the transpose
FEW = 1 << 15  # numbers up to which a call of NumPy takes less time than one of torch, whose calls cost more
CHUNK = 1 << 17  # logits, or channels of keys, that are worked on together: they stay in a core's cache
FUTURE = np.triu(np.full((ROWS, ROWS), F32(-np.inf)), 1)
"""What hides later places from a score."""


def fold(x: np.ndarray) -> np.ndarray:
    """Sum over the last axis in a stated order: the later half is added to the earlier one until one is left.

    x: [..., K]. Returns [..., 1].
    """
    y = x.reshape(-1, x.shape[-1])
    n = x.shape[-1]
    while n > NARROW and x.size > FEW:
        half = (n + 1) // 2
        z = y[:, :half].copy()
        z[:, : n - half] += y[:, half:n]
        y, n = z, half
    y = np.array(y.T, order="C")  # a copy, and whole rows to add
    while n > 1:
        half = (n + 1) // 2
        y[: n - half] += y[half:n]
        n = half
    return y[0].reshape(*x.shape[:-1], 1)


@lru_cache(64)
def exp_table(step: int, peak: int) -> np.ndarray:
    """round(peak * e^(-i / step)) for i = 0, 1, ... up to the first 0, as integers."""
    with localcontext() as context:
        context.prec = 60
        ratio = int((Decimal(-1) / step).exp() * (1 << 160))
    value, out = peak << 160, []
    while not out or out[-1]:
        out.append((value + (1 << 159)) >> 160)
        value = value * ratio >> 160
    return np.array(out)


@lru_cache(64)
def cap_table(cap: float) -> np.ndarray:
    """round(64 * cap * tanh(i / (64 * cap))) for i = 0, 1, ..., where tanh has as good as reached 1 or i 2^20."""
    size = min(math.ceil(10 * cap * LOGIT_STEP), 1 << 20)
    bits = 160
    scale = Decimal(cap) * LOGIT_STEP
    with localcontext() as context:
        context.prec = 60
        ratio = int((Decimal(-2) / scale).exp() * (1 << bits))
        top = int(scale * (1 << bits))
    one, power = 1 << bits, 1 << bits
    out = []
    for _ in range(size + 1):
        out.append((2 * top * (one - power) // (one + power) + one) >> (bits + 1))
        power = power * ratio >> bits
    return np.array(out)


@lru_cache(16)
def rotary_tables(length: int, channels: int, base: float) -> tuple[np.ndarray, np.ndarray]:
    """cos and sin of place * base^(-2 i / channels), rounded to multiples of 2^-15, float32 [length, channels / 2]."""
    bits = 160
    shape = (length, channels // 2)
    cos, sin = np.zeros(shape), np.zeros(shape)
    for i in range(channels // 2):
        with localcontext() as context:
            context.prec = 60
            angle = (Decimal(base).ln() * (-2 * i) / channels).exp()
            c = s = Decimal(0)
            term, n = Decimal(1), 0
            while abs(term) > Decimal(10) ** -58:  # the series of e^(i angle)
                if n % 2:
                    s += -term if n % 4 == 3 else term
                else:
                    c += -term if n % 4 == 2 else term
                n += 1
                term = term * angle / n
            step_c, step_s = int(c * (1 << bits)), int(s * (1 << bits))
        a, b = 1 << bits, 0
        for place in range(length):
            cos[place, i] = (a + (1 << bits - 16)) >> bits - 15
            sin[place, i] = (b + (1 << bits - 16)) >> bits - 15
            a, b = (a * step_c - b * step_s) >> bits, (a * step_s + b * step_c) >> bits
    return (cos / 32768).astype(F32), (sin / 32768).astype(F32)


class _Matrix:
    """A weight matrix [R, K] as integers of at most 63 with a float32 scale for each row."""

    def __init__(self, weight: np.ndarray) -> None:
        weight = np.ascontiguousarray(weight, dtype=F32)
        largest = np.abs(weight).max(axis=1)
        self.scale = largest / F32(WEIGHT)
        inverse = np.where(largest > 0, F32(WEIGHT) / np.where(largest > 0, largest, F32(1)), F32(0))
        codes = np.clip(np.rint(weight * inverse[:, None]), -WEIGHT, WEIGHT)
        # The bound of every partial sum, in any order: float32 holds integers below 2^24.
        bound = INPUT * int(np.abs(codes).sum(axis=1, dtype=np.float64).max(initial=0))
        self.kind: Any = F32 if bound < 1 << 24 else np.float64
        self.codes = np.ascontiguousarray(codes.T.astype(self.kind))
        self.short = torch.from_numpy(codes.astype(np.int8)).T if bound < 1 << 31 else None
        if not self._integer_kernel_is_exact():
            self.short = None
            probe = np.where(self.codes.T[:4] < 0, -INPUT, INPUT).astype(self.kind)
            if not np.array_equal(probe @ self.codes, probe.astype(np.int64) @ self.codes.astype(np.int64)):
                raise MezzotintError("this machine's matrix products are not exact in float32: cannot compress here")

    def _integer_kernel_is_exact(self) -> bool:
        """Try torch's int8 product on inputs that make the largest sums."""
        if self.short is None or not hasattr(torch, "_int_mm"):
            return False
        rows = np.sign(self.codes.T[:24]) * INPUT
        mixed = (np.arange(rows.size).reshape(rows.shape) * 89 % 255 - INPUT).astype(rows.dtype)
        codes = self.codes.astype(np.float64)
        for probe in (rows, mixed, mixed[:1]):
            try:
                found = torch._int_mm(torch.from_numpy(probe.astype(np.int8)), self.short).numpy()
            except (RuntimeError, NotImplementedError):
                return False
            if not np.array_equal(found, probe.astype(np.float64) @ codes):
                return False
        return True

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """Integers x [n, K] of at most 127 -> exact sums [n, R], rounded to float32."""
        if self.short is None:
            return np.matmul(x.astype(self.kind, copy=False), self.codes).astype(F32, copy=False)
        sums = torch._int_mm(torch.from_numpy(x.astype(np.int8, copy=False)), self.short)
        return sums.view(torch.float32).copy_(sums).numpy()  # number by number in the same memory

    def product(self, x: np.ndarray) -> np.ndarray:
        """Integers x [n, K] -> the sums times the scales of their rows, float32 [n, R]."""
        return times(self(x), self.scale)


def times(x: np.ndarray, by: np.ndarray) -> np.ndarray:
    """x * by, float32, in the memory of x; torch takes half as long as NumPy where `by` is spread out over many."""
    if x.size <= FEW:
        return np.multiply(x, by, out=x)
    torch.from_numpy(x).mul_(torch.from_numpy(by))
    return x


def total(x: np.ndarray) -> np.ndarray:
    """Sums over the last axis of integers, which no order changes: [..., K] -> [..., 1]."""
    if x.size <= FEW:
        return np.add.reduce(x, axis=-1, keepdims=True)
    return torch.from_numpy(x).sum(-1, keepdim=True).numpy()


def products(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Stacked products of integers, [..., n, K] @ [..., K, m], whose sums float32 holds; by the faster kernel."""
    if a.shape[-2] == 1 or torch.get_float32_matmul_precision() != "highest":
        return np.matmul(a, b)
    return torch.matmul(torch.from_numpy(a), torch.from_numpy(b)).numpy()


def to_integers(x: np.ndarray, *, signed: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """Rows of x [n, K] as integers of at most 127, int8, and what one of them is worth, float32 [n, 1].

    signed: whether any number may be below 0.
    """
    sizes = np.abs(x) if signed else x
    if x.size <= FEW:
        largest = np.maximum.reduce(sizes, axis=-1, keepdims=True)
        y = x * (F32(INPUT) / np.maximum(largest, TINY))
        return np.rint(y, out=y).astype(np.int8), largest / F32(INPUT)
    largest = torch.from_numpy(sizes).amax(-1, keepdim=True).numpy()
    steps = torch.from_numpy(F32(INPUT) / np.maximum(largest, TINY))
    return torch.mul(torch.from_numpy(x), steps).round_().to(torch.int8).numpy(), largest / F32(INPUT)


def shares(z: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Scores z [..., S], spoilt, -> integers in proportion to their exponentials (see `exp_table`) that sum to about 4096."""
    if z.size <= FEW:
        t = np.subtract(np.maximum.reduce(z, axis=-1, keepdims=True) + F32(0.5), z, out=z)
        np.minimum(t, F32(len(table) - 1), out=t)
        e = table.take(t.astype(np.int64), mode="clip")
        return np.rint(times(e, SHARE / total(e)), out=e)
    t = torch.from_numpy(z)
    torch.sub(t.amax(-1, keepdim=True) + 0.5, t, out=t)
    t.clamp_(max=len(table) - 1)
    e = torch.index_select(torch.from_numpy(table), 0, t.to(torch.int32).view(-1)).view(t.shape).numpy()
    return np.rint(times(e, SHARE / total(e)), out=e)


def inverse_rms(x: np.ndarray, epsilon: np.float32 = EPSILON) -> np.ndarray:
    """1 / sqrt(mean of squares + epsilon) of rows, [..., K] -> [..., 1]."""
    mean = fold(x * x) * (F32(1) / F32(x.shape[-1]))
    return F32(1) / np.sqrt(mean + epsilon)


class _Entry:
    """What enters the first layer, and the biases of the values: what depends on inputs alone."""

    def __init__(self, config: ModelConfig, state: dict[str, np.ndarray]) -> None:
        self.config, self.embedding = config, state["embedding.weight"]
        self.taps = state.get("neighbour_taps")
        self.bigram = self.values = None
        if config.bigram_buckets:
            self.bigram = state["bigram.embedding.weight"], _Matrix(state["bigram.project.weight"])
            self.bigram_scale = state["bigram.scale"]
        self.biases: np.ndarray | None = None
        if config.value_embedding_width:
            self.values = state["value_embedding.embedding.weight"], _Matrix(state["value_embedding.project.weight"])
            self.value_scale = state["value_embedding.scale"]
            if (config.vocab_size + 1) * config.kv_heads * config.head_width <= BIAS_FLOATS:
                self.biases = self.value_bias(np.arange(config.vocab_size + 1))

    def value_bias(self, ids: np.ndarray) -> np.ndarray:
        """What ids [n] add to the values of all late layers, before the layers' scales: [n, kv_heads * D]."""
        assert self.values is not None
        if self.biases is not None:
            return self.biases[ids]
        table, project = self.values
        x, worth = to_integers(table[ids])
        return times(project.product(x), worth * self.value_scale)

    def __call__(self, ids: np.ndarray, new: int) -> np.ndarray:
        """The vectors [B * new, W] of the last `new` of the inputs ids [B, m], whose first ones are context."""
        c = self.config
        x = self.embedding[ids]
        if self.bigram is not None:
            table, project = self.bigram
            previous = np.concatenate((np.full((len(ids), 1), -1), ids[:, :-1]), axis=1)
            bucket = np.bitwise_xor(36_313 * ids, 27_191 * previous) % (c.bigram_buckets - 1)
            y, worth = to_integers(table[np.where(previous < 0, c.bigram_buckets - 1, bucket).ravel()])
            x += times(project.product(y), worth * self.bigram_scale).reshape(x.shape)
        if self.taps is not None:
            reach = c.neighbour_reach
            padded = np.concatenate((np.zeros((len(ids), reach, c.width), F32), x), axis=1)
            mixed = np.zeros_like(x)
            for tap in range(reach + 1):
                mixed += padded[:, tap : tap + x.shape[1]] * self.taps[tap]
            x = x + mixed
        x = x[:, x.shape[1] - new :].reshape(-1, c.width)
        return x * inverse_rms(x)


class _Output:
    """The last hidden states' probabilities."""

    def __init__(self, softcap: float, weight: np.ndarray) -> None:
        self.matrix = _Matrix(weight)
        half = cap_table(softcap)
        self.edge = len(half) - 1
        self.cap = torch.from_numpy(np.concatenate((-half[:0:-1], half)).astype(np.int32))
        table = exp_table(LOGIT_STEP, TOTAL).astype(np.float64)
        # Its last entry, 0, as often as a logit may lie below the largest: so no distance has to be cut to its length.
        self.exp = torch.from_numpy(np.pad(table, (0, max(0, 2 * int(half[-1]) + 1 - len(table)))))
        self.rows = max(1, CHUNK // len(weight))

    def excess(self, hidden: np.ndarray) -> np.ndarray:
        """Hidden states [n, W], at most `rows` -> each token's frequency less 1, float64 integers [n, V]."""
        xi, worth = to_integers(hidden)
        z = times(self.matrix.product(xi), worth * inverse_rms(hidden) * F32(LOGIT_STEP))
        place = torch.from_numpy(z).round_().clamp_(-self.edge, self.edge).add_(self.edge).to(torch.int32)
        level = torch.index_select(self.cap, 0, place.view(-1)).view(place.shape)
        row, best = np.arange(len(z)), level.numpy().argmax(axis=1)
        torch.sub(torch.from_numpy(level.numpy()[row, best][:, None]), level, out=level)
        f = torch.index_select(self.exp, 0, level.view(-1)).view(level.shape)
        size = f.shape[1]
        f.mul_(torch.from_numpy((TOTAL - size) / f.sum(-1, keepdim=True).numpy())).floor_()
        excess = f.numpy()
        excess[row, best] += TOTAL - size - f.sum(-1).numpy()
        return excess


class ExactNetwork:
    """A causal model's integer probabilities. See the module's head and FORMAT.md."""

    def __init__(self, model: Model) -> None:
        c = self.config = model.config
        if c.head_width > 512 or c.width > 1 << 16 or c.mlp_width > 1 << 16:
            raise MezzotintError("compress takes models with heads of at most 512 channels and 65,536 channels in all")
        if not c.rotary_base >= 1:
            raise MezzotintError(f"compress takes models with a rotary_base of at least 1, not {c.rotary_base}")
        state = {name: value.detach().float().cpu().numpy() for name, value in model.network.state_dict().items()}
        if any(not np.abs(value).max(initial=0) <= LARGEST for value in state.values()):
            raise MezzotintError(f"compress takes models whose weights are at most {LARGEST:,} in size")
        self.length = min(c.sequence_length, WINDOW)
        self.half = max(1, self.length // 2)
        self.state = {name: value for name, value in state.items() if value.ndim < 2 or "mix" in name}
        self.state["skip_scales"] = state.get("skip_scales", np.zeros((0, 1), F32))
        self.entry = _Entry(c, state)
        self.output = _Output(c.softcap, state["embedding.weight"][: c.vocab_size])
        self.layers: list[dict[str, _Matrix]] = []
        for i in range(c.layers):
            at = f"blocks.{i}."
            inside = np.concatenate([state[f"{at}attention.{part}.weight"] for part in ("query", "key", "value")])
            self.layers.append({
                "inside": _Matrix(inside), "output": _Matrix(state[f"{at}attention.output.weight"]),
                "up": _Matrix(state[f"{at}mlp.up.weight"]), "down": _Matrix(state[f"{at}mlp.down.weight"]),
            })  # fmt: skip
        channels = c.rotary_dims or c.head_width
        places = max(self.length, 2 * self.half)
        cos, sin = rotary_tables(places, channels, c.rotary_base)
        still = np.zeros((places, c.head_width - channels), F32)
        # For all heads of queries and keys, one after another: [places, (heads + kv_heads) * D].
        self.cos = np.tile(np.concatenate((cos, cos, still + 1), axis=1), (1, c.heads + c.kv_heads))
        self.sin = np.tile(np.concatenate((sin, -sin, still), axis=1), (1, c.heads + c.kv_heads))
        self.turning = channels
        self.score_exp = exp_table(SCORE_STEP, 4096).astype(F32)
        self.value_grid = [self._grid(state, i) for i in range(c.layers)]
        gains = [state[f"blocks.{i}.attention.query_gain"] for i in range(c.layers)]
        step = F32(SCORE_STEP / (128 * 128 * math.sqrt(c.head_width)))
        self.score_scale = [(gain * step).reshape(c.kv_heads, -1, 1, 1) for gain in gains]

    def _late(self, layer: int) -> int:
        """Which of the layers whose values have a bias this is; below 0 where it has none."""
        c = self.config
        return layer - (c.layers - c.value_embedding_layers) if self.entry.values is not None else -1

    def _grid(self, state: dict[str, np.ndarray], layer: int) -> np.float32:
        """Steps per 1 of a layer's values: a power of two that leaves room for 16 times their root mean square."""
        weight = state[f"blocks.{layer}.attention.value.weight"]
        mean = fold(np.square(weight.reshape(1, -1)))[0, 0] / F32(len(weight))
        if (late := self._late(layer)) >= 0:
            bias = self.entry.value_bias(np.arange(self.config.vocab_size + 1))
            bias = bias * self.state["value_embedding.layer_scales"][late]
            mean = mean + fold(np.square(bias.reshape(1, -1)))[0, 0] / F32(bias.size)
        return F32(2.0 ** (7 - int(np.frexp(np.sqrt(np.maximum(mean, TINY)))[1])))

    def rotate(self, x: np.ndarray, at: int, n: int) -> np.ndarray:
        """x [B * n, heads * D] at places at .. at + n - 1, turned and normalised, in integers of 1 / 128."""
        width, half = self.config.head_width, self.turning // 2
        size = x.shape[-1]
        turned = np.empty((len(x), size // width, width), F32)
        y = x.reshape(turned.shape)
        turned[..., :half] = y[..., half : 2 * half]
        turned[..., half : 2 * half] = y[..., :half]
        if 2 * half < width:
            turned[..., 2 * half :] = 0
        cos, sin = self.cos[at : at + n, :size], self.sin[at : at + n, :size]
        out, other = y.reshape(-1, n, size), turned.reshape(-1, n, size)
        if x.size <= FEW:
            out = out * cos
            out += np.multiply(other, sin, out=other)
        else:
            other = torch.from_numpy(other).mul_(torch.from_numpy(sin))
            out = torch.mul(torch.from_numpy(out), torch.from_numpy(cos)).add_(other).numpy()
        out = out.reshape(turned.shape)
        return np.rint(times(out, inverse_rms(out, TINY) * UNIT), out=out)

    def _attend(self, q: np.ndarray, cache: Cache, layer: int, at: int) -> np.ndarray:
        """q [B, n, H, D] at places `at` on -> [B, n, H, D], given the keys and values kept for all of them."""
        c = self.config
        b, n, heads, width = q.shape
        group = heads // c.kv_heads
        out = np.empty_like(q)
        for start in range(0, n, ROWS):
            rows = min(ROWS, n - start)
            stop = at + start + rows
            part = q[:, start : start + rows].reshape(b, rows, c.kv_heads, group, width).transpose(0, 2, 3, 1, 4)
            part = np.ascontiguousarray(part).reshape(b, c.kv_heads, group * rows, width)
            keys, values = cache.keys[layer, :, :, :stop], cache.values[layer, :, :, :stop]
            z = products(part, keys.swapaxes(-1, -2)).reshape(b, c.kv_heads, group, rows, stop)
            times(z, self.score_scale[layer])
            if rows > 1:
                z[..., stop - rows :] += FUTURE[:rows, :rows]
            e = shares(z, self.score_exp)
            worth = F32(1) / (total(e) * self.value_grid[layer])
            y = products(e.reshape(b, c.kv_heads, group * rows, stop), values).reshape(
                b, c.kv_heads, group, rows, width
            )
            there = out[:, start : start + rows].reshape(b, rows, c.kv_heads, group, width)
            np.multiply(y, worth, out=there.transpose(0, 2, 3, 1, 4))
        return out

    def _attention(self, i: int, x: np.ndarray, bias: np.ndarray | None, cache: Cache, skip: int) -> np.ndarray:
        """Layer i's attention for x [B * n, W] behind what is kept, less the first `skip` of each row's n places.

        bias: of the values, as `_Entry.value_bias` gives it.
        """
        c, at = self.config, cache.kept
        b = len(cache.ids)
        n = len(x) // b
        matrix, kv = self.layers[i]["inside"], c.kv_heads * c.head_width
        xi, worth = to_integers(x)
        acc = matrix.product(xi)
        v = acc[:, c.width + kv :] * (worth * self._norm(i, x))
        late = self._late(i)
        if bias is not None and late >= 0:
            v += bias * self.state["value_embedding.layer_scales"][late]
        v = v.reshape(b, n, c.kv_heads, c.head_width)
        if skip:
            q = acc[:, : c.width].reshape(b, n, -1)[:, skip:].reshape(-1, c.width)
            q, k = self.rotate(q, at + skip, n - skip), self.rotate(acc[:, c.width : c.width + kv], at, n)
        else:
            both = self.rotate(acc[:, : c.width + kv], at, n)
            q, k = both[:, : c.heads], both[:, c.heads :]
        grid = v * self.value_grid[i]
        np.rint(grid, out=grid)
        np.minimum(np.maximum(grid, F32(-VALUE), out=grid), F32(VALUE), out=grid)
        cache.keys[i, :, :, at : at + n] = k.reshape(v.shape).swapaxes(1, 2)
        cache.keep_unturned(i, acc[:, c.width : c.width + kv].reshape(b, n, kv))
        cache.values[i, :, :, at : at + n] = grid.swapaxes(1, 2)
        q = q.reshape(b, n - skip, c.heads, c.head_width)
        y = self._attend(q, cache, i, at + skip)
        if c.exclusive_attention:
            own = v[:, skip:]
            own = (own / np.maximum(np.sqrt(fold(own * own)), F32(1e-12)))[:, :, :, None]
            grouped = y.reshape(b, n - skip, c.kv_heads, -1, c.head_width)
            y = grouped - fold(grouped * own) * own
        xi, worth = to_integers(y.reshape(-1, c.width))
        return self._scaled(times(self.layers[i]["output"].product(xi), worth), f"blocks.{i}.attention_scale")

    def _norm(self, i: int, x: np.ndarray) -> np.ndarray:
        r = inverse_rms(x)
        return r * F32(1 / math.sqrt(i + 1)) if self.config.depth_scaled_norm else r

    def _scaled(self, x: np.ndarray, name: str) -> np.ndarray:
        return x * self.state[name] if name in self.state else x

    def _mlp(self, i: int, x: np.ndarray) -> np.ndarray:
        up, down = self.layers[i]["up"], self.layers[i]["down"]
        xi, worth = to_integers(x)
        worth = worth * self._norm(i, x)
        h = up.product(xi)
        np.maximum(h, h * F32(0.5) if self.config.activation == "leaky_relu2" else F32(0), out=h)
        np.multiply(h, h, out=h)
        hi, square = to_integers(h, signed=False)
        return self._scaled(times(down.product(hi), square * (worth * worth)), f"blocks.{i}.mlp_scale")

    def hidden(self, ids: np.ndarray, cache: Cache, skip: int = 0) -> np.ndarray:
        """The last layer's outputs at the next inputs ids [B, n], less the first `skip` of each row: [B, n - skip, W].

        The first input of a window is MASK. Keeps keys and values of all n in `cache`. Raises MezzotintError where numbers
        leave float32's range.
        """
        c = self.config
        b, n = ids.shape
        at = cache.kept
        cache.ids[:, at : at + n] = ids
        context = min(at, c.neighbour_reach + 1)
        x = embedded = self.entry(cache.ids[:, at - context : at + n], n)
        bias = self.entry.value_bias(ids.ravel()) if self.entry.values is not None else None
        skips: list[np.ndarray] = []
        half = len(self.state["skip_scales"]) and c.layers // 2
        for i in range(c.layers):
            if half and i >= half and skips:
                x = x + self.state["skip_scales"][i - half] * skips.pop()
            mix = self.state.get(f"blocks.{i}.embedding_mix")
            if mix is not None:
                x = mix[0] * x + mix[1] * embedded
            last = skip if i == c.layers - 1 else 0
            a = self._attention(i, x, bias, cache, last)
            if last:
                x = x.reshape(b, n, -1)[:, last:].reshape(-1, c.width)
            x = x + a
            x = x + self._mlp(i, x)
            if half and i < half:
                skips.append(x)
        if not np.isfinite(x).all():
            raise MezzotintError("the model's numbers leave float32's range: it cannot compress")
        cache.kept += n
        return x.reshape(b, n - skip, c.width)

    def frequencies(self, hidden: np.ndarray) -> np.ndarray:
        """Last hidden states [n, W] -> how probable each token is next: float64 integers >= 1 [n, V], sum 2^24."""
        rows = self.output.rows
        parts = [torch.from_numpy(self.output.excess(hidden[at : at + rows])) for at in range(0, len(hidden), rows)]
        return (torch.cat(parts) if len(parts) > 1 else parts[0]).add_(1).numpy()

    def intervals(self, hidden: np.ndarray, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Last hidden states [n, W] and the tokens [n] that come next -> the tokens' starts and frequencies, int64 [n].

        A start is the sum of the frequencies of all tokens with lower ids.
        """
        starts, frequencies = np.zeros(len(hidden), np.int64), np.zeros(len(hidden), np.int64)
        for at in range(0, len(hidden), self.output.rows):
            part = slice(at, at + self.output.rows)
            excess, chosen = self.output.excess(hidden[part]), tokens[part]
            n, size = excess.shape
            first = np.arange(n) * size
            # Sums from each row's first to its chosen token, and from there on.
            below = np.add.reduceat(excess.ravel(), np.stack((first, first + chosen), axis=1).ravel())[::2]
            starts[part] = np.where(chosen > 0, below, 0) + chosen
            frequencies[part] = excess[np.arange(n), chosen] + 1
        return starts, frequencies


class Cache:
    """Keys, values and inputs of `rows` windows side by side."""

    def __init__(self, network: ExactNetwork, rows: int, length: int) -> None:
        c = network.config
        self.half = network.half
        # Filled, not np.zeros: so the memory comes in large pages, which a step reads a tenth faster.
        kept = np.empty((2, c.layers, rows, c.kv_heads, length, c.head_width), F32)
        kept.fill(0)
        self.keys, self.values = kept
        # Keys of the later half before they are turned: what `slide` turns for other places.
        self.unturned = np.zeros((c.layers, rows, max(0, length - self.half), c.kv_heads * c.head_width), F32)
        self.ids = np.zeros((rows, length), dtype=np.int64)
        self.kept = 0

    @property
    def full(self) -> bool:
        """Whether two halves of a window are kept, so that `slide` must come before the next input."""
        return self.kept == 2 * self.half

    def keep_unturned(self, layer: int, keys: np.ndarray) -> None:
        """Keys [B, n, kv_heads * D] at the next n places; those of the earlier half are not kept."""
        stop = self.kept + keys.shape[1] - self.half
        if stop > 0:
            start = max(0, self.kept - self.half)
            self.unturned[layer, :, start:stop] = keys[:, start - stop :]

    def slide(self, network: ExactNetwork) -> None:
        """Go on with the later half in the place of the earlier one, except that the first input stays at place 0.

        Attention leans on a first input; a window without it is worse by some 4% (an attention sink: Xiao et al. 2023,
        "Efficient Streaming Language Models with Attention Sinks").
        """
        half = self.half
        layers, rows, heads, _, width = self.keys.shape
        together = max(1, CHUNK // (half * heads * width))
        for layer in range(layers):
            for row in range(0, rows, together):
                part = slice(row, row + together)
                turned = network.rotate(self.unturned[layer, part].reshape(-1, heads * width), 0, half)
                turned = turned.reshape(-1, half, heads, width).swapaxes(1, 2)
                self.keys[layer, part, :, 1:half] = turned[:, :, 1:]
        self.values[:, :, :, 1:half] = self.values[:, :, :, half + 1 : 2 * half]
        self.ids[:, :half] = self.ids[:, half : 2 * half]
        self.kept = half

    def part(self, rows: slice) -> Cache:
        """Some of the windows, in the same memory, from their start on."""
        view = object.__new__(Cache)
        view.keys, view.values, view.unturned = self.keys[:, rows], self.values[:, rows], self.unturned[:, rows]
        view.ids, view.kept, view.half = self.ids[rows], 0, self.half
        return view
