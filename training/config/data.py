"""The section [data]: which corpus a run reads, and in which order."""

from typing import Literal

from pydantic import BaseModel, Field

from turnout.moe.config import STRICT


class DataConfig(BaseModel):
    model_config = STRICT

    corpus: str  # directory written by `turnout prepare`
    seed: int = Field(default=0, ge=0)
    attend_across_documents: bool = False
    verify: Literal["checksum", "size"] = "checksum"  # of every shard, at start
