"""What the engine costs over a plain torch loop of the same model: `python -m tests.bench engine`.

One rank of one thread, the `tiny` recipe in fp32, the same micro-batches, clipping and AdamW on both sides.
"""

from collections.abc import Callable
from functools import partial
from itertools import count

import torch

from data.loader import IGNORE_INDEX
from launch.settings import load_config
from moe.balance import RouterState
from tests.bench.side_by_side import Timing, time_in_turn
from tests.layouts import groups_of
from tests.ranks import run_ranks
from tests.runs import uneven_batch
from training.batches import split_microbatches
from training.build import build_local_decoder, put_under_engine
from training.config import RunConfig
from training.objective import Objective
from training.optimizer import build_adamw, param_groups
from training.parallel import Groups, plan_layout
from training.step import train_step


def print_engine_cost() -> None:
    print("\n### a step of `tiny`, fp32, one rank of one thread\n")
    print("| way | ms | ratio | spread |\n|---|---|---|---|")
    for name, found in run_ranks(time_steps, 1)[0].items():
        print(f"| {name} | {found.ms:.0f} | {found.ratio:.3f} | {found.low:.2f} to {found.high:.2f} |")


def time_steps(rank: int) -> dict[str, Timing]:
    torch.set_num_threads(1)
    cfg = load_config("tiny")
    groups = groups_of(plan_layout(cfg, 1), rank)
    ways = {"plain torch loop": plain_step(cfg, groups), "DeepSpeed engine": engine_step(cfg, groups)}
    return time_in_turn(ways, n_rounds=15)


def engine_step(cfg: RunConfig, groups: Groups) -> Callable[[], None]:
    objective = Objective(build_local_decoder(cfg, groups))
    engine = put_under_engine(objective, cfg, groups, partial(build_adamw, cfg=cfg.optim))
    microbatches = split_microbatches(uneven_batch(cfg, 0), cfg.train.microbatch_seqs)
    state, steps = RouterState.initial(cfg.model), count(1)

    def run() -> None:
        train_step(engine, microbatches, state, step=next(steps), lr=1e-4, groups=groups)

    return run


def plain_step(cfg: RunConfig, groups: Groups) -> Callable[[], None]:
    objective = Objective(build_local_decoder(cfg, groups))
    optimizer = build_adamw(param_groups(objective.named_parameters(), cfg.optim.weight_decay), cfg=cfg.optim)
    microbatches = split_microbatches(uneven_batch(cfg, 0), cfg.train.microbatch_seqs)
    n_tokens = sum(int((batch.targets != IGNORE_INDEX).sum()) for batch in microbatches)
    state, clip_norm = RouterState.initial(cfg.model), cfg.train.clip_norm
    assert clip_norm is not None

    def run() -> None:
        optimizer.zero_grad()
        for batch in microbatches:
            (objective(batch, state).total / n_tokens).backward()
        torch.nn.utils.clip_grad_norm_(objective.parameters(), clip_norm)
        optimizer.step()

    return run


if __name__ == "__main__":
    print_engine_cost()
