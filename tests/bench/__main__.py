"""`make bench`: speed and memory as ratios to baselines measured in turn, in one table.

python -m tests.bench [NAME ...] [--out FILE]: without a name, the benchmarks of the expert layer, of the
training step and of its parts, in about 50 minutes.
"""

import argparse
import sys
import time
from pathlib import Path

from tests.bench.rows import Row, to_markdown
from tests.bench.side_by_side import call, in_own_process
from turnout.launch.ranks.launcher import CPU_ALLOCATOR

# Each names a function that returns rows.
DEFAULT = {
    "experts": "tests.bench.experts:expert_rows",
    "scaling": "tests.bench.scaling:scaling_rows",
    "loss": "tests.bench.loss:loss_rows",
    "step": "tests.bench.step:step_rows",
    "engine": "tests.bench.engine:engine_rows",
    "ranks": "tests.bench.ranks:rank_rows",
    "mfu": "tests.bench.mfu:mfu_rows",
}
OTHERS = {
    "prepare": "tests.bench.command:prepare_rows",
    "training": "tests.bench.command:training_rows",
    "busy": "tests.bench.command:busy_rows",
    "layouts": "tests.bench.command:layout_rows",
    "start-up": "tests.bench.start_up:start_up_rows",
    "self-check": "tests.bench.self_check:self_check_rows",
    "checkpoints": "tests.bench.checkpoints:checkpoint_rows",
    "generate": "tests.bench.generate:generation_rows",
    "step-memory": "tests.bench.step_memory:step_memory_rows",
    "export-memory": "tests.bench.export_memory:export_memory_rows",
}
BENCHMARKS = DEFAULT | OTHERS


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(BENCHMARKS)}")
    parser.add_argument("--out", type=Path, help="also write the table to this file")
    arguments = parser.parse_args()
    if unknown := [name for name in arguments.names if name not in BENCHMARKS]:
        parser.error(f"no benchmark {', '.join(unknown)}; there are {', '.join(BENCHMARKS)}")
    found: dict[str, list[Row]] = {}
    try:
        for name in arguments.names or DEFAULT:
            start_s = time.monotonic()
            found[name] = in_own_process(call, BENCHMARKS[name], malloc=CPU_ALLOCATOR)
            print(f"{name}: {time.monotonic() - start_s:.0f} s", file=sys.stderr, flush=True)
    finally:  # if one fails, the results of those before it are kept
        table = to_markdown(found)
        print(table, end="")
        if arguments.out is not None:
            arguments.out.write_text(table, encoding="utf-8")


if __name__ == "__main__":
    main()
