"""Whether a layout trains as one process does: both take the same steps, each from equal weights, in float32.

Without dropout. Every rank also runs the whole model by itself, so the model must fit into one device: shrink one that
does not (`--model.n_layers 4`). What is compared is the layout with its recomputation and its compiler against neither.
"""

import dataclasses
import logging
import math
import os
import tempfile
from contextlib import ExitStack, redirect_stdout
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from titanling import ranks
from titanling.cli import warn
from titanling.config import Config, LoadedConfig
from titanling.config.check import errors_name_the_file
from titanling.config.schema import ActivationCheckpoint, Compile, Parallelism
from titanling.errors import UserError
from titanling.model.presets import LlamaShape
from titanling.parallel.degrees import Degrees
from titanling.parallel.weights import local_part
from titanling.train import check
from titanling.trainer import Trainer

BOUND = 1e-5
"""What float32 sums in another order may differ by; a wrong layout is off by far more."""


class Difference(NamedTuple):
    """One step of the layout against one process."""

    loss: float
    loss_error: float
    """Absolute, in nats."""
    norm: float
    norm_error: float
    """Relative."""
    gradient_error: float
    """2-norm of the difference over the 2-norm, the largest of all parameters'."""
    parameter: str
    """The parameter whose it is."""

    @property
    def equal(self) -> bool:
        """Whether all three are within BOUND; nan is not."""
        return all(error < BOUND for error in (self.loss_error, self.norm_error, self.gradient_error))


def compare(loaded: LoadedConfig, steps: int) -> int:
    """Take `steps` steps and print a table on rank 0; 1 if the layout differs from one process."""
    # DTensor warns that gathering what FSDP and tensor parallelism share takes two steps: it costs nothing here.
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
    with errors_name_the_file(loaded), ExitStack() as stack:
        if loaded.config.data.streams:
            raise UserError(
                "data.sources: its sources are streamed: one process would read other sequences than the ranks of a"
                " layout; compare it on token files (scripts/prepare_data.py makes them)"
            )
        shape, degrees = check(loaded.config)
        warn(loaded.remarks)
        shape = dataclasses.replace(shape, dropout=0.0)
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="titanling-parity-"))
        config = comparable(loaded.config, folder)
        # The layout first: its ranks meet only when rank 0 has prepared the data.
        layout = Trainer(config, shape, degrees)
        stack.callback(layout.close)
        alone = single(config, shape, layout.sequences, folder)
        stack.callback(alone.close)
        differences = [compare_step(layout, alone) for _ in range(steps)]
        if layout.world.rank == 0:
            print(report(differences), flush=True)
    return 0 if all(difference.equal for difference in differences) else 1


def comparable(config: Config, folder: str) -> Config:
    """The run in float32, with nothing but training in it, and its files in `folder`."""
    off = {"enable": False}
    changes = {
        "job": {"dump_folder": folder},
        "training": {"dtype": "float32", "mixed_precision_param": "float32"},
        "checkpoint": off,
        "validation": off,
        "sampling": {"freq": 0},
        "metrics": {"enable_tensorboard": False, "enable_wandb": False},
        "profiling": {"enable_profiling": False, "enable_memory_snapshot": False},
    }
    return config.model_copy(
        update={table: getattr(config, table).model_copy(update=keys) for table, keys in changes.items()}
    )


def single(config: Config, shape: LlamaShape, sequences: int, folder: str) -> Trainer:
    """A trainer of the same batch of `sequences` in this process alone: eager, all activations kept."""
    training = config.training.model_copy(update={"global_batch_size": sequences, "enable_cpu_offload": False})
    update = {
        "training": training,
        "parallelism": Parallelism(plans=config.parallelism.plans),
        "activation_checkpoint": ActivationCheckpoint(),
        "compile": Compile(),
        "model": config.model.model_copy(update={"converters": ()}),
        "job": config.job.model_copy(update={"dump_folder": f"{folder}/alone"}),
    }
    with ranks.alone(), open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
        return Trainer(config.model_copy(update=update), shape, Degrees())


def compare_step(layout: Trainer, alone: Trainer) -> Difference:
    """Let both take a step from equal weights, and compare losses, norms and clipped gradients. All ranks together."""
    take_weights(layout, alone)
    expected: dict[str, Tensor] = {}
    worst: list[tuple[float, str]] = []

    def keep(*_: object) -> None:
        expected.update((name, p.grad) for name, p in alone.runner.named_parameters() if p.grad is not None)

    def compare(*_: object) -> None:
        worst.append(worst_gradient(layout, expected))

    hooks = alone.optimizer.register_step_pre_hook(keep), layout.optimizer.register_step_pre_hook(compare)
    reference, reference_norm, _ = alone.train_step()
    mine, norm, _ = layout.train_step()
    for hook in hooks:
        hook.remove()
    loss = layout.world.sum_(mine).item()
    error, parameter = max(layout.world.gather(worst[0]), key=lambda found: (math.isnan(found[0]), found[0]))
    norm_error = abs(norm.item() / reference_norm.item() - 1)
    return Difference(loss, abs(loss - reference.item()), norm.item(), norm_error, error, parameter)


def take_weights(layout: Trainer, alone: Trainer) -> None:
    """Give the layout the weights of the one process.

    Adam divides by the size of each gradient: where that is next to nothing, its rounding decides where a weight goes,
    and after a step the weights of equal layouts are not equal.
    """
    weights = dict(alone.runner.named_parameters())
    for name, parameter in layout.runner.named_parameters():
        part, offsets = local_part(parameter)
        whole = weights[name].detach()
        for dim, (offset, size) in enumerate(zip(offsets, part.shape, strict=True)):
            whole = whole.narrow(dim, min(offset, whole.size(dim)), size)
        part.copy_(whole)


def worst_gradient(layout: Trainer, expected: dict[str, Tensor]) -> tuple[float, str]:
    """The largest relative error of the gradients of this rank's stages, and its parameter."""
    worst = (0.0, "")
    for name, parameter in layout.runner.named_parameters():
        if parameter.grad is None and name not in expected:
            continue  # frozen by a plan
        if parameter.grad is None or name not in expected:
            return math.inf, name
        gradient = parameter.grad
        whole = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
        reference = expected[name]
        error = torch.dist(whole.to(reference.device), reference) / reference.norm().clamp_min(1e-30)
        # A nan compares as nothing: let it win.
        worst = max(worst, (error.nan_to_num(math.inf).item(), name))
    return worst


def report(differences: list[Difference]) -> str:
    """A table of the steps, and the verdict."""
    lines = [f"{'step':>4}  {'loss':>9} {'differs':>8}  {'grad norm':>9} {'differs':>8}  worst gradient"]
    for step, found in enumerate(differences, 1):
        lines.append(
            f"{step:>4}  {found.loss:>9.5f} {found.loss_error:>8.1e}  {found.norm:>9.4f} {found.norm_error:>8.1e}  "
            f"{found.gradient_error:.1e} {found.parameter}"
        )
    equal = all(found.equal for found in differences)
    verdict = "equal to one process" if equal else "DIFFERENT from one process"
    return "\n".join([*lines, f"{verdict}: float32, within {BOUND:.0e}" if equal else f"{verdict} (bound {BOUND:.0e})"])
