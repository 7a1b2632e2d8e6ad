"""The train and the valid shard that one range of a source's documents becomes.

Both end at the same document, and the train shard is committed last: its JSON marks the whole range as done,
so the point to resume from is one document number. A last range without train documents has no such mark and
is simply written again.
"""

from pathlib import Path

import numpy as np

from turnout.data.manifest import SPLITS
from turnout.data.megatron import ShardInfo, ShardWriter, check_shard, read_shard_info, shard_file
from turnout.data.tokenizer import Tokenizer

# By split, where the range has documents of it: the shard's name and description.
PairInfo = dict[str, tuple[str, ShardInfo]]


def shard_name(source: str, number: int) -> str:
    return f"{source}-{number:05d}"


def find_committed(out: Path, source: str, tokenizer_sha256: str) -> list[PairInfo]:
    """Return the committed pairs of a source, in order, after checking that their files are there."""
    pairs: list[PairInfo] = []
    while shard_file(out / "train" / (name := shard_name(source, len(pairs))), ".json").is_file():
        pair: PairInfo = {}
        for split in SPLITS:
            stem = out / split / name
            if shard_file(stem, ".json").is_file():
                info = read_shard_info(stem)
                check_shard(stem, info, verify="size")
                assert info.tokenizer_sha256 == tokenizer_sha256, "the plan names the tokenizer"
                pair[split] = (name, info)
        pairs.append(pair)
    return pairs


class ShardPair:
    """Collect the documents of one range, then commit both shards, or neither."""

    def __init__(
        self, out: Path, source: str, number: int, *, first_document: int, tokenizer: Tokenizer
    ) -> None:
        self.first_document = first_document
        self._out, self._source, self._tokenizer = out, source, tokenizer
        self._name = shard_name(source, number)
        self._writers: dict[str, ShardWriter] = {}

    @property
    def n_train_tokens(self) -> int:
        return self._writers["train"].n_tokens if "train" in self._writers else 0

    def append(self, split: str, ids: np.ndarray, *, n_text_bytes: int) -> None:
        if split not in self._writers:
            self._writers[split] = ShardWriter(
                self._out / split / self._name, vocab_size=self._tokenizer.vocab_size
            )
        self._writers[split].append(ids, n_text_bytes=n_text_bytes)

    def commit(self, *, end_document: int, text_sha256: str) -> PairInfo:
        """Commit the valid shard, then the train shard that marks the range as done."""
        infos = {
            split: self._writers[split].close(
                split=split,
                source=self._source,
                tokenizer_sha256=self._tokenizer.sha256,
                first_document=self.first_document,
                end_document=end_document,
                text_sha256=text_sha256,
            )
            for split in reversed(SPLITS)
            if split in self._writers
        }
        return {split: (self._name, info) for split, info in infos.items()}

    def abort(self) -> None:
        for writer in self._writers.values():
            writer.abort()
