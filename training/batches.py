"""The micro-batches that each rank reads from the corpus in each step."""

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from turnout.data.corpus import Corpus
from turnout.data.loader import Batch, Loader, Prefetcher
from turnout.training.config.run import RunConfig
from turnout.training.parallel.layout import Layout

if TYPE_CHECKING:
    import torch  # slow, and not needed to inspect a corpus


def build_loader(cfg: RunConfig, corpus: Corpus) -> Loader:
    """Build the loader of a run's global batches."""
    return Loader(
        corpus,
        seq_len=cfg.model.seq_len,
        batch_seqs=cfg.batch_seqs,
        seed=cfg.data.seed,
        attend_across_documents=cfg.data.attend_across_documents,
    )


def prefetch(
    loader: Loader,
    cfg: RunConfig,
    layout: Layout,
    rank: int,
    *,
    start_step: int = 0,
    data_step_at: Callable[[int], int] = int,
) -> Prefetcher[list[Batch]]:
    """Load a rank's micro-batches of each step ahead of time. The step alone decides which samples it reads.

    data_step_at: returns the data step that a step reads; they are equal unless data has been left out.
    """
    per_rank, dp_rank = cfg.batch_seqs // layout.dp, layout.dp_rank(rank)
    mine = slice(dp_rank * per_rank, (dp_rank + 1) * per_rank)

    def load(step: int) -> list[Batch]:
        return split_microbatches(loader.batch(data_step_at(step), mine), cfg.train.microbatch_seqs)

    return Prefetcher(load, start_step, cfg.train.n_steps)


def to_device(batch: Batch, device: "torch.device") -> Batch:
    """Move tokens and targets [B, S] to the device; doc_ids stay on the host, where documents are found."""
    if device.type == "cpu":
        return batch
    return replace(
        batch,
        tokens=batch.tokens.to(device, non_blocking=True),
        targets=batch.targets.to(device, non_blocking=True),
    )


def split_microbatches(batch: Batch, microbatch_seqs: int) -> list[Batch]:
    """Split a rank's part of the batch into micro-batches of microbatch_seqs sequences."""
    n_seqs = batch.tokens.size(0)
    return [
        Batch(
            tokens=batch.tokens[i : i + microbatch_seqs],
            targets=batch.targets[i : i + microbatch_seqs],
            doc_ids=batch.doc_ids[i : i + microbatch_seqs],
            sample_ids=batch.sample_ids[i : i + microbatch_seqs],
        )
        for i in range(0, n_seqs, microbatch_seqs)
    ]
