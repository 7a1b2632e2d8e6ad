"""Ways to compute one thing, measured in turn, so that a slower machine in between cancels."""

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
# Kernels are made in the first; both touch fresh pages, until the heap has settled, which can take as long as
# the arithmetic.
N_WARM_ROUNDS = 2
# Longer, and a process prints its stacks and dies.
TIMEOUT_S = 1800
# Written out, they also keep glibc from raising the thresholds as a process goes on.
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
    """Return the seconds of each way in each round, of CPU time unless clock is another.

    n_warm_rounds: of which the seconds are not counted.
    """
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(n_warm_rounds + n_rounds):
        for name, run in ways.items():
            start_s = clock()
            run()
            seconds[name].append(clock() - start_s)
    return {name: times[n_warm_rounds:] for name, times in seconds.items()}


def over(these: Sequence[float], those: Sequence[float]) -> list[float]:
    """Return the ratio of each round."""
    return [a / b for a, b in zip(these, those, strict=True)]


def in_ms(seconds: Sequence[float]) -> str:
    return f"{1e3 * statistics.median(seconds):,.0f} ms"


def in_own_process(run: Callable[..., R], *args: object, malloc: Mapping[str, str]) -> R:
    """Call a function of a module in a new process with these settings of malloc, which are read at its
    start.
    """
    watched = partial(faulthandler.dump_traceback_later, TIMEOUT_S, exit=True)
    spawn = multiprocessing.get_context("spawn")
    with _environment(malloc), ProcessPoolExecutor(1, mp_context=spawn, initializer=watched) as pool:
        return pool.submit(run, *args).result()


def call(address: str) -> Any:
    """Call the function at `module:name`, which is imported here, and not by whoever names it."""
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
    """Return by how much the resident memory grows at most while run does, held pages included."""
    before = resident_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    run()
    return resident_bytes("VmHWM") - before


def resident_bytes(key: str) -> int:
    """Return VmRSS or VmHWM of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(key))
