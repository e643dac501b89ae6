"""Checkpoints of random models, in the pieces that different layouts would have written."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from helpers import TinyData, tiny_config
from torch import Tensor

from titanling.checkpoint import folder
from titanling.checkpoint.shards import Piece, Shards, write_tensors
from titanling.config import load_config
from titanling.model.llama import Llama

# Layout → (files, along the rows, along the columns of matrices that write into the residual stream).
LAYOUTS = {"one": (1, 1, 1), "rows": (3, 3, 1), "rows_and_columns": (6, 3, 2)}


def write_checkpoint(
    root: Path,
    model: Llama,
    data: TinyData,
    layout: str = "one",
    changes: Mapping[str, Any] | None = None,
    weights: Mapping[str, Tensor] | None = None,
    state: Mapping[str, Any] | None = None,
) -> Path:
    """A checkpoint of step 3 under `root` as a run with `changes` would have saved it; its folder.

    `weights` are saved instead of the model's, if given; `state` is what else its state says.
    """
    config = load_config(tiny_config(root, data, changes, "saved.toml")).config
    whole = {
        "format": 1,
        "step": 3,
        "tokens_seen": 3 * 4 * 32,
        "best": None,
        "skipped_steps": 0,
        "interrupted": False,
        "scaler": {},
        "loader": {},
        "data": {
            "seq_len": 32,
            "seed": 7,
            "sources": {"train": {"bin_sha256": "ab" * 32, "idx_sha256": "cd" * 32}},
            "stages": [{"start": 0, "weights": {"train": 1}}],
        },
        "model": asdict(model.shape),
        "config": config.model_dump(mode="json"),
    }
    tensors = dict(model.state_dict()) if weights is None else dict(weights)
    return commit(root, whole | dict(state or {}), divide(tensors, layout))


def divide(tensors: Mapping[str, Tensor], layout: str) -> list[dict[str, Piece]]:
    """Each file's pieces, of uneven sizes where a dimension does not divide. A pipeline's first file has layer 0."""
    if layout == "pipeline":
        first = {name for name in tensors if ".layers.0." in name or "embed" in name}
        parts = [{n: t for n, t in tensors.items() if (n in first) is want} for want in (True, False)]
        return [{name: Piece(t, [0] * t.ndim) for name, t in part.items()} for part in parts]
    files, rows, columns = LAYOUTS[layout]
    pieces: list[dict[str, Piece]] = [{} for _ in range(files)]
    for name, tensor in tensors.items():
        wide = name.endswith(("o_proj.weight", "down_proj.weight"))
        for index, piece in enumerate(_grid(tensor, rows, columns if wide else 1)):
            pieces[index][name] = piece
    return pieces


def _grid(tensor: Tensor, rows: int, columns: int) -> Iterator[Piece]:
    top = 0
    for band in tensor.chunk(rows, 0):
        left = 0
        for part in band.chunk(columns, 1) if tensor.ndim > 1 else [band]:
            yield Piece(part, [top, left][: tensor.ndim])
            left += part.shape[-1]
        top += len(band)


def commit(root: Path, state: dict[str, Any], pieces: list[dict[str, Piece]]) -> Path:
    """Write and commit a checkpoint; its folder."""
    final = folder.step_folder(root / "checkpoints", state["step"])
    working = folder.working_folder(final)
    folder.begin(final)
    (working / "model").mkdir()
    files: dict[str, dict[str, Any]] = {}
    for number, part in enumerate(pieces, 1):
        name = f"model/shard-{number:05d}-of-{len(pieces):05d}.safetensors"
        with (working / name).open("wb") as file:
            files[name] = write_tensors(file, part)._asdict()
    folder.write_json(working / folder.STATE, state)
    files[folder.STATE] = folder.digest(working / folder.STATE)
    folder.commit(final, files)
    return final


def whole_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of the safetensors files of a folder, put together."""
    shards = Shards(path)
    return {name: shards.whole(name) for name in shards.names()}


def assert_same(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """The same names, types and values, bit for bit."""
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name
