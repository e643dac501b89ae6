"""titanling on a GPU: one configuration of train_gpu.py, by the Trainer's own `train_step`, timed and then traced.

PYTHONPATH=.:benchmarks python benchmarks/contestants/titanling_gpu.py '{"flavor": "1B", …}'   (protocol.GpuJob)
"""

import gc
import itertools
import json
import re
import sys
import time
from pathlib import Path
from typing import Any

import torch
from device_time import describe
from kernel_classes import break_down, where_it_goes
from protocol import GpuJob
from random_tokens import write_tokens
from torch.profiler import ProfilerActivity

from titanling.config import Config
from titanling.metrics import FlopsPerToken, device_memory, mfu
from titanling.model.presets import resolve_shape
from titanling.parallel.degrees import Degrees
from titanling.planner.forecast import forecast
from titanling.planner.hardware import hardware
from titanling.planner.setup import resolve
from titanling.trainer import Trainer

TINY = {"dim": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "head_dim": 16, "ffn_dim": 128, "vocab_size": 512}
MARGIN = 1.2
"""Of the planner's peak, which is below what torchtitan published by so much (README.md, scaling)."""
NEVER = 1_000_000  # steps
DATA_STEPS = 30  # so many steps of data; the loader begins another epoch by itself
WARM_UP = 3
TRACED = 2

Result = dict[str, Any]


def main() -> None:
    """Build, train, trace; the answer goes to a file, for the Trainer talks on stdout."""
    job = GpuJob(**json.loads(sys.argv[1]))
    micro_batch = job.micro_batch or expected_to_fit(job)
    try:
        result = train(job, micro_batch)
    except RuntimeError as error:  # torch's own OutOfMemoryError is one; cuBLAS and Triton allocate for themselves
        if not re.search("out of memory|ALLOC_FAILED", str(error), re.IGNORECASE):
            raise
        result = {"out_of_memory": True, "micro_batch": micro_batch}
    job.answer.write_text(json.dumps(result), encoding="utf-8")


def config_of(job: GpuJob, micro_batch: int) -> Config:
    """The run's config."""
    # Triton has no CPU target: a dry run takes what "auto" gives, and its result says what that was.
    triton = "auto" if job.device == "cpu" else "triton"
    folder = f"{job.folder}/{job.flavor}-{job.implementation}-{micro_batch}"
    tables = {
        "job": {"dump_folder": folder, "description": "benchmark"},
        "model": {"flavor": job.flavor, **(TINY if job.smoke else {})},
        "data": {"train": f"{folder}/train"},
        "training": {
            "steps": NEVER,
            "seq_len": job.seq_len,
            "local_batch_size": micro_batch,
            "global_batch_size": job.sequences,
            "dtype": "float32",
            "mixed_precision_param": "bfloat16",
        },
        "lr_scheduler": {"warmup_steps": 0, "decay_ratio": 0.0},
        "activation_checkpoint": {"mode": "none"},
        "compile": {"enable": job.device != "cpu"},  # a CPU's compiler takes longer than the whole dry run
        "kernels": {"implementation": triton if job.implementation == "triton" else job.implementation},
        "metrics": {"log_freq": NEVER},
    }
    return Config.model_validate(tables)


def forecast_peak(job: GpuJob, micro_batch: int) -> float:
    """Bytes that the planner expects at the peak of a step."""
    row = hardware("cpu" if job.device == "cpu" else "h100")  # tensors are as large on any GPU
    return forecast(resolve(config_of(job, micro_batch), 1, row)).memory.peak


def expected_to_fit(job: GpuJob) -> int:
    """The largest micro-batch, a power of two up to the whole step, that leaves MARGIN; at least 1."""
    micro_batch, total = job.sequences, device_memory(job.device).total
    while micro_batch > 1 and forecast_peak(job, micro_batch) * MARGIN > total:
        micro_batch //= 2
    return micro_batch


def train(job: GpuJob, micro_batch: int) -> Result:
    """The figures of one configuration."""
    started, expected = time.perf_counter(), forecast_peak(job, micro_batch)
    config = config_of(job, micro_batch)
    shape = resolve_shape(config.model)
    assert config.data.train is not None
    write_tokens(Path(config.data.train), shape.vocab_size, DATA_STEPS * job.sequences * job.seq_len)
    trainer = Trainer(config, shape, Degrees())
    gc.disable()  # as Trainer.train does
    first_loss = trainer.train_step()[0].item()
    first_step = time.perf_counter() - started
    for _ in range(WARM_UP - 1):
        trainer.train_step()
    seconds, last_loss = timed(trainer, job.steps)
    memory = device_memory(job.device)
    step, tokens = sum(seconds) / len(seconds), job.sequences * job.seq_len
    peak = None if job.smoke else trainer.peak_flops
    found = break_down(trace(trainer, Path(job.folder) / "trace.json"), TRACED)
    result: Result = {
        "flavor": job.flavor,
        "implementation": job.implementation,
        "kernels": next(plan.describe() for plan in trainer.plans if plan.name == "kernels"),
        "compiled": config.compile.enable,
        "parameters": shape.total_params,
        "micro_batch": micro_batch,
        "accumulation": trainer.accumulation,
        "tokens_per_step": tokens,
        "first_step_seconds": first_step,
        "step_seconds": seconds,
        "tokens_per_second": tokens / step,
        "peak_bytes": memory.peak,
        "expected_peak_bytes": expected,
        "device_bytes": memory.total,
        "first_loss": first_loss,
        "last_loss": last_loss,
        "loss_ranges": found.loss_ranges,
        "kernels_per_step": found.kernels,
        "class_seconds": found.classes if found.kernels else None,
        "longest_kernels": found.longest,
        "machine": describe(torch.device(job.device)),
    }
    if peak is not None:
        result |= against_peak(found.classes, step, tokens, trainer.flops, peak)
    trainer.close()
    return result


def timed(trainer: Trainer, steps: int) -> tuple[list[float], float]:
    """Seconds of each step, none of which waits for the device, and the last loss."""
    if trainer.world.device.type == "cpu":
        marks = [time.perf_counter()]
        for _ in range(steps):
            loss, *_ = trainer.train_step()
            marks.append(time.perf_counter())
        return [after - before for before, after in itertools.pairwise(marks)], loss.item()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
    torch.cuda.synchronize()
    events[0].record()
    for event in events[1:]:
        loss, *_ = trainer.train_step()
        event.record()
    torch.cuda.synchronize()
    return [before.elapsed_time(after) / 1000 for before, after in itertools.pairwise(events)], loss.item()


def trace(trainer: Trainer, path: Path) -> list[dict[str, Any]]:
    """Events of TRACED steps. One step is taken before, for the collector's start is slow."""
    on_gpu = trainer.world.device.type == "cuda"
    with torch.profiler.profile(
        activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])],
        schedule=torch.profiler.schedule(wait=0, warmup=1, active=TRACED, repeat=1),
        on_trace_ready=lambda profiler: profiler.export_chrome_trace(str(path)),
    ) as profiler:
        for _ in range(1 + TRACED):
            trainer.train_step()
            if on_gpu:
                torch.cuda.synchronize()  # so that no kernel of another step is in the trace
            profiler.step()
    return json.loads(path.read_text(encoding="utf-8"))["traceEvents"]


def against_peak(classes: dict[str, float], step: float, tokens: int, flops: FlopsPerToken, peak: float) -> Result:
    """MFU by both conventions, and where the rest of the step goes by the "full" one."""
    speed, attention = tokens / step, 2 * (flops.full - flops.causal)
    ideal = [tokens * each / peak for each in (flops.full - attention, attention)]
    return {
        "peak_flops": peak,
        "mfu_full": mfu(speed, flops.full, peak),
        "mfu_causal": mfu(speed, flops.causal, peak),
        "where_the_rest_goes": where_it_goes(classes, step, *ideal) if any(classes.values()) else None,
    }


if __name__ == "__main__":
    main()
