"""The command line: overrides, flags, --help, --print-config, and what an error costs."""

import resource
from pathlib import Path
from typing import Any

import pytest
import tomli
import tomli_w
from helpers import ROOT, run_python, run_train
from hypothesis import given
from hypothesis import strategies as st

from titanling.config.arguments import parse_arguments
from titanling.config.load import dump_toml, header, is_kind, is_repeated, known_tables, load_config
from titanling.config.reference import help_text, markdown
from titanling.errors import UserError

DEBUG = ROOT / "train_configs" / "debug.toml"


@pytest.mark.parametrize(
    ("words", "overrides"),
    [
        (["--training.steps", "3"], {"training.steps": 3}),
        (["--training.steps=3"], {"training.steps": 3}),
        (["--optimizer.lr=3e-4"], {"optimizer.lr": 3e-4}),
        (["--parallelism.data_parallel_shard_degree", "-1"], {"parallelism.data_parallel_shard_degree": -1}),
        (["--compile.enable"], {"compile.enable": True}),
        (["--compile.enable", "--training.steps", "3"], {"compile.enable": True, "training.steps": 3}),
        (["--compile.enable", "false"], {"compile.enable": False}),
        (["--compile.enable=false"], {"compile.enable": False}),
        (["--job.description", "two words"], {"job.description": "two words"}),
        (["--job.description", '"quoted"'], {"job.description": "quoted"}),
        (["--job.description=a=b"], {"job.description": "a=b"}),
        (["--job.description=--x"], {"job.description": "--x"}),
        # A string key takes what looks like another type as it stands.
        (["--job.description", "007"], {"job.description": "007"}),
        (["--job.dump_folder", "2024-01-01"], {"job.dump_folder": "2024-01-01"}),
        (["--model.flavor", "8B"], {"model.flavor": "8B"}),
        (["--activation_checkpoint.selective_ac_option", "2"], {"activation_checkpoint.selective_ac_option": "2"}),
        (["--data.train", "1"], {"data.train": "1"}),
        (["--sampling.prompts", '["def ", "a\\n"]'], {"sampling.prompts": ["def ", "a\n"]}),
        (["--compile.components=[]"], {"compile.components": []}),
        (["--data.prepare.vocab_size", "400"], {"data.prepare.vocab_size": 400}),
        (["--training.steps", "3", "--training.steps", "4"], {"training.steps": 4}),
        (["--data.stages.0.from_step", "3"], {"data.stages.0.from_step": 3}),
    ],
)
def test_overrides(words: list[str], overrides: dict[str, Any]) -> None:
    assert parse_arguments(words).overrides == overrides


def test_the_other_words() -> None:
    parsed = parse_arguments(["--config", "a.toml", "--print-config"])
    assert (parsed.config, parsed.overrides, parsed.print_config, parsed.help) == ("a.toml", {}, True, False)
    # torchtitan's spelling
    assert parse_arguments(["--job.config_file=b.toml"]).config == "b.toml"
    assert parse_arguments(["-h"]).help and parse_arguments(["--help"]).help


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--training.steps"], "--training.steps needs a value"),
        (["--job.dump_folder", "--training.steps", "3"], "--job.dump_folder needs a value"),
        (["--config"], "--config needs a value"),
        (["--training.stepz", "3"], "unknown key stepz in [training]; did you mean steps?"),
        (["--traning.steps", "3"], "unknown table [traning]; did you mean training?"),
        (["--confg", "a"], "did you mean config?"),
        (["train"], "'train': expected --config FILE or --table.key value"),
        (["training.steps=3"], "expected --config FILE or --table.key value"),
        (["--data.prepare", "3"], "must be a table, [data.prepare]"),
        (
            ["--data.stages.from_step", "3"],
            "say which, --data.stages.0.from_step for the",
        ),
        (["--data.stages.0.from_step", "3"], "there are 0 [[data.stages]], counted from 0"),
        (["--data.stages.0.from_steps", "3"], "unknown key from_steps in [data.stages]; did you mean from_step"),
        (["--data.0.train", "x"], "there is one [data]; use --data.train"),
    ],
)
def test_refused_words(tmp_path: Path, words: list[str], says: str) -> None:
    path = tmp_path / "a.toml"
    path.write_text("")
    with pytest.raises(UserError) as caught:
        load_config(path, parse_arguments(words).overrides)
    assert str(caught.value).startswith("command line: ") and says in str(caught.value)


TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1)


@given(st.one_of(st.tuples(st.just("job.description"), TEXT), st.tuples(st.just("sampling.prompts"), st.lists(TEXT))))
def test_any_text_passes_quoted(key_value: tuple[str, Any]) -> None:
    key, value = key_value
    quoted = tomli_w.dumps({"v": value}).removeprefix("v = ").removesuffix("\n")
    assert parse_arguments([f"--{key}={quoted}"]).overrides == {key: value}
    assert parse_arguments([f"--{key}", quoted]).overrides == {key: value}


def test_help_lists_every_key_with_type_and_default() -> None:
    text = help_text()
    for table, fields in known_tables().items():
        for key, field in fields.model_fields.items():
            if f"{table}.{key}" in known_tables() or (key == "kind" and is_kind(table)):
                continue
            assert field.description, f"{table}.{key} has no docstring"
            flag = f"{header(table)} {key}" if is_repeated(table) else f"--{table}.{key}"
            line = next((line for line in text.splitlines() if line.startswith(f"  {flag}  ")), None)
            assert line is not None and ", default " in line, f"{table}.{key} is not in --help"
    assert "training.steps  integer ≥ 1, default 10000\n      Optimizer steps" in text
    assert "example: python -m titanling.train --config train_configs/debug.toml" in text


def test_help_and_print_config_as_a_user_calls_them(tmp_path: Path) -> None:
    shown = run_train("--help")
    assert (shown.returncode, shown.stderr) == (0, "") and "--training.steps" in shown.stdout
    printed = run_train("--config", DEBUG, "--training.steps", "7", "--print-config")
    assert (printed.returncode, printed.stderr) == (0, "")
    (tmp_path / "resolved.toml").write_text(printed.stdout, encoding="utf-8")
    config = load_config(tmp_path / "resolved.toml").config
    assert config == load_config(DEBUG, {"training.steps": 7}).config
    assert tomli.loads(printed.stdout)["training"]["steps"] == 7
    assert dump_toml(config) == printed.stdout


def test_a_reader_that_leaves_early_sees_no_traceback() -> None:
    code = (
        "import subprocess, sys\n"
        "run = subprocess.Popen([sys.executable, '-m', 'titanling.train', '--help'],"
        " stdout=subprocess.PIPE, stderr=subprocess.PIPE)\n"
        "run.stdout.close()\n"
        "print(run.stderr.read().decode(), end='')\n"
    )
    assert run_python("-c", code).stdout == ""


def test_configuration_md_is_current() -> None:
    path = ROOT / "docs" / "configuration.md"
    message = "run: python -m titanling.config.reference > docs/configuration.md"
    assert path.read_text(encoding="utf-8") == markdown(), message


def test_a_config_error_is_quick_and_comes_before_torch() -> None:
    # Processor time: what the user waits on a machine that does nothing else.
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    run = run_train("--config", DEBUG, "--training.steps", "0")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert run.returncode == 2 and run.stderr == "error: command line: training.steps = 0: must be at least 1\n"
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2.0
    traced = run_python("-X", "importtime", "-m", "titanling.train", "--config", DEBUG, "--model.flavor", "9B")
    imported = {line.rpartition("|")[2].strip() for line in traced.stderr.splitlines() if "|" in line}
    assert traced.returncode == 2 and "titanling.config.schema" in imported
    assert not {name for name in imported if name.partition(".")[0] in ("torch", "tokenizers", "tensorboard")}
