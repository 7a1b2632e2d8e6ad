"""For tests of a stranger's checkpoint: files with right checksums, resource limits, the error message."""

import hashlib
import json
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from turnout.training.checkpoint.directory import verify_checkpoint
from turnout.training.checkpoint.manifest import MANIFEST, MANIFEST_SUM
from turnout.training.errors import CheckpointError

ALLOWED_BYTES = 256 << 20  # of address space, more than the process has
ALLOWED_S = 20


@contextmanager
def limits() -> Iterator[None]:
    """Make giant allocations and endless waits fail."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"not refused within {ALLOWED_S} s")

    n_pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    before = signal.signal(signal.SIGALRM, stop)
    resource.setrlimit(resource.RLIMIT_AS, (n_pages * resource.getpagesize() + ALLOWED_BYTES, hard))
    signal.alarm(ALLOWED_S)
    try:
        yield
    finally:
        signal.alarm(0)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.signal(signal.SIGALRM, before)


def put_manifest(path: Path, text: str | bytes) -> None:
    """Write a manifest with its right checksum."""
    raw = text.encode() if isinstance(text, str) else text
    (path / MANIFEST).write_bytes(raw)
    (path / MANIFEST_SUM).write_text(f"{hashlib.sha256(raw).hexdigest()}  {MANIFEST}\n")


def put_file(path: Path, name: str, content: bytes) -> None:
    """Write a file, and its size and checksum into the manifest."""
    (path / name).write_bytes(content)
    tree = json.loads((path / MANIFEST).read_bytes())
    tree["files"][name] = {"n_bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    put_manifest(path, json.dumps(tree))


def refusal(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        verify_checkpoint(path)
    message = str(caught.value)
    assert message.isprintable() and len(message) < 600, "one line, without control characters"
    return message
