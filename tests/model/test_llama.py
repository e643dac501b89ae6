"""The decoder against plain formulas in float64, and its cache and dropout."""

import math

import pytest
import torch
from model_helpers import SHAPES, random_ids, random_model
from torch import Tensor

from titanling.model.llama import (
    AddRMSNorm,
    Attention,
    LayerCache,
    Llama,
    RMSNorm,
    apply_rope,
    rope_angles,
    rope_frequencies,
)
from titanling.model.presets import LlamaShape

Weights = dict[str, Tensor]


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / ((x * x).mean(-1, keepdim=True) + eps).sqrt() * weight


def frequencies(shape: LlamaShape) -> Tensor:
    """One frequency after the other, by wavelength, as the paper tells it."""
    result = []
    for i in range(shape.head_dim // 2):
        frequency = shape.rope_theta ** (-2 * i / shape.head_dim)
        if (scaling := shape.rope_scaling) is not None:
            context, wavelength = scaling.original_max_position_embeddings, 2 * math.pi / frequency
            if wavelength > context / scaling.low_freq_factor:
                frequency /= scaling.factor
            elif wavelength > context / scaling.high_freq_factor:
                s = (context / wavelength - scaling.low_freq_factor) / (
                    scaling.high_freq_factor - scaling.low_freq_factor
                )
                frequency = (1 - s) * frequency / scaling.factor + s * frequency
        result.append(frequency)
    return torch.tensor(result, dtype=torch.float64)


def rotate(x: Tensor, shape: LlamaShape) -> Tensor:
    """RoPE on (batch, seq, heads, head_dim) as multiplication by complex numbers of length one."""
    angles = torch.arange(x.size(1), dtype=torch.float64)[:, None] * frequencies(shape)
    turn = torch.polar(torch.ones_like(angles), angles)[:, None]
    half = shape.head_dim // 2
    turned = torch.complex(x[..., :half], x[..., half:]) * turn
    return torch.cat((turned.real, turned.imag), -1)


def attention(x: Tensor, w: Weights, prefix: str, shape: LlamaShape) -> Tensor:
    """Head by head: scores, mask, softmax."""
    q, k, v = (
        (x @ w[f"{prefix}{name}_proj.weight"].T).unflatten(-1, (heads, shape.head_dim))
        for name, heads in (("q", shape.n_heads), ("k", shape.n_kv_heads), ("v", shape.n_kv_heads))
    )
    if shape.qk_norm:
        q = rms_norm(q, w[f"{prefix}q_norm.weight"], shape.norm_eps)
        k = rms_norm(k, w[f"{prefix}k_norm.weight"], shape.norm_eps)
    q, k = rotate(q, shape), rotate(k, shape)
    future = torch.ones(x.size(1), x.size(1)).triu(1).bool()
    heads = []
    for head in range(shape.n_heads):
        group = head // (shape.n_heads // shape.n_kv_heads)
        scores = q[:, :, head] @ k[:, :, group].mT / math.sqrt(shape.head_dim)
        heads.append(scores.masked_fill(future, -math.inf).softmax(-1) @ v[:, :, group])
    return torch.cat(heads, -1) @ w[f"{prefix}o_proj.weight"].T


def logits(ids: Tensor, w: Weights, shape: LlamaShape) -> Tensor:
    x = w["model.embed_tokens.weight"][ids]
    for layer in range(shape.n_layers):
        prefix = f"model.layers.{layer}."
        y = rms_norm(x, w[f"{prefix}input_layernorm.weight"], shape.norm_eps)
        x = x + attention(y, w, f"{prefix}self_attn.", shape)
        y = rms_norm(x, w[f"{prefix}post_attention_layernorm.weight"], shape.norm_eps)
        gate, up = y @ w[f"{prefix}mlp.gate_proj.weight"].T, y @ w[f"{prefix}mlp.up_proj.weight"].T
        x = x + (gate * gate.sigmoid() * up) @ w[f"{prefix}mlp.down_proj.weight"].T
    x = rms_norm(x, w["model.norm.weight"], shape.norm_eps)
    return x @ w.get("lm_head.weight", w["model.embed_tokens.weight"]).T


def double(model: torch.nn.Module) -> Weights:
    return {name: p.detach().double().requires_grad_() for name, p in model.named_parameters()}


def assert_close(found: Tensor, wanted: Tensor, tolerance: float) -> None:
    error = (found.double() - wanted).abs().max() / wanted.abs().max()
    assert error <= tolerance, f"largest error {error:.2e} of the largest value"


@pytest.fixture(params=SHAPES)
def shape(request: pytest.FixtureRequest) -> LlamaShape:
    return SHAPES[request.param]


def test_forward_and_every_gradient(shape: LlamaShape) -> None:
    model, ids = random_model(shape), random_ids(shape, 2, 80)
    weights = double(model)
    direction = torch.randn(2, 80, shape.vocab_size, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    found, wanted = model(ids), logits(ids, weights, shape)
    assert wanted.abs().max() > 1  # else the tolerances would mean little
    assert_close(found, wanted, 1e-5)
    (found * direction.float()).sum().backward()
    (wanted * direction).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and weights[name].grad is not None
        assert_close(parameter.grad, weights[name].grad, 1e-5)


def test_float64(shape: LlamaShape) -> None:
    """RoPE alone stays in float32: its rounding is all that separates a float64 model from the formulas."""
    model, ids = random_model(shape).double(), random_ids(shape, 1, 40)
    found = model(ids)
    assert found.dtype == torch.float64
    assert_close(found, logits(ids, double(model), shape), 1e-6)


def test_bfloat16(shape: LlamaShape) -> None:
    model, ids = random_model(shape), random_ids(shape, 1, 40)
    found = model.bfloat16()(ids)
    assert found.dtype == torch.bfloat16
    assert_close(found, logits(ids, double(model), shape), 0.1)


def test_rms_norm_gradient() -> None:
    norm = RMSNorm(24, 1e-3).double()
    norm.weight.data = torch.randn(24, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x = torch.randn(3, 5, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    direction = torch.randn(3, 5, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    (norm(x) * direction).sum().backward()
    # By hand, with r = 1 / rms: dw = Σ dy·x·r and dx = r·(w·dy) − x·r³·mean(w·dy·x).
    value, weight = x.detach(), norm.weight.detach()
    r = ((value**2).mean(-1, keepdim=True) + 1e-3).rsqrt()
    dx = r * weight * direction - value * r**3 * (weight * direction * value).mean(-1, keepdim=True)
    assert norm.weight.grad is not None and x.grad is not None
    assert_close(norm.weight.grad, (direction * value * r).sum((0, 1)), 1e-14)
    assert_close(x.grad, dx, 1e-14)
    assert torch.autograd.gradcheck(norm, x)


def test_add_rms_norm_is_the_norm_of_the_sum() -> None:
    add, plain, results = AddRMSNorm(24, 1e-3), RMSNorm(24, 1e-3), []
    for fused in (True, False):
        x, r = (torch.randn(5, 24, generator=torch.Generator().manual_seed(i)).requires_grad_() for i in (0, 1))
        total = x + r
        y, total = add(x, r) if fused else (plain(total), total)
        results.append([y, total, *torch.autograd.grad((y * total.sin()).sum(), (x, r))])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_rms_norm_statistics_are_float32() -> None:
    """In bfloat16 the squares of 300 entries would lose their sum."""
    x = torch.full((300,), 3.0, dtype=torch.bfloat16)
    assert torch.equal(RMSNorm(300, 1e-5).bfloat16()(x), torch.ones(300, dtype=torch.bfloat16))


def test_rope_frequencies(shape: LlamaShape) -> None:
    assert_close(rope_frequencies(shape), frequencies(shape), 1e-6)
    if shape.rope_scaling is not None:
        ratios = rope_frequencies(shape) * shape.rope_theta ** (torch.arange(0, shape.head_dim, 2) / shape.head_dim)
        assert ratios[0] == pytest.approx(1) and ratios[-1] == pytest.approx(1 / 8)
        assert 1 / 8 < ratios[1] < 1  # all three kinds of wavelength are there


def test_rope_and_its_gradient(shape: LlamaShape) -> None:
    x = torch.randn(2, 50, 3, shape.head_dim, generator=torch.Generator().manual_seed(0)).requires_grad_()
    reference = x.detach().double().requires_grad_()
    direction = torch.randn(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found, wanted = apply_rope(x, *rope_angles(shape, torch.arange(50))), rotate(reference, shape)
    assert_close(found, wanted, 1e-5)
    (found * direction.float()).sum().backward()
    (wanted * direction).sum().backward()
    assert x.grad is not None and reference.grad is not None
    assert_close(x.grad, reference.grad, 1e-5)
    assert torch.equal(found[:, 0], x[:, 0])  # position 0 does not turn
    assert torch.allclose(found.norm(dim=-1), x.norm(dim=-1), rtol=1e-5)


def test_attention_and_its_gradient(shape: LlamaShape) -> None:
    module = random_model(shape).model.layers["0"].self_attn
    assert isinstance(module, Attention)
    x = torch.randn(2, 33, shape.dim, generator=torch.Generator().manual_seed(0)).requires_grad_()
    reference, weights = x.detach().double().requires_grad_(), double(module)
    direction = torch.randn(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found = module(x, *rope_angles(shape, torch.arange(33)))
    wanted = attention(reference, weights, "", shape)
    assert_close(found, wanted, 1e-5)
    (found * direction.float()).sum().backward()
    (wanted * direction).sum().backward()
    assert x.grad is not None and reference.grad is not None
    assert_close(x.grad, reference.grad, 1e-5)
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None and weights[name].grad is not None
        assert_close(parameter.grad, weights[name].grad, 1e-5)


def test_nothing_looks_ahead(shape: LlamaShape) -> None:
    model, ids = random_model(shape), random_ids(shape, 1, 20)
    changed = ids.clone()
    changed[0, 12:] = (ids[0, 12:] + 1) % shape.vocab_size
    with torch.no_grad():
        before, after = model(ids), model(changed)
    assert torch.allclose(before[:, :12], after[:, :12], atol=1e-6)
    assert ((before[:, 12:] - after[:, 12:]).abs().amax(-1) > 1e-2).all()


@torch.no_grad()
def test_the_cache_changes_nothing(shape: LlamaShape) -> None:
    model, ids = random_model(shape), random_ids(shape, 3, 70)
    cache = [LayerCache(70) for _ in range(shape.n_layers)]
    parts = [model(ids[:, :9], cache=cache)] + [model(ids[:, i : i + 1], cache=cache) for i in range(9, 70)]
    assert torch.allclose(torch.cat(parts, 1), model(ids), atol=1e-5)
    assert [layer.length for layer in cache] == [70] * shape.n_layers


@torch.no_grad()
def test_the_cache_from_the_first_token_on(shape: LlamaShape) -> None:
    model, ids = random_model(shape), random_ids(shape, 1, 12)
    cache = [LayerCache(12) for _ in range(shape.n_layers)]
    parts = [model(ids[:, i : i + 1], cache=cache) for i in range(12)]
    assert torch.allclose(torch.cat(parts, 1), model(ids), atol=1e-5)


@torch.no_grad()
def test_a_cache_is_not_extended_by_several_tokens(shape: LlamaShape) -> None:
    model, ids = random_model(shape), random_ids(shape, 1, 8)
    cache = [LayerCache(8) for _ in range(shape.n_layers)]
    model(ids[:, :4], cache=cache)
    with pytest.raises(ValueError, match="one token at a time"):
        model(ids[:, 4:], cache=cache)


def test_a_loss_gets_what_the_logits_are_made_of(shape: LlamaShape) -> None:
    model, ids = random_model(shape), random_ids(shape, 2, 7)
    assert torch.equal(model(ids, loss=torch.nn.functional.linear), model(ids))


def test_tied_embeddings_are_one_parameter() -> None:
    tied, untied = random_model(SHAPES["gqa3_tied"]), random_model(SHAPES["untied"])
    assert "lm_head.weight" not in tied.state_dict()
    assert "lm_head.weight" in untied.state_dict()


def test_dropout_acts_in_training_only() -> None:
    shape = LlamaShape(64, 2, 4, 2, 128, 320, head_dim=16, dropout=0.1)
    model, ids = random_model(shape), random_ids(shape, 4, 32)
    plain = Llama(LlamaShape(64, 2, 4, 2, 128, 320, head_dim=16)).eval()
    plain.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(model(ids), plain(ids))
        model.train(), plain.train()
        torch.manual_seed(5)
        first = model(ids)
        torch.manual_seed(5)
        assert torch.equal(model(ids), first)
        assert not torch.allclose(model(ids), first)
        assert torch.equal(plain.train()(ids), plain.eval()(ids))


def test_dropout_rate_and_places() -> None:
    """After the embedding and on both branches of each block; a tenth of the entries, the others scaled up."""
    shape = LlamaShape(64, 2, 4, 2, 128, 320, head_dim=16, dropout=0.1)
    model = random_model(shape).train()
    outputs: dict[str, Tensor] = {}
    calls: dict[str, int] = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Dropout):

            def record(_module: object, inputs: tuple[Tensor], output: Tensor, name: str = name) -> None:
                outputs[name], calls[name] = output / inputs[0], calls.get(name, 0) + 1

            module.register_forward_hook(record)
    with torch.no_grad():
        torch.manual_seed(0)
        model(random_ids(shape, 4, 64))
    assert calls == {"model.dropout": 1, "model.layers.0.dropout": 2, "model.layers.1.dropout": 2}
    for ratio in outputs.values():
        dropped = ratio == 0
        assert 0.08 < dropped.double().mean() < 0.12
        assert torch.allclose(ratio[~dropped], torch.tensor(1 / 0.9), rtol=1e-5)


def test_a_block_compiled_for_any_length_is_causal() -> None:
    shape = SHAPES["head_dim"]
    model, ids = random_model(shape), random_ids(shape, 2, 12)
    expected = model(ids)
    for block in model.model.layers.values():
        block.compile(fullgraph=True, dynamic=True, backend="aot_eager")
    for length in (5, 12, 1):
        assert torch.allclose(model(ids[:, :length]), expected[:, :length], atol=1e-5)
