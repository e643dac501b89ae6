"""A checkpoint's model, by itself on one device: for generation and export."""

from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import HuggingFaceStorageReader

from titanling.checkpoint import folder
from titanling.checkpoint.checkpointer import without_warnings
from titanling.data.prepare.tokenizer import TokenizerFiles, load_tokenizer
from titanling.errors import UserError
from titanling.model.llama import Llama, build_on_meta
from titanling.model.presets import LlamaShape, RopeScaling


class SavedModel(NamedTuple):
    """A model with its trained weights, and the state.json saved with it."""

    model: Llama
    shape: LlamaShape
    state: dict[str, Any]


def load_model(checkpoint: Path) -> SavedModel:
    """The model of a checkpoint on the CPU, in the type that it was saved in.

    Raises UserError if the folder is no checkpoint or a file of it is damaged.
    """
    manifest = folder.read_manifest(checkpoint)
    problem = folder.damage(checkpoint, [name for name in sorted(manifest) if _wanted(name)], manifest)
    if problem:
        raise UserError(f"{problem}; this checkpoint is damaged: use an earlier one")
    state = folder.read_json(checkpoint / folder.STATE)
    shape = _shape(state["model"])
    model = build_on_meta(shape, getattr(torch, state["config"]["training"]["dtype"])).to_empty(device="cpu")
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    with without_warnings():
        dcp.load(weights, storage_reader=HuggingFaceStorageReader(str(checkpoint / "model")))
    return SavedModel(model.eval(), shape, state)


def find_tokenizer(saved: SavedModel, given: Path | None) -> tuple[Path, TokenizerFiles]:
    """The tokenizer to use with a saved model, and its directory: the given one, else the run's.

    Raises UserError if there is none, or if it has more tokens than the model.
    """
    directory = given or saved.state["config"]["model"]["hf_assets_path"]
    if directory is None:
        raise UserError("the run of this checkpoint had no tokenizer (model.hf_assets_path); give one with --tokenizer")
    directory = Path(directory)
    if not directory.is_dir():
        raise UserError(f"{directory}: no such tokenizer directory; say where it is with --tokenizer")
    files = load_tokenizer(str(directory))
    if files.vocab_size > saved.shape.vocab_size:
        raise UserError(
            f"{directory}: has {files.vocab_size} tokens, the model only {saved.shape.vocab_size}; give the tokenizer"
            " that it was trained with, --tokenizer"
        )
    return directory, files


def _wanted(name: str) -> bool:
    return name.startswith("model/") or name == folder.STATE


def _shape(saved: dict[str, Any]) -> LlamaShape:
    known = {field.name for field in fields(LlamaShape)}
    scaling = saved["rope_scaling"]
    values = {key: value for key, value in saved.items() if key in known}
    return LlamaShape(**(values | {"rope_scaling": RopeScaling(**scaling) if scaling else None}))
