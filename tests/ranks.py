"""Real processes over gloo: one pool of ranks per world size, kept for the whole test session.

`run_ranks(fn, world_size, *args)` calls fn(rank, *args) on every rank and returns the results by rank. fn
must be a module-level function. A rank that takes longer than TIMEOUT_S dumps the stacks of all its threads
and dies.

Without a GPU the ranks are forked from one server that has imported torch and DeepSpeed: importing them in
every rank would take minutes of CPU time.
"""

import faulthandler
import gc
import io
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from multiprocessing import forkserver, util
from multiprocessing.connection import Connection
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from turnout.launch.ranks.parent import die_with_parent

TIMEOUT_S = 240
# What every rank imports: torch, DeepSpeed, and what DeepSpeed imports when an engine is built.
PRELOADED = [
    "tests.rank_server",
    "turnout.training.engine.build",
    "deepspeed.runtime.zero.muon.muon_optimizer",
]
RANK_ENV = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}


class RankFailed(AssertionError):
    """A rank raised; the message holds its traceback."""


class RankPool:
    """The processes of one world size. They are stopped (SIGSTOP) between calls."""

    def __init__(self, world_size: int) -> None:
        self._store = Path(tempfile.mkdtemp(prefix="ranks-")) / "store"
        context = _context()
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in range(world_size):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve, args=(rank, world_size, str(self._store), theirs), daemon=True
            )
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)
        # At exit, before multiprocessing sends SIGTERM, to which a stopped process does not react.
        util.Finalize(None, self.close, exitpriority=0)

    def run(self, fn: Callable[..., Any], args: tuple[Any, ...]) -> list[Any]:
        self._signal(signal.SIGCONT)
        for pipe in self._pipes:
            pipe.send((fn, args))
        results: list[Any] = []
        failures: list[str] = []
        for rank, pipe in enumerate(self._pipes):
            try:
                # Peers of a failed rank may wait for it in a collective; we do not wait for them.
                if not pipe.poll(5 if failures else TIMEOUT_S + 30):
                    raise EOFError
                is_ok, value = pickle.loads(pipe.recv_bytes())
            except EOFError:
                is_ok, value = False, "no answer: the process ended or hangs; its stacks are on stderr"
            results.append(value)
            if not is_ok:
                failures.append(f"rank {rank}: {value}")
        if failures:
            self.close()
            raise RankFailed("\n".join(failures))
        # Idle gloo groups poll: those of all pools would keep half a core busy between calls.
        self._signal(signal.SIGSTOP)
        return results

    @property
    def is_alive(self) -> bool:
        return all(process.is_alive() for process in self._processes)

    def _signal(self, number: signal.Signals) -> None:
        for process in self._processes:
            if process.is_alive():  # otherwise its pid may belong to another process by now
                assert process.pid is not None
                os.kill(process.pid, number)

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()


_pools: dict[int, RankPool] = {}


def run_ranks(fn: Callable[..., Any], world_size: int, *args: Any, **kwargs: Any) -> list[Any]:
    """Call fn(rank, *args, **kwargs) on every rank and return the results by rank. Raises RankFailed."""
    pool = _pools.get(world_size)
    if pool is None or not pool.is_alive:
        pool = _pools[world_size] = RankPool(world_size)
    return pool.run(partial(fn, **kwargs), args)


def join_alone() -> None:
    """Give this process a process group of one rank, for code that needs a group."""
    if not torch.distributed.is_initialized():
        store = Path(tempfile.mkdtemp(prefix="ranks-")) / "store"
        torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)


def _serve(rank: int, world_size: int, store: str, pipe: Connection) -> None:
    os.environ.update(
        RANK_ENV,
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_SIZE=str(world_size),
    )
    die_with_parent()  # a stopped rank would not notice that its parent has ended
    torch.set_num_threads(1)
    gc.freeze()  # imported objects are never garbage, and scanning them takes half a second
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=world_size, timeout=timedelta(seconds=60)
    )
    while True:
        try:
            fn, args = pipe.recv()
        except EOFError:
            return
        faulthandler.dump_traceback_later(TIMEOUT_S, exit=True, file=sys.stderr)
        try:
            answer = (True, fn(rank, *args))
        except BaseException:
            answer = (False, traceback.format_exc())
        faulthandler.cancel_dump_traceback_later()
        pipe.send_bytes(_pack(answer))


def _context() -> BaseContext:
    """Return how ranks are started. A process forked from one that has initialised CUDA cannot use it."""
    if torch.cuda.is_available():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    kept = {name: os.environ.get(name) for name in RANK_ENV}
    os.environ.update(RANK_ENV)  # the server inherits it at its start, and its imports depend on it
    try:
        forkserver.ensure_running()
    finally:
        for name, value in kept.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value
    return context


def _pack(answer: Any) -> bytes:
    """Pickle an answer together with the values of its tensors.

    Connection.send would put each tensor into its own shared memory and pass a file descriptor, which can
    take longer than the training itself.
    """
    file = io.BytesIO()
    _Pickler(file, protocol=pickle.HIGHEST_PROTOCOL).dump(answer)
    return file.getvalue()


class _Pickler(pickle.Pickler):
    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, Tensor) and obj.dtype in _NUMPY_DTYPES:
            return torch.from_numpy, (obj.detach().contiguous().numpy(),)
        return NotImplemented


_NUMPY_DTYPES = {torch.float64, torch.float32, torch.int64, torch.int32, torch.bool}
