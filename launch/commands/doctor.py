"""`turnout doctor`: advice on a config's settings, and a check that every parallel layout trains the same.

The user's config is shrunk with its structure kept, trained under every layout of a few CPU ranks, and each
tensor is compared by name with that of one plain process. Files are written to a temporary directory only.
"""

import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from turnout.data.corpus import open_corpus
from turnout.launch.exit_codes import DONE, OTHER
from turnout.launch.ranks.attempt_dir import make_attempt_dir
from turnout.launch.ranks.failures import explain_failures
from turnout.launch.ranks.launcher import launch_ranks, this_machine
from turnout.launch.settings import to_toml
from turnout.training.batches import build_loader
from turnout.training.config.run import RunConfig
from turnout.training.doctor.compare import CHECKS, HALF_LIMITS, LIMITS
from turnout.training.doctor.config_advice import Advice, lint
from turnout.training.doctor.layouts_to_try import list_variants, split_layouts
from turnout.training.doctor.shrink_config import shrink
from turnout.training.doctor.synthetic_batches import Order
from turnout.training.errors import ConfigError
from turnout.training.parallel.layout import Layout, name_ranks

# Files in the ranks' directory: what to compare, and a line for each variant compared.
PLAN, RESULTS = "doctor.json", "results.jsonl"
# Two sources so small that the comparison covers the order of several epochs.
SYNTHETIC_ORDER = Order(n_samples_per_source=(37, 11), weights=(0.7, 0.3))
TABLE_WIDTH = 260  # where the output is no terminal


def examine(
    cfg: RunConfig,
    *,
    nproc: int,
    layouts: Sequence[str],
    worker: str = "turnout.launch.commands.doctor_worker",
) -> int:
    """Print the advice and the comparison; return the exit code. worker: the module that each rank runs."""
    console = Console(highlight=False, soft_wrap=True)
    print_advice(lint(cfg), console)
    chosen = choose_layouts(cfg, nproc, layouts, console)
    small = shrink(cfg, nproc)
    print_shrunk(small, nproc, console)
    print_replaced(cfg, small, console)
    directory = Path(tempfile.mkdtemp(prefix="turnout-doctor-"))
    (directory / "config.toml").write_text(to_toml(small), encoding="utf-8")
    plan = {"layouts": [asdict(layout) for layout in chosen], **asdict(order_of(cfg))}
    (directory / PLAN).write_text(json.dumps(plan), encoding="utf-8")
    # The ranks are CPU processes even on a machine with GPUs: on CPUs fp32 is exact, and no GPU is occupied.
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    attempt_dir = make_attempt_dir(directory / "logs")
    ended = launch_ranks(directory, attempt_dir, this_machine(nproc), worker)
    results, reasons = read_results(directory), []
    if ended.is_done:
        shutil.rmtree(directory)
    else:
        reasons = explain_failures(attempt_dir, Layout(nproc), ended.stuck)[1]
        reasons.append(f"the ranks ended early; see their logs in {directory / 'logs'}")
    print_table(results, console)
    return conclude(results, reasons, n_wanted=len(list_variants(small, chosen)))


def choose_layouts(cfg: RunConfig, nproc: int, wanted: Sequence[str], console: Console) -> list[Layout]:
    """Return the layouts to compare: the requested ones, or all that fit.

    Raises ConfigError where a requested layout does not fit.
    """
    fitting, refused = split_layouts(cfg, nproc)
    if wanted:
        chosen = [parse_layout(text, nproc) for text in wanted]
        for text, layout in zip(wanted, chosen, strict=True):
            if layout in refused:
                raise ConfigError(f"--layouts {text}: parallel.{refused[layout]}; leave it out")
        return list(dict.fromkeys(chosen))
    for reason in dict.fromkeys(refused.values()):
        console.print(f"not compared: {reason}")
    return fitting


def parse_layout(text: str, nproc: int) -> Layout:
    """Parse tp=2,ep=4; an omitted size is 1. Raises ConfigError."""
    sizes: dict[str, int] = {}
    for part in text.split(","):
        match = re.fullmatch(r"(tp|ep)=([1-9][0-9]*)", part)
        if match is None or match[1] in sizes:
            raise ConfigError(
                f"--layouts {text!r} is not tp=N,ep=N; for example --layouts tp=2,ep=4 tp=1,ep=2"
            )
        sizes[match[1]] = int(match[2])
    return Layout(nproc, **sizes)


def order_of(cfg: RunConfig) -> Order:
    """Return what decides the order of samples: from the user's corpus if it exists, else synthetic."""
    path = Path(cfg.data.corpus)
    if not path.exists():
        return SYNTHETIC_ORDER
    corpus = open_corpus(path, verify="size")
    n_samples = build_loader(cfg, corpus).n_samples_per_source
    return Order(tuple(n_samples), tuple(stream.weight for stream in corpus.split("train")))


def read_results(directory: Path) -> list[dict[str, Any]]:
    path = directory / RESULTS
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def print_advice(advice: Sequence[Advice], console: Console) -> None:
    for one in advice:
        value = "unset" if one.value is None else one.value
        console.print(
            f"{one.severity} {one.rule}: {one.path}={value}: {one.reason}; {one.remedy}", markup=False
        )
    if not advice:
        console.print("no advice about the settings")


def print_shrunk(small: RunConfig, nproc: int, console: Console) -> None:
    model = small.model
    console.print(
        f"compared with one process at n_layers={model.n_layers} d_model={model.d_model} "
        f"n_heads={model.n_heads} n_kv_heads={model.n_kv_heads} n_experts={model.n_experts} "
        f"top_k={model.top_k} d_expert={model.d_expert} seq_len={model.seq_len}, "
        f"{small.batch_seqs} sequences per step, on {nproc} CPU ranks:"
    )
    if small.train.precision == "fp16":
        console.print("in fp32: CPUs do not compute in fp16, whose loss scaling would also skip steps")


def print_replaced(cfg: RunConfig, small: RunConfig, console: Console) -> None:
    """Print which expert backend is compared in place of one that runs on GPUs only."""
    wanted, compared = cfg.train.expert_backend, small.train.expert_backend
    if wanted != compared:
        console.print(f"experts by train.expert_backend={compared}, because {wanted} needs a GPU")


def print_table(results: Sequence[dict[str, Any]], console: Console) -> None:
    """Print a row for each variant: the largest relative error of each check, and the verdict."""
    table = Table("variant", *CHECKS, "verdict")
    for result in results:
        cells = [cell(check) for check in result["checks"]]
        differs = any(check["n_different"] for check in result["checks"])
        table.add_row(result["variant"], *cells, "DIFFERS" if differs else "agrees")
    if not results:
        return
    width = None if console.is_terminal else TABLE_WIDTH
    Console(highlight=False, width=width).print(table)
    console.print(f"largest error allowed in fp32: {format_limits(LIMITS)}")
    if any(result["variant"].endswith(" bf16") for result in results):
        console.print(
            "largest error allowed in bf16, of a tensor's length along its fp32 counterpart (near-ties send "
            f"rows to other experts): {format_limits(HALF_LIMITS)}"
        )


def format_limits(limits: Mapping[str, float]) -> str:
    return ", ".join(f"{check} {limit:g}" for check, limit in limits.items())


def cell(check: dict[str, Any]) -> str:
    """Format one check: its worst error, and for gradients the name of the worst tensor."""
    worst = check["worst"]
    if worst is None:
        return "none"
    if worst["error"] == 0:
        return "same"
    name = f" {worst['name']}" if check["check"] == "gradient" else ""
    return f"{worst['error']:.1e}{name}"


def conclude(results: Sequence[dict[str, Any]], reasons: Sequence[str], *, n_wanted: int) -> int:
    """Print which tensor differs first in each variant, and return the exit code."""
    n_different = 0
    for result in results:
        check = next((check for check in result["checks"] if check["n_different"]), None)
        if check is None:
            continue
        n_different += 1
        first = check["first"]
        print(
            f"turnout: {result['variant']}: {check['check']}: {first['name']} {first['detail']} "
            f"({check['n_different']} of {check['n_tensors']} differ, on {name_ranks(check['ranks'])})",
            file=sys.stderr,
        )
    for reason in reasons:
        print(f"turnout: {reason}", file=sys.stderr)
    if len(results) < n_wanted:
        print(f"turnout: only {len(results)} of {n_wanted} variants could be compared", file=sys.stderr)
    if n_different:
        print(f"turnout: {n_different} of {len(results)} variants differ from one process", file=sys.stderr)
    if n_different or len(results) < n_wanted:
        return OTHER
    print(f"all {len(results)} variants agree with one process")
    return DONE
