"""Activation recomputation (Chen et al. 2016, 1604.06174): keep inputs, compute the rest again in backward.

full       a whole block is computed again, its collectives too
selective  attention and the feed-forward arithmetic of one rank; nothing is communicated twice but
           rows beyond parallel.ep_max_load
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeVar, TypeVarTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from turnout.moe.parallel.expert_parallel import Route
from turnout.moe.torch_compile import uncompiled_itself

Args = TypeVarTuple("Args")
R = TypeVar("R")

Recompute = Literal["none", "selective", "full"]

# Recomputed scores may differ by the rounding of half precision, not by more.
SCORE_TOLERANCE = 1e-2


@dataclass
class RoutingMemo:
    """The choices of a layer's forward pass, which its recomputation in backward must repeat.

    Scores that come out a bit otherwise could flip a near tie, and rows would go where no gradient waits.
    """

    scores_TK: Tensor | None = None
    expert_ids_TK: Tensor | None = None
    is_kept_TK: Tensor | None = None
    route: Route | None = None

    def check_scores(self, scores_TK: Tensor) -> None:
        """See that the recomputation is of the same forward pass. No device sync: on a GPU the message comes
        late.
        """
        assert self.scores_TK is not None
        is_same = torch.isclose(scores_TK, self.scores_TK, rtol=SCORE_TOLERANCE, atol=1e-6, equal_nan=True)
        torch._assert_async(
            is_same.all(),
            "recomputation routes by other scores than the forward pass: weights changed between",
        )


def recompute_if(is_wanted: bool, run: Callable[[*Args], R], *args: *Args) -> R:
    """Call run, and where it is wanted and a backward pass can follow, keep only its inputs."""
    if not is_wanted or not torch.is_grad_enabled():
        return run(*args)
    return _checkpoint(run, *args)


# What it runs is compiled, and is the same compiled code when it is computed again.
@uncompiled_itself
def _checkpoint(run: Callable[[*Args], R], *args: *Args) -> R:
    return checkpoint(run, *args, use_reentrant=False, preserve_rng_state=False)
