"""The loss on held-out text, the same at any world size."""

import math
from collections.abc import Callable

import torch

from titanling.config.schema import Data, Validation
from titanling.data.documents import separate_documents
from titanling.data.held_out import NO_TARGET
from titanling.data.loader import validation_batches
from titanling.data.token_files import facts, open_files
from titanling.errors import UserError
from titanling.loss import IGNORE_INDEX
from titanling.parallel.mesh import World
from titanling.parallel.runner import Batch, Runner


class HeldOut:
    """The validation set of a run, opened on one of its ranks."""

    def __init__(self, settings: Validation, data: Data, seq_len: int, vocab_size: int) -> None:
        """`seq_len` is that of training. Raises UserError for what is wrong with the files."""
        assert data.validation is not None  # check_runnable saw to it
        self.settings, self.prefix, self.seq_len = settings, data.validation, settings.seq_len or seq_len
        self.vocab_size = vocab_size
        self.files, known = open_files(self.prefix, data), facts(self.prefix, data)
        self.eod_id = known.eod_id if data.document_mask != "none" else None
        self.bytes_per_token = known.utf8_bytes / known.tokens if known.utf8_bytes else None  # unknown of foreign files

    def mean_loss(
        self, runner: Runner, world: World, to_device: Callable[[Batch], Batch], stopped: Callable[[], bool]
    ) -> float | None:
        """Nats per token over the whole set, on all ranks together; None if `stopped` said so in between.

        Raises UserError if no token of the set is to be predicted.
        """
        size, count = self.settings.local_batch_size, self.settings.steps
        where = world.dp_rank, world.degrees.dp
        batches = validation_batches(self.files, self.seq_len, size, count, *where, self.vocab_size)
        totals = torch.zeros(2, device=world.device, dtype=torch.float64)
        alike = world.size // world.degrees.dp  # ranks that share their sequences
        with runner.evaluation():
            for batch in (to_device(separate_documents(batch, self.eod_id)) for batch in batches):
                if stopped():
                    return None
                totals[0] += runner.loss_sum(batch)
                totals[1] += (batch["labels"] != IGNORE_INDEX).sum() / alike
        loss_sum, tokens = world.sum_(totals).tolist()
        if not tokens:
            raise UserError(f"data.validation: {self.prefix}: {NO_TARGET}")
        return loss_sum / tokens

    def row(self, step: int, loss: float) -> dict[str, float]:
        """What is logged of it."""
        row = {"step": step, "val_loss": loss, "perplexity": math.exp(min(loss, 700.0))}
        if self.bytes_per_token is not None:
            row["bits_per_byte"] = loss / math.log(2) / self.bytes_per_token
        return row
