"""Build one rank's part of the decoder, and the engine around it."""

from collections.abc import Callable
from functools import partial

import torch

from turnout.moe.init_weights import init_weights
from turnout.moe.model import Decoder, build_decoder
from turnout.training.config.run import RunConfig
from turnout.training.engine.engine import Engine
from turnout.training.hardware import expert_backend_of
from turnout.training.objective import Objective
from turnout.training.optimizers.adamw import ParamGroups, build_adamw, param_groups
from turnout.training.parallel.groups import Groups
from turnout.training.parallel.layout import n_microbatches


def build_local_decoder(cfg: RunConfig, groups: Groups, dtype: torch.dtype = torch.float32) -> Decoder:
    """Build this rank's part of the decoder with its initial weights, which are the same in every layout."""
    decoder = build_decoder(
        cfg.model,
        device=groups.device,
        dtype=dtype,
        dispatcher=groups.dispatcher(max_load=cfg.parallel.ep_max_load, min_chunks=cfg.parallel.ep_chunks),
        tp=groups.tensor_parallel(sequence_parallel=cfg.parallel.sequence_parallel),
        expert_backend=expert_backend_of(cfg, groups.device),
        recompute=cfg.train.recompute,
    )
    if cfg.train.compile:
        decoder.compile_blocks()
    first_expert = groups.layout.local_experts(groups.rank, cfg.model.n_experts).start
    init_weights(decoder, seed=cfg.train.seed, first_expert=first_expert)
    return decoder


def build_engine(cfg: RunConfig, groups: Groups) -> tuple[Engine, Decoder]:
    """Build this rank's decoder, and an engine with its optimizer around it. Collective."""
    decoder = build_local_decoder(cfg, groups)
    return put_under_engine(Objective(decoder), cfg, groups, partial(build_adamw, cfg=cfg.optim)), decoder


def put_under_engine(
    objective: Objective,
    cfg: RunConfig,
    groups: Groups,
    build_optimizer: Callable[[ParamGroups], torch.optim.Optimizer],
    *,
    checks_first_step: bool = True,
) -> Engine:
    """Build the engine around this rank's objective. Collective."""
    return Engine(
        objective,
        cfg.train,
        groups,
        zero_stage=cfg.parallel.zero_stage,
        n_microbatches=n_microbatches(cfg, groups.layout),
        param_groups=param_groups(objective.named_parameters(), cfg.optim.weight_decay),
        build_optimizer=build_optimizer,
        checks_first_step=checks_first_step,
    )
