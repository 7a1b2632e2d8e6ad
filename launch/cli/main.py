"""The `turnout` command: registers the commands of this folder and turns errors into exit codes.

The codes are in launch/exit_codes.py. An error that the user can cause ends in one line on stderr.
"""

import io
import os
import sys
from collections.abc import Sequence

from cyclopts import App, CycloptsError
from rich.console import Console

from turnout import __version__
from turnout.data.errors import DataError
from turnout.launch.cli import cluster, evaluate, export, generate, train
from turnout.launch.cli.checkpoint import checkpoint
from turnout.launch.exit_codes import BAD_CONFIG, DONE, OTHER, exit_code
from turnout.launch.ranks.launcher import thread_wait_settings
from turnout.launch.slurm.client import SlurmError
from turnout.training.errors import CheckpointError, ConfigError, ExportError, printable
from turnout.training.renames import COMMANDS

app = App(
    name="turnout",
    help="Pretrain Mixture-of-Experts language models; the parallel layout cannot change the result.",
    version=__version__,
    suppress_keyboard_interrupt=False,  # it would exit with 130; main reports the interrupt and exits with 1
)

for command in (
    train.prepare,
    train.train,
    cluster.submit,
    cluster.status,
    train.doctor,
    export.export,
    evaluate.evaluate,
    evaluate.lm_eval,
    evaluate.experts,
    generate.generate,
):
    app.command(command)
app.command(export.import_, name="import")
app.command(checkpoint)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command, and exit with its code. An error that the user can cause is one line on stderr."""
    # Before torch is imported, because its threads read them once.
    for name, value in thread_wait_settings().items():
        os.environ.setdefault(name, value)
    if isinstance(sys.stdout, io.TextIOWrapper):  # a locale's encoding may lack characters of the text
        sys.stdout.reconfigure(errors="backslashreplace")
    words = sys.argv[1:] if arguments is None else arguments
    if words and words[0] in COMMANDS:
        _fail(f"`turnout {words[0]}` is called `turnout {COMMANDS[words[0]]}` now", BAD_CONFIG)
    try:
        app(arguments, exit_on_error=False, print_error=False, console=Console(soft_wrap=True))
    except CycloptsError as err:
        _fail(f"{' '.join(str(err).split())} (`turnout --help` shows the usage)", BAD_CONFIG)
    except (CheckpointError, ConfigError, DataError) as err:
        _fail(str(err), exit_code(err))
    except (SlurmError, ExportError) as err:
        _fail(str(err), OTHER)
    except BrokenPipeError:
        # The reader of the pipe is gone. What is still buffered would fail again when Python exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(OTHER)
    except OSError as err:
        where = f"{err.filename}: " if err.filename else ""
        _fail(f"{where}{err.strerror or err}", OTHER)
    except KeyboardInterrupt:
        _fail("interrupted", OTHER)
    except (MemoryError, RuntimeError) as err:
        if not isinstance(err, MemoryError) and type(err).__name__ != "OutOfMemoryError":  # torch's own
            raise
        _fail(f"out of memory: {err}; use a smaller model or batch, or --device-map auto to generate", OTHER)
    sys.exit(DONE)


def _fail(message: str, code: int) -> None:
    # A message may quote a file from elsewhere, whose control characters must not reach the terminal.
    print(f"turnout: {printable(message, len(message))}", file=sys.stderr)
    sys.exit(code)
