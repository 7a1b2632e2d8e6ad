"""Send routed rows to the experts that own them, and bring the results back.

Contract: combine(dispatch(rows)) with identity experts returns the rows, and so does its gradient.
Nothing here knows about scores: weighting happens in layer.py, on the sending side.

Shapes
  N routed rows on the sending side   R rows on the receiving side   E n_experts   L experts on this rank
"""

from typing import Any, Protocol

from torch import Tensor


class Dispatcher(Protocol):
    def n_local_experts(self, n_experts: int) -> int:
        """Return how many experts live on this rank."""
        ...

    def dispatch(self, rows_ND: Tensor, counts_E: Tensor) -> tuple[Tensor, Tensor, Any]:
        """Move each row to its expert's rank, sorted by local expert.

        rows_ND   [N, d_model], sorted by expert id
        counts_E  [E] int64 rows of each expert, sum N
        Returns rows_RD [R, d_model], counts_L [L] int64 with sum R, and the route that combine needs.
        """
        ...

    def combine(self, rows_RD: Tensor, route: Any) -> Tensor:
        """Bring rows [R, d_model] back to where they were sent from, [N, d_model], in the order of
        rows_ND.
        """
        ...


class LocalDispatcher:
    """Every expert is on this rank: rows stay where they are."""

    def n_local_experts(self, n_experts: int) -> int:
        return n_experts

    def dispatch(self, rows_ND: Tensor, counts_E: Tensor) -> tuple[Tensor, Tensor, None]:
        return rows_ND, counts_E, None

    def combine(self, rows_RD: Tensor, route: None) -> Tensor:
        return rows_RD
