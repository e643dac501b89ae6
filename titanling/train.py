"""Train a model: python -m titanling.train --config FILE [--table.key value …]

Everything that can be wrong in the config, the data or the topology is said before torch is even imported.
"""

import os
import sys
from pathlib import Path

from titanling import cli
from titanling.config import Config, load_config
from titanling.config.arguments import parse_arguments
from titanling.config.check import check_runnable, errors_name_the_file
from titanling.config.load import dump_toml
from titanling.config.reference import help_text
from titanling.data.indexed import check_dataset, file_sha256
from titanling.data.prepare.run import prepare
from titanling.errors import UserError
from titanling.model.presets import LlamaShape
from titanling.parallel.degrees import Degrees, resolve_layout, world_size
from titanling.planner.command import plan, planned_world_size
from titanling.summary import summary


def main() -> None:
    """Parse, check, prepare what is missing, train."""
    arguments = parse_arguments(sys.argv[1:])
    if arguments.help:
        print(help_text())
        return
    if arguments.config is None:
        raise UserError("command line: --config FILE is missing (try --config train_configs/debug.toml, or --help)")
    loaded = load_config(arguments.config, arguments.overrides)
    config = loaded.config
    if arguments.print_config:
        print(dump_toml(config), end="")
        return
    if arguments.dry_run:
        plan(loaded, planned_world_size())
        return
    with errors_name_the_file(loaded):
        shape, degrees = check(config)
        losses, steps = _run(config, shape, degrees)
    if os.environ.get("RANK", "0") == "0":
        print(summary(arguments.config, arguments.overrides, config, steps, losses))


def check(config: Config) -> tuple[LlamaShape, Degrees]:
    """Everything that can be checked without torch, as UserErrors; rank 0 makes the data where it is missing."""
    check_runnable(config)
    shape, degrees = resolve_layout(
        config.model, config.parallelism, config.training, config.validation, config.compile, world_size()
    )
    if os.environ.get("RANK", "0") == "0":
        _check_run_folder(config)
        _prepare_data(config)
        _check_data(config, shape)
    return shape, degrees


def _run(config: Config, shape: LlamaShape, degrees: Degrees) -> tuple[dict[str, float], int]:
    """Train; the last losses by name, and the step that the run has reached."""
    from titanling.trainer import Trainer  # torch takes seconds to import: only now

    trainer = Trainer(config, shape, degrees)
    try:
        if trainer.world.rank == 0:
            # Only now: a run that is refused, because its checkpoint differs say, leaves the earlier config.
            _save_config(config)
        if trainer.step >= config.training.steps:
            trainer.metrics.info(
                f"this run is complete at step {trainer.step}; extend it with --training.steps {2 * trainer.step}"
            )
        losses = trainer.train()
    except BaseException:
        trainer.metrics.close()  # but do not wait for the other ranks, which may never come
        raise
    trainer.close()
    return losses, trainer.step


def _check_run_folder(config: Config) -> None:
    """Whether the run folder exists or can be made. Makes nothing, so that a refused run leaves no trace."""
    folder = Path(config.job.dump_folder).absolute()
    there = next(path for path in (folder, *folder.parents) if os.path.exists(path))
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        why = "is not writable" if there.is_dir() else "is not a folder"
        raise UserError(f'job.dump_folder = "{config.job.dump_folder}": {there} {why}; set another folder')


def _save_config(config: Config) -> None:
    path = Path(config.job.dump_folder) / "config.toml"
    partial = path.with_suffix(".toml.partial")
    try:
        partial.write_text(dump_toml(config), encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise UserError(f"{path}: cannot be written: {error.strerror}; free some space or mend permissions") from None


def _prepare_data(config: Config) -> None:
    data, tokenizer = config.data, config.model.hf_assets_path
    if data.train and data.prepare.text and tokenizer:
        if not all(Path(f"{prefix}.json").exists() for prefix in (data.train, data.validation) if prefix):
            print(f"preparing {' '.join(data.prepare.text)} as {data.train} (once)", flush=True)
        for line in prepare(data.prepare, data.train, data.validation, tokenizer):
            print(line, flush=True)


def _check_data(config: Config, shape: LlamaShape) -> None:
    tokenizer, data = config.model.hf_assets_path, config.data
    if tokenizer is not None and not (Path(tokenizer) / "tokenizer.json").is_file():
        raise UserError(f'model.hf_assets_path = "{tokenizer}": has no tokenizer.json; correct it or remove it')
    expected = file_sha256(f"{tokenizer}/tokenizer.json") if tokenizer is not None else None
    used = [(data.train, "training.seq_len", config.training.seq_len)]
    if config.validation.enable:
        key = "validation.seq_len" if config.validation.seq_len else "training.seq_len"
        used.append((data.validation, key, config.validation.seq_len or config.training.seq_len))
    for prefix, key, seq_len in used:
        assert prefix is not None  # check_runnable saw to it
        tokens = check_dataset(prefix, shape.vocab_size, expected).tokens
        if tokens <= seq_len:
            raise UserError(
                f"{key} = {seq_len}: {prefix}.bin holds only {tokens} tokens, and one sequence needs {seq_len + 1};"
                " give more text or a smaller seq_len"
            )


if __name__ == "__main__":
    cli.run(main)
