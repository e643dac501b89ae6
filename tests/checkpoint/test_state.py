"""A state.json with odd values, its hashes right: refused in one line by every reader, naming the key."""

import copy
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
from helpers import ROOT

from titanling.checkpoint import folder
from titanling.checkpoint.describe import inspect
from titanling.checkpoint.inventory import take_stock
from titanling.checkpoint.resume import check_resumable
from titanling.checkpoint.state import read_state
from titanling.errors import UserError

SAVED = ROOT / "tests/compatibility/053da0a/runs"
ODD: list[Any] = [None, True, -1, 1.5, math.nan, 2**63, 10**400, "x", "\x1b[2J" * 2000, [], [None], {}, {"a": [{}]}]
COUNTS = ("step", "tokens_seen", "best.step", "data.seq_len", "data.stages.0.start")
OTHERS = ("best", "best.val_loss", "interrupted", "scaler", "loader", "data", "data.seed", "data.sources",
          "data.sources.train", "data.stages", "data.stages.0", "data.stages.0.weights",
          "data.stages.0.weights.train", "model", "config", "skipped_steps", "model_only")  # fmt: skip


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A checkpoint, free to be changed."""
    return Path(shutil.copytree(SAVED / "one/checkpoints/step-000002", tmp_path / "step-000002"))


def forge(checkpoint: Path, state: dict[str, Any]) -> None:
    """Another state.json, and the manifest with it."""
    folder.write_json(checkpoint / folder.STATE, state)
    files = {name: folder.digest(checkpoint / name) for name in folder.files_of(checkpoint)}
    folder.write_json(checkpoint / folder.MANIFEST, folder._manifest(files))


def changed(state: dict[str, Any], dotted: str, value: Any) -> dict[str, Any]:
    """A copy with another value at a dotted key."""
    state = copy.deepcopy(state)
    *tables, key = dotted.split(".")
    inner: Any = state
    for table in tables:
        inner = inner[int(table) if isinstance(inner, list) else table]
    inner[int(key) if isinstance(inner, list) else key] = value
    return state


@pytest.mark.parametrize("key", COUNTS + OTHERS)
def test_odd_values(saved: Path, key: str) -> None:
    """A reader takes a state as it is or refuses it; no other error comes of it, whatever reads it."""
    good = read_state(saved, folder.read_manifest(saved))
    for value in ODD:
        forge(saved, changed(good, key, value))
        try:
            state = read_state(saved, folder.read_manifest(saved))
        except UserError as error:
            assert key.split(".")[0] in str(error) or "cannot be read" in str(error)
            assert len(str(error)) < 600 and "\x1b" not in str(error)
        else:
            assert key not in COUNTS
            refused(lambda state=state: check_resumable(saved, state, good["model"], good["data"], good["config"]))
        refused(lambda: inspect(str(saved), tensors=True))
        assert [entry.step for entry in take_stock(saved.parent)] == [2]


def refused(read: Any) -> None:
    """Nothing but a UserError."""
    try:
        read()
    except UserError:
        pass


@pytest.mark.parametrize("name", ["a\0b", "\ud800", "../x", "/x", "model/../../x"])
def test_names_in_the_manifest_that_no_file_can_have(saved: Path, name: str) -> None:
    files = json.loads((saved / folder.MANIFEST).read_text(encoding="utf-8"))["files"]
    folder.write_json(saved / folder.MANIFEST, folder._manifest(files | {name: files[folder.STATE]}))
    with pytest.raises(UserError, match="names a file outside"):
        folder.read_manifest(saved)
    assert take_stock(saved.parent)[0].state == "damaged"


@pytest.mark.parametrize("run", ["one", "streams", "mixture", "float16", "bfloat16", "fsdp", "pipeline"])
def test_states_of_every_kind_of_run_are_good(run: str) -> None:
    path = SAVED / run / "checkpoints/step-000002"
    assert read_state(path, folder.read_manifest(path))["step"] == 2
