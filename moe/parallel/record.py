"""How a collective is recorded. Apart from the collectives, because launchers read records without torch."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol


class Record(Protocol):
    """Record a collective while it runs, so that a hang report can name it.

    sent, received: rows to and from each rank of the group, if they are known
    """

    def __call__(
        self,
        operation: str,
        group: str,
        *,
        layer: int | None = None,
        sent: Sequence[int] = (),
        received: Sequence[int] = (),
    ) -> AbstractContextManager[None]: ...


def no_record(
    operation: str,
    group: str,
    *,
    layer: int | None = None,
    sent: Sequence[int] = (),
    received: Sequence[int] = (),
) -> AbstractContextManager[None]:
    return nullcontext()
