"""Start the ranks of this node through DeepSpeed's per-node launcher, and watch them until they have ended.

A failure of any rank on any node ends the ranks of this one. failures.py explains why they ended.
"""

import base64
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType

from rich.console import Console

from turnout.launch.devices import count_gpus
from turnout.launch.exit_codes import DONE
from turnout.launch.ranks.attempt_dir import END_SIGNAL, FAILURE_FILES, read_flight_records
from turnout.training.run_control import FencingToken, ask_to_stop

# glibc returns blocks above 128 KiB to the system as soon as they are freed, so each activation of each layer
# is page-faulted again. Keeping freed blocks makes a CPU step 1.7 times as fast (LOG.md).
CPU_ALLOCATOR = {
    "MALLOC_MMAP_THRESHOLD_": str(2**32),
    "MALLOC_TRIM_THRESHOLD_": str(2**33),
    "MALLOC_TOP_PAD_": str(2**28),
    "THP_MEM_ALLOC_ENABLE": "1",
}
# How many rounds libgomp's idle threads spin before they sleep, in ranks on CPUs and in every command. With
# its default of 300,000, spinning threads hold the cores that the thread they wait for needs as soon as
# another process uses a core: a step then takes 14 times as long. Without any spinning, an undisturbed step
# takes a third longer (LOG.md).
SHORT_SPIN = {"GOMP_SPINCOUNT": "5000"}

POLL_S = 0.5
# Seconds after the first failure: until then the other ranks may notice it by themselves; at END_S they are
# sent END_SIGNAL, and at KILL_S they are killed. DeepSpeed's launcher ends them, too, but one after the
# other, so that two hanging ranks would take a minute.
END_S, KILL_S = 2, 10
# How often the fencing token is checked.
FENCING_CHECK_S = 2


@dataclass(frozen=True)
class NodePlan:
    """One node's part of an attempt: nproc ranks on each node, numbered node by node.

    master_addr, master_port: where the first rank listens. has_gpus: each rank has a GPU of its own.
    """

    nodes: tuple[str, ...]
    node_rank: int
    nproc: int
    master_addr: str
    master_port: int
    has_gpus: bool

    @property
    def ranks(self) -> range:
        return range(self.node_rank * self.nproc, (self.node_rank + 1) * self.nproc)


def this_machine(nproc: int) -> NodePlan:
    """Return the plan of an attempt on this machine alone."""
    return NodePlan(("localhost",), 0, nproc, "127.0.0.1", free_port(), count_gpus() > 0)


@dataclass(frozen=True)
class RanksOutcome:
    """How a node's ranks ended. is_done: all without a failure. stuck: those that had to be killed."""

    is_done: bool
    stuck: set[int]


def launch_ranks(
    run_dir: Path,
    attempt_dir: Path,
    node: NodePlan,
    module: str = "turnout.launch.ranks.worker",
    *,
    fencing_token: FencingToken | None = None,
) -> RanksOutcome:
    """Run `python -m module RUN_DIR ATTEMPT_DIR` in each rank of this node until all have ended.

    The first failure of a rank, on any node, ends the ranks of this one. So does an interrupt of this
    process, or its death.

    fencing_token: given for a run that can stop early. SIGTERM then asks its ranks to save and end. If a
    later attempt has claimed the run, the ranks are killed, and watch raises TakenOverError.
    """
    with interruptible(attempt_dir, fencing_token):
        # A cluster ends a job by sending SIGTERM to each of its processes. Only the command acts on it. The
        # launcher and the ranks inherit it blocked, because they would die before they could save.
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        try:
            launcher = subprocess.Popen(
                launcher_command(run_dir, attempt_dir, node, module),
                env={**os.environ, **rank_environment(node.nproc, has_gpus=node.has_gpus)},
                # A session of its own: a terminal's Ctrl-C reaches the ranks only once, through this process.
                start_new_session=True,
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        return watch(launcher, attempt_dir, node.ranks, fencing_token, kill_session)


@contextmanager
def interruptible(attempt_dir: Path, fencing_token: FencingToken | None) -> Iterator[None]:
    """On SIGHUP, interrupt this process. On SIGTERM do the same, or with a fencing token ask the ranks of the
    run to save and end.
    """
    on_term = partial(_stop, attempt_dir) if fencing_token is not None else _interrupt
    wanted = {signal.SIGTERM: on_term, signal.SIGHUP: _interrupt}
    # nohup makes a process ignore SIGHUP; that must stay so.
    wanted = {n: action for n, action in wanted.items() if signal.getsignal(n) != signal.SIG_IGN}
    before = {n: signal.signal(n, action) for n, action in wanted.items()}
    try:
        yield
    finally:
        for n, action in before.items():
            signal.signal(n, action)


def watch(
    launcher: subprocess.Popen[bytes],
    attempt_dir: Path,
    ranks: range,
    fencing_token: FencingToken | None,
    kill: Callable[[int], None],
) -> RanksOutcome:
    """Wait until a launcher and its ranks have ended; after a first failure anywhere, end them.

    ranks   those on this node
    kill    ends every process below a launcher, given its process id
    The fencing token raises TakenOverError if a later attempt has claimed the run; the ranks are then killed.
    """
    outcome = None
    try:
        outcome = _wait(launcher, attempt_dir, ranks, fencing_token)
        return outcome
    finally:
        if launcher.returncode != DONE:
            kill(launcher.pid)
            launcher.wait()
        if outcome is None or not outcome.is_done:
            _restore_terminal()


def _wait(
    launcher: subprocess.Popen[bytes], attempt_dir: Path, ranks: range, fencing_token: FencingToken | None
) -> RanksOutcome:
    """Wait until the launcher has ended, its ranks are all done, or some ranks do not end."""
    failed_s: float | None = None
    checked_s = time.monotonic()
    while True:
        with suppress(subprocess.TimeoutExpired):
            launcher.wait(POLL_S)
        found = _inspect(attempt_dir, ranks)
        if found.are_done:
            # The launcher would notice within a second, and then sleep for another.
            return RanksOutcome(True, set())
        if launcher.poll() is not None:
            # Its exit code is enough here: the ranks' own files say why they ended.
            return RanksOutcome(launcher.returncode == DONE, set())
        if fencing_token is not None and time.monotonic() - checked_s > FENCING_CHECK_S:
            with suppress(OSError):  # the file system will answer again; the ranks check before they commit
                fencing_token.check()
            checked_s = time.monotonic()
        if failed_s is None:
            if not found.has_failed:
                continue
            failed_s = time.monotonic()
        waited_s = time.monotonic() - failed_s
        if waited_s > KILL_S:
            return RanksOutcome(False, set(found.pids))
        if waited_s > END_S:
            for pid in found.pids.values():
                _signal_to_end(pid)


@dataclass(frozen=True)
class _RankStates:
    """The ranks at one moment.

    pids         process ids of this node's running ranks, by rank
    are_done     all ranks of this node have ended without a failure
    has_failed   a rank has failed, on whichever node
    """

    pids: dict[int, int]
    are_done: bool
    has_failed: bool


def _inspect(attempt_dir: Path, ranks: range) -> _RankStates:
    records = {rank: one for rank, one in read_flight_records(attempt_dir).items() if rank in ranks}
    pids = {rank: record.pid for rank, record in records.items() if _is_running(record.pid)}
    # Read again: a rank may have written that it is done, and ended, since the first reading.
    gone = [
        record
        for rank, record in read_flight_records(attempt_dir).items()
        if rank in records and rank not in pids
    ]
    n_done = sum(record.has_ended for record in gone)
    has_failed = n_done < len(gone) or any(attempt_dir.glob(FAILURE_FILES))
    return _RankStates(pids, 0 < n_done == len(ranks) and not has_failed, has_failed)


def _is_running(pid: int) -> bool:
    try:
        status = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return False
    # Z: zombie, X: dead. A stopped process counts as running.
    return status.rpartition(")")[2].split()[0] not in "ZX"


def _signal_to_end(pid: int) -> None:
    try:
        os.kill(pid, END_SIGNAL)
    except ProcessLookupError:
        return


def _interrupt(signum: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _stop(attempt_dir: Path, signum: int, frame: FrameType | None) -> None:
    ask_to_stop(attempt_dir)


def _restore_terminal() -> None:
    """Show the cursor, which stays hidden if a rank was ended while its progress bar was on the screen."""
    console = Console()
    if console.is_terminal:
        console.show_cursor(True)
        console.print()


def kill_session(leader: int) -> None:
    """Kill what is left of the launcher's session, including ranks that the launcher could not end."""
    try:
        os.killpg(leader, signal.SIGKILL)
    except ProcessLookupError:
        return


def launcher_command(run_dir: Path, attempt_dir: Path, node: NodePlan, module: str) -> list[str]:
    """Return the command line of DeepSpeed's launcher on this node."""
    # The launcher uses only this node's devices; it needs the other nodes' names to number the ranks.
    world = json.dumps({name: local_devices(node) for name in node.nodes}).encode()
    return [
        sys.executable,
        "-m",
        "turnout.launch.ranks.deepspeed_launcher",
        str(os.getpid()),
        f"--world_info={base64.urlsafe_b64encode(world).decode()}",
        f"--node_rank={node.node_rank}",
        f"--master_addr={node.master_addr}",
        f"--master_port={node.master_port}",
        "--log_level=critical",
        "--no_local_rank",
        "--module",
        module,
        str(run_dir),
        str(attempt_dir),
    ]


def local_devices(node: NodePlan) -> list[str]:
    """Return the devices of this node's ranks, which the launcher writes to CUDA_VISIBLE_DEVICES.

    A CUDA_VISIBLE_DEVICES of the user's therefore chooses them here.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") if node.has_gpus else None
    return visible.split(",")[: node.nproc] if visible else [str(i) for i in range(node.nproc)]


def rank_environment(nproc: int, *, has_gpus: bool) -> dict[str, str]:
    """Return the environment variables of the ranks; a variable that the user has set keeps its value."""
    # `python -m` would put the user's directory, with any random.py in it, first on the module path.
    settings = {"PYTHONSAFEPATH": "1"}
    if not has_gpus:
        n_threads = max(1, len(os.sched_getaffinity(0)) // nproc)
        threads = {"OMP_NUM_THREADS": str(n_threads), **thread_wait_settings()}
        settings |= {"DS_ACCELERATOR": "cpu", **threads, **CPU_ALLOCATOR}
    return {name: os.environ.get(name, value) for name, value in settings.items()}


def thread_wait_settings() -> dict[str, str]:
    """Return how long idle threads spin, unless the user has set OpenMP's own OMP_WAIT_POLICY."""
    return {} if "OMP_WAIT_POLICY" in os.environ else SHORT_SPIN


def free_port() -> int:
    """Return a port that is free now and that the system gives to no connection.

    The first rank listens on it only seconds later, so it lies below net.ipv4.ip_local_port_range, which
    begins at 32768: the system chooses the ports of outgoing connections from that range.
    """
    while True:
        port = secrets.choice(range(20_000, 32_768))
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("", port))
            return port
