"""Shrink a config to tiny sizes with the same structure and the same fitting layouts, for `turnout doctor`.

Unchanged are the choice, weighting and balancing of experts, the kinds of layers, the ratio of heads,
precision and clipping. Every size that a layout must divide remains divisible by the same numbers of ranks.
Pure.
"""

import math
from collections.abc import Callable

from turnout.moe.config import ModelConfig
from turnout.moe.experts.requirements import REQUIREMENTS
from turnout.training.config.run import RunConfig

N_STEPS = 3  # of training/doctor/parity.py: a balancing-only step and two updates
# Every model's gradient norm is above this, so that clipping is active whatever the original limit.
CLIP_NORM = 0.05


def shrink(cfg: RunConfig, world_size: int) -> RunConfig:
    """Return the small version of cfg for world_size ranks. Its own layout is plain data parallelism.

    A batch has at least 4 sequences for every data-parallel rank, so that it can be split into micro-batches.
    """
    backend = cpu_backend(cfg.train.expert_backend)
    multiple = 1 if backend == "auto" else REQUIREMENTS[backend].width_multiple
    model = shrink_model(cfg.model, world_size, multiple=multiple)
    batch_seqs = 4 * world_size if world_size > 1 else 8
    schedule = {"warmup_steps": 0, "decay_frac": 1.0 if cfg.optim.schedule.kind == "wsd" else None}
    tree = cfg.model_dump()
    tree["model"] = model.model_dump()
    tree["parallel"] |= {"tp": 1, "ep": 1, "sequence_parallel": False, "ep_chunks": 1}
    tree["train"] |= {
        "n_steps": N_STEPS,
        "batch_tokens": batch_seqs * model.seq_len,
        "microbatch_seqs": 1,
        "clip_norm": None if cfg.train.clip_norm is None else CLIP_NORM,
        "recompute": "none",
        "expert_backend": backend,
        "compile": False,  # it takes seconds per variant, for models that compute for milliseconds
    }
    tree["optim"]["schedule"] |= schedule
    del tree["sample"], tree["guard"]  # they may require more steps or longer sequences
    return RunConfig.model_validate(tree)


def cpu_backend(name: str) -> str:
    """Return an expert backend, or if it needs a GPU the one that replaces it on a CPU."""
    return "auto" if name != "auto" and REQUIREMENTS[name].is_gpu_only else name


def shrink_model(model: ModelConfig, world_size: int, *, multiple: int = 8) -> ModelConfig:
    """Return the small version of a model. multiple: must divide the widths of experts' matrices."""

    def small(size: int, at_least: int, step: int = 1) -> int:
        return _like(size, at_least, world_size, step)

    n_dense_layers = min(1, model.n_dense_layers)
    n_kv_heads = small(model.n_kv_heads, 1)
    seq_len = small(model.seq_len, 16)
    d_model = min(model.d_model, 64)
    sizes = {
        "n_layers": n_dense_layers + min(2, model.n_moe_layers),
        "n_dense_layers": n_dense_layers,
        "d_model": d_model,
        "n_kv_heads": n_kv_heads,
        "n_heads": n_kv_heads * (model.n_heads // model.n_kv_heads),
        "d_head": min(model.d_head, 8),
        "d_expert": _small_expert(model, world_size, multiple),
        "d_ff": None if model.d_ff is None else small(model.d_ff, 32),
        "n_experts": _few_experts(model, world_size),
        "vocab_size": small(model.vocab_size, 64),
        "seq_len": seq_len,
        "sliding_window": None if model.sliding_window is None else min(model.sliding_window, seq_len // 2),
        # Router logits and activations initially have the same spread as in the wide model.
        "init_std": model.init_std * math.sqrt(model.d_model / d_model),
    }
    return ModelConfig.model_validate(model.model_dump() | sizes)


def _like(size: int, at_least: int, world_size: int, step: int = 1) -> int:
    """Return the least multiple of step, at most size, that the same numbers of ranks divide."""
    shared = math.gcd(size, world_size)
    return _first(lambda n: n >= at_least and math.gcd(n, world_size) == shared, step, size)


def _small_expert(model: ModelConfig, world_size: int, multiple: int) -> int:
    """Return d_expert. Tensor parallelism splits the shared experts by their joint width."""
    shared = math.gcd(model.d_shared, world_size)

    def fits(d_expert: int) -> bool:
        return d_expert >= 16 and math.gcd(model.n_shared_experts * d_expert, world_size) == shared

    return _first(fits, multiple, model.d_expert)


def _few_experts(model: ModelConfig, world_size: int) -> int:
    """Return n_experts: enough for a choice among and within groups, and if possible two on each rank."""
    router, shared = model.router, math.gcd(model.n_experts, world_size)
    at_least = max(2 * model.top_k, 2 * world_size)
    if router.capacity_factor is not None:
        at_least = max(at_least, math.floor(router.capacity_factor * model.top_k) + 1)  # it must drop rows

    def fits(n_experts: int) -> bool:
        reachable = n_experts // router.n_groups * router.top_groups
        return (
            n_experts >= at_least
            and n_experts % router.n_groups == 0
            and (router.n_groups == 1 or reachable >= 2 * model.top_k)
            and math.gcd(n_experts, world_size) == shared
        )

    return _first(fits, 1, model.n_experts)


def _first(fits: Callable[[int], bool], step: int, limit: int) -> int:
    """Return the least multiple of step below limit that fits, otherwise limit."""
    return next((n for n in range(step, limit, step) if fits(n)), limit)
