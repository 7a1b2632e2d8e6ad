"""Ways to compute one thing, timed in turn in one process, so that a slower machine in between cancels."""

import os
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from launch.local import CPU_ALLOCATOR

MIB = 1 << 20


@dataclass(frozen=True)
class Timing:
    """ratio: the median over rounds of this time over the baseline's of the same round."""

    ms: float
    ratio: float
    low: float
    high: float


def time_in_turn(ways: Mapping[str, Callable[[], None]], *, n_rounds: int = 5) -> dict[str, Timing]:
    """Return the CPU time of each, the first being the baseline. Each runs once unmeasured."""
    for run in ways.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(n_rounds):
        for name, run in ways.items():
            start_s = time.process_time()
            run()
            seconds[name].append(time.process_time() - start_s)
    base = next(iter(seconds.values()))
    timings = {}
    for name, mine in seconds.items():
        ratios = [a / b for a, b in zip(mine, base, strict=True)]
        timings[name] = Timing(
            1e3 * statistics.median(mine), statistics.median(ratios), min(ratios), max(ratios)
        )
    return timings


def peak_extra_bytes(run: Callable[[], object]) -> int:
    """Return by how much the resident memory grows at most while run does, held pages included."""
    before = resident_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    run()
    return resident_bytes("VmHWM") - before


def without_allocator() -> dict[str, str]:
    """Return the environment without the launcher's settings of malloc, which keep what was freed."""
    return {name: value for name, value in os.environ.items() if name not in CPU_ALLOCATOR}


def resident_bytes(key: str) -> int:
    """Return VmRSS or VmHWM of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(key))
