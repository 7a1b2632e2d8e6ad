"""The `turnout` command with ranks of sabotaged_rank.py; everything else is as for a user."""

from functools import partial

import turnout.launch.commands.train
from turnout.launch.cli.main import main
from turnout.launch.ranks.launcher import launch_ranks

if __name__ == "__main__":
    turnout.launch.commands.train.launch_ranks = partial(
        launch_ranks, module="tests.distributed.runs.sabotaged_rank"
    )
    main()
