"""Loading speed: tokens/s of titanling's loader beside a bare memory-map gather of the same windows, and resuming.

A file of random tokens is written first and read once, so that it is in the page cache. Then the loader and two bare
loops over the same windows in the same order take turns: one copies the raw tokens, one also makes the loader's int64
inputs and labels. Resuming is timed from nothing to the first batch, at sample 0 and at sample 10⁹. Free disk needed:
2 bytes a token.

Then --text, by default the standard library, a document a file, is packed by best fit: read through the loader in turn
with concat, and its padding counted.
"""

import sys
from os.path import dirname, realpath

sys.path.insert(0, dirname(dirname(realpath(__file__))))
from titanling import environment

environment.require(even_for_help=True)

import argparse
import email
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from harness import machine, say, write_json
from rich.console import Console
from rich.table import Table

from titanling.config.schema import Prepare
from titanling.data.indexed import IndexedDataset, IndexedWriter, write_sidecar
from titanling.data.loader import build_loader
from titanling.data.mixture import Mixture, Span
from titanling.data.packing import PackedSource
from titanling.data.prepare.run import prepare
from titanling.data.sources import MixedSource, WindowSource

EXAMPLE = "example: python benchmarks/loader.py --tokens 500_000_000 --json results.json"
VOCAB = 32_768
DOCUMENT = 1_000_000
SEED = 0
SEQ_LEN, BATCH = 2048, 8
SOURCES = 28
FAR = 10**9
TARGET_SPEED, TARGET_RESUME = 50e6, 0.010
PACKED_SEQ_LENS, WINDOW = (512, 2048), 256
TARGET_PACKED, TARGET_PADDING = 10e6, 0.08


def main() -> None:
    """Arguments → file → measurements → table and JSON."""
    parser = argparse.ArgumentParser(description=__doc__, epilog=EXAMPLE)
    parser.add_argument("--tokens", type=int, default=100_000_000, help="size of the file (default 100_000_000)")
    parser.add_argument("--batches", type=int, default=2000, help="batches of 8 × 2048 in a turn (default 2000)")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each (default 5)")
    parser.add_argument("--resumes", type=int, default=50, help="resumes at each sample (default 50)")
    parser.add_argument("--packed-tokens", type=int, default=30_000_000, help="read packed (default 30_000_000)")
    parser.add_argument("--text", default="python-stdlib", help="what is packed, as data.prepare.text")
    parser.add_argument("--held-out", type=float, default=0.05, help="share of it that is not (default 0.05)")
    parser.add_argument("--folder", help="where the file is made for the time being (default: the temporary folder)")
    parser.add_argument("--json", metavar="OUT", help="also write the results here")
    parser.add_argument("--smoke", action="store_true", help="seconds: a small file, few batches")
    arguments = parser.parse_args()
    if arguments.smoke:
        arguments.tokens, arguments.batches, arguments.rounds, arguments.resumes = 2_000_000, 50, 2, 3
        arguments.packed_tokens, arguments.text, arguments.held_out = (
            100_000,
            f"{Path(email.__file__).parent}/*.py",
            0.3,
        )
    results: dict[str, Any] = {"benchmark": "loader", "machine": machine(), "settings": vars(arguments)}
    with tempfile.TemporaryDirectory(prefix="titanling-benchmark-", dir=arguments.folder) as folder:
        prefix = str(Path(folder) / "tokens")
        write_tokens(prefix, arguments.tokens)
        dataset = IndexedDataset(prefix)
        with open(f"{prefix}.bin", "rb") as file:  # into the page cache
            while file.read(1 << 24):
                pass
        results["speed"] = measure_speed(dataset, prefix, arguments.batches, arguments.rounds)
        results["resume"] = measure_resume(dataset, arguments.resumes)
        dataset.close()
        results["packing"] = measure_packing(folder, arguments)
    report(results["speed"], results["resume"])
    report_packing(results["packing"])
    write_json(arguments.json, results)


def write_tokens(prefix: str, tokens: int) -> None:
    """Random tokens in documents of a million."""
    say(f"writing {tokens:,} tokens")
    random = np.random.default_rng(0)
    with IndexedWriter(prefix, VOCAB) as writer:
        for first in range(0, tokens, DOCUMENT):
            writer.add_document(random.integers(0, VOCAB, min(DOCUMENT, tokens - first)))
    write_sidecar(prefix, writer.sidecar("none", eod_id=0, utf8_bytes=tokens, source="random tokens"))


def measure_speed(dataset: IndexedDataset, prefix: str, batches: int, rounds: int) -> dict[str, Any]:
    """Tokens/s of each way in each round."""
    source = WindowSource([dataset], SEQ_LEN, SEED)
    # The bare loops are given the order; the loader has to find it.
    starts = (source.window_of(np.arange(batches * BATCH)) * SEQ_LEN).reshape(batches, BATCH)
    tokens = np.memmap(f"{prefix}.bin", dtype=dataset.dtype, mode="r")
    ways: dict[str, Callable[[], None]] = {
        "loader": lambda: read_loader(source, batches),
        "mixture": lambda: read_loader(mixture(dataset), batches),
        "gather": lambda: gather(tokens, starts, convert=False),
        "gather_int64": lambda: gather(tokens, starts, convert=True),
    }
    speeds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds):
        say(f"round {number + 1} of {rounds}")
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            speeds[name].append(batches * BATCH * SEQ_LEN / (time.perf_counter() - start))
    ratios = [loader / bare for loader, bare in zip(speeds["loader"], speeds["gather_int64"], strict=True)]
    return {"tokens_per_second": speeds, "ratio_to_gather_int64": statistics.median(ratios), "target": TARGET_SPEED}


def mixture(dataset: IndexedDataset) -> MixedSource:
    """SOURCES sources of random weights, all over the same file."""
    sources = [WindowSource([dataset], SEQ_LEN, SEED, str(number)) for number in range(SOURCES)]
    weights = np.random.default_rng(0).integers(1, 1000, SOURCES).tolist()
    return MixedSource(sources, Mixture([Span(0, tuple(weights))], SEED))


def read_loader(source: WindowSource | MixedSource, batches: int) -> None:
    """`batches` batches as the trainer takes them, the loader's own start included."""
    loader = build_loader(source, BATCH)
    iterator = iter(loader)
    for _ in range(batches):
        next(iterator)
    loader.dataset.close()


def gather(tokens: np.ndarray, starts: np.ndarray, convert: bool) -> None:
    """Copy each batch's windows out of the memory map; `convert` to inputs and labels in int64."""
    for rows in starts:
        batch = np.stack([tokens[start : start + SEQ_LEN + 1] for start in rows.tolist()])
        if convert:
            batch[:, :-1].astype(np.int64, order="C")
            batch[:, 1:].astype(np.int64, order="C")


def measure_resume(dataset: IndexedDataset, repeats: int) -> dict[str, Any]:
    """Seconds from nothing to the first batch with a state from the start and from sample 10⁹ on, taking turns."""
    states = {sample: state_at(dataset, sample) for sample in (0, FAR)}
    seconds: dict[int, list[float]] = {sample: [] for sample in states}
    for _ in range(repeats):
        for sample, state in states.items():
            start = time.perf_counter()
            loader = build_loader(WindowSource([dataset], SEQ_LEN, SEED), BATCH)
            loader.load_state_dict(state)
            next(iter(loader))
            seconds[sample].append(time.perf_counter() - start)
            loader.dataset.close()
    near, far = (statistics.median(found) for found in seconds.values())
    return {"seconds_at_0": near, "seconds_at_1e9": far, "difference": far - near, "target": TARGET_RESUME}


def state_at(dataset: IndexedDataset, sample: int) -> dict[str, Any]:
    """The state that a loader saves one batch after `sample`."""
    loader = build_loader(WindowSource([dataset], SEQ_LEN, SEED), BATCH)
    loader.dataset.load_state_dict({"samples": sample})
    next(iter(loader))
    state = loader.state_dict()
    loader.dataset.close()
    return state


def measure_packing(folder: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Of each seq_len: tokens/s through the loader, packed and not, in turns; padding; documents kept whole."""
    say(f"preparing {arguments.text}")
    prefix, tokens, rounds = str(Path(folder) / "text"), arguments.packed_tokens, arguments.rounds
    settings = Prepare(text=(arguments.text,), vocab_size=8192, validation_fraction=arguments.held_out)
    prepare(settings, prefix, f"{prefix}-held-out", f"{prefix}-tokenizer")
    return {str(seq_len): measure_packed(prefix, seq_len, tokens, rounds) for seq_len in PACKED_SEQ_LENS}


def measure_packed(prefix: str, seq_len: int, tokens: int, rounds: int) -> dict[str, Any]:
    """The same of one seq_len. Seconds to find one sample that is far away, nothing packed before, too."""
    dataset = IndexedDataset(prefix)

    def packed() -> PackedSource:
        return PackedSource([dataset], seq_len, SEED, "train", WINDOW, masked=True)

    ways = {"best_fit": packed, "concat": lambda: WindowSource([dataset], seq_len, SEED)}
    speeds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            start = time.perf_counter()
            loader = build_loader(way(), BATCH * SEQ_LEN // seq_len)
            for _, _ in zip(range(tokens // (BATCH * SEQ_LEN)), loader, strict=False):
                pass
            speeds[name].append(tokens / (time.perf_counter() - start))
    seeks = []
    for sample in range(FAR, FAR + 20):
        start = time.perf_counter()
        packed().batch(np.array([sample]))
        seeks.append(time.perf_counter() - start)
    source = packed()
    parts = [part for window in range(source.num_windows) for part in source.parts(window)]
    sizes = [len(dataset.document_range(number)) for number in range(dataset.num_documents)]
    dataset.close()
    return {
        "tokens_per_second": speeds,
        "ratio_to_concat": statistics.median(speeds["best_fit"]) / statistics.median(speeds["concat"]),
        "padding": 1 - source.num_tokens / (source.num_windows * seq_len),
        "parts": len(parts),
        "parts_needed": sum(-(-size // seq_len) for size in sizes),
        "seek_seconds": statistics.median(seeks),
    }


def report_packing(found: dict[str, Any]) -> None:
    """Print the medians of each seq_len."""
    console = Console(highlight=False)
    for seq_len, result in found.items():
        speed, bare = (statistics.median(result["tokens_per_second"][way]) for way in ("best_fit", "concat"))
        console.print(
            f"packed by best fit, seq_len {seq_len}: {speed / 1e6:.0f} M tokens/s, concat {bare / 1e6:.0f}"
            f" ({result['ratio_to_concat']:.2f} ×; {speed / TARGET_PACKED:.1f} × the target of"
            f" {TARGET_PACKED / 1e6:.0f}), padding {100 * result['padding']:.2f} % (target {100 * TARGET_PADDING:.0f}),"
            f" {result['parts']:,} parts where {result['parts_needed']:,} are least, sample 10⁹ after"
            f" {1e3 * result['seek_seconds']:.1f} ms (target {1e3 * TARGET_RESUME:.0f})"
        )


def report(speed: dict[str, Any], resume: dict[str, Any]) -> None:
    """Print the medians."""
    table = Table(title=f"loading {BATCH} × {SEQ_LEN} tokens, warm cache")
    for column in ("", "M tokens/s", "min … max"):
        table.add_column(column, justify="right")
    titles = {
        "loader": "titanling's loader (order, read, int64 inputs and labels)",
        "mixture": f"the same of a mixture of {SOURCES} sources",
        "gather": "bare gather from a memory map",
        "gather_int64": "bare gather, int64 inputs and labels",
    }
    for name, found in speed["tokens_per_second"].items():
        millions = [value / 1e6 for value in found]
        table.add_row(titles[name], f"{statistics.median(millions):.0f}", f"{min(millions):.0f} … {max(millions):.0f}")
    console = Console(highlight=False)
    console.print(table)
    console.print(
        f"loader {speed['ratio_to_gather_int64']:.2f} × the like gather (target {TARGET_SPEED / 1e6:.0f} M/s)"
    )
    milliseconds = [1e3 * resume[key] for key in ("seconds_at_0", "seconds_at_1e9", "difference")]
    console.print(
        "first batch after {:.2f} ms at sample 0, {:.2f} ms at sample 10⁹: {:+.2f} ms (target below {:.0f})".format(
            *milliseconds, 1e3 * TARGET_RESUME
        )
    )


if __name__ == "__main__":
    main()
