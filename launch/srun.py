"""The srun command of one step of a job: one task on each of some nodes."""

import sys
from collections.abc import Mapping, Sequence


def srun_command(
    nodes: Sequence[str],
    module: str,
    arguments: Sequence[str],
    *,
    log: str | None,
    options: Mapping[str, str],
    kills_on_failure: bool = True,
) -> list[str]:
    """Return the command; it runs in the directory of its logs.

    log: files LOG-NODE.log, or None for the job's own output. kills_on_failure: a task that fails ends the
    others. The first that ends at all gives the others a minute.
    """
    command = [
        "srun",
        f"--nodes={len(nodes)}",
        # Both: a number of tasks for each node is ignored where sbatch has set a number of tasks.
        f"--ntasks={len(nodes)}",
        "--ntasks-per-node=1",
        f"--nodelist={','.join(nodes)}",
        "--unbuffered",
        "--mpi=none",
        f"--kill-on-bad-exit={int(kills_on_failure)}",
        "--wait=60",
        f"--job-name={module.rpartition('.')[2]}",
    ]
    if log is not None:
        command.append(f"--output={log}-%N.log")
    command += [f"--{name}={value}" if value else f"--{name}" for name, value in options.items()]
    return [*command, sys.executable, "-m", module, *arguments]
