"""Whether a folder of checkpoints' is ours to remove. Imports no torch."""

import re
from pathlib import Path

# What a checkpoint is made of; and a file that somebody still had open when it was removed on NFS.
_FILE = re.compile(r"(manifest\.json|state\.json|(model|optimizer)/[^/]+\.safetensors|(.*/)?\.nfs[0-9a-f]+)")
_FOLDERS = ("model", "optimizer")
TOP = (*_FOLDERS, "manifest.json", "state.json")
"""All that a checkpoint's folder holds itself."""


def stranger(folder: Path) -> str | None:
    """What makes a folder, or what is in its place, somebody else's: "notes.txt", "a link"; None: it is ours to remove.

    An empty folder is ours. Raises what the storage raises.
    """
    local = isinstance(folder, Path)
    if local and folder.is_symlink():
        return "a link"
    if folder.exists() and not folder.is_dir():
        return "a file"
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        ours = name in _FOLDERS if path.is_dir() else _FILE.fullmatch(name)
        if not ours or (local and path.is_symlink()):
            return name
    return None
