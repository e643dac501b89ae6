"""TensorBoard read back with its own reader; W&B as far as it goes without an account."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from titanling.config import schema
from titanling.errors import UserError
from titanling.metrics import MetricsLogger

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
    return MetricsLogger(schema.Metrics(**settings), folder, rank, total_steps=200, run_config={"job": {"seed": 1}})


def read(folder: Path) -> EventAccumulator:
    events = EventAccumulator(str(folder))
    events.Reload()
    return events


def test_tensorboard_gets_scalars_and_texts_by_step(tmp_path: Path) -> None:
    logger = make(tmp_path, enable_tensorboard=True, save_tb_folder="events")
    logger.log_step(ROW)
    logger.log_validation(VALIDATION)
    logger.log_text(120, "sample", "def f():\n<b>")
    logger.close()
    events = read(tmp_path / "events")
    assert set(events.Tags()["scalars"]) == {f"train/{key}" for key in ROW if key != "step"} | {
        "validation/loss",
        "validation/perplexity",
        "validation/bits_per_byte",
        "validation/seconds",
    }
    (loss,) = events.Scalars("train/loss")
    assert (loss.step, loss.value) == (120, pytest.approx(5.12341))
    (text,) = events.Tensors("sample/text_summary")
    assert text.tensor_proto.string_val == [b"    def f():\n    <b>"]


def test_tensorboard_hides_the_steps_that_run_again(tmp_path: Path) -> None:
    first = make(tmp_path, enable_tensorboard=True)
    for step in (10, 20, 30):
        first.log_step({**ROW, "step": step, "loss": 1.0})
    first.close()
    second = make(tmp_path, enable_tensorboard=True)
    second.resume_at(20)
    second.log_step({**ROW, "step": 30, "loss": 2.0})
    second.close()
    losses = [(event.step, event.value) for event in read(tmp_path / "tensorboard").Scalars("train/loss")]
    assert losses == [(10, 1.0), (20, 1.0), (30, 2.0)]


def test_nothing_of_tensorboard_unless_enabled(tmp_path: Path) -> None:
    logger = make(tmp_path)
    logger.log_step(ROW)
    logger.log_text(1, "sample", "text")
    logger.close()
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize("rank", [0, 1])
def test_missing_wandb_is_said_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank: int
) -> None:
    # Only the standard library and a folder ./wandb, as W&B leaves one, can be found.
    (tmp_path / "wandb").mkdir()
    outside = [path for path in sys.path if not path.endswith("site-packages")]
    monkeypatch.setattr(sys, "path", [str(tmp_path), *outside])
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    with pytest.raises(UserError, match=r"metrics.enable_wandb.*pip install 'titanling\[wandb\]'"):
        make(tmp_path / "run", rank=rank, enable_wandb=True)
    assert not (tmp_path / "run").exists()


def test_wandb_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="the wandb extra is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    logger = make(tmp_path, enable_wandb=True)
    logger.log_step(ROW)
    logger.log_validation(VALIDATION)
    logger.close()
    (written,) = (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")
    content = written.read_bytes()
    for expected in (b"train/loss", b"validation/perplexity", b"5.12341"):
        assert expected in content


START_WANDB = """
import sys
from pathlib import Path
from titanling.config import schema
from titanling.errors import UserError
from titanling.metrics import MetricsLogger
try:
    MetricsLogger(schema.Metrics(enable_wandb=True), Path(sys.argv[1]), 0, 200, {})
except UserError as error:
    print(error)
"""


def test_wandb_that_cannot_start_is_the_users_error(tmp_path: Path) -> None:
    pytest.importorskip("wandb", reason="the wandb extra is not installed")
    # In its own process, as wandb keeps the mode of the first run.
    command = [sys.executable, "-c", START_WANDB, str(tmp_path)]
    env = {**os.environ, "WANDB_MODE": "online", "WANDB_API_KEY": "short"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=env)
    assert done.stdout.startswith("metrics.enable_wandb = true: W&B did not start (WANDB_API_KEY invalid")
    assert done.stdout.count("\n") == 1
