"""Make a tokenizer and token files from text: JSON lines, Parquet, plain text, also packed."""

import sys
from os.path import dirname, realpath

sys.path.insert(0, dirname(dirname(realpath(__file__))))
from titanling import environment

environment.require()

import argparse
import os
from typing import TYPE_CHECKING

from titanling.cli import add_format, path_or_url, run, say
from titanling.errors import UserError

if TYPE_CHECKING:
    from titanling.config.schema import Prepare

EXAMPLE = """example:
  python scripts/prepare_data.py --text 'books/**/*.txt' notes/ --output data/mine --vocab-size 16384
  python scripts/prepare_data.py --text fi='web/fi-*.jsonl.zst' en=web/en.parquet --tokenizer data/mine/tokenizer \\
      --config filters.toml --output data/web

writes data/mine/train.bin .idx .json, data/mine/validation.bin .idx .json and data/mine/tokenizer/. Then train with
  --data.train data/mine/train --data.validation data/mine/validation --model.hf_assets_path data/mine/tokenizer
What exists already is kept; killed half-way, the same command finishes the work.

Over several machines: --shard 1/8 … --shard 8/8, or --shard slurm in a job array (sbatch --array=1-8), into one
folder; then python scripts/data.py merge data/web/train, and the same for data/web/validation.
"""


def parse_arguments() -> argparse.Namespace:
    """The command line. What is not given is left to the config, or to its defaults."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--text",
        nargs="+",
        metavar="[NAME=]PATH",
        help="files, folders or globs: JSON, CSV, Parquet, Arrow (a document a row), plain text (a document a file);"
        ' gz, bz2, xz and zst are unpacked; or "python-stdlib"',
    )
    add("--output", type=path_or_url, required=True, help="folder to write to")
    add("--tokenizer", type=path_or_url, help="folder of a Hugging Face tokenizer to use instead of a new one")
    add(
        "--config",
        metavar="FILE",
        help="TOML whose [data.prepare] holds for all that is not given here; filters, say",
    )
    add("--shard", metavar="I/N", help='make only this share (from 1) of the text; "slurm": as the job array says')
    add("--vocab-size", type=int, help="size of a new tokenizer (default: 8192)")
    add("--validation-fraction", type=float, help="share of the documents kept aside (default: 0.01)")
    add_format(parser)
    add("--text-field", help="JSON, CSV, Parquet, Arrow: key or column of the text (default: text)")
    add("--id-field", help="JSON, CSV, Parquet, Arrow: key or column of the documents' names, kept in .ids.jsonl")
    add("--max-document-bytes", type=int, help="refuse longer ones (default: 100,000,000)")
    add("--skip-bad", action="store_true", default=None, help="count what cannot be used instead of refusing it")
    add("--add-bos", action="store_true", default=None, help="begin each document with the tokenizer's bos_token")
    add("--workers", type=int, help="processes (default: one for each core, if there is work for all)")
    add("--language", help="language of the text, for filters (default: of NAME=PATH, the NAME)")
    add(
        "--backend",
        choices=("auto", "tokenizers", "gigatoken"),
        help="what encodes the text (default: auto, gigatoken if it is installed and gives the ids of tokenizers)",
    )
    return parser.parse_args()


def main() -> None:
    """Prepare what is missing and print what was done."""
    arguments = parse_arguments()
    # Imported late, so that --help answers at once.
    from titanling.data.prepare.run import parse_shard, prepare

    settings = _settings(arguments)
    tokenizer = arguments.tokenizer
    if tokenizer is not None and not os.path.isfile(os.path.join(tokenizer, "tokenizer.json")):
        raise UserError(f"--tokenizer {tokenizer}: has no tokenizer.json; leave --tokenizer out to train one")
    shard = parse_shard(arguments.shard, os.environ) if arguments.shard else None
    output = arguments.output
    lines = prepare(
        settings,
        os.path.join(output, "train"),
        os.path.join(output, "validation") if settings.validation_fraction else None,
        tokenizer or os.path.join(output, "tokenizer"),
        shard,
    )
    say("\n".join(lines))
    if any(line.startswith("tokenised") for line in lines):
        _print_report(shard.name(os.path.join(output, "train")) if shard else os.path.join(output, "train"))


def _settings(arguments: argparse.Namespace) -> "Prepare":
    from pydantic import ValidationError

    from titanling.config import load_config
    from titanling.config.schema import Prepare

    settings = load_config(arguments.config, {}).config.data.prepare if arguments.config else Prepare()
    given = {name: getattr(arguments, name, None) for name in Prepare.model_fields}
    given["text"] = tuple(arguments.text or ()) or None
    try:
        settings = Prepare(**dict(settings) | {name: value for name, value in given.items() if value is not None})
    except ValidationError as error:
        first = error.errors()[0]
        flag = "--" + str(first["loc"][0]).replace("_", "-")
        raise UserError(f"{flag} {first['input']}: {first['msg']}") from None
    if not settings.text:
        raise UserError("--text: give files, folders or globs, or a --config that has data.prepare.text")
    return settings


def _print_report(prefix: str) -> None:
    from titanling.checkpoint.text import columns
    from titanling.data.prepare.report import memory_lines, read_report, rows

    report = read_report(prefix)
    say()
    say("\n".join([*columns(rows(report), right=(2, 3, 4)), *memory_lines(report)]))
    say(f"({prefix}.report.json)")


if __name__ == "__main__":
    run(main, "the same command goes on with the parts that are finished", reports=True)
