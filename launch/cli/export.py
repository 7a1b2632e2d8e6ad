"""The commands that bring weights out of Turnout and into it; launch/cli/main.py registers them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from turnout.launch.settings import load_config
from turnout.launch.verify import check_is_model
from turnout.training.errors import ConfigError

TAKEN_FROM_RECIPE = ("model.seq_len", "model.balance")
UPCYCLED_FROM_RECIPE = ("model.top_k", "model.router")


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
    check_is_model(checkpoint)
    # Imported here because torch takes a second to import. --help and refusals need not wait for it.
    from turnout.launch.commands.export import run_export

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
    if upcycle is not None and upcycle < 2:
        raise ConfigError(f"--upcycle {upcycle} must be at least 2, the number of experts")
    check_overrides(overrides, is_upcycled=upcycle is not None)
    cfg = load_config(recipe, overrides)
    from turnout.launch.commands.import_ import run_import  # as above

    run_import(from_, cfg, run_dir=run_dir, n_upcycled=upcycle)


def check_overrides(overrides: Sequence[str], *, is_upcycled: bool) -> None:
    """Raise ConfigError for a setting of the model, which is the directory's, and would have no effect."""
    taken = (*TAKEN_FROM_RECIPE, *(UPCYCLED_FROM_RECIPE if is_upcycled else ()))
    for path in (override.partition("=")[0].strip() for override in overrides):
        if path.startswith("model.") and not any(path == one or path.startswith(f"{one}.") for one in taken):
            raise ConfigError(
                f"--set {path} has no effect: the model is the directory's, and of the recipe's only "
                f"{', '.join(taken)} are taken; drop it"
            )
