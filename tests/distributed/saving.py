"""Checkpoints under every layout and across layouts: what layouts.py checks of them."""

import errno
from collections.abc import Mapping
from typing import Any

from runs import Tensors, differing, live_tensors
from suite import RANK, WORLD, Suite, alone
from table import MODELS, Settings, mesh, pipeline

from titanling.checkpoint import saving
from titanling.errors import UserError
from titanling.trainer import Trainer

GLOBAL_BATCH = {"training.local_batch_size": 2, "training.global_batch_size": 8}
CHAIN = {
    "fsdp4": mesh(1, 4),
    "tp2 x fsdp2": mesh(1, 2, tp=2),
    "pp2 x fsdp2": pipeline(shard=2),
    "cp2 x fsdp2": mesh(1, 2, cp=2),
    "cp2 x tp2": mesh(cp=2, tp=2),
}


def checkpoints(suite: Suite, name: str, model: str, layout: Settings) -> dict[str, Any]:
    """Save, resume and change the number of processes, validating and sampling just before each save."""
    settings = MODELS[model] | GLOBAL_BATCH
    settings |= {
        "checkpoint.interval": 2,
        "validation.enable": True,
        "validation.freq": 2,
        "sampling.freq": 2,
        "sampling.max_new_tokens": 4,
    }
    run, other = f"{name}-a", f"{name}-b"
    with suite.trainer(settings, layout, {"training.steps": 4}, run=run) as trainer:
        trainer.train()
        straight = live_tensors(trainer)
    with suite.trainer(settings, layout, {"training.steps": 2}, run=other) as trainer:
        trainer.train()
        halfway = live_tensors(trainer)
    onto_one: list[str] = []
    if RANK == 0:  # a run folder belongs to one run at a time
        with alone(), suite.trainer(settings, {"training.steps": 2}, run=other) as trainer:
            onto_one = differing(halfway, live_tensors(trainer))
    with suite.trainer(settings, layout, {"training.steps": 4}, run=other) as trainer:
        onto_same = differing(halfway, live_tensors(trainer))
        trainer.train()
        resumed = differing(straight, live_tensors(trainer))
    alone_run = f"{name}-alone-{RANK}"  # each rank trains by itself, all the same
    with alone(), suite.trainer(settings, {"training.steps": 2}, run=alone_run) as trainer:
        trainer.train()
        single = live_tensors(trainer)
    with suite.trainer(settings, layout, {"training.steps": 2}, run=f"{name}-alone-0") as trainer:
        from_one = differing(single, live_tensors(trainer))
    return {
        "moments_of_zero": [n for n, t in straight.items() if n.endswith("exp_avg_sq") and not t.any()],
        "to_one_process": onto_one,
        "to_the_same": onto_same,
        "resumed": resumed,
        "from_one_process": from_one,
    }


def resume_chain(suite: Suite, layouts: Mapping[str, Settings]) -> dict[str, Any]:
    """One run, a step under each layout and the last one alone: what each load changed, and how far each loss is off.

    The losses are compared with those of one process that did all the steps.
    """
    settings = MODELS["untied"] | GLOBAL_BATCH | {"checkpoint.interval": 1}
    with alone(), suite.trainer(settings, {"checkpoint.enable": False, "training.steps": 9}) as trainer:
        reference = [step(trainer) for _ in range(len(layouts) + 1)]
    found: dict[str, Any] = {}
    before: Tensors = {}
    for index, (name, layout) in enumerate(layouts.items()):
        with suite.trainer(settings, layout, {"training.steps": 9}, run="chain") as trainer:
            changed = differing(before, live_tensors(trainer)) if index else []
            found[name] = {"changed": changed, "step": trainer.step, "loss": abs(step(trainer) - reference[index])}
            trainer.save()
            before = live_tensors(trainer)
    if RANK == 0:
        with alone(), suite.trainer(settings, {"training.steps": 9}, run="chain") as trainer:
            changed = differing(before, live_tensors(trainer))
            found["one process"] = {
                "changed": changed,
                "step": trainer.step,
                "loss": abs(step(trainer) - reference[-1]),
            }
    return found


def step(trainer: Trainer) -> float:
    """One training step; its loss."""
    loss, _, _ = trainer.train_step()
    return trainer.world.sum_(loss).item()


def failed_save(suite: Suite, name: str, model: str, layout: Settings) -> dict[str, Any]:
    """The disk of the last rank fills up while a checkpoint is saved again: what is said, what is left."""
    settings = MODELS[model] | {"training.steps": 2, "training.global_batch_size": 8}
    with suite.trainer(settings, layout, run=f"{name}-full") as trainer:
        trainer.train()
        before = (trainer.checkpointer.root / "step-000002" / "manifest.json").read_bytes()
        write = saving.write_tensors
        if RANK == WORLD - 1:
            saving.write_tensors = full_disk
        said = ""
        trainer.save()
        try:
            trainer.checkpointer.finish()
        except UserError as error:
            said = str(error)
        saving.write_tensors = write
        trainer.world.gather(None)  # rank 0 has tidied up
        left = sorted(path.name for path in trainer.checkpointer.root.iterdir())
        unchanged = (trainer.checkpointer.root / "step-000002" / "manifest.json").read_bytes() == before
        saved = trainer.world.gather({"said": said, "left": left, "unchanged": unchanged})
        trainer.save()  # the ranks are still in step
        trainer.checkpointer.finish()
        return {name: saved}


def full_disk(*arguments: object) -> None:
    """What writing to a full disk does."""
    raise OSError(errno.ENOSPC, "No space left on device")
