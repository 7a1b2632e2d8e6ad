"""One rank of `turnout doctor`, launched like a rank of a run.

    python -m turnout.launch.commands.doctor_worker DIR ATTEMPT_DIR

The same processes run all variants, because starting processes costs most of the time. Each rank compares its
own tensors with those of one process; the first rank writes the findings of all.
"""

import json
import logging
import os
import sys
import warnings
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist

from turnout.launch.commands.doctor import PLAN, RESULTS
from turnout.launch.console import LiveBar
from turnout.launch.ranks.failures import record_failure
from turnout.launch.ranks.parent import die_with_parent
from turnout.launch.run_dir import read_config
from turnout.training.doctor.compare import Comparison, compare
from turnout.training.doctor.layouts_to_try import list_variants
from turnout.training.doctor.parity import find_steady_batches, train_by_engine
from turnout.training.doctor.synthetic_batches import Order, SyntheticLoader
from turnout.training.parallel.flight_recorder import NullRecorder
from turnout.training.parallel.groups import Groups, join_groups, leave_groups
from turnout.training.parallel.layout import Layout

TIMEOUT_S = 60  # for one collective; the models are tiny, so a rank that takes longer hangs


def main() -> None:
    die_with_parent()
    directory, rank = Path(sys.argv[1]), int(os.environ["RANK"])
    logging.basicConfig(filename=directory / "logs" / f"rank-{rank:05d}.log")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    torch.set_num_threads(1)
    try:
        compare_all(directory)
    except BaseException as err:  # the peers wait in a collective until this process exits
        os._exit(record_failure(err, rank, Path(sys.argv[2])))


def compare_all(directory: Path) -> None:
    """Run every variant on these ranks, and write one line of findings for each."""
    cfg, plan = read_config(directory), json.loads((directory / PLAN).read_text(encoding="utf-8"))
    layouts = [Layout(**layout) for layout in plan["layouts"]]
    order = Order(tuple(plan["n_samples_per_source"]), tuple(plan["weights"]))
    known = {
        layouts[0]: join_groups(layouts[0], torch.device("cpu"), timeout_s=TIMEOUT_S, recorder=NullRecorder())
    }
    rank = known[layouts[0]].rank
    seed, want = find_steady_batches(cfg, order)
    loader = SyntheticLoader(cfg, order, seed)
    variants = list_variants(cfg, layouts)
    bar = LiveBar("comparing", len(variants)) if rank == 0 else None
    for n_done, variant in enumerate(variants, 1):
        if variant.layout not in known:
            known[variant.layout] = Groups(variant.layout, rank, torch.device("cpu"), timeout_s=TIMEOUT_S)
        try:
            got = train_by_engine(variant.apply(cfg), known[variant.layout], loader)
            found = gather(compare(got, want, is_half=variant.precision == "bf16"))
        except Exception as err:
            err.add_note(str(variant))
            raise
        if bar is not None:
            with (directory / RESULTS).open("a", encoding="utf-8") as file:
                file.write(json.dumps({"variant": str(variant), "checks": found}) + "\n")
            verdict = "differs" if any(check["n_different"] for check in found) else "agrees"
            bar.update(n_done, str(variant))
            if not bar.is_live:
                bar.print_line(f"{n_done}/{len(variants)}  {variant}  {verdict}")
    if bar is not None:
        bar.close()
    dist.barrier()
    leave_groups()


def gather(own: list[Comparison]) -> list[dict[str, object]]:
    """Return each check as seen by the rank that differs most, with the ranks on which it differs."""
    of_ranks: list[list[Comparison]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(of_ranks, own)
    return merge(of_ranks)


def merge(of_ranks: list[list[Comparison]]) -> list[dict[str, object]]:
    merged = []
    for comparisons in zip(*of_ranks, strict=True):
        ranks = [rank for rank, comparison in enumerate(comparisons) if comparison.n_different]
        worst = max(comparisons, key=lambda c: (c.n_different, c.worst.error if c.worst else 0.0))
        merged.append({**asdict(worst), "ranks": ranks})
    return merged


if __name__ == "__main__":
    main()
