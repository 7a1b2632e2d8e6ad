"""One rank of a run: `python -m launch.worker RUN_DIR`, started by DeepSpeed's launcher with RANK and
WORLD_SIZE set.
"""

import faulthandler
import logging
import os
import sys
import threading
import traceback
import warnings
from pathlib import Path

from launch.console import TrainConsole
from launch.failures import record_failure
from launch.local import die_with_parent
from launch.run_dir import read_config
from training.loop import Observer, train
from training.parallel import join_groups, leave_groups, local_device, plan_layout


def main() -> None:
    die_with_parent()
    run_dir, rank = Path(sys.argv[1]), int(os.environ["RANK"])
    log_file = (run_dir / "logs" / f"rank-{rank:05d}.log").open("a", encoding="utf-8")
    logging.basicConfig(stream=log_file, format="%(asctime)s %(levelname)s %(message)s")
    logging.getLogger("turnout").setLevel(logging.INFO)
    # DeepSpeed calls collectives by names that torch is renaming; a user can do nothing about it.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    faulthandler.enable(log_file)
    # Libraries' threads (TensorBoard's writer) fail apart from the run; their tracebacks belong in the log.
    threading.excepthook = log_thread_failure
    try:
        run_rank(run_dir)
    except BaseException as err:  # whatever it is, the peers wait in a collective until this process is gone
        # Not sys.exit: its clean-up joins threads and process groups, which may wait for peers for ever.
        os._exit(record_failure(err, rank, run_dir / "logs"))


def log_thread_failure(failure: threading.ExceptHookArgs) -> None:
    name = failure.thread.name if failure.thread else "a thread"
    details = traceback.format_exception(failure.exc_type, failure.exc_value, failure.exc_traceback)
    logging.error("%s failed:\n%s", name, "".join(details))


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


if __name__ == "__main__":
    main()
