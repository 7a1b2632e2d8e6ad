"""The tables of mutants: one TOML file for each area.

[[mutant]]
name = "AdamW's eps is not taken from the config"
file = "training/optimizers/adamw.py"
old = "eps=cfg.eps"        # must occur exactly once in the file
new = "eps=1e-8"
tests = ["tests/unit/training/optimizers/test_adamw.py::test_settings"]   # at least one of them must fail
"""

import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

TABLES = Path(__file__).parent


@dataclass(frozen=True)
class Mutant:
    area: str
    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.area}: {self.name}"

    def matches(self, texts: Sequence[str]) -> bool:
        """Return whether the area or name contains one of the texts; True without texts."""
        return not texts or any(text in str(self) for text in texts)


def read_mutants() -> list[Mutant]:
    mutants = []
    for path in sorted(TABLES.glob("*.toml")):
        tree = tomllib.loads(path.read_text(encoding="utf-8"))
        for fields in tree["mutant"]:
            mutants.append(Mutant(path.stem, **{**fields, "tests": tuple(fields["tests"])}))
    return mutants


def broken_text(mutant: Mutant, text: str) -> str | None:
    """Return a file's text with the break in it; None unless the text to replace occurs exactly once."""
    if text.count(mutant.old) != 1 or mutant.old == mutant.new:
        return None
    return text.replace(mutant.old, mutant.new)
