"""Options that several commands have: what is wrong with one is said before anything is read."""

from collections.abc import Sequence
from pathlib import Path

from turnout.data.sources import Source
from turnout.training.errors import ConfigError


def check_at_least(least: int, options: dict[str, int | None]) -> None:
    """Raise ConfigError for the first that is below; None was not given."""
    for option, value in options.items():
        if value is not None and value < least:
            raise ConfigError(f"{option} {value} must be at least {least}")


def check_text(text: str, where: str) -> None:
    """Raise ConfigError for bytes of the command line that are no text."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as err:
        raise ConfigError(f"{where}: character {err.start} is not UTF-8; give text in UTF-8") from err


def check_out_file(out: Path | None, suffixes: tuple[str, ...]) -> None:
    """Raise ConfigError where --out names a file of another kind, or in no directory."""
    if out is None:
        return
    if out.suffix not in suffixes:
        raise ConfigError(f"--out {out} must end in {' or '.join(suffixes)}")
    if out.is_dir() or not out.absolute().parent.is_dir():
        raise ConfigError(f"--out {out} must be a file in a directory that exists; make {out.parent}")


def parse_sources(inputs: Sequence[str], weights: Sequence[str], text_field: str) -> list[Source]:
    """Read `PATH` or `NAME=PATH` inputs and `NAME=W` weights."""
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
    strangers = sorted(weight_of.keys() - paths.keys())
    if strangers:
        raise ConfigError(f"--weight names {strangers[0]!r}, but the sources are {sorted(paths)}")
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
        raise ConfigError(f"--weight {text} must be positive; leave a source out instead of weighing it 0")
    return name, weight
