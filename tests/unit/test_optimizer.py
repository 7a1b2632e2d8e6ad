"""Learning-rate schedules at their corners, and who is decayed."""

import pytest

from moe.model import build_decoder
from tests.models import tiny_config
from training.config import ScheduleConfig
from training.optimizer import lr_at, param_groups


def rates(n_steps: int, **schedule: object) -> list[float]:
    checked = ScheduleConfig.model_validate(schedule)
    return [lr_at(step, lr=2.0, schedule=checked, n_steps=n_steps) for step in range(n_steps)]


def test_warmup_rises_to_the_peak_and_never_starts_at_zero() -> None:
    assert rates(10, warmup_steps=4)[:5] == pytest.approx([0.5, 1.0, 1.5, 2.0, 2.0])


@pytest.mark.parametrize("kind", ["cosine", "linear"])
def test_decay_ends_at_final_frac_and_never_rises(kind: str) -> None:
    values = rates(21, kind=kind, warmup_steps=1, final_frac=0.1)
    assert values[-1] == pytest.approx(0.2)
    assert all(a >= b for a, b in zip(values, values[1:], strict=False))


def test_middle_of_cosine_and_linear_is_half_way() -> None:
    assert rates(21, kind="cosine", final_frac=0.0)[10] == pytest.approx(1.0)
    assert rates(21, kind="cosine", final_frac=0.0)[5] == pytest.approx(1 + 2**-0.5)
    assert rates(21, kind="linear", final_frac=0.0)[5] == pytest.approx(1.5)


def test_wsd_is_stable_until_the_last_share() -> None:
    values = rates(20, kind="wsd", warmup_steps=2, decay_frac=0.25, final_frac=0.0)
    assert values[2:16] == [2.0] * 14
    assert values[15:] == pytest.approx([2.0, 1.5, 1.0, 0.5, 0.0])


def test_norms_are_not_decayed_and_everything_is_in_one_group() -> None:
    decoder = build_decoder(tiny_config(qk_norm=True, n_shared_experts=1))
    decayed, undecayed = param_groups(decoder.named_parameters(), 0.1)
    assert (decayed["weight_decay"], undecayed["weight_decay"]) == (0.1, 0.0)
    names = {id(p): n for n, p in decoder.named_parameters()}
    assert all(names[id(p)].endswith("norm.weight") for p in undecayed["params"])
    assert not any(names[id(p)].endswith("norm.weight") for p in decayed["params"])
    assert len(decayed["params"]) + len(undecayed["params"]) == len(names)
