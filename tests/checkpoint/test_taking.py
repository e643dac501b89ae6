"""Pieces of tensors out of files, and the files' hashes in the same pass."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from titanling.checkpoint import folder, shards
from titanling.checkpoint.shards import Piece, Shards, take_all, write_tensors
from titanling.errors import UserError

FILES = ("one.safetensors", "two.safetensors")


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a few kilobytes are read in many pieces."""
    for name in ("CACHED_BYTES", "SCRATCH_BYTES", "CHUNK_BYTES"):
        monkeypatch.setattr(shards, name, 96)


@pytest.fixture
def saved(tmp_path: Path) -> dict[str, Tensor]:
    """Three tensors in two files, of which one has the upper rows of the first, the other the lower."""
    torch.manual_seed(0)
    whole = {"a": torch.randn(40, 7), "b": torch.randn(33), "c": torch.randn(())}
    pieces = (
        {"a": Piece(whole["a"][:25], (0, 0)), "b": Piece(whole["b"], (0,))},
        {"c": Piece(whole["c"], ()), "a": Piece(whole["a"][25:], (25, 0))},
    )
    for name, content in zip(FILES, pieces, strict=True):
        with (tmp_path / name).open("wb", buffering=0) as file:
            write_tensors(file, content)
    return whole


KINDS: dict[str, tuple[Tensor, str, tuple[slice, ...]]] = {
    "whole": (torch.zeros(40, 7), "a", (slice(0, 40), slice(0, 7))),
    "some rows": (torch.zeros(11, 7), "a", (slice(20, 31), slice(0, 7))),
    "some columns": (torch.zeros(40, 3), "a", (slice(0, 40), slice(2, 5))),
    "another type": (torch.zeros(40, 7, dtype=torch.float64), "a", (slice(0, 40), slice(0, 7))),
    "not contiguous": (torch.zeros(7, 40).T, "a", (slice(0, 40), slice(0, 7))),
    "the middle of a row": (torch.zeros(4), "b", (slice(9, 13),)),
    "a number": (torch.zeros(()), "c", ()),
    "nothing": (torch.zeros(0, 7), "a", (slice(3, 3), slice(0, 7))),
}


@pytest.mark.parametrize("hashed", [(), FILES[:1], FILES[1:], FILES])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_taken_and_the_hashes_on_the_way(
    tmp_path: Path, saved: dict[str, Tensor], kind: str, hashed: tuple[str, ...]
) -> None:
    place, name, box = KINDS[kind]
    into = place.clone()
    takes = Shards(tmp_path).takes(name, into, [side.start for side in box])
    found = take_all(takes, [tmp_path / file for file in hashed])
    assert torch.equal(into, saved[name][box].to(into.dtype))
    assert {path.name: written._asdict() for path, written in found.items()} == {
        file: folder.digest(tmp_path / file) for file in hashed
    }


def test_a_file_is_read_once(tmp_path: Path, saved: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    stored, into = Shards(tmp_path), {name: torch.zeros_like(tensor) for name, tensor in saved.items()}
    takes = [take for name, tensor in into.items() for take in stored.takes(name, tensor, [0] * tensor.ndim)]
    opened: list[Path] = []
    monkeypatch.setattr(shards, "open_to_read", lambda path: opened.append(path) or folder.open_to_read(path))
    take_all(takes, [tmp_path / file for file in FILES])
    assert sorted(path.name for path in opened) == sorted(FILES)
    assert all(torch.equal(into[name], saved[name]) for name in saved)


def test_a_file_that_became_shorter(tmp_path: Path, saved: dict[str, Tensor]) -> None:
    takes = Shards(tmp_path).takes("b", torch.zeros(33), [0])
    path = tmp_path / FILES[0]
    path.write_bytes(path.read_bytes()[:-4])
    for hashed in ((), (path,)):
        with pytest.raises(UserError, match="one.safetensors: ends too early"):
            take_all(takes, hashed)
