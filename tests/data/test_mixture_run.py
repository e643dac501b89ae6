"""Training on a mixture, as a user does: packed, across a stage change, resumed on more ranks, edited on the way."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import TinyData, clean_env, run_python, run_train, tiny_config

from titanling.config import load_config
from titanling.data.sources import open_sources
from titanling.data.trace import pieces, samples_of_step

STEPS = 8


def config(folder: Path, data: TinyData, name: str = "run.toml", **changes: Any) -> Path:
    """Two sources whose shares are swapped at step 5."""
    sources = [
        {"name": "x", "paths": [data.train], "weight": 3.0},
        {"name": "y", "paths": [data.validation], "weight": 1.0},
    ]
    settings = {
        "data.train": None,
        "data.sources": sources,
        "data.stages": [stage(5)],
        "data.packing": "best_fit",
        "data.packing_window": 16,
        "data.document_mask": "causal",
        "data.audit_log": True,
        "training.steps": STEPS,
        "lr_scheduler.decay_ratio": 0.0,  # or half of the steps would end with another rate
        "validation.enable": False,
        "metrics.enable_tensorboard": False,
    }
    return tiny_config(folder, data, settings | {key.replace("__", "."): value for key, value in changes.items()}, name)


def stage(step: int, **weights: float) -> dict[str, Any]:
    return {"from_step": step, "weights": weights or {"x": 1.0, "y": 3.0}}


def losses(folder: Path) -> list[float]:
    rows = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, tiny_data: TinyData) -> Path:
    """A run without interruption."""
    folder = tmp_path_factory.mktemp("whole")
    run = run_train("--config", config(folder, tiny_data))
    assert run.returncode == 0, run.stderr
    lines = [line.split() for line in run.stdout.splitlines()]
    assert ["data:", "2", "sources;", "their", "shares", "change", "at", "step", "5"] in lines
    assert any(line[:6] == "x 75.00 % → 25.00 %".split() for line in lines), run.stdout
    return folder


def test_across_a_stage_and_on_with_two_ranks(whole: Path, tmp_path: Path, tiny_data: TinyData) -> None:
    path = config(tmp_path, tiny_data)
    first = run_train("--config", path, "--training.steps=6")
    assert first.returncode == 0, first.stderr
    shutil.rmtree(tmp_path / "run/checkpoints/step-000006")  # as if it had been killed before: two steps are done again
    command = ("-m", "titanling.launch", "--", "--config", path, "--parallelism.data_parallel_shard_degree=-1")
    rest = run_python(*command, "--training.local_batch_size=1", env=clean_env(NGPU="2"))
    assert rest.returncode == 0, rest.stderr
    assert losses(tmp_path) == pytest.approx(losses(whole), rel=1e-5)
    assert audited(tmp_path, 0, [4] * 4 + [2] * 4) | audited(tmp_path, 1, [2] * 4) == audited(whole, 0, [4] * 8)


def audited(folder: Path, rank: int, sizes: list[int]) -> dict[int, Any]:
    """What a rank's log says of each sample: as the inverse of the order says too, and as the files do."""
    settings = load_config(folder / "run/config.toml").config
    source = open_sources(settings.data, settings.training.seq_len, settings.debug.seed, 4)
    text = (folder / f"run/data/steps-rank{rank:03d}.jsonl").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in text.splitlines()]
    assert [row["step"] for row in rows] == list(range(STEPS - len(sizes) + 1, STEPS + 1))
    assert [len(row["sequences"]) for row in rows] == sizes
    found = {}
    for row in rows:
        for sequence in row["sequences"]:
            sample = sequence["sample"]
            assert sample in samples_of_step(row["step"], 4)
            assert sequence["pieces"] == [piece._asdict() for piece in pieces(source, sample)]
            ids = source.batch(np.array([sample]))["input_ids"][0]
            assert sequence["blake2b"] == hashlib.blake2b(ids.tobytes(), digest_size=16).hexdigest()
            found[sample] = sequence
    assert len(found) == sum(sizes)
    return found


def test_a_stage_edited_into_a_running_job(whole: Path, tmp_path: Path, tiny_data: TinyData) -> None:
    assert run_train("--config", config(tmp_path, tiny_data, data__stages=[]), "--training.steps=4").returncode == 0
    early = config(tmp_path, tiny_data, "early.toml", data__stages=[stage(3)])
    refused = run_train("--config", early)
    assert refused.returncode == 2 and len(refused.stderr.splitlines()) == 1
    says = "up to step 4 it read x 3 : y 1 from token 0, and this config says x 3 : y 1 from token 0, x 1 : y 3 from"
    assert f"data.stages: {says}" in refused.stderr and "only what begins after that step may change" in refused.stderr
    run = run_train("--config", config(tmp_path, tiny_data))
    assert run.returncode == 0, run.stderr
    assert losses(tmp_path)[:4] == losses(whole)[:4] and losses(tmp_path)[4:] == pytest.approx(losses(whole)[4:])
    later = config(tmp_path, tiny_data, "later.toml", data__stages=[stage(5), stage(9, y=1.0)])
    assert run_train("--config", later, "--training.steps=10").returncode == 0


def test_a_stage_with_shorter_rows(tmp_path: Path, tiny_data: TinyData) -> None:
    """Resumed on two ranks it goes on as on one, and its length may not be changed afterwards."""
    swap = {"from_step": 5, "weights": {"x": 1.0, "y": 3.0}}
    stages = [{"from_step": 2, "seq_len": 16}, swap | {"seq_len": 32}, {"from_step": 7, "seq_len": 8}]
    settings = {"data__stages": stages, "data__packing": "concat"}
    path = config(tmp_path, tiny_data, **settings)
    first = run_train("--config", path, "--training.steps=3")
    assert first.returncode == 0, first.stderr
    assert "cut into rows of 16 tokens from step 2, of 32 tokens from step 5, of 8 tokens from step 7" in first.stdout
    shutil.rmtree(tmp_path / "run/checkpoints/step-000003")
    command = ("-m", "titanling.launch", "--", "--config", path, "--parallelism.data_parallel_shard_degree=-1")
    rest = run_python(*command, "--training.local_batch_size=1", env=clean_env(NGPU="2"))
    assert rest.returncode == 0, rest.stderr
    alone = config(tmp_path / "alone", tiny_data, **settings)
    assert run_train("--config", alone).returncode == 0
    assert losses(tmp_path) == pytest.approx(losses(tmp_path / "alone"), rel=1e-5)
    stages[0]["seq_len"] = 8
    refused = run_train("--config", config(tmp_path, tiny_data, "other.toml", **settings))
    assert refused.returncode == 2 and "in rows of 16 from token" in refused.stderr, refused.stderr


BAD = {
    "nothing changes": ({"data__stages": [{"from_step": 5}]}, "weights or seq_len must say what a stage changes"),
    "rows that do not fit": ({"data__stages": [stage(5) | {"seq_len": 5}]}, "does not divide training.seq_len = 32"),
    "weight of nothing": ({"data__sources": [{"name": "x", "paths": ["x"], "weight": 0.0}]}, "weight = 0.0: must be"),
    "unknown source": ({"data__stages": [stage(5, z=1.0)]}, 'data.stages gives a weight to "z"'),
    "negative weight": ({"data__stages": [stage(5, x=-1.0)]}, "must be greater than 0"),
    "both kinds of start": ({"data__stages": [stage(5) | {"from_tokens": 9}]}, "not both"),
    "train and sources": ({"data__train": "a"}, "data.train is one source"),
    "out of order": ({"data__stages": [stage(5), stage(4)]}, "data.stages must stand in order"),
    "no file": (
        {"data__sources": [{"name": "x", "paths": ["none*"], "weight": 1.0}], "data__stages": []},
        "is no prefix",
    ),
    "exhausted": ({"training__steps": 4000}, '"y" has'),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_mixtures(tmp_path: Path, tiny_data: TinyData, case: str) -> None:
    changes, words = BAD[case]
    path = config(tmp_path, tiny_data, **changes)
    if case == "exhausted":
        path.write_text(path.read_text().replace("weight = 1.0\n", "weight = 1.0\nmax_epochs = 4.0\n"))
    run = run_train("--config", path)
    assert run.returncode == 2 and len(run.stderr.splitlines()) == 1 and words in run.stderr, run.stderr
    assert not (tmp_path / "run").exists()
