"""Files of a folder that somebody else made: only what lies in it is read, and nothing that would never end."""

import os
import shutil
import stat
from pathlib import Path

from titanling.checkpoint.folder import renames
from titanling.errors import UserError


def own_file(path: Path, most: int | None = None) -> Path | None:
    """Where a file of a folder really lies; None if there is none, or a folder of that name.

    A link may lead to another file of its folder, and out of it only as in Hugging Face's cache, from snapshots/NAME/
    to blobs/. Raises UserError for every other link, for what is no regular file, and beyond `most` bytes.
    """
    if not renames(path):  # an object store has no links
        return path if path.is_file() else None
    if not os.path.lexists(path):
        return None
    try:
        real, folder = path.resolve(strict=True), path.parent.resolve(strict=True)
        found = real.stat()
    except (OSError, RuntimeError) as error:  # it leads nowhere, or round in circles
        reason = getattr(error, "strerror", None) or "the link leads nowhere"
        raise UserError(f"{path}: cannot be read: {reason}; copy the file itself there") from None
    if path.is_symlink() and not _belongs(real, folder):
        raise UserError(
            f"{path}: is a link, which is not followed; copy the directory with cp -rL and give the copy, if what is"
            f" meant is {real}"
        )
    if stat.S_ISDIR(found.st_mode):
        return None
    if not stat.S_ISREG(found.st_mode):  # a pipe would keep its reader waiting for ever
        raise UserError(f"{path}: is no regular file; replace it with one, or remove it")
    if most is not None and found.st_size > most:
        raise UserError(f"{path}: {found.st_size:,} bytes, and at most {most:,} are read; is it what its name says?")
    return real


def copy_own_file(path: Path, target: Path) -> None:
    """Copy what `own_file` finds. Raises UserError as that does, OSError."""
    found = own_file(path)
    assert found is not None
    shutil.copyfile(found, target)


def _belongs(real: Path, folder: Path) -> bool:
    if real.is_relative_to(folder):
        return True
    caches = (above for above in (folder, folder.parent) if above.parent.name == "snapshots")
    return any(real.parent == above.parent.parent / "blobs" for above in caches)
