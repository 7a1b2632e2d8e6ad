"""The corpus that needs no download: the running interpreter's standard library and its documentation.

It differs between Python releases, so compare results only between runs with the same corpus hash.
"""

import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from pydoc_data.topics import topics

from turnout.data.errors import DataError

STDLIB, DOCS = "stdlib", "docs"
MIN_BYTES = 5_000_000
EXCLUDED_DIRECTORIES = {"site-packages", "dist-packages", "__pycache__"}
# The text of the "docs" source, as a Python literal.
EXCLUDED_FILE = "pydoc_data/topics.py"


@dataclass(frozen=True)
class EmbeddedFiles:
    readable: tuple[Path, ...]
    skipped: tuple[Path, ...]  # not UTF-8: CPython tests its own decoder with such files
    n_bytes: int  # of the readable ones


@cache
def list_embedded_files() -> EmbeddedFiles:
    """Find the standard library's .py files, sorted by their path inside it.

    Raises DataError if the interpreter has too few of them.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    readable, skipped, n_bytes = [], [], 0
    inside = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.py"))
    for name in inside:
        path = root / name
        if name == EXCLUDED_FILE or EXCLUDED_DIRECTORIES & set(Path(name).parts) or not path.is_file():
            continue
        content = path.read_bytes()
        try:
            content.decode("utf-8")
        except UnicodeDecodeError:
            skipped.append(path)
            continue
        readable.append(path)
        n_bytes += len(content)
    if n_bytes < MIN_BYTES:
        raise DataError(
            f"{root}: the embedded corpus has {n_bytes} bytes of .py files, fewer than {MIN_BYTES}: "
            "this interpreter is stripped; use a full Python, or give text files"
        )
    return EmbeddedFiles(tuple(readable), tuple(skipped), n_bytes)


def iterate_embedded_texts(name: str) -> Iterator[tuple[str, str]]:
    """Yield (origin, text) of one embedded source, line ends unchanged. Raises DataError for another name."""
    if name == DOCS:
        for topic in sorted(topics):
            yield f"pydoc_data.topics:{topic}", topics[topic]
        return
    if name != STDLIB:
        raise DataError(f"no embedded source {name!r}; use {STDLIB!r} or {DOCS!r}, or give a path")
    for path in list_embedded_files().readable:
        yield str(path), path.read_bytes().decode("utf-8")
