"""Continuations of prompts, token by token.

stream_texts goes on from a cache (moe/kv_cache.py): one process, the whole model, prompts of any lengths.
continue_prompts computes a whole forward pass for each token: its slow twin, and what training samples with,
because that works in every parallel layout.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from turnout.data.tokenizer import Tokenizer
from turnout.moe.kv_cache import CachedDecoder
from turnout.moe.load_balancing import RouterState
from turnout.moe.model import Decoder
from turnout.training.config.sample import SampleConfig
from turnout.training.errors import CheckpointError, ConfigError
from turnout.training.generation.sampling import Sampling, sample_tokens
from turnout.training.generation.text_stream import TextStream

# Each row keeps its own cache, so more rows cost memory; a CPU gains little beyond these.
ROWS_AT_ONCE = 32
# Prompts go through the model side by side, so longer ones go in smaller company.
PROMPT_TOKENS_AT_ONCE = 16_384

End = Literal["end of text", "stop string", "max tokens", "seq_len"]


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to write.

    max_tokens  tokens of a continuation, at most
    seed        row i draws from seed + i, so its text is the same in any batch
    n_samples   continuations of each prompt
    stop        strings before which a continuation ends
    """

    max_tokens: int
    sampling: Sampling = Sampling()
    seed: int = 0
    n_samples: int = 1
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class TextPiece:
    """What one token added to a row's text, which may be nothing yet. Row: prompt * n_samples + sample.

    end  why the text ends here; None: it goes on
    """

    row: int
    text: str
    end: End | None


def stream_texts(
    model: CachedDecoder, tokenizer: Tokenizer, prompts: Sequence[str], options: Options
) -> Iterator[TextPiece]:
    """Yield the continuations as they come, without their prompts; those of a step by row.

    Raises ConfigError for a prompt that leaves no room, CheckpointError where the logits are not finite.
    """
    encoded = [[tokenizer.bos_id, *tokenizer.encode(prompt)] for prompt in prompts]
    yield from stream_encoded(model, tokenizer, encoded, options)


def stream_encoded(
    model: CachedDecoder, tokenizer: Tokenizer, encoded: list[list[int]], options: Options
) -> Iterator[TextPiece]:
    """Do as stream_texts, for prompts that are tokens, the one that begins a text included."""
    _check_room(encoded, model.max_positions)
    for rows in _in_batches([len(ids) for ids in encoded for _ in range(options.n_samples)]):
        yield from _stream_rows(model, tokenizer, encoded, rows, options)


def _in_batches(lengths: Sequence[int]) -> Iterator[range]:
    """Cut rows of prompts of these lengths into batches of bounded rows and tokens, of one row at least."""
    first, n_tokens = 0, 0
    for row, length in enumerate(lengths):
        n_tokens += length
        if row > first and (row - first == ROWS_AT_ONCE or n_tokens > PROMPT_TOKENS_AT_ONCE):
            yield range(first, row)
            first, n_tokens = row, length
    yield range(first, len(lengths))


def _check_room(encoded: Sequence[Sequence[int]], max_positions: int | None) -> None:
    for i, ids in enumerate(encoded, start=1):
        if max_positions is not None and len(ids) >= max_positions:
            raise ConfigError(
                f"prompt {i} has {len(ids)} tokens with the one that begins a text, and the model was "
                f"trained on seq_len={max_positions} positions; shorten it to {max_positions - 1} at most"
            )


def _stream_rows(
    model: CachedDecoder, tokenizer: Tokenizer, encoded: list[list[int]], rows: range, options: Options
) -> Iterator[TextPiece]:
    of_row = {row: encoded[row // options.n_samples] for row in rows}
    most = {row: _most_tokens(len(ids), model.max_positions, options) for row, ids in of_row.items()}
    generators = {row: torch.Generator().manual_seed(options.seed + row) for row in rows}
    texts = {row: TextStream(tokenizer, ids, options.stop) for row, ids in of_row.items()}
    n_new = dict.fromkeys(rows, 0)
    # Samples of one prompt share its prefill.
    first = rows.start // options.n_samples
    shared = encoded[first : (rows.stop - 1) // options.n_samples + 1]
    logits, cache = model.prefill(shared, max(len(of_row[row]) + most[row] for row in rows))
    places = [row // options.n_samples - first for row in rows]
    logits, cache, live = logits[places], cache.select(places), list(rows)
    while True:
        tokens = _draw(logits, tokenizer, options.sampling, [generators[row] for row in live])
        going_on = []
        for place, (row, token) in enumerate(zip(live, tokens, strict=True)):
            n_new[row] += 1
            is_last = n_new[row] == most[row]
            piece = _piece(row, token, texts[row], tokenizer.eos_id, is_last, most[row] < options.max_tokens)
            yield piece
            if piece.end is None:
                going_on.append(place)
        if not going_on:
            return
        if len(going_on) < len(live):
            cache, live = cache.select(going_on), [live[place] for place in going_on]
        logits = model.extend([tokens[place] for place in going_on], cache)


def _most_tokens(n_prompt: int, max_positions: int | None, options: Options) -> int:
    return options.max_tokens if max_positions is None else min(options.max_tokens, max_positions - n_prompt)


def _draw(
    logits: Tensor, tokenizer: Tokenizer, sampling: Sampling, generators: list[torch.Generator]
) -> list[int]:
    logits = _of_texts(logits.float().cpu(), tokenizer)
    if not logits.isfinite().all():
        raise CheckpointError("the model's logits are not finite; train it again from an earlier checkpoint")
    return sample_tokens(logits, sampling, generators).tolist()


def _of_texts(logits: Tensor, tokenizer: Tokenizer) -> Tensor:
    # A vocabulary padded to a round size has ids that no text has.
    return logits[:, : tokenizer.vocab_size]


def _piece(
    row: int, token: int, text: TextStream, eos_id: int, is_last: bool, is_cut_by_seq_len: bool
) -> TextPiece:
    if token == eos_id:
        return TextPiece(row, text.finish(), "end of text")
    new = text.push(token)
    if text.is_stopped:
        return TextPiece(row, new, "stop string")
    if is_last:
        return TextPiece(row, new + text.finish(), "seq_len" if is_cut_by_seq_len else "max tokens")
    return TextPiece(row, new, None)


@torch.no_grad()
def continue_prompts(
    decoder: Decoder, tokenizer: Tokenizer, state: RouterState, cfg: SampleConfig, *, seed: int
) -> list[str]:
    """Return one continuation per prompt, without the prompt.

    A continuation ends at the end-of-text token or after cfg.n_tokens. Draws from a generator of its own, so
    the same seed gives the same text on every rank.
    """
    generator = torch.Generator().manual_seed(seed)
    sampling = Sampling(temperature=cfg.temperature, top_p=cfg.top_p)
    prompts = [[tokenizer.bos_id, *tokenizer.encode(prompt)] for prompt in cfg.prompts]
    # A prompt keeps its tail where it would not leave room for the continuation.
    rows = [ids[-(decoder.cfg.seq_len - cfg.n_tokens) :] for ids in prompts]
    n_prompt = [len(row) for row in rows]
    is_done = [False] * len(rows)
    was_training = decoder.training
    decoder.eval()
    for _ in range(cfg.n_tokens):
        logits = _of_texts(whole_pass_logits(decoder, rows, state), tokenizer)
        next_ids = sample_tokens(logits, sampling, [generator])
        for i, token in enumerate(next_ids.tolist()):
            is_done[i] = is_done[i] or token == tokenizer.eos_id
            if not is_done[i]:
                rows[i].append(token)
        if all(is_done):
            break
    decoder.train(was_training)
    return [tokenizer.decode(row[start:]) for row, start in zip(rows, n_prompt, strict=True)]


def whole_pass_logits(decoder: Decoder, rows: list[list[int]], state: RouterState) -> Tensor:
    """Return the logits after each row's last token, [rows, V] on the CPU. Causality hides the padding."""
    device = decoder.embed.weight.device
    tokens = torch.zeros(len(rows), decoder.cfg.seq_len, dtype=torch.int64)
    is_counted = torch.zeros_like(tokens, dtype=torch.bool)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = torch.tensor(row)
        is_counted[i, : len(row)] = True
    hidden, _ = decoder(tokens.to(device), torch.zeros_like(tokens), is_counted.to(device), state)
    last = torch.stack([hidden[i, len(row) - 1] for i, row in enumerate(rows)])
    return decoder.tp.gather_last(decoder.logits(last)).float().cpu()
