"""How a run fits on the nodes it gets: the global batch stays, and with it every number of the run.

tp and ep are the user's; data parallelism takes the rest, and a micro-batch shrinks where it must.
"""

from turnout.training.config.run import RunConfig
from turnout.training.errors import ConfigError
from turnout.training.parallel.layout import divisors, plan_layout


def fit_to_nodes(cfg: RunConfig, n_nodes: int, ranks_per_node: int) -> tuple[int, RunConfig]:
    """Return how many of these nodes to use, the most that fit, and the config for them.

    Raises ConfigError, that of all nodes, where no number of them fits.
    """
    first: ConfigError | None = None
    for n in range(n_nodes, 0, -1):
        try:
            return n, fit_microbatch(cfg, n * ranks_per_node)
        except ConfigError as err:
            first = first or err
    assert first is not None
    raise first


def fit_microbatch(cfg: RunConfig, n_ranks: int) -> RunConfig:
    """Return the config with the largest micro-batch, up to its own, that divides the batch over n_ranks.

    Raises ConfigError where none does, or the layout does not fit otherwise.
    """
    wanted = cfg.train.microbatch_seqs
    error: ConfigError | None = None
    for microbatch_seqs in [wanted, *(d for d in reversed(divisors(wanted)) if d != wanted)]:
        changed = cfg.model_copy(
            update={"train": cfg.train.model_copy(update={"microbatch_seqs": microbatch_seqs})}
        )
        try:
            plan_layout(changed, n_ranks)
        except ConfigError as err:
            error = error or err
            continue
        return changed
    assert error is not None
    raise error
