"""The table of `make bench`, and a benchmark at toy size."""

import math
import os

import pytest

from tests.bench.rows import Row, to_markdown
from tests.bench.scaling import token_rows
from tests.bench.side_by_side import GLIBC_DEFAULTS, N_WARM_ROUNDS, in_own_process, over, time_in_turn

pytestmark = pytest.mark.long


def test_a_row_holds_the_median_and_the_extremes() -> None:
    row = Row.of("time", [1.4, 0.9, 1.0])
    assert (row.measured, row.low, row.high) == (1.0, 0.9, 1.4)


@pytest.mark.parametrize(
    ("measured", "limits", "is_met"),
    [
        (1.06, {"at_most": 1.05}, False),
        (1.05, {"at_most": 1.05}, True),
        (1.9, {"at_least": 2.0}, False),
        (2.0, {"at_least": 2.0}, True),
        (math.nan, {"at_most": 1.05}, False),
        (math.nan, {"at_least": 2.0}, False),
        (9.0, {}, None),
    ],
)
def test_a_row_is_met_within_its_limits(
    measured: float, limits: dict[str, float], is_met: bool | None
) -> None:
    assert Row.of("what", [measured], **limits).is_met is is_met


def test_the_table_shows_which_rows_are_met() -> None:
    found = {
        "experts": [
            Row.of("time over dense", [1.3, 1.2, 1.4], at_most=1.25, note="dense 10 ms"),
            Row.of("tokens/s", [2.5], at_least=2.0),
        ],
        "layouts": [Row.of("speed", [0.5, 0.75])],
    }
    assert to_markdown(found).splitlines() == [
        "| benchmark | what | measured | spread | target | met | in numbers |",
        "|---|---|---|---|---|---|---|",
        "| experts | time over dense | 1.3 | 1.2 to 1.4 | at most 1.25 | no | dense 10 ms |",
        "| experts | tokens/s | 2.5 |  | at least 2 | yes |  |",
        "| layouts | speed | 0.625 | 0.5 to 0.75 |  |  |  |",
    ]


def test_ways_take_turns_and_the_first_rounds_are_not_counted() -> None:
    order: list[str] = []
    ways = {name: lambda name=name: order.append(name) for name in ("a", "b")}
    seconds = time_in_turn(ways, n_rounds=2, clock=lambda: len(order) ** 2)
    assert order == ["a", "b"] * (N_WARM_ROUNDS + 2)
    first = 4 * N_WARM_ROUNDS + 1
    assert seconds == {"a": [first, first + 4], "b": [first + 2, first + 6]}
    assert over(seconds["b"], seconds["a"]) == [(first + 2) / first, (first + 6) / (first + 4)]


def test_a_function_runs_in_a_process_with_its_own_malloc_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MALLOC_TOP_PAD_", "1")
    assert in_own_process(_malloc_settings, malloc=GLIBC_DEFAULTS) == GLIBC_DEFAULTS
    assert _malloc_settings()["MALLOC_TOP_PAD_"] == "1", "this process's environment is unchanged"


def test_a_benchmark_runs() -> None:
    rows = token_rows("fp32", "sorted_loop", (2, 4), has_router=True, n_rounds=3, rows_per_expert=16)
    assert [row.what for row in rows] == ["time of a token, layer, fp32, E 4 over E 2"]
    assert rows[0].measured > 0 and rows[0].note.endswith("us")


def _malloc_settings() -> dict[str, str | None]:
    return {name: os.environ.get(name) for name in GLIBC_DEFAULTS}
