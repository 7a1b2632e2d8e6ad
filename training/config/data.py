"""The section [data]: which corpus a run reads, and in which order."""

from typing import Literal

from pydantic import BaseModel, Field

from turnout.moe.config import STRICT


class DataConfig(BaseModel):
    """Corpus, order of the samples, and what attention may see."""

    model_config = STRICT

    # Directory of the tokenized corpus, as `turnout prepare` wrote it.
    corpus: str
    # Seed of the order in which samples are read.
    seed: int = Field(default=0, ge=0)
    # Whether a token may attend to earlier documents in its sequence. false: only to its own document.
    attend_across_documents: bool = False
    # How every shard of the corpus is checked before the ranks start. checksum: all bytes are read and
    # hashed. size: only the file sizes are compared.
    verify: Literal["checksum", "size"] = "checksum"
