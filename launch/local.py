"""Start the ranks of a run on this machine through DeepSpeed's per-node launcher, and wait for them."""

import base64
import ctypes
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import torch
from rich.console import Console

from launch.exit_codes import DONE
from launch.failures import FAILURE_FILES, make_start_dir, read_ledgers

# glibc gives blocks above 128 KiB back to the system at once, so each activation of each layer is
# page-faulted anew. Keeping them makes a CPU step 1.7 times as fast (LOG.md).
CPU_ALLOCATOR = {
    "MALLOC_MMAP_THRESHOLD_": str(2**32),
    "MALLOC_TRIM_THRESHOLD_": str(2**33),
    "MALLOC_TOP_PAD_": str(2**28),
    "THP_MEM_ALLOC_ENABLE": "1",
}

# The launcher gives each of its ranks 30 s to end before it kills it.
SHUTDOWN_S = 40
POLL_S = 0.5
# After the first failure: the others may find out by themselves, then are told to end, then are killed. The
# launcher does so too, but rank after rank, so that two ranks which hang would take a minute.
TELL_S, KILL_S = 2, 10
# Of the ranks' environment.
OWNER_TOKEN, START_DIR = "TURNOUT_OWNER", "TURNOUT_START_DIR"
PR_SET_PDEATHSIG = 1  # linux/prctl.h


@dataclass(frozen=True)
class Ended:
    """How ranks ended: whether all went well, which had to be killed, and where they told what happened."""

    is_done: bool
    stuck: set[int]
    start_dir: Path


def launch_ranks(run_dir: Path, nproc: int, module: str = "launch.worker", *, token: str = "") -> Ended:
    """Run `python -m module RUN_DIR` in nproc ranks until all have ended.

    The first rank that fails ends the others. So does a signal to this process, or its death.
    token: what this start has written to RUN/owner, where the ranks write there too.
    """
    start_dir = make_start_dir(run_dir / "logs")
    ranks = subprocess.Popen(
        launcher_command(run_dir, nproc, module),
        env={**rank_environment(nproc), OWNER_TOKEN: token, START_DIR: str(start_dir)},
        # A session of its own: a terminal's Ctrl-C reaches the ranks through this process, and only once.
        start_new_session=True,
        preexec_fn=die_with_parent,
    )
    for signum in (signal.SIGTERM, signal.SIGHUP):
        # Under nohup the hang-up is ignored, and stays so.
        if signal.getsignal(signum) != signal.SIG_IGN:
            signal.signal(signum, _interrupt)
    try:
        stuck = _wait(ranks, start_dir)
        is_done = ranks.returncode == DONE
        if not is_done:
            kill_session(ranks.pid)
            _restore_terminal()
        return Ended(is_done, stuck, start_dir)
    except KeyboardInterrupt:
        ranks.terminate()
        try:
            ranks.wait(SHUTDOWN_S)
        finally:
            kill_session(ranks.pid)
            _restore_terminal()
        raise


def _wait(ranks: subprocess.Popen[bytes], start_dir: Path) -> set[int]:
    """Wait until all ranks have ended, soon after a first failure; return those that had to be killed."""
    failed_s: float | None = None
    while True:
        try:
            ranks.wait(POLL_S)
            return set()
        except subprocess.TimeoutExpired:
            pids, has_failed = _look(start_dir)
        if failed_s is None:
            if not has_failed:
                continue
            failed_s = time.monotonic()
        waited_s = time.monotonic() - failed_s
        if waited_s > KILL_S:
            kill_session(ranks.pid)
            ranks.wait()
            return set(pids)
        if waited_s > TELL_S:
            for pid in pids.values():
                _tell_to_end(pid)


def _look(start_dir: Path) -> tuple[dict[int, int], bool]:
    """Return the process ids of the ranks that run, and whether a rank has failed."""
    views = read_ledgers(start_dir)
    pids = {rank: view.pid for rank, view in views.items() if _is_running(view.pid)}
    # Read again: the rank may have ended well between the two looks.
    gone = [view for rank, view in read_ledgers(start_dir).items() if rank in views and rank not in pids]
    return pids, not all(view.has_ended for view in gone) or any(start_dir.glob(FAILURE_FILES))


def _is_running(pid: int) -> bool:
    try:
        status = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return False
    return status.rpartition(")")[2].split()[0] not in "ZX"  # zombie or dead; stopped runs


def _tell_to_end(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGTERM)
    except ProcessLookupError:
        return


def _interrupt(signum: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


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


def die_with_parent(signum: signal.Signals = signal.SIGTERM) -> None:
    """Have the kernel send this process a signal when its parent dies, so that no rank outlives its run."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signum)


def launcher_command(run_dir: Path, nproc: int, module: str) -> list[str]:
    world = json.dumps({"localhost": local_devices(nproc)}).encode()
    return [
        sys.executable,
        "-m",
        "deepspeed.launcher.launch",
        f"--world_info={base64.urlsafe_b64encode(world).decode()}",
        "--master_addr=127.0.0.1",
        f"--master_port={free_port()}",
        "--log_level=critical",
        "--no_local_rank",
        "--module",
        module,
        str(run_dir),
    ]


def local_devices(nproc: int) -> list[str]:
    """Return the devices of the ranks. The launcher sets CUDA_VISIBLE_DEVICES from them, so it must be heeded
    here.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = visible.split(",") if visible else [str(i) for i in range(nproc)]
    return devices[:nproc] if torch.cuda.is_available() else [str(i) for i in range(nproc)]


def rank_environment(nproc: int) -> dict[str, str]:
    """Return the environment of the ranks; what the user has set stays."""
    # Ranks are started as modules, which would put the user's directory, and any random.py in it, first on
    # the path.
    settings = {"PYTHONSAFEPATH": "1"}
    if not torch.cuda.is_available():
        n_threads = max(1, len(os.sched_getaffinity(0)) // nproc)
        settings |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": str(n_threads), **CPU_ALLOCATOR}
    return {**settings, **os.environ}


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
