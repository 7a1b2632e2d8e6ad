"""Fixtures and environment for all folders of tests."""

import os
from pathlib import Path

import pytest

from turnout.launch.devices import count_gpus

# Two workers have as many threads as cores each, so idle threads must not spin. torch reads this at import.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
if not count_gpus():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # as in ranks; else DeepSpeed probes for others with gcc


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.unit.data_fixtures import write_tokenizer

    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))
