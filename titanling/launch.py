"""Starts one training process per device on this node, and ends with their exit code.

    NGPU=2 python -m titanling.launch -- --config train_configs/debug.toml
    NGPU=8 NNODES=4 NODE_RANK=0 MASTER_ADDR=node0 python -m titanling.launch -- --config FILE      (on each node)

Everything after `--` goes to the program (`--module NAME`, default titanling.train). Each process gets the variables
that `torchrun` sets and torch.distributed's `env://` start-up reads: RANK, LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE,
GROUP_RANK, MASTER_ADDR, MASTER_PORT. `torchrun -m titanling.train` works as well; this launcher exists because our
exit codes are promises, and torchrun (torch.distributed.elastic, 2.11 to 2.13) turns every
failure into code 1 with a banner, forgets its children's codes when it is signalled, and kills them 30 s later even in
the middle of a save. It stays free of torch, so that it costs no start-up time and no memory.
"""

if __name__ == "__main__":
    from titanling import environment

    environment.require()

import argparse
import ctypes
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType

from titanling.cli import run
from titanling.errors import FAILED_NUMERICALLY, UserError
from titanling.ranks import Topology, topology

GRACE_SECONDS = 0.75
"""How long the other processes may take to end after one has failed: they usually hang in a collective with it, and
a save that they have under way can never be whole."""
POLL_SECONDS = 0.02
UNHURRIED = (None, os.EX_TEMPFAIL, FAILED_NUMERICALLY)
FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)
# Below Linux's range of ephemeral ports, so that no outgoing connection takes the port before rank 0 listens on it.
PORTS = range(15000, 32000)
PR_SET_PDEATHSIG = 1
START = Path(__file__).resolve().with_name("start.py")


def worker_environment(topology: Topology, local_rank: int, port: int) -> dict[str, str]:
    """Environment of the process `local_rank` of this node."""
    environment = os.environ | {
        "RANK": str(topology.node_rank * topology.local_size + local_rank),
        "LOCAL_RANK": str(local_rank),
        "WORLD_SIZE": str(topology.nodes * topology.local_size),
        "LOCAL_WORLD_SIZE": str(topology.local_size),
        "GROUP_RANK": str(topology.node_rank),
        "MASTER_ADDR": topology.address,
        "MASTER_PORT": str(port),
    }
    if "PYTHONPATH" in environment:  # an empty entry would be the working folder
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, environment["PYTHONPATH"].split(os.pathsep)))
    # torch takes every core in every process otherwise.
    environment.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // topology.local_size)))
    return environment


def command_of(module: str, arguments: list[str]) -> list[str]:
    """The command that runs a module, wherever it is called: no file of the working folder is ever imported."""
    return [sys.executable, str(START), module, *arguments]


class Group:
    """The processes of this node, from start to the exit code of the first that failed."""

    def __init__(self, command: list[str], topology: Topology) -> None:
        """Start `command` once per local rank; signals to this process go to all of them from now on."""
        self._stops = 0
        self._early: list[int] | None = []
        self._processes: list[subprocess.Popen[bytes]] = []
        self._first_rank = topology.node_rank * topology.local_size
        for number in FORWARDED:
            if signal.getsignal(number) != signal.SIG_IGN:  # nohup's wish holds for the processes too
                signal.signal(number, self._forward)
        port = topology.port or free_port()
        for local_rank in range(topology.local_size):
            environment = worker_environment(topology, local_rank, port)
            # A session each: Ctrl-C in a terminal reaches them once, through us, and helpers can be ended with them.
            self._processes.append(
                subprocess.Popen(command, env=environment, start_new_session=True, preexec_fn=_die_with(os.getpid()))
            )
        early, self._early = self._early, None
        for number in early or ():
            self._forward(number, None)

    def wait(self) -> int:
        """Wait for all; return 0, or the code of the first to fail (128 + n if signal n killed it).

        75 (EX_TEMPFAIL) and 3 are for a program that ended after saving: the others are about to end as well and may
        still be writing, so nobody is hurried. After any other failure they have GRACE_SECONDS to end by themselves; if
        a signal was the reason, none, for they could only say once more, and later, what we have said.
        """
        first_failure: int | None = None
        deadline = float("inf")
        while None in [process.poll() for process in self._processes]:
            if first_failure is None and (first_failure := self._failure()) not in UNHURRIED:
                deadline = time.monotonic() + (0 if first_failure < 0 and not self._stops else GRACE_SECONDS)
            if time.monotonic() >= deadline:
                self._send(signal.SIGKILL)
            time.sleep(POLL_SECONDS)
        first_failure = first_failure or self._failure()
        self._end_helpers()
        if first_failure is None:
            return 0
        return 128 - first_failure if first_failure < 0 else first_failure

    def _failure(self) -> int | None:
        """Return code of a failed process; a signal's (negative) before a mere error, which it may have caused."""
        codes = [process.returncode for process in self._processes]
        worst = min((code for code in codes if code), default=None)
        if worst is not None and worst < 0 and not self._stops:
            name = signal.Signals(-worst).name if -worst in set(signal.Signals) else f"signal {-worst}"
            hint = " (out of memory?)" if worst == -signal.SIGKILL else ""
            rank = self._first_rank + codes.index(worst)
            print(f"error: rank {rank} was killed by {name}{hint}", file=sys.stderr, flush=True)
        return worst

    def _send(self, number: int) -> None:
        for process in self._processes:
            process.send_signal(number)  # does nothing for a process that has ended

    def _forward(self, number: int, frame: FrameType | None) -> None:
        """Pass a signal on. They save and stop by themselves; the third SIGTERM or SIGINT means: at once."""
        if self._early is not None:
            self._early.append(number)  # a process that is just being made could miss it
            return
        self._stops += number in (signal.SIGTERM, signal.SIGINT)
        self._send(number if self._stops < 3 else signal.SIGKILL)

    def _end_helpers(self) -> None:
        """Kill what the processes themselves started and left, such as compiler workers."""
        for process in self._processes:
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except (ProcessLookupError, PermissionError):
                pass


def free_port() -> int:
    """A TCP port of 127.0.0.1 that nothing listens on now."""
    for port in random.SystemRandom().sample(PORTS, 100):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise UserError(f"no free TCP port found in {PORTS.start}…{PORTS.stop - 1}: end programs that hold them")


def main() -> int:
    """Parse the command line, run the processes, return their exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m titanling.launch",
        description="Start one process per device on this node and end with their exit code. Environment: NGPU"
        " (processes on this node), NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT.",
        epilog="example: NGPU=2 python -m titanling.launch -- --config train_configs/debug.toml",
    )
    parser.add_argument("--module", default="titanling.train", help="module to run (default: %(default)s)")
    parser.usage = "%(prog)s [--module NAME] -- [arguments of the module]"
    split = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    module = parser.parse_args(sys.argv[1:split]).module
    places, command = topology(), command_of(module, sys.argv[split + 1 :])
    if places.size == 1:
        sys.stdout.flush()
        os.execv(command[0], command)  # nobody to look after
    return Group(command, places).wait()


def _die_with(parent: int) -> Callable[[], None]:
    """Preparation of a child: the kernel kills it if this launcher dies without a chance to pass the word on."""
    libc = ctypes.CDLL(None, use_errno=True)

    def prepare() -> None:
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os.kill(os.getpid(), signal.SIGKILL)

    return prepare


if __name__ == "__main__":
    run(main, "the same command goes on from the last checkpoint, if one was saved")
