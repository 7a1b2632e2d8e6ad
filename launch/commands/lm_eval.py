"""`turnout lm-eval`: run tasks of the lm-evaluation-harness on a saved model."""

import difflib
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Column, Table

from turnout.data.errors import DataError
from turnout.data.files import write_atomically
from turnout.launch.arguments import check_at_least, check_out_file
from turnout.launch.console import print_table
from turnout.launch.models import DType
from turnout.training.errors import CheckpointError, ConfigError, printable


def run_lm_eval(
    path: Path,
    *,
    tasks: str,
    include_path: Path | None,
    limit: int | None,
    num_fewshot: int | None,
    microbatch_seqs: int,
    dtype: DType,
    out: Path | None,
) -> None:
    """Evaluate tasks and print their metrics. Raises ConfigError, DataError or CheckpointError."""
    check_at_least(1, {"--limit": limit, "--microbatch-seqs": microbatch_seqs})
    check_at_least(0, {"--num-fewshot": num_fewshot})
    check_out_file(out, (".json",))
    names = [name.strip() for name in tasks.split(",") if name.strip()]
    if not names:
        raise ConfigError(f"--tasks {tasks!r} names no task; write for example --tasks arc_easy,hellaswag")
    if include_path is not None and not include_path.is_dir():
        raise ConfigError(
            f"--include-path {include_path} is not a directory; name the one with the tasks' YAML files"
        )
    try:
        # Imported here because they are an optional dependency.
        import lm_eval
        from lm_eval.utils import handle_non_serializable

        from turnout.launch.lm_eval_model import TurnoutLM
    except ModuleNotFoundError as err:
        raise ConfigError(
            f"turnout lm-eval needs the module {err.name}; pip install 'turnout[lm-eval]'"
        ) from err
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    manager, loaded = _load_tasks(names, include_path)
    model = TurnoutLM(path, dtype=dtype, batch_size=microbatch_seqs)
    try:
        results = lm_eval.simple_evaluate(
            model=model, tasks=loaded, limit=limit, num_fewshot=num_fewshot, task_manager=manager
        )
    except (CheckpointError, ConfigError, DataError):
        raise
    # An error in the task's own code or options.
    except (ArithmeticError, LookupError, TypeError, ValueError) as err:
        raise DataError(f"--tasks {tasks}: {type(err).__name__}: {err}; fix the task or its options") from err
    if out is not None:  # before anything is printed, because stdout may be a closed pipe
        text = json.dumps(results, indent=1, default=handle_non_serializable, ensure_ascii=False)
        write_atomically(out, (text + "\n").encode())
    _print_results(results)
    if out is not None:
        print(f"results and samples: {out}")


def _print_results(results: dict[str, Any]) -> None:
    """Print a row for each metric of each task or group; lm_eval keys them as "acc,none"."""
    table = Table("task", "metric", "filter", *(Column(c, justify="right") for c in ("value", "stderr", "n")))
    for task, metrics in (results["results"] | results.get("groups", {})).items():
        n_samples = results.get("n-samples", {}).get(task, {}).get("effective", "")
        for key, value in metrics.items():
            metric, comma, filter_name = key.partition(",")
            if not comma or metric.endswith("_stderr"):
                continue
            numbers = (value, metrics.get(f"{metric}_stderr,{filter_name}"))
            words = [f"{number:.4f}" if isinstance(number, float) else "" for number in numbers]
            table.add_row(printable(task), metric, filter_name, *words, str(n_samples))
    print_table(table)


def _load_tasks(names: Sequence[str], include_path: Path | None) -> tuple[Any, list[Any]]:
    """Return lm_eval's TaskManager, and the tasks and groups of these names, with their data loaded."""
    from lm_eval.tasks import TaskManager

    def manager(has_defaults: bool) -> TaskManager:
        where = None if include_path is None else str(include_path)
        return TaskManager(include_path=where, include_defaults=has_defaults)

    try:
        found = manager(False) if include_path is not None else None
        # Reading the YAML files of lm_eval's ten thousand tasks takes a while.
        if found is None or not {*names} <= {*found.all_tasks}:
            found = manager(True)
        for name in names:
            if name not in found.all_tasks:
                nearest = difflib.get_close_matches(name, found.all_tasks, n=3)
                way_out = (
                    f"did you mean {' or '.join(nearest)}?" if nearest else "`lm-eval ls tasks` lists them"
                )
                raise ConfigError(f"--tasks {name}: no such task; {way_out}")
        loaded = found.load(list(names))
    except ConfigError:
        raise
    except Exception as err:  # any error in the task's YAML, code or data
        reason = f"{type(err).__name__}: {err}".splitlines()[0]
        raise DataError(f"--tasks {','.join(names)}: cannot be loaded ({reason}); fix the task") from err
    inner = {name for children in (loaded["group_map"] or {}).values() for name in children}
    items = {**loaded["groups"], **loaded["tasks"]}
    return found, [item for name, item in items.items() if name not in inner]
