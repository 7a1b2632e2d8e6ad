"""DeepSpeed and everything private to it. Nothing outside training/engine/ knows about DeepSpeed.

Contract: a step applies exactly the gradient of the sum of all losses given to `backward` on the
data-parallel ranks, clipped by its global norm. DeepSpeed divides gradients by the number of data-parallel
ranks, also those of experts, which it sums over the expert-data-parallel ranks; `backward` therefore
multiplies by that number.

DeepSpeed's settings are in training/engine/deepspeed_config.py.
"""

import contextlib
import importlib
import io
import logging
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import deepspeed
import deepspeed.ops
import deepspeed.runtime.compiler
import torch
import torch.distributed as dist
from deepspeed.moe.layer import MoE
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.utils import groups as deepspeed_groups
from deepspeed.utils import logger as deepspeed_logger
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad
from torch import Tensor, nn

from turnout.moe.parallel.sharding import is_expert, split_of
from turnout.training.config.optim import MASTER
from turnout.training.config.train import TrainConfig
from turnout.training.engine.deepspeed_config import deepspeed_config
from turnout.training.engine.first_step_check import FirstStepCheck, ReducedFragment, check_norm
from turnout.training.errors import CheckpointError
from turnout.training.optimizers.adamw import ParamGroups
from turnout.training.parallel.groups import Groups
from turnout.training.parallel.layout import Layout, has_own_expert_groups

_SCALER_STATE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


@dataclass(frozen=True)
class StepOutcome:
    """grad_norm: the global norm before clipping; may be inf or nan.

    was_applied: False if a non-finite gradient made DeepSpeed skip the update, so that no weight changed.
    """

    grad_norm: float
    was_applied: bool


@dataclass(frozen=True)
class Fragment:
    """What one rank's optimizer holds of a parameter: live views that a checkpoint reads or fills.

    part_shape: shape of this rank's part of the parameter
    start: the fragment's offset in the flattened part
    values: by kind ("master", and the optimizer's state such as exp_avg and exp_avg_sq), [n] fp32 each
    """

    name: str
    part_shape: tuple[int, ...]
    start: int
    values: dict[str, Tensor]


class Engine:
    """One model under DeepSpeed: forward, backward, step, and the fp32 master weights by global name."""

    def __init__(
        self,
        module: nn.Module,
        cfg: TrainConfig,
        groups: Groups,
        *,
        zero_stage: int,
        n_microbatches: int,
        param_groups: ParamGroups,
        build_optimizer: Callable[[ParamGroups], torch.optim.Optimizer],
        checks_first_step: bool = True,
    ) -> None:
        _silence_info()
        _skip_shm_build()
        _import_muon()
        if groups.device.type == "cpu":
            os.environ.setdefault("LOCAL_SIZE", str(groups.layout.world_size))
        deepspeed.init_distributed(verbose=False)  # uses the process group that already exists
        self.n_microbatches, self._groups = n_microbatches, groups
        settings = deepspeed_config(
            cfg, zero_stage=zero_stage, dp=groups.layout.dp, n_microbatches=n_microbatches
        )
        if has_own_expert_groups(groups.layout):
            param_groups = mark_experts(module, param_groups, groups)
        mark_split_parameters(module, groups.layout)
        self._check: FirstStepCheck | None = None
        if checks_first_step:
            self._check = FirstStepCheck(
                module, groups, has_expert_groups=has_own_expert_groups(groups.layout)
            )
        # DeepSpeed's bf16 optimizer prints memory reports that no setting turns off.
        with contextlib.redirect_stdout(io.StringIO()):
            self._engine, *_ = deepspeed.initialize(
                model=module, optimizer=build_optimizer(param_groups), config=settings, mpu=_Mpu(groups)
            )

    @property
    def module(self) -> nn.Module:
        module: nn.Module = self._engine.module
        return module

    @property
    def loss_scale(self) -> float:
        """The factor on the loss that keeps fp16 gradients representable; 1 in other precisions."""
        return float(getattr(self._engine.optimizer, "loss_scale", 1.0))

    def forward(self, *args: Any) -> Any:
        """Call the module."""
        return self._engine(*args)

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of a loss [] to this rank's gradient; a step applies the sum over ranks."""
        self._engine.backward(loss * self._groups.layout.dp, scale_wrt_gas=False)
        if isinstance(self._engine.optimizer, BF16_Optimizer):
            # This optimizer has added the bf16 gradients to its fp32 sum but leaves them in place; the next
            # micro-batch would add them again.
            self._engine.optimizer.clear_lp_grads()

    def finish_microbatch(self) -> None:
        """Let DeepSpeed count one micro-batch that is not the last of the step."""
        self._engine.step()

    def step(self, lr: float) -> StepOutcome:
        """Clip and apply the gradients of n_microbatches backward passes; all ranks have the same outcome."""
        for group in self._engine.optimizer.param_groups:
            group["lr"] = lr
        if self._check is not None:
            return self._first_step(self._check)
        return self._step()

    def drop_step(self) -> None:
        """Make the next step change no weight: an infinite gradient makes DeepSpeed skip the update."""
        for parameter in self._engine.module.parameters():
            if parameter._hp_mapping is not None:
                self._reduced_gradient(parameter).view(-1)[0] = math.inf

    @staticmethod
    def _reduced_gradient(parameter: nn.Parameter) -> Tensor:
        mapping, index = parameter._hp_mapping, parameter._index_in_param_group  # type: ignore[attr-defined]
        gradient: Tensor = mapping.get_lp_grad_fragment(index)
        return gradient

    def _step(self) -> StepOutcome:
        self._engine.step()
        return StepOutcome(float(self._engine.get_global_grad_norm()), self._engine.was_step_applied())

    def _first_step(self, check: FirstStepCheck) -> StepOutcome:
        """Step, and check that DeepSpeed reduces and clips correctly. Raises EngineError if it does not."""
        fragments, loss_scale = list(self._reduced_fragments()), self.loss_scale
        norm = float(check.norm(fragments)) / loss_scale
        if not math.isfinite(norm):
            check.restart()
            return self._step()
        check.check_gradients(fragments)
        outcome = self._step()
        check_norm(outcome.grad_norm, norm)
        check.close()
        self._check = None
        return outcome

    def _reduced_fragments(self) -> Iterator[ReducedFragment]:
        """Yield this rank's parts of the reduced gradient, as the next step will apply them."""
        for name, parameter in self._engine.module.named_parameters():
            mapping = parameter._hp_mapping
            if mapping is None:
                continue  # none of it is in this rank's partition
            values = self._reduced_gradient(parameter).flatten()
            address = mapping.lp_fragment_address
            if values.numel() == parameter.numel():  # BF16_Optimizer keeps the whole gradient on each rank
                values = values.narrow(0, address.start, address.numel)
            yield ReducedFragment(name, address.start, values)

    def master_weights(self) -> dict[str, Tensor]:
        """Return the whole fp32 value [...] of every parameter by name. Collective."""
        return self._whole(safe_get_full_fp32_param)

    def gradients(self) -> dict[str, Tensor]:
        """Return the whole gradient [...] of every parameter by name, reduced and not yet clipped.

        Collective; to be called between the last backward pass of a step and the step.
        """
        factor = 1 / self.loss_scale
        return {name: gradient * factor for name, gradient in self._whole(safe_get_full_grad).items()}

    def _whole(self, read: Callable[[nn.Parameter], Tensor | None]) -> dict[str, Tensor]:
        whole = {}
        for name, parameter in self._engine.module.named_parameters():
            value = read(parameter)
            assert value is not None, f"DeepSpeed holds no value of {name}"
            whole[name] = self._groups.whole(name, value.detach().float()).clone()
        return whole

    def fragments(self) -> list[Fragment]:
        """Return this rank's fragments of the optimizer state; all ranks together hold the whole state."""
        states = self._optimizer.state
        flats = [group["params"][0] for group in self._optimizer.param_groups]
        fragments = []
        for name, parameter in self._engine.module.named_parameters():
            mapping = parameter._hp_mapping
            if mapping is None:
                continue  # none of it is in this rank's partition
            # By address, because DeepSpeed links only the state of the first parameter group.
            here, flat = mapping.hp_fragment_address, flats[mapping.param_group_index]
            whole = {MASTER: flat.detach()} | _per_element(states[flat], flat)
            values = {kind: tensor.narrow(0, here.start, here.numel) for kind, tensor in whole.items()}
            start = mapping.lp_fragment_address.start
            fragments.append(Fragment(name, tuple(parameter.shape), start, values))
        return fragments

    def state_kinds(self) -> tuple[str, ...]:
        """Return the kinds of a fragment's values; they are the same on every rank."""
        flat = self._optimizer.param_groups[0]["params"][0]
        return (MASTER, *_per_element(self._optimizer.state[flat], flat))

    def optimizer_scalars(self) -> dict[str, float]:
        """Return the state that the optimizer keeps once for all parameters, such as its number of steps."""
        flats = [group["params"][0] for group in self._optimizer.param_groups]
        scalars: dict[str, float] = {}
        for flat in flats:
            own = self._optimizer.state[flat]
            scalars |= {key: float(v) for key, v in own.items() if key not in _per_element(own, flat)}
        return scalars

    def make_optimizer_state(self, kinds: Iterable[str], scalars: Mapping[str, float]) -> None:
        """Create the state that the optimizer otherwise creates in its first step, as zeros to be filled."""
        for group in self._optimizer.param_groups:
            flat = group["params"][0]
            self._optimizer.state[flat] = {
                key: torch.tensor(value, dtype=torch.float32, device=flat.device)
                for key, value in scalars.items()
            } | {kind: torch.zeros_like(flat) for kind in kinds if kind != MASTER}

    def adopt_masters(self) -> None:
        """Copy the master weights, which a checkpoint has filled, into the model. Collective."""
        self._engine.optimizer.update_lp_params()

    def loss_scaler_state(self) -> dict[str, float]:
        """Return the state of fp16's dynamic loss scaling; empty in other precisions."""
        scaler = getattr(self._engine.optimizer, "loss_scaler", None)
        return {k: float(getattr(scaler, k)) for k in _SCALER_STATE if getattr(scaler, "dynamic", False)}

    def restore_loss_scaler(self, state: Mapping[str, float]) -> None:
        """Restore the state of fp16's dynamic loss scaling; other precisions have none and ignore it.

        Raises CheckpointError if the state contains unknown fields.
        """
        if unknown := state.keys() - {*_SCALER_STATE}:
            raise CheckpointError(
                f"the loss scaler's state has unknown fields {sorted(unknown)}; use another checkpoint"
            )
        scaler = getattr(self._engine.optimizer, "loss_scaler", None)
        if getattr(scaler, "dynamic", False):
            for key, value in state.items():
                setattr(scaler, key, value if key == "cur_scale" else int(value))

    @property
    def _optimizer(self) -> torch.optim.Optimizer:
        optimizer: torch.optim.Optimizer = self._engine.optimizer.optimizer
        return optimizer

    def close(self) -> None:
        """Free DeepSpeed's engine."""
        self._engine.destroy()


def _per_element(state: Mapping[str, Any], flat: Tensor) -> dict[str, Tensor]:
    return {k: v for k, v in state.items() if isinstance(v, Tensor) and v.shape == flat.shape}


class _Mpu:
    """The model-parallel unit that DeepSpeed expects, with Megatron's method names."""

    def __init__(self, groups: Groups) -> None:
        self._groups = groups

    def get_model_parallel_rank(self) -> int:
        return self._groups.tp.rank()

    def get_model_parallel_world_size(self) -> int:
        return self._groups.layout.tp

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        return self._groups.tp

    get_tensor_model_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_world_size = get_model_parallel_world_size
    get_tensor_model_parallel_group = get_model_parallel_group

    def get_data_parallel_rank(self) -> int:
        return self._groups.dp_rank

    def get_data_parallel_world_size(self) -> int:
        return self._groups.layout.dp

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        return self._groups.dp

    def get_pipeline_model_parallel_world_size(self) -> int:
        return 1


class _MoEMarker(MoE):
    """An empty layer: DeepSpeed reduces experts separately only if a model contains a layer of this class."""

    def __init__(self, n_experts: int) -> None:
        nn.Module.__init__(self)
        self.num_experts = n_experts

    def set_deepspeed_parallelism(self, use_data_before_expert_parallel_: bool = False) -> None:
        """Do nothing: the groups are already registered."""


def mark_experts(module: nn.Module, param_groups: ParamGroups, groups: Groups) -> ParamGroups:
    """Mark experts for DeepSpeed, and register the ranks that hold the same ones.

    Returns the parameter groups with the experts in groups of their own, as DeepSpeed requires.
    """
    name, layout = f"ep_size_{groups.layout.ep}", groups.layout
    deepspeed_groups._EXPERT_PARALLEL_GROUP = {name: groups.ep}
    deepspeed_groups._EXPERT_PARALLEL_GROUP_RANKS = {name: layout.ep_group(groups.rank)}
    deepspeed_groups._EXPERT_DATA_PARALLEL_GROUP = {name: groups.edp}
    deepspeed_groups._EXPERT_DATA_PARALLEL_GROUP_RANKS = {name: layout.edp_group(groups.rank)}
    experts = [p for n, p in module.named_parameters() if is_expert(n)]
    for parameter in experts:
        mark(parameter, allreduce=False, group_name=name)
    module.add_module("deepspeed_moe_marker", _MoEMarker(experts[0].size(0) * layout.ep))
    ids, split = {id(p) for p in experts}, []
    for group in param_groups:
        split.append({**group, "params": [p for p in group["params"] if id(p) not in ids]})
        if own := [p for p in group["params"] if id(p) in ids]:
            split.append({**group, "params": own, "name": name, "moe": True})
    return split


def mark_split_parameters(module: nn.Module, layout: Layout) -> None:
    """Mark, for DeepSpeed's clip norm, the parameters that differ between tensor-parallel ranks.

    Experts do at every ep, because each rank keeps the optimizer state of a different part of them.
    """
    for name, parameter in module.named_parameters():
        if layout.tp > 1 and split_of(name) is not None:
            mark(parameter, model_parallel=True, tensor_model_parallel=True)


def mark(parameter: nn.Parameter, **marks: bool | str) -> None:
    """Set attributes that DeepSpeed reads on a parameter."""
    for key, value in marks.items():
        setattr(parameter, key, value)


def _silence_info() -> None:
    """Let DeepSpeed log errors only: its banners, timings and advice repeat what is in the run directory."""
    deepspeed_logger.setLevel(logging.ERROR)


def _import_muon() -> None:
    """Import DeepSpeed's Muon without compiling it.

    Every engine imports Muon, and the import compiles it, which delays the start of each rank by a second.
    """
    compiler = deepspeed.runtime.compiler
    compile_ = compiler.compile
    compiler.compile = lambda: lambda function: function
    try:
        importlib.import_module("deepspeed.runtime.zero.muon.original_muon")
    finally:
        compiler.compile = compile_


def _skip_shm_build() -> None:
    """Keep DeepSpeed from compiling its shared-memory op on the CPU.

    The op is for inference only; compiling it takes half a minute and needs a compiler. A process killed
    while it compiles leaves a lock behind, on which every later process waits forever.
    """
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
