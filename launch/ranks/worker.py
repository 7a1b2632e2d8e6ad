"""One rank of a run: `python -m turnout.launch.ranks.worker RUN_DIR ATTEMPT_DIR`.

DeepSpeed's launcher starts it and sets RANK and WORLD_SIZE. This module only imports launch/ranks/rank.py,
with garbage collection off: collecting while modules are imported takes 0.4 s and finds nothing.
"""

import gc
import importlib


def main() -> None:
    gc.disable()
    rank = importlib.import_module("turnout.launch.ranks.rank")
    gc.freeze()  # so that later collections skip the modules, too
    gc.enable()
    rank.main()


if __name__ == "__main__":
    main()
