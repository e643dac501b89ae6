"""Preparing in parallel: the same bytes by any number of workers, after any kill, from any mixture of formats."""

import gzip
import json
import multiprocessing
import os
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from data_helpers import json_lines, run_python, start_python, texts_of

from titanling.config import load_config
from titanling.config.schema import Prepare
from titanling.data.check_files import verify_hashes
from titanling.data.indexed import IndexedDataset, IndexedWriter
from titanling.data.prepare import pieces, pipeline, pool, progress
from titanling.data.prepare.encode import Encoder
from titanling.data.prepare.progress import progress_line
from titanling.data.prepare.readers import Reading, Span
from titanling.data.prepare.report import memory_lines, rows
from titanling.data.prepare.run import prepare
from titanling.data.prepare.seen import SeenHashes
from titanling.data.prepare.text import TextFile, find_files
from titanling.data.prepare.tokenise import is_validation
from titanling.data.prepare.tokenizer import load_tokenizer
from titanling.data.prepare.train import train_tokenizer
from titanling.data.prepare.worker import Task
from titanling.errors import UserError

FILES = [f"{split}.{suffix}" for split in ("t", "v") for suffix in ("bin", "idx", "json")]


def run(mixed_corpus: Path, output: Path, **settings) -> list[str]:
    output.mkdir(exist_ok=True)
    text = settings.pop("text", (str(mixed_corpus),))
    return prepare(
        Prepare(text=text, validation_fraction=0.2, **settings),
        f"{output}/t",
        f"{output}/v",
        str(mixed_corpus.parent / "tokenizer"),
    )


def contents(output: Path) -> dict[str, bytes]:
    return {path.relative_to(output).as_posix(): path.read_bytes() for path in output.rglob("*") if path.is_file()}


def test_the_files_are_those_of_one_document_after_another(mixed_corpus: Path, tmp_path: Path) -> None:
    run(mixed_corpus, tmp_path / "out", workers=1)
    files = load_tokenizer(str(tmp_path / "tokenizer"))
    encode = Encoder(files, "tokenizers")
    texts = texts_of(mixed_corpus)
    assert len(texts) == 160
    for split, aside in (("t", False), ("v", True)):
        with IndexedWriter(f"{tmp_path}/{split}", files.vocab_size) as writer:
            for text in texts:
                if is_validation(text, 0.2) == aside:
                    writer.add_document(encode([text]).ids)
        for suffix in ("bin", "idx"):
            made, expected = (folder / f"{split}.{suffix}" for folder in (tmp_path / "out", tmp_path))
            assert made.read_bytes() == expected.read_bytes()


def test_any_number_of_workers(mixed_corpus: Path, tmp_path: Path) -> None:
    for workers in (1, 3):
        run(mixed_corpus, tmp_path / str(workers), workers=workers)
    made = contents(tmp_path / "1")
    assert sorted(made) == sorted([*FILES, "t.report.json"]) and made == contents(tmp_path / "3")
    assert len(pieces.cut_into_pieces(find_files([str(mixed_corpus)]), Reading())) == 7


@pytest.mark.parametrize("workers", [1, 2])
def test_finished_parts_are_kept_after_an_error_and_joined_only_where_they_fit(
    mixed_corpus: Path, tmp_path: Path, workers: int
) -> None:
    run(mixed_corpus, tmp_path / "straight", workers=1)
    output, bad = tmp_path / "out", mixed_corpus / "d159.txt"
    good = bad.read_bytes()
    bad.write_bytes(b"\xff")
    with pytest.raises(UserError, match=r"d159\.txt: not UTF-8 at byte 0"):
        run(mixed_corpus, output, workers=workers)
    parts = output / "t.parts"
    assert [path.name for path in output.iterdir()] == ["t.parts"] and not list(parts.glob("*.partial"))
    finished = {path: path.stat().st_ino for path in parts.iterdir()}
    assert finished
    # Another file may be changed meanwhile: its old part is not used.
    (mixed_corpus / "a.jsonl").write_bytes(json_lines(1, 60))
    with pytest.raises(UserError, match="d159"):
        run(mixed_corpus, output, workers=1)
    assert len(list(parts.iterdir())) > len(finished)
    assert {path: path.stat().st_ino for path in finished} == finished
    (mixed_corpus / "a.jsonl").write_bytes(json_lines(0, 60))
    bad.write_bytes(good)
    run(mixed_corpus, output, workers=workers)
    assert contents(output) == contents(tmp_path / "straight")


def test_settings_that_make_other_parts(mixed_corpus: Path, tmp_path: Path) -> None:
    (mixed_corpus / "d159.txt").write_bytes(b"\xff")
    output = tmp_path / "out"
    found = []
    for settings in ({}, {"backend": "tokenizers"}, {"max_document_bytes": 10_000}):
        with pytest.raises(UserError, match="d159"):
            run(mixed_corpus, output, workers=1, **settings)
        found.append(len(list((output / "t.parts").iterdir())))
    # Whoever was told that one backend gives wrong ids, and sets the other, gets no part of the first.
    assert found == [found[0], 2 * found[0], 3 * found[0]]
    lines = run(mixed_corpus, output, workers=1, skip_bad=True)
    assert "1 skipped (bad)" in lines[-1] and sorted(contents(output)) == sorted([*FILES, "t.report.json"])


def test_a_worker_that_dies_is_one_line(mixed_corpus: Path, tmp_path: Path) -> None:
    (mixed_corpus / "e.jsonl").write_bytes(json_lines(0, 20_000))

    def kill_one() -> None:
        deadline = time.monotonic() + 60
        while not (children := multiprocessing.active_children()) and time.monotonic() < deadline:
            time.sleep(0.001)
        children[0].kill()

    killer = threading.Thread(target=kill_one, daemon=True)
    killer.start()
    with pytest.raises(UserError, match=r"a worker died \(killed by SIGKILL\) while it prepared .*corpus/") as error:
        run(mixed_corpus, tmp_path / "out", workers=2)
    killer.join()
    assert "\n" not in str(error.value) and not multiprocessing.active_children()


@pytest.mark.parametrize("answer", [None, b"", b"\0\0\0\x63half an answer"])
def test_a_worker_that_dies_between_tasks_or_while_it_answers(answer: bytes | None) -> None:
    ours, theirs = multiprocessing.Pipe()
    task = Task(pieces.Piece("a", None, (Span(TextFile("a.txt", 1)),), 1), 0, "part", None)
    dead = SimpleNamespace(join=lambda: None, exitcode=-9)
    if answer is not None:
        os.write(theirs.fileno(), answer)
    theirs.close()
    with pytest.raises(UserError, match=r"a worker died \(killed by SIGKILL\) while it prepared a\.txt;"):
        (pool._send if answer is None else pool._check)(ours, dead, task)


def test_seen_hashes() -> None:
    choose = np.random.default_rng(0)
    seen, known = SeenHashes(), set()
    for _ in range(40):
        hashes = choose.integers(0, 3000, choose.integers(1, 100)).astype(np.uint64) << np.uint64(40)
        expected = []
        for value in hashes.tolist():
            expected.append(value not in known)
            known.add(value)
        assert seen.add(hashes).tolist() == expected
    assert len(seen) == len(known) and seen.bytes == 8 * len(known)


def test_hashes_of_a_large_part_are_looked_at_in_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashes, sizes = np.random.default_rng(0).integers(0, 90, 100).astype("<u8"), []

    class Seen(SeenHashes):
        def add(self, hashes: np.ndarray) -> np.ndarray:
            sizes.append(len(hashes))
            return super().add(hashes)

    (tmp_path / "hashes.bin").write_bytes(hashes.tobytes())
    found = []
    for block in (100, 7):
        monkeypatch.setattr(pipeline, "BLOCK_HASHES", block)
        found.append((pipeline._decide(Seen(), str(tmp_path)), (tmp_path / "new.bin").read_bytes()))
    assert found[0] == found[1] and sizes == [100, *[7] * 14, 2]
    (tmp_path / "hashes.bin").write_bytes(b"")
    assert pipeline._decide(Seen(), str(tmp_path)) and not (tmp_path / "new.bin").read_bytes()


FILTERS = """
[[data.prepare.filters]]
kind = "length"
min_words = 4
[[data.prepare.filters]]
kind = "deduplicate_documents"
[[data.prepare.filters]]
kind = "length"
max_characters = 130
[[data.prepare.filters]]
kind = "deduplicate_paragraphs"
[[data.prepare.filters]]
kind = "token_word_ratio"
max_ratio = { "*" = 1.8 }
"""


def test_filters_that_need_order(mixed_corpus: Path, tmp_path: Path) -> None:
    """The documents that are left are those that going through all of them one after another leaves."""
    (mixed_corpus / "a.jsonl").write_bytes(json_lines(0, 40) + json_lines(20, 60))
    both = [{"text": f"shared paragraph of {number % 4} words\n\nparagraph of its own {number}"} for number in range(9)]
    both.append({"text": "paragraph of its own 3\n\nshared paragraph of 1 words"})
    (mixed_corpus / "e.jsonl").write_text("".join(json.dumps(row) + "\n" for row in both))
    (tmp_path / "filters.toml").write_text(FILTERS)
    filters = load_config(tmp_path / "filters.toml", {}).config.data.prepare.filters
    files = load_tokenizer(str(tmp_path / "tokenizer"))
    encode = Encoder(files, "tokenizers")
    seen_documents, seen_paragraphs, left, expected = set(), set(), [0] * 5, []
    for text in texts_of(mixed_corpus):
        if len(text.split()) < 4:
            continue
        left[0] += 1
        if text in seen_documents:
            continue
        seen_documents.add(text)
        left[1] += 1
        if len(text) > 130:
            continue
        left[2] += 1
        new = [part for part in text.split("\n\n") if part.strip() not in seen_paragraphs]
        seen_paragraphs |= {part.strip() for part in new}
        if not new:
            continue
        left[3] += 1
        text = "\n\n".join(new)
        ids = encode([text]).ids.tolist()
        if (len(ids) - 1) / len(text.split()) <= 1.8:
            left[4] += 1
            expected.append(ids)
    assert sorted(left, reverse=True) == left and len(set(left)) == 5 and left[4] > 20
    for workers in (1, 2):
        output = tmp_path / str(workers)
        output.mkdir()
        settings = Prepare(text=(str(mixed_corpus),), workers=workers, filters=filters)
        prepare(settings, f"{output}/t", None, str(tmp_path / "tokenizer"))
        dataset = IndexedDataset(f"{output}/t")
        assert [dataset.document(index).tolist() for index in range(dataset.num_documents)] == expected
    assert contents(tmp_path / "1") == contents(tmp_path / "2")
    report = json.loads((output / "t.report.json").read_text())
    counted = report["sources"][str(mixed_corpus)]
    assert [counts["documents_out"] for counts in counted["filters"]] == left
    assert [counts["documents_in"] for counts in counted["filters"]] == [counted["read"]["documents"], *left[:-1]]
    assert counted["splits"]["training"]["documents"] == left[-1]
    assert report["seen"]["1"] == {"hashes": len(seen_documents), "bytes": 8 * len(seen_documents)}
    assert memory_lines(report)[0].startswith(f"deduplicate_documents: {left[1]} hashes of {left[0]} documents")
    table = rows(report)
    assert [row[1] for row in table[1:]] == ["read", *report["filters"], "training"]
    assert table[-1][2] == f"{left[-1]:,}" and table[1][0] == str(mixed_corpus)


def test_progress_in_a_log(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    assert progress_line(3_000_000, 12_000_000, 2_000.0).endswith("3 of 12 MB (25%), 0.0 MB/s, 1:15:00 left")
    with progress.show_progress(100) as advance:
        advance(50)
    assert capsys.readouterr() == ("", "")  # a short one says nothing
    monkeypatch.setattr(progress, "LINE_SECONDS", 0)
    with progress.show_progress(100) as advance:
        advance(25)
        advance(75)
    first, last = capsys.readouterr().err.splitlines()
    assert "(25%)" in first and "(100%)" in last and last.endswith("0:00:00 left")


@pytest.mark.slow  # six runs of some seconds each
def test_killed_at_any_moment_and_run_again(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for number in range(6):
        with gzip.open(corpus / f"{number}.jsonl.gz", "wb", 1) as file:
            for line in json_lines(number * 700, number * 700 + 700).splitlines(keepends=True):
                file.write(line)
    train_tokenizer([json.loads(line)["text"] for line in json_lines(0, 50).splitlines()], 400, f"{tmp_path}/tokenizer")

    text = [f"s{number}={corpus}/{number}.jsonl.gz" for number in range(6)]  # each source is a piece of its own

    def command(output: Path) -> list[str]:
        others = ["--tokenizer", f"{tmp_path}/tokenizer", "--workers", "2", "--validation-fraction", "0.1"]
        return ["scripts/prepare_data.py", "--text", *text, "--output", str(output), *others]

    straight = run_python(*command(tmp_path / "straight"))
    assert straight.returncode == 0, straight.stderr
    output = tmp_path / "killed"
    parts = output / "train.parts"
    moments = (
        lambda: list(parts.glob("*.partial")),
        lambda: len([path for path in parts.glob("*") if not path.suffix]) >= 2,
        lambda: list(output.glob("train.bin.*.partial")),
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
