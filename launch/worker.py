"""One rank of a run: `python -m launch.worker RUN_DIR`, started by DeepSpeed's launcher with RANK and
WORLD_SIZE set.
"""

import faulthandler
import logging
import os
import sys
import traceback
import warnings
from pathlib import Path

from launch.console import TrainConsole
from launch.exit_codes import exit_code
from launch.run_dir import read_config
from training.config import ConfigError
from training.loop import Observer, train
from training.parallel import join_groups, leave_groups, local_device, plan_layout
from training.step import NonFiniteError


def main() -> None:
    run_dir, rank = Path(sys.argv[1]), int(os.environ["RANK"])
    log_path = run_dir / "logs" / f"rank-{rank:05d}.log"
    log_file = log_path.open("a", encoding="utf-8")
    logging.basicConfig(stream=log_file, format="%(asctime)s %(levelname)s %(message)s")
    logging.getLogger("turnout").setLevel(logging.INFO)
    # DeepSpeed calls collectives by names that torch is renaming; a user can do nothing about it.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    faulthandler.enable(log_file)
    try:
        run_rank(run_dir)
    except BaseException as err:  # whatever it is, the peers wait in a collective until this process is gone
        report_failure(err, rank, log_path)
        # Not sys.exit: its clean-up joins threads and process groups, which may wait for peers for ever.
        os._exit(exit_code(err))


def run_rank(run_dir: Path) -> None:
    cfg = read_config(run_dir)
    layout = plan_layout(cfg, int(os.environ["WORLD_SIZE"]))
    groups = join_groups(layout, local_device())
    if groups.is_first:
        console = TrainConsole(cfg.train.n_steps)
        try:
            train(cfg, run_dir, groups, Observer(console.on_row, console.on_text))
        finally:
            console.close()
    else:
        train(cfg, run_dir, groups, observer=None)
    groups.barrier()
    leave_groups()


def report_failure(err: BaseException, rank: int, log_path: Path) -> None:
    """Say on stderr in one line what ended this rank; the traceback of a surprise goes to its log."""
    logging.error("rank %d ended:\n%s", rank, "".join(traceback.format_exception(err)))
    is_expected = isinstance(err, ConfigError | NonFiniteError | OSError | ValueError)
    hint = "" if is_expected else f" ({type(err).__name__}; traceback in {log_path})"
    print(f"turnout: rank {rank}: {err}{hint}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
