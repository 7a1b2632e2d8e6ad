"""Check that all ranks reach one another, by a sum over all of them whose result is known.

The ranks of a run do this before anything else (launch/ranks/rank.py). The ranks of a preflight do nothing
else; each runs `python -m turnout.launch.ranks.collective_check RUN_DIR ATTEMPT_DIR`.
"""

import os
import sys
import time
from pathlib import Path

import torch

from turnout.launch.ranks.failures import record_failure, write_stack_at_end
from turnout.launch.ranks.parent import die_with_parent
from turnout.training.errors import EngineError
from turnout.training.parallel.flight_recorder import FlightRecorder
from turnout.training.parallel.groups import Groups, join_groups, leave_groups, local_device
from turnout.training.parallel.layout import Layout, name_ranks
from turnout.training.run_control import Status, write_status

TIMEOUT_S = 60
N_FLOATS, N_ROUNDS = 16 * 2**20, 5


def check_collective(groups: Groups) -> None:
    """Sum rank + 1 over all ranks. Raises EngineError on every rank, naming those that got a wrong sum."""
    n = groups.layout.world_size
    want = n * (n + 1) / 2
    value = torch.full((8,), float(groups.rank + 1), device=groups.device)
    got = groups.sum_over_ranks(value)
    wrong = [rank for rank, error in enumerate(groups.collect(float((got - want).abs().max()))) if error]
    if wrong:
        raise EngineError(f"a sum over all ranks, {want:g}, came out wrong on {name_ranks(wrong)}")


def measure_gb_per_s(groups: Groups) -> float:
    """Return the size of a large tensor divided by the time that its sum over all ranks takes, in GB/s."""
    value = torch.ones(N_FLOATS, device=groups.device)
    groups.sum_over_ranks(value)
    groups.barrier()
    start_s = time.perf_counter()
    for _ in range(N_ROUNDS):
        groups.sum_over_ranks(value)
    if groups.device.type == "cuda":
        torch.cuda.synchronize()
    return N_ROUNDS * 4 * N_FLOATS / (time.perf_counter() - start_s) / 1e9


def main() -> None:
    die_with_parent()
    attempt_dir, rank = Path(sys.argv[2]), int(os.environ["RANK"])
    stack_file = (attempt_dir / f"rank-{rank:05d}.stack").open("w", encoding="utf-8")
    write_stack_at_end(stack_file)
    try:
        layout = Layout(int(os.environ["WORLD_SIZE"]))
        recorder = FlightRecorder(attempt_dir / f"rank-{rank:05d}.flight", layout, rank)
        groups = join_groups(layout, local_device(), timeout_s=TIMEOUT_S, recorder=recorder)
        check_collective(groups)
        speed = measure_gb_per_s(groups)
        if groups.is_first:
            print(f"{layout.world_size} ranks: sums are right, {speed:.2f} GB/s for 64 MiB", flush=True)
            write_status(attempt_dir, Status("done", 0, 0.0, None))
        leave_groups()
    except BaseException as err:  # the peers wait in a collective until this process is gone
        os._exit(record_failure(err, rank, attempt_dir))
    Path(stack_file.name).unlink()


if __name__ == "__main__":
    main()
