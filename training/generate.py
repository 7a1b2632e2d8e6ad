"""Continuations of a prompt, sampled token by token, each from a whole forward pass."""

import torch
from torch import Tensor

from data.tokenizer import Tokenizer
from moe.balance import RouterState
from moe.model import Decoder
from training.config import SampleConfig


@torch.no_grad()
def continue_prompts(
    decoder: Decoder, tokenizer: Tokenizer, state: RouterState, cfg: SampleConfig, *, seed: int
) -> list[str]:
    """Return one continuation per prompt, without the prompt.

    A continuation ends at the end-of-text token or after cfg.n_tokens. Draws from a generator of its own, so
    the same seed gives the same text on every rank.
    """
    generator = torch.Generator().manual_seed(seed)
    device = decoder.embed.weight.device
    prompts = [[tokenizer.bos_id, *tokenizer.encode(prompt)] for prompt in cfg.prompts]
    # A prompt keeps its tail where it would not leave room for the continuation.
    rows = [ids[-(decoder.cfg.seq_len - cfg.n_tokens) :] for ids in prompts]
    n_prompt = [len(row) for row in rows]
    is_done = [False] * len(rows)
    was_training = decoder.training
    decoder.eval()
    for _ in range(cfg.n_tokens):
        logits = _next_logits(decoder, rows, state, device)
        next_ids = sample_tokens(logits, cfg.temperature, cfg.top_p, generator)
        for i, token in enumerate(next_ids.tolist()):
            is_done[i] = is_done[i] or token == tokenizer.eos_id
            if not is_done[i]:
                rows[i].append(token)
        if all(is_done):
            break
    decoder.train(was_training)
    return [tokenizer.decode(row[start:]) for row, start in zip(rows, n_prompt, strict=True)]


def _next_logits(decoder: Decoder, rows: list[list[int]], state: RouterState, device: torch.device) -> Tensor:
    """Return the logits after each row's last token, [rows, V] on the CPU. Causality hides the padding."""
    tokens = torch.zeros(len(rows), decoder.cfg.seq_len, dtype=torch.int64)
    is_counted = torch.zeros_like(tokens, dtype=torch.bool)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = torch.tensor(row)
        is_counted[i, : len(row)] = True
    hidden, _ = decoder(tokens.to(device), torch.zeros_like(tokens), is_counted.to(device), state)
    last = torch.stack([hidden[i, len(row) - 1] for i, row in enumerate(rows)])
    return decoder.tp.gather_last(decoder.logits(last)).float().cpu()


def sample_tokens(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator) -> Tensor:
    """Draw one token id per row of logits [B, V]; temperature 0 takes the most likely.

    top_p keeps the smallest set of tokens whose probabilities reach top_p (Holtzman et al. 2020, section
    3.1).
    """
    if temperature == 0:
        return logits.argmax(-1)
    probs, ids = (logits / temperature).softmax(-1).sort(dim=-1, descending=True, stable=True)
    mass_before = probs.cumsum(-1) - probs
    probs = probs.masked_fill(mass_before >= top_p, 0.0)
    return ids.gather(-1, torch.multinomial(probs, 1, generator=generator)).squeeze(-1)
