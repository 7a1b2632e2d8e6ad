"""Each rank's share of a step: joined over ranks it is the global batch, sample by sample."""

from pathlib import Path

import pytest
import torch

from tests.runs import run_config
from tests.unit.data_fixtures import make_corpus, make_texts
from training.batches import build_loader, prefetch
from training.layout import Layout


@pytest.mark.parametrize(("dp", "microbatch_seqs"), [(1, 8), (1, 2), (2, 4), (2, 1), (4, 2)])
def test_ranks_together_see_the_same_samples_in_order(tmp_path: Path, dp: int, microbatch_seqs: int) -> None:
    corpus = make_corpus(tmp_path, {"text": make_texts(200)})
    cfg = run_config(train={"n_steps": 7, "microbatch_seqs": microbatch_seqs}, optim={"lr": 1})
    loader = build_loader(cfg, corpus)
    shares = [list(prefetch(loader, cfg, Layout(dp), rank)) for rank in range(dp)]
    for step in range(cfg.train.n_steps):
        microbatches = [mb for share in shares for mb in share[step][1]]
        assert all(share[step][0] == step for share in shares)
        assert {mb.tokens.size(0) for mb in microbatches} == {microbatch_seqs}
        whole = loader.batch(step)
        assert torch.cat([mb.sample_ids for mb in microbatches]).tolist() == whole.sample_ids.tolist()
        assert torch.equal(torch.cat([mb.tokens for mb in microbatches]), whole.tokens)
        assert torch.equal(torch.cat([mb.targets for mb in microbatches]), whole.targets)
