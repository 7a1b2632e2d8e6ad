"""`turnout export` and `turnout import` on the command line; launch/cli/main.py registers them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from turnout.launch.cli.parameters import Overrides
from turnout.launch.settings import load_config
from turnout.launch.verify import check_is_model
from turnout.training.errors import ConfigError

# The model comes from the directory; only these sections of the recipe's model apply.
FROM_RECIPE = ("model.seq_len", "model.balance")
ALSO_FROM_RECIPE_IF_UPCYCLED = ("model.top_k", "model.router")


def export(
    *,
    checkpoint: Annotated[
        Path, Parameter(help="A checkpoint, or a run directory for its newest intact one.")
    ],
    out: Annotated[
        Path, Parameter(help="A new directory. It gets its name only once its content is verified.")
    ],
    format_: Annotated[
        Literal["hf", "gguf"], Parameter(name="--format", help="hf is for transformers, gguf for llama.cpp.")
    ],
    dtype: Annotated[
        Literal["float32", "bfloat16", "q8_0"], Parameter(help="Dtype of the matrices; q8_0 only with gguf.")
    ] = "float32",
) -> None:
    """Export trained weights, and check that the exported model computes the same logits.

    Needs no GPU. Example: turnout export --checkpoint runs/first --out exports/first --format hf
    """
    check_is_model(checkpoint)
    # Imported here because torch takes a second to import; --help and errors need not wait for it.
    from turnout.launch.commands.export import run_export

    run_export(checkpoint, out, format_, dtype)


def import_(
    recipe: Annotated[str, Parameter(help="Recipe for the training; the model comes from --from instead.")],
    /,
    *,
    from_: Annotated[
        Path, Parameter(name="--from", help="Hugging Face directory: config.json, safetensors, tokenizer.")
    ],
    run_dir: Annotated[Path, Parameter(help="A new directory for the run.")],
    upcycle: Annotated[
        int | None, Parameter(help="Copy each feed-forward layer of a dense model into this many experts.")
    ] = None,
    overrides: Overrides = (),
) -> None:
    """Turn a Hugging Face model into a run that `turnout train --resume` continues, at any layout.

    Example: turnout import tiny --from exports/first --run-dir runs/more --set train.n_steps=100
    """
    if upcycle is not None and upcycle < 2:
        raise ConfigError(f"--upcycle {upcycle} must be at least 2, the number of experts")
    check_overrides(overrides, is_upcycled=upcycle is not None)
    cfg = load_config(recipe, overrides)
    from turnout.launch.commands.import_ import run_import  # as above

    run_import(from_, cfg, run_dir=run_dir, n_upcycled=upcycle)


def check_overrides(overrides: Sequence[str], *, is_upcycled: bool) -> None:
    """Raise ConfigError for a setting that has no effect because the model comes from the directory."""
    applied = (*FROM_RECIPE, *(ALSO_FROM_RECIPE_IF_UPCYCLED if is_upcycled else ()))
    for path in (override.partition("=")[0].strip() for override in overrides):
        if path.startswith("model.") and not any(
            path == one or path.startswith(f"{one}.") for one in applied
        ):
            raise ConfigError(
                f"--set {path} has no effect: the model comes from the directory, and only "
                f"{', '.join(applied)} from the recipe; drop it"
            )
