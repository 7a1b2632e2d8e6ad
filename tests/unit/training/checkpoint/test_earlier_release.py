"""Checkpoints of an earlier release (format version 2): their manifests are read and every byte verifies."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from turnout.launch.run_dir import read_config
from turnout.training.checkpoint.directory import (
    list_checkpoints,
    read_checkpoint,
    step_of,
    verify_checkpoint,
)
from turnout.training.checkpoint.manifest import MANIFEST, MANIFEST_SUM, SavedLayout, rank_file
from turnout.training.checkpoint.tensor_files import key_of
from turnout.training.checkpoint.weights import CheckpointWeights, parameter_shapes
from turnout.training.errors import CheckpointError

RUN = Path(__file__).parents[3] / "old_run" / "a31d440" / "run"
PATHS = list_checkpoints(RUN)
each_checkpoint = pytest.mark.parametrize("path", PATHS, ids=lambda path: path.name)


def test_the_run_has_its_two_checkpoints() -> None:
    assert [step_of(path) for path in PATHS] == [12, 9]


@each_checkpoint
def test_the_manifest_is_read_under_todays_names(path: Path) -> None:
    old = json.loads((path / MANIFEST).read_bytes())
    assert old["format_version"] == 2 and "saved_layout" not in old, "a manifest of today proves nothing"
    manifest = read_checkpoint(path)
    assert manifest.saved_layout == SavedLayout(world_size=2, tp=1, ep=2, zero_stage=1)
    assert manifest.saved_layout.model_dump() == old["saved_at"]
    assert manifest.format_version == 2
    assert manifest.kinds == ("master", "exp_avg", "exp_avg_sq")
    # All other fields have the same names in both versions.
    same = manifest.model_dump(mode="json", include={"data", "state", "files"})
    assert same == {name: old[name] for name in same}
    assert manifest.state.step == step_of(path) and manifest.state.n_interventions == 2
    shards = {name: [list(shard) for shard in entry.shards] for name, entry in manifest.tensors.items()}
    assert shards == {name: entry["pieces"] for name, entry in old["tensors"].items()}
    shapes = {name: entry.shape for name, entry in manifest.tensors.items()}
    assert shapes == parameter_shapes(read_config(path).model)


@each_checkpoint
def test_every_byte_verifies(path: Path) -> None:
    n_read = 0

    def on_read(n_bytes: int) -> None:
        nonlocal n_read
        n_read += n_bytes

    manifest = verify_checkpoint(path, on_read)
    covered = {*manifest.files, MANIFEST, MANIFEST_SUM}
    assert {file.name for file in path.iterdir()} == covered
    assert n_read == manifest.n_bytes == sum((path / name).stat().st_size for name in manifest.files)


def test_damage_to_any_file_is_found(tmp_path: Path) -> None:
    (path := tmp_path / PATHS[0].name).mkdir()
    for source in PATHS[0].iterdir():
        shutil.copyfile(source, path / source.name)
    for file in sorted(path.iterdir()):
        content = file.read_bytes()
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        # The manifest and its checksum are compared, so the error names the manifest for both.
        named = MANIFEST if file.name == MANIFEST_SUM else file.name
        with pytest.raises(CheckpointError, match=f"^{path / named}: "):
            verify_checkpoint(path)
        file.write_bytes(content)
    verify_checkpoint(path)


@each_checkpoint
def test_the_weights_are_those_in_the_rank_files(path: Path) -> None:
    """Compare with the shards in rank order, which is the order of the elements at ep=2 and tp=1."""
    weights = CheckpointWeights(path, read_config(path).model)
    ranks = [load_file(path / rank_file(rank)) for rank in range(2)]
    for name, shape in weights.shapes.items():
        key = key_of("master", name)
        stored = torch.cat([rank[key] for rank in ranks if key in rank])
        assert torch.equal(weights.read(name), stored.view(shape)), name
