"""Kernels for Llama-style models in Triton, for NVIDIA (sm_80 and newer) and AMD (gfx90a, gfx942), and in torch.

Each operation is a custom op that works eager, compiled, under fake tensors and on DTensors: on a GPU it runs the
Triton kernel, on a CPU the same mathematics in torch. The …_torch functions are plain differentiable torch, anywhere.
The losses are autograd functions, not ops, and `LossOptions.by` says what computes them; their products are torch's.
"""

from triton_kernels.cross_entropy import cross_entropy
from triton_kernels.implementation import IMPLEMENTATIONS, OPERATIONS, available, choose
from triton_kernels.linear_cross_entropy import linear_cross_entropy
from triton_kernels.loss_options import LossOptions, VocabShard
from triton_kernels.rms_norm import add_rms_norm, add_rms_norm_torch, rms_norm, rms_norm_torch
from triton_kernels.rope import rope, rope_torch
from triton_kernels.swiglu import swiglu, swiglu_packed, swiglu_packed_torch, swiglu_torch

__all__ = [
    "IMPLEMENTATIONS",
    "OPERATIONS",
    "LossOptions",
    "VocabShard",
    "add_rms_norm",
    "add_rms_norm_torch",
    "available",
    "choose",
    "cross_entropy",
    "linear_cross_entropy",
    "rms_norm",
    "rms_norm_torch",
    "rope",
    "rope_torch",
    "swiglu",
    "swiglu_packed",
    "swiglu_packed_torch",
    "swiglu_torch",
]
