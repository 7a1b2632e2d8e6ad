"""`turnout checkpoint` and its subcommands on the command line; launch/cli/main.py registers them."""

from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter

checkpoint = App(name="checkpoint", help="List, verify, show or remove the checkpoints of a run.")


@checkpoint.command(name="list")
def list_(run_dir: Annotated[Path, Parameter(help="The run directory, as given to --run-dir.")], /) -> None:
    """List a run's checkpoints, newest first, without reading their tensors.

    Example: turnout checkpoint list runs/first
    """
    from turnout.launch.commands.checkpoint import list_saved

    list_saved(run_dir)


@checkpoint.command
def verify(
    directory: Annotated[Path, Parameter(help="A checkpoint, or a run directory to verify all of them.")], /
) -> None:
    """Read every byte and compare it with the checksums. The exit code is 4 if a file is damaged.

    Example: turnout checkpoint verify runs/first/checkpoints/step-00001000
    """
    from turnout.launch.commands.checkpoint import verify_all

    verify_all(directory)


@checkpoint.command
def show(
    directory: Annotated[Path, Parameter(help="A checkpoint, or a run directory for its newest one.")],
    /,
    *,
    tensors: Annotated[
        bool, Parameter(negative=(), help="Also read the weights: mean, std, min and max of each parameter.")
    ] = False,
) -> None:
    """Show what a checkpoint holds: step, data, layout, optimizer, and the shape of each parameter.

    Example: turnout checkpoint show runs/first --tensors
    """
    from turnout.launch.commands.checkpoint import show_contents

    show_contents(directory, has_tensors=tensors)


@checkpoint.command
def prune(
    run_dir: Annotated[
        Path, Parameter(help="The run directory, as given to --run-dir. The run may be training.")
    ],
    /,
    *,
    keep_last: Annotated[int, Parameter(help="How many of the newest checkpoints to keep.")],
    keep_every_steps: Annotated[
        int | None, Parameter(help="Also keep the checkpoints whose step is a multiple of this.")
    ] = None,
    dry_run: Annotated[
        bool, Parameter(negative=(), help="Print what would be removed, and remove nothing.")
    ] = False,
) -> None:
    """Remove old checkpoints, but never the newest intact one.

    Example: turnout checkpoint prune runs/first --keep-last 2 --keep-every-steps 10000 --dry-run
    """
    from turnout.launch.commands.checkpoint import prune_old

    prune_old(run_dir, keep_last=keep_last, keep_every_steps=keep_every_steps, is_dry=dry_run)
