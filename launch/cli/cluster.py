"""`turnout submit` and `status` on the command line; launch/cli/main.py registers them."""

import sys
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from turnout.launch.cli.parameters import Overrides, Recipe
from turnout.launch.settings import load_config


def submit(
    recipe: Recipe,
    /,
    *,
    run_dir: Annotated[
        Path, Parameter(help="Directory for everything that the run writes; all nodes must see it.")
    ],
    nodes: Annotated[
        str,
        Parameter(help="Number of nodes, such as 8; 4-8 lets the run continue on any number from 4 to 8."),
    ],
    time: Annotated[
        str, Parameter(help="Time limit of the job, such as 24:00:00; each requeue starts it again.")
    ] = "24:00:00",
    gpus_per_node: Annotated[int | None, Parameter(help="GPUs per node, one rank on each.")] = None,
    ranks_per_node: Annotated[int | None, Parameter(help="CPU ranks per node, if it has no GPUs.")] = None,
    overrides: Overrides = (),
    allow_change: Annotated[
        tuple[str, ...],
        Parameter(help="A setting, such as optim.lr, that may differ from before; may be repeated."),
    ] = (),
    sbatch: Annotated[
        tuple[str, ...], Parameter(help="An option for sbatch, such as partition=gpu; may be repeated.")
    ] = (),
    srun: Annotated[
        tuple[str, ...],
        Parameter(
            help="An option for the srun of the ranks, such as container-image=turnout.sqsh; may be repeated."
        ),
    ] = (),
    env_file: Annotated[
        Path | None, Parameter(help="Shell file that sets the site's own NCCL variables.")
    ] = None,
    warn_s: Annotated[
        int, Parameter(help="SLURM warns the job at least this many seconds before its time limit.")
    ] = 300,
    max_failures: Annotated[int, Parameter(help="Stop after this many failures without progress.")] = 3,
    chain: Annotated[
        int | None,
        Parameter(help="For sites that requeue no job: submit this many jobs, each after the one before."),
    ] = None,
    shared: Annotated[bool, Parameter(negative=(), help="Let other jobs share the nodes.")] = False,
    preflight: Annotated[
        bool,
        Parameter(negative=(), help="Train nothing: check the nodes, and that their ranks reach each other."),
    ] = False,
    dry_run: Annotated[
        bool, Parameter(negative=(), help="Print the batch script, and submit nothing.")
    ] = False,
) -> None:
    """Submit a run to SLURM. It saves before its time limit, is requeued, and resumes until it is finished.

    Example: turnout submit small --run-dir runs/small --nodes 8 --gpus-per-node 8 --time 24:00:00
    """
    cfg = load_config(recipe, overrides)
    from turnout.launch.slurm.submit import SubmitOptions, submit_run

    options = SubmitOptions(
        run_dir=run_dir,
        nodes=nodes,
        time=time,
        gpus_per_node=gpus_per_node,
        ranks_per_node=ranks_per_node,
        allowed_changes=allow_change,
        sbatch_options=sbatch,
        srun_options=srun,
        env_file=env_file,
        warn_s=warn_s,
        max_failures=max_failures,
        chain=chain,
        is_shared=shared,
        is_preflight=preflight,
        is_dry=dry_run,
    )
    sys.exit(submit_run(cfg, options))


def status(
    run_dir: Annotated[
        Path | None, Parameter(help="The run directory; default: all your runs in the queue.")
    ] = None,
    /,
    *,
    verify: Annotated[
        bool, Parameter(negative=(), help="Also verify every byte of the newest checkpoint.")
    ] = False,
) -> None:
    """Show the state of a run: queue, step, loss, speed, time left, newest checkpoint and last failure.

    Example: turnout status runs/small --verify
    """
    from turnout.launch.commands.status import show_status

    show_status(run_dir, is_verified=verify)
