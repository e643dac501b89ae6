"""What a run trains on, opened on one of its ranks: token files, or text that is streamed."""

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any, NamedTuple

from titanling.config.schema import Data, Training
from titanling.data.ends import ends_of
from titanling.data.loader import Batch, build_loader
from titanling.data.mixture import Mixture
from titanling.data.sources import MixedSource, all_prefixes, check_epochs, describe, identity, open_sources
from titanling.data.stream_loader import build_stream_loader
from titanling.data.streaming import open_streams
from titanling.data.token_files import facts
from titanling.errors import UserError


class TrainingText(NamedTuple):
    """The text of one data-parallel rank."""

    loader: Any
    """Iterates over this rank's micro-batches, without end; has `state_dict` and `load_state_dict`."""
    source: MixedSource | None
    """The order of the run's samples; None if they are streamed."""
    mixture: Mixture
    """Where its samples come from, and how they are cut into rows."""
    identity: dict[str, Any]
    """What that order depends on, for a checkpoint to be compared with."""
    documents: dict[str, Any]
    """What generation and export must know of the text: "eod_id" and "bos_id", of the tokens that end and begin each
    document (None: nothing begins it), and "tokenizer_sha256" (None: not known). All JSON."""
    lines: list[str]
    """What the run says of it when it starts."""

    def read(
        self, batches: Iterator[Batch], count: int, gather: Callable[[str | None], list[str | None]]
    ) -> list[Batch]:
        """The next `count` of an iterator over `loader`. All ranks together.

        What is wrong with one rank's stream is a UserError on every rank: the others would wait for it in a collective.
        """
        if self.source is not None:
            return list(islice(batches, count))
        found: list[Batch] = []
        wrong: str | None = None
        try:
            found = list(islice(batches, count))
        except UserError as error:
            wrong = str(error)
        for said in gather(wrong):
            if said is not None:
                raise UserError(said)
        return found

    def state(self, gather: Callable[[Any], list[Any]], dp_rank: int) -> dict[str, Any]:
        """Where the run stands: of token files the same on every rank, of streams each data-parallel rank's own."""
        own = self.loader.state_dict()
        if self.source is not None:
            return own
        return {"ranks": [state for _, state in sorted(dict(gather((dp_rank, own))).items())]}

    def go_on(self, state: dict[str, Any], dp_rank: int) -> None:
        """Continue there, with the next iterator. Raises what a state that is none leads to."""
        self.loader.load_state_dict(state if self.source is not None else state["ranks"][dp_rank])


def open_training_text(
    data: Data,
    training: Training,
    seed: int,
    sequences: int,
    assets: str | None,
    say: Callable[[str], None],
    dp_rank: int,
    dp_world: int,
    vocab_size: int | None = None,
) -> TrainingText:
    """Open it; `sequences` is how many a step takes, of all ranks together, `assets` the folder of the tokenizer.

    An id beyond `vocab_size`, the model's, ends the iteration with a UserError.

    Streams `say` when a source begins again. Raises UserError for what is wrong with the files.
    """
    seq_len, batch = training.seq_len, training.local_batch_size
    if data.streams:
        assert assets is not None  # check_runnable saw to it
        streams = open_streams(data, assets, seq_len, seed, sequences)
        loader = build_stream_loader(streams, batch, say, dp_rank, dp_world)
        files = streams.tokenizer
        note = files.bos_note() if streams.bos_id is None else None
        lines = [*streams.describe(sequences), *([f"data: {note}"] if note else [])]
        documents = {"eod_id": files.eod_id, "bos_id": streams.bos_id, "tokenizer_sha256": files.sha256}
        return TrainingText(loader, None, streams.mixture, streams.identity(dp_world, batch), documents, lines)
    source = open_sources(data, seq_len, seed, sequences)
    lines = describe(source, training.steps, sequences)
    lines += [f"data: {line}" for line in check_epochs(data, source, training.steps, sequences)]
    prefixes = all_prefixes(data)
    ends, said = ends_of(data, prefixes, assets)
    documents = ends._asdict() | {"tokenizer_sha256": facts(prefixes[0], data).tokenizer_sha256}
    loader = build_loader(source, batch, dp_rank, dp_world, vocab_size)
    return TrainingText(loader, source, source.mixture, identity(source), documents, lines + said)
