"""The weights in a Hugging Face directory under our names, read one tensor or one expert at a time.

The directory may come from anyone: config.json is checked field by field, tensors by name and shape, and
nothing in the directory is executed.

read_back_huggingface compares an export with its model, parameter by parameter, because the tokens that the
gate tries may not reach every one. It shares the table of names with the writer. The gate proves that table:
transformers would miss a tensor with a wrong name.
"""

import json
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from turnout.moe.config import BalanceConfig, ModelConfig
from turnout.moe.init_weights import initial_values
from turnout.moe.parallel.sharding import is_expert
from turnout.training.checkpoint.weights import MAPPED_BYTES, Weights, parameter_shapes
from turnout.training.errors import CheckpointError, ConfigError, ExportError, printable
from turnout.training.export.hf_config import CONFIG, DENSE, INDEX, SINGLE, from_hf_config
from turnout.training.export.huggingface import Slot, half_of, slots

MAX_JSON_BYTES = 256 << 20
FLOATS = ("F32", "BF16", "F16")


class HfWeights:
    """The weights in a directory that `turnout export` or transformers wrote."""

    def __init__(self, directory: Path, *, experts: Mapping[str, Any] | None = None, seed: int = 0) -> None:
        """Raise ConfigError for a model Turnout does not compute, CheckpointError where tensors are missing.

        experts: settings of the experts to make of a dense model's layers. Each expert is a copy of its
        layer; the routers' weights are small and random, by the seed (Komatsuzaki et al. 2022, 2212.05055).
        """
        self.place, self._seed = directory, seed
        tree = read_json(directory / CONFIG)
        self.architecture, self.cfg = from_hf_config(tree, str(directory / CONFIG), experts=experts)
        self._files = SafetensorsFiles(directory)
        self._slots = self._find_slots()
        self._settle_config()
        self.tokenizer_path = self._find_tokenizer()

    def read(self, name: str, expert: int | None = None) -> Tensor:
        """Return a parameter, or one expert's part of it, fp32 on the CPU, of the parameter's shape.

        Raises CheckpointError where a file is damaged.
        """
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
        """Return the slots of each parameter: one, or the two halves of gate_up.

        Raises CheckpointError for a missing or unexpected tensor.
        """
        found, filled, wanted = self._files.shapes, dict[tuple[str, int | None], list[Slot]](), set[str]()
        # One at a time: a hostile config may name more layers than fit into memory.
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
                    f"{self.place}: holds {printable(name)}, which is no tensor of the {self.architecture} "
                    "in its config; use the weights' own config.json"
                )
        return filled

    def _settle_config(self) -> None:
        """Undo what export adds: the head of a tied model, and the shared expert of zeros.

        Decided from the values, not from a note in the config: further training of an export may change them.
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
        for name in ("tokenizer.model", "tokenizer.json"):  # training used the first, where it exists
            if (path := self.place / name).is_file():
                return path
        raise CheckpointError(
            f"{self.place}: has no tokenizer.model and no tokenizer.json; copy the model's tokenizer there"
        )


class SafetensorsFiles:
    """The tensors of a directory by name, from one file or from the files that an index lists.

    shapes  of every tensor, by name
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._opened: dict[str, Any] = {}
        self._n_mapped = 0
        self._file_of = self._read_index()
        self.shapes = {name: tuple(self._slice(name).get_shape()) for name in self._file_of}

    def read(self, name: str) -> Tensor:
        """Return a copy of a tensor, fp32, in its shape. Raises CheckpointError for a damaged file."""
        out = torch.empty(self.shapes[name])
        start = 0
        for part in self._parts(name):
            out[start : start + len(part)] = part
            start += len(part)
        return out

    def has_nonzero(self, name: str) -> bool:
        """Return whether a tensor has an element other than 0."""
        return any(bool(part.any()) for part in self._parts(name))

    def are_equal(self, one: str, other: str) -> bool:
        """Return whether two tensors of one shape hold the same bits."""
        pairs = zip(self._parts(one), self._parts(other), strict=True)
        return all(torch.equal(a, b) for a, b in pairs)

    def _parts(self, name: str) -> Iterator[Tensor]:
        """Yield the tensor's rows in order and in their stored dtype, some MiB at a time."""
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
                f"only {', '.join(FLOATS)} can be read"
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
        # A file name that holds a path could lead out of the directory.
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
    """Return the object in a JSON file.

    Raises CheckpointError where it cannot be read; where it cannot be used, a ValueError: ConfigError for
    config.json, CheckpointError for other files.
    """
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise ValueError("it is too large")
        tree = json.loads(path.read_bytes())
        if not isinstance(tree, dict):
            raise ValueError("it holds no JSON object")
    except OSError as err:
        raise CheckpointError(f"{path}: cannot be read: {err.strerror or err}") from err
    except (ValueError, RecursionError) as err:
        kind = ConfigError if path.name == CONFIG else CheckpointError
        raise kind(f"{path}: is no usable JSON ({printable(str(err))})") from err
    return tree


def _is_text(name: str) -> bool:
    # JSON can spell half of a surrogate pair, which is no character, and NUL, which ends a file name.
    return "\0" not in name and not any("\ud800" <= char <= "\udfff" for char in name)


def _is_computed(name: str) -> bool:
    # Old files hold RoPE's frequencies, which the config determines.
    return name.endswith("rotary_emb.inv_freq")


def read_back_huggingface(directory: Path, weights: Weights) -> str:
    """Compare every parameter and the config of a directory with the model's; return the result in words.

    weights: the model's, already rounded as the files store them. One tensor of each side is in memory at a
    time, one expert's where experts are stacked. Raises ExportError where anything differs.
    """
    try:
        found = HfWeights(directory)
        _check_config(found, weights)
        names = list(parameter_shapes(weights.cfg))
        for name in names:
            for expert in range(weights.cfg.n_experts) if is_expert(name) else (None,):
                written, wanted = _read_written(found, name, expert), weights.read(name, expert)
                if not torch.equal(
                    written.expand_as(wanted).contiguous().view(torch.int32), wanted.view(torch.int32)
                ):
                    part = name if expert is None else f"{name} of expert {expert}"
                    raise ExportError(f"{part} was written with other values; nothing was kept")
        # Compared as floats: a bias of -0.0, which has no effect, reads as 0.0 if the architecture has none.
        if not torch.equal(found.read_bias(), weights.read_bias()):
            raise ExportError("the routers' bias was written with other values; nothing was kept")
    except (CheckpointError, ConfigError) as err:
        raise ExportError(f"the written files cannot be read back: {err}; nothing was kept") from err
    return f"read back: all {len(names)} parameters are the model's, bit for bit after rounding"


def _check_config(found: HfWeights, weights: Weights) -> None:
    # A head that equals the embedding reads as tied, and a shared expert of zeros as absent. Whether they
    # really are is compared with the parameters, next.
    have, want = found.cfg.model_dump(), weights.cfg.model_dump()
    want["balance"] = BalanceConfig().model_dump()
    want["tie_embeddings"] |= have["tie_embeddings"]
    if have["n_shared_experts"] == 0 and want["n_shared_experts"] == 1:
        want["n_shared_experts"] = 0
    for name, value in want.items():
        if have[name] != value:
            raise ExportError(
                f"config.json reads as model.{name}={have[name]} where the model has {value}; nothing was "
                "kept"
            )


def _read_written(found: HfWeights, name: str, expert: int | None) -> Tensor:
    if name == "head.weight" and found.cfg.tie_embeddings:
        name = "embed.weight"
    if ".moe.shared." in name and not found.cfg.n_shared_experts:
        return torch.zeros(())
    return found.read(name, expert)
