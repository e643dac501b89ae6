"""What the planner says without ranks: errors, limits, remedies, and sums that must come out."""

import json
from pathlib import Path
from typing import Any

import pytest
from helpers import ROOT, clean_env, run_python

from titanling.config import load_config
from titanling.errors import UserError
from titanling.planner.forecast import Forecast, forecast
from titanling.planner.hardware import NAMES, hardware
from titanling.planner.remedy import remedies
from titanling.planner.report import as_json, grouped
from titanling.planner.setup import Setup, resolve
from titanling.planner.speed import bubble

TORCHTITAN = ROOT / "tests/config/torchtitan"
DEBUG = ROOT / "train_configs/debug.toml"


def setup_of(path: Path, world: int, device: str = "h100", **changes: Any) -> Setup:
    """A setup; `table__key` is `table.key`."""
    overrides = {key.replace("__", "."): value for key, value in changes.items()}
    return resolve(load_config(path, overrides).config, world, hardware(device))


def planned(path: Path, world: int, device: str = "h100", **changes: Any) -> Forecast:
    """Its forecast."""
    return forecast(setup_of(path, world, device, **changes))


def test_one_device_holds_everything() -> None:
    found = planned(DEBUG, 1, "cpu")
    elements = found.setup.shape.total_params
    assert found.memory.weights == found.memory.gradients == 4 * elements
    assert found.memory.optimizer == 8 * elements + 4 * len(found.parameters[0])
    assert found.collectives == [] and found.speed is None and found.fits


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"parallelism__tensor_parallel_degree": 2},
        {"parallelism__data_parallel_replicate_degree": 2, "parallelism__context_parallel_degree": 2},
        {"parallelism__pipeline_parallel_degree": 2, "model__tie_embeddings": False},
        {
            "parallelism__pipeline_parallel_degree": 2,
            "parallelism__pipeline_parallel_schedule": "Interleaved1F1B",
            "model__tie_embeddings": False,
            "model__n_layers": 6,
            "parallelism__tensor_parallel_degree": 2,
        },
    ],
)
def test_one_block_stands_for_all(changes: dict[str, Any]) -> None:
    setup = setup_of(DEBUG, 8, **({"training__global_batch_size": 32} | changes))
    whole, quick = forecast(setup), forecast(setup, quick=True)
    for one, other in zip(whole.parameters, quick.parameters, strict=True):
        assert sorted(grouped(one), key=str) == sorted(grouped(other), key=str)
    assert whole.memory == quick.memory and whole.collectives == quick.collectives


def test_uneven_shards_are_those_of_rank_0() -> None:
    found = planned(DEBUG, 3, "cpu", training__global_batch_size=12)
    by_name = {each.name: each for each in found.parameters[0]}
    # 256 rows over 3 ranks: 86 and 86 and 84.
    assert by_name["model.layers.0.self_attn.q_proj.weight"].local == (86, 256)


def test_more_shards_never_need_more() -> None:
    peaks = [planned(TORCHTITAN / "llama3_8b.toml", world).memory.peak for world in (8, 64)]
    assert peaks[0] > peaks[1]


def test_checkpointing_trades_memory_for_time() -> None:
    modes = [
        {"activation_checkpoint__mode": "none"},
        {"activation_checkpoint__mode": "selective", "activation_checkpoint__selective_ac_option": "op"},
        {"activation_checkpoint__mode": "full"},
    ]
    found = [planned(TORCHTITAN / "llama3_8b.toml", 8, **mode) for mode in modes]
    peaks, steps = [each.memory.peak for each in found], [each.speed.step for each in found if each.speed]
    assert peaks == sorted(peaks, reverse=True) and steps == sorted(steps)
    flops = found[2].flops
    assert flops.recomputed == pytest.approx(
        2 * found[2].setup.shape.matmul_params + (flops.per_token.full - flops.per_token.causal) / 3
    )


def test_remedies_fit_and_keep_the_global_batch() -> None:
    found = planned(TORCHTITAN / "llama3_8b.toml", 8, training__local_batch_size=4, activation_checkpoint__mode="none")
    assert not found.fits
    offered = remedies(found, enough=3)
    assert len(offered) == 3
    for changes, other in offered:
        assert changes and other.fits and other.setup.tokens == found.setup.tokens
        again = forecast(found.setup.changed(changes))
        assert again.memory == other.memory


def test_when_nothing_fits_the_closest_is_shown() -> None:
    found = planned(TORCHTITAN / "llama3_70b.toml", 8, training__seq_len=131072)
    offered = remedies(found)
    assert len(offered) == 1 and not offered[0][1].fits
    assert offered[0][1].memory.peak < found.memory.peak


def test_bubbles() -> None:
    def of(schedule: str, p: int, v: float, m: int) -> float:
        changes = {"parallelism__pipeline_parallel_schedule": schedule}
        return bubble(setup_of(DEBUG, 1, **changes).config.parallelism, p, v, m)

    assert of("1F1B", 1, 1, 1) == 0
    assert of("1F1B", 4, 1, 12) == of("GPipe", 4, 1, 12) == pytest.approx(0.25)
    assert of("Interleaved1F1B", 4, 2, 12) == pytest.approx(0.125)
    assert of("ZBVZeroBubble", 4, 2, 12) == 0


@pytest.mark.parametrize("name", NAMES)
def test_hardware(name: str) -> None:
    row = hardware(name)
    assert row.memory > 2**30
    known = (row.peak("bfloat16"), row.bandwidth, row.intra_node, row.inter_node)
    assert all(rate is None for rate in known) if name == "cpu" else all(rate and rate > 1e9 for rate in known)


def test_mfu_stays_below_what_products_reach() -> None:
    found = planned(TORCHTITAN / "llama3_8b.toml", 1024)
    assert found.speed is not None
    assert 0.1 < found.speed.mfu_causal < found.speed.mfu_full < 0.75


def test_float8_needs_its_units() -> None:
    with pytest.raises(UserError, match="float8.*--hardware a100"):
        planned(TORCHTITAN / "llama3_405b.toml", 512, "a100")


@pytest.mark.parametrize("path", sorted((ROOT / "train_configs").glob("*.toml")) + sorted(TORCHTITAN.glob("llama3*")))
def test_every_config_can_be_planned(path: Path) -> None:
    found = forecast(setup_of(path, 512, "h100", training__global_batch_size=-1), quick=True)
    assert json.loads(json.dumps(as_json(found, [])))["speed"]["step"] > 0


@pytest.mark.parametrize(
    ("name", "world", "device", "tokens"),
    [
        ("minilingua_1b", 256, "mi250x", 2_097_152),
        ("minilingua_30m", 8, "mi250x", 524_288),
        ("llammlein_1b", 64, "h100", 2_097_152),
        ("llammlein_7b", 64, "h100", 2_097_152),
        ("dense_180m", 1, "a100", 131_072),
        ("custom_300m", 4, "a100", 1_048_576),
    ],
)
def test_a_system_fits_its_machine(name: str, world: int, device: str, tokens: int) -> None:
    found = forecast(setup_of(ROOT / f"train_configs/{name}.toml", world, device), quick=True)
    assert found.fits and found.setup.tokens == tokens and found.speed is not None
    # Its cards have 40 GB, of which some are not for tensors; the table has those of 80.
    assert name != "custom_300m" or found.memory.peak < 36 * 2**30


def test_the_command(tmp_path: Path) -> None:
    out = tmp_path / "plan.json"
    done = run_python(
        "scripts/plan.py", "--config", DEBUG, "--world-size", "8", "--hardware", "h200", "--json", out,
        "--parallelism.tensor_parallel_degree", "2", "--training.global_batch_size=32",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for word in ("dp_shard 4 × tp 2", "sequence parallel", "embed_tokens", "MFU", "all-gather"):
        assert word in done.stdout, word
    found = json.loads(out.read_text(encoding="utf-8"))
    assert found["world_size"] == 8 and found["mesh"]["tp"] == 2 and found["memory"]["fits"]
    assert sum(row["bytes"] for row in found["parameters"]) == found["memory"]["weights"]


def test_a_mixture_is_planned_without_its_files(tmp_path: Path) -> None:
    config = ROOT / "train_configs/minilingua_1b.toml"
    done = run_python(
        "-m",
        "titanling.train",
        "--config",
        config,
        "--dry-run",
        "--model.n_layers=2",
        cwd=tmp_path,
        env=clean_env(NGPU="8", NNODES="32"),
    )
    assert done.returncode == 0 and "mesh: dp_shard 256" in done.stdout, done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--world-size", "3"], "training.global_batch_size = 16"),
        (["--world-size", "8", "--parallelism.tensor_parallel_degree", "8"], "model.n_kv_heads"),
        (["--world-size", "8", "--parallelism.pipeline_parallel_degree", "2"], "tied"),
        (["--world-size", "0"], "--world-size 0"),
        (["--world-size", "2", "--training.step", "1"], "did you mean steps"),
    ],
)
def test_errors_are_those_of_training(arguments: list[str], said: str) -> None:
    done = run_python("scripts/plan.py", "--config", DEBUG, *arguments)
    assert done.returncode == 2 and said in done.stderr and done.stderr.count("\n") == 1, done.stderr


def test_help_has_an_example() -> None:
    done = run_python("scripts/plan.py", "--help")
    assert done.returncode == 0 and "example: python scripts/plan.py" in " ".join(done.stdout.split())


def test_a_dry_run_needs_no_data(tmp_path: Path) -> None:
    done = run_python(
        "-m", "titanling.train", "--config", DEBUG, "--dry-run", cwd=tmp_path, env=clean_env(NGPU="2", NNODES="2")
    )
    assert done.returncode == 0 and "mesh: dp_shard 4" in done.stdout, done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_world_size_that_is_no_number(tmp_path: Path) -> None:
    done = run_python("-m", "titanling.train", "--config", DEBUG, "--dry-run", env=clean_env(NGPU="all"))
    assert done.returncode == 2 and "NGPU=all" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(("name", "world"), [("llama3_8b", 1024), ("llama3_405b", 4096)])
def test_large_worlds_take_a_minute_and_four_gib_at_most(name: str, world: int) -> None:
    code = (
        "import resource, runpy, sys, time; start = time.process_time()\n"
        "sys.argv = ['plan.py', *sys.argv[1:]]\n"
        "try: runpy.run_path('scripts/plan.py', run_name='__main__')\n"
        "except SystemExit as end: assert not end.code\n"
        "print('USED', time.process_time() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)"
    )
    arguments = ["--config", TORCHTITAN / f"{name}.toml", "--world-size", str(world), "--hardware", "h100"]
    done = run_python("-c", code, *arguments, timeout=200)
    assert done.returncode == 0, done.stderr
    seconds, gib = map(float, done.stdout.rpartition("USED")[2].split())
    assert seconds < 60 and gib < 4
