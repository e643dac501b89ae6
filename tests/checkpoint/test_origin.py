"""What an imported model brought along survives training and export; what training changed, and only that, is new."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conversion_helpers import write_checkpoint
from helpers import VOCAB, TinyData, tiny_config
from model_helpers import SHAPES, hf_twin, random_model
from runs import open_trainer
from transformers import AutoConfig, GenerationConfig

from titanling.checkpoint import folder
from titanling.checkpoint.describe import inspect
from titanling.checkpoint.export import export_to_hf
from titanling.checkpoint.import_model import import_hf
from titanling.checkpoint.weights import find_tokenizer, text_ends
from titanling.config import load_config
from titanling.errors import UserError
from titanling.summary import End, summary

SHAPE = replace(SHAPES["untied"], vocab_size=VOCAB)
CONFIG = {
    "max_position_embeddings": 8192,
    "eos_token_id": [5, 6, 7],
    "bos_token_id": 4,
    "pad_token_id": 9,
    "attention_dropout": 0.1,
    "initializer_range": 0.05,
    "a_key_of_theirs": {"deep": [1, None]},
    "use_cache": False,
}
GENERATION = {"eos_token_id": [5, 6, 7], "bos_token_id": 4, "pad_token_id": 9, "do_sample": True, "temperature": 0.6}
GENERATION |= {"top_p": 0.9, "max_length": 4096, "a_key_of_theirs": 1}


def hugging_face(path: Path, data: TinyData, config: dict[str, Any], generation: dict[str, Any] | None) -> Path:
    """A directory of a random model whose configs say this too."""
    hf_twin(random_model(SHAPE)).save_pretrained(path)
    for name, changes in (("config.json", config), ("generation_config.json", generation)):
        if changes is None:
            (path / name).unlink(missing_ok=True)
            continue
        before = json.loads((path / name).read_text()) if name == "config.json" else {}
        (path / name).write_text(json.dumps(before | changes))
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (path / name).write_bytes(Path(data.tokenizer, name).read_bytes())
    return path


def read(path: Path, name: str) -> Any:
    return json.loads((path / name).read_text())


def train(root: Path, data: TinyData, start: Path, **changes: Any) -> Path:
    """Its last checkpoint, of a run of two steps from the weights of `start`."""
    shape = {f"model.{key}": getattr(SHAPE, key) for key in ("dim", "n_layers", "n_heads", "n_kv_heads", "ffn_dim")}
    shape |= {"model.head_dim": SHAPE.head_dim, "model.norm_eps": SHAPE.norm_eps, "model.rope_theta": SHAPE.rope_theta}
    settings = shape | {"checkpoint.initial_load_path": str(start), "training.steps": 2} | changes
    with open_trainer(root, data, settings) as trainer:
        trainer.train()
    return root / "run/checkpoints/step-000002"


@pytest.mark.parametrize("by_conversion", [True, False], ids=["converted first", "as it is"])
def test_two_phases_keep_what_was_imported(by_conversion: bool, tmp_path: Path, tiny_data: TinyData) -> None:
    source = hugging_face(tmp_path / "hf", tiny_data, CONFIG, GENERATION)
    start = import_hf(source, tmp_path / "converted").path if by_conversion else source
    first = train(tmp_path / "one", tiny_data, start, **{"optimizer.lr": 1e-3})
    last = train(tmp_path / "two", tiny_data, first, **{"optimizer.lr": 2e-4, "training.seq_len": 16})
    for checkpoint, name in ((first, "a"), (last, "b")):
        export_to_hf(checkpoint, tmp_path / name)
        ours, theirs = read(tmp_path / name, "config.json"), read(source, "config.json")
        assert ours == theirs | {"eos_token_id": [1, 5, 6, 7]}  # what ended this training's documents, and theirs
        assert read(tmp_path / name, "generation_config.json") == GENERATION | {"eos_token_id": [1, 5, 6, 7]}
    assert AutoConfig.from_pretrained(tmp_path / "b").max_position_embeddings == 8192
    assert GenerationConfig.from_pretrained(tmp_path / "b").temperature == 0.6
    state = folder.read_json(last / "state.json")
    _, files = find_tokenizer(state, SHAPE, None)
    assert text_ends(state, files).stop_ids == [1, 5, 6, 7]
    card = (tmp_path / "b/README.md").read_text()
    for row in ("| peak learning rate | 0.001 | 0.0002 |", "| step | 2 | 2 |", "| computed in | float32 | float32 |"):
        assert row in card
    assert "| weights converted from | Hugging Face (LlamaForCausalLM) |" in card
    assert "computed in  float32" in " ".join(inspect(str(last)).split()).replace("computed in", "computed in ")


def test_a_converted_model_is_exported_as_it_came(tmp_path: Path, tiny_data: TinyData) -> None:
    source = hugging_face(tmp_path / "hf", tiny_data, CONFIG | {"eos_token_id": 1}, GENERATION | {"eos_token_id": 1})
    export_to_hf(import_hf(source, tmp_path / "converted").path, tmp_path / "back")
    for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        assert read(tmp_path / "back", name) == read(source, name), name
    export_to_hf(tmp_path / "converted/step-000000", tmp_path / "half", dtype="bfloat16")
    key = "dtype" if "dtype" in read(source, "config.json") else "torch_dtype"
    assert read(tmp_path / "half", "config.json") == read(source, "config.json") | {key: "bfloat16"}


def test_a_source_without_generation_config(tmp_path: Path, tiny_data: TinyData) -> None:
    source = hugging_face(tmp_path / "hf", tiny_data, CONFIG, None)
    export_to_hf(import_hf(source, tmp_path / "converted").path, tmp_path / "back")
    ends = {"eos_token_id": [1, 5, 6, 7], "bos_token_id": 4, "pad_token_id": 9}
    assert read(tmp_path / "back", "generation_config.json") == ends


STAGES = [{"start": 0, "seq_len": 16, "weights": {}}, {"start": 99, "weights": {}}]
LENGTHS = {
    "of the run": ({}, {}, 32),
    "of an earlier phase": ({"phases": [{"longest": 64}]}, {}, 64),
    "of the longest stage that has begun": (
        {"data": {"seq_len": 32, "seed": 1, "sources": {}, "stages": STAGES}},
        {},
        16,
    ),
    "of the origin": ({"origin": {"from": "Megatron-core", "max_positions": 512}}, {}, 512),
    "of training beyond the origin": ({"origin": {"from": "x", "max_positions": 8}}, {}, 32),
}


@pytest.mark.parametrize("case", LENGTHS)
def test_max_position_embeddings(case: str, tmp_path: Path, tiny_data: TinyData) -> None:
    state, changes, wanted = LENGTHS[case]
    phase = {"step": 1, "tokens_seen": 2, "computed_in": None, "settings": {}}
    if "phases" in state:
        state = {"phases": [phase | each for each in state["phases"]]}
    checkpoint = write_checkpoint(tmp_path / "run", random_model(SHAPE), tiny_data, changes=changes, state=state)
    export_to_hf(checkpoint, tmp_path / "hf")
    assert read(tmp_path / "hf", "config.json")["max_position_embeddings"] == wanted


def test_settings_changed_within_a_run_are_phases_too(tmp_path: Path, tiny_data: TinyData) -> None:
    for steps, lr in ((2, 1e-3), (4, 1e-3), (6, 1e-4)):
        with open_trainer(tmp_path, tiny_data, {"training.steps": steps, "optimizer.lr": lr}) as trainer:
            trainer.train()
    phases = folder.read_json(tmp_path / "run/checkpoints/step-000006/state.json")["phases"]
    assert [(phase["step"], phase["settings"]["optimizer.lr"]) for phase in phases] == [(4, 1e-3)]


def test_a_tokenizer_that_has_changed_since(tmp_path: Path, tiny_data: TinyData) -> None:
    documents = {"eod_id": 1, "bos_id": None, "tokenizer_sha256": "0" * 64}
    checkpoint = write_checkpoint(tmp_path / "run", random_model(SHAPE), tiny_data, state={"documents": documents})
    with pytest.raises(UserError, match=r"tokenizer.json: has changed since .*--tokenizer .* takes this one"):
        export_to_hf(checkpoint, tmp_path / "hf")
    export_to_hf(checkpoint, tmp_path / "hf", tokenizer=Path(tiny_data.tokenizer))  # the advice


def test_an_origin_that_is_no_model_of_ours(tmp_path: Path, tiny_data: TinyData) -> None:
    origin = {"from": "x", "config": {"model_type": "llama", "auto_map": {"AutoModel": "evil.py"}}}
    checkpoint = write_checkpoint(tmp_path / "run", random_model(SHAPE), tiny_data, state={"origin": origin})
    with pytest.raises(UserError, match="state.json: origin.config: "):
        export_to_hf(checkpoint, tmp_path / "hf")


def test_the_summary_recommends_the_best_checkpoint_and_words_of_the_run(tmp_path: Path, tiny_data: TinyData) -> None:
    changes = {"validation.enable": True, "checkpoint.keep_best": True}
    config = load_config(tiny_config(tmp_path, tiny_data, changes)).config
    root = tmp_path / "run/checkpoints"
    for step in (2, 4):
        (root / f"step-{step:06d}").mkdir(parents=True)
        (root / f"step-{step:06d}/manifest.json").touch()
    for best, recommended in ((2, 2), (4, 4), (3, 4), (None, 4)):
        state = {"best": best and {"step": best, "val_loss": 1.0}}
        (root / "step-000004/state.json").write_text(json.dumps(state))
        said = summary("run.toml", {}, config, End(4, {}))
        lines = {line.split()[0]: line for line in said.splitlines() if line.startswith("  ")}
        assert f"step-{recommended:06d}" in lines["generate"] and f"step-{recommended:06d}" in lines["convert"]
        assert ("best" in lines) == (recommended != 4) and "step-000004" in lines["checkpoint"]
    prompt = lines["generate"].split("--prompt ")[1].strip("'")
    assert prompt and any(prompt in path.read_text() for path in tiny_data.text.iterdir())
    config = load_config(tiny_config(tmp_path, tiny_data, {"data.validation": str(tmp_path / "gone")})).config
    assert summary("run.toml", {}, config, End(4, {})).count("--prompt ''") == 1
