"""Held-out loss, free of side effects: no gradient, no router statistic and no random state is touched.

Convention (lm-eval's rolling log-likelihood, without a second BOS): each document is scored alone, BOS first,
in windows of seq_len tokens that score each token once (data/windows.py), and the sum of its tokens' -log2 p
is divided by the UTF-8 bytes of its text.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from data.corpus import Corpus
from data.errors import DataError
from data.loader import IGNORE_INDEX
from data.windows import Window, evaluation_documents, rolling_windows
from moe.balance import RouterState
from moe.model import Decoder
from training.objective import token_nll
from training.parallel import Groups


@dataclass(frozen=True)
class Evaluation:
    """Sums over documents. nll in nats; n_tokens are the scored ones."""

    nll: float
    n_tokens: int
    n_bytes: int
    n_documents: int

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.nll / self.n_tokens

    @property
    def bits_per_byte(self) -> float:
        return self.nll / math.log(2) / self.n_bytes


def evaluation_windows(
    corpus: Corpus, seq_len: int, max_documents: int | None
) -> tuple[list[Window], int, int]:
    """Return the windows of the validation split, its bytes and its documents."""
    bos_id = corpus.load_tokenizer().bos_id
    windows, n_bytes, n_documents = [], 0, 0
    for document in evaluation_documents(corpus):
        if n_documents == max_documents:
            break
        windows += rolling_windows(document.ids, seq_len=seq_len, bos_id=bos_id)
        n_bytes += document.n_bytes
        n_documents += 1
    if not windows:
        raise DataError(
            f"{corpus.path}: the validation split holds no text to evaluate; "
            "prepare the corpus with a larger --valid-frac"
        )
    return windows, n_bytes, n_documents


@torch.no_grad()
def evaluate(
    decoder: Decoder,
    corpus: Corpus,
    router_state: RouterState,
    groups: Groups,
    *,
    microbatch_seqs: int,
    max_documents: int | None,
) -> Evaluation:
    """Score the validation split, spread over the data-parallel ranks. Every rank returns the same sums."""
    seq_len = decoder.cfg.seq_len
    windows, n_bytes, n_documents = evaluation_windows(corpus, seq_len, max_documents)
    random_before, state_before = torch.get_rng_state(), _copy(router_state)
    was_training = decoder.training
    decoder.eval()
    sums = torch.zeros(2, dtype=torch.float64, device=groups.device)
    for batch in _rank_batches(windows, groups, microbatch_seqs):
        sums += _score(decoder, batch, router_state, groups.device)
    decoder.train(was_training)
    assert torch.equal(torch.get_rng_state(), random_before), "evaluation drew random numbers"
    assert _equal(router_state, state_before), "evaluation changed the router state"
    nll, n_tokens = groups.sum_over_tokens(sums).tolist()
    return Evaluation(nll, int(n_tokens), n_bytes, n_documents)


def _rank_batches(windows: list[Window], groups: Groups, microbatch_seqs: int) -> Iterator[list[Window]]:
    """Yield this rank's windows in batches; every rank gets equally many batches, some of them empty."""
    dp = groups.layout.dp
    per_round = dp * microbatch_seqs
    # Sorted by length, a batch wastes little on padding; the sum does not care.
    windows = sorted(windows, key=lambda w: len(w.inputs))
    for start in range(0, len(windows), per_round):
        yield windows[start : start + per_round][groups.dp_rank :: dp]


def _score(decoder: Decoder, windows: Iterable[Window], state: RouterState, device: torch.device) -> Tensor:
    """Return [nll, scored tokens] of some windows, fp64."""
    seq_len, rows = decoder.cfg.seq_len, list(windows)
    n_rows = max(1, len(rows))
    tokens = torch.zeros(n_rows, seq_len, dtype=torch.int64)
    targets = torch.full((n_rows, seq_len), IGNORE_INDEX)
    for i, window in enumerate(rows):
        tokens[i, : len(window.inputs)] = torch.as_tensor(window.inputs)
        targets[i, : len(window.targets)] = torch.as_tensor(window.targets)
    tokens, targets, doc_ids = tokens.to(device), targets.to(device), torch.zeros_like(tokens)
    is_counted = targets != IGNORE_INDEX
    hidden, _ = decoder(tokens, doc_ids, is_counted, state)
    nll = token_nll(decoder.logits(hidden), targets, decoder.tp)
    return torch.stack([nll.double().sum(), is_counted.sum().double()])


def _copy(state: RouterState) -> RouterState:
    return RouterState(state.bias_ME.clone(), state.load_frac_ME.clone())


def _equal(a: RouterState, b: RouterState) -> bool:
    return torch.equal(a.bias_ME, b.bias_ME) and torch.equal(a.load_frac_ME, b.load_frac_ME)
