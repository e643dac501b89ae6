"""Sources of several files, mixtures over them, and tracing both ways."""

import json
import os
import resource
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_helpers import run_python, write_documents

from titanling.config.schema import Data, Source
from titanling.data.indexed import IndexedDataset
from titanling.data.sources import (
    MixedSource,
    check_epochs,
    check_sources,
    describe,
    identity,
    open_sources,
    prefixes_of,
    read_words,
)
from titanling.data.trace import pieces, samples_of_step, sights
from titanling.errors import UserError

SEQ_LEN = 4
SIZES = {"a": [3, 9, 1, 28, 6], "b-1": [50, 2], "b-2": [7, 7, 7, 7], "c": [4] * 40}
"""Lengths of the documents of each pair of files. A token says where it is: file × 1,000 + its offset."""


def data(root: Path, **changes: Any) -> Data:
    sources = [
        {"name": "c", "paths": ["c"], "weight": 1.0},
        {"name": "a", "paths": ["a"], "weight": 2.0},
        {"name": "b", "paths": ["b-*"]},
    ]
    stages = [{"from_step": 3, "weights": {"a": 0.5, "b": 1.5}}, {"from_tokens": 200, "weights": {"b": 1.0, "c": 3.0}}]
    return Data(**{"root": str(root), "sources": sources, "stages": stages} | changes)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sources")
    for number, (name, lengths) in enumerate(SIZES.items()):
        ends = np.cumsum([0, *lengths])
        documents = [list(range(1000 * number + a, 1000 * number + b)) for a, b in zip(ends, ends[1:], strict=False)]
        write_documents(str(folder / name), documents, vocab_size=5000, vocab=5000)
    return folder


@pytest.fixture(scope="module")
def mixed(root: Path) -> MixedSource:
    return open_sources(data(root), SEQ_LEN, seed=5, sequences=8)


def test_every_window_of_every_file_once_an_epoch(mixed: MixedSource) -> None:
    for windows, names in zip(mixed.sources, (["a"], ["b-1", "b-2"], ["c"]), strict=True):
        files = [list(SIZES).index(name) for name in names]
        tokens = [sum(SIZES[name]) for name in names]
        expected = [
            list(range(1000 * file + at, 1000 * file + at + SEQ_LEN + 1))
            for file, count in zip(files, tokens, strict=True)
            for at in range(0, count - SEQ_LEN, SEQ_LEN)
        ]
        assert windows.num_windows == len(expected)
        for epoch in range(3):
            rows = windows.read(np.arange(epoch * len(expected), (epoch + 1) * len(expected)))
            assert sorted(rows.tolist()) == expected and (epoch == 0 or rows.tolist() != expected)


def test_samples_of_a_run_come_from_the_stages_sources(mixed: MixedSource) -> None:
    batch = mixed.batch(np.arange(5000))
    rows = batch["input_ids"]
    files = rows[:, 0] // 1000
    assert np.all(rows == rows[:, :1] + np.arange(SEQ_LEN)) and np.array_equal(batch["labels"], rows + 1)
    assert set(files[:24]) == {0, 3} and set(files[24:50]) == {0, 1, 2} and set(files[50:]) == {1, 2, 3}
    shares = np.bincount(files[50 : 50 + 4096], minlength=4) / 4096
    assert shares[3] == 0.75 and shares[0] == 0
    assert np.array_equal(mixed.batch(np.array([4321, 7, 4999]))["input_ids"], rows[[4321, 7, 4999]])


def test_tokens_of_every_sample_are_those_of_its_documents(mixed: MixedSource) -> None:
    data = {dataset.prefix: dataset for windows in mixed.sources for dataset in windows.datasets}
    for sample in [*range(200), 10**9]:
        parts = pieces(mixed, sample)
        read = [data[p.prefix].document(_local(mixed, p))[p.first : p.first + p.tokens] for p in parts]
        assert np.array_equal(np.concatenate(read), mixed.batch(np.array([sample]))["input_ids"][0])


def _local(mixed: MixedSource, piece: Any) -> int:
    """Number of a piece's document in its file."""
    return piece.document - (len(SIZES["b-1"]) if piece.prefix.endswith("b-2") else 0)


def test_documents_lead_back_to_their_samples(mixed: MixedSource) -> None:
    samples, sequences = 400, 8
    seen = {(sample, p) for sample in range(samples) for p in pieces(mixed, sample)}
    back = set()
    for name, files in {"a": ["a"], "b": ["b-1", "b-2"], "c": ["c"]}.items():
        for document in range(sum(len(SIZES[file]) for file in files)):
            for sight in sights(mixed, name, document, samples, sequences):
                assert sight.sample in samples_of_step(sight.step, sequences)
                back.add((sight.sample, name, document, sight.first, sight.tokens))
    assert back == {(sample, p.source, p.document, p.first, p.tokens) for sample, p in seen}


def test_tracing_is_instant_at_any_step(mixed: MixedSource) -> None:
    (first, *_) = pieces(mixed, 10**12)
    windows = next(w for w in mixed.sources if w.name == first.source)
    number = mixed.mixture.locate(np.array([10**12]))[1][0]
    epoch = int(number) // windows.num_windows
    assert mixed.mixture.sample_of(mixed.sources.index(windows), int(number)) == 10**12 and epoch > 10**9


def test_the_command_traces_both_ways(root: Path, tmp_path: Path) -> None:
    config = tmp_path / "run.toml"
    config.write_text(
        f"""
[model]
flavor = "debugmodel"
vocab_size = 5000
[training]
seq_len = 4
steps = 20
local_batch_size = 4
global_batch_size = 8
[data]
root = "{root}"
[[data.sources]]
name = "b"
paths = ["b-*"]
weight = 1.0
[[data.sources]]
name = "c"
paths = ["c"]
weight = 3.0
""",
        encoding="utf-8",
    )
    step = run_python("scripts/trace_data.py", "--config", str(config), "--step", "2", "--json")
    assert (step.returncode, step.stderr) == (0, "")
    rows = [json.loads(line) for line in step.stdout.splitlines()]
    assert [row["sample"] for row in rows] == list(range(8, 16))
    part = rows[3]["pieces"][0]
    name = f"{part['source']}:{part['document']}"
    back = run_python("scripts/trace_data.py", "--config", str(config), "--document", name, "--world-size", "2")
    assert back.returncode == 0 and f"step 2  sequence {rows[3]['sample']}  " in back.stdout
    for arguments, words in (
        (["--document", "d:0"], 'no source is named "d"; there are b, c'),
        (["--document", "c:40"], '"c" has the documents 0 to 39'),
        (["--document", "c"], "must be SOURCE:N"),
        (["--step", "0"], "steps begin with 1"),
    ):
        wrong = run_python("scripts/trace_data.py", "--config", str(config), *arguments)
        assert (wrong.returncode, wrong.stdout) == (2, "") and words in wrong.stderr, wrong.stderr


def test_what_a_run_reads_is_said(mixed: MixedSource) -> None:
    lines = describe(mixed, steps=100, sequences=8)
    assert lines[0] == "data: 3 sources; their shares change at step 3, step 6.25"
    assert lines[2].split() == "b 0.00 % → 75.00 % → 25.00 % of 80 tokens, read".split() + lines[2].split()[-4:]
    for line, epochs in zip(lines[1:], mixed.epochs(800), strict=True):
        assert line.endswith(read_words(epochs))


def test_how_often_a_source_is_read_is_never_said_to_be_0_times() -> None:
    words = {
        0: "not read",
        0.0004: "read 0.0004 times",
        0.034: "read 0.034 times",
        0.1: "read 0.10 ",
        12: "read 12.00 ",
    }
    for epochs, said in words.items():
        assert read_words(epochs).startswith(said)


def test_stages_that_cut_sequences_into_rows(root: Path) -> None:
    """Weights and lengths stay as they were where a stage does not set them; what is read is the same."""
    stages = [
        {"from_step": 0, "seq_len": 2},
        {"from_step": 2, "weights": {"a": 1.0}},
        {"from_step": 3, "seq_len": SEQ_LEN},
        {"from_tokens": 200, "seq_len": 1},
    ]
    cut = open_sources(data(root, stages=stages), SEQ_LEN, 5, 8)
    found = [(span.start, span.weights, span.seq_len) for span in cut.mixture.spans]
    (first,) = {weights for start, weights, _ in found if start == 0}
    assert [(start, seq_len) for start, _, seq_len in found] == [(0, 2), (16, 2), (24, None), (50, 1)]
    assert [weights for _, weights, _ in found] == [first] + [(1, 0, 0)] * 3
    assert [cut.mixture.seq_len_at(sample) for sample in (0, 23, 24, 49, 50, 10**12)] == [2, 2, None, None, 1, 1]
    assert [stage.get("seq_len") for stage in identity(cut)["stages"]] == [2, 2, None, 1]
    says, shares = describe(cut, 100, 8)[:2]
    assert says == (
        "data: 4 tokens are read together, cut into rows of 2 tokens from step 0, of 4 tokens from step 3, of 1 tokens"
        " from step 6.25"
    )
    assert shares.endswith("their shares change at step 2")
    whole = open_sources(data(root, stages=[stages[1]]), SEQ_LEN, 5, 8)
    assert np.array_equal(cut.batch(np.arange(24))["input_ids"], whole.batch(np.arange(24))["input_ids"])
    with pytest.raises(UserError, match="seq_len = 3 of the one from step 1 does not divide training.seq_len = 4"):
        open_sources(data(root, stages=[{"from_step": 1, "seq_len": 3}]), SEQ_LEN, 5, 8)


def test_repeated_text(root: Path) -> None:
    source = open_sources(data(root), SEQ_LEN, 5, 8)
    assert check_epochs(data(root), source, 7, 8) == []
    (b, c) = check_epochs(data(root), source, 100, 8)
    assert '"b" is read 1' in b and '"c" is read 1' in c
    limited = [{"name": n, "paths": [f"{n}*"], "weight": 1.0, "max_epochs": 2.0} for n in "ac"]
    settings = data(root, sources=limited, stages=[])
    source = open_sources(settings, SEQ_LEN, 5, 8)
    assert check_epochs(settings, source, 5, 8) == []
    with pytest.raises(UserError) as refused:
        check_epochs(settings, source, 6, 8)
    assert '"a" has 11 sequences, and 6 steps read it 2.1 times; its max_epochs = 2 are over in step 6' in str(
        refused.value
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"sources": [{"name": "a", "paths": ["x*"]}], "stages": []}, ['data.sources: "a"', "x* is no prefix"]),
        (
            {"stages": [{"from_tokens": 400, "weights": {"a": 1.0}}, {"from_step": 1, "weights": {"c": 1.0}}]},
            [
                "data.stages: the one from step 1 begins with sequence 8, not after the one before it, at 100",
                "in order",
            ],
        ),
    ],
)
def test_bad_sources(root: Path, changes: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(UserError) as refused:
        open_sources(data(root, **changes), SEQ_LEN, 5, 8)
    assert all(word in str(refused.value) for word in words), refused.value


def test_shards_that_were_merged_are_left_out(root: Path, tmp_path: Path) -> None:
    for name in ("a-shard-00001-of-00002", "a-shard-00002-of-00002", "a", "b-shard-00001-of-00001", "a-shard-1"):
        (tmp_path / f"{name}.idx").touch()
    found = prefixes_of(Data(), Source(name="x", paths=(f"{tmp_path}/*",)))
    assert {Path(prefix).name for prefix in found} == {"a", "a-shard-1", "b-shard-00001-of-00001"}


def test_more_files_than_may_be_open(root: Path) -> None:
    limits, taken = resource.getrlimit(resource.RLIMIT_NOFILE), []
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, limits[1]))
    try:
        with suppress(OSError):
            while True:
                taken.append(os.open(os.devnull, os.O_RDONLY))
        with pytest.raises(UserError, match="raise the limit .ulimit -n."):
            open_sources(data(root), SEQ_LEN, seed=5, sequences=8)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        for each in taken:
            os.close(each)


def test_sources_of_two_tokenizers(root: Path, tmp_path: Path) -> None:
    for name, tokenizer in (("a", "ab"), ("c", "cd")):
        write_documents(str(tmp_path / name), [[*range(1, 30), 0]], 5000, tokenizer_sha256=tokenizer * 32)
    settings = data(tmp_path, sources=[{"name": n, "paths": [n], "weight": 1.0} for n in "ac"], stages=[])
    with pytest.raises(UserError, match=r"/a and .*/c were tokenised by different tokenizers .*abab.* and cdcd"):
        check_sources(settings, 5000, None, SEQ_LEN)


def test_documents_and_offsets(root: Path) -> None:
    dataset = IndexedDataset(str(root / "a"))
    for document in range(dataset.num_documents):
        place = dataset.document_range(document)
        assert len(place) == SIZES["a"][document]
        assert {dataset.document_at(offset) for offset in place} == {document}
    for offset in (-1, dataset.num_tokens):
        with pytest.raises(IndexError):
            dataset.document_at(offset)
