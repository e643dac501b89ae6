"""Peaks, FLOPs and memory, checked against published figures and arithmetic done by hand."""

import subprocess
import sys

import pytest

from titanling.metrics import device_memory, flops_per_token, mfu, peak_flops


@pytest.mark.parametrize(
    ("name", "tera"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H200", 989),
        ("NVIDIA H200 NVL", 835),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA B200", 2250),
        ("NVIDIA A100-SXM4-40GB", 312),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("A100-PCIE-40GB", 312),
        ("NVIDIA L40S", 362),
        ("NVIDIA A10", 125),
        ("AMD Instinct MI250X", 191.5),
        ("AMD Instinct MI300X", 1307),
        ("AMD Instinct MI325X", 1307),
    ],
)
def test_half_precision_peak_is_the_published_dense_one(name: str, tera: float) -> None:
    assert peak_flops(name, "bfloat16") == pytest.approx(tera * 1e12)
    assert peak_flops(name, "float16") == pytest.approx(tera * 1e12)


@pytest.mark.parametrize(
    "name",
    [
        "",
        "cpu",
        "Intel(R) Xeon(R) Platinum 8480+",
        "NVIDIA A10G",
        "NVIDIA H20",
        "NVIDIA L40",
        "NVIDIA GB200",
        "NVIDIA A100-SXM-64GB",
        "NVIDIA H100 64GB HBM2",
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
        "NVIDIA GeForce RTX 4090",
    ],
)
def test_unknown_device_has_no_peak(name: str) -> None:
    assert peak_flops(name, "bfloat16") is None


def test_peak_depends_on_the_type() -> None:
    assert peak_flops("NVIDIA A100-SXM4-80GB", "float32") == 19.5e12
    assert peak_flops("NVIDIA A100-SXM4-80GB", "tf32") == 156e12
    assert peak_flops("Tesla V100-SXM2-32GB", "float16") == 125e12
    assert peak_flops("Tesla V100-SXM2-32GB", "bfloat16") is None
    assert peak_flops("NVIDIA H200", "float64") is None


def test_flops_and_mfu_of_llama3_8b_by_hand() -> None:
    # 32 × (4096·4096·2 + 4096·1024·2 + 3·4096·14336) + 4096·128256 = 7,504,658,432 of 8.03 B parameters.
    matmul_params = 8_030_261_248 - 128_256 * 4096 - 65 * 4096
    assert matmul_params == 7_504_658_432
    flops = flops_per_token(matmul_params, n_layers=32, n_heads=32, head_dim=128, seq_len=8192)
    assert flops.full == 45_027_950_592 + 12_884_901_888
    assert flops.causal == 45_027_950_592 + 6_442_450_944
    # torchtitan's 5,762 tokens/s per H100 is 33.7 % of 989 TFLOP/s.
    peak = peak_flops("NVIDIA H100 80GB HBM3", "bfloat16")
    assert peak is not None
    assert mfu(5762, flops.full, peak) == pytest.approx(0.3374, abs=1e-4)


def test_cpu_memory_is_the_peak_of_the_process() -> None:
    before = device_memory("cpu")
    block = bytearray(b"\1") * (200 * 2**20)
    del block
    after = device_memory("cpu")
    assert after.peak >= before.peak
    assert 200 * 2**20 < after.peak < after.total


def test_package_does_not_import_torch() -> None:
    code = "import sys, titanling.metrics; print([m for m in ('torch', 'rich', 'tensorboard') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
