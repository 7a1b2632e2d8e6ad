"""The section [checkpoint]: when a run saves, and which checkpoints it keeps."""

from typing import Self

from pydantic import BaseModel, PositiveInt, model_validator

from turnout.moe.config import STRICT


class CheckpointConfig(BaseModel):
    """When checkpoints are written, and which ones are kept."""

    model_config = STRICT

    # Optimizer steps between checkpoints; one is always written after the last step. None: only that one.
    every_steps: PositiveInt | None = None
    # Number of newest checkpoints to keep; older ones are deleted.
    keep_last: PositiveInt = 3
    # Checkpoints at multiples of this step count are never deleted. None: none is protected.
    keep_every_steps: PositiveInt | None = None
    # Whether training continues while a checkpoint is written. false: it waits until the files are on disk.
    async_save: bool = True

    @model_validator(mode="after")
    def _check_kept(self) -> Self:
        every, kept = self.every_steps, self.keep_every_steps
        if kept is None:
            return self
        if every is None:
            raise ValueError(
                f"keep_every_steps={kept} has no effect without every_steps; set it, or drop this"
            )
        if kept % every:
            below = kept // every * every
            fits = f"{below} or {below + every}" if below else every
            raise ValueError(f"keep_every_steps={kept} must be a multiple of every_steps={every}; use {fits}")
        return self
