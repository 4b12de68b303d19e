"""Filling gaps: candidates ranked by exact code lengths, constraints, escapes, and work bounded by the input."""

from __future__ import annotations

import itertools
import math
import re

import pytest
import torch
from test_sample import TEXT, Recall, Same, block_model, challenge_tokenizer, own_tokenizer, random_model
from toy import TableModel, eighths

from mezzotint.config import ModelConfig
from mezzotint.data.tokenizer import train_tokenizer
from mezzotint.errors import ConfigError, MezzotintError
from mezzotint.network.model import Denoiser, Model, Surroundings
from mezzotint.sampling import candidates, healing, ranking
from mezzotint.sampling.constraints import Constraint
from mezzotint.sampling.draft import Draft, parse_gaps, shows
from mezzotint.sampling.healing import heal
from mezzotint.sampling.infill import infill


class Counted(Recall):
    """Counts what goes through the network, and answers at once."""

    def __init__(self, *args, **options) -> None:
        super().__init__(*args, **options)
        self.rows_seen = self.tokens_seen = self.most = 0

    def logits(self, ids, *, block_size=0, positions=None):
        self.rows_seen += ids.shape[0]
        self.tokens_seen += ids.numel()
        self.most = max(self.most, ids.numel())
        return torch.zeros(int(positions.sum()), self.config.vocab_size)


def test_code_lengths_by_the_chain_are_exact():
    """Against the chain rule position by position, and they sum to one over all continuations."""
    model = type("Masked", (TableModel,), {"trained_causally": False})(vocab_size=3, length=4)
    texts = [([0, 1], list(b)) for b in itertools.product(range(3), repeat=2)]
    nats, _ = ranking.code_lengths(model, texts)
    assert sum(math.exp(-x) for x in nats) == pytest.approx(1)
    for (a, b), found in zip(texts, nats, strict=True):
        expected = 0.0
        for j in range(2):
            known = [*a, *b[:j]]
            row = model.logits(torch.tensor([known + [3] * (4 - len(known))]))[0, len(known)]
            expected -= float(row.log_softmax(-1)[b[j]])
        assert found == pytest.approx(expected)


def test_code_lengths_by_next_tokens_are_exact(monkeypatch):
    """Against whole windows, one row at a time; contexts that differ early, late and not at all."""
    monkeypatch.setattr(ranking, "ROWS_AT_ONCE", 2)
    model = block_model(1)
    for texts in (
        [([1, 20, 21], [22]), ([1, 20, 21], [30, 31, 32]), ([1, 20, 23], [30, 31, 32])],
        [([1, 20], [22, 5]), ([5, 20, 21, 40], [30, 31, 32])],
        [([], [22, 5]), ([5], [30])],
    ):
        nats, _ = ranking.code_lengths(model, texts)
        for (a, b), found in zip(texts, nats, strict=True):
            shifted = torch.tensor([[model.config.mask_id, *a, *b]])[:, :-1]
            log_p = model.logits(shifted, block_size=1)[0].double().log_softmax(-1)
            expected = -sum(float(log_p[len(a) + j, t]) for j, t in enumerate(b))
            assert found == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("make", [own_tokenizer, challenge_tokenizer])
def test_alternatives_are_ranked_and_share_one(make):
    model = Recall(make(), ["London is the capital of England.", "Paris is the capital of France."])
    filled = infill(model, "London is the ____ of England.", n=6)
    (gap,) = filled.gaps
    assert filled.text == "London is the capital of England."
    assert gap.text == gap.alternatives[0].text == "capital" and len(gap.alternatives) == 6
    assert [a.bits for a in gap.alternatives] == sorted(a.bits for a in gap.alternatives)
    assert len({a.text for a in gap.alternatives}) == 6
    assert gap.alternatives[0].probability > 0.9 and sum(a.probability for a in gap.alternatives) <= 1 + 1e-9
    assert set(filled.to_dict()["gaps"][0]["alternatives"][0]) == {"text", "bits", "probability"}


def test_gaps_beside_each_other_are_chosen_together():
    """Each first word fits; only with the second gap's text is one of them right."""
    texts = ["The old man saw a red ship."] * 2 + ["The old cat saw a red ship.", "The old cat saw a blue tree."] * 3
    model = Recall(own_tokenizer(), texts)
    filled = infill(model, "The old ____ saw a ____ tree.", n=3)
    assert filled.text == "The old cat saw a blue tree."
    model = Recall(own_tokenizer(), [TEXT.replace("\n", " ")], window=48)
    text = (
        "The old man opened the ____ and said that he would ____ go to London again, because the weather was ____ and"
    )
    filled = infill(model, text)
    assert [g.text for g in filled.gaps] == ["door", "not", "bad"]


def test_constraints_hold():
    table = own_tokenizer()
    model = Same(table, torch.tensor([4.0 * (raw[:1] == b" " and raw[1:].isalpha()) for raw in table.raw]))
    text = "Lon____ and a ____ of it____"
    filled = infill(model, text, whole_words=True, max_words=2, lengths=(1, 2, 3))
    before, after = parse_gaps(text)[0][:-1], parse_gaps(text)[0][1:]
    for gap, left, right in zip(filled.gaps, before, after, strict=True):
        assert 1 <= len(re.findall(r"\w+", gap.text)) <= 2
        assert not (left[-1:].isalnum() and gap.text[0].isalnum()) and not (
            right[:1].isalnum() and gap.text[-1].isalnum()
        )
    known = Recall(own_tokenizer(), ["London is the capital of England.", "Paris is the capital of France."])
    assert infill(known, "London is the ____ of England.").gaps[0].text == "capital"
    assert infill(known, "London is the ____ of England.", avoid="Capital").gaps[0].text != "capital"
    filled = infill(known, "London is the ____ of England.", regex="c[a-z ]+")
    assert filled.gaps[0].text == "capital"
    filled = infill(known, "London is the ____ of England.", regex="[aeo]{3}", n=4)
    assert all(re.fullmatch("[aeo]{3}", a.text) for a in filled.gaps[0].alternatives)
    for bad, words in (
        (dict(regex="("), "regular expression"),
        (dict(max_words=0), "max_words"),
        (dict(avoid=["two words"]), "single words"),
        (dict(n=0), "n must be"),
        (dict(candidates=-1), "candidates must be"),
    ):
        with pytest.raises(ConfigError, match=words) as error:
            infill(model, "a ____ b", **bad)
        assert "\n" not in str(error.value)
    with pytest.raises(MezzotintError, match="loosen"):
        infill(model, "a ____ b", regex="[\u4e00-\u9fff]{40}")


def test_constraints_tell_beginnings_from_texts():
    avoid = Constraint.of(avoid=["man"])
    assert not avoid.allows("a man", "", "", complete=True) and not avoid.allows("man of", "", "", complete=False)
    assert avoid.allows("a man", "", "", complete=False)  # it may become "a manor"
    digits = Constraint.of(regex=r"\d{4}")
    assert digits.allows("18", "", "", complete=False) and not digits.allows("18", "", "", complete=True)
    assert not digits.allows("1a", "", "", complete=False) and digits.allows("1815", "", "", complete=True)
    whole = Constraint.of(whole_words=True)
    assert not whole.allows("don", "Lon", " is", complete=False) and not whole.allows("a", " ", "b", complete=True)


def test_constraints_look_at_what_stands_beside_the_gap():
    avoid = Constraint.of(avoid=["London", "well-known"])
    assert not avoid.allows("don", "He saw Lon", " again", complete=True)
    assert avoid.allows("don", "Lon", "", complete=False)  # it may become "Londoner"
    assert avoid.allows("doner", "Lon", " again", complete=True)
    assert not avoid.allows("well", "a ", "-known man", complete=True)
    assert avoid.allows("man", "London ", " London", complete=True)  # what was given stays
    whole = Constraint.of(whole_words=True)
    assert not whole.allows("-like", "hap", " to", complete=True) and not whole.allows(
        "well-", "", "known", complete=True
    )
    assert whole.allows("five", "twenty-", " men", complete=True) and whole.allows(" and", "hap", " to", complete=True)
    known = Recall(own_tokenizer(), ["London is the capital of England.", "Paris is the capital of France."])
    text = "Lon____ is the capital of England."
    assert infill(known, text).text.startswith("London is")
    assert "London" not in re.findall(r"\w+", infill(known, text, avoid="london").text)


@pytest.mark.parametrize("tries", [1, 256])
def test_a_regular_expression_is_met_by_tokens_that_are_not_likely(monkeypatch, tries):
    """A space and digits are tokens of their own here, and five of them are no length that is tried else."""
    tokenizer = train_tokenizer(["They met in the year 1863 or 1790, when the 25 men were 40."] * 3, 300)
    assert len(tokenizer.encode("1863")) == 5 and tokenizer.text_of(tokenizer.encode("1863")[:1]) == " "
    likely = [4.0 * raw[1:].isalpha() for raw in tokenizer.raw]
    monkeypatch.setattr(candidates, "TRIES", tries)
    for text, pattern in (("the year ____ when", r"1[89]\d\d"), ("____ men", r"\d\d"), ("year____.", r" \d{4}")):
        filled = infill(Same(tokenizer, torch.tensor(likely)), text, regex=pattern)
        assert re.fullmatch(pattern, filled.gaps[0].text) and filled.text == text.replace("____", filled.gaps[0].text)


@pytest.mark.parametrize("make", [own_tokenizer, challenge_tokenizer])
@pytest.mark.parametrize("lengths", [(1,), (2,), (1, 2, 3)])
def test_blanks_alone_fill_no_gap_of_unknown_length(make, lengths):
    """Also where they are all that the model would say: white space, or a control character and a space."""
    tokenizer = make()
    blank = [not shows(raw.decode(errors="replace")) for raw in tokenizer.raw]
    model = Same(tokenizer, torch.tensor([30.0 * b for b in blank]))
    for text in ("a____b", "a ____ b", "____", "a.\n____\nb", "a____ b"):
        for options in ({}, {"temperature": 1.0}, {"temperature": 0.0}):
            filled = infill(model, text, lengths=lengths, **options)
            assert shows(filled.gaps[0].text), (text, filled.gaps[0].text)
    assert infill(model, "a[MASK]b").text  # a length that was asked for may be a space


def test_what_shows():
    assert all(map(shows, ["a", " a", "\u0301", "\u6771", "."])) and not any(
        map(shows, ["", " ", "\x1f ", "\n", "\xa0", "\u200b"])
    )


def test_escaped_gaps_are_text():
    assert parse_gaps(r"a \____ b") == (["a ____ b"], [])
    assert parse_gaps(r"\[MASK*3]\[MASK] ____") == (["[MASK*3][MASK] ", ""], [None])
    assert parse_gaps("\\\\____\\x") == (["\\", "\\x"], [None])
    assert parse_gaps("\\\\\\____") == (["\\____"], [])
    assert infill(random_model(), r"a \____ b").text == "a ____ b"


@pytest.mark.parametrize("make", [own_tokenizer, challenge_tokenizer])
@pytest.mark.parametrize("word", ["a" * 1000, "qz" * 2000, "\u6771\u4eac\u90fd" * 300])
def test_healing_looks_at_the_last_few_tokens_only(make, word, monkeypatch):
    monkeypatch.setattr(healing, "TOKENS_PER_FORWARD", 512)
    for text in (f"x {word}____ b", f"a ____{word} b"):
        seen = []
        for size in (len(word), 50):
            model = Counted(make(), ["x"], window=48)
            draft = Draft(model, text.replace(word, word[:size]))
            heal(model, draft, 0)
            seen.append(model.tokens_seen)
            assert model.most <= 512
        assert seen[0] <= 1.5 * seen[1] + 100


def test_work_is_linear_in_the_gaps():
    """Twice the gaps in twice the text: about twice the rows and tokens, and the text looked at is as near."""
    counted = []
    for gaps in (10, 20, 40):
        model = Counted(own_tokenizer(), ["x"], window=48)
        told = []
        text = "The old ____ opened the door and said that he would not go to London again. " * gaps
        filled = infill(
            model, text, candidates=8, lengths=(1, 2), progress=lambda at, told=told: told.append((at.done, at.total))
        )
        assert "____" not in filled.text and told == [(i + 1, gaps) for i in range(gaps)]
        counted.append((model.rows_seen, model.tokens_seen))
    for small, large in itertools.pairwise(counted):
        assert 1.8 < large[0] / small[0] < 2.2 and 1.8 < large[1] / small[1] < 2.2


def test_proposals_differ_and_a_beam_finds_the_likeliest():
    """Width as large as the vocabulary: the best fill of two tokens by the chain rule, by enumeration."""
    model = random_model()
    draft = Draft(model, "a [MASK*2] b")
    search = candidates.Search(model, draft, 0, "full", Constraint(), None)
    found = candidates.beam(search, [2], draft.tokenizer.vocab_size, 0)
    texts = [tuple(c.ids) for c in found]
    assert len(set(texts)) == len(texts)
    scores = [sum(map(math.log, c.confidence)) for c in found]
    assert scores == sorted(scores, reverse=True)
    # The first token's probability does not depend on the second, so the chain rule over all pairs is two passes.
    canvas, at = search.canvas([[draft.mask_id] * 2])
    where = torch.zeros(canvas.shape, dtype=torch.bool)
    where[:, at] = True
    first, _ = healing.log_probabilities(model, canvas, where)
    best = {}
    for token in first[0].topk(60).indices.tolist():
        rows, _ = search.canvas([[token, draft.mask_id]])
        where = torch.zeros(rows.shape, dtype=torch.bool)
        where[:, at + 1] = True
        second, _ = healing.log_probabilities(model, rows, where)
        able = draft.tokenizer.is_text & ~draft.tokenizer.is_byte
        best[token] = float(first[0, token] + second[0].masked_fill(~able, -torch.inf).max())
    for ids, score in zip(texts[:5], scores[:5], strict=True):
        if ids[0] in best:
            assert score <= best[ids[0]] + 1e-6


def mixing_network(**more) -> Denoiser:
    """A network whose inputs look at their neighbours in every way there is."""
    config = ModelConfig(
        vocab_size=50, sequence_length=64, layers=3, width=32, heads=4, kv_heads=2, mlp_ratio=2.0, neighbour_reach=2,
        bigram_buckets=64, bigram_width=8, unet_skips=True, embedding_mix=True, value_embedding_width=8,
        value_embedding_layers=2, **more,
    )  # fmt: skip
    return eighths(Denoiser(config)).eval()


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("stretch", [(10, 20), (0, 7), (30, 40), (0, 40)])
def test_what_surrounds_a_stretch_is_read_once(shifted, stretch):
    """Rows that do not differ in it come back as the whole network has them, and all where it is the whole canvas."""
    network = mixing_network(shifted_output=shifted)
    ids = torch.arange(120).view(3, 40) * 7 % 51
    with torch.inference_mode():
        kept, whole = Surroundings(network, ids, *stretch), network.hidden(ids)
        assert torch.allclose(kept.given, whole[:, slice(*stretch)], atol=1e-9)
        rows = torch.tensor([2, 0, 0, 1])
        assert torch.allclose(kept.hidden(ids[rows], rows), whole[rows, slice(*stretch)], atol=1e-9)
        others = ids[rows]
        others[:, slice(*stretch)] = (others[:, slice(*stretch)] * 5 + rows[:, None] + 3) % 51
        near, exact = kept.hidden(others, rows), network.hidden(others)[:, slice(*stretch)]
        assert torch.allclose(near, exact, atol=1e-9) == (stretch == (0, 40))


def test_what_is_far_behind_is_not_weighed_to_the_end(monkeypatch):
    """The end of all texts costs the same here, so two rounds tell of all what one round does, for less work."""
    tokenizer = own_tokenizer()
    model = Same(tokenizer, torch.linspace(0, 8, tokenizer.vocab_size), window=32)
    middles = [[t] for t in range(0, tokenizer.vocab_size, 7)] + [[5, t] for t in range(0, tokenizer.vocab_size, 9)]
    texts = [([1, 2], [*middle, 8, 9, 10, 11, 12]) for middle in middles]
    once, _ = ranking.code_lengths(model, texts)
    monkeypatch.setattr(ranking, "MARGIN", 0.5)
    asked: list[int] = []
    plain = ranking.code_lengths
    monkeypatch.setattr(ranking, "code_lengths", lambda m, t: asked.append(sum(len(b) for _, b in t)) or plain(m, t))
    for count in (1, 3, len(texts)):
        asked.clear()
        twice, _ = ranking.least_code_lengths(model, texts, 4, count)
        ahead = sorted(range(len(texts)), key=once.__getitem__)[:count]
        assert [twice[n] for n in ahead] == pytest.approx([once[n] for n in ahead])
        assert min(range(len(texts)), key=twice.__getitem__) == ahead[0]
        assert all(given >= max(twice[n] for n in ahead) or given == pytest.approx(exact)
                   for given, exact in zip(twice, once, strict=True))  # fmt: skip
        assert (sum(asked) < 0.6 * sum(len(b) for _, b in texts)) == (count < len(texts))


def test_a_gap_costs_a_few_thousand_tokens(monkeypatch):
    """Rows times tokens that go through the network for one gap, beside those with all of the text read for each row."""
    tokenizer = own_tokenizer()
    config = ModelConfig(vocab_size=tokenizer.vocab_size, sequence_length=128, layers=1, width=16, heads=2, kv_heads=2)
    info = {"train": {"causal_share": 0.5}}
    model = Model(config, tokenizer, Denoiser(config).eval(), info)
    counted: list[int] = []
    layers = Denoiser._layers
    monkeypatch.setattr(
        Denoiser, "_layers", lambda net, x, *more: counted.append(x.shape[0] * x.shape[1]) or layers(net, x, *more)
    )
    text = TEXT[: len(TEXT) // 2] + "____" + TEXT[len(TEXT) // 2 :]
    infill(model, text)
    near = sum(counted)
    counted.clear()
    monkeypatch.setattr("mezzotint.sampling.infill.NEAR", None)
    infill(model, text)
    assert near < 8000 and near < 0.6 * sum(counted)
