"""Fixtures of more than one folder of tests."""

from pathlib import Path

import pytest

from tests.unit.data_fixtures import write_tokenizer


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))
