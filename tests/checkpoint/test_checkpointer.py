"""Checkpoints of a real (tiny) run: what is on disk, what a resume reads, and what happens to damaged ones."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from helpers import TinyData
from runs import Tensors, differing, live_tensors, open_trainer, rows, saved_tensors

from titanling.checkpoint import folder
from titanling.errors import UserError

CHANGES: dict[str, Any] = {"training.steps": 6, "checkpoint.interval": 2, "checkpoint.keep_latest_k": 2}
FILES = [
    "manifest.json",
    "model/shard-00001-model-00001-of-00001.safetensors",
    "optimizer/shard-00001-model-00001-of-00001.safetensors",
    "state.json",
]


class Finished(NamedTuple):
    """A run of six steps that kept the checkpoints of steps 4 and 6."""

    folder: Path
    tensors: Tensors


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_data: TinyData) -> Finished:
    """The run. Tests that change it copy it first (`copy_run`)."""
    where = tmp_path_factory.mktemp("finished")
    with open_trainer(where, tiny_data, CHANGES) as trainer:
        trainer.train()
        return Finished(where, live_tensors(trainer))


@pytest.fixture
def copy_run(finished: Finished, tmp_path: Path) -> Path:
    """A copy of the finished run: the folder to give to `open_trainer`."""
    shutil.copytree(finished.folder / "run", tmp_path / "run")
    return tmp_path


def checkpoint(run: Path, step: int) -> Path:
    """Folder of one checkpoint."""
    return run / "run" / "checkpoints" / f"step-{step:06d}"


def resume(run: Path, data: TinyData, changes: Mapping[str, Any]) -> Tensors:
    """Start the run again without training; its tensors."""
    with open_trainer(run, data, {**CHANGES, **changes}) as trainer:
        return live_tensors(trainer)


def test_layout_on_disk(finished: Finished) -> None:
    assert sorted(path.name for path in checkpoint(finished.folder, 6).parent.iterdir()) == [
        "step-000004",
        "step-000006",
    ]
    for step in (4, 6):
        found = [p.relative_to(checkpoint(finished.folder, step)) for p in checkpoint(finished.folder, step).rglob("*")]
        assert sorted(str(path) for path in found if path.suffix) == FILES


def test_no_pickle_anywhere(finished: Finished) -> None:
    for name in FILES:
        content = (checkpoint(finished.folder, 6) / name).read_bytes()
        assert not content.startswith((b"\x80", b"PK"))  # pickle, torch.save's zip
        if name.endswith(".json"):
            json.loads(content)
        else:  # a length, then a JSON header that accounts for every byte of the file
            size = int.from_bytes(content[:8], "little")
            header = json.loads(content[8 : 8 + size])
            ends = [entry["data_offsets"][1] for key, entry in header.items() if key != "__metadata__"]
            assert 8 + size + max(ends) == len(content)


def test_files_hold_the_live_tensors_under_hugging_face_names(finished: Finished) -> None:
    saved = saved_tensors(checkpoint(finished.folder, 6))
    assert differing(saved, finished.tensors) == []
    for name in ("model.embed_tokens.weight", "model.layers.1.self_attn.q_proj.weight", "lm_head.weight"):
        assert {name, f"{name}.exp_avg", f"{name}.exp_avg_sq", f"{name}.step"} <= saved.keys()
        assert saved[f"{name}.step"].item() == 6


def test_state(finished: Finished) -> None:
    state = json.loads((checkpoint(finished.folder, 6) / "state.json").read_text())
    assert (state["step"], state["tokens_seen"], state["skipped_steps"]) == (6, 6 * 4 * 32, 0)
    assert state["model"]["dim"] == 32 and state["config"]["checkpoint"]["interval"] == 2
    assert (checkpoint(finished.folder, 6) / "state.json").stat().st_size < 10_000


def test_a_finished_run_loads_bit_by_bit(finished: Finished, copy_run: Path, tiny_data: TinyData) -> None:
    assert differing(resume(copy_run, tiny_data, {}), finished.tensors) == []


def test_load_step(finished: Finished, copy_run: Path, tiny_data: TinyData) -> None:
    earlier = saved_tensors(checkpoint(finished.folder, 4))
    assert differing(resume(copy_run, tiny_data, {"checkpoint.load_step": 4}), earlier) == []
    assert rows(copy_run / "run")[-1][0] == 4


def test_load_step_that_is_not_there(copy_run: Path, tiny_data: TinyData) -> None:
    with pytest.raises(UserError, match=r"load_step = 5.* \(it has: 4, 6\)"):
        resume(copy_run, tiny_data, {"checkpoint.load_step": 5})
    assert rows(copy_run / "run")[-1][0] == 6


def test_leftovers_are_removed_at_the_start(finished: Finished, copy_run: Path, tiny_data: TinyData) -> None:
    half = checkpoint(copy_run, 6).with_name("step-000008.partial")
    shutil.copytree(checkpoint(copy_run, 6), half)
    doomed = half.with_name("step-000002.deleted")
    doomed.mkdir()
    assert differing(resume(copy_run, tiny_data, {}), finished.tensors) == []
    assert not half.exists() and not doomed.exists()


@pytest.mark.parametrize("name", FILES)
def test_damage_is_refused_and_named(copy_run: Path, tiny_data: TinyData, name: str) -> None:
    path = checkpoint(copy_run, 6) / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match="damaged: delete .*load_step 4") as refusal:
        resume(copy_run, tiny_data, {})
    assert str(path) in str(refusal.value) and "\n" not in str(refusal.value)
    shutil.rmtree(checkpoint(copy_run, 6))
    assert resume(copy_run, tiny_data, {})["lm_head.weight.step"].item() == 4


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model.n_layers": 3}, "another model .*n_layers was 2 and is now 3"),
        ({"model.qk_norm": True}, "another model .*qk_norm"),
        ({"training.seq_len": 16}, "other data .*seq_len was 32 and is now 16"),
        ({"debug.seed": 1}, "other data .*seed"),
    ],
)
def test_another_model_or_other_data_is_refused(
    copy_run: Path, tiny_data: TinyData, changes: Mapping[str, Any], words: str
) -> None:
    with pytest.raises(UserError, match=words):
        resume(copy_run, tiny_data, changes)
    assert folder.list_steps(copy_run / "run" / "checkpoints") == [4, 6]


def test_another_parameter_type_is_converted(finished: Finished, copy_run: Path, tiny_data: TinyData) -> None:
    changes = {"training.dtype": "bfloat16", "training.mixed_precision_param": "bfloat16"}
    found = resume(copy_run, tiny_data, changes)
    for name, tensor in finished.tensors.items():
        expected = tensor if name.endswith(".step") else tensor.bfloat16()
        assert torch.equal(found[name], expected), name


def test_first_step_and_last_step(tmp_path: Path, tiny_data: TinyData) -> None:
    changes = {"checkpoint.enable_first_step_checkpoint": True, "training.steps": 5, "checkpoint.interval": 3}
    with open_trainer(tmp_path, tiny_data, changes) as trainer:
        trainer.train()
        assert folder.list_steps(trainer.checkpointer.root) == [1, 3, 5]


def test_disabled(tmp_path: Path, tiny_data: TinyData) -> None:
    with open_trainer(tmp_path, tiny_data, {**CHANGES, "checkpoint.enable": False}) as trainer:
        assert trainer.step == 0
        assert not any(trainer.checkpointer.due(step, last=True) for step in range(8))


def test_disabled_does_not_start_over_in_a_folder_that_has_checkpoints(copy_run: Path, tiny_data: TinyData) -> None:
    rows = (copy_run / "run" / "metrics.jsonl").read_bytes()
    with pytest.raises(UserError, match=r"checkpoint.enable = false: .* would start over; set checkpoint.enable"):
        with open_trainer(copy_run, tiny_data, {**CHANGES, "checkpoint.enable": False}):
            pass
    assert (copy_run / "run" / "metrics.jsonl").read_bytes() == rows
    assert folder.list_steps(copy_run / "run" / "checkpoints") == [4, 6]


@pytest.mark.parametrize("obstacle", ["no space", "cannot write"])
def test_a_failed_save_leaves_the_others(
    finished: Finished, copy_run: Path, tiny_data: TinyData, monkeypatch: pytest.MonkeyPatch, obstacle: str
) -> None:
    """The next start goes on from the last whole checkpoint."""
    if obstacle == "no space":
        monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 0))
    else:
        checkpoint(copy_run, 8).with_name("step-000008.partial").mkdir()
        monkeypatch.setattr(shutil, "rmtree", lambda *arguments, **options: None)
    with open_trainer(copy_run, tiny_data, {**CHANGES, "training.steps": 8}) as trainer:
        with pytest.raises(UserError, match="step-000008: .*could not be saved: .*Earlier checkpoints are untouched"):
            trainer.train()
    monkeypatch.undo()
    assert folder.list_steps(copy_run / "run" / "checkpoints") == [4, 6]
    assert differing(resume(copy_run, tiny_data, {}), finished.tensors) == []
