"""The loss of documents, without side effects: no gradient, router statistic or random state changes.

Convention (lm-eval's rolling log-likelihood, without a second BOS): each document is scored alone, after BOS,
in windows of seq_len tokens that score each token once (data/windows.py). Bits per byte are the sum of
-log2 p over its tokens, divided by the UTF-8 bytes of its text.

evaluate computes the held-out loss of a run, over its ranks; score_documents scores any documents, one by
one, in one process.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields

import torch

from turnout.data.corpus import Corpus
from turnout.data.errors import DataError
from turnout.data.loader import IGNORE_INDEX
from turnout.data.windows import EvaluationDocument, Window, evaluation_documents, rolling_windows
from turnout.moe.load_balancing import RouterState
from turnout.moe.model import Decoder
from turnout.training.errors import CheckpointError, printable
from turnout.training.evaluation.scoring import PACKED_BATCHES, score_windows, sequence_logits
from turnout.training.objective import token_nll
from turnout.training.parallel.groups import Groups

MAX_EXPONENT = 700.0  # exp of a larger number overflows a float


@dataclass(frozen=True)
class Evaluation:
    """Sums over documents. nll is in nats; n_tokens counts the scored tokens."""

    nll: float
    n_tokens: int
    n_bytes: int
    n_documents: int

    @property
    def loss(self) -> float:
        """Nats per token; NaN if no token was scored."""
        return self.nll / self.n_tokens if self.n_tokens else math.nan

    @property
    def bits_per_byte(self) -> float:
        return self.nll / math.log(2) / self.n_bytes if self.n_bytes else math.nan

    @property
    def perplexity(self) -> float:
        """Per token; infinite if it is too large for a float, NaN if no token was scored."""
        return math.inf if self.loss > MAX_EXPONENT else math.exp(self.loss)

    def __add__(self, other: "Evaluation") -> "Evaluation":
        return Evaluation(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))


def evaluation_windows(
    corpus: Corpus, seq_len: int, max_documents: int | None
) -> tuple[list[Window], int, int]:
    """Return the windows of the validation split, and the numbers of its bytes and documents.

    Raises DataError if there is no text in it.
    """
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
    """Score the validation split over the data-parallel ranks. Every rank returns the same sums."""
    seq_len = decoder.cfg.seq_len
    windows, n_bytes, n_documents = evaluation_windows(corpus, seq_len, max_documents)
    random_before, state_before = torch.get_rng_state(), _copy(router_state)
    was_training = decoder.training
    decoder.eval()
    sums = torch.zeros(2, dtype=torch.float64, device=groups.device)
    for batch in _rank_batches(windows, groups, microbatch_seqs):
        sequences = [[window] for window in batch]
        logits, targets = sequence_logits(decoder, sequences, router_state, groups.device)
        nll = token_nll(logits, targets, decoder.tp)
        sums += torch.stack([nll.double().sum(), (targets != IGNORE_INDEX).sum().double()])
    decoder.train(was_training)
    assert torch.equal(torch.get_rng_state(), random_before), "evaluation drew random numbers"
    assert _equal(router_state, state_before), "evaluation changed the router state"
    nll, n_tokens = groups.sum_over_tokens(sums).tolist()
    return Evaluation(nll, int(n_tokens), n_bytes, n_documents)


def _rank_batches(windows: list[Window], groups: Groups, microbatch_seqs: int) -> Iterator[list[Window]]:
    """Yield this rank's windows in batches; every rank gets the same number, some of them empty."""
    dp = groups.layout.dp
    per_round = dp * microbatch_seqs
    # Batches of similar lengths waste little on padding. The order does not change the sums.
    windows = sorted(windows, key=lambda w: len(w.inputs))
    for start in range(0, len(windows), per_round):
        yield windows[start : start + per_round][groups.dp_rank :: dp]


def score_documents(
    decoder: Decoder,
    state: RouterState,
    documents: Iterable[EvaluationDocument],
    *,
    bos_id: int,
    microbatch_seqs: int,
) -> Iterator[tuple[EvaluationDocument, Evaluation]]:
    """Yield each document with its sums, in the order given. A document without tokens has loss sum 0.

    Raises CheckpointError if the logits are not finite.
    """
    pending: list[tuple[EvaluationDocument, list[Window]]] = []
    n_windows = 0
    for document in documents:
        windows = rolling_windows(document.ids, seq_len=decoder.cfg.seq_len, bos_id=bos_id)
        pending.append((document, windows))
        n_windows += len(windows)
        if n_windows >= PACKED_BATCHES * microbatch_seqs:
            yield from _scored(decoder, state, pending, microbatch_seqs)
            pending, n_windows = [], 0
    yield from _scored(decoder, state, pending, microbatch_seqs)


def _scored(
    decoder: Decoder,
    state: RouterState,
    pending: list[tuple[EvaluationDocument, list[Window]]],
    microbatch_seqs: int,
) -> Iterator[tuple[EvaluationDocument, Evaluation]]:
    flat = [window for _, windows in pending for window in windows]
    scores = score_windows(decoder, flat, state, microbatch_seqs=microbatch_seqs)
    sizes = [len(windows) for _, windows in pending]
    sums = zip(pending, scores.nll.split(sizes), scores.n_tokens.split(sizes), strict=True)
    for (document, _), nll, n_tokens in sums:
        if not nll.isfinite().all():
            raise CheckpointError(
                f"the model's logits are not finite in document {printable(document.origin)} of "
                f"{printable(document.source)}; resume training from an earlier checkpoint"
            )
        yield document, Evaluation(float(nll.sum()), int(n_tokens.sum()), document.n_bytes, 1)


def _copy(state: RouterState) -> RouterState:
    return RouterState(state.bias_ME.clone(), state.load_frac_ME.clone())


def _equal(a: RouterState, b: RouterState) -> bool:
    return torch.equal(a.bias_ME, b.bias_ME) and torch.equal(a.load_frac_ME, b.load_frac_ME)
