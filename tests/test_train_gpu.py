"""benchmarks/train_gpu.py without a GPU: real names of kernels, the arithmetic of a step's time, what is printed."""

import ast
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from helpers import ROOT

sys.path.append(str(ROOT / "benchmarks"))

from kernel_classes import MEANING, break_down, kernel_class, where_it_goes  # noqa: E402
from train_gpu import incomparable, ratios, report  # noqa: E402

ELEMENTWISE = (
    "void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float>, std::array<char*, 3>>"
)

# As torch.profiler prints them on NVIDIA and AMD GPUs; the longest are cut.
NAMES = {
    "matmul": [
        "nvjet_tst_128x256_64x4_1x2_h_bz_coopA_TNT",
        "nvjet_hsh_256x128_64x4_2x1_v_bz_coopB_NNT",
        "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64_warpgroupsize1x1x1_execute_segment_k_off_kernel",
        "ampere_bf16_s16816gemm_bf16_256x128_ldg8_f2f_stages_32x3_nn",
        "void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_relu_bf16_256x128_32x3_nn_align8>(Params)",
        "void cublasLt::splitKreduce_kernel<32, 16, int, float, __nv_bfloat16, float, __nv_bfloat16, false, true>",
        "Cijk_Ailk_Bljk_BBS_BH_Bias_HA_S_SAV_UserArgs_MT256x256x64_MI16x16x1_CMS_SN_LDSB0_AFC1.kd",
        "Cijk_Alik_Bljk_BBS_BH_Bias_HA_S_SAV_UserArgs_MT96x96x32",
        "Custom_Cijk_Alik_Bljk_BBS_BH_Bias_HAS_SAV_UserArgs_MT256x256x64_MI16x16x1",
        "triton_tem_fused_mm_t_12",
    ],
    "attention": [
        "void pytorch_flash::flash_fwd_kernel<pytorch_flash::Flash_fwd_kernel_traits<64, 128, 128, 4, false>>",
        "void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<pytorch_flash::Flash_bwd_kernel_traits<64>>",
        "void pytorch_flash::flash_bwd_dot_do_o_kernel<true, pytorch_flash::Flash_bwd_kernel_traits<64, 128, 128, 8>>",
        "void cutlass::device_kernel<flash::enable_sm90_or_later<flash::FlashAttnFwdSm90<flash::CollectiveMainloopFwd",
        "fmha_cutlassF_bf16_aligned_64x128_rf_sm80(PyTorchMemEffAttention::AttentionKernel<cutlass::bfloat16_t>::Params)",
        "fmha_cutlassB_bf16_aligned_128x64_k64_sm80",
        "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_64x128x128_4x1x1_kernel0_0",
        "cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_26_64x64x128_1x1x1",
        "attn_fwd.kd",
        "bwd_preprocess.kd",
        "bwd_kernel_dk_dv.kd",
        "bwd_kernel_dq.kd",
    ],
    "compiled": [
        "triton_poi_fused__scaled_dot_product_flash_attention_transpose_view_3",
        "triton_poi_fused_mm_mul_silu_4",
        "triton_red_fused__to_copy_add_mean_mul_pow_rsqrt_0",
        "triton_per_fused__to_copy_sum_11",
        "triton_",
    ],
    "loss": ["_statistics_kernel", "_gradient_kernel.kd"],
    "kernels": ["_forward_kernel", "_backward_kernel", "_rope_kernel", "_rope_kernel.kd"],
    "optimizer": [
        "void at::native::(anonymous namespace)::multi_tensor_apply_kernel<at::native::(anonymous namespace)::"
        "FusedOptimizerTensorListMetadata<4>, at::native::(anonymous namespace)::FusedAdamMathFunctor<float, 4>>",
        "void at::native::(anonymous namespace)::multi_tensor_apply_kernel<at::native::(anonymous namespace)::"
        "TensorListMetadata<1>, at::native::(anonymous namespace)::LpNormFunctor<float, (at::native::NormType)1>>",
        "void at::native::lpnorm_cleanup<float, (at::native::NormType)1, float, float>",
    ],
    "copies": [
        "Memcpy HtoD (Pinned -> Device)",
        "Memcpy DtoD (Device -> Device)",
        "Memset (Device)",
        "CopyHostToDevice",
        "__amd_rocclr_copyBuffer.kd",
        "__amd_rocclr_fillBufferAligned",
        "ncclDevKernel_AllGather_RING_LL(ncclDevKernelArgsStorage<4096ul>)",
        "ncclDevKernel_ReduceScatter_Sum_bf16_RING_LL(ncclDevKernelArgsStorage<4096ul>)",
        "ncclDevKernel_Generic_1(ncclDevKernelArgsStorage<4096ul>)",
    ],
    "other": [
        ELEMENTWISE,
        "void at::native::reduce_kernel<512, 1, at::native::ReduceOp<float, at::native::MaxNanFunctor<float>>>",
        "void at::native::(anonymous namespace)::CatArrayBatchedCopy<at::native::OpaqueType<2u>, unsigned int>",
    ],
}


@pytest.mark.parametrize(("expected", "name"), [(found, name) for found, names in NAMES.items() for name in names])
def test_real_names(expected: str, name: str) -> None:
    assert kernel_class(name) == expected
    assert kernel_class(name, in_loss=True) == ("loss" if expected == "other" else expected)


def our_kernels() -> Iterator[str]:
    """Names of the functions of triton_kernels/ that are launched: jitted, and named …_kernel."""
    for path in (ROOT / "triton_kernels").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel"):
                if any(isinstance(each, ast.Name) and each.id == "jit" for each in node.decorator_list):
                    yield node.name


def test_our_kernels_are_known() -> None:
    names = list(our_kernels())
    assert len(names) >= 5 and {kernel_class(name) for name in names} == {"kernels", "loss"}


def kernel(name: str, ts: float, dur: float, correlation: int, cat: str = "kernel") -> dict[str, Any]:
    """A kernel as the trace has it, in microseconds."""
    return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur, "args": {"correlation": correlation}}


def launch(ts: float, correlation: int, tid: int = 1, cat: str = "cuda_runtime") -> dict[str, Any]:
    """Its launch on the host."""
    args = {"correlation": correlation}
    return {"ph": "X", "cat": cat, "name": "launch", "ts": ts, "dur": 1, "tid": tid, "args": args}


def test_a_trace_is_broken_down() -> None:
    events = [
        {"ph": "M", "name": "process_name", "args": {"name": "python"}},
        {"ph": "X", "cat": "cpu_op", "name": "_LinearCrossEntropy", "ts": 10, "dur": 10, "tid": 1},
        {"ph": "X", "cat": "cpu_op", "name": "aten::add", "ts": 30, "dur": 10, "tid": 1},
        *(launch(ts, n) for n, ts in enumerate((1, 12, 14, 33))),
        launch(15, 4, tid=2),
        launch(40, 5, cat="cuda_driver"),
        kernel("nvjet_tst_128x256_64x4", 100, 40, 0),
        kernel("nvjet_tst_128x256_64x4", 140, 20, 1),  # the loss's product
        kernel(ELEMENTWISE, 160, 10, 2),  # launched by the loss
        kernel(ELEMENTWISE, 180, 6, 3),  # after it
        kernel(ELEMENTWISE, 190, 4, 4),  # meanwhile, in another thread
        kernel("_forward_kernel", 200, 8, 5),
        kernel("Memcpy HtoD (Pinned -> Device)", 204, 10, 6, "gpu_memcpy"),  # half overlaps; its launch is not there
    ]
    found = break_down(reversed(events), steps=2)
    microseconds = {name: round(seconds * 2e6, 6) for name, seconds in found.classes.items() if seconds}
    assert microseconds == {"matmul": 60, "loss": 10, "other": 10, "kernels": 8, "copies": 6}
    assert found.kernels == 3.5 and found.loss_ranges == 1
    assert found.longest[0] == ("matmul", "nvjet_tst_128x256_64x4", pytest.approx(30e-6))


def test_a_trace_without_a_gpu() -> None:
    found = break_down([{"ph": "X", "cat": "cpu_op", "name": "aten::mm", "ts": 0, "dur": 5, "tid": 1}], steps=1)
    assert found.kernels == 0 and not any(found.classes.values()) and found.longest == []


def test_the_rest_adds_up_to_what_the_mfu_leaves() -> None:
    classes = dict.fromkeys(MEANING, 0.0) | {"matmul": 0.5, "attention": 0.05, "compiled": 0.1, "loss": 0.05}
    rows = dict(where_it_goes(classes, step=0.8, ideal_matmul=0.4, ideal_attention=0.06))
    assert sum(rows.values()) == pytest.approx(1 - (0.4 + 0.06) / 0.8)
    assert rows["matrix products, beyond the ideal"] == pytest.approx(0.1 / 0.8)
    assert rows["attention, beyond the ideal"] == pytest.approx(-0.01 / 0.8)
    assert rows["nothing runs"] == pytest.approx(0.1 / 0.8)
    assert len(rows) == 5


def row(implementation: str, seconds: float, **changes: Any) -> dict[str, Any]:
    """What one configuration answers, as far as it is printed. The figures are made up."""
    found = {"flavor": "1B", "implementation": implementation, "micro_batch": 16, "accumulation": 1}
    found |= {"kernels": f"rms_norm in {implementation.capitalize()}; linear_cross_entropy in torch"}
    found |= {"step_seconds": [seconds, seconds], "tokens_per_second": 1000 / seconds, "peak_bytes": 2**30}
    found |= {"first_step_seconds": 9.0, "first_loss": 11.8, "last_loss": 11.7, "loss_ranges": 2}
    found |= {"machine": {"device": "NVIDIA H100 80GB HBM3"}, "class_seconds": {"matmul": 0.5, "loss": 0.1}}
    return found | changes


def test_what_is_printed() -> None:
    rest = [("matrix products, beyond the ideal", 0.25), ("nothing runs", 0.2)]
    rows = [
        row("triton", 0.8, mfu_full=0.55, mfu_causal=0.5, where_the_rest_goes=rest),
        row("torch", 1.0, micro_batch=8, accumulation=2),
    ]
    results = {"results": rows, "ratios": ratios(rows), "dry_run": False, "problems": [], "left_out": ["that: late"]}
    lines = [" ".join(line.split()) for line in report(results)]
    assert lines[1] == "1B triton 16 × 1 1,250 800.0 800.0 … 800.0 55.0% 50.0% 1.0 9.0"
    assert lines[2] == "1B torch 8 × 2 1,000 1000.0 1000.0 … 1000.0 1.0 9.0"
    assert "the loss, without its products 100.00 12.5%" in lines and "nothing runs 200.00 25.0%" in lines
    assert "where the other 45.0% go (full MFU 55.0%)" in lines and "nothing runs 20.0%" in lines
    assert "1B: Triton 1.250 × torch (with different micro-batches)" in lines
    goal = "1B: 55.0% MFU (full); the goal is 58% on one H200, and this is one NVIDIA H100 80GB HBM3"
    assert goal in lines and lines[-1] == "not measured: that: late"


def test_what_makes_figures_not_valid() -> None:
    rows = [row("triton", 1.0, last_loss=float("nan"), mfu_full=1.2), row("torch", 1.0, first_loss=10.0)]
    assert incomparable([row("triton", 1.0), row("torch", 1.0)]) == []
    assert incomparable(rows) == [
        "1B, triton: the loss is nan",
        "1B, triton: an MFU of 120% is not possible",
        "1B: initial losses differ: 11.800, 10.000",
    ]
