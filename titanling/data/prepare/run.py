"""Makes what a run's data lacks: the tokenizer, the training files, the validation files. Free of torch."""

import fcntl
import os
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from titanling.config.schema import Prepare
from titanling.data.indexed import Sidecar, file_sha256, read_sidecar
from titanling.data.prepare.readers import Reading, Span, read_documents
from titanling.data.prepare.text import TextFile, find_files
from titanling.errors import UserError

# Byte-pair merges hardly change beyond this much text, and training time grows with it.
TOKENIZER_BYTES = 32_000_000


def prepare(settings: Prepare, train: str, validation: str | None, tokenizer_dir: str) -> list[str]:
    """Make the tokenizer and token files that do not exist yet; return lines that say what exists and what was made.

    `train` and `validation` are prefixes; without `validation` every document is training text. What exists is used
    as it is and never overwritten. Safe to kill at any moment and to call from several processes: the next call
    finishes the work, with the same bytes. With no `settings.text`, nothing is prepared.
    Raises `UserError`: no text, text that is not UTF-8, files of another tokenizer, disk full.
    """
    if not settings.text:
        return []
    prefixes = {"training": train} if validation is None else {"training": train, "validation": validation}
    if train == validation:
        raise UserError(f"data.train and data.validation are both {train}; give them different prefixes")
    folder = os.path.dirname(train) or "."
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with _alone(folder):
            return _prepare(settings, prefixes, tokenizer_dir)
    except OSError as error:
        raise UserError(
            f"{error.filename or folder}: {error.strerror}; mend its permissions or free disk space, then run again"
        ) from error


def _prepare(settings: Prepare, prefixes: dict[str, str], tokenizer_dir: str) -> list[str]:
    done = {split: read_sidecar(prefix) for split, prefix in prefixes.items() if os.path.exists(f"{prefix}.json")}
    has_tokenizer = _check_tokenizer(tokenizer_dir, {prefixes[split]: sidecar for split, sidecar in done.items()})
    lines = [
        f"{prefixes[split]}: exists, {sidecar.tokens:,} tokens made from {sidecar.source}, used as it is"
        for split, sidecar in done.items()
    ]
    if len(done) == len(prefixes) and has_tokenizer:
        return lines
    # The tokenizers library is imported only when there is work: a warm start does not pay for it.
    from titanling.data.prepare.encode import Encoder
    from titanling.data.prepare.tokenise import tokenise
    from titanling.data.prepare.tokenizer import load_tokenizer

    files, reading = find_files(settings.text), _reading(settings)
    fraction = settings.validation_fraction if "validation" in prefixes else 0.0
    if not has_tokenizer:
        lines.append(_train(_sample(files, reading, fraction), settings.vocab_size, tokenizer_dir))
    start, read = time.monotonic(), Counter[str]()
    missing = {split: prefix for split, prefix in prefixes.items() if split not in done}
    documents = _documents(files, reading, fraction, read)
    tokenizer = load_tokenizer(tokenizer_dir)
    encode = Encoder(tokenizer, settings.backend)
    made = tokenise(documents, missing, tokenizer, " ".join(settings.text), encode)
    lines += [encode.note] if encode.note else []
    lines += [f"{prefixes[split]}: {_describe(sidecar)}" for split, sidecar in made.items()]
    skipped = "".join(f", {read[why]:,} skipped ({why})" for why in ("empty", "bad") if read[why])
    lines.append(f"tokenised in {time.monotonic() - start:.1f} s: {read['documents']:,} documents{skipped}")
    return lines


def _check_tokenizer(tokenizer_dir: str, done: dict[str, Sidecar]) -> bool:
    """Whether the tokenizer exists. UserError if it is not the one of the existing files (prefix → sidecar)."""
    path = os.path.join(tokenizer_dir, "tokenizer.json")
    exists = os.path.isfile(path)
    if not exists and os.path.isdir(tokenizer_dir) and os.listdir(tokenizer_dir):
        raise UserError(f"{tokenizer_dir}: has no tokenizer.json but is not empty; correct model.hf_assets_path")
    for prefix, sidecar in done.items():
        if not exists or file_sha256(path) != sidecar.tokenizer_sha256:
            raise UserError(
                f"{prefix}.json: the data was tokenised with another tokenizer than {path}"
                f"{'' if exists else ' (which does not exist)'}; correct model.hf_assets_path,"
                f" or move {prefix}.bin, .idx and .json away to make them again"
            )
    return exists


def _train(texts: Iterator[str], vocab_size: int, tokenizer_dir: str) -> str:
    from titanling.data.prepare.tokenizer import load_tokenizer
    from titanling.data.prepare.train import train_tokenizer

    start = time.monotonic()
    train_tokenizer(texts, vocab_size, tokenizer_dir)
    made = load_tokenizer(tokenizer_dir).vocab_size
    return f"{tokenizer_dir}: byte-level BPE, vocabulary {made:,}, trained in {time.monotonic() - start:.1f} s"


def _reading(settings: Prepare) -> Reading:
    return Reading(settings.text_field, settings.max_document_bytes, settings.skip_bad)


def _documents(
    files: list[TextFile], reading: Reading, fraction: float, read: Counter[str]
) -> Iterator[tuple[str, str]]:
    """(split, text) of every document; counts as `read_documents` does. UserError if there is none."""
    from titanling.data.prepare.tokenise import is_validation

    for file in files:
        for text in read_documents(Span(file), reading, read):
            yield "validation" if is_validation(text, fraction) else "training", text
    if not read["documents"]:
        raise UserError(f"{files[0].path}: holds no text, nor does any other of data.prepare.text; give other files")


def _sample(files: list[TextFile], reading: Reading, fraction: float) -> Iterator[str]:
    """Training texts spread evenly over `files`, at most TOKENIZER_BYTES characters together."""
    share = min(1.0, TOKENIZER_BYTES / max(1, sum(file.bytes for file in files)))
    seen = taken = 0
    for split, text in _documents(files, reading, fraction, Counter()):
        if split == "training":
            if taken <= seen * share:
                piece = text[: TOKENIZER_BYTES - taken]
                taken += len(piece)
                yield piece
            seen += len(text)


def _describe(sidecar: Sidecar) -> str:
    return (
        f"{sidecar.documents:,} documents, {sidecar.utf8_bytes / 1e6:.1f} MB, {sidecar.tokens:,} tokens,"
        f" {sidecar.utf8_bytes / sidecar.tokens:.2f} bytes/token,"
        f" unigram entropy {sidecar.unigram_entropy:.3f} nats/token"
    )


@contextmanager
def _alone(folder: str) -> Iterator[None]:
    """Let one process at a time prepare in `folder`. The lock dies with its process and leaves no file."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)
