"""The manifest of a checkpoint, manifest.json, and its checksum, manifest.sha256: format, reading, checks.

    step-00001000/
        manifest.json, manifest.sha256    written last
        rank-00000.safetensors ...        flattened shards of parameters: master, exp_avg, exp_avg_sq
        router.safetensors                bias and load fractions
        config.toml, provenance.json, tokenizer.model (or .json)

Everything is JSON, TOML or safetensors, so reading a stranger's checkpoint runs no code. Every claim in the
manifest is checked before it is used, and no memory is allocated because of an unchecked one.
"""

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BaseModel, Field, TypeAdapter, ValidationError, field_validator, model_validator

from turnout.data.files import sha256_of
from turnout.data.skips import SkippedWindow
from turnout.moe.config import STRICT
from turnout.training.checkpoint.resharding import Matrix, Shard, tiling_fault
from turnout.training.config.optim import MASTER
from turnout.training.errors import CheckpointError, UnknownVersionError, UnreadableError, printable
from turnout.training.guard import GuardState
from turnout.training.renames import rename_manifest

# Version 1, which stored gate and up of the experts separately, is not read; 2 names two keys differently.
FORMAT_VERSION, READ_VERSIONS = 3, (2, 3)
MANIFEST, MANIFEST_SUM = "manifest.json", "manifest.sha256"
ROUTER_FILE, CONFIG_FILE, PROVENANCE_FILE = "router.safetensors", "config.toml", "provenance.json"
MAX_MANIFEST_BYTES = 1 << 30
BIAS, LOAD_FRAC = "bias", "load_frac"  # the tensors in ROUTER_FILE
_FILE_NAMES = re.compile(
    r"(rank-[0-9]{5}|router)\.safetensors|config\.toml|provenance\.json|tokenizer\.(model|json)"
)
# Python's integers have no limit; tensor sizes and file offsets do. Strict, or the text "nan" would pass.
Count = Annotated[int, Field(strict=True, ge=0, lt=2**63)]
Size = Annotated[int, Field(strict=True, ge=1, lt=2**63)]
Scalar = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.]+$")]  # is printed, and is part of a key


def rank_file(rank: int) -> str:
    return f"rank-{rank:05d}.safetensors"


class FileEntry(BaseModel):
    model_config = STRICT

    n_bytes: Count
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class TensorEntry(BaseModel):
    """A whole tensor and its shards, each as (rank, first_col, width, start, stop)."""

    model_config = STRICT

    shape: Annotated[tuple[Size, ...], Field(max_length=8)]
    n_rows: Size
    row_width: Size
    shards: tuple[tuple[Count, Count, Size, Count, Size], ...]

    @property
    def matrix(self) -> Matrix:
        return Matrix(self.n_rows, self.row_width)

    def held_shards(self) -> list[tuple[int, Shard]]:
        """Return each shard with the rank that holds it."""
        return [(rank, Shard(*bounds)) for rank, *bounds in self.shards]


class SavedLayout(BaseModel):
    """The layout that saved the checkpoint. For information only: any layout can load it."""

    model_config = STRICT

    world_size: Size
    tp: Size
    ep: Size
    zero_stage: Count


_GUARD = TypeAdapter(GuardState)


class TrainingState(BaseModel):
    """What training carries from step to step besides tensors.

    optimizer     scalars of the optimizer, such as the number of applied steps
    loss_scaler   state of fp16's dynamic loss scaling; empty otherwise
    guard         the state of training/guard.py
    skipped       the data steps that the run never trains on
    """

    model_config = STRICT

    step: Count
    tokens_seen: Count
    n_skipped: Count
    n_skipped_in_a_row: Count
    n_interventions: Count
    optimizer: dict[Name, Scalar]
    loss_scaler: dict[Name, Scalar]
    guard: dict[str, Any]
    skipped: tuple[SkippedWindow, ...]

    @field_validator("guard")
    @classmethod
    def _check_guard(cls, guard: dict[str, Any]) -> dict[str, Any]:
        if unknown := guard.keys() - GuardState.__dataclass_fields__.keys():
            raise ValueError(f"holds {sorted(unknown)}, which the guard does not know")
        # Validated as JSON, because strict validation of Python objects accepts only a GuardState.
        _GUARD.validate_json(json.dumps(guard), strict=True)
        return guard

    @field_validator("skipped")
    @classmethod
    def _check_skipped(cls, skipped: tuple[SkippedWindow, ...]) -> tuple[SkippedWindow, ...]:
        if any(window.last >= 2**63 for window in skipped):
            raise ValueError("skips data steps beyond 2**63")
        return skipped


class DataIdentity(BaseModel):
    """The training data of a run, identified by content and not by path."""

    model_config = STRICT

    corpus_hash: str
    tokenizer_sha256: str


class Manifest(BaseModel):
    model_config = STRICT

    format_version: Count
    saved_layout: SavedLayout
    data: DataIdentity
    state: TrainingState
    kinds: Annotated[tuple[Name, ...], Field(max_length=8)]
    tensors: dict[Name, TensorEntry]
    files: dict[str, FileEntry]

    @property
    def n_bytes(self) -> int:
        """Bytes of all files that the manifest lists."""
        return sum(entry.n_bytes for entry in self.files.values())

    @model_validator(mode="after")
    def _check_files(self) -> Self:
        for name in self.files:
            if not _FILE_NAMES.fullmatch(name):
                raise ValueError(f"{name!r} is not the name of a checkpoint's file")
        if missing := {ROUTER_FILE, CONFIG_FILE} - self.files.keys():
            raise ValueError(f"{sorted(missing)} is not among the files")
        return self

    @model_validator(mode="after")
    def _check_kinds(self) -> Self:
        if MASTER not in self.kinds or len({*self.kinds}) != len(self.kinds):
            raise ValueError(f"kinds {list(self.kinds)} must hold {MASTER!r}, and each only once")
        return self

    @model_validator(mode="after")
    def _check_tensors(self) -> Self:
        for name, entry in self.tensors.items():
            numel = entry.n_rows * entry.row_width
            if numel != _product(entry.shape):
                raise ValueError(f"{name}: {entry.n_rows} x {entry.row_width} is not its shape {entry.shape}")
            if fault := tiling_fault(entry.matrix, [shard for _, shard in entry.held_shards()]):
                raise ValueError(f"{name}: {fault}")
            missing = {rank_file(rank) for rank, *_ in entry.shards} - self.files.keys()
            if missing:
                raise ValueError(f"{name}: is in {sorted(missing)}, which is not among the files")
        return self


@dataclass(frozen=True)
class Attached:
    """What a run's checkpoints carry besides its state: the identity of the data, and small files by name."""

    data: DataIdentity
    files: Mapping[str, bytes]


def _product(shape: tuple[int, ...]) -> int:
    n = 1
    for size in shape:
        n *= size
    return n


def to_bytes(manifest: Manifest) -> tuple[bytes, bytes]:
    """Return the contents of manifest.json and of manifest.sha256 (which `sha256sum -c` reads)."""
    text = (manifest.model_dump_json() + "\n").encode()
    return text, f"{hashlib.sha256(text).hexdigest()}  {MANIFEST}\n".encode()


def read_manifest(directory: Path) -> Manifest:
    """Read and check a checkpoint's manifest, and check that its files exist and have the right sizes.

    Raises CheckpointError naming the file and the fault.
    """
    path, sum_path = directory / MANIFEST, directory / MANIFEST_SUM
    text, wanted = _read_small(path), _read_small(sum_path)
    if wanted != f"{hashlib.sha256(text).hexdigest()}  {MANIFEST}\n".encode():
        raise CheckpointError(
            f"{path}: its SHA-256 is not the one in {sum_path.name}; one of the two files is damaged"
        )
    try:
        # Python's json accepts NaN and Infinity, which JSON does not have, and reads 1e999 as infinity.
        tree = json.loads(text, parse_constant=_finite, parse_float=_finite, object_pairs_hook=_each_key_once)
        version = _check_version(path, tree)
        manifest = Manifest.model_validate(rename_manifest(tree) if version < FORMAT_VERSION else tree)
    except (ValueError, RecursionError) as err:
        if isinstance(err, CheckpointError):
            raise
        raise CheckpointError(f"{path}: {printable(_first_line(err))}") from err
    for name, entry in manifest.files.items():
        check_size(directory / name, entry)
    return manifest


def _check_version(path: Path, tree: Any) -> int:
    # Checked before the fields, because another version may have other fields.
    found = tree.get("format_version", FORMAT_VERSION) if isinstance(tree, dict) else FORMAT_VERSION
    if found not in READ_VERSIONS:
        # A damaged one would not have its SHA-256.
        raise UnknownVersionError(
            f"{path}: format_version={printable(repr(found), 20)} must be one of {list(READ_VERSIONS)}; "
            "use the version of Turnout that wrote it"
        )
    return int(found)


def _finite(literal: str) -> float:
    if not math.isfinite(value := float(literal)):
        raise ValueError(f"{literal} is not a finite number")
    return value


def _each_key_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    # JSON readers differ in which of two equal keys they keep.
    if len(tree := dict(pairs)) != len(pairs):
        raise ValueError("a key appears twice in one object")
    return tree


def check_size(path: Path, entry: FileEntry) -> None:
    """Check the size of a file. Raises CheckpointError if it differs, or if there is no such plain file."""
    if (found := _size_of(path)) != entry.n_bytes:
        raise CheckpointError(f"{path}: has {found} bytes, but the manifest says {entry.n_bytes}")


def check_file(path: Path, entry: FileEntry, on_read: Callable[[int], None] | None = None) -> None:
    """Read a file whole and compare it with its entry. Raises CheckpointError."""
    check_size(path, entry)
    with naming_unreadable(path):
        found = sha256_of(path, on_read)
    if found != entry.sha256:
        raise CheckpointError(f"{path}: SHA-256 {found[:16]}.., but the manifest says {entry.sha256[:16]}..")


def _read_small(path: Path) -> bytes:
    if _size_of(path) > MAX_MANIFEST_BYTES:
        raise CheckpointError(f"{path}: is larger than {MAX_MANIFEST_BYTES} bytes, the limit for a manifest")
    with naming_unreadable(path):
        return path.read_bytes()


def _size_of(path: Path) -> int:
    with naming_unreadable(path):
        if path.is_symlink() or not path.is_file():
            raise CheckpointError(f"{path}: {'is not a plain file' if path.exists() else 'is missing'}")
        return path.stat().st_size


@contextmanager
def naming_unreadable(path: Path) -> Iterator[None]:
    """Turn an OSError, such as a failing disk's, into an UnreadableError.

    Raises UnreadableError, which names the file.
    """
    try:
        yield
    except OSError as err:
        raise UnreadableError(f"{path}: cannot be read: {err.strerror or err}") from err


def _first_line(err: Exception) -> str:
    if isinstance(err, ValidationError):
        first = err.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        return f"{where}: {first['msg']}" if where else str(first["msg"])
    return f"not a manifest ({type(err).__name__}: {err})"
