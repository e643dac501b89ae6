"""What scripts/checkpoint.py says of a run: what it has, what is damaged, what differs, what may go."""

import json
import os
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import ROOT, TinyData, flip_bit, run_python, snapshot
from runs import open_trainer

from titanling.checkpoint import folder
from titanling.checkpoint.compare import compare, difference_text
from titanling.checkpoint.describe import inspect
from titanling.checkpoint.inventory import find_root, prune, take_stock, verify
from titanling.checkpoint.shards import Piece, write_tensors
from titanling.errors import UserError

CHANGES: dict[str, Any] = {
    "training.steps": 8,
    "checkpoint.interval": 2,
    "checkpoint.keep_latest_k": 0,
    "validation.enable": True,
    "validation.freq": 4,
    "validation.steps": 1,
}
SHARD = "model/shard-00001-of-00001.safetensors"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_data: TinyData) -> Path:
    """A run folder with the checkpoints of steps 2, 4, 6 and 8, of which that of step 8 is the best."""
    where = tmp_path_factory.mktemp("stock")
    with open_trainer(where, tiny_data, CHANGES) as trainer:
        trainer.train()
        assert trainer.best is not None and trainer.best["step"] == 8
    shutil.copy(where / "run.toml", where / "run" / "config.toml")  # which titanling.train writes
    return where / "run"


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return shutil.copytree(finished, tmp_path / "run")


def checkpoint(run: Path, step: int) -> Path:
    """Folder of one checkpoint."""
    return folder.step_folder(run / "checkpoints", step)


def script(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run scripts/checkpoint.py."""
    return run_python(ROOT / "scripts" / "checkpoint.py", *arguments)


def rewrite(path: Path, changes: Mapping[str, Any]) -> None:
    """Change a checkpoint's state.json and its manifest with it."""
    state = folder.read_json(path / folder.STATE) | dict(changes)
    folder.write_json(path / folder.STATE, state)
    path.rename(folder.working_folder(path))
    working = folder.working_folder(path)
    folder.commit(path, {name: folder.digest(working / name) for name in folder.files_of(working)})


def steps(run: Path) -> list[int]:
    """Steps that are left."""
    return folder.list_steps(run / "checkpoints")


def test_list(run: Path) -> None:
    checkpoints = run / "checkpoints"
    flip_bit(checkpoint(run, 2) / folder.MANIFEST)
    os.truncate(checkpoint(run, 4) / SHARD, 100)
    for name in ("step-000006.damaged", "step-000010.partial", "step-000006.mine"):
        shutil.copytree(checkpoint(run, 6), checkpoints / name)
    (checkpoints / "notes").mkdir()
    found = {entry.path.name: entry for entry in take_stock(find_root(str(run)))}
    assert {name: entry.state for name, entry in found.items()} == {
        "step-000002": "damaged",
        "step-000004": "damaged",
        "step-000006": "whole",
        "step-000006.damaged": ".damaged",
        "step-000006.mine": ".mine",
        "step-000008": "whole",
        "step-000010.partial": ".partial",
    }
    assert folder.MANIFEST in str(found["step-000002"].problem) and SHARD in str(found["step-000004"].problem)
    assert found["step-000008"].best and not found["step-000006"].best and found["step-000008"].ranks == 1
    size = sum(path.stat().st_size for path in checkpoint(run, 8).rglob("*.*") if path.name != folder.MANIFEST)
    assert found["step-000008"].bytes == size


def test_list_as_a_command(run: Path) -> None:
    rewrite(checkpoint(run, 6), {"model_only": True})
    done = script("list", run)
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert len(lines) == 6 and "4 whole checkpoints" in lines[0]
    assert " weights  " in lines[4] and lines[5].endswith("whole, best by validation")
    assert done.stdout == script("list", run / "checkpoints").stdout
    found = json.loads(script("list", run, "--json").stdout)
    assert [each["step"] for each in found["checkpoints"]] == [2, 4, 6, 8]


def test_verify_names_every_bad_file(run: Path) -> None:
    assert script("verify", run).returncode == 0
    bad = [checkpoint(run, 4) / SHARD, checkpoint(run, 4) / folder.STATE, checkpoint(run, 8) / SHARD]
    for path in bad[:2]:
        flip_bit(path)
    bad[2].unlink()
    shutil.copy(checkpoint(run, 2) / SHARD, checkpoint(run, 2) / "model" / "more.safetensors")
    bad.append(checkpoint(run, 2) / "model" / "more.safetensors")
    done = script("verify", run)
    assert done.returncode == 1 and done.stdout.count("DAMAGED") == 3 and done.stdout.count("good") == 1
    assert all(str(path) in done.stdout for path in bad)
    assert [len(verdict.bad) for verdict in verify([str(run)])] == [1, 2, 0, 1]
    done = script("verify", checkpoint(run, 6), checkpoint(run, 8), "--json")
    assert done.returncode == 1 and [each["whole"] for each in json.loads(done.stdout)] == [True, False]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["verify", "nowhere"], "no such folder"),
        (["list", "tests"], "neither a run folder"),
        (["inspect", "tests"], "not a whole checkpoint"),
        (["diff", "nowhere", "tests"], "no such checkpoint folder"),
        (["prune", "tests", "--keep", "0"], "--keep must be 1 or more"),
        (["list", "nosuch://bucket/run"], "Unsupported filesystem: 'nosuch'"),
    ],
)
def test_wrong_input(arguments: list[str], words: str) -> None:
    done = script(*arguments)
    assert done.returncode == 2 and words in done.stderr and len(done.stderr.splitlines()) == 1


def test_a_hostile_name_does_not_reach_the_terminal(run: Path) -> None:
    (checkpoint(run, 2) / "model" / "\x1b[2J.safetensors").write_bytes(b"")
    said = script("verify", run).stdout
    assert "\x1b" not in said and "\\x1b[2J.safetensors" in said


def test_inspect(run: Path) -> None:
    text = inspect(str(checkpoint(run, 8)), tensors=True)
    assert "39,072, 18,592 non-embedding" in text and "8 of 8; 1,024 tokens seen" in text and "by 1 rank" in text
    row = next(line.split() for line in text.splitlines() if line.startswith("model.embed_tokens.weight "))
    assert row == ["model.embed_tokens.weight", "model", "F32", "320", "×", "32", "40,960", "whole"]


def test_how_tensors_are_divided(run: Path) -> None:
    values, part = torch.zeros(4, 6), checkpoint(run, 8) / "model"
    (part / SHARD.partition("/")[2]).unlink()
    pieces = [
        {"rows": Piece(values[:3], (0, 0)), "blocks": Piece(values[:2, :3], (0, 0))},
        {"rows": Piece(values[3:], (3, 0)), "blocks": Piece(values[2:, 3:], (2, 3))},
    ]
    for number, each in enumerate(pieces):
        with (part / f"{number}.safetensors").open("wb") as file:
            write_tensors(file, each)
    rewrite(checkpoint(run, 8), {})
    text = inspect(str(checkpoint(run, 8)), tensors=True)
    assert "dimension 0: 3 + 1" in text and "2 blocks over dimensions 0, 1" in text


def test_diff(run: Path) -> None:
    same = compare(str(checkpoint(run, 8)), str(checkpoint(run, 8)))
    assert same.equal and same.compared == 21 * 4
    found = compare(str(checkpoint(run, 4)), str(checkpoint(run, 8)))
    assert ("step", 4, 8) in found.state and found.config == [] and len(found.tensors) == 84
    done = script("diff", checkpoint(run, 4), checkpoint(run, 8))
    assert done.returncode == 1 and "tensors: 0 of 84 are equal bit for bit" in done.stdout


def test_diff_of_single_tensors(run: Path, tmp_path: Path) -> None:
    """Types, shapes, names, not-a-number and the sign of zero."""
    values = torch.tensor([1.0, -2.0, 0.0])
    mine = {"a": values, "half": values, "nan": values, "zero": values, "gone": values, "long": values, "same": values}
    theirs = {
        "a": values + torch.tensor([0.0, 0.5, 0.0]),
        "half": values.half(),
        "nan": torch.tensor([1.0, float("nan"), 0.0]),
        "long": torch.zeros(4),
        "same": values,
    }
    theirs["zero"] = torch.tensor([1.0, -2.0, -0.0])
    for step, tensors in ((2, mine), (4, theirs)):
        with (checkpoint(run, step) / SHARD).open("wb") as file:
            write_tensors(file, {name: Piece(each, (0,)) for name, each in tensors.items()})
        rewrite(checkpoint(run, step), {"config": {"training": {"steps": step}}})
    found = compare(str(checkpoint(run, 2)), str(checkpoint(run, 4)))
    assert found.config == [("training.steps", 2, 4)]
    assert {name: what for name, what in found.tensors if name.startswith("model: ")} == {
        "model: a": "max 0.5, relative 0.25, 1 of 3 values",
        "model: half": "F32 → F16, equal values",
        "model: nan": "max nan, relative nan, 1 of 3 values",
        "model: zero": "equal values, other bits (-0 and 0)",
        "model: gone": "only in A",
        "model: long": "shape [3] → [4]",
    }
    assert "training.steps  2 → 4" in difference_text(found, "a", "b")


def test_prune(run: Path) -> None:
    before = snapshot(run)
    done = script("prune", run, "--keep", "1", "--dry-run")
    assert done.returncode == 0 and "would delete 3 checkpoints" in done.stdout and snapshot(run) == before
    done = script("prune", run, "--keep", "1", "--every", "4")
    assert done.returncode == 0 and "deleted 2 checkpoints" in done.stdout and "a multiple of 4" in done.stdout
    assert steps(run) == [4, 8]


def test_prune_keeps_what_verifies_and_the_best(run: Path) -> None:
    """Damage that sizes do not show is found before anything is deleted, and does not count."""
    for step in (6, 8):
        rewrite(checkpoint(run, step), {"best": {"step": 2, "val_loss": 1.0}})
    flip_bit(checkpoint(run, 8) / SHARD)
    pruned = prune(str(run), 1)
    assert pruned.deleted == [4] and steps(run) == [2, 6, 8]
    flip_bit(checkpoint(run, 6) / SHARD)
    assert prune(str(run), 2).deleted == []
    flip_bit(checkpoint(run, 2) / SHARD)
    with pytest.raises(UserError, match="no checkpoint verifies"):
        prune(str(run), 1)
    assert steps(run) == [2, 6, 8]


def test_a_run_whose_checkpoints_are_elsewhere(run: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    (run / "checkpoints").rename(elsewhere)
    (run / "config.toml").write_text(f'[checkpoint]\nfolder = "file://{elsewhere}"\n')
    assert [entry.step for entry in take_stock(find_root(str(run)))] == [2, 4, 6, 8]
    assert prune(str(run), 1).deleted == [2, 4, 6]
    assert folder.list_steps(elsewhere) == [8]
