"""Which documents a step has read, and which steps have read a document."""

import sys
from os.path import dirname, realpath

sys.path.insert(0, dirname(dirname(realpath(__file__))))
from titanling import environment

environment.require()

import argparse
import time
from typing import TYPE_CHECKING

from titanling import cli
from titanling.errors import UserError

if TYPE_CHECKING:
    from titanling.data.sources import MixedSource
    from titanling.data.trace import Piece

EXAMPLE = """examples:
  python scripts/trace_data.py --config outputs/mine/config.toml --step 1000
  python scripts/trace_data.py --config outputs/mine/config.toml --document web-fi:1234
  python scripts/trace_data.py --config outputs/mine/config.toml --id web-fi:https://example.org/

The config.toml in a run's folder is that of the run; --table.key value overrides keys as for training. Without
training.global_batch_size, say with --world-size how many processes the run has.
"""


def main() -> None:
    """Print what a step reads, or when a document is read."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="the run's TOML")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--step", type=int, metavar="N", help="list the documents of every sequence of step N (from 1)")
    what.add_argument("--document", metavar="SOURCE:N", help="list the steps that read document N (from 0) of a source")
    what.add_argument("--id", metavar="SOURCE:ID", help="the same, by the name that data.prepare.id_field has kept")
    parser.add_argument("--world-size", type=int, default=1, metavar="N", help="processes of the run (default 1)")
    parser.add_argument("--text", action="store_true", help="with --step: the text too (needs model.hf_assets_path)")
    parser.add_argument("--json", action="store_true", help="a JSON object a line")
    arguments, rest = parser.parse_known_args()
    # Imported late, so that --help answers at once.
    from titanling.run_data import open_run_data

    config, _, sequences, source = open_run_data(arguments.config, rest, arguments.world_size)
    if arguments.step is not None:
        tokenizer = config.model.hf_assets_path if arguments.text else None
        if arguments.text and tokenizer is None:
            raise UserError("--text needs a tokenizer: set model.hf_assets_path, or --model.hf_assets_path FOLDER")
        print_step(source, arguments.step, sequences, tokenizer, arguments.json)
    elif arguments.id is not None:
        from titanling.data.trace import documents_with_id

        name, colon, id = arguments.id.partition(":")
        if not colon:
            raise UserError(f"--id {arguments.id}: must be SOURCE:ID, the ID as data.prepare.id_field gives it")
        for document in documents_with_id(source, name, id):
            print_document(source, name, document, config.training.steps, sequences, arguments.json)
    else:
        name, _, number = arguments.document.rpartition(":")
        if not name or not number.isdecimal():
            raise UserError(f"--document {arguments.document}: must be SOURCE:N, as web-fi:1234 or train:0")
        print_document(source, name, int(number), config.training.steps, sequences, arguments.json)


def print_step(source: "MixedSource", step: int, sequences: int, tokenizer: str | None, as_json: bool) -> None:
    """One line, or one JSON object, for each sequence of a step."""
    import numpy as np

    from titanling.data.trace import names, pieces, samples_of_step

    text = None
    if tokenizer is not None and not as_json:
        from titanling.data.prepare.tokenizer import load_tokenizer

        text = load_tokenizer(tokenizer).tokenizer
    if step < 1:
        raise UserError(f"--step {step}: steps begin with 1")
    samples = {sample: pieces(source, sample) for sample in samples_of_step(step, sequences)}
    ids = names(source, (piece for found in samples.values() for piece in found))
    for sample, found in samples.items():
        named = [(piece, ids.get((piece.source, piece.document))) for piece in found]
        if as_json:
            rows = [piece._asdict() | ({} if id is None else {"id": id}) for piece, id in named]
            cli.say_json({"step": step, "sample": sample, "pieces": rows})
            continue
        parts = ", ".join(describe(piece, id) for piece, id in named)
        cli.say(f"step {step}  sequence {sample}  {parts}")
        if text is not None:
            tokens = source.batch(np.array([sample]))["input_ids"][0, : sum(piece.tokens for piece in found)].tolist()
            lines = text.decode(tokens, skip_special_tokens=False).splitlines()
            cli.say("\n".join(f"    {line}" for line in lines))


def describe(piece: "Piece", id: str | int | None) -> str:
    """A piece in words: its document, by number and by name if it has one, and which of the document's tokens."""
    name = "" if id is None else f" ({id})"
    return f"{piece.source}:{piece.document}{name} [{piece.first}–{piece.first + piece.tokens - 1}]"


def print_document(source: "MixedSource", name: str, document: int, steps: int, sequences: int, as_json: bool) -> None:
    """One line, or one JSON object, for each time that a run reads a part of a document."""
    from titanling.data.trace import sights

    start = time.perf_counter()
    found = list(sights(source, name, document, steps * sequences, sequences))
    for sight in found:
        if as_json:
            cli.say_json({"source": name, "document": document, **sight._asdict()})
        else:
            last = sight.first + sight.tokens - 1
            cli.say(f"step {sight.step}  sequence {sight.sample}  epoch {sight.epoch + 1}  tokens {sight.first}–{last}")
    if not as_json:
        seconds = time.perf_counter() - start
        cli.say(f"{name}:{document}: {len(found)} places in {steps:,} steps, found in {1000 * seconds:.1f} ms")


if __name__ == "__main__":
    cli.run(main)
