"""Documents that are packed into one row: where each token stands in its own."""

import torch
from torch import Tensor

from titanling.data.loader import Batch
from titanling.loss import IGNORE_INDEX


def document_positions(input_ids: Tensor, eod_id: int) -> Tensor:
    """The position of each token of input_ids (batch, seq) in its document, of what the row holds of it: int64.

    They begin at 0 with the row and behind each end-of-document token, which is the last one of its document.
    """
    places = torch.arange(input_ids.size(1), device=input_ids.device)
    starts = torch.zeros_like(input_ids)
    starts[:, 1:] = torch.where(input_ids[:, :-1] == eod_id, places[1:], 0)
    return places - starts.cummax(1).values


def separate_documents(batch: Batch, eod_id: int | None) -> Batch:
    """The batch with `positions`, and no label where a document ends; as it is with no eod_id, or if it has them.

    Labels are one token ahead already: an end-of-document token's is the first token of the next document, of which
    nothing in this one tells.
    """
    if eod_id is None or "positions" in batch:
        return batch
    ended = batch["input_ids"] == eod_id
    return batch | {
        "labels": batch["labels"].masked_fill(ended, IGNORE_INDEX),
        "positions": document_positions(batch["input_ids"], eod_id),
    }
