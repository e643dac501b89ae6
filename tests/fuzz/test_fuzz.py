"""A few inputs of every kind that benchmarks/fuzz.py makes, always the same ones; and that it notices what is wrong."""

from pathlib import Path

import jail
import pytest
from helpers import ROOT, run_python

BAD = {
    "1 / 0": "traceback: ZeroDivisionError",
    "raise SystemExit(5)": "exit code 5",
    "open('../outside.txt').read()": jail.ESCAPED,
    "open('../made.txt', 'w')": jail.ESCAPED,
    "import os; os.mkdir('../made')": jail.ESCAPED,
    "bytearray(1 << 40)": "traceback: MemoryError",
    "print('\\x1b[2J')": "control bytes",
    "import sys; print('a\\nb', file=sys.stderr); sys.exit(2)": "2 lines instead of one",
    "import sys; print('a' * 5000, file=sys.stderr); sys.exit(2)": "a message of 5,000 characters",
}
GOOD = ("open('here.txt', 'w')", "import sys; print('error: no', file=sys.stderr); sys.exit(2)")


@pytest.mark.parametrize("code", [*BAD, *GOOD])
def test_what_a_command_must_not_do_is_noticed(tmp_path: Path, code: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "outside.txt").write_text("not yours")
    script = tmp_path / "folder/script.py"
    script.write_text(code)
    found = jail.run([str(script)], tmp_path / "folder", codes=(), confined=True)
    assert any(BAD[code] in fault for fault in found.faults) if code in BAD else found.faults == []


@pytest.mark.slow
def test_odd_inputs_are_refused_or_taken(tmp_path: Path) -> None:
    found = tmp_path / "found"
    done = run_python(ROOT / "benchmarks/fuzz.py", "500", "--seed", "1", "--inputs", "1", "--keep", found, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 faults" in done.stdout and not found.exists()
