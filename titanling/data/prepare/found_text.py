"""Text that a machine has anyway: documentation, manuals, translations, the standard library. Free of torch.

Each function yields texts, in an order that depends on nothing but the files, and none where the machine has none.
"""

import ast
import gzip
import hashlib
import random
import re
import string
import struct
import sysconfig
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

from titanling.data.prepare.readers import Reading, Span, read_texts
from titanling.data.prepare.text import STDLIB, find_files

SHARE = Path("/usr/share")
PACKAGES = (Path(sysconfig.get_path("purelib")), Path("/usr/lib/python3/dist-packages"))
CATALOGUE_PIECE = 4000
"""Characters of messages that make a document: a message alone is a line."""
LONGEST = 30_000
"""Characters beyond which a document is cut off."""

_ROFF = (
    (re.compile(r"^\.?'?\\\".*$", re.M), ""),  # comments
    (re.compile(r"^[.'](?:SH|SS|B|I|BR|IR|RB|RI|BI|IB|Nm|Sh|Fl|Ar)\b", re.M), ""),  # macros whose arguments are text
    (re.compile(r"^[.'].*$", re.M), ""),
    (re.compile(r"\\f(?:\[\w*\]|\(..|.)|\\[&%|^/,]|\\s[-+]?\d"), ""),  # fonts, marks without width, sizes
    (re.compile(r"\\\((?:aq|cq|oq)"), "'"),
    (re.compile(r"\\-"), "-"),
    (re.compile(r"\\(?:e|\(rs)"), r"\\"),
    (re.compile(r"\\(?:\[\w*\]|\(..|.)"), " "),
    (re.compile(r"\n\s*\n+"), "\n\n"),
)


def documentation() -> Iterator[str]:
    """What packages say of themselves: /usr/share/doc."""
    names = ("README*", "NEWS*", "*.txt", "*.md", "*.rst", "copyright")
    yield from _read(path for name in names for path in (SHARE / "doc").rglob(name))


def manuals(language: str) -> Iterator[str]:
    """Manual pages in a language, without their markup: /usr/share/man."""
    folder = SHARE / "man" if language == "en" else SHARE / "man" / language
    for text in _read(folder.glob("man[1-8]/*")):
        for pattern, instead in _ROFF:
            text = pattern.sub(instead, text)
        yield text.strip()


def translations(language: str) -> Iterator[str]:
    """Messages of programs in a language, some hundred to a document: compiled gettext catalogues."""
    for path in _by_name(_catalogues()[language]):
        lines: list[str] = []
        for line in _messages(path):
            lines.append(line)
            if sum(map(len, lines)) >= CATALOGUE_PIECE:
                yield "\n".join(lines)
                lines = []
        if lines:
            yield "\n".join(lines)


def topics() -> Iterator[str]:
    """Python's own reference, which comes with its help()."""
    from pydoc_data.topics import topics as known

    yield from (known[name] for name in sorted(known))


def docstrings() -> Iterator[str]:
    """The standard library's docstrings, those of a module together."""
    for code in python_code():
        nodes = ast.walk(ast.parse(code))
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
        found = [text for node in nodes if isinstance(node, kinds) and (text := ast.get_docstring(node))]
        yield "\n\n".join(found)


def python_code() -> Iterator[str]:
    """The standard library's modules."""
    files = {Path(file.path): file for file in find_files([STDLIB])}
    for path in _by_name(files):
        yield from read_texts(Span(files[path]), Reading(), Counter())


def pseudo_text(language: str, alphabet: str) -> Iterator[str]:
    """Endless nonsense in an alphabet: a Markov chain over the words of `topics`, whose letters stand for others.

    It is of no language, but has words, frequencies and sentences, and other ones for each `language`.
    """
    words = re.findall(r"[a-z]+|\.", " ".join(topics()).lower())
    following = defaultdict(list)
    for word, after in zip(words, words[1:], strict=False):
        following[word].append(after)
    choose = random.Random(f"pseudo-text {language}")
    letters = choose.sample(alphabet * 2, len(string.ascii_lowercase))
    table = str.maketrans(string.ascii_lowercase, "".join(letters))
    word = "."
    while True:
        text: list[str] = []
        for _ in range(choose.randrange(100, 800)):
            word = choose.choice(following[word])
            text.append(word)
        yield " ".join(text).replace(" .", ".").translate(table)


def _read(paths: Iterable[Path]) -> Iterator[str]:
    """Those files, plain or .gz, that are UTF-8."""
    for path in _by_name(paths):
        try:
            content = path.read_bytes()
            content = gzip.decompress(content) if path.suffix == ".gz" else content
            yield content.decode("utf-8")[:LONGEST]
        except (OSError, EOFError, ValueError, zlib.error):
            continue


def _by_name(paths: Iterable[Path]) -> list[Path]:
    """In an order that mixes packages: a part of the files is then a sample of all."""
    return sorted(set(paths), key=lambda path: hashlib.sha256(str(path).encode()).digest())


@cache
def _catalogues() -> dict[str, list[Path]]:
    """Language → catalogues, of the system and of Python's packages."""
    found = defaultdict(list)
    for root in (SHARE / "locale", *PACKAGES):
        for path in root.rglob("LC_MESSAGES/*.mo"):
            language = re.split("[_@.]", path.parent.parent.name)[0]
            found[language].append(path)
    return found


def _messages(path: Path) -> Iterator[str]:
    """Translated messages of a .mo file (format: GNU gettext manual, section "MO Files"), in UTF-8 ones only."""
    content = path.read_bytes()
    order = {b"\xde\x12\x04\x95": "<", b"\x95\x04\x12\xde": ">"}.get(content[:4])
    if order is None:
        return
    try:
        count, _, table = struct.unpack_from(f"{order}3I", content, 8)
        places = struct.iter_unpack(f"{order}2I", content[table : table + 8 * count])
        texts = [content[start : start + length].decode("utf-8") for length, start in places]
    except (struct.error, UnicodeDecodeError):
        return
    # The empty message comes first: it is the header. A message of several forms has them behind one another.
    yield from (text.replace("\0", "\n").strip() for text in texts[1:])
