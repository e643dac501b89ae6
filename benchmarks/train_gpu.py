"""Training on one GPU: tokens/s, MFU, peak memory and where the time goes, with the Triton kernels and without.

titanling's own Trainer on random tokens: sequences of 2,048, 32,768 tokens a step, blocks compiled, nothing recomputed,
bfloat16 over float32 weights. The micro-batch is the largest that the planner expects to fit, halved while memory does
not suffice. Every configuration is a process of its own. Steps are timed without the profiler; kernels are those of two
more steps under it. What the time does not suffice for is left out, and said.
"""

import sys
from os.path import dirname, realpath

sys.path.insert(0, dirname(dirname(realpath(__file__))))
from titanling import environment

environment.require(even_for_help=True)

import argparse
import importlib.util
import json
import math
import os
import subprocess
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from contestants.protocol import GpuJob
from harness import BENCHMARKS, ROOT, environment, machine, say, write_json
from kernel_classes import MEANING

EXAMPLE = "example: python benchmarks/train_gpu.py --flavors 1B --json benchmarks/results/train_h200.json"
FLAVORS = ("1B", "minilingua_1b")
IMPLEMENTATIONS = ("triton", "torch")
NEEDED = ("numpy", "pydantic", "safetensors", "tokenizers", "tomli", "tomli_w", "torch", "torchdata", "xxhash")
"""What the Trainer imports."""
GOAL_DEVICE, GOAL = "H200", 0.58
SAME_LOSS = 0.02
GIB = 2**30

Result = dict[str, Any]


def main() -> int:
    """Arguments → configurations → tables and JSON. Exit code 1 if one failed or a comparison is not valid."""
    started, arguments = time.monotonic(), parse_arguments()
    problem = missing(arguments.device) or unknown(arguments.flavors)
    if problem:
        print(f"error: {problem}", file=sys.stderr)
        return 2
    results: Result = {"benchmark": "train_gpu", "machine": machine(), "dry_run": arguments.smoke}
    results |= {"results": [], "left_out": [], "problems": []}
    with tempfile.TemporaryDirectory(prefix="titanling-benchmark-") as folder:
        measure_all(arguments, folder, started, results)
    rows = results["results"]
    if rows:
        results["machine"] |= rows[0]["machine"]
    results["problems"] += incomparable(rows)
    results["ratios"] = ratios(rows)
    print("\n".join(report(results)))
    write_json(arguments.json, results)
    return int(bool(results["problems"]) or not rows)


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, epilog=EXAMPLE)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cuda: NVIDIA or AMD")
    parser.add_argument("--flavors", nargs="+", help=f"presets (default {' '.join(FLAVORS)})")
    parser.add_argument("--implementations", nargs="+", choices=IMPLEMENTATIONS, default=IMPLEMENTATIONS)
    parser.add_argument("--steps", type=int, default=10, help="timed, after a few others (default 10)")
    parser.add_argument("--seconds", type=float, default=140, help="leave out what does not fit in (default 140)")
    parser.add_argument("--json", metavar="OUT", help="also write the results here")
    parser.add_argument("--smoke", action="store_true", help="seconds: a tiny model; the figures mean nothing")
    arguments = parser.parse_args()
    if arguments.steps < 1:
        parser.error("--steps must be positive")
    if arguments.device == "cpu" and not arguments.smoke:
        parser.error("on a CPU only --smoke makes sense")
    arguments.flavors = arguments.flavors or (FLAVORS[:1] if arguments.smoke else FLAVORS)
    return arguments


def missing(device: str = "cpu") -> str:
    """What this Python or machine lacks to run the Trainer, in a line; nothing if all is there."""
    packages = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if packages:
        return f"titanling's Trainer needs {', '.join(packages)}, not installed here (pip install -e . brings them)"
    if device == "cuda":
        import torch

        if not torch.cuda.is_available():
            return "this machine has no GPU for torch; --device cpu --smoke makes a dry run"
    return ""


def unknown(flavors: list[str]) -> str:
    """What is wrong with the names of presets, in a line."""
    from titanling.config.schema import Model
    from titanling.errors import UserError
    from titanling.model.presets import resolve_shape

    try:
        for flavor in flavors:
            resolve_shape(Model(flavor=flavor))
    except UserError as error:
        return str(error)
    return ""


# ---- the configurations, one after another ----


def measure_all(arguments: argparse.Namespace, folder: str, started: float, results: Result) -> None:
    """Fill in the results, what was left out and what went wrong. Both implementations of a flavor come together."""
    longest = 0.0
    for flavor in arguments.flavors:
        micro_batch = 0  # what did not fit for one implementation is not tried for the next
        for implementation in arguments.implementations:
            steps = min(arguments.steps, 2) if arguments.smoke else arguments.steps
            job = GpuJob(flavor, implementation, arguments.device, steps, arguments.smoke, folder, micro_batch)
            begun = time.monotonic()
            left = arguments.seconds - (begun - started)
            if left <= longest:
                results["left_out"].append(f"{job.name}: {max(0.0, left):.0f} s were left, too few (--seconds)")
                continue
            say(f"{job.name}: starts")
            try:
                result = measure(job, begun + left)
            except subprocess.TimeoutExpired:
                results["left_out"].append(f"{job.name}: stopped when {arguments.seconds:.0f} s were over")
                continue
            longest = max(longest, time.monotonic() - begun)
            if "problem" in result:
                results["problems"].append(f"{job.name}: {result['problem']}")
                continue
            micro_batch = result["micro_batch"]
            results["results"].append(result)


def measure(job: GpuJob, until: float) -> Result:
    """One configuration, with half the micro-batch for as long as memory does not suffice.

    Raises TimeoutExpired at time.monotonic() `until`.
    """
    out_of_memory: list[int] = []
    while True:
        result = run(job, until - time.monotonic())
        if not result.get("out_of_memory"):
            return result | {"out_of_memory": out_of_memory}
        out_of_memory.append(result["micro_batch"])
        if result["micro_batch"] == 1:
            return {"problem": "out of memory with one sequence"}
        job = replace(job, micro_batch=result["micro_batch"] // 2)
        say(f"{job.name}: out of memory, now with micro-batches of {job.micro_batch}")


def run(job: GpuJob, seconds: float) -> Result:
    """The child's answer, or the problem that it ended with."""
    job.answer.unlink(missing_ok=True)
    log = Path(job.folder) / "log"
    path = os.pathsep.join([str(ROOT), str(BENCHMARKS), *filter(None, [os.environ.get("PYTHONPATH")])])
    env = environment(PYTHONPATH=path) if job.device == "cpu" else os.environ | {"PYTHONPATH": path}
    command = [sys.executable, str(BENCHMARKS / "contestants" / "titanling_gpu.py"), json.dumps(asdict(job))]
    with open(log, "w", encoding="utf-8") as file:
        done = subprocess.run(command, stdout=file, stderr=file, env=env, timeout=max(1.0, seconds))
    if job.answer.exists():
        return json.loads(job.answer.read_text(encoding="utf-8"))
    last = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
    return {"problem": f"ended with code {done.returncode}: {' '.join(last)}"}


# ---- telling ----


def incomparable(rows: list[Result]) -> list[str]:
    """What makes figures not valid: losses that are no numbers or differ from the start, an MFU above 100 %."""
    found = []
    for row in rows:
        if not math.isfinite(row["last_loss"]):
            found.append(f"{_name(row)}: the loss is {row['last_loss']}")
        if row.get("mfu_full", 0) > 1:
            found.append(f"{_name(row)}: an MFU of {row['mfu_full']:.0%} is not possible")
    for flavor in dict.fromkeys(row["flavor"] for row in rows):
        losses = [row["first_loss"] for row in rows if row["flavor"] == flavor]
        if not max(losses) <= (1 + SAME_LOSS) * min(losses):
            found.append(f"{flavor}: initial losses differ: {', '.join(f'{loss:.3f}' for loss in losses)}")
    return found


def ratios(rows: list[Result]) -> dict[str, float]:
    """Flavor → tokens/s with the Triton kernels over those without, where both ran: on a CPU Triton does not."""
    ran = [row for row in rows if (row["implementation"] == "triton") == ("in Triton" in row["kernels"])]
    speeds = {(row["flavor"], row["implementation"]): row["tokens_per_second"] for row in ran}
    return {
        flavor: speeds[flavor, "triton"] / speeds[flavor, "torch"]
        for flavor in dict.fromkeys(flavor for flavor, _ in speeds)
        if {(flavor, "triton"), (flavor, "torch")} <= speeds.keys()
    }


def report(results: Result) -> list[str]:
    """All that is printed."""
    rows = results["results"]
    lines = [
        f"{'model':16}{'kernels':>8}{'batch':>8}{'tokens/s':>11}{'ms a step':>11}{'min … max':>16}"
        f"{'MFU full':>10}{'causal':>8}{'peak GiB':>10}{'1st step s':>12}"
    ]
    lines += [_line(row) for row in rows]
    for row in rows:
        lines += _where(row)
    for flavor, ratio in results["ratios"].items():
        batches = {row["micro_batch"] for row in rows if row["flavor"] == flavor}
        differ = " (with different micro-batches)" if len(batches) > 1 else ""
        lines.append(f"{flavor}: Triton {ratio:.3f} × torch{differ}")
    for row in rows:
        if "mfu_full" in row and row["implementation"] == "triton":
            goal = f"{row['flavor']}: {row['mfu_full']:.1%} MFU (full); the goal is {GOAL:.0%} on one {GOAL_DEVICE}"
            here = row["machine"]["device"]
            lines.append(goal if GOAL_DEVICE in here else f"{goal}, and this is one {here}")
        elif row["implementation"] == "triton" and not results["dry_run"]:
            lines.append(f"{row['flavor']}: no MFU, for the peak of {row['machine']['device']} is not known")
    lines += [f"not measured: {each}" for each in results["left_out"]]
    lines += [f"PROBLEM: {each}" for each in results["problems"]]
    if results["dry_run"]:
        lines.append("dry run: the figures mean nothing" + ("" if results["ratios"] else ", and no Triton kernel ran"))
    return lines


def _name(row: Result) -> str:
    return f"{row['flavor']}, {row['implementation']}"


def _line(row: Result) -> str:
    milliseconds = [1000 * each for each in row["step_seconds"]]
    shares = [f"{row[key]:.1%}" if key in row else "" for key in ("mfu_full", "mfu_causal")]
    return (
        f"{row['flavor']:16}{row['implementation']:>8}{row['micro_batch']:>5} ×{row['accumulation']:>2}"
        f"{row['tokens_per_second']:>11,.0f}{sum(milliseconds) / len(milliseconds):>11.1f}"
        f"{min(milliseconds):>7.1f} … {max(milliseconds):<6.1f}{shares[0]:>10}{shares[1]:>8}"
        f"{row['peak_bytes'] / GIB:>10.1f}{row['first_step_seconds']:>12.1f}"
    )


def _where(row: Result) -> list[str]:
    """The time by class, and where the other x % goes."""
    classes, step = row["class_seconds"], sum(row["step_seconds"]) / len(row["step_seconds"])
    if classes is None:
        return [f"{_name(row)}: no kernels of a GPU in the trace"]
    lines = ["", f"{_name(row)}: ms a step by class of kernel"]
    shown = [(MEANING[name], seconds) for name, seconds in classes.items() if seconds]
    shown.append(("nothing runs", step - sum(classes.values())))
    lines += [f"  {what:58}{1000 * seconds:>9.2f}{seconds / step:>8.1%}" for what, seconds in shown]
    if not row["loss_ranges"]:
        lines.append("  (the loss is not in the trace by name: its kernels are among the other eager ones)")
    if row.get("where_the_rest_goes"):
        lines.append(f"where the other {1 - row['mfu_full']:.1%} go (full MFU {row['mfu_full']:.1%})")
        lines += [f"  {what:58}{'':9}{share:>8.1%}" for what, share in row["where_the_rest_goes"]]
    return [*lines, ""]


if __name__ == "__main__":
    sys.exit(main())
