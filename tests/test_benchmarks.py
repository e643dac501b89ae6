"""The benchmark scripts run and report what they promise. Their times mean nothing here: models and files are tiny."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers import ROOT, clean_env, run_python

BENCHMARKS = ROOT / "benchmarks"
MACHINE = {"date", "cpu", "cpus", "memory_gib", "system", "python", "load_before", "command"}

pytestmark = pytest.mark.slow


def smoke(script: str, folder: Path, *arguments: str, **variables: str) -> dict[str, Any]:
    """The JSON of `script --smoke`."""
    path, env = folder / "results" / "results.json", clean_env(**variables)
    command = (BENCHMARKS / f"{script}.py", "--smoke", "--json", path, *arguments)
    done = run_python(*command, cwd=folder, env=env, timeout=400)
    assert done.returncode == 0, done.stderr + done.stdout
    results = json.loads(path.read_text(encoding="utf-8"))
    assert results["benchmark"] == script
    assert MACHINE <= results["machine"].keys()
    assert results["machine"]["command"].startswith("python ")
    return results


@pytest.mark.parametrize(
    "script",
    [
        "train_step",
        "loader",
        "memory",
        "startup",
        "parallel",
        "scaling",
        "checkpoint",
        "convert",
        "tokenise",
        "filters",
        "faults",
        "kernels",
        "tune_kernels",
        "document_mask",
        "linear_cross_entropy",
        "train_gpu",
    ],
)
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
    assert list(speeds) == ["loader", "mixture", "gather", "gather_int64"]
    assert all(len(found) == 2 and min(found) > 0 for found in speeds.values())
    resume = results["resume"]
    assert resume["difference"] == resume["seconds_at_1e9"] - resume["seconds_at_0"]
    for packed in results["packing"].values():
        assert 0 <= packed["padding"] < 1 and 0 < packed["parts_needed"] <= packed["parts"]


def test_memory_reports_peaks(tmp_path: Path) -> None:
    results = smoke("memory", tmp_path)
    for runs in results["runs"].values():
        assert all(0 < run["rss_before_steps"] <= run["peak_rss"] for run in runs)
    assert results["ratio_to_reference"] > 0


def test_filters_reports_rates_and_memory(tmp_path: Path) -> None:
    results = smoke("filters", tmp_path)
    assert all(rate > 0 for rates in results["megabytes_per_cpu_second"].values() for rate in rates)
    assert 0 < results["gigabytes_per_million_documents"] < 0.1


def test_document_mask_reports_ratios(tmp_path: Path) -> None:
    results = smoke("document_mask", tmp_path, "--lengths", "20", "--rounds", "1")
    assert [(cell["seq_len"], cell["document"]) for cell in results["cells"]] == [(512, 20), (2048, 20)]
    assert all(cell["ratio"] > 0 for cell in results["cells"])


def test_linear_cross_entropy_reports_ratios(tmp_path: Path) -> None:
    results = smoke("linear_cross_entropy", tmp_path)
    assert list(results["runs"]) == ["full", "in place", "chunked"]
    first, *others = [run["losses"] for run in results["runs"].values()]
    assert all(found == pytest.approx(first, rel=1e-5) for found in others)
    assert all(ratio > 0 for found in results["ratios"].values() for ratio in found.values())


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


def test_checkpoint_reports_bandwidth_and_stall(tmp_path: Path) -> None:
    results = smoke("checkpoint", tmp_path)
    assert results["bytes"] > 0 and results["ratios"].keys() == results["targets"].keys()
    assert all(len(found) == 2 and min(found) > 0 for found in results["ratios"].values())


def test_faults_reports_each_gate(tmp_path: Path) -> None:
    results = smoke("faults", tmp_path, "--rows", "damage", "disk")
    assert len(results["rows"]) == 5
    for row in results["rows"]:
        assert row["met"] == (row["failures"] == []), row


def test_convert_reports_ratios(tmp_path: Path) -> None:
    results = smoke("convert", tmp_path)
    assert list(results["runs"]) == ["copy", "titanling", "torchtitan's way"]
    for runs in results["runs"].values():
        assert all(run["seconds"] > 0 and run["peak_rss"] > 0 for run in runs)
    assert results["of_copy_rate"] > 0 and results["of_their_time"] > 0 and results["largest_tensor"] == 2048 * 256 * 4


def test_tokenise_compares_files_and_speeds(tmp_path: Path) -> None:
    results = smoke("tokenise", tmp_path)
    assert results["differing_files"] == []
    assert {"tokenizers", "tokenizers alone"} <= results["megabytes_per_second"].keys()
    assert ("tokenizers", "tokenizers alone") in {(row["way"], row["to"]) for row in results["ratios"]}
    assert all(speed > 0 for found in results["megabytes_per_second"].values() for speed in found)


def test_kernels_have_no_figures_for_a_cpu(tmp_path: Path) -> None:
    done = run_python(BENCHMARKS / "kernels.py", "--device", "cpu", cwd=tmp_path)
    assert done.returncode == 2 and "only --smoke makes sense" in done.stderr


def test_goals_are_judged() -> None:
    done = run_python(
        "-c",
        "import sys; sys.path.insert(0, 'benchmarks')\n"
        "from kernels import Case, Result, judge\n"
        "def result(name, direction, device, of_copy, n=4096):\n"
        "    return Result(Case('rms_norm', 16384, n, list, 0, 0), direction, name, device, 1.0, of_copy)\n"
        "good = [result('titanling', 'forward', 1.0, 0.93), result('compile', 'forward', 0.98, 0.95)]\n"
        "assert judge(good) == []\n"
        "bad = [result('titanling', 'backward', 1.04, 0.87), result('compile', 'backward', 1.0, 0.9),\n"
        "       result('liger', 'backward', 1.3, 0.7), result('titanling', 'forward', 1.0, 0.5, n=64)]\n"
        "print(*judge(bad), sep='\\n')",
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "rms_norm backward 16384 × 4096: 0.87 of copy, wanted 0.88",
        "rms_norm backward 16384 × 4096: 1.04 × the time of compile",
        "rms_norm backward 16384 × 4096: 1.25 × the speed of liger, wanted 1.4",
    ]


def test_tune_kernels_dry_run(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    results = smoke("tune_kernels", tmp_path, "--device", "cpu", TRITON_INTERPRET="1")
    assert len(results["tuned"]) == 7
    assert all(len(rows) == 2 and rows[0]["seconds"] <= rows[1]["seconds"] for rows in results["tuned"].values())


def test_tune_kernels_needs_triton_on_the_device(tmp_path: Path) -> None:
    done = run_python(BENCHMARKS / "tune_kernels.py", "--device", "cpu", cwd=tmp_path)
    assert done.returncode == 2 and "nothing to tune: " in done.stderr


def test_gpu_check_dry_run(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    command = [ROOT / "scripts/gpu_check.sh", "--device", "cpu"]
    env = clean_env(PYTHON=sys.executable, OUT=str(tmp_path))
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "gpu_check: done" in done.stdout
    results = json.loads((tmp_path / "kernels_cpu_dry_run.json").read_text(encoding="utf-8"))
    assert results["dry_run"] and results["machine"]["device"] == "cpu" and results["missed"] == []
    cells = {(row["operation"], row["direction"], row["contestant"]) for row in results["results"]}
    operations, names = ("rms_norm", "add_rms_norm", "swiglu", "rope"), ("titanling", "torch", "compile")
    assert cells >= {(o, d, n) for o in operations for d in ("forward", "backward") for n in names}
    assert all(row["device"] > 0 and row["wall"] > 0 and row["of_copy"] > 0 for row in results["results"])
    loss = json.loads((tmp_path / "loss_cpu_dry_run.json").read_text(encoding="utf-8"))
    assert loss["results"].keys() >= {"titanling", "titanling, torch", "all logits", "compiled"}
    assert loss["dry_run"] and loss["missed"] == loss["left_out"] == [] and loss["rows_alone"]["seconds"] > 0
    training = json.loads((tmp_path / "train_cpu_dry_run.json").read_text(encoding="utf-8"))
    assert training["dry_run"] and training["left_out"] == training["problems"] == []
    assert [row["implementation"] for row in training["results"]] == ["triton", "torch"]
    assert training["ratios"] == {}  # for Triton has not run
    for row in training["results"]:
        assert len(row["step_seconds"]) == 2 and row["tokens_per_second"] > 0 and row["peak_bytes"] > 0
        assert row["loss_ranges"] > 0, "the loss is not found in the trace: kernel_classes.LOSS_OP"
        assert row["class_seconds"] is None and not {"mfu_full", "mfu_causal", "where_the_rest_goes"} & row.keys()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--device", "cpu"], "on a CPU only --smoke makes sense"),
        ([], "error: this machine has no GPU for torch; --device cpu --smoke makes a dry run\n"),
        (["--device", "cpu", "--smoke", "--flavors", "2B"], 'error: model.flavor = "2B": no such preset'),
    ],
)
def test_train_gpu_says_why_it_does_not_run(arguments: list[str], said: str) -> None:
    done = run_python(BENCHMARKS / "train_gpu.py", *arguments, env=clean_env(CUDA_VISIBLE_DEVICES=""))
    assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr


def test_gpu_check_without_a_gpu(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    env = clean_env(PYTHON=sys.executable, OUT=str(tmp_path), CUDA_VISIBLE_DEVICES="")
    done = subprocess.run([ROOT / "scripts/gpu_check.sh"], env=env, capture_output=True, text=True, timeout=100)
    assert done.returncode == 2 and "--device cpu makes a dry run" in done.stderr
