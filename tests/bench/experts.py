"""The expert layer against a dense one with the same active FLOPs: `python -m tests.bench experts`.

One thread, forward and backward with all gradients; the layer without its router (its choices are given), and
with it.
"""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.bench.rows import Row
from tests.bench.side_by_side import in_ms, over, time_in_turn
from tests.models import tiny_config
from turnout.moe.config import ModelConfig
from turnout.moe.load_balancing import RouterState
from turnout.moe.moe_layer import MoELayer
from turnout.moe.parallel.expert_parallel import LocalDispatcher
from turnout.moe.parallel.tensor_parallel import Unsplit
from turnout.moe.recompute import RoutingMemo
from turnout.moe.router import Routing

T, D = 4096, 512
# Enough for the heap to fill: touching one of its pages for the first time costs more than the arithmetic on
# it, which in a run happens only in the first steps.
N_WARM_ROUNDS = 8
N_ROUTINGS = 20  # more than there are rounds, so that each pass has a new routing, as in training
# (dtype, E, K, F): the target for the time over dense.
TARGETS = {
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


def expert_rows(n_rounds: int = 9) -> list[Row]:
    torch.set_num_threads(1)
    rows = []
    for (name, n_experts, top_k, d_expert), target in TARGETS.items():
        ways = beside_dense(DTYPES[name], n_experts, top_k, d_expert)
        seconds = time_in_turn(ways, n_rounds=n_rounds, n_warm_rounds=N_WARM_ROUNDS)
        shape = f"{name} E {n_experts} k {top_k} F {d_expert}"
        for way in (name for name in seconds if name != "dense"):
            rows.append(
                Row.of(
                    f"time over dense, {shape}, {way}",
                    over(seconds[way], seconds["dense"]),
                    at_most=target if way == "compiled_loop" else None,
                    note=f"dense {in_ms(seconds['dense'])}",
                )
            )
    return [*rows, skew_row(n_rounds)]


def skew_row(n_rounds: int) -> Row:
    """Return the cost of a routing that gives one expert four times the mean load."""
    dtype, (n_experts, top_k, d_expert) = torch.bfloat16, (64, 8, 512)
    layer = build_layer(layer_config(n_experts, top_k, d_expert, T), "compiled_loop", dtype)
    x, out = leaf(T, D, dtype=dtype), torch.randn(T, D).to(dtype)
    ways = {}
    for name, skew in (("even", 0.0), ("skewed", 1.15)):
        routing = synthetic_routing(T, n_experts, top_k, skew)
        loads = routing.expert_ids_TK.flatten().bincount(minlength=n_experts)
        ways[name] = step(lambda routing=routing: mixed(layer, x, routing), out, [x, *layer.parameters()])
    largest = loads.max() / loads.float().mean()
    seconds = time_in_turn(ways, n_rounds=n_rounds)
    return Row.of(
        f"time of a routing with a largest load of {largest:.1f} means over an even one, bf16 E 64 k 8 F 512",
        over(seconds["skewed"], seconds["even"]),
        at_most=1.05,
        note=f"even {in_ms(seconds['even'])}",
    )


def beside_dense(
    dtype: torch.dtype, n_experts: int, top_k: int, d_expert: int
) -> dict[str, Callable[[], None]]:
    cfg = layer_config(n_experts, top_k, d_expert, T)
    x, out = leaf(T, D, dtype=dtype), torch.randn(T, D).to(dtype)
    dense_in, dense_out = leaf(2 * top_k * d_expert, D, dtype=dtype), leaf(D, top_k * d_expert, dtype=dtype)
    ways = {
        "dense": step(lambda: dense(x, dense_in, dense_out), out, [x, dense_in, dense_out]),
    }
    routing = synthetic_routing(T, n_experts, top_k, 0.0)
    for i, backend in enumerate(("compiled_loop", "sorted_loop", "torch_grouped")):
        layer, seeds = build_layer(cfg, backend, dtype), range(i * N_ROUTINGS, (i + 1) * N_ROUTINGS)
        changing = itertools.cycle([synthetic_routing(T, n_experts, top_k, 0.0, seed) for seed in seeds])
        ways[backend] = mix_step(layer, itertools.repeat(routing), x, out)
        ways[f"{backend}, other routings"] = mix_step(layer, changing, x, out)
    ways["with router"] = layer_step(build_layer(cfg, "compiled_loop", dtype), cfg, x, out)
    return ways


def mix_step(layer: MoELayer, routings: Iterator[Routing], x: Tensor, out: Tensor) -> Callable[[], None]:
    """Return forward and backward of all but the router; each pass uses the next routing."""
    leaves = [x, *layer.experts.parameters()]
    return step(lambda: mixed(layer, x, next(routings)), out, leaves)


def mixed(layer: MoELayer, x_TD: Tensor, routing: Routing) -> Tensor:
    """Return each token's sum of its experts' weighted results, [T, D], for a given routing."""
    return layer._receive(layer._send(x_TD, routing, RoutingMemo()))


def layer_step(layer: MoELayer, cfg: ModelConfig, x: Tensor, out: Tensor) -> Callable[[], None]:
    """Return forward and backward of the whole layer."""
    state, is_counted = RouterState.initial(cfg), torch.ones(x.size(0), dtype=torch.bool)
    inputs = (x, state.bias_ME[0], state.load_frac_ME[0], is_counted)
    return step(lambda: layer(*inputs, RoutingMemo())[0], out, [x, *layer.parameters()])


def layer_config(n_experts: int, top_k: int, d_expert: int, n_tokens: int) -> ModelConfig:
    return tiny_config(d_model=D, d_expert=d_expert, n_experts=n_experts, top_k=top_k, seq_len=n_tokens)


def build_layer(cfg: ModelConfig, backend: str, dtype: torch.dtype) -> MoELayer:
    torch.manual_seed(0)
    layer = MoELayer(cfg, LocalDispatcher(), Unsplit(), backend, "none").to(dtype)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.02)
    return layer


def synthetic_routing(n_tokens: int, n_experts: int, top_k: int, skew: float, seed: int = 0) -> Routing:
    """Return a random routing; the larger skew is, the more rows the first expert has."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(n_tokens, n_experts, generator=generator)
    scores[:, 0] += skew
    weights = torch.rand(n_tokens, top_k, generator=generator).requires_grad_()
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
