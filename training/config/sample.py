"""The section [sample]: texts that a run writes after its last step."""

from pydantic import BaseModel, Field, PositiveInt

from turnout.moe.config import STRICT


class SampleConfig(BaseModel):
    """Continuations written after the last step."""

    model_config = STRICT

    # Texts to continue. Empty: no samples are written.
    prompts: tuple[str, ...] = ()
    # Maximum number of tokens generated per prompt.
    n_tokens: PositiveInt = 64
    # Sampling temperature, by which logits are divided. 0: greedy decoding.
    temperature: float = Field(default=0.8, ge=0)
    # Nucleus sampling: only the most probable tokens that together reach this probability are sampled.
    top_p: float = Field(default=0.95, gt=0, le=1)
