"""One command of ours in a child process: in a folder of its own, with limits, and watched for what it opens.

A command may refuse what it is given, in one line and with exit code 2; everything else that it should not do is told.
"""

import os
import re
import resource
import runpy
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple, NoReturn

from helpers import LAUNCHER, ROOT

SECONDS = 60
"""An input that takes longer, though it is small, counts as a hang; the machine may be busy."""
MEMORY_BYTES = 2 << 30
"""More than the process had, for data of some kilobytes."""
FILE_BYTES = 64 << 20
LONGEST_MESSAGE = 3200
READABLE = tuple(
    os.path.realpath(path)
    for path in (ROOT, sys.prefix, sys.base_prefix, "/proc", "/sys", "/dev", "/etc", "/usr", "/lib", "/lib64", "/bin")
)
"""Where code and the system are; reading there is no fault."""
WRITES = {"os.remove", "os.rmdir", "os.mkdir", "os.rename", "os.truncate", "os.chmod", "os.link", "os.symlink"}
CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")
ESCAPED = "outside of its folder"


class Result(NamedTuple):
    """What a command did."""

    faults: list[str]
    """In words; none if it behaved."""
    code: int
    output: str
    """stdout and stderr."""


def run(command: Sequence[str], folder: Path, codes: Sequence[int], confined: bool) -> Result:
    """Run `command`, a script of ours or `-m MODULE` with arguments, in a folder.

    `codes` are the exit codes that it may end with beside 0 and 2. If `confined` it may not even read elsewhere.
    """
    out, err, notes = (folder.with_name(f"{folder.name}.{name}") for name in ("out", "err", "notes"))
    child = os.fork()
    if not child:
        _behave(command, folder, out, err, notes, confined)
    status, hung = _wait(child)
    said, complained = (path.read_bytes().decode(errors="replace") for path in (out, err))
    faults = notes.read_text(errors="replace").splitlines() if notes.exists() else []
    for path in (out, err, notes):
        path.unlink(missing_ok=True)
    code = os.waitstatus_to_exitcode(status)
    faults += _judge(code, said, complained, codes) if not hung else [f"still running after {SECONDS} s"]
    return Result(sorted(set(faults)), code, said + complained)


def _judge(code: int, said: str, complained: str, codes: Sequence[int]) -> Sequence[str]:
    last = complained.strip().rpartition("\n")[2]
    if "Traceback (most recent call last)" in complained + said:
        return [f"traceback: {last[:300]}"]
    if code not in (0, 2, *codes):
        return [f"exit code {code}: {last[:300]}"]
    lines = [line for line in complained.splitlines() if not line.startswith("warning: ")]
    faults = []
    if code == 2 and not (len(lines) == 1 or complained.startswith("usage: ")):
        faults.append(f"{len(lines)} lines instead of one: {last[:300]}")
    if complained.startswith("usage: "):  # argparse quotes what was typed, as it was
        return faults
    if CONTROLS.search(complained + said):
        faults.append("control bytes reach the terminal")
    if max(map(len, [*lines, ""])) > LONGEST_MESSAGE:
        faults.append(f"a message of {max(map(len, lines)):,} characters")
    return faults


def _wait(child: int) -> tuple[int, bool]:
    """Its status, and whether it had to be killed."""
    began = time.monotonic()
    hung = False
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return status, hung
        if not hung and time.monotonic() - began > SECONDS:
            hung = True
            with suppress(ProcessLookupError):
                os.killpg(child, signal.SIGKILL)
        time.sleep(0.002)


def _behave(command: Sequence[str], folder: Path, out: Path, err: Path, notes: Path, confined: bool) -> NoReturn:
    """The child's part."""
    code = 1
    try:
        os.setsid()
        for number, path in ((0, os.devnull), (1, out), (2, err)):
            os.dup2(os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC), number)
        sys.stdout, sys.stderr = (open(number, "w", encoding="utf-8", closefd=False) for number in (1, 2))
        for name in LAUNCHER:
            os.environ.pop(name, None)
        os.environ["TMPDIR"] = str(folder)
        os.chdir(folder)
        resource.setrlimit(resource.RLIMIT_AS, (_address_space() + MEMORY_BYTES,) * 2)
        resource.setrlimit(resource.RLIMIT_FSIZE, (FILE_BYTES,) * 2)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        sys.addaudithook(_watch(os.path.realpath(folder), os.open(notes, os.O_WRONLY | os.O_CREAT, 0o600), confined))
        module, *sys.argv = command if command[0] != "-m" else command[1:]
        sys.argv.insert(0, module)
        if command[0] == "-m":
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(str(ROOT / module), run_name="__main__")
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    except BaseException:
        traceback.print_exc()
    finally:
        with suppress(BaseException):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code & 0xFF)


def _address_space() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def _watch(folder: str, notes: int, confined: bool) -> Callable[[str, tuple], None]:
    """An audit hook that notes what is opened or changed elsewhere."""

    def beneath(path: str, roots: Sequence[str]) -> bool:
        return any(path == root or path.startswith(root + os.sep) for root in roots)

    def hook(event: str, arguments: tuple) -> None:
        if event != "open" and event not in WRITES:
            return
        writes = event in WRITES or bool((arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
        paths = arguments[:2] if event in ("os.rename", "os.link", "os.symlink") else arguments[:1]
        for given in paths:
            if not isinstance(given, (str, bytes)) or (event == "os.symlink" and given is arguments[0]):
                continue
            path = os.path.abspath(os.fsdecode(given))
            # Only opening follows a link in the last place.
            path = os.path.join(os.path.realpath(os.path.dirname(path)), os.path.basename(path))
            path = os.path.realpath(path) if event == "open" else path
            above = not writes and beneath(folder, (path,))  # as what makes a folder's name durable is opened
            if above or beneath(path, (folder, "/dev")) or (not writes and (not confined or beneath(path, READABLE))):
                continue
            os.write(notes, f"{event} {path[:200]!r} {ESCAPED}\n".encode())

    return hook
