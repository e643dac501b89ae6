"""The fixed validation set: which windows it is, and whether there is anything in them to predict. Free of torch."""

import numpy as np

from titanling.config.schema import Data, Validation
from titanling.data.sources import count_windows
from titanling.data.token_files import Tokens, facts, open_files, tokens_path
from titanling.errors import UserError

NO_TARGET = (
    'none of its tokens is to be predicted: with data.document_mask = "causal", documents need two tokens or more; give'
    ' other text, or set document_mask = "none"'
)
READ_ROWS = 64


def validation_starts(dataset: Tokens, seq_len: int, local_batch_size: int, num_batches: int = -1) -> np.ndarray:
    """Offsets of `num_batches × local_batch_size` windows spread evenly over the file (-1: all)."""
    windows = count_windows(dataset, seq_len)
    wanted = windows if num_batches < 0 else min(windows, num_batches * local_batch_size)
    return np.arange(wanted) * windows // wanted * seq_len


def check_targets(prefix: str, data: Data, settings: Validation, seq_len: int) -> None:
    """Raise UserError if no token of the validation set is to be predicted; reads up to the first one that is."""
    if data.document_mask == "none":
        return
    eod_id, dataset = facts(prefix, data).eod_id, open_files(prefix, data)
    try:
        starts = validation_starts(dataset, seq_len, settings.local_batch_size, settings.steps)
        for first in range(0, len(starts), READ_ROWS):
            # An end-of-document token has no label; every other one's is the next, which is of its document.
            if (dataset.read_rows(starts[first : first + READ_ROWS], seq_len) != eod_id).any():
                return
        raise UserError(f"data.validation: {tokens_path(prefix)}: {NO_TARGET}")
    finally:
        dataset.close()
