"""Turns of phrase that readers stumble over: no text of ours uses them, in code, comments or documents."""

import io
import re
import subprocess
import tokenize
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCUMENTS = (".md", ".toml", ".sh", ".env")
NOT_OURS = ("tests/old_run/a31d440/", "tests/golden/")
HERE = "tests/architecture/test_words.py"
AVOIDED = (
    "told of",
    "of which",
    "be it",
    "for ever",
    "anew",
    "at will",
    "take up",
    "takes up",
    "taken up",
    "taking up",
    "took up",
    "what is more",
    "does so",
    "no word",
    "by a hair",
    "come out a bit otherwise",
    "comes in further trips",
    "which is said",
    "to have run first",
)
PATTERN = re.compile(r"\b(" + "|".join(text.replace(" ", r"\s+") for text in AVOIDED) + r")\b", re.IGNORECASE)


def files() -> list[str]:
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    return [
        name
        for name in filter(None, listed.split("\0"))
        if (name.endswith((".py", *DOCUMENTS)) or name in ("Makefile", ".ci/run"))
        and not name.startswith(NOT_OURS)
        and name != HERE
        and (ROOT / name).is_file()
    ]


def passages(name: str) -> Iterator[tuple[int, str]]:
    """Yield (first line, text): of Python the strings and comments, each with those that continue it."""
    text = (ROOT / name).read_text(encoding="utf-8")
    if not name.endswith(".py"):
        yield 1, text
        return
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    prose = {tokenize.STRING: "string", tokenize.COMMENT: "comment"}
    for middle in ("FSTRING_START", "FSTRING_MIDDLE", "FSTRING_END"):  # Python 3.12
        if hasattr(tokenize, middle):
            prose[getattr(tokenize, middle)] = "string"
    kept = [token for token in tokens if token.type not in (tokenize.NL, tokenize.INDENT, tokenize.DEDENT)]
    for kind, group in groupby(kept, lambda token: prose.get(token.type)):
        if kind is None:
            continue
        run = list(group)
        marks = r"^#|\s#" if kind == "comment" else r"^[rbfRBF]*[\"']+|[\"']+$"
        # A line of a comment, and a piece of a string, go on where the last one ended.
        joined, line = "", run[0].start[0]
        for token in run:
            joined += "\n" * (token.start[0] - line) + " " + re.sub(marks, "", token.string)
            line = token.end[0]
        yield run[0].start[0], joined


@pytest.mark.parametrize("name", files())
def test_no_text_uses_a_turn_that_readers_stumble_over(name: str) -> None:
    found = [
        f"{name}:{start + text[: match.start()].count(chr(10))}: {' '.join(match[0].split())}"
        for start, text in passages(name)
        for match in PATTERN.finditer(text)
    ]
    assert not found, "\n".join(found)


def test_a_turn_is_found_across_lines_and_pieces(tmp_path: Path) -> None:
    comment = "# one of\n# which\n"
    pieces = 'text = (\n    "one of "\n    "which"\n)\n'
    for source, line in ((comment, 1), (pieces, 2)):
        (path := tmp_path / "a.py").write_text(source)
        found = [
            (start, match[0].split())
            for start, text in passages(str(path))
            for match in PATTERN.finditer(text)
        ]
        assert found == [(line, ["of", "which"])]
