"""The section [train]: length, batch, precision and speed of training."""

from typing import Literal

from pydantic import BaseModel, Field, PositiveInt

from turnout.moe.config import STRICT


class TrainConfig(BaseModel):
    model_config = STRICT

    n_steps: PositiveInt
    batch_tokens: PositiveInt  # per optimizer step, all ranks
    microbatch_seqs: PositiveInt  # per rank and forward
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    seed: int = Field(default=0, ge=0)
    clip_norm: float | None = Field(default=None, gt=0)  # None: no clipping
    # auto: in half precision on a GPU from sm_80 on triton_grouped or torch_grouped, else sorted_loop
    expert_backend: Literal[
        "auto",
        "reference",
        "sorted_loop",
        "compiled_loop",
        "torch_grouped",
        "megablocks",
        "triton_grouped",
    ] = "auto"
    recompute: Literal["none", "selective", "full"] = "none"  # of activations, in backward
    # Blocks by torch.compile, and the loss where parallel.tp=1: a slower first step, faster ones after it.
    compile: bool = False
