"""Token ids that no model has, found in each batch before it is trained on, and traced to their file. Free of torch."""

from collections.abc import Callable
from typing import NoReturn

import numpy as np

from titanling.data.packing import NO_LABEL, Arrays
from titanling.data.sources import MixedSource, WindowSource
from titanling.data.token_files import Tokens, tokens_path
from titanling.errors import UserError


def check_ids(
    batch: Arrays, vocab_size: int, place_of: Callable[[int, int], tuple[Tokens, int, str]], whole: bool = True
) -> None:
    """Raise UserError if a batch holds an id that is not below `vocab_size`, or a negative one.

    `whole`: the labels are the inputs, one ahead, so of those only the last in each row need to be looked at.
    `place_of` finds it then: of (row, place in the row, one more than inputs for the last label) the file, the offset
    in it and, in words, what the row is.
    """
    ids, labels = batch["input_ids"], batch["labels"]
    unseen = labels[:, -1] if whole else labels[labels != NO_LABEL]
    # Seen as unsigned, a negative one is beyond all.
    if all(each.view(np.uint64).max(initial=0) < vocab_size for each in (ids, unseen)):
        return
    for array, ahead in ((ids, 0), (labels, 1)):
        wrong = (array >= vocab_size) | ((array < 0) & (array != NO_LABEL if ahead else True))
        if wrong.any():
            row, place = np.argwhere(wrong)[0].tolist()
            dataset, offset, what = place_of(row, place + ahead)
            _refuse(dataset, offset, int(array[row, place]), vocab_size, what)


def place_of_sample(source: MixedSource | WindowSource, sample: int, place: int) -> tuple[Tokens, int, str]:
    """The file and the offset in it of a token of a sample."""
    number = sample
    if isinstance(source, MixedSource):
        sources, numbers = source.mixture.locate(np.array([sample]))
        source, number = source.sources[int(sources[0])], int(numbers[0])
    parts = source.parts(int(source.window_of(number)))
    before = 0
    for part in parts:
        if place <= before + part.tokens and (place < before + part.tokens or part is parts[-1]):
            break
        before += part.tokens
    return part.dataset, part.start + place - before, f"sample {sample:,} of the run"


def _refuse(dataset: Tokens, offset: int, found: int, vocab_size: int, what: str) -> NoReturn:
    raise UserError(
        f"{tokens_path(dataset.prefix)}: token {offset:,}, in document {dataset.document_at(offset):,}, is {found}, and"
        f" the model's ids end with {vocab_size - 1} ({what}); the file is damaged or of another tokenizer: restore it,"
        " or prepare it again"
    )
