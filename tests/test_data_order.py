"""The order of samples: pure, complete, mixed, and read only where it is asked for."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from v2flow.data.order import ShuffledOrder, keyed_hashes, keyed_permutation, keyed_uniform


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=8),
    seed=st.integers(0, 2**40),
    epoch=st.integers(0, 1000),
    block=st.integers(1, 17),
    window=st.integers(1, 5),
    data=st.data(),
)
def test_any_slice_is_a_slice_of_one_permutation(
    sizes: list[int], seed: int, epoch: int, block: int, window: int, data: st.DataObject
) -> None:
    total = sum(sizes)
    whole = ShuffledOrder(sizes, seed, block, window).samples(epoch, 0, total)
    assert sorted(whole.tolist()) == list(range(total))
    start = data.draw(st.integers(0, total))
    stop = data.draw(st.integers(start, total))
    fresh = ShuffledOrder(sizes, seed, block, window)
    np.testing.assert_array_equal(fresh.samples(epoch, start, stop), whole[start:stop])


def test_epochs_and_seeds_differ_and_repeat() -> None:
    def epoch(seed: int, number: int) -> list[int]:
        return ShuffledOrder([700, 300, 24], seed).samples(number, 0, 1024).tolist()

    assert epoch(3, 0) == epoch(3, 0)
    others = [epoch(3, 1), epoch(4, 0), epoch(0, 3)]
    for other in others:  # about one of 1,024 samples stands at its place by chance
        assert sum(a == b for a, b in zip(epoch(3, 0), other, strict=True)) < 12


def test_the_order_is_fixed_for_all_time() -> None:
    """Saved positions are worthless if a new version orders differently."""
    assert keyed_hashes(np.arange(3), 1, 2).tolist() == FIRST_HASHES
    assert ShuffledOrder([6, 4], 0, block_size=2, window_blocks=2).samples(0, 0, 10).tolist() == FIRST_ORDER


FIRST_HASHES = [13215808944539048159, 615147362192387662, 14341635350333910708]
FIRST_ORDER = [0, 1, 3, 2, 4, 8, 5, 9, 6, 7]


def test_samples_of_a_window_come_from_its_blocks_only() -> None:
    order = ShuffledOrder([1000] * 4, 5, block_size=100, window_blocks=4)
    whole = order.samples(0, 0, 4000)
    for first in range(0, 4000, 400):
        blocks, counts = np.unique(whole[first : first + 400] // 100, return_counts=True)
        assert len(blocks) == 4 and set(counts.tolist()) == {100}
    assert len(set((whole[:400] // 1000).tolist())) > 1, "a window mixes shards"
    assert np.abs(np.diff(whole[:400])).mean() > 50, "samples of a window are mixed, not only blocks"


def test_a_resume_looks_at_its_own_windows_only(monkeypatch: pytest.MonkeyPatch) -> None:
    order = ShuffledOrder([10_000] * 10, 5, block_size=100, window_blocks=2)
    made: list[int] = []
    make = ShuffledOrder._make_window
    monkeypatch.setattr(ShuffledOrder, "_make_window", lambda self, e, w: made.append(w) or make(self, e, w))
    order = ShuffledOrder([10_000] * 10, 5, block_size=100, window_blocks=2)
    order.samples(7, 50_010, 50_040)
    assert made == [250]


def test_permutations_are_uniform() -> None:
    """Each of the 24 orders of 4 things about equally often: chi-squared over 4,800 draws."""
    counts: dict[tuple[int, ...], int] = {}
    for seed in range(4800):
        order = tuple(keyed_permutation(4, seed).tolist())
        counts[order] = counts.get(order, 0) + 1
    assert len(counts) == 24
    chi2 = sum((count - 200) ** 2 / 200 for count in counts.values())
    assert chi2 < 60  # 23 degrees of freedom: above 60 once in 25,000 seeds; ours are fixed


def test_uniform_draws() -> None:
    draws = keyed_uniform(np.arange(20_000), 1, 2, 3)
    assert draws.min() >= 0 and draws.max() < 1
    assert abs(draws.mean() - 0.5) < 0.01 and abs(draws.var() - 1 / 12) < 0.003
    other = keyed_uniform(np.arange(20_000), 1, 2, 4)
    assert abs(np.corrcoef(draws, other)[0, 1]) < 0.03
    np.testing.assert_array_equal(keyed_uniform(np.arange(500, 600), 1, 2, 3), draws[500:600])
