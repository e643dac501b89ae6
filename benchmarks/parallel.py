"""Parallel plans on the CPU: tokens/s of the same job under each layout of two processes, and compiled against eager.

Every run is the command that a user types (`python -m titanling.launch -- --config …`) on random tokens, minilingua_30m
with a vocabulary of 32,768, 8 × 512 tokens a step without accumulation: under FSDP and DDP four sequences a process, as
in train_step.py. Layouts take turns in rounds, each alone on the machine; a ratio is taken within a round.
"""

import sys
from os.path import dirname, realpath

sys.path.insert(0, dirname(dirname(realpath(__file__))))
from titanling import environment

environment.require(even_for_help=True)

import argparse
import json
import statistics
import subprocess
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from contestants.protocol import FULL, SMOKE, Sizes
from contestants.random_tokens import write_tokens
from harness import environment, machine, say, write_json
from rich.console import Console
from rich.table import Table

EXAMPLE = "example: python benchmarks/parallel.py --layouts ddp fsdp tp --rounds 2 --json results.json"
P = "--parallelism."
DDP = [f"{P}data_parallel_replicate_degree", "2", f"{P}data_parallel_shard_degree", "1"]
COMPILE = ["--compile.enable", "true"]
BF16 = ["--training.mixed_precision_param", "bfloat16"]
RECOMPUTE = ["--activation_checkpoint.mode", "full"]
# Layout → data-parallel ranks, which share the batch without accumulating, and options.
LAYOUTS: dict[str, tuple[int, list[str]]] = {
    "ddp": (2, DDP),
    "fsdp": (2, []),
    "tp": (1, [f"{P}tensor_parallel_degree", "2"]),
    "cp": (1, [f"{P}context_parallel_degree", "2"]),
    "pp": (1, [f"{P}pipeline_parallel_degree", "2", "--model.tie_embeddings", "false"]),
    "fsdp-never": (2, [f"{P}fsdp_reshard_after_forward", "never"]),
    "fsdp-recomputed": (2, RECOMPUTE),
    "fsdp-compiled": (2, COMPILE),
    "fsdp-bf16": (2, BF16),
    "fsdp-bf16-compiled": (2, BF16 + COMPILE),
}
RATIOS = [
    ("fsdp", "ddp", "at least 0.9"),
    ("fsdp-never", "ddp", "reported"),
    ("fsdp-compiled", "fsdp", "at least 1.1"),
    ("fsdp-bf16-compiled", "fsdp-bf16", "at least 1.3"),
    ("tp", "ddp", "reported"),
    ("cp", "ddp", "reported"),
    ("pp", "ddp", "reported: its head is a matrix of its own"),
    ("fsdp-recomputed", "fsdp", "reported"),
]
WARM = 2


def main() -> None:
    """Arguments → runs → table and JSON."""
    parser = argparse.ArgumentParser(description=__doc__, epilog=EXAMPLE)
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS), help="default: all")
    parser.add_argument("--rounds", type=int, default=2, help="turns of each layout (default 2)")
    parser.add_argument("--steps", type=int, default=4, help=f"measured steps of a run, after {WARM} (default 4)")
    parser.add_argument("--json", metavar="OUT", help="also write the results here")
    parser.add_argument("--smoke", action="store_true", help="seconds: a tiny model; the times mean nothing")
    arguments = parser.parse_args()
    sizes = SMOKE if arguments.smoke else FULL
    sizes = replace(sizes, batch=2 * sizes.batch)  # of the step, which two processes share
    results: dict[str, Any] = {"benchmark": "parallel", "machine": machine(), "tokens_per_step": sizes.tokens}
    found: dict[str, list[float]] = {name: [] for name in arguments.layouts}
    with tempfile.TemporaryDirectory(prefix="titanling-benchmark-") as temporary:
        folder = Path(temporary)
        write_job(folder, sizes)
        for number in range(1 if arguments.smoke else arguments.rounds):
            for name in arguments.layouts:
                say(f"round {number + 1}: {name}")
                found[name].append(tokens_per_second(folder, f"{name}-{number}", name, arguments.steps, sizes.batch))
    results |= {"tokens_per_second": found, "ratios": ratios(found)}
    report(results)
    write_json(arguments.json, results)


def write_job(folder: Path, sizes: Sizes) -> None:
    """Random tokens, and the TOML of a run over them."""
    prefix = folder / "train"
    write_tokens(prefix, sizes.vocab_size, 50 * sizes.tokens)
    keys = ("dim", "n_layers", "n_heads", "n_kv_heads", "ffn_dim", "vocab_size")
    model = {key: getattr(sizes, key) for key in keys} | {"tie_embeddings": True}
    if model["n_kv_heads"] % 2:  # 6 and 3 heads do not divide by two ranks of tensor parallelism
        model |= {"n_kv_heads": model["n_heads"]}
    training = {"seq_len": sizes.seq_len, "global_batch_size": sizes.batch}
    tables = {
        "model": model | {"flavor": "minilingua_30m"},
        "data": {"train": str(prefix)},
        "training": training | {"mixed_precision_param": "float32"},
        "parallelism": {"pipeline_parallel_microbatch_size": 1},
        "metrics": {"log_freq": 1},
    }
    lines = []
    for table, values in tables.items():
        lines += [f"[{table}]", *(f"{key} = {json.dumps(value)}" for key, value in values.items())]
    (folder / "run.toml").write_text("\n".join(lines) + "\n", encoding="utf-8")


def tokens_per_second(folder: Path, run: str, layout: str, steps: int, batch: int) -> float:
    """Median over the steps after the first WARM. Raises RuntimeError if the run fails."""
    ranks, options = LAYOUTS[layout]
    command = [sys.executable, "-m", "titanling.launch", "--", "--config", str(folder / "run.toml"), *options]
    command += ["--training.local_batch_size", str(batch // ranks)]
    command += ["--job.dump_folder", str(folder / run), "--training.steps", str(WARM + steps)]
    done = subprocess.run(command, env=environment(NGPU="2"), capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with code {done.returncode}:\n{done.stderr}")
    lines = (folder / run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return statistics.median(json.loads(line)["tokens_per_second"] for line in lines[WARM:])


def ratios(found: dict[str, list[float]]) -> list[dict[str, Any]]:
    """The ratios of RATIOS whose layouts were run, each the median over the rounds."""
    rows = []
    for name, base, target in RATIOS:
        if name in found and base in found:
            each = [mine / theirs for mine, theirs in zip(found[name], found[base], strict=True)]
            rows.append({"layout": name, "to": base, "ratio": statistics.median(each), "each": each, "target": target})
    return rows


def report(results: dict[str, Any]) -> None:
    """Print the medians and ratios."""
    table = Table(title="training under parallel plans, two CPU processes: medians over the rounds")
    for column in ("layout", "tokens/s", "ratio", "min … max", "target"):
        table.add_column(column, justify="right")
    by_layout = {row["layout"]: row for row in results["ratios"]}
    for name, speeds in results["tokens_per_second"].items():
        row = by_layout.get(name)
        ratio = f"{row['ratio']:.3f} × {row['to']}" if row else ""
        spread = f"{min(row['each']):.3f} … {max(row['each']):.3f}" if row else ""
        table.add_row(name, f"{statistics.median(speeds):.0f}", ratio, spread, row["target"] if row else "")
    Console(width=120 if not sys.stdout.isatty() else None).print(table)


if __name__ == "__main__":
    main()
