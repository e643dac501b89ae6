"""Traces of the right steps, whole and readable."""

import json
from pathlib import Path

import pytest
import torch

from titanling.config import schema
from titanling.errors import UserError
from titanling.metrics import profile


def train(settings: schema.Profiling, folder: Path, steps: int, start_step: int = 0) -> None:
    with profile(settings, folder, rank=1, start_step=start_step) as profiler:
        for step in range(start_step + 1, start_step + steps + 1):
            with torch.profiler.record_function(f"training step {step}"):
                torch.ones(8, 8) @ torch.ones(8, 8)
            profiler.step()


def traced(folder: Path) -> dict[str, list[str]]:
    """The training steps that each trace contains."""
    found = {}
    for path in folder.glob("*.json"):
        events = json.loads(path.read_text())["traceEvents"]
        found[path.name] = sorted({e["name"] for e in events if e["name"].startswith("training step")})
        assert any(e["name"] == "aten::mm" for e in events)
    return found


def test_every_nth_step_is_traced_alone(tmp_path: Path) -> None:
    settings = schema.Profiling(enable_profiling=True, profile_freq=3)
    # Step 9 begins to record but never runs: no trace of it.
    train(settings, tmp_path, steps=8)
    assert traced(tmp_path / "profile_traces") == {
        "rank1_step3.json": ["training step 3"],
        "rank1_step6.json": ["training step 6"],
    }


def test_resumed_run_traces_the_same_steps(tmp_path: Path) -> None:
    settings = schema.Profiling(enable_profiling=True, profile_freq=4, save_traces_folder="traces")
    train(settings, tmp_path, steps=6, start_step=3)
    assert traced(tmp_path / "traces") == {
        "rank1_step4.json": ["training step 4"],
        "rank1_step8.json": ["training step 8"],
    }


def test_a_crash_in_a_traced_step_leaves_no_trace(tmp_path: Path) -> None:
    settings = schema.Profiling(enable_profiling=True, profile_freq=2)
    with pytest.raises(RuntimeError), profile(settings, tmp_path, rank=0) as profiler:
        profiler.step()
        raise RuntimeError
    assert list((tmp_path / "profile_traces").iterdir()) == []


def test_off_writes_nothing(tmp_path: Path) -> None:
    train(schema.Profiling(), tmp_path, steps=20)
    assert list(tmp_path.iterdir()) == []


def test_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "profile_traces").write_text("a file")
    with pytest.raises(UserError, match="profiling.save_traces_folder .*profile_traces: cannot be made"):
        train(schema.Profiling(enable_profiling=True), tmp_path, steps=1)
