"""Megatron-core checkpoints as input, packed here by a second implementation: head by head, rank by rank."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conversion_helpers import assert_same, whole_tensors
from helpers import ROOT, TinyData, run_python
from model_helpers import SHAPES, random_ids, random_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from titanling.checkpoint.export import export_to_hf
from titanling.checkpoint.import_model import import_megatron
from titanling.checkpoint.weights import load_model
from titanling.errors import UserError
from titanling.model.llama import Llama
from titanling.model.presets import LlamaShape

Tensors = dict[str, Tensor]
SCRIPT = ROOT / "scripts/convert_hf_to_dcp.py"
PADDED = 352
# Ours beside Megatron's, for one layer.
FUSED = {"input": "self_attention.linear_qkv.layer_norm_weight", "mlp": "mlp.linear_fc1.layer_norm_weight"}
SEPARATE = {"input": "input_layernorm.weight", "mlp": "pre_mlp_layernorm.weight"}


def megatron_rank(model: Llama, rank: int, tp: int, norms: dict[str, str] = FUSED, prefix: str = "") -> Tensors:
    """The tensors of one tensor-parallel rank, its vocabulary padded to PADDED rows over all ranks."""
    ours, shape = model.state_dict(), model.shape
    packed: Tensors = {}
    padding = ours["model.embed_tokens.weight"].new_full((PADDED - shape.vocab_size, shape.dim), 77.0)
    words = PADDED // tp
    packed["embedding.word_embeddings.weight"] = torch.cat([ours["model.embed_tokens.weight"], padding])[
        words * rank : words * (rank + 1)
    ]
    if "lm_head.weight" in ours:
        packed["output_layer.weight"] = torch.cat([ours["lm_head.weight"], padding])[words * rank : words * (rank + 1)]
    packed["decoder.final_layernorm.weight"] = ours["model.norm.weight"]
    for layer in range(shape.n_layers):
        for name, tensor in _layer(ours, shape, layer, rank, tp, norms).items():
            packed[f"decoder.layers.{layer}.{name}"] = tensor
    packed["decoder.layers.0.self_attention.linear_qkv._extra_state"] = torch.zeros(3, dtype=torch.uint8)
    return {prefix + name: tensor.clone() for name, tensor in packed.items()}


def _layer(ours: Tensors, shape: LlamaShape, layer: int, rank: int, tp: int, norms: dict[str, str]) -> Tensors:
    at = f"model.layers.{layer}."
    attention, mlp = f"{at}self_attn.", f"{at}mlp."
    size = shape.head_dim

    def heads(name: str) -> list[Tensor]:
        return [*ours[f"{attention}{name}_proj.weight"].split(size)]

    q, k, v = heads("q"), heads("k"), heads("v")
    rows: list[Tensor] = []
    for group in range(rank * shape.n_kv_heads // tp, (rank + 1) * shape.n_kv_heads // tp):
        rows += [q[head] for head in range(shape.n_heads) if head // (shape.n_heads // shape.n_kv_heads) == group]
        rows += [k[group], v[group]]
    gate, up, down = (ours[f"{mlp}{name}_proj.weight"] for name in ("gate", "up", "down"))
    packed = {
        "self_attention.linear_qkv.weight": torch.cat(rows),
        "self_attention.linear_proj.weight": ours[f"{attention}o_proj.weight"].chunk(tp, 1)[rank],
        "mlp.linear_fc1.weight": torch.cat([gate.chunk(tp)[rank], up.chunk(tp)[rank]]),
        "mlp.linear_fc2.weight": down.chunk(tp, 1)[rank],
        norms["input"]: ours[f"{at}input_layernorm.weight"],
        norms["mlp"]: ours[f"{at}post_attention_layernorm.weight"],
    }
    if shape.qk_norm:
        packed["self_attention.q_layernorm.weight"] = ours[f"{attention}q_norm.weight"]
        packed["self_attention.k_layernorm.weight"] = ours[f"{attention}k_norm.weight"]
    return packed


def dump(folder: Path, model: Llama, tp: int, **options: object) -> Path:
    """Its files, one for each rank."""
    folder.mkdir(parents=True)
    for rank in range(tp):
        name = f"mp_rank_{rank:02d}.safetensors" if tp > 1 else "all.safetensors"
        save_file(megatron_rank(model, rank, tp, **options), folder / name)  # type: ignore[arg-type]
    return folder


SHAPES_BY_KIND = {name: SHAPES[name] for name in ("gqa3_tied", "untied", "head_dim", "qk_norm")}


@pytest.mark.parametrize("name", SHAPES_BY_KIND)
@pytest.mark.parametrize("tp", [1, 2])
def test_the_model_is_the_same(name: str, tp: int, tmp_path: Path, tiny_data: TinyData) -> None:
    model = random_model(SHAPES[name])
    folder = dump(tmp_path / "dumped", model, tp)
    tokenizer = Path(tiny_data.tokenizer)
    made = import_megatron(folder, tmp_path, replace(SHAPES[name], vocab_size=PADDED), 320, tokenizer, 64)
    assert made.shape == SHAPES[name]
    assert_same(whole_tensors(made.path / "model"), model.state_dict())
    ids = random_ids(SHAPES[name], 2, 40)
    with torch.no_grad():
        assert torch.equal(load_model(made.path).model(ids), model(ids))
    export_to_hf(made.path, tmp_path / "hf")
    assert_same(whole_tensors(tmp_path / "hf"), model.state_dict())


@pytest.mark.parametrize("prefix", ["", "model.", "module.", "model.module."])
@pytest.mark.parametrize("norms", [FUSED, SEPARATE], ids=["fused", "separate"])
def test_variants_of_names(prefix: str, norms: dict[str, str], tmp_path: Path) -> None:
    model = random_model(SHAPES["qk_norm"]).to(torch.bfloat16)
    folder = dump(tmp_path / "dumped", model, 2, prefix=prefix, norms=norms)
    made = import_megatron(folder, tmp_path, SHAPES["qk_norm"], 320)
    assert_same(whole_tensors(made.path / "model"), model.state_dict())


def test_small_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("titanling.checkpoint.stream.BLOCK_BYTES", 1000)  # 7 rows: heads and ranks in the middle
    model = random_model(SHAPES["gqa3_tied"])
    made = import_megatron(dump(tmp_path / "dumped", model, 2), tmp_path, SHAPES["gqa3_tied"], 320)
    assert_same(whole_tensors(made.path / "model"), model.state_dict())


def test_a_vocabulary_without_padding(tmp_path: Path) -> None:
    shape = replace(SHAPES["untied"], vocab_size=PADDED)
    made = import_megatron(dump(tmp_path / "dumped", random_model(shape), 2), tmp_path, shape)
    assert made.shape == shape


def drop(name: str) -> Callable[[Tensors], Tensors]:
    """Without a tensor."""
    return lambda tensors: {key: value for key, value in tensors.items() if key != name}


def put(name: str, tensor: Tensor) -> Callable[[Tensors], Tensors]:
    """With another tensor."""
    return lambda tensors: tensors | {name: tensor}


AT = "decoder.layers.1."


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (drop(f"{AT}mlp.linear_fc2.weight"), f"has no tensor {AT}mlp.linear_fc2.weight"),
        (drop("output_layer.weight"), "has no tensor output_layer.weight"),
        (drop(f"{AT}{FUSED['mlp']}"), f"has no tensor {AT}mlp.linear_fc1.layer_norm_weight or {AT}pre_mlp_layernorm"),
        (put(f"{AT}mlp.linear_fc1.bias", torch.zeros(64)), f"holds a tensor {AT}mlp.linear_fc1.bias, for which"),
        (put("decoder.layers.2.mlp.linear_fc2.weight", torch.zeros(2)), "a tensor decoder.layers.2.mlp.linear_fc2"),
        (put(f"{AT}{SEPARATE['mlp']}", torch.zeros(32)), f"holds a tensor {AT}pre_mlp_layernorm.weight"),
        (put(f"{AT}mlp.linear_fc2.weight", torch.zeros(32, 33)), r"has the shape \[32, 33\], .*--flavor.* \[32, 32\]"),
        (put("decoder.final_layernorm.weight", torch.zeros(32)), "final_layernorm.weight is not the same in all"),
        (put(f"{AT}mlp.linear_fc2.weight", torch.zeros(32, 32, dtype=torch.int8)), "holds torch.int8"),
        (put("model.decoder.final_layernorm.weight", torch.ones(32)), "holds decoder.final_layernorm.weight twice"),
    ],
)
def test_what_is_wrong_is_named(change: Callable[[Tensors], Tensors], words: str, tmp_path: Path) -> None:
    folder = dump(tmp_path / "dumped", random_model(SHAPES["untied"]), 2)
    for path in sorted(folder.iterdir())[: 2 if "has no tensor" in words else 1]:
        save_file(change(load_file(path)), path)
    refused(words, folder, tmp_path / "out", SHAPES["untied"], 320)


def refused(words: str, folder: Path, output: Path, shape: LlamaShape, vocab_size: int | None = None) -> None:
    """Importing raises a one-line UserError with these words, and leaves nothing behind."""
    with pytest.raises(UserError, match=words) as caught:
        import_megatron(folder, output, shape, vocab_size)
    assert "\n" not in str(caught.value)
    assert not output.exists()


def test_files_that_do_not_belong_together(tmp_path: Path) -> None:
    shape, out = SHAPES["untied"], tmp_path / "out"
    refused("nowhere: has no .safetensors files; docs/checkpoints.md", tmp_path / "nowhere", out, shape)
    folder = dump(tmp_path / "dumped", random_model(shape), 2)
    refused("has 352 rows in all, the model 320 tokens; give the number .* --vocab-size", folder, out, shape)
    refused("has 352 rows in all, the model 400 tokens", folder, out, shape, 400)
    refused("n_kv_heads = 1 cannot have been divided over 2", folder, out, replace(shape, n_kv_heads=1), 320)
    refused("shape .*--flavor", folder, out, replace(shape, ffn_dim=128), 320)
    first = folder / "mp_rank_00.safetensors"
    first.rename(folder / "mp_rank_02.safetensors")
    refused("has mp_rank files of 1, 2; some are missing", folder, out, shape, 320)
    (folder / "mp_rank_02.safetensors").rename(folder / "mp_rank_00_001.safetensors")
    refused("mp_rank_00_001.safetensors: is of a later pipeline stage", folder, out, shape, 320)
    (folder / "mp_rank_00_001.safetensors").rename(folder / "other.safetensors")
    refused("other.safetensors: is there beside files of mp_rank", folder, out, shape, 320)


def test_the_command(tmp_path: Path, tiny_data: TinyData) -> None:
    shape = SHAPES["gqa3_tied"]
    model = random_model(shape)
    dump(tmp_path / "dumped", model, 2)
    sizes = "dim = 48\nn_layers = 2\nn_heads = 6\nn_kv_heads = 2\nffn_dim = 96\nhead_dim = 8\ntie_embeddings = true\n"
    (tmp_path / "model.toml").write_text(f"[model]\nvocab_size = 320\nrope_theta = 10000.0\n{sizes}")
    options = ("--format", "megatron", "--input", "dumped", "--config", "model.toml", "--vocab-size", "320")
    done = run_python(SCRIPT, *options, "--tokenizer", tiny_data.tokenizer, "--output", "made", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert 'initial_load_path = "made/step-000000"' in done.stdout
    loaded = load_model(tmp_path / "made/step-000000")
    assert loaded.shape == shape
    assert_same(loaded.model.state_dict(), model.state_dict())
    wrong = run_python(SCRIPT, *options[:4], "--flavor", "llammlein_7b", "--output", "other", cwd=tmp_path)
    assert wrong.returncode == 2 and wrong.stderr.count("\n") == 1 and "dumped" in wrong.stderr
