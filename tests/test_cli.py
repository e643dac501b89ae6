"""How a process that has other ranks ends: with its code and all it had to say, without taking Python down."""

import re
import subprocess
import sys

import pytest
from helpers import ROOT, clean_env

from titanling import cli

INTERRUPTED = re.compile(r'run\(main, "(.+)"\)')

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

    for words, said in (("nothing was written", "interrupted; nothing was written\n"), ("", "interrupted\n")):
        with pytest.raises(SystemExit) as ended:
            cli.run(main, words)
        assert (ended.value.code, capsys.readouterr().err) == (130, said)


def test_only_commands_that_train_promise_a_checkpoint() -> None:
    commands = [*(ROOT / "scripts").glob("*.py"), *(ROOT / "titanling").glob("*.py")]
    words = {path.name: found[1] for path in commands if (found := INTERRUPTED.search(path.read_text()))}
    assert {name for name, said in words.items() if "checkpoint" in said} == {"train.py", "launch.py"}
    assert {"convert_dcp_to_hf.py", "convert_hf_to_dcp.py", "prepare_data.py"} <= words.keys()
