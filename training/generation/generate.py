"""Continue prompts, token by token.

stream_texts uses a KV cache (moe/kv_cache.py): one process, the whole model, prompts of any lengths.
continue_prompts is its slow twin, with a whole forward pass for each token. Training samples with it, because
it works in every parallel layout.
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

# Each row has its own cache, so more rows cost memory. A CPU gains little from a larger batch.
MAX_BATCH_ROWS = 32
# The prompts of a batch are prefilled together, so long prompts go in smaller batches.
MAX_BATCH_PROMPT_TOKENS = 16_384

EndReason = Literal["end of text", "stop string", "max tokens", "seq_len"]


@dataclass(frozen=True, kw_only=True)
class Options:
    """How to continue prompts.

    max_tokens  maximum length of a continuation, in tokens
    seed        row i uses seed + i, so its text is the same in any batch
    n_samples   continuations of each prompt
    stop        a continuation ends before any of these strings
    """

    max_tokens: int
    sampling: Sampling = Sampling()
    seed: int = 0
    n_samples: int = 1
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class TextPiece:
    """The text that one token added to a row; it may be empty. Row: prompt * n_samples + sample.

    end  why the text ends here; None: it continues
    """

    row: int
    text: str
    end: EndReason | None


def stream_texts(
    model: CachedDecoder, tokenizer: Tokenizer, prompts: Sequence[str], options: Options
) -> Iterator[TextPiece]:
    """Yield the continuations piece by piece, without their prompts; within a step in the order of the rows.

    Raises ConfigError if a prompt leaves no room, CheckpointError if the logits are not finite.
    """
    encoded = [[tokenizer.bos_id, *tokenizer.encode(prompt)] for prompt in prompts]
    yield from stream_encoded(model, tokenizer, encoded, options)


def stream_encoded(
    model: CachedDecoder, tokenizer: Tokenizer, encoded: list[list[int]], options: Options
) -> Iterator[TextPiece]:
    """Do the same as stream_texts for prompts given as token ids, each with its bos."""
    _check_room(encoded, model.max_positions)
    for rows in _in_batches([len(ids) for ids in encoded for _ in range(options.n_samples)]):
        yield from _stream_rows(model, tokenizer, encoded, rows, options)


def _in_batches(lengths: Sequence[int]) -> Iterator[range]:
    """Yield batches of rows, bounded in rows and in prompt tokens, from the rows' prompt lengths.

    A prompt that is too long for the bound is a batch by itself.
    """
    first, n_tokens = 0, 0
    for row, length in enumerate(lengths):
        n_tokens += length
        if row > first and (row - first == MAX_BATCH_ROWS or n_tokens > MAX_BATCH_PROMPT_TOKENS):
            yield range(first, row)
            first, n_tokens = row, length
    yield range(first, len(lengths))


def _check_room(encoded: Sequence[Sequence[int]], max_positions: int | None) -> None:
    for i, ids in enumerate(encoded, start=1):
        if max_positions is not None and len(ids) >= max_positions:
            raise ConfigError(
                f"prompt {i} has {len(ids)} tokens, bos included, and the model was trained on "
                f"seq_len={max_positions} positions; shorten it to at most {max_positions - 1} tokens"
            )


def _stream_rows(
    model: CachedDecoder, tokenizer: Tokenizer, encoded: list[list[int]], rows: range, options: Options
) -> Iterator[TextPiece]:
    prompt_of = {row: encoded[row // options.n_samples] for row in rows}
    limits = {row: _token_limit(len(ids), model.max_positions, options) for row, ids in prompt_of.items()}
    generators = {row: torch.Generator().manual_seed(options.seed + row) for row in rows}
    texts = {row: TextStream(tokenizer, ids, options.stop) for row, ids in prompt_of.items()}
    n_new = dict.fromkeys(rows, 0)
    # Samples of one prompt share its prefill.
    first = rows.start // options.n_samples
    prompts = encoded[first : (rows.stop - 1) // options.n_samples + 1]
    logits, cache = model.prefill(prompts, max(len(prompt_of[row]) + limits[row] for row in rows))
    prompt_idx = [row // options.n_samples - first for row in rows]
    logits, cache, live = logits[prompt_idx], cache.select(prompt_idx), list(rows)
    while True:
        tokens = _draw(logits, tokenizer, options.sampling, [generators[row] for row in live])
        unfinished = []
        for i, (row, token) in enumerate(zip(live, tokens, strict=True)):
            n_new[row] += 1
            is_last = n_new[row] == limits[row]
            is_cut_by_seq_len = limits[row] < options.max_tokens
            piece = _piece(row, token, texts[row], tokenizer.eos_id, is_last, is_cut_by_seq_len)
            yield piece
            if piece.end is None:
                unfinished.append(i)
        if not unfinished:
            return
        if len(unfinished) < len(live):
            cache, live = cache.select(unfinished), [live[i] for i in unfinished]
        logits = model.extend([tokens[i] for i in unfinished], cache)


def _token_limit(n_prompt: int, max_positions: int | None, options: Options) -> int:
    return options.max_tokens if max_positions is None else min(options.max_tokens, max_positions - n_prompt)


def _draw(
    logits: Tensor, tokenizer: Tokenizer, sampling: Sampling, generators: list[torch.Generator]
) -> list[int]:
    logits = _without_padded_ids(logits.float().cpu(), tokenizer)
    if not logits.isfinite().all():
        raise CheckpointError("the model's logits are not finite; resume training from an earlier checkpoint")
    return sample_tokens(logits, sampling, generators).tolist()


def _without_padded_ids(logits: Tensor, tokenizer: Tokenizer) -> Tensor:
    # A vocabulary that is padded to a round size has ids that stand for no text.
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

    A continuation ends at the end-of-text token or after cfg.n_tokens. The random generator is local, so the
    same seed gives the same text on every rank, and training's random state is untouched.
    """
    generator = torch.Generator().manual_seed(seed)
    sampling = Sampling(temperature=cfg.temperature, top_p=cfg.top_p)
    prompts = [[tokenizer.bos_id, *tokenizer.encode(prompt)] for prompt in cfg.prompts]
    # A prompt that leaves no room for the continuation loses its beginning.
    rows = [ids[-(decoder.cfg.seq_len - cfg.n_tokens) :] for ids in prompts]
    n_prompt = [len(row) for row in rows]
    is_done = [False] * len(rows)
    was_training = decoder.training
    decoder.eval()
    for _ in range(cfg.n_tokens):
        logits = _without_padded_ids(whole_pass_logits(decoder, rows, state), tokenizer)
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
    """Return the logits after each row's last token, [rows, V] on the CPU.

    The padding after a row cannot change them, because attention is causal.
    """
    device = decoder.embed.weight.device
    tokens = torch.zeros(len(rows), decoder.cfg.seq_len, dtype=torch.int64)
    is_counted = torch.zeros_like(tokens, dtype=torch.bool)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = torch.tensor(row)
        is_counted[i, : len(row)] = True
    hidden, _ = decoder(tokens.to(device), torch.zeros_like(tokens), is_counted.to(device), state)
    last = torch.stack([hidden[i, len(row) - 1] for i, row in enumerate(rows)])
    return decoder.tp.gather_last(decoder.logits(last)).float().cpu()
