"""Where the time of a training step on a GPU goes: kernels by class, out of a Chrome trace of torch.profiler.

Standard library only.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

LOSS, OTHER = "loss", "other"
"""What the loss launches, and all other eager kernels. Those have the same few names, whoever launches them."""
# Class and what its kernels are called; the first row that fits counts. Inductor names a kernel after all that it fuses
# ("triton_poi_fused__scaled_dot_product_flash_attention_3"), and attention says "gemm" and "cutlass" too.
CLASSES: tuple[tuple[str, str], ...] = (
    ("compiled", r"^triton_(?!tem_)"),  # Inductor: poi(ntwise), red(uction), per(sistent reduction), …; not its matmuls
    ("kernels", r"^_(forward|backward|rope)_kernel"),  # triton_kernels/: norms, SwiGLU, RoPE
    (LOSS, r"^_(statistics|gradient)_kernel"),  # triton_kernels/cross_entropy.py
    ("attention", r"flash|fmha|sdpa|^attn_fwd|^bwd_(kernel|preprocess)"),  # FA2, FA3, efficient, cuDNN; AOTriton, CK
    ("copies", r"^mem(cpy|set)\b|rocclr_(copy|fill)|^copy(host|device)|nccl|rccl"),  # and communication
    ("matmul", r"gemm|gemv|nvjet|xmma|cijk_|splitk|^triton_tem_"),  # cuBLAS, CUTLASS, hipBLASLt, Inductor's templates
    ("optimizer", r"multi_tensor_apply|lpnorm_cleanup|fused_adam"),  # clipping, too
)
MEANING = {
    "matmul": "matrix products",
    "attention": "attention",
    "kernels": "our Triton kernels",
    "compiled": "compiled pointwise and reductions",
    LOSS: "the loss, without its products",
    "optimizer": "AdamW and clipping",
    "copies": "copies and communication",
    OTHER: "other eager kernels (embedding, casts, sums of gradients)",
}
LOSS_OP = "CrossEntropy"
"""In the name of the autograd function that is the loss, and so of its ranges in the trace."""
MICROSECOND = 1e-6


class Breakdown(NamedTuple):
    """One step's time on the device. Seconds."""

    classes: dict[str, float]
    """By class. Where kernels overlap, the time is that of the first: they add up to the time that the device works."""
    kernels: float
    """How many there are."""
    loss_ranges: int
    """How many calls of the loss, forward and backward, the whole trace has; 0: its kernels are not told apart."""
    longest: list[tuple[str, str, float]]
    """Class, name and time of the kernels that take the most."""


def kernel_class(name: str, in_loss: bool = False) -> str:
    """The class of a kernel; `in_loss`: whether the loss launched it."""
    for found, pattern in CLASSES:
        if re.search(pattern, name, re.IGNORECASE):
            return found
    return LOSS if in_loss else OTHER


def break_down(events: Iterable[Mapping[str, Any]], steps: int) -> Breakdown:
    """The mean step of the `traceEvents` of a trace of `steps` steps. Without a GPU there are no kernels."""
    kernels: list[Mapping[str, Any]] = []
    launches: dict[Any, tuple[Any, float]] = {}  # by correlation: thread and time
    losses: dict[Any, list[tuple[float, float]]] = defaultdict(list)  # by thread: from, to
    for event in events:
        category = event.get("cat")
        if category in ("kernel", "gpu_memcpy", "gpu_memset"):
            kernels.append(event)
        elif category in ("cuda_runtime", "cuda_driver") and "correlation" in event.get("args", {}):
            launches[event["args"]["correlation"]] = event["tid"], event["ts"]
        elif category == "cpu_op" and LOSS_OP in event["name"]:
            losses[event["tid"]].append((event["ts"], event["ts"] + event["dur"]))
    classes: dict[str, float] = dict.fromkeys(MEANING, 0.0)
    names: dict[tuple[str, str], float] = defaultdict(float)
    reached = float("-inf")
    for event in sorted(kernels, key=lambda each: each["ts"]):
        thread, at = launches.get(event.get("args", {}).get("correlation"), (None, 0.0))
        in_loss = any(begin <= at <= end for begin, end in losses.get(thread, ()))
        found, end = kernel_class(event["name"], in_loss), event["ts"] + event["dur"]
        seconds = max(0.0, end - max(event["ts"], reached)) * MICROSECOND / steps
        reached = max(reached, end)
        classes[found] += seconds
        names[found, event["name"]] += seconds
    longest = sorted(((*key, seconds) for key, seconds in names.items()), key=lambda each: -each[2])
    return Breakdown(classes, len(kernels) / steps, sum(map(len, losses.values())), longest[:20])


def where_it_goes(
    classes: Mapping[str, float], step: float, ideal_matmul: float, ideal_attention: float
) -> list[tuple[str, float]]:
    """What a step of `step` seconds spends beyond its model FLOPs at the device's peak: (what, share of the step).

    The shares add up to 1 less the MFU of the convention that `ideal_attention` (seconds at the peak) follows. Products
    and attention count with what they take beyond the ideal, which can be less than nothing: a causal kernel computes
    half of what the "full" convention counts.
    """
    ideal = {"matmul": ideal_matmul, "attention": ideal_attention}
    rows = [
        (MEANING[name] + (", beyond the ideal" if name in ideal else ""), seconds - ideal.get(name, 0.0))
        for name, seconds in classes.items()
        if seconds or name in ideal
    ]
    rows.append(("nothing runs", step - sum(classes.values())))
    return [(what, seconds / step) for what, seconds in rows]
