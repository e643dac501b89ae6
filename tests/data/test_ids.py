"""Names of documents (data.prepare.id_field): kept through filters, workers, shards and merging, and traced by."""

import gzip
import json
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_helpers import json_lines, run_python, texts_of, write_documents

from titanling.config.schema import Prepare
from titanling.data import ids
from titanling.data.ids import find_id, has_ids, ids_path, read_ids, write_ids
from titanling.data.indexed import read_sidecar
from titanling.data.inspect import document_ids, verify
from titanling.data.merge import merge, shards_of
from titanling.data.prepare import pieces
from titanling.data.prepare.readers import Reading, Span, read_documents
from titanling.data.prepare.run import Shard, prepare
from titanling.data.prepare.text import TextFile
from titanling.data.prepare.tokenizer import load_tokenizer
from titanling.data.prepare.train import train_tokenizer
from titanling.errors import UserError


@pytest.mark.parametrize("block", [1, 2, 5, 13, 1 << 24])
def test_names_are_found_both_ways(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    """Wherever the file is cut in blocks."""
    monkeypatch.setattr(ids, "BLOCK", block)
    names = ["a", "", 'two\n"lines"', "ñandú", 17, "17", "aa", "a", -3, "a", "\u2028", "b" * 30]
    parts = [tmp_path / "1", tmp_path / "2", tmp_path / "3"]
    for part, its in zip(parts, (names[:5], [], names[5:]), strict=True):
        part.write_text("".join(json.dumps(name, ensure_ascii=False) + "\n" for name in its), encoding="utf-8")
    prefix = str(tmp_path / "t")
    assert write_ids(prefix, [str(part) for part in parts])
    assert read_ids(prefix, range(12)) == names
    assert read_ids(prefix, [11, 0, 4, 4]) == [names[11], "a", 17, 17]
    assert read_ids(prefix, []) == []
    for name in set(map(str, names)):
        assert find_id(prefix, name) == [place for place, other in enumerate(names) if str(other) == name], name
    assert find_id(prefix, "aaa") == find_id(prefix, "1") == []
    with pytest.raises(UserError, match=r"t\.ids\.jsonl: has 12 lines, none for document 12"):
        read_ids(prefix, [3, 12])
    assert write_ids(prefix, []) is None and not has_ids(prefix)


@pytest.fixture
def corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Documents of every format in several pieces, each with its number as the name, and copies that go."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    rows = [json.loads(line) | {"name": f"n{number}"} for number, line in enumerate(json_lines(0, 100).splitlines())]
    copies = [row | {"name": "copy"} for row in rows[:60:9]]
    lines = [f"{json.dumps(row)}\n".encode() for row in rows[:60] + copies]
    (folder / "a.jsonl").write_bytes(b"".join(lines[:40]))
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(b"".join(lines[40:])))
    pq.write_table(pa.table({key: [row[key] for row in rows[60:]] for key in ("name", "text")}), folder / "c.parquet")
    (folder / "d.txt").write_text("document none: plain text")
    train_tokenizer(texts_of(folder), 400, str(tmp_path / "tokenizer"))
    monkeypatch.setattr(pieces, "PIECE_BYTES", 2000)
    return folder


def run(corpus: Path, output: Path, shard: Shard | None = None, **settings: object) -> str:
    settings = {"id_field": "name", "workers": 1} | settings
    prepare(
        Prepare(text=(str(corpus),), validation_fraction=0.2, **settings),
        f"{output}/t",
        f"{output}/v",
        str(corpus.parent / "tokenizer"),
        shard,
    )
    return f"{output}/t"


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if "-shard-" not in path.name}


def test_each_document_has_its_name(corpus: Path, tmp_path: Path) -> None:
    filters = (
        {"kind": "length", "min_characters": 15},
        {"kind": "deduplicate_documents"},
        {"kind": "length", "min_words": 2},
    )
    train = run(corpus, tmp_path / "one", filters=filters)
    tokenizer = load_tokenizer(str(tmp_path / "tokenizer")).tokenizer
    found = []
    for prefix in (train, f"{tmp_path}/one/v"):
        verify(prefix)
        for document in range(read_sidecar(prefix).documents):
            number = tokenizer.decode(document_ids(prefix, document)).removeprefix("document ").partition(":")[0]
            (name,) = read_ids(prefix, [document])
            assert name == (f"{corpus}/d.txt" if number == "none" else f"n{number}")
            assert find_id(prefix, str(name)) == [document]
            found.append(name)
    assert sorted(found) == sorted([f"{corpus}/d.txt", *(f"n{number}" for number in range(100) if number % 7)])
    run(corpus, tmp_path / "two", filters=filters, workers=3)
    assert files_of(tmp_path / "two") == files_of(tmp_path / "one")
    run(corpus, tmp_path / "plain", filters=filters, id_field=None)
    for suffix in ("bin", "idx"):
        assert (tmp_path / f"plain/t.{suffix}").read_bytes() == (tmp_path / f"one/t.{suffix}").read_bytes()
    assert not has_ids(f"{tmp_path}/plain/t") and "ids" not in (tmp_path / "plain/t.json").read_text()


def test_shards_keep_the_names(corpus: Path, tmp_path: Path) -> None:
    run(corpus, tmp_path / "whole")
    for number in (1, 2, 3):
        prefix = run(corpus, tmp_path / "shards", Shard(number, 3))
    for name in (prefix, f"{tmp_path}/shards/v"):
        assert merge(name, shards_of(name))[1] == []
    assert files_of(tmp_path / "shards") == files_of(tmp_path / "whole")
    sidecar = read_sidecar(prefix)
    same = {"tokenizer_sha256": sidecar.tokenizer_sha256, "eod_id": sidecar.eod_id}
    write_documents(f"{tmp_path}/other", [[1, 2]], sidecar.vocab_size, **same)
    _, lines = merge(f"{tmp_path}/both", [prefix, f"{tmp_path}/other"])
    assert len(lines) == 1 and f"those of {tmp_path}/other have no names" in lines[0]
    assert not has_ids(f"{tmp_path}/both")


def test_damaged_names(corpus: Path, tmp_path: Path) -> None:
    train = run(corpus, tmp_path / "out")
    Path(ids_path(train)).write_text('"other"\n')
    with pytest.raises(UserError, match=r"t\.ids\.jsonl: damaged"):
        verify(train)
    Path(ids_path(train)).unlink()
    with pytest.raises(UserError, match=r"t\.ids\.jsonl: no such file, though .*t\.json says its hash"):
        verify(train)
    Path(ids_path(f"{tmp_path}/new/t")).parent.mkdir()
    Path(ids_path(f"{tmp_path}/new/t")).write_text("somebody's")
    with pytest.raises(UserError, match=r"t\.ids\.jsonl: exists and is never overwritten"):
        run(corpus, tmp_path / "new")


BAD = {
    "null": 'a.jsonl:2: "id" is null, not a string or a whole number',
    "1.5": '"id" is float',
    "true": '"id" is bool',
    '["a"]': '"id" is list',
    '"\\ud800"': "a.jsonl:2: half a surrogate pair",
}


@pytest.mark.parametrize("value", BAD)
def test_bad_names(tmp_path: Path, value: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(f'{{"text": "a", "id": 1}}\n{{"text": "b", "id": {value}}}\n{{"text": "c", "id": "é"}}\n')
    span = Span(TextFile(str(path), "source", None, path.stat().st_size))
    counts = Counter[str]()
    with pytest.raises(UserError, match=BAD[value]):
        list(read_documents(span, Reading(id_field="id"), counts))
    assert not counts["bad"]
    found = list(read_documents(span, Reading(id_field="id", skip_bad=True), counts))
    assert found == [("a", "1"), ("c", '"é"')] and counts["bad"] == 1


def test_fields_that_lack(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a", "url": "x"}\n')
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "a.parquet")
    for name, says in (("a.jsonl", 'a.jsonl:1: no "id" (it has text, url)'), ("a.parquet", 'no column "id"')):
        done = run_python(
            "scripts/prepare_data.py", "--text", str(tmp_path / name), "--id-field", "id", "--output", f"{tmp_path}/out"
        )
        assert done.returncode == 2 and done.stderr.count("\n") == 1
        assert says in done.stderr and "correct data.prepare.id_field (--id-field)" in done.stderr, done.stderr


def test_tracing_and_inspecting_by_name(corpus: Path, tmp_path: Path) -> None:
    train = run(corpus, tmp_path / "out")
    config = tmp_path / "run.toml"
    config.write_text(
        f'[model]\nflavor = "debugmodel"\nvocab_size = 5000\n[training]\nseq_len = 16\nsteps = 40\n'
        f'local_batch_size = 4\n[data]\ntrain = "{train}"\n'
    )
    trace = ("scripts/trace_data.py", "--config", str(config))
    (name,) = read_ids(train, [7])
    found = run_python(*trace, "--id", f"train:{name}")
    assert found.returncode == 0, found.stderr
    by_number = run_python(*trace, "--document", "train:7")
    assert found.stdout.splitlines()[:-1] == by_number.stdout.splitlines()[:-1] != []  # the last tells a time
    step = found.stdout.split()[1]
    shown = run_python(*trace, "--step", step)
    assert f"train:7 ({name}) [" in shown.stdout
    rows = [json.loads(line) for line in run_python(*trace, "--step", step, "--json").stdout.splitlines()]
    assert name in [piece["id"] for row in rows for piece in row["pieces"] if piece["document"] == 7]
    tokenizer = ("--tokenizer", str(tmp_path / "tokenizer"))
    looked = run_python("scripts/data.py", "inspect", train, "--id", str(name), *tokenizer)
    assert looked.stdout.startswith(f"{train}: document 7 ({name}), "), looked.stderr
    for arguments, says in (
        ((*trace, "--id", "train:nobody"), 'no document of "train" has this name'),
        ((*trace, "--id", "train"), "must be SOURCE:ID"),
        (("scripts/data.py", "inspect", train, "--id", "nobody", *tokenizer), "no document of"),
    ):
        wrong = run_python(*arguments)
        assert (wrong.returncode, wrong.stdout) == (2, "") and says in wrong.stderr, wrong.stderr
    Path(ids_path(train)).unlink()
    wrong = run_python(*trace, "--id", f"train:{name}")
    assert wrong.returncode == 2 and "have no names; prepare it with data.prepare.id_field" in wrong.stderr
