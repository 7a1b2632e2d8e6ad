"""The `turnout` command with ranks of sabotaged_rank.py; everything else is as a user starts it."""

from functools import partial

import launch.train
from launch.cli import main
from launch.local import launch_ranks

if __name__ == "__main__":
    launch.train.launch_ranks = partial(launch_ranks, module="tests.distributed.sabotaged_rank")
    main()
