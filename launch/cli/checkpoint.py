"""`turnout checkpoint` and its commands; launch/cli/main.py registers them."""

from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter

checkpoint = App(
    name="checkpoint", help="Look at the checkpoints of a run, verify them, and remove old ones."
)


@checkpoint.command(name="list")
def list_(run_dir: Annotated[Path, Parameter(help="What --run-dir named.")], /) -> None:
    """List a run's checkpoints, newest first, without reading their tensors.

    Example: turnout checkpoint list runs/first
    """
    from turnout.launch.commands.checkpoint import list_saved

    list_saved(run_dir)


@checkpoint.command
def verify(
    directory: Annotated[Path, Parameter(help="A checkpoint, or a run directory for all of its own.")], /
) -> None:
    """Read every byte and compare it with the checksums; exit code 4 where a file is damaged.

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
        bool, Parameter(negative=(), help="Read the weights: mean, std, min and max of each parameter.")
    ] = False,
) -> None:
    """Show what a checkpoint holds: step, data, layout, optimizer, and each parameter's shape.

    Example: turnout checkpoint show runs/first --tensors
    """
    from turnout.launch.commands.checkpoint import show_contents

    show_contents(directory, has_tensors=tensors)


@checkpoint.command
def prune(
    run_dir: Annotated[Path, Parameter(help="What --run-dir named; the run may be going on.")],
    /,
    *,
    keep_last: Annotated[int, Parameter(help="How many of the newest stay.")],
    keep_every_steps: Annotated[int | None, Parameter(help="Those of each so many steps stay, too.")] = None,
    dry_run: Annotated[bool, Parameter(negative=(), help="Only say what would be removed.")] = False,
) -> None:
    """Remove old checkpoints, but never the newest intact one.

    Example: turnout checkpoint prune runs/first --keep-last 2 --keep-every-steps 10000 --dry-run
    """
    from turnout.launch.commands.checkpoint import prune_old

    prune_old(run_dir, keep_last=keep_last, keep_every_steps=keep_every_steps, is_dry=dry_run)
