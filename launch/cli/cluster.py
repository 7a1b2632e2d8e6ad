"""`turnout submit` and `status` on the command line; launch/cli/main.py registers them."""

import sys
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from turnout.launch.settings import load_config


def submit(
    recipe: Annotated[str, Parameter(help="Name of a packaged recipe, or a TOML file.")],
    /,
    *,
    run_dir: Annotated[Path, Parameter(help="Directory of everything the run writes, seen by all nodes.")],
    nodes: Annotated[str, Parameter(help="How many nodes, as 8, or 4-8 to go on with what there is.")],
    time: Annotated[str, Parameter(help="Time limit of each life of the job, as 24:00:00.")] = "24:00:00",
    gpus_per_node: Annotated[int | None, Parameter(help="GPUs of each node, with one rank each.")] = None,
    ranks_per_node: Annotated[int | None, Parameter(help="CPU ranks of each node without GPUs.")] = None,
    overrides: Annotated[
        tuple[str, ...], Parameter(name="--set", help="path=value, as in a recipe; repeat at will.")
    ] = (),
    allow_change: Annotated[
        tuple[str, ...],
        Parameter(help="A setting that may differ from the run's, as optim.lr; repeat at will."),
    ] = (),
    sbatch: Annotated[
        tuple[str, ...], Parameter(help="An option for sbatch, as partition=gpu; repeat at will.")
    ] = (),
    srun: Annotated[
        tuple[str, ...],
        Parameter(help="An option for the ranks' srun, as container-image=turnout.sqsh; repeat at will."),
    ] = (),
    env_file: Annotated[Path | None, Parameter(help="Shell file of the site's own NCCL variables.")] = None,
    warn_s: Annotated[
        int, Parameter(help="Seconds before the time limit at which SLURM warns the job, at the latest.")
    ] = 300,
    max_failures: Annotated[int, Parameter(help="Failures without progress, after which the run stops.")] = 3,
    chain: Annotated[
        int | None, Parameter(help="Submit so many jobs, one after the other, where none may be requeued.")
    ] = None,
    shared: Annotated[bool, Parameter(negative=(), help="Leave other jobs room on the nodes.")] = False,
    preflight: Annotated[
        bool, Parameter(negative=(), help="Only check the nodes, and that their ranks reach one another.")
    ] = False,
    dry_run: Annotated[bool, Parameter(negative=(), help="Print the batch script, submit nothing.")] = False,
) -> None:
    """Submit a run to SLURM; it saves before its limit, is requeued, and goes on until it is finished.

    Example: turnout submit small --run-dir runs/small --nodes 8 --gpus-per-node 8 --time 24:00:00
    """
    cfg = load_config(recipe, overrides)
    from turnout.launch.slurm.submit import Wanted, submit_run

    wanted = Wanted(
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
    sys.exit(submit_run(cfg, wanted))


def status(
    run_dir: Annotated[
        Path | None, Parameter(help="What --run-dir named; default: all in the queue.")
    ] = None,
    /,
    *,
    verify: Annotated[bool, Parameter(negative=(), help="Read every byte of the newest checkpoint.")] = False,
) -> None:
    """Show where a run stands: queue, step, loss, speed, time to the end, checkpoint and last failure.

    Example: turnout status runs/small --verify
    """
    from turnout.launch.commands.status import show_status

    show_status(run_dir, is_verified=verify)
