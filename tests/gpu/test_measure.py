"""Each part of tests/gpu/measure.py, in tiny sizes on the CPU: it still fits the code that it measures."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from turnout.moe.experts.requirements import REQUIREMENTS

pytestmark = pytest.mark.long

ROOT = Path(__file__).parents[2]
ON_CPU = {"DRY": "1", "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT)}
# The arguments of each part, and at least how many results of each kind it prints on a CPU.
PARTS = {
    "steps": (["sorted_loop", "torch_grouped", "triton_grouped"], {"step": 4}),
    "layer": ([], {"matrix product": 1, "dense layer of as many FLOPs": 1, "expert layer": 3}),
    "profile": ([], {"profile of a step": 1}),
    "stall": ([], {"checkpoint copy": 3}),
}


@pytest.mark.parametrize("part", PARTS)
def test_a_part_runs_on_the_cpu(part: str) -> None:
    arguments, n_wanted = PARTS[part]
    run = subprocess.run(
        [sys.executable, "-m", "tests.gpu.measure", part, *arguments],
        cwd=ROOT,
        env=os.environ | ON_CPU,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    results = [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]
    failed = [result for result in results if "failed" in result]
    unexpected = [result for result in failed if not needs_gpu(result["what"])]
    assert not unexpected, f"{unexpected}\n{run.stderr}"
    n_found = Counter(result["what"] for result in results if "failed" not in result)
    assert n_found >= Counter(n_wanted), run.stdout


def needs_gpu(what: str) -> bool:
    """Return whether a measurement, such as "layer megablocks", is of a backend that runs on GPUs only."""
    backend = what.split()[-1].partition("+")[0]
    return backend in REQUIREMENTS and REQUIREMENTS[backend].is_gpu_only
