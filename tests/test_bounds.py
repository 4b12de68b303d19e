"""Tighter figures by enumeration: strides, K orders, orders with a lean, and what is no bound."""

import itertools
import math

import numpy as np
import pytest
import torch
from toy import TableModel, ToyTokenizer, ToyWindows, UniformModel, enumerated_nelbo, order_nll, toy_windows

from mezzotint.data.dataset import TokenStream
from mezzotint.errors import DataError
from mezzotint.objective import lean_mask
from mezzotint.packing.pack import calibration_windows
from mezzotint.scoring.compare import compare
from mezzotint.scoring.journal import Journal
from mezzotint.scoring.kinds import kind_of
from mezzotint.scoring.likelihood import causal, chain_rule, lower_bound, nelbo, nelbo_by_window, reconstruction_score
from mezzotint.scoring.rates import mask_rate_curve
from mezzotint.seeding import generator

V, T = 3, 3
ORDERS = list(itertools.permutations(range(T)))
TEXTS = list(itertools.product(range(V), repeat=T))


def law(order, lean, length=T):
    """Chance of an order by Plackett and Luce, by its definition."""
    if math.isinf(lean):
        return float(order == tuple(range(length)))
    weights = [math.exp(-lean * i / length) for i in range(length)]
    left, chance = set(order), 1.0
    for i in order:
        chance *= weights[i] / sum(weights[j] for j in left)
        left.remove(i)
    return chance


class TestLean:
    @pytest.mark.parametrize("lean", [0.0, 1.0, 4.0, math.inf])
    def test_mean_over_counts_and_masks_is_the_mean_over_the_law(self, lean):
        """What a mask is worth, averaged over every count and order by its chance, is the leaning mean of chains."""
        model = TableModel(V, T)
        for x in TEXTS[:9]:
            want = sum(law(o, lean) * order_nll(model, x, o) for o in ORDERS)
            mixture = sum(law(o, lean) * math.exp(-order_nll(model, x, o)) for o in ORDERS)
            assert want >= -math.log(mixture) - 1e-12
            if lean == 0:
                assert want == pytest.approx(enumerated_nelbo(model, x), abs=1e-9)
            if math.isinf(lean):
                assert want == pytest.approx(order_nll(model, x, (0, 1, 2)), abs=1e-12)
            windows = ToyWindows(np.array([*x, 1]), T, model.tokenizer)
            last = enumerated_nelbo(model, (1,))
            found = nelbo(model, windows, repeats=600, order_lean=lean or 1e-9)
            nats, error = found.nats_per_token * 4, found.stderr_bpb * found.bytes * math.log(2)
            assert abs(nats - want - last) < 4.5 * error + 1e-6
            assert found.kind == "upper bound"

    def test_masks_have_the_laws_chances(self):
        counts: dict = {}
        n = 4000
        for seed in range(n):
            masked, chance = lean_mask(T, 2, 2.0, generator(seed))
            key = tuple(masked.tolist())
            counts[key] = counts.get(key, 0) + 1
            w = torch.exp(-2.0 * torch.arange(3) / 3) * masked
            assert torch.allclose(chance, (w / w.sum()).double(), atol=1e-6)
        for key, count in counts.items():
            want = sum(law(o, 2.0) for o in ORDERS if not key[o[0]])
            assert abs(count / n - want) < 4.5 * math.sqrt(want * (1 - want) / n)

    def test_out_of_range(self):
        model = TableModel(V, T)
        for lean in (-1.0, math.nan):
            with pytest.raises(DataError, match="lean"):
                nelbo(model, toy_windows(model, 9), order_lean=lean)


class TestOrders:
    def test_bounds_fall_to_the_mixture(self):
        """E[-log mean of K] by enumeration over all K-tuples of orders; the estimate has that mean."""
        model = TableModel(V, T, scale=2.5)
        x = (1, 2, 1)
        p = np.array([math.exp(-order_nll(model, x, o)) for o in ORDERS])
        exact = [float(np.mean([-math.log(np.mean(c)) for c in itertools.product(p, repeat=k)])) for k in (1, 2, 3, 4)]
        assert exact[0] == pytest.approx(enumerated_nelbo(model, x), abs=1e-9)
        assert exact == sorted(exact, reverse=True) and exact[-1] > -math.log(p.mean())
        windows = ToyWindows(np.array(x), T, model.tokenizer)
        for k, want in zip((1, 2, 3), exact, strict=False):
            found = nelbo(model, windows, orders=k, repeats=500)
            error = found.stderr_bpb * found.bytes * math.log(2)
            assert abs(found.nats_per_token * T - want) < 4.5 * error
            assert found.forward_passes == 500 * k * T and found.kind == "upper bound"

    @pytest.mark.parametrize("more", [{"orders": 2, "repeats": 6}, {"order_lean": 3.0, "repeats": 8}])
    def test_intervals_hold_the_enumerated_value_over_200_seeds(self, more):
        model = TableModel(V, T, seed=2)
        windows, want = toy_windows(model, 6 * T, seed=2), 0.0
        for i in range(len(windows)):
            nats = np.array([order_nll(model, tuple(windows[i].tolist()), o) for o in ORDERS])
            if "orders" in more:
                want += float(np.mean([-math.log(np.mean(c)) for c in itertools.product(np.exp(-nats), repeat=2)]))
            else:
                want += float(np.array([law(o, 3.0) for o in ORDERS]) @ nats)
        covered = 0
        for seed in range(200):
            found = nelbo(model, windows, seed=seed, **more)
            low, high = found.interval()
            covered += low <= want / found.bytes / math.log(2) <= high
        assert 178 <= covered <= 198

    def test_leaning_to_the_end_is_the_chain(self):
        model = TableModel(V, T)
        windows = toy_windows(model, 12)
        assert nelbo(model, windows, orders=2, order_lean=math.inf).bpb == pytest.approx(
            chain_rule(model, windows).bpb, rel=1e-12
        )

    @pytest.mark.parametrize("slack", [0.0, 0.5, 1.0, 3.0])
    def test_the_tangent_bounds_from_below_by_enumeration(self, slack):
        """Its mean over all pairs of sets of orders is below -log p of the mixture, text by text; the estimate has that mean."""
        model = TableModel(V, T, scale=2.5)
        for x in TEXTS[::3]:
            p = np.array([math.exp(-order_nll(model, x, o)) for o in ORDERS])
            truth = -math.log(p.mean())
            exact = []
            for k in (1, 2, 3):
                means = np.array([np.mean(c) for c in itertools.product(p, repeat=k)])
                q = means * math.exp(slack)
                exact.append(float(np.mean(-np.log(q)[:, None] + 1 - means[None, :] / q[:, None])))
                assert exact[-1] <= truth + 1e-12
            if slack <= 1:
                assert exact == sorted(exact)  # closer with more orders, unless the slack is the larger loss
        x = (1, 2, 1)
        p = np.array([math.exp(-order_nll(model, x, o)) for o in ORDERS])
        q = np.array([np.mean(c) for c in itertools.product(p, repeat=2)]) * math.exp(slack)
        want = float(np.mean(-np.log(q) + 1 - p.mean() / q))
        windows = ToyWindows(np.array(x), T, model.tokenizer)
        found = lower_bound(model, windows, orders=2, slack=slack, repeats=400)
        error = found.stderr_bpb * found.bytes * math.log(2)
        assert abs(found.nats_per_token * T - want) < 4.5 * error
        assert (found.kind, found.method) == ("lower bound", "lower orders(2)")
        assert found.forward_passes == 400 * 4 * T

    def test_bounds_bracket_the_leaning_mixture(self):
        model = TableModel(V, T, seed=3, scale=2.0)
        windows = toy_windows(model, 18)
        truth = 0.0
        for i in range(len(windows)):
            x = tuple(int(t) for t in windows[i])
            truth -= math.log(sum(law(o, 2.0) * math.exp(-order_nll(model, x, o)) for o in ORDERS))
        low = lower_bound(model, windows, orders=8, repeats=40, order_lean=2.0)
        high = nelbo(model, windows, orders=8, repeats=40, order_lean=2.0)
        scale = low.bytes * math.log(2)
        assert low.bpb * scale - 4 * low.stderr_bpb * scale < truth < high.bpb * scale + 4 * high.stderr_bpb * scale
        assert low.bpb < high.bpb < low.bpb + 0.8 * len(windows) / scale  # the slack of 1 nat costs 0.37 a window
        windows.lost = 1
        assert lower_bound(model, windows).kind == "not a code length"

    def test_bounds_of_no_probability_stay_numbers(self):
        """A model that rules the text out: infinite from above and below, and no NaN on the way."""

        class Certain(UniformModel):
            def logits(self, ids, *, block_size=0, positions=None):
                out = super().logits(ids, block_size=block_size, positions=positions)
                out[..., 1] = -math.inf
                return out

        model = Certain(V, T)
        windows = ToyWindows(np.array([1, 2, 1]), T, model.tokenizer)
        for found in (
            nelbo(model, windows, orders=2),
            nelbo(model, windows),
            nelbo(model, windows, order_lean=2.0),
            chain_rule(model, windows),
            causal(model, windows),
        ):
            assert found.bpb == found.stderr_bpb == math.inf and found.interval() == (-math.inf, math.inf)
        low = lower_bound(model, windows, orders=2)
        assert 1e5 < low.bpb < math.inf and not math.isnan(low.stderr_bpb)
        with pytest.raises(DataError, match="no probability"):
            compare(model, UniformModel(V, T), windows)

    def test_what_is_no_number_is_no_figure(self):
        class Damaged(UniformModel):
            def logits(self, ids, *, block_size=0, positions=None):
                return super().logits(ids, block_size=block_size, positions=positions) * math.nan

        model = Damaged(V, T)
        windows = toy_windows(model, 12)
        for score in (nelbo, chain_rule, causal, reconstruction_score, lower_bound):
            with pytest.raises(DataError, match="not numbers"):
                score(model, windows)

    def test_a_lower_bound_needs_the_posterior(self):
        """The mean of -log p(x | order) over p(order | x) is below -log p, over the law itself above: no mean over orders
        drawn without the posterior is a lower bound."""
        model = TableModel(V, T, scale=2.5)
        for x in TEXTS:
            nll = np.array([order_nll(model, x, o) for o in ORDERS])
            p = np.exp(-nll)
            truth = -math.log(p.mean())
            assert float((p / p.sum()) @ nll) <= truth + 1e-12 <= nll.mean() + 2e-12

    def test_errors(self):
        model = TableModel(V, T)
        for more in ({"orders": 0}, {"orders": 2, "repeats": 1}, {"orders": 2, "block_size": 2}):
            with pytest.raises(DataError):
                nelbo(model, toy_windows(model, 9), **more)
        for more in ({"orders": 0}, {"repeats": 1}, {"slack": -1.0}, {"slack": math.nan}, {"order_lean": -1.0}):
            with pytest.raises(DataError):
                lower_bound(model, toy_windows(model, 9), **more)


class TestStride:
    @pytest.mark.parametrize("stride", [1, 2, 3])
    def test_chain_and_causal_by_hand_and_normalised(self, stride):
        model = TableModel(2, T, seed=4)
        totals = {chain_rule: 0.0, causal: 0.0}
        for x in itertools.product(range(2), repeat=5):
            windows = ToyWindows(np.array(x), T, model.tokenizer, stride)
            assert [t for i in range(len(windows)) for t in windows[i][windows.context(i) :]] == [*x]
            for score, nats in ((chain_rule, 0.0), (causal, 0.0)):
                for i in range(len(windows)):
                    ids = windows[i].tolist()
                    for j in range(windows.context(i), len(ids)):
                        canvas = [*ids[:j], *[2] * (len(ids) - j)] if score is chain_rule else [2, *ids[:-1]]
                        logits = model.logits(torch.tensor([canvas]), block_size=int(score is causal))[0, j]
                        nats -= float(logits.log_softmax(0)[ids[j]])
                totals[score] += math.exp(-nats)
                if sum(x):
                    found = score(model, windows)
                    assert found.nats_per_token * 5 == pytest.approx(nats, abs=1e-9) and found.kind == "exact"
        assert list(totals.values()) == pytest.approx([1, 1], abs=1e-9)

    def test_nelbo_given_the_text_before(self):
        model = TableModel(V, T, seed=1)
        x = (1, 2, 0, 2, 1)
        windows = ToyWindows(np.array(x), T, model.tokenizer, 2)
        want = enumerated_nelbo(model, x[:3])
        ids = (0, 2, 1)
        for k in (1, 2):
            for masked in itertools.combinations((1, 2), k):
                canvas = torch.tensor([[V if i in masked else t for i, t in enumerate(ids)]])
                rows = model.logits(canvas)[0].log_softmax(1)
                want -= sum(float(rows[i, ids[i]]) for i in masked) * 2 / k / math.comb(2, k) / 2
        found = nelbo(model, windows, repeats=2000)
        assert abs(found.nats_per_token * 5 - want) < 4.5 * found.stderr_bpb * found.bytes * math.log(2)
        assert (found.tokens, found.kind, found.method) == (5, "upper bound", "nelbo")
        model.info = {"train": {"block_size": 2}}
        assert nelbo(model, windows, repeats=2).method == "nelbo"
        for call in (
            lambda: nelbo(model, windows, block_size=2),
            lambda: chain_rule(model, windows, attention="block(2)"),
            lambda: reconstruction_score(model, windows),
        ):
            with pytest.raises(DataError, match="stride"):
                call()


class TestKinds:
    def test_a_token_of_two_parts_as_a_single_event_is_no_bound(self):
        """Parts are masked at a rate t, uniform on 0..1, each by itself, and the joint log-probability of a token's masked
        parts is weighted by 1 / t like a single event's. A code length L has sum of exp(-L) <= 1 over all texts (Kraft);
        this figure has not, so it bounds nothing from above, while the NELBO of the parts has."""
        model = UniformModel(2, 2)
        invalid = nelbo_sum = 0.0
        for x in itertools.product(range(2), repeat=2):
            bound = enumerated_nelbo(model, x)
            # One event of a rate t: E[t * joint / t]. Both parts masked at once have chance t^2, one alone counts not.
            both = order_nll(model, x, (0, 1))
            invalid += math.exp(-both * np.mean([t * t / t for t in (np.arange(1000) + 0.5) / 1000]))
            nelbo_sum += math.exp(-bound)
        assert both * 0.5 == pytest.approx(math.log(2))  # two independent fair bits as one bit
        assert invalid == pytest.approx(2.0) and nelbo_sum == pytest.approx(1.0)
        assert kind_of("pseudo") == kind_of("reconstruction") == "not a bound"
        bound = nelbo(model, ToyWindows(np.array([1, 1]), 2, ToyTokenizer(2)))
        assert bound.nats_per_token * 2 == pytest.approx(2 * math.log(2)) and bound.kind == "upper bound"

    def test_lost_bytes_are_no_code_length(self):
        model = TableModel(V, T)
        windows = toy_windows(model, 12)
        windows.lost = 2
        for score in (nelbo, chain_rule, causal):
            found = score(model, windows)
            assert (found.kind, found.bytes_lost) == ("not a code length", 8)
            assert found.to_dict()["bytes_lost"] == 8
        assert reconstruction_score(model, windows).kind == "not a bound"
        with pytest.raises(ValueError, match="proven"):
            kind_of("best")

    def test_another_tokenizers_windows_are_refused_by_all(self):
        model = TableModel(V, T)
        windows = toy_windows(model, 12)
        windows.tokenizer = ToyTokenizer(V)
        windows.tokenizer.sha256 = "other"
        for score in (nelbo, chain_rule, causal, reconstruction_score, lower_bound, mask_rate_curve, nelbo_by_window):
            with pytest.raises(DataError, match="another tokenizer"):
                score(model, windows)
        with pytest.raises(DataError, match="another tokenizer"):
            compare(model, model, windows)

        class Stream(TokenStream):
            def __init__(self):
                self.tokenizer = windows.tokenizer

            def __len__(self):
                return 100

        with pytest.raises(DataError, match="another tokenizer"):
            calibration_windows(model, Stream(), 10)


@pytest.mark.parametrize("score", [nelbo, chain_rule])
def test_a_journal_keeps_what_was_done_when_interrupted_at_once(score, tmp_path):
    model = TableModel(4, 3)
    windows = toy_windows(model, 100)
    whole = score(model, windows)

    def stop(told):
        if told.done >= told.total // 2:
            raise KeyboardInterrupt

    assert Journal.interval == 30.0
    with pytest.raises(KeyboardInterrupt):
        score(model, windows, journal=tmp_path / "j", progress=stop, batch=4)
    model.rows = 0
    assert score(model, windows, journal=tmp_path / "j").bpb == whole.bpb
    assert 0 < model.rows < 0.6 * whole.forward_passes
