"""Tokenising JSONL: titanling beside Megatron's way and its own backends alone, and whether the files are Megatron's.

The corpus is the source of this Python's library and packages, a document each file. Each contestant is a fresh process
that reads the same JSONL; in a round they take turns. titanling's time includes loading gigatoken, comparing it with
tokenizers, hashing, syncing and the sidecar; none includes imports. Every round compares the files byte by byte.
"""

import sys
from os.path import dirname, realpath

sys.path.insert(0, dirname(dirname(realpath(__file__))))
from titanling import environment

environment.require(even_for_help=True)

import argparse
import filecmp
import json
import statistics
import subprocess
import sysconfig
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from harness import BENCHMARKS, PEERS, environment, machine, say, write_json
from rich.console import Console
from rich.table import Table

from titanling.data.prepare.train import train_tokenizer

EXAMPLE = "example: python benchmarks/tokenise.py --json results.json (after ./benchmarks/setup_peers.sh megatron)"
VOCAB = 32_768
TRAINING_CHARACTERS = 8_000_000
MEGATRON = "Megatron's way"
WAYS = ("gigatoken", "tokenizers", "gigatoken alone", "gigatoken's reader", "tokenizers alone")
# (contestant, compared with, its rate should be at least so many times the other's)
TARGETS = (
    ("gigatoken", MEGATRON, 20.0),
    ("gigatoken", "gigatoken alone", 0.8),
    ("tokenizers", MEGATRON, 1.5),
    ("tokenizers", "tokenizers alone", 0.9),
)


def main() -> int:
    """Arguments → corpus, tokenizer → rounds → table and JSON; 1 if files differ."""
    parser = argparse.ArgumentParser(description=__doc__, epilog=EXAMPLE)
    parser.add_argument("--megabytes", type=float, default=50, help="size of the corpus (default 50)")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each (default 3)")
    parser.add_argument("--json", metavar="OUT", help="also write the results here")
    parser.add_argument("--smoke", action="store_true", help="seconds: a small corpus; Megatron may be missing")
    arguments = parser.parse_args()
    if arguments.smoke:
        arguments.megabytes, arguments.rounds = 0.3, 1
    python = PEERS / "megatron" / "bin" / "python"
    ways = [way for way in WAYS if "gigatoken" not in way or find_spec("gigatoken")]
    if python.exists():
        ways.insert(0, MEGATRON)
    elif not arguments.smoke:
        parser.error("Megatron's way needs ./benchmarks/setup_peers.sh megatron")
    results: dict[str, Any] = {"benchmark": "tokenise", "machine": machine(), "settings": vars(arguments)}
    with tempfile.TemporaryDirectory(prefix="titanling-benchmark-") as folder:
        where = Path(folder)
        results["corpus"] = write_corpus(where, arguments.megabytes, 1000 if arguments.smoke else VOCAB)
        found = [run_round(where / f"round{number}", where, ways, python) for number in range(arguments.rounds)]
    runs = {way: [taken[0][way] for taken in found] for way in ways}
    megabytes = results["corpus"]["utf8_bytes"] / 1e6
    results["versions"] = {way: taken[0].pop("versions") for way, taken in runs.items()}
    results["megabytes_per_second"] = {
        way: [megabytes / run["seconds"] for run in taken] for way, taken in runs.items()
    }
    results["peak_rss"] = {way: taken[0]["peak_rss"] for way, taken in runs.items() if way != MEGATRON}
    results["differing_files"] = [name for _, differing in found for name in differing]
    results["ratios"] = [
        compare(results["megabytes_per_second"], *target) for target in TARGETS if {*target[:2]} <= {*ways}
    ]
    report(results)
    write_json(arguments.json, results)
    return 1 if results["differing_files"] else 0


def write_corpus(where: Path, megabytes: float, vocab_size: int) -> dict[str, Any]:
    """corpus.jsonl of `megabytes` and a tokenizer trained on its beginning."""
    size = documents = 0
    sample: list[str] = []
    with open(where / "corpus.jsonl", "w", encoding="utf-8") as file:
        for path in sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py")) + sorted(
            Path(sysconfig.get_path("purelib")).rglob("*.py")
        ):
            try:
                text = path.read_bytes().decode()
            except UnicodeDecodeError:
                continue
            if not text or size >= megabytes * 1e6:
                continue
            file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
            size += len(text.encode())
            documents += 1
            if size <= TRAINING_CHARACTERS:
                sample.append(text)
    say(f"{documents:,} documents, {size / 1e6:.1f} MB; training a tokenizer")
    made = train_tokenizer(sample, vocab_size, str(where / "tokenizer"))
    return {"documents": documents, "utf8_bytes": size, "vocab_size": made}


def run_round(folder: Path, where: Path, ways: list[str], megatron: Path) -> tuple[dict[str, dict], list[str]]:
    """What each way reports, and the files that differ from the first writer's."""
    folder.mkdir()
    reports, differing, first = {}, [], None
    for way in ways:
        prefix = folder / way.replace(" ", "-").replace("'", "")
        program = [megatron, BENCHMARKS / "contestants" / "megatron_tokenise.py"]
        if way != MEGATRON:
            program = [sys.executable, BENCHMARKS / "contestants" / "tokenise_run.py", way]
        command = [*program, where / "corpus.jsonl", where / "tokenizer", prefix]
        done = subprocess.run(list(map(str, command)), env=environment(), capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{way} failed:\n{done.stderr}")
        reports[way] = json.loads(done.stdout.splitlines()[-1])
        say(f"{way}: {reports[way]['seconds']:.2f} s")
        if Path(f"{prefix}.bin").exists():
            first = first or prefix
            pairs = [(f"{first}{suffix}", f"{prefix}{suffix}") for suffix in (".bin", ".idx")]
            differing += [other for one, other in pairs if not filecmp.cmp(one, other, shallow=False)]
    return reports, differing


def compare(speeds: dict[str, list[float]], way: str, other: str, target: float) -> dict[str, Any]:
    """The ratio of two rates in each round and its median, beside the target."""
    ratios = [ours / theirs for ours, theirs in zip(speeds[way], speeds[other], strict=True)]
    return {"way": way, "to": other, "ratios": ratios, "median": statistics.median(ratios), "target": target}


def report(results: dict[str, Any]) -> None:
    """Print medians and ratios."""
    console = Console(highlight=False)
    table = Table(title=f"JSONL of {results['corpus']['utf8_bytes'] / 1e6:.0f} MB")
    for column in ("", "MB/s", "min … max"):
        table.add_column(column, justify="right")
    for way, speeds in results["megabytes_per_second"].items():
        name = f"titanling by {way}" if way in ("gigatoken", "tokenizers") else way
        table.add_row(name, f"{statistics.median(speeds):.1f}", f"{min(speeds):.1f} … {max(speeds):.1f}")
    console.print(table)
    for row in results["ratios"]:
        console.print(f"titanling by {row['way']} {row['median']:.2f} × {row['to']} (target {row['target']} ×)")
    files = results["differing_files"]
    console.print(f"these differ: {' '.join(files)}" if files else "all .bin and .idx are byte-identical")


if __name__ == "__main__":
    sys.exit(main())
