"""Random tokens as token files, for those benchmarks that train titanling itself."""

from pathlib import Path

import numpy as np

from titanling.data.indexed import IndexedWriter, write_sidecar

EOD = 0


def write_tokens(prefix: Path, vocab_size: int, tokens: int) -> None:
    """One document of `tokens` ids, the last one EOD, as `prefix`.bin, .idx and .json; always the same ones."""
    prefix.parent.mkdir(parents=True, exist_ok=True)
    ids = np.random.default_rng(0).integers(0, vocab_size, tokens)
    ids[-1] = EOD
    with IndexedWriter(str(prefix), vocab_size) as writer:
        writer.add_document(ids)
    write_sidecar(str(prefix), writer.sidecar("none", eod_id=EOD, utf8_bytes=tokens, source="random tokens"))
