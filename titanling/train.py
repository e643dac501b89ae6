"""Train a model: python -m titanling.train --config FILE [--table.key value …]

Everything that can be wrong in the config, the data or the topology is said before torch is even imported.
"""

if __name__ == "__main__":
    from titanling import environment

    environment.require(even_for_help=True)

import os
import signal
import sys
import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from titanling import cli, terminal
from titanling.checkpoint.folder import FULL, shortage
from titanling.checkpoint.remote import open_root
from titanling.config import Config, load_config
from titanling.config.arguments import parse_arguments
from titanling.config.check import check_runnable, errors_name_the_file
from titanling.config.load import dump_toml
from titanling.config.reference import help_text
from titanling.data.ends import check_ends, ends_of
from titanling.data.held_out import check_targets
from titanling.data.indexed import file_sha256
from titanling.data.prepare.run import prepare
from titanling.data.sources import all_prefixes, check_epochs, check_length, check_sources, open_sources
from titanling.data.token_files import check_files, is_foreign
from titanling.errors import FAILED_NUMERICALLY, UserError
from titanling.files import new_file, set_aside
from titanling.metrics.sinks import require_wandb
from titanling.model.presets import LlamaShape
from titanling.owner import Owner
from titanling.parallel.degrees import Degrees, resolve_layout, sequences_per_step
from titanling.planner.command import plan
from titanling.ranks import is_first, planned, refuse_unlaunched, this_process
from titanling.sizes import check_batches, host_memory
from titanling.stop import StopRequest
from titanling.summary import End, failed_summary, stopped_summary, summary
from titanling.text import escape_controls

if TYPE_CHECKING:
    from titanling.trainer import Trainer


def main() -> int | None:
    """Parse, check, prepare what is missing, train; the exit code."""
    arguments = parse_arguments(sys.argv[1:])
    if arguments.help:
        print(help_text())
        return 0
    if arguments.config is None:
        raise UserError("command line: --config FILE is missing (try --config train_configs/debug.toml, or --help)")
    loaded = load_config(arguments.config, arguments.overrides)
    config = loaded.config
    if arguments.print_config:
        print(dump_toml(config), end="")
        return 0
    if arguments.dry_run:
        plan(loaded, planned())
        return 0
    terminal.report_to("stdout")
    refuse_unlaunched()
    owner = Owner()
    try:
        with errors_name_the_file(loaded):
            stop = StopRequest(owner.release)
            # Until then a signal ends the command. Of several ranks the first has torch before it checks.
            early = this_process().size > 1 and not _to_be_prepared(config)
            if early:
                stop.install()
            shape, degrees = check(config, owner)
            cli.warn(loaded.remarks)
            if not early:
                stop.install()
            end = _run(config, shape, degrees, stop, owner)
    finally:
        owner.release()
    finished = end.steps >= config.training.steps
    if is_first():
        text = failed_summary if end.failure else summary if finished else stopped_summary
        said = escape_controls(text(arguments.config, arguments.overrides, config, end))
        print(said, file=sys.stderr if end.failure else sys.stdout, flush=True)
    if end.failure:
        return FAILED_NUMERICALLY
    if finished:
        return 0
    # Saved: the same command goes on. Without checkpoints, it is as if the signal had ended it.
    return os.EX_TEMPFAIL if config.checkpoint.enable else 128 + signal.Signals[stop.name or "SIGTERM"]


def check(config: Config, owner: Owner | None = None) -> tuple[LlamaShape, Degrees]:
    """Everything that can be checked without torch, as UserErrors; rank 0 makes the data where it is missing.

    Before it does, rank 0 takes the run's folders into `owner`.
    """
    check_runnable(config)
    if config.metrics.enable_wandb:
        require_wandb()
    shape, degrees = resolve_layout(
        config.model,
        config.parallelism,
        config.training,
        config.data,
        config.validation,
        config.compile,
        this_process().size,
    )
    check_batches(config, degrees, host_memory())
    if is_first():
        with _shown_to_others(config):
            _check_run_folder(config)
            if owner is not None:
                owner.take(_run_folders(config))
            _prepare_data(config)
            _check_data(config, shape, degrees)
    return shape, degrees


def _run(config: Config, shape: LlamaShape, degrees: Degrees, stop: StopRequest, owner: Owner) -> End:
    """Train; how it has ended."""
    # Where a rank is lost, torch's own warnings are pages of stack frames around what we say in a line.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from titanling.trainer import Trainer  # torch takes seconds to import: only now

    trainer: Trainer | None = None
    try:
        trainer = Trainer(config, shape, degrees, stop, owner)
        if trainer.world.rank == 0:
            # Only now: a run that is refused, because its checkpoint differs say, leaves the earlier config.
            _save_config(config, trainer.metrics.info)
        if trainer.step >= config.training.steps:
            trainer.metrics.info(f"this run is complete at step {trainer.step}; how to go on is said below")
        losses = trainer.train()
        trainer.close()
    except RuntimeError as error:
        owner.release()
        _end_at_once(error, trainer, config)
    except BaseException:
        if trainer is not None:
            trainer.metrics.close()  # but do not wait for the other ranks, which may never come
            trainer.world.leave()
        raise
    return End(trainer.step, losses, trainer.outcomes.skipped, trainer.outcomes.empty, trainer.failure)


def _end_at_once(error: RuntimeError, trainer: "Trainer | None", config: Config) -> NoReturn:
    """Say what has ended the run, and exit: what would be ended in order hangs with the ranks that are lost.

    Once, and without a traceback, if ranks are lost: it would only show where the others waited for them.
    """
    from titanling.parallel.roll_call import RanksLost

    me = this_process()
    if trainer is not None:
        trainer.metrics.close()
    if not isinstance(error, RanksLost):
        traceback.print_exception(error)
    elif me.rank == min(set(range(me.size)) - set(error.ranks)):
        when = f"after step {trainer.step}" if trainer is not None else "before the first step"
        goes_on = " The same command goes on from the last checkpoint" if config.checkpoint.enable else ""
        print(
            f"error: {when}, {error}, of {me.size} (killed, suspended or cut off); look at that process's messages and"
            f" node.{goes_on}",
            file=sys.stderr,
        )
    sys.stdout.flush()
    sys.stderr.flush()
    if trainer is not None and not isinstance(error, RanksLost):
        trainer.world.leave()
    os._exit(1)


def _shown_to_others(config: Config) -> AbstractContextManager[None]:
    """While rank 0 is at work before the ranks meet, the others know that it is. Several ranks do pay for torch now."""
    if this_process().size == 1:
        return nullcontext()
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from titanling.parallel.rendezvous import at_work

    return at_work(timedelta(seconds=config.comm.init_timeout_seconds))


def _check_run_folder(config: Config) -> None:
    """Whether the run folder exists or can be made. Makes nothing, so that a refused run leaves no trace."""
    folder = Path(config.job.dump_folder).absolute()
    there = next(path for path in (folder, *folder.parents) if os.path.exists(path))
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        why = "is not writable" if there.is_dir() else "is not a folder"
        raise UserError(f'job.dump_folder = "{config.job.dump_folder}": {there} {why}; set another folder')
    if config.checkpoint.enable:
        try:
            open_root(folder, config.checkpoint.folder)
        except UserError as error:
            raise UserError(f"checkpoint.folder = {error}") from None


def _run_folders(config: Config) -> dict[str, Path]:
    """The folders that the run writes, by the settings that name them."""
    folder = Path(config.job.dump_folder)
    folders = {"job.dump_folder": folder}
    if config.checkpoint.enable:
        folders["checkpoint.folder"] = open_root(folder, config.checkpoint.folder)
    return folders


def _save_config(config: Config, say: Callable[[str], None]) -> None:
    """Write the run's config; another one that is there, of an earlier start or the user's own, is kept."""
    path = Path(config.job.dump_folder) / "config.toml"
    content = dump_toml(config).encode()
    try:
        if path.is_file() and not path.is_symlink() and path.read_bytes() == content:
            return
        with new_file(path) as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
            if os.path.lexists(path):
                say(f"{path}: differs from this start's config and is kept as {set_aside(path).name}")
    except OSError as error:
        room = f": {shortage(path, len(content))}" if error.errno in FULL else ""
        raise UserError(
            f"{path}: cannot be written: {error.strerror}{room}; free some space or mend permissions"
        ) from None


def _to_be_prepared(config: Config) -> bool:
    """Whether the run makes its own data, and has not made it yet."""
    data, asked = config.data, config.data.prepare.text and config.model.hf_assets_path
    files = [Path(f"{prefix}.json") for prefix in (data.train, data.validation) if prefix]
    return bool(data.train and asked and not is_foreign(data.train)) and not all(file.exists() for file in files)


def _prepare_data(config: Config) -> None:
    data, tokenizer = config.data, config.model.hf_assets_path
    if data.train and data.prepare.text and tokenizer and not is_foreign(data.train):
        if _to_be_prepared(config):
            print(escape_controls(f"preparing {' '.join(data.prepare.text)} as {data.train} (once)"), flush=True)
        for line in prepare(data.prepare, data.train, data.validation, tokenizer, run_folder=config.job.dump_folder):
            print(escape_controls(line), flush=True)


def _check_data(config: Config, shape: LlamaShape, degrees: Degrees) -> None:
    tokenizer, data = config.model.hf_assets_path, config.data
    if tokenizer is not None and not (Path(tokenizer) / "tokenizer.json").is_file():
        raise UserError(f'model.hf_assets_path = "{tokenizer}": has no tokenizer.json; correct it or remove it')
    expected = file_sha256(f"{tokenizer}/tokenizer.json") if tokenizer is not None else None
    training, validation = config.training, config.validation
    sequences = sequences_per_step(training, degrees.dp)
    if data.streams:
        from titanling.data.streaming import check_streams  # it imports tokenizers

        assert tokenizer is not None  # check_runnable saw to it
        check_streams(data, tokenizer, shape.vocab_size, training.seq_len, config.debug.seed, sequences)
    else:
        expected = check_sources(data, shape.vocab_size, expected, training.seq_len)
        source = open_sources(data, training.seq_len, config.debug.seed, sequences)
        check_epochs(data, source, training.steps, sequences)
        source.close()
    if validation.enable:
        assert data.validation is not None  # check_runnable saw to it
        tokens = check_files(data.validation, data, shape.vocab_size, expected).tokens
        key, seq_len = "validation.seq_len", validation.seq_len
        if seq_len is None:
            key, seq_len = "training.seq_len", training.seq_len
        check_length(data.validation, tokens, key, seq_len)
        check_targets(data.validation, data, validation, seq_len)
    _check_ends(config)


def _check_ends(config: Config) -> None:
    """Whether all files and the tokenizer mean the same tokens to end and to begin a document."""
    data, tokenizer = config.data, config.model.hf_assets_path
    held_out = [data.validation] if config.validation.enable and data.validation else []
    prefixes = held_out if data.streams else [*all_prefixes(data), *held_out]
    if prefixes:
        ends, _ = ends_of(data, prefixes, tokenizer)
        if tokenizer is not None:
            check_ends(prefixes, tokenizer)
        if data.streams and data.prepare.add_bos != (ends.bos_id is not None):
            raise UserError(
                f"data.prepare.add_bos = {str(data.prepare.add_bos).lower()}, by which the sources are streamed:"
                f" {prefixes[0]}, the validation text, is prepared otherwise; change it, or prepare that again"
            )


if __name__ == "__main__":
    cli.run(main, "the same command goes on from the last checkpoint, if one was saved")
