"""Plan a config: what scripts/plan.py and the trainer's --dry-run both do."""

import json
import sys
import warnings
from pathlib import Path

from titanling.cli import warn
from titanling.config import LoadedConfig
from titanling.config.check import errors_name_the_file
from titanling.errors import UserError


def plan(loaded: LoadedConfig, world: int, hardware: str | None = None, out: Path | None = None) -> None:
    """Print the plan of a config for a world size, and write it as JSON if asked to.

    `hardware` is one of titanling.planner.hardware.NAMES; None: this machine's. Raises the UserErrors of training.
    """
    # torch takes seconds: not for --help
    from rich.console import Console

    from titanling.planner.forecast import forecast
    from titanling.planner.hardware import hardware as row
    from titanling.planner.hardware import here
    from titanling.planner.remedy import remedies
    from titanling.planner.report import as_json, show
    from titanling.planner.setup import resolve

    with errors_name_the_file(loaded), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, about a mesh that is not there
        planned = forecast(resolve(loaded.config, world, row(hardware or here())))
        better = [] if planned.fits else remedies(planned)
    warn(loaded.remarks)
    show(planned, better, Console(width=None if sys.stdout.isatty() else 160))
    if out is not None:
        try:
            out.write_text(json.dumps(as_json(planned, better), indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            raise UserError(f"--json {out}: cannot be written: {error.strerror}; give another file") from None
