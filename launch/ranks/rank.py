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
from turnout.launch.ranks.failures import leave_stack_behind, record_failure
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
    leave_stack_behind(stack_file)
    logging.basicConfig(stream=log_file, format="%(asctime)s %(levelname)s %(message)s")
    logging.getLogger("turnout").setLevel(logging.INFO)
    # DeepSpeed calls collectives by names that torch is renaming; a user can do nothing about it.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    # Libraries' threads (TensorBoard's writer) fail apart from the run; their tracebacks belong in the log.
    threading.excepthook = log_thread_failure
    try:
        run_rank(run_dir, attempt_dir, rank)
    except BaseException as err:  # whatever it is, the peers wait in a collective until this process is gone
        code = OTHER
        try:
            code = record_failure(err, rank, attempt_dir)
        finally:
            # Not sys.exit: its clean-up joins threads and process groups, which may wait for peers for ever.
            os._exit(code)
    Path(stack_file.name).unlink()
    logging.shutdown()
    sys.stdout.flush()
    os._exit(DONE)  # the interpreter would take 0.7 s to take its modules apart


def log_thread_failure(failure: threading.ExceptHookArgs) -> None:
    name = failure.thread.name if failure.thread else "a thread"
    details = traceback.format_exception(failure.exc_type, failure.exc_value, failure.exc_traceback)
    logging.error("%s failed:\n%s", name, "".join(details))


def run_rank(run_dir: Path, attempt_dir: Path, rank: int) -> None:
    cfg = read_config(run_dir)
    layout = plan_layout(cfg, int(os.environ["WORLD_SIZE"]))
    recorder = FlightRecorder(attempt_dir / f"rank-{rank:05d}.flight", layout, rank)
    groups = join_groups(layout, local_device(), timeout_s=cfg.parallel.timeout_s, recorder=recorder)
    check_collective(groups)
    fencing_token, attached = FencingToken.of_attempt(run_dir, attempt_dir), attachments(run_dir, cfg)
    if groups.is_first:
        console = TrainConsole(cfg.train.n_steps)
        try:
            on_status = partial(write_status, attempt_dir)
            observer = Observer(console.on_row, console.on_text, console.on_event, on_status)
            train(
                cfg,
                run_dir,
                groups,
                observer,
                fencing_token=fencing_token,
                attached=attached,
                attempt_dir=attempt_dir,
            )
        finally:
            console.close()
    else:
        train(
            cfg,
            run_dir,
            groups,
            None,
            fencing_token=fencing_token,
            attached=attached,
            attempt_dir=attempt_dir,
        )
    groups.barrier()
    leave_groups()
    recorder.enter_phase(cfg.train.n_steps, ENDED)
