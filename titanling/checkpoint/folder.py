"""A checkpoint as a folder: names, manifest, atomic commit, retention. Imports no torch.

On a file system a checkpoint is written to `step-000100.partial`, synced and renamed: a folder with the final name is
whole. In an object store, which cannot rename a folder, it is written in place, and whole once its manifest is there.
Either way manifest.json is written last; it holds the size and hash (XXH3, 128 bits) of every other file.
"""

import errno
import hashlib
import io
import json
import os
import re
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Any

import xxhash

from titanling.checkpoint.ours import TOP, stranger
from titanling.checkpoint.remote import RemoteFile, reason
from titanling.errors import UserError

FULL = (errno.ENOSPC, errno.EDQUOT)
new_hash = xxhash.xxh3_128
"""What files are hashed with: against damage, not against forgery, which could rewrite the manifest as well; and ten
times as fast as SHA-256, so that it hides behind reading and writing."""
MANIFEST = "manifest.json"
STATE = "state.json"
PARTS = ("model", "optimizer")
"""Folders of tensor files."""
CHUNK_BYTES = 2**20
_NAME = re.compile(r"step-(\d{6,})")
_SUFFIXED = re.compile(r"step-(\d{6,})(?:\.(\w+)(?:-\d+)?)?")
_LEFTOVER = re.compile(r"step-\d{6,}\.(partial|deleted)(-\d+)?")


def renames(path: Path) -> bool:
    """Whether folders there are renamed in one move (a file system), or not (an object store)."""
    return isinstance(path, Path)


def failures(path: Path) -> tuple[type[Exception], ...]:
    """What reading or writing there may raise when the storage fails: each client of a URL has its own errors."""
    return (OSError,) if renames(path) else (Exception,)


@contextmanager
def one_line(path: Path) -> Iterator[None]:
    """Raises UserError for what reading there may raise when the storage fails, or when others delete it meanwhile."""
    try:
        yield
    except UserError:
        raise
    except failures(path) as error:
        raise UserError(f"{path}: cannot be read: {reason(error)}") from None


def open_to_read(path: Path) -> io.RawIOBase:
    """A file, unbuffered: whoever reads it takes large pieces."""
    return path.open("rb", buffering=0) if renames(path) else RemoteFile(path)


def step_name(step: int) -> str:
    """Name of the folder of a step's checkpoint."""
    return f"step-{step:06d}"


def parse_name(name: str) -> tuple[int, str | None] | None:
    """Step and suffix of `step-000100` (None) or `step-000100.damaged-2` ("damaged"); None: another name."""
    found = _SUFFIXED.fullmatch(name)
    return (int(found[1]), found[2]) if found else None


def step_folder(root: Path, step: int) -> Path:
    """Where the checkpoint of `step` belongs."""
    return root / step_name(step)


def working_folder(final: Path) -> Path:
    """Where the checkpoint `final` is written until it is whole."""
    return final.with_name(final.name + ".partial") if renames(final) else final


def list_steps(root: Path) -> list[int]:
    """Steps of the whole checkpoints under `root`, ascending."""
    if not root.is_dir():
        return []
    names = ((_NAME.fullmatch(entry.name), entry) for entry in root.iterdir() if entry.is_dir())
    return sorted(int(name[1]) for name, entry in names if name and (renames(root) or (entry / MANIFEST).exists()))


def remove_leftovers(root: Path) -> list[str]:
    """Delete what an interrupted save or deletion left behind; what has such a name and is not ours stays, in words."""
    remarks = []
    for entry in sorted(root.iterdir()) if root.is_dir() else []:
        torn = not renames(root) and _NAME.fullmatch(entry.name) and not (entry / MANIFEST).exists()
        if torn or _LEFTOVER.fullmatch(entry.name):
            discard(entry)
            if renames(root) and os.path.lexists(entry):
                found = stranger(entry)
                what = f"is not ours ({found})" if found else "cannot be removed"
                remarks.append(f"{entry}: {what} and stays; its name is that of a checkpoint: move it away")
    return remarks


def begin(final: Path) -> None:
    """Make the folder in which the checkpoint `final` is written. Other ranks may have begun to write there.

    Raises OSError if what is there is not ours.
    """
    working = working_folder(final)
    working.mkdir(parents=True, exist_ok=True)
    if not renames(final):
        (final / MANIFEST).unlink(missing_ok=True)
        return
    found = [entry.name for entry in os.scandir(working) if entry.name not in TOP or entry.is_symlink()]
    if working.is_symlink() or found:
        what = "it is a link" if working.is_symlink() else f"it holds {min(found)}, which is no part of a checkpoint"
        raise FileExistsError(errno.EEXIST, f"{what}; move it away", str(working))


def discard(folder: Path) -> None:
    """Delete what there is of a folder, as far as that is possible; nothing if it is not ours."""
    with suppress(*failures(folder)):
        if folder.is_dir() and stranger(folder) is None:
            _remove(folder)


def commit(final: Path, files: dict[str, dict[str, Any]]) -> None:
    """Make a checkpoint whole whose files (name → size and hash) have all been written and synced."""
    working = working_folder(final)
    if not renames(final):
        write_json(final / MANIFEST, _manifest(files))
        return
    write_json(working / MANIFEST, _manifest(files))
    sync(working / MANIFEST)
    for path in sorted({working, *(working / name for name in map(os.path.dirname, files))}, reverse=True):
        sync(path)
    former = _free(final, "deleted")
    if os.path.lexists(final):  # out of the way in one move: deleting it takes time
        final.rename(former)
    working.rename(final)
    sync_parents(final)
    discard(former)


def prune(root: Path, keep: int, protected: Collection[int] = (), every: int = 0) -> list[int]:
    """Delete all but the newest `keep` checkpoints (0 keeps all); the steps that were deleted.

    Those of `protected` steps and of multiples of `every` stay as well, and those that hold what is not ours.
    """
    doomed = [step for step, strange in _superfluous(root, keep, protected, every).items() if strange is None]
    for step in doomed:
        delete(step_folder(root, step))
    return doomed


def spared(root: Path, keep: int, protected: Collection[int] = (), every: int = 0) -> list[str]:
    """Why `prune`, called so, leaves checkpoints that it would delete if nothing of somebody else's were in them."""
    found = _superfluous(root, keep, protected, every)
    return [f"{step_folder(root, step)}: is kept, for it holds {what}" for step, what in found.items() if what]


def _superfluous(root: Path, keep: int, protected: Collection[int], every: int) -> dict[int, str | None]:
    """Step of each checkpoint that retention would let go → what there is in it that is not ours."""
    return {
        step: stranger(step_folder(root, step))
        for step in (list_steps(root)[:-keep] if keep else [])
        if step not in protected and not (every and step % every == 0)
    }


def set_aside(folder: Path, why: str) -> str:
    """Keep a checkpoint under another name, `….<why>`, never again taken for a part of this run; that name.

    Another one that was set aside stays: the second is `….<why>-2`.
    """
    aside = _free(folder, why)
    if renames(folder):
        return folder.rename(aside).name
    # A copy, the manifest last, and only then is the original deleted: cut short, one of the two is whole.
    for name in (*files_of(folder), MANIFEST):
        source, target = folder / name, aside / name
        target.parent.mkdir(parents=True, exist_ok=True)
        source.fs.copy(source.path, target.path)  # type: ignore[attr-defined]  # universal_pathlib's, in the storage
    delete(folder)
    return aside.name


def delete(folder: Path) -> None:
    """Delete a checkpoint. Cut short, it leaves none that looks whole."""
    if renames(folder):
        folder = folder.rename(_free(folder, "deleted"))
    else:
        (folder / MANIFEST).unlink(missing_ok=True)
    _remove(folder)


def shortage(where: Path, needed: int) -> str:
    """In words, how many bytes are needed on the disk of a local path, and how many it has."""
    disk = next(path for path in (where, *where.parents) if path.exists())
    return f"it needs {needed:,} bytes and the disk has {shutil.disk_usage(disk).free:,} free"


def files_of(folder: Path) -> list[str]:
    """Relative names of a checkpoint's files, sorted, without the manifest."""
    found = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return sorted(name for name in found if name != MANIFEST)


def digest(path: Path) -> dict[str, Any]:
    """Size and hash of a file."""
    hasher, size = new_hash(), 0
    buffer = memoryview(bytearray(CHUNK_BYTES))  # one for all: new memory for each piece would cost as much as hashing
    with open_to_read(path) as file:
        while count := file.readinto(buffer):
            hasher.update(buffer[:count])
            size += count
    return {"bytes": size, "xxh3_128": hasher.hexdigest()}


def read_manifest(folder: Path) -> dict[str, dict[str, Any]]:
    """File name → size and hash. Raises UserError where the folder is no checkpoint or its manifest is damaged.

    Also where there is a tensor file that the manifest does not list.
    """
    files = listed_files(folder)
    stranger = next(iter(strangers(folder, files)), None)
    if stranger is not None:
        raise UserError(stranger)
    return files


def strangers(folder: Path, manifest: dict[str, dict[str, Any]]) -> list[str]:
    """What is wrong with tensor files that the manifest does not list: a reader takes every one in the folder."""
    with one_line(folder):
        found = [name for name in files_of(folder) if name.endswith(".safetensors") and name not in manifest]
    return [f"{folder / name}: does not belong to this checkpoint" for name in found]


def listed_files(folder: Path) -> dict[str, dict[str, Any]]:
    """The manifest alone, as `read_manifest`."""
    with one_line(folder):
        if not folder.is_dir():
            others = ", ".join(map(step_name, list_steps(folder.parent)[-5:]))
            raise UserError(f"{folder}: no such checkpoint folder" + (f"; there are {others}" if others else ""))
        for path in sorted(folder.rglob("*")) if renames(folder) else ():
            if not _is_plain(path):
                raise UserError(f"{path}: is a link or no regular file, which a checkpoint never holds")
    content = _content(folder / MANIFEST)
    manifest = _parse_json(folder / MANIFEST, content)
    files = manifest.get("files")
    if manifest.get("format") != 2 or not isinstance(files, dict) or not all(map(_is_entry, files.values())):
        raise UserError(f"{folder / MANIFEST}: not a titanling checkpoint manifest of format 2")
    if any(name.startswith("/") or ".." in Path(name).parts or not _is_a_name(name) for name in files):
        raise UserError(f"{folder / MANIFEST}: names a file outside the checkpoint; do not trust this checkpoint")
    if manifest.get("sha256") != _seal(files) or content != encode_json(_manifest(files)):
        raise UserError(f"{folder / MANIFEST}: its list of files is not the one that was written")
    return files


def damage(
    folder: Path, names: Collection[str], manifest: dict[str, dict[str, Any]], hashes: bool = True
) -> str | None:
    """What is wrong with the first bad file of `names` (a part of the manifest's), or None.

    Without `hashes` only sizes are looked at.
    """
    for name in names:
        path, expected = folder / name, manifest[name]
        try:
            problem = mismatch(path, digest(path) if hashes else {**expected, "bytes": path.stat().st_size}, expected)
            if problem is not None:
                return problem
        except FileNotFoundError:
            return f"{path}: missing from the checkpoint"
        except failures(folder) as error:
            return f"{path}: cannot be read: {reason(error)}"
    return None


def mismatch(path: Path, found: dict[str, Any], expected: dict[str, Any]) -> str | None:
    """What is wrong with a file of this size and hash, or None."""
    if found["bytes"] != expected["bytes"]:
        return f"{path}: has {found['bytes']} bytes instead of {expected['bytes']}"
    if found["xxh3_128"] != expected["xxh3_128"]:
        return f"{path}: its hash is not the one that the manifest recorded"
    return None


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write readable JSON."""
    path.write_bytes(encode_json(value))


def encode_json(value: dict[str, Any]) -> bytes:
    """Readable JSON."""
    return (json.dumps(value, indent=1) + "\n").encode()


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raises UserError if it is missing, cannot be read or is malformed."""
    return _parse_json(path, _content(path))


def _content(path: Path) -> bytes:
    with one_line(path):
        try:
            return path.read_bytes()
        except FileNotFoundError:
            raise UserError(f"{path}: missing; {path.parent} is not a whole checkpoint") from None


def _parse_json(path: Path, content: bytes) -> dict[str, Any]:
    try:
        value = json.loads(content.decode())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: must hold a JSON object")
    return value


def sync(path: Path) -> None:
    """Flush a local file or folder to the disk."""
    if not renames(path):
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_parents(path: Path) -> None:
    """Flush the folder that a local path is in, and those above, which may be as new: the run's and the one of runs."""
    sync(path.parent)
    for above in path.parents[1:3]:
        with suppress(OSError):  # we may pass through it, but not open it
            sync(above)


def forget_cached(path: Path) -> None:
    """Have the next read of a synced local file come from the disk, not from the copy that writing left in memory."""
    if renames(path) and hasattr(os, "posix_fadvise"):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def _is_plain(path: Path) -> bool:
    """Whether this is a file or a folder of its own: reading a pipe would wait for ever, and a link leads elsewhere."""
    return not path.is_symlink() and (path.is_file() or path.is_dir())


def _is_a_name(name: str) -> bool:
    """Whether a file can be called so."""
    try:
        return b"\0" not in os.fsencode(name)
    except UnicodeEncodeError:  # half a character, which JSON can say and no file system
        return False


def _is_entry(entry: Any) -> bool:
    return isinstance(entry, dict) and isinstance(entry.get("bytes"), int) and isinstance(entry.get("xxh3_128"), str)


def _manifest(files: dict[str, dict[str, Any]]) -> dict[str, Any]:
    files = dict(sorted(files.items()))
    return {"format": 2, "sha256": _seal(files), "files": files}


def _seal(files: dict[str, dict[str, Any]]) -> str:
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


def _free(folder: Path, why: str) -> Path:
    """The first of `….<why>`, `….<why>-2`, … that nothing has."""
    names = (folder.with_name(f"{folder.name}.{why}{f'-{number}' if number > 1 else ''}") for number in count(1))
    return next(name for name in names if not (os.path.lexists(name) if renames(name) else name.exists()))


def _remove(folder: Path) -> None:
    if not renames(folder):
        folder.rmdir(recursive=True)  # type: ignore[call-arg]  # universal_pathlib's
    elif folder.is_symlink():  # never what it leads to
        folder.unlink()
    else:
        shutil.rmtree(folder)
