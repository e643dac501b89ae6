"""Steps that update nothing, empty or not finite: what they leave, who hears of them, how a run of them ends."""

import json
import math
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import ROOT, SEQ_LEN, VOCAB, TinyData, run_python, tiny_config
from runs import differing, live_tensors, open_trainer, rows
from torch import Tensor

from titanling.config.schema import Data, Validation
from titanling.data.held_out import check_targets
from titanling.data.indexed import IndexedWriter, write_sidecar
from titanling.errors import UserError
from titanling.trainer import Trainer

EOD = 0
MASKED = {"data.document_mask": "causal", "model.hf_assets_path": None, "checkpoint.enable": False}
PRECISIONS: dict[str, Mapping[str, Any]] = {
    "float32": {},
    "float16": {"training.mixed_precision_param": "float16"},
    "bfloat16 parameters": {"training.dtype": "bfloat16", "training.mixed_precision_param": "bfloat16"},
    "smoothed": {"training.label_smoothing": 0.1, "training.z_loss": 1e-3},
}


def write_windows(prefix: Path, full: list[bool]) -> str:
    """Token files of one-token documents, but for the windows of SEQ_LEN tokens that are `full` of text."""
    choose = np.random.default_rng(0)
    with IndexedWriter(str(prefix), VOCAB) as writer:
        for has_text in full:
            if has_text:
                writer.add_document([*choose.integers(1, VOCAB, SEQ_LEN - 1), EOD])
            else:
                writer.add_documents(np.full(SEQ_LEN, EOD), np.ones(SEQ_LEN, np.int64))
        writer.add_document([EOD])
    write_sidecar(str(prefix), writer.sidecar(tokenizer_sha256="0" * 64, eod_id=EOD, utf8_bytes=0, source="test"))
    return str(prefix)


def poison(trainer: Trainer, when: Callable[[int], bool]) -> None:
    """Make the loss of some steps nan."""
    loss = trainer.runner.loss
    trainer.runner.loss = lambda *given: loss(*given) * (math.nan if when(trainer.step + 1) else 1.0)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_an_empty_step_changes_nothing(
    tmp_path: Path, tiny_data: TinyData, precision: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Weights, moments, their step counter and the loss scale: bit-equal. It is told one step later."""
    train = write_windows(tmp_path / "mixed", [True, False] * 8)
    changes = MASKED | PRECISIONS[precision] | {"data.train": train, "training.steps": 12}
    changes |= {"training.local_batch_size": 1, "training.global_batch_size": 1, "optimizer.weight_decay": 0.3}
    with open_trainer(tmp_path, tiny_data, changes) as trainer:
        take, found = trainer.train_step, []

        def watched() -> tuple[Tensor, Tensor, float]:
            before, scaler = live_tensors(trainer), trainer.scaler.state()
            taken = take()
            after = differing(before, live_tensors(trainer))
            found.append((after == [], trainer.scaler.state() == scaler, taken[0].item()))
            return taken

        trainer.train_step = watched  # type: ignore[method-assign]
        trainer.train()
        empty = [step for step, (same, _, _) in enumerate(found, 1) if same]
        assert trainer.outcomes.empty == len(empty) > 2 and trainer.outcomes.skipped == 0
        assert 0 < trainer.losses["training loss"] < 10
        run = trainer.run_folder
    assert len(empty) < 12
    for same, scaler_same, loss in found:
        assert same == (loss == 0.0) and (scaler_same or not same)
    assert rows(run, "empty_steps") == [(s, sum(e <= s for e in empty)) for s in range(1, 13)]
    said = capsys.readouterr().err
    for step in empty:
        line = f"step {step}: none of its tokens (sequences {step - 1} to {step - 1}) is to be predicted"
        assert said.count(line) == 1
    for line in (run / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def test_some_empty_micro_batches_change_only_the_count(tmp_path: Path, tiny_data: TinyData) -> None:
    train = write_windows(tmp_path / "mixed", [True, True, False] * 6)
    found = []
    for local in (6, 1):
        sizes = {"training.local_batch_size": local, "training.global_batch_size": 6, "data.train": train}
        with open_trainer(tmp_path / str(local), tiny_data, MASKED | sizes) as trainer:
            steps = [trainer.train_step() for _ in range(3)]
            found.append([(loss.item(), norm.item()) for loss, norm, _ in steps])
            assert trainer.outcomes.settle().empty == 0
    assert np.allclose(*found, rtol=1e-6, atol=1e-6) and np.isfinite(found).all() and np.min(found) > 0


@pytest.mark.parametrize("what", ["the loss is nan", "the loss alone is infinite"])
def test_a_loss_that_is_not_finite_is_skipped_though_gradients_are(
    tmp_path: Path, tiny_data: TinyData, what: str
) -> None:
    with open_trainer(tmp_path, tiny_data, {"checkpoint.enable": False}) as trainer:
        loss, before = trainer.runner.loss, live_tensors(trainer)
        wrong = math.nan if what == "the loss is nan" else math.inf
        trainer.runner.loss = lambda *given: loss(*given) + wrong  # its derivative is 0
        trainer.train_step()
        assert differing(before, live_tensors(trainer)) == []
        assert trainer.outcomes.settle().skipped == 1


@pytest.mark.parametrize("kind", ["skipped", "empty"])
def test_too_many_in_a_row_save_and_end_the_run(tmp_path: Path, tiny_data: TinyData, kind: str) -> None:
    """Without pushing earlier checkpoints out; a start goes on counting."""
    changes = {"training.steps": 50, "training.max_skipped_in_a_row": 5, "checkpoint.interval": 1}
    changes |= {"checkpoint.keep_latest_k": 2, "lr_scheduler.decay_ratio": 0.0}
    if kind == "empty":
        changes |= MASKED | {"checkpoint.enable": True, "data.train": write_windows(tmp_path / "empty", [False] * 9)}
    with open_trainer(tmp_path, tiny_data, changes) as trainer:
        if kind == "skipped":
            poison(trainer, lambda step: step > 4)
        trainer.train()
        ended, failure = trainer.step, trainer.failure
        assert failure is not None and not trainer.stopped and failure.empty == (kind == "empty")
        good = 4 if kind == "skipped" else 0
        assert (failure.first, failure.last) == (good + 1, ended) == (good + 1, good + 5)
        assert failure.older == (3 if kind == "skipped" else None)
    names = sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir())
    assert names == [f"step-{step:06d}" for step in ((3, 4, ended) if kind == "skipped" else (ended,))]
    state = json.loads((tmp_path / f"run/checkpoints/step-{ended:06d}/state.json").read_text())
    assert state[f"{kind}_steps"] == state["skipped_in_a_row"] == ended - good
    with open_trainer(tmp_path, tiny_data, changes) as trainer:
        assert trainer.outcomes.in_a_row == ended - good
        if kind == "skipped":
            poison(trainer, lambda step: True)
        trainer.train()
        assert trainer.failure is not None and trainer.step == ended + 1


def test_a_step_that_updates_begins_the_count_anew(tmp_path: Path, tiny_data: TinyData) -> None:
    changes = {"training.steps": 12, "training.max_skipped_in_a_row": 3, "checkpoint.interval": 3}
    with open_trainer(tmp_path, tiny_data, changes) as trainer:
        poison(trainer, lambda step: step % 3 != 1)
        trainer.train()
        assert trainer.failure is None and trainer.outcomes.skipped == 8
    # Those of steps 3, 6 and 9 waited for the next step that updated.
    names = sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir())
    assert names == [f"step-{step:06d}" for step in (4, 7, 10, 12)]


def test_state_of_earlier_versions_has_no_empty_steps(tmp_path: Path, tiny_data: TinyData) -> None:
    with open_trainer(tmp_path, tiny_data) as trainer:
        trainer.outcomes.load({"skipped_steps": 3.0})
        assert trainer.outcomes.state() == {"skipped_steps": 3, "empty_steps": 0, "skipped_in_a_row": 0}


def advice(text: str, script: str) -> list[str]:
    """The arguments of the command of `script` that a message ends with."""
    words = shlex.split(text.rstrip().splitlines()[-1])
    return words[next(place for place, word in enumerate(words) if word.endswith(script)) + 1 :]


def test_a_diverged_run_ends_with_3_and_its_advice_works(
    tmp_path: Path, tiny_data: TinyData, command: Callable[..., int | None], capsys: pytest.CaptureFixture[str]
) -> None:
    shared = {"checkpoint.interval": 1, "training.steps": 4, "lr_scheduler.warmup_steps": 0, "optimizer.lr": 0.005}
    config = tiny_config(tmp_path, tiny_data, shared | {"lr_scheduler.decay_ratio": 0.0})
    assert command("--config", config) == 0
    changes = ("--training.steps", 12, "--training.max_skipped_in_a_row", 3, "--optimizer.lr")
    assert command("--config", config, *changes, 1e30) == 3
    said = capsys.readouterr()
    assert said.out.count("Done") == 1 and "failed numerically: the same command would do the same" in said.err
    assert command("--config", config, *changes, 1e30) == 3  # as it says
    words = advice(capsys.readouterr().err, "run_train.sh")
    assert words[words.index("--checkpoint.load_step") + 1] == "4"
    words[words.index("--optimizer.lr") + 1] = "0.0005"  # lower indeed
    assert command("--config", config, *words) == 0
    assert "Done: 12 steps" in capsys.readouterr().out


def test_an_empty_run_ends_with_3_and_its_advice_works(
    tmp_path: Path, tiny_data: TinyData, command: Callable[..., int | None], capsys: pytest.CaptureFixture[str]
) -> None:
    """Though it is shorter than what makes a run end early; nor is it done when it is started again."""
    changes = MASKED | {"data.train": write_windows(tmp_path / "empty", [False] * 9), "checkpoint.enable": True}
    config = tiny_config(tmp_path, tiny_data, changes)
    for _ in range(2):
        assert command("--config", config) == 3
        said = capsys.readouterr()
        assert "Done" not in said.out and "no token that they read is to be predicted" in said.err
    look = run_python(ROOT / "scripts/trace_data.py", *advice(said.err, "trace_data.py"))
    assert look.returncode == 0 and "step 4  sequence 12" in look.stdout


def test_a_run_with_some_of_them_says_so(
    tmp_path: Path, tiny_data: TinyData, command: Callable[..., int | None], capsys: pytest.CaptureFixture[str]
) -> None:
    changes = MASKED | {"data.train": write_windows(tmp_path / "mixed", [True, False] * 4)}
    sizes = {"training.local_batch_size": 1, "training.global_batch_size": 1, "training.steps": 8}
    assert command("--config", tiny_config(tmp_path, tiny_data, changes | sizes)) == 0
    assert "Done: 8 steps (4 empty, which changed nothing), training loss" in capsys.readouterr().out


@pytest.mark.parametrize("steps", [-1, 2])
def test_a_validation_set_without_a_target_is_refused(tmp_path: Path, tiny_data: TinyData, steps: int) -> None:
    settings, data = Validation(enable=True, steps=steps, local_batch_size=2), Data(document_mask="causal")
    for name, full, good in (("none", [False] * 80, False), ("last", [False] * 79 + [True], steps < 0)):
        prefix = write_windows(tmp_path / name, full)
        if good:
            check_targets(prefix, data, settings, SEQ_LEN)
            continue
        with pytest.raises(UserError, match=r"data.validation: .*\.bin: none of its tokens is to be predicted"):
            check_targets(prefix, data, settings, SEQ_LEN)
        check_targets(prefix, Data(), settings, SEQ_LEN)  # without a mask, every token is


def test_validation_of_a_mostly_empty_set_is_the_mean_of_what_there_is(tmp_path: Path, tiny_data: TinyData) -> None:
    held_out = write_windows(tmp_path / "held_out", [False] * 5 + [True])
    changes = MASKED | {"validation.enable": True, "data.validation": held_out, "data.train": held_out}
    found = []
    for size in (1, 6):
        with open_trainer(tmp_path, tiny_data, changes | {"validation.local_batch_size": size}) as trainer:
            trainer.evaluate()
            found.append(trainer.losses["validation loss"])
    assert found[0] == pytest.approx(found[1], rel=1e-6) and 5 < found[0] < 7
