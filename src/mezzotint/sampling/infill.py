"""Text with gaps: parse, tokenize, heal the words around a gap, choose its length, fill it.

All that is not a gap comes back byte for byte. Does not know how masks are revealed.
"""

from __future__ import annotations

import functools
import math
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from mezzotint.config import SamplingConfig, parse_attention
from mezzotint.errors import ConfigError, MezzotintError
from mezzotint.model import Model
from mezzotint.sampling.denoise import Denoised, denoise
from mezzotint.sampling.generate import Span, _check_text, _readable, resample_invalid_utf8
from mezzotint.sampling.pieces import _encode_inside, _space_pending, _without_pending_space, join, pieces

GAP = re.compile(r"_{4,}|\[MASK(?:\*([0-9]+))?\]")
LENGTHS = (1, 2, 3, 4, 6, 8, 12, 16)
NOMINAL = 4  # masks that stand for a gap of unknown length while another one is filled
RIGHT_TOKENS = 4  # tokens right of a gap whose plausibility judges its length
LONGEST_OVERLAP = 12  # characters of a broken word that a token across a gap's edge may take in


@dataclass
class _Fixed:
    """Text that comes back as it is. tokens: how the network sees it."""

    text: str
    tokens: list[int]


@dataclass
class _Gap:
    """A gap. count: masks asked for, None if unknown. tokens: MASK until filled.

    left, right: characters of the fixed text beside it that its first or last token repeats (see `_heal`).
    """

    count: int | None
    tokens: list[int]
    confidence: list[float] = field(default_factory=list)
    left: str = ""
    right: str = ""
    space_before: bool = False
    open_before: bool = False
    space_after: bool = False
    text: str | None = None
    nats: float = 0.0


@dataclass(frozen=True)
class Gap:
    """A filled gap. text: what was put there. tokens: how many ids. confidence: of each; nats: -log of their product.

    The confidence of an id that crosses the gap's edge counts the id whole.
    """

    text: str
    tokens: int
    confidence: list[float]
    nats: float


@dataclass(frozen=True)
class Filled:
    """Text whose gaps are filled. text: all of it, the fixed parts byte for byte."""

    text: str
    gaps: list[Gap]
    forward_passes: int
    seconds: float
    seed: int

    def to_dict(self) -> dict[str, Any]:
        """JSON object."""
        return asdict(self)


def parse_gaps(text: str) -> tuple[list[str], list[int | None]]:
    """Split text at its gaps: n + 1 fixed strings and n mask counts, None where the length is unknown.

    A gap is `____` (four or more underscores: unknown length), `[MASK]` (1 mask) or `[MASK*8]` (8 masks).
    Raises MezzotintError for `[MASK*0]` and for text that is not Unicode.
    """
    _check_text(text)
    fixed: list[str] = []
    counts: list[int | None] = []
    last = 0
    for match in GAP.finditer(text):
        fixed.append(text[last : match.start()])
        last = match.end()
        if match[0].startswith("_"):
            counts.append(None)
        else:
            digits = (match[1] or "1").lstrip("0")
            if not digits:
                raise MezzotintError(f"{match[0]} asks for no masks: ask for at least 1, or take it out")
            # More digits than any window has tokens: the number only has to be too large.
            counts.append(int(digits[:12]))
    return [*fixed, text[last:]], counts


class _Filling:
    """One call of `infill`: the segments, the cost so far, and what is being watched."""

    def __init__(
        self,
        model: Model,
        text: str,
        seed: int,
        attention: str,
        on_step: Callable[[int, list[Span]], None] | None,
        settings: dict[str, Any],
    ) -> None:
        self.model, self.seed, self.attention, self.on_step, self.settings = model, seed, attention, on_step, settings
        self.tokenizer, self.mask_id = model.tokenizer, model.config.mask_id
        self.table = pieces(model.tokenizer)
        self.passes = 0
        self.calls = 0
        strings, counts = parse_gaps(text)
        room = model.config.sequence_length - 1
        masks = sum(count or 1 for count in counts)
        if masks > room:
            raise MezzotintError(
                f"the text has {len(counts):,} gap{'s' * (len(counts) > 1)} of at least {masks:,} tokens, but the "
                f"model's window holds {room:,}: fill {'fewer or ' * (len(counts) > 1)}shorter gaps at a time"
            )
        self.parts: list[_Fixed | _Gap] = [self._fixed(strings[0], inside=False, before_gap=bool(counts))]
        for i, count in enumerate(counts):
            before, after = strings[i], strings[i + 1]
            gap = _Gap(count, [self.mask_id] * (count or NOMINAL))
            gap.open_before = i == 0 and not before
            gap.space_before = _space_pending(self.tokenizer, before)
            gap.space_after = bool(after) and join(self.table, _encode_inside(self.tokenizer, after)).startswith(" ")
            gap.space_after |= bool(after) and after[0].isspace()
            self.parts += [gap, self._fixed(after, inside=True, before_gap=i + 1 < len(counts))]

    def _fixed(self, text: str, *, inside: bool, before_gap: bool) -> _Fixed:
        """Fixed text as ids. A space at its end, if a gap follows, belongs to the gap's first token."""
        seen = _without_pending_space(self.tokenizer, text) if before_gap else text
        return _Fixed(text, _encode_inside(self.tokenizer, seen) if inside else self.tokenizer.encode(seen))

    # --- canvases

    def context(self, index: int, side: int) -> list[int]:
        """Ids left (side -1) or right (side 1) of part `index`, whole text; the left begins with BOS."""
        if side < 0:
            return [self.tokenizer.bos_id, *(t for part in self.parts[:index] for t in part.tokens)]
        return [t for part in self.parts[index + 1 :] for t in part.tokens]

    def canvas(self, left: list[int], middles: list[list[int]], right: list[int]) -> tuple[Tensor, int]:
        """Rows of left + middle + right + masks, of one length within the window, and where the middles start.

        The longest middle decides how much context fits; it is taken evenly from both sides. Masks at the end stand
        for text unknown, as in training, and make the rows equally long.
        """
        window = self.model.config.sequence_length
        longest = max(len(m) for m in middles)
        room = max(0, window - longest)
        take_left = min(len(left), max(room - len(right), room // 2))
        take_right = min(len(right), room - take_left)
        left = left[len(left) - take_left :]
        right = right[:take_right]
        total = min(window, max(len(left) + longest + len(right) + PADDING, SHORTEST_CANVAS))
        rows = [left + m + right for m in middles]
        return torch.tensor([row + [self.mask_id] * (total - len(row)) for row in rows]), len(left)

    def log_p(self, canvas: Tensor, wanted: Tensor) -> Tensor:
        """Log-probabilities, float64 [n, V], at the wanted positions of the canvas, which are hidden for it."""
        self.passes += 1
        hidden = canvas.masked_fill(wanted, self.mask_id).to(self.model.device)
        with torch.inference_mode():
            logits = self.model.logits(
                hidden, block_size=parse_attention(self.attention), positions=wanted.to(self.model.device)
            )
        return torch.log_softmax(logits.double().cpu(), dim=-1)

    # --- edges of gaps

    def limits(self, gap: _Gap, count: int) -> list[Tensor | None]:
        """Which ids may stand at each of the gap's `count` positions; None where any text may."""
        found: list[Tensor | None] = [None] * count
        left, right, blank = gap.left, gap.right, gap.space_before or gap.open_before

        def fits(text: str, first: bool, last: bool) -> bool:
            if first and left and not text.startswith(left):
                return False
            if last and right and not text.endswith(right):
                return False
            if first and not left and gap.space_before and not text.startswith(" "):
                return False
            inner = text[len(left) if first else 0 : len(text) - (len(right) if last else 0)]
            if len(text) < (len(left) if first else 0) + (len(right) if last else 0) + (1 if left or right else 0):
                return False
            # A gap is not filled with nothing, nor a space put beside a space.
            if first and blank and not left:
                inner = inner.removeprefix(" ")
            return bool(inner) and not (last and gap.space_after and inner.endswith(" "))

        for place in {0, count - 1}:
            first, last = place == 0, place == count - 1
            if not (first and (left or blank)) and not (last and (right or gap.space_after)):
                continue
            able = self.table.where(lambda text, first=first, last=last: fits(text, first, last))
            # Without any such id the tokenizer has no pieces with spaces: then the plain text is put there.
            found[place] = able if bool(able.any()) else None
            if found[place] is not None and not (first and (left or gap.space_before)) and not (last and right):
                # All that may not stand here is a space, which a byte of a longer character is not.
                found[place] = able | self.table.is_byte & torch.tensor([raw != b" " for raw in self.table.raw])
        return found

    def possible(self, gap: _Gap, count: int) -> bool:
        """Whether `count` tokens can meet both edges: one alone may have to be a space, a word and a word's rest."""
        return count > 1 or not self._narrow(gap) or self.limits(gap, count)[0] is not None

    def _narrow(self, gap: _Gap) -> bool:
        return bool(gap.right) and (bool(gap.left) or gap.space_before or gap.open_before)

    def heal(self, index: int) -> None:
        """Let a gap's first and last tokens cross its edges, where the edge cuts a word: "Lon____ is" -> "London is".

        The tokens of "Lon" alone are not those with which "London" begins, so a model that is shown them would not
        go on with "don". For each way to cut the word W at the edge into tokens w_1..w_j and a rest r that the gap's
        first token must begin with (and exceed), the model's probability of the word so far is

            p(w_1..w_j, r...) = prod_i p(w_i | w_<i, context) * sum over tokens v that begin with r of p(v | w, context)

        and the most probable cut is taken. At the right edge likewise, from right to left. Cuts are bounded by
        LONGEST_OVERLAP characters, and all are scored in one batch.
        """
        gap = self.parts[index]
        before, after = self.parts[index - 1], self.parts[index + 1]
        options: list[tuple[str, list[int], list[int]]]
        assert isinstance(gap, _Gap) and isinstance(before, _Fixed) and isinstance(after, _Fixed)
        inside = index > 1
        whole = join(self.table, before.tokens)
        start = whole.rfind(" ") if " " in whole else 0
        if not gap.space_before and whole and self._plain(before.tokens) and before.text[-1:].isalnum():
            options = []
            head = self._encode(whole[:start], inside)
            for cut in range(max(start, len(whole) - LONGEST_OVERLAP), len(whole)):
                ids = self._encode(whole[:cut], inside)
                if ids[: len(head)] == head and join(self.table, ids) == whole[:cut]:
                    options.append((whole[cut:], ids, ids[len(head) :]))
            if before.tokens[: len(head)] != head:
                head = []  # the ids of the word depend on what is before it: then all of the text is the word
                options.clear()
            options.append(("", before.tokens, before.tokens[len(head) :]))
            far_left = self.context(index - 1, -1) + head
            right = self.context(index, 1)
            best = self._best_cut(options, far_left, right, leftwards=False)
            gap.left, before.tokens = options[best][0], options[best][1]
        whole = join(self.table, after.tokens)
        end = whole.find(" ") if " " in whole else len(whole)
        if not gap.space_after and whole and self._plain(after.tokens) and after.text[:1].isalnum():
            options = []
            tail = _encode_inside(self.tokenizer, whole[end:])
            if after.tokens[len(after.tokens) - len(tail) :] != tail:
                tail = []
            options.append(("", after.tokens, after.tokens[: len(after.tokens) - len(tail)]))
            for cut in range(1, min(end, LONGEST_OVERLAP) + 1 if tail or end == len(whole) else 1):
                ids = _encode_inside(self.tokenizer, whole[cut:])
                word = ids[: len(ids) - len(tail)]
                if ids[len(word) :] == tail and join(self.table, ids) == whole[cut:]:
                    options.append((whole[:cut], ids, word))
            far_right = tail + self.context(index + 1, 1)
            best = self._best_cut(options, self.context(index, -1), far_right, leftwards=True)
            gap.right, after.tokens = options[best][0], options[best][1]

    def _encode(self, text: str, inside: bool) -> list[int]:
        """Ids of fixed text; of the first one also if `text` already shows the space that its encoding adds."""
        if inside:
            return _encode_inside(self.tokenizer, text)
        ids = self.tokenizer.encode(text)
        if text.startswith(" ") and join(self.table, ids) != text:
            bare = self.tokenizer.encode(text[1:])
            ids = bare if join(self.table, bare) == text else ids
        return ids

    def _plain(self, ids: list[int]) -> bool:
        return all(self.table.text[i] for i in ids)

    def _best_cut(
        self, options: list[tuple[str, list[int], list[int]]], left: list[int], right: list[int], *, leftwards: bool
    ) -> int:
        """The most probable of (overlap, ids of the text, ids of the word's part that stays); see `heal`."""
        span = max(len(word) for _, _, word in options) + NOMINAL
        rows: list[list[int]] = []
        asked: list[tuple[int, int, Tensor]] = []  # option, place in the span, ids whose probability counts
        for n, (overlap, _, word) in enumerate(options):
            known = word[::-1] if leftwards else word
            for j in range(len(known) + (1 if overlap else 0)):
                row = known[:j] + [self.mask_id] * (span - j)
                if j < len(known):
                    able = torch.zeros(len(self.table.text), dtype=torch.bool)
                    able[known[j]] = True
                elif leftwards:
                    able = self.table.where(lambda t, o=overlap: t.endswith(o) and len(t) > len(o))
                else:
                    able = self.table.where(lambda t, o=overlap: t.startswith(o) and len(t) > len(o))
                rows.append(row[::-1] if leftwards else row)
                asked.append((n, span - 1 - j if leftwards else j, able))
        if len(options) == 1:
            return 0
        canvas, offset = self.canvas(left, rows, right)
        wanted = torch.zeros(canvas.shape, dtype=torch.bool)
        for r, (_, place, _) in enumerate(asked):
            wanted[r, offset + place] = True
        log_p = self.log_p(canvas, wanted)
        score = torch.zeros(len(options), dtype=torch.float64)
        for (n, _, able), row in zip(asked, log_p, strict=True):
            score[n] += torch.logsumexp(row.masked_fill(~able, -math.inf), dim=0)
        return int(score.argmax())

    # --- filling

    def denoise(self, canvas: Tensor, wanted: Tensor, only: dict[tuple[int, int], Tensor], show: Any) -> Denoised:
        """`denoise` with a seed of its own for every call, byte ids mended."""
        seed = self.seed + 0x9E3779B97F4A7C15 * self.calls
        self.calls += 1
        watch = None
        if self.on_step is not None:
            watch = functools.partial(self._show, self.passes, show)
        drawable = self.table.is_text
        result = denoise(
            self.model, canvas, seed=seed, wanted=wanted, only=only, attention=self.attention, on_step=watch,
            **self.settings,
        )  # fmt: skip
        result = resample_invalid_utf8(
            self.model, result, wanted, seed, drawable, 0, only=only, attention=self.attention, **self.settings
        )
        self.passes += result.forward_passes
        return result

    def _show(self, before: int, show: Any, step: int, ids: Tensor, confidence: Tensor) -> None:
        assert self.on_step is not None
        shown = show(ids, confidence)
        spans: list[Span] = []
        for i, part in enumerate(self.parts):
            if isinstance(part, _Fixed):
                if part.text:
                    spans.append(Span(part.text, None))
            elif i in shown:
                spans += self.spans(part, *shown[i])
            elif part.text is not None:
                spans += self.spans(part, part.tokens, part.confidence)
            else:
                spans += [Span("", 0.0)] * len(part.tokens)
        self.on_step(before + step, spans)

    def spans(self, gap: _Gap, ids: Sequence[int], confidence: Sequence[float]) -> list[Span]:
        """A gap's ids one by one, without what they repeat of the fixed text."""
        spans = []
        at = 0
        for text, sure, count in _readable(self.table, ids, confidence):
            if at == 0:
                text = self._cut_left(gap, text)
            at += count
            if at == len(ids):
                text = self._cut_right(gap, text)
            spans.append(Span(text, sure))
        return spans

    def _cut_left(self, gap: _Gap, text: str) -> str:
        if gap.left:
            return text.removeprefix(gap.left)
        return text.removeprefix(" ") if gap.space_before or gap.open_before else text

    def _cut_right(self, gap: _Gap, text: str) -> str:
        if gap.right:
            return text.removesuffix(gap.right)
        return text.removesuffix(" ") if gap.space_after else text

    def settle(self, gap: _Gap, ids: list[int], confidence: list[float]) -> None:
        """Take these ids for the gap."""
        gap.tokens, gap.confidence = ids, confidence
        gap.text = self._cut_right(gap, self._cut_left(gap, join(self.table, ids)))
        gap.nats = -sum(math.log(max(c, 1e-300)) for c in confidence)

    def fill_unknown(self, index: int, lengths: Sequence[int]) -> None:
        """Fill a gap of unknown length: the length that, per byte, makes the gap and what follows it most probable.

        Each length l is filled (a row of one batch) and scored by

            -sum_i log p(g_i | context, the g revealed before) / bytes(g)
            -sum_j log p(r_j | context, l masks, the other r hidden) / bytes(r)

        over the gap's ids g in the order revealed, and over the RIGHT_TOKENS ids r to its right, hidden together with
        the gap. The first term is a chain-rule likelihood; the second says how well the text to the right fits l
        tokens on, before anything is put in between, so a length cannot win by what it fills itself with. Bytes of g
        and r in one denominator would let the longest gap win by diluting r.
        """
        gap = self.parts[index]
        assert isinstance(gap, _Gap)
        left, right = self.context(index, -1), self.context(index, 1)
        window = self.model.config.sequence_length
        # A gap that took most of the window would leave no context to judge it by.
        lengths = [n for n in lengths if n <= max(2, window // 4) and self.possible(gap, n)] or [
            2 if self._narrow(gap) else min(lengths)
        ]
        near = [t for t in right[:RIGHT_TOKENS] if t != self.mask_id] if right[:1] != [self.mask_id] else []
        near_nats = [0.0] * len(lengths)
        if near:
            canvas, at = self.canvas(left, [[self.mask_id] * n for n in lengths], right)
            asked = torch.zeros(canvas.shape, dtype=torch.bool)
            for b, n in enumerate(lengths):
                asked[b, at + n : at + n + len(near)] = True
            log_p = self.log_p(canvas, asked).view(len(lengths), -1, len(self.table.text))
            targets = torch.tensor(near)[None, :, None].expand(len(lengths), -1, 1)[:, : log_p.shape[1]]
            near_nats = (-log_p.gather(-1, targets).sum(dim=(1, 2))).tolist()
        canvas, at = self.canvas(left, [[self.mask_id] * n for n in lengths], right)
        wanted = torch.zeros(canvas.shape, dtype=torch.bool)
        only: dict[tuple[int, int], Tensor] = {}
        for b, n in enumerate(lengths):
            wanted[b, at : at + n] = True
            only |= {(b, at + i): able for i, able in enumerate(self.limits(gap, n)) if able is not None}

        def show(ids: Tensor, confidence: Tensor) -> dict[int, tuple[list[int], list[float]]]:
            b = len(lengths) // 2
            here = slice(at, at + lengths[b])
            return {index: (ids[b, here].tolist(), confidence[b, here].tolist())}

        result = self.denoise(canvas, wanted, only, show)
        near_bytes = max(1, sum(len(self.table.raw[t]) for t in near))
        scores = []
        for b, n in enumerate(lengths):
            ids = result.ids[b, at : at + n].tolist()
            nats = -result.confidence[b, at : at + n].double().clamp_min(1e-300).log().sum().item()
            size = max(1, len(b"".join(self.table.raw[t] for t in ids)))
            scores.append(nats / size + near_nats[b] / near_bytes)
        best = scores.index(min(scores))
        n = lengths[best]
        self.settle(gap, result.ids[best, at : at + n].tolist(), result.confidence[best, at : at + n].tolist())
        if self.on_step is not None:
            self._show(self.passes, lambda *_: {}, 0, canvas, canvas)

    def fill_known(self, indices: list[int]) -> None:
        """Fill gaps of known lengths that lie in one window, all at once."""
        first, last = indices[0], indices[-1]
        middle = [t for part in self.parts[first : last + 1] for t in part.tokens]
        canvas, at = self.canvas(self.context(first, -1), [middle], self.context(last, 1))
        wanted = torch.zeros(canvas.shape, dtype=torch.bool)
        only: dict[tuple[int, int], Tensor] = {}
        places: dict[int, slice] = {}
        for i, part in enumerate(self.parts[first : last + 1], start=first):
            if i in indices:
                assert isinstance(part, _Gap)
                places[i] = slice(at, at + len(part.tokens))
                wanted[0, places[i]] = True
                limits = self.limits(part, len(part.tokens))
                only |= {(0, at + j): able for j, able in enumerate(limits) if able is not None}
            at += len(part.tokens)

        def show(ids: Tensor, confidence: Tensor) -> dict[int, tuple[list[int], list[float]]]:
            return {i: (ids[0, here].tolist(), confidence[0, here].tolist()) for i, here in places.items()}

        result = self.denoise(canvas, wanted, only, show)
        for i, here in places.items():
            part = self.parts[i]
            assert isinstance(part, _Gap)
            self.settle(part, result.ids[0, here].tolist(), result.confidence[0, here].tolist())

    def run(self, lengths: Sequence[int]) -> None:
        """Gaps of unknown length from left to right, then the others, as many together as a window holds."""
        known: list[int] = []
        for i, part in enumerate(self.parts):
            if isinstance(part, _Gap) and part.count is None:
                self.heal(i)
                self.fill_unknown(i, lengths)
            elif isinstance(part, _Gap):
                known.append(i)
        while known:
            group = [known.pop(0)]
            while known and self._span(group[0], known[0]) <= self.model.config.sequence_length // 2:
                group.append(known.pop(0))
            self.fill_known(group)

    def _span(self, first: int, last: int) -> int:
        return sum(len(part.tokens) for part in self.parts[first : last + 1])


PADDING = 8
SHORTEST_CANVAS = 32


def infill(
    model: Model,
    text: str,
    seed: int = 0,
    *,
    lengths: Sequence[int] = LENGTHS,
    attention: str = "full",
    on_step: Callable[[int, list[Span]], None] | None = None,
    **settings: Any,
) -> Filled:
    """Fill the gaps of a text (see `parse_gaps`); all the rest of it comes back byte for byte.

    lengths: token counts to try for gaps of unknown length. on_step(pass, spans) sees the text being revealed.
    settings: the fields of `SamplingConfig`; temperature is 0.7 unless given, and `steps` is per gap. Text longer than the
    window is seen through a window around each gap. Raises MezzotintError when all gaps together need more tokens than
    the window holds.
    """
    started = time.perf_counter()
    settings.setdefault("temperature", 0.7)
    SamplingConfig(**settings)
    if not lengths or min(lengths) < 1:
        raise ConfigError("lengths to try must be at least 1 token each")
    filling = _Filling(model, text, seed, attention, on_step, settings)
    filling.run(lengths)
    parts = filling.parts
    output = "".join(part.text or "" for part in parts)
    gaps = [
        Gap(part.text or "", len(part.tokens), part.confidence, part.nats) for part in parts if isinstance(part, _Gap)
    ]
    return Filled(output, gaps, filling.passes, time.perf_counter() - started, seed)


def fill(model: Model, text: str, seed: int = 0, **options: Any) -> str:
    """The text with its gaps filled: `infill(...).text`. Text without gaps comes back as it is."""
    return infill(model, text, seed, **options).text
