"""The plan of a `prepare` run: its inputs and settings, so that a rerun continues exactly this work.

The plan is a flat mapping, so that the keys in which two plans differ can be shown to the user.
"""

import fcntl
import json
import os
import platform
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from turnout.data.errors import DataError
from turnout.data.files import sha256_of, write_atomically
from turnout.data.manifest import PLAN_FILE
from turnout.data.sources import Source, list_files

# Increased when the same inputs and settings would no longer give the same shards.
PLAN_VERSION = 1
LOCK_FILE = ".lock"
SOURCE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
N_DIFFERENCES_SHOWN = 3

Plan = Mapping[str, str | int | float | None]


@dataclass(frozen=True)
class Settings:
    """The settings that, together with the text, decide what a corpus holds."""

    tokenizer: Path | None
    vocab_size: int | None
    valid_frac: float
    shard_tokens: int


def check_settings(sources: Sequence[Source], settings: Settings) -> None:
    """Check the settings before any file is read. Raises DataError for settings that cannot work."""
    if not sources:
        raise DataError(
            "sources: none given; name at least one file or directory, or use the embedded corpus"
        )
    names = [source.name for source in sources]
    for name in names:
        if not SOURCE_NAME.fullmatch(name):
            raise DataError(
                f"source {name!r}: the name becomes a file name; use letters, digits, '.', '_' and '-'"
            )
        if names.count(name) > 1:
            raise DataError(
                f"source {name!r}: given {names.count(name)} times; give each source its own name"
            )
    weights = {source.name: source.weight for source in sources}
    without = [name for name, weight in weights.items() if weight is None]
    if without and len(without) < len(sources):
        raise DataError(
            f"sources {without} have no weight, but the others do; give every source a weight, or none"
        )
    for name, weight in weights.items():
        if weight is not None and not 0 < weight < float("inf"):
            raise DataError(
                f"source {name!r}: weight={weight} must be positive and finite; leave unused sources out"
            )
    if not 0 <= settings.valid_frac < 1:
        raise DataError(f"valid_frac={settings.valid_frac} must be at least 0 and below 1, such as 0.01")
    if settings.shard_tokens < 1:
        raise DataError(f"shard_tokens={settings.shard_tokens} must be at least 1, such as {2**26}")
    if settings.tokenizer is None and settings.vocab_size is None:
        raise DataError("vocab_size: needed to train a tokenizer; give it, or give a tokenizer file")


def build_plan(sources: Sequence[Source], settings: Settings) -> Plan:
    """Describe the inputs (paths, sizes, modification times) and the settings that decide the result."""
    plan: dict[str, str | int | float | None] = {
        "plan_version": PLAN_VERSION,
        "sources": ", ".join(source.name for source in sources),
        "valid_frac": settings.valid_frac,
        "shard_tokens": settings.shard_tokens,
    }
    if settings.tokenizer is None:
        plan["tokenizer"] = f"trained, vocab_size {settings.vocab_size}"
    else:
        plan["tokenizer"] = f"{settings.tokenizer.suffix} file, SHA-256 {sha256_of(settings.tokenizer)}"
    for source in sources:
        where = f"source {source.name}"
        plan[f"{where}: weight"] = source.weight
        if source.path is None:
            plan[f"{where}: embedded in Python"] = platform.python_version()
        else:
            plan[f"{where}: path"] = str(source.path.resolve())
            plan[f"{where}: text_field"] = source.text_field
        for file in list_files(source):
            stat = file.stat()
            plan[f"{where}: {file.resolve()}"] = f"{stat.st_size} bytes, changed at {stat.st_mtime_ns} ns"
    return plan


def adopt_directory(out: Path, plan: Plan) -> None:
    """Make `out` the directory of this plan, or check that it already is.

    Raises DataError if it holds a corpus of another plan, or foreign files.
    """
    path = out / PLAN_FILE
    if path.is_file() and not _holds_shards(out):
        # The earlier run ended before its first shard, so starting over loses nothing, whatever its plan was.
        for stale in [*out.glob("tokenizer.*"), *out.glob("*/*.bin"), *out.glob("*/*.idx")]:
            stale.unlink()
        write_atomically(path, json.dumps(plan, indent=1).encode())
    elif path.is_file():
        _check_same_plan(path, plan)
    else:
        foreign = sorted(p.name for p in out.iterdir() if p.name not in (LOCK_FILE, PLAN_FILE + ".tmp"))
        if foreign:
            raise DataError(
                f"{out}: holds {len(foreign)} other files, such as {foreign[0]!r}, and no {PLAN_FILE}; "
                "give an empty or new directory"
            )
        write_atomically(path, json.dumps(plan, indent=1).encode())
    for stale in [*out.glob("*.tmp"), *out.glob("*/*.tmp")]:
        stale.unlink()


def _holds_shards(out: Path) -> bool:
    return any(out.glob("*/*.json"))


def _check_same_plan(path: Path, plan: Plan) -> None:
    try:
        before = json.loads(path.read_bytes())
    except ValueError as err:
        raise DataError(f"{path}: not JSON ({err}); delete {path.parent} and prepare again") from err
    # Through JSON, so that both sides have JSON's types.
    now = json.loads(json.dumps(plan))
    keys = [key for key in [*before, *(k for k in now if k not in before)] if before.get(key) != now.get(key)]
    if not keys and before.keys() == now.keys():
        return
    shown = "; ".join(f"{key}: {before.get(key)} -> {now.get(key)}" for key in keys[:N_DIFFERENCES_SHOWN])
    more = f"; and {len(keys) - N_DIFFERENCES_SHOWN} more" if len(keys) > N_DIFFERENCES_SHOWN else ""
    raise DataError(
        f"{path.parent}: was prepared from other inputs or settings ({shown}{more}); "
        "give a new directory, or delete this one"
    )


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Keep a second prepare out of the directory. Raises DataError if another process holds the lock.

    The lock ends with the process that holds it.
    """
    out.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(out / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as err:
        os.close(descriptor)
        raise DataError(
            f"{out}: another prepare is writing here; wait for it, or give another directory"
        ) from err
    try:
        yield
    finally:
        os.close(descriptor)
