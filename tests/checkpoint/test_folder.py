"""Checkpoints as folders: whole or absent, and every kind of damage named. No torch here."""

import json
import os
import shutil
import threading
from pathlib import Path

import pytest
from helpers import snapshot

from titanling.checkpoint import folder
from titanling.checkpoint.inventory import take_stock
from titanling.errors import UserError

FILES = {
    "model/a.safetensors": b"weights" * 40,
    "optimizer/b.safetensors": b"moments" * 40,
    "state.json": b'{"a": 1}\n',
}


def make(root: Path, step: int, files: dict[str, bytes] = FILES) -> Path:
    """A checkpoint with these files, as a save leaves it."""
    final = folder.step_folder(root, step)
    folder.begin(final)
    partial = folder.working_folder(final)
    for name, content in files.items():
        (partial / name).parent.mkdir(exist_ok=True)
        (partial / name).write_bytes(content)
    folder.commit(final, {name: folder.digest(partial / name) for name in folder.files_of(partial)})
    return final


def problem(checkpoint: Path) -> str | None:
    """What a resume would say is wrong with it."""
    try:
        manifest = folder.read_manifest(checkpoint)
        return folder.damage(checkpoint, sorted(manifest), manifest)
    except UserError as error:
        return str(error)


def names(root: Path) -> list[str]:
    """What is in the folder of the checkpoints."""
    return sorted(path.name for path in root.iterdir())


def test_a_whole_checkpoint(tmp_path: Path) -> None:
    checkpoint = make(tmp_path, 100)
    assert checkpoint.name == "step-000100"
    assert names(tmp_path) == ["step-000100"]
    assert folder.files_of(checkpoint) == sorted(FILES)
    assert problem(checkpoint) is None


def test_steps_are_sorted_as_numbers_and_nothing_else_counts(tmp_path: Path) -> None:
    for step in (1_000_000, 20, 3):
        make(tmp_path, step)
    for name in ("step-000004.partial", "step-000005.deleted", "step-5", "notes", "step-000006.superseded"):
        (tmp_path / name).mkdir()
    (tmp_path / "step-000007").write_text("a file")
    assert folder.list_steps(tmp_path) == [3, 20, 1_000_000]
    assert folder.list_steps(tmp_path / "absent") == []


def test_leftovers_are_removed_and_nothing_else(tmp_path: Path) -> None:
    make(tmp_path, 3)
    for name in ("step-000004.partial", "step-000005.deleted", "mine.partial", "step-000006.superseded"):
        (tmp_path / name / "model").mkdir(parents=True)
    folder.remove_leftovers(tmp_path)
    assert names(tmp_path) == ["mine.partial", "step-000003", "step-000006.superseded"]
    folder.remove_leftovers(tmp_path / "absent")


@pytest.mark.parametrize(("keep", "left"), [(0, [1, 2, 3, 4]), (2, [3, 4]), (3, [2, 3, 4]), (9, [1, 2, 3, 4])])
def test_retention(tmp_path: Path, keep: int, left: list[int]) -> None:
    for step in (1, 2, 3, 4):
        make(tmp_path, step)
    assert folder.prune(tmp_path, keep) == sorted({1, 2, 3, 4} - set(left))
    assert folder.list_steps(tmp_path) == left
    assert len(names(tmp_path)) == len(left)


def test_retention_spares_the_protected_and_the_multiples(tmp_path: Path) -> None:
    for step in (10, 15, 20, 25, 30, 35):
        make(tmp_path, step)
    assert folder.prune(tmp_path, 2, protected={15}, every=20) == [10, 25]
    assert folder.list_steps(tmp_path) == [15, 20, 30, 35]


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    make(tmp_path, 1)
    again = make(tmp_path, 1, {"state.json": b"{}\n"})
    assert folder.files_of(again) == ["state.json"]
    assert names(tmp_path) == ["step-000001"]


def test_a_checkpoint_set_aside_is_kept_and_never_counts(tmp_path: Path) -> None:
    for step in (1, 2):
        make(tmp_path, step)
    assert folder.set_aside(tmp_path / "step-000002", "superseded") == "step-000002.superseded"
    make(tmp_path, 2)
    assert folder.set_aside(tmp_path / "step-000002", "superseded") == "step-000002.superseded-2"
    assert names(tmp_path) == ["step-000001", "step-000002.superseded", "step-000002.superseded-2"]
    assert folder.parse_name("step-000002.superseded-2") == (2, "superseded")
    assert folder.list_steps(tmp_path) == [1]
    assert problem(tmp_path / "step-000002.superseded") is None


def test_every_new_folder_is_flushed_after_the_names_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a power cut takes the first checkpoint of a run with the folder that it is in."""
    flushed, fsync = [], os.fsync

    def recorded(descriptor: int) -> None:
        flushed.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", recorded)
    final = make(tmp_path / "outputs" / "run" / "checkpoints", 1)
    partial = folder.working_folder(final)
    assert set(flushed[:4]) == {partial, partial / "model", partial / "optimizer", partial / folder.MANIFEST}
    assert flushed[0] == partial / folder.MANIFEST
    assert flushed[4:] == [final.parent, final.parents[1], final.parents[2]]


class Crash(BaseException):
    """The process dies here."""


# Where a save or a deletion may be cut short: each call that changes the disk.
CALLS = [(os, "fsync"), (Path, "rename"), (Path, "mkdir"), (Path, "write_bytes"), (os, "unlink"), (os, "rmdir")]


@pytest.mark.parametrize(("owner", "name"), CALLS, ids=[name for _, name in CALLS])
@pytest.mark.parametrize("moment", range(6))
def test_cut_short_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: object, name: str, moment: int
) -> None:
    """Die before the n-th call of one kind while a step is saved again and an old one retired."""
    for step in (1, 2):
        make(tmp_path, step)
    original, calls = getattr(owner, name), iter(range(1000))

    def dying(*arguments: object, **options: object) -> object:
        if next(calls) == moment:
            raise Crash
        return original(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, dying)
        try:
            make(tmp_path, 2)
            make(tmp_path, 3)
            folder.prune(tmp_path, 2)
        except Crash:
            pass
    folder.remove_leftovers(tmp_path)
    steps = folder.list_steps(tmp_path)
    assert steps, "nothing is left to resume from"
    assert names(tmp_path) == [f"step-{step:06d}" for step in steps]
    for step in steps:
        assert problem(folder.step_folder(tmp_path, step)) is None


@pytest.mark.parametrize("name", [*FILES, folder.MANIFEST])
def test_every_flipped_bit_is_named(tmp_path: Path, name: str) -> None:
    path = make(tmp_path, 1) / name
    content = path.read_bytes()
    for position in range(len(content)):
        bit = 1 << (position % 8)
        path.write_bytes(content[:position] + bytes([content[position] ^ bit]) + content[position + 1 :])
        found = problem(path.parents[name.count("/")])
        if name == folder.MANIFEST and found is None:
            # White space may be flipped into other white space: the content is the same.
            assert json.loads(path.read_bytes()) == json.loads(content)
        else:
            assert found is not None and str(path) in found, position
        assert found is None or "\n" not in found


@pytest.mark.parametrize("name", [*FILES, folder.MANIFEST])
@pytest.mark.parametrize("length", [None, 0, 5, -1])
def test_truncated_or_missing_files_are_named(tmp_path: Path, name: str, length: int | None) -> None:
    path = make(tmp_path, 1) / name
    content = path.read_bytes()
    path.unlink()
    if length is not None:
        # The manifest's last byte is a line break, which means nothing.
        path.write_bytes(content.rstrip()[:length] if name == folder.MANIFEST else content[:length])
    found = problem(path.parents[name.count("/")])
    assert found is not None and str(path) in found


def test_what_a_link_leads_to_is_neither_written_nor_deleted(tmp_path: Path) -> None:
    root, elsewhere = tmp_path / "checkpoints", make(tmp_path / "elsewhere", 1)
    root.mkdir()
    links = ["step-000001", "step-000003.deleted", "step-000004.damaged", "step-000009.partial"]
    for name in links:
        (root / name).symlink_to(elsewhere)
    before = snapshot(elsewhere)
    assert all("a link" in remark for remark in folder.remove_leftovers(root))
    for step in (2, 3, 4):
        make(root, step)
    with pytest.raises(OSError, match="it is a link; move it away"):
        folder.begin(root / "step-000009")
    assert folder.prune(root, 1) == [2, 3]
    assert folder.set_aside(root / "step-000004", "damaged") == "step-000004.damaged-2"
    assert names(root) == sorted([*links, "step-000004.damaged-2"]) and snapshot(elsewhere) == before


def test_what_is_not_ours_stays_whatever_its_name(tmp_path: Path) -> None:
    """A user's own folder, file or notes under every name that a checkpoint's may have on its way."""
    kept = {}
    for name in ("step-000001", "step-000002.partial", "step-000002.deleted", "step-000002.deleted-2"):
        (tmp_path / name / "model").mkdir(parents=True)
        kept[tmp_path / name / "notes.txt"] = name
    kept |= {tmp_path / "step-000003.partial": "a file", tmp_path / "step-000007.superseded": "mine"}
    kept |= {tmp_path / "step-000007.deleted": "mine"}
    for path, text in kept.items():
        path.write_text(text)
    remarks = folder.remove_leftovers(tmp_path)
    assert [remark.partition(": ")[0].rpartition("/")[2] for remark in remarks] == [
        "step-000002.deleted", "step-000002.deleted-2", "step-000002.partial", "step-000003.partial",
        "step-000007.deleted"
    ]  # fmt: skip
    for step in (4, 5, 6):
        make(tmp_path, step)
    for step in (2, 3):
        with pytest.raises(OSError, match="move it away|File exists"):
            folder.begin(tmp_path / f"step-{step:06d}")
    (tmp_path / "step-000004" / "mine.txt").write_text("why I keep it")
    kept[tmp_path / "step-000004" / "mine.txt"] = "why I keep it"
    assert folder.prune(tmp_path, 1) == [5] and "mine.txt" in folder.spared(tmp_path, 1)[1]
    folder.delete(make(tmp_path, 7))
    assert folder.set_aside(make(tmp_path, 7), "superseded") == "step-000007.superseded-2"
    assert {path: path.read_text() for path in kept} == kept


def test_listing_while_checkpoints_come_and_go(tmp_path: Path) -> None:
    """Each is whole, or damaged, or on its way; none is an error of the listing."""
    source, stop, failed = make(tmp_path / "source", 1), threading.Event(), []
    root = tmp_path / "root"
    root.mkdir()

    def list_them() -> None:
        try:
            while not stop.is_set():
                take_stock(root)
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=list_them)
    thread.start()
    for _ in range(300):
        shutil.copytree(source, root / "step-000001")
        folder.delete(root / "step-000001")
    stop.set()
    thread.join()
    assert failed == []


def test_a_file_that_grew_and_one_that_does_not_belong(tmp_path: Path) -> None:
    checkpoint = make(tmp_path, 1)
    (checkpoint / "notes.txt").write_text("mine")
    assert problem(checkpoint) is None
    stranger = checkpoint / "model" / "other.safetensors"
    stranger.write_bytes(b"x")
    assert str(stranger) in str(problem(checkpoint))
    stranger.unlink()
    with (checkpoint / "state.json").open("ab") as file:
        file.write(b"\n")
    assert str(checkpoint / "state.json") in str(problem(checkpoint))


@pytest.mark.parametrize("name", ["../../secret", "/etc/passwd", "model/../../../secret"])
def test_a_manifest_that_points_outside_is_refused(tmp_path: Path, name: str) -> None:
    checkpoint = make(tmp_path, 1)
    manifest = json.loads((checkpoint / folder.MANIFEST).read_text())
    manifest["files"][name] = {"bytes": 1, "xxh3_128": "0"}
    (checkpoint / folder.MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="outside the checkpoint"):
        folder.read_manifest(checkpoint)


@pytest.mark.parametrize("text", ["[]", "{}", "null", '{"format": 3, "files": {}}', '{"format": 2, "files": []}', "{"])
def test_a_strange_manifest_is_refused(tmp_path: Path, text: str) -> None:
    checkpoint = make(tmp_path, 1)
    (checkpoint / folder.MANIFEST).write_text(text)
    with pytest.raises(UserError, match="manifest.json"):
        folder.read_manifest(checkpoint)


def test_no_checkpoint_at_all(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such checkpoint folder"):
        folder.read_manifest(tmp_path / "step-000001")
    shutil.rmtree(make(tmp_path, 1) / "model")
    with pytest.raises(UserError, match="step-000002: no such checkpoint folder; there are step-000001$"):
        folder.read_manifest(tmp_path / "step-000002")
    assert "model/a.safetensors: missing" in str(problem(tmp_path / "step-000001"))
