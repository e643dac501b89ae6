"""Files of earlier versions (make.py wrote them): today's code loads them, goes on from them and exports them.

Loaded tensors and the samples that follow must be equal; losses nearly, for another processor rounds otherwise.
"""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers import ROOT, clean_env, run_python
from make import TABLES
from outcome import AT_ONE_RANK, AT_TWO_RANKS, RUNS, STEPS, interrupted_again, of_folder, outcome
from runs import differing, rows

from titanling import train
from titanling.checkpoint.export import export_to_hf
from titanling.checkpoint.import_model import import_hf
from titanling.checkpoint.inventory import verify as verify_checkpoints
from titanling.config import load_config
from titanling.data.ids import has_ids, read_ids
from titanling.data.inspect import verify
from titanling.data.prepare import report
from titanling.data.prepare.run import prepare
from titanling.data.prepare.tokenizer import read_tokenizer
from titanling.launch import free_port
from titanling.stop import StopRequest

HERE = Path(__file__).parent
VERSIONS = sorted(path.parent.name for path in HERE.glob("*/expected.json"))
ONE_PROCESS = {f"parallelism.{key}": 1 for table in AT_TWO_RANKS.values() for key in table}
TOLERANCE = {"float16": 2e-2, "bfloat16": 2e-2}
"""Relative, of a loss; of float32 1e-4."""


@pytest.fixture(params=VERSIONS)
def version(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What a version's files must give. The current folder becomes a copy of them."""
    files = tmp_path / "files"
    shutil.copytree(HERE / request.param, files)
    monkeypatch.chdir(files)
    return json.loads(Path("expected.json").read_text(encoding="utf-8"))


def check(run: str, found: dict[str, Any], expected: dict[str, Any]) -> None:
    """A run has loaded what it had saved, and goes on as it did."""
    found, expected = dict(found), dict(expected)
    losses = expected.pop("losses")
    assert found.pop("losses") == pytest.approx(losses, rel=TOLERANCE.get(run, 1e-4))
    assert found == expected


@pytest.mark.parametrize("run", RUNS)
def test_a_run_goes_on(version: dict[str, Any], run: str) -> None:
    """In one process; bit for bit however often it is interrupted."""
    assert not Path(f"runs/{run}/owner.json").exists()  # of a version that had no owners; it may be taken
    found, ends = outcome(run, ONE_PROCESS)
    check(run, found, version["runs"][run])
    if run in AT_ONE_RANK:
        assert differing(ends, interrupted_again(run)) == []


@pytest.mark.slow
def test_runs_of_two_ranks_go_on_at_two_ranks(version: dict[str, Any]) -> None:
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port())]
    env = clean_env(PYTHONPATH=f"{ROOT}:{ROOT / 'tests'}")
    done = run_python(*torchrun, HERE / "at_two_ranks.py", cwd=Path.cwd(), env=env)
    assert done.returncode == 0, done.stderr
    results = json.loads(Path("results.json").read_text(encoding="utf-8"))
    assert results.keys() == AT_TWO_RANKS.keys()
    for run, (found, unlike) in results.items():
        check(run, found, version["runs"][run])
        assert unlike == []


def test_the_command_goes_on_in_the_run_folder(
    version: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the config that lies in it: the prepared data is still this config's, the folder is free to be taken."""
    before = Path("runs/one/metrics.jsonl").read_text(encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["train", "--config=runs/one/config.toml", f"--training.steps={2 * STEPS}"])
    monkeypatch.setattr(StopRequest, "install", lambda _: None)  # signals are the tests' own
    assert train.main() == 0
    said = capsys.readouterr().out
    assert "used as it is" in said and f"resumed from runs/one/checkpoints/step-{STEPS:06d}" in said
    assert Path("runs/one/metrics.jsonl").read_text(encoding="utf-8").startswith(before)
    steps, losses = zip(*rows(Path("runs/one")), strict=True)
    assert steps == tuple(range(1, 2 * STEPS + 1))
    assert list(losses[STEPS:]) == pytest.approx(version["runs"]["one"]["losses"], rel=1e-4)


def test_checkpoints_verify(version: dict[str, Any]) -> None:
    verdicts = verify_checkpoints([*(f"runs/{run}" for run in RUNS), "imported"])
    assert len(verdicts) == len(RUNS) + 1 and not any(verdict.bad for verdict in verdicts)


def test_configs_load(version: dict[str, Any]) -> None:
    for run in RUNS:
        config = load_config(f"runs/{run}/config.toml").config
        assert config.job.dump_folder == f"runs/{run}" and config.training.steps == STEPS


def test_weights_are_exported_and_imported(version: dict[str, Any]) -> None:
    expected, tokenizer = version["exports"], Path("data/tokenizer")
    step = f"checkpoints/step-{STEPS:06d}"
    export_to_hf(Path(f"runs/one/{step}"), Path("again"))
    export_to_hf(Path(f"runs/fsdp/{step}"), Path("again-bfloat16"), dtype="bfloat16")
    export_to_hf(Path("imported/step-000000"), Path("once-more"), tokenizer)
    import_hf(Path("hf-bfloat16"), Path("imported-again"))
    assert of_folder("again") == expected["hf"]
    assert of_folder("again-bfloat16") == of_folder("once-more") == expected["hf-bfloat16"]
    assert of_folder("imported-again/step-000000/model") == expected["imported/step-000000/model"]


def test_token_files_are_read(version: dict[str, Any]) -> None:
    for prefix, expected in version["token_files"].items():
        sidecar = verify(prefix).model_dump(mode="json")
        assert {key: sidecar[key] for key in expected["sidecar"]} == expected["sidecar"]
        assert has_ids(prefix) == (expected["names"] is not None)
        if expected["names"] is not None:
            assert read_ids(prefix, range(sidecar["documents"])) == expected["names"]
    for prefix, expected in version["reports"].items():
        assert [list(row) for row in report.rows(report.read_report(prefix))] == expected
    for text, ids in version["encoded"].items():
        assert read_tokenizer("data/tokenizer").encode(text).ids == ids


def test_prepared_data_is_kept(version: dict[str, Any]) -> None:
    """The same settings ask for the files that are there."""
    settings = load_config("runs/one/config.toml").config.data.prepare
    said = prepare(settings, "data/train", "data/validation", "data/tokenizer")
    assert any("used as it is" in line for line in said) and not any(line.startswith("tokenised") for line in said)


def test_every_run_is_there() -> None:
    assert set(TABLES) == set(RUNS) and len(set(RUNS)) == len(AT_ONE_RANK) + len(AT_TWO_RANKS)
