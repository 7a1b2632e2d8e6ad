"""Raw text: formats are read exactly, and bad files and rows are located in the message."""

import bz2
import gzip
import json
import lzma
import random
import sysconfig
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard
from datasets import Dataset

from turnout.data.embedded import list_embedded_files
from turnout.data.errors import DataError
from turnout.data.sources import Source, embedded_sources, iterate_documents, list_files

EXACT = "caf\u00e9\r\nlone\rcr\n\n\u2028sep\x0b end"


def texts_of(path: Path, **fields: str) -> list[str]:
    return [document.text for document in iterate_documents(Source("s", path, **fields))]


def jsonl(*rows: object) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def two_zstd_frames(content: bytes) -> bytes:
    half = len(content) // 2
    return zstandard.compress(content[:half]) + zstandard.compress(content[half:])


COMPRESSORS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": two_zstd_frames,
}


@pytest.mark.parametrize("suffix", COMPRESSORS)
def test_text_and_json_lines_are_read_exactly(tmp_path: Path, suffix: str) -> None:
    text_file, json_file = tmp_path / f"a.txt{suffix}", tmp_path / f"b.jsonl{suffix}"
    text_file.write_bytes(COMPRESSORS[suffix](EXACT.encode()))
    rows = jsonl({"text": EXACT}, {"text": ""}, {"text": "2020-01-01", "n": 1})
    json_file.write_bytes(COMPRESSORS[suffix](rows + b"\n"))
    assert texts_of(text_file) == [EXACT]
    assert texts_of(json_file) == [EXACT, "2020-01-01"]
    documents = list(iterate_documents(Source("s", tmp_path)))
    assert [d.text for d in documents] == [EXACT, EXACT, "2020-01-01"]
    assert [d.origin for d in documents] == [str(text_file), f"{json_file}:1", f"{json_file}:3"]
    assert documents[0].n_bytes == len(EXACT.encode())


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz", ".zst"])
def test_truncated_compressed_files_are_refused(tmp_path: Path, suffix: str) -> None:
    path, rng = tmp_path / f"a.jsonl{suffix}", random.Random(1)
    whole = COMPRESSORS[suffix](jsonl(*({"text": str(rng.random())} for _ in range(500))))
    path.write_bytes(whole[: len(whole) - 20])
    with pytest.raises(DataError, match=f"a.jsonl{suffix}: the {suffix} data is damaged or cut short"):
        texts_of(path)


def test_lines_longer_than_a_chunk(tmp_path: Path) -> None:
    long = "x" * 3_000_001
    (tmp_path / "a.jsonl").write_bytes(jsonl({"text": long}, {"text": "next"}))
    assert texts_of(tmp_path / "a.jsonl") == [long, "next"]


def test_json_array_is_a_list_of_rows(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('[\n {"text": "one"},\n {"text": "two"}\n]')
    assert texts_of(tmp_path / "a.json") == ["one", "two"]


def test_parquet_and_saved_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "cache"
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(cache))
    dataset = Dataset.from_dict({"body": [EXACT, "", "third"], "n": [1, 2, 3]})
    dataset.to_parquet(tmp_path / "p.parquet")
    dataset.save_to_disk(tmp_path / "saved")
    for path in (tmp_path / "p.parquet", tmp_path / "saved"):
        documents = list(iterate_documents(Source("s", path, text_field="body")))
        assert [d.text for d in documents] == [EXACT, "third"]
        assert documents[1].origin == f"{path}[2]"
        with pytest.raises(DataError, match=r"no field 'text' among \['body', 'n'\]"):
            texts_of(path)
        with pytest.raises(DataError, match=r"\[0\]: field 'n' is 1 \(int\), not a string"):
            texts_of(path, text_field="n")
    assert not cache.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (jsonl({"text": "a"}) + b'{"text": "b}\n', r"a.jsonl:2: not JSON \(.* at column 10\)"),
        (jsonl({"text": "a"}, {"body": "b", "id": 1}), r"a.jsonl:2: no field 'text' among \['body', 'id'\]"),
        (jsonl({"text": "a"}, {"text": None}), r"a.jsonl:2: field 'text' is None \(NoneType\), not a string"),
        (jsonl({"text": 5}), r"a.jsonl:1: field 'text' is 5 \(int\)"),
        (jsonl("bare"), "a.jsonl:1: the row is a str"),
        (b'{"text": "ok"}\n{"text": "\xff"}\n', r"a.jsonl: not UTF-8 at byte 25 \(0xff\)"),
        (b'{"text": "x\\ud800"}\n', "a.jsonl:1: character 1 is .* half a surrogate pair"),
        (b"", r"a.jsonl: the file is empty \(0 bytes\)"),
    ],
    ids=["json", "field", "null", "number", "not-an-object", "utf8", "surrogate", "empty"],
)
def test_bad_rows_are_reported_with_their_line(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        texts_of(path)


def test_invalid_utf8_in_a_text_file_is_reported_with_its_offset(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"x" * 1_500_000 + b"\xc3(")
    with pytest.raises(DataError, match="a.txt: not UTF-8 at byte 1500000"):
        texts_of(tmp_path / "a.txt")


def test_directories_are_walked_in_order(tmp_path: Path) -> None:
    for name in ("b/2.txt", "b/1.txt", "a.jsonl", ".git/x.txt", "README.md", "notes.pdf"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(jsonl({"text": name}) if name.endswith("jsonl") else name.encode())
    found = [p.relative_to(tmp_path).as_posix() for p in list_files(Source("s", tmp_path))]
    assert found == ["a.jsonl", "b/1.txt", "b/2.txt"]
    assert texts_of(tmp_path) == ["a.jsonl", "b/1.txt", "b/2.txt"]
    assert texts_of(tmp_path / "README.md") == ["README.md"]


def test_a_directory_of_source_files_only(tmp_path: Path) -> None:
    (tmp_path / "__init__.py").touch()
    (tmp_path / "m.py").write_text("x = 1\n")
    assert texts_of(tmp_path) == ["x = 1\n"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing.txt", "source 's': .*missing.txt: no such file"),
        ("a.pdf", "cannot read the suffix '.pdf'; the kinds are .txt"),
        ("folder", "none of its 1 files can be read"),
        ("bad.parquet", "bad.parquet: not a readable parquet file"),
    ],
)
def test_unreadable_paths_are_refused(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "a.pdf").write_bytes(b"%PDF")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 and no more")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "x.bin").write_bytes(b"1")
    with pytest.raises(DataError, match=message):
        texts_of(tmp_path / name)


def test_embedded_corpus_is_the_standard_library() -> None:
    stdlib, docs = embedded_sources()
    files, root = list_embedded_files(), Path(sysconfig.get_paths()["stdlib"])
    assert root / "argparse.py" in files.readable
    assert not any("site-packages" in p.parts for p in files.readable)
    assert root / "pydoc_data" / "topics.py" not in files.readable
    for path in files.skipped:
        with pytest.raises(UnicodeDecodeError):
            path.read_text(encoding="utf-8")
    filled = next(path for path in files.readable if path.stat().st_size)
    first = next(document for document in iterate_documents(stdlib) if document.text)
    assert first.text.encode() == filled.read_bytes()
    topics = list(iterate_documents(docs))
    assert [t.origin for t in topics] == sorted(t.origin for t in topics)
    assert any("lambda" in t.text for t in topics)
