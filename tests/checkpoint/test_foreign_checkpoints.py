"""Checkpoints of other programs, given where one of ours belongs: what they are, and how they come here."""

from pathlib import Path

import pytest
from helpers import ROOT

from titanling.checkpoint.folder import MANIFEST
from titanling.checkpoint.foreign import what_it_is
from titanling.checkpoint.import_model import import_hf
from titanling.checkpoint.loading import open_checkpoint
from titanling.errors import UserError

FOUND = {
    ".metadata __0_0.distcp": "a checkpoint of PyTorch (DCP), as torchtitan saves it",
    ".metadata __0_0.distcp common.pt metadata.json": "of Megatron; docs/checkpoints.md",
    "latest_checkpointed_iteration.txt iter_0000100": "of Megatron",
    "mp_rank_00": "of Megatron",
    "lit_model.pth model_config.yaml config.json tokenizer.json": "of LitGPT; litgpt convert_from_litgpt",
    "adapter_config.json adapter_model.safetensors": "an adapter of PEFT, not a whole model",
    "model-q4.gguf": "a GGUF file",
    "consolidated.00.pth params.json tokenizer.model": "of Meta's own release; python -m transformers.models.llama",
    "latest global_step100 zero_to_fp32.py": "of DeepSpeed; its zero_to_fp32.py",
    "model.nemo": "of NeMo",
    "model.pt": "a pickle, which can run any program",
    "model.safetensors": "files of tensors without their config.json",
}


@pytest.mark.parametrize(("names", "what"), FOUND.items())
def test_what_a_folder_holds(tmp_path: Path, names: str, what: str) -> None:
    for name in names.split():
        (tmp_path / name).touch()
    assert what_it_is(tmp_path).startswith(f"is {what}")
    for read in (open_checkpoint, lambda path: import_hf(path, tmp_path / "out")):
        with pytest.raises(UserError) as caught:
            read(tmp_path)
        assert f"is {what}" in str(caught.value) and str(tmp_path) in str(caught.value)
    (only, *more) = names.split()
    if not more:
        assert what_it_is(tmp_path / only).startswith(f"is {what}")


def test_a_run_or_nothing(tmp_path: Path) -> None:
    step = tmp_path / "checkpoints" / "step-000020"
    step.mkdir(parents=True)
    (step / MANIFEST).touch()
    for folder in (tmp_path, tmp_path / "checkpoints"):
        assert what_it_is(folder) == f"is a run, or the folder of its checkpoints; give one of them, {step}"
    assert what_it_is(step) == ""
    assert what_it_is(Path("meta-llama/Llama-3.2-1B")) == (
        "is not there; if it is of the Hub, get it first: hf download meta-llama/Llama-3.2-1B --local-dir FOLDER"
    )
    assert what_it_is(tmp_path / "nowhere") == "is not there"


def test_the_pages_that_are_named_say_so() -> None:
    assert "--format megatron" in (ROOT / "docs" / "checkpoints.md").read_text(encoding="utf-8")
