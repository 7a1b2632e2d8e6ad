"""Any damage to the files of a checkpoint is found, and the file is named.

Random damage, from fixed seeds, to a checkpoint that three ranks saved.
"""

import errno
import os
import random
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from tests.checkpoints import save_small
from tests.ranks import run_ranks
from tests.runs import run_config
from turnout.launch.settings import to_toml
from turnout.training.checkpoint.directory import list_checkpoints, verify_checkpoint
from turnout.training.checkpoint.manifest import MANIFEST, MANIFEST_SUM, Attached, DataIdentity, rank_file
from turnout.training.errors import CheckpointError
from turnout.training.run_control import take_over

N_RANKS = 3
N_DAMAGES = 400  # of each kind
TEXTS = {
    "config.toml": to_toml(run_config()).encode(),
    "provenance.json": b'{"attempts": []}\n',
    "tokenizer.model": random.Random(0).randbytes(300),
}
FILES = {*TEXTS, *map(rank_file, range(N_RANKS)), "router.safetensors", MANIFEST, MANIFEST_SUM}

Damage = Callable[[Path, random.Random], set[str]]  # damages files, and returns which ones an error may name


def flip_bits(directory: Path, rng: random.Random) -> set[str]:
    path = directory / rng.choice(sorted(FILES))
    content = bytearray(path.read_bytes())
    for idx in rng.sample(range(len(content)), rng.choice([1, 1, 2, 5])):
        content[idx] ^= 1 << rng.randrange(8)
    path.write_bytes(content)
    return {path.name}


def cut(directory: Path, rng: random.Random) -> set[str]:
    path = directory / rng.choice(sorted(FILES))
    os.truncate(path, rng.choice([0, rng.randrange(path.stat().st_size), path.stat().st_size - 1]))
    return {path.name}


def append(directory: Path, rng: random.Random) -> set[str]:
    path = directory / rng.choice(sorted(FILES))
    with path.open("ab") as file:
        file.write(rng.choice([b"\0", b"\n", b" ", rng.randbytes(rng.randint(1, 5000))]))
    return {path.name}


def overwrite(directory: Path, rng: random.Random) -> set[str]:
    """Overwrite a range with zeros or with other bytes of the file, as lost and misplaced sectors do."""
    path = directory / rng.choice(sorted(FILES))
    content = path.read_bytes()
    begin = rng.randrange(len(content))
    n = rng.randint(1, len(content) - begin)
    put = rng.choice([bytes(n), content[:n], rng.randbytes(n)])
    changed = content[:begin] + put + content[begin + n :]
    path.write_bytes(changed if changed != content else content[:-1])
    return {path.name}


def delete(directory: Path, rng: random.Random) -> set[str]:
    path = directory / rng.choice(sorted(FILES))
    path.unlink()
    return {path.name}


def swap(directory: Path, rng: random.Random) -> set[str]:
    one, other = (directory / name for name in rng.sample(sorted(FILES), 2))
    aside = directory / "aside"
    one.rename(aside)
    other.rename(one)
    aside.rename(other)
    return {one.name, other.name}


def swap_rank_files(directory: Path, rng: random.Random) -> set[str]:
    """Swap two files of the same size, so that only their bytes differ."""
    one, other = (directory / rank_file(rank) for rank in rng.sample(range(N_RANKS), 2))
    contents = one.read_bytes(), other.read_bytes()
    assert len(contents[0]) == len(contents[1]) and contents[0] != contents[1]
    one.write_bytes(contents[1])
    other.write_bytes(contents[0])
    return {one.name, other.name}


# Deletions and swaps of rank files have few outcomes, so fewer trials cover them all.
DAMAGES: dict[Damage, int] = {
    flip_bits: N_DAMAGES,
    cut: N_DAMAGES,
    append: N_DAMAGES,
    overwrite: N_DAMAGES,
    delete: 40,
    swap: N_DAMAGES,
    swap_rank_files: 10,
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("saved") / "run"
    run_dir.mkdir()
    attached = Attached(DataIdentity(corpus_hash="c" * 64, tokenizer_sha256="d" * 64), TEXTS)
    save = partial(save_small, token=take_over(run_dir), n_ranks=N_RANKS, attached=attached)
    run_ranks(save, N_RANKS, run_dir, [7])
    (path,) = list_checkpoints(run_dir)
    assert {file.name for file in path.iterdir()} == FILES
    verify_checkpoint(path)
    return path


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_damage_is_refused_by_file(damage: Damage, saved: Path, tmp_path: Path) -> None:
    damaged = tmp_path / saved.name
    shutil.copytree(saved, damaged)
    hit = set()
    for seed in range(DAMAGES[damage]):
        names = damage(damaged, random.Random(f"{damage.__name__} {seed}"))
        with pytest.raises(CheckpointError) as caught:
            verify_checkpoint(damaged)
        # The manifest and its checksum are compared, so the error cannot say which of them is damaged.
        if names & {MANIFEST, MANIFEST_SUM}:
            names |= {MANIFEST}
        where = str(caught.value).partition(": ")[0]
        assert where in {str(damaged / name) for name in names}, (seed, str(caught.value))
        hit |= names
        for name in names:  # restored for the next trial
            shutil.copyfile(saved / name, damaged / name)
    verify_checkpoint(damaged)
    assert hit == (set(map(rank_file, range(N_RANKS))) if damage is swap_rank_files else FILES)


def test_a_read_error_names_the_file(saved: Path) -> None:
    failing = str(saved / rank_file(1))
    n_left = sum((saved / name).stat().st_size for name in FILES if name < rank_file(1) and name[0] != "m")

    def on_read(n_bytes: int) -> None:
        nonlocal n_left
        n_left -= n_bytes
        if n_left < 0:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    with pytest.raises(CheckpointError) as caught:
        verify_checkpoint(saved, on_read)
    assert str(caught.value) == f"{failing}: cannot be read: Input/output error"
