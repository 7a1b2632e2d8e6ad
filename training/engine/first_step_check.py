"""Check the engine's first step of every attempt against an independent computation.

A wrong group or factor in the reduction of gradients does not stop a run, which merely trains differently.
Therefore some elements of every parameter's gradient are sampled before the engine sees them, summed over the
correct ranks, and compared with the gradient that the engine is about to apply. The clip norm is recomputed
from the reduced gradient.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from turnout.moe.parallel.sharding import is_expert, split_of
from turnout.training.errors import EngineError
from turnout.training.parallel.groups import Groups

N_SAMPLES = 64  # elements per parameter
# Relative to the parameter's largest sampled gradient. A wrong factor causes a much larger error. bf16 and
# fp16 need more tolerance because each micro-batch's gradient is rounded.
TOLERANCES = {torch.float32: 1e-3, torch.bfloat16: 3e-2, torch.float16: 3e-2}
NORM_TOLERANCE = 1e-3
WAY_OUT = (
    "This is a bug in Turnout or in the installed DeepSpeed: compare its version with constraints.txt, "
    "and run `turnout doctor` on this config"
)


@dataclass(frozen=True)
class ReducedFragment:
    """The part of a parameter's reduced gradient whose update this rank computes.

    start: its offset in the flattened parameter
    values: [n], as the engine holds them, multiplied by the loss scale
    """

    name: str
    start: int
    values: Tensor


class FirstStepCheck:
    """Samples gradients in the backward passes of one step, whose loss the engine has multiplied by dp."""

    def __init__(self, module: nn.Module, groups: Groups, *, has_expert_groups: bool) -> None:
        self._groups, self._has_expert_groups = groups, has_expert_groups
        parameters = dict(module.named_parameters())
        self._names = list(parameters)
        self._dtype = next(iter(parameters.values())).dtype
        self._indices = {name: _sampled_indices(p) for name, p in parameters.items()}
        self._hooks = []
        self._samples: dict[str, Tensor] = {}
        self.restart()
        for name, parameter in parameters.items():
            self._hooks.append(
                parameter.register_hook(lambda gradient, name=name: self._sample(name, gradient))
            )

    def restart(self) -> None:
        """Discard the samples, after a step that was not applied."""
        self._samples = {
            name: torch.zeros(len(indices), dtype=torch.float64, device=indices.device)
            for name, indices in self._indices.items()
        }

    def close(self) -> None:
        """Stop sampling."""
        for hook in self._hooks:
            hook.remove()

    def check_gradients(self, fragments: Iterable[ReducedFragment]) -> None:
        """Compare reduced gradients with the sum over ranks. Collective.

        Raises EngineError, on every rank with the same text, if they differ.
        """
        wanted = self._reduced_samples()
        worst, worst_error = 0, 0.0
        for fragment in fragments:
            indices = self._indices[fragment.name]
            is_here = (indices >= fragment.start) & (indices < fragment.start + fragment.values.numel())
            got = fragment.values[indices[is_here] - fragment.start].double()
            want = wanted[fragment.name]
            scale = want.abs().max().clamp(min=torch.finfo(torch.float32).tiny)
            error = float((got - want[is_here]).abs().max() / scale) if got.numel() else 0.0
            if error > worst_error:
                worst, worst_error = self._names.index(fragment.name), error
        errors = self._groups.collect(worst_error)
        culprits = self._groups.collect(worst)
        rank = max(range(len(errors)), key=errors.__getitem__)
        if errors[rank] > TOLERANCES[self._dtype]:
            name = self._names[int(culprits[rank])]
            raise EngineError(
                f"the engine's gradient of {name} differs from the sum over ranks "
                f"by {errors[rank]:.2g} of its size (on rank {rank}); nothing was applied. {WAY_OUT}"
            )

    def norm(self, fragments: Iterable[ReducedFragment]) -> Tensor:
        """Return the global norm of the reduced gradient, [] fp64. Collective."""
        square = torch.zeros((), dtype=torch.float64, device=self._groups.device)
        for fragment in fragments:
            # Ranks of a tensor-parallel group hold the same gradient of parameters that are not split.
            if split_of(fragment.name) is not None or self._groups.tp.rank() == 0:
                square += torch.linalg.vector_norm(fragment.values, dtype=torch.float32).double() ** 2
        return self._groups.sum_over_ranks(square).sqrt()

    def _sample(self, name: str, gradient: Tensor) -> None:
        self._samples[name] += gradient.take(self._indices[name]).double()

    def _reduced_samples(self) -> dict[str, Tensor]:
        """Sum the samples over the ranks that hold the same parameter, with two reductions in all."""
        dp = self._groups.layout.dp
        reduced: dict[str, Tensor] = {}
        for is_apart in (False, True):
            names = [n for n in self._names if (self._has_expert_groups and is_expert(n)) == is_apart]
            if not names:
                continue
            flat = torch.cat([self._samples[n] for n in names])
            flat = (
                self._groups.sum_over_expert_replicas(flat)
                if is_apart
                else self._groups.sum_over_tokens(flat)
            )
            sizes = [len(self._indices[n]) for n in names]
            reduced |= dict(zip(names, (flat / dp).split(sizes), strict=True))
        return reduced


def check_norm(got: float, want: float) -> None:
    """Compare the engine's norm with ours. Raises EngineError if it clipped by a different norm."""
    if abs(got - want) > NORM_TOLERANCE * want:
        raise EngineError(
            f"the engine's gradient norm is {got:.6g}, but the reduced gradient's is {want:.6g}. {WAY_OUT}"
        )


def _sampled_indices(parameter: nn.Parameter) -> Tensor:
    """Return the flat indices of the sampled elements, spread over the parameter."""
    n = min(N_SAMPLES, parameter.numel())
    return torch.linspace(0, parameter.numel() - 1, n, dtype=torch.float64, device=parameter.device).long()
