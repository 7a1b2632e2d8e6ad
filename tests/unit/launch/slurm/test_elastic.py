"""How a run is fitted to the nodes that it gets; the global batch never changes."""

import pytest

from tests.runs import run_config
from turnout.launch.slurm.elastic import fit_to_nodes
from turnout.training.errors import ConfigError
from turnout.training.parallel.layout import plan_layout


def test_all_nodes_are_used_if_the_run_fits_on_them() -> None:
    cfg = run_config(train={"batch_tokens": 96, "microbatch_seqs": 2})  # 8 sequences
    assert fit_to_nodes(cfg, 2, 2) == (2, cfg)


def test_a_microbatch_shrinks_before_a_node_is_left_out() -> None:
    cfg = run_config(train={"batch_tokens": 96, "microbatch_seqs": 4})
    n_nodes, fitted = fit_to_nodes(cfg, 4, 2)
    assert n_nodes == 4 and fitted.train.microbatch_seqs == 1
    assert fitted.train.batch_tokens == cfg.train.batch_tokens
    plan_layout(fitted, 8)


def test_nodes_that_do_not_divide_the_batch_are_left_out() -> None:
    cfg = run_config(train={"batch_tokens": 96, "microbatch_seqs": 2})
    assert fit_to_nodes(cfg, 3, 2)[0] == 2
    assert fit_to_nodes(cfg, 7, 1)[0] == 4


def test_expert_parallelism_stays_as_the_user_set_it() -> None:
    cfg = run_config(parallel={"ep": 6}, train={"batch_tokens": 144, "microbatch_seqs": 2})
    assert fit_to_nodes(cfg, 5, 2)[0] == 3, "6 ranks, the largest number that ep=6 divides"
    with pytest.raises(ConfigError, match=r"parallel\.ep=6 must divide world_size=4"):
        fit_to_nodes(cfg, 2, 2)
