"""Scaling by simulation: MFU that the planner predicts, beside torchtitan's published figures for the same layouts.

Nothing is trained and no GPU is needed: every number is scripts/plan.py's roofline. Published: torchtitan's benchmark
of December 2024 (benchmarks/llama3_h100_202412_torchtitan.md in its repository), on H100s of 96 GB with 2.4 TB/s whose
power was limited to 500 W.
"""

import sys
from os.path import dirname, realpath

sys.path.insert(0, dirname(dirname(realpath(__file__))))
from titanling import environment

environment.require(even_for_help=True)

import argparse
import statistics
import warnings
from dataclasses import asdict
from typing import Any

from harness import machine, say, write_json
from rich.console import Console
from rich.table import Table

EXAMPLE = "example: python benchmarks/scaling.py --json benchmarks/results/scaling.json"
SELECTIVE = {"activation_checkpoint": {"mode": "selective", "selective_ac_option": "op"}}
FULL = {"activation_checkpoint": {"mode": "full"}}
COMPILE = {"compile": {"enable": True}}
FLOAT8 = "quantize.linear.float8"


def tables(
    flavor: str, seq_len: int, local: int, *more: dict[str, Any], float8: bool = False, **layout: Any
) -> dict[str, Any]:
    """A config as tables."""
    tree: dict[str, Any] = {
        "model": {"flavor": flavor, "converters": [FLOAT8] if float8 else []},
        "training": {"seq_len": seq_len, "local_batch_size": local},
        "parallelism": layout,
    }
    for each in more:
        tree |= each
    return tree


def cp(degree: int) -> dict[str, Any]:
    """8 GPUs, sequences over `degree` of them."""
    return tables("8B", 32768 * degree, 1, FULL, COMPILE, float8=True, context_parallel_degree=degree)


PIPELINE = {"tensor_parallel_degree": 8, "pipeline_parallel_degree": 8, "enable_async_tensor_parallel": True}
WIDE = {"tensor_parallel_degree": 8}
# (name, GPUs, config, tokens/s per GPU, GiB)
PUBLISHED: list[tuple[str, int, dict[str, Any], float, float]] = [
    ("8B, FSDP, eager", 8, tables("8B", 8192, 2, SELECTIVE), 5762, 82.4),
    ("8B, FSDP, compiled", 8, tables("8B", 8192, 2, SELECTIVE, COMPILE), 6667, 77.0),
    ("8B, FSDP, compiled, float8", 8, tables("8B", 8192, 2, SELECTIVE, COMPILE, float8=True), 8532, 76.8),
    ("8B, FSDP, eager", 128, tables("8B", 8192, 2, SELECTIVE), 5605, 67.0),
    ("8B, FSDP, compiled", 128, tables("8B", 8192, 2, SELECTIVE, COMPILE), 6514, 62.0),
    ("8B, FSDP, compiled, float8", 128, tables("8B", 8192, 2, SELECTIVE, COMPILE, float8=True), 8380, 61.8),
    ("8B, 32k, FSDP 8, float8", 8, cp(1), 3890, 83.9),
    ("8B, 64k, CP 2, float8", 8, cp(2), 2540, 84.2),
    ("8B, 128k, CP 4, float8", 8, cp(4), 1071, 84.0),
    ("8B, 256k, CP 8, float8", 8, cp(8), 548, 84.5),
    ("70B, TP 8, float8", 256, tables("70B", 8192, 16, FULL, COMPILE, float8=True, **WIDE), 829, 71.9),
    ("70B, async TP 8, float8", 256,
     tables("70B", 8192, 16, FULL, COMPILE, float8=True, enable_async_tensor_parallel=True, **WIDE), 876, 67.6),
    ("405B, async TP 8, PP 8, float8", 512,
     tables("405B", 8192, 32, FULL, COMPILE, float8=True, **PIPELINE), 100, 82.5),
    ("405B, the same, interleaved", 512,
     tables("405B", 8192, 32, FULL, COMPILE, float8=True, pipeline_parallel_schedule="Interleaved1F1B",
            pipeline_parallel_layers_per_stage=8, **PIPELINE), 128, 72.7),
]  # fmt: skip
SCALING: list[tuple[str, str, dict[str, Any], range]] = [
    ("8B", "h100", tables("8B", 8192, 1, SELECTIVE, COMPILE), range(3, 13)),
    ("1B", "mi250x", tables("1B", 2048, 8, SELECTIVE, COMPILE), range(3, 11)),
]


def main() -> None:
    """Arguments → predictions → tables and JSON."""
    parser = argparse.ArgumentParser(description=__doc__, epilog=EXAMPLE)
    parser.add_argument("--json", metavar="OUT", help="also write the results here")
    parser.add_argument("--smoke", action="store_true", help="seconds: two layouts and two sizes")
    arguments = parser.parse_args()
    results: dict[str, Any] = {"benchmark": "scaling", "machine": machine()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        results["published"] = [published(*row) for row in (PUBLISHED[:2] if arguments.smoke else PUBLISHED)]
        results["scaling"] = [
            size
            for name, device, tree, powers in SCALING
            for size in scaling(name, device, tree, powers[:1] if arguments.smoke else powers)
        ]
    results["median_error"] = statistics.median(abs(row["error"]) for row in results["published"])
    report(results)
    write_json(arguments.json, results)


def predict(tree: dict[str, Any], world: int, row: Any) -> dict[str, float]:
    """What the planner says."""
    from titanling.config import Config
    from titanling.planner.forecast import forecast
    from titanling.planner.setup import resolve

    found = forecast(resolve(Config.model_validate(tree), world, row), quick=True)
    assert found.speed is not None
    rate = found.speed.tokens_per_second / world
    return asdict(found.speed) | {"tokens_per_second_per_device": rate, "peak_gib": found.memory.peak / 2**30}


def published(name: str, gpus: int, tree: dict[str, Any], rate: float, gib: float) -> dict[str, Any]:
    """A layout that torchtitan has published, on its hardware."""
    from titanling.planner.hardware import LIMITED_H100

    say(f"{name}, {gpus} GPUs")
    found = predict(tree, gpus, LIMITED_H100)
    error = found["tokens_per_second_per_device"] / rate - 1
    return {"name": name, "gpus": gpus, "published": rate, "published_gib": gib, "error": error, "predicted": found}


def scaling(name: str, device: str, tree: dict[str, Any], powers: range) -> list[dict[str, Any]]:
    """One model on 2^n devices: sharded over up to 64 devices, copies of that beyond."""
    from titanling.planner.hardware import hardware

    rows = []
    for world in (2**power for power in powers):
        say(f"{name} on {world} × {device}")
        layout = {"data_parallel_shard_degree": min(world, 64), "data_parallel_replicate_degree": max(1, world // 64)}
        found = predict(tree | {"parallelism": layout}, world, hardware(device))
        rows.append({"model": name, "device": device, "devices": world, "predicted": found})
    return rows


def report(results: dict[str, Any]) -> None:
    """Print both tables."""
    table = Table(title="torchtitan's layouts on its H100s (500 W, 2.4 TB/s): tokens/s per GPU, GiB")
    for column in ("layout", "GPUs", "published", "predicted", "off by", "MFU predicted", "GiB", "predicted"):
        table.add_column(column, justify="left" if column == "layout" else "right")
    for row in results["published"]:
        found = row["predicted"]
        table.add_row(
            row["name"], str(row["gpus"]), f"{row['published']:,.0f}", f"{found['tokens_per_second_per_device']:,.0f}",
            f"{row['error']:+.0%}", f"{found['mfu_full']:.0%}", f"{row['published_gib']}", f"{found['peak_gib']:.1f}",
        )  # fmt: skip
    console = Console(width=None if sys.stdout.isatty() else 140)
    console.print(table)
    console.print(f"median of |off by|: {results['median_error']:.0%}")
    table = Table(title="scaling, predicted: HSDP beyond 64 devices")
    for column in ("model", "device", "devices", "tokens/s per device", "MFU full", "MFU causal"):
        table.add_column(column, justify="right")
    for row in results["scaling"]:
        found = row["predicted"]
        table.add_row(
            row["model"], row["device"], f"{row['devices']:,}", f"{found['tokens_per_second_per_device']:,.0f}",
            f"{found['mfu_full']:.1%}", f"{found['mfu_causal']:.1%}",
        )  # fmt: skip
    console.print(table)


if __name__ == "__main__":
    main()
