"""Training, generation and the exported model give a text the same ids, whatever tokenizer and template it is."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from conversion_helpers import write_checkpoint
from helpers import TinyData
from model_helpers import SHAPES, random_model
from tokenizers import Tokenizer
from tokenizers_of_others import TEXTS, make_byte_tokenizer, make_llama_tokenizer
from transformers import AutoTokenizer

from titanling.checkpoint.export import export_to_hf
from titanling.checkpoint.weights import text_ends
from titanling.config.schema import Prepare
from titanling.data.indexed import IndexedDataset, read_sidecar
from titanling.data.prepare.run import prepare
from titanling.data.prepare.tokenizer import load_tokenizer

LONG = TEXTS[0] * 9
MAKERS: dict[str, Callable[..., str]] = {"byte-level": make_byte_tokenizer, "llama": make_llama_tokenizer}
CASES = {
    "byte-level": {},
    "byte-level, as GPT-2's": {"tokenizer_class": "GPT2TokenizerFast"},
    "byte-level, adds both, cuts": {"template": "both", "cuts": True, "add_bos_token": True, "add_eos_token": True},
    "llama": {},
    "llama, adds nothing": {"template": "plain"},
    "llama, adds </s>, cuts": {"template": "eos", "cuts": True},
    "llama, adds both": {"template": "both", "add_bos_token": True, "add_eos_token": True},
    "llama, of no class": {"tokenizer_class": "unset"},
}


def text_files(folder: Path) -> str:
    folder.mkdir()
    for number, text in enumerate((*TEXTS, LONG)):
        (folder / f"{number}.txt").write_text(text)
    return str(folder)


@pytest.mark.parametrize("add_bos", [False, True], ids=["without BOS", "with BOS"])
@pytest.mark.parametrize("case", CASES)
def test_the_same_ids_everywhere(case: str, add_bos: bool, tmp_path: Path, tiny_data: TinyData) -> None:
    tokenizer = MAKERS[case.partition(",")[0]](tmp_path / "tokenizer", **CASES[case])
    settings = Prepare(text=(text_files(tmp_path / "text"),), add_bos=add_bos)
    said = prepare(settings, str(tmp_path / "train"), None, tokenizer)
    files, sidecar, data = (
        load_tokenizer(tokenizer),
        read_sidecar(f"{tmp_path}/train"),
        IndexedDataset(f"{tmp_path}/train"),
    )
    assert sidecar.bos_id == (files.bos_id if add_bos else None)
    assert any("begin without it" in line for line in said) == (not add_bos and files.adds_bos)
    documents = {"eod_id": sidecar.eod_id, "bos_id": sidecar.bos_id, "tokenizer_sha256": sidecar.tokenizer_sha256}
    run = {"model.hf_assets_path": tokenizer}
    model = random_model(replace(SHAPES["untied"], vocab_size=400))
    checkpoint = write_checkpoint(tmp_path / "run", model, tiny_data, changes=run, state={"documents": documents})
    lines: list[str] = []
    export_to_hf(checkpoint, tmp_path / "hf", say=lines.append)
    theirs = AutoTokenizer.from_pretrained(tmp_path / "hf")
    exported = Tokenizer.from_file(f"{tmp_path}/hf/tokenizer.json")
    ends = text_ends({"documents": documents}, files)
    for number, text in enumerate((*TEXTS, LONG)):
        ids = data.document(number)[:-1].tolist()
        if "<s>" not in text:  # written out, they are special in a prompt, and text in training
            assert (
                files.encode_prompt(text, ends.bos_id) == exported.encode(text).ids == theirs(text)["input_ids"] == ids
            )
        assert theirs(text, split_special_tokens=True)["input_ids"] == ids
    assert any("left out" in line for line in lines) == CASES[case].get("cuts", False)
    assert ends.stop_ids == [files.eod_id] == [theirs.eos_token_id]


@pytest.mark.parametrize("name", MAKERS)
def test_a_prompt_and_its_continuation_read_as_one_text(name: str, tmp_path: Path) -> None:
    files = load_tokenizer(MAKERS[name](tmp_path))
    for text in TEXTS[:3]:
        ids = files.encode_prompt(text, files.bos_id)
        assert ids[0] == files.bos_id
        for cut in range(1, len(ids)):
            before = files.tokenizer.decode(ids[:cut]).rstrip("\ufffd")  # a part of a character
            assert before + files.continuation(ids[:cut], ids[cut:]) == text
            assert text.startswith(
                before + files.continuation(ids[:cut], ids[cut:-1]).rstrip("\ufffd")
            )  # or ends within one


def test_prompts(tmp_path: Path) -> None:
    files = load_tokenizer(make_llama_tokenizer(tmp_path))
    assert files.encode_prompt("", None) == [files.eod_id]  # behind which a document begins
    assert files.encode_prompt("", 1) == [1]
    assert files.encode_prompt("<s>a", 1) == files.encode_prompt("a", 1)  # not twice
    assert files.encode_prompt("a", None)[0] != 1


@pytest.mark.parametrize("case", CASES)
def test_a_converted_model_keeps_the_ways_of_its_tokenizer(case: str, tmp_path: Path) -> None:
    """Nobody here has trained it: its own template says how texts begin."""
    files = load_tokenizer(MAKERS[case.partition(",")[0]](tmp_path, **CASES[case]))
    begins = CASES[case].get("template", "bos" if "llama" in case else "plain") in ("bos", "both")
    assert text_ends({"converted_from": "x", "origin": {"from": "x"}}, files).bos_id == (
        files.bos_id if begins else None
    )
    assert text_ends({"step": 1}, files).bos_id is None  # trained before there was a choice: without
