"""Schedules and settings that cannot be meant: said at start, with numbers; and how a run is made longer."""

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from helpers import TinyData, tiny_config
from hypothesis import given
from hypothesis import strategies as st
from runs import rows

from titanling.checkpoint.inventory import prune, take_stock
from titanling.checkpoint.text import pruned_text, stock_text
from titanling.config import Config
from titanling.config.schema import LRScheduler
from titanling.doubts import doubts, lr_jump
from titanling.schedule import lr_factor, trunk_end

WSD = {"lr_scheduler.warmup_steps": 2, "lr_scheduler.decay_ratio": 0.4, "training.steps": 10}


def config_of(settings: Mapping[str, Any]) -> Config:
    """A config of dotted keys."""
    tree: dict[str, Any] = {}
    for dotted, value in settings.items():
        table, key = dotted.split(".")
        tree.setdefault(table, {})[key] = value
    return Config.model_validate(tree)


DOUBTFUL: dict[str, tuple[dict[str, Any], list[str]]] = {
    "warm-up as long as the run": (
        {"training.steps": 50, "lr_scheduler.warmup_steps": 200, "optimizer.lr": 1e-3},
        ["warmup_steps = 200", "training.steps = 50", "only rises, to 2.50e-04 of optimizer.lr = 1.00e-03"],
    ),
    "warm-up into the decay": (
        {"training.steps": 100, "lr_scheduler.warmup_steps": 60, "lr_scheduler.decay_ratio": 0.5},
        ["decay_ratio = 0.5 of 100 steps is 50", "warmup_steps = 60 there are 40"],
    ),
    "schedule shorter than the run": (
        {"training.steps": 100, "lr_scheduler.warmup_steps": 5, "lr_scheduler.total_steps": 40},
        ["total_steps = 40", "training.steps = 100", "is 0.00e+00 from step 41 to the end"],
    ),
    "schedule longer than the run": (
        {"training.steps": 100, "lr_scheduler.warmup_steps": 0, "lr_scheduler.total_steps": 200, "optimizer.lr": 1e-3},
        ["total_steps = 200", "training.steps = 100", "begins after step 0 and is not over", "at 5.05e-04"],
    ),
    "decay behind the end": (
        WSD | {"lr_scheduler.total_steps": 100, "optimizer.lr": 1e-3},
        ["total_steps = 100", "does not begin when the run ends, at 1.00e-03"],
    ),
    "total_steps of a constant": (
        {"lr_scheduler.warmup_steps": 5, "lr_scheduler.decay_ratio": 0.0, "lr_scheduler.total_steps": 4},
        ["total_steps = 4 has no effect"],
    ),
    "decay of no step": (WSD | {"lr_scheduler.decay_ratio": 0.01}, ["decay_ratio = 0.01 of 10 steps is not one step"]),
    "floor of a constant": (
        WSD | {"lr_scheduler.decay_ratio": 0.0, "lr_scheduler.min_lr_factor": 0.1},
        ["min_lr_factor = 0.1 has no effect"],
    ),
    "floor at the peak": (WSD | {"lr_scheduler.min_lr_factor": 1.0}, ["min_lr_factor = 1: the decay lowers nothing"]),
    "validation": (
        WSD | {"validation.enable": True, "validation.freq": 11},
        ["validation.freq = 11 is more than training.steps = 10"],
    ),
    "samples": (WSD | {"sampling.freq": 11}, ["sampling.freq = 11 is more than training.steps = 10"]),
    "traces": (
        WSD | {"profiling.enable_profiling": True, "profiling.profile_freq": 11},
        ["profiling.profile_freq = 11 is more than training.steps = 10: the run has no trace"],
    ),
    "checkpoints": (
        WSD | {"checkpoint.enable": True, "checkpoint.interval": 11},
        ["checkpoint.interval = 11 is more than training.steps = 10"],
    ),
    "kept checkpoints": (WSD | {"checkpoint.enable": True, "checkpoint.keep_every": 11}, ["keep_every = 11"]),
    "the best of nothing": (WSD | {"checkpoint.keep_best": True}, ["keep_best = true has no effect"]),
}  # fmt: skip


@pytest.mark.parametrize("case", DOUBTFUL)
def test_it_is_said_with_numbers(case: str) -> None:
    settings, words = DOUBTFUL[case]
    (said,) = doubts(config_of(settings))
    assert [word for word in words if word not in said] == [], said


@pytest.mark.parametrize(
    "settings",
    [
        {},
        WSD,
        WSD | {"lr_scheduler.total_steps": 10, "checkpoint.enable": True, "lr_scheduler.min_lr_factor": 0.1},
        {"training.steps": 300, "checkpoint.enable": True, "lr_scheduler.decay_ratio": 0.0},
        {"training.steps": 300, "lr_scheduler.decay_type": "cosine", "lr_scheduler.min_lr_factor": 0.1},
    ],
)
def test_what_can_be_meant_is_not_doubted(settings: dict[str, Any]) -> None:
    assert list(doubts(config_of(settings))) == []


SCHEDULES = st.builds(
    LRScheduler,
    warmup_steps=st.integers(0, 60),
    total_steps=st.none() | st.integers(1, 80),
    decay_ratio=st.none() | st.floats(0, 1),
    min_lr_factor=st.floats(0, 0.9),
)


@given(settings=SCHEDULES, steps=st.integers(1, 60))
def test_the_end_of_the_trunk_is_the_last_constant_step(settings: LRScheduler, steps: int) -> None:
    end = trunk_end(settings, steps)
    factors = [lr_factor(settings, steps, completed) for completed in range(steps + 1)]
    if end is None:
        # Nothing falls in the run, or it falls from the warm-up on.
        constant = factors[settings.warmup_steps + 1 : -1]
        assert not constant or factors[-1] == 1 or constant[0] < 1 or settings.warmup_steps == 0
    else:
        assert settings.warmup_steps < end < steps
        assert factors[end] == 1 == factors[end - 1] and factors[end + 1] < 1


def test_a_jump_is_said_with_both_rates() -> None:
    before = config_of(WSD | {"optimizer.lr": 1e-3})
    longer = config_of(WSD | {"optimizer.lr": 1e-3, "training.steps": 20})
    said = lr_jump(before.model_dump(mode="json"), longer, 10)
    assert said is not None and "from 2.50e-04 in step 10 to 1.00e-03 in step 11" in said and "had 0.00e+00" in said
    assert "began to fall behind step 6" in said
    assert lr_jump(before.model_dump(mode="json"), longer, 6) is None
    assert lr_jump(before.model_dump(mode="json"), before, 9) is None
    lower = config_of(WSD | {"optimizer.lr": 1e-4})
    assert "1.00e-04 in step 5" in str(lr_jump(before.model_dump(mode="json"), lower, 4))
    assert lr_jump({"lr_scheduler": {"of": "another version"}}, longer, 6) is None


def go_on(said: str) -> list[str]:
    """The arguments of the command that the summary ends with."""
    line = next(line for line in said.splitlines() if line.startswith("  go on  "))
    words = shlex.split(line)
    return words[next(place for place, word in enumerate(words) if word.endswith("run_train.sh")) + 1 :]


@pytest.mark.parametrize("last_save_model_only", [False, True])
def test_the_end_of_the_trunk_stays_and_the_summary_goes_on_from_it(
    tmp_path: Path, tiny_data: TinyData, command: Any, capsys: pytest.CaptureFixture[str], last_save_model_only: bool
) -> None:
    changes = WSD | {"checkpoint.interval": 1, "checkpoint.keep_latest_k": 2, "optimizer.lr": 1e-3}
    config = tiny_config(tmp_path, tiny_data, changes | {"checkpoint.last_save_model_only": last_save_model_only})
    assert command("--config", config) == 0
    root, said = tmp_path / "run/checkpoints", capsys.readouterr().out
    assert sorted(path.name for path in root.iterdir()) == ["step-000006", "step-000009", "step-000010"]
    assert "whole, last before the decay" in stock_text(root, take_stock(root))
    assert "step 6   kept: the last before the decay" in pruned_text(prune(str(root), 1, really=False), False)
    prune(str(root), 1)
    assert command("--config", config, *go_on(said)) == 0
    longer = capsys.readouterr()
    assert "Done: 20 steps" in longer.out and "learning rate goes from" not in longer.err
    factors = [lr_factor(LRScheduler(warmup_steps=2, decay_ratio=0.4), 20, step) for step in range(6, 20)]
    assert rows(tmp_path / "run-20-steps", "lr") == [(7 + n, 1e-3 * factor) for n, factor in enumerate(factors)]
    assert sorted(path.name for path in root.iterdir()) == ["step-000006", "step-000010"]  # as it was
    state = json.loads((tmp_path / "run-20-steps/checkpoints/step-000020/state.json").read_text())
    assert state["trunk_ends"] == [6, 12]


def test_going_on_where_there_is_no_trunk(
    tmp_path: Path, tiny_data: TinyData, command: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """From the end, with a note that the rate rises again; of weights alone, anew; total_steps grows with the steps."""
    changes = {"lr_scheduler.total_steps": 4, "optimizer.lr": 1e-3}
    config = tiny_config(tmp_path, tiny_data, changes)
    assert command("--config", config) == 0
    said = capsys.readouterr().out
    assert "note         going on raises the learning rate again, from 5.00e-04 to 6.67e-04" in said
    assert command("--config", config) == 0
    assert "this run is complete at step 4" in capsys.readouterr().out
    assert command("--config", config, *go_on(said)) == 0
    longer = capsys.readouterr()
    assert "Done: 8 steps" in longer.out and "goes from 5.00e-04 in step 4 to 6.67e-04 in step 5" in longer.err

    weights = {"job.dump_folder": str(tmp_path / "weights"), "checkpoint.last_save_model_only": True}
    config = tiny_config(tmp_path, tiny_data, changes | weights)
    assert command("--config", config) == 0
    assert command("--config", config, *go_on(capsys.readouterr().out)) == 0
    assert "started from the weights of" in capsys.readouterr().out
