"""Checkpoints of a real (tiny) run: what is on disk, what a resume reads, and what happens to damaged ones."""

import json
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed.checkpoint as dcp
from helpers import TinyData, flip_bit, snapshot
from runs import Tensors, differing, live_tensors, open_trainer, rows, saved_tensors
from torch.distributed.checkpoint import HuggingFaceStorageReader

from titanling.checkpoint import folder
from titanling.errors import UserError

CHANGES: dict[str, Any] = {"training.steps": 6, "checkpoint.interval": 2, "checkpoint.keep_latest_k": 2}
FILES = [
    "manifest.json",
    "model/shard-00001-of-00001.safetensors",
    "optimizer/shard-00001-of-00001.safetensors",
    "state.json",
]

SUFFIXES = (".exp_avg", ".exp_avg_sq", ".step")


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


def damage(run: Path, step: int, name: str) -> Path:
    """Flip one bit in the middle of a checkpoint's file; its path."""
    path = checkpoint(run, step) / name
    flip_bit(path)
    return path


@pytest.mark.parametrize("name", FILES)
def test_damage_is_named_and_the_checkpoint_before_is_taken(
    copy_run: Path, tiny_data: TinyData, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = damage(copy_run, 6, name)
    content = path.read_bytes()
    assert resume(copy_run, tiny_data, {})["lm_head.weight.step"].item() == 4
    said = capsys.readouterr()
    assert f"warning: {path}" in said.err and f"damaged: going back to {checkpoint(copy_run, 4)}" in said.err
    assert "set the damaged step-000006.damaged aside" in said.out
    assert [p.name for p in sorted(path.parents[name.count("/") + 1].iterdir())] == [
        "step-000004",
        "step-000006.damaged",
    ]
    assert (checkpoint(copy_run, 6).with_name("step-000006.damaged") / name).read_bytes() == content
    assert rows(copy_run / "run")[-1][0] == 4


@pytest.mark.parametrize("changes", [{"checkpoint.fallback": False}, {"checkpoint.load_step": 6}])
def test_without_fallback_damage_is_refused(copy_run: Path, tiny_data: TinyData, changes: Mapping[str, Any]) -> None:
    path = damage(copy_run, 6, FILES[1])
    before = snapshot(copy_run)
    with pytest.raises(UserError, match="damaged: delete .*load_step 4") as refusal:
        resume(copy_run, tiny_data, changes)
    assert str(path) in str(refusal.value) and "\n" not in str(refusal.value)
    (copy_run / "run.toml").unlink()
    assert snapshot(copy_run) == before


def test_if_all_are_damaged_the_run_is_refused_and_nothing_moves(copy_run: Path, tiny_data: TinyData) -> None:
    paths = [damage(copy_run, step, FILES[2]) for step in (4, 6)]
    with pytest.raises(UserError, match="step-000004.*damaged: delete .*, or start anew$") as refusal:
        resume(copy_run, tiny_data, {})
    assert str(paths[0]) in str(refusal.value)
    assert folder.list_steps(checkpoint(copy_run, 6).parent) == [4, 6]


def test_files_of_another_step_are_noticed(copy_run: Path, tiny_data: TinyData) -> None:
    """Swapped in whole, each file is good in itself."""
    shutil.copyfile(checkpoint(copy_run, 4) / FILES[1], checkpoint(copy_run, 6) / FILES[1])
    with pytest.raises(UserError, match="its hash is not"):
        resume(copy_run, tiny_data, {"checkpoint.fallback": False})


def test_verify_can_be_switched_off(finished: Finished, copy_run: Path, tiny_data: TinyData) -> None:
    path = checkpoint(copy_run, 6) / FILES[1]
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    found = resume(copy_run, tiny_data, {"checkpoint.verify": False})
    assert len(differing(found, finished.tensors)) == 1


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
def test_a_failed_save_is_reported_and_training_goes_on(
    finished: Finished,
    copy_run: Path,
    tiny_data: TinyData,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    obstacle: str,
) -> None:
    """The next save works again, or the next start goes on from the last whole checkpoint."""
    blocked = checkpoint(copy_run, 8).with_name("step-000008.partial")
    room = shutil.disk_usage
    with open_trainer(copy_run, tiny_data, {**CHANGES, "training.steps": 10}) as trainer:
        if obstacle == "cannot write":
            blocked.write_text("in the way")
        else:
            monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 0))
        save = trainer.save

        def saved(last: bool) -> None:
            save(last)
            monkeypatch.setattr(shutil, "disk_usage", room)

        trainer.save = saved  # type: ignore[method-assign]
        trainer.train()
        assert folder.list_steps(trainer.checkpointer.root) == [6, 10]
    said = capsys.readouterr().err
    assert "step-000008: could not be saved" in said and "Training goes on" in said
    assert obstacle == "cannot write" or "bytes and the disk has 0 free" in said


def test_a_failed_last_save_ends_the_run_with_an_error(
    finished: Finished, copy_run: Path, tiny_data: TinyData, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 0))
    with open_trainer(copy_run, tiny_data, {**CHANGES, "training.steps": 8}) as trainer:
        with pytest.raises(UserError, match="step-000008: could not be saved: .*Earlier checkpoints are untouched"):
            trainer.train()
    monkeypatch.undo()
    assert folder.list_steps(copy_run / "run" / "checkpoints") == [4, 6]
    assert differing(resume(copy_run, tiny_data, {}), finished.tensors) == []


@pytest.mark.parametrize("mode", ["async", "async_with_pinned_mem"])
def test_saving_in_the_background_saves_the_same(
    finished: Finished, tmp_path: Path, tiny_data: TinyData, mode: str
) -> None:
    """Each save holds its own step, although training goes on while it is written."""
    changes = {**CHANGES, "checkpoint.async_mode": mode, "checkpoint.interval": 1, "checkpoint.keep_latest_k": 0}
    with open_trainer(tmp_path, tiny_data, changes) as trainer:
        trainer.train()
    for step in (4, 6):
        here, there = (saved_tensors(checkpoint(folder, step)) for folder in (tmp_path, finished.folder))
        assert differing(here, there) == []
    assert folder.list_steps(tmp_path / "run" / "checkpoints") == [1, 2, 3, 4, 5, 6]


def test_old_checkpoints_stay_until_a_newer_one_reads_back(
    tmp_path: Path, tiny_data: TinyData, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A disk that damages whatever is written to it costs no good checkpoint."""
    forget = folder.forget_cached

    def damaging(path: Path) -> None:
        forget(path)
        if path.name.startswith("shard") and path.parents[1].name != "step-000002":
            flip_bit(path)

    monkeypatch.setattr(folder, "forget_cached", damaging)
    with open_trainer(tmp_path, tiny_data, {**CHANGES, "training.steps": 8}) as trainer:
        with pytest.raises(UserError, match="step-000008.*does not read back as it was written.*are untouched"):
            trainer.train()
    assert folder.list_steps(tmp_path / "run" / "checkpoints") == [2, 4, 6, 8]
    said = capsys.readouterr().err
    assert "step-000006" in said and "does not read back as it was written; look at the disk. Training goes on" in said
    monkeypatch.undo()
    assert resume(tmp_path, tiny_data, {"training.steps": 8})["lm_head.weight.step"].item() == 2


def test_a_file_that_cannot_be_read_back_is_warned_of(
    tmp_path: Path, tiny_data: TinyData, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is gone, or the disk gives an error: the run goes on, and its older checkpoints stay."""
    commit = folder.commit

    def losing(final: Path, files: dict[str, dict[str, Any]]) -> None:
        commit(final, files)
        if final.name == "step-000006":
            (final / FILES[1]).unlink()

    monkeypatch.setattr(folder, "commit", losing)
    with open_trainer(tmp_path, tiny_data, {**CHANGES, "training.steps": 8}) as trainer:
        trainer.train()
        assert trainer.step == 8
    said = capsys.readouterr().err
    assert f"{checkpoint(tmp_path, 6) / FILES[1]}: missing" in said and "earlier checkpoints are as they were" in said


def test_the_best_by_validation_and_multiples_are_kept(tmp_path: Path, tiny_data: TinyData) -> None:
    changes = {
        "training.steps": 9,
        "checkpoint.interval": 4,
        "checkpoint.keep_latest_k": 2,
        "checkpoint.keep_every": 4,
        "checkpoint.keep_best": True,
        "validation.enable": True,
        "validation.freq": 1,
        "validation.steps": 1,
    }
    with open_trainer(tmp_path, tiny_data, changes) as trainer:
        losses = iter([5.0, 4.0, 3.0, 3.5, 3.6, 3.7, 3.8, 3.9, 3.95])
        evaluate = trainer.evaluate

        def scripted() -> None:
            before = trainer.best
            evaluate()
            loss = next(losses)
            trainer.best = (
                {"step": trainer.step, "val_loss": loss} if not before or loss < before["val_loss"] else before
            )

        trainer.evaluate = scripted  # type: ignore[method-assign]
        trainer.train()
    assert folder.list_steps(tmp_path / "run" / "checkpoints") == [3, 4, 8, 9]
    with open_trainer(tmp_path, tiny_data, {**changes, "training.steps": 10}) as trainer:
        assert trainer.best == {"step": 3, "val_loss": 3.0}


def test_saving_by_the_clock(tmp_path: Path, tiny_data: TinyData) -> None:
    changes = {"training.steps": 3, "checkpoint.interval": 100, "checkpoint.interval_minutes": 1e-9}
    with open_trainer(tmp_path, tiny_data, changes) as trainer:
        trainer.train()
    assert folder.list_steps(tmp_path / "run" / "checkpoints") == [1, 2, 3]


def test_a_last_save_of_weights_only(
    finished: Finished, tmp_path: Path, tiny_data: TinyData, capsys: pytest.CaptureFixture[str]
) -> None:
    """It ends the run; extended, the run goes on from the last whole checkpoint."""
    changes = {**CHANGES, "checkpoint.last_save_model_only": True, "checkpoint.export_dtype": "bfloat16"}
    with open_trainer(tmp_path, tiny_data, changes) as trainer:
        trainer.train()
    saved = saved_tensors(checkpoint(tmp_path, 6))
    expected = {n: t.bfloat16() for n, t in finished.tensors.items() if n.count(".") and not n.endswith(SUFFIXES)}
    assert differing(saved, expected) == []
    with open_trainer(tmp_path, tiny_data, changes) as trainer:
        assert trainer.step == 6
    with open_trainer(tmp_path, tiny_data, {**changes, "training.steps": 8}) as trainer:
        assert trainer.step == 4
    assert "step-000006: holds only weights: going back to" in capsys.readouterr().err
    assert differing(saved_tensors(checkpoint(tmp_path, 6).with_name("step-000006.superseded")), saved) == []


def forge(path: Path, key: str, value: Any) -> None:
    """Change a checkpoint's state.json and its manifest with it."""
    folder.write_json(path / folder.STATE, folder.read_json(path / folder.STATE) | {key: value})
    files = {name: folder.digest(path / name) for name in folder.files_of(path)}
    folder.write_json(path / folder.MANIFEST, folder._manifest(files))


@pytest.mark.parametrize("loader", [{"dataset_state": 1}, {"dataset_state": {"samples": "x"}}])
def test_a_place_in_the_data_that_is_none_is_refused(
    copy_run: Path, tiny_data: TinyData, loader: dict[str, Any]
) -> None:
    forge(checkpoint(copy_run, 6), "loader", loader)
    with pytest.raises(UserError, match="step-000006: its state.json has no usable scaler or loader"):
        resume(copy_run, tiny_data, {})


def test_a_changed_setting_is_told_on_one_line(
    copy_run: Path, tiny_data: TinyData, capsys: pytest.CaptureFixture[str]
) -> None:
    forge(checkpoint(copy_run, 6), "config", {"optimizer": {"name": "a\nerror: b"}})
    resume(copy_run, tiny_data, {})
    assert "optimizer.name was a error: b, now " in capsys.readouterr().out


def test_starting_from_another_run(finished: Finished, tmp_path: Path, tiny_data: TinyData) -> None:
    source = str(checkpoint(finished.folder, 6))
    weights = {name: t for name, t in finished.tensors.items() if not name.endswith(SUFFIXES)}
    common = {"training.steps": 8, "checkpoint.initial_load_path": source}
    with open_trainer(tmp_path / "weights", tiny_data, common | {"model.dropout": 0.1}) as trainer:
        found = live_tensors(trainer)
        assert trainer.step == 0
        assert differing({name: found[name] for name in weights}, weights) == []
        assert not any(found[f"{name}.exp_avg"].any() for name in weights)
        trainer.train()
    with open_trainer(tmp_path / "weights", tiny_data, common | {"model.dropout": 0.1}) as trainer:
        assert trainer.step == 8  # its own checkpoint comes first
    common |= {"checkpoint.initial_load_model_only": False}
    with open_trainer(tmp_path / "all", tiny_data, common) as trainer:
        assert (trainer.step, trainer.tokens_seen) == (6, 6 * 4 * 32)
        assert differing(live_tensors(trainer), finished.tensors) == []
    common |= {"checkpoint.initial_load_fresh_schedule": True}
    with open_trainer(tmp_path / "fresh", tiny_data, common) as trainer:
        assert (trainer.step, trainer.tokens_seen) == (0, 0)
        assert differing(live_tensors(trainer), finished.tensors) == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"checkpoint.initial_load_path": "{folder}/nothing"}, "neither a step-… folder of a run nor a Hugging Face"),
        ({"model.n_layers": 3}, "another model .*n_layers was 2 and is now 3; set the same sizes"),
    ],
)
def test_starting_from_what_does_not_fit(
    finished: Finished, tmp_path: Path, tiny_data: TinyData, changes: dict[str, Any], words: str
) -> None:
    source = {"checkpoint.initial_load_path": str(checkpoint(finished.folder, 6))}
    changes = {key: str(value).format(folder=tmp_path) if "path" in key else value for key, value in changes.items()}
    with pytest.raises(UserError, match=words):
        with open_trainer(tmp_path, tiny_data, source | changes):
            pass


def test_torch_reads_what_we_write(finished: Finished) -> None:
    """The files are those of torch's distributed checkpoint in safetensors."""
    names = [name for name in finished.tensors if not name.endswith(SUFFIXES)]
    tensors = {name: torch.zeros_like(finished.tensors[name]) for name in names}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(tensors, storage_reader=HuggingFaceStorageReader(str(checkpoint(finished.folder, 6) / "model")))
    assert differing(tensors, {name: finished.tensors[name] for name in names}) == []
