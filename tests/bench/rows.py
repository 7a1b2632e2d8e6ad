"""The results of a benchmark: ratios, each with its spread and its target."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self


@dataclass(frozen=True, kw_only=True)
class Row:
    """One ratio. measured: the median over rounds. low, high: the extremes over rounds.

    at_most, at_least: the target, if there is one. note: the values behind the ratio, with their units.
    """

    what: str
    measured: float
    low: float
    high: float
    at_most: float | None = None
    at_least: float | None = None
    note: str = ""

    @classmethod
    def of(
        cls,
        what: str,
        ratios: Sequence[float],
        *,
        at_most: float | None = None,
        at_least: float | None = None,
        note: str = "",
    ) -> Self:
        """Return the row for one ratio per round."""
        return cls(
            what=what,
            measured=statistics.median(ratios),
            low=min(ratios),
            high=max(ratios),
            at_most=at_most,
            at_least=at_least,
            note=note,
        )

    @property
    def is_met(self) -> bool | None:
        """Whether the measured ratio meets its target; None without a target."""
        if self.at_most is not None:
            return self.measured <= self.at_most
        return None if self.at_least is None else self.measured >= self.at_least


def to_markdown(found: Mapping[str, Sequence[Row]]) -> str:
    """Return one table of the rows of all benchmarks."""
    lines = ["| benchmark | what | measured | spread | target | met | in numbers |", f"{7 * '|---'}|"]
    lines += [f"| {name} | {' | '.join(_cells(row))} |" for name, rows in found.items() for row in rows]
    return "\n".join(lines) + "\n"


def _cells(row: Row) -> list[str]:
    spread = f"{row.low:.3g} to {row.high:.3g}" if row.low < row.high else ""
    target = "" if row.at_most is None else f"at most {row.at_most:g}"
    target = target if row.at_least is None else f"at least {row.at_least:g}"
    met = {True: "yes", False: "no", None: ""}[row.is_met]
    return [row.what, f"{row.measured:.3g}", spread, target, met, row.note]
