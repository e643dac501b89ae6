"""Shards and their merging, and looking into token files: inspect, verify, stats; and the scripts' bad input."""

import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pytest
from data_helpers import json_lines, run_python, texts_of, write_documents

from titanling.config.schema import Prepare
from titanling.data.indexed import IndexedDataset, read_sidecar, write_sidecar
from titanling.data.inspect import document_ids, sample_ids, stats, verify
from titanling.data.merge import document_lengths, merge, shards_of
from titanling.data.prepare.report import read_report
from titanling.data.prepare.run import Shard, parse_shard, prepare
from titanling.data.prepare.tokenizer import load_tokenizer
from titanling.errors import UserError


def run(corpus: Path, output: Path, shard: Shard | None = None, fraction: float = 0.2, **settings) -> list[str]:
    return prepare(
        Prepare(text=(str(corpus),), validation_fraction=fraction, workers=1, **settings),
        f"{output}/t",
        f"{output}/v",
        str(corpus.parent / "tokenizer"),
        shard,
    )


def contents(output: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in output.iterdir() if "-shard-" not in path.name}


@pytest.mark.parametrize("fraction", [0.2, 0.01])  # 0.01: no document of some shards falls into validation
@pytest.mark.parametrize("count", [1, 3, 7])
def test_merged_shards_are_the_whole(mixed_corpus: Path, tmp_path: Path, count: int, fraction: float) -> None:
    run(mixed_corpus, tmp_path / "whole", fraction=fraction)
    output = tmp_path / "shards"
    for number in reversed(range(1, count + 1)):
        run(mixed_corpus, output, Shard(number, count), fraction)
        before = {path: path.stat().st_mtime_ns for path in output.iterdir()}
        run(mixed_corpus, output, Shard(number, count), fraction)  # done: nothing is made again
        assert {path: path.stat().st_mtime_ns for path in output.iterdir()} == before
    assert not list(output.glob("*.parts"))
    assert bool(list(output.glob("v-*.empty"))) == (fraction == 0.01 and count > 1)
    for split in ("t", "v"):
        prefix = f"{output}/{split}"
        assert merge(prefix, shards_of(prefix))[1] == []
        verify(prefix)
    assert contents(output) == contents(tmp_path / "whole")


def test_shards_that_cannot_be_merged(mixed_corpus: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    prefix = f"{output}/t"
    with pytest.raises(UserError, match="has no shards"):
        shards_of(prefix)
    for number in (1, 3):
        run(mixed_corpus, output, Shard(number, 3))
    with pytest.raises(UserError, match="shards 2 of 3 are not finished"):
        shards_of(prefix)
    run(mixed_corpus, output, Shard(2, 3))
    run(mixed_corpus, output, Shard(1, 2))
    with pytest.raises(UserError, match="shards of 2 and of 3"):
        shards_of(prefix)
    with pytest.raises(UserError, match="only 7 pieces.*at most 7 shards"):
        run(mixed_corpus, output, Shard(1, 8))
    (mixed_corpus.parent / "tokenizer" / "tokenizer.json").rename(tmp_path / "tokenizer.json")
    (mixed_corpus.parent / "tokenizer").rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="no shard can train it"):
        run(mixed_corpus, tmp_path / "other", Shard(1, 2))
    assert not list((tmp_path / "other").iterdir())
    inputs = [f"{prefix}-shard-{number:05}-of-00003" for number in (1, 2, 3)]
    damaged = Path(f"{inputs[2]}.bin")
    good = damaged.read_bytes()
    damaged.write_bytes(bytes([good[0] ^ 1]) + good[1:])
    sidecar = read_sidecar(inputs[1])
    for said in ("damaged, its SHA-256", "tokenizer_sha256 is not that of"):
        with pytest.raises(UserError, match=said):
            merge(f"{output}/merged", inputs)
        assert not list(output.glob("merged*"))
        damaged.write_bytes(good)
        write_sidecar(inputs[1], sidecar.model_copy(update={"tokenizer_sha256": "0" * 64}))
    write_sidecar(inputs[1], sidecar)
    merge(f"{output}/merged", inputs)
    with pytest.raises(UserError, match="never overwritten"):
        merge(f"{output}/merged", inputs)


def test_what_deduplication_misses_between_shards_is_said(mixed_corpus: Path, tmp_path: Path) -> None:
    (mixed_corpus / "e.jsonl").write_bytes(json_lines(0, 60))
    filters = ({"kind": "deduplicate_documents"},)
    for number in (1, 2):
        run(mixed_corpus, tmp_path / "out", Shard(number, 2), filters=filters)
    made, lines = merge(f"{tmp_path}/out/t", shards_of(f"{tmp_path}/out/t"))
    assert len(lines) == 1 and lines[0].startswith("deduplicate_documents: each shard knew only its own documents")
    report = json.loads((tmp_path / "out" / "t.report.json").read_text())
    assert report["sources"][str(mixed_corpus)]["read"]["documents"] == 220 > made.documents


def test_merging_what_went_through_other_filters(mixed_corpus: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    for number, least in ((1, 1), (2, 4)):
        run(mixed_corpus, output, Shard(number, 2), filters=({"kind": "length", "min_words": least},))
    inputs = [f"{output}/t-shard-{number:05}-of-00002" for number in (1, 2)]
    with pytest.raises(
        UserError, match="t-shard-00002-of-00002: was made with other filters or settings than .*-00001"
    ):
        shards_of(f"{output}/t")
    # Given one by one, the same kinds are added up, whatever their settings.
    assert merge(f"{output}/one", inputs)[1] == []
    report = read_report(f"{output}/one")
    assert report["sources"][str(mixed_corpus)]["filters"][0]["documents_in"] == 160 and report["settings"] is None
    run(mixed_corpus, tmp_path / "other", Shard(1, 2))
    inputs[0] = f"{tmp_path}/other/t-shard-00001-of-00002"
    lines = merge(f"{output}/two", inputs)[1]
    assert lines == ["no report is written: the inputs went through different filters (none; length)"]
    verify(f"{output}/two")
    assert not (output / "two.report.json").exists()


SLURM = {f"SLURM_ARRAY_TASK_{name}": value for name, value in (("ID", "7"), ("MIN", "5"), ("MAX", "9"), ("COUNT", "5"))}


def test_which_shard() -> None:
    assert parse_shard("3/8", {}) == (3, 8) and parse_shard("slurm", SLURM) == (3, 5)
    assert Shard(3, 8).name("a/train") == "a/train-shard-00003-of-00008"
    for text in ("0/8", "9/8", "1", "1/", "/2", "a/b", "1/100000"):
        with pytest.raises(UserError, match=f"--shard {text}: must be I/N"):
            parse_shard(text, {})
    with pytest.raises(UserError, match="no task of a job array"):
        parse_shard("slurm", {})
    with pytest.raises(UserError, match="4 of the tasks 5 to 9"):
        parse_shard("slurm", SLURM | {"SLURM_ARRAY_TASK_COUNT": "4"})


def test_documents_of_several_sequences_are_merged_whole(tmp_path: Path) -> None:
    """Megatron's own files may hold more than one sequence to a document."""
    write_documents(f"{tmp_path}/a", [[1, 2, 0], [3, 0], [4, 5, 6, 0]], 10)
    index = tmp_path / "a.idx"
    raw = index.read_bytes()
    whole = np.frombuffer(raw[-32:], "<i8")
    assert whole.tolist() == [0, 1, 2, 3]
    index.write_bytes(raw[:26] + np.int64(3).tobytes() + raw[34:-32] + np.array([0, 2, 3], "<i8").tobytes())
    sidecar = read_sidecar(f"{tmp_path}/a").model_copy(
        update={"documents": 2, "idx_sha256": hashlib.sha256(index.read_bytes()).hexdigest()}
    )
    write_sidecar(f"{tmp_path}/a", sidecar)
    assert document_lengths(f"{tmp_path}/a").tolist() == [5, 4]
    merge(f"{tmp_path}/b", [f"{tmp_path}/a"] * 2)
    dataset = IndexedDataset(f"{tmp_path}/b")
    assert [dataset.document(number).tolist() for number in range(4)] == [[1, 2, 0, 3, 0], [4, 5, 6, 0]] * 2


def test_inspect_and_stats(mixed_corpus: Path, tmp_path: Path) -> None:
    prepare(Prepare(text=(str(mixed_corpus),)), f"{tmp_path}/t", None, f"{tmp_path}/tokenizer")
    prefix, files = f"{tmp_path}/t", load_tokenizer(f"{tmp_path}/tokenizer")
    texts = texts_of(mixed_corpus)
    flat = np.concatenate([document_ids(prefix, number) for number in range(160)])
    assert files.tokenizer.decode(document_ids(prefix, 159)[:-1]) == texts[159]
    ids, documents = sample_ids(prefix, 5, 64)
    assert ids.tolist() == flat[320:385].tolist()
    assert documents.start == np.count_nonzero(flat[:320] == files.eod_id)
    assert documents.stop - 1 == np.count_nonzero(flat[:384] == files.eod_id)
    found = stats(prefix)
    lengths = np.sort([len(document_ids(prefix, number)) for number in range(160)])
    assert list(found.lengths.values()) == [lengths[place] for place in (0, 1, 16, 40, 80, 120, 144, 158, 159)]
    assert found.mean_length == lengths.mean()
    assert found.bytes_per_token == sum(len(text.encode()) for text in texts) / len(flat)
    for call in (lambda: document_ids(prefix, 160), lambda: sample_ids(prefix, len(flat) // 64, 64)):
        with pytest.raises(UserError, match="has .*, no "):
            call()


def test_verify_finds_what_is_wrong(tmp_path: Path) -> None:
    prefix = f"{tmp_path}/t"

    def check(documents: list[list[int]], says: str | None, **changes: object) -> None:
        write_sidecar(prefix, write_documents(prefix, documents, 50).model_copy(update=changes))
        if says is None:
            assert verify(prefix).tokens == sum(map(len, documents))
        else:
            with pytest.raises(UserError, match=says) as error:
                verify(prefix)
            assert "\n" not in str(error.value)
        for path in tmp_path.iterdir():
            path.unlink()

    good = [[1, 2, 0], [3, 0]]
    check(good, None)
    check(good, "t.bin: damaged", bin_sha256="0" * 64)
    check(good, "t.idx: damaged", idx_sha256="0" * 64)
    check([[1, 49, 0]], "token 1 is 49, beyond the vocabulary", vocab_size=49)
    check([[1, 0], [2, 3]], "document 1 does not end with token 0")
    check([[1, 0], [2, 0, 3, 0]], "1 end-of-document tokens stand within documents")


def test_scripts(mixed_corpus: Path, tmp_path: Path) -> None:
    output, tokenizer = tmp_path / "out", str(tmp_path / "tokenizer")
    (tmp_path / "run.toml").write_text('[data.prepare]\nvalidation_fraction = 0.2\nlanguage = "xx"\n')
    text = ["--text", f"a={mixed_corpus}/a.jsonl", f"b={mixed_corpus}/b.jsonl.gz", "--tokenizer", tokenizer]
    options = ["--config", str(tmp_path / "run.toml"), "--output", str(output)]
    arrays = {f"SLURM_ARRAY_TASK_{name}": value for name, value in (("MIN", "0"), ("MAX", "1"), ("COUNT", "2"))}
    for task in "01":
        environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])} | arrays
        environment["SLURM_ARRAY_TASK_ID"] = task
        done = run_python("scripts/prepare_data.py", *text, *options, "--shard", "slurm", env=environment)
        assert done.returncode == 0 and done.stderr == ""
    assert "train-shard-00002-of-00002.report.json" in done.stdout and "bytes/token" in done.stdout
    train = f"{output}/train"
    for arguments, says in (
        (("merge", train), "2 inputs"),
        (("verify", train), "all is well"),
        (("stats", train), "bytes/token"),
        (("inspect", train, "--sample", "1", "--seq-len", "9", "--tokenizer", tokenizer), "10 tokens"),
    ):
        shown = run_python("scripts/data.py", *arguments)
        assert shown.returncode == 0 and says in shown.stdout, shown.stderr
    for arguments, says in (
        (("scripts/data.py", "inspect", train, "--sample", "1", "--tokenizer", tokenizer), "--sample needs --seq-len"),
        (("scripts/prepare_data.py", *options), "--text: give files"),
        (("scripts/prepare_data.py", *text, *options, "--shard", "3/2"), "--shard 3/2: must be I/N"),
    ):
        failed = run_python(*arguments)
        assert failed.returncode == 2 and failed.stderr.startswith("error: ") and says in failed.stderr, failed.stderr
        assert failed.stderr.count("\n") == 1
