"""The section [log]: how often a run logs, and to which trackers."""

from typing import Literal

from pydantic import BaseModel, PositiveInt

from turnout.moe.config import STRICT


class LogConfig(BaseModel):
    model_config = STRICT

    every_steps: PositiveInt = 10
    trackers: tuple[Literal["tensorboard", "wandb"], ...] = ("tensorboard",)
