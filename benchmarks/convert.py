"""Conversion of a checkpoint to Hugging Face: wall time and peak memory, beside torchtitan's way and a plain copy.

A float32 checkpoint of random weights in row shards is written first: ours, and one of torch.distributed.checkpoint.
Then take turns: scripts/convert_dcp_to_hf.py to bfloat16 (it checks the checkpoint's hashes too), torchtitan's way
written out (contestants/convert_dcp.py), and a copy that reads as many bytes and writes as many. Each starts with its
input out of the page cache, and is a process of its own whose start-up counts; the copy and ours end when their output
is on the disk.
"""

import sys
from os.path import dirname, realpath

sys.path.insert(0, dirname(dirname(realpath(__file__))))
from titanling import environment

environment.require(even_for_help=True)

import argparse
import json
import os
import shutil
import statistics
import subprocess
import tempfile
import time
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from harness import BENCHMARKS, ROOT, environment, machine, say, write_json
from rich.console import Console
from rich.table import Table

from titanling.checkpoint import folder
from titanling.checkpoint.names import tensor_shapes
from titanling.checkpoint.shards import CHUNK_BYTES, SHARDING, Piece, encode_header, write_tensors
from titanling.config.schema import Config, Model
from titanling.data.prepare.train import train_tokenizer
from titanling.model.presets import LlamaShape, resolve_shape

EXAMPLE = "example: python benchmarks/convert.py --flavor 1B --rounds 3 --json results.json"
SHARD_BYTES = 2 * 10**9
TARGET_COPY, TARGET_DCP, TARGET_MEMORY = 0.5, 0.35, 2**30
COPY = (
    "import os, sys; size, kept = map(int, sys.argv[1:3]); out = open(sys.argv[3], 'wb')\n"
    "for path in sys.argv[4:]:\n"
    "    with open(path, 'rb', buffering=0) as file:\n"
    "        while block := file.read(size):\n"
    "            out.write(block[: len(block) * kept // 100])\n"
    "out.flush(); os.fsync(out.fileno())\n"
)


def main() -> int:
    """Arguments → checkpoint → conversions → table and JSON."""
    parser = argparse.ArgumentParser(description=__doc__, epilog=EXAMPLE)
    parser.add_argument("--flavor", default="1B", help="preset of the model (default 1B)")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each (default 3)")
    parser.add_argument("--sparse", action="store_true", help="weights of zeros, which take no disk: for large models")
    parser.add_argument("--folder", help="where files are made for the time being (default: the temporary folder)")
    parser.add_argument("--json", metavar="OUT", help="also write the results here")
    parser.add_argument("--smoke", action="store_true", help="seconds: a tiny model, one turn; the ratios mean nothing")
    arguments = parser.parse_args()
    if arguments.smoke:
        arguments.flavor, arguments.rounds = "debugmodel", 1
    shape = resolve_shape(Model(flavor=arguments.flavor))
    with tempfile.TemporaryDirectory(prefix="titanling-benchmark-", dir=arguments.folder) as temporary:
        where = Path(temporary)
        peer = fits_in_memory(shape) and not arguments.sparse
        bytes_each = 2 if arguments.sparse else 10 if peer else 6
        needed, free = bytes_each * shape.total_params, shutil.disk_usage(where).free
        if needed > 0.95 * free:
            print(f"skipped: {arguments.flavor} needs {needed / 1e9:.0f} GB of disk and there are {free / 1e9:.0f}")
            return 0
        results: dict[str, Any] = {"benchmark": "convert", "machine": machine(), "flavor": arguments.flavor}
        results |= {"parameters": shape.total_params, "torch": torch.__version__, "sparse": arguments.sparse}
        say("writing the checkpoint (not counted)")
        checkpoint = write_checkpoint(where, shape, arguments.flavor, arguments.sparse)
        if peer:
            weights = {name: torch.randn(size) for name, size in tensor_shapes(shape).items()}
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of its single process
                dcp.save(weights, checkpoint_id=str(where / "dcp"))
            del weights
        contestants = ["copy", "titanling", *(["torchtitan's way"] if peer else [])]
        if not peer:
            say("torchtitan's way is left out: it needs the memory for the whole model, and weights on the disk")
        results["runs"] = measure(contestants, where, checkpoint, arguments.flavor, arguments.rounds)
    results |= summarize(results["runs"], max(map(numel, tensor_shapes(shape).values())) * 4)
    report(results)
    write_json(arguments.json, results)
    return 0


def numel(shape: tuple[int, ...]) -> int:
    """Number of values."""
    return torch.Size(shape).numel()


def fits_in_memory(shape: LlamaShape) -> bool:
    """Whether the model fits in float32 and in bfloat16, twice for what is on its way to the disk."""
    return 10 * shape.total_params < os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")


def write_checkpoint(where: Path, shape: LlamaShape, flavor: str, sparse: bool) -> Path:
    """Random weights in four row shards or more, or zeros that take no disk; the checkpoint's folder."""
    train_tokenizer(iter(["some text"] * 9), 300, str(where / "tokenizer"))
    model = {"flavor": flavor, "hf_assets_path": str(where / "tokenizer")}
    state = {"format": 1, "step": 1, "tokens_seen": 0, "model_only": True, "model": asdict(shape)}
    state["config"] = Config.model_validate({"model": model}).model_dump(mode="json")
    final, files = folder.step_folder(where, 1), {}
    working = folder.working_folder(final)
    folder.begin(final)
    (working / "model").mkdir()
    count = max(4, -(-4 * shape.total_params // SHARD_BYTES))
    for index in range(count):
        name = f"model/shard-{index + 1:05d}-of-{count:05d}.safetensors"
        write_shard(working / name, shape, index, count, sparse)
        folder.sync(working / name)
        files[name] = folder.digest(working / name)
    folder.write_json(working / folder.STATE, state)
    files[folder.STATE] = folder.digest(working / folder.STATE)
    folder.commit(final, files)
    return final


def write_shard(path: Path, shape: LlamaShape, index: int, count: int, sparse: bool) -> None:
    """The rows of all tensors that are one rank's of `count`."""
    torch.manual_seed(index)
    pieces = {}
    for name, size in sorted(tensor_shapes(shape).items()):
        rows = -(-size[0] // count)
        low, high = min(index * rows, size[0]), min((index + 1) * rows, size[0])
        if low < high:
            values = torch.empty(1).expand(high - low, *size[1:]) if sparse else torch.randn(high - low, *size[1:])
            pieces[name] = Piece(values, [low] + [0] * (len(size) - 1))
    with path.open("wb", buffering=0) as file:
        if not sparse:
            write_tensors(file, pieces)
            return
        offsets = {name: {"saved_offsets": list(piece.offsets)} for name, piece in pieces.items()}
        layout = {name: (torch.float32, piece.values.shape) for name, piece in pieces.items()}
        header = encode_header(layout, {SHARDING: json.dumps(offsets)})
        file.write(header)
        file.truncate(len(header) + sum(4 * piece.values.numel() for piece in pieces.values()))


def measure(
    contestants: list[str], where: Path, checkpoint: Path, flavor: str, rounds: int
) -> dict[str, list[dict[str, float]]]:
    """Contestant → its runs: seconds and peak RSS in bytes."""
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in contestants}
    inputs = sorted((checkpoint / "model").iterdir())
    output = where / "output"
    commands = {
        "copy": ["-c", COPY, str(CHUNK_BYTES), "50", str(output), *map(str, inputs)],
        "titanling": [
            str(ROOT / "scripts/convert_dcp_to_hf.py"),
            *("--checkpoint", str(checkpoint), "--output", str(output), "--dtype", "bfloat16"),
        ],
        "torchtitan's way": [
            str(BENCHMARKS / "contestants/convert_dcp.py"),
            *("--flavor", flavor, "--checkpoint", str(where / "dcp"), "--output", str(output)),
        ],
    }
    for number in range(1, rounds + 1):
        for name in contestants:
            os.sync()
            for path in [*inputs, *(where / "dcp").glob("*")]:
                folder.forget_cached(path)
            runs[name].append(run([sys.executable, *commands[name]]))
            say(f"round {number}: {name} took {runs[name][-1]['seconds']:.1f} s")
            shutil.rmtree(output) if output.is_dir() else output.unlink()
    return runs


def run(command: list[str]) -> dict[str, float]:
    """Seconds of a process and the peak of its memory, as far as it can be seen from outside."""
    start, peak = time.perf_counter(), 0
    process = subprocess.Popen(command, env=environment(), stdout=subprocess.DEVNULL)
    while process.poll() is None:
        with open(f"/proc/{process.pid}/status", encoding="utf-8") as file:
            found = [line.split()[1] for line in file if line.startswith("VmHWM:")]
        peak = max([peak, *(int(kib) * 1024 for kib in found)])
        time.sleep(0.01)
    seconds = time.perf_counter() - start
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with code {process.returncode}")
    return {"seconds": seconds, "peak_rss": peak}


def summarize(runs: dict[str, list[dict[str, float]]], largest: int) -> dict[str, Any]:
    """Medians of the ratios within a round, and what of the peak is beyond the largest tensor."""
    peak = max(run["peak_rss"] for run in runs["titanling"])
    summary: dict[str, Any] = {"largest_tensor": largest, "beyond_largest_tensor": peak - largest}
    for name, key in (("copy", "of_copy_rate"), ("torchtitan's way", "of_their_time")):
        pairs = list(zip(runs["titanling"], runs.get(name, []), strict=False))
        ratios = [theirs["seconds"] / ours["seconds"] for ours, theirs in pairs]
        if ratios:
            summary[key] = statistics.median(ratios if name == "copy" else [1 / ratio for ratio in ratios])
    return summary | {"targets": {"of_copy_rate": TARGET_COPY, "of_their_time": TARGET_DCP}}


def report(results: dict[str, Any]) -> None:
    """Print the medians."""
    title = f"conversion to bfloat16 of {results['flavor']} ({results['parameters'] / 1e9:.2f} B parameters, float32)"
    table = Table(title=title)
    for column in ("", "seconds", "min … max", "peak RSS, MiB"):
        table.add_column(column, justify="right")
    for name, found in results["runs"].items():
        seconds = [run["seconds"] for run in found]
        peak = max(run["peak_rss"] for run in found) / 2**20
        spread = f"{min(seconds):.1f} … {max(seconds):.1f}"
        table.add_row(name, f"{statistics.median(seconds):.1f}", spread, f"{peak:,.0f}")
    console = Console(highlight=False)
    console.print(table)
    console.print(f"titanling: {results['of_copy_rate']:.2f} of the copy's rate (target at least {TARGET_COPY})")
    if "of_their_time" in results:
        console.print(f"{results['of_their_time']:.2f} × the time of torchtitan's way (target at most {TARGET_DCP})")
    beyond, largest = results["beyond_largest_tensor"] / 2**20, results["largest_tensor"] / 2**20
    console.print(f"peak: {beyond:,.0f} MiB beyond the largest tensor's {largest:,.0f} (target at most 1,024)")


if __name__ == "__main__":
    sys.exit(main())
