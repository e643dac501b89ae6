"""Train a few steps under a config's layout and in one process, and print how far loss and gradients are apart.

NGPU, NNODES, NODE_RANK and MASTER_ADDR are read as run_train.sh reads them; torchrun works as well.
"""

import sys
from os.path import dirname, realpath

sys.path.insert(0, dirname(dirname(realpath(__file__))))
from titanling import environment

environment.require()

import argparse
import os

from titanling import cli
from titanling.launch import Group
from titanling.ranks import Topology, launched, topology

EXAMPLE = (
    "example: NGPU=4 python scripts/parity.py --config train_configs/debug.toml --parallelism.tensor_parallel_degree 2"
)


def main() -> int:
    """Start the processes, or be one of them. 1 if the layout differs from one process."""
    parser = argparse.ArgumentParser(
        description="Compare a layout with one process.", epilog=EXAMPLE, allow_abbrev=False
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="the run's TOML; --table.key value overrides")
    parser.add_argument("--steps", type=int, default=5, metavar="N", help="optimizer steps (default 5)")
    arguments, rest = parser.parse_known_args()
    if arguments.steps < 1:
        parser.error("--steps must be 1 or more")
    places = Topology() if launched() else topology()
    if places.size > 1:
        return Group([sys.executable, os.path.realpath(__file__), *sys.argv[1:]], places).wait()
    from titanling.config import load_config  # torch takes seconds: not for --help
    from titanling.config.arguments import parse_arguments
    from titanling.parity import compare

    return compare(load_config(arguments.config, parse_arguments(rest).overrides), arguments.steps)


if __name__ == "__main__":
    cli.run(main)
