"""The section [log]: how often a run logs, and to which trackers."""

from typing import Literal

from pydantic import BaseModel, PositiveInt

from turnout.moe.config import STRICT


class LogConfig(BaseModel):
    """Rows of metrics and where they go."""

    model_config = STRICT

    # Optimizer steps between rows of metrics; the last step is always logged.
    every_steps: PositiveInt = 10
    # Trackers that receive each row, in addition to metrics.jsonl. Empty: none.
    trackers: tuple[Literal["tensorboard", "wandb"], ...] = ("tensorboard",)
