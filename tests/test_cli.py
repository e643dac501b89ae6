"""How a process that has other ranks ends: with its code and all it had to say, without taking Python down."""

import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT, clean_env

from titanling import cli
from titanling.interrupts import ENDING

INTERRUPTED = re.compile(r'run\(main, "(.+)"(?:, reports=True)?\)')

SOURCE = """
import atexit, sys
from titanling import cli

class TornDown:
    def __del__(self):
        print("torn down", file=sys.__stderr__)

kept = TornDown()

def main():
    atexit.register(lambda: print("in order"))
    print("done", end=" ")  # not flushed
    {last}

cli.run(main)
"""


@pytest.mark.parametrize(("last", "code"), [("return 75", 75), ("return None", 0), ("sys.exit(4)", 4), ("1 / 0", 1)])
def test_a_rank_ends_before_the_interpreter_is_taken_down(last: str, code: int) -> None:
    command = [sys.executable, "-c", SOURCE.format(last=last)]
    result = subprocess.run(command, env=clean_env(WORLD_SIZE="2"), capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (code, "done in order\n")
    assert "torn down" not in result.stderr and ("ZeroDivisionError" in result.stderr) == (last == "1 / 0")
    alone = subprocess.run(command, env=clean_env(), capture_output=True, text=True)
    assert (alone.returncode, alone.stdout) == (code, "done in order\n") and "torn down" in alone.stderr


def test_an_interrupted_command_says_what_is_left(capsys: pytest.CaptureFixture[str]) -> None:
    def main() -> int | None:
        raise KeyboardInterrupt

    handlers = {number: signal.getsignal(number) for number in ENDING}
    try:
        for words, said in (("nothing was written", "interrupted; nothing was written\n"), ("", "interrupted\n")):
            with pytest.raises(SystemExit) as ended:
                cli.run(main, words)
            assert (ended.value.code, capsys.readouterr().err) == (130, said)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def test_only_commands_that_train_promise_a_checkpoint() -> None:
    commands = [*(ROOT / "scripts").glob("*.py"), *(ROOT / "titanling").glob("*.py")]
    words = {path.name: found[1] for path in commands if (found := INTERRUPTED.search(path.read_text()))}
    assert {name for name, said in words.items() if "checkpoint" in said} == {"train.py", "launch.py"}
    assert {"convert_dcp_to_hf.py", "convert_hf_to_dcp.py", "prepare_data.py"} <= words.keys()


SPEAKS = """
import sys
from pathlib import Path
from titanling import cli

def main():
    print("result … ×")
    print("progress … ×", file=sys.stderr)

cli.run(main, reports=sys.argv[1:] == ["reports"])
"""


@pytest.mark.parametrize(
    ("redirection", "results", "reports"),
    [
        (">/dev/full", 2, 0),
        (">&-", 2, 0),
        ("<&- >&- 2>&-", 2, 0),
        ("2>/dev/full", 0, 0),
        ("2>&-", 0, 0),
        ("> >(true)", None, 0),  # a reader that has left; results may have been written before it did
    ],
)
def test_a_report_that_cannot_be_written_ends_nothing(redirection: str, results: int | None, reports: int) -> None:
    """But a result that cannot be is an error, in one line."""
    for arguments, expected in ((("results",), results), (("reports",), reports)):
        command = ["bash", "-c", f'"$0" -c "$1" "$2" {redirection}', sys.executable, SPEAKS, *arguments]
        done = subprocess.run(command, env=clean_env(), capture_output=True, text=True)
        assert expected is None or done.returncode == expected, (arguments, done)
        said = done.stdout + done.stderr
        assert "Traceback" not in said and "Exception ignored" not in said, said
        assert said.count("error: ") == (1 if expected == 2 and "2>&-" not in redirection else 0), said


def test_a_stream_that_cannot_encode_a_character_ends_nothing() -> None:
    done = subprocess.run(
        [sys.executable, "-c", SPEAKS], env=clean_env(PYTHONIOENCODING="ascii"), capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "result \\u2026 \\xd7\n", "progress \\u2026 \\xd7\n")


WAITS = """
import sys, threading, time
from pathlib import Path
from titanling import cli, files, interrupts

def main():
    with files.new_folder(Path(sys.argv[1]) / "out") as folder:
        (folder / "half").touch()
        threading.Thread(target=threading.Event().wait).start()  # nobody will end it
        print("ready", flush=True)
        while True:
            try:
                time.sleep(60)
            except BaseException:
                if sys.argv[2] == "hears":
                    raise

interrupts.GRACE_SECONDS = 0.1
cli.run(main, "nothing was written")
"""


@pytest.mark.parametrize("hears", ["hears", "is deaf"])
@pytest.mark.parametrize(
    ("number", "says"), [("SIGINT", "interrupted"), ("SIGTERM", "ended by SIGTERM"), ("SIGHUP", "ended by SIGHUP")]
)
def test_a_signal_ends_a_command_in_one_line_with_nothing_half_written(
    tmp_path: Path, number: str, says: str, hears: str
) -> None:
    """Also where a thread never ends, and where a library swallows the interruption."""
    command = [sys.executable, "-c", WAITS, str(tmp_path), hears]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen(command, env=clean_env(), text=True, **pipes)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    process.send_signal(signal.Signals[number])
    _, said = process.communicate()
    assert (process.returncode, said) == (128 + signal.Signals[number], f"{says}; nothing was written\n")
    assert not list(tmp_path.iterdir())


HOSTILE = "a\x1b]0;title\x07b\x9bc\u202ed\udcffe\r\x00f"


def test_what_somebody_else_wrote_commands_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    cli.say(f"{HOSTILE}\tä\n")
    cli.say_json({HOSTILE: [HOSTILE, "ä"]})
    said = capsys.readouterr().out
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e\ud800-\udfff]", said) and "\tä\n" in said
    assert json.loads(said.splitlines()[-1]) == {HOSTILE: [HOSTILE, "ä"]}


def test_scripts_print_through_the_one_door() -> None:
    """What they print may hold names of files, tokens and fields that somebody else has chosen."""
    for path in (ROOT / "scripts").glob("*.py"):
        if path.name not in ("check_env.py", "kernel_report.py"):  # which print what they measured
            assert not re.search(r"\bprint\(", path.read_text()), path
