"""torchtitan v0.2.2's keys that titanling has no field for: dropped when they ask for nothing, refused otherwise.

And training.dataset, which becomes a streaming source.
"""

import json
import os
from collections.abc import Callable
from typing import Any

from titanling.errors import UserError

# Values with which torchtitan's key changes nothing here. `...` stands for any value: the key only steers
# torchtitan's own tests and printing, or is read only when a feature that is refused below is on.
NOTHING_ASKED: dict[str, tuple[Any, ...]] = {
    "job.config_file": (...,),
    "job.print_args": (...,),
    "job.print_config": (False,),
    "job.save_config_file": (...,),  # the resolved config is always saved with the run
    "job.custom_config_module": ("",),
    "job.use_for_integration_test": (...,),
    "profiling.profiler_active": (1,),
    "profiling.profiler_warmup": (1, 3),
    "training.gc_debug": (False,),
    "training.dataloader": (...,),  # but see stream_data_set
    "validation.dataloader": (...,),
    "parallelism.module_fqns_per_model_part": (),
    "parallelism.pipeline_parallel_schedule_csv": ("",),
    "parallelism.pipeline_parallel_expert_parallel_overlap": (...,),
    "parallelism.context_parallel_load_balancer": (...,),
    "parallelism.expert_parallel_degree": (1,),
    "parallelism.expert_tensor_parallel_degree": (1,),
    "parallelism.expert_parallel_comm_backend": ("standard",),
    "checkpoint.enable_ft_dataloader_checkpoints": (...,),
    "checkpoint.initial_load_in_hf": (...,),  # found out by looking at initial_load_path
    "checkpoint.initial_load_in_hf_quantized": (False,),
    "checkpoint.last_save_in_hf": (False,),
    "checkpoint.exclude_from_loading": ([],),
    "checkpoint.create_seed_checkpoint": (False,),
    "checkpoint.load_only": (False,),
    "activation_checkpoint.per_op_sac_force_recompute_mm_shapes_by_fqns": (...,),
    "activation_checkpoint.early_stop": (False,),
    "activation_checkpoint.visualize_memory_budget_pareto": (False,),
    "activation_checkpoint.preserve_rng_state": (...,),
    "activation_checkpoint.determinism_check": (...,),
    "activation_checkpoint.debug": (False,),
    "quantize.linear.float8.emulate": (False,),
    "quantize.linear.mx": (...,),
    "quantize.grouped_mm": (...,),
    "comm.trace_buf_size": (...,),
    "comm.save_traces_folder": (...,),
    "comm.save_traces_file_prefix": (...,),
    "comm.mode": ("default",),
    "memory_estimation.enable": (False,),
    "memory_estimation.disable_fake_mode": (...,),
    "fault_tolerance.enable": (False,),
    "fault_tolerance.process_group": (...,),
    "fault_tolerance.process_group_timeout_ms": (...,),
    "fault_tolerance.replica_id": (...,),
    "fault_tolerance.group_size": (...,),
    "fault_tolerance.min_replica_size": (...,),
    "fault_tolerance.semi_sync_method": (),
    "experimental.custom_import": ("",),
    "experimental.custom_args_module": ("",),
    "debug.deterministic_warn_only": (False,),
    "debug.moe_force_load_balance": (False,),
}

DATA_SETS = {"c4": ("allenai/c4", "en"), "c4_test": ("tests/assets/c4_test", None)}
"""training.dataset → its name on the Hub, or folder beside torchtitan, and the configuration."""


def is_torchtitan_key(dotted: str) -> bool:
    """Whether `refuse_or_drop` knows this key, or a table that it stands in."""
    return any(f"{dotted}.".startswith(f"{known}.") for known in NOTHING_ASKED)


def refuse_or_drop(tree: dict[str, Any], origin: Callable[[str], str]) -> None:
    """Remove from `tree` every torchtitan key that asks for nothing.

    Raises UserError for one that asks for a feature titanling lacks, naming its file through `origin(dotted key)`.
    """
    for dotted, harmless in NOTHING_ASKED.items():
        *tables, key = dotted.split(".")
        inner: Any = tree
        for table in tables:
            inner = inner.get(table) if isinstance(inner, dict) else None
        if not isinstance(inner, dict) or key not in inner:
            continue
        value = inner[key]
        # `is`-like comparison of types, so that 0 does not pass for False.
        if ... not in harmless and not any(value == ok and type(value) is type(ok) for ok in harmless):
            raise UserError(
                f"{origin(dotted)}: {dotted} = {json.dumps(value, default=str)} is a torchtitan setting that titanling"
                " does not support; remove it"
            )
        del inner[key]
    for table in ("memory_estimation", "fault_tolerance", "experimental"):
        if tree.get(table) == {}:
            del tree[table]


def stream_data_set(tree: dict[str, Any], origin: Callable[[str], str]) -> None:
    """Give `tree` a source for training.dataset, and workers, unless its [data] names text already.

    Call it before `refuse_or_drop`, which drops training.dataloader: pre-tokenised data needs no workers.
    Raises UserError for a data set that is not known.
    """
    training, data = tree.get("training"), tree.setdefault("data", {})
    name = training.get("dataset") if isinstance(training, dict) else None
    if not isinstance(name, str) or not isinstance(data, dict) or data.get("train") or data.get("sources"):
        return
    if name not in DATA_SETS:
        raise UserError(
            f'{origin("training.dataset")}: training.dataset = "{name}" is not known (only {", ".join(DATA_SETS)});'
            ' remove it, and name the text in [[data.sources]], of kind = "hf" say'
        )
    path, subset = DATA_SETS[name]
    path = training.get("dataset_path") or path
    source = {"name": name, "kind": "hf", "paths": [path], "weight": 1.0}
    # A folder of plain files has no configurations; a copy of the repository names them in its README.md.
    if subset is not None and not (os.path.isdir(path) and not os.path.isfile(os.path.join(path, "README.md"))):
        source["subset"] = subset
    data["sources"] = [source]
    dataloader = training.get("dataloader")
    if isinstance(dataloader, dict) and "num_workers" in dataloader:
        data.setdefault("workers", dataloader["num_workers"])
