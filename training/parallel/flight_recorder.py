"""What each rank is doing, in a small file that outlives it: RUN/logs/attempt-00001/rank-00001.ledger.

The file is mapped into memory, so an entry costs no system call, anybody may read it at any time, and the
last entry is there even if the rank was killed or stopped in the middle of it. training/parallel/hang_report.py makes
sense of the ledgers of all ranks.
"""

import mmap
import os
import struct
import time
import zlib
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from turnout.training.parallel.layout import Layout

GROUPS = ("ep", "tp", "dp", "edp", "world")
N_ENTRIES = 16
MAX_COUNTS = 128  # row counts kept per direction; larger groups are cut, and the entry says so

AT, WAITING, DONE = range(3)
ENDED = "ended"  # the phase of a rank that has nothing left to do

_MAGIC = b"turnout1"
_FILE = struct.Struct("<8sIIIIQ")  # magic, rank, world_size, tp, ep, pid
_FILE_BYTES = 64
# CRC32 of the body, then the state. The state is not under the checksum: one byte cannot be torn, so a
# collective that is done needs no second entry.
_HEAD = struct.Struct("<IB3x")
# n (of this rank's entries), time, step, collectives entered so far in each of GROUPS, layer, sizes of sent
# and received, group, phase, operation
_BODY = struct.Struct("<Qdq5IiHHb24s48s")
_ENTRY_BYTES = 1280
_COUNTS = [struct.Struct(f"<{n}i") for n in range(MAX_COUNTS + 1)]
assert _HEAD.size + _BODY.size + 2 * _COUNTS[-1].size <= _ENTRY_BYTES


@dataclass(frozen=True)
class Entry:
    """One line of a ledger.

    n         counts the rank's entries; ranks that run the same program make the same ones in the same order
    entered   how many collectives the rank has entered in each of GROUPS, this one included
    layer, group, operation   None for a mere change of phase
    sent, received    row counts by the group's ranks, at most MAX_COUNTS of them
    n_sent, n_received   how many there were before that cut
    """

    n: int
    time_s: float
    step: int
    phase: str
    state: int = AT
    entered: tuple[int, ...] = (0,) * len(GROUPS)
    layer: int | None = None
    group: str | None = None
    operation: str | None = None
    sent: tuple[int, ...] = ()
    received: tuple[int, ...] = ()
    n_sent: int = 0
    n_received: int = 0

    @property
    def index(self) -> int:
        """Which collective of its group this is, counted from 1: the same number on all its ranks."""
        assert self.group is not None
        return self.n_entered(self.group)

    def n_entered(self, group: str) -> int:
        return self.entered[GROUPS.index(group)]

    @property
    def is_waiting(self) -> bool:
        return self.state == WAITING


@dataclass(frozen=True)
class FlightRecord:
    """A ledger as it was read. entries: the last ones, oldest first; none if it was killed at its start."""

    rank: int
    pid: int
    entries: tuple[Entry, ...]

    @property
    def current(self) -> Entry | None:
        return self.entries[-1] if self.entries else None

    @property
    def has_ended(self) -> bool:
        return self.current is not None and self.current.phase == ENDED

    def collective(self, group: str, index: int) -> Entry | None:
        """Return the entry of one collective, where it is among the last ones."""
        return next((e for e in self.entries if e.group == group and e.index == index), None)


class NullRecorder:
    """Takes the same calls and keeps nothing: for tests, and for what runs apart from a run."""

    def enter_phase(self, step: int, phase: str) -> None:
        """Note that this rank begins a phase of a step."""

    def collective(
        self,
        operation: str,
        group: str,
        *,
        layer: int | None = None,
        sent: Sequence[int] = (),
        received: Sequence[int] = (),
    ) -> AbstractContextManager[None]:
        """Note a collective over one of this rank's groups; the body of the context takes part in it.

        sent, received: rows to and from each rank of the group. After an exception the entry stays as it is,
        waiting, which is what the others want to know.
        """
        return nullcontext()


class FlightRecorder(NullRecorder):
    """One rank's ledger. One thread at a time may use it."""

    def __init__(self, path: Path, layout: Layout, rank: int) -> None:
        with path.open("w+b") as file:
            # Written out, not truncated to size: storing to a hole of a full disk would be a bus error.
            file.write(bytes(_FILE_BYTES + N_ENTRIES * _ENTRY_BYTES))
            file.flush()
            self._map = mmap.mmap(file.fileno(), 0)
        _FILE.pack_into(self._map, 0, _MAGIC, rank, layout.world_size, layout.tp, layout.ep, os.getpid())
        self._n, self._step, self._phase = 0, 0, b""
        self._entered = [0] * len(GROUPS)
        self.enter_phase(0, "start")

    def enter_phase(self, step: int, phase: str) -> None:
        self._step, self._phase = step, phase.encode()
        self._write(AT, -1, -1, b"", (), ())

    def collective(
        self,
        operation: str,
        group: str,
        *,
        layer: int | None = None,
        sent: Sequence[int] = (),
        received: Sequence[int] = (),
    ) -> AbstractContextManager[None]:
        return _Waiting(self, operation, group, -1 if layer is None else layer, sent, received)

    def _write(
        self,
        state: int,
        layer: int,
        group: int,
        operation: bytes,
        sent: Sequence[int],
        received: Sequence[int],
    ) -> int:
        """Write one entry over the oldest; return its number."""
        n = self._n = self._n + 1
        body = _BODY.pack(
            n,
            time.time(),
            self._step,
            *self._entered,
            layer,
            len(sent),
            len(received),
            group,
            self._phase,
            operation,
        )
        if sent or received:
            kept_sent, kept_received = sent[:MAX_COUNTS], received[:MAX_COUNTS]
            body += _COUNTS[len(kept_sent)].pack(*kept_sent) + _COUNTS[len(kept_received)].pack(
                *kept_received
            )
        start = _FILE_BYTES + n % N_ENTRIES * _ENTRY_BYTES
        _HEAD.pack_into(self._map, start, zlib.crc32(body), state)
        start += _HEAD.size
        self._map[start : start + len(body)] = body
        return n

    def _enter(
        self, operation: str, group: str, layer: int, sent: Sequence[int], received: Sequence[int]
    ) -> int:
        i = GROUPS.index(group)
        self._entered[i] += 1
        return self._write(WAITING, layer, i, operation.encode(), sent, received)

    def _leave(self, n: int) -> None:
        if self._n - n < N_ENTRIES:  # else it has been written over
            self._map[_FILE_BYTES + n % N_ENTRIES * _ENTRY_BYTES + 4] = DONE


class _Waiting(AbstractContextManager[None]):
    __slots__ = ("_call", "_recorder", "_n")

    def __init__(self, recorder: FlightRecorder, *call: object) -> None:
        self._recorder, self._call = recorder, call

    def __enter__(self) -> None:
        self._n = self._recorder._enter(*self._call)  # type: ignore[arg-type]

    def __exit__(
        self,
        kind: type[BaseException] | None,
        err: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if kind is None:
            self._recorder._leave(self._n)


def read_flight_record(path: Path) -> FlightRecord:
    """Read a ledger, also one that is being written. Entries caught half-written are left out.

    Raises ValueError where the file is no ledger; a rank killed while it made one leaves such a file.
    """
    data = path.read_bytes()
    if len(data) != _FILE_BYTES + N_ENTRIES * _ENTRY_BYTES or not data.startswith(_MAGIC):
        raise ValueError(f"{path} is not a flight record")
    _, rank, _, _, _, pid = _FILE.unpack_from(data)
    found = [_read_entry(data, _FILE_BYTES + i * _ENTRY_BYTES) for i in range(N_ENTRIES)]
    entries = sorted((e for e in found if e is not None), key=lambda e: e.n)
    return FlightRecord(rank, pid, tuple(entries))


def _read_entry(data: bytes, start: int) -> Entry | None:
    crc, state = _HEAD.unpack_from(data, start)
    start += _HEAD.size
    n, time_s, step, *rest = _BODY.unpack_from(data, start)
    entered, (layer, n_sent, n_received, group, phase, operation) = rest[: len(GROUPS)], rest[len(GROUPS) :]
    sent, received = _COUNTS[min(n_sent, MAX_COUNTS)], _COUNTS[min(n_received, MAX_COUNTS)]
    end = start + _BODY.size + sent.size + received.size
    if n == 0 or zlib.crc32(data[start:end]) != crc:
        return None
    return Entry(
        n=n,
        time_s=time_s,
        step=step,
        phase=_text(phase),
        state=state,
        entered=tuple(entered),
        layer=None if layer < 0 else layer,
        group=None if group < 0 else GROUPS[group],
        operation=_text(operation) or None,
        sent=sent.unpack_from(data, start + _BODY.size),
        received=received.unpack_from(data, start + _BODY.size + sent.size),
        n_sent=n_sent,
        n_received=n_received,
    )


def _text(padded: bytes) -> str:
    return padded.rstrip(b"\0").decode(errors="replace")
