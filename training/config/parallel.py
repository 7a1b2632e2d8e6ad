"""The section [parallel]: how the model and its optimizer state are split over ranks."""

from typing import Literal

from pydantic import BaseModel, Field, PositiveInt

from turnout.moe.config import STRICT


class ParallelConfig(BaseModel):
    model_config = STRICT

    tp: PositiveInt = 1
    ep: PositiveInt = 1
    sequence_parallel: bool = False  # norms and residuals hold 1 / tp of the tokens
    # Expert rows a rank takes at once, over the mean of the ranks; more come in further trips, which are
    # computed again in backward, so that no routing is out of memory. None: all at once.
    ep_max_load: float | None = Field(default=2.0, gt=0, allow_inf_nan=False)
    ep_chunks: PositiveInt = 1  # rows go in so many trips, each of which travels while others are computed
    zero_stage: Literal[1, 2] = 1  # 0 clips by a wrong norm in DeepSpeed 0.19.8 once experts are split
    timeout_s: PositiveInt = 600  # how long a collective waits for a rank before it is taken for dead
