"""Lines, metrics.jsonl, TensorBoard and W&B, as a user meets them."""

import errno
import json
import math
import os
import pty
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from titanling.config import schema
from titanling.errors import UserError
from titanling.metrics.jsonl import JsonLines, encode_row
from titanling.metrics.logger import MetricsLogger, format_duration

ROW = {
    "step": 120,
    "loss": 5.12341,
    "grad_norm": 0.8123,
    "lr": 3e-3,
    "tokens_seen": 983040,
    "tokens_per_second": 2412.3,
    "step_seconds": 0.775,
    "memory_bytes": 655_000_000,
}
VALIDATION = {"step": 120, "val_loss": 5.2, "perplexity": 181.272, "bits_per_byte": 1.75, "seconds": 3.21}


def make(folder: Path, rank: int = 0, **settings: Any) -> MetricsLogger:
    return MetricsLogger(schema.Metrics(**settings), folder, rank, total_steps=200, run_config={"job": {}})


def rows(folder: Path) -> list[dict[str, Any]]:
    def refuse(name: str) -> None:
        raise ValueError(f"{name} is not JSON")

    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=refuse) for line in lines]


# Lines


def test_step_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(tmp_path).log_step(ROW)
    assert capsys.readouterr().out == (
        "step  120/200  loss 5.1234  grad_norm 0.812  lr 3.00e-03  2,412 tok/s  0.61 GiB  ETA 1 m 02 s\n"
    )


def test_step_line_with_everything(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = {**ROW, "step": 7, "mfu_full": 0.4123, "mfu_causal": 0.38, "skipped_steps": 1, "loss": math.nan}
    make(tmp_path).log_step(row)
    line = capsys.readouterr().out
    assert line.startswith("step    7/200  loss nan  ")
    assert "  2,412 tok/s  MFU 41.2 % (causal 38.0 %)  0.61 GiB  skipped 1  ETA 2 m 30 s\n" in line


def test_validation_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    logger = make(tmp_path)
    logger.log_validation(VALIDATION)
    logger.log_validation({"step": 9, "val_loss": 1000.0, "perplexity": math.inf, "seconds": 1.0})
    assert capsys.readouterr().out.splitlines() == [
        "val   120/200  loss 5.2000  perplexity 181.27  1.7500 bits/byte  3.2 s",
        "val     9/200  loss 1000.0000  perplexity inf  1.0 s",
    ]


def test_eta_counts_what_happens_between_steps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    now = [0.0]
    logger = MetricsLogger(schema.Metrics(), tmp_path, 0, 200, {}, clock=lambda: now[0])
    logger.log_step({**ROW, "step": 10, "step_seconds": 30.0})
    now[0] = 20.0
    logger.log_step({**ROW, "step": 20, "step_seconds": 1.0})
    first, second = capsys.readouterr().out.splitlines()
    assert first.endswith("ETA 1 h 35 m")
    assert second.endswith("ETA 6 m 00 s")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (59.4, "59 s"), (59.6, "1 m 00 s"), (3600, "1 h 00 m"), (7385, "2 h 03 m"), (273_600, "3 d 04 h")],
)
def test_durations(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


def test_sampled_text_cannot_control_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    logger = make(tmp_path)
    logger.log_text(5, "sample", "[bold]a[/bold]\tä\n\x1b]0;title\x07\r\x9b2J\u202eb\x00")
    logger.info("file \x1b[31mred")
    logger.warn("odd \x1b[0m name")
    captured = capsys.readouterr()
    assert captured.out == (
        "sample:\n    [bold]a[/bold]\tä\n    \\x1b]0;title\\x07\\r\\x9b2J\\u202eb\\x00\nfile \\x1b[31mred\n"
    )
    assert captured.err == "warning: odd \\x1b[0m name\n"


SCRIPT = """
import sys
from pathlib import Path
from titanling.config import schema
from titanling.metrics.logger import MetricsLogger
logger = MetricsLogger(schema.Metrics(disable_color_printing=sys.argv[2] == "plain"), Path(sys.argv[1]), 0, 200, {})
logger.info("wide " * 60 + "[red]end[/red] äß\\x1b[5m")
logger.warn("careful")
"""
WIDE = "wide " * 60 + "[red]end[/red] "


def on_terminal(folder: Path, mode: str = "colour", **environment: str) -> str:
    """What the script sends to a terminal of 80 columns."""
    leader, follower = pty.openpty()
    env = {k: v for k, v in os.environ.items() if k != "NO_COLOR"} | {"TERM": "xterm-256color", **environment}
    child = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(folder), mode], stdout=follower, stderr=follower, env=env
    )
    os.close(follower)
    sent = b""
    while True:
        try:
            sent += os.read(leader, 65536)
        except OSError:  # the other end is closed
            break
    os.close(leader)
    assert child.wait() == 0
    return sent.decode().replace("\r\n", "\n")


def test_colours_on_a_terminal_without_wrapping(tmp_path: Path) -> None:
    info, warning = on_terminal(tmp_path).splitlines()
    assert info == WIDE + "äß\\x1b[5m"
    assert warning == "\x1b[1;33mwarning: \x1b[0m\x1b[33mcareful\x1b[0m"


@pytest.mark.parametrize(("mode", "environment"), [("plain", {}), ("colour", {"NO_COLOR": "1"})])
def test_colours_can_be_refused(tmp_path: Path, mode: str, environment: dict[str, str]) -> None:
    assert on_terminal(tmp_path, mode, **environment).splitlines() == [WIDE + "äß\\x1b[5m", "warning: careful"]


def test_pipe_is_plain_in_any_encoding(tmp_path: Path) -> None:
    command = [sys.executable, "-c", SCRIPT, str(tmp_path), "colour"]
    done = subprocess.run(command, capture_output=True, check=True, env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert done.stdout.decode("ascii") == WIDE + "\\xe4\\xdf\\x1b[5m\n"
    assert done.stderr == b"warning: careful\n"


def test_impossible_mfu_alarms_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    logger = MetricsLogger(schema.Metrics(), tmp_path, 0, 200, {}, device_name="NVIDIA H200", peak_flops=989e12)
    logger.log_step({**ROW, "mfu_full": 1.0})
    assert capsys.readouterr().err == ""
    for mfu_full in (1.52, 5.63):
        logger.log_step({**ROW, "mfu_full": mfu_full})
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: MFU 152.0 % is impossible")
    assert "NVIDIA H200 (989 TFLOP/s" in line


# metrics.jsonl


def test_rows_keep_every_digit_and_are_there_at_once(tmp_path: Path) -> None:
    logger = make(tmp_path)
    logger.log_step({**ROW, "loss": 0.1 + 0.2, "lr": 1e-300 / 3})
    (row,) = rows(tmp_path)
    assert row == {**ROW, "loss": 0.1 + 0.2, "lr": 1e-300 / 3}
    logger.log_validation(VALIDATION)
    assert rows(tmp_path)[1] == {
        "step": 120,
        "val_loss": 5.2,
        "val_perplexity": 181.272,
        "val_bits_per_byte": 1.75,
        "val_seconds": 3.21,
    }


def test_non_finite_values_stay_strict_json(tmp_path: Path) -> None:
    make(tmp_path).log_step({**ROW, "loss": math.nan, "grad_norm": math.inf, "lr": -math.inf})
    (row,) = rows(tmp_path)
    assert (row["loss"], row["grad_norm"], row["lr"]) == (None, None, None)
    assert (row["loss_text"], row["grad_norm_text"], row["lr_text"]) == ("nan", "inf", "-inf")


@given(st.floats() | st.integers())
def test_any_number_survives(value: float) -> None:
    row = json.loads(encode_row({"step": 1, "x": value}))
    assert repr(float(row["x_text"]) if row["x"] is None else row["x"]) == repr(value)


def test_resume_drops_later_rows_and_a_torn_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    logger = make(tmp_path)
    for step in (10, 20, 30):
        logger.log_step({**ROW, "step": step})
        logger.log_validation({**VALIDATION, "step": step})
    logger.close()
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes() + b'{"step": 40, "lo')
    whole = path.read_bytes().splitlines(keepends=True)[:4]

    resumed = make(tmp_path)
    resumed.resume_at(20)
    assert path.read_bytes() == b"".join(whole)
    assert "dropped 1 line(s)" in capsys.readouterr().err
    resumed.log_step({**ROW, "step": 30})
    assert [row["step"] for row in rows(tmp_path)] == [10, 10, 20, 20, 30]
    assert os.listdir(tmp_path) == ["metrics.jsonl"]


def test_resume_completes_a_row_that_only_lost_its_newline(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 10}\n{"step": 20}')
    logger = make(tmp_path)
    logger.resume_at(20)
    logger.log_step({**ROW, "step": 30})
    assert [row["step"] for row in rows(tmp_path)] == [10, 20, 30]


def test_new_run_starts_an_empty_file(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 10}\n')
    make(tmp_path).resume_at(0)
    assert rows(tmp_path) == []


FULL_DISK = """
import json, resource, sys
from pathlib import Path
from titanling.config import schema
from titanling.metrics.logger import MetricsLogger
logger = MetricsLogger(schema.Metrics(enable_tensorboard=sys.argv[2] == "tensorboard"), Path(sys.argv[1]), 0, 200, {})
row = json.loads(sys.argv[3])
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, -1))
for step in range(60):
    logger.log_step({**row, "step": step})
logger.close()
print("finished")
"""


@pytest.mark.parametrize("target", ["jsonl", "tensorboard"])
def test_full_disk_warns_once_and_training_goes_on(tmp_path: Path, target: str) -> None:
    command = [sys.executable, "-c", FULL_DISK, str(tmp_path), target, json.dumps(ROW)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.endswith("finished\n")
    assert done.stderr.count("warning: metrics.jsonl: cannot be written (File too large)") == 1
    assert done.stderr.count("warning: TensorBoard events: cannot be written") == (target == "tensorboard")
    kept = rows(tmp_path)
    assert kept == [{**ROW, "step": step} for step in range(len(kept))] and 0 < len(kept) < 60


def test_folder_that_cannot_be_written_is_the_users_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="job.dump_folder .*file: metrics.jsonl cannot be written there"):
        make(tmp_path / "file")


def test_failed_rewrite_is_the_users_error_and_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 10}\n')
    logger = make(tmp_path)

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="metrics.jsonl: cannot be rewritten"):
        logger.resume_at(5)
    assert rows(tmp_path) == [{"step": 10}]


def test_a_new_run_keeps_what_an_earlier_one_logged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for run in (1, 2, 3):
        logger = make(tmp_path)
        logger.resume_at(0)
        logger.log_step({**ROW, "step": run})
        logger.close()
    kept = {path.name: json.loads(path.read_text())["step"] for path in tmp_path.iterdir()}
    assert kept == {"metrics.jsonl": 3, "metrics.1.jsonl": 1, "metrics.2.jsonl": 2}
    assert "kept as metrics.2.jsonl" in capsys.readouterr().out


def test_a_deep_line_is_no_row(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n' + "[" * 100_000 + '\n{"step": 2}\n')
    make(tmp_path).resume_at(2)
    assert [row["step"] for row in rows(tmp_path)] == [1, 2]


@pytest.mark.parametrize("becomes", ["deleted", "folder deleted", "pipe", "link", "folder", "file"])
def test_what_happens_to_the_file_while_it_is_written_ends_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], becomes: str
) -> None:
    logger, path = make(tmp_path / "run"), tmp_path / "run/metrics.jsonl"
    logger.log_step(ROW)
    shutil.rmtree(path.parent) if becomes == "folder deleted" else path.unlink()
    precious = tmp_path / "precious"
    precious.write_text("mine")
    {
        "pipe": lambda: os.mkfifo(path),
        "link": lambda: path.symlink_to(precious),
        "folder": lambda: path.mkdir(),
        "file": lambda: path.write_text('{"step": 1}\n'),
    }.get(becomes, lambda: None)()
    for _ in range(2):
        logger.log_step(ROW)
    logger.close()
    goes_on = becomes in ("deleted", "folder deleted", "file")
    said = capsys.readouterr().err
    assert said.count("warning") == 1 and ("go on in a new one" if goes_on else "rows are lost") in said
    assert precious.read_text() == "mine"
    if goes_on:
        assert [row["step"] for row in rows(tmp_path / "run")][-2:] == [ROW["step"]] * 2


@pytest.mark.parametrize("becomes", ["pipe", "link", "folder"])
def test_what_is_no_file_is_refused_at_the_start(tmp_path: Path, becomes: str) -> None:
    path = tmp_path / "metrics.jsonl"
    {"pipe": os.mkfifo, "link": lambda at: at.symlink_to("elsewhere"), "folder": os.mkdir}[becomes](path)
    with pytest.raises(UserError, match="metrics.jsonl cannot be written there .it is "):
        make(tmp_path)


def test_a_full_disk_keeps_no_half_of_a_rewrite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = JsonLines(tmp_path / "rows.jsonl")
    for step in (1, 2):
        file.append({"step": step})

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        file.drop_after(1)
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]
    assert (tmp_path / "rows.jsonl").read_text() == '{"step": 1}\n{"step": 2}\n'


def test_the_validation_of_the_last_step_can_go_alone(tmp_path: Path) -> None:
    file = JsonLines(tmp_path / "metrics.jsonl")
    for row in ({"step": 1, "val_loss": 5}, {"step": 2}, {"step": 2, "val_loss": 4}, {"step": 3}):
        file.append(row)
    assert file.drop_after(2, validated=False) == 0
    assert rows(tmp_path) == [{"step": 1, "val_loss": 5}, {"step": 2}]


def test_other_ranks_are_silent(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    logger = make(tmp_path / "run", rank=1, enable_tensorboard=True)
    logger.resume_at(0)
    logger.log_step({**ROW, "mfu_full": 2.0})
    logger.log_validation(VALIDATION)
    logger.log_text(1, "sample", "text")
    logger.info("info")
    logger.warn("warn")
    logger.close()
    assert capsys.readouterr() == ("", "")
    assert not (tmp_path / "run").exists()


def test_append_leaves_no_part_of_a_row(tmp_path: Path) -> None:
    file = JsonLines(tmp_path / "rows.jsonl")
    file.append({"step": 1})
    with pytest.raises(TypeError):
        file.append({"step": 2, "loss": "high"})  # type: ignore[dict-item]
    file.append({"step": 3})
    assert (tmp_path / "rows.jsonl").read_text() == '{"step": 1}\n{"step": 3}\n'
    assert file.drop_after(3) == 0
