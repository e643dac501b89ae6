"""Drops near duplicates by MinHash, with datatrove's four stages. Needs the extra `datatrove`."""

import gzip
import json
import os
import shlex
import shutil
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from datatrove.data import Document
from datatrove.executor import LocalPipelineExecutor, SlurmPipelineExecutor
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.dedup import MinhashDedupBuckets, MinhashDedupCluster, MinhashDedupFilter, MinhashDedupSignature
from datatrove.pipeline.dedup.minhash import MinhashConfig
from datatrove.utils.hashing import HashConfig
from datatrove.utils.logging import logger
from datatrove.utils.word_tokenizers import WordTokenizer

from titanling.data.prepare.filters.lists import words_of
from titanling.data.prepare.readers import Reading, Span, read_documents
from titanling.data.prepare.text import TextFile
from titanling.errors import UserError
from titanling.files import write_whole

NOTE = "settings.json"
"""In the folder of the work: with which settings it was begun, and that it is ours."""
WORK = ("signatures", "pairs", "clusters", "kept", "logs")
"""What else we put there."""


@dataclass(frozen=True)
class MinHash:
    """What counts as nearly the same. Documents that share s of their n-grams (Jaccard) are duplicates with the
    probability 1 - (1 - s ** hashes) ** buckets: by default 0.92 at s = 0.8, one half at 0.69."""

    n_grams: int = 5
    """Words of an n-gram. A document of fewer words is never a duplicate."""
    buckets: int = 14
    """Groups of hashes; documents that agree in all hashes of a group are duplicates."""
    hashes: int = 8
    """Hashes of a group."""
    seed: int = 1
    """Chooses the hashes."""


@dataclass(frozen=True)
class Slurm:
    """How jobs are submitted."""

    partition: str
    time: str = "04:00:00"
    mem_per_cpu_gb: int = 4
    workers: int = -1
    """Tasks that run at the same time; -1: all."""
    options: dict[str, str] = field(default_factory=dict)
    """Further options of sbatch, such as account."""


def deduplicate(
    files: Sequence[TextFile], output: str, reading: Reading, settings: MinHash, workers: int = 1
) -> tuple[int, int]:
    """Write what stays of each file as JSON lines, packed, to the folder `output`, which appears when all is done.

    Of documents that are nearly the same one stays, the same one whenever the files are the same. Killed half-way, the
    same call goes on from `output`.partial. Returns the numbers of documents before and behind.
    Raises `UserError`: `output` exists, was begun with other settings or files, or a file cannot be read.
    """
    work = _begin(files, output, reading, settings)
    logger.disable("datatrove")  # it logs an error with its traceback; ours is one line
    for name, steps, tasks in _stages(work, files, output, reading, settings):
        LocalPipelineExecutor(
            steps, tasks, min(workers, tasks), logging_dir=str(work / "logs" / name), start_method="fork"
        ).run()
    found = Counter[str]()
    for path in (work / "logs" / "filter" / "stats").iterdir():
        for step in json.loads(path.read_text(encoding="utf-8")):
            found.update({name: count for name, count in step["stats"].items() if name in ("read", "written")})
    for name in WORK:
        shutil.rmtree(work / name, ignore_errors=True)
    (work / NOTE).unlink()
    with suppress(OSError):  # the user may have put something there
        work.rmdir()
    return found["read"], found["written"]


def submit(files: Sequence[TextFile], output: str, reading: Reading, settings: MinHash, slurm: Slurm) -> str:
    """Submit the same as jobs of Slurm, each stage when the one before it has succeeded; return their folder.

    It is `output`.partial, and stays. All paths must mean the same on the nodes. Raises `UserError` as `deduplicate`.
    """
    work = _begin(files, output, reading, settings).absolute()
    executor = None
    for name, steps, tasks in _stages(work, files, os.path.abspath(output), reading, settings):
        executor = SlurmPipelineExecutor(
            steps,
            tasks,
            slurm.time,
            slurm.partition,
            mem_per_cpu_gb=slurm.mem_per_cpu_gb,
            workers=slurm.workers,
            job_name=f"minhash-{name}",
            qos="",
            # A node's shell finds the commands of this Python, and this titanling.
            env_command=f"export PATH={shlex.quote(os.path.dirname(sys.executable))}:$PATH"
            f" PYTHONPATH={shlex.quote(str(Path(__file__).parents[3]))}${{PYTHONPATH:+:$PYTHONPATH}}",
            sbatch_args=dict(slurm.options),
            depends=executor,
            logging_dir=str(work / "logs" / name),
        )
    assert executor is not None
    executor.run()
    return str(work)


class ReadFile(PipelineStep):
    """Yields the documents of the file of this task."""

    type, name = "reader", "titanling"

    def __init__(self, files: Sequence[TextFile], reading: Reading) -> None:
        super().__init__()
        self._files, self._reading = list(files), reading

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        """There are as many tasks as files."""
        file = self._files[rank]
        for index, (text, name) in enumerate(read_documents(Span(file), self._reading, Counter())):
            self.stat_update("read")
            yield Document(text=text, id=f"{file.path}:{index}", metadata={"name": name})


class WriteLines(PipelineStep):
    """Writes the documents of a task, so that the same ones make the same file."""

    type, name = "writer", "titanling"

    def __init__(self, folder: str, reading: Reading) -> None:
        super().__init__()
        self._folder, self._reading = folder, reading

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> None:
        """Task 7 writes 00007.jsonl.gz."""
        os.makedirs(self._folder, exist_ok=True)
        with open(os.path.join(self._folder, f"{rank:05d}.jsonl.gz"), "wb") as raw:
            with gzip.GzipFile("", "wb", 6, raw, mtime=0) as file:
                for document in data:
                    name, field = document.metadata["name"], self._reading.id_field
                    row = {} if field is None else {field: json.loads(name)}
                    line = json.dumps(row | {self._reading.text_field: document.text}, ensure_ascii=False)
                    file.write(f"{line}\n".encode())
                    self.stat_update("written")
            raw.flush()
            os.fsync(raw.fileno())


class Publish(PipelineStep):
    """Gives a finished folder its name."""

    type, name = "writer", "publish"

    def __init__(self, folder: str, output: str) -> None:
        super().__init__()
        self._folder, self._output = folder, output

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> None:
        """Does nothing if it has it already."""
        if os.path.exists(self._folder):
            os.rename(self._folder, self._output)


class Words(WordTokenizer):
    """Words of any language that separates them, instead of a package for each language."""

    def word_tokenize(self, text: str) -> list[str]:
        """Without punctuation and case."""
        return words_of(text)

    def sent_tokenize(self, text: str) -> list[str]:
        """Not needed here."""
        raise NotImplementedError

    def span_tokenize(self, text: str) -> list[tuple[int, int]]:
        """Not needed here."""
        raise NotImplementedError


def _stages(
    work: Path, files: Sequence[TextFile], output: str, reading: Reading, settings: MinHash
) -> list[tuple[str, list[PipelineStep], int]]:
    """(name, steps, tasks) of each stage."""
    # Its xxhash is one of version 3, which takes strings; ours takes bytes.
    hashing = HashConfig(hash_fc="sha1")
    config = MinhashConfig(settings.n_grams, settings.buckets, settings.hashes, settings.seed, hash_config=hashing)
    signatures, pairs, clusters, kept = (str(work / name) for name in WORK[:4])
    read = ReadFile(files, reading)
    return [
        ("signatures", [read, MinhashDedupSignature(signatures, config, Words())], len(files)),
        ("buckets", [MinhashDedupBuckets(signatures, pairs, config=config)], settings.buckets),
        ("clusters", [MinhashDedupCluster(pairs, clusters, config)], 1),
        ("filter", [read, MinhashDedupFilter(clusters), WriteLines(kept, reading)], len(files)),
        ("publish", [Publish(kept, output)], 1),
    ]


def _begin(files: Sequence[TextFile], output: str, reading: Reading, settings: MinHash) -> Path:
    """The folder of the work, begun or gone on with."""
    output = output.rstrip("/")
    work = Path(f"{output}.partial")
    wanted = {"files": [asdict(file) for file in files], "reading": asdict(reading), "minhash": asdict(settings)}
    note = work / NOTE
    if note.exists():
        try:
            same = json.loads(note.read_text(encoding="utf-8")) == wanted
        except (OSError, ValueError, RecursionError):
            same = False
        if not same:
            raise UserError(f"{work}: was begun with other files or settings; give those, or remove it to begin anew")
    elif os.path.lexists(output):
        raise UserError(f"{output}: exists; give another --output or move it away")
    if os.path.lexists(work) and (work.is_symlink() or not work.is_dir() or not note.exists() and any(work.iterdir())):
        raise UserError(f"{work}: the work would be done there, and it is not ours; give another --output or move it")
    work.mkdir(parents=True, exist_ok=True)
    write_whole(note, json.dumps(wanted).encode())
    return work
