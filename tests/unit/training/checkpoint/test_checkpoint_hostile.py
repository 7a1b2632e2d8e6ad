"""A stranger's checkpoint runs no code, reads no files outside it, and is refused in bounded memory.

Every attack has right checksums, because an attacker can compute those, too. False claims in a manifest are
tested in test_checkpoint_lies.py.
"""

import json
import os
import pickle
import shutil
import socket
import struct
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpoints import SMALL_SHAPE
from tests.unit.hostile_fixtures import ALLOWED_BYTES, limits, put_file, put_manifest, refusal
from turnout.training.checkpoint.manifest import CONFIG_FILE, MANIFEST, MANIFEST_SUM, ROUTER_FILE, rank_file

RANK_FILE = rank_file(0)
NUMEL = prod(SMALL_SHAPE)
HUGE = 1 << 62


def test_the_memory_limit_is_in_force() -> None:
    with limits(), pytest.raises(RuntimeError, match="allocate memory"):
        torch.empty(2 * ALLOWED_BYTES, dtype=torch.uint8)


class Trap:
    """Makes a directory when it is unpickled."""

    def __init__(self, sprung: Path) -> None:
        self.sprung = sprung

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.sprung),)


@pytest.mark.parametrize("name", [RANK_FILE, ROUTER_FILE, MANIFEST])
@pytest.mark.parametrize("is_torch", [True, False], ids=["torch.save", "pickle"])
def test_a_pickle_is_not_loaded(is_torch: bool, name: str, path: Path, tmp_path: Path) -> None:
    sprung, source = tmp_path / "sprung", tmp_path / "trap"
    if is_torch:
        torch.save({"w": Trap(sprung)}, source)
    else:
        source.write_bytes(pickle.dumps(Trap(sprung)))
    if name == MANIFEST:
        put_manifest(path, source.read_bytes())
    else:
        put_file(path, name, source.read_bytes())
    assert str(path / name) in refusal(path)
    assert not sprung.exists()
    if not is_torch:
        pickle.loads(source.read_bytes())
        assert sprung.exists(), "the trap works"


def make_pipe(path: Path) -> None:
    os.mkfifo(path)


def link_outside(path: Path) -> None:
    """Link to a file that is exactly what the manifest says."""
    outside = path.parent.parent / "outside"
    shutil.copyfile(path.with_name("kept"), outside)
    path.symlink_to(outside)


def link_to_a_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def link_to_nothing(path: Path) -> None:
    path.symlink_to("nothing")


def make_socket(path: Path) -> None:
    here = Path.cwd()
    os.chdir(path.parent)  # a socket's path may not be long
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path.name)
    os.chdir(here)


@pytest.mark.parametrize("name", [RANK_FILE, ROUTER_FILE, CONFIG_FILE, MANIFEST, MANIFEST_SUM])
@pytest.mark.parametrize(
    "put", [make_pipe, Path.mkdir, link_outside, link_to_a_device, link_to_nothing, make_socket]
)
def test_only_plain_files_are_read(put: Callable[[Path], None], name: str, path: Path) -> None:
    (path / name).rename(path / "kept")
    put(path / name)
    message = refusal(path)
    assert message.startswith(f"{path / name}: is ")
    assert message.endswith((": is not a plain file", ": is missing"))


CLIMBING = [
    *("../x", "/etc/hostname", "./config.toml", "a/../../x", "..", "", f"{RANK_FILE}/../x", f"{RANK_FILE}\n"),
    *(
        "rank-0000\u0661.safetensors",
        "rank-1.safetensors",
        "x\x1b]0;x\x07.toml",
        "latest",
        MANIFEST,
        "\ud800",
    ),
]


@pytest.mark.parametrize("name", CLIMBING, ids=ascii)
def test_a_file_name_that_no_checkpoint_has_is_refused(name: str, path: Path) -> None:
    tree = json.loads((path / MANIFEST).read_bytes())
    tree["files"][name] = tree["files"][RANK_FILE]
    put_manifest(path, json.dumps(tree))
    assert str(path / MANIFEST) in refusal(path)


def header(tensors: Any, n_bytes: int, *, length: int | None = None) -> bytes:
    text = json.dumps(tensors).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + bytes(n_bytes)


def two(begin: int, end: int, **changes: Any) -> bytes:
    """Return a file with both kinds of w. The second is at [begin, end)."""
    first = {"dtype": "F32", "shape": [NUMEL], "data_offsets": [0, 4 * NUMEL]}
    second = {"dtype": "F32", "shape": [NUMEL], "data_offsets": [begin, end], **changes}
    return header({"master/w": first, "exp_avg/w": second}, 8 * NUMEL)


def one_of(dtype: str, shape: list[int], end: int) -> bytes:
    entry = {"dtype": dtype, "shape": shape, "data_offsets": [0, end]}
    return header({"master/w": entry, "exp_avg/w": entry}, 4 * NUMEL)


RANK_FILES: dict[str, bytes] = {
    "nothing": b"",
    "part of a header": b"\x01\x00\x00",
    "a header of terabytes": header({}, 64, length=1 << 43),
    "a header of 2**64 bytes": header({}, 64, length=(1 << 64) - 1),
    "a header longer than the file": header({}, 64, length=1000),
    "a header that is not JSON": struct.pack("<Q", 8) + b"{{{{{{{{" + bytes(64),
    "a header that is not an object": header([1, 2], 64),
    "a header nested deep": struct.pack("<Q", 200_000) + b"[" * 200_000,
    "terabytes of a tensor": two(4 * NUMEL, 1 << 43, shape=[1 << 41]),
    "a shape whose product overflows": two(4 * NUMEL, 8 * NUMEL, shape=[HUGE, 8]),
    "a shape of a huge size and zero": two(4 * NUMEL, 4 * NUMEL, shape=[HUGE, 0]),
    "a negative size": two(4 * NUMEL, 8 * NUMEL, shape=[-NUMEL]),
    "another shape": two(4 * NUMEL, 8 * NUMEL, shape=[1, NUMEL]),
    "a scalar": two(4 * NUMEL, 4 * NUMEL + 4, shape=[]),
    "offsets that overlap": two(0, 4 * NUMEL),
    "offsets with a gap": two(4 * NUMEL + 4, 8 * NUMEL),
    "offsets beyond the end": two(4 * NUMEL, 8 * NUMEL + 4, shape=[NUMEL + 1]),
    "offsets in reverse order": two(8 * NUMEL, 4 * NUMEL),
    "a negative offset": two(-4, 4 * NUMEL),
    "the dtype int32": two(4 * NUMEL, 8 * NUMEL, dtype="I32"),
    "the dtype float64": two(4 * NUMEL, 8 * NUMEL, dtype="F64", shape=[NUMEL // 2]),
    "an unknown dtype": two(4 * NUMEL, 8 * NUMEL, dtype="O\x1b[2J"),
    "a dtype of four bits": two(4 * NUMEL, 8 * NUMEL, dtype="F4", shape=[8 * NUMEL]),
    "both kinds at the same offsets": one_of("F32", [NUMEL], 4 * NUMEL),
    "one kind only": header(
        {"master/w": {"dtype": "F32", "shape": [NUMEL], "data_offsets": [0, 4 * NUMEL]}}, 4 * NUMEL
    ),
    "a name with terminal escapes": header({"\x1b[2J": 1}, 64),
}  # fmt: skip


@pytest.mark.parametrize("content", RANK_FILES.values(), ids=RANK_FILES.keys())
def test_a_rank_file_with_false_claims_is_refused(content: bytes, path: Path) -> None:
    put_file(path, RANK_FILE, content)
    assert str(path / RANK_FILE) in refusal(path)
