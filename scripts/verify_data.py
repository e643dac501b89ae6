"""Check what the loaders of a config hand out: nothing twice, nothing left out, every source in its share."""

import sys
from os.path import dirname, realpath

sys.path.insert(0, dirname(dirname(realpath(__file__))))
from titanling import environment

environment.require()

import argparse
import re
from typing import TYPE_CHECKING

from titanling import cli
from titanling.errors import UserError

if TYPE_CHECKING:
    from titanling.data.verify import Verdict

EXAMPLE = """example:
  python scripts/verify_data.py --config outputs/mine/config.toml --steps 1:200 --ranks 4

reads these steps as the ranks would, one micro-batch after the other, and compares each sequence with the files. Exits
with 1 if something is wrong. --table.key value overrides keys as for training.
"""


def main() -> int:
    """Read the steps, print what was found; the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="the run's TOML")
    parser.add_argument("--steps", default="1:100", metavar="A:B", help="first and last step (default 1:100)")
    parser.add_argument("--ranks", type=int, default=1, metavar="N", help="processes of the run (default 1)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments, rest = parser.parse_known_args()
    steps = parse_steps(arguments.steps)
    if arguments.ranks < 1:
        raise UserError(f"--ranks {arguments.ranks}: must be 1 or more")
    verdict = verify_config(arguments.config, rest, steps, arguments.ranks)
    if arguments.json:
        found = vars(verdict) | {"shares": [share._asdict() for share in verdict.shares]}
        cli.say_json(found)
    else:
        cli.say("\n".join(lines(verdict, steps, arguments.ranks)))
    return 1 if verdict.faults else 0


def parse_steps(text: str) -> range:
    """The steps that A:B names, both included. Raises UserError."""
    found = re.fullmatch(r"([0-9]+):([0-9]+)", text)
    if not found or not 1 <= int(found[1]) <= int(found[2]):
        raise UserError(f"--steps {text}: must be A:B, the first and the last step, as 1:100; the first of a run is 1")
    return range(int(found[1]), int(found[2]) + 1)


def verify_config(path: str, overrides: list[str], steps: range, ranks: int) -> "Verdict":
    """Build every data-parallel rank's loader of a config, and verify them together."""
    # Imported late, so that --help answers at once.
    from titanling.data.loader import build_loader
    from titanling.data.verify import verify
    from titanling.run_data import open_run_data

    config, degrees, sequences, source = open_run_data(path, overrides, ranks)
    local = config.training.local_batch_size
    loaders = [build_loader(source, local, rank, degrees.dp) for rank in range(degrees.dp)]
    for loader in loaders:
        loader.dataset.load_state_dict({"samples": (steps.start - 1) * sequences})
    try:
        return verify(source, list(map(iter, loaders)), steps, sequences, local)
    finally:
        for loader in loaders:
            loader.dataset.close()


def lines(verdict: "Verdict", steps: range, ranks: int) -> list[str]:
    """The verdict as a short table."""
    whole, width = verdict.sequences, max(6, *(len(share.source) for share in verdict.shares))
    processes = f"{ranks} process{'es' if ranks > 1 else ''}"
    found = [
        f"steps {steps.start:,} to {steps.stop - 1:,} on {processes}: {whole:,} sequences",
        f"{'source':<{width}}  sequences    share  configured  epochs",
    ]
    for name, count, expected, _, epochs in verdict.shares:
        row = f"{count:>9,}  {count / whole:7.2%}  {expected / whole:10.2%}  {epochs:6.2f}"
        found.append(f"{name:<{width}}  {row}")
    found.append(f"sequences that read as an earlier one: {verdict.same_text:,}; padding {verdict.padding:.2%}")
    return found + ([f"wrong: {fault}" for fault in verdict.faults] or ["right: each read once an epoch, in its share"])


if __name__ == "__main__":
    cli.run(main)
