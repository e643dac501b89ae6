"""A small stand-in for the sources of train_configs/, of text that this machine has. Free of torch."""

import hashlib
import json
import os
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from titanling.config.schema import Prepare
from titanling.data.prepare import found_text
from titanling.data.prepare.run import prepare
from titanling.errors import UserError
from titanling.files import new_folder

ALPHABETS = {
    "en": "abcdefghijklmnopqrstuvwxyz",
    "de": "abcdefghijklmnopqrstuvwxyzäöüß",
    "es": "abcdefghijklmnopqrstuvwxyzñáéíóú",
    "fr": "abcdefghijklmnopqrstuvwxyzàâçéèêëîïôûùœ",
    "it": "abcdefghilmnopqrstuvzàèéìòù",
    "pt": "abcdefghijklmnopqrstuvwxyzáâãàçéêíóôõú",
    "nl": "abcdefghijklmnopqrstuvwxyzëïé",
    "pl": "aąbcćdeęfghijklłmnńoóprsśtuwyzźż",
    "cs": "aábcčdďeéěfghiíjklmnňoópqrřsštťuúůvwxyýzž",
    "el": "αβγδεζηθικλμνξοπρσςτυφχψωάέήίόύώ",
    "fi": "abcdefghijklmnopqrstuvwxyzäöå",
    "sv": "abcdefghijklmnopqrstuvwxyzåäö",
    "bg": "абвгдежзийклмнопрстуфхцчшщъьюя",
}
"""Language → letters of its pseudo-text."""
SHORTEST = 200
"""Characters below which a text is left out."""
FEWEST = 4
"""Documents that a source has in any case."""
HELD_OUT = 20
"""One document of so many is kept for validation, of each source at least one."""


class Made(NamedTuple):
    """A source of the stand-in."""

    documents: int
    held_out: int
    bytes: int
    """Of both."""
    origins: dict[str, int]
    """Where the text is from → documents."""


def make_standin(output: str, bytes_per_source: int = 500_000, vocab_size: int = 8192) -> Iterator[str]:
    """Write the text and prepare it, keeping what exists; yield lines that say what was done.

    Below `output`: text/train/SOURCE/ and text/held-out/SOURCE/, a file a document; text/sources.json, where it is
    from; tokenizer/; SOURCE/train and, of all sources together, train and validation (prefixes of token files).
    Sources are web-xx and hq-xx of each language, and code. Raises UserError if something cannot be written.
    """
    text = Path(output) / "text"
    try:
        if not text.exists():
            _write_text(text, bytes_per_source)
        made = {name: Made(**row) for name, row in json.loads((text / "sources.json").read_text("utf-8")).items()}
    except OSError as error:
        raise UserError(f"--output {output}: {error.filename or text}: {error.strerror}; give another folder") from None
    yield from table(made)
    todo = {"train": text / "train", "validation": text / "held-out"}
    todo |= {f"{name}/train": text / "train" / name for name in made}
    for prefix, folder in todo.items():
        settings = Prepare(text=(str(folder),), format="text", vocab_size=vocab_size)
        lines = prepare(settings, os.path.join(output, prefix), None, os.path.join(output, "tokenizer"))
        if prefix in ("train", "validation"):
            yield from lines
    yield f"{output}: {len(made)} sources"


def table(made: dict[str, Made]) -> list[str]:
    """A line for each source: how much text it has and where it is from."""
    lines = [f"{'source':<8} documents  held out       kB  from"]
    for name, source in made.items():
        origins = ", ".join(f"{origin} ({count:,})" for origin, count in source.origins.items())
        counts = f"{source.documents:9,} {source.held_out:9,} {source.bytes / 1000:8,.0f}"
        lines.append(f"{name:<8} {counts}  {origins}")
    return lines


def _write_text(text: Path, limit: int) -> None:
    seen: set[bytes] = set()
    with new_folder(text) as partial:
        made = {name: _write_source(partial, name, origins, limit, seen) for name, origins in _sources().items()}
        rows = {name: source._asdict() for name, source in made.items()}
        (partial / "sources.json").write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
        partial.rename(text)


def _sources() -> dict[str, dict[str, Iterator[str]]]:
    """Name → origins of its text, the better ones first, each with its text."""
    english = {
        "web": {"documentation of packages": found_text.documentation(), "docstrings": found_text.docstrings()},
        "hq": {"Python's reference": found_text.topics(), "manual pages": found_text.manuals("en")},
    }
    sources: dict[str, dict[str, Iterator[str]]] = {}
    for kind in ("web", "hq"):
        for language, alphabet in ALPHABETS.items():
            name = f"{kind}-{language}"
            found = english[kind] if language == "en" else _translated(kind, language)
            sources[name] = found | {"pseudo-text": found_text.pseudo_text(name, alphabet)}
    return sources | {"code": {"Python's standard library": found_text.python_code()}}


def _translated(kind: str, language: str) -> dict[str, Iterator[str]]:
    messages = {"translations": found_text.translations(language)}
    manuals = {"manual pages": found_text.manuals(language)}
    return messages if kind == "web" else manuals | messages


def _write_source(folder: Path, name: str, origins: dict[str, Iterator[str]], limit: int, seen: set[bytes]) -> Made:
    """Take texts up to `limit` bytes, none twice. Pseudo-text only up to a fifth of it, for want of anything else."""
    taken: list[tuple[bytes, str]] = []
    size, counts = 0, dict.fromkeys(origins, 0)
    for origin, text in chain.from_iterable(((origin, text) for text in texts) for origin, texts in origins.items()):
        if len(taken) >= FEWEST and size >= (limit // 5 if origin == "pseudo-text" else limit):
            break
        digest = hashlib.sha256(text.encode()).digest()
        if len(text) >= SHORTEST and digest not in seen:
            seen.add(digest)
            taken.append((digest, text))
            size += len(text.encode())
            counts[origin] += 1
    taken.sort()  # by their hashes: in no order
    held_out = max(1, len(taken) // HELD_OUT)
    for part, texts in (("held-out", taken[:held_out]), ("train", taken[held_out:])):
        (folder / part / name).mkdir(parents=True)
        for number, (_, text) in enumerate(texts):
            (folder / part / name / f"{number:04d}.txt").write_text(text, encoding="utf-8")
    return Made(len(taken) - held_out, held_out, size, {origin: count for origin, count in counts.items() if count})
