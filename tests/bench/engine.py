"""What the engine costs over a plain torch loop with the same model: `python -m tests.bench engine`.

One rank of one thread, the `tiny` recipe in fp32, the same micro-batches, clipping and AdamW on both sides.
"""

from collections.abc import Callable
from functools import partial
from itertools import count

import torch

from tests.bench.rows import Row
from tests.bench.side_by_side import in_ms, over, time_in_turn
from tests.layouts import groups_of
from tests.ranks import run_ranks
from tests.runs import uneven_batch
from turnout.data.loader import IGNORE_INDEX, Batch
from turnout.launch.settings import load_config
from turnout.moe.load_balancing import RouterState
from turnout.training.batches import split_microbatches
from turnout.training.config.run import RunConfig
from turnout.training.engine.build import build_local_decoder, put_under_engine
from turnout.training.objective import Objective
from turnout.training.optimizers.adamw import build_adamw, param_groups
from turnout.training.parallel.groups import Groups
from turnout.training.parallel.layout import plan_layout
from turnout.training.step import train_step


def engine_rows(n_rounds: int = 15) -> list[Row]:
    seconds = run_ranks(time_steps, 1, n_rounds)[0]
    engine, plain = seconds["engine"], seconds["plain"]
    note = f"{in_ms(engine)} and {in_ms(plain)}"
    return [Row.of("time of a step over a plain loop's", over(engine, plain), at_most=1.10, note=note)]


def time_steps(rank: int, n_rounds: int) -> dict[str, list[float]]:
    cfg = load_config("tiny")
    groups, batch = groups_of(plan_layout(cfg, 1), rank), uneven_batch(cfg, 0)
    ways = {"plain": plain_step(cfg, groups, batch), "engine": engine_step(cfg, groups, batch)}
    return time_in_turn(ways, n_rounds=n_rounds)


def engine_step(cfg: RunConfig, groups: Groups, batch: Batch) -> Callable[[], None]:
    objective = Objective(build_local_decoder(cfg, groups))
    engine = put_under_engine(objective, cfg, groups, partial(build_adamw, cfg=cfg.optim))
    microbatches = split_microbatches(batch, cfg.train.microbatch_seqs)
    state, steps = RouterState.initial(cfg.model), count(1)

    def run() -> None:
        train_step(engine, microbatches, state, step=next(steps), lr=1e-4, groups=groups)

    return run


def plain_step(cfg: RunConfig, groups: Groups, batch: Batch) -> Callable[[], None]:
    objective = Objective(build_local_decoder(cfg, groups))
    optimizer = build_adamw(param_groups(objective.named_parameters(), cfg.optim.weight_decay), cfg=cfg.optim)
    microbatches = split_microbatches(batch, cfg.train.microbatch_seqs)
    n_tokens = sum(int((microbatch.targets != IGNORE_INDEX).sum()) for microbatch in microbatches)
    state, clip_norm = RouterState.initial(cfg.model), cfg.train.clip_norm
    assert clip_norm is not None

    def run() -> None:
        optimizer.zero_grad()
        for microbatch in microbatches:
            (objective(microbatch, state).total / n_tokens).backward()
        torch.nn.utils.clip_grad_norm_(objective.parameters(), clip_norm)
        optimizer.step()

    return run
