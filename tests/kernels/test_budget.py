"""Every kernel compiled for every GPU that it is made for, without one, and held to its recorded cost."""

from pathlib import Path

import pytest
from helpers import ROOT, run_python

REPORT = ROOT / "scripts/kernel_report.py"
RECORDED = ROOT / "benchmarks/kernel_budget.json"
GOOD = {"registers": 64, "spills": 0, "shared": 1024, "threads": 256, "widest": 16, "elementwise": 0, "float64": 0}

pytest.importorskip("triton")


def test_kernels_are_within_their_budget() -> None:
    done = run_python(REPORT, "--check", timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "kernels within their budget" in done.stdout


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"spills": 8}, "spills registers"),
        ({"float64": 1}, "float64"),
        ({"widest": 8}, "by 8 bytes at most"),
        ({"elementwise": 3}, "3 times a single 2-byte element"),
        ({"shared": 65537}, "over 65536"),
        ({"threads": 2048}, "over 1024"),
        ({"registers": 65}, "registers: 65 instead of 64"),
    ],
)
def test_what_fails(change: dict[str, int], problem: str) -> None:
    from triton_kernels.ahead_of_time import Cost
    from triton_kernels.budget import check

    recorded = {"sm_90": {"norm": Cost(**GOOD)}}
    assert check(recorded, recorded) == [] == check(recorded, None)
    found = check({"sm_90": {"norm": Cost(**(GOOD | change))}}, recorded)
    assert found and problem in "; ".join(found)
    assert check({"sm_90": {"new": Cost(**GOOD)}}, recorded) == ["sm_90 new: is not recorded"]


def test_record_is_read_back(tmp_path: Path) -> None:
    from triton_kernels.ahead_of_time import Cost
    from triton_kernels.budget import read, record

    path, costs = tmp_path / "budget.json", {"gfx90a": {"norm": Cost(**GOOD), "rope": Cost(**GOOD)}}
    record(path, "3.7.1", costs)
    record(path, "3.6.0", costs)
    record(path, "3.7.1", {"sm_80": costs["gfx90a"]})
    assert read(path, "3.7.1") == {"sm_80": costs["gfx90a"]} and read(path, "3.6.0") == costs
    assert read(path, "3.5.0") is None and read(tmp_path / "none.json", "3.7.1") is None


def test_both_tritons_are_recorded_alike() -> None:
    from triton_kernels.budget import read

    older, newer = read(RECORDED, "3.6.0"), read(RECORDED, "3.7.1")
    assert older is not None and newer is not None
    assert {t: list(kernels) for t, kernels in older.items()} == {t: list(kernels) for t, kernels in newer.items()}


def test_what_is_recorded_keeps_the_limits() -> None:
    from triton_kernels.budget import check, read

    for version in ("3.6.0", "3.7.1"):
        recorded = read(RECORDED, version)
        assert recorded and check(recorded, None) == []


@pytest.mark.parametrize("arguments", [["--targets", "sm_70"], ["--record", "--match", "rope"]])
def test_bad_arguments(arguments: list[str]) -> None:
    done = run_python(REPORT, *arguments)
    assert done.returncode == 2 and "Traceback" not in done.stderr
