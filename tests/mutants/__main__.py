"""`python -m tests.mutants [--jobs N] [TEXT...]`: break the code in one place, run the tests that must fail.

The tables beside this file list the breaks: a text in a file, its replacement, and the tests. TEXT selects
those whose area or name contains it. Exit code 1 if a break survives, 2 if one no longer applies.
"""

import argparse
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.mutants.table import read_mutants
from tests.mutants.trial import Result, Trials

ROOT = Path(__file__).parents[2]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__)
    parser.add_argument("text", nargs="*", help="only mutants whose area or name contains one of these")
    parser.add_argument(
        "--jobs", type=int, default=2, help="trials at once, each in its own copy of the tree"
    )
    arguments = parser.parse_args()
    mutants = [m for m in read_mutants() if m.matches(arguments.text)]
    if not mutants:
        print(f"no mutant's area or name contains {' or '.join(arguments.text)}", file=sys.stderr)
        return 2
    start_s = time.monotonic()
    with Trials(ROOT, arguments.jobs) as trials:
        if failed := trials.check_unbroken(mutants):
            print(f"tests that fail without a mutant prove nothing:\n{failed}", file=sys.stderr)
            return 2
        results = list(ThreadPoolExecutor(arguments.jobs).map(lambda m: report(trials.run(m)), mutants))
    return summarise(results, time.monotonic() - start_s)


def report(result: Result) -> Result:
    print(f"{result.verdict:12} {result.seconds:5.0f} s  {result.mutant}", flush=True)
    return result


def summarise(results: list[Result], elapsed_s: float) -> int:
    """Print what survived and what no longer applies; return the exit code."""
    survivors = [r for r in results if r.verdict == "survived"]
    broken = [r for r in results if r.verdict == "not applied"]
    for result in (*survivors, *broken):
        print(f"\n{result.mutant} {result.verdict}: {result.detail}")
    areas = sorted({r.mutant.area for r in results})
    print(f"\n{'area':24} mutants  killed")
    for area in areas:
        here = [r for r in results if r.mutant.area == area]
        print(f"{area:24} {len(here):7} {sum(r.verdict == 'killed' for r in here):7}")
    n_killed = len(results) - len(survivors) - len(broken)
    print(
        f"{len(results)} mutants in {elapsed_s / 60:.1f} minutes: {n_killed} killed, "
        f"{len(survivors)} survived, {len(broken)} no longer apply"
    )
    return 2 if broken else 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
