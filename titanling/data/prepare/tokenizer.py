"""Reads and writes tokenizers: directories in Hugging Face's layout."""

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from titanling.data.indexed import file_sha256, sync_folder
from titanling.errors import UserError

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


def load_tokenizer(directory: str) -> TokenizerFiles:
    """Load a Hugging Face tokenizer directory (tokenizer.json, tokenizer_config.json). Raises `UserError`."""
    tokenizer = read_tokenizer(directory)
    eod_id, bos_id = (_special_id(tokenizer, directory, key) for key in ("eos_token", "bos_token"))
    if eod_id is None:
        settings = os.path.join(directory, SETTINGS)
        raise UserError(f"{settings}: names no eos_token of this tokenizer, which must close each document; add it")
    return TokenizerFiles(tokenizer, tokenizer_sha256(directory), vocabulary_size(tokenizer), eod_id, bos_id)


def read_tokenizer(directory: str) -> Tokenizer:
    """The tokenizer.json of a directory. Raises `UserError`."""
    path = os.path.join(directory, "tokenizer.json")
    if not os.path.isfile(path):
        raise UserError(f"{path}: no such file; give the folder that holds it (model.hf_assets_path)")
    try:
        return Tokenizer.from_file(path)
    except Exception as error:  # the library raises plain Exception
        raise UserError(f"{path}: not a tokenizer ({error}); give the folder of one (model.hf_assets_path)") from None


def encode_plainly(tokenizer: Tokenizer) -> None:
    """Have it encode the whole of every text, and special tokens that a text mentions as any other text."""
    tokenizer.encode_special_tokens = True
    tokenizer.no_truncation()
    tokenizer.no_padding()


def vocabulary_size(tokenizer: Tokenizer) -> int:
    """Largest token id + 1, special tokens included."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1


def save_tokenizer(tokenizer: Tokenizer, directory: str, settings: dict[str, Any]) -> None:
    """Write `tokenizer` and its tokenizer_config.json, `settings`, as `directory`, which appears whole or not at all.

    Raises OSError if it exists and is not empty.
    """
    special = {key: token for key, token in settings.items() if key.endswith("_token")}
    settings = settings | {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    files = {
        "tokenizer.json": tokenizer.to_str(pretty=True),
        SETTINGS: json.dumps(settings, indent=2, ensure_ascii=False) + "\n",
        "special_tokens_map.json": json.dumps(special, indent=2, ensure_ascii=False) + "\n",
    }
    _write_directory(directory, files)


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
