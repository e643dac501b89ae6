"""What a device can do: one documented row each. Imports no torch."""

import os
from dataclasses import dataclass

GIB = 2**30
GIGA = 1e9
TERA = 1e12


@dataclass(frozen=True)
class Hardware:
    """One device and its links. Rates are those of one direction; `None` where a figure would be a guess."""

    name: str
    driver_name: str
    """What torch.cuda.get_device_name says: key of the table of peaks in titanling/metrics/hardware.py."""
    memory: int
    """Bytes."""
    bandwidth: float | None = None
    """Of the device's memory, bytes/s."""
    intra_node: float | None = None
    """To the other devices of the node, bytes/s of each device."""
    inter_node: float | None = None
    """To other nodes, bytes/s of each device's share of the node's network."""
    per_node: int = 8
    """Devices in a node."""
    matmul: float = 0.7
    """Share of the peak that large bfloat16 matrix products reach."""
    attention: float = 0.4
    """Share of the peak that fused attention reaches."""
    float8_gain: float = 0.0
    """How much faster blocks multiply in float8, with the casts; 0: it has no such units."""

    def peak(self, dtype: str) -> float | None:
        """Dense peak for matrix products of this type in FLOP/s; None where unknown."""
        from titanling.metrics.hardware import peak_flops  # its package needs more than --help may

        return peak_flops(self.driver_name, dtype)


STREAM = 0.8
"""Share of the memory bandwidth that element-wise kernels reach (copies: 4.3 of 4.8 TB/s on H200; kernels, less)."""
LINK = 0.8
"""Share of a link's rate that large collectives reach (NCCL's bus bandwidth over NVLink 4: about 360 of 450 GB/s)."""
HOP = 5e-6
"""Seconds that a collective waits per node of its ring."""

# Memory, bandwidth, links: data sheets. matmul and attention: measured by us or reported, as noted.
_TABLE = (
    # NVIDIA H100 SXM data sheet: 80 GB, 3.35 TB/s, NVLink 900 GB/s both ways; DGX H100: one 400 Gb/s port per GPU.
    # matmul, attention: 790 of 989 TFLOP/s in a short burst on H200, less where power limits it for long; set so that
    # 8B comes out at the 41-48 % MFU that Megatron-LM and MosaicML report.
    Hardware("h100", "NVIDIA H100 80GB HBM3", 80 * 10**9, 3.35 * TERA, 450 * GIGA, 50 * GIGA, 8, 0.58, 0.32, 1.5),
    # NVIDIA H200 data sheet: 141 GB, 4.8 TB/s; otherwise an H100.
    Hardware("h200", "NVIDIA H200", 141 * 10**9, 4.8 * TERA, 450 * GIGA, 50 * GIGA, 8, 0.60, 0.32, 1.5),
    # NVIDIA A100 80GB SXM data sheet: 2.039 TB/s, NVLink 600 GB/s both ways; DGX A100: one 200 Gb/s port per GPU.
    # matmul, attention: set so that TinyLlama's 56 % MFU is within reach.
    Hardware("a100", "NVIDIA A100-SXM4-80GB", 80 * 10**9, 2.039 * TERA, 300 * GIGA, 25 * GIGA, 8, 0.72, 0.45),
    # One of the two GCDs of an AMD Instinct MI250X (data sheet: 128 GB, 3.2768 TB/s a card). Links as in LUMI-G (its
    # documentation): Infinity Fabric of 50 GB/s a link, two links on most paths of a ring; 4 × 200 Gb/s a node of 8.
    # matmul, attention: set so that the 70-83 of 191.5 TFLOP/s of the best trainings are reached.
    Hardware("mi250x", "AMD Instinct MI250X", 64 * 2**30, 1.6384 * TERA, 100 * GIGA, 12.5 * GIGA, 8, 0.50, 0.20),
    # AMD Instinct MI300X data sheet: 192 GB, 5.3 TB/s, 7 links of 64 GB/s; platforms have one 400 Gb/s port per GPU.
    # matmul, attention: an assumption, as MI250X.
    Hardware("mi300x", "AMD Instinct MI300X", 192 * 10**9, 5.3 * TERA, 448 * GIGA, 50 * GIGA, 8, 0.50, 0.20),
)
# HBM2e, and a limit of 500 W, which products feel most. matmul, attention: set to torchtitan's own figures for FSDP and
# context parallelism, so only what benchmarks/scaling.py says of other layouts is a prediction.
LIMITED_H100 = Hardware(
    "h100, 500 W", "NVIDIA H100 80GB HBM3", 96 * 10**9, 2.4 * TERA, 450 * GIGA, 50 * GIGA, 8, 0.46, 0.25, 1.5
)
"""The H100s of torchtitan's published figures."""
NAMES = (*(row.name for row in _TABLE), "cpu")


def hardware(name: str) -> Hardware:
    """The row of one of NAMES. "cpu" is this machine, of which only the memory is known: no times, no MFU."""
    if name == "cpu":
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return Hardware("cpu", "CPU", memory, per_node=1)
    return next(row for row in _TABLE if row.name == name)


def here() -> str:
    """The one of NAMES that this machine has; "cpu" without a GPU, or with one that is not listed."""
    import torch

    if not torch.cuda.is_available():
        return "cpu"
    # "NVIDIA H100 80GB HBM3" and "AMD Instinct MI250X" both have the row's name in them as a word.
    words = torch.cuda.get_device_name().lower().replace("-", " ").split()
    return next((name for name in NAMES if name in words), "cpu")
