"""What is minimised, written out: the terms, their coefficients, and the mean over expert layers."""

import pytest
import torch

from data.loader import IGNORE_INDEX
from tests.layouts import build_objective, starting_state
from tests.runs import run_config, uneven_batch


def test_balancing_terms_are_means_over_layers_times_their_coefficients() -> None:
    coef, z_coef = 0.3, 0.07
    cfg = run_config(model={"n_layers": 3, "balance": {"coef": coef, "z_coef": z_coef}})
    objective, batch = build_objective(cfg, dtype=torch.float64), uneven_batch(cfg, 0)
    sums = objective(batch, starting_state(cfg))
    layers, z_layers = sums.stats.balance_sum.tolist(), sums.stats.z_sum.tolist()
    assert len(layers) == len({*layers}) == len({*z_layers}) == 3, "each layer's term is its own"
    terms = coef * sum(layers) / 3 + z_coef * sum(z_layers) / 3
    assert sums.total.item() == pytest.approx(sums.nll.item() + terms, rel=1e-12)


def test_the_loss_is_the_sum_over_targets_that_count() -> None:
    cfg = run_config()
    objective, batch = build_objective(cfg, dtype=torch.float64), uneven_batch(cfg, 0)
    state, decoder = starting_state(cfg), objective.decoder
    hidden, _ = decoder(batch.tokens, batch.doc_ids, batch.targets != IGNORE_INDEX, state)
    log_probs = decoder.logits(hidden.detach()).log_softmax(-1).detach()
    want = 0.0
    for place in (batch.targets != IGNORE_INDEX).nonzero().tolist():
        want -= float(log_probs[*place, batch.targets[*place]])
    assert objective(batch, state).nll.item() == pytest.approx(want, rel=1e-12)
