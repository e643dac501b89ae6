"""Finds the text to prepare: each file is one document."""

import glob
import os
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from titanling.errors import UserError

STDLIB = "python-stdlib"
# Packages that are not the library's own, caches, and its tests, which not every distribution ships.
STDLIB_WITHOUT = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}


@dataclass(frozen=True)
class TextFile:
    """One file of text."""

    path: str
    bytes: int
    """Size of the file."""
    lenient: bool = False
    """Skip the file instead of failing if it is not UTF-8."""


def find_files(sources: Sequence[str]) -> list[TextFile]:
    """Files of `Prepare.text` in a fixed order: by source as given, by relative POSIX path within a source.

    A source is a file, a folder (everything below it but hidden files and folders), a glob (files only, ** allowed),
    or "python-stdlib" (the standard library's .py files without its tests). A file found twice counts once.
    Raises `UserError` for a source that yields no file.
    """
    found: dict[str, TextFile] = {}
    for source in sources:
        lenient = source == STDLIB
        paths = _find(os.path.expanduser(source))
        if not paths:
            raise UserError(
                f'data.prepare.text: "{source}" is no file, folder or glob that holds any; correct the path'
                " (it is relative to the working directory)"
            )
        for path in paths:
            found.setdefault(os.path.realpath(path), TextFile(path, os.path.getsize(path), lenient))
    return list(found.values())


def read_text(file: TextFile) -> str | None:
    """The text of a file exactly as stored, None if it is empty or (lenient) not UTF-8. Raises `UserError`."""
    try:
        return Path(file.path).read_bytes().decode("utf-8") or None
    except UnicodeDecodeError as error:
        # The standard library holds a few files in other encodings, to test Python's own decoding.
        if file.lenient:
            return None
        raise UserError(
            f"{file.path}: not UTF-8 at byte {error.start}; convert it (iconv -t utf-8) or leave it out of"
            " data.prepare.text"
        ) from None


def _find(source: str) -> list[str]:
    if source == STDLIB:
        files = _below(sysconfig.get_path("stdlib"), STDLIB_WITHOUT)
        return [path for path in files if path.endswith(".py")]
    if os.path.isfile(source):
        return [source]
    if os.path.isdir(source):
        return _below(source, set())
    return sorted(path for path in glob.glob(source, recursive=True) if os.path.isfile(path))


def _below(root: str, without: set[str]) -> list[str]:
    """Files below `root`, none of whose path parts is hidden or in `without`, sorted by relative POSIX path."""
    found = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if not name.startswith(".") and name not in without]
        found += [os.path.join(folder, name) for name in names if not name.startswith(".")]
    files = [path for path in found if os.path.isfile(path)]
    return sorted(files, key=lambda path: Path(path).relative_to(root).as_posix())
