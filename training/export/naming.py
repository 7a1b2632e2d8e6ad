"""Our parameters under the names of Hugging Face: one table, read forwards by export, backwards by import.

Every tensor of a file is a slot, and every slot says what of ours fills it. Contract: each parameter of the
model, expert by expert, fills at least one slot, and nothing else does.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from turnout.moe.config import ModelConfig

# The first three can be written and read; of llama and qwen3, which are dense, experts are made.
Architecture = Literal["mixtral", "qwen3_moe", "glm4_moe", "llama", "qwen3"]
ROUTED: tuple[Architecture, ...] = ("mixtral", "qwen3_moe", "glm4_moe")
DENSE: tuple[Architecture, ...] = ("llama", "qwen3")

ATTENTION = {part: f"self_attn.{part}_proj" for part in "qkvo"}
NORMS = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
QK_NORMS = {"attn.q_norm": "self_attn.q_norm", "attn.k_norm": "self_attn.k_norm"}
PROJECTIONS = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
MIXTRAL_PROJECTIONS = {"gate": "w1", "up": "w3", "down": "w2"}


@dataclass(frozen=True)
class Slot:
    """One tensor of a file.

    name    what the file calls it
    kind    parameter: `ours`, or one expert of it; bias: a row of the routers' bias; zeros: nothing of ours
    ours    the parameter's name
    index   parameter: the expert, or None; bias: the row, which is the number of the expert layer
    half    of gate_up [D, 2 * d_expert] of an expert: its columns of gate or of up, turned into rows
    """

    name: str
    shape: tuple[int, ...]
    kind: Literal["parameter", "bias", "zeros"] = "parameter"
    ours: str = ""
    index: int | None = None
    half: Literal["gate", "up"] | None = None


def slots(architecture: Architecture, cfg: ModelConfig) -> Iterator[Slot]:
    """Yield the slots of a model in the order of its layers. Of a tied model the head is one of its own."""
    width, rows = cfg.d_model, cfg.vocab_size
    yield Slot("model.embed_tokens.weight", (rows, width), ours="embed.weight")
    for layer in range(cfg.n_layers):
        yield from _block_slots(architecture, cfg, layer)
    yield Slot("model.norm.weight", (width,), ours="norm.weight")
    # Readers differ in whether they heed tie_word_embeddings (vLLM ignores it for glm4_moe).
    yield Slot("lm_head.weight", (rows, width), ours="embed.weight" if cfg.tie_embeddings else "head.weight")


def _block_slots(architecture: Architecture, cfg: ModelConfig, layer: int) -> Iterator[Slot]:
    here, there = f"blocks.{layer}.", f"model.layers.{layer}."
    inner, outer = cfg.n_heads * cfg.d_head, cfg.n_kv_heads * cfg.d_head
    shapes = {"q": (inner, cfg.d_model), "o": (cfg.d_model, inner)}
    for ours, theirs in NORMS.items():
        yield Slot(f"{there}{theirs}.weight", (cfg.d_model,), ours=f"{here}{ours}.weight")
    for part, theirs in ATTENTION.items():
        shape = shapes.get(part, (outer, cfg.d_model))
        yield Slot(f"{there}{theirs}.weight", shape, ours=f"{here}attn.{part}.weight")
    if cfg.qk_norm:
        for ours, theirs in QK_NORMS.items():
            yield Slot(f"{there}{theirs}.weight", (cfg.d_head,), ours=f"{here}{ours}.weight")
    if layer < cfg.n_dense_layers:
        assert cfg.d_ff is not None
        yield from _swiglu(f"{there}mlp.", f"{here}ffn.", cfg.d_model, cfg.d_ff)
    elif architecture in DENSE:
        yield from _copied_expert_slots(cfg, here, there)
    else:
        yield from _expert_slots(architecture, cfg, layer)


def _expert_slots(architecture: Architecture, cfg: ModelConfig, layer: int) -> Iterator[Slot]:
    here, there = f"blocks.{layer}.moe.", f"model.layers.{layer}.mlp."
    projections = PROJECTIONS
    if architecture == "mixtral":
        there, projections = f"model.layers.{layer}.block_sparse_moe.", MIXTRAL_PROJECTIONS
    yield Slot(f"{there}gate.weight", (cfg.n_experts, cfg.d_model), ours=f"{here}router.weight")
    if architecture == "glm4_moe":
        row = layer - cfg.n_dense_layers
        yield Slot(f"{there}gate.e_score_correction_bias", (cfg.n_experts,), kind="bias", index=row)
    for expert in range(cfg.n_experts):
        for part, theirs in projections.items():
            yield _expert_slot(f"{there}experts.{expert}.{theirs}.weight", here, part, expert, cfg)
    if architecture == "glm4_moe":
        kind: Literal["parameter", "zeros"] = "parameter" if cfg.n_shared_experts else "zeros"
        # It needs a shared expert (vLLM divides by their number), so one of zeros stands in.
        width = cfg.d_shared or cfg.d_expert
        yield from _swiglu(f"{there}shared_experts.", f"{here}shared.", cfg.d_model, width, kind)


def _copied_expert_slots(cfg: ModelConfig, here: str, there: str) -> Iterator[Slot]:
    """Every expert of the layer reads the one feed-forward layer that a dense model has."""
    for expert in range(cfg.n_experts):
        for part, theirs in PROJECTIONS.items():
            yield _expert_slot(f"{there}mlp.{theirs}.weight", f"{here}moe.", part, expert, cfg)


def _expert_slot(name: str, here: str, part: str, expert: int, cfg: ModelConfig) -> Slot:
    if part == "down":
        return Slot(name, (cfg.d_model, cfg.d_expert), ours=f"{here}experts.down", index=expert)
    half: Literal["gate", "up"] = "gate" if part == "gate" else "up"
    return Slot(name, (cfg.d_expert, cfg.d_model), ours=f"{here}experts.gate_up", index=expert, half=half)


def half_of(gate_up: Tensor, half: Literal["gate", "up"]) -> Tensor:
    """Return gate or up, [..., d_expert, D], of experts' gate_up [..., D, 2 * d_expert]."""
    return gate_up.chunk(2, dim=-1)[0 if half == "gate" else 1].transpose(-1, -2)


def _swiglu(
    there: str, here: str, d_model: int, width: int, kind: Literal["parameter", "zeros"] = "parameter"
) -> Iterator[Slot]:
    for part, theirs in PROJECTIONS.items():
        shape = (d_model, width) if part == "down" else (width, d_model)
        ours = f"{here}{part}.weight" if kind == "parameter" else ""
        yield Slot(f"{there}{theirs}.weight", shape, kind, ours)
