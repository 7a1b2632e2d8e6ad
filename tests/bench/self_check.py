"""What the engine's check of its first step costs: `python -m tests.bench self-check`."""

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import Tensor

from tests.bench.rows import Row
from tests.bench.side_by_side import in_ms, over
from tests.layouts import groups_of, with_parallel
from tests.ranks import run_ranks
from tests.runs import rank_batch, uneven_batch
from turnout.launch.settings import load_config
from turnout.moe.load_balancing import RouterState
from turnout.training.batches import split_microbatches
from turnout.training.config.run import RunConfig
from turnout.training.engine.build import build_engine
from turnout.training.engine.first_step_check import FirstStepCheck, ReducedFragment
from turnout.training.parallel.layout import has_own_expert_groups, plan_layout
from turnout.training.step import train_step

N_STEPS = 12


class TimedCheck(FirstStepCheck):
    """Adds up the seconds spent in the check: a step's time varies by more than the check costs."""

    seconds = 0.0

    def norm(self, fragments: Iterable[ReducedFragment]) -> Tensor:
        with self._timed():
            return super().norm(fragments)

    def check_gradients(self, fragments: Iterable[ReducedFragment]) -> None:
        with self._timed():
            super().check_gradients(fragments)

    def _note(self, name: str, gradient: Tensor) -> None:
        with self._timed():
            super()._note(name, gradient)

    @contextmanager
    def _timed(self) -> Iterator[None]:
        start_s = time.perf_counter()
        yield
        self.seconds += time.perf_counter() - start_s


def time_steps(rank: int, cfg: RunConfig, world_size: int) -> tuple[list[float], list[float]]:
    """Return the seconds of each step, and of the check in it."""
    layout = plan_layout(cfg, world_size)
    groups = groups_of(layout, rank)
    engine, _ = build_engine(cfg, groups)
    state = RouterState.initial(cfg.model)
    own_batch = rank_batch(uneven_batch(cfg, 0), layout.dp_rank(rank), layout.dp)
    microbatches = split_microbatches(own_batch, cfg.train.microbatch_seqs)
    step_s, check_s = [], []
    for i in range(N_STEPS):
        start_s = time.perf_counter()
        check = TimedCheck(engine.module, groups, has_expert_groups=has_own_expert_groups(layout))
        built_s = time.perf_counter() - start_s
        engine._check = check
        start_s = time.perf_counter()
        train_step(engine, microbatches, state, step=i + 1, lr=1e-4, groups=groups)
        step_s.append(time.perf_counter() - start_s)
        check_s.append(built_s + check.seconds)
    engine.close()
    return step_s, check_s


def self_check_rows() -> list[Row]:
    rows = []
    for parallel in ({"tp": 1, "ep": 1}, {"tp": 1, "ep": 2}, {"tp": 2, "ep": 2}):
        cfg = with_parallel(load_config("tiny"), **parallel)
        steps, checks = run_ranks(time_steps, 2, cfg, 2)[0]
        rows.append(
            Row.of(
                f"fraction of its step, tiny, fp32, 2 ranks, tp {parallel['tp']}, ep {parallel['ep']}",
                over(checks, steps),
                note=f"{in_ms(checks)} of {in_ms(steps)}",
            )
        )
    return rows
