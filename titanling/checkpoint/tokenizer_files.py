"""The tokenizer of an exported model: its own files, changed only where they would not give the ids of training."""

import json
from pathlib import Path
from typing import Any, NamedTuple

from titanling.checkpoint.borrowed import copy_own_file, own_file
from titanling.data.prepare.tokenizer import SETTINGS, TokenizerFiles, plain_ids
from titanling.errors import UserError

TOKENIZER = "tokenizer.json"
SPECIAL = "special_tokens_map.json"
FILES = (
    TOKENIZER,
    SETTINGS,
    SPECIAL,
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
)
"""What a Hugging Face directory may have of its tokenizer."""
TEMPLATES = "additional_chat_templates"
"""A folder of further chat templates."""
MOST_BYTES = 1 << 28
"""The largest tokenizers have some 40 MB."""
AS_IT_IS = ("PreTrainedTokenizerFast", "TokenizersBackend")
"""Classes of transformers that take tokenizer.json as it is; the others make anew what they think of it."""


class TokenizerExport(NamedTuple):
    """What becomes of a tokenizer's files."""

    directory: Path
    names: list[str]
    """Files that are copied."""
    changed: dict[str, str]
    """Name → content of those that are written anew."""
    lines: list[str]
    """What is to be said of it."""

    def write(self, folder: Path) -> None:
        """Write them all. Raises UserError, OSError."""
        for name in self.names:
            (folder / name).parent.mkdir(exist_ok=True)
            if name in self.changed:
                (folder / name).write_text(self.changed[name], encoding="utf-8")
            else:
                copy_own_file(self.directory / name, folder / name)


def tokenizer_names(directory: Path) -> list[str]:
    """Names of a directory's tokenizer files. Raises UserError for a link that leads out of it, a pipe or the like."""
    names = [name for name in FILES if own_file(directory / name, MOST_BYTES) is not None]
    more = directory / TEMPLATES
    if more.is_dir():
        if more.is_symlink():
            raise UserError(f"{more}: is a link, which is not followed; copy the folder with cp -rL and give the copy")
        found = sorted(path.name for path in more.iterdir() if path.suffix == ".jinja")
        names += [f"{TEMPLATES}/{name}" for name in found if own_file(more / name, MOST_BYTES) is not None]
    return names


def export_tokenizer(files: TokenizerFiles, bos_id: int | None, trained: bool) -> TokenizerExport:
    """The files for a model whose training text began each document with `bos_id`, or with nothing.

    transformers and tokenizers then encode a text to the ids that it has there, but for the end-of-document token.
    Of a model that was not `trained` here, only cutting and padding is left out. Raises UserError.
    """
    directory = Path(files.folder)
    names, lines = tokenizer_names(directory), []
    changed = {}
    tokenizer = _read(directory / TOKENIZER)
    before = json.dumps(tokenizer)
    for key in ("truncation", "padding"):
        if tokenizer.get(key) is not None:
            tokenizer[key] = None
            lines.append(f"{TOKENIZER}: its {key} is left out: training encodes every text whole")
    if trained and not _gives(files, bos_id):
        begin = "nothing" if bos_id is None else files.tokenizer.id_to_token(bos_id)
        tokenizer["post_processor"] = _post_processor(tokenizer.get("post_processor"), files, bos_id)
        lines.append(f"{TOKENIZER}: puts {begin} before a text and nothing behind it, as in training")
    if json.dumps(tokenizer) != before:
        changed[TOKENIZER] = _text(tokenizer)
    if trained:
        token = None if bos_id is None else files.tokenizer.id_to_token(bos_id)
        for name in {SETTINGS, SPECIAL} & set(names):
            found = _read(directory / name)
            wanted = _settings(found, token) if name == SETTINGS else _with_bos(found, token)
            if wanted != found:
                changed[name] = _text(wanted)
    return TokenizerExport(directory, names, changed, lines)


def _gives(files: TokenizerFiles, bos_id: int | None) -> bool:
    """Whether it encodes texts as training did."""
    begin = [] if bos_id is None else [bos_id]
    return all(
        files.tokenizer.encode(text).ids == begin + plain_ids(files.tokenizer, text) for text in ("", "a", "a b")
    )


def _post_processor(old: Any, files: TokenizerFiles, bos_id: int | None) -> Any:
    """Puts the token of `bos_id` before a text, if any. ByteLevel, which moves offsets only, stays."""
    listed = old.get("processors", [old]) if isinstance(old, dict) else []
    parts = [part for part in listed if isinstance(part, dict) and part.get("type") == "ByteLevel"]
    if bos_id is not None:
        token = files.tokenizer.id_to_token(bos_id)
        single, pair = (
            [{"SpecialToken": {"id": token, "type_id": kind}}, {"Sequence": {"id": name, "type_id": kind}}]
            for kind, name in enumerate("AB")
        )
        special = {token: {"id": token, "ids": [bos_id], "tokens": [token]}}
        parts.append(
            {"type": "TemplateProcessing", "single": single, "pair": [*single, *pair], "special_tokens": special}
        )
    return {"type": "Sequence", "processors": parts} if len(parts) > 1 else parts[0] if parts else None


def _settings(found: dict[str, Any], bos_token: str | None) -> dict[str, Any]:
    """tokenizer_config.json with which transformers does what tokenizer.json says."""
    wanted = dict(found)
    if found.get("tokenizer_class") not in AS_IT_IS:
        wanted["tokenizer_class"] = AS_IT_IS[0]
        for key in ("auto_map", "add_prefix_space"):  # code of its own, and what tokenizer.json says itself
            wanted.pop(key, None)
    if bos_token is not None or "add_bos_token" in found:
        wanted["add_bos_token"] = bos_token is not None
    if "add_eos_token" in found:
        wanted["add_eos_token"] = False
    return _with_bos(wanted, bos_token)


def _with_bos(found: dict[str, Any], token: str | None) -> dict[str, Any]:
    old = found.get("bos_token")
    named = old.get("content") if isinstance(old, dict) else old
    return found if token is None or named == token else found | {"bos_token": token}


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    if not isinstance(found, dict):
        raise UserError(f"{path}: must hold a JSON object")
    return found


def _text(value: dict[str, Any]) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"
