"""The order of samples: bijections, exact blends, and independence of other batches."""

from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest

from turnout.data.order import Blend, permute, quantize_weights, sample_ids

Permute = Callable[[np.ndarray, int, int], np.ndarray]


def is_bijection(permute_fn: Permute, n: int, key: int) -> bool:
    return bool((np.sort(permute_fn(np.arange(n), n, key)) == np.arange(n)).all())


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 16, 17, 37, 255, 257, 4096, 4097, 30_011])
def test_permute_is_a_bijection_that_depends_on_the_key(n: int) -> None:
    for key in (0, 1, -7, 2**70):
        assert is_bijection(permute, n, key)
    if n > 16:
        orders = [permute(np.arange(n), n, key) for key in ((3, 0, 0), (3, 0, 1), (3, 1, 0), (0, 3, 0))]
        assert all((a != b).any() for i, a in enumerate(orders) for b in orders[:i])
        assert all((order != np.arange(n)).mean() > 0.5 for order in orders)


def test_the_bijection_check_finds_a_broken_one() -> None:
    def collides(index: np.ndarray, n: int, key: int) -> np.ndarray:
        order = permute(index, n, key)
        order[5] = order[6]
        return order

    def wraps(index: np.ndarray, n: int, key: int) -> np.ndarray:
        """What folding with a modulus instead of walking the cycle would do."""
        return permute(index, 4096, key) % n

    assert not is_bijection(collides, 1000, 1)
    assert not is_bijection(wraps, 1000, 1)


def test_permute_of_a_huge_range_needs_no_table() -> None:
    n = 2**40 - 87
    index = np.random.default_rng(0).integers(0, n, 10_000)
    found = permute(index, n, 4)
    assert len(np.unique(found)) == len(np.unique(index))
    assert found.min() >= 0 and found.max() < n
    # The same one at a time or all at once, and spread over the whole range.
    assert permute(index[7:8], n, 4)[0] == found[7]
    assert abs(found.mean() / n - 0.5) < 0.02
    assert permute(np.array([], dtype=np.int64), n, 4).shape == (0,)


@pytest.mark.parametrize(("index", "n"), [([5], 5), ([0], 0), ([0], 2**40 + 1)])
def test_permute_refuses_values_out_of_range(index: list[int], n: int) -> None:
    with pytest.raises(ValueError, match="must be in|is outside"):
        permute(np.array(index), n, 0)


def test_index_0_goes_everywhere_equally_often_over_keys() -> None:
    """Chi-square over 12 values, with 11 degrees of freedom: p = 0.001 at 31.3."""
    firsts = [int(permute(np.array([0]), 12, (5, key))[0]) for key in range(3000)]
    counts = np.bincount(firsts, minlength=12)
    assert ((counts - 250) ** 2 / 250).sum() < 31.3


@pytest.mark.parametrize(
    ("weights", "parts"),
    [
        ([0.7, 0.25, 0.05], [14, 5, 1]),
        ([3, 1], [3, 1]),
        ([2.0, 4.0, 6.0], [1, 2, 3]),
        ([0.1], [1]),
        ([1e-9, 1.0], [1, 65535]),
    ],
)
def test_short_weights_are_exact(weights: list[float], parts: list[int]) -> None:
    assert quantize_weights(weights) == parts


def test_long_weights_go_to_the_nearest_part() -> None:
    weights = np.random.default_rng(2).random(7)
    parts = quantize_weights(weights.tolist())
    assert sum(parts) == 65536
    assert np.abs(np.array(parts) - weights / weights.sum() * 65536).max() < 1


@pytest.mark.parametrize("n_tiny", [3, 40])
def test_tiny_sources_are_not_lost(n_tiny: int) -> None:
    parts = quantize_weights([1.0, *([1e-8] * n_tiny)])
    assert parts == [65536 - n_tiny, *([1] * n_tiny)]


def largest_deviation(blend: Blend, n_samples: int) -> float:
    """Return the largest |count - share| over all windows, from the extremes of the prefix deviations."""
    source_ids, _ = blend.locate(np.arange(n_samples))
    worst = 0.0
    for source_id, part in enumerate(blend.parts):
        prefix = np.append(0, np.cumsum(source_ids == source_id))
        deviation = prefix - np.arange(n_samples + 1) * part / blend.period
        worst = max(worst, float(deviation.max() - deviation.min()))
    return worst


@pytest.mark.parametrize(
    "weights",
    [[0.7, 0.3], [0.999, 0.001], [1 / 3, 0.6543210987]],
    ids=["short", "rare", "long"],
)
def test_two_sources_are_within_one_sample_over_any_window(weights: list[float]) -> None:
    blend = Blend(weights)
    assert largest_deviation(blend, 2 * blend.period + 5) <= 1 + 1e-9


@pytest.mark.parametrize("seed", range(4))
def test_many_sources_are_within_two_samples_over_any_window(seed: int) -> None:
    rng = np.random.default_rng(seed)
    weights = np.round(rng.exponential(size=3 + 2 * seed) + 0.01, 2)
    blend = Blend(weights.tolist())
    assert largest_deviation(blend, 2 * blend.period + 5) < 2


def test_locate_counts_each_source_without_gaps() -> None:
    blend = Blend([0.7, 0.25, 0.05])
    source_ids, indices = blend.locate(np.arange(1003))
    for source_id in range(3):
        mine = indices[source_ids == source_id]
        assert mine.tolist() == list(range(len(mine)))
    late = np.array([10**12 + 3])
    assert blend.locate(late)[1][0] > 10**10


N_SAMPLES = [311, 50, 8]
BLEND = Blend([0.7, 0.25, 0.05])


def batch_of(step: int, *, seed: int = 3) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return sample_ids(step, n_samples_per_source=N_SAMPLES, blend=BLEND, batch_seqs=23, seed=seed)


def test_each_epoch_of_each_source_visits_each_sample_once_in_its_own_order() -> None:
    batches = [batch_of(step) for step in range(100)]
    source_ids, samples, epochs = (np.concatenate(parts) for parts in zip(*batches, strict=True))
    for source_id, n_samples in enumerate(N_SAMPLES):
        mine, mine_epochs = samples[source_ids == source_id], epochs[source_ids == source_id]
        n_full = len(mine) // n_samples
        assert n_full >= 5
        orders = [mine[mine_epochs == epoch] for epoch in range(n_full)]
        for order in orders:
            assert np.sort(order).tolist() == list(range(n_samples))
        assert all((a != b).any() for a, b in pairwise(orders))
        assert np.bincount(mine_epochs)[:n_full].tolist() == [n_samples] * n_full


def test_sources_of_the_same_size_have_different_orders() -> None:
    """Two sources of 50 samples, drawn in turn: a batch of 100 is one epoch of each."""
    source_ids, samples, _ = sample_ids(
        0, n_samples_per_source=[50, 50], blend=Blend([1, 1]), batch_seqs=100, seed=3
    )
    first, second = (samples[source_ids == source_id] for source_id in (0, 1))
    assert sorted(first) == sorted(second) == list(range(50))
    assert (first == second).mean() < 0.2, "independent orders agree in one position of 50, on average"


def test_a_batch_needs_no_earlier_batch_and_the_seed_matters() -> None:
    forward = [batch_of(step) for step in range(50)]
    backward = [batch_of(step) for step in reversed(range(50))][::-1]
    for a, b in zip(forward, backward, strict=True):
        assert all((x == y).all() for x, y in zip(a, b, strict=True))
    assert (batch_of(7, seed=4)[1] != forward[7][1]).any()
    assert (batch_of(7, seed=4)[0] == forward[7][0]).all(), "the blend does not depend on the seed"


def test_the_stream_does_not_depend_on_the_batch_size() -> None:
    large = [np.concatenate([batch_of(step)[part] for step in range(2)]) for part in range(2)]
    for step in range(46):
        source_ids, samples, _ = sample_ids(
            step, n_samples_per_source=N_SAMPLES, blend=BLEND, batch_seqs=1, seed=3
        )
        assert (source_ids[0], samples[0]) == (large[0][step], large[1][step])
