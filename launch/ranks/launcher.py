"""Start the ranks of this node through DeepSpeed's per-node launcher, and watch over them."""

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
from turnout.launch.ranks.attempt_dir import FAILURE_FILES, TOLD_TO_END, read_flight_records
from turnout.training.run_control import FencingToken, ask_to_stop

# glibc gives blocks above 128 KiB back to the system at once, so each activation of each layer is
# page-faulted anew. Keeping them makes a CPU step 1.7 times as fast (LOG.md).
CPU_ALLOCATOR = {
    "MALLOC_MMAP_THRESHOLD_": str(2**32),
    "MALLOC_TRIM_THRESHOLD_": str(2**33),
    "MALLOC_TOP_PAD_": str(2**28),
    "THP_MEM_ALLOC_ENABLE": "1",
}
# For how long libgomp's threads look for work before they sleep, in ranks on CPUs and in every command. By
# its own 300,000 rounds they keep the cores from the one that they wait for when another process has a core,
# and a step takes 14 times as long; if they sleep at once, an undisturbed step takes a third longer (LOG.md).
SPIN_SHORTLY = {"GOMP_SPINCOUNT": "5000"}

POLL_S = 0.5
# After the first failure: the others may find out by themselves, then are told to end, then are killed. The
# launcher does so too, but rank after rank, so that two ranks which hang would take a minute.
TELL_S, KILL_S = 2, 10
# How often it is seen whether the run directory is still this start's own.
OWNER_CHECK_S = 2


@dataclass(frozen=True)
class NodePlan:
    """One node's part of a start: nproc ranks on each node, numbered node after node.

    master_addr, master_port: where the first rank listens. has_gpus: each rank has one.
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
    """Return the plan of a start on this machine alone."""
    return NodePlan(("localhost",), 0, nproc, "127.0.0.1", free_port(), count_gpus() > 0)


@dataclass(frozen=True)
class Ended:
    """How the ranks of a node ended: whether all went well, and which had to be killed."""

    is_done: bool
    stuck: set[int]


def launch_ranks(
    run_dir: Path,
    attempt_dir: Path,
    node: NodePlan,
    module: str = "turnout.launch.ranks.worker",
    *,
    fencing_token: FencingToken | None = None,
) -> Ended:
    """Run `python -m module RUN_DIR START_DIR` in this node's ranks until all have ended.

    The first rank of any node that fails ends those of this one. So does an interrupt of this process, or its
    death. owner: of a run that can be stopped; SIGTERM then asks its ranks to save and end. Where a later
    start has taken over the run, these ranks are killed, and TakenOverError raised.
    """
    with interruptible(attempt_dir, fencing_token):
        # A cluster ends a job by sending SIGTERM to each of its processes. Only the command acts on it. The
        # launcher and the ranks inherit it blocked, because they would die before they could save.
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        try:
            launcher = subprocess.Popen(
                launcher_command(run_dir, attempt_dir, node, module),
                env={**os.environ, **rank_environment(node.nproc, has_gpus=node.has_gpus)},
                # A session of its own: a terminal's Ctrl-C reaches the ranks through this process, and once.
                start_new_session=True,
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        return watch(launcher, attempt_dir, node.ranks, fencing_token, kill_session)


@contextmanager
def interruptible(attempt_dir: Path, fencing_token: FencingToken | None) -> Iterator[None]:
    """Have SIGTERM ask a run to stop, where it has an owner, and else interrupt, as a hang-up does."""
    on_term = partial(_stop, attempt_dir) if fencing_token is not None else _interrupt
    wanted = {signal.SIGTERM: on_term, signal.SIGHUP: _interrupt}
    # Under nohup the hang-up is ignored, and stays so.
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
) -> Ended:
    """Wait until a launcher and its ranks have ended, soon after a first failure anywhere.

    ranks: those on this node. kill: ends all that is below a launcher, by its process id. Raises
    TakenOverError, with the ranks gone, where a later start has taken over.
    """
    ended = None
    try:
        ended = _wait(launcher, attempt_dir, ranks, fencing_token)
        return ended
    finally:
        if launcher.returncode != DONE:
            kill(launcher.pid)
            launcher.wait()
        if ended is None or not ended.is_done:
            _restore_terminal()


def _wait(
    launcher: subprocess.Popen[bytes], attempt_dir: Path, ranks: range, fencing_token: FencingToken | None
) -> Ended:
    """Wait until the launcher has ended, or is to be: its ranks have ended well, or some do not end."""
    failed_s: float | None = None
    checked_s = time.monotonic()
    while True:
        with suppress(subprocess.TimeoutExpired):
            launcher.wait(POLL_S)
        seen = _look(attempt_dir, ranks)
        if seen.are_done:
            # The launcher would find out within a second, and then sleep for another.
            return Ended(True, set())
        if launcher.poll() is not None:
            # What the ranks have said themselves says more.
            return Ended(launcher.returncode == DONE, set())
        if fencing_token is not None and time.monotonic() - checked_s > OWNER_CHECK_S:
            with suppress(OSError):  # the file system will answer again; the ranks look before they commit
                fencing_token.check()
            checked_s = time.monotonic()
        if failed_s is None:
            if not seen.has_failed:
                continue
            failed_s = time.monotonic()
        waited_s = time.monotonic() - failed_s
        if waited_s > KILL_S:
            return Ended(False, set(seen.pids))
        if waited_s > TELL_S:
            for pid in seen.pids.values():
                _ask_to_end(pid)


@dataclass(frozen=True)
class _Seen:
    """A look at a start. pids: by rank, those of this node's ranks that run. are_done: all of this node's
    ranks have ended well; has_failed: some rank of any node has not.
    """

    pids: dict[int, int]
    are_done: bool
    has_failed: bool


def _look(attempt_dir: Path, ranks: range) -> _Seen:
    views = {rank: view for rank, view in read_flight_records(attempt_dir).items() if rank in ranks}
    pids = {rank: view.pid for rank, view in views.items() if _is_running(view.pid)}
    # Read again: the rank may have ended well between the two looks.
    gone = [
        view for rank, view in read_flight_records(attempt_dir).items() if rank in views and rank not in pids
    ]
    n_done = sum(view.has_ended for view in gone)
    has_failed = n_done < len(gone) or any(attempt_dir.glob(FAILURE_FILES))
    return _Seen(pids, 0 < n_done == len(ranks) and not has_failed, has_failed)


def _is_running(pid: int) -> bool:
    try:
        status = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return False
    return status.rpartition(")")[2].split()[0] not in "ZX"  # zombie or dead; stopped runs


def _ask_to_end(pid: int) -> None:
    try:
        os.kill(pid, TOLD_TO_END)
    except ProcessLookupError:
        return


def _interrupt(signum: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _stop(attempt_dir: Path, signum: int, frame: FrameType | None) -> None:
    ask_to_stop(attempt_dir)


def _restore_terminal() -> None:
    """Show the cursor again, which a rank that was ended with its bar on the screen has left hidden."""
    console = Console()
    if console.is_terminal:
        console.show_cursor(True)
        console.print()


def kill_session(leader: int) -> None:
    """Kill what is left of the launcher's session: the ranks too, where the launcher could not end them."""
    try:
        os.killpg(leader, signal.SIGKILL)
    except ProcessLookupError:
        return


def launcher_command(run_dir: Path, attempt_dir: Path, node: NodePlan, module: str) -> list[str]:
    # The names tell nodes apart and nothing more; each node's launcher reads only its own devices.
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
    """Return the devices of the ranks. The launcher sets CUDA_VISIBLE_DEVICES from them, so it must be heeded
    here.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") if node.has_gpus else None
    return visible.split(",")[: node.nproc] if visible else [str(i) for i in range(node.nproc)]


def rank_environment(nproc: int, *, has_gpus: bool) -> dict[str, str]:
    """Return what the ranks need in their environment, where the user has not set it."""
    # Ranks are started as modules, which would put the user's directory, and any random.py in it, first on
    # the path.
    settings = {"PYTHONSAFEPATH": "1"}
    if not has_gpus:
        n_threads = max(1, len(os.sched_getaffinity(0)) // nproc)
        threads = {"OMP_NUM_THREADS": str(n_threads), **waiting_threads()}
        settings |= {"DS_ACCELERATOR": "cpu", **threads, **CPU_ALLOCATOR}
    return {name: os.environ.get(name, value) for name, value in settings.items()}


def waiting_threads() -> dict[str, str]:
    """Return how threads wait for each other, unless the user has said it in the standard's way."""
    return {} if "OMP_WAIT_POLICY" in os.environ else SPIN_SHORTLY


def free_port() -> int:
    """Return a port that is free now, and that no connection is given meanwhile.

    The first rank takes it seconds later, so it is not one of those that the system hands to any connection
    (net.ipv4.ip_local_port_range, which begins at 32768).
    """
    while True:
        port = secrets.choice(range(20_000, 32_768))
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("", port))
            return port
