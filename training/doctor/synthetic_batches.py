"""Synthetic batches for comparisons: random tokens, unequal masks and documents, in the order of a corpus."""

from dataclasses import dataclass

import torch

from turnout.data.loader import IGNORE_INDEX, SOURCE_BIT, Batch, Loader
from turnout.data.order import Blend, sample_ids
from turnout.training.config.run import RunConfig


@dataclass(frozen=True)
class Order:
    """Sizes and weights of a corpus's sources; together with a seed they determine the order of samples."""

    n_samples_per_source: tuple[int, ...]
    weights: tuple[float, ...]


class SyntheticLoader(Loader):
    """Serves random tokens under the sample ids that training would read at the same step.

    Sequences keep different fractions of their targets and hold two documents with varying borders, so that
    ranks and micro-batches have unequal numbers of targets.
    """

    def __init__(self, cfg: RunConfig, order: Order, seed: int) -> None:
        self._cfg, self._order, self._seed = cfg, order, seed
        self._blend = Blend(order.weights)

    def batch(self, step: int, rows: slice | None = None) -> Batch:
        """Return the batch of a step, or some of its sequences."""
        cfg, chosen = self._cfg, slice(None) if rows is None else rows
        source_ids, sample_idx, _ = sample_ids(
            step,
            n_samples_per_source=self._order.n_samples_per_source,
            blend=self._blend,
            batch_seqs=cfg.batch_seqs,
            seed=cfg.data.seed,
        )
        generator = torch.Generator().manual_seed(1000 * self._seed + step)
        n_seqs, seq_len = cfg.batch_seqs, cfg.model.seq_len
        stream = torch.randint(cfg.model.vocab_size, (n_seqs, seq_len + 1), generator=generator)
        targets = stream[:, 1:].clone()
        kept_frac = torch.linspace(1.0, 0.1, n_seqs)[torch.randperm(n_seqs, generator=generator)]
        targets[torch.rand(n_seqs, seq_len, generator=generator) > kept_frac[:, None]] = IGNORE_INDEX
        targets[:, 0] = stream[:, 1]  # no sequence is entirely masked
        borders = torch.randint(seq_len, (n_seqs, 1), generator=generator)
        doc_ids = (torch.arange(seq_len) >= borders).long() * (not cfg.data.attend_across_documents)
        ids = torch.from_numpy(source_ids << SOURCE_BIT | sample_idx)
        return Batch(stream[chosen, :-1].clone(), targets[chosen], doc_ids[chosen], ids[chosen])
