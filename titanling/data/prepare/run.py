"""Makes what a run's data lacks: the tokenizer, the training files, the validation files. Free of torch."""

import fcntl
import os
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

from titanling.config.schema import Prepare
from titanling.data.ends import check_ends
from titanling.data.indexed import Sidecar, check_unused, file_sha256, read_sidecar
from titanling.data.prepare.outputs import Outputs
from titanling.data.prepare.parts import remove_parts
from titanling.data.prepare.readers import Reading, Span, read_texts, reading_of
from titanling.data.prepare.record import Record, check_record, new_record
from titanling.data.prepare.text import TextFile, find_files
from titanling.errors import UserError

if TYPE_CHECKING:
    from titanling.data.prepare.pieces import Piece
    from titanling.data.prepare.worker import Job

# Byte-pair merges hardly change beyond this much text, and training time grows with it.
TOKENIZER_BYTES = 32_000_000
# Characters of a text that it is trained on whole.
WHOLE = 10_000


class Shard(NamedTuple):
    """A part of a preparation that is done by several machines."""

    number: int
    """From 1."""
    count: int

    def name(self, prefix: str) -> str:
        """What its files are called."""
        return f"{prefix}-shard-{self.number:05}-of-{self.count:05}"


def parse_shard(text: str, environment: Mapping[str, str]) -> Shard:
    """The shard that I/N says, or, for "slurm", the environment of a job array's task. Raises `UserError`."""
    if text == "slurm":
        names = ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_MIN", "SLURM_ARRAY_TASK_MAX", "SLURM_ARRAY_TASK_COUNT")
        values = [environment.get(name, "") for name in names]
        if not all(value.isdecimal() for value in values):
            raise UserError("--shard slurm: no task of a job array (SLURM_ARRAY_TASK_ID …); sbatch --array=1-N, or I/N")
        task, first, last, count = map(int, values)
        if last - first + 1 != count:
            raise UserError(
                f"--shard slurm: the array has {count} of the tasks {first} to {last}; give all of them (--array=1-N),"
                " or resubmit some with --shard I/N"
            )
        return Shard(task - first + 1, count)
    number, slash, count = text.partition("/")
    if not (slash and number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count) <= 99_999):
        raise UserError(f'--shard {text}: must be I/N, from 1/N to N/N, or "slurm"')
    return Shard(int(number), int(count))


def prepare(
    settings: Prepare,
    train: str,
    validation: str | None,
    tokenizer_dir: str,
    shard: Shard | None = None,
    run_folder: str | None = None,
) -> list[str]:
    """Make the tokenizer and token files that do not exist yet; return lines that say what exists and what was made.

    `train` and `validation` are prefixes; without `validation` every document is training text. What exists is used
    as it is, if these settings would make it, and never overwritten. It is no text itself, nor is what a run has
    written into `run_folder`. Safe to kill at any moment and to call from several processes of one machine: the next
    call finishes the work, with the same bytes. With no `settings.text`, nothing is prepared.
    A `shard` makes its share alone, in files of its own, with a tokenizer that exists; `data.merge` joins them.
    Unless the input is small or `settings.workers` is 1, processes are started, which import the main module.
    Raises `UserError`: no text, text that is bad, files of another tokenizer or other settings, disk full.
    """
    if not settings.text:
        return []
    if train == validation:
        raise UserError(f"data.train and data.validation are both {train}; give them different prefixes")
    prefixes = {"training": train} if validation is None else {"training": train, "validation": validation}
    outputs = Outputs(list(prefixes.values()), tokenizer_dir, run_folder)
    folder = os.path.dirname(train) or "."
    if shard is not None:
        prefixes = {split: shard.name(prefix) for split, prefix in prefixes.items()}
        folder = f"{prefixes['training']}.parts"
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with _alone(folder):
            try:
                return _prepare(settings, prefixes, tokenizer_dir, shard, outputs)
            finally:
                remove_parts(f"{prefixes['training']}.parts", only_if_empty=True)
    except FileNotFoundError as error:
        raise UserError(
            f"{error.filename or folder}: is no longer there; put it back, or run again without it"
        ) from error
    except OSError as error:
        raise UserError(
            f"{error.filename or folder}: {error.strerror}; mend its permissions or free disk space, then run again"
        ) from error


def _prepare(
    settings: Prepare, prefixes: dict[str, str], tokenizer_dir: str, shard: Shard | None, outputs: Outputs
) -> list[str]:
    fraction = _fraction(settings, prefixes)
    done = {split: _finished(prefix, shard) for split, prefix in prefixes.items()}
    sidecars = {prefixes[split]: sidecar for split, sidecar in done.items() if isinstance(sidecar, Sidecar)}
    has_tokenizer = _check_tokenizer(tokenizer_dir, sidecars)
    if sidecars:
        check_ends(sidecars, tokenizer_dir)
    _check_bos(settings, sidecars)
    files, lines = _compare(settings, sidecars, fraction, outputs)
    missing = {split: prefix for split, prefix in prefixes.items() if done[split] is None}
    if not missing and has_tokenizer:
        remove_parts(f"{prefixes['training']}.parts")  # a run was killed behind its last step
        return lines
    for prefix in missing.values():
        check_unused(prefix)
    # Imported only when there is work, with the tokenizers library: a warm start does not pay for it.
    from titanling.data.prepare import pipeline, report
    from titanling.data.prepare.pieces import cut_into_pieces, describe

    report.check_unused_report(prefixes["training"])
    files = files or find_files(settings.text, outputs)
    pieces = cut_into_pieces(files, reading_of(settings))
    lines += describe(files, reading_of(settings), outputs)
    settings_hash = pipeline.settings_hash(settings, pieces, fraction)
    if shard is not None:
        pieces = _share(pieces, shard)
    if not has_tokenizer:
        if shard is not None:
            raise UserError(f"{tokenizer_dir}: has no tokenizer.json, and no shard can train it; train it first")
        lines.append(_train(_sample(files, reading_of(settings), fraction), settings.vocab_size, tokenizer_dir))
    bos_id, note = _bos(settings, tokenizer_dir)
    lines += [note] if note else []
    # Not whether it was just trained: a run that was killed behind that must record the same.
    trained = _vocabulary(tokenizer_dir) == settings.vocab_size
    record = new_record(settings, files, fraction, settings.vocab_size if trained else None)
    job = pipeline.new_job(settings, pieces, tokenizer_dir, fraction, bos_id)
    making = _Making(settings, job, pieces, settings_hash, record, prefixes["training"], shard is not None)
    return lines + making.make(missing)


def _fraction(settings: Prepare, prefixes: dict[str, str]) -> float:
    """Share of the text that validation gets."""
    if "validation" not in prefixes:
        return 0.0
    if not settings.validation_fraction:
        prefix = prefixes["validation"]
        if not os.path.exists(f"{prefix}.json"):
            raise UserError(
                f"data.prepare.validation_fraction = 0: keeps nothing for data.validation = {prefix}, which does not"
                " exist; remove data.validation (and set validation.enable = false), or set a share"
            )
    return settings.validation_fraction


def _compare(
    settings: Prepare, done: dict[str, Sidecar], fraction: float, outputs: Outputs
) -> tuple[list[TextFile] | None, list[str]]:
    """The files of the text, if they were looked for, and lines on what exists, which these settings must have made."""
    if not any(sidecar.prepared for sidecar in done.values()):
        files, now = None, None
    else:
        try:
            files = find_files(settings.text, outputs)
        except UserError:
            files = None
        now = new_record(settings, files, fraction, settings.vocab_size)
    lines = []
    for prefix, sidecar in done.items():
        remark = ""
        if sidecar.prepared is None:
            remark = " (by which settings it was prepared is not recorded)"
        elif now is not None:
            check_record(prefix, sidecar.prepared, now, fraction > 0)
            remark = " (its text is no longer there to be compared)" if files is None else ""
        lines.append(f"{prefix}: exists, {sidecar.tokens:,} tokens made from {sidecar.source}, used as it is{remark}")
    return files, lines


def _vocabulary(tokenizer_dir: str) -> int:
    from titanling.data.prepare.tokenizer import load_tokenizer

    return load_tokenizer(tokenizer_dir).vocab_size


class _Making(NamedTuple):
    """Makes token files from parts in `name`.parts, which is removed when they are there, and `name`.report.json."""

    settings: Prepare
    job: "Job"
    pieces: "list[Piece]"
    settings_hash: str
    record: Record
    name: str
    is_shard: bool

    def make(self, prefixes: dict[str, str]) -> list[str]:
        """Write the files of these prefixes; lines on what was made."""
        from titanling.data.prepare import pipeline, report
        from titanling.data.prepare.join import join_parts
        from titanling.data.prepare.parts import read_counts
        from titanling.data.prepare.progress import show_progress
        from titanling.data.prepare.tokenizer import load_tokenizer

        start = time.monotonic()
        job, pieces = self.job, self.pieces
        tokenizer = load_tokenizer(job.tokenizer)
        key = pipeline.fingerprint(self.settings, self.settings_hash, tokenizer)
        folder = f"{self.name}.parts"
        Path(folder).mkdir(exist_ok=True)
        with show_progress(len(job.stages) * sum(piece.bytes for piece in pieces)) as advance:
            made = pipeline.make_all(job, pieces, tokenizer, key, folder, advance)
        found = report.report_of(made, [filter.kind for filter in self.settings.filters], self.settings_hash)
        documents = report.read_total(found, "documents")
        if not self.is_shard and not report.written_total(found):
            remove_parts(folder)  # they are of no use
            if documents:
                raise UserError(report.emptied(found))
            raise _no_text(pieces[0].spans[0].file)
        written, remarks = join_parts(
            made.parts[-1],
            prefixes,
            tokenizer,
            " ".join(self.settings.text),
            lambda: report.write_report(self.name, found),
            may_be_empty=self.is_shard,
            with_ids=self.settings.id_field is not None,
            fraction=job.fraction,
            record=self.record,
            bos_id=job.bos_id,
        )
        notes = {str(note) for part in made.parts[-1] if (note := read_counts(part)["note"])}
        remove_parts(folder)
        lines = [*sorted(notes), *remarks]
        lines += [f"{prefixes[split]}: {_describe(sidecar)}" for split, sidecar in written.items()]
        skipped = "".join(
            f", {number:,} skipped ({why})" for why in ("empty", "bad") if (number := report.read_total(found, why))
        )
        return [*lines, f"tokenised in {time.monotonic() - start:.1f} s: {documents:,} documents{skipped}"]


def _share(pieces: "list[Piece]", shard: Shard) -> "list[Piece]":
    if shard.count > len(pieces):
        raise UserError(
            f"--shard {shard.number}/{shard.count}: the text is only {len(pieces)} pieces (of some 64 MB, or a packed"
            f" file each); make at most {len(pieces)} shards"
        )
    first, last = ((shard.number - less) * len(pieces) // shard.count for less in (1, 0))
    return pieces[first:last]


def _finished(prefix: str, shard: Shard | None) -> Sidecar | Literal["empty"] | None:
    """The sidecar of files that exist; "empty" for those of a shard that no document fell into."""
    if os.path.exists(f"{prefix}.json"):
        if not os.path.exists(f"{prefix}.bin") and b'"bin_sha256"' not in Path(f"{prefix}.json").read_bytes()[:65536]:
            raise UserError(
                f"{prefix}.json: exists, is not ours, and is where {prefix} is described; give data.train and"
                " data.validation (--output) other names"
            )
        return read_sidecar(prefix)
    return "empty" if shard is not None and os.path.exists(f"{prefix}.empty") else None


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


def _check_bos(settings: Prepare, done: dict[str, Sidecar]) -> None:
    for prefix, sidecar in done.items():
        if settings.add_bos != (sidecar.bos_id is not None):
            was, remedy = f"with token {sidecar.bos_id}", "set it to true (--add-bos)"
            if settings.add_bos:
                was, remedy = "without a bos_token", "set it to false"
            raise UserError(
                f"data.prepare.add_bos = {str(settings.add_bos).lower()}: the documents of {prefix} begin {was};"
                f" {remedy}, or prepare under another prefix"
            )


def _bos(settings: Prepare, tokenizer_dir: str) -> tuple[int | None, str | None]:
    """What documents shall begin with, and what is to be said about it. Raises UserError: no such token."""
    from titanling.data.prepare.tokenizer import load_tokenizer

    files = load_tokenizer(tokenizer_dir)
    return (files.document_bos(), None) if settings.add_bos else (None, files.bos_note())


def _train(texts: Iterator[str], vocab_size: int, tokenizer_dir: str) -> str:
    from titanling.data.prepare.tokenizer import load_tokenizer
    from titanling.data.prepare.train import train_tokenizer

    start = time.monotonic()
    train_tokenizer(texts, vocab_size, tokenizer_dir)
    made = load_tokenizer(tokenizer_dir).vocab_size
    return f"{tokenizer_dir}: byte-level BPE, vocabulary {made:,}, trained in {time.monotonic() - start:.1f} s"


def _sample(files: list[TextFile], reading: Reading, fraction: float) -> Iterator[str]:
    """Training texts from the beginnings of files, at most TOKENIZER_BYTES characters together.

    A file gives in proportion to its size on the disk, for what a packed one holds is not known before it is read; of
    many small files some are taken whole and the others not read. UserError if no file has a text.
    """
    from titanling.data.prepare.tokenise import is_validation

    total = max(1, sum(file.bytes for file in files))
    read = Counter[str]()
    passed = taken = 0
    for file in files:
        passed += file.bytes
        due = TOKENIZER_BYTES * passed // total
        if taken >= due:
            continue
        for text in read_texts(Span(file), reading, read):
            if is_validation(text, fraction):
                continue
            # Short texts are not cut in two, nor may a long one take the place of later files.
            piece = text[: max(due - taken, min(WHOLE, TOKENIZER_BYTES - taken))]
            taken += len(piece)
            yield piece
            if taken >= due:
                break
    if not read["documents"]:
        raise _no_text(files[0])


def _no_text(first: TextFile) -> UserError:
    return UserError(f"{first.path}: holds no text, nor does any other of data.prepare.text; give other files")


def _describe(sidecar: Sidecar | None) -> str:
    if sidecar is None:
        return "no document falls into it"
    return (
        f"{sidecar.documents:,} documents, {sidecar.utf8_bytes / 1e6:.1f} MB, {sidecar.tokens:,} tokens,"
        f" {sidecar.utf8_bytes / sidecar.tokens:.2f} bytes/token,"
        f" unigram entropy {sidecar.unigram_entropy:.3f} nats/token"
    )


@contextmanager
def _alone(folder: str) -> Iterator[None]:
    """Let one process of a machine at a time prepare in `folder`. The lock dies with its process and leaves no file."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)
