"""The section [train]: length, batch, precision and speed of training."""

from typing import Literal

from pydantic import BaseModel, Field, PositiveInt

from turnout.moe.config import STRICT


class TrainConfig(BaseModel):
    """Steps, batches and arithmetic."""

    model_config = STRICT

    # Optimizer steps of the whole run.
    n_steps: PositiveInt
    # Tokens per optimizer step, over all ranks; a multiple of model.seq_len.
    batch_tokens: PositiveInt
    # Sequences per rank in one forward pass.
    microbatch_seqs: PositiveInt
    # Data type of the forward and backward passes. In bf16 and fp16, master weights and optimizer state are
    # fp32.
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    # Seed of the initial weights and of sampling.
    seed: int = Field(default=0, ge=0)
    # Global gradient norm above which gradients are scaled down to it. None: no clipping.
    clip_norm: float | None = Field(default=None, gt=0)
    # Implementation of the experts' matrix products. auto: triton_grouped or torch_grouped in half precision
    # on GPUs from sm_80 on, otherwise sorted_loop.
    expert_backend: Literal[
        "auto",
        "reference",
        "sorted_loop",
        "compiled_loop",
        "torch_grouped",
        "megablocks",
        "triton_grouped",
    ] = "auto"
    # Activations that are recomputed in the backward pass instead of being kept. selective: attention and
    # feed-forward layers, without repeating their communication, except for rows above parallel.ep_max_load.
    # full: whole blocks, communication included.
    recompute: Literal["none", "selective", "full"] = "none"
    # Whether torch.compile compiles the blocks, and with parallel.tp=1 the loss. Slower first step, faster
    # later ones.
    compile: bool = False
