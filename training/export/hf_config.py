"""Which Hugging Face architecture holds a model, its config.json both ways, and the names of the files.

We write config.json ourselves: transformers 5 writes spellings that version 4 does not read or misreads
(rope_theta), and the other way round. So both spellings are written, everywhere. The names of the tensors are
in huggingface.py. Imports no torch, so that refusals are quick.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from turnout.moe.config import ModelConfig
from turnout.training.errors import ConfigError, printable

CONFIG, INDEX, SINGLE = "config.json", "model.safetensors.index.json", "model.safetensors"

# We read and write the first three. llama and qwen3 are dense: import makes experts of their layers.
Architecture = Literal["mixtral", "qwen3_moe", "glm4_moe", "llama", "qwen3"]
ROUTED: tuple[Architecture, ...] = ("mixtral", "qwen3_moe", "glm4_moe")
DENSE: tuple[Architecture, ...] = ("llama", "qwen3")
CLASSES: dict[Architecture, str] = {
    "mixtral": "MixtralForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "glm4_moe": "Glm4MoeForCausalLM",
}
MAX_POSITIONS = 1 << 24  # more than any model has been trained on


def is_hf_directory(path: Path) -> bool:
    """Return whether a directory looks like a Hugging Face model: config.json and safetensors beside it."""
    return (path / CONFIG).is_file() and ((path / INDEX).is_file() or (path / SINGLE).is_file())


def choose_architecture(cfg: ModelConfig, *, has_bias: bool) -> Architecture:
    """Return the first architecture that computes what the model computes.

    has_bias: some router's bias is not 0. Raises ConfigError that lists the obstacles of the nearest one.
    """
    faults = {architecture: obstacles(architecture, cfg, has_bias=has_bias) for architecture in ROUTED}
    for architecture, found in faults.items():
        if not found:
            return architecture
    fewest = min(map(len, faults.values()))
    nearest = [
        f"{name}, but {', and '.join(found)}" for name, found in faults.items() if len(found) == fewest
    ]
    raise ConfigError(f"no Hugging Face architecture holds this model; nearest is {'; or '.join(nearest)}")


def obstacles(architecture: Architecture, cfg: ModelConfig, *, has_bias: bool) -> list[str]:
    """Return why an architecture cannot hold the model, each reason with the setting that would remove it.

    Source: transformers 4.57 and 5.23, models/{mixtral,qwen3_moe,glm4_moe}/modeling_*.py.
    """
    router, found = cfg.router, []

    def need(is_met: bool, reason: str, setting: str) -> None:
        if not is_met:
            found.append(f"{reason} ({setting} would do)")

    need(router.capacity_factor is None, "it drops no rows", "model.router.capacity_factor=none")
    need(router.n_groups == 1, "versions mask groups differently", "model.router.n_groups=1")
    if architecture == "glm4_moe":
        need(router.score == "sigmoid", "its scores are sigmoid", "model.router.score=sigmoid")
        need(cfg.sliding_window is None, "it has no sliding window", "model.sliding_window=none")
        return found
    need(router.score == "softmax", "its scores are softmax", "model.router.score=softmax")
    need(router.scale == 1.0, "its weights have no scale", "model.router.scale=1.0")
    need(not has_bias, "its routers have no bias", "model.balance.bias_rate=0 from the first step on")
    need(not cfg.n_shared_experts, "it has no shared experts", "model.n_shared_experts=0")
    if architecture == "mixtral":
        need(router.normalize, "its weights sum to 1", "model.router.normalize=true")
        need(not cfg.qk_norm, "it does not norm queries and keys", "model.qk_norm=false")
        need(not cfg.n_dense_layers, "it has no dense layers", "model.n_dense_layers=0")
    else:
        need(cfg.qk_norm, "it norms queries and keys", "model.qk_norm=true")
    return found


def to_hf_config(
    architecture: Architecture, cfg: ModelConfig, *, dtype: str, bos_id: int, eos_id: int
) -> dict[str, Any]:
    """Return the contents of config.json, which transformers 4 and 5 both read as the same model."""
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": cfg.rope_theta}
    tree: dict[str, Any] = {
        "architectures": [CLASSES[architecture]],
        "model_type": architecture,
        "dtype": dtype,
        "torch_dtype": dtype,
        "vocab_size": cfg.vocab_size,
        "hidden_size": cfg.d_model,
        "num_hidden_layers": cfg.n_layers,
        "num_attention_heads": cfg.n_heads,
        "num_key_value_heads": cfg.n_kv_heads,
        "head_dim": cfg.d_head,
        "max_position_embeddings": cfg.seq_len,
        "rms_norm_eps": cfg.norm_eps,
        "rope_theta": cfg.rope_theta,
        "rope_parameters": rope,
        "hidden_act": "silu",
        "initializer_range": cfg.init_std,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "use_cache": True,
        "tie_word_embeddings": False,
        "bos_token_id": bos_id,
        "eos_token_id": eos_id,
        "num_experts": cfg.n_experts,
        "num_local_experts": cfg.n_experts,
        "num_experts_per_tok": cfg.top_k,
        "sliding_window": cfg.sliding_window,
        "intermediate_size": cfg.d_ff or cfg.d_expert,
    }
    if architecture == "mixtral":
        return {**tree, "intermediate_size": cfg.d_expert}
    tree |= {"moe_intermediate_size": cfg.d_expert, "norm_topk_prob": cfg.router.normalize}
    if architecture == "qwen3_moe":
        tree |= {
            "decoder_sparse_step": 1,
            "mlp_only_layers": list(range(cfg.n_dense_layers)),
            "use_sliding_window": cfg.sliding_window is not None,
        }
        return tree
    rope["partial_rotary_factor"] = 1.0  # the default is 0.5
    tree |= {
        "partial_rotary_factor": 1.0,
        "use_qk_norm": cfg.qk_norm,
        "n_routed_experts": cfg.n_experts,
        "n_shared_experts": cfg.n_shared_experts or 1,
        "first_k_dense_replace": cfg.n_dense_layers,
        "routed_scaling_factor": cfg.router.scale,
        "n_group": 1,
        "topk_group": 1,
        "num_nextn_predict_layers": 0,
    }
    return tree


def from_hf_config(
    tree: Mapping[str, Any], where: str, *, experts: Mapping[str, Any] | None = None
) -> tuple[Architecture, ModelConfig]:
    """Return the model that a config.json describes, with default balancing, which the file does not hold.

    experts: settings of the experts to make of a dense model's layers. Raises ConfigError for a model that
    Turnout does not compute.
    """
    architecture = _architecture(tree, where, is_upcycled=experts is not None)
    try:
        _check_supported(tree, where, architecture)
        _check_sizes(tree, where)
        return architecture, ModelConfig.model_validate(_settings(tree, architecture, experts or {}))
    except KeyError as err:
        raise ConfigError(f"{where}: lacks {err.args[0]}; use the model's own config.json") from err
    except (TypeError, AttributeError, ZeroDivisionError) as err:
        raise ConfigError(f"{where}: is not a model's config ({printable(str(err))})") from err
    except ValidationError as err:
        first = err.errors(include_url=False)[0]
        path = ".".join(str(part) for part in first["loc"])
        message = printable(f"{path}: {first['msg']}".removeprefix(": "))
        raise ConfigError(f"{where}: describes a model that Turnout cannot train: {message}") from err


def _architecture(tree: Mapping[str, Any], where: str, *, is_upcycled: bool) -> Architecture:
    found = tree.get("model_type")
    for architecture in DENSE if is_upcycled else ROUTED:
        if found == architecture:
            return architecture
    shown = printable(repr(found), 40)
    if is_upcycled:
        raise ConfigError(f"{where}: model_type {shown} cannot be upcycled; use one of {list(DENSE)}")
    if found in DENSE:
        raise ConfigError(
            f"{where}: model_type {shown} is dense; make experts of it with --upcycle N_EXPERTS"
        )
    raise ConfigError(f"{where}: model_type {shown} cannot be read; use one of {list(ROUTED)}")


def _check_supported(tree: Mapping[str, Any], where: str, architecture: Architecture) -> None:
    """Raise ConfigError for a feature that a config can ask for and our decoder lacks."""
    rope = _rope(tree)
    rotary = rope.get("partial_rotary_factor", tree.get("partial_rotary_factor"))
    if rotary is None:
        rotary = 0.5 if architecture == "glm4_moe" else 1.0
    scaling = tree.get("rope_scaling") or {}
    requested = {
        "hidden_act": (tree.get("hidden_act", "silu"), "silu"),
        "attention_bias": (tree.get("attention_bias", False), False),
        "mlp_bias": (tree.get("mlp_bias", False), False),
        "partial_rotary_factor": (rotary, 1.0),
        "rope_type": (rope.get("rope_type", "default"), "default"),
        "rope_scaling": (scaling.get("rope_type", scaling.get("type", "default")), "default"),
        "n_group": (tree.get("n_group", 1), 1),
        "decoder_sparse_step": (tree.get("decoder_sparse_step", 1), 1),
        "quantization_config": (tree.get("quantization_config"), None),
    }
    if architecture == "qwen3":  # its first layers may have no window
        requested["use_sliding_window"] = (tree.get("use_sliding_window", False), False)
    for name, (found, wanted) in requested.items():
        if found != wanted:
            shown = printable(repr(found), 60)
            raise ConfigError(f"{where}: {name} is {shown}, and Turnout computes {wanted!r} only")
    dense = tree.get("mlp_only_layers") or []
    if dense != list(range(len(dense))):
        raise ConfigError(f"{where}: mlp_only_layers {printable(repr(dense), 60)} are not the first layers")


def _rope(tree: Mapping[str, Any]) -> Mapping[str, Any]:
    return tree.get("rope_parameters") or {}


def _check_sizes(tree: Mapping[str, Any], where: str) -> None:
    """Raise ConfigError for an absurd sequence length: evaluation would allocate for it."""
    if (length := tree["max_position_embeddings"]) > MAX_POSITIONS:
        shown = printable(repr(length), 40)
        raise ConfigError(
            f"{where}: max_position_embeddings is {shown}, more than {MAX_POSITIONS:,}; write the length "
            "that the model was trained on"
        )


def _settings(
    tree: Mapping[str, Any], architecture: Architecture, experts: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the fields of ModelConfig. Raises KeyError where the config lacks one."""
    rope = _rope(tree)
    has_window = architecture == "mixtral" or bool(tree.get("use_sliding_window", False))
    window = tree.get("sliding_window") if has_window else None
    if window is not None and window >= tree["max_position_embeddings"]:
        window = None  # it never hides a token
    common = {
        "n_layers": tree["num_hidden_layers"],
        "d_model": tree["hidden_size"],
        "n_heads": tree["num_attention_heads"],
        "n_kv_heads": tree.get("num_key_value_heads") or tree["num_attention_heads"],
        "d_head": tree.get("head_dim") or tree["hidden_size"] // tree["num_attention_heads"],
        "vocab_size": tree["vocab_size"],
        "seq_len": tree["max_position_embeddings"],
        "rope_theta": rope["rope_theta"] if "rope_theta" in rope else tree["rope_theta"],
        "norm_eps": tree["rms_norm_eps"],
        "init_std": tree.get("initializer_range", 0.02),
        "sliding_window": window,
        "tie_embeddings": tree.get("tie_word_embeddings", False),
    }
    if architecture in DENSE:
        return {
            **common,
            **experts,
            "qk_norm": architecture == "qwen3",
            "d_expert": tree["intermediate_size"],
        }
    if architecture == "mixtral":
        routed = {"d_expert": tree["intermediate_size"], "n_experts": tree["num_local_experts"]}
        return {**common, **routed, "top_k": tree["num_experts_per_tok"]}
    n_dense = len(tree.get("mlp_only_layers") or [])
    router: dict[str, Any] = {"normalize": tree["norm_topk_prob"]}
    counts = {"qk_norm": True}
    if architecture == "glm4_moe":
        n_dense = tree["first_k_dense_replace"]
        router |= {"score": "sigmoid", "scale": tree["routed_scaling_factor"]}
        counts = {"qk_norm": tree["use_qk_norm"], "n_shared_experts": tree["n_shared_experts"]}
    names = ("n_routed_experts", "num_experts", "num_local_experts")
    n_experts = next((tree[name] for name in names if name in tree), None)
    return {
        **common,
        **counts,
        "d_expert": tree["moe_intermediate_size"],
        "n_experts": n_experts,
        "top_k": tree["num_experts_per_tok"],
        "n_dense_layers": n_dense,
        "d_ff": tree["intermediate_size"] if n_dense else None,
        "router": router,
    }
