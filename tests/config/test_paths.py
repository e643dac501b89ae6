"""Paths in configs and arguments: ~ and $VAR are expanded for all of them in one way."""

import os
import re
from pathlib import Path
from typing import Any, get_origin

import pytest
from helpers import ROOT

from titanling import cli
from titanling.config.load import dump_toml, is_kind, is_repeated, known_tables, load_config
from titanling.data.prepare.filters.lists import find_test_sets, list_path
from titanling.data.prepare.text import find_files
from titanling.errors import UserError
from titanling.paths import expand

# Keys whose name or meaning is a path: found by their name, so that a later one is not forgotten.
NAMES = re.compile(r"folder|path|_dir$|^root$|^train$|^validation$|^text$|^plans$|^test_sets$|^stop_words$")
WRITTEN = {"data.prepare.text", "data.prepare.filters.bad_words.path", "data.prepare.filters.gopher_quality.stop_words"}
WRITTEN |= {"data.prepare.filters.language.model", "data.prepare.filters.decontaminate.test_sets"}
"""Expanded where they are used: as written they are part of the hash of what was prepared."""
NEEDED: dict[str, dict[str, Any]] = {
    "data.sources": {"name": "a"},
    "data.prepare.filters.bad_words": {"kind": "bad_words"},
    "data.prepare.filters.gopher_quality": {"kind": "gopher_quality"},
    "data.prepare.filters.decontaminate": {"kind": "decontaminate"},
    "data.prepare.filters.language": {"kind": "language", "library": "fasttext"},
}


def path_keys() -> list[str]:
    """Every key that holds a path or a list of paths."""
    keys = [f"{table}.{key}" for table, fields in known_tables().items() for key in fields.model_fields]
    keys = [key for key in keys if NAMES.search(key.rpartition(".")[2]) and key not in known_tables()]
    return sorted({*keys, "data.prepare.filters.language.model"} - {"model.tokenizer_path", "validation.dataset_path"})


def load_with(folder: Path, dotted: str, text: str) -> Any:
    """The value that a config has for a key that is set to `text`."""
    table, _, key = dotted.rpartition(".")
    field = known_tables()[table].model_fields[key]
    value: Any = [text] if get_origin(field.annotation) is tuple else text
    path = folder / "a.toml"
    path.write_text("")
    outer = table.rpartition(".")[0] if is_kind(table) else table
    overrides = {outer: [NEEDED[table] | {key: value}]} if is_repeated(table) else {dotted: value}
    config = load_config(path, overrides).config
    again = folder / "again.toml"
    again.write_text(dump_toml(config), encoding="utf-8")
    assert load_config(again).config == config
    found: Any = config
    for part in outer.split("."):
        found = getattr(found, part)
    found = getattr(found[0] if isinstance(found, tuple) else found, key)
    return found[0] if isinstance(found, tuple) else found


@pytest.fixture(autouse=True)
def variables(monkeypatch: pytest.MonkeyPatch) -> None:
    """A home and a scratch folder."""
    for name, value in {"HOME": "/home/me", "SCRATCH": "/scratch/p_1", "EMPTY": "", "MONEY": "a$b"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("NOWHERE", raising=False)


@pytest.mark.parametrize("dotted", path_keys())
def test_every_path_of_a_config(tmp_path: Path, dotted: str) -> None:
    for text, path in (("~/x", "/home/me/x"), ("$SCRATCH/x", "/scratch/p_1/x"), ("a/${SCRATCH}", "a//scratch/p_1")):
        assert load_with(tmp_path, dotted, text) == (text if dotted in WRITTEN else path)
    for plain in ("a/b", "/a b/~c", "s3://$bucket/~x", "a$", "$1", "cost$/x", "${}"):
        assert load_with(tmp_path, dotted, plain) == plain
    for text, why in (
        ("$NOWHERE/x", "the environment variable NOWHERE is not set"),
        ("${NOWHERE}", "the environment variable NOWHERE is not set"),
        ("$EMPTY/x", "the environment variable EMPTY is empty"),
        ("$MONEY", "the environment variable MONEY holds a $"),
        ("~nobody_here/x", "~nobody_here is nobody's home folder here; write ./~nobody_here"),
        ("a\0b", "no path holds a NUL character"),
        ("", "must not be empty"),
    ):
        with pytest.raises(UserError) as caught:
            load_with(tmp_path, dotted, text)
        outer, _, kind = dotted.rpartition(".")[0].rpartition(".")
        assert str(caught.value).startswith(f"command line: {outer if is_kind(f'{outer}.{kind}') else dotted}")
        assert why in str(caught.value)


def test_what_is_expanded_where_it_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SCRATCH", str(tmp_path))
    words = tmp_path / "words.txt"
    words.write_text("bad\n")
    for text in ("~/words.txt", "$SCRATCH/words.txt"):
        assert list_path(text, None) == find_test_sets([text])[0] == find_files([text])[0].path == str(words)
        assert find_files([f"en={text}"])[0].path == str(words)
    for read in (find_files, find_test_sets):
        with pytest.raises(UserError, match="NOWHERE is not set"):
            read(["$NOWHERE/x"])


def test_a_folder_that_was_made_under_the_literal_name_is_not_forgotten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "~").mkdir()
    (tmp_path / "~" / "runs").mkdir()
    with pytest.raises(UserError, match="stands for /home/me/runs, which is not there; what has this very name"):
        expand("~/runs")
    assert expand("./~/runs") == "./~/runs"


def test_files_that_a_config_extends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "base.toml").write_text("[training]\nsteps = 3\n")
    for text in ("~/base.toml", "$HOME/base.toml"):
        (tmp_path / "a.toml").write_text(f'extends = "{text}"\n')
        assert load_config("~/a.toml").config.training.steps == 3
    (tmp_path / "a.toml").write_text('extends = "$NOWHERE/base.toml"\n')
    with pytest.raises(UserError, match=r"a\.toml: extends = .*NOWHERE is not set"):
        load_config("~/a.toml")


def test_arguments_of_scripts() -> None:
    assert cli.local_path("~/x") == Path("/home/me/x") and cli.path_or_url("$SCRATCH/x") == "/scratch/p_1/x"
    assert cli.path_or_url("s3://a/$b") == "s3://a/$b"
    for read in (cli.local_path, cli.path_or_url):
        for text in ("", "~nobody_here", "$NOWHERE", "a\0"):
            with pytest.raises(UserError):
                read(text)
    # Each argument that is a path says so.
    for script in ROOT.glob("scripts/*.py"):
        for line in script.read_text(encoding="utf-8").split("add")[1:]:
            found = re.match(r'(?:_argument)?\(\s*"(?:--)?(output|checkpoint|tokenizer|json|budget|prefix|run)"', line)
            if found and "store_true" not in line.partition(")\n")[0] and "add_parser" not in line:
                assert "path_or_url" in line or "local_path" in line, f"{script.name}: {found[1]}"


def test_what_the_environment_says_is_not_read_twice() -> None:
    assert os.environ["MONEY"] == "a$b"
    with pytest.raises(UserError, match="MONEY holds a"):
        expand("$MONEY")
