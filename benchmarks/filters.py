"""Filters of documents: megabytes a CPU-second, each alone and together, beside reading the JSONL; memory they take.

The corpus is the source of this Python's library and packages, a document each file, none twice, so that nothing is
dropped early. The list of bad words is made of words that few files hold. A round reads the file, then runs the filters
over what it read, each made anew. Numbers of tokens are given: the preparation has them, for it encodes what is left.
"""

import sys
from os.path import dirname, realpath

sys.path.insert(0, dirname(dirname(realpath(__file__))))
from titanling import environment

environment.require(even_for_help=True)

import argparse
import json
import statistics
import sysconfig
import tempfile
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from harness import machine, say, write_json
from pydantic import TypeAdapter
from rich.console import Console
from rich.table import Table

from titanling.config.schema import Filter
from titanling.data.prepare.filters import Filters, TokenFilters, open_hashes
from titanling.data.prepare.filters.lists import words_of
from titanling.data.prepare.seen import SeenHashes

EXAMPLE = "example: python benchmarks/filters.py --json results.json"
TARGET = 10.0
"""MB a CPU-second of deduplication, bad words and ratio together."""
TOGETHER = "documents + bad words + ratio"
BATCH = 256
"""Documents whose hashes are looked up at a time."""
ENTRIES = 500


def main() -> int:
    """Arguments → corpus → rounds → table and JSON."""
    parser = argparse.ArgumentParser(description=__doc__, epilog=EXAMPLE)
    parser.add_argument("--megabytes", type=float, default=20, help="size of the corpus (default 20)")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each (default 3)")
    parser.add_argument("--documents", type=int, default=4_000_000, help="for the memory (default 4,000,000)")
    parser.add_argument("--json", metavar="OUT", help="also write the results here")
    parser.add_argument("--smoke", action="store_true", help="seconds: a small corpus")
    arguments = parser.parse_args()
    if arguments.smoke:
        arguments.megabytes, arguments.rounds, arguments.documents = 0.2, 1, 20_000
    results: dict[str, Any] = {"benchmark": "filters", "machine": machine(), "settings": vars(arguments)}
    with tempfile.TemporaryDirectory(prefix="titanling-benchmark-") as folder:
        where = Path(folder)
        results["corpus"] = write_corpus(where, arguments.megabytes)
        found = [run_round(where) for _ in range(arguments.rounds)]
    megabytes = results["corpus"]["utf8_bytes"] / 1e6
    results["megabytes_per_cpu_second"] = {name: [megabytes / taken[name] for taken in found] for name in found[0]}
    results["gigabytes_per_million_documents"] = memory(arguments.documents)
    report(results)
    write_json(arguments.json, results)
    return 0


def write_corpus(where: Path, megabytes: float) -> dict[str, Any]:
    """corpus.jsonl, bad.txt and test.txt (a test set of 200 texts)."""
    size, texts = 0, []
    for path in sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py")):
        try:
            text = path.read_bytes().decode()
        except UnicodeDecodeError:
            continue
        if text and size < megabytes * 1e6:
            texts.append(text)
            size += len(text.encode())
    texts = list(dict.fromkeys(texts))
    size = sum(len(text.encode()) for text in texts)
    (where / "corpus.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    holders = Counter(word for text in texts for word in {*words_of(text)} if word.isalpha())
    rare = sorted(word for word, count in holders.items() if count <= 2)
    (where / "bad.txt").write_text("\n".join(rare[:: max(1, len(rare) // ENTRIES)]) + "\n", encoding="utf-8")
    paragraphs = [" ".join(text.split()[:60]) for text in texts[:: max(1, len(texts) // 200)]]
    (where / "test.txt").write_text("\n".join(paragraphs) + "\n", encoding="utf-8")
    say(f"{len(texts):,} documents, {size / 1e6:.1f} MB")
    return {"documents": len(texts), "utf8_bytes": size, "bad_words": min(len(rare), ENTRIES)}


def run_round(where: Path) -> dict[str, float]:
    """CPU-seconds of reading, of each filter, and of three together."""
    taken, texts = {}, []
    start = time.process_time()
    with open(where / "corpus.jsonl", "rb") as file:
        for line in file:
            texts.append(json.loads(line)["text"])
    taken["reading the JSONL"] = time.process_time() - start
    tokens = [len(text) // 3 for text in texts]
    bad = setting("bad_words", path=str(where / "bad.txt"))
    alone: dict[str, Callable[[], None]] = {
        "deduplicate_documents": lambda: run_hashes("deduplicate_documents", texts),
        "deduplicate_paragraphs": lambda: run_hashes("deduplicate_paragraphs", texts),
        "token_word_ratio": lambda: run_ratio(texts, tokens),
        TOGETHER: lambda: run_together(bad, texts, tokens),
    }
    settings = [bad, setting("length", min_words=5), setting("symbol_lines"), setting("gopher_quality")]
    settings += [setting("gopher_repetition"), setting("fix_text"), setting("language")]
    settings.append(setting("decontaminate", test_sets=[str(where / "test.txt")]))
    # What is built once for a process does not count: a language model, the n-grams of test sets.
    built = {each.kind: Filters([each], "en") for each in settings}
    alone |= {kind: partial(run_filters, filters, texts) for kind, filters in built.items()}
    for name, step in alone.items():
        start = time.process_time()
        step()
        taken[name] = time.process_time() - start
        say(f"{name}: {taken[name]:.2f} CPU-s")
    return taken


def setting(kind: str, **keys: Any) -> Any:
    """A filter's settings, as a file gives them."""
    return TypeAdapter(Filter).validate_python({"kind": kind, **keys})


def run_filters(filters: Filters, texts: Sequence[str]) -> None:
    """Filters of one text each."""
    for text in texts:
        filters.apply(text)


def run_hashes(kind: str, texts: Sequence[str]) -> list[str]:
    """Exact deduplication, both halves and the lookup; what stays."""
    step, seen, left = open_hashes(setting(kind), None), SeenHashes(), []
    for start in range(0, len(texts), BATCH):
        batch = texts[start : start + BATCH]
        hashes = [step.hashes(text) for text in batch]
        counts = np.array([len(own) for own in hashes])
        new = np.split(seen.add(np.concatenate(hashes)), np.cumsum(counts)[:-1])
        kept = [step.keep(text, own) for text, own in zip(batch, new, strict=True)]
        left += [text for text in kept if text is not None]
    return left


def run_ratio(texts: Sequence[str], tokens: Sequence[int]) -> None:
    """Tokens per word."""
    filters = TokenFilters([setting("token_word_ratio", max_ratio={"*": 9.0})], "en")
    for text, count in zip(texts, tokens, strict=True):
        filters.keep(text, count)


def run_together(bad: Any, texts: Sequence[str], tokens: Sequence[int]) -> None:
    """The three of the target, one behind the other."""
    run_filters(Filters([bad], "en"), run_hashes("deduplicate_documents", texts))
    run_ratio(texts, tokens)


def memory(documents: int) -> float:
    """Peak memory of the set of hashes while it grows to so many documents, in GB per million of them."""
    rng = np.random.default_rng(0)
    tracemalloc.start()
    seen = SeenHashes()
    for start in range(0, documents, 10_000):
        count = min(10_000, documents - start)
        seen.add(rng.integers(0, 2**64, count, np.uint64))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak / documents / 1e3


def report(results: dict[str, Any]) -> None:
    """Print medians and ratios."""
    console = Console(highlight=False)
    speeds = results["megabytes_per_cpu_second"]
    reading = speeds["reading the JSONL"]
    table = Table(title=f"{results['corpus']['utf8_bytes'] / 1e6:.0f} MB, {results['corpus']['documents']:,} documents")
    for column in ("", "MB per CPU-s", "min … max", "of reading"):
        table.add_column(column, justify="right")
    for name, found in speeds.items():
        share = statistics.median(ours / its for ours, its in zip(found, reading, strict=True))
        row = f"{statistics.median(found):.1f}", f"{min(found):.1f} … {max(found):.1f}", f"{share:.3f} ×"
        table.add_row(name, *row)
    console.print(table)
    results["ratio_to_target"] = statistics.median(speeds[TOGETHER]) / TARGET
    console.print(f"{TOGETHER}: {results['ratio_to_target']:.2f} × the target of {TARGET:g} MB per CPU-s")
    gigabytes = results["gigabytes_per_million_documents"]
    console.print(f"deduplicating documents holds {gigabytes:.4f} GB per million documents at its peak")


if __name__ == "__main__":
    sys.exit(main())
