"""Under torchrun, in a copy of a version's files: what its runs of two ranks give, to results.json."""

import json
import os
from pathlib import Path

import torch
from outcome import AT_TWO_RANKS, interrupted_again, outcome
from runs import differing

from titanling import cli


def main() -> None:
    """Write on rank 0 what test_compatibility.py judges."""
    results = {}
    for run in AT_TWO_RANKS:
        found, ends = outcome(run)
        results[run] = found, differing(ends, interrupted_again(run))
    if os.environ["RANK"] == "0":
        Path("results.json").write_text(json.dumps(results))


if __name__ == "__main__":
    torch.set_num_threads(1)
    cli.run(main)
