"""In what two checkpoints differ, tensor by tensor: never more than one of each is in memory."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from titanling.checkpoint import folder, remote
from titanling.checkpoint.shards import NAMES, Shards
from titanling.checkpoint.state import read_state
from titanling.checkpoint.text import columns, counted

BLOCK = 2**20  # values compared at once: their float64 copies are small beside any tensor worth dividing


@dataclass
class Difference:
    """What two checkpoints do not share."""

    config: list[tuple[str, Any, Any]] = field(default_factory=list)
    """Dotted key and both values."""
    state: list[tuple[str, Any, Any]] = field(default_factory=list)
    """The same of state.json, without its config."""
    tensors: list[tuple[str, str]] = field(default_factory=list)
    """Name, with its part, of each tensor that is not bit-equal, and how far it is off."""
    compared: int = 0
    """Number of tensors that either has."""

    @property
    def equal(self) -> bool:
        """Whether there is none."""
        return not (self.config or self.state or self.tensors)


def compare(first: str, second: str) -> Difference:
    """Compare configs, states and tensors. Raises UserError if one is no checkpoint or its files are cut."""
    paths = [remote.open_path(name) for name in (first, second)]
    left, right = (read_state(path, folder.read_manifest(path)) for path in paths)
    found = Difference()
    found.config = list(_values(left.pop("config"), right.pop("config")))
    found.state = list(_values(left, right))
    for part in folder.PARTS:
        _compare_part(*(Shards(path / part) for path in paths), part, found)
    return found


def difference_text(found: Difference, first: str, second: str) -> str:
    """What `compare` found, in words."""
    lines = [f"A: {first}", f"B: {second}"]
    for title, pairs in (("config", found.config), ("state", found.state)):
        lines += ["", f"{title}: {counted(len(pairs), 'difference')}"]
        lines += [f"  {line}" for line in columns([(key, f"{_short(old)} → {_short(new)}") for key, old, new in pairs])]
    lines += ["", f"tensors: {found.compared - len(found.tensors):,} of {found.compared:,} are equal bit for bit"]
    lines += [f"  {line}" for line in columns(found.tensors)]
    if any("max" in what for _, what in found.tensors):
        lines.append("  (relative: to the largest absolute value of the tensor in A)")
    return "\n".join(lines)


def _values(left: Any, right: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    if isinstance(left, dict) and isinstance(right, dict):
        for key in sorted(left.keys() | right.keys()):
            yield from _values(left.get(key), right.get(key), f"{prefix}.{key}" if prefix else key)
    elif left != right:
        yield prefix, left, right


def _compare_part(left: Shards, right: Shards, part: str, found: Difference) -> None:
    ours, theirs = set(left.names()), set(right.names())
    found.compared += len(ours | theirs)
    for name in sorted(ours | theirs):
        if name not in ours or name not in theirs:
            what = "only in " + ("A" if name in ours else "B")
        elif left.shape(name) != right.shape(name):
            what = f"shape {list(left.shape(name))} → {list(right.shape(name))}"
        else:
            what = _compare_tensors(left.whole(name), right.whole(name))
        if what is not None:
            found.tensors.append((f"{part}: {name}", what))


def _compare_tensors(left: Tensor, right: Tensor) -> str | None:
    """How far two tensors are apart; None if they are equal bit for bit."""
    types = "" if left.dtype == right.dtype else f"{NAMES[left.dtype]} → {NAMES[right.dtype]}, "
    left, right = left.reshape(-1), right.reshape(-1)
    if not types and torch.equal(left.view(torch.uint8), right.view(torch.uint8)):
        return None
    apart = largest = 0.0
    changed = 0
    for a, b in zip(left.split(BLOCK), right.split(BLOCK), strict=True):
        a, b = a.double(), b.double()
        changed += int((a != b).sum())
        # torch's max keeps nan, Python's does not: a nan on either side must show.
        apart = torch.tensor([apart, (a - b).abs().max()]).max().item()
        largest = torch.tensor([largest, a.abs().max()]).max().item()
    if not changed:
        return f"{types}equal values" if types else "equal values, other bits (-0 and 0)"
    relative = apart / largest if largest else float("inf")
    return f"{types}max {apart:.3g}, relative {relative:.3g}, {changed:,} of {left.numel():,} values"


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else text[:32] + "…"
