"""Results that must not change unnoticed: the resolved recipes, and a short loss curve.

After a change that is meant to change them, `python -m tests.golden.test_golden` rewrites them.
"""

import json
from pathlib import Path

import pytest
import torch

from tests.layouts import train_on_ranks
from tests.ranks import run_ranks
from tests.runs import run_config
from turnout.data.loader import Batch
from turnout.launch.settings import load_config, recipe_names, to_toml
from turnout.training.config.run import RunConfig

HERE = Path(__file__).parent
CURVE = HERE / "loss_curve.json"
# Sooner or later another CPU's rounding sends a token to another expert, and the curves drift apart a little.
N_EXACT = 25
CFG = run_config(
    model={"n_shared_experts": 1, "balance": {"scope": "batch", "bias_rate": 0.001}},
    train={"n_steps": 50, "microbatch_seqs": 4},
)


def counting_batch(cfg: RunConfig, step: int) -> Batch:
    """Return sequences that count in steps of 3 from a random start, with 10 % random tokens."""
    generator = torch.Generator().manual_seed(step)
    vocab_size, shape = cfg.model.vocab_size, (cfg.batch_seqs, cfg.model.seq_len + 1)
    starts = torch.randint(vocab_size, (cfg.batch_seqs, 1), generator=generator)
    stream = (starts + 3 * torch.arange(shape[1])) % vocab_size
    noise = torch.randint(vocab_size, shape, generator=generator)
    stream = torch.where(torch.rand(shape, generator=generator) < 0.1, noise, stream)
    doc_ids = torch.zeros(cfg.batch_seqs, cfg.model.seq_len, dtype=torch.int64)
    return Batch(stream[:, :-1].clone(), stream[:, 1:].clone(), doc_ids, torch.arange(cfg.batch_seqs))


def loss_curve() -> list[float]:
    (result,) = run_ranks(train_on_ranks, 1, CFG, 1, "adamw", 1e-2, counting_batch)
    return result["losses"]


@pytest.mark.parametrize("name", recipe_names())
def test_resolved_recipe_is_the_recorded_one(name: str) -> None:
    assert to_toml(load_config(name)) == (HERE / "recipes" / f"{name}.toml").read_text(encoding="utf-8")


def test_loss_curve_is_the_recorded_one_and_learns() -> None:
    want = json.loads(CURVE.read_text())
    got = loss_curve()
    assert got[:N_EXACT] == pytest.approx(want[:N_EXACT], rel=1e-5)
    assert got == pytest.approx(want, rel=1e-2)
    assert got[-1] < 0.75 * got[0]


if __name__ == "__main__":
    (HERE / "recipes").mkdir(exist_ok=True)
    for recipe in recipe_names():
        (HERE / "recipes" / f"{recipe}.toml").write_text(to_toml(load_config(recipe)), encoding="utf-8")
    CURVE.write_text(json.dumps([round(loss, 6) for loss in loss_curve()], indent=1) + "\n")
