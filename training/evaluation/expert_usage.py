"""Which experts tokens use: hooks record the routing of every expert layer.

Removing the hooks leaves the model as it was. Every token of a document, from bos to eos, is counted once, in
the windows of evaluation (data/windows.py).

Shapes
  T tokens   K top_k   M expert layers   E n_experts   G groups of tokens
"""

import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from torch import Tensor, nn

from turnout.data.loader import IGNORE_INDEX
from turnout.data.tokenizer import Tokenizer
from turnout.data.windows import EvaluationDocument, Window, rolling_windows
from turnout.moe.load_balancing import RouterState, RouterStats
from turnout.moe.model import Decoder
from turnout.moe.router import Router, Routing
from turnout.training.evaluation.scoring import PACKED_BATCHES, pack_windows, target_windows, to_tensors
from turnout.training.generation.text_stream import REPLACEMENT

TOKEN_CLASSES = ("whitespace", "letters", "digits", "punctuation", "other", "control")


@dataclass(frozen=True)
class TokenRouting:
    """The routing of tokens, in the order of the text.

    token_ids       [T] int64
    expert_ids_MTK  [M, T, K] int64, best first
    weights_MTK     [M, T, K] fp32
    is_kept_MTK     [M, T, K] bool, False where an expert was full
    """

    token_ids: Tensor
    expert_ids_MTK: Tensor
    weights_MTK: Tensor
    is_kept_MTK: Tensor


@contextmanager
def recording_routing(decoder: Decoder) -> Iterator[list[Routing]]:
    """Yield a list to which each call of the model appends the routing of every expert layer, in order."""
    recorded: list[Routing] = []

    def record(module: nn.Module, inputs: object, outputs: tuple[Routing, RouterStats]) -> None:
        recorded.append(outputs[0])

    handles = [m.register_forward_hook(record) for m in decoder.modules() if isinstance(m, Router)]
    try:
        yield recorded
    finally:
        for handle in handles:
            handle.remove()


def input_windows(token_ids: Sequence[int], seq_len: int) -> list[Window]:
    """Return windows that count each of these tokens, bos first, once as an input."""
    # An input is counted if its target is, so the last token needs some target.
    return rolling_windows([*token_ids[1:], token_ids[-1]], seq_len=seq_len, bos_id=token_ids[0])


@torch.no_grad()
def route_windows(
    decoder: Decoder, sequences: Sequence[Sequence[Window]], state: RouterState
) -> TokenRouting:
    """Run the model on packed sequences, and return the routing of the tokens whose targets are counted."""
    device = decoder.embed.weight.device
    tokens, targets, doc_ids, is_token = to_tensors(sequences, decoder.cfg.seq_len)
    with recording_routing(decoder) as recorded:
        _, stats = decoder(tokens.to(device), doc_ids, is_token.to(device), state)
    ids_N = [routing.expert_ids_TK.cpu()[is_token.flatten()].flatten() for routing in recorded]
    counts_ME = torch.stack([ids.bincount(minlength=decoder.cfg.n_experts) for ids in ids_N])
    assert torch.equal(counts_ME, stats.counts_E.cpu()), "the hooks missed a row"
    is_counted_T = (targets != IGNORE_INDEX).flatten()

    def counted(parts: list[Tensor]) -> Tensor:
        return torch.stack(parts).cpu()[:, is_counted_T]

    return TokenRouting(
        tokens.flatten()[is_counted_T],
        counted([routing.expert_ids_TK for routing in recorded]),
        counted([routing.weights_TK for routing in recorded]),
        counted([_kept(routing) for routing in recorded]),
    )


def route_text(
    decoder: Decoder, state: RouterState, token_ids: Sequence[int], *, microbatch_seqs: int
) -> TokenRouting:
    """Return the routing of the tokens of one text, bos first."""
    windows = input_windows(token_ids, decoder.cfg.seq_len)
    starts = range(0, len(windows), microbatch_seqs)
    parts = [route_windows(decoder, [[w] for w in windows[i : i + microbatch_seqs]], state) for i in starts]
    return TokenRouting(
        torch.cat([part.token_ids for part in parts]),
        torch.cat([part.expert_ids_MTK for part in parts], dim=1),
        torch.cat([part.weights_MTK for part in parts], dim=1),
        torch.cat([part.is_kept_MTK for part in parts], dim=1),
    )


def _kept(routing: Routing) -> Tensor:
    kept = routing.is_kept_TK
    return torch.ones_like(routing.expert_ids_TK, dtype=torch.bool) if kept is None else kept


def token_class(token_id: int, tokenizer: Tokenizer) -> str:
    """Return the class of a token by its text; "other" if it mixes kinds or is part of a character."""
    if token_id in (tokenizer.bos_id, tokenizer.eos_id):
        return "control"
    return class_of_text(tokenizer.decode([token_id]))


def class_of_text(text: str) -> str:
    if not text or REPLACEMENT in text:
        return "other"
    # Unicode's general categories: L letters and M the marks on them, N numbers, P punctuation, S symbols.
    kinds = {unicodedata.category(char)[0] for char in text.strip()}
    if not kinds:
        return "whitespace"
    if kinds <= {"L", "M"}:
        return "letters"
    if kinds <= {"N"}:
        return "digits"
    return "punctuation" if kinds <= {"P", "S"} else "other"


@dataclass(frozen=True)
class ExpertUsage:
    """How many tokens of each group each expert got.

    groups      (kind, name) of each group, kind "class" or "source"; every token is in one group of each kind
    tokens_G    [G] int64, tokens
    counts_MGE  [M, G, E] int64, rows
    """

    groups: tuple[tuple[str, str], ...]
    tokens_G: np.ndarray
    counts_MGE: np.ndarray

    def of_kind(self, kind: str) -> list[int]:
        """Return the indices of one kind's groups, without empty ones."""
        return [g for g, (k, _) in enumerate(self.groups) if k == kind and self.tokens_G[g]]

    def shares(self, kind: str) -> tuple[np.ndarray, np.ndarray]:
        """Return the share that each group of one kind has in each expert's rows, and in all tokens.

        [M, G, E], NaN for an expert without rows, and [G]. Both sum to 1 over the groups.
        """
        mine = self.of_kind(kind)
        counts_MGE, tokens_G = self.counts_MGE[:, mine], self.tokens_G[mine]
        with np.errstate(invalid="ignore"):
            return counts_MGE / counts_MGE.sum(1, keepdims=True), tokens_G / tokens_G.sum()

    def information_bits(self, kind: str) -> np.ndarray:
        """Return the mutual information of expert and group per row, [M] in bits; 0 if independent."""
        joint_MGE = self.counts_MGE[:, self.of_kind(kind)].astype(np.float64)
        joint_MGE /= joint_MGE.sum((1, 2), keepdims=True)
        independent_MGE = joint_MGE.sum(2, keepdims=True) * joint_MGE.sum(1, keepdims=True)
        ratio_MGE = np.divide(joint_MGE, independent_MGE, out=np.ones_like(joint_MGE), where=joint_MGE > 0)
        information_M: np.ndarray = (joint_MGE * np.log2(ratio_MGE)).sum((1, 2))
        return information_M


def count_usage(
    decoder: Decoder,
    state: RouterState,
    documents: Iterable[EvaluationDocument],
    tokenizer: Tokenizer,
    *,
    sources: Sequence[str],
    microbatch_seqs: int,
) -> ExpertUsage:
    """Count the rows that each expert gets from each class of tokens and from each source.

    Every token of a document counts, from bos to eos.
    """
    cfg = decoder.cfg
    groups = [("class", name) for name in TOKEN_CLASSES] + [("source", name) for name in sources]
    classes = [token_class(i, tokenizer) for i in range(tokenizer.vocab_size)]
    class_of_id = np.asarray([TOKEN_CLASSES.index(name) for name in classes])
    tokens_G = np.zeros(len(groups), dtype=np.int64)
    counts_MGE = np.zeros((cfg.n_moe_layers, len(groups), cfg.n_experts), dtype=np.int64)
    windows = (
        (len(TOKEN_CLASSES) + sources.index(document.source), window)
        for document in documents
        for window in input_windows([tokenizer.bos_id, *document.ids, tokenizer.eos_id], cfg.seq_len)
    )
    while pairs := list(islice(windows, PACKED_BATCHES * microbatch_seqs)):
        group_of_window, unpacked = np.asarray([g for g, _ in pairs]), [window for _, window in pairs]
        sequences = pack_windows(unpacked, cfg)
        for start in range(0, len(sequences), microbatch_seqs):
            batch = sequences[start : start + microbatch_seqs]
            routing = route_windows(decoder, [[unpacked[i] for i in row] for row in batch], state)
            sources_T = group_of_window[target_windows(batch, unpacked)]
            for group_T in (class_of_id[routing.token_ids], sources_T):
                tokens_G += np.bincount(group_T, minlength=len(groups))
                for counts_GE, expert_ids_TK in zip(counts_MGE, routing.expert_ids_MTK.numpy(), strict=True):
                    np.add.at(counts_GE, (group_T[:, None], expert_ids_TK), 1)
    return ExpertUsage(tuple(groups), tokens_G, counts_MGE)
