"""Sampling against enumeration, and filling against models that know one text by heart."""

from __future__ import annotations

import dataclasses
import itertools
import re
import unicodedata
from collections import Counter
from functools import cache
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from corpus import PADDED, sentencepiece_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from toy import eighths

from mezzotint.config import OPTIONS, SAMPLERS, ModelConfig, SamplingConfig
from mezzotint.data.tokenizer import Tokenizer, train_tokenizer
from mezzotint.errors import ConfigError, MezzotintError
from mezzotint.network.model import Denoiser, Model
from mezzotint.sampling import denoise as denoising
from mezzotint.sampling import samplers
from mezzotint.sampling.denoise import denoise
from mezzotint.sampling.draft import parse_gaps
from mezzotint.sampling.generate import Span, canvas_spans, sample
from mezzotint.sampling.infill import fill, infill
from mezzotint.sampling.samplers import Canvas, sample_tokens

# --- toys -------------------------------------------------------------------------------------------------------------


class JointModel:
    """Exact conditionals of a known joint distribution over V^T, so what is drawn can be counted against it."""

    block_size, trained_causally = 0, False

    def __init__(self, vocab: int = 3, length: int = 3, seed: int = 0) -> None:
        self.config = SimpleNamespace(vocab_size=vocab, mask_id=vocab, sequence_length=length)
        self.device = torch.device("cpu")
        weights = np.random.default_rng(seed).gamma(1.5, size=(vocab,) * length)
        self.joint = (weights + 0.1) / (weights + 0.1).sum()  # no cell too rare to count
        self.asked: list[torch.Tensor] = []
        self.info: dict = {}

    def marginal(self, row: tuple[int, ...], position: int) -> np.ndarray:
        """p(x_position | the row's tokens that are not MASK)."""
        where = tuple(slice(None) if t == self.config.mask_id else slice(t, t + 1) for t in row)
        part = self.joint[where]
        part = part.sum(axis=tuple(i for i in range(len(row)) if i != position))
        return part / part.sum()

    def logits(self, ids, *, block_size=0, positions=None):
        assert positions is not None
        self.asked.append(positions)
        where = positions.nonzero().tolist()
        return torch.stack([self._log(tuple(ids[row].tolist()), i) for row, i in where]).float()

    @cache  # noqa: B019
    def _log(self, row, position):
        return torch.from_numpy(np.log(self.marginal(row, position) + 1e-30))


class Recall:
    """A model that knows texts by heart: the posterior over them, at every offset, given what a canvas shows.

    p(canvas) = mixture over (text, offset) of prod_i [(1 - e) 1{x_i = text_i} + e / V]: a proper joint distribution.
    """

    block_size, trained_causally = 0, False

    def __init__(self, tokenizer: Tokenizer, texts: list[str], window: int = 48, noise: float = 1e-3) -> None:
        self.tokenizer = tokenizer
        self.info: dict = {}
        self.config = SimpleNamespace(
            vocab_size=tokenizer.vocab_size, mask_id=tokenizer.vocab_size, sequence_length=window
        )
        self.device = torch.device("cpu")
        self.noise = noise
        self.rows = [[tokenizer.bos_id, *tokenizer.encode(text)] for text in texts]
        self.widest = 0

    @cache  # noqa: B019
    def _table(self, length: int) -> torch.Tensor:
        # Offset 0 is where a canvas with BOS looks; a canvas from the middle of a text matches another offset.
        rows = [(r + [-1] * length)[o : o + length] for r in self.rows for o in range(max(1, len(r) - length + 1))]
        return torch.tensor(rows)

    def logits(self, ids, *, block_size=0, positions=None):
        self.widest = max(self.widest, ids.shape[1])
        v, table, out = self.config.vocab_size, self._table(ids.shape[1]), []
        for row, asked in zip(ids, positions, strict=True):
            shown = row != self.config.mask_id
            agree = torch.where(table[:, shown] == row[shown], 1 - self.noise, self.noise / v)
            agree = torch.where(table[:, shown] < 0, 1 / v, agree)
            weight = agree.double().log().sum(1).softmax(0)
            for i in asked.nonzero()[:, 0].tolist():
                p = torch.full((v,), self.noise / v, dtype=torch.float64)
                known = table[:, i] >= 0
                p.index_add_(0, table[known, i], weight[known])
                p += weight[~known].sum() / v
                out.append(p.log())
        return torch.stack(out)


class Same:
    """A model that says the same of every position, whatever the canvas shows."""

    block_size, trained_causally = 0, False

    def __init__(self, tokenizer: Tokenizer, logits: torch.Tensor, window: int = 32) -> None:
        self.tokenizer, self.row = tokenizer, logits
        self.info: dict = {}
        self.config = SimpleNamespace(
            vocab_size=tokenizer.vocab_size, mask_id=tokenizer.vocab_size, sequence_length=window
        )
        self.device = torch.device("cpu")

    def logits(self, ids, *, block_size=0, positions=None):
        out = self.row.expand(*ids.shape, len(self.row))
        return out if positions is None else out[positions]


TEXT = """London is the capital of England. Paris is the capital of France. The old man opened the door and said that
he would not go to London again, because the weather was bad and the people were worse. Whether he went to Paris
instead nobody knows; the captain of the ship said nothing about it. Ships came and went, the weather stayed, and the
old man grew older and happier by the day. English and French people drank tea and coffee. "Good morning!" she said.
"""


@cache
def own_tokenizer() -> Tokenizer:
    """As `prepare` trains it: byte fallback, no normalisation, a dummy space at the start."""
    return train_tokenizer([TEXT] * 3, 420)


@cache
def challenge_tokenizer() -> Tokenizer:
    """As the challenge's: NFKC, extra spaces removed, no dummy space, no bytes."""
    return sentencepiece_tokenizer([TEXT] * 3, 150, add_dummy_prefix=False, **PADDED)


TOKENIZERS = [own_tokenizer, challenge_tokenizer]


@cache
def random_model(make=own_tokenizer, window: int = 32) -> Model:
    """A real network with arbitrary weights: it says nonsense, which is the hardest for whoever puts text together."""
    tokenizer = make()
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size, sequence_length=window, layers=1, width=16, heads=2, kv_heads=2, mlp_ratio=2.0
    )
    return Model(config, tokenizer, eighths(Denoiser(config)))


def chi_square(counts: Counter, expected: dict, n: int) -> float:
    return sum((counts[x] - n * p) ** 2 / (n * p) for x, p in expected.items())


# 99.9% quantile of chi-square with 26 degrees of freedom.
LIMIT = 54.05
ALL3 = torch.ones(3, dtype=torch.bool)


def counted(model: JointModel, n: int = 3000, **options) -> Counter:
    canvas = torch.full((n, 3), 3)
    result = denoise(model, canvas, allowed=ALL3, seed=7, **options)
    return Counter(map(tuple, result.ids.tolist()))


# --- what is drawn ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        dict(sampler="ancestral"),
        dict(sampler="ancestral", steps=3),
        dict(sampler="blocks", block=1),
        dict(sampler="margin"),
        dict(sampler="entropy", entropy_budget=0.0),
    ],
    ids=lambda o: "-".join(map(str, o.values())),
)
def test_one_token_a_pass_draws_from_the_joint(options):
    model = JointModel()
    expected = {x: float(model.joint[x]) for x in itertools.product(range(3), repeat=3)}
    assert chi_square(counted(model, **options), expected, 3000) < LIMIT


def test_ancestral_in_two_passes_draws_what_enumeration_says():
    model = JointModel()
    expected = dict.fromkeys(itertools.product(range(3), repeat=3), 0.0)
    for first in itertools.product((True, False), repeat=3):
        for x in expected:
            p = 0.5**3
            seen = tuple(t if f else 3 for t, f in zip(x, first, strict=True))
            for i in range(3):
                p *= model.marginal((3, 3, 3) if first[i] else seen, i)[x[i]]
            expected[x] += p
    assert sum(expected.values()) == pytest.approx(1)
    counts = counted(model, sampler="ancestral", steps=2)
    assert chi_square(counts, expected, 3000) < LIMIT
    # The test can fail: two passes do not draw from the joint itself.
    joint = {x: float(model.joint[x]) for x in expected}
    assert chi_square(counts, joint, 3000) > LIMIT


def test_temperature_and_top_p():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]], dtype=torch.float64).log().expand(20_000, 4)
    uniform = torch.rand(20_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def shares(**options):
        return (torch.bincount(sample_tokens(logits, uniform, **options), minlength=4) / 20_000).tolist()

    assert shares(temperature=1.0, top_p=1.0) == pytest.approx([0.5, 0.3, 0.15, 0.05], abs=0.012)
    squares = np.array([0.5, 0.3, 0.15, 0.05]) ** 2
    assert shares(temperature=0.5, top_p=1.0) == pytest.approx(squares / squares.sum(), abs=0.012)
    assert shares(temperature=1.0, top_p=0.7) == pytest.approx([0.625, 0.375, 0, 0], abs=0.012)
    assert shares(temperature=1.0, top_p=0.4) == [1, 0, 0, 0]
    assert shares(temperature=0.0, top_p=1.0) == [1, 0, 0, 0]
    # The ends of the unit interval never fall on a token of probability zero.
    edge = torch.tensor([[-torch.inf, 0.0, -torch.inf]], dtype=torch.float64).expand(2, 3)
    assert sample_tokens(edge, torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64), 1.0, 1.0).tolist() == [1, 1]


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("steps", [None, 1, 5, 100])
def test_fixed_ids_stay_and_passes_are_bounded(sampler, steps):
    model = random_model()
    v, mask = model.config.vocab_size, model.config.mask_id
    canvas = torch.randint(4, v, (3, 24), generator=torch.Generator().manual_seed(1))
    masked = torch.rand(3, 24, generator=torch.Generator().manual_seed(2)) < 0.6
    canvas[masked] = mask
    before = canvas.clone()
    seen = []
    result = denoise(
        model, canvas, sampler=sampler, steps=steps, seed=3, on_step=lambda i, ids, sure: seen.append((i, ids, sure))
    )
    assert torch.equal(canvas, before)
    assert torch.equal(result.ids[~masked], before[~masked])
    assert (result.ids != mask).all()
    assert (result.confidence[~masked] == 1).all() and (result.confidence[masked] < 1).all()
    assert [i for i, _, _ in seen] == list(range(1, result.forward_passes + 1))
    assert torch.equal(seen[-1][1], result.ids)
    if steps is not None:
        assert result.forward_passes <= steps
    elif sampler != "entropy":
        assert result.forward_passes == masked.sum(1).max()
    drawn = -result.confidence.double().log().sum(1)
    assert torch.allclose(result.nats, drawn, rtol=1e-5)


def test_decided_positions_skip_the_output_layer():
    model = JointModel(length=6)
    denoise(model, torch.full((2, 6), 3), allowed=ALL3, sampler="ancestral")
    assert [int(asked.sum()) for asked in model.asked] == [2] * 6
    model.asked.clear()
    denoise(model, torch.full((1, 6), 3), allowed=ALL3, sampler="confidence")
    assert [int(asked.sum()) for asked in model.asked] == [6, 5, 4, 3, 2, 1]
    model.asked.clear()
    denoise(model, torch.full((1, 6), 3), allowed=ALL3, sampler="blocks", block=2)
    assert [asked.nonzero()[:, 1].tolist()[:1] for asked in model.asked][::2] == [[0], [2], [4]]
    assert max(int(asked.sum()) for asked in model.asked) == 2


def test_entropy_budget_reveals_what_it_may():
    """Positions with known, independent distributions: the bound can be worked out by hand."""

    class Independent(JointModel):
        def __init__(self) -> None:
            super().__init__(vocab=2, length=5)
            self.p = torch.tensor([0.5, 0.999, 0.9, 0.99, 0.7], dtype=torch.float64)

        def logits(self, ids, *, block_size=0, positions=None):
            self.asked.append(positions)
            return torch.stack([self.p, 1 - self.p], 1).log().expand(len(ids), 5, 2)[positions]

    model = Independent()
    h = {p: -(p * np.log(p) + (1 - p) * np.log(1 - p)) for p in model.p.tolist()}
    # Ascending: .999 (.008), .99 (.056), .9 (.325), .7 (.611), .5 (.693). All but the last one revealed must fit.
    budget = h[0.999] + h[0.99] + 1e-6
    denoise(
        model, torch.full((1, 5), 2), sampler="entropy", entropy_budget=budget, allowed=torch.ones(2, dtype=torch.bool)
    )
    assert [asked[0].nonzero()[:, 0].tolist() for asked in model.asked] == [[0, 1, 2, 3, 4], [0, 4], [0]]
    assert h[0.7] > budget


def test_a_row_does_not_depend_on_its_batch_and_seeds_reproduce():
    model = random_model()
    canvas = torch.full((6, 20), model.config.mask_id)
    for sampler in SAMPLERS:
        whole = denoise(model, canvas, sampler=sampler, steps=8, seed=5)
        for b in (0, 3, 5):
            alone = denoise(model, canvas[b : b + 1], sampler=sampler, steps=8, seed=5, first_row=b)
            assert torch.equal(alone.ids[0], whole.ids[b])
        assert torch.equal(whole.ids, denoise(model, canvas, sampler=sampler, steps=8, seed=5).ids)
        assert not torch.equal(whole.ids, denoise(model, canvas, sampler=sampler, steps=8, seed=6).ids)
    assert sample(model, 4, 12, seed=9).texts[:2] == sample(model, 2, 12, seed=9).texts


class Uncached:
    """`Cache` by the ordinary forward of everything that was seen: nothing kept but ids."""

    def __init__(self, network: Denoiser, rows: int, length: int) -> None:
        self.network, self.kept, self.ids = network, [0] * rows, torch.zeros(rows, length, dtype=torch.int64)

    @torch.inference_mode()
    def hidden(self, ids, size, keep, rows=None):
        rows = list(range(len(self.kept))) if rows is None else rows
        at = self.kept[rows[0]]
        self.ids[rows, at : at + ids.shape[1]] = ids
        for r in rows:
            self.kept[r] += keep
        return self.network.hidden(self.ids[rows, : at + ids.shape[1]], size)[:, at:]


def block_model(size: int, shifted: bool = False, **options) -> Model:
    """A network of arbitrary weights with every part that looks at neighbours, said to be trained in blocks."""
    tokenizer = own_tokenizer()
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size, sequence_length=32, layers=2, width=16, heads=2, kv_heads=1, mlp_ratio=2.0,
        neighbour_reach=1, bigram_buckets=9, bigram_width=4, value_embedding_width=4, unet_skips=True,
        shifted_output=shifted,
    )  # fmt: skip
    return Model(config, tokenizer, eighths(Denoiser(config)), {"train": {"block_size": size, **options}})


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize(("size", "options"), [(1, {}), (4, {}), (5, {"steps": 12}), (6, {"block": 2}), (31, {})])
def test_kept_keys_and_values_change_no_token(size, options, shifted, monkeypatch):
    """Prompts, rows that end early, given tokens between: the same tokens, and logits, as by whole canvases."""
    model = block_model(size, shifted)
    canvas = torch.full((5, 30), model.config.mask_id)
    canvas[:, :3] = torch.tensor([model.tokenizer.bos_id, 20, 21])
    canvas[2, 3:14], canvas[3, 20] = 22, 23
    allowed = model.tokenizer.is_text.clone()
    allowed[[model.tokenizer.bos_id]] = True
    words = {"sampler": "blocks", "seed": 4, "allowed": allowed, "stop_id": model.tokenizer.bos_id, **options}
    answers: list[list[torch.Tensor]] = [[], []]
    results = []
    for n, kind in enumerate((denoising.Cache, Uncached)):
        monkeypatch.setattr(denoising, "Cache", kind)
        original = Canvas.commit

        def noted(self, positions, logits, n=n, original=original):
            answers[n].append(logits.clone())
            original(self, positions, logits)

        monkeypatch.setattr(Canvas, "commit", noted)
        results.append(denoise(model, canvas, **words))
        monkeypatch.setattr(Canvas, "commit", original)
    kept, plain = results
    assert torch.equal(kept.ids, plain.ids) and kept.forward_passes == plain.forward_passes
    assert len(answers[0]) == len(answers[1]) > 5
    for a, b in zip(*answers, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)  # float64 but for the last step
    if size > 1:  # and the same as without any notion of keeping, which the other samplers' way goes
        monkeypatch.setattr(denoising, "Cache", None)
        row_by_row = denoising._Network(model, 5, 30, size, keep=False)
        monkeypatch.setattr(denoising, "_Network", lambda *_: row_by_row)
        assert torch.equal(denoise(model, canvas, **words).ids, kept.ids)


def test_blocks_of_a_whole_window_are_whole_windows():
    """Training in blocks no shorter than the window is training on whole windows, so it is read as one."""
    model = block_model(32, shifted=True)
    canvas = torch.full((2, 30), model.config.mask_id)
    whole = denoise(model, canvas, sampler="blocks", seed=1, attention="full")
    assert torch.equal(denoise(model, canvas, sampler="blocks", seed=1).ids, whole.ids)
    assert torch.equal(denoise(model, canvas, sampler="blocks", seed=1, attention="block(32)").ids, whole.ids)


def test_blocks_do_not_depend_on_the_batch(monkeypatch):
    for size in (1, 4):
        model = block_model(size)
        canvas = torch.full((5, 24), model.config.mask_id)
        whole = denoise(model, canvas, sampler="blocks", seed=1)
        monkeypatch.setattr(denoising, "TOKENS_PER_FORWARD", 48)  # two rows at a time
        assert torch.equal(denoise(model, canvas, sampler="blocks", seed=1).ids, whole.ids)
        watched = denoise(model, canvas, sampler="blocks", seed=1, on_step=lambda *_: None)
        assert torch.equal(watched.ids, whole.ids) and watched.forward_passes == whole.forward_passes
        monkeypatch.undo()
        alone = denoise(model, canvas[3:4], sampler="blocks", seed=1, first_row=3)
        assert torch.equal(alone.ids[0], whole.ids[3])


def test_next_tokens_are_drawn_as_they_are_scored():
    """A model of next tokens, greedily: each token is the best one by `causal`'s own arithmetic."""
    for info in ({"block_size": 1}, {"causal_share": 1.0}):
        model = block_model(**{"size": 0, **{k: v for k, v in info.items() if k != "block_size"}})
        model.info["train"].update(info)
        canvas = torch.full((2, 20), model.config.mask_id)
        canvas[1, 0] = 30
        ids = denoise(model, canvas, sampler="blocks", temperature=0.0).ids
        shifted = torch.nn.functional.pad(ids[:, :-1], (1, 0), value=model.config.mask_id)
        logits = model.logits(shifted, block_size=1).masked_fill(~model.tokenizer.is_text, -torch.inf)
        assert torch.equal(logits.argmax(-1)[:, 1:], ids[:, 1:])


def test_texts_are_drawn_by_next_tokens_where_they_were_learnt_and_nothing_else_was_asked():
    model = dataclasses.replace(random_model(), info={})
    plain = sample(model, 2, 20, temperature=0.8).tokens
    assert plain == sample(model, 2, 20, temperature=0.8, sampler="confidence").tokens
    model.info["train"] = {"causal_share": 0.5}
    following = sample(model, 2, 20, temperature=0.8)
    assert following.forward_passes == 20 and following.tokens != plain
    assert (
        following.tokens == sample(model, 2, 20, temperature=0.8, sampler="blocks", block=1, attention="causal").tokens
    )
    assert plain == sample(model, 2, 20, temperature=0.8, sampler="confidence").tokens
    assert sample(model, 2, 20, steps=4).forward_passes == 4
    assert sample(model, 2, 20).tokens == sample(model, 2, 20, temperature=0.9).tokens


def test_blocks_see_nothing_to_the_right_and_other_samplers_do():
    model = block_model(4)
    canvas = torch.full((1, 16), model.config.mask_id)
    other = canvas.clone()
    other[0, 12:] = 40
    same = {"temperature": 0.0, "sampler": "blocks"}
    assert torch.equal(denoise(model, canvas, **same).ids[0, :12], denoise(model, other, **same).ids[0, :12])
    full = {**same, "attention": "full"}
    assert not torch.equal(denoise(model, canvas, **full).ids[0, :12], denoise(model, other, **full).ids[0, :12])
    asked, plain = (sample(model, 2, 50, **more).tokens for more in ({"sampler": "blocks"}, {}))
    assert asked == plain != sample(model, 2, 50, sampler="confidence").tokens


@pytest.mark.parametrize("steps", [None, 3])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_nothing_is_said_twice_under_no_repeat(sampler, steps):
    model = random_model()
    with torch.no_grad():
        model.network.embedding.weight[10] += 3  # one token is a favourite
    try:
        result = denoise(
            model,
            torch.full((2, 30), model.config.mask_id),
            sampler=sampler,
            temperature=0.5,
            no_repeat=2,
            steps=steps,
            seed=1,
        )
    finally:
        with torch.no_grad():
            model.network.embedding.weight[10] -= 3
    for row in result.ids.tolist():
        pairs = list(itertools.pairwise(row))
        assert len(pairs) == len(set(pairs))


def test_bad_settings_are_refused_in_one_line():
    for bad in (
        dict(sampler="best"),
        dict(steps=0),
        dict(temperature=-1.0),
        dict(temperature=float("nan")),
        dict(top_p=0.0),
        dict(entropy_budget=-1.0),
        dict(top_p=1.1),
        dict(block=0),
        dict(no_repeat=1),
        dict(remask=2.0),
    ):
        with pytest.raises(ConfigError) as error:
            SamplingConfig(**bad)
        assert "\n" not in str(error.value)
    with pytest.raises(ConfigError):
        sample(random_model(), 0)
    with pytest.raises(ConfigError):
        sample(random_model(), 1, 0)


def test_every_sampler_has_a_row_and_a_name():
    assert tuple(samplers.SAMPLERS) == SAMPLERS


def test_a_sampler_is_a_row_and_a_function(monkeypatch):
    """Right to left, as a user would add it."""

    def from_the_right(canvas, drawn):
        return drawn.positions.nonzero()[:, 1].double()

    row = samplers.Sampler(samplers.all_masked, from_the_right, samplers.even_share)
    monkeypatch.setitem(samplers.SAMPLERS, "backwards", row)
    monkeypatch.setitem(vars(OPTIONS["sampler"]), "choices", (*SAMPLERS, "backwards"))  # what a name in SAMPLERS does
    model = JointModel(length=4)
    denoise(model, torch.full((2, 4), 3), allowed=ALL3, sampler="backwards")
    assert [asked[0].nonzero()[:, 0].tolist() for asked in model.asked] == [[0, 1, 2, 3], [0, 1, 2], [0, 1], [0]]


def test_hidden_again_only_in_rows_that_are_not_done():
    model = random_model()
    canvas = torch.full((2, 24), model.config.mask_id)
    canvas[0, 6:] = 20  # done long before the other row
    both = denoise(model, canvas, sampler="remask", remask=0.5, steps=20, seed=1)
    alone = denoise(model, canvas[:1], sampler="remask", remask=0.5, steps=20, seed=1)
    assert torch.equal(both.ids[0], alone.ids[0])
    assert (both.ids != model.config.mask_id).all()


# --- texts from nothing -----------------------------------------------------------------------------------------------


def test_control_ids_are_not_drawn_and_an_end_of_text_cuts():
    tokenizer = own_tokenizer()
    able = tokenizer.is_text
    assert not able[list(tokenizer.control_ids)].any() and able.sum() == len(able) - len(tokenizer.control_ids)
    text, bos = "London is the capital of England.", tokenizer.bos_id
    model = Recall(tokenizer, [text])
    ids = tokenizer.encode(text)
    model.rows = [[bos, *ids, bos, *ids]]
    drawn = sample(model, 2, 40, seed=0, temperature=0.5)
    assert drawn.texts == [text, text] and drawn.ended == [True, True]
    assert drawn.tokens == [ids, ids]


def test_length_beyond_the_window_is_drawn_window_after_window():
    tokenizer = own_tokenizer()
    model = Recall(tokenizer, [TEXT], window=24)
    n = len(tokenizer.encode(TEXT))
    assert n > 60
    seen = []
    drawn = sample(model, 1, 60, temperature=0.3, on_step=lambda i, ids, sure: seen.append(ids.shape))
    assert drawn.tokens[0] == tokenizer.encode(TEXT)[:60]
    assert model.widest == 24
    assert set(seen) == {(1, 61)} and len(seen) == drawn.forward_passes == 60


def test_a_prompt_comes_back_as_it_was_given():
    for make in TOKENIZERS:
        model = Recall(make(), [TEXT])
        drawn = sample(model, 1, 8, prompt="London is the ", temperature=0.2)
        assert drawn.texts[0].startswith("London is the capital")
        assert sample(model, 1, 8, prompt="London is the", temperature=0.2).texts[0].startswith("London is the capital")
    # A prompt as long as the window is gone on from by half a window.
    short = Recall(own_tokenizer(), [TEXT], window=24)
    assert len(sample(short, 1, prompt=" ".join(TEXT.split()[:30]), temperature=0.2).tokens[0]) == 12
    odd = "London  is\u00a0the \t"
    assert sample(model, 1, 8, prompt=odd, temperature=0.2).texts[0].startswith(odd + "capital")


def test_invalid_utf8_is_found_and_never_left():
    table = own_tokenizer()
    byte = {table.raw[i]: i for i in range(len(table.raw)) if table.is_byte[i]}
    e_acute = [byte[b"\xc3"], byte[b"\xa9"]]
    assert table.invalid_utf8(e_acute) == []
    assert table.invalid_utf8([*e_acute, byte[b"\xa9"], 300]) == [2]
    assert table.invalid_utf8([byte[b"\xc3"], 300, *e_acute, byte[b"\xe2"]]) == [0, 4]
    # Half of all draws are a byte that continues nothing, so a row of 30 without any is beyond 1e-9.
    logits = torch.zeros(table.vocab_size)
    logits[byte[b"\xa9"]] = float(np.log(table.vocab_size - 1))
    model = Same(table, logits)
    raw = denoise(model, torch.full((8, 30), model.config.mask_id), seed=2)
    assert all(table.invalid_utf8(row) for row in raw.ids.tolist())
    drawn = sample(model, 8, 30, seed=2)
    filled = infill(model, "a [MASK*12] b ____ c", seed=1)
    assert not any("\ufffd" in text for text in drawn.texts)
    assert "\ufffd" not in filled.text


# --- text with gaps ---------------------------------------------------------------------------------------------------


def test_grammar_of_gaps():
    assert parse_gaps("a ____ b") == (["a ", " b"], [None])
    assert parse_gaps("________") == (["", ""], [None])
    assert parse_gaps("___ __ _") == (["___ __ _"], [])
    assert parse_gaps("[MASK][MASK*8]x[mask] [MASK*] [MASK *2]") == (["", "", "x[mask] [MASK*] [MASK *2]"], [1, 8])
    assert parse_gaps("[MASK*007]") == (["", ""], [7])
    assert parse_gaps("[MASK*" + "9" * 9999 + "]")[1] == [999_999_999_999]
    with pytest.raises(MezzotintError, match="no masks"):
        parse_gaps("[MASK*0]")


@pytest.mark.parametrize("make", TOKENIZERS)
@pytest.mark.parametrize(
    "text, expected",
    [
        ("London is the ____ of England.", "capital"),
        ("____ is the capital of England.", "London"),
        ("Lon____ is the capital of England.", "don"),
        ("London is the cap____ of England.", "ital"),
        ("London is the ____tal of England.", "capi"),
        ("London is the c____l of England.", "apita"),
        ("London is the capital of____.", " England"),
        ("London is the capital____ England.", " of"),
        ("London is the____of England.", " capital "),
        ("London is ____ England.", "the capital of"),
    ],
)
def test_gaps_of_unknown_length_and_broken_words(make, text, expected):
    model = Recall(make(), ["London is the capital of England.", "Paris is the capital of France."])
    filled = infill(model, text, temperature=0.0)
    assert [gap.text for gap in filled.gaps] == [expected]
    assert filled.text == text.replace("____", expected)
    assert filled.gaps[0].nats < 1


@pytest.mark.parametrize("make", TOKENIZERS)
def test_exact_gaps_hold_exactly_their_masks(make):
    tokenizer = make()
    model = Recall(tokenizer, ["London is the capital of England.", "Paris is the capital of France."])
    ids = tokenizer.encode("London is the capital")
    left = len(ids) - len(tokenizer.encode("London is the"))
    filled = infill(model, f"London is the [MASK*{left}] of England.", temperature=0.0)
    assert filled.text == "London is the capital of England."
    assert filled.gaps[0].tokens == left == len(filled.gaps[0].confidence)
    assert filled.forward_passes == left + 1  # the last one weighs what was filled


@pytest.mark.parametrize("make", TOKENIZERS)
def test_several_gaps_at_once_in_text_longer_than_the_window(make):
    tokenizer = make()
    text = " ".join(TEXT.split())
    model = Recall(tokenizer, [text], window=24)
    assert len(tokenizer.encode(text)) > 3 * 24
    gaps = text.replace("capital of Fr", "____ of Fr").replace("older and happier", "____ and happ____")
    tea = len(tokenizer.encode("drank tea")) - len(tokenizer.encode("drank"))
    gaps = gaps.replace("drank tea", f"drank [MASK*{tea}]")
    assert gaps.count("____") == 3 and "[MASK" in gaps
    seen = []
    filled = infill(model, gaps, temperature=0.0, on_step=lambda i, spans: seen.append((i, spans)))
    assert filled.text == text
    assert model.widest == 24
    # What is watched is the text itself, and ends as the text that is returned.
    assert "".join(span.text for span in seen[-1][1]) == text
    for _, spans in seen:
        assert "".join(s.text for s in spans if s.confidence is None) == "".join(parse_gaps(gaps)[0])
    assert any(span.confidence == 0 for span in seen[0][1])


ODD = st.text(
    st.one_of(
        st.characters(exclude_categories=["Cs"]),
        st.sampled_from(list(" \t\n\r\x00\x0b\x1f\x7f\u00a0\u2581\u200b\ufeff\u0301é_[]*MASK\U0001f600ﬁⅣ")),
    ),
    max_size=24,
)


@pytest.mark.parametrize("make", TOKENIZERS)
@settings(max_examples=60, deadline=None)
@given(
    pieces_of_text=st.lists(ODD, min_size=2, max_size=4),
    gap=st.lists(st.sampled_from(["____", "______", "[MASK]", "[MASK*3]"]), min_size=3, max_size=3),
    form=st.sampled_from(["NFC", "NFD", None]),
    seed=st.integers(-3, 2**70),
)
def test_fixed_text_comes_back_byte_for_byte(make, pieces_of_text, gap, form, seed):
    fixed = [unicodedata.normalize(form, t) if form else t for t in pieces_of_text]
    text = "".join(itertools.chain(*zip(fixed, gap, strict=False))) if len(fixed) <= 3 else gap[0].join(fixed)
    fixed, counts = parse_gaps(text)
    filled = infill(random_model(make), text, seed, lengths=(1, 3), candidates=4)
    output = filled.text
    assert re.fullmatch("(.*)".join(map(re.escape, fixed)), output, re.DOTALL)
    # No gap of unknown length is filled with nothing.
    assert all(gap.text for gap, count in zip(filled.gaps, counts, strict=True) if count is None)
    assert output.encode().startswith(fixed[0].encode()) and output.encode().endswith(fixed[-1].encode())
    if not counts:
        assert output == fixed[0]


def test_text_without_gaps_is_returned_without_asking_the_network():
    filled = infill(random_model(), "nothing \u0000 to  do\n___ here ")
    assert filled.text == "nothing \u0000 to  do\n___ here " and filled.forward_passes == 0 and filled.gaps == []
    assert fill(random_model(), "") == ""


def test_what_cannot_be_filled_is_refused_in_one_line():
    model = random_model()
    for text, words in (
        ("a \ud800 ____", "surrogate"),
        ("[MASK*32]", "a gap of 32 tokens.*window holds 31: ask for fewer"),
        ("[MASK*99999999999999999999]", "window holds 31"),
        ("[MASK*100000000000000000000]", "a gap of at least 999,999,999,999 tokens.*window holds 31: ask for fewer"),
        (f"[MASK*{'9' * 5000}]", "a gap of at least 999,999,999,999 tokens"),
        ("[MASK*999999999998]", "a gap of 999,999,999,998 tokens"),
    ):
        with pytest.raises(MezzotintError, match=words) as error:
            fill(model, text)
        assert "\n" not in str(error.value)
    # As many as fit do get filled.
    assert fill(model, "[MASK*31]")
    assert "____" not in fill(model, "____ " * 31, lengths=(1,))
    assert "[MASK" not in fill(model, "a [MASK*30] ____ [MASK*20]", temperature=1.0)
    with pytest.raises(ConfigError):
        fill(model, "____", sampler="none")
    with pytest.raises(ConfigError):
        fill(model, "____", lengths=())


@pytest.mark.parametrize("make", TOKENIZERS)
@pytest.mark.parametrize("text", ["He went. ____The end", "____The end", "a ____b", "Lon____land"])
def test_a_gap_of_unknown_length_is_never_filled_with_nothing(make, text):
    for seed in range(4):
        filled = infill(random_model(make), text, seed, lengths=(1,), temperature=0.0 if seed == 0 else 1.0)
        before, after = text.split("____")
        assert filled.gaps[0].text.strip() and filled.text == before + filled.gaps[0].text + after


def test_a_character_of_several_bytes_is_seen_whole():
    tokenizer = own_tokenizer()
    table = tokenizer
    euro = tokenizer.encode("\u20ac")[-3:]
    assert [table.raw[i] for i in euro] == [b"\xe2", b"\x82", b"\xac"]
    mask = tokenizer.vocab_size
    spans = canvas_spans(tokenizer, [tokenizer.bos_id, *euro, mask, *euro[:2]], [1.0, 0.5, 0.5, 1.0, 0.0, 0.5, 0.25])
    assert spans[:2] == [Span("\u20ac", 0.25), Span("", 0.0)]
    assert [s.confidence for s in spans[2:]] == [0.5, 0.25]  # not yet a character
    # Such a character may be the last one of a gap that a space follows.
    text = "London is the cap\u20ac of England."
    model = Recall(tokenizer, [text])
    seen = []
    filled = infill(
        model, text.replace("\u20ac", "[MASK*3]"), temperature=0.0, on_step=lambda _, spans: seen.append(spans)
    )
    assert filled.text == text and "".join(span.text for span in seen[-1]) == text


def test_stopping_from_the_watcher():
    class Stop(Exception):
        pass

    def stop(*_):
        raise Stop

    with pytest.raises(Stop):
        sample(random_model(), 1, 10, on_step=stop)
    with pytest.raises(Stop):
        fill(random_model(), "a ____ b", on_step=stop)
