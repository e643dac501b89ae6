"""From a checkpoint to a directory that Hugging Face's transformers loads as it is, in a few blocks of memory."""

import json
import re
import shutil
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch

from titanling.checkpoint import folder
from titanling.checkpoint.hf_folder import INDEX, WEIGHTS, open_hf_folder
from titanling.checkpoint.hf_json import CONFIG, GENERATION
from titanling.checkpoint.loading import Opened, open_checkpoint
from titanling.checkpoint.model_card import model_card
from titanling.checkpoint.names import tensor_shapes
from titanling.checkpoint.origin import exported_configs, origin_of
from titanling.checkpoint.phases import longest_of_all
from titanling.checkpoint.shards import Shards
from titanling.checkpoint.stream import Target, compare, plan_files, sizes_of, write_target
from titanling.checkpoint.team import Team
from titanling.checkpoint.tokenizer_files import TokenizerExport, export_tokenizer
from titanling.checkpoint.weights import find_tokenizer, open_weights, setting, text_ends, verified
from titanling.errors import UserError
from titanling.files import new_folder, temporary

MAX_SHARD_SIZE = "5GB"
UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


class Plan(NamedTuple):
    """What is to be made of a checkpoint."""

    opened: Opened
    shards: Shards
    targets: list[Target]
    texts: dict[str, str]
    """Further files by name."""
    tokenizer: TokenizerExport
    total_bytes: int


def parse_size(text: str) -> int:
    """Bytes of a size such as 5GB, 800MB or 2GiB. Raises UserError."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?I?)B?\s*", text.upper())
    size = int(float(found[1]) * UNITS[found[2]]) if found and found[2] in UNITS else 0
    if size < 1:
        raise UserError(f"--max-shard-size {text}: must be a size such as 5GB, 800MB or 2GiB")
    return size


def export_to_hf(
    checkpoint: Path,
    output: Path,
    tokenizer: Path | None = None,
    dtype: str | None = None,
    max_shard_size: str = MAX_SHARD_SIZE,
    verify: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> list[str]:
    """Write weights, config.json, generation_config.json, tokenizer and README.md; return the names of the files.

    `tokenizer` is the run's own by default; `dtype` the one that each weight was saved in. The output appears only when
    it is whole; with `verify`, only after every tensor has been read back. Under torchrun the processes share the work.
    What is changed on the way is said through `say`.
    Raises UserError for a damaged checkpoint, a missing tokenizer, an output that exists or that cannot be written.
    """
    output = output.resolve()  # "." has no name to put another beside
    team = Team()
    partial = Path(team.share(str(temporary(output))))
    plans: list[Plan] = []

    def prepare() -> None:
        _refuse_output(checkpoint, output)
        plans.append(_plan(checkpoint, partial, tokenizer, dtype, parse_size(max_shard_size)))

    with ExitStack() as stack:
        team.act(prepare, lambda: _begin(stack, partial, output, plans[0]))
        plan = plans[0]
        team.act(
            lambda: _write_share(plan, output, team.rank, team.size, verify),
            lambda: _finish(plan, partial, output, verify),
        )
    team.leave()
    if team.rank == 0:
        for line in plan.tokenizer.lines:
            say(line)
    return sorted([*(target.path.name for target in plan.targets), *plan.texts, *plan.tokenizer.names])


def _refuse_output(checkpoint: Path, output: Path) -> None:
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"{output}: exists already; give another --output or remove it")
    if folder.renames(checkpoint) and output.is_relative_to(checkpoint.resolve()):
        raise UserError(f"{output}: lies in the checkpoint itself; give another --output")


def _plan(checkpoint: Path, partial: Path, tokenizer: Path | None, dtype: str | None, limit: int) -> Plan:
    opened = open_checkpoint(checkpoint)
    try:
        shape, shards = open_weights(opened)
    except UserError:
        with verified(opened):  # a hash names the bad file better than what reading it stumbled over
            raise
    _, files = find_tokenizer(opened.state, shape, tokenizer)
    ends = text_ends(opened.state, files)
    trained = "converted_from" not in opened.state
    dtypes = {name: getattr(torch, dtype) if dtype else shards.dtype(name) for name in tensor_shapes(shape)}
    sizes = sizes_of(shards, dtypes)
    plan = plan_files(sizes, limit)
    paths = [partial / name for name in _file_names(len(plan))]
    targets = [Target(path, {name: dtypes[name] for name in part}, {}) for path, part in zip(paths, plan, strict=True)]
    dtype_name = str(dtypes["model.embed_tokens.weight"]).removeprefix("torch.")
    setting(opened.state, "training.seq_len")
    longest, origin = longest_of_all(opened.state), origin_of(opened.state)
    config, generation = exported_configs(shape, dtype_name, longest, origin, ends.bos_id, files.bos_id, ends.stop_ids)
    texts = {CONFIG: _json(config), GENERATION: _json(generation)}
    texts["README.md"] = model_card(opened.state, shape, dtype_name)
    if len(targets) > 1:
        texts[INDEX] = _json(_index(targets, sizes, shape.total_params))
    return Plan(opened, shards, targets, texts, export_tokenizer(files, ends.bos_id, trained), sum(sizes.values()))


def _file_names(count: int) -> list[str]:
    if count == 1:
        return [WEIGHTS]
    return [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def _index(targets: list[Target], sizes: Mapping[str, int], parameters: int) -> dict[str, Any]:
    places = {name: target.path.name for target in targets for name in target.dtypes}
    return {"metadata": {"total_parameters": parameters, "total_size": sum(sizes.values())}, "weight_map": places}


def _begin(stack: ExitStack, partial: Path, output: Path, plan: Plan) -> None:
    """On rank 0: an empty folder to write to until `stack` ends, on a disk with room."""
    existing = next(path for path in output.parents if path.exists())
    free = shutil.disk_usage(existing).free
    if plan.total_bytes > free:
        raise UserError(f"{output}: needs {plan.total_bytes:,} bytes and the disk has {free:,} free; free some space")
    try:
        stack.enter_context(new_folder(output, partial))
    except OSError as error:
        raise _cannot_write(output, error) from None


def _write_share(plan: Plan, output: Path, rank: int, size: int, verify: bool) -> None:
    """Write this process's share of the weight files, and check its share of the checkpoint's meanwhile."""
    with verified(plan.opened, rank, size):
        for target in plan.targets[rank::size]:
            try:
                write_target(target, plan.shards, hashed=False)
            except OSError as error:
                raise _cannot_write(output, error) from None
            if verify:
                folder.forget_cached(target.path)
                wrong = compare(target, plan.shards)
                if wrong is not None:
                    raise UserError(f"{target.path}: {wrong} does not read back as it was written; look at the disk")


def _finish(plan: Plan, partial: Path, output: Path, verify: bool) -> None:
    """On rank 0: add the small files, and give the directory its name."""
    try:
        for name, text in plan.texts.items():
            (partial / name).write_text(text, encoding="utf-8")
        plan.tokenizer.write(partial)
        for path in (*partial.iterdir(), partial):
            folder.sync(path)
        if verify:
            open_hf_folder(partial)
        if output.exists():
            output.rmdir()
        partial.rename(output)
        folder.sync_parents(output)
    except OSError as error:
        raise _cannot_write(output, error) from None


def _cannot_write(output: Path, error: OSError) -> UserError:
    return UserError(f"{output}: cannot be written: {error.strerror or error}; free some space or choose another")


def _json(value: dict[str, Any]) -> str:
    return json.dumps(value, indent=2) + "\n"
