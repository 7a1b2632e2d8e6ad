"""What a checkpoint costs: bytes, memory, training's wait, and the time to write and to verify it."""

import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import torch.distributed as dist

from tests.bench.rows import Row
from tests.bench.side_by_side import in_ms, over
from tests.checkpoints import KINDS, saver_of, state_at
from tests.layouts import groups_of
from tests.ranks import run_ranks
from turnout.launch.settings import load_config
from turnout.moe.flops import n_params
from turnout.moe.load_balancing import RouterState
from turnout.training.checkpoint.directory import list_checkpoints, verify_checkpoint
from turnout.training.checkpoint.rank_state import rank_state_of
from turnout.training.config.run import RunConfig
from turnout.training.engine.build import build_engine
from turnout.training.parallel.layout import plan_layout
from turnout.training.run_control import take_over

N_ROUNDS, N_RANKS = 5, 2
RECIPE = "small"
SETTINGS = ["data.corpus=unused", "train.precision=fp32", "checkpoint.keep_last=1"]


def timed(fn: Callable[[], object]) -> float:
    start_s = time.perf_counter()
    fn()
    return time.perf_counter() - start_s


class PeakMemory:
    """The peak of this process's resident bytes above those at the start, sampled."""

    def __enter__(self) -> "PeakMemory":
        self._process, self._stop = psutil.Process(), threading.Event()
        self.extra, self._before = 0, self._process.memory_info().rss
        self._thread = threading.Thread(target=self._sample)
        self._thread.start()
        return self

    def _sample(self) -> None:
        while not self._stop.wait(0.005):
            self.extra = max(self.extra, self._process.memory_info().rss - self._before)

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


def measure(rank: int, cfg: RunConfig, directory: Path, token: str) -> dict[str, list[float]]:
    """Return what this rank measured in each round, by name: seconds, and bytes of memory."""
    groups = groups_of(plan_layout(cfg, N_RANKS), rank)
    engine, _ = build_engine(cfg, groups)
    engine.make_optimizer_state(KINDS, {"step": 1.0})
    router_state = RouterState.initial(cfg.model)
    run_dir = directory / "run"
    sync_cfg = cfg.model_copy(update={"checkpoint": cfg.checkpoint.model_copy(update={"async_save": False})})
    sync_saver = saver_of(run_dir, groups, sync_cfg, token=token)
    saver = saver_of(run_dir, groups, cfg, token=token)
    found: dict[str, list[float]] = {
        name: [] for name in ("copy", "stall", "written", "sync", "bare", "first")
    }
    buffers: dict = {}
    rank_state = rank_state_of(engine, router_state, groups)
    # The first save makes the buffers, which later ones reuse.
    with PeakMemory() as memory:
        saver.save(rank_state, state_at(1))
        saver.wait()
    found["first"].append(memory.extra)
    rank_state.copy_to_host(buffers)
    for i in range(N_ROUNDS):
        dist.barrier()
        found["copy"].append(timed(lambda: rank_state.copy_to_host(buffers)))
        dist.barrier()
        start_s = time.perf_counter()
        saver.save(rank_state, state_at(2 + 2 * i))
        found["stall"].append(time.perf_counter() - start_s)
        saver.wait()
        found["written"].append(time.perf_counter() - start_s)
        dist.barrier()
        found["sync"].append(timed(lambda i=i: sync_saver.save(rank_state, state_at(3 + 2 * i))))
        dist.barrier()
        found["bare"].append(timed(lambda: write_bare(directory / f"bare-{rank}", buffers)))
    saver.close()
    sync_saver.close()
    engine.close()
    return found


def write_bare(path: Path, buffers: dict) -> None:
    """Write and flush the same bytes, and nothing else."""
    with path.open("wb") as file:
        for tensor in buffers.values():
            file.write(memoryview(tensor.numpy()).cast("B"))
        file.flush()
        os.fsync(file.fileno())


def checkpoint_rows() -> list[Row]:
    cfg = load_config(RECIPE, SETTINGS)
    expected = 12 * n_params(cfg.model)
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        (directory / "run").mkdir()
        ranks = run_ranks(measure, N_RANKS, cfg, directory, take_over(directory / "run"))
        (path,) = list_checkpoints(directory / "run")
        n_bytes = sum(file.stat().st_size for file in path.iterdir())
        verify = [timed(lambda: verify_checkpoint(path)) for _ in range(N_ROUNDS)]
    # All ranks wait for the slowest.
    rounds = {
        name: [max(times) for times in zip(*(r[name] for r in ranks), strict=True)] for name in ranks[0]
    }
    extra = [r["first"][0] / (expected / N_RANKS) for r in ranks]
    rows = [
        Row.of("size over 12 bytes a parameter", [n_bytes / expected], note=f"{n_bytes:,} bytes"),
        Row.of("memory of the first save over a rank's part of the bytes", extra),
    ]
    names = {
        "copy": "copy into buffers, nothing else",
        "stall": "asynchronous save, training waits",
        "written": "asynchronous save, until it has its name",
        "sync": "synchronous save, training waits",
    }
    for name, words in names.items():
        rows.append(_row(words, rounds[name], rounds["bare"], n_bytes))
    return [*rows, _row("verify, one process, from the page cache", verify, rounds["bare"], n_bytes)]


def _row(words: str, seconds: list[float], bare: list[float], n_bytes: int) -> Row:
    note = f"{in_ms(seconds)}, {n_bytes / 1e6 / statistics.median(seconds):,.0f} MB/s"
    return Row.of(f"{words}, over the same bytes written and flushed", over(seconds, bare), note=note)
