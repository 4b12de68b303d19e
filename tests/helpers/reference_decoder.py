"""A second decoder of `.mzz` files of version 2, written from FORMAT.md alone, in NumPy and nothing of the package.

Plain and slow: one token at a time, everything but integers in float32, one operation after another. Integers are held
in int64, so it does not matter that the package holds them in float32 or int8.
"""

from __future__ import annotations

import copy
import hashlib
import lzma
import math
import zlib
from collections.abc import Callable
from decimal import Decimal, getcontext
from functools import cache

import numpy as np

F = np.float32


class Bytes:
    """Reads from the front."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def take(self, n: int) -> bytes:
        self.at += n
        assert self.at <= len(self.data)
        return self.data[self.at - n : self.at]

    def number(self) -> int:
        value = shift = 0
        while (byte := self.take(1)[0]) & 0x80:
            value |= (byte & 0x7F) << shift
            shift += 7
        return value | byte << shift


def rounded(x: Decimal) -> int:
    return math.floor(x + Decimal("0.5"))


@cache
def turn(place: int, j: int, half: int, base: float) -> tuple[np.float32, np.float32]:
    angle = place * (Decimal(base).ln() * (-j) / half).exp()
    term, n, cos, sin = Decimal(1), 0, Decimal(0), Decimal(0)
    while n < 4 or abs(term) > Decimal(10) ** -50:
        cos, sin = cos + (term, 0, -term, 0)[n % 4], sin + (0, term, 0, -term)[n % 4]
        n += 1
        term = term * angle / n
    return F(rounded(cos * 32768) / 32768), F(rounded(sin * 32768) / 32768)


def fold(x: np.ndarray) -> np.float32:
    x = np.array(x, F).ravel()
    while len(x) > 1:
        half = (len(x) + 1) // 2
        y = x[:half].copy()
        y[: len(x) - half] += x[half:]
        x = y
    return x[0]


def inverse_rms(x: np.ndarray, epsilon: float = 2.0**-23) -> np.float32:
    return F(1) / np.sqrt(fold(x * x) * (F(1) / F(len(x))) + F(epsilon))


def integers(x: np.ndarray) -> tuple[np.ndarray, np.float32]:
    largest = np.abs(x).max()
    return np.rint(x * (F(127) / max(largest, F(2.0**-80)))).astype(np.int64), largest / F(127)


class Matrix:
    def __init__(self, w: np.ndarray) -> None:
        largest = np.abs(w).max(axis=1)
        self.scale = largest / F(63)
        with np.errstate(divide="ignore", invalid="ignore"):
            codes = np.rint(w * (F(63) / largest)[:, None])
        self.codes = np.clip(np.where(largest[:, None] > 0, codes, 0), -63, 63).astype(np.int64)

    def __call__(self, x: np.ndarray) -> np.ndarray:
        return (self.codes @ x).astype(F) * self.scale


class Network:
    """Keys and values of one window, fed an input at a time."""

    def __init__(self, config: dict, w: dict[str, np.ndarray]) -> None:
        getcontext().prec = 60
        self.c, self.w = config, w
        self.head = config["width"] // config["heads"]
        self.matrices = {n: Matrix(v) for n, v in w.items() if v.ndim == 2 and n.endswith("weight")}
        self.matrices["output"] = Matrix(w["embedding.weight"][: config["vocab_size"]])
        for i in range(config["layers"]):
            at = f"blocks.{i}.attention."
            self.matrices[at] = Matrix(np.concatenate([w[f"{at}{p}.weight"] for p in ("query", "key", "value")]))
        self.exp, i = [], 0
        while not self.exp or self.exp[-1]:
            self.exp.append(rounded((Decimal(-i) / 32).exp() * 4096))
            i += 1
        self.logit_exp, i = [], 0
        while not self.logit_exp or self.logit_exp[-1]:
            self.logit_exp.append(rounded((Decimal(-i) / 64).exp() * (1 << 24)))
            i += 1
        cap = Decimal(config["softcap"])
        self.edge = min(math.ceil(640 * config["softcap"]), 1 << 20)
        self.cap = []
        for i in range(self.edge + 1):
            t = (Decimal(-2 * i) / (64 * cap)).exp()
            self.cap.append(rounded(64 * cap * (1 - t) / (1 + t)))
        self.grid = [self.value_grid(i) for i in range(config["layers"])]
        self.start()

    def start(self) -> None:
        self.ids: list[int] = []
        self.keys = [[] for _ in range(self.c["layers"])]
        self.values = [[] for _ in range(self.c["layers"])]

    def value_grid(self, i: int) -> np.float32:
        w = self.w[f"blocks.{i}.attention.value.weight"]
        mean = fold(w * w) / F(len(w))
        late = i - self.c["layers"] + self.c["value_embedding_layers"]
        if self.c["value_embedding_width"] and late >= 0:
            bias = np.stack([self.bias(t, late) for t in range(self.c["vocab_size"] + 1)])
            mean = mean + fold(bias * bias) / F(bias.size)
        return F(2.0 ** (7 - math.frexp(np.sqrt(max(mean, F(2.0**-80))))[1]))

    def bias(self, token: int, late: int) -> np.ndarray:
        x, worth = integers(self.w["value_embedding.embedding.weight"][token])
        y = self.matrices["value_embedding.project.weight"](x) * (worth * self.w["value_embedding.scale"])
        return y * self.w["value_embedding.layer_scales"][late]

    def embedded(self, at: int) -> np.ndarray:
        x = self.w["embedding.weight"][self.ids[at]]
        if self.c["bigram_buckets"]:
            n = self.c["bigram_buckets"] - 1
            bucket = n if at == 0 else (36313 * self.ids[at] ^ 27191 * self.ids[at - 1]) % n
            y, worth = integers(self.w["bigram.embedding.weight"][bucket])
            x = x + self.matrices["bigram.project.weight"](y) * (worth * self.w["bigram.scale"])
        return x

    def embed(self, at: int) -> np.ndarray:
        x, reach = self.embedded(at), self.c["neighbour_reach"]
        if reach:
            mixed = np.zeros_like(x)
            for tap in range(reach + 1):
                there = at - reach + tap
                mixed = mixed + (self.embedded(there) if there >= 0 else F(0) * x) * self.w["neighbour_taps"][tap]
            x = x + mixed
        return x * inverse_rms(x)

    def rotate(self, x: np.ndarray, place: int) -> np.ndarray:
        half = (self.c["rotary_dims"] or self.head) // 2
        out = x.copy()
        for j in range(half):
            c, s = turn(place, j, half, self.c["rotary_base"])
            a, b = x[j], x[half + j]
            out[j], out[half + j] = a * c + b * s, b * c - a * s
        return np.rint(out * (inverse_rms(out, 2.0**-80) * F(128))).astype(np.int64)

    def norm(self, i: int, x: np.ndarray) -> np.float32:
        return inverse_rms(x) * (F(1 / math.sqrt(i + 1)) if self.c["depth_scaled_norm"] else F(1))

    def attention(self, i: int, x: np.ndarray, token: int, place: int) -> np.ndarray:
        c, d, at = self.c, self.head, f"blocks.{i}.attention."
        kv = c["kv_heads"] * d
        xi, worth = integers(x)
        y = self.matrices[at](xi)
        v = y[c["width"] + kv :] * (worth * self.norm(i, x))
        late = i - c["layers"] + c["value_embedding_layers"]
        if c["value_embedding_width"] and late >= 0:
            v = v + self.bias(token, late)
        v = v.reshape(-1, d)
        self.keys[i].append(np.stack([self.rotate(k, place) for k in y[c["width"] :][:kv].reshape(-1, d)]))
        self.values[i].append(np.clip(np.rint(v * self.grid[i]), -2047, 2047).astype(np.int64))
        out = []
        for h, q in enumerate(y[: c["width"]].reshape(-1, d)):
            group = h // (c["heads"] // c["kv_heads"])
            q = self.rotate(q, place)
            factor = self.w[at + "query_gain"][h] * F(32 / (128 * 128 * math.sqrt(d)))
            z = np.array([k[group] @ q for k in self.keys[i]]).astype(F) * factor
            steps = np.minimum((z.max() + F(0.5)) - z, F(len(self.exp) - 1)).astype(int)
            e = np.array([self.exp[s] for s in steps])
            p = np.rint(e.astype(F) * (F(4096) / F(e.sum()))).astype(np.int64)
            o = (p @ np.stack([u[group] for u in self.values[i]])).astype(F) * (F(1) / (F(p.sum()) * self.grid[i]))
            if c["exclusive_attention"]:
                own = v[group] / max(np.sqrt(fold(v[group] * v[group])), F(1e-12))
                o = o - fold(o * own) * own
            out.append(o)
        yi, worth = integers(np.concatenate(out))
        return self.matrices[at + "output.weight"](yi) * worth

    def mlp(self, i: int, x: np.ndarray) -> np.ndarray:
        xi, worth = integers(x)
        worth = worth * self.norm(i, x)
        h = self.matrices[f"blocks.{i}.mlp.up.weight"](xi)
        h = np.maximum(h, h * F(0.5) if self.c["activation"] == "leaky_relu2" else F(0))
        hi, square = integers(h * h)
        return self.matrices[f"blocks.{i}.mlp.down.weight"](hi) * (square * (worth * worth))

    def frequencies(self, token: int) -> list[int]:
        """Read one more input; how probable each token is next, of 2^24."""
        c, place = self.c, len(self.ids)
        self.ids.append(token)
        x = first = self.embed(place)
        half, kept = c["layers"] // 2, []
        for i in range(c["layers"]):
            if c["unet_skips"] and i >= half and kept:
                x = x + self.w["skip_scales"][i - half] * kept.pop()
            if c["embedding_mix"]:
                mix = self.w[f"blocks.{i}.embedding_mix"]
                x = mix[0] * x + mix[1] * first
            a = self.attention(i, x, token, place)
            x = x + (a * self.w[f"blocks.{i}.attention_scale"] if c["channel_scales"] else a)
            m = self.mlp(i, x)
            x = x + (m * self.w[f"blocks.{i}.mlp_scale"] if c["channel_scales"] else m)
            if c["unet_skips"] and i < half:
                kept.append(x)
        xi, worth = integers(x)
        z = self.matrices["output"](xi) * (worth * inverse_rms(x) * F(64))
        z = np.clip(np.rint(z), -self.edge, self.edge).astype(int).tolist()
        levels = [self.cap[n] if n >= 0 else -self.cap[-n] for n in z]
        below = [min(max(levels) - n, len(self.logit_exp) - 1) for n in levels]
        e = np.array([self.logit_exp[n] for n in below], np.float64)
        f = np.floor(e * (np.float64((1 << 24) - len(e)) / e.sum())).astype(np.int64) + 1
        f[below.index(0)] += (1 << 24) - f.sum()
        return f.tolist()


class Coder:
    def __init__(self, data: bytes) -> None:
        self.state = int.from_bytes(data[:8], "little")
        self.words = np.frombuffer(data[8:], "<u4").tolist()[::-1]

    def symbol(self, frequencies: list[int]) -> int:
        point, start, symbol = self.state % (1 << 24), 0, 0
        while start + frequencies[symbol] <= point:
            start += frequencies[symbol]
            symbol += 1
        self.state = frequencies[symbol] * (self.state >> 24) + point - start
        if self.state < 1 << 32:
            self.state = self.state << 32 | self.words.pop()
        return symbol


def tokens_of(network: Network, coder: Coder, count: int, streams: int) -> list[int]:
    """All streams' tokens, place by place."""
    short, longer = divmod(count, streams)
    length, mask = min(network.c["sequence_length"], 4096), network.c["vocab_size"]
    out: list[list[int]] = [[] for _ in range(streams)]
    networks = [copy.copy(network) for _ in range(streams)]
    for place in range(short + (longer > 0)):
        for stream in range(streams if place < short else longer):
            done = out[stream]
            start = 0
            while place >= start + length:
                start += max(1, length // 2)
            inputs = [mask, *done[start:place]]
            own = networks[stream]
            if place == 0 or own.ids != inputs[:-1]:
                own.start()
                for token in inputs[:-1]:
                    own.frequencies(token)
            done.append(coder.symbol(own.frequencies(inputs[-1])))
    return [token for stream in out for token in stream]


def kinds_of(texts: list[bytes], number: int, coder: Coder) -> list[int]:
    def kind_of_byte(b: int) -> int:
        for first, last in ((65, 90), (97, 122), (48, 57)):
            if first <= b <= last:
                return first
        return min(b, 128)

    counts: dict[tuple, list[int]] = {}
    out = []
    for text in texts:
        padded, last = b"\0\0" + text + b"\0", 0
        for at in [i for i in range(2, len(padded) - 1) if padded[i] == 32]:
            two, one, after = (kind_of_byte(padded[at + i]) for i in (-2, -1, 1))
            kind = number - 1
            for node in range(number - 1):
                p, cells = 1 << 15, []
                for context in ((node,), (node, one, after), (node, one, after, two, (at - last).bit_length())):
                    cells.append(counts.setdefault(context, [0, 0]))
                    p = (65536 * cells[-1][1] + 4 * p) // (sum(cells[-1]) + 4)
                p = 256 * min(max(p, 1), 65535)
                hit = coder.symbol([p, (1 << 24) - p]) == 0
                for cell in cells:
                    cell[hit] += 1
                if hit:
                    kind = node
                    break
            last = at if kind else last
            out.append(kind)
    return out


def modelled(body: bytes, network: Network, decode: Callable[[list[int]], bytes]) -> bytes:
    b = Bytes(body)
    side = Bytes(b.take(b.number()))
    streams, coder = b.number(), Coder(b.data[b.at :])
    if side.take(1) == b"\1":
        size = side.number()
        side = Bytes(lzma.decompress(side.data[side.at :]))
        assert len(side.data) == size
    table = []
    for _ in range(side.number()):
        kind, count = side.take(1)[0], side.number()
        table.append((kind, count, side.number() if kind == 0 else 0))
    fold_runs = side.take(1) == b"\1"
    common = [side.take(side.number()) for _ in range(side.number())] if fold_runs else []
    edits = [
        [(side.number(), side.number(), side.take(side.number())) for _ in range(n)] for k, _, n in table if k == 0
    ]
    ids = tokens_of(network, coder, sum(count + 1 for kind, count, _ in table if kind == 0), streams)
    texts = []
    for count, changes in zip([c for k, c, _ in table if k == 0], edits, strict=True):
        known, text, at = decode(ids[1 : count + 1]), b"", 0
        ids = ids[count + 1 :]
        for keep, drop, put in changes:
            text += known[at : at + keep] + put
            at += keep + drop
        texts.append(text + known[at:])
    runs = []
    for kind in kinds_of(texts, len(common) + 1, coder) if fold_runs else []:
        runs.append(common[kind] if kind < len(common) else side.take(side.number()))
    assert coder.state == 1 << 32 and not coder.words
    out = b""
    for kind, count, _ in table:
        if kind == 1:
            out += side.take(count)
            continue
        first, *words = texts.pop(0).split(b" ") if fold_runs else [texts.pop(0)]
        out += first + b"".join(runs.pop(0) + word for word in words)
    return out


def decode(data: bytes, config: dict, weights: dict, decode_ids: Callable[[list[int]], bytes], sha256: str) -> bytes:
    """The bytes that a `.mzz` file holds. decode_ids: a tokenizer's ids -> bytes."""
    b, out = Bytes(data), b""
    assert b.take(4) == b"MZZ2"
    while (kind := b.take(1)[0]) not in (0, 5):
        if kind == 1:
            out += b.take(b.number())
        elif kind == 3:
            assert b.take(33) == bytes.fromhex(sha256) + b"\1"
        else:
            size, body = b.number(), b.take(b.number())
            assert b.take(4) == zlib.crc32(body).to_bytes(4, "little")
            part = lzma.decompress(body) if kind == 2 else modelled(body, Network(config, weights), decode_ids)
            assert len(part) == size
            out += part
    if kind == 5:
        out += b.take(len(data) - 16 - b.at)
    assert data[b.at :] == hashlib.sha256(out).digest()[:16]
    return out
