"""Compare tokenizers by the tokens that they spend on texts, per source: per word, per byte, and to each other."""

import sys
from os.path import dirname, realpath

sys.path.insert(0, dirname(dirname(realpath(__file__))))
from titanling import environment

environment.require()

import argparse
import json

from titanling.cli import add_format, local_path, path_or_url, run, say
from titanling.errors import UserError

EXAMPLE = """example:
  python scripts/compare_tokenizers.py data/mine/tokenizer other/tokenizer --source en=english/ fi='finnish/*.txt'

NSL, normalised sequence length (Dagan et al. 2024), is a tokenizer's tokens over those of the reference.
"""


def main() -> None:
    """Arguments → table, and JSON if wanted."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("tokenizers", nargs="+", type=path_or_url, metavar="TOKENIZER", help="directories that hold a tokenizer.json")
    add(
        "--source",
        nargs="+",
        required=True,
        metavar="NAME=PATH[:WEIGHT]",
        help="text, as for train_tokenizer.py; best none that a tokenizer was trained on. Weights: for the mean",
    )
    add("--reference", type=path_or_url, help="the tokenizer to which lengths are normalised (default: the first)")
    add("--max-bytes", type=float, default=1e7, help="text to read of each source (default: 1e7)")
    add_format(parser)
    add("--text-field", default="text", help="JSON, CSV, Parquet, Arrow: key or column of the text (default: text)")
    add("--skip-bad", action="store_true", help="leave out documents that cannot be read")
    add("--seed", type=int, default=0, help="which pieces of a large source are taken (default: 0)")
    add("--json", metavar="OUT", type=local_path, help="also write the figures here")
    arguments = parser.parse_args()
    from titanling.checkpoint.text import columns
    from titanling.data.prepare.fertility import as_json, compare, means
    from titanling.data.prepare.readers import Reading
    from titanling.data.prepare.sample import Sample, parse_sources
    from titanling.data.prepare.tokenizer import read_tokenizer

    names = [*arguments.tokenizers]
    reference = arguments.reference or names[0]
    if reference not in names:
        names.append(reference)
    if len(set(names)) < len(names):
        raise UserError(f"{' '.join(names)}: a tokenizer is named twice; name each once")
    tokenizers = {name: read_tokenizer(name) for name in names}
    reading = Reading(
        arguments.text_field,
        None,
        skip_bad=arguments.skip_bad,
        format=arguments.format or "auto",
        document_separator=arguments.document_separator,
    )
    sample = Sample(parse_sources(arguments.source), arguments.max_bytes, arguments.seed, True, reading)
    reports = compare(tokenizers, sample, reference)
    rows = [("source", "tokenizer", "tokens/word", "tokens/byte", "NSL")]
    for report in reports:
        for name, found in report.tokenizers.items():
            rows.append(_row(report.name, name, vars(found)))
    if len(reports) > 1:
        rows += [_row("mean", name, found) for name, found in means(reports, sample.shares).items()]
    say("\n".join(columns(rows, right=(2, 3, 4))))
    say(f"NSL: tokens over those of {reference}; words: what white space separates")
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(as_json(reports, sample.shares, reference), indent=2, ensure_ascii=False)
        arguments.json.write_text(text + "\n", encoding="utf-8")


def _row(source: str, tokenizer: str, figures: dict[str, float]) -> tuple[str, ...]:
    numbers = (figures[name] for name in ("tokens_per_word", "tokens_per_byte", "normalised_length"))
    return (source, tokenizer, *(f"{number:.3f}" for number in numbers))


if __name__ == "__main__":
    run(main)
