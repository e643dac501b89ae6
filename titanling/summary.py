"""The last words of a run: what it reached, what it leaves, and the exact commands that go on from it."""

import json
import os
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from titanling.checkpoint.folder import list_steps, step_name
from titanling.checkpoint.remote import open_root, root_name
from titanling.config import Config
from titanling.data.token_files import facts
from titanling.doubts import JUMP
from titanling.hints import better_step, first_words
from titanling.ranks import asked, this_process
from titanling.schedule import lr_factor, trunk_end

ROOT = Path(__file__).resolve().parents[1]


class Failure(NamedTuple):
    """Steps at the end of a run that updated nothing."""

    first: int
    last: int
    empty: bool
    """Whether there was nothing to predict; if not, losses or gradients were not finite."""
    older: int | None = None
    """A checkpoint from before the last update."""


class End(NamedTuple):
    """How a run has ended."""

    steps: int
    """How far it has come."""
    losses: Mapping[str, float]
    """The last ones by name; a run that had nothing left to do has none."""
    skipped: int = 0
    empty: int = 0
    """Steps of the run that updated nothing, for they were not finite, or had nothing to predict."""
    failure: Failure | None = None


def summary(config_file: str, overrides: Mapping[str, Any], config: Config, end: End) -> str:
    """What to say of a run that has done what was asked: several lines."""
    folder, steps, losses = Path(config.job.dump_folder), end.steps, end.losses
    lines = [f"\nDone: {steps} steps"]
    idle = [f"{count} {kind}" for kind, count in (("skipped", end.skipped), ("empty", end.empty)) if count]
    if idle:
        lines[0] += f" ({' and '.join(idle)}, which changed nothing)"
    if losses:
        lines[0] += ", " + ", ".join(f"{name} {loss:.4f}" for name, loss in losses.items())
    entropy = facts(config.data.train, config.data).unigram_entropy if config.data.train else None
    if entropy is not None and "validation loss" in losses:
        gap = entropy - losses["validation loss"]
        side = "below" if gap > 0 else "above"
        lines[0] += f" ({abs(gap):.2f} nats {side} the corpus's unigram entropy of {entropy:.4f})"
    rows = {"metrics": str(folder / "metrics.jsonl")}
    if config.metrics.enable_tensorboard:
        rows["TensorBoard"] = _command(_program("tensorboard"), "--logdir", folder / config.metrics.save_tb_folder)
    if config.checkpoint.enable:
        root = root_name(folder, config.checkpoint.folder)
        rows["checkpoint"] = f"{root}/{step_name(steps)}"
        best = better_step(config, steps)
        if best is not None:
            rows["best"] = f"{root}/{step_name(best)}, whose validation loss is lower"
        checkpoint = f"{root}/{step_name(steps if best is None else best)}"
        script = (_program("python"), _script("scripts/generate.py"), "--checkpoint", checkpoint)
        rows |= going_on(config_file, overrides, config, end)
        if config.model.hf_assets_path:
            rows["generate"] = _command(*script, "--prompt", first_words(config))
        script = (_program("python"), _script("scripts/convert_dcp_to_hf.py"), "--checkpoint", checkpoint)
        rows["convert"] = _command(*script, "--output", "hf/")
    return "\n".join([*lines, *(f"  {name:<12} {text}" for name, text in rows.items())])


def stopped_summary(config_file: str, overrides: Mapping[str, Any], config: Config, end: End) -> str:
    """What to say of a run that a signal has ended before its last step."""
    steps = end.steps
    again = _run_again(config_file, overrides, config.training.steps)
    if steps == 0:
        return f"\nStopped before the first step; nothing was to be saved\n  {'go on':<12} {again}"
    if not config.checkpoint.enable:
        return (
            f"\nStopped after step {steps} of {config.training.steps}; checkpoint.enable = false, so nothing is saved"
        )
    return f"\nStopped after step {steps} of {config.training.steps}, which is saved\n  {'go on':<12} {again}"


def failed_summary(config_file: str, overrides: Mapping[str, Any], config: Config, end: End) -> str:
    """What to say, on one line, of a run that has ended because its steps updated nothing any more."""
    failure = end.failure
    assert failure is not None
    steps = f"steps {failure.first} to {failure.last}" if failure.first < failure.last else f"step {failure.last}"
    says = f"error: failed numerically: the same command would do the same: {steps} changed nothing, for"
    folder = Path(config.job.dump_folder)
    if failure.empty:
        if config.data.streams:
            return f"{says} no token that they read is to be predicted; look at the text of data.sources"
        look = [_program("python"), _script("scripts/trace_data.py"), "--config", folder / "config.toml"]
        size = ["--world-size", this_process().size] if this_process().size > 1 else []
        return (
            f"{says} no token that they read is to be predicted; see which documents:"
            f" {_command(*look, *size, '--step', failure.last)}"
        )
    changes: dict[str, Any] = {"optimizer.lr": float(f"{config.optimizer.lr / 10:.3g}")}
    if failure.older is None:
        changes["job.dump_folder"] = f"{folder}-lower-lr"
        again = "start anew with a lower learning rate"
    else:
        changes["checkpoint.load_step"] = failure.older
        again = f"go back to step {failure.older} with a lower learning rate"
    steps = config.training.steps
    return f"{says} losses or gradients are not finite; {again}: {_run_again(config_file, overrides, steps, changes)}"


def going_on(config_file: str, overrides: Mapping[str, Any], config: Config, end: End) -> dict[str, str]:
    """The command that trains for twice as long, from where the learning rate had not begun to fall, if that is saved.

    As rows of the summary; with a note where the learning rate rises again.
    """
    steps, schedule, changes = 2 * end.steps, config.lr_scheduler, dict[str, Any]()
    if schedule.total_steps is not None:
        changes["lr_scheduler.total_steps"] = steps
        schedule = schedule.model_copy(update={"total_steps": steps})
    trunk = trunk_end(config.lr_scheduler, config.training.steps)
    if trunk is not None and trunk not in list_steps(open_root(Path(config.job.dump_folder), config.checkpoint.folder)):
        trunk = None
    if trunk is None and not config.checkpoint.last_save_model_only:
        rows = {"go on": _run_again(config_file, overrides, steps, changes)}
        last = config.optimizer.lr * lr_factor(config.lr_scheduler, config.training.steps, end.steps - 1)
        then = config.optimizer.lr * lr_factor(schedule, steps, end.steps)
        if then > (1 + JUMP) * last:
            rows["note"] = f"going on raises the learning rate again, from {last:.2e} to {then:.2e}"
        return rows
    # In a run of its own, so that this one stays as it is; from its end, of which only weights are saved, anew.
    folder, start = config.checkpoint.folder, step_name(end.steps if trunk is None else trunk)
    changes["checkpoint.initial_load_path"] = f"{root_name(Path(config.job.dump_folder), folder)}/{start}"
    changes["checkpoint.initial_load_model_only"] = trunk is None
    changes["job.dump_folder"] = f"{config.job.dump_folder.rstrip('/')}-{steps}-steps"
    if "://" in folder or Path(folder).is_absolute():
        changes["checkpoint.folder"] = f"{folder.rstrip('/')}-{steps}-steps"
    return {"go on": _run_again(config_file, overrides, steps, changes)}


def _run_again(
    config_file: str, overrides: Mapping[str, Any], steps: int, changes: Mapping[str, Any] | None = None
) -> str:
    """The command of this run with other steps, and with changes."""
    changes = changes or {}
    environment = []
    if Path(config_file).resolve() != ROOT / "train_configs" / "debug.toml":
        environment.append(f"CONFIG_FILE={shlex.quote(config_file)}")
    environment += asked()
    words = [_script("run_train.sh")]
    for key, value in (dict(overrides) | changes).items():
        if key != "training.steps" and (key != "checkpoint.load_step" or key in changes):  # it has gone on from there
            words += [f"--{key}", value if isinstance(value, str) else json.dumps(value)]
    return " ".join([*environment, _command(*words, "--training.steps", steps)])


def _command(*words: object) -> str:
    return " ".join(shlex.quote(str(word)) for word in words)


def _program(name: str) -> str:
    """A program of this Python's environment, as short as the user can type it."""
    program = Path(sys.executable).with_name(name)
    return os.path.relpath(program) if program.is_relative_to(ROOT) else name


def _script(name: str) -> str:
    path = os.path.relpath(ROOT / name)
    return path if os.sep in path else f"./{path}"
