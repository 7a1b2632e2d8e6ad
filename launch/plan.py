"""What a run will need, counted before any rank starts: `turnout train --dry-run`."""

from dataclasses import dataclass

from accelerate import init_empty_weights

from data.corpus import Corpus
from moe.config import ModelConfig
from moe.counts import flops_per_token, n_active_params, n_params
from moe.model import Decoder
from moe.sharding import split_of
from training.config import RunConfig
from training.parallel import Layout, n_microbatches


@dataclass(frozen=True)
class StateBytes:
    """Bytes one rank holds of the training state, without activations."""

    weights: int
    gradients: int
    optimizer: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer


def count_built_params(cfg: ModelConfig) -> int:
    """Count the parameters of the real decoder, built without memory for its weights."""
    with init_empty_weights():
        decoder = Decoder(cfg)
    return sum(p.numel() for p in decoder.parameters())


def rank_params(cfg: ModelConfig, layout: Layout) -> tuple[int, int]:
    """Return how many parameters one rank holds: dense ones and those of routed experts."""
    with init_empty_weights():
        decoder = Decoder(cfg)
    dense = experts = 0
    for name, parameter in decoder.named_parameters():
        split = split_of(name)
        if split is not None and split.over == "ep":
            experts += parameter.numel() // layout.ep
        else:
            dense += parameter.numel() // (1 if split is None else layout.tp)
    return dense, experts


def state_bytes(cfg: RunConfig, layout: Layout) -> StateBytes:
    """Return a rank's bytes under ZeRO (Rajbhandari et al. 2020, section 3).

    AdamW's two moments and the fp32 master are split over the ranks that hold the same weights. Gradients:
    ZeRO-2 keeps the fp32 sum of its own part; ZeRO-1 keeps a whole one, in fp32 also under bf16, where it
    comes beside the bf16 one.
    """
    dense, experts = rank_params(cfg.model, layout)
    n = dense + experts
    part = -(-dense // layout.dp) - (-experts // layout.edp)
    is_fp32 = cfg.train.precision == "fp32"
    weight_bytes = 4 if is_fp32 else 2
    gradients = weight_bytes * n + 4 * part
    if cfg.parallel.zero_stage == 1:
        gradients = weight_bytes * n + (0 if is_fp32 else 4 * n)
    return StateBytes(weights=weight_bytes * n, gradients=gradients, optimizer=12 * part)


def plan_lines(cfg: RunConfig, layout: Layout) -> list[tuple[str, str]]:
    """Return (quantity, value) rows of a run's plan, without the data."""
    model, train = cfg.model, cfg.train
    built = count_built_params(model)
    assert built == n_params(model), f"counted {n_params(model)} parameters, but the model has {built}"
    state = state_bytes(cfg, layout)
    n_tokens = train.n_steps * train.batch_tokens
    return [
        ("parameters", f"{n_params(model):,} ({_short(n_params(model))})"),
        ("active parameters", f"{n_active_params(model):,} ({_short(n_active_params(model))})"),
        ("FLOPs per token", f"{flops_per_token(model):.4g} (forward and backward)"),
        ("ranks", f"{layout.world_size} (dp={layout.dp} tp={layout.tp} ep={layout.ep})"),
        (
            "state per rank",
            f"{_gib(state.total)} = weights {_gib(state.weights)} + gradients {_gib(state.gradients)} + "
            f"optimizer {_gib(state.optimizer)}, activations not counted",
        ),
        (
            "tokens per step",
            f"{train.batch_tokens:,} = {layout.dp} data-parallel ranks x "
            f"{n_microbatches(cfg, layout)} micro-batches x {train.microbatch_seqs} sequences x "
            f"{model.seq_len} tokens",
        ),
        ("steps", f"{train.n_steps:,}"),
        ("tokens in all", f"{n_tokens:,}"),
        ("FLOPs in all", f"{n_tokens * flops_per_token(model):.4g}"),
        ("checkpoint", _checkpoint_words(cfg)),
    ]


def checkpoint_bytes(cfg: ModelConfig) -> int:
    """Return the bytes of one checkpoint: the fp32 master and AdamW's two moments, whatever the layout."""
    return 12 * n_params(cfg)


def n_checkpoints_kept(cfg: RunConfig) -> int:
    """Return how many checkpoints there are at once when the run ends, which is when there are most."""
    n_steps, kept = cfg.train.n_steps, cfg.checkpoint
    steps = {n_steps, *range(kept.every_steps or n_steps, n_steps + 1, kept.every_steps or n_steps)}
    newest = sorted(steps)[-kept.keep_last :]
    for_ever = [s for s in steps if kept.keep_every_steps and s % kept.keep_every_steps == 0]
    return len({*newest, *for_ever})


def _checkpoint_words(cfg: RunConfig) -> str:
    one, n = checkpoint_bytes(cfg.model), n_checkpoints_kept(cfg)
    every = cfg.checkpoint.every_steps
    when = "after the last step only" if every is None else f"every {every:,} steps"
    # A new one is whole before an old one goes.
    return f"{_gib(one)} {when}, {n:,} kept at once = {_gib(n * one)}, and room for one more"


def data_line(cfg: RunConfig, corpus: Corpus) -> tuple[str, str]:
    """Return the row that holds the tokens there are against the tokens the run needs."""
    available = sum(stream.n_tokens for stream in corpus.split("train"))
    needed = cfg.train.n_steps * cfg.train.batch_tokens
    return ("data", f"{available:,} training tokens in {cfg.data.corpus}, {needed / available:.2f} epochs")


def _short(n: int) -> str:
    for unit, size in (("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if n >= size:
            return f"{n / size:.3g}{unit}"
    return str(n)


def _gib(n_bytes: int) -> str:
    return f"{n_bytes / 2**30:.3g} GiB"
