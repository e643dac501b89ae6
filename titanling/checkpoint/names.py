"""Which tensors a model has, and whether some files hold just these."""

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from titanling.checkpoint.shards import Shards
from titanling.checkpoint.text import counted
from titanling.errors import UserError
from titanling.model.llama import build_on_meta
from titanling.model.presets import LlamaShape, RopeScaling

Shapes = dict[str, tuple[int, ...]]
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def tensor_shapes(shape: LlamaShape) -> Shapes:
    """Name → shape of each of a model's tensors, in the order of its modules."""
    return {name: tuple(p.shape) for name, p in build_on_meta(shape, torch.float32).named_parameters()}


def check_tensors(shards: Shards, shape: LlamaShape, where: Path, ignore: Collection[str] = ()) -> Shapes:
    """`tensor_shapes` of the model, if the files hold these tensors whole and no others but those in `ignore`.

    Raises UserError naming the first that is missing, unknown, incomplete, of another shape, or not of floating point.
    """
    found = set(shards.names())
    if shape.n_layers > len(found):  # before a model of so many layers is even built
        raise UserError(f"{where}: has {counted(len(found), 'tensor')}, its model {shape.n_layers} layers")
    try:
        wanted = tensor_shapes(shape)
    except (TypeError, ValueError, RuntimeError) as error:  # sizes beyond all bounds
        reason = " ".join(str(error).split())
        raise UserError(f"{where}: its model cannot be built: {reason}") from None
    missing = next((name for name in wanted if name not in found), None)
    if missing is not None:
        raise UserError(f"{where}: has no tensor {missing}, which its model must have")
    unknown = next((name for name in shards.names() if name not in wanted and name not in ignore), None)
    if unknown is not None:
        raise UserError(f"{where}: holds a tensor {unknown}, for which its model has no place")
    for name, size in wanted.items():
        if shards.shape(name) != size:
            raise UserError(f"{where}: {name} has the shape {list(shards.shape(name))}; its model wants {list(size)}")
        if shards.dtype(name) not in FLOATS:
            raise UserError(f"{where}: {name} holds {shards.dtype(name)}; only floating-point weights can be read")
    return wanted


def saved_shape(saved: dict[str, Any], where: Path) -> LlamaShape:
    """The shape in a state.json, which `where` names. Raises UserError if it is none."""
    try:
        scaling = saved["rope_scaling"]
        shape = LlamaShape(**(saved | {"rope_scaling": RopeScaling(**scaling) if scaling else None}))
        tensor_shapes(replace(shape, n_layers=min(shape.n_layers, 1)))
    except (TypeError, KeyError, AttributeError, ValueError, RuntimeError, ZeroDivisionError) as error:
        raise UserError(f"{where}: does not describe a model of this version of titanling: {error}") from None
    return shape
