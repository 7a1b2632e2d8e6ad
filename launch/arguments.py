"""Checks and parsing of options that several commands share.

A wrong value ends in a ConfigError that names the option, before a model or corpus is read.
"""

from collections.abc import Sequence
from pathlib import Path

from turnout.data.sources import Source
from turnout.training.errors import ConfigError


def check_at_least(least: int, options: dict[str, int | None]) -> None:
    """Raise ConfigError for the first option whose value is below `least`; None: the option was not given."""
    for option, value in options.items():
        if value is not None and value < least:
            raise ConfigError(f"{option} {value} must be at least {least}")


def check_text(text: str, where: str) -> None:
    """Raise ConfigError if text from the command line holds bytes that are not UTF-8."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as err:
        raise ConfigError(f"{where}: character {err.start} is not UTF-8; give text in UTF-8") from err


def check_out_file(out: Path | None, suffixes: tuple[str, ...]) -> None:
    """Raise ConfigError if --out has none of the suffixes, or its directory does not exist."""
    if out is None:
        return
    if out.suffix not in suffixes:
        raise ConfigError(f"--out {out} must end in {' or '.join(suffixes)}")
    if out.is_dir() or not out.absolute().parent.is_dir():
        raise ConfigError(f"--out {out} must be a file in a directory that exists; make {out.parent}")


def parse_sources(inputs: Sequence[str], weights: Sequence[str], text_field: str) -> list[Source]:
    """Parse `PATH` or `NAME=PATH` inputs and `NAME=W` weights. A path without a name is called by its file's.

    Raises ConfigError if two inputs have one name, or a weight names none of them.
    """
    paths: dict[str, str] = {}
    for text in inputs:
        name, equals, path = text.partition("=")
        if not equals:
            name, path = Path(text).name.split(".")[0], text
        if name in paths:
            raise ConfigError(
                f"two inputs are called {name!r}; give them names: one={paths[name]} two={path}"
            )
        paths[name] = path
    weight_of: dict[str, float] = {}
    for name, weight in map(_parse_weight, weights):
        if name in weight_of:
            raise ConfigError(f"--weight {name} is given twice, {weight_of[name]} and {weight}; keep one")
        weight_of[name] = weight
    unknown = sorted(weight_of.keys() - paths.keys())
    if unknown:
        raise ConfigError(f"--weight names {unknown[0]!r}, but the sources are {sorted(paths)}")
    return [Source(name, Path(path), weight_of.get(name), text_field) for name, path in paths.items()]


def _parse_weight(text: str) -> tuple[str, float]:
    name, _, number = text.partition("=")
    try:
        weight = float(number)
    except ValueError as err:
        raise ConfigError(
            f"--weight {text!r} is not NAME=NUMBER; write for example --weight web=0.7"
        ) from err
    if not 0 < weight < float("inf"):
        raise ConfigError(
            f"--weight {text} must be positive; leave a source out instead of giving it weight 0"
        )
    return name, weight
