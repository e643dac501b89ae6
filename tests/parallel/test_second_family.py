"""A model family that no plan knows: with a layout table beside it, every plan applies."""

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from titanling.config.schema import ActivationCheckpoint, Compile, Kernels, Model, Parallelism, Quantize, Training
from titanling.model.layout import ModelLayout
from titanling.model.llama import HeadLoss
from titanling.model.presets import LlamaShape
from titanling.parallel import plan
from titanling.parallel.degrees import Degrees
from titanling.parallel.lay_out import build_plans
from titanling.parallel.mesh import World, build_meshes

SHAPE = LlamaShape(dim=16, n_layers=4, n_heads=4, n_kv_heads=4, ffn_dim=32, vocab_size=50, head_dim=4)


class Mixer(nn.Module):
    """Attention under other names, with queries, keys and values in one place each."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(16, 16, bias=False) for _ in range(4))
        self.attend = nn.functional.scaled_dot_product_attention

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (p(x).unflatten(2, (-1, 4)).transpose(1, 2) for p in (self.q, self.k, self.v))
        return self.out(self.attend(q, k, v).transpose(1, 2).flatten(2))


class Layer(nn.Module):
    """A post-norm block with a plain two-layer feed-forward."""

    def __init__(self) -> None:
        super().__init__()
        self.mixer, self.ln = Mixer(), nn.RMSNorm(16)
        self.ff = nn.Sequential(nn.Linear(16, 32, bias=False), nn.GELU(), nn.Linear(32, 16, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mixer(x)
        return self.ln(x + self.ff(x))


class Other(nn.Module):
    """The family: no inner `model`, other names throughout."""

    layout = ModelLayout(
        embedding="wte",
        embedding_dropout="drop",
        blocks="h",
        norm="ln_f",
        head="out",
        attention="mixer",
        tensor={
            "mixer": "gather",
            "mixer.q": "column",
            "mixer.k": "column",
            "mixer.v": "column",
            "mixer.out": "row",
            "ln": "norm",
            "ff": "gather",
            "ff.0": "column",
            "ff.2": "row",
        },
    )

    def __init__(self) -> None:
        super().__init__()
        self.wte, self.drop = nn.Embedding(50, 16), nn.Dropout(0)
        self.h = nn.ModuleDict({str(i): Layer() for i in range(4)})
        self.ln_f, self.out = nn.RMSNorm(16), nn.Linear(16, 50, bias=False)

    def forward(self, ids: Tensor, positions: Tensor | None = None, loss: HeadLoss | None = None) -> Tensor:
        x = self.drop(self.wte(ids))
        for layer in self.h.values():
            x = layer(x)
        hidden = self.ln_f(x)
        return self.out(hidden) if loss is None else loss(hidden, self.out.weight)


@pytest.fixture
def world() -> Iterator[World]:
    """Rank 0 of 16: two of everything but copies."""
    degrees = Degrees(pp=2, dp_shard=2, cp=2, tp=2)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=degrees.world)
    yield World(0, degrees.world, torch.device("cpu"), degrees, *build_meshes(degrees, "cpu"))
    dist.destroy_process_group()


def test_every_plan_applies_by_the_table_alone(world: World) -> None:
    parallelism = Parallelism(
        pipeline_parallel_degree=2,
        data_parallel_shard_degree=2,
        context_parallel_degree=2,
        tensor_parallel_degree=2,
    )
    plans = build_plans(
        parallelism,
        Training(),
        ActivationCheckpoint(mode="full"),
        Compile(enable=True),
        Model(),
        Quantize(),
        Kernels(),
        shape=SHAPE,
        degrees=world.degrees,
        device=world.device,
    )
    assert [p.name for p in plan.active(plans, world)] == [
        *("kernels", "tensor", "context", "pipeline", "precision", "activation_checkpoint", "compile", "data")
    ]
    with torch.device("meta"):
        model = Other()
    names = dict(model.named_parameters())
    (stage,) = plan.apply(plans, model, world)
    kept = dict(stage.named_parameters())
    assert set(kept) == {n for n in names if n.startswith(("wte.", "h.0.", "h.1."))}
    assert all(isinstance(p, DTensor) and p.device_mesh.mesh_dim_names == ("fsdp", "tp") for p in kept.values())
    local = {name: tuple(parameter.to_local().shape) for name, parameter in kept.items()}
    assert local["wte.weight"] == (7, 16)  # 25 of 50 rows by tp, of which 7 by fsdp over 4
    assert local["h.0.mixer.q.weight"] == (2, 16) and local["h.0.mixer.out.weight"] == (4, 8)
    assert local["h.1.ff.0.weight"] == (4, 16) and local["h.1.ff.2.weight"] == (4, 16)
    assert local["h.1.ln.weight"] == (4,)
    assert isinstance(stage, FSDPModule) and all(isinstance(block, FSDPModule) for block in stage.h.values())
    block = stage.h["0"]
    assert block.mixer.attend is stage.h["1"].mixer.attend and block._compiled_call_impl is not None
    assert isinstance(stage.ln_f, nn.Identity) and isinstance(stage.out, nn.Identity)
