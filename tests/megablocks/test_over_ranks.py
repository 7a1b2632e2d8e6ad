"""megablocks' kernels in the real engine on several ranks, against one plain process.

megablocks' own layer, dMoE, computes the same function as ours, except that it divides the gradients of
experts by the number of expert-parallel ranks.
"""

from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from tests.assertions import assert_same_grads, assert_same_tensors
from tests.layouts import train_on_ranks, train_plainly, with_parallel, with_split
from tests.megablocks.interpreted import complete_megablocks, interpret_megablocks, skip_elsewhere
from tests.models import random_state, tiny_config
from tests.ranks import run_ranks
from tests.runs import run_config
from turnout.moe.config import ModelConfig
from turnout.moe.moe_layer import MoELayer
from turnout.moe.parallel.expert_parallel import AllToAllDispatcher, Dispatcher, LocalDispatcher
from turnout.moe.parallel.tensor_parallel import Unsplit
from turnout.moe.recompute import RoutingMemo
from turnout.training.config.run import RunConfig

skip_elsewhere()
RUNS = {
    "dropless": run_config(model={"balance": {"coef": 0.5, "z_coef": 0.05}}),
    "dropping, shared, bias": run_config(
        model={
            "n_kv_heads": 2,
            "top_k": 3,
            "n_shared_experts": 1,
            "router": {"score": "sigmoid", "scale": 1.5, "capacity_factor": 1.25},
            "balance": {"coef": 0.5, "scope": "batch", "bias_rate": 0.01},
        },
    ),
}
RTOL = 1e-5  # of fp32; measured 1e-6
LAYOUTS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("dropless", {"ep": 2}, {}),
    ("dropping, shared, bias", {"ep": 2}, {"recompute": "full"}),
    ("dropping, shared, bias", {"ep": 2, "tp": 2, "sequence_parallel": True}, {"recompute": "selective"}),
]


def train_interpreted(rank: int, cfg: RunConfig, *args: Any) -> dict[str, Any]:
    interpret_megablocks()
    return train_on_ranks(rank, cfg, *args)


@pytest.mark.parametrize(("name", "parallel", "train"), LAYOUTS, ids=str)
def test_every_layout_equals_plain_sgd(name: str, parallel: dict[str, Any], train: dict[str, Any]) -> None:
    cfg = with_split(RUNS[name], 2, n_steps=2)
    want = train_plainly(cfg)
    split = with_split(with_parallel(cfg, **parallel), 2, expert_backend="megablocks", **train)
    for got in run_ranks(train_interpreted, 2, split, 2, "sgd"):
        assert got["losses"] == pytest.approx(want["losses"], rel=1e-5)
        assert got["norms"] == pytest.approx(want["norms"], rel=1e-4)
        assert torch.tensor(got["stats"]) == pytest.approx(torch.tensor(want["stats"]), rel=1e-4)
        assert_same_grads(got["gradients"], want["gradients"], rtol=1e-5)
        assert_same_tensors(got["parameters"], want["parameters"], rtol=1e-5)


# The model of both layers, and the tokens of each of two ranks; one rank alone has both ranks' tokens.
CFG, N_TOKENS = tiny_config(n_experts=6, top_k=3, seq_len=37, d_model=24, d_expert=32), 37
EXPERTS = ("gate_up", "down")


def tensors_of(cfg: ModelConfig) -> dict[str, Tensor]:
    """Return the router [E, D] and the experts, gate_up [E, D, 2 F] and down [E, D, F]."""
    n, d, f = cfg.n_experts, cfg.d_model, cfg.d_expert
    shapes = {"router": (n, d), "gate_up": (n, d, 2 * f), "down": (n, d, f)}
    generator = torch.Generator().manual_seed(11)
    return {name: 0.4 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def compare_layers(rank: int, world_size: int) -> dict[str, dict[str, Tensor]]:
    """Return this rank's output and, by name, all gradients of our layer and theirs, in our shapes."""
    complete_megablocks()
    group = dist.group.WORLD
    assert group is not None
    dispatcher: Dispatcher = LocalDispatcher() if world_size == 1 else AllToAllDispatcher(group)
    tokens = torch.randn(2, N_TOKENS, CFG.d_model, generator=torch.Generator().manual_seed(12))
    x = (tokens.flatten(0, 1) if world_size == 1 else tokens[rank]).clone()
    n_local = CFG.n_experts // world_size
    mine = slice(rank * n_local, (rank + 1) * n_local)
    weights = {k: w[mine] if k in EXPERTS else w for k, w in tensors_of(CFG).items()}
    return {
        "ours": run_ours(weights, x.clone().requires_grad_(), dispatcher),
        "theirs": run_theirs(weights, x.clone().requires_grad_(), group if world_size > 1 else None),
    }


def run_ours(weights: dict[str, Tensor], x: Tensor, dispatcher: Dispatcher) -> dict[str, Tensor]:
    layer, state = MoELayer(CFG, dispatcher, Unsplit(), "megablocks", "none"), random_state(CFG)
    layer.load_state_dict(
        {"router.weight": weights["router"]} | {f"experts.{name}": weights[name] for name in EXPERTS}
    )
    is_counted = torch.ones(x.size(0), dtype=torch.bool)
    out, _ = layer(x, state.bias_ME[0], state.load_frac_ME[0], is_counted, RoutingMemo())
    out.square().sum().backward()
    grads = {name.split(".")[-1]: p.grad for name, p in layer.experts.named_parameters()}
    return {"out": out.detach(), "x": x.grad, "router": layer.router.weight.grad, **grads}


def run_theirs(weights: dict[str, Tensor], x: Tensor, group: dist.ProcessGroup | None) -> dict[str, Tensor]:
    from megablocks.layers.arguments import Arguments
    from megablocks.layers.dmoe import dMoE

    settings = Arguments(
        hidden_size=CFG.d_model,
        ffn_hidden_size=CFG.d_expert,
        moe_num_experts=CFG.n_experts,
        moe_top_k=CFG.top_k,
        moe_normalize_expert_weights=1,
        mlp_type="glu",
        mlp_impl="grouped",
        activation_fn=F.silu,
        bias=False,
        return_bias=False,
        fp16=False,
        device=torch.device("cpu"),
        moe_expert_model_parallelism=group is not None,
        expert_parallel_group=group,
    )
    layer = dMoE(settings)
    router, mlp = layer.router.layer.weight, layer.experts.mlp
    with torch.no_grad():
        router.copy_(weights["router"])
        gate, up = weights["gate_up"].chunk(2, dim=2)
        mlp.w1.copy_(gate.transpose(1, 2).flatten(0, 1))
        mlp.v1.copy_(up.transpose(1, 2).flatten(0, 1))
        mlp.w2.copy_(weights["down"].transpose(1, 2).flatten(0, 1))
    out = layer(x.unsqueeze(1)).squeeze(1)
    out.square().sum().backward()
    gate, up, down = (w.grad.unflatten(0, (-1, CFG.d_expert)) for w in (mlp.w1, mlp.v1, mlp.w2))
    grads = {"gate_up": torch.cat([gate, up], dim=1).transpose(1, 2), "down": down.transpose(1, 2)}
    return {"out": out.detach(), "x": x.grad, "router": router.grad, **grads}


def test_their_layer_is_ours_and_scales_its_gradients() -> None:
    (alone,) = run_ranks(compare_layers, 1, 1)
    assert_same_grads(alone["ours"], alone["theirs"], rtol=RTOL)
    ranks = run_ranks(compare_layers, 2, 2)
    whole = {
        side: {name: torch.cat([rank[side][name] for rank in ranks]) for name in ("out", "x", *EXPERTS)}
        | {"router": sum(rank[side]["router"] for rank in ranks)}
        for side in ("ours", "theirs")
    }
    assert_same_grads(whole["ours"], alone["ours"], rtol=RTOL)
    halved = {name: w / 2 if name in EXPERTS else w for name, w in alone["theirs"].items()}
    assert_same_grads(whole["theirs"], halved, rtol=RTOL)
