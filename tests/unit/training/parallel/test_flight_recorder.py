"""Flight records can be read at any moment, and those of all ranks show which rank is to blame."""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from turnout.training.parallel.flight_recorder import (
    DONE,
    GROUPS,
    MAX_COUNTS,
    N_ENTRIES,
    WAITING,
    Entry,
    FlightRecord,
    FlightRecorder,
    NullRecorder,
    read_flight_record,
)
from turnout.training.parallel.hang_report import RankEnding, explain, group_of
from turnout.training.parallel.layout import Layout

FOUR = Layout(4, ep=2)
ROWS = "all-to-all of rows"


def test_a_flight_record_contains_what_was_written(tmp_path: Path) -> None:
    recorder = FlightRecorder(path := tmp_path / "rank-00003.flight", FOUR, 3)
    record = read_flight_record(path)
    assert (record.rank, record.pid) == (3, os.getpid())
    assert record.current is not None and (record.current.step, record.current.phase) == (0, "start")
    recorder.enter_phase(12, "backward")
    with recorder.collective("all-reduce", "tp"):
        pass
    with recorder.collective(ROWS, "ep", layer=0, sent=[3, 0], received=(7, 1)):
        entry = read_flight_record(path).current
        assert entry is not None and entry.is_waiting
        assert (entry.step, entry.phase, entry.layer, entry.group) == (12, "backward", 0, "ep")
        assert (entry.operation, entry.sent, entry.received) == (ROWS, (3, 0), (7, 1))
        assert (entry.n, entry.index, entry.n_entered("tp"), entry.n_entered("dp")) == (4, 1, 1, 0)
    entry = read_flight_record(path).current
    assert entry is not None and (entry.state, entry.n) == (DONE, 4)


def test_an_exception_leaves_the_collective_waiting(tmp_path: Path) -> None:
    recorder = FlightRecorder(path := tmp_path / "a.flight", FOUR, 0)
    with pytest.raises(RuntimeError, match="lost"), recorder.collective("all-reduce", "world"):
        raise RuntimeError("lost")
    entry = read_flight_record(path).current
    assert entry is not None and entry.state == WAITING


def test_the_ring_keeps_the_last_entries_in_order(tmp_path: Path) -> None:
    recorder = FlightRecorder(path := tmp_path / "a.flight", FOUR, 0)
    with recorder.collective("outer", "world"):
        for step in range(1, 3 * N_ENTRIES):
            recorder.enter_phase(step, "forward")
    record = read_flight_record(path)
    last = 3 * N_ENTRIES - 1
    assert [e.step for e in record.entries] == list(range(last - N_ENTRIES + 1, last + 1))
    assert all(e.state not in (WAITING, DONE) for e in record.entries), "the outer one was overwritten"


def test_counts_beyond_the_limit_are_cut_and_their_number_is_kept(tmp_path: Path) -> None:
    recorder = FlightRecorder(path := tmp_path / "a.flight", FOUR, 0)
    with recorder.collective(ROWS, "world", sent=range(200), received=range(MAX_COUNTS)):
        entry = read_flight_record(path).current
    assert entry is not None
    assert entry.sent == entry.received == tuple(range(MAX_COUNTS))
    assert (entry.n_sent, entry.n_received) == (200, MAX_COUNTS)


def test_a_half_written_entry_is_left_out(tmp_path: Path) -> None:
    recorder = FlightRecorder(path := tmp_path / "a.flight", FOUR, 0)
    recorder.enter_phase(1, "forward")
    recorder.enter_phase(2, "forward")
    data = bytearray(path.read_bytes())
    at = data.rindex(b"forward")
    data[at : at + 7] = b"forwXXX"
    path.write_bytes(data)
    record = read_flight_record(path)
    assert record.current is not None and record.current.step == 1
    path.write_bytes(data[:100])
    with pytest.raises(ValueError, match="a.flight is not a flight record"):
        read_flight_record(path)


def test_the_null_recorder_accepts_the_same_calls() -> None:
    recorder = NullRecorder()
    recorder.enter_phase(1, "forward")
    with recorder.collective(ROWS, "ep", layer=1, sent=[1], received=[2]):
        pass


def test_groups_follow_from_the_layout() -> None:
    layout = Layout(8, tp=2, ep=4)
    got = {group: group_of(layout, group, 5) for group in GROUPS}
    assert got == {
        "ep": [4, 5, 6, 7],
        "tp": [4, 5],
        "dp": [1, 3, 5, 7],
        "edp": [1, 5],
        "world": list(range(8)),
    }


def record_of(rank: int, *entries: Entry) -> FlightRecord:
    return FlightRecord(rank, 1000 + rank, entries)


def at(phase: str, *, n: int = 10, ep: int = 4, world: int = 2, step: int = 12) -> Entry:
    return Entry(n, 0.0, step, phase, entered=(ep, 0, 0, 0, world))


def collective(
    operation: str,
    group: str,
    *,
    state: int = WAITING,
    phase: str = "backward",
    layer: int | None = None,
    n: int = 11,
    ep: int = 4,
    world: int = 2,
    sent: Sequence[int] = (),
    received: Sequence[int] = (),
) -> Entry:
    return Entry(
        n,
        0.0,
        12,
        phase,
        state,
        (ep, 0, 0, 0, world),
        layer,
        group,
        operation,
        tuple(sent),
        tuple(received),
        len(sent),
        len(received),
    )


def rows(layer: int = 3, **more: object) -> Entry:
    return collective(ROWS, "ep", layer=layer, **{"ep": 5, **more})  # type: ignore[arg-type]


def endings(*kinds: RankEnding) -> dict[int, RankEnding]:
    return dict(enumerate(kinds))


F, T, G, S, D = (
    RankEnding.FAILED,
    RankEnding.TERMINATED,
    RankEnding.DIED,
    RankEnding.STUCK,
    RankEnding.DONE,
)


def test_a_dead_rank_is_named_with_where_it_was_and_where_the_others_waited() -> None:
    total = collective("all-reduce", "world", n=14, ep=6, world=3)
    records = {
        0: record_of(0, at("backward"), rows()),
        1: record_of(1, at("backward")),
        2: record_of(2, total),
        3: record_of(3, total),
    }
    assert explain(records, FOUR, endings(F, G, F, T)) == [
        "rank 1 died without an error message (killed, or out of memory); last seen in step 12, backward",
        "rank 0 waited for it in step 12, backward, layer 3, all-to-all of rows (ep group 0, 1)",
        "ranks 2, 3 waited for it in step 12, backward, all-reduce (all ranks)",
    ]


@pytest.mark.parametrize(
    ("last", "words"),
    [
        (rows(), "step 12, backward, waiting in layer 3, all-to-all of rows (ep group 2, 3)"),
        (rows(state=DONE), "step 12, backward, after layer 3, all-to-all of rows (ep group 2, 3)"),
        (Entry(1, 0.0, 0, "start"), "start"),
        (at("data"), "step 12, data"),
    ],
    ids=["in a collective", "after one", "before the first step", "elsewhere"],
)
def test_where_a_dead_rank_was_seen(last: Entry, words: str) -> None:
    lines = explain({3: record_of(3, last)}, FOUR, endings(F, F, F, G))
    assert (
        lines[0] == f"rank 3 died without an error message (killed, or out of memory); last seen in {words}"
    )


def test_a_rank_that_dies_in_a_collective_is_what_its_peers_there_wait_for() -> None:
    records = {0: record_of(0, rows()), 1: record_of(1, rows())}
    assert explain(records, Layout(2, ep=2), endings(F, G))[1] == (
        "rank 0 waited for it in step 12, backward, layer 3, all-to-all of rows (ep group 0, 1)"
    )


def test_waiting_for_a_rank_that_waits_for_the_missing_one_is_waiting_for_it() -> None:
    layout = Layout(4, tp=2, ep=2)
    third = collective("all-reduce", "dp", n=12, ep=4)
    third = replace(third, entered=(4, 0, 1, 0, 2))
    records = {1: record_of(1, at("backward")), 2: record_of(2, rows()), 3: record_of(3, third)}
    assert explain(records, layout, endings(D, G, F, F))[1:] == [
        "rank 2 waited for it in step 12, backward, layer 3, all-to-all of rows (ep group 2, 3)",
        "rank 3 waited for it in step 12, backward, all-reduce (dp group 1, 3)",
    ]


def test_ranks_that_died_before_they_had_a_flight_record() -> None:
    records = {rank: record_of(rank, Entry(1, 0.0, 0, "start")) for rank in (0, 1)}
    assert explain(records, FOUR, endings(F, T, G, G)) == [
        "ranks 2, 3 died without an error message (killed, or out of memory); had not started",
        "rank 0 lost contact in start",
        "rank 1 got to start",
    ]


def test_a_stopped_rank_is_named_not_those_that_timed_out() -> None:
    waiting = {rank: record_of(rank, at("backward"), rows(layer=0)) for rank in (0, 2, 3)}
    records = {**waiting, 1: record_of(1, at("forward", n=9))}
    assert explain(records, FOUR, endings(F, S, F, F)) == [
        "rank 1 hung (stopped, or stuck in the system) and had to be killed; last seen in step 12, forward",
        "rank 0 waited for it in step 12, backward, layer 0, all-to-all of rows (ep group 0, 1)",
        "ranks 2, 3 waited in step 12, backward, layer 0, all-to-all of rows (ep group 2, 3)",
    ]


def test_a_rank_busy_in_python_is_found_through_the_ranks_that_wait_for_it() -> None:
    total = collective("all-reduce", "world", n=14, ep=6, world=3)
    records = {
        0: record_of(0, rows()),
        1: record_of(1, at("data")),
        2: record_of(2, total),
        3: record_of(3, total),
    }
    first, *others = explain(records, FOUR, endings(F, T, F, F))
    assert first == (
        "rank 1 did not take part; rank-00001.stack shows what it was doing; last seen in step 12, data"
    )
    assert all(" waited for it in " in line for line in others)


def test_if_no_flight_record_has_the_collective_the_least_advanced_rank_is_named() -> None:
    records = {rank: record_of(rank, at("optimizer step", n=12)) for rank in (0, 2, 3)}
    records[1] = record_of(1, at("backward", n=11))
    lines = explain(records, FOUR, endings(F, T, F, F))
    assert lines[0].startswith("rank 1 did not take part")
    assert lines[1:] == ["ranks 0, 2, 3 lost contact in step 12, optimizer step"]
    records[1] = record_of(1, at("optimizer step", n=12))
    lines = explain(records, FOUR, endings(F, T, F, F))
    assert lines[0].startswith("rank 1 did not take part"), "it had to be terminated, the others noticed"


def test_row_counts_that_do_not_match_are_reported() -> None:
    records = {
        0: record_of(0, rows(sent=[2, 5], received=[2, 4])),
        1: record_of(1, rows(sent=[4, 1], received=[3, 1])),
        2: record_of(2, rows(sent=[1, 1], received=[1, 1])),
        3: record_of(3, rows(sent=[1, 1], received=[1, 1])),
    }
    where = "step 12, backward, layer 3, all-to-all of rows (ep group 0, 1)"
    lines = explain(records, FOUR, endings(F, F, F, F))
    assert lines[0] == f"rank 0 sends 5 rows to rank 1, which expects 3 ({where})"
    assert lines[1] == f"ranks 0, 1 waited in {where}"
    # A rank that finished the collective does not hide the mismatch.
    records[1] = record_of(1, rows(sent=[4, 1], received=[3, 1], state=DONE), at("forward", n=12, ep=5))
    assert explain(records, FOUR, endings(F, F, F, F))[0] == lines[0]


def test_many_wrong_row_counts_are_summarised() -> None:
    layout = Layout(6, ep=6)
    records = {rank: record_of(rank, rows(sent=[1] * 6, received=[2] * 6)) for rank in range(6)}
    lines = explain(records, layout, dict.fromkeys(range(6), F))
    assert lines[0].startswith("rank 0 sends 1 rows to rank 1, which expects 2 (step 12")
    assert lines[4] == "and 32 more such pairs of ranks"


def test_ranks_in_different_collectives_are_reported() -> None:
    records = {
        0: record_of(0, rows(layer=3)),
        1: record_of(1, collective("all-gather of counts", "ep", layer=4, ep=5)),
        2: record_of(2, rows()),
        3: record_of(3, rows()),
    }
    assert explain(records, FOUR, endings(F, F, F, F))[0] == (
        "ranks of one group are in different collectives: "
        "rank 0 in step 12, backward, layer 3, all-to-all of rows (ep group 0, 1); "
        "rank 1 in step 12, backward, layer 4, all-gather of counts (ep group 0, 1)"
    )


def test_ranks_that_wait_for_one_another_are_reported() -> None:
    records = {
        0: record_of(0, rows(ep=5, world=2)),
        1: record_of(1, collective("all-reduce", "world", ep=4, world=3)),
        2: record_of(2, collective("all-reduce", "world", ep=5, world=3)),
        3: record_of(3, collective("all-reduce", "world", ep=5, world=3)),
    }
    assert explain(records, FOUR, endings(F, F, F, F)) == [
        "ranks wait for one another:",
        "rank 0 waited in step 12, backward, layer 3, all-to-all of rows (ep group 0, 1)",
        "ranks 1, 2, 3 waited in step 12, backward, all-reduce (all ranks)",
    ]


def test_nobody_is_blamed_where_all_is_well() -> None:
    done = {rank: record_of(rank, at("ended")) for rank in range(4)}
    assert explain(done, FOUR, endings(D, D, D, D)) == []
    alike = {rank: record_of(rank, rows(sent=[1, 1], received=[1, 1])) for rank in range(4)}
    assert explain(alike, FOUR, endings(F, F, F, F)) == []
    apart = {rank: record_of(rank, at("forward", n=10 + rank)) for rank in range(4)}
    assert explain(apart, FOUR, endings(T, T, T, T)) == [], "no rank failed"
