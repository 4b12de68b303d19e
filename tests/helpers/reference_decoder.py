"""A second decoder of `.mzz` files of version 2, written from FORMAT.md alone, in NumPy and nothing of the package.
Plain and slow: one stream and one input at a time, all keys turned anew for each, and integers are int64. Vectors are
the last axis of arrays. Numbers in comments name sections of FORMAT.md."""

from __future__ import annotations

import hashlib
import io
import lzma
import math
import zlib
from collections.abc import Callable, Iterator
from decimal import Decimal, getcontext
from types import SimpleNamespace

import numpy as np

F = np.float32
getcontext().prec = 60


def fold(x: np.ndarray) -> np.ndarray:
    n, half = x.shape[-1], (x.shape[-1] + 1) // 2
    return x if n == 1 else fold(np.append(x[..., : n - half] + x[..., half:], x[..., n - half : half], axis=-1))


def inverse_rms(x: np.ndarray, epsilon: float = 2.0**-23) -> np.ndarray:
    return F(1) / np.sqrt(fold(x * x) * (F(1) / F(x.shape[-1])) + F(epsilon))


def integers(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    largest = np.abs(x).max(axis=-1, keepdims=True)
    return np.rint(x * (F(127) / np.maximum(largest, F(2.0**-80)))).astype(np.int64), largest / F(127)


def turn(angle: Decimal) -> list[float]:
    """cos and sin in steps of 2^-15, by their series."""
    terms = [Decimal(1)]
    while len(terms) < 4 or abs(terms[-1]) > Decimal(10) ** -50:
        terms.append(terms[-1] * angle / len(terms))
    return [round((sum(terms[i::4]) - sum(terms[i + 2 :: 4])) * 32768) / 32768 for i in (0, 1)]


class Window:
    def __init__(self, layers: int) -> None:
        self.ids: list[int] = []
        self.keys: list[list] = [[] for _ in range(layers)]
        self.values: list[list] = [[] for _ in range(layers)]

    def slide(self, half: int) -> None:  # 7.3
        self.ids = self.ids[half:]
        for kept in (*self.keys, *self.values):
            del kept[1 : half + 1]


class Network:  # a model's weights, and the tables of 8
    def __init__(self, config: dict, weights: dict[str, np.ndarray]) -> None:
        c = self.c = SimpleNamespace(**config)
        self.w = weights | {"next token": weights["embedding.weight"][: c.vocab_size]}
        self.length, self.head = min(c.sequence_length, 4096), c.width // c.heads
        self.exp, self.logit_exp = (np.array([round((Decimal(-i) / step).exp() * peak) for i in range(20 * step)])
                                    for peak, step in ((4096, 32), (1 << 24, 64)))  # fmt: skip
        cap = Decimal(c.softcap) * 64
        powers = [(Decimal(-2 * i) / cap).exp() for i in range(min(math.ceil(640 * c.softcap), 1 << 20) + 1)]
        self.cap = np.array([round(cap * (1 - p) / (1 + p)) for p in powers])
        half = (c.rotary_dims or self.head) // 2
        angles = [(Decimal(c.rotary_base).ln() * -j / half).exp() for j in range(half)]
        self.turns = np.array([[turn(t * angle) for angle in angles] for t in range(max(2, self.length))], F)
        self.grid = []
        for i in range(c.layers):
            v, bias = weights[f"blocks.{i}.attention.value.weight"], self.bias(i, np.arange(c.vocab_size + 1))
            mean = fold((v * v).ravel())[0] / F(len(v)) + fold((bias * bias).ravel())[0] / F(bias.size)
            self.grid.append(F(2.0 ** (7 - math.frexp(np.sqrt(max(mean, F(2.0**-80))))[1])))

    def product(self, name: str, x: np.ndarray) -> np.ndarray:
        w = self.w[name]
        largest = np.abs(w).max(axis=1)
        inverse = F(63) / np.where(largest > 0, largest, F(np.inf))
        codes = np.clip(np.rint(w * inverse[:, None]), -63, 63).astype(np.int64)
        return (x @ codes.T).astype(F) * (largest / F(63))

    def looked_up(self, name: str, ids: np.ndarray) -> np.ndarray:
        """Rows of a narrow table, made as wide as the network."""
        x, worth = integers(self.w[f"{name}.embedding.weight"][ids])
        return self.product(f"{name}.project.weight", x) * (worth * self.w[f"{name}.scale"])

    def bias(self, i: int, ids: np.ndarray) -> np.ndarray:
        """What layer i adds to its values: 0 where it adds nothing."""
        late = i - self.c.layers + self.c.value_embedding_layers
        if not self.c.value_embedding_width or late < 0:
            return np.zeros((len(ids), 1), F)
        return self.looked_up("value_embedding", ids) * self.w["value_embedding.layer_scales"][late]

    def entry(self, ids: np.ndarray) -> np.ndarray:  # 8.1
        x, reach = self.w["embedding.weight"][ids], self.c.neighbour_reach
        if self.c.bigram_buckets:
            n = self.c.bigram_buckets - 1
            x = x + self.looked_up("bigram", np.append(n, (36313 * ids[1:] ^ 27191 * ids[:-1]) % n))
        if reach:
            padded = np.concatenate((np.zeros((reach, x.shape[1]), F), x))
            x = x + sum(padded[j : j + len(x)] * taps for j, taps in enumerate(self.w["neighbour_taps"][: reach + 1]))
        return x * inverse_rms(x)

    def normed(self, i: int, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """ints(x) and u * N."""
        xi, worth = integers(x)
        return xi, worth * (inverse_rms(x) * (F(1 / math.sqrt(i + 1)) if self.c.depth_scaled_norm else F(1)))

    def turned(self, x: np.ndarray, place: int = 0) -> np.ndarray:
        """Queries or keys [heads, places, D], from `place` on, as integers."""
        half, cos, sin = self.turns.shape[1], *np.moveaxis(self.turns[place : place + x.shape[1]], 2, 0)
        a, b = x[..., :half], x[..., half : 2 * half]
        x = np.concatenate((a * cos + b * sin, b * cos - a * sin, x[..., 2 * half :]), axis=-1)
        return np.rint(x * (inverse_rms(x, 2.0**-80) * F(128))).astype(np.int64)

    def attention(self, i: int, x: np.ndarray, window: Window) -> np.ndarray:
        """8.3, for the newest input. Heads are the first axis, places the second."""
        c, d, name = self.c, self.head, f"blocks.{i}.attention"
        group = np.arange(c.heads) // (c.heads // c.kv_heads)  # the key head of each query head
        xi, worth = self.normed(i, x)
        q, k, v = (self.product(f"{name}.{part}.weight", xi) for part in ("query", "key", "value"))
        q, k, v = (y.reshape(1, -1, d).swapaxes(0, 1) for y in (q, k, v * worth + self.bias(i, window.ids[-1:])))
        window.keys[i].append(k)
        window.values[i].append(np.clip(np.rint(v * self.grid[i]), -2047, 2047).astype(np.int64))
        k, kept, v = self.turned(np.hstack(window.keys[i]))[group], np.hstack(window.values[i])[group], v[group]
        gain = self.w[f"{name}.query_gain"][:, None, None]
        z = self.turned(q, len(window.ids) - 1) @ k.swapaxes(1, 2)
        z = z.astype(F) * (gain * F(32 / (16384 * math.sqrt(d))))
        e = self.exp[np.minimum((z.max(axis=-1, keepdims=True) + F(0.5)) - z, F(len(self.exp) - 1)).astype(int)]
        p = np.rint(e.astype(F) * (F(4096) / e.sum(axis=-1, keepdims=True).astype(F))).astype(np.int64)
        y = (p @ kept).astype(F) * (F(1) / (p.sum(axis=-1, keepdims=True).astype(F) * self.grid[i]))
        if c.exclusive_attention:
            own = v / np.maximum(np.sqrt(fold(v * v)), F(1e-12))
            y = y - fold(y * own) * own
        yi, worth = integers(y.reshape(1, -1))
        return self.product(f"{name}.output.weight", yi) * worth

    def frequencies(self, window: Window, new: int) -> list[int]:
        """After a new input at the window's next place: how probable each token is next, of 2^24 (8.2 and 8.5)."""
        c, w, kept = self.c, self.w, []
        window.ids.append(new)
        x = first = self.entry(np.array(window.ids))[-1:]
        for i in range(c.layers):
            if c.unet_skips and i >= c.layers // 2 and kept:
                x = x + w["skip_scales"][i - c.layers // 2] * kept.pop()
            if c.embedding_mix:
                mix = w[f"blocks.{i}.embedding_mix"]
                x = mix[0] * x + mix[1] * first
            x = x + self.attention(i, x, window) * w.get(f"blocks.{i}.attention_scale", F(1))
            xi, worth = self.normed(i, x)
            h = self.product(f"blocks.{i}.mlp.up.weight", xi)
            hi, square = integers(np.square(np.maximum(h, h * F(0.5) if c.activation == "leaky_relu2" else F(0))))
            m = self.product(f"blocks.{i}.mlp.down.weight", hi) * (square * (worth * worth))
            x = x + m * w.get(f"blocks.{i}.mlp_scale", F(1))
            if c.unet_skips and i < c.layers // 2:
                kept.append(x)
        xi, worth = integers(x[-1])
        z = np.rint(self.product("next token", xi) * (worth * inverse_rms(x[-1]) * F(64))).astype(np.int64)
        levels = np.sign(z) * self.cap[np.minimum(np.abs(z), len(self.cap) - 1)]
        e = self.logit_exp[np.minimum(levels.max() - levels, len(self.logit_exp) - 1)].astype(np.float64)
        f = np.floor(e * (np.float64((1 << 24) - len(e)) / e.sum())).astype(np.int64) + 1
        f[levels.argmax()] += (1 << 24) - f.sum()
        return f.tolist()


class Coder:  # 7.2
    def __init__(self, data: bytes) -> None:
        self.state = int.from_bytes(data[:8], "little")
        self.words = np.frombuffer(data[8:], "<u4").tolist()[::-1]

    def symbol(self, frequencies: list[int]) -> int:
        ends, point = np.cumsum(frequencies).tolist(), self.state % (1 << 24)
        symbol = int(np.searchsorted(ends, point, side="right"))
        self.state = frequencies[symbol] * (self.state >> 24) + point - (ends[symbol] - frequencies[symbol])
        if self.state < 1 << 32:
            self.state = self.state << 32 | self.words.pop()
        return symbol


def tokens_of(network: Network, coder: Coder, count: int, streams: int, arithmetic: int) -> list[int]:  # 7.3
    out: list[list[int]] = [[] for _ in range(streams)]
    windows = [Window(network.c.layers) for _ in out]
    half, mask = max(1, network.length // 2), network.c.vocab_size
    for done in range(count):
        tokens, stream = out[done % streams], done % streams
        inputs = tokens[-1:] or [mask]
        if arithmetic == 2 and len(windows[stream].ids) == 2 * half:
            windows[stream].slide(half)
        if arithmetic == 1 and len(windows[stream].ids) == network.length:
            windows[stream] = Window(network.c.layers)
            inputs = [mask, *tokens[len(tokens) - network.length + half :]]
        found = [network.frequencies(windows[stream], token) for token in inputs]
        tokens.append(coder.symbol(found[-1]))
    return [token for stream in out for token in stream]


def runs_of(text: bytes, common: int, coder: Coder, counts: dict[tuple, list[int]]) -> Iterator[int]:
    """The kind of each space of a text (7.4)."""
    classes = [(65, 90, 65), (97, 122, 97), (48, 57, 48), (128, 255, 128)]
    near = [next((c for first, last, c in classes if first <= b <= last), b) for b in b"\0\0" + text + b"\0"]
    last = 0
    for at in [i for i in range(2, len(near) - 1) if near[i] == 32]:
        kind, hit = 0, False
        while kind < common and not hit:
            fine = near[at - 1], near[at + 1], near[at - 2], (at - last).bit_length()
            cells = [counts.setdefault((kind, *fine[:n]), [0, 0]) for n in (0, 2, 4)]
            p = 1 << 15
            for no, yes in cells:
                p = (65536 * yes + 4 * p) // (no + yes + 4)
            p = 256 * min(max(p, 1), 65535)
            hit = coder.symbol([p, (1 << 24) - p]) == 0
            for cell in cells:
                cell[hit] += 1
            kind += not hit
        last = at if kind else last
        yield kind


def number(file: io.BytesIO) -> int:
    byte = file.read(1)[0]
    return byte & 0x7F | (number(file) << 7 if byte & 0x80 else 0)


def modelled(body: bytes, network: Network, decode_ids: Callable[[list[int]], bytes], arithmetic: int) -> bytes:  # 7
    file = io.BytesIO(body)
    side = io.BytesIO(file.read(number(file)))
    streams, coder = number(file), Coder(file.read())
    if side.read(1) == b"\1":
        size, side = number(side), io.BytesIO(lzma.decompress(side.read()))
        assert len(side.getvalue()) == size
    segments = [(kind := side.read(1)[0], number(side), 0 if kind else number(side)) for _ in range(number(side))]
    folded = side.read(1) == b"\1"
    common = [side.read(number(side)) for _ in range(number(side))] if folded else []
    texts = [(count, [(number(side), number(side), side.read(number(side))) for _ in range(edits)])
             for kind, count, edits in segments if kind == 0]  # fmt: skip
    ids = tokens_of(network, coder, sum(count + 1 for count, _ in texts), streams, arithmetic)
    pieces, counts = [], {}
    for count, edits in texts:
        known, ids, text, at = decode_ids(ids[1 : count + 1]), ids[count + 1 :], b"", 0
        for keep, drop, put in edits:
            text, at = text + known[at : at + keep] + put, at + keep + drop
        text += known[at:]
        if folded:
            first, *words = text.split(b" ")
            kinds = runs_of(text, len(common), coder, counts)
            runs = [common[k] if k < len(common) else side.read(number(side)) for k in kinds]
            text = first + b"".join(run + word for run, word in zip(runs, words, strict=True))
        pieces.append(text)
    assert coder.state == 1 << 32 and not coder.words
    return b"".join(side.read(count) if kind == 1 else pieces.pop(0) for kind, count, _ in segments)


def decode(data: bytes, config: dict, weights: dict, decode_ids: Callable[[list[int]], bytes], sha256: str) -> bytes:
    """The bytes that a `.mzz` file holds (section 6). decode_ids: a tokenizer's ids -> bytes."""
    file, out = io.BytesIO(data), b""
    assert file.read(4) == b"MZZ2"
    while (kind := file.read(1)[0]) not in (0, 5):
        if kind == 1:
            out += file.read(number(file))
        elif kind == 3:
            assert file.read(32) == bytes.fromhex(sha256)
            arithmetic = file.read(1)[0]
        else:
            size, body = number(file), file.read(number(file))
            assert file.read(4) == zlib.crc32(body).to_bytes(4, "little")
            part = (lzma.decompress(body) if kind == 2
                    else modelled(body, Network(config, weights), decode_ids, arithmetic))  # fmt: skip
            assert len(part) == size
            out += part
    out += file.read(len(data) - 16 - file.tell())  # nothing in an end block
    assert file.read() == hashlib.sha256(out).digest()[:16]
    return out
