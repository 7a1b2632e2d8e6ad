"""The commands that bring weights out of Turnout and into it; launch/cli.py registers them."""

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from training.errors import ConfigError


def export(
    *,
    checkpoint: Annotated[
        Path, Parameter(help="A checkpoint, or a run directory for its newest intact one.")
    ],
    out: Annotated[Path, Parameter(help="A new directory; it appears when what is in it has been proven.")],
    format_: Annotated[
        Literal["hf", "gguf"], Parameter(name="--format", help="For transformers, or for llama.cpp.")
    ],
    dtype: Annotated[
        Literal["float32", "bfloat16", "q8_0"], Parameter(help="Of the matrices; q8_0 with gguf only.")
    ] = "float32",
) -> None:
    """Export trained weights, and prove that what was written computes the same logits.

    Needs no GPU. Example: turnout export --checkpoint runs/first --out exports/first --format hf
    """
    # Imported here because torch and transformers take seconds, which --help need not wait for.
    from launch.export import run_export

    run_export(checkpoint, out, format_, dtype)


def import_(
    recipe: Annotated[str, Parameter(help="Recipe of the training to come; the model is not taken from it.")],
    /,
    *,
    from_: Annotated[Path, Parameter(name="--from", help="Directory with config.json and safetensors.")],
    run_dir: Annotated[Path, Parameter(help="A new directory, for the run that is to go on.")],
    upcycle: Annotated[
        int | None, Parameter(help="Make so many experts of each feed-forward layer of a dense model.")
    ] = None,
    overrides: Annotated[
        tuple[str, ...], Parameter(name="--set", help="path=value, as in a recipe; repeat at will.")
    ] = (),
) -> None:
    """Make a run of a Hugging Face model, from which `turnout train --resume` goes on at any layout.

    Example: turnout import tiny --from exports/first --run-dir runs/more --set train.n_steps=100
    """
    from launch.import_ import run_import  # as above

    if upcycle is not None and upcycle < 2:
        raise ConfigError(f"--upcycle {upcycle} must be at least 2, the number of experts")
    run_import(from_, recipe, overrides, run_dir=run_dir, n_upcycled=upcycle)
