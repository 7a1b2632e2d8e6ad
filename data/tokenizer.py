"""Text to token ids and back: a sentencepiece `tokenizer.model` or a Hugging Face `tokenizer.json`.

Contract: text never becomes a control id, whatever it spells. A document could otherwise end itself
early, or begin another one. `encode` adds no control ids; the caller composes `[bos, *ids, eos]`.
"""

import io
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import sentencepiece
import tokenizers

from turnout.data.errors import DataError
from turnout.data.files import sha256_of, write_atomically

UNK_ID, BOS_ID, EOS_ID = 0, 1, 2
# unk, bos, eos and one piece for each byte.
MIN_VOCAB_SIZE = 3 + 256
# sentencepiece drops sentences above its limit, so documents are cut, preferably at newlines.
TRAIN_PIECE_CHARS = 1 << 14
MAX_SENTENCE_BYTES = 4 * TRAIN_PIECE_CHARS
# Above sentencepiece's levels INFO and WARNING: failures arrive as exceptions.
QUIET = 2

# A tokenizer.json does not say which special token begins or ends a text, so the usual names are tried.
BOS_NAMES: tuple[str, ...] = ("<s>", "<|begin_of_text|>", "<bos>", "[BOS]", "<|startoftext|>", "<|bos|>")
BOS_NAMES += ("<\uff5cbegin\u2581of\u2581sentence\uff5c>",)
EOS_NAMES: tuple[str, ...] = ("</s>", "<|end_of_text|>", "<|endoftext|>", "<eos>", "[EOS]", "<|eos|>")
EOS_NAMES += ("<\uff5cend\u2581of\u2581sentence\uff5c>",)


class Tokenizer(ABC):
    """The interface that the rest of the system uses."""

    vocab_size: int
    bos_id: int
    eos_id: int

    def __init__(self, path: Path) -> None:
        self.path = path
        self.sha256 = sha256_of(path)

    def encode(self, text: str) -> list[int]:
        """Return the ids of the text alone, without bos or eos."""
        return self.encode_batch([text])[0]

    @abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]: ...

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str: ...


class SentencePieceTokenizer(Tokenizer):
    """A sentencepiece model. The character U+2581 stands for a space inside it and decodes as one."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (RuntimeError, OSError) as err:
            raise DataError(f"{path}: not a sentencepiece model ({err}); give a tokenizer.model") from err
        self.vocab_size = self._model.piece_size()
        bos_id, eos_id = self._model.bos_id(), self._model.eos_id()
        if eos_id < 0:
            raise DataError(f"{path}: the model has no </s> (eos) piece; train it with eos_id >= 0")
        self.bos_id, self.eos_id = (bos_id if bos_id >= 0 else eos_id), eos_id
        _check_control_text(self, [self._model.id_to_piece(i) for i in {self.bos_id, self.eos_id}])

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        # One thread: the worker processes already run in parallel.
        ids: list[list[int]] = self._model.encode(list(texts), num_threads=1)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self._model.decode([int(i) for i in ids])
        return text


class HuggingFaceTokenizer(Tokenizer):
    """A tokenizer.json of the `tokenizers` library."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        try:
            self._model = tokenizers.Tokenizer.from_file(str(path))
        except Exception as err:  # the library raises bare Exception for an unreadable file
            raise DataError(f"{path}: not a Hugging Face tokenizer.json ({err}); give another") from err
        # With this, special tokens spelled in a text are split like any text. A file saved for inference may
        # still hold its last settings of truncation and padding.
        self._model.encode_special_tokens = True
        self._model.no_truncation()
        self._model.no_padding()
        self.vocab_size = max(self._model.get_vocab(with_added_tokens=True).values()) + 1
        special = {t.content: i for i, t in self._model.get_added_tokens_decoder().items() if t.special}
        bos_id = next((special[name] for name in BOS_NAMES if name in special), None)
        eos_id = next((special[name] for name in EOS_NAMES if name in special), None)
        if eos_id is None:
            raise DataError(
                f"{path}: no end-of-text token among its special tokens {sorted(special)}; "
                f"add one named {EOS_NAMES[0]} or {EOS_NAMES[2]} with special=true"
            )
        self.bos_id, self.eos_id = (eos_id if bos_id is None else bos_id), eos_id
        _check_control_text(self, list(special))

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        encodings = self._model.encode_batch(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Sequence[int]) -> str:
        return self._model.decode([int(i) for i in ids], skip_special_tokens=False)


def _check_control_text(tokenizer: Tokenizer, spellings: Sequence[str]) -> None:
    for spelling in spellings:
        if {tokenizer.bos_id, tokenizer.eos_id} & set(tokenizer.encode(spelling)):
            raise DataError(
                f"{tokenizer.path}: the text {spelling!r} becomes a control id: a document could end itself; "
                "declare that piece as a control symbol (sentencepiece) or a special token (tokenizer.json)"
            )


def load_tokenizer(path: Path) -> Tokenizer:
    """Load a tokenizer.model or a tokenizer.json, chosen by the suffix. Raises DataError."""
    if not path.is_file():
        raise DataError(f"{path}: no such tokenizer file; give a tokenizer.model or a tokenizer.json")
    if path.suffix == ".model":
        return SentencePieceTokenizer(path)
    if path.suffix == ".json":
        return HuggingFaceTokenizer(path)
    raise DataError(
        f"{path}: unknown tokenizer suffix {path.suffix!r}; give a sentencepiece .model or a tokenizer.json"
    )


def split_text(text: str, max_chars: int) -> Iterator[str]:
    """Cut a text into consecutive pieces of at most max_chars.

    A cut falls after a newline, or else before a space, where a token rarely spans it.
    """
    start = 0
    while len(text) - start > max_chars:
        middle, limit = start + max_chars // 2, start + max_chars
        end = text.rfind("\n", middle, limit) + 1 or max(text.rfind(" ", middle, limit), 0) or limit
        yield text[start:end]
        start = end
    if start < len(text):
        yield text[start:]


def train_tokenizer(documents: Iterable[str], *, vocab_size: int, out: Path, n_threads: int) -> None:
    """Train a sentencepiece BPE model on whole documents and write it to `out`.

    The learned vocabulary does not depend on n_threads, but the file records n_threads, so its SHA-256 does.
    Raises DataError if a vocabulary of this size cannot be learned from the text.
    """
    if vocab_size < MIN_VOCAB_SIZE:
        raise DataError(
            f"vocab_size={vocab_size} must be at least {MIN_VOCAB_SIZE}: 3 control ids and 256 bytes"
        )
    failures: list[Exception] = []

    def pieces() -> Iterator[str]:
        # sentencepiece turns an exception of its iterator into a RuntimeError; the original is kept here.
        try:
            for document in documents:
                yield from split_text(document, TRAIN_PIECE_CHARS)
        except Exception as err:
            failures.append(err)
            raise

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=pieces(),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            split_digits=True,
            # Indentation is one token: 38 % fewer tokens on Python source.
            allow_whitespace_only_pieces=True,
            max_sentence_length=MAX_SENTENCE_BYTES,
            unk_id=UNK_ID,
            bos_id=BOS_ID,
            eos_id=EOS_ID,
            pad_id=-1,
            num_threads=n_threads,
            minloglevel=QUIET,
        )
    except RuntimeError as err:
        if failures:
            raise failures[0] from err
        raise _training_error(vocab_size, str(err)) from err
    write_atomically(out, model.getvalue())


def _training_error(vocab_size: int, message: str) -> DataError:
    if "too high" in message:
        most = message.rstrip(". ").rpartition("<= ")[2]
        return DataError(
            f"vocab_size={vocab_size} is more than this text can fill; use at most {most}, or more text"
        )
    if "smaller than required" in message:
        return DataError(
            f"vocab_size={vocab_size} is less than the text's characters need ({message}); raise it"
        )
    if "sentences_.empty()" in message:
        return DataError(
            "training a tokenizer: there is no text to train on; give documents or a tokenizer file"
        )
    return DataError(f"training a tokenizer with vocab_size={vocab_size} failed: {message}")
