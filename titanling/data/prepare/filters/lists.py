"""Files of words and of test texts that filters look for."""

import glob
import io
import json
import os
import re
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from titanling.data.formats import recognise
from titanling.data.prepare.reading import Reading, Span
from titanling.data.prepare.text import TextFile
from titanling.data.prepare.values import json_values
from titanling.data.unpack import Unreadable, open_unpacked
from titanling.errors import UserError
from titanling.paths import expand

_WORD = re.compile(r"\w+")


def words_of(text: str) -> list[str]:
    """The words of a text, without punctuation and case."""
    return _WORD.findall(text.casefold())


def list_path(path: str, language: str | None) -> str:
    """A list's path for a language. Raises `UserError` if it needs a language and there is none, or is missing."""
    if "{language}" in path:
        if language is None:
            raise UserError(
                f"data.prepare.filters: {path} asks for the language, which is not known; set data.prepare.language"
            )
        path = path.replace("{language}", language)
    path = expand(path)
    if not os.path.isfile(path):
        of = "" if language is None else f" (language {language})"
        raise UserError(f"data.prepare.filters: {path}: no such list{of}; add the file or correct the path")
    return path


def read_list(path: str, language: str | None) -> list[str]:
    """The entries of a list, without comments, in normal form C. Raises `UserError`, also if there is none."""
    path = list_path(path, language)
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 at byte {error.start}; convert it (iconv -t utf-8)") from None
    entries = [entry for line in lines if (entry := unicodedata.normalize("NFC", line.partition("#")[0].strip()))]
    if not entries:
        raise UserError(f"{path}: holds no word; add some, or take the filter out of data.prepare.filters")
    return entries


def read_words(path: str, language: str | None) -> set[str]:
    """The entries of a list, without case."""
    return {entry.casefold() for entry in read_list(path, language)}


def find_test_sets(patterns: Sequence[str]) -> list[str]:
    """Files of `test_sets`, sorted within each. Raises `UserError` for one that finds none or another kind of file."""
    found = []
    for pattern in patterns:
        paths = sorted(path for path in glob.glob(expand(pattern), recursive=True) if os.path.isfile(path))
        if not paths:
            raise UserError(f'data.prepare.filters: test_sets: "{pattern}" finds no file; correct the path')
        for path in paths:
            if _kind(path) not in ("text", "jsonl", "json"):
                raise UserError(f"{path}: a test set is a .txt or .jsonl, perhaps with .gz; rename or convert it")
        found += paths
    return list(dict.fromkeys(found))


def read_test_texts(path: str) -> Iterator[str]:
    """The lines of plain text, the strings of each object of JSON. Raises `UserError`."""
    number, kind = 0, _kind(path)
    try:
        if kind == "json":
            for _, value in json_values(Span(TextFile(path, 0)), Reading(), 0):
                number += 1
                yield from _strings(value)
            return
        with open_unpacked(path) as file:
            for line in io.TextIOWrapper(file, encoding="utf-8-sig"):
                number += 1
                if line.strip():
                    yield from _strings(json.loads(line)) if kind == "jsonl" else (line,)
    except (Unreadable, ValueError, OSError) as error:
        raise UserError(f"{path}: cannot be read at line {number} ({error}); mend or replace this test set") from None


def _kind(path: str) -> str:
    """The format of a test set. Raises `UserError`."""
    try:
        return recognise(path).kind
    except Unreadable as bad:
        if ".txt" in os.path.basename(path):
            return "text"  # whatever it looks like; whoever reads it says what is damaged
        raise UserError(str(bad)) from None


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, (dict, list)):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _strings(inner)
