"""Speed and memory of training on one GPU: `python -m tests.gpu.measure PART`, from the root of the tree.

steps BACKEND...  optimizer steps of two models, with each expert backend; BACKEND+compile compiles the blocks
layer             an expert layer with each backend, and a dense layer of as many FLOPs
profile           one step: where it waits for the device, and the time by kind of kernel
stall             how long training waits while a checkpoint is copied to the host

Each result is printed as one line of JSON as soon as it is known. A measurement that fails prints a line with
"failed", and the next one runs. DRY=1 runs everything in tiny sizes on the CPU; such times mean nothing.
"""

import argparse
import gc
import json
import os
import re
import statistics
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.profiler import ProfilerActivity, profile

from tests.gpu.trainer import DEVICE, DRY, ON_GPU, SIZES, Trainer, config_of, fill_randomly, join_as_only_rank
from turnout.moe.config import ModelConfig
from turnout.moe.flops import flops_per_token, n_active_params, n_params
from turnout.moe.layers import SwiGLU
from turnout.moe.load_balancing import RouterState
from turnout.moe.moe_layer import MoELayer
from turnout.moe.parallel.expert_parallel import AllToAllDispatcher, Dispatcher, LocalDispatcher
from turnout.moe.parallel.tensor_parallel import Unsplit
from turnout.moe.recompute import RoutingMemo
from turnout.training.checkpoint.rank_state import rank_state_of
from turnout.training.hardware import peak_flops, peak_memory_gib
from turnout.training.parallel.groups import Groups

N_WARM_STEPS, N_TIMED_STEPS = (1, 2) if DRY else (3, 5)
N_WARM_CALLS, N_TIMED_CALLS = (1, 3) if DRY else (3, 10)
N_COPIES = 3


# Kinds of kernels, by what their names contain; the first match counts.
KINDS = {
    "attention": "flash|fmha|attention",
    "matrix product": "gemm|nvjet|cutlass|cublas|mm_kernel|group_gemm|grouped",
    "sort, scatter, histogram": "sort|scatter|radix|scan|histogram",
    "gather": "gather|index|embedding|embed",
    "collective": "nccl",
    "copy, fill": "memcpy|memset|copy_kernel|fill",
    "reduction": "reduce|softmax|norm",
    "optimizer": "adam|multi_tensor",
    "fused by torch.compile": "^triton_",
    "elementwise": "elementwise",
}


def print_result(what: str, **values: Any) -> None:
    print(json.dumps({"what": what, **values}), flush=True)


def wait_for_device() -> None:
    if ON_GPU:
        torch.cuda.synchronize()


def attempt(what: str, measure: Callable[[], None]) -> None:
    """Run one measurement; if it fails, print why, so that the others still run."""
    try:
        measure()
    except Exception as err:
        traceback.print_exc()
        print_result(what, failed=f"{type(err).__name__}: {str(err)[:300]}")
    gc.collect()  # a model in a reference cycle would add to the next one's peak memory
    if ON_GPU:
        torch.cuda.empty_cache()


def measure_steps(backends: list[str]) -> None:
    groups = join_as_only_rank()
    for backend in backends:
        for size in SIZES:
            attempt(f"step {size} {backend}", partial(measure_step, size, backend, groups))


def measure_step(size: str, backend: str, groups: Groups) -> None:
    name, _, suffix = backend.partition("+")
    if ON_GPU:
        torch.cuda.reset_peak_memory_stats()
    torch._dynamo.reset()
    counters.clear()
    start_s = time.perf_counter()
    trainer = Trainer(size, name, groups, compiles=suffix == "compile")
    built_s = time.perf_counter()
    losses = [float(trainer.step().loss) for _ in range(N_WARM_STEPS)]
    wait_for_device()
    warm_s = time.perf_counter()
    step_times_s = []
    for _ in range(N_TIMED_STEPS):
        begin_s = time.perf_counter()
        losses.append(float(trainer.step().loss))
        wait_for_device()
        step_times_s.append(time.perf_counter() - begin_s)
    model, step_s = trainer.cfg.model, statistics.median(step_times_s)
    tokens_per_s = trainer.cfg.train.batch_tokens / step_s
    peak = peak_flops(DEVICE, torch.bfloat16)
    print_result(
        "step",
        size=size,
        backend=name,
        compile=trainer.cfg.train.compile,
        n_params=n_params(model),
        n_active_params=n_active_params(model),
        step_ms=round(1000 * step_s, 1),
        slowest_over_fastest=round(max(step_times_s) / min(step_times_s), 3),
        tokens_per_s=round(tokens_per_s),
        mfu_frac=round(tokens_per_s * flops_per_token(model) / peak.flops_per_s, 4),
        peak_source=peak.source,
        peak_gib=round(peak_memory_gib(DEVICE), 2),
        build_s=round(built_s - start_s, 1),
        warm_up_s=round(warm_s - built_s, 1),
        first_loss=round(losses[0], 5),
        last_loss=round(losses[-1], 5),
        n_graphs=counters["stats"]["unique_graphs"],
    )
    trainer.engine.close()


def median_ms(call: Callable[[], Any]) -> float:
    """Return the median milliseconds of a call, on the device's clock if it is a GPU."""
    for _ in range(N_WARM_CALLS):
        call()
    return statistics.median(time_ms(call) for _ in range(N_TIMED_CALLS))


def time_ms(call: Callable[[], Any]) -> float:
    if not ON_GPU:
        start_s = time.perf_counter()
        call()
        return 1000 * (time.perf_counter() - start_s)
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def measure_matmul() -> None:
    size = 512 if DRY else 8192
    a, b = torch.randn(2, size, size, device=DEVICE, dtype=torch.bfloat16)
    ms = median_ms(lambda: a @ b)
    print_result("matrix product", n_rows=size, ms=round(ms, 3), tflops_per_s=tflops_per_s(2 * size**3, ms))


def tflops_per_s(flops: float, ms: float) -> float:
    return round(flops / ms / 1e9, 1)


class LayerBench:
    """Times layers that do the same FLOPs on the tokens of one micro-batch, forward and backward."""

    def __init__(self, cfg: ModelConfig, n_tokens: int) -> None:
        self.cfg, self.n_tokens = cfg, n_tokens
        self.x = torch.randn(n_tokens, cfg.d_model, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
        self.grad = torch.randn_like(self.x)
        self.router_state = RouterState.initial(cfg, DEVICE)
        self.is_counted = torch.ones(n_tokens, dtype=torch.bool, device=DEVICE)
        self.dense_ms: float | None = None

    def measure_dense(self) -> None:
        cfg = self.cfg
        layer = SwiGLU(cfg.d_model, cfg.top_k * cfg.d_expert, Unsplit(), "none").to(DEVICE, torch.bfloat16)
        self.dense_ms = self.measure("dense layer of as many FLOPs", layer, lambda: layer(self.x))

    def measure_experts(self, backend: str, dispatcher: Dispatcher) -> None:
        layer = MoELayer(self.cfg, dispatcher, Unsplit(), backend, "none").to(DEVICE, torch.bfloat16)
        bias, load_frac = self.router_state.bias_ME[0], self.router_state.load_frac_ME[0]

        def forward() -> Tensor:
            out, _ = layer(self.x, bias, load_frac, self.is_counted, RoutingMemo())
            return out

        where = "local" if isinstance(dispatcher, LocalDispatcher) else "all-to-all, one rank"
        self.measure("expert layer", layer, forward, backend=backend, dispatch=where)

    def measure(self, what: str, layer: nn.Module, forward: Callable[[], Tensor], **labels: str) -> float:
        """Print the times of a layer, and return the milliseconds of forward and backward together."""
        fill_randomly(layer)
        forward_ms = median_ms(forward)
        both_ms = median_ms(lambda: forward().backward(self.grad))
        forward_flops = 2 * 3 * self.n_tokens * self.cfg.top_k * self.cfg.d_model * self.cfg.d_expert
        print_result(
            what,
            **labels,
            n_tokens=self.n_tokens,
            forward_ms=round(forward_ms, 3),
            both_ms=round(both_ms, 3),
            tflops_per_s=tflops_per_s(3 * forward_flops, both_ms),
            over_dense=round(both_ms / self.dense_ms, 2) if self.dense_ms is not None else None,
        )
        return both_ms


def measure_layer() -> None:
    groups, cfg = join_as_only_rank(), config_of("big")
    attempt("matrix product", measure_matmul)
    bench = LayerBench(cfg.model, cfg.train.microbatch_seqs * cfg.model.seq_len)
    attempt("dense layer", bench.measure_dense)
    local = LocalDispatcher()
    dispatchers: list[tuple[str, Dispatcher]] = [
        ("torch_grouped", local),
        ("torch_grouped", AllToAllDispatcher(groups.ep)),
        ("triton_grouped", local),
        ("megablocks", local),
        ("sorted_loop", local),
    ]
    for backend, dispatcher in dispatchers:
        attempt(f"layer {backend}", partial(bench.measure_experts, backend, dispatcher))


def measure_profile() -> None:
    trainer = Trainer("big", "auto", join_as_only_rank())
    for _ in range(N_WARM_STEPS):
        trainer.step()
    wait_for_device()
    if ON_GPU:
        count_waits(trainer)
    profile_step(trainer)


def count_waits(trainer: Trainer) -> None:
    """Print how often, and in which lines, a step waits for the device."""
    torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.step()
    torch.cuda.set_sync_debug_mode("default")
    waits = [warning for warning in caught if "synchroniz" in str(warning.message)]
    lines = Counter(f"{wait.filename.split('site-packages/')[-1]}:{wait.lineno}" for wait in waits)
    print_result(
        "waits for the device in a step",
        n=len(waits),
        n_microbatches=len(trainer.microbatches),
        n_moe_layers=trainer.cfg.model.n_moe_layers,
        lines=dict(lines.most_common(20)),
    )


def profile_step(trainer: Trainer) -> None:
    """Print the time of one step by kind of kernel, the calls of the driver, and the profiler's table."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if ON_GPU else [])]
    start_s = time.perf_counter()
    with profile(activities=activities) as profiler:
        trainer.step()
        wait_for_device()
    wall_s = time.perf_counter() - start_s
    events = profiler.key_averages()
    time_key = "self_device_time_total" if ON_GPU else "self_cpu_time_total"  # in microseconds
    ms_by_kind: Counter[str] = Counter()
    for event in events:
        if not ON_GPU or event.device_type == torch.autograd.DeviceType.CUDA:
            ms_by_kind[kind_of(event.key)] += getattr(event, time_key) / 1000
    print_result(
        "profile of a step",
        wall_ms=round(1000 * wall_s, 1),
        busy_ms=round(sum(ms_by_kind.values()), 1),
        ms_by_kind={kind: round(ms, 1) for kind, ms in ms_by_kind.most_common()},
        driver_calls={event.key: event.count for event in events if re.match("cuda|cuLaunch", event.key)},
    )
    print(events.table(sort_by=time_key, row_limit=40, max_name_column_width=90), flush=True)


def kind_of(kernel: str) -> str:
    matches = (kind for kind, pattern in KINDS.items() if re.search(pattern, kernel, re.IGNORECASE))
    return next(matches, "other")


def measure_stall() -> None:
    """Time the copy of a checkpoint to the host: the first, which allocates the buffers, and later ones."""
    trainer = Trainer("big", "auto", join_as_only_rank())
    trainer.step()
    buffers: dict[str, Tensor] = {}
    for i in range(N_COPIES):
        wait_for_device()
        start_s = time.perf_counter()
        live = rank_state_of(trainer.engine, trainer.router_state, trainer.groups)
        state = live.copy_to_host(buffers)
        stall_s = time.perf_counter() - start_s
        n_bytes = sum(values.nbytes for values in state.tensors.values())
        print_result(
            "checkpoint copy",
            i=i,
            gib=round(n_bytes / 2**30, 2),
            stall_ms=round(1000 * stall_s, 1),
            gb_per_s=round(n_bytes / stall_s / 1e9, 2),
        )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.gpu.measure")
    parts = parser.add_subparsers(dest="part", required=True)
    steps = parts.add_parser("steps", help="optimizer steps")
    steps.add_argument("backends", nargs="+", metavar="BACKEND", help="an expert backend, or NAME+compile")
    for name, help_text in [
        ("layer", "an expert layer with each backend"),
        ("profile", "the kernels of one step"),
        ("stall", "the wait for a checkpoint's copy"),
    ]:
        parts.add_parser(name, help=help_text)
    arguments = parser.parse_args()
    measures = {"layer": measure_layer, "profile": measure_profile, "stall": measure_stall}
    if arguments.part == "steps":
        measures["steps"] = partial(measure_steps, arguments.backends)
    attempt(arguments.part, measures[arguments.part])
    sys.stdout.flush()
    # After a failed kernel, destroying process groups could hang; nothing here needs it.
    os._exit(0)


if __name__ == "__main__":
    main()
