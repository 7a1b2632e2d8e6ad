"""Time and memory of several ways to compute one thing, measured in turn, so that slow moments cancel."""

import faulthandler
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, TypeVar

R = TypeVar("R")

MIB = 1 << 20
# The first compiles kernels. Both touch new pages until the heap has settled, which can take as long as the
# arithmetic.
N_WARM_ROUNDS = 2
# After this a process prints its stacks and dies.
TIMEOUT_S = 1800
# Setting them explicitly also keeps glibc from raising the thresholds while a process runs.
GLIBC_DEFAULTS = {
    "MALLOC_MMAP_THRESHOLD_": str(128 * 1024),
    "MALLOC_TRIM_THRESHOLD_": str(128 * 1024),
    "MALLOC_TOP_PAD_": str(128 * 1024),
    "THP_MEM_ALLOC_ENABLE": "0",
}


def time_in_turn(
    ways: Mapping[str, Callable[[], object]],
    *,
    n_rounds: int,
    n_warm_rounds: int = N_WARM_ROUNDS,
    clock: Callable[[], float] = time.process_time,
) -> dict[str, list[float]]:
    """Return the seconds of each way in each round: CPU time, unless another clock is given.

    n_warm_rounds: rounds before those, whose seconds are left out.
    """
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(n_warm_rounds + n_rounds):
        for name, run in ways.items():
            start_s = clock()
            run()
            seconds[name].append(clock() - start_s)
    return {name: times[n_warm_rounds:] for name, times in seconds.items()}


def over(these: Sequence[float], those: Sequence[float]) -> list[float]:
    """Return the ratio in each round."""
    return [a / b for a, b in zip(these, those, strict=True)]


def in_ms(seconds: Sequence[float]) -> str:
    return f"{1e3 * statistics.median(seconds):,.0f} ms"


def in_own_process(run: Callable[..., R], *args: object, malloc: Mapping[str, str]) -> R:
    """Call a module-level function in a new process, which reads these settings of malloc at its start."""
    watched = partial(faulthandler.dump_traceback_later, TIMEOUT_S, exit=True)
    spawn = multiprocessing.get_context("spawn")
    with _environment(malloc), ProcessPoolExecutor(1, mp_context=spawn, initializer=watched) as pool:
        return pool.submit(run, *args).result()


def call(address: str) -> Any:
    """Call the function at `module:name`, importing the module in this process only."""
    return resolve_name(address)()


@contextmanager
def _environment(settings: Mapping[str, str]) -> Iterator[None]:
    kept = dict(os.environ)
    os.environ.update(settings)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(kept)


def peak_extra_bytes(run: Callable[[], object]) -> int:
    """Return the peak growth of resident memory during run, in bytes, mapped pages included."""
    before = resident_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    run()
    return resident_bytes("VmHWM") - before


def resident_bytes(key: str) -> int:
    """Return VmRSS or VmHWM of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(key))
