"""Peak rates of known devices, the FLOPs of a token, and the memory in use. torch is imported only for a GPU."""

import os
import re
import resource
import sys
from typing import NamedTuple

TERA = 1e12


def _peaks(half: float, float32: float | None = None, tf32: float | None = None) -> dict[str, float]:
    """Row of the table in TFLOP/s; bfloat16 and float16 run at one rate on every device that has both."""
    published = {"bfloat16": half, "float16": half, "float32": float32, "tf32": tf32}
    return {dtype: peak for dtype, peak in published.items() if peak is not None}


# Dense peaks in TFLOP/s by a pattern for the name that the driver reports. Vendors advertise sparse tensor-core rates,
# twice these. Only rows that a vendor's document states: an unlisted device gets no MFU rather than a guessed one.
_PEAKS: tuple[tuple[str, dict[str, float]], ...] = (
    # NVIDIA H100 data sheet and Hopper whitepaper. SXM parts carry HBM3; other bare "H100" names are custom parts.
    (r"H100 PCIe", _peaks(756, 51, 378)),
    (r"H100 NVL", _peaks(835, 60, 417.5)),
    (r"H100 (80GB HBM3|SXM)", _peaks(989, 67, 494.5)),
    # NVIDIA H200 data sheet.
    (r"H200 NVL", _peaks(835, 60, 417.5)),
    (r"H200", _peaks(989, 67, 494.5)),
    # NVIDIA GH200 data sheet.
    (r"GH200", _peaks(989, 67, 494.5)),
    # NVIDIA Blackwell data sheet: HGX B200 at 1,000 W.
    (r"B200", _peaks(2250)),
    # NVIDIA A100 data sheet; the PCIe card has the same peaks. "A100-SXM-64GB" is a larger custom part.
    (r"A100-SXM4-(40|80)GB|A100-PCI[Ee]-40GB|A100 80GB PCIe", _peaks(312, 19.5, 156)),
    # NVIDIA L40S data sheet.
    (r"L40S", _peaks(362, 91.6, 183)),
    # NVIDIA A10 data sheet.
    (r"A10", _peaks(125, 31.2, 62.5)),
    # NVIDIA V100 data sheet. No bfloat16 and no TF32 in its tensor cores.
    (r"V100-SXM2-(16|32)GB", {"float16": 125, "float32": 15.7}),
    (r"V100-PCIE-(16|32)GB", {"float16": 112, "float32": 14}),
    # AMD Instinct MI200 data sheets, halved: a card is two devices (GCDs). float32 is the matrix cores' rate.
    (r"MI250X", _peaks(191.5, 47.85)),
    (r"MI250", _peaks(181.05, 45.25)),
    # AMD Instinct MI300 and MI325X data sheets. float32 is the matrix cores' rate.
    (r"MI300A", _peaks(980.6, 122.6, 490.3)),
    (r"MI300X", _peaks(1307, 163.4, 653.7)),
    (r"MI325X", _peaks(1307, 163.4, 653.7)),
)


def peak_flops(device_name: str, dtype: str) -> float | None:
    """Dense peak of one device in FLOP/s, or None when it is not known.

    Args:
        device_name: What `torch.cuda.get_device_name` returns. Any CPU, a slice of a GPU (MIG) and an unlisted
            device are unknown: an MFU against a guessed peak would mean nothing.
        dtype: Type of the matrix products: "bfloat16", "float16", "float32", or "tf32" when torch is allowed to
            round float32 products to it.
    """
    if re.search(r"\bMIG\b", device_name):
        return None
    for pattern, peaks in _PEAKS:
        # Whole words, so that A10 is neither A100 nor A10G.
        if re.search(rf"(?<!\w)({pattern})(?!\w)", device_name):
            peak = peaks.get(dtype)
            return None if peak is None else peak * TERA
    return None


class FlopsPerToken(NamedTuple):
    """Model FLOPs of one training token, forward and backward, without recomputation."""

    full: float
    """Attention counted as if every token saw the whole sequence: the convention of PaLM and of most reports."""
    causal: float
    """Attention counted once for each pair that the causal mask keeps: half."""


def flops_per_token(matmul_params: int, n_layers: int, n_heads: int, head_dim: int, seq_len: int) -> FlopsPerToken:
    """FLOPs to train on one token: 6·N + 12·L·H·Q·T (PaLM, arXiv 2204.02311, appendix B).

    Each weight is multiplied and added once in the forward pass and twice in the backward pass. Attention does the
    same with two products, QKᵀ and AV, of H·Q·T multiply-adds each.

    Args:
        matmul_params: N, the weights used in matrix products: the output head counts, also when it is tied to the
            embedding; an embedding that is only looked up and norm weights do not.
        n_layers: L.
        n_heads: H, query heads: keys and values shared by a group are still multiplied by each of its heads.
        head_dim: Q.
        seq_len: T, in tokens.
    """
    attention = 12 * n_layers * n_heads * head_dim * seq_len
    return FlopsPerToken(full=6 * matmul_params + attention, causal=6 * matmul_params + attention / 2)


def mfu(tokens_per_second_per_device: float, flops: float, peak: float) -> float:
    """Model FLOPs utilisation as a fraction.

    Args:
        tokens_per_second_per_device: Tokens/s of the run divided by its devices.
        flops: FLOPs per token, `flops_per_token(…).full` or `.causal`.
        peak: FLOP/s of one device, from `peak_flops`.
    """
    return tokens_per_second_per_device * flops / peak


class DeviceMemory(NamedTuple):
    """Memory of this process's device, in bytes."""

    peak: int
    """GPU: the most that tensors occupied at once. CPU: the most RAM that the process held (RSS)."""
    total: int
    """What the device, or the machine, has."""


def device_memory(device_type: str) -> DeviceMemory:
    """Peak and total memory of the current "cuda" device (ROCm too), or of this process for any other type."""
    if device_type == "cuda":
        import torch

        total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
        return DeviceMemory(torch.cuda.max_memory_allocated(), total)
    # getrusage counts kibibytes on Linux and bytes on macOS.
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return DeviceMemory(peak, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
