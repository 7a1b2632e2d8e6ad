"""Fixtures of more than one folder of tests."""

import os
from pathlib import Path

import pytest

# Each of two workers has as many threads as there are cores. They look once, as torch is imported: not above.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.unit.data_fixtures import write_tokenizer

    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))
