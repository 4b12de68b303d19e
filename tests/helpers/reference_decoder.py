"""A second decoder of `.mzz` files of version 2, written from FORMAT.md alone, in NumPy and nothing of the package.

Plain and slow: one token at a time, everything but integers in float32, one operation after another. Integers are held
in int64, so it does not matter that the package holds them in float32 or int8. Numbers in comments are FORMAT.md's.
"""

from __future__ import annotations

import copy
import hashlib
import io
import lzma
import math
import re
import zlib
from collections.abc import Callable, Iterator
from decimal import Decimal, getcontext
from functools import cache

import numpy as np

F = np.float32


def rounded(x: Decimal) -> int:
    return math.floor(x + Decimal("0.5"))


@cache
def exponentials(step: int, peak: int) -> np.ndarray:
    out = [peak]
    while out[-1]:
        out.append(rounded((Decimal(-len(out)) / step).exp() * peak))
    return np.array(out)


@cache
def turns(place: int, half: int, base: float) -> tuple[np.ndarray, np.ndarray]:
    """cos and sin of a place's angles, by the series of e^(i angle)."""
    out = np.zeros((2, half), F)
    for j in range(half):
        angle = place * (Decimal(base).ln() * (-j) / half).exp()
        term, n, sums = Decimal(1), 0, [Decimal(0), Decimal(0)]
        while n < 4 or abs(term) > Decimal(10) ** -50:
            sums[n % 2] += term if n % 4 < 2 else -term
            n += 1
            term = term * angle / n
        out[:, j] = [rounded(x * 32768) / 32768 for x in sums]
    return out[0], out[1]


def fold(x: np.ndarray) -> np.ndarray:
    """Sums over the last axis, which is kept."""
    while (n := x.shape[-1]) > 1:
        half = (n + 1) // 2
        first = x[..., :half].copy()
        first[..., : n - half] += x[..., half:]
        x = first
    return x


def irms(x: np.ndarray, epsilon: float = 2.0**-23) -> np.ndarray:
    return F(1) / np.sqrt(fold(x * x) * (F(1) / F(x.shape[-1])) + F(epsilon))


def ints(x: np.ndarray) -> tuple[np.ndarray, np.float32]:
    largest = np.abs(x).max()
    return np.rint(x * (F(127) / max(largest, F(2.0**-80)))).astype(np.int64), largest / F(127)


class Matrix:
    def __init__(self, w: np.ndarray) -> None:
        largest = np.abs(w).max(axis=1)
        steps = np.where(largest > 0, F(63) / np.where(largest > 0, largest, F(1)), F(0))
        self.scale = largest / F(63)
        self.codes = np.clip(np.rint(w * steps[:, None]), -63, 63).astype(np.int64)

    def __call__(self, x: np.ndarray) -> np.ndarray:
        return (self.codes @ x).astype(F) * self.scale


class Network:
    """One window, fed an input at a time."""

    def __init__(self, config: dict, w: dict[str, np.ndarray]) -> None:
        getcontext().prec = 60
        c = self.c = config
        self.w, self.head = w, c["width"] // c["heads"]
        self.matrices = {name: Matrix(v) for name, v in w.items() if v.ndim == 2 and name.endswith("weight")}
        self.matrices["logits"] = Matrix(w["embedding.weight"][: c["vocab_size"]])
        for i in range(c["layers"]):
            at = f"blocks.{i}.attention."
            self.matrices[at] = Matrix(np.concatenate([w[f"{at}{p}.weight"] for p in ("query", "key", "value")]))
        softcap = Decimal(c["softcap"])
        self.edge = min(math.ceil(640 * c["softcap"]), 1 << 20)
        powers = [(Decimal(-2 * i) / (64 * softcap)).exp() for i in range(self.edge + 1)]
        self.cap = np.array([rounded(64 * softcap * (1 - p) / (1 + p)) for p in powers])
        self.grid = [self.value_grid(i) for i in range(c["layers"])]
        self.start()

    def start(self) -> None:
        self.ids: list[int] = []
        self.keys: list[list[np.ndarray]] = [[] for _ in self.grid]
        self.values: list[list[np.ndarray]] = [[] for _ in self.grid]

    def value_grid(self, i: int) -> np.float32:  # 8.3
        w = self.w[f"blocks.{i}.attention.value.weight"]
        mean = fold((w * w).ravel())[0] / F(len(w))
        bias = [self.bias(i, token) for token in range(self.c["vocab_size"] + 1)]
        if bias[0] is not None:
            mean = mean + fold(np.square(np.concatenate(bias)))[0] / F(len(bias) * len(bias[0]))
        return F(2.0 ** (7 - math.frexp(np.sqrt(max(mean, F(2.0**-80))))[1]))

    def projected(self, name: str, row: int) -> np.ndarray:
        """A row of a small embedding, projected and scaled."""
        x, u = ints(self.w[f"{name}.embedding.weight"][row])
        return self.matrices[f"{name}.project.weight"](x) * (u * self.w[f"{name}.scale"])

    def bias(self, i: int, token: int) -> np.ndarray | None:
        late = i - self.c["layers"] + self.c["value_embedding_layers"]
        if not self.c["value_embedding_width"] or late < 0:
            return None
        return self.projected("value_embedding", token) * self.w["value_embedding.layer_scales"][late]

    def embedded(self, at: int) -> np.ndarray:
        x, n = self.w["embedding.weight"][self.ids[at]], self.c["bigram_buckets"] - 1
        if n > 0:
            x = x + self.projected("bigram", n if at == 0 else (36313 * self.ids[at] ^ 27191 * self.ids[at - 1]) % n)
        return x

    def entry(self, at: int) -> np.ndarray:  # 8.1
        x, reach = self.embedded(at), self.c["neighbour_reach"]
        if reach:
            y = np.zeros_like(x)
            for j in range(reach + 1):
                there = at - reach + j
                y = y + (self.embedded(there) if there >= 0 else np.zeros_like(x)) * self.w["neighbour_taps"][j]
            x = x + y
        return x * irms(x)

    def rotate(self, x: np.ndarray, place: int) -> np.ndarray:
        """Heads [n, D] -> integers."""
        half = (self.c["rotary_dims"] or self.head) // 2
        cos, sin = turns(place, half, self.c["rotary_base"])
        a, b = x[:, :half], x[:, half : 2 * half]
        y = np.concatenate((a * cos + b * sin, b * cos - a * sin, x[:, 2 * half :]), axis=1)
        return np.rint(y * (irms(y, 2.0**-80) * F(128))).astype(np.int64)

    def norm(self, i: int, x: np.ndarray) -> np.ndarray:
        return irms(x) * F(1 / math.sqrt(i + 1)) if self.c["depth_scaled_norm"] else irms(x)

    def attention(self, i: int, x: np.ndarray) -> np.ndarray:  # 8.3
        c, d, at, place = self.c, self.head, f"blocks.{i}.attention.", len(self.ids) - 1
        xi, u = ints(x)
        parts = np.split(self.matrices[at](xi), [c["width"], c["width"] + c["kv_heads"] * d])
        queries, keys = (self.rotate(part.reshape(-1, d), place) for part in parts[:2])
        v = parts[2] * (u * self.norm(i, x))
        if (bias := self.bias(i, self.ids[-1])) is not None:
            v = v + bias
        v = v.reshape(-1, d)
        self.keys[i].append(keys)
        self.values[i].append(np.clip(np.rint(v * self.grid[i]), -2047, 2047).astype(np.int64))
        exp, out = exponentials(32, 4096), []
        for h, q in enumerate(queries):
            group = h // (c["heads"] // c["kv_heads"])
            factor = self.w[at + "query_gain"][h] * F(32 / (16384 * math.sqrt(d)))
            z = np.array([k[group] @ q for k in self.keys[i]]).astype(F) * factor
            e = exp[np.minimum((z.max() + F(0.5)) - z, F(len(exp) - 1)).astype(int)]
            p = np.rint(e.astype(F) * (F(4096) / F(e.sum()))).astype(np.int64)
            y = (p @ np.stack([u[group] for u in self.values[i]])).astype(F) * (F(1) / (F(p.sum()) * self.grid[i]))
            if c["exclusive_attention"]:
                o = v[group] / np.maximum(np.sqrt(fold(v[group] * v[group])), F(1e-12))
                y = y - fold(y * o) * o
            out.append(y)
        yi, u = ints(np.concatenate(out))
        return self.matrices[at + "output.weight"](yi) * u

    def mlp(self, i: int, x: np.ndarray) -> np.ndarray:  # 8.2, step 3
        xi, u = ints(x)
        u = u * self.norm(i, x)
        h = self.matrices[f"blocks.{i}.mlp.up.weight"](xi)
        h = np.maximum(h, h * F(0.5) if self.c["activation"] == "leaky_relu2" else F(0))
        hi, g = ints(h * h)
        return self.matrices[f"blocks.{i}.mlp.down.weight"](hi) * (g * (u * u))

    def read(self, token: int) -> np.ndarray:
        """Read one more input; how probable each token is next, of 2^24."""
        c, w = self.c, self.w
        self.ids.append(token)
        x = x0 = self.entry(len(self.ids) - 1)
        half, kept = c["layers"] // 2, []
        for i in range(c["layers"]):  # 8.2
            if c["unet_skips"] and i >= half and kept:
                x = x + w["skip_scales"][i - half] * kept.pop()
            if c["embedding_mix"]:
                x = w[f"blocks.{i}.embedding_mix"][0] * x + w[f"blocks.{i}.embedding_mix"][1] * x0
            for part, scale in ((self.attention, "attention_scale"), (self.mlp, "mlp_scale")):
                y = part(i, x)
                x = x + (y * w[f"blocks.{i}.{scale}"] if c["channel_scales"] else y)
            if c["unet_skips"] and i < half:
                kept.append(x)
        xi, u = ints(x)  # 8.5
        z = np.rint(self.matrices["logits"](xi) * (u * irms(x) * F(64))).clip(-self.edge, self.edge).astype(int)
        level = np.where(z < 0, -self.cap[abs(z)], self.cap[abs(z)])
        exp = exponentials(64, 1 << 24)
        e = exp[np.minimum(level.max() - level, len(exp) - 1)].astype(np.float64)
        f = np.floor(e * (np.float64((1 << 24) - len(e)) / e.sum())).astype(np.int64) + 1
        f[level.argmax()] += (1 << 24) - f.sum()
        return f


class Coder:  # 7.2
    def __init__(self, data: bytes) -> None:
        self.state = int.from_bytes(data[:8], "little")
        self.words = np.frombuffer(data[8:], "<u4").tolist()[::-1]

    def symbol(self, frequencies: np.ndarray) -> int:
        point, ends = self.state % (1 << 24), np.cumsum(frequencies)
        symbol = int((ends <= point).sum())
        w = int(frequencies[symbol])
        self.state = w * (self.state >> 24) + point - (int(ends[symbol]) - w)
        if self.state < 1 << 32:
            self.state = self.state << 32 | self.words.pop()
        return symbol


def tokens_of(network: Network, coder: Coder, count: int, streams: int) -> list[int]:  # 7.3
    length = min(network.c["sequence_length"], 4096)
    out: list[list[int]] = [[] for _ in range(streams)]
    networks = [copy.copy(network) for _ in range(streams)]
    for at in range(count):
        place, own, done = at // streams, networks[at % streams], out[at % streams]
        start = 0
        while place >= start + length:
            start += max(1, length // 2)
        *before, last = [network.c["vocab_size"], *done[start:place]]  # MASK first
        if own.ids != before or not before:
            own.start()
            for token in before:
                own.read(token)
        done.append(coder.symbol(own.read(last)))
    return [token for stream in out for token in stream]


def kinds_of(texts: list[bytes], number: int, coder: Coder) -> Iterator[int]:  # 7.4
    classes = [next((a for a, z in ((65, 90), (97, 122), (48, 57)) if a <= b <= z), min(b, 128)) for b in range(256)]
    counts: dict[tuple, list[int]] = {}
    for text in texts:
        padded, last = b"\0\0" + text + b"\0", 0
        for at in [i for i in range(2, len(padded) - 1) if padded[i] == 32]:
            a, b, c = (classes[padded[at + i]] for i in (-2, -1, 1))
            for kind in range(number):
                if kind == number - 1:
                    break
                contexts = (kind,), (kind, b, c), (kind, b, c, a, (at - last).bit_length())
                cells = [counts.setdefault(context, [0, 0]) for context in contexts]
                p = 1 << 15
                for no, yes in cells:
                    p = (65536 * yes + 4 * p) // (no + yes + 4)
                q = 256 * min(max(p, 1), 65535)
                hit = coder.symbol(np.array([q, (1 << 24) - q])) == 0
                for cell in cells:
                    cell[hit] += 1
                if hit:
                    break
            last = at if kind else last
            yield kind


def number(b: io.BytesIO) -> int:
    byte = b.read(1)[0]
    return byte if byte < 128 else byte - 128 + 128 * number(b)


def string(b: io.BytesIO) -> bytes:
    return b.read(number(b))


def modelled(b: io.BytesIO, network: Network, decode: Callable[[list[int]], bytes]) -> bytes:  # 7
    side, streams, coder = io.BytesIO(string(b)), number(b), Coder(b.read())
    if side.read(1) == b"\1":
        size = number(side)
        side = io.BytesIO(lzma.decompress(side.read()))
        assert len(side.getvalue()) == size
    segments = []  # 7.1: tokens or bytes, edits or None
    for _ in range(number(side)):
        kind, size = side.read(1), number(side)
        segments.append((size, number(side) if kind == b"\0" else None))
    folded = side.read(1) == b"\1"
    common = [string(side) for _ in range(number(side))] if folded else []
    edits = [[(number(side), number(side), string(side)) for _ in range(n)] for _, n in segments if n is not None]
    sizes = [size for size, n in segments if n is not None]
    ids = tokens_of(network, coder, sum(sizes) + len(sizes), streams)
    texts = []
    for size, changes in zip(sizes, edits, strict=True):
        known, text, at = decode(ids[1 : size + 1]), b"", 0
        ids = ids[size + 1 :]
        for keep, drop, put in changes:
            text += known[at : at + keep] + put
            at += keep + drop
        texts.append(text + known[at:])
    kinds = list(kinds_of(texts, len(common) + 1, coder)) if folded else []
    assert coder.state == 1 << 32 and not coder.words
    runs = iter([common[kind] if kind < len(common) else string(side) for kind in kinds])
    whole = iter(
        [b"".join(next(runs) if x == b" " else x for x in re.split(b"( )", t)) if folded else t for t in texts]
    )
    return b"".join(side.read(size) if n is None else next(whole) for size, n in segments)


def decode(data: bytes, config: dict, weights: dict, decode_ids: Callable[[list[int]], bytes], sha256: str) -> bytes:
    """The bytes that a `.mzz` file holds. decode_ids: a tokenizer's ids -> bytes."""
    b, out = io.BytesIO(data), b""
    assert b.read(4) == b"MZZ2"
    while (kind := b.read(1)[0]) not in (0, 5):  # 6
        if kind == 1:
            out += string(b)
        elif kind == 3:
            assert b.read(33) == bytes.fromhex(sha256) + b"\1"
        else:
            size, body = number(b), string(b)
            assert b.read(4) == zlib.crc32(body).to_bytes(4, "little")
            network = Network(config, weights) if kind == 4 else None
            part = modelled(io.BytesIO(body), network, decode_ids) if network else lzma.decompress(body)
            assert len(part) == size
            out += part
    if kind == 5:
        out += b.read(len(data) - 16 - b.tell())
    assert b.read() == hashlib.sha256(out).digest()[:16]
    return out
