"""Train a few steps under a config's layout and in one process, and print how far loss and gradients are apart.

NGPU, NNODES, NODE_RANK and MASTER_ADDR are read as run_train.sh reads them; torchrun works as well.
"""

import os
import sys

from titanling import cli
from titanling.launch import Group, topology_from_environment


def main() -> int:
    """Start the processes, or be one of them."""
    topology = topology_from_environment()
    if "RANK" not in os.environ and topology.local_size * topology.nodes > 1:
        return Group([sys.executable, "-m", "titanling.parity", *sys.argv[1:]], topology).wait()
    from titanling.parity import main as compare

    return compare()


if __name__ == "__main__":
    cli.run(main)
