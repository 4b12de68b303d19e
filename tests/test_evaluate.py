"""Scores against exhaustive enumeration on toy models, and against figures that can be had by hand."""

import itertools
import math

import numpy as np
import pytest
import torch
from toy import (
    TableModel,
    ToyWindows,
    UniformModel,
    enumerated_nelbo,
    enumerated_orders,
    order_nll,
    split_nelbo,
    toy_windows,
)

from mezzotint.errors import DataError
from mezzotint.evaluate import (
    causal,
    chain_rule,
    choose_windows,
    nelbo,
    reconstruction_score,
    student_t_quantile,
    student_t_tail,
)
from mezzotint.objective import masked_nll, nelbo_per_window

V, T = 3, 3


def texts():
    return list(itertools.product(range(V), repeat=T))


class TestAnchor:
    """The identity that everything rests on: NELBO = mean over orders of an exact code length."""

    def test_enumerated_nelbo_is_the_mean_over_orders(self):
        model = TableModel(V, T)
        for x in texts():
            assert enumerated_nelbo(model, x) == pytest.approx(enumerated_orders(model, x), abs=1e-9)

    def test_every_order_is_a_normalised_distribution(self):
        model = TableModel(V, T)
        for order in itertools.permutations(range(T)):
            assert sum(math.exp(-order_nll(model, x, order)) for x in texts()) == pytest.approx(1, abs=1e-9)

    def test_nelbo_is_above_the_mixture_of_orders(self):
        model = TableModel(V, T)
        orders = list(itertools.permutations(range(T)))
        for x in texts():
            mixture = sum(math.exp(-order_nll(model, x, order)) for order in orders) / len(orders)
            assert enumerated_nelbo(model, x) >= -math.log(mixture) - 1e-12

    def test_the_estimators_mean_over_all_masks(self):
        """The formula that trains and evaluates, averaged over every k and every set, is the enumerated NELBO."""
        model = TableModel(V, T)
        for x in texts():
            ids = torch.tensor([x])
            mean = 0.0
            for k in range(1, T + 1):
                sets = list(itertools.combinations(range(T), k))
                for hidden in sets:
                    masked = torch.zeros_like(ids, dtype=torch.bool)
                    masked[0, list(hidden)] = True
                    logits = model.logits(ids.masked_fill(masked, V), positions=masked)
                    value = nelbo_per_window(masked_nll(logits, ids, masked), torch.tensor([k]))
                    mean += value.item() / len(sets) / T
            assert mean == pytest.approx(enumerated_orders(model, x), abs=1e-9)

    def test_chain_rule_is_the_left_to_right_order(self):
        model = TableModel(V, T)
        total = 0.0
        for x in texts():
            if sum(x) == 0:
                continue  # only BOS: no bytes to divide by
            estimate = chain_rule(model, ToyWindows(np.array(x), T, model.tokenizer))
            assert estimate.nats_per_token * T == pytest.approx(order_nll(model, x, (0, 1, 2)), abs=1e-9)
            total += math.exp(-estimate.nats_per_token * T)
        assert total + math.exp(-order_nll(model, (0, 0, 0), (0, 1, 2))) == pytest.approx(1, abs=1e-9)

    def test_causal_is_a_normalised_distribution(self):
        model = TableModel(V, T)
        total = 0.0
        for x in texts():
            shifted = torch.tensor([[V, *x[:-1]]])
            logits = model.logits(shifted, visibility="causal")
            nll = float(torch.nn.functional.cross_entropy(logits[0], torch.tensor(x), reduction="sum"))
            total += math.exp(-nll)
            if sum(x):
                estimate = causal(model, ToyWindows(np.array(x), T, model.tokenizer))
                assert estimate.nats_per_token * T == pytest.approx(nll, abs=1e-9)
        assert total == pytest.approx(1, abs=1e-9)


class TestUniform:
    """A model that knows nothing has figures that can be written down."""

    def test_everything_costs_log_v(self):
        model = UniformModel(1024, 16)
        windows = toy_windows(model, 16 * 20 + 5)
        for score in (nelbo, chain_rule, causal):
            estimate = score(model, windows)
            assert estimate.nats_per_token == pytest.approx(math.log(1024), rel=1e-12)
            assert estimate.stderr_bpb == pytest.approx(0, abs=1e-12)
            assert estimate.tokens == 325
            assert estimate.bpb == pytest.approx(10 * 325 / estimate.bytes, rel=1e-12)

    def test_reconstruction_multiplies(self):
        model = UniformModel(1024, 64)
        estimate = reconstruction_score(model, toy_windows(model, 64 * 50))
        factor = sum(1 / t for t in (0.1, 0.3, 0.5, 0.7, 0.9)) / 5
        assert factor == pytest.approx(3.5746, abs=1e-4)
        assert estimate.nats_per_token == pytest.approx(factor * math.log(1024), rel=1e-9)
        assert estimate.kind == "not a bound"

    def test_reconstruction_charges_the_next_tokens_bytes(self):
        model = UniformModel(8, 4)
        windows = ToyWindows(np.array([1, 2, 3, 4, 5, 6, 7]), 4, model.tokenizer)
        estimate = reconstruction_score(model, windows)
        assert estimate.bytes == int(model.tokenizer.byte_counts(np.array([2, 3, 4, 5, 6, 7])).sum())
        assert estimate.tokens == 7


class TestNelbo:
    def test_unbiased_with_a_short_last_window(self):
        model = TableModel(4, 3, seed=1)
        windows = toy_windows(model, 3 * 5 + 2, seed=1)
        nats, size = split_nelbo(model, windows)
        exact = nats / size / math.log(2)
        estimates = [nelbo(model, windows, repeats=16, seed=s) for s in range(150)]
        mean = np.mean([e.bpb for e in estimates])
        error = np.std([e.bpb for e in estimates], ddof=1) / math.sqrt(len(estimates))
        assert abs(mean - exact) < 3.5 * error
        assert error < 0.01 * exact  # tight enough to see a bias of some percent

    def test_interval_covers_the_enumerated_value(self):
        model = TableModel(3, 3, seed=2)
        windows = toy_windows(model, 3 * 6, seed=2)
        nats, size = split_nelbo(model, windows)
        exact = nats / size / math.log(2)
        covered = 0
        for seed in range(200):
            low, high = nelbo(model, windows, repeats=8, seed=seed).interval()
            covered += low <= exact <= high
        assert 180 <= covered <= 198

    def test_same_seed_same_figure_for_any_batch(self):
        model = TableModel(4, 3)
        windows = toy_windows(model, 32)
        first = nelbo(model, windows, seed=5)
        for batch in (1, 3, 1000):
            assert nelbo(model, windows, seed=5, batch=batch).bpb == pytest.approx(first.bpb, rel=1e-12)
        assert nelbo(model, windows, seed=6).bpb != first.bpb

    def test_forward_passes_are_counted_as_they_happen(self):
        model = TableModel(4, 3)
        windows = toy_windows(model, 32)
        seen = []
        for score in (nelbo, chain_rule, causal, reconstruction_score):
            seen.clear()
            model.rows = 0
            estimate = score(model, windows, progress=lambda done, total: seen.append((done, total)))
            assert estimate.forward_passes == model.rows
            assert seen[-1] == (model.rows, model.rows)
            assert [done for done, _ in seen] == sorted(done for done, _ in seen)

    def test_one_repeat_has_no_error_to_report(self):
        model = TableModel(4, 3)
        with pytest.raises(DataError, match="2 repeats"):
            nelbo(model, toy_windows(model, 32), repeats=1)


class TestWindows:
    def test_choice_is_even_and_the_same_for_all(self):
        model = TableModel(4, 3)
        windows = toy_windows(model, 300)
        chosen = choose_windows(windows, 30)
        assert len(chosen) == 10 and set(np.diff(chosen)) == {10}
        assert choose_windows(windows, 31) != chosen and len(choose_windows(windows, 31)) == 11
        assert choose_windows(windows, None) == list(range(100)) == choose_windows(windows, 10**9)
        assert chain_rule(model, windows, tokens=30, seed=1).bpb == chain_rule(model, windows, tokens=30, seed=2).bpb

    @pytest.mark.parametrize("tokens", [0, -5])
    def test_nothing_to_score(self, tokens):
        model = TableModel(4, 3)
        with pytest.raises(DataError):
            chain_rule(model, toy_windows(model, 30), tokens=tokens)
        with pytest.raises(DataError):
            nelbo(model, ToyWindows(np.array([], dtype=int), 3, model.tokenizer))
        with pytest.raises(DataError, match="bytes"):
            nelbo(model, ToyWindows(np.zeros(6, dtype=int), 3, model.tokenizer))

    def test_error_of_a_subset_covers_the_whole(self):
        """Scoring some windows of many: the interval covers the figure of all of them about as often as it says."""
        model = TableModel(4, 3, seed=3)
        exact = {x: enumerated_nelbo(model, x) for x in itertools.product(range(4), repeat=3)}
        covered = {chain_rule: 0, nelbo: 0}
        trials = 100
        for seed in range(trials):
            windows = toy_windows(model, 240, seed=seed)
            whole_chain = chain_rule(model, windows)
            assert whole_chain.stderr_bpb == 0
            nats = sum(exact[tuple(int(t) for t in windows[i])] for i in range(80))
            whole = {chain_rule: whole_chain.bpb, nelbo: nats / whole_chain.bytes / math.log(2)}
            for score in covered:
                estimate = score(model, windows, tokens=60, seed=seed)
                assert estimate.window_stderr_bpb > 0 and estimate.tokens == 60
                low, high = estimate.interval()
                covered[score] += low <= whole[score] <= high
        for score, hits in covered.items():
            assert 0.87 * trials <= hits <= 0.995 * trials, score.__name__

    def test_to_dict_is_json(self):
        import json

        model = TableModel(4, 3)
        windows = toy_windows(model, 30)
        for estimate in (nelbo(model, windows, tokens=3), reconstruction_score(model, windows), causal(model, windows)):
            text = json.dumps(estimate.to_dict(), allow_nan=False)
            assert {"method", "kind", "bpb", "stderr_bpb", "nats_per_token"} <= set(json.loads(text))


class TestStudent:
    @pytest.mark.parametrize(
        ("degrees", "quantile"),
        [(1, 12.7062), (2, 4.3027), (7, 2.3646), (31, 2.0395), (1000, 1.9623), (math.inf, 1.96)],
    )
    def test_tabulated_quantiles(self, degrees, quantile):
        assert student_t_quantile(0.95, degrees) == pytest.approx(quantile, abs=1e-4)
        assert student_t_tail(quantile, degrees) == pytest.approx(0.05, abs=1e-5)

    def test_tails(self):
        assert student_t_tail(0, 5) == pytest.approx(1)
        assert student_t_tail(10, 10) == pytest.approx(1.5896e-6, rel=1e-3)
        assert student_t_tail(1e9, 3) < 1e-20
