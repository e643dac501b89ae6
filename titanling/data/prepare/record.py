"""What token files were prepared by: kept in their sidecars, and compared with what the settings say later.

Settings that were edited behind finished files would be recorded by the run and have no effect.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from typing import Any

from titanling.config.schema import Prepare
from titanling.data.identity import sample_file
from titanling.data.prepare.text import TextFile
from titanling.errors import UserError

COMPARED = (
    "format",
    "text_field",
    "id_field",
    "document_separator",
    "max_document_bytes",
    "skip_bad",
    "vocab_size",
    "validation_fraction",
    "language",
    "filters",
)
"""Settings that decide what the files hold."""
NOT_COMPARED = {
    "add_bos": "the sidecar's bos_id says it",
    "text": "its files are compared, wherever they lie",
    "workers": "the files are the same",
    "backend": "the files are the same",
}
"""Other settings, and why they may change."""
SAMPLED = 16
"""Files whose content is looked at, in samples. Of all others the name and the size are compared."""

Record = dict[str, Any]


def new_record(settings: Prepare, files: Sequence[TextFile] | None, fraction: float, vocabulary: int | None) -> Record:
    """What decides the content of token files. `vocabulary`: the size of a tokenizer trained for them.

    `files`: None if they are not there any more. Raises OSError.
    """
    chosen = settings.model_dump(mode="json", include=set(COMPARED))
    # What is unset is left out, so that keys of later versions compare as unset with the records of earlier ones.
    defaults = Prepare().model_dump(mode="json")
    chosen = {key: value for key, value in chosen.items() if value != defaults[key]}
    chosen |= {"validation_fraction": fraction, "vocab_size": vocabulary}
    return {"settings": chosen, "text": None if files is None else _text(files)}


def _text(files: Sequence[TextFile]) -> Record:
    """The files without the standard library, which is the machine's: names, sizes and samples, not where they lie."""
    files = [file for file in files if not file.lenient]
    bases: dict[str, list[str]] = {}
    for file in files:
        bases.setdefault(file.source, []).append(os.path.dirname(os.path.abspath(file.path)))
    above = {source: os.path.commonpath(folders) for source, folders in bases.items()}
    digest = hashlib.sha256()
    for file in files:
        name = os.path.relpath(os.path.abspath(file.path), above[file.source])
        digest.update(json.dumps([file.name, name, file.bytes]).encode())
    for file in files[:: max(1, -(-len(files) // SAMPLED))]:
        digest.update(sample_file(file.path).encode())
    return {"files": len(files), "bytes": sum(file.bytes for file in files), "sha256": digest.hexdigest()}


def check_record(prefix: str, record: Record, now: Record, has_validation: bool) -> None:
    """Raise `UserError` if token files were prepared by other settings, or from other text, than a config says now.

    `now`: what `new_record` says with the config's vocabulary, its text None if that is no longer there.
    """
    before, after = record["settings"], now["settings"]
    defaults = Prepare().model_dump(mode="json")
    for key in COMPARED:
        old, new = (each.get(key, defaults.get(key)) for each in (before, after))
        if key == "vocab_size" and before.get(key) is None:
            continue  # the tokenizer was there
        if key == "validation_fraction" and not has_validation:
            continue  # what was kept aside is not read
        if old != new:
            raise _changed(prefix, f"data.prepare.{key} = {_short(old)}, and now it is {_short(new)}", key)
    if now["text"] is not None and record["text"] != now["text"]:
        old, new = (f"{each['files']:,} files of {each['bytes']:,} bytes" for each in (record["text"], now["text"]))
        what = (
            f"{old}, and data.prepare.text finds {new}" if old != new else f"{old}, whose names or content are others"
        )
        raise _changed(prefix, what, "text")


def _changed(prefix: str, what: str, key: str) -> UserError:
    tokenizer = ", model.hf_assets_path" if key == "vocab_size" else ""
    return UserError(
        f"{prefix}: was prepared {'from' if key == 'text' else 'with'} {what}; restore that, or give data.train,"
        f" data.validation{tokenizer} (--output) new names to prepare anew, or set data.prepare.text = [] to use the"
        " files as they are"
    )


def _short(value: Any) -> str:
    text = "unset" if value is None else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:59]}…"
