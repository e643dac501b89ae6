"""Tokenise JSONL by titanling, or only encode it by one of the libraries that it uses: each in a fresh process."""

import argparse
import json
import resource
import time
from collections.abc import Callable, Iterator
from importlib import import_module
from importlib.metadata import version
from typing import Any

from titanling.config.schema import Prepare
from titanling.data.prepare import pipeline  # noqa: F401 (imported in time)
from titanling.data.prepare.run import prepare
from titanling.data.prepare.tokenise import BATCH_CHARACTERS, batches
from titanling.data.prepare.tokenizer import TokenizerFiles, load_tokenizer

WAYS = ("gigatoken", "tokenizers", "gigatoken alone", "gigatoken's reader", "tokenizers alone")


def main() -> None:
    """Arguments → work; prints seconds, peak RSS and versions as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("way", choices=WAYS)
    parser.add_argument("jsonl")
    parser.add_argument("tokenizer", help="directory")
    parser.add_argument("prefix")
    arguments = parser.parse_args()
    files = load_tokenizer(arguments.tokenizer)
    if "gigatoken" in arguments.way:
        for name in ("gigatoken", "awkward"):  # nobody's imports count
            import_module(name)
    if arguments.way in ("gigatoken", "tokenizers"):
        settings = Prepare(text=(arguments.jsonl,), backend=arguments.way)
        start = time.perf_counter()
        prepare(settings, arguments.prefix, None, arguments.tokenizer)
    else:
        encode = alone(arguments.way, files)
        start = time.perf_counter()
        whole = arguments.way == "gigatoken's reader"
        for batch in [arguments.jsonl] if whole else batches(texts(arguments.jsonl), BATCH_CHARACTERS):
            encode(batch)
    seconds = time.perf_counter() - start
    names = ("tokenizers", "numpy", *(["gigatoken"] if "gigatoken" in arguments.way else []))
    rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"seconds": seconds, "peak_rss": rss, "versions": {name: version(name) for name in names}}))


def alone(way: str, files: TokenizerFiles) -> Callable[[Any], object]:
    """What encodes a batch and forgets it; already loaded, unlike titanling's, whose loading counts."""
    if way == "tokenizers alone":
        return lambda batch: files.tokenizer.encode_batch_fast(batch, add_special_tokens=False)
    import gigatoken

    fast = gigatoken.Tokenizer.from_json(files.tokenizer.to_str())
    if way == "gigatoken's reader":
        return lambda path: fast.encode_files(gigatoken.JsonlFileSource([path]))
    return fast.encode_batch


def texts(jsonl: str) -> Iterator[str]:
    """The documents of a file."""
    with open(jsonl, encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)["text"]


if __name__ == "__main__":  # also for the workers of titanling
    main()
