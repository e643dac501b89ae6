"""What a run has saved: list, inspect, verify, compare and prune its checkpoints. Folders may be paths or URLs."""

import sys
from os.path import dirname, realpath

sys.path.insert(0, dirname(dirname(realpath(__file__))))
from titanling import environment

environment.require()

import argparse
import json

from titanling import cli

EXAMPLES = """examples:
  python scripts/checkpoint.py list outputs/debug
  python scripts/checkpoint.py inspect outputs/debug/checkpoints/step-000200 --tensors
  python scripts/checkpoint.py verify outputs/debug s3://bucket/run/step-000100
  python scripts/checkpoint.py diff outputs/debug/checkpoints/step-000100 outputs/debug/checkpoints/step-000200
  python scripts/checkpoint.py prune outputs/debug --keep 2 --every 1000 --dry-run

exit codes: 0; of verify 1 if a file is damaged; of diff 1 if they differ; 2 if the input is wrong
"""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = top.add_subparsers(dest="command", required=True, metavar="{list,inspect,verify,diff,prune}")

    def add(name: str, words: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=words, description=f"{words[0].upper()}{words[1:]}.", epilog=EXAMPLES,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip

    run = "a run folder, or the folder of its checkpoints"
    listing = add("list", "what a run has, and whether it is whole as far as sizes tell")
    listing.add_argument("run", type=cli.path_or_url, help=run)
    inspecting = add("inspect", "the model, the step, the config and the tensors of one checkpoint")
    inspecting.add_argument("checkpoint", type=cli.path_or_url, help="a step-… folder")
    inspecting.add_argument("--tensors", action="store_true", help="list every tensor: type, shape, how it is divided")
    verifying = add("verify", "read every file and compare it with its hash")
    verifying.add_argument("folder", nargs="+", type=cli.path_or_url, help=f"a step-… folder; or {run}")
    for each in (listing, verifying):
        each.add_argument("--json", action="store_true", help="print JSON")
    comparing = add("diff", "in what settings, state and tensors two checkpoints differ")
    comparing.add_argument("first", type=cli.path_or_url, metavar="A", help="a step-… folder")
    comparing.add_argument("second", type=cli.path_or_url, metavar="B", help="another one")
    pruning = add(
        "prune",
        "delete all but the newest checkpoints that verify, the best by validation, and the last before a decay",
    )
    pruning.add_argument("run", type=cli.path_or_url, help=run)
    pruning.add_argument("--keep", type=int, required=True, metavar="K", help="how many of the newest, at least 1")
    pruning.add_argument("--every", type=int, default=0, metavar="N", help="keep those of steps divisible by N too")
    pruning.add_argument("--dry-run", action="store_true", help="say what would be deleted, and delete nothing")
    return top


def main() -> int:
    """Arguments → one call; what it found, on stdout."""
    arguments = parser().parse_args()
    # Imported late, so that --help answers at once.
    from titanling.checkpoint.inventory import find_root, prune, take_stock, verify
    from titanling.checkpoint.text import pruned_text, stock_text, verdicts_text

    code = 0
    if arguments.command == "list":
        root = find_root(arguments.run)
        entries = take_stock(root)
        found = {"folder": str(root), "checkpoints": [entry.as_json() for entry in entries]}
        text = json.dumps(found, indent=1) if arguments.json else stock_text(root, entries)
    elif arguments.command == "inspect":
        from titanling.checkpoint.describe import inspect

        text = inspect(arguments.checkpoint, arguments.tensors)
    elif arguments.command == "verify":
        verdicts = verify(arguments.folder)
        as_json = [verdict.as_json() for verdict in verdicts]
        text = json.dumps(as_json, indent=1) if arguments.json else verdicts_text(verdicts)
        code = int(any(verdict.bad for verdict in verdicts))
    elif arguments.command == "diff":
        from titanling.checkpoint.compare import compare, difference_text  # imports torch

        difference = compare(arguments.first, arguments.second)
        text = difference_text(difference, arguments.first, arguments.second)
        code = 0 if difference.equal else 1
    else:
        really = not arguments.dry_run
        text = pruned_text(prune(arguments.run, arguments.keep, arguments.every, really), really)
    cli.say(text)
    return code


if __name__ == "__main__":
    cli.run(main, "nothing is half-deleted")
