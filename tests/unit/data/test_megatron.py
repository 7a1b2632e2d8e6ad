"""Token shards: the bytes of the Megatron layout, and damage that must be found."""

import json
import struct
from pathlib import Path

import numpy as np
import pytest

from turnout.data.errors import DataError
from turnout.data.megatron import (
    HEADER,
    Shard,
    ShardInfo,
    ShardWriter,
    check_shard,
    read_shard_info,
    shard_file,
)

DOCUMENTS = [np.array([1, 5, 2]), np.array([1, 2]), np.array([1, 7, 7, 299, 2])]


def write_shard(stem: Path, documents: list[np.ndarray], *, vocab_size: int = 300) -> ShardInfo:
    writer = ShardWriter(stem, vocab_size=vocab_size)
    for ids in documents:
        writer.append(ids, n_text_bytes=len(ids))
    return writer.close(
        split="train",
        source="s",
        tokenizer_sha256="t" * 64,
        first_document=0,
        end_document=len(documents),
        text_sha256="0" * 64,
    )


def test_bytes_on_disk_are_the_megatron_layout(tmp_path: Path) -> None:
    info = write_shard(tmp_path / "s.v1-00000", DOCUMENTS)
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"s.v1-00000.{x}" for x in ("bin", "idx", "json")]
    # Written out by hand, so that a change of the format fails here.
    expected = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 8, 3, 4)
    expected += struct.pack("<3i", 3, 2, 5) + struct.pack("<3q", 0, 6, 10) + struct.pack("<4q", 0, 1, 2, 3)
    assert (tmp_path / "s.v1-00000.idx").read_bytes() == expected
    assert (tmp_path / "s.v1-00000.bin").read_bytes() == struct.pack("<10H", 1, 5, 2, 1, 2, 1, 7, 7, 299, 2)
    assert (info.n_documents, info.n_tokens, info.n_text_bytes, info.dtype) == (3, 10, 10, "uint16")
    assert read_shard_info(tmp_path / "s.v1-00000") == info


@pytest.mark.parametrize(("vocab_size", "dtype"), [(65536, "uint16"), (65537, "int32")])
def test_round_trip_in_both_widths(tmp_path: Path, vocab_size: int, dtype: str) -> None:
    documents = [*DOCUMENTS, np.array([vocab_size - 1, 0])]
    write_shard(tmp_path / "s", documents, vocab_size=vocab_size)
    shard = Shard(tmp_path / "s")
    assert (shard.dtype.name, shard.n_documents, shard.n_tokens) == (dtype, 4, 12)
    assert shard.starts.tolist() == [0, 3, 5, 10]
    for number, ids in enumerate(documents):
        assert shard.document(number).tolist() == ids.tolist()


def test_documents_of_several_sequences(tmp_path: Path) -> None:
    """Other writers put one document into several sequences; the document index says which."""
    write_shard(tmp_path / "s", DOCUMENTS)
    index = bytearray((tmp_path / "s.idx").read_bytes())
    header = HEADER.pack(b"MMIDIDX\x00\x00", 1, 8, 3, 3)
    (tmp_path / "s.idx").write_bytes(header + index[HEADER.size : -32] + struct.pack("<3q", 0, 2, 3))
    shard = Shard(tmp_path / "s")
    assert shard.starts.tolist() == [0, 5]
    assert shard.document(0).tolist() == [1, 5, 2, 1, 2]


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
@pytest.mark.parametrize("n_bytes", [-2, 2])
def test_a_wrong_size_is_reported_with_both_sizes(tmp_path: Path, suffix: str, n_bytes: int) -> None:
    info = write_shard(tmp_path / "s", DOCUMENTS)
    path = tmp_path / f"s{suffix}"
    content = path.read_bytes()
    path.write_bytes(content[:n_bytes] if n_bytes < 0 else content + b"\0" * n_bytes)
    message = f"s{suffix}: {len(content) + n_bytes} bytes where {len(content)} were expected"
    with pytest.raises(DataError, match=message):
        Shard(tmp_path / "s")
    with pytest.raises(DataError, match=message):
        check_shard(tmp_path / "s", info, verify="size")


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_the_checksum_finds_one_flipped_bit(tmp_path: Path, suffix: str) -> None:
    info = write_shard(tmp_path / "s", DOCUMENTS)
    check_shard(tmp_path / "s", info, verify="checksum")
    path = tmp_path / f"s{suffix}"
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    check_shard(tmp_path / "s", info, verify="size")
    with pytest.raises(DataError, match=f"s{suffix}: SHA-256"):
        check_shard(tmp_path / "s", info, verify="checksum")


@pytest.mark.parametrize(
    ("offset", "value", "message"),
    [
        (0, b"X", "not a Megatron index"),
        (9, struct.pack("<Q", 2), "version 2"),
        (17, b"\x06", "dtype code 6"),
        (34, struct.pack("<i", -3), "sequence 0 has length -3"),
        (34 + 12 + 8, struct.pack("<q", 2), "sequence 1 has length 2 and offset 2 where 6"),
        (34 + 12 + 24 + 24, struct.pack("<q", 2), "document index does not cover"),
    ],
    ids=["magic", "version", "dtype", "length", "pointer", "documents"],
)
def test_a_damaged_index_is_refused(tmp_path: Path, offset: int, value: bytes, message: str) -> None:
    write_shard(tmp_path / "s", DOCUMENTS)
    content = bytearray((tmp_path / "s.idx").read_bytes())
    content[offset : offset + len(value)] = value
    (tmp_path / "s.idx").write_bytes(content)
    with pytest.raises(DataError, match=message):
        Shard(tmp_path / "s")


def test_a_shard_without_its_json_does_not_exist(tmp_path: Path) -> None:
    write_shard(tmp_path / "s", DOCUMENTS)
    values = json.loads((tmp_path / "s.json").read_text())
    (tmp_path / "s.json").write_text(json.dumps({**values, "format_version": 9}))
    with pytest.raises(DataError, match="s.json: not a shard description of format 1"):
        read_shard_info(tmp_path / "s")
    shard_file(tmp_path / "s", ".json").unlink()
    with pytest.raises(DataError, match="s.json: the file is missing"):
        read_shard_info(tmp_path / "s")


def test_nothing_has_its_final_name_before_close(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path / "s", vocab_size=300)
    writer.append(DOCUMENTS[0], n_text_bytes=1)
    assert [p.name for p in tmp_path.iterdir()] == ["s.bin.tmp"]
    writer.abort()
    assert list(tmp_path.iterdir()) == []


def test_ids_outside_the_vocabulary_are_not_written(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path / "s", vocab_size=300)
    with pytest.raises(AssertionError):
        writer.append(np.array([300]), n_text_bytes=1)
    writer.abort()
