"""The expert layer against a dense one of as many active FLOPs: `python -m tests.bench experts`.

One thread. Forward and backward with all gradients, of the layer without its router, whose choices are given,
and with it.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe.balance import RouterState
from moe.config import ModelConfig
from moe.dispatch import LocalDispatcher
from moe.layer import MoELayer
from moe.recompute import RoutingMemo
from moe.router import Routing
from moe.tensor_parallel import Unsplit
from tests.bench.side_by_side import Timing, time_in_turn
from tests.models import tiny_config

T, D = 4096, 512
# (dtype, E, K, F): the ratio that is asked.
ASKED = {
    ("bf16", 8, 2, 1408): 0.90,
    ("bf16", 32, 2, 1024): 1.35,
    ("bf16", 64, 8, 512): 1.15,
    ("bf16", 128, 8, 512): 1.50,
    ("bf16", 128, 2, 512): 2.8,
    ("fp32", 8, 2, 1408): 1.05,
    ("fp32", 32, 2, 1024): 1.10,
    ("fp32", 64, 8, 512): 1.15,
}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def print_expert_speed() -> None:
    torch.set_num_threads(1)
    print(f"\n### expert layer over a dense one of equal active FLOPs, T {T}, d {D}, forward and backward\n")
    print(
        "| dtype E K F | dense ms | asked | compiled_loop | spread | with router | sorted_loop "
        "| torch_grouped |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for (dtype, n_experts, top_k, d_expert), asked in ASKED.items():
        found = compare_with_dense(DTYPES[dtype], n_experts, top_k, d_expert)
        ours = found["compiled_loop"]
        rest = (found[name].ratio for name in ("with router", "sorted_loop", "torch_grouped"))
        print(
            f"| {dtype} {n_experts} {top_k} {d_expert} | {found['dense'].ms:.0f} | {asked:.2f} "
            f"| {ours.ratio:.2f} | {ours.low:.2f} to {ours.high:.2f} "
            f"| {' | '.join(f'{x:.2f}' for x in rest)} |",
            flush=True,
        )
    print_skewed()


def print_skewed() -> None:
    """Print what a routing costs in which some expert has four times the mean."""
    dtype, (n_experts, top_k, d_expert) = torch.bfloat16, (64, 8, 512)
    layer = build_layer(layer_config(n_experts, top_k, d_expert), "compiled_loop", dtype)
    x, out = leaf(T, D, dtype=dtype), torch.randn(T, D).to(dtype)
    ways = {}
    for name, skew in (("even", 0.0), ("skewed", 1.15)):
        routing = made_up_routing(n_experts, top_k, skew)
        loads = routing.expert_ids_TK.flatten().bincount(minlength=n_experts)
        ways[f"{name}, largest load {loads.max() / loads.float().mean():.1f} x mean"] = step(
            lambda routing=routing: layer._mix(x, routing, RoutingMemo()), out, [x, *layer.parameters()]
        )
    print("\n| bf16 64 8 512 | ms | ratio | spread |\n|---|---|---|---|")
    for name, found in time_in_turn(ways, n_rounds=7).items():
        print(f"| {name} | {found.ms:.0f} | {found.ratio:.2f} | {found.low:.2f} to {found.high:.2f} |")


def compare_with_dense(dtype: torch.dtype, n_experts: int, top_k: int, d_expert: int) -> dict[str, Timing]:
    cfg = layer_config(n_experts, top_k, d_expert)
    x, out = leaf(T, D, dtype=dtype), torch.randn(T, D).to(dtype)
    dense_in, dense_out = leaf(2 * top_k * d_expert, D, dtype=dtype), leaf(D, top_k * d_expert, dtype=dtype)
    ways = {
        "dense": step(lambda: dense(x, dense_in, dense_out), out, [x, dense_in, dense_out]),
    }
    routing = made_up_routing(n_experts, top_k, 0.0)
    for backend in ("compiled_loop", "sorted_loop", "torch_grouped"):
        layer = build_layer(cfg, backend, dtype)
        ways[backend] = step(
            lambda layer=layer: layer._mix(x, routing, RoutingMemo()),
            out,
            [x, routing.weights_TK, *layer.experts.parameters()],
        )
    layer, state = build_layer(cfg, "compiled_loop", dtype), RouterState.initial(cfg)
    is_counted = torch.ones(T, dtype=torch.bool)
    inputs = (x, state.bias_ME[0], state.load_frac_ME[0], is_counted)
    ways["with router"] = step(lambda: layer(*inputs, RoutingMemo())[0], out, [x, *layer.parameters()])
    return time_in_turn(ways, n_rounds=9)


def layer_config(n_experts: int, top_k: int, d_expert: int) -> ModelConfig:
    return tiny_config(d_model=D, d_expert=d_expert, n_experts=n_experts, top_k=top_k, seq_len=T)


def build_layer(cfg: ModelConfig, backend: str, dtype: torch.dtype) -> MoELayer:
    torch.manual_seed(0)
    layer = MoELayer(cfg, LocalDispatcher(), Unsplit(), backend, "none").to(dtype)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.02)
    return layer


def made_up_routing(n_experts: int, top_k: int, skew: float) -> Routing:
    """Return choices of which some experts get more the larger skew is."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(T, n_experts, generator=generator)
    scores[:, 0] += skew
    weights = torch.rand(T, top_k, generator=generator).requires_grad_()
    return Routing(scores.topk(top_k).indices, weights, None)


def dense(x: Tensor, weight_in: Tensor, weight_out: Tensor) -> Tensor:
    gate, up = F.linear(x, weight_in).chunk(2, -1)
    return F.linear(F.silu(gate) * up, weight_out)


def leaf(*shape: int, dtype: torch.dtype) -> Tensor:
    return (torch.randn(*shape) * 0.02).to(dtype).requires_grad_()


def step(forward: Callable[[], Tensor], grad: Tensor, leaves: list[Any]) -> Callable[[], None]:
    def run() -> None:
        for tensor in leaves:
            tensor.grad = None
        forward().backward(grad)

    return run


if __name__ == "__main__":
    print_expert_speed()
