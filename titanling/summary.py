"""The last words of a run: what it reached, what it leaves, and the exact commands that go on from it."""

import json
import os
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from titanling.checkpoint.folder import step_name
from titanling.checkpoint.remote import root_name
from titanling.config import Config
from titanling.data.token_files import facts
from titanling.ranks import asked

ROOT = Path(__file__).resolve().parents[1]


def summary(
    config_file: str, overrides: Mapping[str, Any], config: Config, steps: int, losses: Mapping[str, float]
) -> str:
    """Several lines. `losses` are the last ones by name; a run that had nothing left to do has none."""
    folder = Path(config.job.dump_folder)
    lines = [f"\nDone: {steps} steps"]
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
        checkpoint = f"{root_name(folder, config.checkpoint.folder)}/{step_name(steps)}"
        script = (_program("python"), _script("scripts/generate.py"), "--checkpoint", checkpoint)
        rows["checkpoint"] = checkpoint
        rows["go on"] = _run_again(config_file, overrides, 2 * steps)
        if config.model.hf_assets_path:
            rows["generate"] = _command(*script, "--prompt") + ' "def fibonacci(n):"'
        script = (_program("python"), _script("scripts/convert_dcp_to_hf.py"), "--checkpoint", checkpoint)
        rows["convert"] = _command(*script, "--output", "hf/")
    return "\n".join([*lines, *(f"  {name:<12} {text}" for name, text in rows.items())])


def stopped_summary(
    config_file: str, overrides: Mapping[str, Any], config: Config, steps: int, losses: Mapping[str, float]
) -> str:
    """What to say of a run that a signal has ended before its last step."""
    again = _run_again(config_file, overrides, config.training.steps)
    if steps == 0:
        return f"\nStopped before the first step; nothing was to be saved\n  {'go on':<12} {again}"
    if not config.checkpoint.enable:
        return (
            f"\nStopped after step {steps} of {config.training.steps}; checkpoint.enable = false, so nothing is saved"
        )
    return f"\nStopped after step {steps} of {config.training.steps}, which is saved\n  {'go on':<12} {again}"


def _run_again(config_file: str, overrides: Mapping[str, Any], steps: int) -> str:
    """The command of this run with more steps."""
    environment = []
    if Path(config_file).resolve() != ROOT / "train_configs" / "debug.toml":
        environment.append(f"CONFIG_FILE={shlex.quote(config_file)}")
    environment += asked()
    words = [_script("run_train.sh")]
    for key, value in overrides.items():
        if key not in ("training.steps", "checkpoint.load_step"):  # it has gone on from there: not once more
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
