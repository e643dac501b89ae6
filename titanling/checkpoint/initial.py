"""The first weights of a run that another one, or somebody else's, has trained."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from titanling.checkpoint import folder, remote
from titanling.checkpoint.foreign import what_it_is
from titanling.checkpoint.hf_folder import open_hf_folder
from titanling.checkpoint.loading import Restored, agreed, load_checkpoint, open_checkpoint, read_tensors
from titanling.checkpoint.origin import hf_origin
from titanling.checkpoint.resume import check_model, check_resumable
from titanling.config.schema import Checkpoint
from titanling.errors import UserError
from titanling.model.presets import LlamaShape
from titanling.parallel.mesh import World

Tensors = Mapping[str, Tensor]
REMEDY = "set the same sizes in [model]"


def load_initial(
    settings: Checkpoint,
    shape: LlamaShape,
    data: dict[str, Any],
    config: dict[str, Any],
    model: Tensors,
    optimizer: Tensors,
    world: World,
) -> Restored | None:
    """Load what checkpoint.initial_load_path names into the given tensors; None if it names nothing.

    Raises UserError if that is neither a checkpoint nor a Hugging Face directory, is damaged, or holds another model.
    """
    if settings.initial_load_path is None:
        return None
    path = remote.open_path(settings.initial_load_path)
    found: list[Restored] = []

    def load() -> None:
        if (path / folder.MANIFEST).exists():
            found.append(_from_checkpoint(settings, path, asdict(shape), data, config, model, optimizer, world))
        elif (path / "config.json").exists() and not (path / "lit_model.pth").exists():
            found.append(_from_hugging_face(settings, path, asdict(shape), model))
        else:
            what = what_it_is(path)
            raise UserError(
                f'checkpoint.initial_load_path = "{path}": is neither a step-… folder of a run nor a Hugging Face'
                f" directory (config.json and .safetensors){what and f': it {what}'}"
            )

    problem = agreed(world, load)
    if problem is not None:
        raise UserError(problem)
    return found[0]


def _from_checkpoint(
    settings: Checkpoint,
    path: Path,
    shape: dict[str, Any],
    data: dict[str, Any],
    config: dict[str, Any],
    model: Tensors,
    optimizer: Tensors,
    world: World,
) -> Restored:
    opened = open_checkpoint(path)
    if settings.initial_load_model_only:
        check_model(path, opened.state["model"], _but_dropout(opened.state["model"], shape), REMEDY)
        load_checkpoint(opened, {"model": model}, world, settings.verify)
        return Restored(f"started from the weights of {path}", opened.state, [], goes_on=False)
    if opened.state.get("model_only", False):
        raise UserError(f"{path}: holds only weights; set checkpoint.initial_load_model_only = true")
    fresh, remarks = settings.initial_load_fresh_schedule, []
    if fresh:
        check_model(path, opened.state["model"], _but_dropout(opened.state["model"], shape), REMEDY)
    else:
        remarks = check_resumable(path, opened.state, shape, data, config)
    load_checkpoint(opened, {"model": model, "optimizer": optimizer}, world, settings.verify)
    what = f"started from weights and optimizer of {path}" if fresh else f"went on from {path}"
    return Restored(what, opened.state, remarks, goes_on=not fresh)


def _from_hugging_face(settings: Checkpoint, path: Path, shape: dict[str, Any], model: Tensors) -> Restored:
    if not settings.initial_load_model_only:
        raise UserError(
            f"{path}: a Hugging Face directory holds no optimizer; set checkpoint.initial_load_model_only = true"
        )
    their_shape, shards = open_hf_folder(path)
    theirs = asdict(their_shape)
    check_model(path, theirs, _but_dropout(theirs, shape), REMEDY)
    read_tensors(shards, model)
    return Restored(f"started from the weights of {path}", {"origin": hf_origin(path, their_shape)}, [], goes_on=False)


def _but_dropout(theirs: dict[str, Any], ours: dict[str, Any]) -> dict[str, Any]:
    """Our shape with their dropout, which weights do not depend on."""
    return ours | {"dropout": theirs.get("dropout")}
