"""Plan a layout before running it: memory, collectives, speed. One process, no GPU, no data."""

import sys
from os.path import dirname, realpath

sys.path.insert(0, dirname(dirname(realpath(__file__))))
from titanling import environment

environment.require()

import argparse

from titanling import cli
from titanling.planner.hardware import NAMES

EXAMPLE = (
    "example: python scripts/plan.py --config train_configs/debug.toml --world-size 8 --hardware h100"
    " --parallelism.tensor_parallel_degree 2"
)


def main() -> None:
    """Arguments → plan."""
    parser = argparse.ArgumentParser(description=__doc__, epilog=EXAMPLE, allow_abbrev=False)
    parser.add_argument("--config", required=True, metavar="FILE", help="the run's TOML")
    parser.add_argument("--world-size", type=int, required=True, metavar="N", help="processes, one per device")
    parser.add_argument("--hardware", choices=NAMES, help="device (default: this machine's; mi250x is one GCD)")
    parser.add_argument("--json", type=cli.local_path, metavar="OUT", help="also write everything here")
    arguments, rest = parser.parse_known_args()  # the rest are overrides, as of training: --table.key value
    # Imported late, so that --help answers at once.
    from titanling.config import load_config
    from titanling.config.arguments import parse_arguments
    from titanling.planner.command import plan

    overrides = parse_arguments(rest).overrides
    plan(load_config(arguments.config, overrides), arguments.world_size, arguments.hardware, arguments.json)


if __name__ == "__main__":
    cli.run(main)
