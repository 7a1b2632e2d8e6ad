"""The section [parallel]: how the model and its optimizer state are split over ranks."""

from typing import Literal

from pydantic import BaseModel, Field, PositiveInt

from turnout.moe.config import STRICT


class ParallelConfig(BaseModel):
    """Sizes of the parallel groups, and how ranks exchange expert rows."""

    model_config = STRICT

    # Tensor-parallel size: ranks that split each dense matrix among them.
    tp: PositiveInt = 1
    # Expert-parallel size: ranks that split each layer's experts among them.
    ep: PositiveInt = 1
    # Whether each rank of a tensor-parallel group holds the norms and residuals of 1 / tp of the tokens.
    # false: of all tokens.
    sequence_parallel: bool = False
    # Cap on the expert rows a rank processes at once, as a multiple of the mean over ranks; rows above it are
    # processed in extra chunks and recomputed in the backward pass. None: no cap.
    ep_max_load: float | None = Field(default=2.0, gt=0, allow_inf_nan=False)
    # Minimum number of chunks in which expert rows are sent; one chunk travels while another is computed.
    ep_chunks: PositiveInt = 1
    # ZeRO stage: 1 splits the optimizer state over data-parallel ranks, 2 splits the gradients too. Stage 0
    # is not offered: DeepSpeed 0.19.8 then clips by a wrong norm as soon as experts are split.
    zero_stage: Literal[1, 2] = 1
    # Seconds a collective waits for a rank before that rank is considered dead.
    timeout_s: PositiveInt = 600
