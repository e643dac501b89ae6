"""Hugging Face directories become checkpoints and come back bit for bit; a run starts from them."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import tomli
import torch
from conversion_helpers import assert_same, whole_tensors, write_checkpoint
from helpers import ROOT, TinyData, clean_env, run_python
from model_helpers import SHAPES, hf_twin, random_ids, random_model
from runs import open_trainer

from titanling.checkpoint import folder, import_model
from titanling.checkpoint.describe import inspect
from titanling.checkpoint.export import export_to_hf
from titanling.checkpoint.import_model import import_hf
from titanling.checkpoint.weights import load_model
from titanling.errors import UserError

SCRIPT = ROOT / "scripts/convert_hf_to_dcp.py"


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_from_hugging_face_and_back(
    name: str, dtype: torch.dtype, tmp_path: Path, tiny_data: TinyData, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(import_model, "FILE_BYTES", 20_000)  # several files
    model = random_model(SHAPES[name]).to(dtype)
    hf_twin(model).to(dtype).save_pretrained(tmp_path / "hf", max_shard_size="30KB")
    made = import_hf(tmp_path / "hf", tmp_path / "converted")
    assert made.path == tmp_path / "converted/step-000000" and made.shape == SHAPES[name]
    assert sorted(path.name for path in made.path.iterdir()) == ["manifest.json", "model", "state.json"]
    manifest = folder.read_manifest(made.path)
    assert len(manifest) > 2 and folder.damage(made.path, sorted(manifest), manifest) is None
    assert_same(whole_tensors(made.path / "model"), model.state_dict())

    loaded = load_model(made.path)
    assert loaded.state["model_only"] and loaded.state["step"] == loaded.state["tokens_seen"] == 0
    assert_same(loaded.model.state_dict(), model.state_dict())

    export_to_hf(made.path, tmp_path / "back", tokenizer=Path(tiny_data.tokenizer))
    assert_same(whole_tensors(tmp_path / "back"), model.state_dict())
    card = (tmp_path / "back/README.md").read_text()
    assert "weights converted from" in card and "learning rate" not in card and "tokens seen" not in card


@pytest.mark.parametrize("name", SHAPES)
def test_to_hugging_face_and_back(name: str, tmp_path: Path, tiny_data: TinyData) -> None:
    model = random_model(SHAPES[name])
    checkpoint = write_checkpoint(tmp_path / "run", model, tiny_data, "rows_and_columns")
    export_to_hf(checkpoint, tmp_path / "hf", max_shard_size="30KB")
    made = import_hf(tmp_path / "hf", tmp_path / "converted")
    assert made.shape == SHAPES[name]
    assert_same(whole_tensors(made.path / "model"), model.state_dict())
    export_to_hf(made.path, tmp_path / "again", max_shard_size="30KB")  # with the tokenizer of hf/
    for path in (tmp_path / "hf").iterdir():
        if path.name != "README.md":
            assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes(), path.name


def test_a_run_starts_from_it(tmp_path: Path, tiny_data: TinyData) -> None:
    model = random_model(SHAPES["head_dim"])
    hf_twin(model).save_pretrained(tmp_path / "hf")
    done = run_python(SCRIPT, "--input", "hf", "--output", "converted", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("wrote converted/step-000000\n")
    printed = tomli.loads(done.stdout.partition("\n\n")[2])
    sizes = {key: None for key in ("dim", "n_layers", "n_heads", "n_kv_heads", "ffn_dim", "vocab_size")}
    changes: dict[str, Any] = {f"model.{key}": value for key, value in (sizes | printed["model"]).items()}
    changes["checkpoint.initial_load_path"] = str(tmp_path / printed["checkpoint"]["initial_load_path"])
    with open_trainer(tmp_path, tiny_data, changes) as trainer:
        assert trainer.step == 0
        assert_same(dict(trainer._tensors()[0]), model.state_dict())
        ids = random_ids(SHAPES["head_dim"], 1, 20)
        with torch.no_grad():
            assert torch.equal(load_model(tmp_path / "converted/step-000000").model(ids), model(ids))


def test_it_is_no_part_of_a_run_but_can_be_looked_at(tmp_path: Path, tiny_data: TinyData) -> None:
    """Converted into a run's own checkpoints, it is no step to go on from."""
    with open_trainer(tmp_path / "source", tiny_data, {"training.steps": 2}) as trainer:
        trainer.train()
    export_to_hf(tmp_path / "source/run/checkpoints/step-000002", tmp_path / "hf")
    made = import_hf(tmp_path / "hf", tmp_path / "run" / "checkpoints").path
    with pytest.raises(UserError, match="holds only weights: start a new run from it with checkpoint.initial_load"):
        with open_trainer(tmp_path, tiny_data):
            pass
    said = inspect(str(made), tensors=True)
    assert "converted from" in said and "39,072, 18,592 non-embedding" in said and "lm_head.weight" in said


def test_a_shape_that_no_config_can_name(tmp_path: Path) -> None:
    hf_twin(random_model(SHAPES["rope_scaling"])).save_pretrained(tmp_path / "hf")
    assert import_hf(tmp_path / "hf", tmp_path / "made").model_table is None
    done = run_python(SCRIPT, "--input", tmp_path / "hf", "--output", tmp_path / "more")
    assert done.returncode == 0 and "no preset has its RoPE scaling" in done.stdout


def refused(words: str, directory: Path, output: Path) -> None:
    """Importing raises a one-line UserError with these words, and leaves nothing behind."""
    before = sorted(output.rglob("*"))
    with pytest.raises(UserError, match=words) as caught:
        import_hf(directory, output)
    assert "\n" not in str(caught.value)
    assert sorted(output.rglob("*")) == before


def test_what_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hf_twin(random_model(SHAPES["untied"])).save_pretrained(tmp_path / "hf")
    import_hf(tmp_path / "hf", tmp_path / "made")
    refused("step-000000: exists already; give another --output", tmp_path / "hf", tmp_path / "made")
    (tmp_path / "file").write_text("mine")
    refused("file: no owner.json can be written there: ", tmp_path / "hf", tmp_path / "file")
    monkeypatch.setattr(os, "fsync", full_disk)
    full = "other: no owner.json can be written there: No space left on device: it needs"
    refused(full, tmp_path / "hf", tmp_path / "other")
    config = json.loads((tmp_path / "hf/config.json").read_text())
    (tmp_path / "hf/config.json").write_text(json.dumps(config | {"mlp_bias": True}))
    refused("config.json: mlp_bias = True", tmp_path / "hf", tmp_path / "other")


def full_disk(descriptor: int) -> None:
    """What a full disk says."""
    raise OSError(28, "No space left on device")


def test_the_command_refuses_in_one_line(tmp_path: Path) -> None:
    done = run_python(SCRIPT, "--input", tmp_path / "nowhere", "--output", tmp_path / "made")
    assert done.returncode == 2
    assert (
        done.stderr == f"error: {tmp_path}/nowhere/config.json: no such file; a Hugging Face model directory has one\n"
    )
    assert run_python(SCRIPT, "--input", "x", "--output", "y", "--flavor", "8B").returncode == 2
    assert run_python(SCRIPT, "--input", "x", "--output", "y", "--format", "megatron").returncode == 2


@pytest.mark.parametrize("script", ["convert_dcp_to_hf.py --checkpoint", "convert_hf_to_dcp.py --input"])
def test_urls_are_not_taken_for_folders(script: str, tmp_path: Path) -> None:
    """They made a folder named s3: here."""
    name, option = script.split()
    done = run_python(ROOT / "scripts" / name, option, "here", "--output", "s3://bucket/model", cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.startswith("error: s3://bucket/model: must be a path of this machine")
    assert len(done.stderr.splitlines()) == 1 and not list(tmp_path.iterdir())


def test_several_processes_do_not_write_one_checkpoint(tmp_path: Path) -> None:
    environment = clean_env(WORLD_SIZE="2", RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="29500")
    done = run_python(SCRIPT, "--input", "here", "--output", tmp_path / "out", env=environment)
    assert done.returncode == 2 and "start it without torchrun" in done.stderr and len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("script", ["convert_dcp_to_hf", "convert_hf_to_dcp"])
def test_help_has_an_example(script: str) -> None:
    done = run_python(ROOT / f"scripts/{script}.py", "--help")
    assert done.returncode == 0
    assert f"example: python scripts/{script}.py --" in " ".join(done.stdout.split())
