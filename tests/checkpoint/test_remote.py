"""Checkpoints in storage that is named by a URL: no renaming there, so a checkpoint is whole once its manifest is."""

import builtins
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import TinyData, run_train, tiny_config, tiny_settings
from runs import Tensors, differing, live_tensors, open_trainer, rows

from titanling.checkpoint import folder, remote, saving
from titanling.checkpoint.compare import compare
from titanling.checkpoint.inventory import find_root, prune, take_stock, verify
from titanling.config import Config
from titanling.errors import UserError
from titanling.summary import End, summary

pytest.importorskip("upath")
CHANGES: dict[str, Any] = {"training.steps": 6, "checkpoint.interval": 2, "checkpoint.keep_latest_k": 2}
FILES = {"model/a.safetensors": b"weights", "optimizer/b.safetensors": b"moments", "state.json": b"{}"}
SHARD = "model/shard-00001-of-00001.safetensors"


@pytest.fixture(params=["memory", "file"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """An empty place of each kind that needs no server."""
    name = f"memory://{uuid.uuid4()}/run" if request.param == "memory" else f"{tmp_path.as_uri()}/bucket/run"
    return remote.open_path(name)


@pytest.fixture
def url() -> str:
    """An empty place in memory."""
    return f"memory://{uuid.uuid4()}/run"


def make(root: Path, step: int) -> Path:
    """A checkpoint, as a save leaves it."""
    final = folder.step_folder(root, step)
    folder.begin(final)
    write(final)
    folder.commit(final, {name: folder.digest(final / name) for name in folder.files_of(final)})
    return final


def write(final: Path) -> None:
    """Its files without the manifest: a save cut short."""
    for name, content in FILES.items():
        (final / name).parent.mkdir(parents=True, exist_ok=True)
        (final / name).write_bytes(content)


def damage(path: Path) -> None:
    """Change the last byte of a file."""
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


def names(root: Path) -> list[str]:
    """What there is, without folders: object storage has none."""
    return sorted({name.partition("/")[0] for name in folder.files_of(root)})


def test_whole_once_the_manifest_is_there(root: Path) -> None:
    assert folder.list_steps(root) == []
    make(root, 2)
    write(folder.step_folder(root, 4))
    assert folder.list_steps(root) == [2]
    assert [entry.state for entry in take_stock(root)] == ["damaged", ".partial"]  # its state.json is not ours
    folder.remove_leftovers(root)
    assert names(root) == ["step-000002"]
    manifest = folder.read_manifest(root / "step-000002")
    assert folder.damage(root / "step-000002", sorted(manifest), manifest) is None


def test_deleting_takes_the_manifest_first(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (1, 2, 3):
        make(root, step)
    assert folder.prune(root, 2) == [1] and names(root) == ["step-000002", "step-000003"]
    with monkeypatch.context() as patch:
        patch.setattr(folder, "_remove", lambda path: None)  # dies here
        folder.delete(root / "step-000002")
    assert folder.list_steps(root) == [3]
    folder.remove_leftovers(root)
    assert names(root) == ["step-000003"]


def test_setting_aside_keeps_every_byte(root: Path) -> None:
    make(root, 1)
    asides = ["step-000002.superseded", "step-000002.superseded-2"]
    for aside in asides:  # also beside an earlier one
        make(root, 2)
        assert folder.set_aside(root / "step-000002", "superseded") == aside
    assert names(root) == ["step-000001", *asides] and folder.list_steps(root) == [1]
    folder.remove_leftovers(root)
    for aside in asides:
        assert {name: (root / aside / name).read_bytes() for name in FILES} == FILES
        assert folder.read_manifest(root / aside).keys() == FILES.keys()


def test_begun_again_it_is_not_whole(root: Path) -> None:
    folder.begin(make(root, 1))
    assert folder.list_steps(root) == []


def test_train_resume_fall_back_prune_and_tools(
    tmp_path: Path, tiny_data: TinyData, url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = {**CHANGES, "checkpoint.folder": url}
    with open_trainer(tmp_path, tiny_data, changes) as trainer:
        trainer.train()
        assert names(trainer.checkpointer.root) == ["step-000004", "step-000006"]
    root = remote.open_path(url)
    damage(root / "step-000006" / SHARD)
    assert [len(verdict.bad) for verdict in verify([url])] == [0, 1]
    with open_trainer(tmp_path, tiny_data, {**changes, "training.steps": 8}) as trainer:
        assert trainer.step == 4
        trainer.train()
    assert f"{url}/step-000006/{SHARD}" in capsys.readouterr().err
    assert names(root) == ["step-000006", "step-000006.damaged", "step-000008"]
    assert [step for step, _ in rows(tmp_path / "run")] == list(range(1, 9))
    assert [entry.state for entry in take_stock(find_root(url))] == ["whole", ".damaged", "whole"]
    assert not compare(f"{url}/step-000006", f"{url}/step-000008").equal
    assert prune(url, 1).deleted == [6] and folder.list_steps(root) == [8]


@pytest.mark.parametrize("mode", ["disabled", "async"])
def test_a_resumed_run_ends_as_one_that_was_not_stopped(
    tmp_path: Path, tiny_data: TinyData, url: str, mode: str
) -> None:
    found: list[Tensors] = []
    for stops in ([6], [2, 6]):
        place = {**CHANGES, "checkpoint.folder": f"{url}/{len(stops)}", "checkpoint.async_mode": mode}
        for stop in stops:
            with open_trainer(tmp_path / str(len(stops)), tiny_data, place) as trainer:
                while trainer.step < stop:
                    trainer.train_step()
                trainer.save()
                trainer.checkpointer.finish()
                tensors = live_tensors(trainer)
        found.append(tensors)
    assert differing(*found) == []


def test_starting_from_a_url(tmp_path: Path, tiny_data: TinyData, url: str) -> None:
    with open_trainer(tmp_path / "first", tiny_data, {**CHANGES, "checkpoint.folder": url}) as trainer:
        trainer.train()
        trained = live_tensors(trainer)
    changes = {"checkpoint.initial_load_path": f"{url}/step-000006"}
    with open_trainer(tmp_path / "second", tiny_data, changes) as trainer:
        assert trainer.step == 0
        found = live_tensors(trainer)
        assert differing(found, trained) == sorted(name for name in found if ".exp_avg" in name or ".step" in name)


def test_a_client_that_fails_costs_one_save(
    tmp_path: Path, tiny_data: TinyData, url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Clients of object storage have errors that are no OSError."""
    write_tensors, calls = saving.write_tensors, iter(range(100))

    def failing(*arguments: Any) -> Any:
        if next(calls) == 2:
            raise LookupError("connection lost")
        return write_tensors(*arguments)

    monkeypatch.setattr(saving, "write_tensors", failing)
    with open_trainer(tmp_path, tiny_data, {**CHANGES, "checkpoint.folder": url}) as trainer:
        trainer.train()
        assert names(trainer.checkpointer.root) == ["step-000002", "step-000006"]
    assert "step-000004: could not be saved: connection lost. Training goes on" in capsys.readouterr().err


@pytest.mark.parametrize("name", [folder.MANIFEST, folder.STATE, SHARD])
def test_a_client_that_fails_while_loading_is_one_line(
    tmp_path: Path, tiny_data: TinyData, url: str, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    changes = {**CHANGES, "checkpoint.folder": url, "checkpoint.fallback": False}
    with open_trainer(tmp_path, tiny_data, changes) as trainer:
        trainer.train()
    storage = type(trainer.checkpointer.root.fs)  # type: ignore[attr-defined]
    for method in ("_open", "cat_file"):
        monkeypatch.setattr(storage, method, failing_at(f"step-000006/{name}", getattr(storage, method)))
    with pytest.raises(UserError, match=f"step-000006/{name}.* cannot be read: connection lost.*load_step 4"):
        with open_trainer(tmp_path, tiny_data, changes):
            pass


def failing_at(place: str, original: Callable[..., Any]) -> Callable[..., Any]:
    """A client's method that fails for one file."""

    def method(self: Any, path: str, *arguments: Any, **options: Any) -> Any:
        if path.endswith(place):
            raise LookupError("connection lost")
        return original(self, path, *arguments, **options)

    return method


def lacking(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    """As if a package were not installed."""
    original: Callable[..., Any] = builtins.__import__

    def without(name: str, *arguments: Any, **options: Any) -> Any:
        if name.partition(".")[0] == package:
            raise ImportError(f"No module named '{name}'")
        return original(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without)


def test_a_missing_package_is_named_with_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    lacking(monkeypatch, "upath")
    with pytest.raises(UserError, match=r"needs universal_pathlib s3fs: .*python\S* -m pip install universal_pathlib"):
        remote.open_path("s3://bucket/run")
    monkeypatch.undo()
    lacking(monkeypatch, "s3fs")
    with pytest.raises(UserError, match=r"not installed: .*python\S* -m pip install s3fs"):
        remote.open_path("s3://bucket/run")


def test_unknown_storage_is_refused_before_torch(tmp_path: Path, tiny_data: TinyData) -> None:
    config = tiny_config(tmp_path, tiny_data, {"checkpoint.folder": "nosuch://bucket/run"})
    done = run_train("--config", config)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert "run.toml" in done.stderr and "checkpoint.folder = nosuch://bucket/run" in done.stderr
    assert not (tmp_path / "run").exists()


def test_last_words_name_the_url_and_go_on(tmp_path: Path, tiny_data: TinyData) -> None:
    settings: dict[str, Any] = {}
    for dotted, value in tiny_settings(tmp_path, tiny_data, {"checkpoint.folder": "s3://bucket/run/"}).items():
        table, key = dotted.split(".")
        settings.setdefault(table, {})[key] = value
    said = summary("run.toml", {"checkpoint.load_step": 2}, Config(**settings), End(4, {}))
    assert "load_step" not in said  # to go on is not to go back once more
    assert "checkpoint   s3://bucket/run/step-000004\n" in said
    assert "--checkpoint s3://bucket/run/step-000004 --prompt" in said
