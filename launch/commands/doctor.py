"""`turnout doctor`: what a config allows and experience advises against, and whether every layout agrees.

The user's own config is shrunk with its structure kept, trained by every layout of a few CPU ranks, and
compared by name with one plain process. Nothing of the user's is written.
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
from turnout.training.doctor.config_advice import Finding, lint
from turnout.training.doctor.layouts_to_try import list_variants, split_layouts
from turnout.training.doctor.shrink_config import shrink
from turnout.training.doctor.synthetic_batches import Order
from turnout.training.errors import ConfigError
from turnout.training.parallel.layout import Layout, name_ranks

# Files in the ranks' directory: what to compare, and a line for each variant that was.
PLAN, RESULTS = "doctor.json", "results.jsonl"
# Two sources that are soon seen whole, so that the order of several epochs is compared.
SYNTHETIC_ORDER = Order(n_samples_per_source=(37, 11), weights=(0.7, 0.3))
TABLE_WIDTH = 260  # where the output is no terminal


def examine(
    cfg: RunConfig,
    *,
    nproc: int,
    layouts: Sequence[str],
    worker: str = "turnout.launch.commands.doctor_worker",
) -> int:
    """Print findings and comparison; return the exit code. worker: the module that each rank runs."""
    console = Console(highlight=False, soft_wrap=True)
    print_findings(lint(cfg), console)
    chosen = choose_layouts(cfg, nproc, layouts, console)
    small = shrink(cfg, nproc)
    print_shrunk(small, nproc, console)
    print_replaced(cfg, small, console)
    directory = Path(tempfile.mkdtemp(prefix="turnout-doctor-"))
    (directory / "config.toml").write_text(to_toml(small), encoding="utf-8")
    plan = {"layouts": [asdict(layout) for layout in chosen], **asdict(order_of(cfg))}
    (directory / PLAN).write_text(json.dumps(plan), encoding="utf-8")
    # The ranks are CPU processes even where there are GPUs: fp32 is exact there, and no GPU is taken.
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    attempt_dir = make_attempt_dir(directory / "logs")
    ended = launch_ranks(directory, attempt_dir, this_machine(nproc), worker)
    results, reasons = read_results(directory), []
    if ended.is_done:
        shutil.rmtree(directory)
    else:
        reasons = explain_failures(attempt_dir, Layout(nproc), ended.stuck)[1]
        reasons.append(f"the ranks ended early; their logs are in {directory / 'logs'}")
    print_table(results, console)
    return conclude(results, reasons, n_wanted=len(list_variants(small, chosen)))


def choose_layouts(cfg: RunConfig, nproc: int, wanted: Sequence[str], console: Console) -> list[Layout]:
    """Return the layouts to compare: those asked for, or all that fit. Raises ConfigError."""
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
    """Read tp=2,ep=4; what is left out is 1. Raises ConfigError."""
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
    """Return what decides the order of samples: of the user's corpus where it is there, else made up."""
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


def print_findings(findings: Sequence[Finding], console: Console) -> None:
    for finding in findings:
        value = "unset" if finding.value is None else finding.value
        console.print(
            f"{finding.severity} {finding.rule}: {finding.path}={value}: {finding.reason}; {finding.remedy}",
            markup=False,
        )
    if not findings:
        console.print("no finding about the settings")


def print_shrunk(small: RunConfig, nproc: int, console: Console) -> None:
    model = small.model
    console.print(
        f"compared with one process at n_layers={model.n_layers} d_model={model.d_model} "
        f"n_heads={model.n_heads} n_kv_heads={model.n_kv_heads} n_experts={model.n_experts} "
        f"top_k={model.top_k} d_expert={model.d_expert} seq_len={model.seq_len}, "
        f"{small.batch_seqs} sequences per step, on {nproc} CPU ranks:"
    )
    if small.train.precision == "fp16":
        console.print("in fp32: CPUs do not compute in fp16, and its loss scaling skips steps at will")


def print_replaced(cfg: RunConfig, small: RunConfig, console: Console) -> None:
    """Say which expert backend is not compared, because it runs on GPUs only."""
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
    console.print(f"largest error allowed in fp32: {word_limits(LIMITS)}")
    if any(result["variant"].endswith(" bf16") for result in results):
        console.print(
            f"in bf16, where rows change experts at near ties, of a tensor's length along that in fp32: "
            f"{word_limits(HALF_LIMITS)}"
        )


def word_limits(limits: Mapping[str, float]) -> str:
    return ", ".join(f"{check} {limit:g}" for check, limit in limits.items())


def cell(check: dict[str, Any]) -> str:
    """Word one check: its worst error, and of several tensors the worst one's name."""
    worst = check["worst"]
    if worst is None:
        return "none"
    if worst["error"] == 0:
        return "same"
    name = f" {worst['name']}" if check["check"] == "gradient" else ""
    return f"{worst['error']:.1e}{name}"


def conclude(results: Sequence[dict[str, Any]], reasons: Sequence[str], *, n_wanted: int) -> int:
    """Say which tensor differs first at each variant, and return the exit code."""
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
