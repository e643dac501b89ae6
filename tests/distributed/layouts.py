"""Run by test_layouts.py on every rank: python layouts.py GROUP FOLDER DATA.

Trains the same tiny models under many layouts, compares each with one process, and writes the figures to
FOLDER/results.json. One launch for all of them: starting processes and importing torch costs more than the training.
"""

import gc
import json
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import table
import torch
from helpers import TinyData
from runs import differing, full, gather_any, live_tensors
from saving import CHAIN, checkpoints, failed_save, resume_chain
from suite import RANK, WITHOUT_CHECKPOINTS, WORLD, Suite, alone
from table import MODELS, Case, Settings, mesh, pipeline
from torch import Tensor
from torch._dynamo.utils import counters

from titanling import cli
from titanling.bfloat16 import places, random_bits, random_keys
from titanling.loss import IGNORE_INDEX
from titanling.model.generate import generate
from titanling.parallel.compile import uncompiled
from titanling.parallel.kernels import EXCHANGED, KernelChoice
from titanling.parallel.runner import Batch
from titanling.parallel.weights import local_part
from titanling.trainer import Trainer

PROMPT, NEW_TOKENS = [5, 31, 7], 12


def main(group: Callable[[Suite], dict[str, Any]]) -> None:
    """Run one group of checks and let rank 0 write what they found."""
    folder, data = Path(sys.argv[2]), TinyData(*json.loads(sys.argv[3]))
    gc.freeze()  # what is imported need not be looked through whenever a trainer is collected
    results = group(Suite(folder, data))
    if RANK == 0:
        (folder / "results.json").write_text(json.dumps(results), encoding="utf-8")


def parity(suite: Suite, cases: Mapping[str, Case]) -> dict[str, Any]:
    """Every case of a table in float32, and how many graphs the compiler made."""
    results = {}
    for name, case in cases.items():
        counters.clear()
        results[name] = suite.compare(case.model, case.settings())
        results[name]["graphs"] = counters["stats"]["unique_graphs"]
    return results


def on_the_kernels_ops(suite: Suite, cases: Mapping[str, Case]) -> dict[str, Any]:
    """Cases of a model that calls the kernels' ops, as on a GPU; a CPU computes them in torch. One process does not."""

    def chosen(_: KernelChoice, key: str) -> str:
        return "triton" if key in EXCHANGED and "RANK" in os.environ else "torch"

    with mock.patch.object(KernelChoice, "chosen", chosen):
        return parity(suite, {f"{name}, on the kernels' ops": case for name, case in cases.items()})


def half_precision(suite: Suite, name: str, layout: Settings, dtype: str) -> dict[str, Any]:
    """Mixed precision against float32 in one process."""
    # On a CPU without units for it, bfloat16 would be computed as float32 and show nothing.
    torch.backends.cpu.get_cpu_capability = lambda: "AVX512"
    case = Case("untied", layout)
    return {f"{name}, {dtype}": suite.compare("untied", case.settings(), {"training.mixed_precision_param": dtype})}


def non_finite(suite: Suite, name: str, layout: Settings, dtype: str) -> dict[str, Any]:
    """One nan in the gradients of the last rank only: what happens to the step on every rank, and to the next."""
    settings = {"training.mixed_precision_param": dtype, "training.local_batch_size": 4}
    with suite.trainer(WITHOUT_CHECKPOINTS, MODELS["untied"], settings, layout) as trainer:
        trainer.train_step()
        before, scale = live_tensors(trainer), trainer.scaler.scale.item()
        loss = trainer.runner.loss
        if RANK == WORLD - 1:
            trainer.runner.loss = lambda given, *rest: loss(poisoned(given), *rest)
        trainer.train_step()
        after, skipped, trainer.runner.loss = live_tensors(trainer), trainer.outcomes.settle().skipped, loss
        factor = trainer.scaler.scale.item() / scale
        trainer.train_step()
        result = {
            "differing": differing(before, after),
            "differing_after_next": len(differing(after, live_tensors(trainer))),
            "tensors": len(after),
            "skipped": [skipped, trainer.outcomes.settle().skipped],
            "scale_factor": factor,
        }
        return {f"{name}, {dtype}": gather_any(trainer, result)}


def empty_steps(suite: Suite, name: str, layout: Settings, dtype: str) -> dict[str, Any]:
    """A step whose sequences have no label, on every rank or on all data-parallel ranks but the first."""
    settings = {"training.mixed_precision_param": dtype, "training.local_batch_size": 4}
    with suite.trainer(WITHOUT_CHECKPOINTS, MODELS["untied"], settings, layout) as trainer:
        move = trainer._to_device

        def without_labels(batch: Batch) -> Batch:
            return move(batch | {"labels": torch.full_like(batch["labels"], IGNORE_INDEX)})

        trainer.train_step()
        before, scale = live_tensors(trainer), trainer.scaler.state()
        trainer._to_device = without_labels
        loss, _, _ = trainer.train_step()
        result = {
            "differing": differing(before, live_tensors(trainer)),
            "scale": trainer.scaler.state() == scale,
            "losses": [trainer.world.sum_(loss.clone()).item()],
        }
        if trainer.world.dp_rank == 0:
            trainer._to_device = move
        loss, _, _ = trainer.train_step()
        result["losses"].append(trainer.world.sum_(loss.clone()).item())
        result["differing_after_next"] = len(differing(before, live_tensors(trainer)))
        result["tensors"] = len(before)
        outcomes = trainer.outcomes.settle()
        result["counts"] = [outcomes.empty, outcomes.skipped, outcomes.in_a_row]
        return {f"{name}, {dtype}": gather_any(trainer, result)}


def stochastic(suite: Suite, name: str, model: str, layout: Settings) -> dict[str, Any]:
    """Stochastic rounding: the bits of each part against the whole's, a step, and one that is not finite."""
    torch.backends.cpu.get_cpu_capability = lambda: "AVX512"  # or bfloat16 would not be computed
    kinds = {"training.dtype": "bfloat16", "training.mixed_precision_param": "bfloat16"}
    settings = kinds | {"optimizer.stochastic_rounding": True, "training.local_batch_size": 4}
    with suite.trainer(WITHOUT_CHECKPOINTS, MODELS[model], settings, layout) as trainer:
        wrong = []
        for parameter_name, parameter in trainer.runner.named_parameters():
            keys, held = random_keys(1, 2, parameter_name), torch.zeros_like(parameter, dtype=torch.int64)
            own, offsets = local_part(held)
            own.copy_(random_bits(places(own.shape, offsets, parameter.shape, own.device), keys))
            whole = random_bits(places(parameter.shape, [0] * parameter.ndim, parameter.shape, own.device), keys)
            if not torch.equal(full(held), whole):
                wrong.append(parameter_name)
        start = live_tensors(trainer)
        trainer.train_step()
        before = live_tensors(trainer)
        loss = trainer.runner.loss
        trainer.runner.loss = lambda given, *rest: loss(poisoned(given), *rest)
        trainer.train_step()
        result = {
            "wrong": wrong,
            "differing": differing(before, live_tensors(trainer)),
            "stepped": len(differing(start, before)) / len(start),
            "skipped": trainer.outcomes.settle().skipped,
        }
        return {name: gather_any(trainer, result)}


def poisoned(given: Tensor) -> Tensor:
    """The same hidden states or logits, but one element of their gradient is nan."""

    def poison(gradient: Tensor) -> Tensor:
        gradient = gradient.clone()
        gradient[0, 0, 0] = float("nan")
        return gradient

    given.register_hook(poison)
    return given


def outputs(suite: Suite, layouts: Mapping[str, tuple[str, Settings]]) -> dict[str, Any]:
    """After three steps: the validation loss against one process's, and whether all ranks write the same text as it."""
    settings = WITHOUT_CHECKPOINTS | {"validation.enable": True, "validation.local_batch_size": 3}
    references: dict[str, tuple[float, list[int]]] = {}
    results = {}
    for name, (model, layout) in layouts.items():
        if model not in references:
            with alone(), suite.trainer(settings, MODELS[model], {"training.local_batch_size": 16}) as trainer:
                references[model] = output(trainer)
        with suite.trainer(settings, MODELS[model], Case(model, layout).settings()) as trainer:
            loss, text = output(trainer)
            same = all(trainer.world.gather(text == references[model][1]))
            results[name] = {"loss": abs(loss - references[model][0]), "same_text": same, "tokens": len(text)}
    return results


def output(trainer: Trainer) -> tuple[float, list[int]]:
    """Validation loss and a greedy text after three steps, and that training goes on as before."""
    for _ in range(3):
        trainer.train_step()
    trainer.evaluate()
    with trainer.runner.evaluation(), uncompiled():
        decoder = trainer.runner.decoder(len(PROMPT) + NEW_TOKENS)
        text = generate(decoder, torch.tensor(PROMPT), NEW_TOKENS, temperature=0)
    trainer.train_step()
    return trainer.losses["validation loss"], text


def two_ranks(suite: Suite) -> dict[str, Any]:
    """All checks of two ranks."""
    data = {"ddp": ("tied", mesh(2)), "fsdp": ("tied", mesh(1, 2))}
    layouts = data | {"tp": ("tied", mesh(tp=2)), "cp": ("tied", mesh(cp=2)), "pp": ("untied", pipeline())}
    more = {f"{name}, masked": ("masked", layouts[name][1]) for name in ("cp", "pp")}
    more |= {"pp, ZBV": ("deep", pipeline("ZBVZeroBubble"))}
    results: dict[str, Any] = {
        "parity": parity(suite, table.two_ranks()) | on_the_kernels_ops(suite, table.on_the_kernels_ops()),
        "half_precision": {},
        "non_finite": {},
        "empty": {},
        "stochastic": {},
        "checkpoints": {name: checkpoints(suite, name, *layout) for name, layout in layouts.items()},
        "failed_save": failed_save(suite, "fsdp", *layouts["fsdp"]) | failed_save(suite, "pp", *layouts["pp"]),
        "outputs": outputs(suite, layouts | more),
    }
    for name, (_, layout) in layouts.items():
        for dtype in ("bfloat16", "float16"):
            results["half_precision"] |= half_precision(suite, name, layout, dtype)
        for dtype in ("float32", "float16") if name in data else ("float16",):
            results["non_finite"] |= non_finite(suite, name, layout, dtype)
        results["stochastic"] |= stochastic(suite, name, *layouts[name])
        results["empty"] |= empty_steps(suite, name, layout, "float16" if name in data else "float32")
    return results


def four_ranks(suite: Suite) -> dict[str, Any]:
    """All checks of four ranks."""
    data = {"hsdp": ("tied", mesh(2, 2)), "fsdp": ("tied", mesh(1, 4))}
    both = {"fsdp2 x tp2": ("tied", mesh(1, 2, tp=2)), "cp2 x tp2": ("tied", mesh(cp=2, tp=2))}
    piped = {f"pp2 x {name}2": ("untied", pipeline(**{name: 2})) for name in ("tp", "cp", "shard")}
    return {
        "parity": parity(suite, table.four_ranks()),
        "half_precision": half_precision(suite, *("fsdp2 x tp2", both["fsdp2 x tp2"][1]), "bfloat16"),
        "non_finite": non_finite(suite, "hsdp", data["hsdp"][1], "float32"),
        "empty": empty_steps(suite, "hsdp", data["hsdp"][1], "float32"),
        "stochastic": stochastic(suite, "hsdp", *data["hsdp"]) | stochastic(suite, "fsdp2 x tp2", *both["fsdp2 x tp2"]),
        "failed_save": failed_save(suite, "hsdp", *data["hsdp"]),
        "checkpoints": {name: checkpoints(suite, name, *layout) for name, layout in data.items()},
        "chain": resume_chain(suite, CHAIN),
        "outputs": outputs(suite, both | piped | {"hsdp": data["hsdp"]}),
    }


GROUPS = {
    "two": two_ranks,
    "four": four_ranks,
    "compiled two": lambda suite: (
        on_the_kernels_ops(suite, table.on_the_kernels_ops("inductor")) | parity(suite, table.compiled_two())
    ),
    "compiled four": lambda suite: parity(suite, table.compiled_four()),
}

if __name__ == "__main__":
    torch.set_num_threads(1)
    cli.run(lambda: main(GROUPS[sys.argv[1]]))
