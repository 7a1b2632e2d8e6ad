"""Parameters that several commands share, with their help."""

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

Recipe = Annotated[str, Parameter(help="A packaged recipe by name, or a TOML file.")]
Overrides = Annotated[
    tuple[str, ...], Parameter(name="--set", help="Change a setting: PATH=VALUE; may be repeated.")
]
Model = Annotated[
    Path, Parameter(help="A run (its newest intact checkpoint), a checkpoint, or an exported model.")
]
TextField = Annotated[str | None, Parameter(help="Field with the text in jsonl and parquet; default: text.")]
DType = Annotated[Literal["float32", "bfloat16"], Parameter(help="Dtype of the weights and the arithmetic.")]
