"""What the benchmark scripts share: contestants as child processes, the machine's description, the results' file."""

import json
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

BENCHMARKS = Path(__file__).resolve().parent
ROOT = BENCHMARKS.parent
PEERS = BENCHMARKS / ".peers"

# Contestant → its program and the environment of setup_peers.sh that it runs in (None: this Python's).
PROGRAMS: dict[str, tuple[str, str | None]] = {
    "titanling": ("titanling_run.py", None),
    "reference": ("reference.py", None),
    "hf": ("hf_trainer.py", "huggingface"),
    "litgpt": ("litgpt_run.py", "litgpt"),
    "gemm": ("gemm.py", None),
}
OURS = ("titanling", "reference")


class ContestantFailed(Exception):
    """A contestant ended without an answer."""


class Contestant:
    """One trainer in a process of its own (contestants/protocol.py says how they talk). A context manager.

    `hello` is what it says of itself after its warm-up steps: parameters, compute_dtype, versions, first_loss,
    first_step_seconds, rss_before_steps.
    """

    def __init__(self, name: str, cell: str, folder: Path, warmup: int = 1, smoke: bool = False) -> None:
        """Start it and wait for its warm-up. Its log and compiler cache go to `folder`. Raises ContestantFailed."""
        self.name = name
        program, _ = PROGRAMS[name]
        self._log = folder / f"{name}-{cell}.log"
        command = [str(python_of(name)), str(BENCHMARKS / "contestants" / program), "--cell", cell]
        command += ["--warmup", str(warmup), *(["--smoke"] if smoke else [])]
        with open(self._log, "w", encoding="utf-8") as log:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=environment(TORCHINDUCTOR_CACHE_DIR=str(folder / f"{name}-{cell}-cache")),
            )
        self.hello: dict[str, Any] = self._answer()

    def window(self, steps: int) -> dict[str, Any]:
        """Run `steps` steps: {"seconds": [one each], "loss": of the last, "peak_rss": bytes}."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{steps}\n")
        self._process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        """Let it end, by force if it must."""
        try:
            self._process.communicate(timeout=30)  # closes its stdin: no more windows
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.communicate()

    def __enter__(self) -> "Contestant":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if line:
            return json.loads(line)
        self.close()
        last = self._log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
        raise ContestantFailed(f"{self.name} ended with code {self._process.returncode}: {' '.join(last)}")


def python_of(contestant: str) -> Path:
    """The Python that runs a contestant."""
    _, peer = PROGRAMS[contestant]
    return Path(sys.executable) if peer is None else PEERS / peer / "bin" / "python"


def installed(contestant: str) -> bool:
    """Whether a contestant can be run here."""
    return python_of(contestant).exists()


def environment(**changes: str) -> dict[str, str]:
    """This process's environment for a child: the CPU only, no network, the checkout importable, `changes`."""
    fixed = {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    # Contestants import what lies beside them, which PYTHONSAFEPATH would forbid.
    return {name: value for name, value in (os.environ | fixed | changes).items() if name != "PYTHONSAFEPATH"}


def machine() -> dict[str, Any]:
    """Where and how a result came about: date, CPU, versions, load before the start, command."""
    load = os.getloadavg()[0]
    if load > 0.5:
        say(f"warning: the load of this machine is {load:.1f}: times will be too long")
    return {
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "cpu": _cpu_name(),
        "cpus": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": platform.platform(),
        "python": platform.python_version(),
        "load_before": load,
        "command": shlex.join(["python", os.path.relpath(sys.argv[0], ROOT), *sys.argv[1:]]),
    }


def say(message: str) -> None:
    """Progress, on stderr."""
    print(message, file=sys.stderr, flush=True)


def write_json(path: str | None, results: Mapping[str, Any]) -> None:
    """Write results to `path`, if there is one."""
    if path is not None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
        print(f"written: {path}")


def _cpu_name() -> str:
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
    return names[0] if names else platform.machine()
