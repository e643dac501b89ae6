"""Configs that are odd as files or as TOML, and values that are odd on the command line: one short line, at once."""

import os
from pathlib import Path

import pytest
from helpers import run_train

from titanling.config.arguments import parse_arguments
from titanling.config.load import load_config
from titanling.config.toml import MAX_BYTES
from titanling.errors import UserError
from titanling.text import shorten, show

DEEP = "a = " + "[" * 400 + "]" * 400
TOML = {
    "lists in each other": DEEP,
    "lists beyond the parser": "a = " + "[" * 100_000,
    "tables in each other": "a = " + "{b = " * 300 + "1" + "}" * 300,
    "tables beyond the parser": "a = " + "{b = " * 100_000,
    "a dotted key": "a" + ".b" * 399 + " = 1",
    "a dotted key beyond the parser": "a" + ".b" * 100_000 + " = 1",
    "a header": f"[{'.'.join('a' * 399)}]\nb = 1",
    "digits": f"[training]\nsteps = 1{'0' * 5000}",
    "hexadecimal digits": f"[training]\nsteps = 0x{'f' * 5000}",
    "more than 64 bits": f"[training]\nsteps = {2**63}",
    "digits in a list": f"[sampling]\nprompts = [{2**64}]",
    "infinity": "[optimizer]\nlr = 1e400",
    "not a number": "[optimizer]\nlr = nan",
    "a date": "[training]\nsteps = 2024-01-01",
    "a date that is none": "[training]\nsteps = 2024-13-41",
    "a time": "[job]\ndescription = 07:32:00",
    "a key and a table": "[training]\nsteps = 1\n[training.steps]\na = 1",
    "a table twice": "[training]\n[training]",
    "a key in quotes": '"training.steps" = 3',
    "an empty key": '"" = 3',
    "control characters in a key": '[training]\n"a\\u001b[2J\\u202e" = 3',
    "a long key": f"[training]\n{'k' * 100_000} = 3",
    "a long table": f"[{'t' * 100_000}]\nb = 3",
    "a long string": f"[training]\nsteps = '{'v' * 100_000}'",
    "a long list": f"[training]\nsteps = [{'1, ' * 50_000}]",
    "a long string in torchtitan's keys": f"[comm]\nmode = '{'v' * 100_000}'",
    "a long key in torchtitan's tables": f"[fault_tolerance]\n{'k' * 100_000} = 3",
    "a long name of a data set": f"[training]\ndataset = '{'v' * 100_000}'",
    "a long name of a file": f"extends = '{'v' * 100_000}'",
    "a long kind": f"[[data.prepare.filters]]\nkind = '{'v' * 100_000}'",
    "a NUL": "a = '\0'",
    "NUL in the name of a file": 'extends = "a\\u0000b"',
    "a URL to extend": 'extends = "https://example.org/a.toml"',
}


@pytest.mark.parametrize("text", TOML.values(), ids=TOML.keys())
def test_odd_toml(tmp_path: Path, text: str) -> None:
    path = tmp_path / "a.toml"
    path.write_text(text, encoding="utf-8")
    for file in (path, tmp_path / "top.toml"):
        (tmp_path / "top.toml").write_text('extends = "a.toml"')
        with pytest.raises(UserError) as caught:
            load_config(file)
        assert str(tmp_path) in str(caught.value) and len(str(caught.value)) < len(str(tmp_path)) + 600


BYTES = {
    "UTF-16": "[training]\nsteps = 3\n".encode("utf-16"),
    "Latin 1": b"# \xe9",
    "a lone surrogate": b"# \xed\xa0\x80",
    "a picture": b"\x89PNG\r\n\x1a\n" + bytes(100),
}


@pytest.mark.parametrize("content", BYTES.values(), ids=BYTES.keys())
def test_bytes_that_are_no_toml(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.toml").write_bytes(content)
    with pytest.raises(UserError, match=r"a\.toml: (cannot read this config file|not valid TOML): "):
        load_config(tmp_path / "a.toml")


def test_a_byte_order_mark_and_windows_lines_are_no_matter(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_bytes(b"\xef\xbb\xbf[training]\r\nsteps = 3\r\n")
    assert load_config(tmp_path / "a.toml").config.training.steps == 3


def test_what_is_no_regular_file_is_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.toml")
    (tmp_path / "loop.toml").symlink_to("loop.toml")
    with open(tmp_path / "huge.toml", "wb") as huge:
        huge.truncate(MAX_BYTES + 1)
    for name, why in (
        ("pipe.toml", "it is a pipe or a device"),
        ("/dev/zero", "it is a pipe or a device"),
        (".", "it is a folder"),
        ("loop.toml", "symbolic links"),
        ("huge.toml", "bytes are no config"),
        ("x" * 300, "name too long"),
    ):
        (tmp_path / "top.toml").write_text(f'extends = "{name}"')
        for file in (tmp_path / name, tmp_path / "top.toml"):
            with pytest.raises(UserError, match="cannot read this config file: ") as caught:
                load_config(file)
            assert why in str(caught.value).lower()
    with pytest.raises(UserError, match="must be the name of a file"):
        load_config("")


def test_each_file_is_read_once_however_many_extend_it(tmp_path: Path) -> None:
    (tmp_path / "0.toml").write_text("[training]\nsteps = 3\nseq_len = 7\n")
    for number in range(1, 60):  # 2⁵⁹ paths lead down
        below = f"{number - 1}.toml"
        text = f'extends = ["{below}", "./{below}", "{below}"]\n[training]\nsteps = {number}\n'
        (tmp_path / f"{number}.toml").write_text(text)
    loaded = load_config(tmp_path / "59.toml")
    assert (loaded.config.training.steps, loaded.config.training.seq_len) == (59, 7)
    assert loaded.where("training.seq_len") == str(tmp_path / "0.toml")
    # What one file changes is not changed in the other that extends the same.
    (tmp_path / "left.toml").write_text('extends = "0.toml"\n[training]\nseq_len = 9\n')
    (tmp_path / "both.toml").write_text('extends = ["left.toml", "0.toml"]\n')
    assert load_config(tmp_path / "both.toml").config.training.seq_len == 7


LONG = "v" * 100_000
WORDS = {
    "lists in each other": ["--sampling.prompts", "[" * 400 + "]" * 400],
    "lists beyond the parser": ["--training.steps", "[" * 100_000],
    "digits": ["--training.steps", "1" + "0" * 5000],
    "hexadecimal digits": ["--training.steps", "0x" + "f" * 5000],
    "infinity": ["--training.steps", "1e400"],
    "another key behind a line break": ["--training.steps", "3\nseq_len = 4"],
    "other alphabets": ["--trаining.steps", "3"],
    "control characters": ["--training.\x1b[2J", "3"],
    "a deep key": ["--a" + ".b" * 5000, "3"],
    "a place without end": [f"--data.stages.{'9' * 5000}.from_step", "3"],
    "a place too far": ["--data.stages.7.from_step", "3"],
    "a long key": [f"--training.{LONG}", "3"],
    "a long table": [f"--{LONG}.a", "3"],
    "a long value": ["--training.steps", LONG],
    "a long word": [LONG],
    "a long flag": [f"--{LONG}"],
    "NUL": ["--job.dump_folder", "a\0b"],
    "nothing": ["--job.dump_folder="],
}


@pytest.mark.parametrize("words", WORDS.values(), ids=WORDS.keys())
def test_odd_words(tmp_path: Path, words: list[str]) -> None:
    (tmp_path / "a.toml").write_text("")
    with pytest.raises(UserError) as caught:
        load_config(tmp_path / "a.toml", parse_arguments(words).overrides)
    assert str(caught.value).startswith("command line: ") and len(str(caught.value)) < 700


def test_the_terminal_gets_one_short_harmless_line(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text(f'[training]\n"\\u001b[2J\\u202e{LONG}" = 3')
    run = run_train("--config", tmp_path / "a.toml")
    assert run.returncode == 2 and run.stderr.count("\n") == 1 and len(run.stderr) < 600
    assert "\x1b" not in run.stderr and "\u202e" not in run.stderr and "\\x1b[2J\\u202e" in run.stderr


def test_what_is_shortened_keeps_both_ends() -> None:
    assert shorten("short") == "short" and show({"a": 1}) == '{"a": 1}'
    cut = shorten("a" * 500 + "z", 100)
    assert len(cut) == 100 and cut.startswith("aaa") and cut.endswith("az") and " … " in cut
    assert show(1 << 100_000) == "(a very long int)"
