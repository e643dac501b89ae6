"""Reads and writes tokenizers: directories in Hugging Face's layout."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from titanling.data.indexed import file_sha256, sync_folder
from titanling.errors import UserError
from titanling.files import new_folder

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
    folder: str = "the tokenizer"
    """Where it is."""

    @property
    def adds_bos(self) -> bool:
        """Whether the tokenizer by itself begins a text with its bos_token; encoding here never does."""
        asked = _settings(self.folder).get("add_bos_token")  # where it is said, transformers goes by it
        does = self.tokenizer.encode("a").ids[:1] == [self.bos_id]
        return self.bos_id is not None and (asked if isinstance(asked, bool) else does)

    def document_bos(self) -> int:
        """The id that documents begin with under data.prepare.add_bos. Raises `UserError` if it can have none."""
        settings = os.path.join(self.folder, SETTINGS)
        if self.bos_id is None:
            raise UserError(
                f"data.prepare.add_bos = true: {settings} names no bos_token of this tokenizer; add it, or set add_bos"
                " = false"
            )
        if self.bos_id == self.eod_id:
            raise UserError(
                f"data.prepare.add_bos = true: in {settings} bos_token is eos_token, which stands between documents"
                " anyway; set add_bos = false"
            )
        return self.bos_id

    def bos_note(self) -> str | None:
        """What to say of documents that begin without bos_token, if the tokenizer itself would begin them with it."""
        if not self.adds_bos:
            return None
        return (
            f"{self.folder}: by itself this tokenizer begins texts with its bos_token; these documents begin without it"
            " (data.prepare.add_bos = true begins them so), and so will generation and export"
        )

    def encode_prompt(self, text: str, bos_id: int | None) -> list[int]:
        """The ids of a text to be continued, as those of a document in training; never none.

        `bos_id`: what documents began with there, if anything. Special tokens that the text writes out are taken as
        such.
        """
        ids = plain_ids(self.tokenizer, text)
        if bos_id is not None and ids[:1] != [bos_id]:
            ids = [bos_id, *ids]
        return ids or [self.eod_id]  # after which, in training, the next document begins

    def continuation(self, prompt: list[int], new: list[int]) -> str:
        """The text of ids that follow those of a prompt.

        Both are decoded together and the prompt's text is cut off: by themselves they would lose the space that some
        decoders strip from the beginning, and characters whose bytes are divided between the two.
        """
        before, whole = self.tokenizer.decode(prompt), self.tokenizer.decode([*prompt, *new])
        return whole[len(os.path.commonprefix([before, whole])) :]


def load_tokenizer(directory: str) -> TokenizerFiles:
    """Load a Hugging Face tokenizer directory (tokenizer.json, tokenizer_config.json). Raises `UserError`."""
    tokenizer = read_tokenizer(directory)
    eod_id, bos_id = (_special_id(tokenizer, directory, key) for key in ("eos_token", "bos_token"))
    if eod_id is None:
        settings = os.path.join(directory, SETTINGS)
        raise UserError(f"{settings}: names no eos_token of this tokenizer, which must close each document; add it")
    sha256, size = tokenizer_sha256(directory), vocabulary_size(tokenizer)
    return TokenizerFiles(tokenizer, sha256, size, eod_id, bos_id, directory)


def read_tokenizer(directory: str) -> Tokenizer:
    """The tokenizer.json of a directory, which shall cut and pad nothing. Raises `UserError`."""
    path = os.path.join(directory, "tokenizer.json")
    if not os.path.isfile(path):
        raise UserError(f"{path}: no such file; give the folder that holds it (model.hf_assets_path)")
    try:
        tokenizer = Tokenizer.from_file(path)
    except Exception as error:  # the library raises plain Exception
        raise UserError(f"{path}: not a tokenizer ({error}); give the folder of one (model.hf_assets_path)") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def encode_plainly(tokenizer: Tokenizer) -> None:
    """Have it encode the whole of every text, and special tokens that a text mentions as any other text."""
    tokenizer.encode_special_tokens = True
    tokenizer.no_truncation()
    tokenizer.no_padding()


def plain_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """The ids of a text and of nothing else: no token that a template puts before or behind it."""
    return tokenizer.encode(text, add_special_tokens=False).ids


def special_ids(directory: str) -> tuple[int | None, int | None]:
    """Ids of a directory's eos_token and bos_token; None for what it does not name. Raises `UserError`."""
    tokenizer = read_tokenizer(directory)
    return _special_id(tokenizer, directory, "eos_token"), _special_id(tokenizer, directory, "bos_token")


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
    token = _settings(directory).get(key)
    token = token.get("content") if isinstance(token, dict) else token
    return tokenizer.token_to_id(token) if isinstance(token, str) else None


def _settings(directory: str) -> dict[str, Any]:
    """What tokenizer_config.json says; nothing if it cannot be read."""
    path = Path(directory, SETTINGS)
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None  # a pipe never ends
    except (OSError, ValueError, RecursionError):
        found = None
    return found if isinstance(found, dict) else {}


def _write_directory(directory: str, files: dict[str, str]) -> None:
    with new_folder(Path(directory)) as partial:
        for name, text in files.items():
            with open(partial / name, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
        os.rename(partial, directory)
    sync_folder(directory)
