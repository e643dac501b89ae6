"""The benchmark scripts run and report what they promise. Their times mean nothing here: models and files are tiny."""

import json
from pathlib import Path
from typing import Any

import pytest
from helpers import ROOT, run_python

BENCHMARKS = ROOT / "benchmarks"
MACHINE = {"date", "cpu", "cpus", "memory_gib", "system", "python", "load_before", "command"}

pytestmark = pytest.mark.slow


def smoke(script: str, folder: Path, *arguments: str) -> dict[str, Any]:
    """The JSON of `script --smoke`."""
    path = folder / "results" / "results.json"
    done = run_python(BENCHMARKS / f"{script}.py", "--smoke", "--json", path, *arguments, cwd=folder, timeout=400)
    assert done.returncode == 0, done.stderr + done.stdout
    results = json.loads(path.read_text(encoding="utf-8"))
    assert results["benchmark"] == script
    assert MACHINE <= results["machine"].keys()
    assert results["machine"]["command"].startswith("python ")
    return results


@pytest.mark.parametrize("script", ["train_step", "loader", "memory", "startup", "parallel", "scaling"])
def test_help_has_an_example(script: str) -> None:
    done = run_python(BENCHMARKS / f"{script}.py", "--help")
    assert done.returncode == 0
    assert f"example: python benchmarks/{script}.py" in " ".join(done.stdout.split())


def test_train_step_compares_the_same_model(tmp_path: Path) -> None:
    cells = ("fp32-eager", "bf16-autocast-eager")
    arguments = ("--contestants", "titanling", "reference", "--rounds", "2", "--cells", *cells)
    results = smoke("train_step", tmp_path, *arguments)
    assert results["tokens_per_step"] == 128
    assert [cell["cell"] for cell in results["cells"]] == list(cells)
    for cell in results["cells"]:
        assert cell["problems"] == []
        rows = cell["contestants"]
        assert list(rows) == ["titanling", "reference"]
        assert rows["titanling"]["parameters"] == rows["reference"]["parameters"] > 0
        assert rows["reference"]["ratios_to_reference"] == [1.0, 1.0]
        for row in rows.values():
            assert len(row["windows"]) == len(row["ratios_to_reference"]) == 2
            for key in (
                "tokens_per_second",
                "ratio_to_reference",
                "gemm_gflops",
                "fraction_of_gemm_rate",
                "first_step_seconds",
                "peak_rss",
                "last_loss",
            ):
                assert row[key] > 0, key
            assert row["versions"]["torch"] and row["compute_dtype"] in ("float32", "bfloat16")


def test_train_step_needs_the_reference(tmp_path: Path) -> None:
    done = run_python(BENCHMARKS / "train_step.py", "--smoke", "--contestants", "titanling", cwd=tmp_path)
    assert done.returncode == 2 and "reference" in done.stderr


def test_loader_reports_speed_and_resume(tmp_path: Path) -> None:
    results = smoke("loader", tmp_path)
    speeds = results["speed"]["tokens_per_second"]
    assert list(speeds) == ["loader", "gather", "gather_int64"]
    assert all(len(found) == 2 and min(found) > 0 for found in speeds.values())
    resume = results["resume"]
    assert resume["difference"] == resume["seconds_at_1e9"] - resume["seconds_at_0"]


def test_memory_reports_peaks(tmp_path: Path) -> None:
    results = smoke("memory", tmp_path)
    for runs in results["runs"].values():
        assert all(0 < run["rss_before_steps"] <= run["peak_rss"] for run in runs)
    assert results["ratio_to_reference"] > 0


def test_startup_reports_seconds(tmp_path: Path) -> None:
    results = smoke("startup", tmp_path)
    assert len(results["first_step_seconds"]) == len(results["config_error_seconds"]) == 1
    assert not results["config_error_imports_torch"]


def test_parallel_reports_ratios(tmp_path: Path) -> None:
    results = smoke("parallel", tmp_path, "--layouts", "ddp", "fsdp", "tp", "--steps", "2")
    assert {(row["layout"], row["to"]) for row in results["ratios"]} == {("fsdp", "ddp"), ("tp", "ddp")}
    assert all(speed > 0 for found in results["tokens_per_second"].values() for speed in found)


def test_scaling_compares_predictions_with_published_figures(tmp_path: Path) -> None:
    results = smoke("scaling", tmp_path)
    assert len(results["published"]) == 2 and len(results["scaling"]) == 2
