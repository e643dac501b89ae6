"""Train a tokenizer on a weighted sample of several sources, and save it as a Hugging Face directory."""

import sys
from os.path import dirname, realpath

sys.path.insert(0, dirname(dirname(realpath(__file__))))
from titanling import environment

environment.require()

import argparse
import os
import time

from titanling.cli import add_format, path_or_url, run, say
from titanling.errors import UserError

EXAMPLE = """example:
  python scripts/train_tokenizer.py --source en='books/**/*.txt:70' fi=finnish/:28 code=python-stdlib:2 \\
      --kind byte-fallback --split-digits --vocab-size 32000 --pad-to-multiple 64 --output data/mine/tokenizer

Then prepare data with it:  python scripts/prepare_data.py --tokenizer data/mine/tokenizer …
and see how it does:        python scripts/compare_tokenizers.py data/mine/tokenizer other/ --source …
"""


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--source",
        nargs="+",
        required=True,
        metavar="NAME=PATH:WEIGHT",
        help="files, folders or globs of UTF-8 text, and each source's share of the sample (default weight: 1);"
        " or a .toml file with name, text and weight in each of its [[sources]]",
    )
    add("--output", type=path_or_url, required=True, help="folder to write to; must not exist")
    add("--vocab-size", type=int, required=True, help="tokens in all, special tokens and bytes included")
    add(
        "--kind",
        default="byte-level",
        choices=("byte-level", "byte-fallback"),
        help="BPE over bytes (GPT-2, Llama 3; default), or over characters with bytes for rare ones (Llama 2)",
    )
    add("--split-digits", action="store_true", help="every digit is a token of its own")
    add("--bos-token", help="default: <|begin_of_text|>")
    add("--eos-token", help="closes each document (default: <|end_of_text|>)")
    add("--pad-token", help="default: none")
    add("--special-tokens", nargs="+", metavar="TOKEN", help="further special tokens, such as '<|user|>'")
    add("--pad-to-multiple", type=int, help="add reserved tokens until this divides the vocabulary")
    add("--character-coverage", type=float, help="byte-fallback: share of characters with tokens (default: 0.9995)")
    add("--model-max-length", type=int, help="as tokenizer_config.json says (default: 131072)")
    add("--max-bytes", type=float, default=1e8, help="size of the sample (default: 1e8)")
    add_format(parser)
    add("--text-field", default="text", help="JSON, CSV, Parquet, Arrow: key or column of the text (default: text)")
    add("--skip-bad", action="store_true", help="leave out documents that cannot be read")
    add("--seed", type=int, default=0, help="which pieces of a large source are taken (default: 0)")
    return parser.parse_args()


def main() -> None:
    """Arguments → sample → tokenizer."""
    arguments = parse_arguments()
    # Imported late, so that --help answers at once.
    from titanling.checkpoint.text import columns
    from titanling.data.prepare.readers import Reading
    from titanling.data.prepare.sample import Sample, parse_sources
    from titanling.data.prepare.train import Recipe, train_tokenizer

    output = arguments.output
    if os.path.exists(output):
        raise UserError(f"--output {output}: exists and is never overwritten; choose another folder")
    given = vars(arguments)
    settings = {name: given[name] for name in Recipe.__dataclass_fields__ if given[name] is not None}
    recipe = Recipe(**settings | {"special_tokens": tuple(arguments.special_tokens or ())})
    reading = Reading(
        arguments.text_field,
        None,
        skip_bad=arguments.skip_bad,
        format=arguments.format or "auto",
        document_separator=arguments.document_separator,
    )
    sample = Sample(parse_sources(arguments.source), arguments.max_bytes, arguments.seed, reading=reading)
    rows = [("source", "weight", "share", "text", "sampled")]
    for source, share, size, quota in zip(sample.sources, sample.shares, sample.bytes, sample.quotas, strict=True):
        times = f", repeated {quota / size:.1f} ×" if quota > size else ""
        rows.append(
            (source.name, f"{source.weight:g}", f"{share:.2%}", f"{size / 1e6:.1f} MB", f"{quota / 1e6:.1f} MB{times}")
        )
    say("\n".join(columns(rows, right=(1, 2, 3))))
    start = time.monotonic()
    made = train_tokenizer(sample, arguments.vocab_size, output, recipe)
    say(f"{output}: {recipe.kind} BPE, vocabulary {made:,}, trained in {time.monotonic() - start:.1f} s")
    if made < arguments.vocab_size:
        say(f"the text gives no more than {made:,} tokens: for {arguments.vocab_size:,} of them, it takes more text")


if __name__ == "__main__":
    run(main, "no tokenizer was written", reports=True)
