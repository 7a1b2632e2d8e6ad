"""Fixtures of more than one folder of tests."""

import os
from pathlib import Path

import pytest

from turnout.launch.devices import count_gpus

# Each of two workers has as many threads as there are cores. torch reads this once, when it is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
if not count_gpus():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # as for ranks; DeepSpeed would look for others, with gcc


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.unit.data_fixtures import write_tokenizer

    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))
