"""What the contestants share: what is measured, and how a contestant is driven. Standard library only.

A contestant is a program that builds its trainer, does a few warm-up steps, prints one JSON line that describes it,
and then waits: each line on stdin holds a number of steps, which it runs and answers with one JSON line. So several can
stay loaded and take turns, and drift of the machine hits all of them. By hand:

    echo 3 | python benchmarks/contestants/reference.py --cell fp32-eager
"""

import argparse
import json
import os
import resource
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

LR, BETAS, WEIGHT_DECAY, MAX_NORM = 3e-4, (0.9, 0.95), 0.1, 1.0


@dataclass(frozen=True)
class Sizes:
    """A tied Llama and the batch of one step."""

    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    ffn_dim: int
    vocab_size: int
    seq_len: int
    batch: int

    @property
    def head_dim(self) -> int:
        """Size of one attention head."""
        return self.dim // self.n_heads

    @property
    def tokens(self) -> int:
        """Tokens of one step."""
        return self.batch * self.seq_len

    @property
    def matrices(self) -> dict[tuple[int, int], int]:
        """(inputs, outputs) of each weight matrix that tokens are multiplied with → how many such there are."""
        kv_dim = self.n_kv_heads * self.head_dim
        found: dict[tuple[int, int], int] = {}
        for shape, count in (
            ((self.dim, self.dim), 2 * self.n_layers),
            ((self.dim, kv_dim), 2 * self.n_layers),
            ((self.dim, self.ffn_dim), 2 * self.n_layers),
            ((self.ffn_dim, self.dim), self.n_layers),
            ((self.dim, self.vocab_size), 1),
        ):
            found[shape] = found.get(shape, 0) + count
        return found

    @property
    def gemm_flops(self) -> int:
        """FLOPs of one step's matrix products, forward and backward, without attention: 6 per weight and token."""
        return 6 * self.tokens * sum(inputs * outputs * count for (inputs, outputs), count in self.matrices.items())


FULL = Sizes(384, 12, 6, 3, 1536, 32768, seq_len=512, batch=4)
"""titanling's minilingua_30m with a vocabulary of 32,768."""
SMOKE = Sizes(32, 2, 4, 2, 64, 320, seq_len=64, batch=2)


@dataclass(frozen=True)
class Cell:
    """Precision and compilation of a measurement."""

    precision: str
    """fp32; bf16-autocast: float32 parameters, bfloat16 products; bf16-parameters: everything held in bfloat16."""
    compiled: bool


CELLS = {
    f"{precision}-{mode}": Cell(precision, mode == "compiled")
    for precision in ("fp32", "bf16-autocast", "bf16-parameters")
    for mode in ("eager", "compiled")
}


@dataclass(frozen=True)
class GpuJob:
    """One configuration of train_gpu.py, for one process, which answers with a file: titanling_gpu.py."""

    flavor: str
    implementation: str
    device: str
    steps: int
    smoke: bool
    folder: str
    micro_batch: int = 0
    """Sequences; 0: as many as the planner expects to fit."""

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.flavor}, {self.implementation}"

    @property
    def seq_len(self) -> int:
        """Tokens of a sequence."""
        return 64 if self.smoke else 2048

    @property
    def sequences(self) -> int:
        """Of a step."""
        return 4 if self.smoke else 16

    @property
    def answer(self) -> Path:
        """Where the process leaves its results, as JSON."""
        return Path(self.folder) / "answer.json"


class Session:
    """The driver's end of a contestant. Takes stdout for itself: what libraries print goes to stderr."""

    def __init__(self, description: str) -> None:
        """Read the command line: attributes `cell`, `smoke` and `sizes`."""
        parser = argparse.ArgumentParser(description=description, epilog=__doc__.splitlines()[0])
        parser.add_argument("--cell", choices=CELLS, default="fp32-eager")
        parser.add_argument("--warmup", type=int, default=1, help="steps before the first window (default 1)")
        parser.add_argument("--smoke", action="store_true", help="a tiny model")
        arguments = parser.parse_args()
        self.cell = CELLS[arguments.cell]
        self.smoke = arguments.smoke
        self.sizes = SMOKE if self.smoke else FULL
        self._warmup = max(1, arguments.warmup)
        self._out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        self._hello: dict[str, object] = {}
        self._steps = 0
        self._window = 0
        self._seconds: list[float] = []

    def ready(self, parameters: int, compute_dtype: str, threads: int, **versions: str) -> None:
        """Describe the contestant, once everything is built and before the first step."""
        self._hello = {
            "parameters": parameters,
            "compute_dtype": compute_dtype,
            "threads": threads,
            "versions": versions,
            "sizes": asdict(self.sizes),
            "rss_before_steps": peak_rss(),
        }
        self._mark = time.perf_counter()

    def step_done(self, loss: float, seconds: float | None = None) -> bool:
        """Call after every step; False when it was the last. Waits for the driver between windows.

        `loss` is anything that `float` takes, and is only read where nothing is being timed. `seconds` replaces the
        time since the last step.
        """
        now = time.perf_counter()
        self._steps += 1
        self._seconds.append(now - self._mark if seconds is None else seconds)
        if self._steps == 1:
            self._hello |= {"first_step_seconds": process_age(), "first_loss": float(loss)}
        if self._steps == self._warmup:
            self._say(self._hello)
        elif self._steps < self._warmup or len(self._seconds) < self._window:
            self._mark = time.perf_counter()
            return True
        else:
            self._say({"seconds": self._seconds, "loss": float(loss), "peak_rss": peak_rss()})
        line = sys.stdin.readline().strip()
        self._window, self._seconds = int(line or 0), []
        self._mark = time.perf_counter()
        return self._window > 0

    def _say(self, message: dict[str, object]) -> None:
        print(json.dumps(message), file=self._out, flush=True)


def peak_rss() -> int:
    """The most RAM in bytes that this process has held. Linux counts it in kibibytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def process_age() -> float:
    """Seconds since this process began, imports included (proc(5): field 22 of stat, in clock ticks since boot)."""
    with open("/proc/self/stat", encoding="utf-8") as stat, open("/proc/uptime", encoding="utf-8") as uptime:
        ticks = int(stat.read().rpartition(")")[2].split()[19])
        return float(uptime.read().split()[0]) - ticks / os.sysconf("SC_CLK_TCK")
