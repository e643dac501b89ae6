"""Preparing in parallel: the same bytes by any number of workers, after any kill, from any mixture of formats."""

import gzip
import json
import multiprocessing
import os
import threading
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_helpers import run_python, start_python, texts_of

from titanling.config.schema import Prepare
from titanling.data.indexed import IndexedWriter, verify_hashes
from titanling.data.prepare import pieces
from titanling.data.prepare.encode import Encoder
from titanling.data.prepare.readers import Reading
from titanling.data.prepare.run import prepare
from titanling.data.prepare.seen import SeenHashes
from titanling.data.prepare.text import find_files
from titanling.data.prepare.tokenise import is_validation
from titanling.data.prepare.tokenizer import load_tokenizer
from titanling.data.prepare.train import train_tokenizer
from titanling.errors import UserError

FILES = [f"{split}.{suffix}" for split in ("t", "v") for suffix in ("bin", "idx", "json")]


def lines(first: int, last: int) -> bytes:
    rows = [{"text": f"document {number}: " + "ñandú and other words " * (number % 7)} for number in range(first, last)]
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


@pytest.fixture
def corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of every format, cut into several pieces, and a tokenizer beside it."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    (folder / "a.jsonl").write_bytes(lines(0, 60))
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(lines(60, 90)))
    texts = [json.loads(line)["text"] for line in lines(90, 150).splitlines()]
    pq.write_table(pa.table({"text": texts}), folder / "c.parquet", row_group_size=20)
    for number in range(150, 160):
        (folder / f"d{number}.txt").write_text(f"plain text {number} " * 20)
    train_tokenizer(texts_of(folder), 400, str(tmp_path / "tokenizer"))
    monkeypatch.setattr(pieces, "PIECE_BYTES", 2000)
    return folder


def run(corpus: Path, output: Path, **settings) -> list[str]:
    output.mkdir(exist_ok=True)
    text = settings.pop("text", (str(corpus),))
    return prepare(
        Prepare(text=text, validation_fraction=0.2, **settings),
        f"{output}/t",
        f"{output}/v",
        str(corpus.parent / "tokenizer"),
    )


def contents(output: Path) -> dict[str, bytes]:
    return {path.relative_to(output).as_posix(): path.read_bytes() for path in output.rglob("*") if path.is_file()}


def test_the_files_are_those_of_one_document_after_another(corpus: Path, tmp_path: Path) -> None:
    run(corpus, tmp_path / "out", workers=1)
    files = load_tokenizer(str(tmp_path / "tokenizer"))
    encode = Encoder(files, "tokenizers")
    texts = texts_of(corpus)
    assert len(texts) == 160
    for split, aside in (("t", False), ("v", True)):
        with IndexedWriter(f"{tmp_path}/{split}", files.vocab_size) as writer:
            for text in texts:
                if is_validation(text, 0.2) == aside:
                    writer.add_document(encode([text]).ids)
        for suffix in ("bin", "idx"):
            made, expected = (folder / f"{split}.{suffix}" for folder in (tmp_path / "out", tmp_path))
            assert made.read_bytes() == expected.read_bytes()


def test_any_number_of_workers(corpus: Path, tmp_path: Path) -> None:
    for workers in (1, 3):
        run(corpus, tmp_path / str(workers), workers=workers)
    made = contents(tmp_path / "1")
    assert sorted(made) == sorted([*FILES, "t.report.json"]) and made == contents(tmp_path / "3")
    assert len(pieces.cut_into_pieces(find_files([str(corpus)]), Reading())) == 7


@pytest.mark.parametrize("workers", [1, 2])
def test_finished_parts_are_kept_after_an_error_and_joined_only_where_they_fit(
    corpus: Path, tmp_path: Path, workers: int
) -> None:
    run(corpus, tmp_path / "straight", workers=1)
    output, bad = tmp_path / "out", corpus / "d159.txt"
    good = bad.read_bytes()
    bad.write_bytes(b"\xff")
    with pytest.raises(UserError, match=r"d159\.txt: not UTF-8 at byte 0"):
        run(corpus, output, workers=workers)
    parts = output / "t.parts"
    assert [path.name for path in output.iterdir()] == ["t.parts"] and not list(parts.glob("*.partial"))
    finished = {path: path.stat().st_ino for path in parts.iterdir()}
    assert finished
    # Another file may be changed meanwhile: its old part is not used.
    (corpus / "a.jsonl").write_bytes(lines(1, 60))
    with pytest.raises(UserError, match="d159"):
        run(corpus, output, workers=1)
    assert len(list(parts.iterdir())) > len(finished)
    assert {path: path.stat().st_ino for path in finished} == finished
    (corpus / "a.jsonl").write_bytes(lines(0, 60))
    bad.write_bytes(good)
    run(corpus, output, workers=workers)
    assert contents(output) == contents(tmp_path / "straight")


def test_settings_that_make_other_parts(corpus: Path, tmp_path: Path) -> None:
    (corpus / "d159.txt").write_bytes(b"\xff")
    output = tmp_path / "out"
    found = []
    for settings in ({}, {"backend": "tokenizers"}, {"max_document_bytes": 10_000}):
        with pytest.raises(UserError, match="d159"):
            run(corpus, output, workers=1, **settings)
        found.append(len(list((output / "t.parts").iterdir())))
    assert found == [found[0], found[0], 2 * found[0]]
    lines = run(corpus, output, workers=1, skip_bad=True)
    assert "1 skipped (bad)" in lines[-1] and sorted(contents(output)) == sorted([*FILES, "t.report.json"])


def test_a_worker_that_dies_is_one_line(corpus: Path, tmp_path: Path) -> None:
    (corpus / "e.jsonl").write_bytes(lines(0, 20_000))

    def kill_one() -> None:
        while not (children := multiprocessing.active_children()):
            time.sleep(0.001)
        children[0].kill()

    killer = threading.Thread(target=kill_one)
    killer.start()
    with pytest.raises(UserError, match=r"a worker died \(killed by SIGKILL\) while it prepared .*corpus/") as error:
        run(corpus, tmp_path / "out", workers=2)
    killer.join()
    assert "\n" not in str(error.value) and not multiprocessing.active_children()


def test_seen_hashes() -> None:
    choose = np.random.default_rng(0)
    for rule in ("each", "any"):
        seen, known = SeenHashes(rule), set()
        for _ in range(40):
            counts = choose.integers(1, 5, choose.integers(1, 30))
            hashes = choose.integers(0, 3000, counts.sum()).astype(np.uint64) << np.uint64(40)
            expected = []
            for part in np.split(hashes, np.cumsum(counts)[:-1]):
                if rule == "any":
                    expected += [not known & set(part.tolist())] * len(part)
                    known |= set(part.tolist())
                else:
                    for value in part.tolist():
                        expected.append(value not in known)
                        known.add(value)
            assert seen.add(hashes, counts).tolist() == expected
        assert len(seen) == len(known) and seen.bytes == 8 * len(known)


SCRIPT = "scripts/prepare_data.py"


@pytest.mark.slow  # six runs of some seconds each
def test_killed_at_any_moment_and_run_again(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for number in range(6):
        with gzip.open(corpus / f"{number}.jsonl.gz", "wb", 1) as file:
            for line in lines(number * 700, number * 700 + 700).splitlines(keepends=True):
                file.write(line)
    train_tokenizer([json.loads(line)["text"] for line in lines(0, 50).splitlines()], 400, f"{tmp_path}/tokenizer")

    text = [f"s{number}={corpus}/{number}.jsonl.gz" for number in range(6)]  # each source is a piece of its own

    def command(output: Path) -> list[str]:
        others = ["--tokenizer", f"{tmp_path}/tokenizer", "--workers", "2", "--validation-fraction", "0.1"]
        return [SCRIPT, "--text", *text, "--output", str(output), *others]

    straight = run_python(*command(tmp_path / "straight"))
    assert straight.returncode == 0, straight.stderr
    output = tmp_path / "killed"
    parts = output / "train.parts"
    moments = (
        lambda: list(parts.glob("*.partial")),
        lambda: len([path for path in parts.glob("*") if not path.suffix]) >= 2,
        lambda: (output / "train.bin.partial").exists(),
        lambda: (output / "train.bin").exists(),
        lambda: (output / "train.json").exists(),
    )
    kept: dict[Path, int] = {}
    for reached in moments:
        process = start_python(*command(output))
        while process.poll() is None and not reached():
            time.sleep(0.0005)
        process.kill()
        process.communicate()
        now = {path: os.stat(path).st_ino for path in parts.glob("*") if not path.suffix} if parts.exists() else {}
        assert not now or kept.items() <= now.items()  # none is made again
        kept = now
    done = run_python(*command(output))
    assert (done.returncode, done.stderr) == (0, "")
    assert contents(output) == contents(tmp_path / "straight")
    verify_hashes(f"{output}/train")
