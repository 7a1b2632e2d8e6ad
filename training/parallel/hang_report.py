"""The hang report: which ranks are missing, and where the others waited for them, from all flight records.

Pure: it reads no files and knows no processes. Ranks that run the same program make the same entries in the
same order, so a rank that has entered fewer collectives of a group than its peers is the one they wait for.
"""

from collections.abc import Iterator, Mapping
from enum import Enum
from itertools import permutations

from turnout.training.parallel.flight_recorder import MAX_COUNTS, Entry, FlightRecord
from turnout.training.parallel.layout import Layout, name_ranks

MAX_LINES = 8  # about ranks that are not missing
MAX_ROW_MISMATCHES = 4


class RankEnding(Enum):
    """How a rank ended, as seen from outside."""

    DONE = "finished its work"
    FAILED = "raised an error, possibly only because it lost contact with a peer"
    TERMINATED = "was asked to end after another rank had failed, and ended"
    DIED = "ended without an error message"
    STUCK = "was asked to end, did not, and was killed"


Records = Mapping[int, FlightRecord]
Waits = dict[int, set[int]]


def explain(records: Records, layout: Layout, endings: Mapping[int, RankEnding]) -> list[str]:
    """Return lines that name the missing ranks, where the others were, and ranks whose row counts disagree.

    records   of the ranks that have a flight record; the others had not started
    endings   of all ranks
    Empty if the flight records show no rank to blame.
    """
    lost = [r for r, ending in sorted(endings.items()) if ending in (RankEnding.DIED, RankEnding.STUCK)]
    waits = _waits(records, layout, lost)
    disagreements = _disagreements(records, layout)
    missing = lost or _roots(waits)
    if any(waits.values()) and not missing:
        disagreements.append("ranks wait for one another:")
    if not missing and not disagreements:
        missing = _least_advanced(records, endings)
    if not missing and not disagreements:
        return []
    lines = _describe_missing(missing, records, layout, endings)
    return lines + disagreements + _describe_others(records, layout, endings, waits, missing)


def group_of(layout: Layout, group: str, rank: int) -> list[int]:
    """Return the ranks of the group of this kind to which a rank belongs."""
    if group == "world":
        return list(range(layout.world_size))
    groups = {
        "ep": layout.ep_groups,
        "tp": layout.tp_groups,
        "dp": layout.dp_groups,
        "edp": layout.edp_groups,
    }
    return next(ranks for ranks in groups[group]() if rank in ranks)


def _waits(records: Records, layout: Layout, lost: list[int]) -> Waits:
    """Return, for each rank that waits in a collective, its peers that have not entered it.

    A lost peer also counts as not entered in the collective in which it was lost.
    """
    waits: Waits = {}
    for rank, record in records.items():
        entry = record.current
        if entry is None or not entry.is_waiting or entry.group is None:
            continue
        peers = [r for r in group_of(layout, entry.group, rank) if r != rank]
        waits[rank] = {r for r in peers if _n_entered(records, r, entry.group) < entry.index + (r in lost)}
    return waits


def _n_entered(records: Records, rank: int, group: str) -> int:
    entry = records[rank].current if rank in records else None
    return entry.n_entered(group) if entry else 0


def _roots(waits: Waits) -> list[int]:
    """Return the ranks that others wait for and that do not wait themselves."""
    awaited = set().union(*waits.values()) if waits else set()
    return sorted(rank for rank in awaited if not waits.get(rank))


def _least_advanced(records: Records, endings: Mapping[int, RankEnding]) -> list[int]:
    """Return the ranks that got least far, for a hang in a collective that flight records do not contain.

    If all got equally far, return those that had to be terminated while others failed by themselves.
    """
    if RankEnding.FAILED not in endings.values():
        return []
    progress = {
        rank: (record.current.step, record.current.n) for rank, record in records.items() if record.current
    }
    least = min(progress.values(), default=(0, 0))
    if any(p > least for p in progress.values()):
        return sorted(rank for rank, p in progress.items() if p == least)
    return sorted(rank for rank, ending in endings.items() if ending == RankEnding.TERMINATED)


def _describe_missing(
    missing: list[int], records: Records, layout: Layout, endings: Mapping[int, RankEnding]
) -> list[str]:
    """Return one line for each group of missing ranks that ended alike: what happened to them, and where."""
    ranks_of: dict[str, list[int]] = {}
    for rank in missing:
        fate = {
            RankEnding.DIED: "died without an error message (killed, or out of memory)",
            RankEnding.STUCK: "hung (stopped, or stuck in the system) and had to be killed",
            RankEnding.TERMINATED: f"did not take part; rank-{rank:05d}.stack shows what it was doing",
        }.get(endings[rank], "did not take part")
        entry = records[rank].current if rank in records else None
        if entry is None:
            where = "had not started"
        else:
            moment = "waiting in " if entry.is_waiting else "after "
            where = f"last seen in {_locate(entry, layout, rank, moment)}"
        ranks_of.setdefault(f"{fate}; {where}", []).append(rank)
    return [f"{name_ranks(ranks)} {words}" for words, ranks in ranks_of.items()]


def _locate(entry: Entry, layout: Layout, rank: int, moment: str = "") -> str:
    """Return where an entry was made: step 12, backward, layer 3, all-to-all of rows (ep group 0, 1).

    moment is put before the collective, if there is one.
    """
    where = f"step {entry.step}, {entry.phase}" if entry.step else entry.phase
    if entry.group is None:
        return where
    layer = "" if entry.layer is None else f"layer {entry.layer}, "
    ranks = name_ranks(group_of(layout, entry.group, rank)).split(" ", 1)[1]
    group = "all ranks" if entry.group == "world" else f"{entry.group} group {ranks}"
    return f"{where}, {moment}{layer}{entry.operation} ({group})"


def _describe_others(
    records: Records, layout: Layout, endings: Mapping[int, RankEnding], waits: Waits, missing: list[int]
) -> list[str]:
    """Return where the ranks that are not missing were, one line for each location."""
    them = "it" if len(missing) == 1 else "them"
    ranks_at: dict[str, list[int]] = {}
    for rank, record in sorted(records.items()):
        entry = record.current
        if rank in missing or entry is None or record.has_ended:
            continue
        if entry.is_waiting:
            did = f"waited for {them} in" if _leads_to(waits, rank, set(missing)) else "waited in"
        else:
            did = "lost contact in" if endings.get(rank) == RankEnding.FAILED else "got to"
        where = _locate(entry, layout, rank, "" if entry.is_waiting else "after ")
        ranks_at.setdefault(f"{did} {where}", []).append(rank)
    lines = [f"{name_ranks(ranks)} {words}" for words, ranks in ranks_at.items()]
    if len(lines) > MAX_LINES:
        lines[MAX_LINES:] = [f"and other ranks in {len(lines) - MAX_LINES} more places"]
    return lines


def _leads_to(waits: Waits, rank: int, goals: set[int]) -> bool:
    """Return whether a rank waits for one of the goals, directly or through other ranks."""
    reached: set[int] = set()
    ahead = waits.get(rank, set())
    while ahead - reached:
        reached |= ahead
        ahead = set().union(*(waits.get(r, set()) for r in ahead))
    return bool(reached & goals)


def _disagreements(records: Records, layout: Layout) -> list[str]:
    """Return where ranks of one group are in different collectives, or disagree on the rows they exchange."""
    waiting = {
        (e.group, e.index, tuple(group_of(layout, e.group, rank)))
        for rank, record in records.items()
        if (e := record.current) is not None and e.is_waiting and e.group is not None
    }
    lines: list[str] = []
    for group, index, ranks in sorted(waiting):
        found = {
            r: e for r in ranks if r in records and (e := records[r].collective(group, index)) is not None
        }
        if len({(e.step, e.phase, e.layer, e.operation) for e in found.values()}) > 1:
            locations = [f"rank {r} in {_locate(e, layout, r)}" for r, e in found.items()]
            lines.append(
                f"ranks of one group are in different collectives: {'; '.join(locations[:MAX_LINES])}"
            )
        else:
            lines += _row_mismatches(found, ranks, layout)
    return lines


def _row_mismatches(found: dict[int, Entry], ranks: tuple[int, ...], layout: Layout) -> Iterator[str]:
    """Compare the rows that each rank of one collective sends to each other with those the other expects."""
    group_ranks = {rank: i for i, rank in enumerate(ranks)}
    wrong = []
    for sender, receiver in [*permutations(found, 2), *((r, r) for r in found)]:
        sent, received = found[sender].sent, found[receiver].received
        to, source = group_ranks[receiver], group_ranks[sender]
        if to < len(sent) and source < len(received) and sent[to] != received[source]:
            wrong.append(
                f"rank {sender} sends {sent[to]} rows to rank {receiver}, which expects {received[source]}"
            )
    for line in wrong[:MAX_ROW_MISMATCHES]:
        yield f"{line} ({_locate(next(iter(found.values())), layout, ranks[0])})"
    if len(wrong) > MAX_ROW_MISMATCHES:
        yield f"and {len(wrong) - MAX_ROW_MISMATCHES} more such pairs of ranks"
    if wrong and any(len(e.sent) < e.n_sent for e in found.values()):
        yield f"row counts beyond the first {MAX_COUNTS} ranks of the group were not kept"
