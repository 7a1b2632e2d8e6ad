"""Fit a run to the nodes that it gets. The global batch does not change, and so neither does the training.

tp and ep stay as the user set them. Data parallelism uses the remaining ranks, and micro-batches shrink if
they must.
"""

from turnout.training.config.run import RunConfig
from turnout.training.errors import ConfigError
from turnout.training.parallel.layout import divisors, plan_layout


def fit_to_nodes(cfg: RunConfig, n_nodes: int, ranks_per_node: int) -> tuple[int, RunConfig]:
    """Return the largest number of nodes, up to n_nodes, on which the run fits, and the config for them.

    Raises the ConfigError for all n_nodes if no number of them fits.
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

    Raises ConfigError if there is none, or if the layout does not fit for another reason.
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
