"""`turnout prepare`, `train` and `doctor` on the command line; launch/cli/main.py registers them."""

import sys
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from turnout.launch.ranks.hostfile import read_hosts
from turnout.launch.settings import load_config
from turnout.training.errors import ConfigError


def prepare(
    *inputs: Annotated[str, Parameter(help="PATH or NAME=PATH: a file, or a directory searched for files.")],
    out: Annotated[Path, Parameter(help="Directory of the corpus; run again after a kill to continue.")],
    embedded: Annotated[
        bool, Parameter(negative=(), help="Use this Python's standard library; needs no input.")
    ] = False,
    weight: Annotated[
        tuple[str, ...], Parameter(help="NAME=W, the share of a source in training; repeat for each source.")
    ] = (),
    tokenizer: Annotated[
        Path | None, Parameter(help="tokenizer.model or tokenizer.json to use; else one is trained.")
    ] = None,
    vocab_size: Annotated[
        int | None, Parameter(help="Tokens of the tokenizer that is trained; default: 32768.")
    ] = None,
    text_field: Annotated[
        str | None, Parameter(help="Field that holds the text in jsonl and parquet; default: text.")
    ] = None,
    valid_frac: Annotated[float, Parameter(help="Share of documents held out for evaluation.")] = 0.01,
    workers: Annotated[int | None, Parameter(help="Processes that tokenise; default: all cores.")] = None,
) -> None:
    """Turn text (txt, jsonl, parquet, also .gz .bz2 .xz .zst) into a tokenised corpus for `turnout train`.

    Example: turnout prepare web=crawl/ code=src.jsonl.zst --weight web=0.7 --weight code=0.3 --out
    corpora/mix
    """
    # Imported here because numpy and the tokenizers take time, and --help need not wait for them.
    from turnout.launch.commands.prepare import run_prepare

    run_prepare(
        inputs,
        out=out,
        embedded=embedded,
        weights=weight,
        tokenizer=tokenizer,
        vocab_size=vocab_size,
        text_field=text_field,
        valid_frac=valid_frac,
        workers=workers,
    )


def train(
    recipe: Annotated[str, Parameter(help="Name of a packaged recipe, or a TOML file.")],
    /,
    *,
    run_dir: Annotated[Path | None, Parameter(help="Directory of everything the run writes.")] = None,
    nproc: Annotated[
        int | None, Parameter(help="Ranks on this machine: one per GPU, or CPU processes; default: 1.")
    ] = None,
    hostfile: Annotated[
        Path | None,
        Parameter(help="Machines to train on, as lines NAME slots=RANKS; reached by pdsh and ssh."),
    ] = None,
    overrides: Annotated[
        tuple[str, ...], Parameter(name="--set", help="path=value, as in a recipe; repeat at will.")
    ] = (),
    resume: Annotated[
        bool,
        Parameter(
            negative=(),
            help="Go on from the newest intact checkpoint in --run-dir, or start where there is no run.",
        ),
    ] = False,
    allow_change: Annotated[
        tuple[str, ...],
        Parameter(
            help="With --resume, a setting that may differ from the run's, as optim.lr; repeat at will."
        ),
    ] = (),
    dry_run: Annotated[
        bool, Parameter(negative=(), help="Print what the run needs and start nothing.")
    ] = False,
) -> None:
    """Train a model by a recipe, on the ranks of this machine, or of those of a hostfile.

    Example: turnout train tiny --run-dir runs/first --nproc 2 --set train.n_steps=200 --resume
    """
    if nproc is not None and hostfile is not None:
        raise ConfigError(f"--nproc {nproc} has no effect with --hostfile, whose slots are ranks; drop it")
    hosts = None if hostfile is None else read_hosts(hostfile)
    nproc = hosts.slots if hosts is not None else 1 if nproc is None else nproc
    if nproc < 1:
        raise ConfigError(f"--nproc {nproc} must be at least 1; use the number of ranks to start")
    if allow_change and not resume:
        raise ConfigError(
            f"--allow-change {allow_change[0]} has no effect without --resume; add it, or drop this"
        )
    cfg = load_config(recipe, overrides)
    # Imported here, as below: a refusal need not wait for what a run needs, nor a run for the model.
    if dry_run:
        from turnout.launch.commands.dry_run import plan_run

        plan_run(cfg, nproc=nproc * (len(hosts.names) if hosts else 1))
        return
    if run_dir is None:
        raise ConfigError("--run-dir is required; name a new directory, for example --run-dir runs/first")
    from turnout.launch.commands.train import start_run

    code = start_run(
        cfg,
        run_dir=run_dir,
        nproc=nproc,
        is_resumed=resume,
        allowed_changes=allow_change,
        hosts=hosts,
    )
    sys.exit(code)


def doctor(
    recipe: Annotated[str, Parameter(help="Name of a packaged recipe, or a TOML file.")],
    /,
    *,
    nproc: Annotated[int, Parameter(help="CPU ranks to lay out; their divisors are tried.")] = 2,
    layouts: Annotated[
        tuple[str, ...],
        Parameter(help="Only these, as tp=2,ep=4; default: all that fit.", consume_multiple=True),
    ] = (),
    overrides: Annotated[
        tuple[str, ...], Parameter(name="--set", help="path=value, as in a recipe; repeat at will.")
    ] = (),
) -> None:
    """Look a config over, and see that every parallel layout trains it exactly as one process does.

    Example: turnout doctor tiny --nproc 4 --set model.balance.scope=batch --layouts tp=1,ep=4 tp=1,ep=2
    """
    if nproc < 1:
        raise ConfigError(f"--nproc {nproc} must be at least 1; use the number of ranks to lay out")
    cfg = load_config(recipe, overrides)
    from turnout.launch.commands.doctor import examine

    sys.exit(examine(cfg, nproc=nproc, layouts=layouts))
