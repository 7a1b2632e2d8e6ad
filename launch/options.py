"""Options that several commands have: what is wrong with one is said before anything is read."""

from pathlib import Path

from training.errors import ConfigError


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
