"""Run by test_layouts.py on every rank: python layouts.py GROUP FOLDER DATA.

Trains the same tiny models under many layouts, compares each with one process, and writes the figures to
FOLDER/results.json. One launch for all of them: starting processes and importing torch costs more than the training.
"""

import errno
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from helpers import TinyData
from runs import Tensors, differing, full, live_tensors, open_trainer
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageWriter

from titanling.errors import UserError
from titanling.trainer import Trainer

STEPS = 5
RANK, WORLD = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])

# Neither the vocabulary nor head_dim divides by the ranks; at four ranks some hold no row of q_norm and k_norm.
MODELS = {
    "tied": {"model.vocab_size": 323, "model.tie_embeddings": True, "model.qk_norm": True, "model.head_dim": 6},
    "untied": {"model.vocab_size": 321, "model.tie_embeddings": False},
    # As many rows as make Inductor split its reductions (pytorch #193061 lost gradients there).
    "wide": {"model.dim": 128, "model.qk_norm": True, "model.tie_embeddings": True, "training.seq_len": 256},
}
DDP = {"parallelism.data_parallel_replicate_degree": WORLD, "parallelism.data_parallel_shard_degree": 1}
FSDP = {"parallelism.data_parallel_shard_degree": WORLD}
HSDP = {"parallelism.data_parallel_replicate_degree": 2, "parallelism.data_parallel_shard_degree": -1}
NEVER = {"parallelism.fsdp_reshard_after_forward": "never"}
GLOBAL_BATCH = 16
WITHOUT_CHECKPOINTS = {
    "checkpoint.enable": False,
    "training.steps": 1000,
    "training.global_batch_size": GLOBAL_BATCH,
    "comm.init_timeout_seconds": 60,
}


class Run(NamedTuple):
    """What a run did, whole tensors on every rank."""

    initial: Tensors
    losses: list[float]
    norms: list[float]
    gradients: list[Tensors]
    final: Tensors


class Suite:
    """The folder, the data and the references of one launch."""

    def __init__(self, folder: Path, data: TinyData) -> None:
        self.folder, self.data = folder, data
        self.references: dict[str, Run] = {}
        self.groups = self.runs = 0
        self.first_port = int(os.environ["MASTER_PORT"])
        os.environ.pop("TORCHELASTIC_USE_AGENT_STORE", None)

    @contextmanager
    def trainer(self, *changes: Mapping[str, Any], run: str | None = None) -> Iterator[Trainer]:
        """A trainer with these settings, in a run folder of its own unless `run` names one."""
        if "RANK" in os.environ:
            # A process group of its own, at an address that no earlier one has used.
            self.groups += 1
            os.environ["MASTER_PORT"] = str(self.first_port + self.groups)
        self.runs += 1
        merged = {"job.dump_folder": str(self.folder / (run or f"rank{RANK}-run{self.runs}"))}
        for change in changes:
            merged |= change
        # The TOML is each rank's own, so that none reads it while another writes it.
        with open_trainer(self.folder / f"rank{RANK}", self.data, merged) as trainer:
            yield trainer

    def run(self, *changes: Mapping[str, Any]) -> Run:
        """Train STEPS steps."""
        with self.trainer(WITHOUT_CHECKPOINTS, *changes) as trainer:
            initial, gradients = live_tensors(trainer), []
            trainer.optimizer.register_step_pre_hook(lambda *_: gradients.append(gradients_of(trainer)))
            losses, norms = [], []
            for _ in range(STEPS):
                loss, norm, _ = trainer.train_step()
                losses.append(trainer.world.sum_(loss.clone()).item())
                norms.append(norm.item())
            return Run(initial, losses, norms, gradients, live_tensors(trainer))

    def compare(self, model: str, *layout: Mapping[str, Any]) -> dict[str, Any]:
        """The differences between a run under a layout and one in a single process, in float32 and eager."""
        if model not in self.references:
            with alone():
                self.references[model] = self.run(MODELS[model], {"training.local_batch_size": GLOBAL_BATCH})
        mine, reference = self.run(MODELS[model], *layout), self.references[model]
        return {
            "initial_differing": differing(mine.initial, reference.initial),
            "names_equal": list(mine.initial) == list(reference.initial),
            "loss": max(abs(a - b) for a, b in zip(mine.losses, reference.losses, strict=True)),
            "norm": max(abs(a - b) / b for a, b in zip(mine.norms, reference.norms, strict=True)),
            "gradient": max(map(gradient_error, mine.gradients, reference.gradients)),
        }


def gradients_of(trainer: Trainer) -> Tensors:
    """Whole clipped gradients, just before the update."""
    return {name: full(p.grad) for name, p in trainer.model.named_parameters() if p.grad is not None}


def gradient_error(mine: Tensors, reference: Tensors) -> float:
    """The largest relative error (2-norm) of any parameter's gradient."""
    assert mine.keys() == reference.keys()
    return max(float((mine[n] - reference[n]).norm() / reference[n].norm()) for n in reference)


@contextmanager
def alone() -> Iterator[None]:
    """Let what is built here believe that this process is the only one. Every rank computes its own reference."""
    others = {name: os.environ.pop(name) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    try:
        yield
    finally:
        os.environ.update(others)


def main(group: Callable[[Suite], dict[str, Any]]) -> None:
    """Run one group of checks and let rank 0 write what they found."""
    folder, data = Path(sys.argv[2]), TinyData(*json.loads(sys.argv[3]))
    results = group(Suite(folder, data))
    if RANK == 0:
        (folder / "results.json").write_text(json.dumps(results), encoding="utf-8")


def parity(suite: Suite, models: list[str], layouts: Mapping[str, list[Mapping[str, Any]]]) -> dict[str, Any]:
    """Every model under every layout, with and without accumulation, in float32."""
    results = {}
    for model in models:
        for name, layout in layouts.items():
            for local in (GLOBAL_BATCH // WORLD, GLOBAL_BATCH // WORLD // 2):
                figures = suite.compare(model, {"training.local_batch_size": local}, *layout)
                results[f"{model}, {name}, {GLOBAL_BATCH // WORLD // local} micro-batch(es)"] = figures
    return results


def half_precision(suite: Suite, name: str, layout: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """Mixed precision against float32 in one process."""
    # On a CPU without units for it, bfloat16 would be computed as float32 and show nothing.
    torch.backends.cpu.get_cpu_capability = lambda: "AVX512"
    precision = {"training.mixed_precision_param": dtype, "training.local_batch_size": GLOBAL_BATCH // WORLD}
    return {f"{name}, {dtype}": suite.compare("untied", precision, layout)}


def non_finite(suite: Suite, name: str, layout: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """One nan in the gradients of the last rank only: what happens to the step on every rank, and to the next."""
    settings = {"training.mixed_precision_param": dtype, "training.local_batch_size": 4}
    with suite.trainer(WITHOUT_CHECKPOINTS, MODELS["tied"], settings, layout) as trainer:
        trainer.train_step()
        before, scale = live_tensors(trainer), trainer.scaler.scale.item()
        loss = trainer.loss
        if RANK == WORLD - 1:
            trainer.loss = lambda logits, labels: loss(poisoned(logits), labels)
        trainer.train_step()
        after, skipped, trainer.loss = live_tensors(trainer), trainer.skipped_steps.item(), loss
        factor = trainer.scaler.scale.item() / scale
        trainer.train_step()
        result = {
            "differing": differing(before, after),
            "differing_after_next": len(differing(after, live_tensors(trainer))),
            "tensors": len(after),
            "skipped": [skipped, trainer.skipped_steps.item()],
            "scale_factor": factor,
        }
        return {f"{name}, {dtype}": trainer.world.gather(result)}


def poisoned(logits: Tensor) -> Tensor:
    """The same logits, but one element of their gradient is nan."""

    def poison(gradient: Tensor) -> Tensor:
        gradient = gradient.clone()
        gradient[0, 0, 0] = float("nan")
        return gradient

    logits.register_hook(poison)
    return logits


def checkpoints(suite: Suite, name: str, layout: Mapping[str, Any]) -> dict[str, Any]:
    """Save, resume and change the number of processes, validating and sampling just before each save."""
    settings = MODELS["tied"] | {
        "training.local_batch_size": 2,
        "training.global_batch_size": 8,
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


def failed_save(suite: Suite, name: str, layout: Mapping[str, Any]) -> dict[str, Any]:
    """The disk of the last rank fills up while a checkpoint is saved again: what each rank is told, what is left."""
    settings = {"training.steps": 2, "training.global_batch_size": 8}
    with suite.trainer(settings, layout, run=f"{name}-full") as trainer:
        trainer.train()
        before = (trainer.checkpointer.root / "step-000002" / "manifest.json").read_bytes()
        write = HuggingFaceStorageWriter.write_data
        if RANK == WORLD - 1:
            HuggingFaceStorageWriter.write_data = full_disk
        said = ""
        try:
            trainer.save()
        except UserError as error:
            said = str(error)
        HuggingFaceStorageWriter.write_data = write
        trainer.world.gather(None)  # rank 0 has tidied up
        left = sorted(path.name for path in trainer.checkpointer.root.iterdir())
        unchanged = (trainer.checkpointer.root / "step-000002" / "manifest.json").read_bytes() == before
        saved = trainer.world.gather({"said": said, "left": left, "unchanged": unchanged})
        trainer.save()  # the ranks are still in step
        return {name: saved}


def full_disk(*arguments: object) -> None:
    """What writing to a full disk does."""
    raise OSError(errno.ENOSPC, "No space left on device")


def two_ranks(suite: Suite) -> dict[str, Any]:
    """All checks of two ranks."""
    layouts = {"ddp": DDP, "fsdp": FSDP}
    results: dict[str, Any] = {
        "parity": parity(
            suite, ["tied", "untied"], {"ddp": [DDP], "fsdp": [FSDP], "fsdp, no resharding": [FSDP, NEVER]}
        ),
        "half_precision": {},
        "non_finite": {},
        "checkpoints": {name: checkpoints(suite, name, layout) for name, layout in layouts.items()},
        "failed_save": failed_save(suite, "fsdp", FSDP),
    }
    for name, layout in layouts.items():
        for dtype in ("bfloat16", "float16"):
            results["half_precision"] |= half_precision(suite, name, layout, dtype)
        for dtype in ("float32", "float16"):
            results["non_finite"] |= non_finite(suite, name, layout, dtype)
    return results


def four_ranks(suite: Suite) -> dict[str, Any]:
    """All checks of four ranks."""
    layouts = {"hsdp": HSDP, "fsdp": FSDP}
    return {
        "parity": parity(suite, ["tied"], {name: [layout] for name, layout in layouts.items()}),
        "half_precision": {},
        "non_finite": non_finite(suite, "hsdp", HSDP, "float32"),
        "failed_save": failed_save(suite, "hsdp", HSDP),
        "checkpoints": {name: checkpoints(suite, name, layout) for name, layout in layouts.items()},
    }


def compiled(suite: Suite) -> dict[str, Any]:
    """torch.compile under each layout of two ranks, against eager in one process."""
    settings = {"compile.enable": True, "training.local_batch_size": GLOBAL_BATCH // WORLD}
    return {name: suite.compare("wide", settings, layout) for name, layout in (("ddp", DDP), ("fsdp", FSDP))}


GROUPS = {"two": two_ranks, "four": four_ranks, "compiled": compiled}

if __name__ == "__main__":
    torch.set_num_threads(1)
    main(GROUPS[sys.argv[1]])
