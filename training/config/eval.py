"""The section [eval]: when a run evaluates, and on how much."""

from pydantic import BaseModel, PositiveInt

from turnout.moe.config import STRICT


class EvalConfig(BaseModel):
    model_config = STRICT

    every_steps: PositiveInt | None = None  # None: only after the last step
    max_documents: PositiveInt | None = None  # None: the whole validation split
