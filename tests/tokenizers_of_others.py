"""Tokenizers as other people's models have them: byte-level, or like Llama 2's, each with what may spoil its ids."""

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, trainers

from titanling.data.prepare.train import train_tokenizer

TEXTS = (
    "the rain falls on the roof",
    "a model learns, Ääkköset 日本語 🦀",
    "  two  spaces\nand a line",
    "so <s>it</s> is",
)
LLAMA = {"tokenizer_class": "LlamaTokenizerFast", "legacy": False, "add_prefix_space": None}
CUTS = {
    "truncation": {"direction": "Right", "max_length": 5, "strategy": "LongestFirst", "stride": 0},
    "padding": {
        "strategy": {"Fixed": 9},
        "direction": "Left",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "<s>",
    },
}
"""Truncation and padding, as a tokenizer.json may hold them."""
TEMPLATES = {"plain": (False, False), "bos": (True, False), "eos": (False, True), "both": (True, True)}
"""Name → whether the template puts <s> before a text and </s> behind it."""


def make_llama_tokenizer(folder: Path, template: str = "bos", cuts: bool = False, **settings: Any) -> str:
    """A tokenizer like Llama 2's of 400 tokens (▁ for spaces, bytes for what it does not know); its directory."""
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=140, show_progress=False, special_tokens=["<unk>", "<s>", "</s>"])
    trained = Tokenizer(models.BPE(unk_token="<unk>"))
    trained.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trained.train_from_iterator(TEXTS[:1] * 9, trainer)
    model = json.loads(trained.to_str())["model"]
    learned = [token for token in sorted(model["vocab"], key=model["vocab"].__getitem__) if token not in SPECIAL]
    vocab = {token: number for number, token in enumerate([*SPECIAL, *byte_tokens, *learned])}
    merges = [tuple(merge) for merge in model["merges"]]
    made = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    made.normalizer = trained.normalizer
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    made.decoder = decoders.Sequence(parts)
    made.add_special_tokens(list(SPECIAL))
    return _write(folder, json.loads(made.to_str()), template, cuts, LLAMA | {"unk_token": "<unk>"} | settings, 1, 2)


def make_byte_tokenizer(folder: Path, template: str = "plain", cuts: bool = False, **settings: Any) -> str:
    """A byte-level tokenizer of 300 tokens; its directory."""
    train_tokenizer(list(TEXTS) * 5, 300, str(folder / "trained"))
    tokenizer = json.loads((folder / "trained/tokenizer.json").read_text())
    for token in tokenizer["added_tokens"]:
        tokenizer["model"]["vocab"].pop(token["content"])
        token["content"] = SPECIAL[token["id"] + 1]
        tokenizer["model"]["vocab"][token["content"]] = token["id"]
    tokenizer["post_processor"] = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True}
    return _write(folder, tokenizer, template, cuts, {"tokenizer_class": "PreTrainedTokenizerFast"} | settings, 0, 1)


SPECIAL = ("<unk>", "<s>", "</s>")


def _write(folder: Path, tokenizer: Any, template: str, cuts: bool, settings: Any, bos: int, eos: int) -> str:
    begins, ends = TEMPLATES[template]
    if begins or ends:
        marks = [{"SpecialToken": {"id": token, "type_id": 0}} for token in ("<s>", "</s>")]
        single = [*marks[:begins], {"Sequence": {"id": "A", "type_id": 0}}, *marks[1:][:ends]]
        special = {t: {"id": t, "ids": [number], "tokens": [t]} for t, number in (("<s>", bos), ("</s>", eos))}
        added = {"type": "TemplateProcessing", "single": single, "pair": [*single, *_second(single)]}
        added["special_tokens"] = special
        before = tokenizer["post_processor"]
        both = {"type": "Sequence", "processors": [before, added]}
        tokenizer["post_processor"] = both if before else added
    tokenizer |= CUTS if cuts else {}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    settings = {"bos_token": "<s>", "eos_token": "</s>"} | settings
    (folder / "tokenizer_config.json").write_text(json.dumps({k: v for k, v in settings.items() if v != "unset"}))
    return str(folder)


def _second(single: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same for the second text of a pair."""
    kinds = ((kind, its) for part in single for kind, its in part.items())
    return [{kind: its | {"type_id": 1} | ({"id": "B"} if kind == "Sequence" else {})} for kind, its in kinds]
