"""Start the ranks of a run on this machine through DeepSpeed's per-node launcher, and wait for them."""

import base64
import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import FrameType

import torch
from rich.console import Console

from launch.exit_codes import DONE

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
PR_SET_PDEATHSIG = 1  # linux/prctl.h


def launch_ranks(run_dir: Path, nproc: int) -> bool:
    """Run `launch.worker` in nproc ranks until all have ended; return whether all went well.

    The first rank that fails ends the others. So does a signal to this process, or its death.
    """
    ranks = subprocess.Popen(
        launcher_command(run_dir, nproc),
        env=rank_environment(nproc),
        # A session of its own: a terminal's Ctrl-C reaches the ranks through this process, and only once.
        start_new_session=True,
        preexec_fn=die_with_parent,
    )
    for signum in (signal.SIGTERM, signal.SIGHUP):
        # Under nohup the hang-up is ignored, and stays so.
        if signal.getsignal(signum) != signal.SIG_IGN:
            signal.signal(signum, _interrupt)
    try:
        is_done = ranks.wait() == DONE
        if not is_done:
            _restore_terminal()
        return is_done
    except KeyboardInterrupt:
        ranks.terminate()
        try:
            ranks.wait(SHUTDOWN_S)
        finally:
            kill_session(ranks.pid)
            _restore_terminal()
        raise


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


def die_with_parent() -> None:
    """Have the kernel send this process SIGTERM when its parent dies, so that no rank outlives its run."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def launcher_command(run_dir: Path, nproc: int) -> list[str]:
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
        "launch.worker",
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
    """Return a TCP port that nobody listens on. Another process may take it first; then the ranks say so."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
