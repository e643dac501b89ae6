"""Names of documents: PREFIX.ids.jsonl, beside token files, holds the name of document n (from 0) in line n + 1.

Each line is JSON, a string or a whole number, as data.prepare.id_field has found it. Free of torch.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from titanling.errors import UserError
from titanling.files import new_file

BLOCK = 1 << 24


def ids_path(prefix: str) -> str:
    """Where the names of a prefix's documents are."""
    return f"{prefix}.ids.jsonl"


def has_ids(prefix: str) -> bool:
    """Whether the documents have names."""
    return os.path.exists(ids_path(prefix))


def write_ids(prefix: str, inputs: Sequence[str]) -> str | None:
    """Join files of names to that of a prefix, which appears whole; its SHA-256. With no inputs, there is none."""
    if not inputs:
        Path(ids_path(prefix)).unlink(missing_ok=True)  # of a run that was killed and had another id_field
        return None
    digest = hashlib.sha256()
    with new_file(Path(ids_path(prefix))) as file:
        for path in inputs:
            for block in _blocks(path):
                file.write(block)
                digest.update(block)
    return digest.hexdigest()


def read_ids(prefix: str, documents: Sequence[int]) -> list[str | int]:
    """The names of documents. Reads the file up to the last of them. Raises `UserError` if it has fewer lines."""
    found: dict[int, str | int] = {}
    wanted, passed, begun = sorted(set(documents)), 0, b""
    for block in _blocks(ids_path(prefix)):
        if len(found) == len(wanted):
            break
        ends = np.flatnonzero(np.frombuffer(block, np.uint8) == ord("\n"))
        while len(found) < len(wanted) and wanted[len(found)] < passed + len(ends):
            line = wanted[len(found)] - passed
            start = int(ends[line - 1]) + 1 if line else 0
            try:
                found[wanted[len(found)]] = json.loads((b"" if line else begun) + block[start : int(ends[line])])
            except (ValueError, RecursionError) as error:
                raise UserError(
                    f"{ids_path(prefix)}:{wanted[len(found)] + 1}: damaged ({' '.join(str(error).split())}); restore it"
                ) from None
        passed += len(ends)
        begun = block[int(ends[-1]) + 1 :] if len(ends) else begun + block
    if len(found) < len(wanted):
        raise UserError(f"{ids_path(prefix)}: has {passed} lines, none for document {wanted[-1]}; prepare it again")
    return [found[document] for document in documents]


def documents_named(id: str, prefixes: Sequence[str], what: str, asked: str) -> list[list[int]]:
    """Of each prefix the documents that have this name. `what` they are of and what was `asked` are for messages.

    Raises `UserError` if none has it, or none has any name.
    """
    if not any(map(has_ids, prefixes)):
        raise UserError(
            f"{asked}: the documents of {what} have no names; prepare it with data.prepare.id_field (--id-field), or"
            " give --document"
        )
    found = [find_id(prefix, id) if has_ids(prefix) else [] for prefix in prefixes]
    if not any(found):
        raise UserError(f"{asked}: no document of {what} has this name")
    return found


def find_id(prefix: str, name: str) -> list[int]:
    """The documents of a name, a string or a whole number. Reads the file whole."""
    lines = {json.dumps(name, ensure_ascii=False).encode()}
    if name.lstrip("-").isdecimal():
        lines.add(name.encode())
    found, passed, begun = [], 0, b""
    for block in _blocks(ids_path(prefix)):
        whole, newline, begun = (begun + block).rpartition(b"\n")
        if not newline:
            continue
        for line in lines:
            found += [passed + number for number in _lines_equal(whole, line)]
        passed += whole.count(b"\n") + 1
    return sorted(found)


def _lines_equal(text: bytes, line: bytes) -> Iterator[int]:
    """Numbers of the lines of a text, without its last newline, that are this one."""
    framed, wanted = b"\n%s\n" % text, b"\n%s\n" % line
    number = counted = 0
    place = framed.find(wanted)
    while place >= 0:
        number += framed.count(b"\n", counted, place)
        yield number
        counted = place
        place = framed.find(wanted, place + 1)


def _blocks(path: str) -> Iterator[bytes]:
    with open(path, "rb") as file:
        while block := file.read(BLOCK):
            yield block
