"""Data steps that are left out: which are read instead, and the file that records them."""

import json
import random
from itertools import count, islice, pairwise
from pathlib import Path

import pytest

from turnout.data.errors import DataError
from turnout.data.skips import SkippedWindow, data_step_at, merged, read_skips, write_skips


def windows_of(*bounds: tuple[int, int]) -> list[SkippedWindow]:
    return [SkippedWindow(first, last, "spike") for first, last in bounds]


def slow_data_steps(n_steps: int, skipped: list[SkippedWindow]) -> list[int]:
    """Walk through all data steps and leave out those in a window."""
    kept = (s for s in count() if not any(window.first <= s <= window.last for window in skipped))
    return list(islice(kept, n_steps))


CASES = {
    "none": [],
    "from the start": [(0, 0)],
    "one step": [(5, 5)],
    "a window": [(3, 9)],
    "two that touch": [(3, 5), (6, 8)],
    "one step between": [(3, 5), (7, 8)],
    "overlapping": [(3, 9), (5, 12)],
    "one in another": [(3, 12), (5, 6)],
    "one in another, then a third": [(3, 12), (5, 6), (12, 14), (20, 21)],
    "twice the same": [(3, 5), (3, 5)],
    "same start": [(3, 9), (3, 4)],
    "unsorted": [(30, 31), (0, 2), (10, 20), (4, 4)],
    "reached only through others": [(1, 10), (12, 12), (14, 30)],
}


@pytest.mark.parametrize("bounds", CASES.values(), ids=CASES)
def test_data_steps_are_those_of_the_slow_twin(bounds: list[tuple[int, int]]) -> None:
    skipped = windows_of(*bounds)
    assert [data_step_at(step, skipped) for step in range(60)] == slow_data_steps(60, skipped)


def test_data_steps_of_random_windows_are_those_of_the_slow_twin() -> None:
    rng = random.Random(7)
    for _ in range(300):
        starts = [rng.randrange(40) for _ in range(rng.randrange(8))]
        skipped = windows_of(*((first, first + rng.choice([0, 0, 1, 2, 9])) for first in starts))
        steps = [data_step_at(step, skipped) for step in range(50)]
        assert steps == slow_data_steps(50, skipped)
        assert all(a < b for a, b in pairwise(steps))


def test_steps_before_a_new_window_stay_where_they_were() -> None:
    """A rollback relies on this: leaving out later data changes no step before it."""
    old = windows_of((4, 6))
    step = next(s for s in range(100) if data_step_at(s, old) == 20)
    new = merged(old, windows_of((18, 20)))
    assert [data_step_at(s, new) for s in range(step - 2)] == [data_step_at(s, old) for s in range(step - 2)]
    assert data_step_at(step - 2, new) == 21


def test_far_steps_cost_nothing() -> None:
    assert data_step_at(10**15, windows_of((10**14, 10**14 + 9), (10**15 + 10, 10**15 + 10))) == 10**15 + 11


def test_merged_windows_are_sorted_without_duplicates() -> None:
    a, b, c = SkippedWindow(9, 9, "spike"), SkippedWindow(2, 5, "spike"), SkippedWindow(2, 5, "collapse")
    assert merged([a, b], [b, c, a]) == (c, b, a)
    many = windows_of(*((first, first) for first in range(50)))
    assert merged(many[::-2], many[-2::-2]) == tuple(many)
    assert merged([], []) == ()
    assert merged([a], []) == merged([], [a, a]) == (a,)


def test_windows_survive_the_file(tmp_path: Path) -> None:
    path = tmp_path / "skips.json"
    assert read_skips(path) == ()
    skipped = (SkippedWindow(7, 9, 'loss 7.9 is "high"\n\u4f60'), SkippedWindow(2, 2, ""))
    write_skips(path, skipped)
    assert read_skips(path) == skipped
    write_skips(path, [])
    assert read_skips(path) == ()
    assert list(tmp_path.iterdir()) == [path]


GOOD = {"first": 3, "last": 4, "reason": "spike"}
DAMAGED = {
    "empty": b"",
    "cut": b'{"format_version": 1, "skipped": [{"first": 3, "la',
    "not UTF-8": b"\xff\xfe",
    "a list": b"[]",
    "without windows": b'{"format_version": 1}',
    "without version": b'{"skipped": []}',
    "a window without reason": {"first": 3, "last": 4},
    "a window with an extra field": GOOD | {"until": 5},
    "a window backwards": GOOD | {"last": 2},
    "a window before the start": GOOD | {"first": -1},
    "a fraction": GOOD | {"last": 4.0},
    "a boolean": GOOD | {"first": True},
    "a text": GOOD | {"first": "3"},
    "a null reason": GOOD | {"reason": None},
}


@pytest.mark.parametrize("damage", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_file_is_reported(damage: bytes | dict[str, object], tmp_path: Path) -> None:
    path = tmp_path / "skips.json"
    if isinstance(damage, dict):
        damage = json.dumps({"format_version": 1, "skipped": [GOOD, damage]}).encode()
    path.write_bytes(damage)
    with pytest.raises(DataError, match=r"skips\.json: damaged \(.*restore it from a copy"):
        read_skips(path)


def test_a_file_of_another_version_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "skips.json"
    path.write_text('{"format_version": 2, "skipped": []}')
    with pytest.raises(DataError, match=r"skips\.json: format_version=2 where 1 is read"):
        read_skips(path)


@pytest.mark.parametrize(("first", "last"), [(-1, 3), (4, 3)])
def test_an_invalid_window_is_refused(first: int, last: int) -> None:
    with pytest.raises(ValueError, match="0 <= first <= last"):
        SkippedWindow(first, last, "")
