"""From text to token files: what is found, what is written, that it survives kills, and every bad input."""

import gzip
import hashlib
import itertools
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_helpers import ROOT, run_python, texts_of
from tokenizers import Tokenizer

from titanling.config.schema import Prepare
from titanling.data.check_files import check_dataset, verify_hashes
from titanling.data.indexed import IndexedDataset, read_sidecar
from titanling.data.prepare.readers import Reading, read_texts
from titanling.data.prepare.run import prepare
from titanling.data.prepare.text import find_files
from titanling.data.prepare.tokenise import is_validation
from titanling.data.prepare.tokenizer import load_tokenizer, tokenizer_sha256
from titanling.data.prepare.train import train_tokenizer
from titanling.errors import UserError

WORDS = "def return class self import for in range print lambda ñandú žluťoučký 日本語 🦊 ∑".split()


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """A folder of 60 texts, in two levels, with things that are not texts of the corpus."""
    folder = tmp_path / "corpus"
    (folder / "b" / "c").mkdir(parents=True)
    (folder / ".git").mkdir()
    (folder / ".git" / "blob").write_bytes(b"\xff\xfe")
    (folder / "empty.txt").write_text("")
    for index in range(60):
        name = ("", "b/", "b/c/")[index % 3] + f"{index:02}.txt"
        text = "\r\n".join(" ".join(WORDS[(index * line + line) % 15 :]) + f" {index}" for line in range(1, 30))
        (folder / name).write_bytes(text.encode())
    return folder


def settings(corpus: Path, **changes) -> Prepare:
    return Prepare(**{"text": (str(corpus),), "vocab_size": 350, "validation_fraction": 0.2} | changes)


def run(corpus: Path, output: Path, **changes) -> list[str]:
    return prepare(settings(corpus, **changes), f"{output}/train", f"{output}/validation", f"{output}/tokenizer")


def contents(folder: Path) -> dict[str, str]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


ALL_FILES = sorted(
    [f"{split}.{suffix}" for split in ("train", "validation") for suffix in ("bin", "idx", "json")]
    + ["train.report.json"]
    + [f"tokenizer/{name}.json" for name in ("tokenizer", "tokenizer_config", "special_tokens_map")]
)


def test_files_are_found_in_a_fixed_order(corpus: Path) -> None:
    names = [Path(file.path).relative_to(corpus).as_posix() for file in find_files([str(corpus)])]
    assert names == sorted(names) and len(names) == 61 and not any(".git" in name for name in names)
    by_glob = find_files([f"{corpus}/**/*.txt"])
    assert len(by_glob) == 61
    one = f"{corpus}/00.txt"
    assert [file.path for file in find_files([one, str(corpus), f"{corpus}/*.txt"])][0] == one
    assert len(find_files([one, str(corpus), f"{corpus}/*.txt"])) == 61  # each file once
    for missing in ("nowhere", f"{corpus}/*.md"):
        with pytest.raises(UserError, match="data.prepare.text") as error:
            find_files([missing])
        assert missing in str(error.value)


def test_the_home_folder_may_be_written_short(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(corpus.parent))
    short, full = (find_files([source]) for source in (f"~/{corpus.name}", str(corpus)))
    assert [file.path for file in short] == [file.path for file in full]


def test_the_standard_library_is_enough() -> None:
    files = find_files(["python-stdlib"])
    assert sum(file.bytes for file in files) >= 10_000_000
    paths = [Path(file.path) for file in files]
    assert not any({"site-packages", "test", "__pycache__"} & set(path.parts) for path in paths)
    assert all(path.suffix == ".py" for path in paths) and find_files(["python-stdlib"]) == files
    assert len(files) - len(texts_of("python-stdlib")) - sum(not file.bytes for file in files) <= 5


def test_tokenizer_is_deterministic_and_loads_in_transformers(corpus: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    texts = [path.read_bytes().decode() for path in sorted(corpus.rglob("*.txt"))]
    for name in ("one", "two"):
        train_tokenizer(iter(texts), 350, str(tmp_path / name))
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    ours = load_tokenizer(str(tmp_path / "one"))
    theirs = AutoTokenizer.from_pretrained(tmp_path / "one", local_files_only=True)
    assert ours.vocab_size == len(theirs) == 350
    assert (theirs.eos_token, theirs.eos_token_id) == ("<|end_of_text|>", ours.eod_id)
    assert (theirs.bos_token, theirs.bos_token_id) == ("<|begin_of_text|>", 0)
    for text in [*texts[:5], "\t x  \n\n  ", "unseen: Ω≈ç√ \x00\x7f"]:
        ids = theirs(text)["input_ids"]
        assert ids == ours.tokenizer.encode(text, add_special_tokens=False).ids
        assert theirs.decode(ids) == text


def test_prepare_writes_every_document_once(corpus: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    lines = run(corpus, output)
    assert sorted(contents(output)) == ALL_FILES
    for word in ("documents", "MB", "tokens", "bytes/token", "unigram entropy", "1 skipped", "vocabulary 350"):
        assert word in "\n".join(lines)
    tokenizer = Tokenizer.from_file(f"{output}/tokenizer/tokenizer.json")
    eod = tokenizer.token_to_id("<|end_of_text|>")
    expected = texts_of(corpus)
    total = 0
    for split in ("train", "validation"):
        prefix = f"{output}/{split}"
        sidecar = check_dataset(prefix, 350, tokenizer_sha256(f"{output}/tokenizer"))
        verify_hashes(prefix)
        dataset = IndexedDataset(prefix)
        mine = [text for text in expected if is_validation(text, 0.2) == (split == "validation")]
        documents = [dataset.document(index).tolist() for index in range(dataset.num_documents)]
        assert [tokenizer.decode(ids[:-1]) for ids in documents] == mine
        assert all(ids[-1] == eod and eod not in ids[:-1] for ids in documents)
        assert sidecar.utf8_bytes == sum(len(text.encode()) for text in mine)
        total += dataset.num_documents
    assert total == 60 and read_sidecar(f"{output}/validation").documents > 3


def test_second_call_changes_nothing(corpus: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    run(corpus, output)
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*")}
    lines = run(corpus, output)
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*")} == before
    assert len(lines) == 2 and all("exists" in line for line in lines)


def test_only_what_is_missing_is_made(corpus: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    run(corpus, output)
    before = contents(output)
    stamp = (output / "train.bin").stat().st_mtime_ns
    for suffix in ("bin", "idx", "json"):
        (output / f"validation.{suffix}").unlink()
    run(corpus, output)
    assert contents(output) == before and (output / "train.bin").stat().st_mtime_ns == stamp


def test_without_validation_everything_is_training_text(corpus: Path, tmp_path: Path) -> None:
    prepare(settings(corpus), f"{tmp_path}/t", None, f"{tmp_path}/tokenizer")
    assert read_sidecar(f"{tmp_path}/t").documents == 60


def test_without_text_nothing_is_prepared(tmp_path: Path) -> None:
    assert prepare(Prepare(), f"{tmp_path}/t", None, f"{tmp_path}/tokenizer") == []
    assert not list(tmp_path.iterdir())


def test_special_tokens_in_a_text_are_plain_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a <|end_of_text|> b <|begin_of_text|>")
    prepare(settings(tmp_path / "a.txt"), f"{tmp_path}/t", None, f"{tmp_path}/tokenizer")
    dataset = IndexedDataset(f"{tmp_path}/t")
    ids = dataset.document(0).tolist()
    assert ids.count(1) == 1 and ids[-1] == 1 and 0 not in ids


def test_existing_tokenizer_is_used(corpus: Path, tmp_path: Path) -> None:
    train_tokenizer(iter(["def return " * 50]), 300, str(tmp_path / "mine"))
    before = contents(tmp_path / "mine")
    prepare(settings(corpus), f"{tmp_path}/t", None, f"{tmp_path}/mine")
    assert contents(tmp_path / "mine") == before
    assert read_sidecar(f"{tmp_path}/t").tokenizer_sha256 == before["tokenizer.json"]


def test_large_corpora_train_the_tokenizer_on_a_sample(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from titanling.data.prepare import run as module

    files = find_files([str(corpus)])
    texts = [Path(file.path).read_bytes().decode() for file in files if file.bytes]
    whole = [text for text in texts if not is_validation(text, 0.2)]
    assert list(module._sample(files, Reading(), 0.2)) == whole
    size = sum(map(len, whole))
    monkeypatch.setattr(module, "TOKENIZER_BYTES", size // 4)
    taken = list(module._sample(files, Reading(), 0.2))
    assert 0.5 * size / 4 < sum(map(len, taken)) <= size // 4
    places = [whole.index(text) for text in taken[:-1]]
    assert max(places) > 0.6 * len(whole)  # spread over the corpus


def test_the_tokenizer_sees_every_packed_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from titanling.data.prepare import run as module

    for name in "abcd":  # texts that pack well: each file alone holds more than is needed
        rows = [f"{name}{number} " * 50 for number in range(400)]
        lines = "".join(json.dumps({"text": row}) + "\n" for row in rows)
        (tmp_path / f"{name}.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    files = find_files([f"{tmp_path}/*.gz"])
    monkeypatch.setattr(module, "TOKENIZER_BYTES", 40_000)
    read = []
    reader = lambda *arguments: (read.append(len(text)) or text for text in read_texts(*arguments))  # noqa: E731
    monkeypatch.setattr(module, "read_texts", reader)
    taken = list(module._sample(files, Reading(), 0.0))
    sizes = [sum(len(text) for text in taken if text[0] == name) for name in "abcd"]
    shares = [40_000 * file.bytes / sum(file.bytes for file in files) for file in files]
    assert sizes == pytest.approx(shares, abs=500) and sum(sizes) == 40_000
    assert "" not in taken and sum(read) < 41_000


def test_a_long_text_leaves_room_for_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from titanling.data.prepare import run as module

    for name in "abc":
        (tmp_path / f"{name}.txt").write_text(name * 100_000)
    monkeypatch.setattr(module, "TOKENIZER_BYTES", 60_000)
    texts = list(module._sample(find_files([str(tmp_path)]), Reading(), 0.0))
    assert texts == [name * 20_000 for name in "abc"]


def test_other_tokenizer_is_refused_and_nothing_touched(corpus: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    run(corpus, output)
    (output / "validation.json").unlink()
    (output / "validation.bin").unlink()
    (output / "validation.idx").unlink()
    tokenizer = output / "tokenizer" / "tokenizer.json"
    good = tokenizer.read_text()
    tokenizer.write_text(good + "\n")
    before = contents(output)
    with pytest.raises(UserError, match="another tokenizer") as error:
        run(corpus, output)
    assert "train.json" in str(error.value) and contents(output) == before
    tokenizer.unlink()
    for path in (output / "tokenizer").iterdir():
        path.unlink()
    with pytest.raises(UserError, match="does not exist"):
        run(corpus, output)


def test_foreign_token_files_are_not_overwritten(corpus: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "train.bin").write_bytes(b"precious")
    with pytest.raises(UserError, match="never overwritten"):
        run(corpus, output)
    assert (output / "train.bin").read_bytes() == b"precious"
    assert [path.name for path in output.iterdir()] == ["train.bin"]  # known before any work, also of the other split
    (output / "train.bin").rename(output / "validation.bin")
    with pytest.raises(UserError, match=r"validation\.bin: exists and is never overwritten"):
        run(corpus, output)
    assert [path.name for path in output.iterdir()] == ["validation.bin"]


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda folder: (folder / "b" / "bad.txt").write_bytes(b"abc\xff"), "bad.txt: not UTF-8 at byte 3"),
        (lambda folder: [path.write_text("") for path in folder.rglob("*.txt")], "holds no text"),
        (lambda folder: [path.unlink() for path in folder.rglob("*.txt")], "data.prepare.text"),
    ],
)
def test_bad_text_is_refused_and_leaves_no_token_files(corpus: Path, tmp_path: Path, make: Callable, says: str) -> None:
    make(corpus)
    output = tmp_path / "out"
    with pytest.raises(UserError) as error:
        run(corpus, output)
    assert says in str(error.value) and "\n" not in str(error.value)
    # With more files, or another fraction, parts of the one there are may do.
    kept = {"tokenizer", "train.parts"} if says == "no document" else {"tokenizer"}
    assert {path.name for path in output.iterdir()} <= kept


def test_parquet_without_row_groups_holds_no_text(tmp_path: Path) -> None:
    path = tmp_path / "empty.parquet"
    pq.ParquetWriter(path, pa.schema({"text": pa.string()})).close()
    train_tokenizer(iter(["abc"]), 300, str(tmp_path / "tokenizer"))
    with pytest.raises(UserError, match=r"empty\.parquet: holds no text"):
        prepare(settings(path), f"{tmp_path}/t", None, f"{tmp_path}/tokenizer")
    (tmp_path / "a.txt").write_text("abc")
    prepare(settings(tmp_path / "*.*"), f"{tmp_path}/t", None, f"{tmp_path}/tokenizer")
    assert read_sidecar(f"{tmp_path}/t").documents == 1


def test_bad_tokenizer_directories(corpus: Path, tmp_path: Path) -> None:
    directory = tmp_path / "out" / "tokenizer"
    directory.mkdir(parents=True)
    (directory / "notes.txt").write_text("x")
    with pytest.raises(UserError, match="has no tokenizer.json"):
        run(corpus, tmp_path / "out")
    (directory / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="tokenizer.json: not a tokenizer"):
        run(corpus, tmp_path / "out")
    train_tokenizer(iter(["abc"]), 300, str(tmp_path / "good"))
    for config in (None, "[]", '{"eos_token": null}', '{"eos_token": "<|other|>"}'):
        path = tmp_path / "good" / "tokenizer_config.json"
        path.unlink(missing_ok=True) if config is None else path.write_text(config)
        with pytest.raises(UserError, match="names no eos_token"):
            load_tokenizer(str(tmp_path / "good"))
    (tmp_path / "good" / "tokenizer_config.json").write_text('{"eos_token": {"content": "<|end_of_text|>"}}')
    assert load_tokenizer(str(tmp_path / "good")).eod_id == 1
    with pytest.raises(UserError, match="different prefixes"):
        prepare(settings(corpus), "same", "same", "tokenizer")


def test_unwritable_output_and_full_disk(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="file"):
        run(corpus, tmp_path / "file" / "out")
    output = tmp_path / "out"
    train_tokenizer(iter(["abc"]), 300, str(output / "tokenizer"))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))  # a write beyond fails as on a full disk
    try:
        with pytest.raises(UserError, match="File too large.*free disk space"):
            run(corpus, output)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in output.iterdir()] == ["tokenizer"]
    run(corpus, output)
    verify_hashes(f"{output}/train")


def test_text_that_goes_meanwhile(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from titanling.data.prepare import pipeline

    make_all = pipeline.make_all
    monkeypatch.setattr(pipeline, "make_all", lambda *given: (corpus / "07.txt").unlink() or make_all(*given))
    with pytest.raises(UserError, match=r"07\.txt: is no longer there; put it back, or run again without it"):
        run(corpus, tmp_path / "out")
    monkeypatch.undo()
    run(corpus, tmp_path / "out")


def start_script(corpus: Path, output: Path) -> subprocess.Popen:
    command = [sys.executable, "scripts/prepare_data.py", "--text", str(corpus), "--output", str(output)]
    command += ["--vocab-size", "350", "--validation-fraction", "0.2"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_killed_at_any_moment_and_run_again_gives_the_same_bytes(corpus: Path, tmp_path: Path) -> None:
    run(corpus, tmp_path / "straight")
    expected = contents(tmp_path / "straight")
    output = tmp_path / "killed"
    # Kill when each of these appears: they are the states on the way.
    for moment in ("tokenizer.*.partial", "tokenizer", "train.bin.*", "validation.bin", "train.bin", "train.json"):
        process = start_script(corpus, output)
        while process.poll() is None and not any(output.glob(moment)):
            time.sleep(0.0005)
        process.kill()
        process.communicate()
    assert start_script(corpus, output).communicate()[1] == ""
    assert contents(output) == expected


def test_every_interrupted_commit_is_finished(corpus: Path, tmp_path: Path) -> None:
    """The states between the renames, which a kill hits too rarely: no sidecar yet, claim present."""
    output = tmp_path / "out"
    run(corpus, output)
    expected = contents(output)
    for split, gone in itertools.product(("train", "validation"), (["json"], ["json", "idx"], ["json", "idx", "bin"])):
        for suffix in gone:
            (output / f"{split}.{suffix}").unlink()
        (output / f"{split}.json.partial").write_text('{\n  "format')
        run(corpus, output)
        assert contents(output) == expected


def test_two_processes_at_once(corpus: Path, tmp_path: Path) -> None:
    run(corpus, tmp_path / "straight")
    both = [start_script(corpus, tmp_path / "both") for _ in range(2)]
    assert [process.communicate()[1] for process in both] == ["", ""]
    assert contents(tmp_path / "both") == contents(tmp_path / "straight")


def test_script(corpus: Path, tmp_path: Path) -> None:
    environment = {"env": os.environ | {"PYTHONPATH": str(ROOT)}}
    script = "scripts/prepare_data.py"
    shown = run_python(script, "--help", **environment)
    assert shown.returncode == 0 and "example:" in shown.stdout
    output = ("--output", str(tmp_path / "out"))
    for arguments, says in (
        (("--text", "nowhere"), '"nowhere"'),
        (("--text", str(corpus), "--vocab-size", "3"), "--vocab-size 3:"),
        (("--text", str(corpus), "--validation-fraction", "1.5"), "--validation-fraction 1.5:"),
        (("--text", str(corpus), "--tokenizer", "nowhere"), "--tokenizer nowhere:"),
    ):
        failed = run_python(script, *arguments, *output, **environment)
        assert failed.returncode == 2 and failed.stderr.startswith("error: ") and says in failed.stderr
        assert failed.stderr.count("\n") == 1
    good = run_python(script, "--text", str(corpus), "--validation-fraction", "0.2", *output, **environment)
    assert good.returncode == 0 and good.stderr == "" and "unigram entropy" in good.stdout
    check_dataset(f"{tmp_path}/out/train", 8192)
