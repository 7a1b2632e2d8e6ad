"""Who is missing, and where the others waited for it: one explanation out of the ledgers of all ranks.

Pure: it reads nothing and knows no process. Ranks that run the same program make the same entries in the same
order, so a rank that has entered fewer collectives of a group than its peers is the one they wait for.
"""

from collections.abc import Iterator, Mapping
from enum import Enum
from itertools import permutations

from turnout.training.parallel.flight_recorder import MAX_COUNTS, Entry, FlightRecord
from turnout.training.parallel.layout import Layout, name_ranks

INT32_ELEMENTS = 8  # lines about where the others waited
MAX_ROW_MISMATCHES = 4


class Ending(Enum):
    """How a rank ended, seen from outside."""

    DONE = "it had nothing left to do"
    FAILED = "it raised an error, be it only that it lost contact with another"
    TOLD = "it was told to end when another had failed, and did"
    GONE = "it ended without a word"
    STUCK = "it was told to end, did not, and was killed"


Views = Mapping[int, FlightRecord]
Waits = dict[int, set[int]]


def explain(views: Views, layout: Layout, endings: Mapping[int, Ending]) -> list[str]:
    """Return lines that say which ranks were missing, where the others were, and whose row counts disagree.

    views     of the ranks that have a ledger; the others had not started
    endings   of all ranks
    Empty where the ledgers blame nobody.
    """
    lost = [r for r, ending in sorted(endings.items()) if ending in (Ending.GONE, Ending.STUCK)]
    waits = _waits(views, layout, lost)
    disagreements = _disagreements(views, layout)
    missing = lost or _roots(waits)
    if any(waits.values()) and not missing:
        disagreements.append("ranks wait for one another:")
    if not missing and not disagreements:
        missing = _behind(views, endings)
    if not missing and not disagreements:
        return []
    lines = _name_missing(missing, views, layout, endings)
    return lines + disagreements + _places(views, layout, endings, waits, missing)


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


def _waits(views: Views, layout: Layout, lost: list[int]) -> Waits:
    """Return, for each rank that waits in a collective, its peers that have not entered it.

    A lost peer is waited for in the collective in which it was lost, too.
    """
    waits: Waits = {}
    for rank, view in views.items():
        entry = view.current
        if entry is None or not entry.is_waiting or entry.group is None:
            continue
        peers = [r for r in group_of(layout, entry.group, rank) if r != rank]
        waits[rank] = {r for r in peers if _n_entered(views, r, entry.group) < entry.index + (r in lost)}
    return waits


def _n_entered(views: Views, rank: int, group: str) -> int:
    entry = views[rank].current if rank in views else None
    return entry.n_entered(group) if entry else 0


def _roots(waits: Waits) -> list[int]:
    """Return the ranks that others wait for and that wait for nobody."""
    awaited = set().union(*waits.values()) if waits else set()
    return sorted(rank for rank in awaited if not waits.get(rank))


def _behind(views: Views, endings: Mapping[int, Ending]) -> list[int]:
    """Return the ranks that did least, where collectives that no ledger knows leave nothing better to go by.

    Where all did the same: those that had to be told to end, while others had failed by themselves.
    """
    if Ending.FAILED not in endings.values():
        return []
    progress = {rank: (view.current.step, view.current.n) for rank, view in views.items() if view.current}
    least = min(progress.values(), default=(0, 0))
    if any(p > least for p in progress.values()):
        return sorted(rank for rank, p in progress.items() if p == least)
    return sorted(rank for rank, ending in endings.items() if ending == Ending.TOLD)


def _name_missing(
    missing: list[int], views: Views, layout: Layout, endings: Mapping[int, Ending]
) -> list[str]:
    """Say what became of each missing rank and where it was, in one line for those that are alike."""
    ranks_of: dict[str, list[int]] = {}
    for rank in missing:
        what = {
            Ending.GONE: "ended without a word (killed, or out of memory)",
            Ending.STUCK: "hung (stopped, or stuck in the system) and had to be killed",
            Ending.TOLD: f"did not take part; rank-{rank:05d}.stack shows what it was doing",
        }.get(endings[rank], "did not take part")
        entry = views[rank].current if rank in views else None
        if entry is None:
            where = "had not started"
        else:
            where = (
                f"last seen in {_place(entry, layout, rank, 'waiting in ' if entry.is_waiting else 'after ')}"
            )
        ranks_of.setdefault(f"{what}; {where}", []).append(rank)
    return [f"{name_ranks(ranks)} {words}" for words, ranks in ranks_of.items()]


def _place(entry: Entry, layout: Layout, rank: int, moment: str = "") -> str:
    """Say where an entry is: step 12, backward, layer 3, all-to-all of rows (ep group 0, 1).

    moment comes before the collective, where there is one.
    """
    where = f"step {entry.step}, {entry.phase}" if entry.step else entry.phase
    if entry.group is None:
        return where
    layer = "" if entry.layer is None else f"layer {entry.layer}, "
    ranks = name_ranks(group_of(layout, entry.group, rank)).split(" ", 1)[1]
    group = "all ranks" if entry.group == "world" else f"{entry.group} group {ranks}"
    return f"{where}, {moment}{layer}{entry.operation} ({group})"


def _places(
    views: Views, layout: Layout, endings: Mapping[int, Ending], waits: Waits, missing: list[int]
) -> list[str]:
    """Say where the ranks that are not missing were, one line for each place."""
    them = "it" if len(missing) == 1 else "them"
    ranks_at: dict[str, list[int]] = {}
    for rank, view in sorted(views.items()):
        entry = view.current
        if rank in missing or entry is None or view.has_ended:
            continue
        if entry.is_waiting:
            did = f"waited for {them} in" if _leads_to(waits, rank, set(missing)) else "waited in"
        else:
            did = "lost contact in" if endings.get(rank) == Ending.FAILED else "got to"
        place = _place(entry, layout, rank, "" if entry.is_waiting else "after ")
        ranks_at.setdefault(f"{did} {place}", []).append(rank)
    lines = [f"{name_ranks(ranks)} {place}" for place, ranks in ranks_at.items()]
    if len(lines) > INT32_ELEMENTS:
        lines[INT32_ELEMENTS:] = [f"and other ranks in {len(lines) - INT32_ELEMENTS} more places"]
    return lines


def _leads_to(waits: Waits, rank: int, goals: set[int]) -> bool:
    """Whether a rank waits for one of the goals, be it through others."""
    reached: set[int] = set()
    ahead = waits.get(rank, set())
    while ahead - reached:
        reached |= ahead
        ahead = set().union(*(waits.get(r, set()) for r in ahead))
    return bool(reached & goals)


def _disagreements(views: Views, layout: Layout) -> list[str]:
    """Say where ranks of one group are in different collectives, or disagree on the rows between them."""
    waiting = {
        (e.group, e.index, tuple(group_of(layout, e.group, rank)))
        for rank, view in views.items()
        if (e := view.current) is not None and e.is_waiting and e.group is not None
    }
    lines: list[str] = []
    for group, index, ranks in sorted(waiting):
        found = {r: e for r in ranks if r in views and (e := views[r].collective(group, index)) is not None}
        if len({(e.step, e.phase, e.layer, e.operation) for e in found.values()}) > 1:
            places = [f"rank {r} in {_place(e, layout, r)}" for r, e in found.items()]
            lines.append(
                f"ranks of one group are in different collectives: {'; '.join(places[:INT32_ELEMENTS])}"
            )
        else:
            lines += _row_mismatches(found, ranks, layout)
    return lines


def _row_mismatches(found: dict[int, Entry], ranks: tuple[int, ...], layout: Layout) -> Iterator[str]:
    """Compare what each rank of one collective sends to each other with what that one expects."""
    places = {rank: i for i, rank in enumerate(ranks)}
    wrong = []
    for sender, receiver in [*permutations(found, 2), *((r, r) for r in found)]:
        sent, received = found[sender].sent, found[receiver].received
        to, source = places[receiver], places[sender]
        if to < len(sent) and source < len(received) and sent[to] != received[source]:
            wrong.append(
                f"rank {sender} sends {sent[to]} rows to rank {receiver}, which expects {received[source]}"
            )
    for line in wrong[:MAX_ROW_MISMATCHES]:
        yield f"{line} ({_place(next(iter(found.values())), layout, ranks[0])})"
    if len(wrong) > MAX_ROW_MISMATCHES:
        yield f"and {len(wrong) - MAX_ROW_MISMATCHES} more such pairs of ranks"
    if wrong and any(len(e.sent) < e.n_sent for e in found.values()):
        yield f"row counts beyond the first {MAX_COUNTS} ranks of the group were not kept"
