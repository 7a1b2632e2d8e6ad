"""The peak of a step, added up by hand from what is held and what is copied."""

from typing import Any

import pytest

from tests.runs import run_config
from turnout.launch.estimate.memory import bucket_bytes, largest_peak, largest_state, peak_bytes, state_bytes
from turnout.moe.flops import n_params
from turnout.training.config.run import RunConfig
from turnout.training.parallel.layout import Layout

BUCKET = 2**27  # elements reduced at once
SMALL, LARGE = 1_000, 10**9  # activations smaller and larger than everything else


def config(
    zero_stage: int, precision: str = "fp32", *, n_microbatches: int = 2, dp: int = 1, **model: Any
) -> RunConfig:
    train = {"precision": precision, "microbatch_seqs": 1, "batch_tokens": 12 * dp * n_microbatches}
    return run_config(model=model, train=train, parallel={"zero_stage": zero_stage})


def n_of(cfg: RunConfig) -> int:
    """Return the number of parameters; check that their groups need no padding on two ranks."""
    assert state_bytes(cfg, Layout(2)).weights % (2 * n_params(cfg.model)) == 0
    return n_params(cfg.model)


# On one rank, in bytes per parameter. stays: weights and optimizer. kept: gradients held beside activations.
# reducing: what gradients and their copies take while they are reduced.
@pytest.mark.parametrize(
    ("zero_stage", "precision", "n_microbatches", "stays", "kept", "reducing"),
    [
        pytest.param(1, "fp32", 2, 16, 4, 4 + 4, id="fp32, ZeRO-1"),
        pytest.param(1, "fp32", 1, 16, 0, 4 + 4, id="fp32, ZeRO-1, one micro-batch"),
        pytest.param(2, "fp32", 2, 16, 4, 4 + 4 + 4, id="fp32, ZeRO-2"),
        pytest.param(2, "fp32", 1, 16, 0, 4 + 4, id="fp32, ZeRO-2, one micro-batch"),
        pytest.param(1, "bf16", 2, 14, 2 + 4, 2 + 4 + 4, id="bf16, ZeRO-1"),
        pytest.param(1, "bf16", 1, 14, 4, 2 + 4 + 4, id="bf16, ZeRO-1, one micro-batch"),
        pytest.param(2, "bf16", 2, 14, 4, 2 + (2 + 4) + 4, id="bf16, ZeRO-2"),
        pytest.param(2, "bf16", 1, 14, 0, 2 + (2 + 4) + 4, id="bf16, ZeRO-2, one micro-batch"),
        pytest.param(1, "fp16", 1, 14, 0, 4 + 4 + 4, id="fp16, ZeRO-1, one micro-batch"),
    ],
)
def test_a_peak_is_what_stays_and_the_larger_of_passes_and_reduction(
    zero_stage: int, precision: str, n_microbatches: int, stays: int, kept: int, reducing: int
) -> None:
    cfg = config(zero_stage, precision, n_microbatches=n_microbatches)
    n, n_counts = n_of(cfg), 8  # AdamW's step counts, one for each of two groups of parameters
    assert peak_bytes(cfg, Layout(1), 0, SMALL) == (stays + reducing) * n + n_counts
    assert peak_bytes(cfg, Layout(1), 0, LARGE) == (stays + kept) * n + n_counts + LARGE


def test_the_bucket_is_copied_only_where_it_is_partitioned() -> None:
    """In fp32: the bucket itself, and then its copy or the kept gradients, whichever is larger."""
    cfg = config(1, dp=8)
    n = n_of(cfg)
    alone, apart = (peak_bytes(cfg, Layout(world), 0, SMALL) for world in (1, 8))
    assert alone == (4 + 12 + 4 + 4) * n + 8
    assert apart == state_bytes(cfg, Layout(8)).weights + state_bytes(cfg, Layout(8)).optimizer + (4 + 4) * n


def test_no_more_is_copied_at_once_than_a_bucket_holds() -> None:
    cfg = config(1, "fp16", n_microbatches=1, d_model=1024, vocab_size=100_000)
    n = n_of(cfg)
    assert n > 3 * BUCKET // 2
    assert peak_bytes(cfg, Layout(1), 0, SMALL) == (14 + 4 + 4) * n + 4 * BUCKET + 8
    cfg = config(2, "bf16", n_microbatches=1, d_model=1024, vocab_size=100_000)
    assert peak_bytes(cfg, Layout(1), 0, SMALL) == (14 + 4) * n + (2 + 2 + 4) * BUCKET + 8


@pytest.mark.parametrize(
    ("zero_stage", "precision", "bytes_per_element"),
    [(1, "fp32", 4), (2, "fp32", 4), (1, "bf16", 0), (2, "bf16", 2), (1, "fp16", 4), (2, "fp16", 2)],
)
def test_the_bucket_is_fp32_where_it_holds_sums(
    zero_stage: int, precision: str, bytes_per_element: int
) -> None:
    assert bucket_bytes(config(zero_stage, precision)) == bytes_per_element * BUCKET


def test_the_rank_that_holds_most_is_reported() -> None:
    """The tied embedding is more than half of the weights: both ranks keep its gradient, and the second rank
    those of all other matrices too. Each rank keeps three of the five norms of 16.
    """
    cfg, layout = config(2, dp=2, vocab_size=4_000, tie_embeddings=True), Layout(2)
    n = n_of(cfg)
    first, second = (state_bytes(cfg, layout, rank) for rank in range(2))
    assert first.gradients == 4 * (4_000 * 16 + 48)
    assert second.gradients == 4 * (n - 80 + 48)
    assert largest_state(cfg, layout) == second
    assert largest_peak(cfg, layout, LARGE) == second.total + LARGE
