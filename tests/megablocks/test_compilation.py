"""Kernels compile to machine code for GPUs that this machine lacks, within the shared memory of a block."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.megablocks.interpreted import skip_elsewhere

skip_elsewhere()
# Largest shared memory of a block, from NVIDIA's tables of compute capabilities.
SHARED_KIB = {"sm_80": 163, "sm_86": 99, "sm_89": 99, "sm_90": 227, "sm_100": 227}


def compiled(backend: str, architectures: list[str], cache: Path) -> list[dict[str, Any]]:
    """Compile a backend's kernels in a process without the interpreter."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.megablocks.compile_kernels", backend, *architectures]
    run = subprocess.run(
        command,
        env=env | {"TRITON_CACHE_DIR": str(cache)},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    return [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]


@pytest.mark.parametrize(
    ("backend", "n_kernels", "architectures"),
    [
        ("megablocks", 4, ["sm_80", "sm_90", "sm_100"]),
        ("triton_grouped", 7, ["sm_80", "sm_86", "sm_89"]),
    ],
    ids=["megablocks", "triton_grouped"],
)
def test_kernels_compile_and_fit(
    backend: str, n_kernels: int, architectures: list[str], tmp_path: Path
) -> None:
    results = compiled(backend, architectures, tmp_path)
    assert len(results) == n_kernels * len(architectures)
    for result in results:
        assert result["cubin_bytes"] > 1000, result
        assert result["architecture"] in result["target"], result
        assert result["shared_bytes"] <= SHARED_KIB[result["architecture"]] * 1024, result
