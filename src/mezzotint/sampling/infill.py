"""Text with gaps: propose texts for each gap, weigh them by the code length of the whole, keep the likeliest.

All that is not a gap comes back byte for byte. Does not know how masks are revealed.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from mezzotint.config import OPTIONS, Rule, SamplingConfig, SamplingOptions, checked, parse_attention
from mezzotint.errors import ConfigError, MezzotintError
from mezzotint.network.model import Model
from mezzotint.progress import OnProgress, Progress
from mezzotint.sampling.candidates import BEAM_LENGTHS, NEAR, Candidate, Search, beam
from mezzotint.sampling.candidates import drawn as draw_candidates
from mezzotint.sampling.constraints import Constraint
from mezzotint.sampling.draft import Draft, Parts, edge_limits, shows
from mezzotint.sampling.generate import Span
from mezzotint.sampling.healing import heal
from mezzotint.sampling.ranking import CONTEXT, HORIZON, NEAR_HORIZON, least_code_lengths, with_candidate

if TYPE_CHECKING:
    from typing_extensions import Unpack


LENGTHS = (1, 2, 3, 4, 6, 8, 12, 16)
LONGEST_BEAM = 2 * LENGTHS[-1]  # tokens of a gap that are sought by a beam
CANDIDATES = 64  # for each gap of a text that has up to FEW of them, then fewer, down to LEAST
FEW, LEAST = 4, 16
PATHS = 3  # ways to fill the gaps so far that are kept while the next one is filled
TEMPERATURE = 0.7  # of fills that are drawn


def check_fills(model: Model) -> None:
    """Raise ConfigError for a model of other software that predicts next tokens only and so has nothing for a gap."""
    if getattr(model, "objective", None) == "causal":
        raise ConfigError("the model predicts next tokens only: it can write (sample), but gaps need a masked model")


@dataclass(frozen=True)
class Alternative:
    """A text for a gap. bits: code length of it and of the text behind it, as far as that was weighed, given the text
    before it and what stands in the other gaps. probability: among the candidates, by these code lengths."""

    text: str
    bits: float
    probability: float


@dataclass(frozen=True)
class Gap:
    """A filled gap. text: what was put there. tokens: how many ids. confidence: of each; nats: -log of their product.

    The confidence of an id that crosses the gap's edge counts the id whole. alternatives: the candidates, the likeliest,
    which was put there, first; as many as were asked for.
    """

    text: str
    tokens: int
    confidence: list[float]
    nats: float
    alternatives: list[Alternative]


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


@dataclass(frozen=True)
class _Path:
    """One way to fill the last few gaps. nats: code length of them and the texts between."""

    filled: tuple[Candidate, ...] = ()
    nats: float = 0.0


@dataclass
class _Filling:
    """What one call of `infill` was asked for, and the forward passes so far. answers: to show for each gap. drawn: not
    sought by a beam."""

    model: Model
    draft: Draft
    seed: int
    lengths: Sequence[int]
    candidates: int
    answers: int
    drawn: bool
    attention: str
    constraint: Constraint
    settings: dict[str, Any]
    on_step: Callable[[int, list[Span]], None] | None
    progress: OnProgress | None
    passes: int = 0


def _lengths(filling: _Filling, i: int) -> list[int]:
    """Token counts to try for gap i."""
    gap, window = filling.draft.gaps[i], filling.draft.window
    if gap.count is not None:
        return [gap.count]
    # One token alone may have to be a space, something to see and a word's rest, which few tokens are.
    least = 1 if edge_limits(filling.draft.tokenizer, gap.edges, 1) else 2
    lengths = filling.lengths
    if filling.constraint.expression is not None:  # what matches may have any number of tokens
        lengths = range(min(lengths), max(lengths) + 1)
    # A gap that took most of the window would leave no context to judge it by.
    fitting = [n for n in lengths if least <= n <= max(2, window // 4)]
    return fitting or [min(max(least, min(filling.lengths)), window - 1)]


def _propose(filling: _Filling, i: int) -> list[Candidate]:
    """Candidates for gap i, each text once."""
    draft, settings = filling.draft, filling.settings
    show = None if filling.on_step is None else _shown(filling, i)
    search = Search(filling.model, draft, i, filling.attention, filling.constraint, show, filling.passes, NEAR)
    lengths, count = _lengths(filling, i), filling.candidates
    seed = filling.seed + 0x9E3779B97F4A7C15 * i
    short = [n for n in lengths if n <= BEAM_LENGTHS]
    found: list[Candidate] = []
    if filling.drawn and not filling.constraint:
        found += draw_candidates(search, lengths * -(-count // len(lengths)), seed, settings)
    else:
        # What a beam leaves out are much longer texts, unless it alone can meet a constraint.
        beamed = [n for n in lengths if filling.constraint or n <= LONGEST_BEAM]
        if beamed:
            width = max(1, round((count - len(lengths) + len(short)) / max(1, len(short))))
            found += beam(search, beamed, width, parse_attention(filling.attention))
        if len(beamed) < len(lengths):
            found += draw_candidates(
                search, [n for n in lengths if n not in beamed], seed, {**settings, "temperature": 0.0}
            )
    filling.passes = search.passes
    unique: dict[str, Candidate] = {}
    for candidate in found:
        text = draft.text_of(i, candidate.ids)
        if draft.gaps[i].count is not None or shows(text):
            unique.setdefault(text, candidate)
    gap = draft.gaps[i]
    if found and not unique and not gap.edges.begins:
        gap.edges = replace(gap.edges, begins=True)  # nothing but blanks: once more, with something to see at its start
        return _propose(filling, i)
    if not unique:
        raise MezzotintError(
            f"nothing that may stand in gap {i + 1} was found: loosen what is asked of it, or try more candidates"
        )
    return list(unique.values())


def _weigh(
    filling: _Filling, i: int, paths: Sequence[_Path], found: Sequence[Candidate], *, beyond: bool
) -> list[list[float]]:
    """Code lengths in nats of gap i's candidates with the text behind it, for each path before it.

    beyond: weigh what stands in the gaps behind it as well, else the text before the next gap only.
    """
    draft = filling.draft
    longest = max(len(c.ids) for c in found)
    right = draft.right_of(i, HORIZON) if beyond else draft.ids[i + 1][:HORIZON]
    right = right[: max(0, draft.window - longest - 1)]
    most = min(CONTEXT, max(1, draft.window - longest - len(right)))
    tail = max(0, len(right) - NEAR_HORIZON)
    weighed: list[list[float]] = []
    for path in paths:
        texts = []
        left = draft.left_of(i, most, [c.ids for c in path.filled])
        for candidate in found:
            before, text = with_candidate(draft, left, candidate.ids, right)
            # Encoded anew a text may have more tokens than it was drawn with.
            spare = len(before) + len(text) - draft.window
            texts.append((before[max(0, spare) :], text[: draft.window]))
        nats, passes = least_code_lengths(filling.model, texts, tail, max(filling.answers, PATHS))
        filling.passes += passes
        weighed.append(nats)
    return weighed


def _fill(filling: _Filling) -> list[list[tuple[Candidate, float]]]:
    """Fill all gaps from left to right; returns each gap's candidates and their nats, the chosen one first.

    Gaps with little text between them are chosen together: PATHS ways to fill the ones before are kept until more than
    HORIZON tokens of given text have been weighed (a beam). Then each gap's candidates are weighed once more given
    all other gaps, and the likeliest is taken.
    """
    draft = filling.draft
    proposals: list[list[Candidate]] = []
    ranked: list[list[tuple[Candidate, float]]] = []
    paths = [_Path()]
    first = 0  # of the gaps that are chosen together
    for i, gap in enumerate(draft.gaps):
        if not filling.constraint.whole_words:
            filling.passes += heal(filling.model, draft, i)
        found = _propose(filling, i)
        proposals.append(found)
        weighed = _weigh(filling, i, paths, found, beyond=False)
        grown = [
            _Path((*path.filled, candidate), path.nats + nats)
            for path, each in zip(paths, weighed, strict=True)
            for candidate, nats in zip(found, each, strict=True)
        ]
        paths = sorted(grown, key=lambda path: path.nats)[:PATHS]
        for done, candidate in zip(draft.gaps[first : i + 1], paths[0].filled, strict=True):
            done.ids, done.confidence = candidate.ids, candidate.confidence
        if i + 1 == len(draft.gaps) or len(draft.ids[i + 1]) >= HORIZON:
            if i == first:
                ranked.append(_ranked(found, weighed[0]))
            else:
                ranked += [_settle(filling, k, proposals[k]) for k in range(first, i + 1)]
            paths, first = [_Path()], i + 1
        if filling.on_step is not None:
            _shown(filling, i)(filling.passes, gap.ids, gap.confidence)
        if filling.progress is not None:
            filling.progress(Progress.nth("gap", i + 1, len(draft.gaps)))
    return ranked


def _settle(filling: _Filling, i: int, found: list[Candidate]) -> list[tuple[Candidate, float]]:
    """Gap i's candidates and their nats given all other gaps, the likeliest, which is put there, first."""
    gap = filling.draft.gaps[i]
    ranked = _ranked(found, _weigh(filling, i, [_Path()], found, beyond=True)[0])
    gap.ids, gap.confidence = ranked[0][0].ids, ranked[0][0].confidence
    return ranked


def _ranked(found: list[Candidate], nats: list[float]) -> list[tuple[Candidate, float]]:
    return sorted(zip(found, nats, strict=True), key=lambda pair: pair[1])


def _shown(filling: _Filling, i: int) -> Callable[[int, Sequence[int], Sequence[float]], None]:
    """What tells `on_step` of gap i's ids, between the text as it stands."""
    draft = filling.draft
    parts = [[Span(text, None)] if text else [] for text in draft.texts]
    gaps = [
        draft.spans(k, gap.ids, gap.confidence) if gap.confidence else [Span("", 0.0)] * len(gap.ids)
        for k, gap in enumerate(draft.gaps)
    ]

    def show(step: int, ids: Sequence[int], confidence: Sequence[float]) -> None:
        assert filling.on_step is not None
        gaps[i] = draft.spans(i, ids, confidence)
        spans = itertools.chain(*itertools.chain(*zip(parts, [*gaps, []], strict=True)))
        filling.on_step(step, list(spans))

    return show


def infill(
    model: Model,
    text: str | Parts,
    seed: int = 0,
    *,
    n: int = 1,
    candidates: int | None = None,
    lengths: Sequence[int] = LENGTHS,
    whole_words: bool = False,
    max_words: int | None = None,
    regex: str | None = None,
    avoid: Sequence[str] | str = (),
    attention: str = "full",
    on_step: Callable[[int, list[Span]], None] | None = None,
    progress: OnProgress | None = None,
    **settings: Unpack[SamplingOptions],
) -> Filled:
    """Fill the gaps of a text (see `parse_gaps`, whose answer may be given instead of a text); all the rest of it comes
    back byte for byte.

    seed: of what is drawn. n: alternatives to return for each gap. candidates: about how many texts are proposed for each gap; the one with
    which the text has the least code length is taken (see `ranking`). Default: CANDIDATES by a beam, fewer where there
    are more than FEW gaps. Where an option of
    sampling is given they are drawn as it says, by default one for each length.
    lengths: token counts to try for gaps of unknown length. whole_words: gaps neither begin nor end inside a word.
    max_words: at most so many in a gap. regex: what a gap's text must match as a whole (needs the extra `regex`). avoid:
    words that must not stand in a gap. on_step(pass, spans) sees the text being revealed, progress counts gaps.
    attention: what a position of `model` attends to, see `denoise`.
    settings: the fields of `SamplingConfig`; temperature is 0.7 unless given, and `steps` is per gap. Text longer than the
    window is seen through a window around each gap; time is linear in the gaps. Raises MezzotintError when one gap needs
    more tokens than the window holds, ConfigError for bad settings.
    """
    started = time.perf_counter()
    check_fills(model)
    drawn = bool(settings)
    settings.setdefault("temperature", TEMPERATURE)
    SamplingConfig(**settings)
    if not lengths or min(lengths) < 1:
        raise ConfigError("lengths to try must be at least 1 token each")
    for name, value in (("n", n), ("candidates", 1 if candidates is None else candidates)):
        OPTIONS["answers"].check(name, value)
    checked("max_words", max_words)
    Rule(int).check("seed", seed)
    draft = Draft(model, text)
    if candidates is None:
        candidates = 1 if drawn else max(LEAST, CANDIDATES * FEW // max(FEW, len(draft.gaps)))
    constraint = Constraint.of(whole_words=whole_words, max_words=max_words, regex=regex, avoid=avoid)
    filling = _Filling(
        model,
        draft,
        seed,
        lengths,
        max(n, candidates),
        n,
        drawn,
        attention,
        constraint,
        dict(settings),
        on_step,
        progress,
    )
    ranked = _fill(filling)
    gaps = []
    for i, found in enumerate(ranked):
        best = found[0][1]
        total = sum(math.exp(best - nats) for _, nats in found)
        alternatives = [
            Alternative(draft.text_of(i, c.ids), nats / math.log(2), math.exp(best - nats) / total)
            for c, nats in found[:n]
        ]
        chosen = found[0][0]
        nats = -sum(math.log(max(c, 1e-300)) for c in chosen.confidence)
        gaps.append(Gap(alternatives[0].text, len(chosen.ids), chosen.confidence, nats, alternatives))
    output = "".join(itertools.chain(*zip(draft.texts, [*(g.text for g in gaps), ""], strict=True)))
    return Filled(output, gaps, filling.passes, time.perf_counter() - started, seed)


class InfillOptions(SamplingOptions, total=False):
    """The options of `infill`."""

    n: int
    candidates: int | None
    lengths: Sequence[int]
    whole_words: bool
    max_words: int | None
    regex: str | None
    avoid: Sequence[str] | str
    attention: str
    on_step: Callable[[int, list[Span]], None] | None
    progress: OnProgress | None


def fill(model: Model, text: str, seed: int = 0, **options: Unpack[InfillOptions]) -> str:
    """The text with its gaps filled: `infill(...).text`. Text without gaps comes back as it is.

    model, seed, options: see `infill`. Raises MezzotintError as it does.
    """
    return infill(model, text, seed, **options).text
