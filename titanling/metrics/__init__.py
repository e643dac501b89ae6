"""What is measured, and where it goes: terminal, metrics.jsonl, TensorBoard, Weights & Biases.

Importing this package does not import torch.
"""

from titanling.metrics.hardware import DeviceMemory, FlopsPerToken, device_memory, flops_per_token, mfu, peak_flops
from titanling.metrics.logger import MetricsLogger
from titanling.metrics.monitor import Rate, Throughput
from titanling.metrics.profiler import profile

__all__ = [
    "DeviceMemory",
    "FlopsPerToken",
    "MetricsLogger",
    "Rate",
    "Throughput",
    "device_memory",
    "flops_per_token",
    "mfu",
    "peak_flops",
    "profile",
]
