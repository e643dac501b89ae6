"""Finds the files of text to prepare."""

import glob
import json
import os
import re
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from titanling.data.prepare.outputs import Outputs
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


def find_files(sources: Sequence[str], outputs: Outputs | None = None) -> list[TextFile]:
    """Files of `Prepare.text` in a fixed order: by source as given, by relative POSIX path within a source.

    A source is a file, a folder (everything below it but hidden files and folders), a glob (files only, ** allowed),
    or "python-stdlib" (the standard library's .py files without its tests), each also as NAME=PATH. A file found
    twice counts once. Of a folder that `datasets` has saved, its rows are found. What preparations, runs and exports
    have written is left out; `outputs` are those of this one, and remember it.
    Raises `UserError` for a source that yields no file, and for a link to nothing; OSError.
    """
    outputs = outputs or Outputs()
    found: dict[str, TextFile] = {}
    for source in sources:
        name, path = split_name(source)
        lenient = path == STDLIB
        paths = _find(expand(path), outputs)
        if not paths:
            own = f" but {outputs.met[0]}, a name that its own output has" if outputs.met else ""
            raise UserError(
                f'data.prepare.text: "{path}" is no file, folder or glob that holds any{own}; correct the path'
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


def _find(source: str, outputs: Outputs) -> list[str]:
    if source == STDLIB:
        files = _below(sysconfig.get_path("stdlib"), STDLIB_WITHOUT, None)
        return [path for path in files if path.endswith(".py")]
    if os.path.isfile(source):
        return [] if outputs.has(source) else [source]
    if os.path.isdir(source):
        return _below(source, set(), outputs)
    paths = sorted(path for path in glob.glob(source, recursive=True) if os.path.isfile(path))
    base = os.path.dirname(re.split(r"[*?[]", source)[0])
    folders = dict.fromkeys(os.path.dirname(path) for path in paths)
    folders = dict.fromkeys(inner for folder in folders for inner in _between(base, folder))
    written = {
        os.path.join(folder, name) for folder in folders for name in outputs.among(folder, os.listdir(folder or "."))
    }
    return [path for path in paths if not outputs.has(path) and not (written and _is_below(path, written))]


def _between(base: str, folder: str) -> list[str]:
    """A folder and those above it, as far as `base`."""
    found = [folder]
    while folder != base and len(folder) > len(base):
        folder = os.path.dirname(folder)
        found.append(folder)
    return found


def _is_below(path: str, written: set[str]) -> bool:
    """Whether a file, or a folder that it lies in, is among them."""
    return any(str(each) in written for each in (path, *Path(path).parents))


def _below(root: str, without: set[str], outputs: Outputs | None) -> list[str]:
    """Files below `root`, none of whose path parts is hidden or in `without`, sorted by relative POSIX path."""
    found, met = [], set()
    tops = [root]
    for top in tops:  # links to folders come last: of a file that is met twice, the path without them counts
        for folder, subfolders, names in os.walk(top, onerror=_refuse):
            place = os.path.realpath(folder)
            saved = _saved(folder, names)
            if saved is not None or place in met:  # or a link leads into a circle, or here a second time
                found += [] if place in met else saved or []
                subfolders.clear()
                met.add(place)
                continue
            met.add(place)
            left_out = without | (set() if outputs is None else outputs.among(folder, [*subfolders, *names]))
            left_out |= {"dataset_dict.json"} if "dataset_dict.json" in names else set()  # around what is saved
            inner = [name for name in sorted(subfolders) if not name.startswith(".") and name not in left_out]
            subfolders[:] = [name for name in inner if not os.path.islink(os.path.join(folder, name))]
            tops += [os.path.join(folder, name) for name in inner if name not in subfolders]
            paths = [os.path.join(folder, name) for name in names if not name.startswith(".") and name not in left_out]
            found += [path for path in paths if outputs is None or not outputs.has(path)]
    for path in found:
        if outputs is not None and not os.path.exists(path):
            raise UserError(f"{path}: is a link to nothing; mend or remove it")
    files = [path for path in found if os.path.isfile(path)]
    return sorted(files, key=lambda path: Path(path).relative_to(root).as_posix())


def _refuse(error: OSError) -> None:
    """A folder that cannot be looked into is not taken for an empty one."""
    raise error


def _saved(folder: str, names: Sequence[str]) -> list[str] | None:
    """The files of rows in a folder that `save_to_disk` of `datasets` has written; None for any other folder."""
    if not {"state.json", "dataset_info.json"} <= set(names):
        return None
    try:
        rows = json.loads(Path(folder, "state.json").read_text(encoding="utf-8"))["_data_files"]
        return [os.path.join(folder, row["filename"]) for row in rows]
    except (ValueError, KeyError, TypeError):
        return None
