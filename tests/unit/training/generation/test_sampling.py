"""Sampling: greedy is the argmax, each filter removes its tail, and frequencies follow the probabilities."""

import pytest
import torch

from turnout.training.generation.sampling import Sampling, sample_tokens

# Probabilities 0.4, 0.3, 0.2 and 0.1, not in that order.
LOGITS = torch.tensor([0.2, 0.4, 0.1, 0.3]).log()


def drawn(how: Sampling, logits: torch.Tensor = LOGITS, n: int = 2000) -> set[int]:
    return set(sample_tokens(logits.expand(n, -1), how, [torch.Generator().manual_seed(0)]).tolist())


def test_greedy_takes_the_most_likely_and_the_lower_id_of_equals() -> None:
    logits = torch.tensor([[0.0, 2.0, 2.0], [3.0, 1.0, 3.0]])
    assert sample_tokens(logits, Sampling(temperature=0), []).tolist() == [1, 0]
    assert drawn(Sampling(temperature=1.0, top_k=1), logits[:1]) == {1}


@pytest.mark.parametrize(
    ("filters", "left"),
    [
        ({}, {0, 1, 2, 3}),
        ({"top_k": 9}, {0, 1, 2, 3}),
        ({"top_k": 3}, {0, 1, 3}),
        ({"top_p": 1.0}, {0, 1, 2, 3}),
        ({"top_p": 0.71}, {0, 1, 3}),
        ({"top_p": 0.69}, {1, 3}),
        ({"top_p": 0.01}, {1}),
        ({"min_p": 0.0}, {0, 1, 2, 3}),
        ({"min_p": 0.45}, {0, 1, 3}),
        ({"min_p": 0.7}, {1, 3}),
        ({"min_p": 1.0}, {1}),
        # top_k leaves three; the first two of them have 7/9 of the probability.
        ({"top_k": 3, "top_p": 0.75}, {1, 3}),
        ({"top_p": 0.95, "min_p": 0.7}, {1, 3}),
    ],
)
def test_filters_remove_the_tail(filters: dict[str, float], left: set[int]) -> None:
    assert drawn(Sampling(temperature=1.0, **filters)) == left


def test_filters_apply_after_the_temperature() -> None:
    # Half the temperature squares the probabilities: 16, 9, 4 and 1 of 30.
    assert drawn(Sampling(temperature=0.5, min_p=0.5)) == {1, 3}
    assert drawn(Sampling(temperature=0.5, top_p=0.82)) == {1, 3}
    assert drawn(Sampling(temperature=1.0, top_p=0.82)) == {0, 1, 3}


def test_min_p_is_relative_to_each_row() -> None:
    """In the first row one token is far above the others; in the second min_p keeps three of four."""
    rows = torch.stack([torch.tensor([0.02, 0.03, 0.9, 0.05]).log(), LOGITS]).repeat(2000, 1)
    ids = sample_tokens(rows, Sampling(temperature=1.0, min_p=0.45), [torch.Generator().manual_seed(0)]).view(
        -1, 2
    )
    assert set(ids[:, 0].tolist()) == {2} and set(ids[:, 1].tolist()) == {0, 1, 3}


def test_frequencies_follow_the_probabilities_left() -> None:
    rows = LOGITS.expand(40_000, -1)
    ids = sample_tokens(rows, Sampling(temperature=0.5, top_k=3), [torch.Generator().manual_seed(0)])
    share = torch.bincount(ids, minlength=4) / len(ids)
    assert share.tolist() == pytest.approx([4 / 29, 16 / 29, 0, 9 / 29], abs=0.01)


def test_a_row_with_its_own_generator_does_not_depend_on_the_others() -> None:
    rows = torch.randn(5, 50, generator=torch.Generator().manual_seed(1))
    how = Sampling(temperature=2.0)

    def generators(*seeds: int) -> list[torch.Generator]:
        return [torch.Generator().manual_seed(seed) for seed in seeds]

    together = sample_tokens(rows, how, generators(0, 1, 2, 3, 4))
    alone = [int(sample_tokens(rows[i : i + 1], how, generators(i))) for i in range(5)]
    assert together.tolist() == alone
    assert together.tolist() != sample_tokens(rows, how, generators(4, 3, 2, 1, 0)).tolist()
