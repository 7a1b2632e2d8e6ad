"""The model card of an export shows the checkpoint's own step and the command of the run's newest attempt."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoints import save_alone
from turnout.training.checkpoint.directory import read_checkpoint
from turnout.training.checkpoint.manifest import PROVENANCE_FILE, Attached, DataIdentity
from turnout.training.export.card import METRICS, Origin, origin_of

CONFIG = b'[data]\ncorpus = "somewhere"\n'
ATTEMPTS = [{"command": ["turnout", "train", "old.toml"]}, {"command": ["turnout", "train", "a b.toml"]}]
ROWS = [
    {"step": 10, "eval/bits_per_byte": 3.0},
    {"step": 20, "train/loss": 1.0, "eval/bits_per_byte": 2.5},
    {"step": 25, "train/loss": 0.9},
    {"step": 30, "eval/bits_per_byte": 2.0},
]


def origin(
    run_dir: Path,
    step: int,
    rows: list[dict[str, Any]] | None,
    attempts: Any = ATTEMPTS,
    key: str = "attempts",
) -> Origin:
    files = {"config.toml": CONFIG, PROVENANCE_FILE: json.dumps({key: attempts}).encode()}
    attached = Attached(DataIdentity(corpus_hash="abc", tokenizer_sha256="t"), files)
    (path,) = save_alone(run_dir, [step], attached=attached)
    if rows is not None:
        (run_dir / METRICS).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return origin_of(path, read_checkpoint(path))


@pytest.mark.parametrize("key", ["attempts", "starts"], ids=["today's name", "the name in old runs"])
def test_a_card_shows_the_checkpoint_and_the_newest_attempt(key: str, tmp_path: Path) -> None:
    assert origin(tmp_path / "run", 20, ROWS, key=key) == Origin(
        step=20,
        tokens_seen=20 * 96,
        corpus_hash="abc",
        trained_by="turnout train 'a b.toml'",
        recipe=CONFIG.decode(),
        bits_per_byte=2.5,
    )


@pytest.mark.parametrize(
    ("step", "rows"),
    [
        pytest.param(20, None, id="no metrics"),
        pytest.param(25, ROWS, id="a step without evaluation"),
        pytest.param(40, ROWS, id="a step after the last row"),
        pytest.param(20, [{"step": 20, "eval/bits_per_byte": None}], id="null"),
    ],
)
def test_bits_per_byte_of_another_step_are_not_shown(
    step: int, rows: list[dict[str, Any]] | None, tmp_path: Path
) -> None:
    assert origin(tmp_path / "run", step, rows).bits_per_byte is None


@pytest.mark.parametrize("attempts", [[], None, [{}], "x"], ids=["none", "null", "no command", "a text"])
def test_a_missing_command_is_not_shown(attempts: Any, tmp_path: Path) -> None:
    assert origin(tmp_path / "run", 20, None, attempts).trained_by is None
