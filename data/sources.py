"""Raw text: the files of a source, and the documents in them, in file order.

Text is passed on as written: no shuffling, no newline translation, no cache left behind. Parquet files and
datasets saved with `save_to_disk` are read through Hugging Face `datasets`. Plain text and JSON lines are
decoded here, because the readers of `datasets` turn "\\r\\n" into "\\n" and a JSON text such as "2020-01-01"
into "2020-01-01 00:00:00", accept a .zst file that was cut short, and do not give the line of a bad row.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from turnout.data.embedded import DOCS, STDLIB, iterate_embedded_texts, list_embedded_files
from turnout.data.errors import DataError
from turnout.data.files import COMPRESSED_SUFFIXES, read_bytes, read_lines

TEXT_SUFFIXES = {".txt"}
# Read when given by name, and from directories without data files: beside data files they are READMEs.
SOURCE_SUFFIXES = {".py", ".md", ".rst"}
JSON_SUFFIXES = {".jsonl", ".json"}
PARQUET_SUFFIX = ".parquet"
KINDS = ".txt, .jsonl, .json (each also with .gz, .zst, .bz2, .xz), .parquet, .py, .md, .rst"
SAVED_DATASET_FILES = ("dataset_info.json", "state.json")


@dataclass(frozen=True)
class Source:
    """A named part of the corpus. A path of None means the embedded source of that name."""

    name: str
    path: Path | None
    weight: float | None = None
    text_field: str = "text"


@dataclass(frozen=True, slots=True)
class Document:
    text: str
    n_bytes: int  # UTF-8 length of the text
    digest: bytes  # SHA-256 of the UTF-8 text
    origin: str  # for messages: "file.jsonl:12"


def embedded_sources() -> list[Source]:
    """Return the sources of the embedded corpus. Raises DataError if this interpreter lacks it."""
    list_embedded_files()
    return [Source(STDLIB, None), Source(DOCS, None)]


def list_files(source: Source) -> list[Path]:
    """Return the files of a source in reading order. Raises DataError for a path that cannot be read."""
    path = source.path
    if path is None:
        return list(list_embedded_files().readable) if source.name == STDLIB else []
    where = f"source {source.name!r}: {path}"
    if path.is_file():
        _check_readable(path, where)
        return [path]
    if not path.is_dir():
        raise DataError(f"{where}: no such file or directory; check the path")
    if (path / "dataset_dict.json").is_file():
        splits = sorted(p.name for p in path.iterdir() if p.is_dir())
        raise DataError(
            f"{where}: a saved dataset with the splits {splits}; give one of them, such as {path}/{splits[0]}"
        )
    if _is_saved_dataset(path):
        return sorted(path.glob("*.arrow"))
    found = [p for p in sorted(path.rglob("*")) if p.is_file() and not _is_hidden(p.relative_to(path))]
    data = [p for p in found if _kind(p) in TEXT_SUFFIXES | JSON_SUFFIXES | {PARQUET_SUFFIX}]
    data = data or [p for p in found if _kind(p) in SOURCE_SUFFIXES]
    if not data:
        raise DataError(f"{where}: none of its {len(found)} files can be read; the kinds are {KINDS}")
    for file in data:
        # An empty text file is an empty document, like many __init__.py; an empty .zst is a failed download.
        if _kind(file) not in TEXT_SUFFIXES | SOURCE_SUFFIXES or file.suffix in COMPRESSED_SUFFIXES:
            _check_readable(file, f"source {source.name!r}: {file}")
    return data


def _is_hidden(inside: Path) -> bool:
    return any(part.startswith(".") for part in inside.parts)


def _is_saved_dataset(path: Path) -> bool:
    return all((path / name).is_file() for name in SAVED_DATASET_FILES)


def _kind(path: Path) -> str:
    """Return the suffix that names the format: the one before the compression suffix, if there is one."""
    if path.suffix in COMPRESSED_SUFFIXES:
        inner = Path(path.stem).suffix
        return "" if inner == PARQUET_SUFFIX else inner
    return path.suffix


def _check_readable(path: Path, where: str) -> None:
    if _kind(path) not in TEXT_SUFFIXES | SOURCE_SUFFIXES | JSON_SUFFIXES | {PARQUET_SUFFIX}:
        raise DataError(f"{where}: cannot read the suffix {path.suffix!r}; the kinds are {KINDS}")
    if path.stat().st_size == 0:
        raise DataError(f"{where}: the file is empty (0 bytes); fill it or leave it out")


def iterate_documents(source: Source) -> Iterator[Document]:
    """Yield the documents of a source in file order, without empty ones.

    A text file is one document, with its line ends unchanged. Each row of a JSON or parquet file is a
    document: the field `source.text_field`, unchanged.
    """
    for origin, text in _iterate_texts(source):
        if text:
            yield _to_document(text, origin)


def _iterate_texts(source: Source) -> Iterator[tuple[str, str]]:
    if source.path is None:
        yield from iterate_embedded_texts(source.name)
        return
    files = list_files(source)
    if _is_saved_dataset(source.path):
        yield from _read_saved_dataset(source.path, source.text_field)
        return
    for file in files:
        if _kind(file) == PARQUET_SUFFIX:
            yield from _read_parquet(file, source.text_field)
        elif _kind(file) in JSON_SUFFIXES:
            yield from _read_json(file, source.text_field)
        else:
            yield str(file), _decode(read_bytes(file), file, 0)


def _to_document(text: str, origin: str) -> Document:
    try:
        encoded = text.encode("utf-8")
    except UnicodeEncodeError as err:
        # JSON can spell half of a surrogate pair ("\ud800"), which is not a character.
        raise DataError(
            f"{origin}: character {err.start} is {text[err.start]!r}, half a surrogate pair; write the pair"
        ) from err
    return Document(text, len(encoded), hashlib.sha256(encoded).digest(), origin)


def _decode(content: bytes, path: Path, offset: int) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as err:
        raise DataError(
            f"{path}: not UTF-8 at byte {offset + err.start} (0x{content[err.start]:02x}); convert it"
        ) from err


def _read_json(path: Path, field: str) -> Iterator[tuple[str, str]]:
    """Read JSON lines, or one array of objects, recognised by its first character."""
    offset = 0
    for number, line in enumerate(read_lines(path), start=1):
        text = _decode(line, path, offset).removeprefix("\ufeff" if number == 1 else "")
        if number == 1 and text.lstrip().startswith("["):
            yield from _read_json_array(path, field)
            return
        offset += len(line) + 1
        if not text.strip():
            continue
        origin = f"{path}:{number}"
        try:
            row = json.loads(text)
        except json.JSONDecodeError as err:
            raise DataError(
                f"{origin}: not JSON ({err.msg} at column {err.colno}); fix or remove the line"
            ) from err
        yield origin, _text_of(row, field, origin)


def _read_json_array(path: Path, field: str) -> Iterator[tuple[str, str]]:
    try:
        rows = json.loads(_decode(read_bytes(path), path, 0).removeprefix("\ufeff"))
    except json.JSONDecodeError as err:
        raise DataError(
            f"{path}:{err.lineno}: not JSON ({err.msg} at column {err.colno}); fix the file"
        ) from err
    for number, row in enumerate(rows):
        origin = f"{path}[{number}]"
        yield origin, _text_of(row, field, origin)


def _text_of(row: object, field: str, origin: str) -> str:
    if not isinstance(row, dict):
        raise DataError(f"{origin}: the row is a {type(row).__name__}, not an object with a field {field!r}")
    if field not in row:
        raise DataError(
            f"{origin}: no field {field!r} among {sorted(row)}; set the source's text_field to one of them"
        )
    text = row[field]
    if not isinstance(text, str):
        raise DataError(
            f"{origin}: field {field!r} is {text!r:.60} ({type(text).__name__}), not a string; fix the row"
        )
    return text


def _load_datasets() -> Any:
    """Import `datasets` without network access and progress bars."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    # Imported here because it takes a second, and only parquet files and saved datasets need it.
    import datasets

    datasets.disable_progress_bars()
    return datasets


def _read_parquet(path: Path, field: str) -> Iterator[tuple[str, str]]:
    datasets = _load_datasets()
    with tempfile.TemporaryDirectory(prefix="turnout-datasets-") as cache_dir:

        def stream(columns: list[str] | None) -> Any:
            return datasets.load_dataset(
                "parquet",
                data_files=str(path),
                split="train",
                streaming=True,
                columns=columns,
                cache_dir=cache_dir,
            )

        try:
            _check_features(stream(None).features, field, str(path))
            for number, row in enumerate(stream([field])):
                origin = f"{path}[{number}]"
                yield origin, _text_of(row, field, origin)
        except DataError:
            raise
        except ValueError as err:  # pyarrow's format errors are ValueErrors
            raise DataError(f"{path}: not a readable parquet file ({err}); write or copy it again") from err


def _read_saved_dataset(path: Path, field: str) -> Iterator[tuple[str, str]]:
    dataset = _load_datasets().load_from_disk(str(path))
    _check_features(dataset.features, field, str(path))
    for number, row in enumerate(dataset.select_columns([field])):
        origin = f"{path}[{number}]"
        yield origin, _text_of(row, field, origin)


def _check_features(features: Any, field: str, where: str) -> None:
    if field not in features:
        raise DataError(f"{where}: no field {field!r} among {sorted(features)}; set the source's text_field")
