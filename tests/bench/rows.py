"""What a benchmark finds: ratios, each with its spread and with what is asked of it."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self


@dataclass(frozen=True, kw_only=True)
class Row:
    """measured: the median over rounds, of which low and high are the extremes.

    at_most, at_least: what is asked, where anything is. note: the numbers behind it, with their units.
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
        """Return the row of one ratio per round."""
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
        """Whether the measured ratio is as asked; None where nothing is asked."""
        if self.at_most is not None:
            return self.measured <= self.at_most
        return None if self.at_least is None else self.measured >= self.at_least


def to_markdown(found: Mapping[str, Sequence[Row]]) -> str:
    """Return one table of the rows of all benchmarks."""
    lines = ["| benchmark | what | measured | spread | asked | met | in numbers |", f"{7 * '|---'}|"]
    lines += [f"| {name} | {' | '.join(_cells(row))} |" for name, rows in found.items() for row in rows]
    return "\n".join(lines) + "\n"


def _cells(row: Row) -> list[str]:
    spread = f"{row.low:.3g} to {row.high:.3g}" if row.low < row.high else ""
    asked = "" if row.at_most is None else f"at most {row.at_most:g}"
    asked = asked if row.at_least is None else f"at least {row.at_least:g}"
    met = {True: "yes", False: "no", None: ""}[row.is_met]
    return [row.what, f"{row.measured:.3g}", spread, asked, met, row.note]
