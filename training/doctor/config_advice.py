"""Advice on settings that are valid but usually a mistake: each rule with its reason, source and remedy.

Settings that cannot work are refused by the config models (training/config/run.py, moe/config.py) and by
plan_layout. The rules here cover settings that work but usually end badly. They stop no run. Pure: a
RunConfig in, a list of Advice out.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

from turnout.moe.flops import flops_per_token, n_params
from turnout.training.config.run import RunConfig

# Tile sizes of matrix products on GPUs: MegaBlocks (Gale et al. 2022, 2211.15841) and cuBLAS.
TILE = 128
RANKS_PER_NODE = 8


@dataclass(frozen=True)
class Advice:
    """One setting that deserves a second look.

    severity  "warning": the loss or the whole run is at risk; "note": only its speed or memory
    """

    rule: str
    severity: Literal["warning", "note"]
    path: str
    reason: str
    remedy: str
    value: Any = None


Rule = Iterator[Advice]


def lint(cfg: RunConfig) -> list[Advice]:
    """Return all advice on a config, warnings first."""
    rules = (_balancing, _batch_statistics, _routing, _optimizer, _schedule, _scale, _run, _shapes, _layout)
    found = [replace(a, value=_value_at(cfg, a.path)) for rule in rules for a in rule(cfg)]
    return sorted(found, key=lambda advice: advice.severity != "warning")


def warning(rule: str, path: str, reason: str, remedy: str) -> Advice:
    """Return advice on a setting that risks the loss or the run."""
    return Advice(rule, "warning", path, reason, remedy)


def note(rule: str, path: str, reason: str, remedy: str) -> Advice:
    """Return advice on a setting that costs speed or memory."""
    return Advice(rule, "note", path, reason, remedy)


def _value_at(cfg: RunConfig, path: str) -> Any:
    value: Any = cfg
    for name in path.split("."):
        value = getattr(value, name)
    return value


def _balancing(cfg: RunConfig) -> Rule:
    balance, router = cfg.model.balance, cfg.model.router
    if balance.coef == 0 and balance.bias_rate == 0:
        yield warning(
            "no-balancing",
            "model.balance.coef",
            "with model.balance.bias_rate=0 too, nothing keeps experts evenly loaded, and the router comes "
            "to favour the same few (Shazeer et al. 2017, 1701.06538, section 4)",
            "set model.balance.coef=0.01, or model.balance.bias_rate=0.001",
        )
    if balance.coef > 0.1:
        yield warning(
            "strong-balancing",
            "model.balance.coef",
            "a coefficient this large competes with the cross-entropy; 0.01 balances without that (Switch "
            "Transformer, 2101.03961, section 2.2)",
            "use at most 0.1",
        )
    if balance.bias_rate and balance.coef >= 0.01:
        yield warning(
            "two-balancings",
            "model.balance.coef",
            f"model.balance.bias_rate={balance.bias_rate} exists to avoid this loss's gradient; "
            "together with it DeepSeek-V3 uses 0.0001 (2412.19437, section 4.2)",
            "use model.balance.coef=0.0001, or model.balance.bias_rate=0",
        )
    # A softmax score is 1 / n_experts on average, a sigmoid score about 0.5.
    mean_score = 1 / cfg.model.n_experts if router.score == "softmax" else 0.5
    limit = (0.1 if router.score == "softmax" else 0.02) * mean_score
    if balance.bias_rate > limit:
        yield warning(
            "large-bias-rate",
            "model.balance.bias_rate",
            f"a {router.score} score is about {mean_score:.2g} here, so a few steps of the bias outweigh "
            "it and loads oscillate; 0.001 is usual for sigmoid scores (Wang et al. 2024, 2408.15664)",
            f"use at most {limit:.2g}",
        )
    if balance.z_coef == 0 and router.score == "softmax" and cfg.train.precision != "fp32":
        yield warning(
            "no-z-loss",
            "model.balance.z_coef",
            "nothing bounds the router's logits, whose growth makes half-precision training of sparse "
            "models unstable (ST-MoE, Zoph et al. 2022, 2202.08906)",
            "use model.balance.z_coef=0.001",
        )


def _batch_statistics(cfg: RunConfig) -> Rule:
    model, balance = cfg.model, cfg.model.balance
    rows_per_step = cfg.train.batch_tokens * model.top_k / model.n_experts
    if (balance.scope == "batch" or balance.bias_rate) and rows_per_step < 64:
        yield warning(
            "noisy-loads",
            "train.batch_tokens",
            f"an expert sees {rows_per_step:.3g} rows per step when balanced, so its measured load is "
            f"uncertain by {rows_per_step**-0.5:.0%} and balancing follows the noise",
            f"use at least {_round_up(64 * model.n_experts // model.top_k, model.seq_len)}",
        )
    rows_per_seq = model.seq_len * model.top_k / model.n_experts
    if balance.scope == "sequence" and balance.coef and rows_per_seq < 8:
        yield warning(
            "short-sequences",
            "model.balance.scope",
            f"an expert sees {rows_per_seq:.3g} rows of a sequence when balanced; forcing so few to be "
            "even prevents experts from specialising (Qiu et al. 2025, 2501.11873)",
            "use model.balance.scope=batch",
        )


def _routing(cfg: RunConfig) -> Rule:
    model, router = cfg.model, cfg.model.router
    if router.score == "sigmoid" and not router.normalize and model.top_k > 1:
        yield warning(
            "unnormalised-sigmoid",
            "model.router.normalize",
            f"sigmoid weights of a token sum to anything from 0 to top_k={model.top_k}, so the layer's "
            "output varies in scale from token to token (DeepSeek-V3 divides by the sum: 2412.19437, "
            "section 2.1.2)",
            "use model.router.normalize=true",
        )
    factor = router.capacity_factor
    if factor is not None and factor < 1:
        yield warning(
            "capacity-below-one",
            "model.router.capacity_factor",
            f"{1 - factor:.0%} of the rows are dropped even when experts are perfectly balanced",
            "use 1.25, or leave it out: dropless",
        )
    if factor is not None and factor * model.top_k >= model.n_experts:
        yield note(
            "capacity-without-effect",
            "model.router.capacity_factor",
            "an expert can take every token of a sequence, so no row is ever dropped and the extra sorting "
            "is wasted",
            f"use less than n_experts / top_k = {model.n_experts / model.top_k:.3g}, or leave it out",
        )
    if model.top_k == model.n_experts:
        yield warning(
            "every-expert",
            "model.top_k",
            "every token goes to every expert: a dense model with the cost of routing",
            f"use at most {model.n_experts // 2}",
        )
    logit_std = model.init_std * math.sqrt(model.d_model)
    if logit_std > 3:
        yield warning(
            "loud-initialisation",
            "model.init_std",
            f"router logits start with a standard deviation of {logit_std:.2g}, so the first, arbitrary "
            "choices have probabilities near 1 and hardly any gradient corrects them (ST-MoE, 2202.08906: "
            "smaller is more stable)",
            f"use at most {1 / math.sqrt(model.d_model):.1g}",
        )


def _optimizer(cfg: RunConfig) -> Rule:
    optim, train = cfg.optim, cfg.train
    if train.clip_norm is None:
        yield warning(
            "no-clipping",
            "train.clip_norm",
            "one bad batch can undo a run, and routing makes gradients jump; published MoE runs clip at "
            "1.0 (OLMoE, 2409.02060, table 10; DeepSeek-V3, 2412.19437, section 4.2)",
            "use train.clip_norm=1.0",
        )
    if optim.betas[1] >= 0.999 and train.batch_tokens >= 2**19:
        yield warning(
            "slow-second-moment",
            "optim.betas",
            f"the second moment averages {1 / (1 - optim.betas[1]):,.0f} steps and lags behind the "
            "gradient in large batches, which shows as loss spikes (Wortsman et al. 2023, 2304.13013)",
            "use [0.9, 0.95]",
        )
    if optim.weight_decay == 0:
        yield warning(
            "no-weight-decay",
            "optim.weight_decay",
            "weights grow without bound, which lowers the effective learning rate uncontrollably (Kosson "
            "et al. 2023, 2305.17212)",
            "use 0.1",
        )
    gradient_rms = (train.clip_norm or 1.0) / math.sqrt(n_params(cfg.model))
    if optim.eps > 0.1 * gradient_rms:
        yield warning(
            "large-eps",
            "optim.eps",
            f"a clipped gradient is about {gradient_rms:.1e} per weight, so eps damps every update "
            "(Wortsman et al. 2023, 2309.14322)",
            "use 1e-8 or less",
        )
    if train.precision == "fp16":
        yield warning(
            "fp16",
            "train.precision",
            "its narrow range needs loss scaling, which skips steps, and was blamed for instabilities "
            "that bf16 did not show (BLOOM, 2211.05100)",
            "use bf16",
        )


def _schedule(cfg: RunConfig) -> Rule:
    schedule, n_steps = cfg.optim.schedule, cfg.train.n_steps
    wanted = math.ceil(min(2 / (1 - cfg.optim.betas[1]), n_steps / 10))
    if schedule.warmup_steps < wanted:
        yield warning(
            "short-warmup",
            "optim.schedule.warmup_steps",
            "AdamW divides by a second moment that is not yet well estimated; 2 / (1 - beta2) steps of "
            "warm-up are enough (Ma and Yarats 2019, 1910.04209)",
            f"use at least {wanted}",
        )
    if schedule.final_frac > 0.3:
        yield warning(
            "little-decay",
            "optim.schedule.final_frac",
            "much of the loss reduction happens while the rate decays (Hu et al. 2024, 2404.06395, section "
            "4), and here it hardly decays",
            "use 0.1 or less",
        )
    if schedule.decay_frac is not None and schedule.decay_frac < 0.05:
        yield warning(
            "short-decay",
            "optim.schedule.decay_frac",
            "a decay over 10 to 20% of the steps is needed to reach a cosine's loss (Hagele et al. 2024, "
            "2405.18392)",
            "use 0.1 to 0.2",
        )


def _scale(cfg: RunConfig) -> Rule:
    """DeepSeek LLM's fits of learning rate and batch size to compute (2401.02954, section 3.1).

    They lie within a factor of 3 of the settings of OLMoE and of the packaged recipes.
    """
    train = cfg.train
    flops = float(train.n_steps * train.batch_tokens * flops_per_token(cfg.model))
    best_lr, best_batch_tokens = 0.3118 * flops**-0.125, 0.2920 * flops**0.3271
    source = f"for {flops:.1e} FLOPs in all, DeepSeek LLM's fit (2401.02954, section 3.1) is"
    if cfg.optim.lr > 4 * best_lr:
        yield warning(
            "high-lr",
            "optim.lr",
            f"{source} {best_lr:.1e}, and far above it training diverges",
            f"use about {best_lr:.1e}",
        )
    if cfg.optim.lr < best_lr / 20:
        yield warning(
            "low-lr",
            "optim.lr",
            f"{source} {best_lr:.1e}; far below it the run learns little for its compute",
            f"use about {best_lr:.1e}, unless the run continues from trained weights",
        )
    if train.batch_tokens > 8 * best_batch_tokens:
        yield warning(
            "large-batch",
            "train.batch_tokens",
            f"{source} {best_batch_tokens:.2g} tokens, and beyond the critical batch size more tokens no "
            "longer improve a step (McCandlish et al. 2018, 1812.06162)",
            "use a smaller batch and more steps",
        )


def _run(cfg: RunConfig) -> Rule:
    if cfg.eval.every_steps is None and cfg.train.n_steps > 10_000:
        yield warning(
            "late-evaluation",
            "eval.every_steps",
            f"the held-out loss is not known before all {cfg.train.n_steps:,} steps are done",
            "evaluate every few thousand steps, with eval.max_documents to keep it short",
        )
    if cfg.checkpoint.every_steps is None and cfg.train.n_steps > 1000:
        yield warning(
            "no-checkpoints",
            "checkpoint.every_steps",
            f"nothing is saved before all {cfg.train.n_steps:,} steps are done; a kill until then loses all",
            "save every few hundred steps; training waits only while the state is copied",
        )
    if cfg.parallel.timeout_s < 60:
        yield warning(
            "short-timeout",
            "parallel.timeout_s",
            "a rank that compiles, evaluates or writes to a slow filesystem is considered dead",
            "use at least 60",
        )
    if cfg.train.precision == "fp32" and n_params(cfg.model) > 10**9:
        yield note(
            "fp32",
            "train.precision",
            "activations take twice the memory and matrix products several times the time of bf16, which "
            "keeps fp32 masters",
            "use bf16",
        )


def _shapes(cfg: RunConfig) -> Rule:
    model, train = cfg.model, cfg.train
    if model.vocab_size % 64:
        yield _tile_note("vocab-tile", "model.vocab_size", model.vocab_size, 64, "the head's product")
    if model.n_experts % RANKS_PER_NODE:
        yield note(
            "experts-per-node",
            "model.n_experts",
            f"parallel.ep must divide it, and nodes have {RANKS_PER_NODE} GPUs; here only "
            f"{math.gcd(model.n_experts, RANKS_PER_NODE)} of them can share a layer's experts",
            f"use {_round_up(model.n_experts, RANKS_PER_NODE)}",
        )
    if train.precision == "fp32":
        return
    for name in ("d_model", "d_expert"):
        if getattr(model, name) % TILE:
            yield _tile_note(
                f"{name.replace('_', '-')}-tile",
                f"model.{name}",
                getattr(model, name),
                TILE,
                "an expert's product",
            )
    if model.d_head % 8 or model.d_head > 256:
        yield note(
            "slow-attention",
            "model.d_head",
            "flash attention supports multiples of 8 up to 256; others are slow and use O(seq_len^2) memory",
            "use 64 or 128",
        )
    if train.expert_backend == "reference":
        yield note(
            "slow-experts",
            "train.expert_backend",
            "this backend exists for comparisons; it keeps more activations and is slower",
            "use auto",
        )


def _tile_note(rule: str, path: str, value: int, tile: int, what: str) -> Advice:
    reason = f"{what} runs in tiles of {tile} on a GPU, and the last one is {value % tile / tile:.0%} full"
    return note(rule, path, reason, f"use {_round_up(value, tile)}")


def _layout(cfg: RunConfig) -> Rule:
    parallel = cfg.parallel
    if parallel.tp > 1 and not parallel.sequence_parallel:
        yield note(
            "no-sequence-parallel",
            "parallel.sequence_parallel",
            f"each of the {parallel.tp} ranks holds all activations of norms and residuals; splitting "
            "them needs no additional communication (Korthikanti et al. 2022, 2205.05198, section 4.2)",
            "use parallel.sequence_parallel=true",
        )
    rows = rows_per_expert(cfg)
    if cfg.train.precision != "fp32" and rows < 64:
        yield note(
            "thin-experts",
            "train.microbatch_seqs",
            f"an expert's matrix product has {rows:.3g} rows per micro-batch, but a GPU's tile has {TILE}",
            "use more sequences per micro-batch with train.recompute, or a larger parallel.ep",
        )


def rows_per_expert(cfg: RunConfig) -> float:
    """Return the rows per expert and forward pass if load is even, from all ranks of its ep group."""
    model = cfg.model
    n_tokens = cfg.train.microbatch_seqs * model.seq_len * cfg.parallel.ep / cfg.parallel.tp
    return n_tokens * model.top_k / model.n_experts


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
