"""What a run has saved, whether it is whole, and what may go. Imports no torch, so that it answers at once."""

import os
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from titanling.checkpoint import folder, remote
from titanling.checkpoint.ours import stranger
from titanling.checkpoint.state import read_state
from titanling.config.toml import parse_toml
from titanling.errors import UserError
from titanling.owner import held

DEFAULT_FOLDER = "checkpoints"
MOST_THREADS = 8
LEFTOVERS = {
    ".partial": "being saved, or cut short: the next start removes it",
    ".deleted": "being deleted, or cut short: the next start removes it",
    ".damaged": "set aside: damaged; the run went on from an earlier one",
    ".superseded": "set aside: the run went another way from an earlier one",
}
"""Suffix of a folder that is not a checkpoint of the run (any more) → what it is."""


@dataclass(frozen=True)
class Entry:
    """One checkpoint, or what is left of one, as far as manifest, sizes and state.json tell."""

    path: Path
    step: int
    state: str
    """"whole", "damaged", or the suffix of its name: a key of LEFTOVERS, or somebody's own."""
    bytes: int
    saved: float | None = None
    """Seconds since 1970; None where the storage does not say."""
    ranks: int | None = None
    """Number of processes that saved it."""
    weights_only: bool = False
    best: bool = False
    """Whether its validation loss is the best of the run."""
    trunk_end: bool = False
    """Whether the learning rate has begun to decay behind it: a longer run goes on from there."""
    problem: str | None = None
    """What is wrong with a damaged one."""

    def as_json(self) -> dict[str, Any]:
        """Everything, for programs."""
        return vars(self) | {"path": str(self.path)}


@dataclass
class Verdict:
    """What hashing every file of a checkpoint has shown."""

    path: Path
    files: int = 0
    bytes: int = 0
    bad: list[str] = field(default_factory=list)
    """What is wrong with each bad file."""

    def as_json(self) -> dict[str, Any]:
        """Everything, for programs."""
        return vars(self) | {"path": str(self.path), "whole": not self.bad}


@dataclass
class Pruned:
    """What has become, or would become, of each checkpoint of a run: its step and why."""

    kept: list[tuple[int, str]] = field(default_factory=list)
    deleted: list[int] = field(default_factory=list)
    bytes: int = 0
    """Of the deleted ones."""


def find_root(name: str) -> Path:
    """The folder of a run's checkpoints: where its config.toml says, or `name` itself.

    Raises UserError if it is neither a run folder nor a folder of checkpoints.
    """
    path = remote.open_path(name)
    if not path.is_dir():
        raise UserError(f"{name}: no such folder")
    config = path / "config.toml"
    if config.is_file():
        try:
            table = parse_toml(config.read_text(encoding="utf-8")).get("checkpoint", {})
            return remote.open_root(path, table.get("folder", DEFAULT_FOLDER))
        except (OSError, ValueError, AttributeError, TypeError) as error:
            raise UserError(f"{config}: cannot be read: {error}") from None
    if (path / DEFAULT_FOLDER).is_dir():
        return path / DEFAULT_FOLDER
    if (path / folder.MANIFEST).exists():
        raise UserError(f"{name}: is one checkpoint; give its run, or the folder above it")
    if not any(folder.parse_name(entry.name) for entry in path.iterdir()):
        raise UserError(f"{name}: is neither a run folder (config.toml) nor a folder of checkpoints (step-…)")
    return path


def take_stock(root: Path) -> list[Entry]:
    """Every checkpoint under `root`, the oldest first, without reading its tensors."""
    named = [(folder.parse_name(path.name), path) for path in (root.iterdir() if root.is_dir() else ())]
    found = [(*parsed, path) for parsed, path in named if parsed is not None]
    entries, best, trunk_ends = [], None, []
    for step, suffix, path in sorted(found, key=lambda each: (each[0], each[2].name)):
        if suffix is not None or not (folder.renames(root) or (path / folder.MANIFEST).exists()):
            entries.append(Entry(path, step, f".{suffix or 'partial'}", _bytes(path)))
            continue
        entry, state = _look(path, step)
        entries.append(entry)
        if state:  # the newest one knows
            best, trunk_ends = (state.get("best") or {}).get("step"), state.get("trunk_ends", ())

    def known(each: Entry) -> dict[str, bool]:
        whole = each.state == "whole"
        return {"best": whole and each.step == best, "trunk_end": whole and each.step in trunk_ends}

    return [Entry(**vars(each) | known(each)) for each in entries]


def saved_by(manifest: Collection[str]) -> int | None:
    """How many processes have saved a checkpoint, as the names of its files tell; None: they are somebody else's."""
    numbers = {name.partition("-of-")[2].partition(".")[0] for name in manifest}
    return max((int(number) for number in numbers if number.isdecimal()), default=None)


def verify(names: Sequence[str]) -> list[Verdict]:
    """Hash every file of the named checkpoints, in threads; of a run, or a folder of checkpoints, of all that count.

    Raises UserError for a name that is neither.
    """
    paths = [path for name in names for path in _checkpoints(name)]
    with ThreadPoolExecutor(min(MOST_THREADS, os.cpu_count() or 1)) as pool:
        started = [_start(path, pool) for path in paths]
        return [_finish(*each) for each in started]


def prune(name: str, keep: int, every: int = 0, really: bool = True) -> Pruned:
    """Delete a run's checkpoints but the newest `keep` that verify, the best, multiples of `every`, and ends of trunks.

    Damaged ones are left alone and not counted. Without `really`, nothing is deleted. Raises UserError if none
    verifies: then nothing is deleted at all.
    """
    if keep < 1 or every < 0:
        raise UserError(f"--keep {keep} --every {every}: --keep must be 1 or more, --every 0 or more")
    root = find_root(name)
    with held("run", root) if really else nullcontext():
        return _prune(root, keep, every, really)


def _prune(root: Path, keep: int, every: int, really: bool) -> Pruned:
    entries = [entry for entry in take_stock(root) if entry.state in ("whole", "damaged")]
    result, good = Pruned(), 0
    for entry in reversed(entries):
        if good < keep:
            verdict = verify([str(entry.path)])[0] if entry.problem is None else None
            problem = entry.problem or next(iter(verdict.bad if verdict else []), None)
            good += problem is None
            result.kept.append((entry.step, "verified" if problem is None else f"damaged, not counted: {problem}"))
        elif entry.problem is not None:
            result.kept.append((entry.step, f"damaged, left alone: {entry.problem}"))
        elif entry.best:
            result.kept.append((entry.step, "the best by validation"))
        elif entry.trunk_end:
            result.kept.append((entry.step, "the last before the decay: a longer run goes on from it"))
        elif every and entry.step % every == 0:
            result.kept.append((entry.step, f"a multiple of {every}"))
        elif (strange := stranger(entry.path)) is not None:
            result.kept.append((entry.step, f"holds what is not ours: {strange}"))
        else:
            result.deleted.append(entry.step)
            result.bytes += entry.bytes
    if entries and not good:
        raise UserError(f"{root}: no checkpoint verifies, so none is deleted: look at them with `verify`")
    result.deleted.reverse()  # the oldest goes first
    for step in result.deleted if really else ():
        folder.delete(folder.step_folder(root, step))
    return result


def _look(path: Path, step: int) -> tuple[Entry, dict[str, Any] | None]:
    """One checkpoint by its manifest, sizes and state; and that state if it can be read."""
    try:
        manifest = folder.read_manifest(path)
        state = read_state(path, manifest)
    except UserError as error:
        return Entry(path, step, "damaged", _bytes(path), problem=str(error)), None
    problem = folder.damage(path, sorted(manifest), manifest, hashes=False)
    if problem is None and state["step"] != step:
        problem = f"{path / folder.STATE}: is of step {state['step']}"
    entry = Entry(
        path,
        step,
        "whole" if problem is None else "damaged",
        sum(file["bytes"] for file in manifest.values()),
        saved_at(path),
        saved_by(manifest),
        bool(state.get("model_only", False)),
        problem=problem,
    )
    return entry, state


def saved_at(path: Path) -> float | None:
    """When a checkpoint was saved, in seconds since 1970; None where the storage does not say."""
    try:
        return (path / folder.MANIFEST).stat().st_mtime or None
    except folder.failures(path):
        return None  # or it has been deleted meanwhile


def _bytes(path: Path) -> int:
    """Size of what there is of a folder, which may vanish meanwhile."""
    try:
        return sum((path / name).stat().st_size for name in folder.files_of(path))
    except folder.failures(path):
        return 0


def _checkpoints(name: str) -> list[Path]:
    path = remote.open_path(name)
    if (path / folder.MANIFEST).exists() or (folder.parse_name(path.name) and path.is_dir()):
        return [path]
    root = find_root(name)
    steps = [folder.step_folder(root, step) for step in folder.list_steps(root)]
    if not steps:
        raise UserError(f"{root}: holds no checkpoint")
    return steps


def _start(path: Path, pool: ThreadPoolExecutor) -> tuple[Verdict, list[Any]]:
    """Begin to hash a checkpoint's files."""
    verdict = Verdict(path)
    try:
        manifest = folder.listed_files(path)
        verdict.bad += folder.strangers(path, manifest)
    except UserError as error:
        verdict.bad.append(str(error))
        return verdict, []
    verdict.files, verdict.bytes = len(manifest), sum(file["bytes"] for file in manifest.values())
    if folder.STATE not in manifest:
        verdict.bad.append(f"{path / folder.MANIFEST}: does not list {folder.STATE}")
    return verdict, [pool.submit(folder.damage, path, [name], manifest) for name in sorted(manifest)]


def _finish(verdict: Verdict, checks: list[Any]) -> Verdict:
    verdict.bad += [problem for check in checks if (problem := check.result()) is not None]
    return verdict
