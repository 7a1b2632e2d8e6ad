"""The section [sample]: texts that a run writes after its last step."""

from pydantic import BaseModel, Field, PositiveInt

from turnout.moe.config import STRICT


class SampleConfig(BaseModel):
    """Continuations written after the last step."""

    model_config = STRICT

    prompts: tuple[str, ...] = ()
    n_tokens: PositiveInt = 64
    temperature: float = Field(default=0.8, ge=0)  # 0: greedy
    top_p: float = Field(default=0.95, gt=0, le=1)
