"""Formats are told by content: the same documents prepared and streamed, and remedies that work for what is refused."""

import bz2
import gzip
import io
import json
import lzma
import re
import shutil
import subprocess
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_helpers import texts_of

from titanling.config.load import load_config
from titanling.config.schema import Data, Prepare, Source, TextFormat
from titanling.data.formats import WORDS
from titanling.data.prepare.filters.lists import read_list, read_test_texts
from titanling.data.prepare.readers import Reading, Span, read_documents
from titanling.data.prepare.sample import parse_sources
from titanling.data.prepare.text import find_files
from titanling.data.stream_files import open_files
from titanling.errors import UserError

TEXTS = ['one, "two"\nthree', "ñandú 日本語 🦊", "last\tone"]
ROWS = [{"id": number, "text": text} for number, text in enumerate(TEXTS)]
LINES = b"".join(json.dumps(row).encode() + b"\n" for row in ROWS)
ARRAY = json.dumps(ROWS).encode()
PRETTY = json.dumps(ROWS, indent=2, ensure_ascii=False).encode()
OBJECTS = b"\n".join(json.dumps(row, indent=1).encode() for row in ROWS)
CSV = 'id,text\r\n0,"one, ""two""\nthree"\r\n1,ñandú 日本語 🦊\r\n2,last\tone\r\n'.encode()
TABLE = pa.table({"id": [0, 1, 2], "text": TEXTS})
BOM = b"\xef\xbb\xbf"
PLAIN = b"first line, of prose\n[1] and {braces}\n"


def zstd(content: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as file:
        file.write(content)
    return sink.getvalue().to_pybytes()


def parquet(table: pa.Table = TABLE) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink)
    return sink.getvalue()


def arrow(kind: Callable = pa.ipc.new_file, table: pa.Table = TABLE) -> bytes:
    sink = io.BytesIO()
    with kind(sink, table.schema) as file:
        file.write_table(table)
    return sink.getvalue()


READ: dict[str, tuple[str, bytes, list[str]]] = {
    **{
        f"lines {suffix}": (f"a{suffix}", LINES, TEXTS)
        for suffix in (".jsonl", ".ndjson", ".json", ".JSON", ".txt", "")
    },
    **{f"array {suffix}": (f"a{suffix}", ARRAY, TEXTS) for suffix in (".jsonl", ".json", ".txt", "")},
    **{f"pretty {suffix}": (f"a{suffix}", PRETTY, TEXTS) for suffix in (".json", ".txt")},
    **{f"objects {suffix}": (f"a{suffix}", OBJECTS, TEXTS) for suffix in (".json", ".jsonl", ".txt")},
    "one object": ("a.json", b'{\n "text": "x"\n}', ["x"]),
    "an empty array": ("a.json", b" [ ]\n", []),
    "lines with a mark": ("a.jsonl", BOM + LINES, TEXTS),
    "an array with a mark": ("a.json", BOM + ARRAY, TEXTS),
    "csv with a mark": ("a.csv", BOM + CSV, TEXTS),
    "text with a mark": ("a.txt", BOM + PLAIN, [PLAIN.decode()]),
    "crlf, blank lines, no last line end": ("a.jsonl", b"\n" + LINES.replace(b"\n", b"\r\n\r\n").rstrip(), TEXTS),
    "csv": ("a.csv", CSV, TEXTS),
    "csv with semicolons": ("a.csv", b'x;text\n1;"a;b"\n2;c\n', ["a;b", "c"]),
    "tsv": ("a.tsv", b"x\ttext\n1\ta, b\n2\tc\n", ["a, b", "c"]),
    "parquet": ("a.parquet", parquet(), TEXTS),
    "parquet by content": ("a.data", parquet(), TEXTS),
    "arrow": ("a.arrow", arrow(), TEXTS),
    "an arrow stream": ("a", arrow(pa.ipc.new_stream), TEXTS),
    "gz": ("a.jsonl.gz", gzip.compress(LINES), TEXTS),
    "gz in members": ("a.jsonl.gz", gzip.compress(LINES[:20]) + gzip.compress(LINES[20:]), TEXTS),
    "gz by content": ("a.jsonl", gzip.compress(LINES), TEXTS),
    "gz array": ("a.json.gz", gzip.compress(ARRAY), TEXTS),
    "gz text": ("a.TXT.GZ", gzip.compress(PLAIN), [PLAIN.decode()]),
    "bz2": ("a.json.bz2", bz2.compress(PRETTY), TEXTS),
    "xz": ("a.csv.xz", lzma.compress(CSV), TEXTS),
    "zst": ("a.json.zst", zstd(LINES), TEXTS),
    "text": ("a", PLAIN, [PLAIN.decode()]),
    "text of brackets": ("a.txt", b"[Music]\n{{wiki}}\n", ["[Music]\n{{wiki}}\n"]),
    "a citation": ("a.md", b'["Hello," he said]\n', ['["Hello," he said]\n']),
    "code": ("a.py", b"import os,sys\n\nx = {'a': 1}\n", ["import os,sys\n\nx = {'a': 1}\n"]),
    "words like magic": ("a.txt", b"PAR1, ORC and PARENTS. ID3", ["PAR1, ORC and PARENTS. ID3"]),
    "verses": (
        "a.txt",
        b"Sing, O goddess\nthe anger, of\nmany, many\n",
        ["Sing, O goddess\nthe anger, of\nmany, many\n"],
    ),
    "empty": ("a.txt", b"", []),
    "empty lines": ("a.jsonl", b"", []),
}


def streamed(path: Path, **settings: Any) -> list[str]:
    source = Source(**{"name": "x", "kind": "files", "paths": (str(path),), "weight": 1.0} | settings)
    files = open_files(Data(sources=(source,)), source)
    rows = list(files.read(0, 0, 0, 1))
    for first, parts in ((1, 1), (0, 2), (2, 3)):  # from any row, and dealt among several
        expected = [row for row in rows if row[0] >= first and row[0] % parts == parts - 1]
        assert list(files.read(0, first, parts - 1, parts)) == expected
    return [text for _, text in rows]


def prepared(path: Path, **reading: Any) -> list[str]:
    from collections import Counter

    file = find_files([str(path)])[0]
    return [document.text for document in read_documents(Span(file), Reading(**reading), Counter())]


@pytest.mark.parametrize("case", READ)
def test_prepared_and_streamed_the_same(tmp_path: Path, case: str) -> None:
    name, content, texts = READ[case]
    (tmp_path / name).write_bytes(content)
    assert prepared(tmp_path / name) == texts
    assert streamed(tmp_path / name) == texts


def tar(name: str = "a.jsonl") -> bytes:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w") as file:
        member = tarfile.TarInfo(name)
        member.size = len(LINES)
        file.addfile(member, io.BytesIO(LINES))
    return sink.getvalue()


def zipped() -> bytes:
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w") as file:
        file.writestr("a.jsonl", LINES)
    return sink.getvalue()


REFUSED: dict[str, tuple[str, bytes, str]] = {
    "a dictionary": ("a.json", b'{"title": "x", "body": {"en": "y"}}', r'no "text" \(it has title, body, body\.en\)'),
    "a list of texts": ("a.json", b'["a", "b"]', "row 1: no JSON object"),
    "a list in .txt": ("a.txt", b'["a", "b"]', "row 1: no JSON object"),
    "a broken array": ("a.json", ARRAY[:-20], "a.json: document 3: not JSON"),
    "an array without its end": ("a.json", ARRAY[:-1], "a.json: document 4: not JSON"),
    "behind an array": ("a.json", ARRAY + b"\n" + ARRAY, "something follows behind the array"),
    "prose in .json": ("a.json", b"once upon a time", "a.json:1: not JSON"),
    "null": ("a.jsonl", b'{"text": null}', 'a.jsonl:1: "text" is null, not a string'),
    "no string": ("a.json", b'[{"text": ["a"]}]', '"text" is list, not a string'),
    "a cut line": ("a.jsonl", LINES[:-9], "a.jsonl:3: not JSON"),
    "csv without the column": ("a.csv", b"x,y\n1,2\n", r'no column "text" \(it has x, y\)'),
    "csv with uneven rows": ("a.csv", b"x,text\n1,a, b\n", "row 1: 3 cells, and the header has 2"),
    "csv with an open quote": ("a.csv", b'x,text\n1,"a\n', "no CSV"),
    "csv in .txt": ("a.txt", b"id,text\n1,a\n2,b\n", 'looks like a table .* = "csv"'),
    "other csv in .txt": ("a.txt", b"id,body\n1,a\n2,b\n", 'looks like a table .* = "csv"'),
    "tsv in .txt": ("a.txt", b"x\ttext\n1\ta\n", 'looks like a table .* = "csv"'),
    "html": ("a.txt", b"\n<!DOCTYPE html><p>x", 'is HTML; .* = "text"'),
    "xml": ("a.txt", b'<?xml version="1.0"?><mediawiki>', 'is XML; .* = "text"'),
    "zip": ("a.txt", zipped(), "is a zip archive; unpack it"),
    "tar": ("a.tar", tar(), "is a tar archive; unpack it"),
    "tar.gz": ("a.tar.gz", gzip.compress(tar()), "is a tar archive; unpack it"),
    "packed twice": ("a.gz", gzip.compress(gzip.compress(LINES)), "is packed twice"),
    "pdf": ("a.pdf", b"%PDF-1.7\n", "is a PDF"),
    "image": ("a.png", b"\x89PNG\r\n\x1a\n", "is an image"),
    "sentencepiece": ("tokenizer.model", b"\n\x0e\n\x05<unk>\x15\0\0\0\0\x18\x02", "SentencePiece"),
    "zero bytes": ("a.txt", b"abc\0def", 'is binary .* = "text"'),
    "utf-16": ("a.txt", "zwölf".encode("utf-16"), "is UTF-16; convert it"),
    "utf-16 lines": ("a.jsonl", LINES.decode().encode("utf-16"), "is UTF-16; convert it"),
    "utf-16 without a mark": ("a.txt", "zwölf Boxkämpfer".encode("utf-16le"), "is UTF-16LE; convert it"),
    "utf-32": ("a.txt", "zwölf".encode("utf-32"), "is UTF-32; convert it"),
    "latin-1": ("a.txt", "zwölf".encode("latin1"), "not UTF-8 at byte 2; if it is Latin-1, convert it"),
    "latin-1 in csv": ("a.csv", "x,text\n1,zwölf\n".encode("latin1"), "not UTF-8"),
    "no gz": ("a.jsonl.gz", LINES, "damaged"),
    "empty gz": ("a.jsonl.gz", b"", "damaged .*it is empty"),
    "cut gz": ("a.jsonl.gz", gzip.compress(LINES)[:-9], "damaged"),
    "cut bz2": ("a.jsonl.bz2", bz2.compress(LINES)[:-9], "damaged"),
    "cut xz": ("a.jsonl.xz", lzma.compress(LINES)[:-9], "damaged"),
    "parquet in gz": ("a.parquet.gz", gzip.compress(parquet()), "packed once more"),
    "no parquet": ("a.parquet", LINES, "damaged"),
    "cut arrow": ("a.arrow", arrow()[:-30], "damaged"),
    "two columns of one name": (
        "a.parquet",
        parquet(pa.table([pa.array(["x"]), pa.array(["y"])], names=["text", "text"])),
        '2 columns are named "text"',
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_in_one_line_both_ways(tmp_path: Path, case: str) -> None:
    name, content, says = REFUSED[case]
    path = tmp_path / name
    path.write_bytes(content)
    for read in (prepared, streamed):
        with pytest.raises(UserError, match=says) as error:
            read(path)
        assert str(error.value).startswith(f"{path}") and "\n" not in str(error.value)
    # Left out, it does not end what reads other files.
    assert prepared(path, skip_bad=True) in ([], TEXTS[:2], TEXTS)


def told(path: Path) -> str:
    """The command in brackets that a refusal tells."""
    with pytest.raises(UserError) as error:
        prepared(path)
    command = re.search(r"\(((?:iconv|python) .*)\)[ ,]", f"{error.value} ")
    assert command, error.value
    return command[1].replace("), or set data.prepare.skip_bad (--skip-bad", "")


@pytest.mark.parametrize("case", ["utf-16", "utf-16 lines", "utf-16 without a mark", "utf-32", "latin-1"])
@pytest.mark.skipif(shutil.which("iconv") is None, reason="the remedy is iconv")
def test_the_remedy_for_other_encodings_works(tmp_path: Path, case: str) -> None:
    name, content, _ = REFUSED[case]
    path = tmp_path / f"it's {name}"
    path.write_bytes(content)
    subprocess.run(told(path).split("), or ")[0], shell=True, check=True)
    assert prepared(path) and [file.path for file in find_files([str(tmp_path)])] == [str(path)]


@pytest.mark.parametrize("case", ["zip", "tar", "tar.gz"])
def test_the_remedy_for_archives_works(tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, content, _ = REFUSED[case]
    (tmp_path / name).write_bytes(content)
    module, path, folder = re.match(r"python -m (\w+) -e (\S+) ([^\s)]+)", told(tmp_path / name)).groups()
    monkeypatch.setattr("sys.argv", [module, "-e", path, folder])
    {"zipfile": zipfile, "tarfile": tarfile}[module].main()
    assert texts_of(folder) == TEXTS


OVERRIDES = {
    "html": ("text", 1),
    "csv in .txt": ("csv", 2),
    "other csv in .txt": ("text", 1),
    "zero bytes": ("text", 1),
    "a dictionary": ("text", 1),
    "prose in .json": ("text", 1),
}


@pytest.mark.parametrize("case", OVERRIDES)
def test_the_format_that_a_refusal_names_works(tmp_path: Path, case: str) -> None:
    name, content, _ = REFUSED[case]
    path, (format, count) = tmp_path / name, OVERRIDES[case]
    path.write_bytes(content)
    assert len(prepared(path, format=format)) == len(streamed(path, format=format)) == count


def test_every_format_may_be_set() -> None:
    assert set(get_args(TextFormat)) == {"auto", *WORDS}
    assert Prepare.model_fields["format"].default == Source.model_fields["format"].default == "auto"


def test_documents_between_separators(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(BOM + b"one\r\ntwo\r\n<|endoftext|>\r\nthree<|endoftext|>\n\n<|endoftext|>four\n")
    texts = ["one\r\ntwo", "three", "four"]
    for block in (1, 7, 1 << 20):
        monkeypatch.setattr("titanling.data.prepare.readers.BLOCK", block)
        assert prepared(path, document_separator="<|endoftext|>") == texts
    assert streamed(path, document_separator="<|endoftext|>") == texts
    path.write_bytes(b"a\nb\r\n\r\nc\n\n\n")
    assert prepared(path, document_separator="\n\n") == ["a\nb", "c"]
    assert prepared(path, document_separator="\n") == ["a", "b", "c"]


def test_large_values_are_read_a_document_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("titanling.data.prepare.values.BLOCK", 5)
    monkeypatch.setattr("titanling.data.formats.HEAD", 8)
    for content in (PRETTY, ARRAY, OBJECTS):
        (tmp_path / "a.json").write_bytes(content)
        assert prepared(tmp_path / "a.json") == TEXTS


def test_a_field_within_a_field(tmp_path: Path) -> None:
    rows = [{"meta": {"body": "x"}, "text": 1}]
    (tmp_path / "a.jsonl").write_text(json.dumps(rows[0]))
    (tmp_path / "b.parquet").write_bytes(parquet(pa.Table.from_pylist(rows)))
    (tmp_path / "c.arrow").write_bytes(arrow(table=pa.Table.from_pylist(rows)))
    for path in sorted(tmp_path.iterdir()):
        assert prepared(path, text_field="meta.body") == ["x"]


def test_a_folder_that_datasets_has_saved(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.DatasetDict({"train": datasets.Dataset.from_dict({"text": TEXTS})}).save_to_disk(tmp_path / "saved")
    assert texts_of(tmp_path / "saved") == texts_of(tmp_path / "saved" / "train") == TEXTS
    source = Source(name="x", kind="files", paths=(str(tmp_path / "saved"),), weight=1.0)
    assert [text for _, text in open_files(Data(sources=(source,)), source).read(0, 0, 0, 1)] == TEXTS


def test_a_kind_that_a_file_is_not(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(parquet())
    with pytest.raises(UserError, match=r'is Parquet, and its source is of kind "jsonl"; set kind = "files"'):
        streamed(tmp_path / "a.jsonl", kind="jsonl")
    (tmp_path / "a.jsonl").write_bytes(ARRAY)
    assert streamed(tmp_path / "a.jsonl", kind="jsonl") == TEXTS


def test_a_mark_at_the_beginning_of_any_file(tmp_path: Path) -> None:
    for name, content in {"a.txt": b"w\xc3\xb6rd\n", "b.toml": b'[[sources]]\nname = "x"\ntext = "y"\n'}.items():
        (tmp_path / name).write_bytes(BOM + content)
    (tmp_path / "c.toml").write_bytes(BOM + b'[job]\ndescription = "marked"\n')
    assert read_list(str(tmp_path / "a.txt"), None) == ["wörd"]
    assert list(read_test_texts(str(tmp_path / "a.txt"))) == ["wörd\n"]
    assert [source.name for source in parse_sources([str(tmp_path / "b.toml")])] == ["x"]
    assert load_config(tmp_path / "c.toml", {}).config.job.description == "marked"
