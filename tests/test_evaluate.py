"""Scores against exhaustive enumeration on toy models, and against figures that can be had by hand."""

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import torchrun
from toy import (
    TableModel,
    ToyTokenizer,
    ToyWindows,
    UniformModel,
    block_nll,
    conditional_nll,
    eighths,
    enumerated_block_nelbo,
    enumerated_nelbo,
    enumerated_orders,
    order_nll,
    split_nelbo,
    toy_windows,
)

from mezzotint.config import ModelConfig, parse_attention
from mezzotint.errors import DataError
from mezzotint.network.model import Denoiser, Model
from mezzotint.objective import masked_nll, nelbo_per_window
from mezzotint.scoring.compare import compare, compare_documents
from mezzotint.scoring.journal import Journal
from mezzotint.scoring.likelihood import causal, chain_rule, lower_bound, nelbo, reconstruction_score
from mezzotint.scoring.nelbo import apply_control
from mezzotint.scoring.orders import reveal_order
from mezzotint.scoring.plan import choose_windows
from mezzotint.scoring.statistics import student_t_quantile, student_t_tail

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
            logits = model.logits(shifted, block_size=1)
            nll = float(torch.nn.functional.cross_entropy(logits[0], torch.tensor(x), reduction="sum"))
            total += math.exp(-nll)
            if sum(x):
                estimate = causal(model, ToyWindows(np.array(x), T, model.tokenizer))
                assert estimate.nats_per_token * T == pytest.approx(nll, abs=1e-9)
        assert total == pytest.approx(1, abs=1e-9)


class TestBlocks:
    """Block diffusion between the autoregressive code length and the NELBO of whole windows."""

    @pytest.mark.parametrize("length", [3, 4])
    def test_ends_of_the_enumeration(self, length):
        model = TableModel(2, length, seed=1)
        for x in itertools.product(range(2), repeat=length):
            left = sum(block_nll(model, x, {i}, i, 1) for i in range(length))
            assert enumerated_block_nelbo(model, x, 1) == pytest.approx(left, abs=1e-9)
            assert enumerated_block_nelbo(model, x, length) == pytest.approx(enumerated_nelbo(model, x), abs=1e-9)

    @pytest.mark.parametrize(("length", "size"), [(3, 1), (3, 2), (3, 3), (4, 2), (4, 3)])
    def test_the_estimators_mean_over_all_counts_and_sets(self, length, size):
        """The formula that trains and evaluates, over every count and set of every block, is the enumerated figure."""
        model = TableModel(2, length)
        blocks = [range(i, min(i + size, length)) for i in range(0, length, size)]
        choices = [[(len(b), n, s) for n in range(1, len(b) + 1) for s in itertools.combinations(b, n)] for b in blocks]
        for x in itertools.product(range(2), repeat=length):
            ids = torch.tensor([x])
            mean = 0.0
            for draw in itertools.product(*choices):
                masked = torch.zeros_like(ids, dtype=torch.bool)
                masked[0, [i for _, _, hidden in draw for i in hidden]] = True
                logits = model.block_logits(ids.masked_fill(masked, 2), ids, size, positions=masked)
                counts = torch.tensor([[float(n) for _, n, _ in draw]], dtype=torch.float64)
                chance = math.prod(1 / tokens / math.comb(tokens, n) for tokens, n, _ in draw)
                mean += chance * nelbo_per_window(masked_nll(logits, ids, masked), counts, size).item()
            assert mean == pytest.approx(enumerated_block_nelbo(model, x, size), abs=1e-9)

    @pytest.mark.parametrize("size", [1, 2, 3, 4])
    @pytest.mark.parametrize("order", ["left", "block"])
    def test_block_chains_are_normalised(self, size, order):
        """And below the bound, on average: the left order is one of those that the block NELBO averages over."""
        model = TableModel(2, 4, seed=2)
        order = f"block({size})" if order == "block" else order
        total = bound = 0.0
        for x in itertools.product(range(2), repeat=4):
            if sum(x) == 0:
                hidden, nats = set(range(4)), 0.0
                for group in reveal_order(order, 4):
                    nats += sum(block_nll(model, x, hidden, i, size) for i in group.tolist())
                    hidden -= set(group.tolist())
            else:
                windows = ToyWindows(np.array(x), 4, model.tokenizer)
                nats = 4 * chain_rule(model, windows, order=order, attention=f"block({size})").nats_per_token
            total += math.exp(-nats)
            bound += math.exp(-enumerated_block_nelbo(model, x, size))
        assert total == pytest.approx(1, abs=1e-9)
        assert bound <= 1 + 1e-9

    def test_estimate_is_unbiased_and_paired_with_the_seed(self):
        model = TableModel(3, 5, seed=1)
        windows = toy_windows(model, 5 * 6 + 3, seed=1)
        texts = [tuple(int(t) for t in windows[i]) for i in range(len(windows))]
        nats = sum(enumerated_block_nelbo(model, x, 2) for x in texts)
        exact = nats / sum(windows.byte_count(i) for i in range(len(windows))) / math.log(2)
        estimates = [nelbo(model, windows, repeats=12, seed=s, block_size=2) for s in range(60)]
        mean = np.mean([e.bpb for e in estimates])
        error = np.std([e.bpb for e in estimates], ddof=1) / math.sqrt(len(estimates))
        assert abs(mean - exact) < 3.5 * error and error < 0.01 * exact
        assert sum(low <= exact <= high for low, high in (e.interval() for e in estimates)) >= 50
        assert {e.kind for e in estimates} == {"upper bound"} and estimates[0].method == "nelbo block(2)"
        again = nelbo(model, windows, repeats=12, seed=0, block_size=2, batch=3)
        assert again.bpb == pytest.approx(estimates[0].bpb, rel=1e-12)
        whole = nelbo(model, windows, repeats=2)
        assert nelbo(model, windows, repeats=2, block_size=5).bpb == whole.bpb != estimates[0].bpb

    def test_block_size_is_what_the_model_was_trained_on(self, tmp_path):
        model = TableModel(3, 5)
        windows = toy_windows(model, 30)
        model.info = {"train": {"block_size": 2}}
        assert nelbo(model, windows).method == "nelbo block(2)"
        assert nelbo(model, windows, block_size=0).method == "nelbo"
        assert compare(model, model, windows).a.method == "nelbo block(2)"
        model.info = {"train": {"block_size": 1}}
        one, exact = nelbo(model, windows), causal(model, windows)
        assert one.bpb == exact.bpb and (one.kind, one.method) == ("exact", "nelbo block(1)")
        same = compare(model, model, windows)
        assert same.a.bpb == exact.bpb and same.a.kind == "exact" and same.difference_bpb == 0
        with pytest.raises(DataError, match="journal"):
            nelbo(model, windows, journal=tmp_path / "j")
        with pytest.raises(DataError, match="blocks"):
            nelbo(model, windows, block_size=-1)


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
            estimate = score(model, windows, progress=lambda told: seen.append((told.done, told.total)))
            assert estimate.forward_passes == model.rows
            assert seen[-1] == (model.rows, model.rows)
            assert [done for done, _ in seen] == sorted(done for done, _ in seen)

    def test_one_repeat_has_no_error_to_report(self):
        model = TableModel(4, 3)
        with pytest.raises(DataError, match="2 repeats"):
            nelbo(model, toy_windows(model, 32), repeats=1)

    def test_more_than_anyone_can_wait_for_is_refused(self):
        model = TableModel(4, 3)
        windows = toy_windows(model, 32)
        for options in ({"repeats": 10**20}, {"orders": 10**20}, {"orders": 10**5000}, {"orders": -(10**5000)}):
            with pytest.raises(DataError, match=r"(at most 1,000,000,000, not|at least 1 order, not)"):
                nelbo(model, windows, **options)
        with pytest.raises(DataError, match="repeats must be a positive whole number, at most 1,000,000,000"):
            compare(model, model, windows, repeats=10**20)
        with pytest.raises(DataError, match="orders must be a positive whole number, at most 1,000,000,000"):
            lower_bound(model, windows, orders=10**20)


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


@pytest.mark.parametrize("given", [{}, [1, 2, 3], "data"])
def test_what_is_no_windows_is_one_line(given):
    with pytest.raises(DataError, match="is not windows: Dataset"):
        nelbo(UniformModel(3, 4), given)


class TestControl:
    def test_unbiased_by_enumeration(self):
        """Over every mask of two windows at once, the mean with the control variate is the enumerated NELBO."""
        model = TableModel(4, 3, seed=4)
        texts = [(1, 3, 2), (2, 2, 1)]
        surprisal = np.array([0.3, 1.0, 2.5, 0.7])
        draws = []
        for x in texts:
            rows = []
            for k in range(1, 4):
                for hidden in itertools.combinations(range(3), k):
                    y = np.array([conditional_nll(model, x, set(hidden), i) for i in hidden])
                    a = surprisal[[x[i] for i in hidden]]
                    control = 3 / k * a.sum() - surprisal[list(x)].sum()
                    centred = a - a.mean()
                    chance = 1 / 3 / math.comb(3, k)
                    rows.append((chance, 3 / k * y.sum(), control, centred @ centred, centred @ y, k / 3))
            draws.append(rows)
        mean = np.zeros(2)
        moved = 0.0
        for pair in itertools.product(*draws):
            columns = np.array(pair).T
            adjusted = apply_control(*columns[1:])
            moved += float(np.abs(adjusted - columns[1]).sum())
            mean += columns[0].prod() * adjusted
        assert mean == pytest.approx([enumerated_nelbo(model, x) for x in texts], abs=1e-9)
        assert moved > 1  # it does something

    @pytest.mark.parametrize("rare", [0, 1])
    def test_text_of_one_token_is_not_steadied_by_rounding(self, rare):
        """All guesses are equal, but perhaps for one token of the first window: there is nothing to fit."""
        cost = torch.linspace(0.5, 9.0, 64, dtype=torch.float64)

        class ByPlace(UniformModel):
            def logits(self, ids, *, block_size=0, positions=None):
                out = torch.zeros(*ids.shape, 3, dtype=torch.float64)
                out[..., 1] = math.log(2) - torch.log(torch.expm1(cost))  # token 1 costs `cost` of its place
                return out if positions is None else out[positions]

        stream = np.full(64 * 5, 1)
        stream[:rare] = 2
        for seed in range(20):
            estimate = nelbo(ByPlace(3, 64), ToyWindows(stream, 64, ToyTokenizer(3)), repeats=2, seed=seed)
            assert 0 < estimate.nats_per_token < 10

    def test_less_variance_where_tokens_differ_in_difficulty(self):
        """A model whose tokens cost what their frequency says: nearly all of the luck of the draw goes away."""
        random = np.random.default_rng(0)
        frequency = np.array([0.5, 0.25, 0.15, 0.06, 0.03, 0.01])
        windows_of = ToyWindows(random.choice(6, 64 * 40, p=frequency), 64, ToyTokenizer(6))

        class Unigram(UniformModel):
            def logits(self, ids, *, block_size=0, positions=None):
                out = torch.from_numpy(np.log(frequency)).expand(*ids.shape, 6)
                return out if positions is None else out[positions]

        model = Unigram(6, 64)
        exact = chain_rule(model, windows_of)
        estimate = nelbo(model, windows_of, repeats=16)
        assert estimate.bpb == pytest.approx(exact.bpb, abs=4 * estimate.stderr_bpb + 1e-4)
        assert estimate.stderr_bpb < 0.02 * exact.bpb / math.sqrt(16)


class TestOrders:
    @pytest.mark.parametrize(
        "order", ["left", "random(0)", "random(7)", "block(1)", "block(2)", "spread(1)", "spread(2)"]
    )
    def test_every_order_is_an_exact_code(self, order):
        model = TableModel(V, T, seed=6)
        groups = reveal_order(order, T)
        assert sorted(int(i) for group in groups for i in group) == list(range(T))
        total = 0.0
        for x in texts():
            hidden, nll = set(range(T)), 0.0
            for group in groups:
                nll += sum(conditional_nll(model, x, hidden, int(i)) for i in group)
                hidden -= {int(i) for i in group}
            total += math.exp(-nll)
            if sum(x):
                estimate = chain_rule(model, ToyWindows(np.array(x), T, model.tokenizer), order=order)
                assert estimate.nats_per_token * T == pytest.approx(nll, abs=1e-9)
                assert estimate.forward_passes == len(groups) and estimate.kind == "exact"
        assert total == pytest.approx(1, abs=1e-9)

    @pytest.mark.parametrize("length", [1, 2, 7, 64, 100])
    def test_groups(self, length):
        for order in ("left", "random(3)", "block(8)", "spread(8)", "spread(1000)"):
            groups = reveal_order(order, length)
            assert sorted(np.concatenate(groups).tolist()) == list(range(length))
            assert all(len(g) for g in groups)
        assert len(reveal_order("spread(8)", length)) == min(8, length)
        assert len(reveal_order("block(8)", length)) == -(-length // 8)
        first = reveal_order("spread(8)", 64)[0]
        assert np.diff(first).min() >= 8  # far apart

    def test_random_orders_differ_and_stay(self):
        a, b = reveal_order("random(1)", 50), reveal_order("random(2)", 50)
        assert np.concatenate(a).tolist() != np.concatenate(b).tolist()
        assert np.concatenate(a).tolist() == np.concatenate(reveal_order("random(1)", 50)).tolist()

    @pytest.mark.parametrize(
        "order", ["best", "block", "block(0)", "spread(-1)", "random()", "left(3)", "", f"random({'9' * 5000})"]
    )
    def test_unknown(self, order):
        with pytest.raises(DataError, match="order"):
            reveal_order(order, 8)

    @pytest.mark.parametrize("attention", ["causal", "block(3)", "block(4)"])
    def test_what_cannot_be_seen_is_not_computed(self, attention):
        """A real network on the cut canvas gives the figure of the whole canvas."""
        config = ModelConfig(
            vocab_size=11,
            sequence_length=16,
            layers=2,
            width=16,
            heads=2,
            kv_heads=1,
            neighbour_reach=1,
            embedding_std=1.0,
        )
        network = eighths(Denoiser(config))
        tokenizer = ToyTokenizer(11)
        model = Model(config, tokenizer, network, sha256="x")
        windows = ToyWindows(np.random.default_rng(0).integers(0, 11, 40), 16, tokenizer)
        for order in ("left", "spread(4)", "block(4)"):
            lengths = []
            forward = network.forward

            def watched(ids, forward=forward, lengths=lengths, **more):
                lengths.append(ids.shape[1])
                return forward(ids, **more)

            network.forward = watched
            short = chain_rule(model, windows, order=order, attention=attention)
            network.forward = forward
            # Orders that finish each block before the next take all blocks at once, and no canvas at all.
            at_once = {
                ("left", "causal"): 3,
                ("left", "block(3)"): 9,
                ("left", "block(4)"): 12,
                ("block(4)", "block(4)"): 3,
            }
            if (order, attention) in at_once:
                assert not lengths and short.forward_passes == at_once[order, attention]
            else:
                assert min(lengths) < 16 or order == "spread(4)"
            nats = 0.0
            for w in range(3):
                x = torch.from_numpy(windows[w])[None]
                hidden = torch.ones_like(x, dtype=torch.bool)
                for group in reveal_order(order, x.shape[1]):
                    logits = model.logits(x.masked_fill(hidden, 11), block_size=parse_attention(attention))[0, group]
                    nats += float(torch.nn.functional.cross_entropy(logits, x[0, group], reduction="sum"))
                    hidden[0, group] = False
            assert short.nats_per_token * 40 == pytest.approx(nats, rel=1e-5)
            full = chain_rule(model, windows, order=order)
            assert full.nats_per_token != pytest.approx(short.nats_per_token, rel=1e-3)


class TestJournal:
    def interrupted(self, score, path, after, model, windows, **more):
        """Score until `after` forward passes were reported, then stop as a killed process would."""

        class Stop(Exception):
            pass

        def progress(told):
            if told.done >= after:
                raise Stop

        with pytest.raises(Stop):
            score(model, windows, journal=path, progress=progress, batch=4, **more)

    @pytest.mark.parametrize("score", [nelbo, chain_rule])
    def test_goes_on_where_it_stopped(self, score, tmp_path, monkeypatch):
        monkeypatch.setattr(Journal, "interval", 0.0)
        model = TableModel(4, 3)
        windows = toy_windows(model, 100)
        whole = score(model, windows)
        path = tmp_path / "journal"
        self.interrupted(score, path, 60, model, windows)
        model.rows = 0
        again = score(model, windows, journal=path)
        assert model.rows < whole.forward_passes
        assert again.bpb == whole.bpb and again.forward_passes == whole.forward_passes
        model.rows = 0
        assert score(model, windows, journal=path).bpb == whole.bpb and model.rows == 0

    def test_of_something_else_is_refused(self, tmp_path):
        model = TableModel(4, 3)
        windows = toy_windows(model, 40)
        path = tmp_path / "journal"
        nelbo(model, windows, journal=path)
        for other in (
            lambda: nelbo(model, windows, journal=path, seed=1),
            lambda: nelbo(model, toy_windows(model, 40, seed=1), journal=path),
            lambda: nelbo(TableModel(4, 3, seed=1), windows, journal=path),
            lambda: chain_rule(model, windows, journal=path),
        ):
            with pytest.raises(DataError, match="belongs to another"):
                other()
        path.write_bytes(b"hello")
        with pytest.raises(DataError, match="not a scoring journal"):
            nelbo(model, windows, journal=path)

    def test_processes_share_the_work(self, tmp_path):
        """Two processes under torchrun, then one that goes on from their files: all the same figure."""
        script = tmp_path / "run.py"
        script.write_text(
            "import sys, json, pathlib\n"
            f"sys.path.insert(0, {str(Path(__file__).parent / 'helpers')!r})\n"
            "from toy import TableModel, toy_windows\n"
            "from mezzotint.scoring.likelihood import nelbo, chain_rule\n"
            "from mezzotint.distributed import process_group\n"
            "model = TableModel(4, 3)\n"
            "windows = toy_windows(model, 101)\n"
            "here = pathlib.Path(sys.argv[1])\n"
            "with process_group('cpu') as (rank, _, _):\n"
            "    out = [s(model, windows, journal=here / n).bpb for s, n in ((nelbo, 'n'), (chain_rule, 'c'))]\n"
            "    (here / f'out{rank}').write_text(json.dumps([*out, model.rows]))\n"
        )
        done = torchrun(script, tmp_path, seconds=120)
        assert done.returncode == 0, done.stderr[-2000:]
        model = TableModel(4, 3)
        windows = toy_windows(model, 101)
        alone = [nelbo(model, windows).bpb, chain_rule(model, windows).bpb]
        rows, model.rows = model.rows, 0
        each = [json.loads((tmp_path / f"out{rank}").read_text()) for rank in (0, 1)]
        assert each[0][:2] == pytest.approx(alone, rel=1e-12) and each[1][:2] == each[0][:2]
        assert each[0][2] + each[1][2] == rows and abs(each[0][2] - each[1][2]) < rows * 0.1
        assert nelbo(model, windows, journal=tmp_path / "n").bpb == pytest.approx(alone[0], rel=1e-12)
        assert model.rows == 0


class Blend(TableModel):
    """A toy model with a little of another's logits."""

    def __init__(self, base: TableModel, other: TableModel, share: float) -> None:
        super().__init__(base.config.vocab_size, base.config.sequence_length, seed=base.seed)
        self.base, self.other, self.share = base, other, share

    def table(self, length: int) -> torch.Tensor:
        return (1 - self.share) * self.base.table(length) + self.share * self.other.table(length)


class TestCompare:
    def test_difference_is_the_enumerated_one_and_pairing_helps(self):
        a = TableModel(4, 3, seed=1)
        b = Blend(a, TableModel(4, 3, seed=2), 0.05)
        windows = toy_windows(a, 3 * 40)
        exact = (split_nelbo(b, windows)[0] - split_nelbo(a, windows)[0]) / split_nelbo(a, windows)[1] / math.log(2)
        found = compare(a, b, windows, repeats=16)
        assert abs(found.difference_bpb - exact) < 4 * found.stderr_bpb
        unpaired = math.hypot(found.a.stderr_bpb, found.b.stderr_bpb)
        assert found.stderr_bpb < unpaired / 3
        assert found.difference_bpb == pytest.approx(found.b.bpb - found.a.bpb, abs=1e-12)
        chain = compare(a, b, windows, method="chain")
        assert chain.stderr_bpb == 0 and chain.p_value == 0
        assert chain.difference_bpb == pytest.approx(chain_rule(b, windows).bpb - chain_rule(a, windows).bpb, abs=1e-12)

    def test_p_value_is_honest(self):
        """Models that differ only in ways that even out: p below 0.05 about one time in twenty."""
        a = TableModel(3, 3, seed=1)
        b = Blend(a, TableModel(3, 3, seed=2), 0.3)
        windows = toy_windows(a, 3 * 12)
        size = split_nelbo(a, windows)[1]
        exact = (split_nelbo(b, windows)[0] - split_nelbo(a, windows)[0]) / size / math.log(2)
        low = 0
        for seed in range(150):
            found = compare(a, b, windows, repeats=6, seed=seed)
            low += student_t_tail((found.difference_bpb - exact) / found.stderr_bpb, 5) < 0.05
        assert 1 <= low <= 17

    def test_error_over_documents_is_honest(self):
        """Documents drawn from a population whose difference is enumerated: 95% intervals hold it about as often."""

        class Letters(ToyTokenizer):
            def original_bytes(self, text):
                return ["_abc".index(c) for c in text], np.ones(len(text), dtype=np.int64)

            def lost_bytes(self, text):
                return np.zeros(len(text), dtype=np.int64)

        a, b = TableModel(4, 4, seed=1), TableModel(4, 4, seed=2)
        a.tokenizer, b.tokenizer = Letters(4), Letters(4)
        b.tokenizer.sha256 = "another"
        population = ["".join(x) for n in (1, 2, 3) for x in itertools.product("abc", repeat=n)]

        def nats(model, text):
            x = (0, *("_abc".index(c) for c in text))
            return sum(conditional_nll(model, x, set(range(i, len(x))), i) for i in range(1, len(x)))

        each = {text: nats(b, text) - nats(a, text) for text in population}
        truth = sum(each.values()) / sum(map(len, population)) / math.log(2)
        random, covered = np.random.default_rng(0), 0
        for _ in range(200):
            texts = [str(t) for t in random.choice(population, 25)]
            found = compare_documents(a, b, texts, method="chain-or-causal")
            mean = sum(each[t] for t in texts) / sum(map(len, texts)) / math.log(2)
            assert found.difference_bpb == pytest.approx(mean, abs=1e-9)
            half = student_t_quantile(0.95, found.degrees_of_freedom) * found.stderr_bpb
            covered += abs(found.difference_bpb - truth) <= half
        assert 178 <= covered <= 198

    def test_same_model_and_errors(self):
        a = TableModel(4, 3)
        windows = toy_windows(a, 60)
        same = compare(a, a, windows)
        assert same.difference_bpb == 0 and same.p_value == 1
        assert set(same.to_dict()) >= {"difference_bpb", "stderr_bpb", "p_value", "a", "b"}
        other = TableModel(4, 3)
        other.tokenizer.sha256 = "other"
        with pytest.raises(DataError, match="tokenizers"):
            compare(a, other, windows)
        with pytest.raises(DataError, match="method"):
            compare(a, a, windows, method="best")
