"""Look into prepared token files, check them, and join those of shards."""

import sys
from os.path import dirname, realpath

sys.path.insert(0, dirname(dirname(realpath(__file__))))
from titanling import environment

environment.require()

import argparse
from typing import Any

from titanling import cli
from titanling.errors import UserError

EXAMPLE = """examples:
  python scripts/data.py stats data/mine/train
  python scripts/data.py inspect data/mine/train --document 17
  python scripts/data.py inspect data/mine/train --sample 3 --seq-len 128
  python scripts/data.py verify data/mine/train data/mine/validation
  python scripts/data.py merge data/mine/train                    joins data/mine/train-shard-…-of-…
  python scripts/data.py merge data/all/train data/en/train data/fi/train

Files are named by their prefix: data/mine/train stands for data/mine/train.bin, .idx and .json.
"""


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    merge = commands.add_parser("merge", help="join token files to new ones, in the order given")
    merge.add_argument("prefix", type=cli.path_or_url, help="what to write")
    inputs = "prefixes (default: the shards of PREFIX)"
    merge.add_argument("inputs", nargs="*", type=cli.path_or_url, metavar="input", help=inputs)
    inspect = commands.add_parser("inspect", help="show a document or a sample, as ids and as text")
    inspect.add_argument("prefix", type=cli.path_or_url)
    what = inspect.add_mutually_exclusive_group(required=True)
    what.add_argument("--document", type=int, metavar="D", help="a document, from 0")
    what.add_argument("--id", metavar="ID", help="a document by its name, kept by data.prepare.id_field")
    what.add_argument("--sample", type=int, metavar="I", help="a window of the file in its own order, from 0")
    inspect.add_argument("--seq-len", type=int, metavar="N", help="tokens of a sample")
    inspect.add_argument("--tokenizer", type=cli.path_or_url, help="its folder (default: tokenizer, beside the files)")
    verify = commands.add_parser("verify", help="read everything: hashes, sizes, ids, ends of documents")
    verify.add_argument("prefixes", nargs="+", type=cli.path_or_url, metavar="prefix")
    stats = commands.add_parser("stats", help="documents, tokens, lengths")
    stats.add_argument("prefixes", nargs="+", type=cli.path_or_url, metavar="prefix")
    stats.add_argument("--json", action="store_true", help="an object a line")
    return parser.parse_args()


def main() -> None:
    """Arguments → one call into titanling.data."""
    arguments = parse_arguments()
    {"merge": _merge, "inspect": _inspect, "verify": _verify, "stats": _stats}[arguments.command](arguments)


def _merge(arguments: argparse.Namespace) -> None:
    from titanling.data.merge import merge, shards_of

    inputs = arguments.inputs or shards_of(arguments.prefix)
    made, lines = merge(arguments.prefix, inputs)
    lines.append(f"{arguments.prefix}: {made.documents:,} documents, {made.tokens:,} tokens, from {len(inputs)} inputs")
    cli.say("\n".join(lines))


def _inspect(arguments: argparse.Namespace) -> None:
    from titanling.data.ids import has_ids, read_ids
    from titanling.data.indexed import read_sidecar
    from titanling.data.inspect import document_ids, sample_ids, tokenizer_beside
    from titanling.data.prepare.tokenizer import read_tokenizer, tokenizer_sha256

    prefix = arguments.prefix
    if arguments.sample is None:
        document = arguments.document if arguments.id is None else _document_named(prefix, arguments.id)
        ids, what = document_ids(prefix, document), f"document {document}"
        if has_ids(prefix):
            what += f" ({read_ids(prefix, [document])[0]})"
    else:
        if arguments.seq_len is None or arguments.seq_len < 1:
            raise UserError("--sample needs --seq-len, the number of its tokens (training.seq_len)")
        ids, documents = sample_ids(prefix, arguments.sample, arguments.seq_len)
        what = f"sample {arguments.sample}, of documents {documents.start} to {documents.stop - 1}"
    folder = arguments.tokenizer or tokenizer_beside(prefix)
    tokenizer = read_tokenizer(folder)
    if tokenizer_sha256(folder) != read_sidecar(prefix).tokenizer_sha256:
        raise UserError(f"{folder}: is not the tokenizer of {prefix}; give that with --tokenizer")
    cli.say(f"{prefix}: {what}, {len(ids):,} tokens")
    cli.say(" ".join(map(str, ids.tolist())))
    text = tokenizer.decode(ids.tolist(), skip_special_tokens=False)
    cli.say(text)


def _document_named(prefix: str, id: str) -> int:
    """The one document of a name; the first, if there are several, and says so."""
    from titanling.data.ids import documents_named

    [found] = documents_named(id, [prefix], prefix, f"--id {id}")
    if len(found) > 1:
        cli.say(f"{id}: the name of {len(found)} documents ({', '.join(map(str, found[:20]))})")
    return found[0]


def _verify(arguments: argparse.Namespace) -> None:
    from titanling.data.inspect import verify

    for prefix in arguments.prefixes:
        found = verify(prefix)
        cli.say(f"{prefix}: {found.documents:,} documents, {found.tokens:,} tokens: all is well")


def _stats(arguments: argparse.Namespace) -> None:
    from titanling.checkpoint.text import columns
    from titanling.data.inspect import QUANTILES, stats

    rows = [("", "documents", "tokens", "MB of text", "bytes/token", "mean", *(f"{share:.0%}" for share in QUANTILES))]
    for prefix in arguments.prefixes:
        found = stats(prefix)
        sidecar = found.sidecar
        if arguments.json:
            row: dict[str, Any] = sidecar.model_dump() | {"prefix": prefix, "bytes_per_token": found.bytes_per_token}
            cli.say_json(row | {"mean_length": found.mean_length, "lengths": found.lengths})
            continue
        size = f"{sidecar.utf8_bytes / 1e6:,.1f}"
        counts = (f"{sidecar.documents:,}", f"{sidecar.tokens:,}", size, f"{found.bytes_per_token:.2f}")
        lengths = (f"{length:,}" for length in found.lengths.values())
        rows.append((prefix, *counts, f"{found.mean_length:,.0f}", *lengths))
    if not arguments.json:
        cli.say("\n".join(columns(rows, right=range(1, len(rows[0])))))
        cli.say("(mean and percentages: tokens of a document)")


if __name__ == "__main__":
    cli.run(main, "nothing half-written is left")
