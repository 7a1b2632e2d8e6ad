"""`turnout train --dry-run`: count what a run needs, before any rank starts."""

from accelerate import init_empty_weights

from turnout.data.corpus import Corpus
from turnout.launch.estimate.activations import activation_bytes, backend_measured
from turnout.launch.estimate.memory import bucket_bytes, largest_peak, largest_state
from turnout.launch.preflight import check_corpus
from turnout.moe.config import ModelConfig
from turnout.moe.flops import flops_per_token, n_active_params, n_params
from turnout.moe.model import Decoder
from turnout.training.checkpoint.directory import checkpoint_bytes
from turnout.training.config.run import RunConfig
from turnout.training.parallel.layout import Layout, n_microbatches, plan_layout


def plan_run(cfg: RunConfig, *, nproc: int) -> None:
    """Print what the run needs. The model's rows come first, so that they are printed even without a corpus.

    Raises ConfigError and DataError.
    """
    for quantity, value in plan_lines(cfg, plan_layout(cfg, nproc)):
        print(f"{quantity:18} {value}")
    quantity, value = data_line(cfg, check_corpus(cfg))
    print(f"{quantity:18} {value}")


def count_built_params(cfg: ModelConfig) -> int:
    """Count the parameters of the real decoder, built without memory for its weights."""
    with init_empty_weights():
        decoder = Decoder(cfg)
    return sum(p.numel() for p in decoder.parameters())


def plan_lines(cfg: RunConfig, layout: Layout) -> list[tuple[str, str]]:
    """Return (quantity, value) rows of a run's plan, without the data."""
    model, train = cfg.model, cfg.train
    built = count_built_params(model)
    assert built == n_params(model), f"counted {n_params(model)} parameters, but the model has {built}"
    n_tokens = train.n_steps * train.batch_tokens
    return [
        ("parameters", f"{n_params(model):,} ({_short(n_params(model))})"),
        ("active parameters", f"{n_active_params(model):,} ({_short(n_active_params(model))})"),
        ("FLOPs per token", f"{flops_per_token(model):.4g} (forward and backward)"),
        ("ranks", f"{layout.world_size} (dp={layout.dp} tp={layout.tp} ep={layout.ep})"),
        *_memory_lines(cfg, layout),
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


def _memory_lines(cfg: RunConfig, layout: Layout) -> list[tuple[str, str]]:
    state = largest_state(cfg, layout)
    activations, bucket = activation_bytes(cfg, layout), bucket_bytes(cfg)
    peak = _gib(largest_peak(cfg, layout, activations))
    reserved = f"; counts the filled part of DeepSpeed's bucket, but a GPU reserves all {_gib(bucket)}"
    return [
        (
            "state per rank",
            f"{_gib(state.total)} = weights {_gib(state.weights)} + gradients {_gib(state.gradients)} + "
            f"optimizer {_gib(state.optimizer)}",
        ),
        (
            "activations",
            f"{_gib(activations)} in a micro-batch, recompute={cfg.train.recompute}, experts by "
            f"{backend_measured(cfg)}, uniform routing",
        ),
        ("peak per rank", f"{peak} in a step{reserved if bucket else ''}"),
    ]


def n_checkpoints_kept(cfg: RunConfig) -> int:
    """Return how many checkpoints exist when the run ends, which is when there are most."""
    n_steps, kept = cfg.train.n_steps, cfg.checkpoint
    steps = {n_steps, *range(kept.every_steps or n_steps, n_steps + 1, kept.every_steps or n_steps)}
    newest = sorted(steps)[-kept.keep_last :]
    permanent = [s for s in steps if kept.keep_every_steps and s % kept.keep_every_steps == 0]
    return len({*newest, *permanent})


def _checkpoint_words(cfg: RunConfig) -> str:
    one, n = checkpoint_bytes(cfg.model), n_checkpoints_kept(cfg)
    every = cfg.checkpoint.every_steps
    when = "after the last step only" if every is None else f"every {every:,} steps"
    # A new checkpoint is complete before an old one is deleted.
    return f"{_gib(one)} {when}, {n:,} kept at once = {_gib(n * one)}, and room for one more"


def data_line(cfg: RunConfig, corpus: Corpus) -> tuple[str, str]:
    """Return the row that compares the corpus's tokens with the tokens that the run needs."""
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
