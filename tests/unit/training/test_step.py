"""Several uneven micro-batches through the real engine, against one batch in plain torch."""

import pytest
import torch

from tests.assertions import assert_same_tensors
from tests.layouts import train_on_ranks, train_plainly
from tests.runs import run_config


@pytest.mark.parametrize("microbatch_seqs", [1, 4, 8], ids=lambda n: f"{8 // n} micro-batches")
def test_micro_batches_are_summed_and_divided_once(one_rank: None, microbatch_seqs: int) -> None:
    cfg = run_config(
        model={
            "n_layers": 3,
            "router": {"capacity_factor": 1.0},
            "balance": {"coef": 0.5, "z_coef": 0.05, "scope": "batch", "bias_rate": 0.01},
        },
        train={"n_steps": 3, "batch_tokens": 96, "microbatch_seqs": microbatch_seqs, "clip_norm": 100.0},
        optim={"schedule": {}},
    )
    got, want = train_on_ranks(0, cfg, 1), train_plainly(cfg)
    assert max(want["norms"]) < cfg.train.clip_norm, "clipping would hide a wrong factor"
    assert got["norms"] == pytest.approx(want["norms"], rel=1e-4)
    assert got["losses"] == pytest.approx(want["losses"], rel=1e-5)
    for got_stats, want_stats in zip(got["stats"], want["stats"], strict=True):
        *got_means, got_dropped = got_stats  # balancing loss, z-loss and entropy per token
        *want_means, want_dropped = want_stats
        assert got_means == pytest.approx(want_means, rel=1e-4)
        assert got_dropped == want_dropped > 0
    assert want["bias"].unique(dim=0).size(0) == 3, "the bias of each layer is its own"
    assert torch.equal(got["bias"], want["bias"])
    assert_same_tensors(got["parameters"], want["parameters"], rtol=1e-5)
