"""Tiny real inputs for the tests of `data`: texts, a tokenizer, a prepared corpus."""

import json
import random
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from turnout.data.corpus import Corpus, open_corpus
from turnout.data.prepare import prepare_corpus
from turnout.data.sources import Source
from turnout.data.tokenizer import train_tokenizer

WORDS = [
    "the",
    "lever",
    "moves",
    "each",
    "switch",
    "so",
    "that",
    "a",
    "train",
    "of",
    "seven",
    "cars",
    "takes",
    "its",
    "own",
    "track\n",
    "at",
    "0417",
    "def",
    "x():",
    "return",
]


def make_texts(n_documents: int, *, seed: int = 0, n_words: int = 40) -> list[str]:
    """Return distinct documents of unequal length."""
    rng = random.Random(seed)
    return [
        f"{seed}:{i} " + " ".join(rng.choices(WORDS, k=rng.randint(1, 2 * n_words)))
        for i in range(n_documents)
    ]


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def write_tokenizer(directory: Path, *, vocab_size: int = 300) -> Path:
    path = directory / "given.model"
    train_tokenizer(make_texts(60, seed=99), vocab_size=vocab_size, out=path, n_threads=1)
    return path


def write_hf_tokenizer(path: Path, *, special_tokens: list[str]) -> Path:
    """Write a byte-level BPE tokenizer.json with these special tokens."""
    model = Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=special_tokens,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    model.train_from_iterator(make_texts(20), trainer)
    model.save(str(path))
    return path


def make_corpus(
    directory: Path,
    texts: dict[str, list[str]],
    *,
    weights: dict[str, float] | None = None,
    valid_frac: float = 0.0,
    shard_tokens: int = 500,
) -> Corpus:
    """Prepare a corpus with one jsonl source per name, in this process."""
    directory.mkdir(parents=True, exist_ok=True)
    sources = [
        Source(name, write_jsonl(directory / f"{name}.jsonl", rows), weights[name] if weights else None)
        for name, rows in texts.items()
    ]
    prepare_corpus(
        sources=sources,
        out=directory / "corpus",
        tokenizer=write_tokenizer(directory),
        vocab_size=None,
        valid_frac=valid_frac,
        shard_tokens=shard_tokens,
        n_workers=1,
    )
    return open_corpus(directory / "corpus", verify="checksum")
