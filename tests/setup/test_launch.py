"""titanling.launch with tiny programs: exit codes, signals, no process left behind."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

Write = Callable[[str], dict[str, str]]
LAUNCH = [sys.executable, "-m", "titanling.launch", "--module", "worker", "--"]
# Rank 1 fails; rank 0 would hang in a collective with it.
ONE_FAILS = """
import os, signal, sys, time
if os.environ["RANK"] == "1":
    {failure}
time.sleep(300)
"""
SAVES_ON_SIGTERM = """
import os, signal, sys, time
def save(number, frame):
    time.sleep(float(os.environ["RANK"]))
    print("saved", os.environ["RANK"], flush=True)
    sys.exit(75)
signal.signal(signal.SIGTERM, save)
print("ready", os.getpid(), flush=True)
time.sleep(300)
"""
HANGS = """
import os, signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
signal.signal(signal.SIGINT, signal.SIG_IGN)
print("ready", os.getpid(), flush=True)
time.sleep(300)
"""


def launch(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the launcher to its end."""
    return subprocess.run([*LAUNCH, *arguments], env=environment, capture_output=True, text=True, timeout=40)


def start(environment: dict[str, str], processes: int = 2) -> tuple[subprocess.Popen[str], list[int]]:
    """Start the launcher; return it and the pids of its processes once each has printed `ready`."""
    launcher = subprocess.Popen(LAUNCH, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert launcher.stdout is not None
    return launcher, [int(launcher.stdout.readline().split()[1]) for _ in range(processes)]


def gone(pid: int) -> bool:
    """Whether a process has ended within a few seconds."""
    for _ in range(100):
        stat = Path(f"/proc/{pid}/stat")
        if not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z":
            return True
        time.sleep(0.05)
    return False


def test_environment_and_arguments(module: Write) -> None:
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR")
    # One write a line, so that the two processes' do not mix.
    source = f"import os, sys; values = [os.environ[n] for n in {names}]\n"
    source += r'sys.stdout.write(f"{values} {sys.argv[1:]}\n")'
    result = launch(module(source), "--config", "a b", "--", "c")
    assert result.returncode == 0
    assert sorted(result.stdout.splitlines()) == [
        "['0', '0', '2', '2', '0', '127.0.0.1'] ['--config', 'a b', '--', 'c']",
        "['1', '1', '2', '2', '0', '127.0.0.1'] ['--config', 'a b', '--', 'c']",
    ]


@pytest.mark.parametrize("code", [0, 1, 2, 3, 75])
def test_code_of_all(module: Write, code: int) -> None:
    result = launch(module(f"raise SystemExit({code})"))
    assert (result.returncode, result.stdout, result.stderr) == (code, "", "")


@pytest.mark.parametrize("code", [1, 2])
def test_code_of_one(module: Write, code: int) -> None:
    result = launch(module(ONE_FAILS.format(failure=f"sys.exit({code})")))
    assert (result.returncode, result.stdout, result.stderr) == (code, "", "")


def test_signal_of_one(module: Write) -> None:
    result = launch(module(ONE_FAILS.format(failure="os.kill(os.getpid(), signal.SIGKILL)")))
    assert (result.returncode, result.stderr) == (137, "error: rank 1 was killed by SIGKILL (out of memory?)\n")


def test_stopped_after_saving_hurries_nobody(module: Write) -> None:
    source = "import os, sys, time; time.sleep(2 * int(os.environ['RANK'])); print('end'); sys.exit(75)"
    result = launch(module(source))
    assert (result.returncode, result.stdout) == (75, "end\nend\n")


def test_sigterm_reaches_all(module: Write) -> None:
    launcher, pids = start(module(SAVES_ON_SIGTERM))
    launcher.send_signal(signal.SIGTERM)
    out, error = launcher.communicate(timeout=20)
    assert (launcher.returncode, out, error) == (75, "saved 0\nsaved 1\n", "")
    assert all(gone(pid) for pid in pids)


def test_nohup_holds(module: Write) -> None:
    ours = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # these tests may run under nohup themselves
    launcher, _ = start(module(SAVES_ON_SIGTERM))
    signal.signal(signal.SIGHUP, ours)
    launcher.send_signal(signal.SIGHUP)
    assert launcher.wait(20) == 128 + signal.SIGHUP
    environment = module(SAVES_ON_SIGTERM)
    ignoring = subprocess.Popen(["nohup", *LAUNCH], env=environment, stdout=subprocess.PIPE, text=True)
    assert ignoring.stdout is not None
    for _ in range(2):
        ignoring.stdout.readline()
    ignoring.send_signal(signal.SIGHUP)
    time.sleep(0.5)
    assert ignoring.poll() is None
    ignoring.terminate()
    assert ignoring.wait(20) == 75


def test_third_signal_kills(module: Write) -> None:
    launcher, pids = start(module(HANGS))
    for number in (signal.SIGINT, signal.SIGTERM):
        launcher.send_signal(number)
        time.sleep(0.3)
        assert launcher.poll() is None
    launcher.send_signal(signal.SIGINT)
    _, error = launcher.communicate(timeout=20)
    assert (launcher.returncode, error) == (137, "")
    assert all(gone(pid) for pid in pids)


@pytest.mark.slow
def test_hanging_process_is_killed(module: Write) -> None:
    source = "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + ONE_FAILS.format(failure="time.sleep(1); sys.exit(5)")
    started = time.monotonic()
    assert launch(module("import signal\n" + source)).returncode == 5
    assert time.monotonic() - started > 1.7  # it had a moment


def test_killed_launcher_leaves_no_process(module: Write) -> None:
    launcher, pids = start(module(HANGS))
    launcher.kill()
    launcher.communicate(timeout=20)
    assert all(gone(pid) for pid in pids)


def test_helpers_end_too(module: Write) -> None:
    source = "import subprocess; print('helper', subprocess.Popen(['sleep', '60']).pid, flush=True)"
    result = launch(module(source))
    pids = [int(line.split()[1]) for line in result.stdout.splitlines()]
    assert result.returncode == 0 and len(pids) == 2 and all(gone(pid) for pid in pids)


def test_two_nodes_all_reduce(module: Write) -> None:
    source = """
import torch, torch.distributed as dist
dist.init_process_group("gloo")
value = torch.tensor(2.0 ** dist.get_rank())
dist.all_reduce(value)
print(dist.get_rank(), dist.get_world_size(), value.item())
dist.barrier()
dist.destroy_process_group()
"""
    from titanling.launch import free_port

    nodes = {"NNODES": "2", "NGPU": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    environment = module(source) | nodes
    both = [
        subprocess.Popen(LAUNCH, env=environment | {"NODE_RANK": rank}, stdout=subprocess.PIPE, text=True)
        for rank in "01"
    ]
    texts = [process.communicate(timeout=100)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert texts == ["0 2 3.0\n", "1 2 3.0\n"]


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"NGPU": "two"}, "NGPU=two: must be a whole number, from 1 to 1,024"),
        ({"NGPU": "0"}, "NGPU=0"),
        ({"NNODES": "2"}, "NNODES=2 needs NODE_RANK"),
        ({"NNODES": "2", "NODE_RANK": "1"}, "needs MASTER_ADDR"),
        ({"NNODES": "2", "NODE_RANK": "2", "MASTER_ADDR": "a"}, "NODE_RANK=2: must be below NNODES=2"),
        ({"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "70000"}, "MASTER_PORT=70000"),
    ],
)
def test_bad_topology(module: Write, variables: dict[str, str], words: str) -> None:
    result = launch(module("") | variables)
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 1 and words in result.stderr


def test_threads_are_shared_out(module: Write) -> None:
    environment = module("import os; print(os.environ['OMP_NUM_THREADS'])")
    environment.pop("OMP_NUM_THREADS", None)
    share = str(max(1, len(os.sched_getaffinity(0)) // 2))
    assert launch(environment).stdout == f"{share}\n{share}\n"
    assert launch(environment | {"OMP_NUM_THREADS": "7"}).stdout == "7\n7\n"


def test_torch_stays_unloaded() -> None:
    code = "import sys, titanling.launch; raise SystemExit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2]).returncode == 0
