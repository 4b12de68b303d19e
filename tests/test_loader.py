"""The loader's order."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch
from corpus import small_tokenizer, write_shard

from mezzotint.data.dataset import TokenStream
from mezzotint.data.loader import Loader, Prefetch, permute
from mezzotint.data.tokenizer import Tokenizer
from mezzotint.errors import DataError


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return small_tokenizer()


@pytest.mark.parametrize("size", [1, 2, 3, 17, 64, 1000])
def test_permute_is_a_permutation(size):
    orders = [permute(np.arange(size), size, key) for key in range(3)]
    for order in orders:
        assert sorted(order.tolist()) == list(range(size))
    if size >= 17:
        assert not np.array_equal(orders[0], orders[1])
        assert abs(np.corrcoef(np.arange(size), orders[0])[0, 1]) < 0.6


@pytest.fixture
def stream(tmp_path, tokenizer) -> TokenStream:
    return TokenStream([write_shard(tmp_path / "train_000000.bin", np.arange(103) % 330)], tokenizer)


def test_each_epoch_takes_every_window_once(stream):
    loader = Loader(stream, 10, 3, seed=5)
    rows = np.concatenate([loader.starts(step) for step in range(loader.epoch_windows * 2)])
    phases = []
    for epoch in range(6):
        starts = np.sort(rows[epoch * loader.epoch_windows : (epoch + 1) * loader.epoch_windows])
        assert np.array_equal(np.diff(starts), np.full(loader.epoch_windows - 1, 10))
        assert starts[0] >= 0 and starts[-1] + 10 <= 103
        phases.append(int(starts[0]))
    assert len(set(phases)) > 1
    assert np.array_equal(loader.batch(0)[0], (np.arange(10) + loader.starts(0)[0]) % 330)


def test_order_does_not_depend_on_processes(stream):
    whole = Loader(stream, 10, 4, seed=1)
    for world in (2, 4):
        parts = [Loader(stream, 10, 4, seed=1, rank=r, world_size=world) for r in range(world)]
        for step in range(12):
            assert np.array_equal(np.concatenate([p.batch(step) for p in parts]), whole.batch(step))


def test_loader_refuses_what_it_cannot_do(stream):
    with pytest.raises(DataError, match="fewer than one window"):
        Loader(stream, 104, 1, seed=0)
    with pytest.raises(DataError, match="cannot be shared"):
        Loader(stream, 10, 3, seed=0, world_size=2)
    with pytest.raises(DataError, match="batch was 4"):
        Loader(stream, 10, 3, seed=0).load_state_dict(Loader(stream, 10, 4, seed=0).state_dict())


def test_short_stream_wraps(stream):
    batch = Loader(stream, 100, 16, seed=0).batch(3)
    assert batch.shape == (16, 100)


def test_prefetch_gives_the_same_batches_and_errors(stream, tokenizer, tmp_path):
    loader = Loader(stream, 10, 3, seed=0)
    ahead = Prefetch(loader)
    for step in (0, 1, 2, 7, 8, 3, 4):
        assert np.array_equal(ahead.batch(step), loader.batch(step))
    ahead.close()
    foreign = TokenStream([write_shard(tmp_path / "x_000000.bin", np.full(50, 60_000))], tokenizer)
    failing = Prefetch(Loader(foreign, 10, 2, seed=0))
    with pytest.raises(DataError, match="60000"):
        failing.batch(0)
    failing.close()
    with pytest.raises(RuntimeError):  # rather than waiting for ever
        ahead.batch(9)


@pytest.mark.skipif("backend: OpenMP" not in torch.__config__.parallel_info(), reason="one team for all threads")
def test_prefetch_computes_in_its_own_thread_alone_and_leaves_others_their_number(stream):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        ahead = Prefetch(Loader(stream, 10, 3, seed=0), lambda *_: torch.get_num_threads())
        assert [ahead.batch(step) for step in range(3)] == [1, 1, 1]
        elsewhere: list[int] = []
        thread = threading.Thread(target=lambda: elsewhere.append(torch.get_num_threads()))
        thread.start()
        thread.join()
        assert (torch.get_num_threads(), elsewhere) == (3, [3])
        ahead.close()
    finally:
        torch.set_num_threads(before)
