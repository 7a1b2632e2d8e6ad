"""The flight recorder: each rank's last actions, in a small file that outlives the rank.

The file is RUN/logs/attempt-00001/rank-00001.flight. It is mapped into memory, so that an entry needs no
system call, other processes can read it at any time, and the last entry survives when the rank is killed or
stopped. training/parallel/hang_report.py interprets the flight records of all ranks.
"""

import mmap
import os
import struct
import time
import zlib
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Protocol

from turnout.moe.parallel.record import Record, no_record
from turnout.training.parallel.layout import Layout

GROUPS = ("ep", "tp", "dp", "edp", "world")
N_ENTRIES = 16
MAX_COUNTS = 128  # row counts kept per direction; in larger groups the rest is cut, and n_sent shows it

IN_PHASE, WAITING, DONE = range(3)
ENDED = "ended"  # the phase of a rank that has finished its work

_MAGIC = b"turnout1"
_FILE = struct.Struct("<8sIIIIQ")  # magic, rank, world_size, tp, ep, pid
_FILE_BYTES = 64
# CRC32 of the body, then the state. The checksum does not cover the state: one byte is written atomically, so
# a finished collective needs no second entry.
_HEAD = struct.Struct("<IB3x")
# n, time_s, step, entered, layer, n_sent, n_received, group, phase, operation: see Entry
_BODY = struct.Struct("<Qdq5IiHHb24s48s")
_ENTRY_BYTES = 1280
_COUNTS = [struct.Struct(f"<{n}i") for n in range(MAX_COUNTS + 1)]
assert _HEAD.size + _BODY.size + 2 * _COUNTS[-1].size <= _ENTRY_BYTES


@dataclass(frozen=True)
class Entry:
    """One entry of a flight record: the start of a phase, or a collective.

    n         number of this entry, from 1; all ranks make the same entries in the same order
    time_s    Unix time
    entered   collectives that the rank has entered in each of GROUPS, this one included
    layer, group, operation   of the collective; None for the start of a phase
    sent, received            row counts by rank of the group, at most MAX_COUNTS
    n_sent, n_received        how many row counts there were before the cut
    """

    n: int
    time_s: float
    step: int
    phase: str
    state: int = IN_PHASE
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
        """Number of this collective within its group, from 1: the same on all ranks of the group."""
        assert self.group is not None
        return self.n_entered(self.group)

    def n_entered(self, group: str) -> int:
        """Return how many collectives of a group the rank has entered."""
        return self.entered[GROUPS.index(group)]

    @property
    def is_waiting(self) -> bool:
        return self.state == WAITING


@dataclass(frozen=True)
class FlightRecord:
    """One rank's flight record. entries: the last ones, oldest first; empty if the rank died at its start."""

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
        """Return the entry of one collective, or None if it is not among the last ones."""
        return next((e for e in self.entries if e.group == group and e.index == index), None)


class Recorder(Protocol):
    """Records what a rank does."""

    def enter_phase(self, step: int, phase: str) -> None:
        """Record that this rank begins a phase of a step."""

    @property
    def collective(self) -> Record:
        """Record a collective over one of this rank's groups, which runs in the body of the context.

        If the body raises an exception, the entry remains WAITING, as the hang report needs it.
        """
        ...


class NullRecorder:
    """Records nothing: for tests, and for groups outside a run."""

    collective = staticmethod(no_record)

    def enter_phase(self, step: int, phase: str) -> None:
        pass


class FlightRecorder:
    """Writes one rank's flight record. Not thread-safe."""

    def __init__(self, path: Path, layout: Layout, rank: int) -> None:
        with path.open("w+b") as file:
            # Zeros are written, because storing to a hole of a sparse file is a bus error if the disk is
            # full.
            file.write(bytes(_FILE_BYTES + N_ENTRIES * _ENTRY_BYTES))
            file.flush()
            self._map = mmap.mmap(file.fileno(), 0)
        _FILE.pack_into(self._map, 0, _MAGIC, rank, layout.world_size, layout.tp, layout.ep, os.getpid())
        self._n, self._step, self._phase = 0, 0, b""
        self._entered = [0] * len(GROUPS)
        self.enter_phase(0, "start")

    def enter_phase(self, step: int, phase: str) -> None:
        self._step, self._phase = step, phase.encode()
        self._write(IN_PHASE, -1, -1, b"", (), ())

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
        """Overwrite the oldest entry with a new one; return its number."""
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
        if self._n - n < N_ENTRIES:  # otherwise it has been overwritten
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
    """Read a flight record, even while it is being written. Half-written entries are left out.

    Raises ValueError if the file is no flight record, such as one left by a rank killed while creating it.
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
