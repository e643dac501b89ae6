"""Two runs of one folder, a launcher's leftovers in the environment, modules that lie in the working directory."""

import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from harm import Died, Job, Process, Row, children
from helpers import TinyData

LISTENING = "0A"
# As the kernel's tables write 127.0.0.1, ::1 and ::ffff:127.0.0.1 on a little-endian machine.
LOOPBACK = {"tcp": ("0100007F",), "tcp6": ("0" * 24 + "01000000", "0" * 16 + "FFFF00000100007F")}
LEFT_OVER: tuple[dict[str, str], ...] = (
    {"RANK": "1"},
    {"RANK": "0", "WORLD_SIZE": "2"},
    {"RANK": "abc", "WORLD_SIZE": "1"},
    {"RANK": "-1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"},
    {"RANK": "2", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"},
    {"RANK": "", "WORLD_SIZE": "2"},
    {"LOCAL_RANK": "1"},
    {"SLURM_JOB_ID": "1", "SLURM_STEP_ID": "0", "SLURM_NTASKS": "2", "SLURM_PROCID": "1", "SLURM_LOCALID": "1"},
    {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_LOCAL_RANK": "1"},
    {"PMI_SIZE": "2", "PMI_RANK": "1"},
)
LONG = {"training.steps": 100_000, "checkpoint.interval": 4}


def one_owner(where: Path, data: TinyData) -> Row:
    """A second start beside a run, a start behind a killed one, two at once behind a killed one, a stolen lock."""
    tries: dict[str, Callable[[Path, TinyData], list[str]]] = {
        "a second start": _second,
        "behind a kill": _behind_a_kill,
        "two behind a kill": _two_behind_a_kill,
        "behind a stop": _behind_a_stop,
        "one checkpoint folder, two run folders": _shared_checkpoints,
        "the lock taken away": _robbed,
    }
    failures = []
    for name, attempt in tries.items():
        try:
            failures += [f"{name}: {wrong}" for wrong in attempt(where / name.replace(" ", "-"), data)]
        except Died as error:
            failures.append(f"{name}: {error}")
    what = "one owner each time, the other named in one line with host and pid; the end bitwise equal"
    return Row("two runs in one folder", len(tries), failures, what)


def left_over_variables(where: Path, data: TinyData) -> Row:
    """Rank variables that are left over, contradict each other or are of another launcher: one line, nothing made."""
    failures = []
    for number, variables in enumerate(LEFT_OVER):
        job = Job(where / str(number), data, {"training.steps": 1})
        with job.started(**variables) as process:
            code = process.end()
        wrong = refused(code, process.said)
        wrong += [f"left {sorted(path.name for path in job.run.iterdir())}"] if job.run.exists() else []
        failures += [f"{variables}: {each}" for each in wrong]
    what = f"{len(LEFT_OVER) - len(failures)} of {len(LEFT_OVER)} refused in one line; nothing made"
    return Row("rank variables left over or of another launcher", len(LEFT_OVER), failures, what)


def hostile_cwd(where: Path, data: TinyData) -> Row:
    """Modules in the folder that the command is called from are not run; one node's ranks listen on loopback alone."""
    failures = []
    for ranks in (1, 2):
        job = Job(where / str(ranks), data, {"training.steps": 10_000}, ranks)
        proof = where / f"executed-{ranks}"
        for name in ("tomli", "tomllib", "torch", "numpy", "sitecustomize", "yaml", "rich", "json"):
            (job.run.parent / f"{name}.py").write_text(f"open({str(proof)!r}, 'a').write({name!r})\n")
        with job.started() as process:
            process.wait_until(lambda job=job: job.step > 1, "a step")
            failures += [f"{ranks} ranks listen on {place}" for place in _listeners(process)]
            process.popen.send_signal(signal.SIGTERM)
            code = process.end()
        failures += [] if code == os.EX_TEMPFAIL else [f"code {code}: {process.said[-1000:]}"]
        failures += [f"executed {proof.read_text()}"] if proof.exists() else []
    return Row("modules in the working directory; open ports", 2, failures, "none executed, loopback alone")


def refused(code: int, said: str) -> list[str]:
    """What is wrong with a refusal: exit code 2 and one line are right."""
    found = [] if code == 2 else [f"code {code}: {said[-1500:]}"]
    errors = [line for line in said.splitlines() if line.startswith("error")]
    if "Traceback" in said or len(errors) != 1:
        found.append(f"said {said[-1500:]}")
    return found


def _second(where: Path, data: TinyData) -> list[str]:
    job = Job(where, data, LONG)
    with job.started() as first:
        first.wait_until(lambda: job.step > 1, "a step")
        found = []
        for ranks in (1, 2):
            job.ranks = ranks
            with job.started() as second:
                found += _names_the_owner(second.end(), second, first)
        before = job.step
        first.wait_until(lambda: job.step > before + 2, "further steps")
        first.popen.send_signal(signal.SIGTERM)
        code = first.end()
    return found + ([] if code == os.EX_TEMPFAIL else [f"the first ended with {code}"]) + job.torn()


def _names_the_owner(code: int, second: Process, first: Process) -> list[str]:
    said = second.said
    own = {first.popen.pid, *children(first.popen.pid)}
    named = socket.gethostname() in said and any(str(pid) in said for pid in own)
    return refused(code, said) + ([] if named else [f"names no owner: {said[-500:]}"])


def _behind_a_kill(where: Path, data: TinyData) -> list[str]:
    straight, job = (Job(where / name, data, {"training.steps": 12}) for name in ("straight", "killed"))
    straight.finish()
    with job.started() as process:
        process.wait_until(lambda: bool(job.saved()), "a checkpoint")
        process.popen.kill()
        process.end()
    job.finish()
    return job.unlike(straight, 12)


def _two_behind_a_kill(where: Path, data: TinyData) -> list[str]:
    job = Job(where, data, LONG)
    with job.started() as process:
        process.wait_until(lambda: bool(job.saved()), "a checkpoint")
        process.popen.kill()
        process.end()
    jobs = []
    for name in ("left", "right"):
        twin = Job(where / name, data, LONG | {"job.dump_folder": str(job.run)})
        twin.run, twin.root = job.run, job.root
        jobs.append(twin)
    codes: list[int] = []
    with ExitStack() as stack:
        both = [stack.enter_context(twin.started()) for twin in jobs]
        while len(codes) < 1:
            codes = [code for process in both if (code := process.popen.poll()) is not None]
            time.sleep(0.1)
        before = job.step
        winner = next(process for process in both if process.popen.poll() is None)
        winner.wait_until(lambda: job.step > before + 2, "further steps")
        winner.popen.send_signal(signal.SIGTERM)
        codes.append(winner.end())
    return ([] if codes == [2, os.EX_TEMPFAIL] else [f"codes {codes}"]) + job.torn()


def _behind_a_stop(where: Path, data: TinyData) -> list[str]:
    job = Job(where, data, LONG)
    found = []
    for _ in range(2):
        before = job.step
        with job.started() as process:
            process.wait_until(lambda before=before: job.step > before + 1, "a step")
            process.popen.send_signal(signal.SIGTERM)
            code = process.end()
        found += [] if code == os.EX_TEMPFAIL else [f"code {code}: {process.said[-500:]}"]
    return found + job.torn()


def _shared_checkpoints(where: Path, data: TinyData) -> list[str]:
    shared = {**LONG, "checkpoint.folder": str(where / "shared")}
    first, second = (Job(where / name, data, shared) for name in ("first", "second"))
    with first.started() as running:
        running.wait_until(lambda: first.step > 1, "a step")
        with second.started() as refusal:
            found = _names_the_owner(refusal.end(), refusal, running)
    return found


def _robbed(where: Path, data: TinyData) -> list[str]:
    job = Job(where, data, LONG | {"checkpoint.interval": 10})
    with job.started() as process:
        process.wait_until(lambda: job.step > 1, "a step")
        path = job.run / "owner.json"
        taken = json.loads(path.read_text())
        aside = path.with_name("taken")
        aside.write_text(json.dumps({**taken, "token": "another", "host": "elsewhere", "pid": 1}))
        keep = threading.Event()

        def renew() -> None:  # as its new owner would
            while not keep.wait(1):
                os.utime(path)

        aside.replace(path)
        renewing = threading.Thread(target=renew)
        renewing.start()
        try:
            before = job.saved()
            code = process.end()
        finally:
            keep.set()
            renewing.join()
        found = [] if job.saved() == before else [f"saved {job.saved()} after it had lost the folder"]
    errors = [line for line in process.said.splitlines() if line.startswith("error")]
    found += [] if code and len(errors) == 1 and "Traceback" not in process.said else [f"{code}: {process.said[-800:]}"]
    return found if json.loads(path.read_text())["token"] == "another" else [*found, "took its lock back"]


def _listeners(process: Process) -> list[str]:
    """Addresses beyond loopback on which a command's processes listen."""
    pids = {process.popen.pid, *process.ranks()}
    own = set()
    for pid in pids:
        for descriptor in Path(f"/proc/{pid}/fd").iterdir():
            try:
                own.add(os.readlink(descriptor))
            except OSError:
                continue
    found = []
    for table, loopback in LOOPBACK.items():
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == LISTENING and f"socket:[{fields[9]}]" in own:
                address = fields[1].partition(":")[0]
                found += [] if address in loopback else [f"{table} {fields[1]}"]
    return found
