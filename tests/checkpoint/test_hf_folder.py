"""Hugging Face directories as input: those of transformers are read, hostile and torn ones refused in one line."""

import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from conversion_helpers import assert_same
from model_helpers import SHAPES, hf_twin, random_model
from safetensors.torch import load_file, save_file

from titanling.checkpoint.hf_folder import open_hf_folder
from titanling.errors import UserError
from titanling.model.llama import Llama

INDEX = "model.safetensors.index.json"


class Hostile:
    """Pickled, it makes a file named `owned` when it is read."""

    def __init__(self, where: Path) -> None:
        self.where = where

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.where / "owned"),))


def saved(name: str, folder: Path, **options: Any) -> Llama:
    """A random model, saved there by transformers."""
    model = random_model(SHAPES[name])
    hf_twin(model).save_pretrained(folder, **options)
    return model


def read(folder: Path) -> dict[str, torch.Tensor]:
    """Its tensors, whole."""
    _, shards = open_hf_folder(folder)
    return {name: shards.whole(name) for name in shards.names()}


def refused(folder: Path, words: str) -> None:
    """Opening raises a one-line UserError with these words."""
    with pytest.raises(UserError, match=words) as caught:
        open_hf_folder(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("options", [{}, {"max_shard_size": "20KB"}], ids=["single", "sharded"])
def test_what_transformers_saves(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    model = saved(name, tmp_path, **options)
    assert (tmp_path / INDEX).exists() == bool(options)
    shape, _ = open_hf_folder(tmp_path)
    assert shape == SHAPES[name]
    assert_same(read(tmp_path), model.state_dict())


def change(folder: Path, file: str, **changes: Any) -> None:
    """Change keys of a JSON file."""
    content = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(content | changes))


@pytest.mark.parametrize("file", ["../model.safetensors", "/etc/passwd.safetensors", "..", "sub/x.safetensors", "a\\b"])
def test_an_index_that_leads_outside(file: str, tmp_path: Path) -> None:
    saved("untied", tmp_path / "hf", max_shard_size="20KB")
    index = json.loads((tmp_path / "hf" / INDEX).read_text())
    save_file(dict(random_model(SHAPES["untied"]).state_dict()), tmp_path / "model.safetensors")
    change(tmp_path / "hf", INDEX, weight_map=index["weight_map"] | {"lm_head.weight": file})
    refused(tmp_path / "hf", f"{INDEX}: names .* not a file beside it; do not trust this directory")


def test_links_are_not_followed(tmp_path: Path) -> None:
    saved("untied", tmp_path / "hf")
    for name in ("model.safetensors", "config.json"):
        (tmp_path / "hf" / name).rename(tmp_path / name)
        (tmp_path / "hf" / name).symlink_to(tmp_path / name)
        refused(tmp_path / "hf", f"{name}: is a link, which is not followed; copy the directory with cp -rL")
        (tmp_path / "hf" / name).unlink()
        (tmp_path / name).rename(tmp_path / "hf" / name)
    saved("untied", tmp_path / "sharded", max_shard_size="20KB")
    path = sorted((tmp_path / "sharded").glob("*.safetensors"))[1]
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    refused(tmp_path / "sharded", f"{path.name}: is a link")


def test_pickles_are_never_read(tmp_path: Path) -> None:
    saved("untied", tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(Hostile(tmp_path)))
    refused(tmp_path, "pytorch_model.bin: pickled weights .* save them as safetensors")
    (tmp_path / "model.safetensors").write_bytes(pickle.dumps(Hostile(tmp_path)))
    refused(tmp_path, "model.safetensors: not a whole safetensors file")
    (tmp_path / "model.safetensors").unlink()
    places = {name: "pytorch_model.bin" for name in random_model(SHAPES["untied"]).state_dict()}
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": places}))
    refused(tmp_path, "'pytorch_model.bin'; weights are read from .safetensors only")
    assert not (tmp_path / "owned").exists()


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", "nowhere/config.json: no such file; a Hugging Face model directory has one")
    saved("untied", tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    refused(tmp_path, "has neither model.safetensors nor model.safetensors.index.json")
    name = "model.layers.1.mlp.up_proj.weight"
    save_file({key: value for key, value in weights.items() if key != name}, tmp_path / "model.safetensors")
    refused(tmp_path, f"has no tensor {name}")
    save_file(weights | {"model.layers.1.mlp.up_proj.bias": torch.zeros(64)}, tmp_path / "model.safetensors")
    refused(tmp_path, "holds a tensor model.layers.1.mlp.up_proj.bias, for which its model has no place")
    save_file(weights | {name: torch.zeros(64, 33)}, tmp_path / "model.safetensors")
    refused(tmp_path, rf"{name} has the shape \[64, 33\]; its model wants \[64, 32\]")
    save_file(weights | {name: torch.zeros(64, 32, dtype=torch.int8)}, tmp_path / "model.safetensors")
    refused(tmp_path, f"{name} holds torch.int8; only floating-point")


ODD = [True, [], ["x"], {}, "x", -1, 0, 1.5, 10**30, 10**400, float("nan"), 10**9]


KEYS = "model_type layer_types rope_theta rms_norm_eps rope_scaling vocab_size hidden_size head_dim num_hidden_layers"


@pytest.mark.parametrize("key", KEYS.split())
def test_a_config_that_says_nonsense(key: str, tmp_path: Path) -> None:
    saved("untied", tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    for value in ODD:
        path.write_text(json.dumps(config | {key: value}))
        try:
            open_hf_folder(tmp_path)
        except UserError as error:
            assert str(tmp_path) in str(error)
    for factor in (10**400, "x"):
        scaling = {"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
        path.write_text(json.dumps(config | {"rope_parameters": None, "rope_scaling": scaling}))
        with pytest.raises(UserError, match="config.json"):
            open_hf_folder(tmp_path)


def test_pipes_are_not_waited_for(tmp_path: Path) -> None:
    saved("untied", tmp_path)
    for name in ("model.safetensors", "config.json"):
        (tmp_path / name).unlink()
        os.mkfifo(tmp_path / name)
        with pytest.raises(UserError, match=f"{name}: is no regular file"):
            open_hf_folder(tmp_path)


def test_an_index_and_its_files_must_agree(tmp_path: Path) -> None:
    saved("untied", tmp_path, max_shard_size="20KB")
    places = json.loads((tmp_path / INDEX).read_text())["weight_map"]
    other = next(file for file in places.values() if file != places["lm_head.weight"])
    change(tmp_path, INDEX, weight_map=places | {"lm_head.weight": other})
    refused(tmp_path, "tensor lm_head.weight, other than model.safetensors.index.json says")
    change(tmp_path, INDEX, weight_map=places | {"lm_head.weight": "gone.safetensors"})
    refused(tmp_path, "gone.safetensors: no such file, but model.safetensors.index.json names it")
    for wrong in ({}, [], {"lm_head.weight": 3}, None):
        change(tmp_path, INDEX, weight_map=wrong)
        refused(tmp_path, "weight_map must give the file of each tensor")
    (tmp_path / INDEX).write_text("[" * 100_000)
    refused(tmp_path, f"{INDEX}: cannot be read")


def test_a_tied_head_that_is_stored_as_well(tmp_path: Path) -> None:
    saved("gqa3_tied", tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    head = weights["model.embed_tokens.weight"].clone()
    save_file(weights | {"lm_head.weight": head}, tmp_path / "model.safetensors")
    assert open_hf_folder(tmp_path)[0] == SHAPES["gqa3_tied"]
    head[7, 3] += 1
    save_file(weights | {"lm_head.weight": head}, tmp_path / "model.safetensors")
    refused(tmp_path, "lm_head.weight differs from the embedding")
    save_file(weights | {"lm_head.weight": head[1:].clone()}, tmp_path / "model.safetensors")
    refused(tmp_path, "lm_head.weight differs from the embedding")


def test_the_config_is_named_with_its_field(tmp_path: Path) -> None:
    saved("untied", tmp_path)
    change(tmp_path, "config.json", attention_bias=True)
    refused(tmp_path, "config.json: attention_bias = True")
    (tmp_path / "config.json").write_text("[]")
    refused(tmp_path, "config.json: must hold a JSON object")
    (tmp_path / "config.json").write_text("{")
    refused(tmp_path, "config.json: cannot be read")
