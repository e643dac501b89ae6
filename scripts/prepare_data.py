"""Make a tokenizer and token files from text: JSON lines, Parquet, plain text, also packed."""

import argparse
import os

from titanling.cli import run
from titanling.errors import UserError

EXAMPLE = """example:
  python scripts/prepare_data.py --text 'books/**/*.txt' notes/ --output data/mine --vocab-size 16384

writes data/mine/train.bin .idx .json, data/mine/validation.bin .idx .json and data/mine/tokenizer/. Then train with
  --data.train data/mine/train --data.validation data/mine/validation --model.hf_assets_path data/mine/tokenizer
What exists already is kept; killed half-way, the same command finishes the work.
"""


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--text",
        nargs="+",
        required=True,
        metavar="[NAME=]PATH",
        help="files, folders or globs: .jsonl and .parquet (a document a line or row), others are a document each;"
        ' .gz and .zst are unpacked; or "python-stdlib"',
    )
    parser.add_argument("--output", required=True, help="folder to write to")
    parser.add_argument("--vocab-size", type=int, default=8192, help="size of a new tokenizer (default: 8192)")
    parser.add_argument(
        "--validation-fraction", type=float, default=0.01, help="share of the documents kept aside (default: 0.01)"
    )
    parser.add_argument("--tokenizer", help="folder of an existing Hugging Face tokenizer to use instead of a new one")
    parser.add_argument(
        "--backend",
        default="auto",
        choices=("auto", "tokenizers", "gigatoken"),
        help="what encodes the text (default: auto, gigatoken if it is installed and gives the ids of tokenizers)",
    )
    parser.add_argument("--text-field", default="text", help="JSON lines, Parquet: where the text is (default: text)")
    parser.add_argument("--max-document-bytes", type=int, default=100_000_000, help="refuse longer ones (default: 1e8)")
    parser.add_argument("--skip-bad", action="store_true", help="count what cannot be used instead of refusing it")
    parser.add_argument("--workers", type=int, help="processes (default: one for each core, if there is work for all)")
    parser.add_argument("--language", help="language of the text, for filters (default: of NAME=PATH, the NAME)")
    return parser.parse_args()


def main() -> None:
    """Prepare what is missing and print what was done."""
    arguments = parse_arguments()
    # Imported late, so that --help answers at once.
    from pydantic import ValidationError

    from titanling.config.schema import Prepare
    from titanling.data.prepare.run import prepare

    try:
        settings = Prepare(
            text=tuple(arguments.text),
            vocab_size=arguments.vocab_size,
            validation_fraction=arguments.validation_fraction,
            backend=arguments.backend,
            text_field=arguments.text_field,
            max_document_bytes=arguments.max_document_bytes,
            skip_bad=arguments.skip_bad,
            workers=arguments.workers,
            language=arguments.language,
        )
    except ValidationError as error:
        first = error.errors()[0]
        flag = "--" + str(first["loc"][0]).replace("_", "-")
        raise UserError(f"{flag} {first['input']}: {first['msg']}") from None
    tokenizer = arguments.tokenizer
    if tokenizer is not None and not os.path.isfile(os.path.join(tokenizer, "tokenizer.json")):
        raise UserError(f"--tokenizer {tokenizer}: has no tokenizer.json; leave --tokenizer out to train one")
    output = arguments.output
    lines = prepare(
        settings,
        os.path.join(output, "train"),
        os.path.join(output, "validation"),
        tokenizer or os.path.join(output, "tokenizer"),
    )
    print("\n".join(lines))


if __name__ == "__main__":
    run(main)
