"""Trains a byte-level BPE tokenizer and reads tokenizers: directories in Hugging Face's layout."""

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from titanling.data.indexed import file_sha256, sync_folder
from titanling.errors import UserError

BEGIN_OF_TEXT = "<|begin_of_text|>"
END_OF_TEXT = "<|end_of_text|>"
SETTINGS = "tokenizer_config.json"


@dataclass(frozen=True)
class TokenizerFiles:
    """A tokenizer directory, loaded."""

    tokenizer: Tokenizer
    sha256: str
    """SHA-256 of tokenizer.json."""
    vocab_size: int
    """Largest token id + 1, special tokens included."""
    eod_id: int
    """Id of the tokenizer's eos_token, which closes each document."""
    bos_id: int | None
    """Id of its bos_token, if it has one."""


def train_tokenizer(texts: Iterator[str], vocab_size: int, directory: str) -> None:
    """Train byte-level BPE with `vocab_size` tokens (fewer if the text is short) and save it as `directory`.

    A directory that transformers' AutoTokenizer loads; it appears whole or not at all. The same texts in the same
    order give the same bytes. Encoding adds no special tokens.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BEGIN_OF_TEXT, END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    special = {"bos_token": BEGIN_OF_TEXT, "eos_token": END_OF_TEXT}
    settings = special | {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": 131072,
        "clean_up_tokenization_spaces": False,
    }
    files = {
        "tokenizer.json": tokenizer.to_str(pretty=True),
        SETTINGS: json.dumps(settings, indent=2) + "\n",
        "special_tokens_map.json": json.dumps(special, indent=2) + "\n",
    }
    _write_directory(directory, files)


def load_tokenizer(directory: str) -> TokenizerFiles:
    """Load a Hugging Face tokenizer directory (tokenizer.json, tokenizer_config.json). Raises `UserError`."""
    path = os.path.join(directory, "tokenizer.json")
    if not os.path.isfile(path):
        raise UserError(f"{path}: no such file; correct model.hf_assets_path")
    try:
        tokenizer = Tokenizer.from_file(path)
    except Exception as error:  # the library raises plain Exception
        raise UserError(f"{path}: not a tokenizer ({error}); correct model.hf_assets_path") from None
    vocab_size = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
    eod_id, bos_id = (_special_id(tokenizer, directory, key) for key in ("eos_token", "bos_token"))
    if eod_id is None:
        settings = os.path.join(directory, SETTINGS)
        raise UserError(f"{settings}: names no eos_token of this tokenizer, which must close each document; add it")
    return TokenizerFiles(tokenizer, tokenizer_sha256(directory), vocab_size, eod_id, bos_id)


def tokenizer_sha256(directory: str) -> str:
    """SHA-256 of the directory's tokenizer.json, as sidecars record it."""
    return file_sha256(os.path.join(directory, "tokenizer.json"))


def _special_id(tokenizer: Tokenizer, directory: str, key: str) -> int | None:
    try:
        token = json.loads(Path(directory, SETTINGS).read_text(encoding="utf-8"))[key]
        token = token["content"] if isinstance(token, dict) else token
    except (OSError, ValueError, KeyError, TypeError):
        token = None
    return tokenizer.token_to_id(token) if isinstance(token, str) else None


def _write_directory(directory: str, files: dict[str, str]) -> None:
    partial = Path(f"{directory.rstrip('/')}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        for name, text in files.items():
            with open(partial / name, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
        os.rename(partial, directory)
    except OSError:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    sync_folder(str(partial))
