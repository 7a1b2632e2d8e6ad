"""A Turnout model for EleutherAI's lm-evaluation-harness, registered there as "turnout".

    import turnout.launch.lm_eval_model
    lm_eval.simple_evaluate(model="turnout", model_args={"path": "runs/first"}, tasks=["arc_easy"])

Every text begins with one bos, as in training. Rolling log-likelihoods equal those of `turnout evaluate`.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs

from turnout.data.errors import DataError
from turnout.data.loader import IGNORE_INDEX
from turnout.data.windows import EvaluationDocument, Window
from turnout.launch.console import LiveBar
from turnout.launch.models import DType, load_model
from turnout.moe.kv_cache import CachedDecoder
from turnout.training.errors import ConfigError
from turnout.training.evaluation.held_out import score_documents
from turnout.training.evaluation.scoring import PACKED_BATCHES, score_windows
from turnout.training.generation.generate import Options, stream_encoded
from turnout.training.generation.sampling import Sampling

DEFAULT_NEW_TOKENS = 256  # as in lm_eval's own models
KNOWN_KWARGS = {"do_sample", "max_gen_toks", "min_p", "temperature", "top_k", "top_p", "until"}
Scored = tuple[float, bool]


@register_model("turnout")
class TurnoutLM(TemplateLM):
    """path: a run, a checkpoint or an export. batch_size: sequences per forward pass."""

    def __init__(self, path: str | Path, *, dtype: DType = "float32", batch_size: int | str = 8) -> None:
        """Load the model. Raises ConfigError for a batch size that is not a positive integer."""
        super().__init__()
        if not str(batch_size).isdecimal() or not int(batch_size):
            raise ConfigError(f"batch_size={batch_size} must be a positive number of sequences, such as 8")
        self.model, self.dtype = load_model(Path(path), dtype=dtype), dtype
        self.microbatch_seqs = int(batch_size)
        self._writer = CachedDecoder(self.model.decoder, self.model.state)

    @property
    def max_length(self) -> int:
        return self.model.decoder.cfg.seq_len

    @property
    def eot_token_id(self) -> int:
        return self.model.tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        return self.model.tokenizer.bos_id

    @property
    def tokenizer_name(self) -> str:
        """The key by which lm_eval separates its request caches."""
        return self.model.tokenizer.sha256

    def get_model_info(self) -> dict[str, str]:
        """Return the fields that lm_eval adds to its results."""
        return {"model_path": str(self.model.place), "model_dtype": self.dtype}

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Return the ids of the text, without bos and eos. Text that spells a control token stays text."""
        return self.model.tokenizer.encode(string)

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        context_ids, continuation_ids = super()._encode_pair(context, continuation)
        return [self.prefix_token_id, *context_ids], continuation_ids

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[Scored]:
        windows = [self._window(context, continuation) for _, context, continuation in requests]
        answers: list[Scored] = []
        per_round = PACKED_BATCHES * self.microbatch_seqs
        with LiveBar("scoring continuations", len(windows)) as bar:
            for start in range(0, len(windows), per_round):
                scores = score_windows(
                    self.model.decoder,
                    windows[start : start + per_round],
                    self.model.state,
                    microbatch_seqs=self.microbatch_seqs,
                )
                answers += zip((-scores.nll).tolist(), scores.is_greedy.tolist(), strict=True)
                bar.update(len(answers))
        for (texts, _, _), answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("loglikelihood", texts, answer)
        return answers

    def _window(self, context: list[int], continuation: list[int]) -> Window:
        """Return the window that scores a continuation; a long context loses its beginning."""
        if len(continuation) > self.max_length:
            raise DataError(
                f"a continuation of {len(continuation)} tokens does not fit into the model's "
                f"seq_len={self.max_length}; leave this task out, or score its text by bits per byte"
            )
        stream = torch.tensor([*context, *continuation][-(self.max_length + 1) :]).numpy()
        targets = stream[1:].copy()
        targets[: len(targets) - len(continuation)] = IGNORE_INDEX
        return Window(stream[:-1], targets)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        texts = [request.args[0] for request in requests]
        documents = (
            EvaluationDocument("", torch.tensor(self.tok_encode(text)).numpy(), len(text.encode()), str(i))
            for i, text in enumerate(texts)
        )
        scored = score_documents(
            self.model.decoder,
            self.model.state,
            documents,
            bos_id=self.prefix_token_id,
            microbatch_seqs=self.microbatch_seqs,
        )
        answers = []
        with LiveBar("scoring texts", len(texts)) as bar:
            for text, (_, evaluation) in zip(texts, scored, strict=True):
                answers.append(-evaluation.nll)
                self.cache_hook.add_partial("loglikelihood_rolling", (text,), -evaluation.nll)
                bar.update(len(answers))
        return answers

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        answers = []
        with LiveBar("generating", len(requests)) as bar:
            for i, request in enumerate(requests):
                prompt, request_kwargs = request.args
                answers.append(self._generate(prompt, request_kwargs, seed=i))
                self.cache_hook.add_partial("generate_until", (prompt, request_kwargs), answers[-1])
                bar.update(len(answers))
        return answers

    def _generate(self, prompt: str, request_kwargs: dict[str, Any], *, seed: int) -> str:
        """Continue a prompt up to the first stop string, which is left out.

        seed: different for each request, so that samples of the same prompt differ
        """
        given: dict[str, Any] = {**normalize_gen_kwargs(request_kwargs, DEFAULT_NEW_TOKENS)}
        if unknown := given.keys() - KNOWN_KWARGS:
            raise DataError(
                f"generation_kwargs {sorted(unknown)} are unknown; use only {sorted(KNOWN_KWARGS)}"
            )
        n_tokens = given["max_gen_toks"]
        if not 0 < n_tokens < self.max_length:
            raise DataError(
                f"max_gen_toks={n_tokens} must leave room for a prompt in the model's seq_len="
                f"{self.max_length}; set generation_kwargs.max_gen_toks of the task"
            )
        sampling = Sampling(temperature=0.0)
        if given["do_sample"] and given["temperature"]:
            filters = {name: given[name] for name in ("top_k", "top_p", "min_p") if given.get(name)}
            sampling = Sampling(temperature=float(given["temperature"]), **filters)
        options = Options(
            max_tokens=n_tokens, sampling=sampling, seed=seed, stop=tuple(filter(None, given["until"]))
        )
        ids = [self.prefix_token_id, *self.tok_encode(prompt)]
        # A prompt that leaves no room for the continuation loses its beginning.
        tail = ids[-(self.max_length - n_tokens) :]
        pieces = stream_encoded(self._writer, self.model.tokenizer, [tail], options)
        return "".join(piece.text for piece in pieces)
