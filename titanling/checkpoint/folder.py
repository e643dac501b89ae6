"""A checkpoint as a folder on disk: names, manifest, atomic commit, retention. Imports no torch.

A checkpoint is written to `step-000100.partial`, synced and renamed: a folder with the final name is whole. Its
manifest.json, written last, holds the size and SHA-256 of every other file.
"""

import hashlib
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

from titanling.data.indexed import file_sha256
from titanling.errors import UserError

MANIFEST = "manifest.json"
STATE = "state.json"
_NAME = re.compile(r"step-(\d{6,})")
_LEFTOVER = re.compile(r"step-\d{6,}\.(partial|deleted)")


def step_folder(root: Path, step: int) -> Path:
    """Where the checkpoint of `step` belongs."""
    return root / f"step-{step:06d}"


def list_steps(root: Path) -> list[int]:
    """Steps of the whole checkpoints under `root`, ascending."""
    if not root.is_dir():
        return []
    names = (_NAME.fullmatch(entry.name) for entry in root.iterdir() if entry.is_dir())
    return sorted(int(name[1]) for name in names if name)


def remove_leftovers(root: Path) -> None:
    """Delete what an interrupted save or deletion left behind."""
    if root.is_dir():
        for entry in root.iterdir():
            if _LEFTOVER.fullmatch(entry.name):
                shutil.rmtree(entry)


def begin(final: Path) -> Path:
    """An empty partial folder for the checkpoint `final`."""
    partial = final.with_name(final.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    return partial


def sync_files(folder: Path, prefix: str) -> None:
    """Flush to the disk the files below `folder` whose names begin with `prefix`."""
    for path in folder.rglob(f"{prefix}*"):
        _sync(path)


def commit(partial: Path, hashes: dict[str, dict[str, Any]]) -> None:
    """Write the manifest, sync files and folders, and give the folder its final name."""
    write_json(partial / MANIFEST, {"format": 1, "sha256": _seal(hashes), "files": hashes})
    for path in sorted(partial.rglob("*"), reverse=True):
        _sync(path)
    _sync(partial)
    final = partial.with_suffix("")
    if final.exists():
        _delete(final)
    partial.rename(final)
    _sync(final.parent)


def retain(root: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints; 0 keeps all."""
    for step in list_steps(root)[:-keep] if keep else []:
        _delete(step_folder(root, step))


def set_aside(root: Path, step: int) -> list[str]:
    """Rename the checkpoints after `step` to `….superseded`: kept, but never again taken for a part of this run."""
    names = []
    for later in (step_folder(root, number) for number in list_steps(root) if number > step):
        aside = later.with_name(later.name + ".superseded")
        shutil.rmtree(aside, ignore_errors=True)
        names.append(later.rename(aside).name)
    return names


def files_of(folder: Path) -> list[str]:
    """Relative names of a checkpoint's files, sorted, without the manifest."""
    found = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return sorted(name for name in found if name != MANIFEST)


def digest(path: Path) -> dict[str, Any]:
    """Size and SHA-256 of a file."""
    return {"bytes": path.stat().st_size, "sha256": file_sha256(str(path))}


def read_manifest(folder: Path) -> dict[str, dict[str, Any]]:
    """File name → size and hash. Raises UserError where the folder is no checkpoint or its manifest is damaged."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such checkpoint folder")
    manifest = read_json(folder / MANIFEST)
    files = manifest.get("files")
    if manifest.get("format") != 1 or not isinstance(files, dict):
        raise UserError(f"{folder / MANIFEST}: not a titanling checkpoint manifest of format 1")
    if any(name.startswith("/") or ".." in Path(name).parts for name in files):
        raise UserError(f"{folder / MANIFEST}: names a file outside the checkpoint; do not trust this checkpoint")
    if manifest.get("sha256") != _seal(files):
        raise UserError(f"{folder / MANIFEST}: its list of files is not the one that was written")
    # Every .safetensors in the folder is read, so none may be there that was not written with it.
    stranger = next((name for name in files_of(folder) if name.endswith(".safetensors") and name not in files), None)
    if stranger is not None:
        raise UserError(f"{folder / stranger}: does not belong to this checkpoint")
    return files


def damage(folder: Path, names: list[str], manifest: dict[str, dict[str, Any]]) -> str | None:
    """What is wrong with the first bad file of `names` (a part of the manifest's), or None."""
    for name in names:
        path = folder / name
        if not path.is_file():
            return f"{path}: missing from the checkpoint"
        if path.stat().st_size != manifest[name]["bytes"]:
            return f"{path}: has {path.stat().st_size} bytes instead of {manifest[name]['bytes']}"
        if digest(path)["sha256"] != manifest[name]["sha256"]:
            return f"{path}: its SHA-256 is not the one that the manifest recorded"
    return None


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write readable JSON."""
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raises UserError if it is missing or malformed."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: missing; {path.parent} is not a whole checkpoint") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: must hold a JSON object")
    return value


def _seal(files: dict[str, dict[str, Any]]) -> str:
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


def _delete(folder: Path) -> None:
    # Renamed first: a deletion that is cut short leaves no folder that looks whole.
    doomed = folder.with_name(folder.name + ".deleted")
    folder.rename(doomed)
    shutil.rmtree(doomed)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
