"""The memory that a process really holds: every tensor of an engine, found by walking all Python objects."""

import gc
import time
from collections.abc import Callable, Iterable

import torch.distributed as dist
from torch import Tensor, UntypedStorage
from torch._subclasses.fake_tensor import is_fake
from torch.profiler import ProfilerActivity, profile

from turnout.launch.estimate.memory import StateBytes
from turnout.training.engine.deepspeed_config import BUCKET_ELEMENTS
from turnout.training.engine.engine import Engine
from turnout.training.parallel.groups import Groups

N_LOOKS = 3
# By address, so that views count once. Holding the storages keeps their addresses from being reused.
Storages = dict[int, UntypedStorage]


def storages(tensors: Iterable[Tensor]) -> Storages:
    # Fake tensors of torch.compile's tracing stay alive, with no memory behind them.
    found = [t.untyped_storage() for t in tensors if t.device.type != "meta" and not is_fake(t)]
    return {storage.data_ptr(): storage for storage in found}


def n_bytes_of(found: Storages) -> int:
    return sum(storage.nbytes() for storage in found.values())


def all_tensors() -> Storages:
    """Return the memory of all tensors that Python objects of this process hold."""
    gc.collect()
    return storages(o for o in gc.get_objects() if issubclass(type(o), Tensor))


def held_by(engine: Engine, groups: Groups, known: Storages) -> StateBytes:
    """Return the bytes of the engine's weights, gradients and optimizer state.

    known: what existed before, or is not the engine's. Everything else that is neither a weight nor optimizer
    state is a gradient, except DeepSpeed's bucket, which is recognized by its size, and the last norm.
    """
    for group in (groups.dp, groups.tp, groups.ep, groups.edp):
        dist.barrier(group)  # gloo keeps the tensor of its last collective
    parameters = list(engine.module.parameters())
    weights = storages(parameters)
    inner = engine._optimizer
    state = [value for own in inner.state.values() for value in own.values()]
    optimizer = storages([*(group["params"][0] for group in inner.param_groups), *state])
    # By name, too: a gradient has no Python object until someone asks for it.
    named = [getattr(p, kind, None) for p in parameters for kind in ("grad", "grad_accum")]
    norm = engine._engine.optimizer._global_grad_norm
    elsewhere = weights | optimizer | known | storages([norm] if isinstance(norm, Tensor) else [])

    def gradient_bytes() -> int:
        found = all_tensors() | storages(t for t in named if t is not None)
        sizes = [storage.nbytes() for address, storage in found.items() if address not in elsewhere]
        return sum(n_bytes for n_bytes in sizes if n_bytes < 2 * BUCKET_ELEMENTS)

    # The minimum of several looks: gloo's thread frees its last tensor when it runs again.
    looks = []
    for _ in range(N_LOOKS):
        time.sleep(0.01)
        looks.append(gradient_bytes())
    return StateBytes(n_bytes_of(weights), min(looks), n_bytes_of(optimizer))


def peak_allocated_bytes(run: Callable[[], object]) -> int:
    """Return the peak growth of torch's CPU memory during run."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = profiler.profiler.kineto_results.events()
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    allocated = peak = 0
    for _, change in changes:
        allocated += change
        peak = max(peak, allocated)
    return peak
