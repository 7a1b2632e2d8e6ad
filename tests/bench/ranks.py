"""Two ranks that share the experts against one, at the same global batch: `python -m tests.bench ranks`.

The `tiny` recipe in fp32 as a run trains it, with its corpus, rows of metrics and TensorBoard; one thread per
rank. One rank and two ranks take turns, a block of steps each. The same matrix products by one process and by
two, measured in the same rounds, show what two cores could gain at best.
"""

import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from tests.bench.command import small_corpus
from tests.bench.rows import Row
from tests.bench.side_by_side import over
from tests.layouts import groups_of
from tests.ranks import run_ranks
from turnout.data.corpus import open_corpus
from turnout.data.loader import Batch, Loader
from turnout.launch.run_dir import attachments, create_run_dir
from turnout.launch.settings import load_config
from turnout.training import metrics
from turnout.training.config.run import RunConfig
from turnout.training.loop import Observer, Run
from turnout.training.parallel.layout import plan_layout
from turnout.training.run_control import FencingToken, StopFile, take_over, write_status

# So many that no run reaches its last step, at which it would evaluate and save.
SETTINGS = ["train.n_steps=100000"]
SETTINGS_OF = {1: ["parallel.ep=1"], 2: ["parallel.ep=2"]}
N_WARM_STEPS, N_STEPS = 5, 20  # a row of metrics is due after 20
N_PRODUCTS, PRODUCT_SIZE = 300, 512


@dataclass(frozen=True)
class Block:
    """Some steps of one rank. data_and_metrics_s: the CPU seconds of batches and rows of metrics."""

    wall_s: float
    cpu_s: float
    data_and_metrics_s: float


def rank_rows(n_rounds: int = 7) -> list[Row]:
    blocks: dict[int, list[Block]] = {1: [], 2: []}
    products: dict[int, list[float]] = {1: [], 2: []}
    with small_corpus() as corpus, tempfile.TemporaryDirectory() as place:
        runs = {n: make_run(Path(place) / f"{n}", corpus, n) for n in blocks}
        for n, run in runs.items():
            run_ranks(train_block, n, *run, N_WARM_STEPS)
        for _ in range(n_rounds):
            for n, run in runs.items():
                blocks[n].append(run_ranks(train_block, n, *run, N_STEPS)[0])
                products[n].append(max(run_ranks(multiply, n)))
    wall_s = {n: [block.wall_s for block in blocks[n]] for n in blocks}
    n_tokens = N_STEPS * load_config("tiny").train.batch_tokens
    note = " and ".join(f"{n_tokens / sorted(wall_s[n])[n_rounds // 2]:,.0f}" for n in (2, 1))
    twice = [2 * ratio for ratio in over(products[1], products[2])]
    rows = [
        Row.of("tokens/s of 2 ranks, EP 2, over 1", over(wall_s[1], wall_s[2]), at_least=1.8, note=note),
        Row.of(f"matrix products/s of 2 processes over 1, fp32, {PRODUCT_SIZE} wide", twice),
    ]
    for n in blocks:
        fractions = [block.data_and_metrics_s / block.cpu_s for block in blocks[n]]
        what = f"loader and metrics, fraction of the first rank's CPU time, {n} ranks"
        rows.append(Row.of(what, fractions, at_most=0.02))
    return rows


def make_run(run_dir: Path, corpus: Path, n_ranks: int) -> tuple[RunConfig, Path, str]:
    cfg = load_config("tiny", [*SETTINGS, *SETTINGS_OF[n_ranks], f"data.corpus={corpus}"])
    create_run_dir(run_dir, cfg, open_corpus(corpus, verify="size"), nproc=n_ranks)
    return cfg, run_dir, take_over(run_dir)


_runs: list["TimedRun"] = []  # this rank's, from its first block on


def train_block(rank: int, cfg: RunConfig, run_dir: Path, token: str, n_steps: int) -> Block:
    if not _runs:
        _runs.append(TimedRun(rank, cfg, run_dir, token))
        _runs[0].resume()
    return _runs[0].train_block(n_steps)


def multiply(rank: int) -> float:
    """Return this rank's wall seconds for N_PRODUCTS products."""
    left, right = (torch.ones(PRODUCT_SIZE, PRODUCT_SIZE) for _ in range(2))
    out = torch.empty_like(left)
    dist.barrier()
    start_s = time.perf_counter()
    for _ in range(N_PRODUCTS):
        torch.mm(left, right, out=out)
    return time.perf_counter() - start_s


class StopAfter(StopFile):
    """Looks for the file as in any run, and stops the run after n_steps more."""

    n_steps = 0

    def is_there(self) -> bool:
        self.n_steps -= 1
        return super().is_there() or self.n_steps == 0


class TimedLoader:
    """Adds up the CPU seconds of the thread that loads."""

    def __init__(self, loader: Loader) -> None:
        self._loader, self.seconds = loader, 0.0

    def batch(self, step: int, rows: slice | None = None) -> Batch:
        start_s = time.thread_time()
        batch = self._loader.batch(step, rows)
        self.seconds += time.thread_time() - start_s
        return batch


class TimedRun(Run):
    """A run in blocks of steps that adds up the CPU seconds of batches and rows of metrics."""

    def __init__(self, rank: int, cfg: RunConfig, run_dir: Path, token: str) -> None:
        groups = groups_of(plan_layout(cfg, dist.get_world_size()), rank)
        self._stop_after = StopAfter(run_dir, groups)
        observer = None
        if groups.is_first:
            observer = Observer(ignore, ignore, ignore, partial(write_status, run_dir))
        fencing_token, attached = FencingToken(run_dir, token), attachments(run_dir, cfg)
        super().__init__(cfg, run_dir, groups, observer, fencing_token, attached, self._stop_after)
        self._timed_loader, self._logging_s = TimedLoader(self._loader), 0.0
        self._loader = self._timed_loader

    def train_block(self, n_steps: int) -> Block:
        self._stop_after.n_steps, self._timed_loader.seconds, self._logging_s = n_steps, 0.0, 0.0
        dist.barrier()
        start_s, start_cpu_s = time.perf_counter(), time.process_time()
        assert self.train_steps() is None, "a finding of the guard"
        wall_s, cpu_s = time.perf_counter() - start_s, time.process_time() - start_cpu_s
        return Block(wall_s, cpu_s, self._timed_loader.seconds + self._logging_s)

    def _log(self, row: metrics.Row) -> None:
        start_s = time.process_time()
        super()._log(row)
        if self._metrics is not None:
            for tracker in self._metrics._trackers.values():
                tracker.writer.flush()  # waits for the writer thread, whose seconds count too
        self._logging_s += time.process_time() - start_s


def ignore(*_: object) -> None:
    """Do nothing."""
