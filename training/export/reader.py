"""The weights in a Hugging Face directory under the names of ours, read a tensor or an expert at a time.

What is read may be a stranger's: config.json is checked field by field, tensors by name and shape, and
nothing in the directory is executed.
"""

import json
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from turnout.moe.config import ModelConfig
from turnout.moe.init_weights import initial_values
from turnout.moe.parallel.sharding import is_expert
from turnout.training.checkpoint.weights import MAPPED_BYTES, parameter_shapes
from turnout.training.errors import CheckpointError, ConfigError, printable
from turnout.training.export.architectures import from_hf_config
from turnout.training.export.hf_files import CONFIG, INDEX, SINGLE
from turnout.training.export.naming import DENSE, Slot, half_of, slots

MAX_JSON_BYTES = 256 << 20
FLOATS = ("F32", "BF16", "F16")


class HfWeights:
    """The weights in a directory that `turnout export` or transformers has written."""

    def __init__(self, directory: Path, *, experts: Mapping[str, Any] | None = None, seed: int = 0) -> None:
        """Raise ConfigError for a model Turnout does not compute, CheckpointError where tensors are missing.

        experts: of a dense model, the settings of the experts that are to be made of its layers: each is a
        copy, and the routers are drawn small at random by the seed (Komatsuzaki et al. 2022, 2212.05055).
        """
        self.place, self._seed = directory, seed
        tree = read_json(directory / CONFIG)
        self.architecture, self.cfg = from_hf_config(tree, str(directory / CONFIG), experts=experts)
        self._files = SafetensorsFiles(directory)
        self._slots = self._find_slots()
        self._settle_config()
        self.tokenizer_path = self._find_tokenizer()

    def read(self, name: str, expert: int | None = None) -> Tensor:
        """Return a parameter, or one expert's part of it, fp32 on the CPU. Raises CheckpointError."""
        if is_expert(name) and expert is None:
            whole = torch.empty(self._shapes[name])
            for i, part in enumerate(whole):
                part.copy_(self.read(name, i))
            return whole
        if found := self._slots.get((name, expert)):
            if len(found) == 1:
                return self._files.read(found[0].name)
            whole = torch.empty(self._shapes[name][1:])
            for slot in found:
                assert slot.half is not None
                half_of(whole, slot.half).copy_(self._files.read(slot.name))
            return whole
        assert self.architecture in DENSE and name.endswith("router.weight"), name
        return initial_values(self._shapes[name], self.cfg.init_std, name, self._seed)

    def read_bias(self) -> Tensor:
        """Return the routers' bias, [M, E] fp32; zeros where the architecture has none."""
        bias_ME = torch.zeros(self.cfg.n_moe_layers, self.cfg.n_experts)
        for slot in slots(self.architecture, self.cfg):
            if slot.kind == "bias":
                assert slot.index is not None
                bias_ME[slot.index] = self._files.read(slot.name)
        return bias_ME

    def _find_slots(self) -> dict[tuple[str, int | None], list[Slot]]:
        """Return the slots of each parameter: one, of gate_up two halves.

        Raises CheckpointError for a missing or unexpected tensor.
        """
        found, filled, wanted = self._files.shapes, dict[tuple[str, int | None], list[Slot]](), set[str]()
        # One at a time: the config of a stranger may speak of more layers than memory has room for.
        for slot in slots(self.architecture, self.cfg):
            if slot.name == "lm_head.weight" and self.cfg.tie_embeddings:
                continue
            if found.get(slot.name) != slot.shape:
                here, there = (
                    printable(str(shape), 80) for shape in (found.get(slot.name, "absent"), slot.shape)
                )
                raise CheckpointError(f"{self.place}: {slot.name} is {here} where its config says {there}")
            wanted.add(slot.name)
            if slot.kind == "parameter":
                filled.setdefault((slot.ours, slot.index), []).append(slot)
        for name in sorted(found.keys() - wanted):
            if not _is_computed(name) and name != "lm_head.weight":
                raise CheckpointError(
                    f"{self.place}: holds {printable(name)}, for which the {self.architecture} of its config "
                    "has no place"
                )
        return filled

    def _settle_config(self) -> None:
        """Take back what export adds: the head of a tied model, and the shared expert of zeros.

        It is seen in the numbers and not in a note, for who trains an export on may change the numbers.
        """
        changes: dict[str, Any] = {}
        if not self.cfg.tie_embeddings and self._files.are_equal(
            "model.embed_tokens.weight", "lm_head.weight"
        ):
            changes["tie_embeddings"] = True
        shared = [
            slot for (name, _), found in self._slots.items() if ".moe.shared." in name for slot in found
        ]
        if self.cfg.n_shared_experts == 1 and not any(self._files.has_nonzero(slot.name) for slot in shared):
            changes["n_shared_experts"] = 0
        if changes:
            self.cfg = ModelConfig.model_validate({**self.cfg.model_dump(), **changes})
        self._shapes = parameter_shapes(self.cfg)
        self._slots = {key: found for key, found in self._slots.items() if key[0] in self._shapes}

    def _find_tokenizer(self) -> Path:
        for name in ("tokenizer.model", "tokenizer.json"):  # ids of the first are those of training
            if (path := self.place / name).is_file():
                return path
        raise CheckpointError(
            f"{self.place}: has no tokenizer.model and no tokenizer.json; copy the model's there"
        )


class SafetensorsFiles:
    """The tensors of a directory by name, from one file or from the many of an index."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._opened: dict[str, Any] = {}
        self._n_mapped = 0
        self._file_of = self._read_index()
        self.shapes = {name: tuple(self._slice(name).get_shape()) for name in self._file_of}

    def read(self, name: str) -> Tensor:
        """Return a tensor of its own memory, fp32. Raises CheckpointError."""
        out = torch.empty(self.shapes[name])
        start = 0
        for part in self._parts(name):
            out[start : start + len(part)] = part
            start += len(part)
        return out

    def has_nonzero(self, name: str) -> bool:
        return any(bool(part.any()) for part in self._parts(name))

    def are_equal(self, one: str, other: str) -> bool:
        """Return whether two tensors of one shape hold the same bits."""
        pairs = zip(self._parts(one), self._parts(other), strict=True)
        return all(torch.equal(a, b) for a, b in pairs)

    def _parts(self, name: str) -> Iterator[Tensor]:
        """Yield the tensor's rows in order, some MiB at a time, as they are stored."""
        shape = self.shapes[name]
        n_rows = max(1, (MAPPED_BYTES // 4) // max(1, 4 * prod(shape[1:])))
        for start in range(0, shape[0], n_rows):
            try:
                part = self._slice(name)[start : start + n_rows]
            except (SafetensorError, OSError) as err:
                raise self._damaged(name, err) from err
            yield part
            self._n_mapped += part.numel() * part.element_size()
            if self._n_mapped >= MAPPED_BYTES:
                self._opened, self._n_mapped = {}, 0

    def _slice(self, name: str) -> Any:
        file = self._file_of[name]
        try:
            if file not in self._opened:
                self._opened[file] = safe_open(self._directory / file, framework="pt", device="cpu")
            found = self._opened[file].get_slice(name)
        except (SafetensorError, OSError) as err:
            raise self._damaged(name, err) from err
        if found.get_dtype() not in FLOATS or not found.get_shape():
            raise CheckpointError(
                f"{self._directory / file}: {printable(name)} is {found.get_dtype()} {found.get_shape()}; "
                f"{', '.join(FLOATS)} can be read"
            )
        return found

    def _read_index(self) -> dict[str, str]:
        """Return the file of each tensor. Raises CheckpointError."""
        if not (self._directory / INDEX).is_file():
            try:
                with safe_open(self._directory / SINGLE, framework="pt", device="cpu") as file:
                    return dict.fromkeys(file.keys(), SINGLE)
            except (SafetensorError, OSError) as err:
                raise CheckpointError(f"{self._directory / SINGLE}: {printable(str(err))}") from err
        files = read_json(self._directory / INDEX).get("weight_map")
        # A name with a path in it would lead out of the directory.
        if not isinstance(files, dict) or not all(
            isinstance(file, str) and file and Path(file).name == file and _is_text(file) and _is_text(name)
            for name, file in files.items()
        ):
            raise CheckpointError(f"{self._directory / INDEX}: does not say which file holds which tensor")
        return files

    def _damaged(self, name: str, err: Exception) -> CheckpointError:
        file = self._directory / self._file_of[name]
        return CheckpointError(f"{file}: {printable(name)}: {printable(str(err))}")


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file. Raises CheckpointError; ConfigError for a config that is none."""
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise ValueError("it is too large")
        tree = json.loads(path.read_bytes())
        if not isinstance(tree, dict):
            raise ValueError("it holds no object")
    except OSError as err:
        raise CheckpointError(f"{path}: cannot be read: {err.strerror or err}") from err
    except (ValueError, RecursionError) as err:
        kind = ConfigError if path.name == CONFIG else CheckpointError
        raise kind(f"{path}: not JSON that can be used ({printable(str(err))})") from err
    return tree


def _is_text(name: str) -> bool:
    # JSON can spell half of a surrogate pair, which is no character, and NUL, which ends a file's name.
    return "\0" not in name and not any("\ud800" <= char <= "\udfff" for char in name)


def _is_computed(name: str) -> bool:
    # Old files hold RoPE's frequencies, which follow from the config.
    return name.endswith("rotary_emb.inv_freq")
