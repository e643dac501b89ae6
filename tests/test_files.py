"""What a user has put beside our files stays as it is, under every name that could be in our way."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conversion_helpers import write_checkpoint
from helpers import ROOT, TinyData, clean_env, tiny_config

from titanling import files, train
from titanling.checkpoint.export import export_to_hf
from titanling.checkpoint.import_model import import_hf
from titanling.config import load_config
from titanling.config.schema import Prepare
from titanling.data.ids import write_ids
from titanling.data.indexed import IndexedWriter, write_sidecar
from titanling.data.merge import merge
from titanling.data.prepare.outputs import Outputs
from titanling.data.prepare.report import write_report
from titanling.data.prepare.run import prepare
from titanling.data.prepare.text import find_files
from titanling.data.prepare.tokenizer import read_tokenizer, save_tokenizer
from titanling.errors import UserError
from titanling.metrics.jsonl import JsonLines
from titanling.model.llama import Llama
from titanling.model.presets import resolve_shape

SUFFIXES = (".partial", ".tmp", ".deleted", ".damaged", ".empty", ".1", ".titanling-1-2-3.partial")
KINDS = ("folder", "file", "link to a file", "link to a folder", "link to nothing")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, tiny_data: TinyData) -> Path:
    """A checkpoint of the tiny model."""
    folder = tmp_path_factory.mktemp("saved")
    shape = resolve_shape(load_config(tiny_config(folder, tiny_data)).config.model)
    torch.manual_seed(0)
    return write_checkpoint(folder, Llama(replace(shape, n_layers=1)), tiny_data)


def token_files(prefix: Path) -> None:
    """As a program writes a pair and its sidecar."""
    with IndexedWriter(str(prefix), 10) as writer:
        writer.add_document(np.array([1, 2, 0]))
    write_sidecar(str(prefix), writer.sidecar("ab" * 32, 0, 7, "test"))


def make_metrics(path: Path) -> None:
    """A run of three steps that goes on from the second."""
    rows = JsonLines(path)
    for step in (1, 2, 3):
        rows.append({"step": step})
    rows.drop_after(2)
    rows.close()


Command = Callable[[Path, TinyData, Path], object]
COMMANDS: dict[str, Command] = {
    "hf": lambda path, _, checkpoint: export_to_hf(checkpoint, path),
    "step-000000": lambda path, data, checkpoint: import_hf(exported(checkpoint), path.parent),
    "tokenizer": lambda path, data, _: save_tokenizer(read_tokenizer(data.tokenizer), str(path), {}),
    "train.bin": lambda path, *_: token_files(path.with_suffix("")),
    "train.idx": lambda path, *_: token_files(path.with_suffix("")),
    "train.json": lambda path, *_: token_files(path.with_suffix("")),
    "train.ids.jsonl": lambda path, *_: write_ids(str(path)[: -len(".ids.jsonl")], [__file__]),
    "train.report.json": lambda path, *_: write_report(str(path)[: -len(".report.json")], {"sources": {}}),
    "all": lambda path, data, _: merge(str(path), [data.train, data.validation]),
    "train": lambda path, data, _: prepare(Prepare(text=(str(data.text),)), str(path), None, data.tokenizer),
    "train.parts": lambda path, data, _: prepare(
        Prepare(text=(str(data.text),)), str(path.with_suffix("")), None, data.tokenizer
    ),
    "metrics.jsonl": lambda path, *_: make_metrics(path),
    "config.toml": lambda path, data, _: save_config(path.parent, data),
}  # fmt: skip


def exported(checkpoint: Path) -> Path:
    """The checkpoint's model as a Hugging Face directory, made once."""
    output = checkpoint.parent / "exported"
    if not output.exists():
        export_to_hf(checkpoint, output)
    return output


def save_config(folder: Path, data: TinyData) -> None:
    """What a start writes to the run folder."""
    config = load_config(tiny_config(folder, data, {"job.dump_folder": str(folder)}, "of_the_run.toml")).config
    train._save_config(config, print)


def put(path: Path, kind: str, elsewhere: Path) -> None:
    """Something of the user's own."""
    if kind == "folder":
        path.mkdir()
        (path / "thesis.txt").write_text("three years")
    elif kind == "file":
        path.write_text("three years")
    else:
        path.symlink_to(elsewhere / {"link to a file": "thesis.txt", "link to a folder": ""}.get(kind, "nothing"))


def everything(folder: Path) -> dict[str, str]:
    """Path → what is there, links as links."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        found[name] = (
            f"→ {os.readlink(path)}" if path.is_symlink() else path.read_text("latin-1") if path.is_file() else "/"
        )
    return found


@pytest.mark.parametrize("name", COMMANDS)
def test_whatever_stands_beside_it_is_untouched(
    tmp_path: Path, tiny_data: TinyData, checkpoint: Path, name: str
) -> None:
    done = 0
    for number, (suffix, kind) in enumerate((suffix, kind) for suffix in SUFFIXES for kind in KINDS):
        elsewhere, place = tmp_path / f"elsewhere{number}", tmp_path / f"place{number}"
        for folder in (elsewhere, place):
            folder.mkdir()
        (elsewhere / "thesis.txt").write_text("three years")
        mine = place / f"{name}{suffix}"
        put(mine, kind, elsewhere)
        before = everything(place) | everything(elsewhere)
        try:
            COMMANDS[name](place / name, tiny_data, checkpoint)
            done += 1
        except UserError as error:
            assert "move" in str(error) and str(mine) in str(error), (suffix, kind)
        except OSError:
            pass
        after = everything(place) | everything(elsewhere)
        assert before.items() <= after.items(), (suffix, kind)
        assert len(everything(elsewhere)) == 1, (suffix, kind)
    assert done >= len(KINDS) * (len(SUFFIXES) - 1), "more than one name is in its way"


@pytest.mark.parametrize("name", ["train.report.json", "train.ids.jsonl", "train.bin", "train.idx"])
def test_what_is_in_the_place_of_a_result_is_refused(tmp_path: Path, tiny_data: TinyData, name: str) -> None:
    """And the remedy, to move it away, works."""
    (tmp_path / name).write_text("three years")
    settings = Prepare(text=(str(tiny_data.text),))
    with pytest.raises(UserError, match=f"{name}: .*move it away"):
        prepare(settings, str(tmp_path / "train"), None, tiny_data.tokenizer)
    assert everything(tmp_path) == {name: "three years"}
    (tmp_path / name).rename(tmp_path / "mine")
    prepare(settings, str(tmp_path / "train"), None, tiny_data.tokenizer)


def test_a_config_that_differs_is_kept(tmp_path: Path, tiny_data: TinyData, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "config.toml"
    path.write_text("# my notes\n")
    save_config(tmp_path, tiny_data)
    assert (tmp_path / "config.1.toml").read_text() == "# my notes\n"
    assert "kept as config.1.toml" in capsys.readouterr().out
    save_config(tmp_path, tiny_data)  # the same again: nothing to keep
    assert not (tmp_path / "config.2.toml").exists() and load_config(path)


def test_what_a_killed_process_left_goes_and_what_a_living_one_writes_stays(tmp_path: Path) -> None:
    code = (
        "import os, sys; from pathlib import Path; from titanling import files\n"
        "with files.new_folder(Path(sys.argv[1])) as folder, files.new_file(folder.parent / 'a.txt') as file:\n"
        "    print('there', flush=True); input()"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "out")]
    process = subprocess.Popen(
        command, cwd=ROOT, env=clean_env(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "there\n"
    theirs = set(tmp_path.iterdir())
    assert len(theirs) == 2
    files.write_whole(tmp_path / "a.txt", b"ours")
    with files.new_folder(tmp_path / "out"):
        assert theirs < set(tmp_path.iterdir())
    process.send_signal(signal.SIGKILL)
    process.communicate()
    files.write_whole(tmp_path / "a.txt", b"ours")
    with files.new_folder(tmp_path / "out") as folder:
        assert set(tmp_path.iterdir()) == {tmp_path / "a.txt", folder}
        files.remove_own()
    assert {path.name for path in tmp_path.iterdir()} == {"a.txt"}


def test_a_file_is_whole_or_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    files.write_whole(path, b"old")
    with pytest.raises(RuntimeError), files.new_file(path) as file:
        file.write(json.dumps({"new": 1}).encode())
        raise RuntimeError
    assert everything(tmp_path) == {"a.json": "old"}
    shutil.rmtree(tmp_path)
    with pytest.raises(OSError), files.new_file(path):
        pass


def test_what_is_half_written_is_no_text(tmp_path: Path, tiny_data: TinyData) -> None:
    """A killed export, tokenizer or token file, and what a run has set aside, in the folder of the text."""
    (tmp_path / "text.txt").write_text("a text")
    for name in ("hf", "tokenizer"):
        left = files.temporary(tmp_path / name)
        left.mkdir()
        (left / "README.md").write_text("half")
    for name in ("train.bin", "config.toml"):
        files.temporary(tmp_path / name).write_text("half")
    found = find_files([str(tmp_path)], Outputs([str(tmp_path / "train")], str(tmp_path / "tokenizer")))
    assert [Path(file.path).name for file in found] == ["text.txt"]
