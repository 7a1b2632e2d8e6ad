"""One rank of a run, from its first line of log to its exit code. launch/ranks/worker.py starts it."""

import logging
import os
import sys
import threading
import traceback
import warnings
from functools import partial
from pathlib import Path

from turnout.launch.console import TrainConsole
from turnout.launch.exit_codes import DONE, OTHER
from turnout.launch.ranks.collective_check import check_collective
from turnout.launch.ranks.failures import record_failure, write_stack_at_end
from turnout.launch.ranks.parent import die_with_parent
from turnout.launch.run_dir import attachments, read_config
from turnout.training.loop import Observer, train
from turnout.training.parallel.flight_recorder import ENDED, FlightRecorder
from turnout.training.parallel.groups import join_groups, leave_groups, local_device
from turnout.training.parallel.layout import plan_layout
from turnout.training.run_control import FencingToken, write_status


def main() -> None:
    die_with_parent()
    run_dir, attempt_dir, rank = Path(sys.argv[1]), Path(sys.argv[2]), int(os.environ["RANK"])
    log_file = (run_dir / "logs" / f"rank-{rank:05d}.log").open("a", encoding="utf-8")
    stack_file = (attempt_dir / f"rank-{rank:05d}.stack").open("w", encoding="utf-8")
    write_stack_at_end(stack_file)
    logging.basicConfig(stream=log_file, format="%(asctime)s %(levelname)s %(message)s")
    logging.getLogger("turnout").setLevel(logging.INFO)
    # DeepSpeed calls collectives by names that torch deprecates; users can do nothing about it.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    # A library's thread (TensorBoard's writer) may fail without the run; its traceback belongs in the log.
    threading.excepthook = log_thread_failure
    try:
        run_rank(run_dir, attempt_dir, rank)
    # Even KeyboardInterrupt: the peers wait in a collective until this process is gone.
    except BaseException as err:
        code = OTHER
        try:
            code = record_failure(err, rank, attempt_dir)
        finally:
            # Not sys.exit: its clean-up joins threads and process groups, which may wait for peers without
            # end.
            os._exit(code)
    Path(stack_file.name).unlink()
    logging.shutdown()
    sys.stdout.flush()
    os._exit(DONE)  # the interpreter would take 0.7 s to tear its modules down


def log_thread_failure(failure: threading.ExceptHookArgs) -> None:
    name = failure.thread.name if failure.thread else "a thread"
    details = traceback.format_exception(failure.exc_type, failure.exc_value, failure.exc_traceback)
    logging.error("%s failed:\n%s", name, "".join(details))


def run_rank(run_dir: Path, attempt_dir: Path, rank: int) -> None:
    """Join the other ranks and train; only the first rank prints and writes the status."""
    cfg = read_config(run_dir)
    layout = plan_layout(cfg, int(os.environ["WORLD_SIZE"]))
    recorder = FlightRecorder(attempt_dir / f"rank-{rank:05d}.flight", layout, rank)
    groups = join_groups(layout, local_device(), timeout_s=cfg.parallel.timeout_s, recorder=recorder)
    check_collective(groups)
    fencing_token, attached = FencingToken.of_attempt(run_dir, attempt_dir), attachments(run_dir, cfg)
    train_rank = partial(
        train,
        cfg,
        run_dir,
        groups,
        fencing_token=fencing_token,
        attached=attached,
        attempt_dir=attempt_dir,
    )
    if groups.is_first:
        console = TrainConsole(cfg.train.n_steps)
        try:
            on_status = partial(write_status, attempt_dir)
            train_rank(Observer(console.on_row, console.on_text, console.on_event, on_status))
        finally:
            console.close()
    else:
        train_rank(None)
    groups.barrier()
    leave_groups()
    recorder.enter_phase(cfg.train.n_steps, ENDED)
