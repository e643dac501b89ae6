"""Make a small stand-in for the data of train_configs/ of text that this machine has: its documentation, manuals,
translations and Python's standard library, and where it has none in a language, openly, pseudo-text."""

import sys
from os.path import dirname, realpath

sys.path.insert(0, dirname(dirname(realpath(__file__))))
from titanling import environment

environment.require()

import argparse

from titanling.cli import path_or_url, run, say
from titanling.errors import UserError

EXAMPLE = """example:
  python scripts/make_standin.py --output data/standin

writes data/standin/SOURCE/train for web-xx and hq-xx of 13 languages and for code, data/standin/train and validation
of all of them, and data/standin/tokenizer/; then any config of train_configs/ trains on it (docs/data.md). What exists
already is kept; killed half-way, the same command finishes the work.
"""


def main() -> None:
    """Arguments → a stand-in."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=path_or_url, required=True, metavar="FOLDER", help="folder to write to")
    parser.add_argument(
        "--bytes-per-source", type=int, default=500_000, metavar="N", help="at most so much text (default: 500000)"
    )
    parser.add_argument("--vocab-size", type=int, default=8192, metavar="N", help="of its tokenizer (default: 8192)")
    arguments = parser.parse_args()
    if arguments.bytes_per_source < 10_000:
        raise UserError(f"--bytes-per-source {arguments.bytes_per_source}: must be at least 10000")
    if arguments.vocab_size < 258:
        raise UserError(f"--vocab-size {arguments.vocab_size}: must be at least 258")
    # Imported late, so that --help answers at once.
    from titanling.data.prepare.standin import make_standin

    for line in make_standin(arguments.output, arguments.bytes_per_source, arguments.vocab_size):
        say(line)


if __name__ == "__main__":
    run(main, "the same command goes on with the sources that are finished", reports=True)
