"""The objective, written out: its terms, their coefficients, and the mean over expert layers."""

import pytest
import torch
import torch.nn.functional as F

from tests.layouts import build_objective, starting_state
from tests.models import random_state
from tests.runs import rank_batch, run_config, uneven_batch
from turnout.data.loader import IGNORE_INDEX
from turnout.moe.parallel.tensor_parallel import Unsplit
from turnout.moe.reference import reference_forward
from turnout.training.objective import token_nll


def test_balancing_terms_are_means_over_layers_times_their_coefficients() -> None:
    coef, z_coef = 0.3, 0.07
    cfg = run_config(model={"n_layers": 3, "balance": {"coef": coef, "z_coef": z_coef}})
    objective, batch = build_objective(cfg, dtype=torch.float64), uneven_batch(cfg, 0)
    sums = objective(batch, starting_state(cfg))
    layers, z_layers = sums.stats.balance_sum.tolist(), sums.stats.z_sum.tolist()
    assert len(layers) == len({*layers}) == len({*z_layers}) == 3, "each layer's term is its own"
    terms = coef * sum(layers) / 3 + z_coef * sum(z_layers) / 3
    assert sums.total.item() == pytest.approx(sums.nll.item() + terms, rel=1e-12)


def test_the_loss_is_the_sum_over_unmasked_targets() -> None:
    cfg = run_config()
    objective, batch = build_objective(cfg, dtype=torch.float64), uneven_batch(cfg, 0)
    state, decoder = starting_state(cfg), objective.decoder
    hidden, _ = decoder(batch.tokens, batch.doc_ids, batch.targets != IGNORE_INDEX, state)
    log_probs = decoder.logits(hidden.detach()).log_softmax(-1).detach()
    want = 0.0
    for index in (batch.targets != IGNORE_INDEX).nonzero().tolist():
        want -= float(log_probs[*index, batch.targets[*index]])
    assert objective(batch, state).nll.item() == pytest.approx(want, rel=1e-12)


@pytest.mark.parametrize("scope", ["sequence", "batch"])
def test_every_term_is_that_of_the_reference(scope: str) -> None:
    """Terms are sums over unmasked targets, and routing uses the given router state."""
    coef, z_coef = 0.3, 0.07
    cfg = run_config(model={"balance": {"scope": scope, "coef": coef, "z_coef": z_coef}})
    objective, batch = build_objective(cfg, dtype=torch.float64), rank_batch(uneven_batch(cfg, 0), 0, 2)
    state, is_counted = random_state(cfg.model, bias=0.2), batch.targets != IGNORE_INDEX
    parameters = dict(objective.decoder.named_parameters())
    want = reference_forward(parameters, cfg.model, batch.tokens, batch.doc_ids, is_counted, state)
    log_probs = (want.hidden[is_counted] @ parameters["head.weight"].T).log_softmax(-1)
    nll = -log_probs.gather(1, batch.targets[is_counted].unsqueeze(1)).sum().item()
    balance, z = (torch.stack(terms).mean().item() for terms in (want.balance_sums, want.z_sums))
    sums = objective(batch, state)
    assert sums.stats.counts_E.tolist() == want.counts
    assert sums.nll.item() == pytest.approx(nll, rel=1e-12)
    assert sums.total.item() == pytest.approx(nll + coef * balance + z_coef * z, rel=1e-12)


def test_scores_of_half_precision_logits_are_computed_in_fp32() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = (5 * torch.randn(3, 7, 40, generator=generator)).bfloat16()
    targets = torch.randint(40, (3, 7), generator=generator)
    targets[:, ::3] = IGNORE_INDEX
    got = token_nll(logits, targets, Unsplit())
    exact = logits.double().flatten(0, 1), targets.flatten()
    want = F.cross_entropy(*exact, ignore_index=IGNORE_INDEX, reduction="none")
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=1e-6)
