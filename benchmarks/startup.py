"""Start-up: from `./run_train.sh` to the first step of the default job, and to the message of a config error.

Everything is warm: the environment is the one of this Python, and a first run, which is not counted, prepares the data.
Runs in a folder of its own (--folder keeps the data for the next time).
"""

import sys
from os.path import dirname, realpath

sys.path.insert(0, dirname(dirname(realpath(__file__))))
from titanling import environment

environment.require(even_for_help=True)

import argparse
import os
import re
import statistics
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

from harness import ROOT, environment, machine, say, write_json
from rich.console import Console
from rich.table import Table

EXAMPLE = "example: python benchmarks/startup.py --repeats 5 --json results.json"
RUN = str(ROOT / "run_train.sh")
FIRST_STEP = re.compile(r"\bstep +1\b")
# The default job, cut short behind its first step.
SHORT = ["--training.steps", "2", "--validation.steps", "1"]
# For --smoke: a corpus and a tokenizer that take a second.
TINY = ["--data.prepare.vocab_size", "400", "--model.vocab_size", "400", "--model.n_layers", "1"]
TINY += ["--data.prepare.text", f'["{ROOT / "titanling"}"]', "--data.prepare.validation_fraction", "0.3"]
BAD = ["--training.steps", "0"]
TARGET_STEP, TARGET_ERROR = 10.0, 2.0


def main() -> int:
    """Arguments → runs → table and JSON. Exit code 1 if a config error imports torch or does not end with code 2."""
    parser = argparse.ArgumentParser(description=__doc__, epilog=EXAMPLE)
    parser.add_argument("--repeats", type=int, default=5, help="runs of each (default 5)")
    parser.add_argument("--folder", type=Path, help="where to run (default: a temporary folder)")
    parser.add_argument("--json", metavar="OUT", help="also write the results here")
    parser.add_argument("--smoke", action="store_true", help="seconds: a tiny corpus and model, one run of each")
    arguments = parser.parse_args()
    repeats = 1 if arguments.smoke else arguments.repeats
    options = TINY if arguments.smoke else []
    results: dict[str, Any] = {"benchmark": "startup", "machine": machine()}
    with tempfile.TemporaryDirectory(prefix="titanling-benchmark-") as temporary:
        folder = arguments.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        say("preparing the data (not counted)")
        first_step_seconds(folder, Path(temporary) / "run-0", options)
        steps, errors = [], []
        for number in range(1, repeats + 1):
            say(f"run {number} of {repeats}")
            steps.append(first_step_seconds(folder, Path(temporary) / f"run-{number}", options))
            errors.append(config_error_seconds(folder))
        torch_free = not imports_torch(folder)
    results |= {
        "first_step_seconds": steps,
        "config_error_seconds": errors,
        "config_error_imports_torch": not torch_free,
        "targets": {"first_step_seconds": TARGET_STEP, "config_error_seconds": TARGET_ERROR},
    }
    report(steps, errors, torch_free)
    write_json(arguments.json, results)
    return int(not torch_free)


def first_step_seconds(folder: Path, dump_folder: Path, options: list[str]) -> float:
    """Seconds until the line of step 1 is printed; the run then ends by itself. RuntimeError if there is none."""
    command = [RUN, "--job.dump_folder", str(dump_folder), *SHORT, *options]
    start, seconds, output = time.perf_counter(), None, ""
    process = subprocess.Popen(
        command, cwd=folder, env=child_environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.stdout is not None
    for line in process.stdout:
        output += line
        if seconds is None and FIRST_STEP.search(line):
            seconds = time.perf_counter() - start
    if process.wait() or seconds is None:
        raise RuntimeError(f"{' '.join(command)} ended with code {process.returncode}:\n{output}")
    return seconds


def config_error_seconds(folder: Path) -> float:
    """Seconds until a run with a value out of range has ended with code 2."""
    start = time.perf_counter()
    code = subprocess.run([RUN, *BAD], cwd=folder, env=child_environment(), capture_output=True).returncode
    seconds = time.perf_counter() - start
    if code != 2:
        raise RuntimeError(f"{RUN} {' '.join(BAD)} ended with code {code}, not 2")
    return seconds


def imports_torch(folder: Path) -> bool:
    """Whether the same config error imports torch."""
    config = str(ROOT / "train_configs" / "debug.toml")
    command = [sys.executable, "-X", "importtime", "-m", "titanling.train", "--config", config, *BAD]
    log = subprocess.run(command, cwd=folder, env=child_environment(), capture_output=True, text=True).stderr
    return re.search(r"\| +torch$", log, re.MULTILINE) is not None


def child_environment() -> dict[str, str]:
    """With this Python as the active one, so that run_train.sh takes its environment."""
    return environment(PATH=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")


def report(steps: list[float], errors: list[float], torch_free: bool) -> None:
    """Print the medians."""
    table = Table(title="start-up, warm: seconds")
    for column in ("", "median", "min … max", "target"):
        table.add_column(column, justify="right")
    for name, found, target in (
        ("first step of the default job", steps, TARGET_STEP),
        ("config error", errors, TARGET_ERROR),
    ):
        spread = f"{min(found):.2f} … {max(found):.2f}"
        table.add_row(name, f"{statistics.median(found):.2f}", spread, f"below {target:.0f}")
    console = Console(highlight=False)
    console.print(table)
    console.print("a config error does not import torch" if torch_free else "A CONFIG ERROR IMPORTS TORCH")


if __name__ == "__main__":
    sys.exit(main())
