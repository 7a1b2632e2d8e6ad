"""Start the ranks of a run on this machine through DeepSpeed's per-node launcher, and wait for them."""

import base64
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import torch

from launch.exit_codes import KNOWN, OTHER

# glibc gives blocks above 128 KiB back to the system at once, so each activation of each layer is
# page-faulted anew; keeping them makes a CPU step faster by a third.
CPU_ALLOCATOR = {
    "MALLOC_MMAP_THRESHOLD_": str(2**32),
    "MALLOC_TRIM_THRESHOLD_": str(2**33),
    "MALLOC_TOP_PAD_": str(2**28),
    "THP_MEM_ALLOC_ENABLE": "1",
}

# The launcher gives its ranks 30 s to end before it kills them.
SHUTDOWN_S = 40


def launch_ranks(run_dir: Path, nproc: int) -> int:
    """Run `launch.worker` in nproc ranks until all have ended; return the exit code of the run.

    The first rank that fails ends the others. A rank that a signal killed counts as OTHER.
    """
    ranks = subprocess.Popen(launcher_command(run_dir, nproc), env=rank_environment(nproc))
    try:
        code = ranks.wait()
    except KeyboardInterrupt:
        # A terminal's Ctrl-C has reached the launcher too; a signal to this process alone has not.
        ranks.send_signal(signal.SIGTERM)
        try:
            ranks.wait(SHUTDOWN_S)
        except subprocess.TimeoutExpired:
            ranks.kill()
        raise
    return code if code in KNOWN else OTHER


def launcher_command(run_dir: Path, nproc: int) -> list[str]:
    world = json.dumps({"localhost": list(range(nproc))}).encode()
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


def rank_environment(nproc: int) -> dict[str, str]:
    """Return the environment of the ranks; what the user has set stays."""
    settings = {}
    if not torch.cuda.is_available():
        settings = {
            "DS_ACCELERATOR": "cpu",
            "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // nproc)),
            **CPU_ALLOCATOR,
        }
    return {**settings, **os.environ}


def free_port() -> int:
    """Return a TCP port that nobody listens on. Another process may take it first; then the ranks say so."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
