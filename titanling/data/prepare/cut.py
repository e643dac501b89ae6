"""Divides few documents by their tokens, where by whole documents a split would be empty."""

import os
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from titanling.data.indexed import DTYPES, dtype_code
from titanling.data.prepare.parts import SPLITS, read_array, read_counts, read_lines
from titanling.data.prepare.tokenizer import TokenizerFiles
from titanling.errors import UserError

LOOK = 256
"""Tokens among which the end of a line is looked for."""


class Half(NamedTuple):
    """The documents of a split."""

    tokens: np.ndarray
    """Of all of them, each with its end-of-document token."""
    lengths: np.ndarray
    """Of each: (documents,)."""
    bytes: int
    """Length of the text in UTF-8."""
    names: list[str]
    """Of each, as in the parts."""


def cut_by_tokens(
    parts: Sequence[str], fraction: float, files: TokenizerFiles, bos_id: int | None = None
) -> dict[str, Half]:
    """All documents of the parts, of which validation gets the last `fraction` of the tokens, and training the others.

    Between two documents where that comes near enough, else within one, behind a line if there is one.
    Each part of a document is closed and, with `bos_id`, begun. Raises `UserError` if there is not a token for each.
    """
    dtype = DTYPES[dtype_code(files.vocab_size)]
    at = [(part, split) for part in parts for split in SPLITS]
    tokens = np.concatenate([read_array(part, f"{split}.bin", dtype) for part, split in at])
    lengths = np.concatenate([read_array(part, f"{split}.lengths", "<i4") for part, split in at])
    names = [name for part, split in at for name in read_lines(part, split)]
    size = sum(read_counts(part)["splits"][split]["bytes"] for part, split in at)
    wanted = min(len(tokens) - 2, max(1, round(len(tokens) * fraction)))
    starts = np.cumsum(lengths) - lengths
    nearest = int(np.abs(starts - (len(tokens) - wanted)).argmin())
    near = nearest and abs(len(tokens) - int(starts[nearest]) - wanted) <= wanted / 2
    within = None if near else _place(tokens, len(tokens) - wanted, starts, files, bos_id is not None)
    if within is None and not nearest:
        raise UserError(
            f"data.prepare.text: its {len(starts)} documents have {len(tokens)} tokens, too few to keep some for"
            " validation; give more text, or set data.prepare.validation_fraction = 0 (--validation-fraction 0) and no"
            " data.validation"
        )
    if within is None:
        place, ending = int(starts[nearest]), tokens[:0]
        first, last = nearest, nearest
    else:
        place = within
        first = int(np.searchsorted(starts, place, side="right"))
        last, ending = first - 1, np.array([files.eod_id], dtype)
    behind = lengths[last:].copy()
    behind[0] -= place - starts[last]
    before = lengths[:first].copy()
    if len(ending):
        before[-1] = place - starts[last] + 1
    kept = tokens[place:]
    if bos_id is not None and len(ending):
        kept = np.concatenate([np.array([bos_id], tokens.dtype), kept])
        behind[0] += 1
    size_behind = _bytes(kept, behind, files, bos_id)
    return {
        "training": Half(np.concatenate([tokens[:place], ending]), before, size - size_behind, names[:first]),
        "validation": Half(kept, behind, size_behind, names[last:]),
    }


def _place(tokens: np.ndarray, place: int, starts: np.ndarray, files: TokenizerFiles, begun: bool) -> int | None:
    """Where in a document to cut: near a place, behind the end of a line, else where no character is cut.

    None if the document is a single token.
    """
    document = int(np.searchsorted(starts, place, side="right")) - 1
    begin = int(starts[document]) + 1 + begun
    end = int(starts[document + 1]) - 1 if document + 1 < len(starts) else len(tokens) - 1
    if end <= begin:
        return None
    place = min(max(place, begin), end - 1)
    near = range(max(begin, place - LOOK), min(end, place + LOOK))
    words = {cut: files.tokenizer.decode([int(tokens[cut - 1])]) for cut in near}
    lines = [cut for cut in near if words[cut].endswith("\n")]
    whole = [cut for cut in near if "\ufffd" not in words[cut]]
    return min(lines or whole or [place], key=lambda cut: abs(cut - place))


def _bytes(tokens: np.ndarray, lengths: np.ndarray, files: TokenizerFiles, bos_id: int | None) -> int:
    """Length in UTF-8 of what the documents say."""
    size = 0
    for ids in np.split(tokens, np.cumsum(lengths)[:-1]):
        words = ids[int(bos_id is not None) : -1].tolist()
        size += len(files.tokenizer.decode(words, skip_special_tokens=False).encode())
    return size


def write_names(half: Half, folder: str, split: str) -> str:
    """Write the names to a file in a folder; its path."""
    path = os.path.join(folder, f"{split}.cut.ids")
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(f"{name}\n" for name in half.names)
    return path
