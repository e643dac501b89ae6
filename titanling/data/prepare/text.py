"""Finds the files of text to prepare."""

import glob
import os
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from titanling.errors import UserError
from titanling.paths import expand

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
    source: str = ""
    """What reports call the argument that it came by: its NAME, or the argument."""
    name: str | None = None
    """NAME of NAME=PATH."""


def find_files(sources: Sequence[str]) -> list[TextFile]:
    """Files of `Prepare.text` in a fixed order: by source as given, by relative POSIX path within a source.

    A source is a file, a folder (everything below it but hidden files and folders), a glob (files only, ** allowed),
    or "python-stdlib" (the standard library's .py files without its tests), each also as NAME=PATH. A file found
    twice counts once. Raises `UserError` for a source that yields no file.
    """
    found: dict[str, TextFile] = {}
    for source in sources:
        name, path = split_name(source)
        lenient = path == STDLIB
        paths = _find(expand(path))
        if not paths:
            raise UserError(
                f'data.prepare.text: "{path}" is no file, folder or glob that holds any; correct the path'
                " (it is relative to the working directory)"
            )
        for path in paths:
            file = TextFile(path, os.path.getsize(path), lenient, name or source, name)
            found.setdefault(os.path.realpath(path), file)
    return list(found.values())


def split_name(source: str) -> tuple[str | None, str]:
    """NAME and PATH of NAME=PATH; no NAME if there is none, or if the whole is a path that exists."""
    name, equals, path = source.partition("=")
    if not equals or not name or not path or "/" in name or os.path.exists(source):
        return None, source
    return name, path


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
