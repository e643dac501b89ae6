"""The training loop on tiny runs in this process: bitwise resume, and numbers that mean what they say."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import SEQ_LEN, TinyData, snapshot
from runs import differing, live_tensors, open_trainer, rows, saved_tensors
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from titanling.data.indexed import IndexedDataset, IndexedWriter, write_sidecar
from titanling.loss import cross_entropy_sum
from titanling.schedule import lr_factor
from titanling.trainer import Trainer

Changes = Mapping[str, Any]
PRECISIONS: dict[str, Changes] = {
    "float32": {},
    "dropout": {"model.dropout": 0.1},
    "bfloat16 autocast": {"training.mixed_precision_param": "bfloat16"},
    "bfloat16 parameters": {"training.dtype": "bfloat16", "training.mixed_precision_param": "bfloat16"},
    "stochastic rounding": {
        "training.dtype": "bfloat16",
        "training.mixed_precision_param": "bfloat16",
        "optimizer.stochastic_rounding": True,
    },
    "float16": {"training.mixed_precision_param": "float16"},
    "masked": {"data.document_mask": "causal"},
}
WITHOUT_CHECKPOINTS: Changes = {"checkpoint.enable": False}


@pytest.fixture(autouse=True)
def bfloat16_units(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compute in bfloat16 where it is asked for, even on a CPU that is slow at it."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")


def train(folder: Path, data: TinyData, *changes: Changes) -> Path:
    """Train one run to its end (or on from where it was); its run folder."""
    merged: dict[str, Any] = {}
    for change in changes:
        merged |= change
    with open_trainer(folder, data, merged) as trainer:
        trainer.train()
        return trainer.run_folder


def gradients_of_step(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Train one step; its clipped gradients."""
    found: dict[str, torch.Tensor] = {}

    def keep(*_: object) -> None:
        named = trainer.runner.named_parameters()
        found.update({name: p.grad.clone() for name, p in named if p.grad is not None})

    handle = trainer.optimizer.register_step_pre_hook(keep)
    trainer.train_step()
    handle.remove()
    return found


@pytest.mark.parametrize("precision", PRECISIONS)
def test_resume_is_bitwise(tmp_path: Path, tiny_data: TinyData, precision: str) -> None:
    """20 steps straight, and 10 + 10."""
    common = PRECISIONS[precision] | {
        "checkpoint.interval": 10,
        "lr_scheduler.total_steps": 20,
        "validation.enable": True,
        "validation.steps": 2,
    }
    straight = train(tmp_path / "straight", tiny_data, common, {"training.steps": 20})
    train(tmp_path / "halves", tiny_data, common, {"training.steps": 10})
    halves = train(tmp_path / "halves", tiny_data, common, {"training.steps": 20})
    for key in ("loss", "grad_norm", "lr", "tokens_seen", "skipped_steps", "val_loss"):
        assert rows(halves, key) == rows(straight, key), key
    last = "checkpoints/step-000020"
    assert differing(saved_tensors(halves / last), saved_tensors(straight / last)) == []
    states = [json.loads((run / last / "state.json").read_text()) for run in (straight, halves)]
    for key in ("step", "tokens_seen", "loader", "scaler", "skipped_steps"):
        assert states[0][key] == states[1][key], key
    assert [step for step, _ in rows(straight)] == list(range(1, 21))


def test_precisions_differ_and_agree(tmp_path: Path, tiny_data: TinyData) -> None:
    """The variants above are really different computations of nearly the same thing."""
    losses = {}
    for name, changes in PRECISIONS.items():
        run = train(tmp_path / name, tiny_data, WITHOUT_CHECKPOINTS, changes, {"training.steps": 5})
        losses[name] = rows(run)[-1][1]
    assert len(set(losses.values())) == len(losses)
    without_dropout = [loss for name, loss in losses.items() if name != "dropout"]
    assert max(without_dropout) - min(without_dropout) < 5e-3


def test_extending_a_finished_run_is_bitwise(tmp_path: Path, tiny_data: TinyData) -> None:
    constant = {"lr_scheduler.decay_ratio": 0.0, "checkpoint.interval": 3}
    straight = train(tmp_path / "straight", tiny_data, constant, {"training.steps": 8})
    for steps in (4, 4, 8):  # the second finds the run complete
        extended = train(tmp_path / "extended", tiny_data, constant, {"training.steps": steps})
    assert rows(extended) == rows(straight)
    last = "checkpoints/step-000008"
    assert differing(saved_tensors(extended / last), saved_tensors(straight / last)) == []


def test_resume_from_an_earlier_checkpoint(
    tmp_path: Path, tiny_data: TinyData, capsys: pytest.CaptureFixture[str]
) -> None:
    """No step is told twice, and the abandoned checkpoints neither come back nor push the new ones out."""
    common = {"checkpoint.keep_latest_k": 2, "checkpoint.interval": 2, "lr_scheduler.total_steps": 6}
    train(tmp_path, tiny_data, common, {"training.steps": 6, "checkpoint.keep_latest_k": 3})
    again = common | {"checkpoint.load_step": 2, "training.steps": 4, "optimizer.lr": 1e-2}
    run = train(tmp_path, tiny_data, again)
    said = capsys.readouterr().out
    assert "optimizer.lr was 0.0008, now 0.01" in said
    assert "set the later step-000004.superseded aside; set the later step-000006.superseded aside" in said
    assert [step for step, _ in rows(run)] == [1, 2, 3, 4]
    names = {path.name for path in (run / "checkpoints").iterdir()}
    assert names == {"step-000002", "step-000004", "step-000004.superseded", "step-000006.superseded"}
    with open_trainer(tmp_path, tiny_data, common | {"training.steps": 8}) as trainer:
        assert trainer.step == 4
    assert "resumed from" in capsys.readouterr().out


def test_loss_and_gradients_do_not_depend_on_accumulation(tmp_path: Path, tiny_data: TinyData) -> None:
    found = {}
    for local in (16, 4, 1):
        sizes = {"training.local_batch_size": local, "training.global_batch_size": 16}
        with open_trainer(tmp_path / str(local), tiny_data, {**WITHOUT_CHECKPOINTS, **sizes}) as trainer:
            gradients = gradients_of_step(trainer)
            steps = [trainer.train_step() for _ in range(3)]
            found[local] = gradients, [(loss.item(), norm.item()) for loss, norm, _ in steps]
            assert trainer.tokens_seen == 4 * 16 * SEQ_LEN
    for local in (4, 1):
        assert np.allclose(found[local][1], found[16][1], rtol=1e-6, atol=1e-6)
        for name, gradient in found[16][0].items():
            assert (found[local][0][name] - gradient).norm() < 1e-6 * gradient.norm() + 1e-9, name


def test_first_loss_is_the_mean_over_the_global_batch(tmp_path: Path, tiny_data: TinyData) -> None:
    with open_trainer(tmp_path, tiny_data, WITHOUT_CHECKPOINTS) as trainer:
        batch = {key: torch.from_numpy(array) for key, array in trainer.text.source.batch(np.arange(4)).items()}
        with torch.no_grad():
            logits = trainer.runner.parts[0](batch["input_ids"])
        expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())
        loss, _, _ = trainer.train_step()
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)


def test_smoothing_and_z_loss_are_in_the_training_loss_alone(tmp_path: Path, tiny_data: TinyData) -> None:
    options = {"training.label_smoothing": 0.2, "training.z_loss": 0.03}
    found = []
    for name, changes in (("plain", {}), ("smoothed", options)):
        with open_trainer(tmp_path / name, tiny_data, {**WITHOUT_CHECKPOINTS, **changes}) as trainer:
            batch = {key: torch.from_numpy(array) for key, array in trainer.text.source.batch(np.arange(4)).items()}
            with torch.no_grad():
                logits = trainer.runner.parts[0](batch["input_ids"]).flatten(0, 1)
            measured = trainer.runner.loss_sum(batch).item()
            loss, _, _ = trainer.train_step()
            found.append((measured, loss.item()))
    (plain, first), (measured, smoothed) = found
    assert measured == plain == pytest.approx(first * batch["labels"].numel(), rel=1e-6)
    expected = torch.nn.functional.cross_entropy(logits, batch["labels"].flatten(), label_smoothing=0.2)
    assert smoothed == pytest.approx((expected + 0.03 * logits.logsumexp(-1).square().mean()).item(), rel=1e-5)


def test_labels_are_shifted_exactly_once(tmp_path: Path, tiny_data: TinyData) -> None:
    """In a text that counts modulo 16, the model learns that the successor of t is t + 1."""
    with IndexedWriter(str(tmp_path / "count"), 16) as writer:
        writer.add_document(np.arange(4096) % 16)
    sidecar = writer.sidecar(tokenizer_sha256="0", eod_id=0, utf8_bytes=4096, source="counting")
    write_sidecar(str(tmp_path / "count"), sidecar)
    changes = {"data.train": str(tmp_path / "count"), "model.hf_assets_path": None, "model.vocab_size": 16}
    changes |= {"optimizer.lr": 1e-2, "training.steps": 60, "training.global_batch_size": 8, **WITHOUT_CHECKPOINTS}
    with open_trainer(tmp_path, tiny_data, changes) as trainer:
        batch = next(iter(trainer.text.loader))
        assert torch.equal(batch["labels"][:, :-1], batch["input_ids"][:, 1:])
        assert trainer.train()["training loss"] < 0.05
        with torch.no_grad():
            logits = trainer.runner.parts[0](torch.arange(16)[None])
    assert torch.equal(logits[0].argmax(-1), (torch.arange(16) + 1) % 16)


def test_validation_does_not_depend_on_its_batch_size(tmp_path: Path, tiny_data: TinyData) -> None:
    found = {}
    for size in (1, 3, 8):
        changes = {"validation.enable": True, "validation.local_batch_size": size, "model.dropout": 0.3}
        with open_trainer(tmp_path / str(size), tiny_data, {**WITHOUT_CHECKPOINTS, **changes}) as trainer:
            trainer.evaluate()
            assert trainer.runner.parts[0].training
            row = {key: rows(trainer.run_folder, f"val_{key}")[0][1] for key in ("loss", "perplexity", "bits_per_byte")}
            found[size], model = row, trainer.runner.parts[0].eval()
    assert found[1] == pytest.approx(found[3], rel=1e-6)
    assert found[8] == pytest.approx(found[3], rel=1e-6)

    held_out = IndexedDataset(tiny_data.validation)
    windows = (held_out.num_tokens - 1) // SEQ_LEN
    tokens = held_out.read_rows(np.arange(windows) * SEQ_LEN, SEQ_LEN + 1).astype(np.int64)
    with torch.no_grad():
        total = cross_entropy_sum(model(torch.from_numpy(tokens[:, :-1])), torch.from_numpy(tokens[:, 1:]))
    loss = total.item() / (windows * SEQ_LEN)
    sidecar = json.loads(Path(f"{tiny_data.validation}.json").read_text())
    nats_per_byte = loss * sidecar["tokens"] / sidecar["utf8_bytes"]
    expected = {"loss": loss, "perplexity": math.exp(loss), "bits_per_byte": nats_per_byte / math.log(2)}
    assert found[3] == pytest.approx(expected, rel=1e-5)


def test_validation_and_samples_do_not_disturb_training(tmp_path: Path, tiny_data: TinyData) -> None:
    often = {"validation.enable": True, "validation.freq": 1, "sampling.freq": 1, "sampling.max_new_tokens": 3}
    common = {"model.dropout": 0.1, **WITHOUT_CHECKPOINTS}
    quiet = train(tmp_path / "quiet", tiny_data, common)
    busy = train(tmp_path / "busy", tiny_data, common, often)
    assert rows(quiet) == rows(busy)
    assert len(rows(busy, "val_loss")) == 4


def test_schedule_and_decay_are_the_configs(tmp_path: Path, tiny_data: TinyData) -> None:
    changes = {"training.steps": 10, "lr_scheduler.decay_ratio": 0.5, "lr_scheduler.decay_type": "cosine"}
    changes |= {"optimizer.lr": 3e-3, "optimizer.weight_decay": 0.25, **WITHOUT_CHECKPOINTS}
    with open_trainer(tmp_path, tiny_data, changes) as trainer:
        trainer.train()
        schedule = trainer.config.lr_scheduler
        expected = [(step + 1, 3e-3 * lr_factor(schedule, 10, step)) for step in range(10)]
        assert rows(trainer.run_folder, "lr") == expected
        assert len({lr for _, lr in expected}) > 5
        decays = {p: group["weight_decay"] for group in trainer.optimizer.param_groups for p in group["params"]}
        for name, parameter in trainer.runner.parts[0].named_parameters():
            assert decays[parameter] == (0.0 if name.endswith("norm.weight") else 0.25), name


def test_skipped_steps_are_counted_logged_and_saved(tmp_path: Path, tiny_data: TinyData) -> None:
    with open_trainer(tmp_path, tiny_data) as trainer:
        loss = trainer.runner.loss
        trainer.runner.loss = lambda *arguments: loss(*arguments) * math.nan
        before = live_tensors(trainer)
        trainer.train_step()
        assert differing(before, live_tensors(trainer)) == []
        trainer.runner.loss = loss
        trainer.train()
        run = trainer.run_folder
    assert rows(run, "skipped_steps") == [(2, 1), (3, 1), (4, 1)]
    with open_trainer(tmp_path, tiny_data) as trainer:
        assert trainer.outcomes.skipped == 1


class CountSyncs(TorchDispatchMode):
    """Counts what would make the host wait for a device."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        waits = {"aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::masked_select"}
        if function.name() in waits:
            self.found.append(function.name())
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_step_never_waits_for_the_device(tmp_path: Path, tiny_data: TinyData, precision: str) -> None:
    with open_trainer(tmp_path, tiny_data, {**WITHOUT_CHECKPOINTS, **PRECISIONS[precision]}) as trainer:
        with CountSyncs() as syncs:
            for _ in range(3):
                loss, _, _ = trainer.train_step()
        assert syncs.found == []
        with CountSyncs() as syncs:
            loss.item()
        assert syncs.found == ["aten::_local_scalar_dense"]


def test_profiling_writes_a_trace(tmp_path: Path, tiny_data: TinyData) -> None:
    profiling = {"profiling.enable_profiling": True, "profiling.profile_freq": 2}
    run = train(tmp_path, tiny_data, WITHOUT_CHECKPOINTS, profiling)
    traces = sorted((run / "profile_traces").iterdir())
    assert [path.name for path in traces] == ["rank0_step2.json", "rank0_step4.json"]
    events = json.loads(traces[0].read_text())["traceEvents"]
    assert any("scaled_dot_product" in str(event.get("name")) for event in events)


def test_the_largest_seed_with_dropout(tmp_path: Path, tiny_data: TinyData) -> None:
    changes = {"debug.seed": 2**63 - 1, "model.dropout": 0.1, "training.steps": 2, **WITHOUT_CHECKPOINTS}
    assert len(rows(train(tmp_path, tiny_data, changes))) == 2


VALIDATED = {"validation.enable": True, "validation.freq": 1, "validation.steps": 1, "checkpoint.keep_best": True}


class Crash(BaseException):
    """The process dies here."""


def stop_after(trainer: Trainer, step: int) -> None:
    """Have a signal come in that step."""
    take = trainer.train_step

    def stopping() -> tuple[Tensor, Tensor, float]:
        found = take()
        trainer.stop.name = "SIGTERM" if trainer.step == step else None
        return found

    trainer.train_step = stopping  # type: ignore[method-assign]


def test_what_a_stop_put_off_is_told_once_and_risks_no_checkpoint(tmp_path: Path, tiny_data: TinyData) -> None:
    """However often the run dies before it has saved again, and although the step is the best so far."""
    run = tmp_path / "run"
    with open_trainer(tmp_path, tiny_data, VALIDATED) as trainer:
        stop_after(trainer, 3)
        trainer.train()
    assert [step for step, _ in rows(run, "val_loss")] == [1, 2]
    before = snapshot(run / "checkpoints" / "step-000003")

    def dying() -> tuple[Tensor, Tensor, float]:
        raise Crash

    for _ in range(2):
        with open_trainer(tmp_path, tiny_data, VALIDATED) as trainer, pytest.raises(Crash):
            trainer.train_step = dying  # type: ignore[method-assign]
            trainer.train()
        assert trainer.best is not None and trainer.best["step"] == 3
        assert snapshot(run / "checkpoints" / "step-000003") == before
    train(tmp_path, tiny_data, VALIDATED)
    assert [step for step, _ in rows(run, "val_loss")] == [1, 2, 3, 4]


def test_a_stop_in_the_last_step_leaves_one_validation(tmp_path: Path, tiny_data: TinyData) -> None:
    with open_trainer(tmp_path, tiny_data, VALIDATED) as trainer:
        stop_after(trainer, 4)
        trainer.train()
    for _ in range(2):
        train(tmp_path, tiny_data, VALIDATED)
        assert [step for step, _ in rows(tmp_path / "run", "val_loss")] == [1, 2, 3, 4]


def test_a_validation_that_is_not_a_number_is_not_the_best(tmp_path: Path, tiny_data: TinyData) -> None:
    with open_trainer(tmp_path, tiny_data, VALIDATED) as trainer:
        loss_sum, losses = trainer.runner.loss_sum, iter([float("nan"), 1.0, 1.0, 1.0])
        trainer.runner.loss_sum = lambda batch: loss_sum(batch) * next(losses)  # type: ignore[method-assign]
        trainer.train()
        assert trainer.best is not None and trainer.best["step"] == 4
