"""The private parts of torch and DeepSpeed that we rely on still exist."""

import deepspeed.runtime.compiler
import pytest
import torch
from torch.optim import Optimizer

from turnout.training.optimizers.adamw import CACHED, METHODS_OUT_OF_GRAPHS, AdamW, keep_compiler_out

MOVED = "training/optimizers/adamw.py keeps torch's compiler out of ranks by a part that this torch has moved"


@pytest.mark.parametrize("name", METHODS_OUT_OF_GRAPHS)
def test_an_optimizers_method_has_a_plain_form(name: str) -> None:
    keep_compiler_out()
    plain = getattr(Optimizer, name).__wrapped__
    assert callable(getattr(plain, CACHED)), MOVED


def test_adamws_step_has_a_plain_form() -> None:
    assert hasattr(torch.optim.AdamW.step, "__wrapped__"), MOVED
    assert AdamW.step.__qualname__ == "Adam.step", MOVED


def test_deepspeed_compiles_by_a_function_that_can_be_replaced() -> None:
    assert callable(deepspeed.runtime.compiler.compile), (
        "training/engine/engine.py replaces it to import Muon uncompiled"
    )


def test_the_plain_step_is_torchs() -> None:
    ours, theirs = (torch.nn.Parameter(torch.linspace(-1, 1, 7)) for _ in range(2))
    optimizers = [AdamW([ours], lr=0.1), torch.optim.AdamW([theirs], lr=0.1)]
    for step in range(3):
        for parameter, optimizer in zip((ours, theirs), optimizers, strict=True):
            optimizer.zero_grad()
            (parameter.square().sum() * (step + 1)).backward()
            optimizer.step()
    assert torch.equal(ours, theirs)
    assert not torch.equal(ours, torch.linspace(-1, 1, 7))
