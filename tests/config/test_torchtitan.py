"""torchtitan v0.2.2's configs run here unchanged: its Llama-3 TOMLs load, and no key of it is dropped in silence."""

import json
from pathlib import Path
from typing import Any

import pytest
import tomli
from helpers import TinyData, clean_env, run_train, tiny_config

from titanling.config.check import check_runnable
from titanling.config.load import dump_toml, is_key, known_tables, load_config
from titanling.config.torchtitan import CONVERTERS, NO_FIELDS, is_torchtitan_key
from titanling.errors import UserError
from titanling.model.presets import resolve_shape

TOMLS = Path(__file__).parent / "torchtitan"

# Keys that every_key.toml cannot show, because their default is None.
UNSET_BY_DEFAULT = """
    job.config_file job.save_config_file model.tokenizer_path lr_scheduler.total_steps lr_scheduler.decay_ratio
    training.dataset_path training.dataloader.prefetch_factor parallelism.module_fqns_per_model_part
    parallelism.pipeline_parallel_layers_per_stage checkpoint.initial_load_path quantize.linear.float8.recipe_name
    fault_tolerance.semi_sync_method validation.dataset_path validation.dataloader.prefetch_factor debug.seed
""".split()


def leaves(tree: dict[str, Any], prefix: str = "") -> list[str]:
    """Dotted names of the values in a TOML tree."""
    found = []
    for key, value in tree.items():
        found += leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else [prefix + key]
    return found


@pytest.mark.parametrize(
    ("name", "total", "tokens"),
    [
        ("debug_model", 6_163_712, 8 * 2048),
        ("llama3_8b", 8_030_261_248, 8192),
        ("llama3_70b", 70_553_706_496, 8 * 8192),
        ("llama3_405b", 405_853_388_800, 2 * 8192),
    ],
)
def test_the_llama3_tomls(tmp_path: Path, name: str, total: int, tokens: int) -> None:
    path = TOMLS / f"{name}.toml"
    config, _, _, remarks = load_config(path)
    assert remarks == []
    assert resolve_shape(config.model).total_params == total
    assert config.training.local_batch_size * config.training.seq_len == tokens
    resolved = tmp_path / "resolved.toml"
    resolved.write_text(dump_toml(config), encoding="utf-8")
    assert load_config(resolved).config == config
    # No value of the file is lost on the way, save those that ask for nothing.
    kept = config.model_dump(mode="json")
    for dotted in leaves(tomli.loads(path.read_text())):
        table, _, key = dotted.rpartition(".")
        here, there = kept, tomli.loads(path.read_text())
        for part in table.split("."):
            here, there = here[part], there[part]
        if dotted == "model.converters":
            there[key] = [CONVERTERS.get(name, name) for name in there[key]]
        assert key not in here and is_torchtitan_key(dotted) or here[key] == there[key], dotted

    run = run_train("--config", path, cwd=tmp_path)
    assert run.returncode == 2 and run.stdout == "" and run.stderr.count("\n") == 1
    # What they ask for is there but for their tokenizer, and the processes.
    check_runnable(config)
    assert f"error: {path}: model.hf_assets_path = " in run.stderr or "does not fit 1 process" in run.stderr
    check_runnable(load_config(path, {"data.train": "data/mine/train"}).config)
    assert [entry.name for entry in tmp_path.iterdir()] == ["resolved.toml"]


def test_every_key_is_known_and_its_default_loads() -> None:
    path = TOMLS / "every_key.toml"
    keys = leaves(tomli.loads(path.read_text())) + UNSET_BY_DEFAULT
    assert len(keys) == 149
    assert [key for key in keys if not is_key(key) and not is_torchtitan_key(key)] == []
    assert load_config(path).remarks == []
    # The list of keys without a field holds nothing that is not torchtitan's, and nothing that we have a field for.
    older = {"job.print_args", "job.use_for_integration_test"}
    assert set(NO_FIELDS) - {*keys} == older
    assert [key for key in NO_FIELDS if is_key(key)] == []


@pytest.mark.parametrize("dotted", NO_FIELDS)
def test_a_key_without_a_field_is_at_its_default_or_refused_or_said_to_have_no_effect(
    tmp_path: Path, dotted: str
) -> None:
    path = tmp_path / "a.toml"
    path.write_text("")
    known = NO_FIELDS[dotted]
    default = load_config(path).config
    for value in known.silent:
        if dotted != "checkpoint.initial_load_in_hf":
            assert load_config(path, {dotted: value})[::3] == (default, [])
    for value in (True, False, 7, "x", ["x"], 0):
        if any(value == silent and type(value) is type(silent) for silent in known.silent):
            continue
        if known.why:
            config, _, _, remarks = load_config(path, {dotted: value})
            said = f"command line: {dotted} = {json.dumps(value)} has no effect here: {known.why}"
            assert (config, remarks) == (default, [said])
            continue
        with pytest.raises(UserError) as caught:
            load_config(path, {dotted: value})
        assert f"command line: {dotted} = " in str(caught.value)
        assert "is a torchtitan setting that titanling does not support; remove it" in str(caught.value)


def test_what_has_no_effect_is_said_when_it_is_run_or_planned(tmp_path: Path, tiny_data: TinyData) -> None:
    changes = {"comm.trace_buf_size": 0, "training.steps": 1, "checkpoint.enable": False}
    changes["lr_scheduler.warmup_steps"] = 0
    path = tiny_config(tmp_path, tiny_data, changes)
    said = f"warning: {path}: comm.trace_buf_size = 0 has no effect here: torch's flight recorder stays as"
    run = run_train("--config", path)
    assert run.returncode == 0 and run.stderr.startswith(said) and run.stderr.count("\n") == 1, run.stderr
    # The resolved config says nothing of it any more.
    assert load_config(tmp_path / "run" / "config.toml").remarks == []
    planned = run_train("--config", path, "--dry-run")
    assert planned.returncode == 0 and planned.stderr.startswith(said), planned.stderr


def test_the_405b_file_is_planned(tmp_path: Path) -> None:
    from titanling.planner.hardware import hardware
    from titanling.planner.setup import resolve

    loaded = load_config(TOMLS / "llama3_405b.toml", {"model.hf_assets_path": str(tmp_path)})
    assert loaded.config.model.converters == ("quantize.linear.float8",)
    assert resolve(loaded.config, 128, hardware("h100")).float8
    both = load_config(TOMLS / "llama3_405b.toml", {"model.converters": ["float8", "quantize.linear.float8"]})
    assert both.config.model.converters == ("quantize.linear.float8",)


def test_weights_beside_the_tokenizer(tmp_path: Path) -> None:
    path = tmp_path / "a.toml"
    path.write_text('[model]\nhf_assets_path = "hf"\n[checkpoint]\ninitial_load_in_hf = true\n')
    config, _, _, remarks = load_config(path)
    assert config.checkpoint.initial_load_path == "hf"
    assert remarks == [
        f"{path}: checkpoint.initial_load_in_hf = true without initial_load_path: the run starts from the weights in"
        " model.hf_assets_path"
    ]
    config, _, _, remarks = load_config(path, {"checkpoint.initial_load_path": "other"})
    assert (config.checkpoint.initial_load_path, remarks) == ("other", [])
    with pytest.raises(UserError, match="takes the weights of model.hf_assets_path, which is not set"):
        load_config(path, {"model.hf_assets_path": None})


def test_its_keys_work_on_the_command_line_too() -> None:
    path = TOMLS / "debug_model.toml"
    assert run_train("--config", path, "--job.print_config=false", "--print-config").returncode == 0
    refused = run_train("--config", path, "--checkpoint.load_only", "--print-config")
    assert refused.returncode == 2
    assert refused.stderr == (
        "error: command line: checkpoint.load_only = true is a torchtitan setting that titanling does not support;"
        " remove it\n"
    )


TABLES = sorted({dotted.rpartition(".")[0] for dotted in NO_FIELDS} - {*known_tables()}) + ["quantize.grouped_mm"]


@pytest.mark.parametrize("table", TABLES)
def test_a_misspelt_key_in_a_table_of_torchtitan(tmp_path: Path, table: str) -> None:
    path = tmp_path / "a.toml"
    key = next((dotted.rpartition(".")[2] for dotted in NO_FIELDS if dotted.rpartition(".")[0] == table), "zzzz")
    hint = f"; did you mean {key}?" if key != "zzzz" else "; remove it"
    path.write_text(f"[{table}]\n{key}s = true\n")
    with pytest.raises(UserError) as caught:
        load_config(path)
    assert str(caught.value) == f"{path}: unknown key {key}s in torchtitan's [{table}]{hint}"
    path.write_text(f"{table} = 3\n")
    with pytest.raises(UserError) as caught:
        load_config(path)
    assert str(caught.value) == f"{path}: {table} = 3: must be a table, [{table}]"


def test_its_data_sets_become_sources(tmp_path: Path) -> None:
    path = TOMLS / "llama3_8b.toml"
    (source,) = load_config(path).config.data.sources
    assert (source.name, source.kind, source.paths, source.subset) == ("c4", "hf", ("allenai/c4",), "en")
    (source,) = load_config(path, {"training.dataset_path": str(tmp_path)}).config.data.sources
    assert (source.paths, source.subset) == ((str(tmp_path),), None)  # a folder of plain files
    (tmp_path / "README.md").touch()
    (source,) = load_config(path, {"training.dataset_path": str(tmp_path)}).config.data.sources
    assert source.subset == "en"  # a copy of the repository
    (source,) = load_config(TOMLS / "debug_model.toml").config.data.sources
    assert (source.name, source.paths, source.subset) == ("c4_test", ("tests/assets/c4_test",), None)
    loader = {"training.dataloader.num_workers": 3, "training.dataloader.pin_memory": True}
    assert load_config(path, loader).config.data.workers == 3
    assert load_config(path, loader | {"data.workers": 2}).config.data.workers == 2
    assert load_config(path, loader | {"data.train": "data/mine/train"}).config.data.workers == 0
    for overrides in ({"data.train": "data/mine/train"}, {"training.dataset": None}):
        assert load_config(path, overrides).config.data.sources == ()
    other = tmp_path / "other.toml"
    other.write_text('[training]\ndataset = "c5"')
    with pytest.raises(UserError, match=r'toml: training.dataset = "c5" is not known \(only c4, c4_test\)'):
        load_config(other)


def test_its_debug_model_trains_on_a_folder(tmp_path: Path, tiny_data: TinyData) -> None:
    pytest.importorskip("datasets")
    lines = [json.dumps({"text": f"line {number} " * 20}) + "\n" for number in range(50)]
    (tmp_path / "c4").mkdir()
    (tmp_path / "c4" / "data.jsonl").write_text("".join(lines), encoding="utf-8")
    run = run_train(
        *("--config", TOMLS / "debug_model.toml", "--training.dataset_path", tmp_path / "c4"),
        *("--model.hf_assets_path", tiny_data.tokenizer, "--training.steps", "2", "--training.seq_len", "32"),
        *("--model.dim", "32", "--model.n_layers", "2", "--model.n_heads", "4", "--model.n_kv_heads", "2"),
        *("--job.dump_folder", tmp_path / "run", "--checkpoint.enable=false", "--metrics.enable_tensorboard=false"),
        env=clean_env(HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path / "hf")),
    )
    assert run.returncode == 0, run.stderr
    assert "c4_test  100.00 %  of 1 hf file" in run.stdout and "Done: 2 steps" in run.stdout
