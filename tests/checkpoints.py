"""Checkpoints for tests: a state in which no two elements of a tensor are equal, at any layout."""

from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from tests.layouts import build_objective
from tests.ranks import join_alone
from tests.runs import run_config
from turnout.moe.load_balancing import RouterState
from turnout.moe.model import build_decoder
from turnout.moe.parallel.sharding import own_part, split_of
from turnout.training.checkpoint.directory import checkpoint_path
from turnout.training.checkpoint.durable_io import Disk
from turnout.training.checkpoint.manifest import Attached, DataIdentity, SavedLayout, TrainingState
from turnout.training.checkpoint.rank_state import MODULE_PREFIX, Placement, RankState
from turnout.training.checkpoint.resharding import Matrix, Shard
from turnout.training.checkpoint.saver import Saver
from turnout.training.checkpoint.tensor_files import key_of
from turnout.training.config.checkpoint import CheckpointConfig
from turnout.training.config.run import RunConfig
from turnout.training.engine.build import put_under_engine
from turnout.training.engine.engine import Engine
from turnout.training.guard import GuardState
from turnout.training.optimizers.adamw import build_adamw
from turnout.training.parallel.groups import Groups
from turnout.training.parallel.layout import Layout
from turnout.training.run_control import FencingToken, take_over

KINDS = ("master", "exp_avg", "exp_avg_sq")
APPLIED_STEPS = 7.0
ATTACHED = Attached(DataIdentity(corpus_hash="c", tokenizer_sha256="t"), {"config.toml": b"# none\n"})

# The smallest checkpoint: one parameter, w, split by rows.
SMALL_KINDS = ("master", "exp_avg")
SMALL_SHAPE = (6, 4)
ALL_KEPT = CheckpointConfig(every_steps=1, keep_last=100, async_save=False)


def unique_state(cfg: RunConfig) -> dict[tuple[str, str], Tensor]:
    """Return the whole tensors of a model by (kind, name). Training can continue from them.

    No two elements of a kind are equal, nor are the elements of different kinds at the same index.
    """
    scales = {"master": (1.0, -0.5), "exp_avg": (2**-6, -(2**-7)), "exp_avg_sq": (2**-12, 2**-20)}
    state, n = {}, 0
    for name, parameter in build_decoder(cfg.model, expert_backend="reference").named_parameters():
        for kind, (scale, offset) in scales.items():
            # An index times an odd number, modulo a power of two: distinct, and exact in fp32.
            values = (n + torch.arange(parameter.numel())) * 40503 % 2**22
            state[kind, name] = (values.double() / 2**22 * scale + offset).float().view(parameter.shape)
            n += parameter.numel()
    assert n < 2**22
    return state


def unique_router_state(cfg: RunConfig) -> RouterState:
    shape = (cfg.model.n_moe_layers, cfg.model.n_experts)
    values_ME = torch.arange(shape[0] * shape[1], dtype=torch.float32).view(shape)
    return RouterState(values_ME / 1024, (values_ME + 1) / (values_ME + 1).sum(-1, keepdim=True))


def build_engine(cfg: RunConfig, groups: Groups) -> Engine:
    objective = build_objective(cfg, groups)
    return put_under_engine(
        objective, cfg, groups, partial(build_adamw, cfg=cfg.optim), checks_first_step=False
    )


def held_here(whole: Tensor, name: str, start: int, n: int, groups: Groups) -> Tensor:
    """Return a rank's fragment of a whole tensor, computed without training/checkpoint/resharding.py."""
    split, layout = split_of(name), groups.layout
    size, index = 1, 0
    if split is not None and split.over == "tp":
        size, index = layout.tp, layout.tp_rank(groups.rank)
    elif split is not None:
        size, index = layout.ep, layout.ep_rank(groups.rank)
    return own_part(whole, split, size, index).flatten()[start : start + n]


def fill(engine: Engine, groups: Groups, state: dict[tuple[str, str], Tensor]) -> None:
    """Put the state into the engine, at any layout."""
    engine.make_optimizer_state(KINDS, {"step": APPLIED_STEPS})
    for fragment in engine.fragments():
        for kind, values in fragment.values.items():
            whole = state[kind, fragment.name.removeprefix(MODULE_PREFIX)]
            values.copy_(held_here(whole, fragment.name, fragment.start, values.numel(), groups))
    engine.adopt_masters()


def differing(engine: Engine, groups: Groups, state: dict[tuple[str, str], Tensor]) -> list[str]:
    """Return which fragments of the engine differ in any bit from the state."""
    wrong = []
    for fragment in engine.fragments():
        name = fragment.name.removeprefix(MODULE_PREFIX)
        assert set(fragment.values) == set(KINDS)
        for kind, values in fragment.values.items():
            want = held_here(state[kind, name], fragment.name, fragment.start, values.numel(), groups)
            if not torch.equal(values, want):
                wrong.append(f"{kind}/{name}")
    return wrong


def state_at(step: int, **changes: object) -> TrainingState:
    plain = {
        "step": step,
        "tokens_seen": 96 * step,
        "n_skipped": 0,
        "n_skipped_in_a_row": 0,
        "n_interventions": 0,
        "optimizer": {"step": APPLIED_STEPS},
        "loss_scaler": {},
        "guard": asdict(GuardState.initial()),
        "skipped": (),
    }
    return TrainingState.model_validate({**plain, **changes})


def saver_of(
    run_dir: Path,
    groups: Groups,
    cfg: RunConfig,
    *,
    token: str,
    disk: Disk | None = None,
    attached: Attached = ATTACHED,
) -> Saver:
    layout = groups.layout
    saved_layout = SavedLayout(
        world_size=layout.world_size, tp=layout.tp, ep=layout.ep, zero_stage=cfg.parallel.zero_stage
    )
    return Saver(run_dir, groups, cfg.checkpoint, FencingToken(run_dir, token), attached, saved_layout, disk)


def small_values(step: int, kind: str) -> Tensor:
    return torch.arange(prod(SMALL_SHAPE), dtype=torch.float32) + 1000 * step + 100 * SMALL_KINDS.index(kind)


def small_rank_state(step: int, rank: int, n_ranks: int) -> RankState:
    """Return one rank's rows of the only parameter."""
    whole = prod(SMALL_SHAPE)
    n = whole // n_ranks
    placement = Placement(SMALL_SHAPE, Matrix(1, whole), Shard(0, whole, n * rank, n * rank + n))
    rows = {
        key_of(kind, "w"): small_values(step, kind)[n * rank : n * (rank + 1)].clone() for kind in SMALL_KINDS
    }
    return RankState(SMALL_KINDS, {"w": placement}, rows, {"bias": torch.full((3,), float(step))})


def save_small(
    rank: int,
    run_dir: Path,
    steps: Sequence[int],
    *,
    token: str,
    n_ranks: int = 1,
    attached: Attached = ATTACHED,
    kept: CheckpointConfig = ALL_KEPT,
    **state: object,
) -> None:
    """Save the smallest checkpoint at these steps. Collective."""
    cfg = run_config().model_copy(update={"checkpoint": kept})
    groups = Groups(Layout(n_ranks), rank, torch.device("cpu"), timeout_s=30)
    saver = saver_of(run_dir, groups, cfg, token=token, attached=attached)
    for step in steps:
        saver.save(small_rank_state(step, rank, n_ranks), state_at(step, **state))
    saver.close()
    groups.close()


def save_alone(run_dir: Path, steps: Sequence[int], **state: object) -> list[Path]:
    """Save the smallest checkpoint in this process; return the paths in the order of steps."""
    join_alone()
    run_dir.mkdir(exist_ok=True)
    save_small(0, run_dir, steps, token=take_over(run_dir), **state)
    return [checkpoint_path(run_dir, step) for step in steps]
