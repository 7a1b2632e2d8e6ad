"""Activation recomputation (Chen et al. 2016, 1604.06174): keep only inputs, and compute the rest again in
the backward pass.

full       recomputes whole blocks, with their collectives
selective  recomputes attention and feed-forward arithmetic, which needs no communication; only rows above
           parallel.ep_max_load are sent again
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

    Slightly different scores could flip a near-tie and send rows to a rank that holds no activation for them.
    """

    scores_TK: Tensor | None = None
    expert_ids_TK: Tensor | None = None
    is_kept_TK: Tensor | None = None
    route: Route | None = None

    def check_scores(self, scores_TK: Tensor) -> None:
        """Check that scores_TK are those of the forward pass. No device sync, so a GPU reports late."""
        assert self.scores_TK is not None
        is_same = torch.isclose(scores_TK, self.scores_TK, rtol=SCORE_TOLERANCE, atol=1e-6, equal_nan=True)
        torch._assert_async(
            is_same.all(),
            "recomputation routes by other scores than the forward pass; do not change weights in between",
        )


def recompute_if(is_wanted: bool, run: Callable[[*Args], R], *args: *Args) -> R:
    """Call run; if is_wanted and a backward pass can follow, keep only its inputs."""
    if not is_wanted or not torch.is_grad_enabled():
        return run(*args)
    return _checkpoint(run, *args)


# torch.compile must skip only this call: what it runs is compiled, and recomputed by the same compiled code.
@uncompiled_itself
def _checkpoint(run: Callable[[*Args], R], *args: *Args) -> R:
    result: R = checkpoint(run, *args, use_reentrant=False, preserve_rng_state=False)
    return result
