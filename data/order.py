"""The order of samples: a pure function of (step, seed), with nothing to store or restore.

A keyed bijection reorders each source once per epoch, and the sources are interleaved by weight, so any batch
of any epoch is computed from its number alone.
"""

import heapq
from collections.abc import Sequence
from fractions import Fraction
from math import gcd

import numpy as np

MAX_PERIOD = 1 << 16
N_ROUNDS = 6
MASK_64 = (1 << 64) - 1
DEADLINE_BITS = 64


def permute(index: np.ndarray, n: int, key: int | tuple[int, ...]) -> np.ndarray:
    """Map each index in [0, n) to an index in [0, n): a bijection for each key, n up to 2**40.

    A balanced Feistel network on the next power of four, walked until it lands below n again (cycle-walking:
    Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002). The walk stays on one cycle of a
    permutation, so it ends, after fewer than four steps on average, and distinct starts have distinct ends.

    Raises ValueError for an n or an index out of range.
    """
    if not 1 <= n <= 1 << 40:
        raise ValueError(f"n={n} must be in [1, 2**40]")
    values = np.array(index, dtype=np.uint64).reshape(-1)
    if values.size and int(values.max()) >= n:
        raise ValueError(f"index {int(values.max())} is outside [0, {n})")
    half_bits = max(1, ((n - 1).bit_length() + 1) // 2)
    round_keys = _round_keys(key)
    values = _feistel(values, half_bits, round_keys)
    while (outside := np.flatnonzero(values >= n)).size:
        values[outside] = _feistel(values[outside], half_bits, round_keys)
    return values.astype(np.int64).reshape(np.shape(index))


def _feistel(values: np.ndarray, half_bits: int, round_keys: Sequence[int]) -> np.ndarray:
    mask = np.uint64((1 << half_bits) - 1)
    left, right = values >> np.uint64(half_bits), values & mask
    for key in round_keys:
        # A round's function need not be invertible: exchanging the halves makes the network a bijection.
        left, right = right, left ^ (_mix(right + np.uint64(key)) & mask)
    return (left << np.uint64(half_bits)) | right


def _mix(x: np.ndarray) -> np.ndarray:
    """The finalizer of splitmix64 (Steele, Lea and Flood, OOPSLA 2014), on uint64 arrays that wrap."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: np.ndarray = x ^ (x >> np.uint64(31))
    return mixed


def _round_keys(key: int | tuple[int, ...]) -> list[int]:
    state = np.zeros(1, dtype=np.uint64)
    for part in key if isinstance(key, tuple) else (key,):
        state = _mix(state + np.uint64(0x9E3779B97F4A7C15)) ^ np.uint64(part & MASK_64)
    keys = []
    for _ in range(N_ROUNDS):
        state = state + np.uint64(0x9E3779B97F4A7C15)
        keys.append(int(_mix(state)[0]))
    return keys


class Blend:
    """Interleave sources by weight: map sample g of a run to sample `index` of source `source_id`.

    One period of at most 65536 samples holds exactly parts[s] samples of source s, then the order repeats.
    Within it, the number of samples of a source among the first t differs from its share by at most
    1 - 1/(2(n-1)) for n sources (Tijdeman, "The chairman assignment problem", 1980). Over any window of the
    run the number is therefore within 1 of the share for two sources, and within 2 for more.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        if not weights or min(weights) <= 0:
            raise ValueError(f"weights {list(weights)} must be positive, one for each source")
        self.parts = quantize_weights(weights)
        self.period = sum(self.parts)
        self._source_ids = np.array(_schedule(self.parts), dtype=np.int64)
        self._parts = np.array(self.parts, dtype=np.int64)
        # The number of samples of the same source before each position of the period.
        self._ranks = np.empty(self.period, dtype=np.int64)
        for source_id, n_parts in enumerate(self.parts):
            self._ranks[self._source_ids == source_id] = np.arange(n_parts)

    def locate(self, global_index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return (source_id, index within the source's endless stream of samples) of each global index."""
        periods, positions = np.divmod(np.asarray(global_index, dtype=np.int64), self.period)
        source_ids = self._source_ids[positions]
        return source_ids, periods * self._parts[source_ids] + self._ranks[positions]


def quantize_weights(weights: Sequence[float]) -> list[int]:
    """Return integers in the ratio of the weights, with a sum of at most 65536.

    Exact for weights that are short decimals; otherwise parts per 65536 by largest remainder, at least one
    for each source.
    """
    # Through the decimal spelling: 0.7 is meant as 7/10, not as the double next to it.
    exact = [Fraction(repr(float(weight))) for weight in weights]
    whole = exact[0].denominator
    for fraction in exact:
        whole = whole * fraction.denominator // gcd(whole, fraction.denominator)
    parts = [int(fraction * whole) for fraction in exact]
    shared = gcd(*parts)
    parts = [part // shared for part in parts]
    if sum(parts) <= MAX_PERIOD:
        return parts
    total = sum(exact)
    ideal = [fraction / total * MAX_PERIOD for fraction in exact]
    parts = [max(1, int(share)) for share in ideal]
    by_remainder = sorted(range(len(parts)), key=lambda s: (parts[s] - ideal[s], s))
    missing = MAX_PERIOD - sum(parts)
    for s in by_remainder[: max(missing, 0)]:
        parts[s] += 1
    for _ in range(-missing):  # the minimum of one part was more than the share of very small sources
        parts[max(range(len(parts)), key=lambda s: (parts[s], -s))] -= 1
    return parts


def _schedule(parts: Sequence[int]) -> list[int]:
    """Return the source at each position of one period, after Tijdeman: of those due, the earliest deadline.

    With d = 1/(2(n-1)) and share a/P, sample k of a source is due from step t on when a/P*t - k >= d, and
    must have been placed by step (k + 1 - d) * P/a. All is multiplied by 2(n-1) to stay in integers.
    Deadlines are compared to DEADLINE_BITS binary places: deadlines that differ, differ by more.
    """
    n, period = len(parts), sum(parts)
    if n == 1:
        return [0] * period
    scale = 2 * (n - 1)
    due: list[list[tuple[int, int, int]]] = [[] for _ in range(period + 1)]
    for s, part in enumerate(parts):
        for k in range(part):
            release = -(-(scale * k + 1) * period // (scale * part))
            deadline = ((scale * (k + 1) - 1) * period << DEADLINE_BITS) // (scale * part)
            due[release].append((deadline, s, k))
    waiting: list[tuple[int, int, int]] = []
    order = []
    for step in range(1, period + 1):
        for job in due[step]:
            heapq.heappush(waiting, job)
        order.append(heapq.heappop(waiting)[1])
    return order


def sample_ids(
    step: int, *, n_samples_per_source: Sequence[int], blend: Blend, batch_seqs: int, seed: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return (source_ids, sample_idx, epochs) of one step's batch, [batch_seqs] int64 each.

    A source's epoch is its own: a small source with a large weight is seen more often.
    """
    source_ids, positions = blend.locate(np.arange(step * batch_seqs, (step + 1) * batch_seqs))
    n_samples = np.asarray(n_samples_per_source, dtype=np.int64)[source_ids]
    epochs, positions = np.divmod(positions, n_samples)
    sample_idx = np.empty(batch_seqs, dtype=np.int64)
    for source_id, epoch in sorted(set(zip(source_ids.tolist(), epochs.tolist(), strict=True))):
        chosen = (source_ids == source_id) & (epochs == epoch)
        sample_idx[chosen] = permute(
            positions[chosen], int(n_samples_per_source[source_id]), (seed, source_id, epoch)
        )
    return source_ids, sample_idx, epochs
