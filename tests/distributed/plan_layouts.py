"""Run by test_plan_layouts.py on every rank: python plan_layouts.py GROUP FOLDER DATA.

One launch for many layouts: each trains three steps, of which the last one's collectives, bytes of weights, gradients
and optimizer, and most bytes of living tensors at once are written down, for the plan to be compared with.
"""

import gc
import json
import sys
import time
import weakref
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from helpers import TinyData
from runs import gather_any
from suite import RANK, WITHOUT_CHECKPOINTS, WORLD, Suite
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from titanling import cli
from titanling.parallel import data as data_plan
from titanling.trainer import Trainer

KINDS = {
    "gather": "all-gather",
    "reduce_scatter": "reduce-scatter",
    "reduce": "all-reduce",
    "send": "send or receive",
    "recv": "send or receive",
}
"""What the names of torch's operators begin with or contain, the first that fits."""


class Watch(TorchDispatchMode):
    """Collectives by kind, and bytes of all storages that operators make and that are alive but for `static` ones.

    torch's CommDebugMode counts the same operators, but its record of modules breaks where a module runs twice.
    """

    def __init__(self, static: list[Tensor]) -> None:
        super().__init__()
        self.static = [tensor.untyped_storage() for tensor in static]
        self.known = {storage._cdata for storage in self.static}
        self.alive: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self.peak = 0
        self.collectives: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Let subclasses unwrap themselves first: their parts come by again."""
        if any(kind not in (Tensor, torch.nn.Parameter) for kind in types):
            return NotImplemented
        output = func(*args, **(kwargs or {}))
        name = str(func)
        if "c10d" in name and not any(local in name for local in ("wait_tensor", "_wrap_tensor")):
            self.collectives[next((kind for part, kind in KINDS.items() if part in name), name)] += 1
        for tensor in tree_leaves(output):
            if type(tensor) in (Tensor, torch.nn.Parameter):
                self._see(tensor.untyped_storage())
        self.peak = max(self.peak, self.now())
        return output

    def _see(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self.known and key not in self.alive:
            self.alive[key] = weakref.ref(storage, lambda _: self.alive.pop(key, None))

    def now(self) -> int:
        """Bytes alive; FSDP shrinks storages to nothing, so sizes are asked for again."""
        found = (reference() for reference in list(self.alive.values()))
        return sum(storage.nbytes() for storage in found if storage is not None)


def local(tensor: Tensor) -> Tensor:
    """This rank's part."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def size(tensors: Any) -> int:
    """Bytes of this rank's parts."""
    return sum(local(tensor).nbytes for tensor in tensors)


def measure(trainer: Trainer) -> dict[str, Any]:
    """Two steps to warm up (DDP arranges its buckets in them), and one watched."""
    trainer.train_step()
    trainer.train_step()
    gradients: list[int] = []
    trainer.optimizer.register_step_pre_hook(
        lambda *_: gradients.append(size(p.grad for _, p in trainer.runner.named_parameters() if p.grad is not None))
    )
    weights, optimizer = trainer._tensors()
    static = [local(tensor) for tensor in (*weights.values(), *optimizer.values())]
    loss, at_loss = trainer.runner.loss, []

    def weighed(*arguments: Any) -> Tensor:
        time.sleep(0.05)  # gloo's threads let go of what they have sent, a moment after it has arrived
        gc.collect()
        before, watch.peak = watch.peak, watch.now()
        value = loss(*arguments)
        at_loss.append(watch.peak)
        watch.peak = max(before, watch.peak)
        return value

    trainer.runner.loss = weighed
    with Watch(static) as watch:
        trainer.train_step()
    return {
        "collectives": watch.collectives,
        "weights": size(weights.values()),
        "optimizer": size(optimizer.values()),
        "gradients": gradients[-1],
        "at_loss": max(at_loss, default=0),
        "peak": watch.peak,
    }


def run(suite: Suite, layouts: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Figures of every layout, from every rank."""
    results = {}
    for name, layout in layouts.items():
        with suite.trainer(WITHOUT_CHECKPOINTS, MODEL, layout) as trainer:
            results[name] = gather_any(trainer, measure(trainer))
    return results


MODEL = {
    "model.dim": 64,
    "model.n_layers": 4,
    "model.ffn_dim": 160,
    "model.n_kv_heads": 2,
    "model.vocab_size": 500,
    "model.tie_embeddings": False,
    "training.seq_len": 128,
    "training.global_batch_size": 4,
}
"""Large enough for activations to outweigh parameters."""
FSDP = {"parallelism.data_parallel_shard_degree": -1}
TP = {"parallelism.tensor_parallel_degree": 2, "model.n_kv_heads": 4}
CP = {"parallelism.context_parallel_degree": 2}
FULL = {"activation_checkpoint.mode": "full"}
OP = {"activation_checkpoint.mode": "selective", "activation_checkpoint.selective_ac_option": "op"}
SECOND = {"activation_checkpoint.mode": "selective", "activation_checkpoint.selective_ac_option": "2"}
NEVER = {"parallelism.fsdp_reshard_after_forward": "never"}
TIED = {"model.tie_embeddings": True, "model.qk_norm": True}
ACCUMULATED = {"training.local_batch_size": 1}
DDP = {"parallelism.data_parallel_replicate_degree": WORLD, "parallelism.data_parallel_shard_degree": 1}
HSDP = {"parallelism.data_parallel_replicate_degree": 2}
PP = {
    "parallelism.pipeline_parallel_degree": 2,
    "parallelism.pipeline_parallel_first_stage_less_layers": 0,
    "parallelism.pipeline_parallel_last_stage_less_layers": 0,
}
WHOLE = {"training.local_batch_size": 4}
HALF = {"training.local_batch_size": 2}

GROUPS: dict[str, dict[str, dict[str, Any]]] = {
    "two": {
        "ddp": DDP | HALF,
        "fsdp": FSDP | HALF,
        "fsdp, every second block": FSDP | HALF | SECOND,
        "fsdp, full": FSDP | HALF | FULL,
        "fsdp, op": FSDP | HALF | OP,
        "fsdp, never, accumulated": FSDP | ACCUMULATED | NEVER,
        "fsdp, accumulated, tied": FSDP | ACCUMULATED | TIED,
        "tp": TP | WHOLE,
        "tp, tied": TP | WHOLE | TIED,
        "tp, full": TP | WHOLE | FULL,
        "tp, op": TP | WHOLE | OP,
        "cp": CP | WHOLE,
        "cp, full": CP | WHOLE | FULL,
        "cp, op": CP | WHOLE | OP,
        "pp": PP | WHOLE,
    },
    "four": {
        "fsdp": FSDP | ACCUMULATED,
        "hsdp": HSDP | ACCUMULATED,
        "fsdp × tp": TP | HALF,
        "fsdp × cp, full": CP | HALF | FULL,
        "fsdp over two": FSDP | ACCUMULATED | {"parallelism.fsdp_reshard_after_forward": 2},
        "hsdp of tp": HSDP | TP | HALF,
        "pp × fsdp": PP | HALF,
    },
}


def main() -> None:
    """Run one group, and let rank 0 write what it found."""
    group, folder, data = sys.argv[1:]
    results = run(Suite(Path(folder), TinyData(*json.loads(data))), GROUPS[group])
    if RANK == 0:
        (Path(folder) / "results.json").write_text(json.dumps(results), encoding="utf-8")


if __name__ == "__main__":
    torch.set_num_threads(1)
    data_plan.suit_gloo = lambda module: None  # the plan is of the collectives that GPUs' ranks call
    cli.run(main)
