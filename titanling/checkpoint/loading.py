"""Reading a checkpoint into live tensors, and finding out whether it is whole while it is read."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from titanling.checkpoint import folder
from titanling.checkpoint.foreign import what_it_is
from titanling.checkpoint.saving import Parts
from titanling.checkpoint.shards import Shards, Take, Written, take_all
from titanling.checkpoint.state import read_state
from titanling.errors import UserError
from titanling.parallel.mesh import World
from titanling.parallel.weights import local_part

CheckState = Callable[[Path, dict[str, Any]], list[str]]
"""(checkpoint, its state.json) → what to say about differences; raises UserError if the run cannot go on from it."""


class Restored(NamedTuple):
    """What a run begins with: tensors have been loaded, and this is the rest."""

    what: str
    """In words."""
    state: dict[str, Any]
    remarks: list[str]
    goes_on: bool = True
    """Whether the run goes on at the state's step; else it begins at step 0."""


class Opened(NamedTuple):
    """A checkpoint whose manifest and state.json are good; its tensors have not been looked at."""

    path: Path
    manifest: dict[str, dict[str, Any]]
    state: dict[str, Any]


def agreed(world: World, action: Callable[[], object]) -> str | None:
    """Do something on all ranks; the first UserError among them as text, or None."""
    problem = None
    try:
        action()
    except UserError as error:
        problem = str(error)
    return next((text for text in world.gather(problem) if text is not None), None)


def open_checkpoint(path: Path) -> Opened:
    """Read manifest and state. Raises UserError naming the file if one of them is missing or damaged."""
    if path.exists() and not (path / folder.MANIFEST).exists() and (what := what_it_is(path)):
        raise UserError(f"{path}: {what}")
    manifest = folder.read_manifest(path)
    return Opened(path, manifest, read_state(path, manifest))


def load_checkpoint(opened: Opened, parts: Parts, world: World, verify: bool) -> None:
    """Fill this rank's pieces of `parts` from a checkpoint; this rank checks the hashes of its share of their files.

    Raises UserError if a tensor is missing or a file of this rank's share is damaged; the tensors' values are then
    undefined.
    """
    skipped = {folder.STATE, *folder.PARTS} - {*parts}
    names = sorted(name for name in opened.manifest if name.partition("/")[0] not in skipped)
    share = names[world.rank :: world.size] if verify else []  # in the layout that saved it: the files that it wrote
    share.sort(key=lambda name: opened.manifest[name]["bytes"], reverse=True)  # the longest first: all cores end alike
    problem, read = None, dict[Path, Written]()
    try:
        takes = [take for part, tensors in parts.items() for take in _takes(Shards(opened.path / part), tensors)]
        read = take_all(takes, [opened.path / name for name in share])
    except (UserError, *folder.failures(opened.path)) as error:
        problem = str(error)
    # A hash names the bad file better than what reading it stumbled over.
    problem = next((found for name in share if (found := _damage(opened, name, read)) is not None), problem)
    if problem is not None:
        raise UserError(problem)


def _damage(opened: Opened, name: str, read: Mapping[Path, Written]) -> str | None:
    """What is wrong with a file, or None; hashed here if it has not been read to its end."""
    path = opened.path / name
    if path in read:
        return folder.mismatch(path, read[path]._asdict(), opened.manifest[name])
    return folder.damage(opened.path, [name], opened.manifest)


def read_tensors(shards: Shards, tensors: Mapping[str, Tensor]) -> None:
    """Fill this rank's pieces of tensors from files. Raises UserError where one is missing or has another shape."""
    take_all(_takes(shards, tensors))


def _takes(shards: Shards, tensors: Mapping[str, Tensor]) -> list[Take]:
    have, takes = set(shards.names()), list[Take]()
    for name, tensor in tensors.items():
        if name not in have:
            raise UserError(f"{shards.folder}: has no tensor {name}")
        if shards.shape(name) != tuple(tensor.shape):
            raise UserError(
                f"{shards.folder}: {name} has the shape {list(shards.shape(name))}, this model wants"
                f" {list(tensor.shape)}"
            )
        takes += shards.takes(name, *local_part(tensor))
    return takes
