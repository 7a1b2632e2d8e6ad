"""The section [eval]: when a run evaluates, and on how much."""

from pydantic import BaseModel, PositiveInt

from turnout.moe.config import STRICT


class EvalConfig(BaseModel):
    """Evaluation on the validation split during training."""

    model_config = STRICT

    # Optimizer steps between evaluations; one always follows the last step. None: only that one.
    every_steps: PositiveInt | None = None
    # Cap on the documents of one evaluation. None: the whole validation split.
    max_documents: PositiveInt | None = None
