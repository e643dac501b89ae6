"""torchtitan v0.2.2's keys that titanling has no field for, or another name.

Each is at its default, or translated, or said to have no effect here, or refused: none is dropped without a word.
"""

import difflib
import os
from collections.abc import Callable
from typing import Any, NamedTuple

from titanling.errors import UserError
from titanling.text import shorten, show


class NoField(NamedTuple):
    """A key of torchtitan's that titanling has no field for."""

    silent: tuple[Any, ...] = ()
    """Values that ask for nothing: torchtitan's default first, if it has one."""
    why: str = ""
    """Why others have no effect here, which is said. Empty: others ask for what titanling lacks, and are refused."""


ALWAYS_SAVED = "the resolved config is always saved, as config.toml in the run folder"
TOKEN_FILES = "validation reads token files, which need no workers"
NO_EXPERTS = "only mixtures of experts have what it steers"
RECORDER = "torch's flight recorder stays as PyTorch and the environment set it"
MX = "it belongs to the converter quantize.linear.mx, which titanling lacks"
TORCHFT = "it belongs to torchft, which is off"
LOADER = "the loader's workers do as they always do"

# In the order of torchtitan's own list.
NO_FIELDS: dict[str, NoField] = {
    "job.config_file": NoField(why="the config is the file that --config names"),
    "job.print_config": NoField((False,)),
    "job.save_config_file": NoField(why=ALWAYS_SAVED),
    "job.custom_config_module": NoField(("",)),
    "profiling.profiler_active": NoField((1,)),
    "profiling.profiler_warmup": NoField((3, 1)),
    "training.gc_debug": NoField((False,)),
    "training.dataloader.num_workers": NoField((0,), "training reads token files, which need no workers"),
    "training.dataloader.persistent_workers": NoField((False,), LOADER),
    "training.dataloader.pin_memory": NoField((False, True)),  # for a GPU memory is pinned, whatever it says
    "training.dataloader.prefetch_factor": NoField(why=LOADER),
    "validation.dataloader.num_workers": NoField((0,), TOKEN_FILES),
    "validation.dataloader.persistent_workers": NoField((False,), TOKEN_FILES),
    "validation.dataloader.pin_memory": NoField((False, True)),
    "validation.dataloader.prefetch_factor": NoField(why=TOKEN_FILES),
    "parallelism.module_fqns_per_model_part": NoField(),
    "parallelism.pipeline_parallel_schedule_csv": NoField(("",)),
    "parallelism.pipeline_parallel_expert_parallel_overlap": NoField((True,), NO_EXPERTS),
    "parallelism.context_parallel_load_balancer": NoField(
        ("headtail",), 'context-parallel ranks always share a sequence as "headtail" does'
    ),
    "parallelism.expert_parallel_degree": NoField((1,)),
    "parallelism.expert_tensor_parallel_degree": NoField((1,)),
    "parallelism.expert_parallel_comm_backend": NoField(("standard",)),
    "checkpoint.enable_ft_dataloader_checkpoints": NoField((True,), TORCHFT),
    "checkpoint.initial_load_in_hf": NoField((False, True)),  # found out by looking; but see _load_from_assets
    "checkpoint.initial_load_in_hf_quantized": NoField((False,)),
    "checkpoint.last_save_in_hf": NoField((False,)),
    "checkpoint.exclude_from_loading": NoField(([],)),
    "checkpoint.create_seed_checkpoint": NoField((False,)),
    "checkpoint.load_only": NoField((False,)),
    "activation_checkpoint.per_op_sac_force_recompute_mm_shapes_by_fqns": NoField(
        (["moe.router.gate"], []), 'selective_ac_option = "op" keeps all matrix products'
    ),
    "activation_checkpoint.early_stop": NoField((False,)),
    "activation_checkpoint.visualize_memory_budget_pareto": NoField((False,)),
    "activation_checkpoint.preserve_rng_state": NoField((True,), "what is recomputed always has the same dropout"),
    "activation_checkpoint.determinism_check": NoField(("default",), "PyTorch's default check always runs"),
    "activation_checkpoint.debug": NoField((False,)),
    "quantize.linear.float8.emulate": NoField((False,)),
    "quantize.linear.mx.mxfp8_dim1_cast_kernel_choice": NoField(("triton",), MX),
    "quantize.linear.mx.recipe_name": NoField(("mxfp8_cublas",), MX),
    "quantize.linear.mx.filter_fqns": NoField((["output"],), MX),
    "quantize.grouped_mm.float8.fqns": NoField(([],), NO_EXPERTS),
    "quantize.grouped_mm.mx.recipe_name": NoField(("mxfp8",), NO_EXPERTS),
    "quantize.grouped_mm.mx.fqns": NoField(([],), NO_EXPERTS),
    "comm.trace_buf_size": NoField((20000,), RECORDER),
    "comm.save_traces_folder": NoField(("comm_traces",), RECORDER),
    "comm.save_traces_file_prefix": NoField(("rank_",), RECORDER),
    "comm.mode": NoField(("default",)),
    "memory_estimation.enable": NoField((False,)),
    "memory_estimation.disable_fake_mode": NoField((False,), "memory_estimation is off"),
    "fault_tolerance.enable": NoField((False,)),
    "fault_tolerance.process_group": NoField(("gloo",), TORCHFT),
    "fault_tolerance.process_group_timeout_ms": NoField((10000,), TORCHFT),
    "fault_tolerance.replica_id": NoField((0,), TORCHFT),
    "fault_tolerance.group_size": NoField((0,), TORCHFT),
    "fault_tolerance.min_replica_size": NoField((1,), TORCHFT),
    "fault_tolerance.semi_sync_method": NoField(),
    "experimental.custom_import": NoField(("",)),
    "experimental.custom_args_module": NoField(("",)),
    "debug.deterministic_warn_only": NoField((False,)),
    "debug.moe_force_load_balance": NoField((False,)),
    # Of versions before.
    "job.print_args": NoField((False,), "--print-config prints the config"),
    "job.use_for_integration_test": NoField((False, True)),  # read by torchtitan's own tests only
}

CONVERTERS = {"float8": "quantize.linear.float8"}
"""Names in torchtitan's own TOMLs → ours."""

DATA_SETS = {"c4": ("allenai/c4", "en"), "c4_test": ("tests/assets/c4_test", None)}
"""training.dataset → its name on the Hub, or folder beside torchtitan, and the configuration."""


def is_torchtitan_key(dotted: str) -> bool:
    """Whether `translate` knows this key, or a table of such keys alone."""
    return dotted in NO_FIELDS or dotted in _tables()


def translate(tree: dict[str, Any], origin: Callable[[str], str], known: Callable[[str], bool]) -> list[str]:
    """Give what torchtitan's keys say the names it has here, and remove from `tree` the keys that titanling has no
    field for. Returns a line for each that has no effect and is not at its default.

    Raises UserError for one that asks for what titanling lacks, naming its file through `origin(dotted key)`, and for
    an unknown one in a table of torchtitan's (`known(dotted key)`: titanling has it).
    """
    workers = stream_data_set(tree, origin)
    _rename_converters(tree)
    remarks = _load_from_assets(tree, origin)
    for dotted, key in NO_FIELDS.items():
        *tables, name = dotted.split(".")
        inner: Any = tree
        for table in tables:
            inner = inner.get(table) if isinstance(inner, dict) else None
        if not isinstance(inner, dict) or name not in inner:
            continue
        value = inner.pop(name)
        # `is`-like comparison of types, so that 0 does not pass for False.
        if any(value == silent and type(value) is type(silent) for silent in key.silent):
            continue
        shown = f"{origin(dotted)}: {dotted} = {show(value)}"
        if not key.why:
            raise UserError(f"{shown} is a torchtitan setting that titanling does not support; remove it")
        if not (workers and dotted == "training.dataloader.num_workers"):
            remarks.append(f"{shown} has no effect here: {key.why}")
    _remove_tables(tree, origin, known)
    return remarks


def _tables() -> list[str]:
    """Tables that hold keys of NO_FIELDS, the inner ones before those around them."""
    found = {dotted.rpartition(".")[0] for dotted in NO_FIELDS}
    found |= {table.rpartition(".")[0] for table in found if "." in table}
    return sorted(found, reverse=True)


def _remove_tables(tree: dict[str, Any], origin: Callable[[str], str], known: Callable[[str], bool]) -> None:
    """Remove tables of torchtitan's alone. Raises UserError for a key that is left in one."""
    for dotted in (table for table in _tables() if not known(table)):
        *tables, name = dotted.split(".")
        inner: Any = tree
        for table in tables:
            inner = inner.get(table) if isinstance(inner, dict) else None
        if not isinstance(inner, dict) or name not in inner:
            continue
        left = inner[name]
        if not isinstance(left, dict):
            shown = show(left)
            raise UserError(f"{origin(dotted)}: {dotted} = {shown}: must be a table, [{dotted}]")
        if left:
            key = next(iter(left))
            keys = [each.rpartition(".")[2] for each in NO_FIELDS if each.rpartition(".")[0] == dotted]
            match = difflib.get_close_matches(key, keys, n=1, cutoff=0.5)
            hint = f"did you mean {match[0]}?" if match else "remove it"
            file = origin(f"{dotted}.{key}")
            raise UserError(f"{file}: unknown key {shorten(key)} in torchtitan's [{dotted}]; {hint}")
        del inner[name]


def _load_from_assets(tree: dict[str, Any], origin: Callable[[str], str]) -> list[str]:
    """torchtitan's initial_load_in_hf = true without a path takes the weights beside the tokenizer: so does `tree`."""
    checkpoint, model = tree.get("checkpoint"), tree.get("model")
    if not isinstance(checkpoint, dict) or checkpoint.get("initial_load_in_hf") is not True:
        return []
    if checkpoint.get("initial_load_path") is not None:
        return []
    assets = model.get("hf_assets_path") if isinstance(model, dict) else None
    said = f"{origin('checkpoint.initial_load_in_hf')}: checkpoint.initial_load_in_hf = true without initial_load_path"
    if assets is None:
        raise UserError(f"{said} takes the weights of model.hf_assets_path, which is not set; set one of the two")
    checkpoint["initial_load_path"] = assets
    return [f"{said}: the run starts from the weights in model.hf_assets_path"]


def _rename_converters(tree: dict[str, Any]) -> None:
    """Give converters the names that they have here, each once."""
    model = tree.get("model")
    given = model.get("converters") if isinstance(model, dict) else None
    if isinstance(given, list) and all(isinstance(name, str) for name in given):
        model["converters"] = list(dict.fromkeys(CONVERTERS.get(name, name) for name in given))


def stream_data_set(tree: dict[str, Any], origin: Callable[[str], str]) -> bool:
    """Give `tree` a source for training.dataset, and the workers of training.dataloader, unless its [data] names text
    already. Whether it did. Raises UserError for a data set that is not known.
    """
    training, data = tree.get("training"), tree.setdefault("data", {})
    name = training.get("dataset") if isinstance(training, dict) else None
    if not isinstance(name, str) or not isinstance(data, dict) or data.get("train") or data.get("sources"):
        return False
    if name not in DATA_SETS:
        raise UserError(
            f"{origin('training.dataset')}: training.dataset = {show(name)} is not known (only"
            f' {", ".join(DATA_SETS)}); remove it, and name the text in [[data.sources]], of kind = "hf" say'
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
    return True
