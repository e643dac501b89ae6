"""From a config's tables to plans, and from plans and a model to what the loop runs."""

from collections.abc import Sequence

import torch
from torch import nn

from titanling.config.schema import ActivationCheckpoint, Compile, Kernels, Model, Parallelism, Quantize, Training
from titanling.model.presets import LlamaShape
from titanling.parallel import plan
from titanling.parallel.activation_checkpoint import ActivationCheckpointing
from titanling.parallel.compile import CompileBlocks
from titanling.parallel.context import ContextParallel
from titanling.parallel.data import DataParallel
from titanling.parallel.degrees import Degrees
from titanling.parallel.kernels import LOSS, KernelChoice
from titanling.parallel.mesh import World
from titanling.parallel.pipeline import Pipeline, PipelineRunner
from titanling.parallel.plan import Plan
from titanling.parallel.precision import Precision
from titanling.parallel.quantize import CONVERTER, Float8Linear
from titanling.parallel.runner import Runner
from titanling.parallel.tensor import TensorParallel


def build_plans(
    parallelism: Parallelism,
    training: Training,
    activation_checkpoint: ActivationCheckpoint,
    compile: Compile,
    model: Model,
    quantize: Quantize,
    kernels: Kernels,
    *,
    shape: LlamaShape,
    degrees: Degrees,
    device: torch.device,
) -> list[Plan]:
    """The plans that these tables ask for, in order. Raises UserError for one that cannot work on this device."""
    compiled = compile.enable and "model" in compile.components
    plans: list[Plan] = [
        KernelChoice(kernels, device, shape),
        TensorParallel(parallelism, compiled),
        ContextParallel(parallelism),
        Pipeline(parallelism, shape),
        Precision(training, device),
        DataParallel(parallelism, training, degrees),
    ]
    if activation_checkpoint.mode != "none":
        plans.append(ActivationCheckpointing(activation_checkpoint, compiled))
    if CONVERTER in model.converters:
        plans.append(Float8Linear(quantize.linear.float8))
    if compiled:
        plans.append(CompileBlocks(compile))
    plans += [plan.load_plan(reference) for reference in parallelism.plans]
    for each in plans:
        each.check(device)
    return plan.order(plans)


def lay_out(model: nn.Module, plans: Sequence[Plan], shape: LlamaShape, world: World) -> Runner:
    """Apply the plans to a model on meta. The runner still has to be initialised."""
    parts = plan.apply(plans, model, world)
    (data,) = (each for each in plans if isinstance(each, DataParallel))
    (kernels,) = (each for each in plans if isinstance(each, KernelChoice))
    loss_by = kernels.chosen(LOSS)
    if world.degrees.pp == 1:
        return Runner(parts, data, shape, world, loss_by)
    (precision,) = (each for each in plans if isinstance(each, Precision))
    return PipelineRunner(parts, data, shape, world, loss_by, precision.dtype)
