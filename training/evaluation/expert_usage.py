"""Which experts tokens take: the routing of every expert layer, taken out of the routers by hooks.

The model is as it was once the hooks are gone. Every token of a document is routed once, from bos to eos, in
windows such as evaluation's, the last of which keeps a full context.

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
from turnout.training.evaluation.scoring import ARRANGED_BATCHES, arrange, lay_out, owners_of
from turnout.training.generation.text_stream import REPLACEMENT

TOKEN_CLASSES = ("whitespace", "letters", "digits", "punctuation", "other", "control")


@dataclass(frozen=True)
class TokenRoutes:
    """The routing of tokens in the order of their text.

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
def recording_routes(decoder: Decoder) -> Iterator[list[Routing]]:
    """Append to the list the routing of each expert layer, in their order, whenever the model is called."""
    taken: list[Routing] = []

    def take(module: nn.Module, inputs: object, outputs: tuple[Routing, RouterStats]) -> None:
        taken.append(outputs[0])

    handles = [m.register_forward_hook(take) for m in decoder.modules() if isinstance(m, Router)]
    try:
        yield taken
    finally:
        for handle in handles:
            handle.remove()


def input_windows(token_ids: Sequence[int], seq_len: int) -> list[Window]:
    """Return windows whose counted inputs are these tokens, bos first, once each."""
    # A counted input is one whose target is counted, so the last token needs some target.
    return rolling_windows([*token_ids[1:], token_ids[-1]], seq_len=seq_len, bos_id=token_ids[0])


@torch.no_grad()
def route(decoder: Decoder, sequences: Sequence[Sequence[Window]], state: RouterState) -> TokenRoutes:
    """Route sequences of windows, and return the routes of the tokens whose targets are counted."""
    device = decoder.embed.weight.device
    tokens, targets, doc_ids, is_token = lay_out(sequences, decoder.cfg.seq_len)
    with recording_routes(decoder) as taken:
        _, stats = decoder(tokens.to(device), doc_ids, is_token.to(device), state)
    taken_rows = [routing.expert_ids_TK.cpu()[is_token.flatten()].flatten() for routing in taken]
    counts_ME = torch.stack([rows.bincount(minlength=decoder.cfg.n_experts) for rows in taken_rows])
    assert torch.equal(counts_ME, stats.counts_E.cpu()), "the hooks missed a row"
    mine = (targets != IGNORE_INDEX).flatten()

    def counted(parts: list[Tensor]) -> Tensor:
        return torch.stack(parts).cpu()[:, mine]

    return TokenRoutes(
        tokens.flatten()[mine],
        counted([routing.expert_ids_TK for routing in taken]),
        counted([routing.weights_TK for routing in taken]),
        counted([_kept(routing) for routing in taken]),
    )


def route_text(
    decoder: Decoder, state: RouterState, token_ids: Sequence[int], *, microbatch_seqs: int
) -> TokenRoutes:
    """Route the tokens of one text, bos first, in their order."""
    windows = input_windows(token_ids, decoder.cfg.seq_len)
    starts = range(0, len(windows), microbatch_seqs)
    parts = [route(decoder, [[w] for w in windows[i : i + microbatch_seqs]], state) for i in starts]
    return TokenRoutes(
        torch.cat([part.token_ids for part in parts]),
        torch.cat([part.expert_ids_MTK for part in parts], dim=1),
        torch.cat([part.weights_MTK for part in parts], dim=1),
        torch.cat([part.is_kept_MTK for part in parts], dim=1),
    )


def _kept(routing: Routing) -> Tensor:
    kept = routing.is_kept_TK
    return torch.ones_like(routing.expert_ids_TK, dtype=torch.bool) if kept is None else kept


def token_class(token_id: int, tokenizer: Tokenizer) -> str:
    """Return the class of a token by its text; what is of no one kind, or no whole character, is other."""
    if token_id in (tokenizer.bos_id, tokenizer.eos_id):
        return "control"
    return class_of_text(tokenizer.decode([token_id]))


def class_of_text(text: str) -> str:
    if not text or REPLACEMENT in text:
        return "other"
    # Unicode's general categories: letters and the marks on them, numbers, punctuation and symbols.
    kinds = {unicodedata.category(char)[0] for char in text.strip()}
    if not kinds:
        return "whitespace"
    if kinds <= {"L", "M"}:
        return "letters"
    if kinds <= {"N"}:
        return "digits"
    return "punctuation" if kinds <= {"P", "S"} else "other"


@dataclass(frozen=True)
class Specialisation:
    """How often tokens of each group took each expert.

    groups      names: (kind, name), kind "class" or "source"; each kind's groups hold every token once
    tokens_G    [G] int64
    counts_MGE  [M, G, E] int64 rows
    """

    groups: tuple[tuple[str, str], ...]
    tokens_G: np.ndarray
    counts_MGE: np.ndarray

    def of_kind(self, kind: str) -> list[int]:
        return [g for g, (k, _) in enumerate(self.groups) if k == kind and self.tokens_G[g]]

    def shares(self, kind: str) -> tuple[np.ndarray, np.ndarray]:
        """Return of one kind's groups the share of each expert's rows [M, G, E], NaN where it has none, and
        the share of all tokens [G].
        """
        mine = self.of_kind(kind)
        counts_MGE, tokens_G = self.counts_MGE[:, mine], self.tokens_G[mine]
        with np.errstate(invalid="ignore"):
            return counts_MGE / counts_MGE.sum(1, keepdims=True), tokens_G / tokens_G.sum()

    def information_bits(self, kind: str) -> np.ndarray:
        """Return how many bits of its token's group a row's expert tells, [M]; 0 where it tells nothing."""
        joint_MGE = self.counts_MGE[:, self.of_kind(kind)].astype(np.float64)
        joint_MGE /= joint_MGE.sum((1, 2), keepdims=True)
        apart_MGE = joint_MGE.sum(2, keepdims=True) * joint_MGE.sum(1, keepdims=True)
        ratio_MGE = np.divide(joint_MGE, apart_MGE, out=np.ones_like(joint_MGE), where=joint_MGE > 0)
        return (joint_MGE * np.log2(ratio_MGE)).sum((1, 2))


def count_routes(
    decoder: Decoder,
    state: RouterState,
    documents: Iterable[EvaluationDocument],
    tokenizer: Tokenizer,
    *,
    sources: Sequence[str],
    microbatch_seqs: int,
) -> Specialisation:
    """Count the rows that each expert gets of each class of tokens and of each source, from bos to eos."""
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
    while chunk := list(islice(windows, ARRANGED_BATCHES * microbatch_seqs)):
        source_of_window, mine = np.asarray([source for source, _ in chunk]), [window for _, window in chunk]
        sequences = arrange(mine, cfg)
        for start in range(0, len(sequences), microbatch_seqs):
            batch = sequences[start : start + microbatch_seqs]
            routes = route(decoder, [[mine[i] for i in row] for row in batch], state)
            for group_T in (class_of_id[routes.token_ids], source_of_window[owners_of(batch, mine)]):
                tokens_G += np.bincount(group_T, minlength=len(groups))
                for counts_GE, expert_ids_TK in zip(counts_MGE, routes.expert_ids_MTK.numpy(), strict=True):
                    np.add.at(counts_GE, (group_T[:, None], expert_ids_TK), 1)
    return Specialisation(tuple(groups), tokens_G, counts_MGE)
