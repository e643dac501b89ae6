"""What a block keeps for its backward pass on GPU kernels, counted on a CPU: there the same ops compute in torch."""

import pytest
import torch
import torch._dynamo
from helpers import ROOT

from titanling.config import load_config
from titanling.model.llama import Block, rope_angles
from titanling.parallel.kernels import EXCHANGED
from titanling.planner.activations import activations
from titanling.planner.hardware import hardware
from titanling.planner.setup import Setup, resolve

CONFIG = ROOT / "train_configs/debug.toml"


def block_on_kernels(setup: Setup) -> Block:
    """A block in the type that is computed in, with every operation exchanged that the setup plans as a kernel."""
    block = Block(setup.shape).to(setup.dtype)
    for module in block.modules():
        for name in EXCHANGED.keys() & vars(module).keys():
            if setup.triton(name):
                setattr(module, name, EXCHANGED[name])
    if setup.compiled:
        # The partition between forward and backward pass is Inductor's; the code is not.
        block.compile(fullgraph=True, dynamic=False, backend="aot_eager_decomp_partition")
    return block


def bytes_kept(setup: Setup) -> int:
    """Of all tensors that autograd saves in a block's forward pass, its input included; weights and angles are not."""
    block = block_on_kernels(setup)
    angles = rope_angles(setup.shape, torch.arange(setup.config.training.seq_len))
    x = torch.randn(setup.micro_sequences, setup.config.training.seq_len, setup.shape.dim, dtype=setup.dtype)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        block(x.requires_grad_(), *angles)
    known = {t.untyped_storage().data_ptr() for t in (*block.parameters(), *angles)}
    sizes = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}
    return sum(size for pointer, size in sizes.items() if pointer not in known)


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize(
    ("compiled", "kernels"),
    [
        (False, {}),
        (False, {"kernels.swiglu": "torch"}),  # not the norms: eager, a CPU has no fused one
        (True, {}),
        (True, {"kernels.swiglu": "torch"}),
        (True, {"kernels.implementation": "torch"}),
    ],
)
def test_what_a_block_keeps(compiled: bool, kernels: dict[str, str], qk_norm: bool) -> None:
    torch._dynamo.reset()  # one function, compiled many times
    changes = {"compile.enable": compiled, "model.qk_norm": qk_norm, **kernels}
    setup = resolve(load_config(CONFIG, changes).config, 1, hardware("h100"))
    assert bytes_kept(setup) == pytest.approx(activations(setup, 0).whole, rel=1e-3)
