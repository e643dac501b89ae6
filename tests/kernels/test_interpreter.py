"""The Triton kernels themselves, run by Triton's interpreter on this CPU."""

import json
from pathlib import Path

import pytest
from helpers import ROOT, TinyData, clean_env, run_python, run_train, tiny_config
from runs import open_trainer

CHECKS = ROOT / "tests/kernels/kernel_checks.py"


def interpret(*arguments: str) -> str:
    """Run kernel_checks.py under the interpreter; its summary line."""
    pytest.importorskip("triton")
    options = ["--noconftest", "-q", "-p", "no:cacheprovider", *arguments]
    done = run_python("-m", "pytest", CHECKS, *options, env=clean_env(TRITON_INTERPRET="1"), timeout=500)
    assert done.returncode == 0, done.stdout[-10000:] + done.stderr
    return done.stdout.splitlines()[-1]


def test_kernels_under_the_interpreter() -> None:
    assert "skipped" not in interpret("-m", "not slow")


@pytest.mark.slow
def test_a_run_on_triton_kernels_equals_one_on_torch(tmp_path: Path, tiny_data: TinyData) -> None:
    pytest.importorskip("triton")
    changes = {"training.steps": 2, "training.seq_len": 8, "training.global_batch_size": 2, "model.n_layers": 1}
    changes |= {"model.qk_norm": True, "checkpoint.enable": False}
    triton = changes | {"kernels.implementation": "triton"}
    config = tiny_config(tmp_path / "triton", tiny_data, triton)
    done = run_train("--config", config, env=clean_env(TRITON_INTERPRET="1"), timeout=300)
    assert done.returncode == 0, done.stderr
    assert "rms_norm, add_rms_norm, swiglu, rope, linear_cross_entropy in Triton" in done.stdout
    with open_trainer(tmp_path / "torch", tiny_data, changes | {"kernels.implementation": "torch"}) as trainer:
        trainer.train()
    found = []
    for kind in ("triton", "torch"):
        rows = (tmp_path / kind / "run/metrics.jsonl").read_text(encoding="utf-8").splitlines()
        found.append([(row["loss"], row["grad_norm"]) for row in map(json.loads, rows) if "loss" in row])
    assert len(found[0]) == 2
    for ours, plain in zip(*found, strict=True):
        assert ours == pytest.approx(plain, rel=1e-6)


@pytest.mark.slow
def test_addresses_beyond_31_bits() -> None:
    assert "2 passed" in interpret("-m", "slow")
