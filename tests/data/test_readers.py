"""Reading documents: every format gives the same texts, spans of a file give each line once, and every bad input."""

import gzip
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from titanling.data.prepare import readers
from titanling.data.prepare.readers import Reading, Span, read_texts, row_groups
from titanling.data.prepare.text import TextFile, find_files
from titanling.errors import UserError

TEXTS = ["one\n", "ñandú 日本語 🦊", "", '"quoted" \\ \x00', "x" * 3000, "last"]


def as_lines(texts: list[str], field: str = "text") -> bytes:
    return b"".join(json.dumps({"id": 1, field: text}).encode() + b"\n" for text in texts)


def as_zstd(path: Path, content: bytes) -> None:
    with pa.CompressedOutputStream(pa.OSFile(str(path), "wb"), "zstd") as file:
        file.write(content)


def write(path: Path, content: bytes) -> Path:
    """`content` packed as the suffix says."""
    if path.suffix == ".zst":
        as_zstd(path, content)
    else:
        path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def write_parquet(
    path: Path, texts: list[str | None], field: str = "text", type: pa.DataType | None = None, rows: int = 4
) -> Path:
    table = pa.table({"n": range(len(texts)), field: pa.array(texts, type)})
    pq.write_table(table, path, row_group_size=rows, write_page_checksum=True)
    return path


def read(path: Path, counts: Counter | None = None, start: int = 0, end: int = -1, **reading) -> list[str]:
    span = Span(TextFile(str(path), path.stat().st_size), start, end)
    return list(read_texts(span, Reading(**reading), Counter() if counts is None else counts))


@pytest.mark.parametrize("name", ["a.jsonl", "a.ndjson", "a.jsonl.gz", "a.JSONL.zst", "a.json.gz", "a.parquet"])
def test_every_format_gives_the_same(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name == "a.parquet":
        write_parquet(path, TEXTS, "body")
    else:
        write(path, as_lines(TEXTS, "body").replace(b"\n", b"\r\n \n", 1).removesuffix(b"\n"))
    counts = Counter[str]()
    expected = [text for text in TEXTS if text]
    assert read(path, counts, text_field="body") == expected
    assert counts == {"documents": 5, "empty": 1, "bytes": sum(len(text.encode()) for text in expected)}


@pytest.mark.parametrize("type", [pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
def test_other_strings_of_parquet(tmp_path: Path, type: pa.DataType) -> None:
    assert read(write_parquet(tmp_path / "a.parquet", ["a", "b", "a"], type=type)) == ["a", "b", "a"]


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.md.zst", "a"])
def test_other_files_are_one_document(tmp_path: Path, name: str) -> None:
    assert read(write(tmp_path / name, b"one\r\ntwo \n")) == ["one\r\ntwo \n"]


def test_files_packed_in_several_members(tmp_path: Path) -> None:
    one, two = tmp_path / "a.jsonl.gz", tmp_path / "a.jsonl.zst"
    one.write_bytes(gzip.compress(as_lines(["a"])) + gzip.compress(as_lines(["b"])))
    as_zstd(two, as_lines(["a"]))
    first = two.read_bytes()
    as_zstd(two, as_lines(["b"]))
    two.write_bytes(first + two.read_bytes())
    assert read(one) == read(two) == ["a", "b"]


def test_spans_give_each_line_once(tmp_path: Path) -> None:
    texts = ["a", "bb" * 9, "c", "ddd"]
    for content in (as_lines(texts), as_lines(texts)[:-1]):
        path = write(tmp_path / "a.jsonl", content)
        size = len(content)
        for cut in range(size + 1):
            assert read(path, end=cut) + read(path, start=cut, end=size) == texts if cut else True
    # An error tells the line of the file, whatever the span.
    path = write(tmp_path / "a.jsonl", as_lines(texts) + b"{\n")
    for start in range(len(as_lines(texts)) + 1):
        with pytest.raises(UserError, match=r"a\.jsonl:5: not JSON"):
            read(path, start=start, end=size + 9)


def test_row_groups_are_spans(tmp_path: Path) -> None:
    texts = [str(number) for number in range(1, 11)]
    path = write_parquet(tmp_path / "a.parquet", texts)
    assert [rows for rows, _ in row_groups(str(path))] == [4, 4, 2]
    assert read(path, start=1, end=2) == texts[4:8] and read(path, start=2, end=3) == texts[8:]
    path = write_parquet(tmp_path / "a.parquet", [*texts, None])
    with pytest.raises(UserError, match=r'row 11: "text" is null'):
        read(path, start=2, end=3)


BAD_LINES = {
    b'{"text": "a"': "not JSON (",
    b"[" * 100_000: "not JSON (",
    b'"text"': "no JSON object",
    b'{"body": "a", "id": 1}': 'no "text" (it has body, id); correct data.prepare.text_field',
    b'{"text": 3}': '"text" is int, not a string',
    b'{"text": null}': '"text" is null',
    b'{"text": "\xff"}': "not UTF-8 at byte 10 of the line",
    b'{"text": "a\\ud800"}': "half a surrogate pair at character 1",
    b'{"text": "' + b"y" * 5000 + b'"}': "a document of 5,000 bytes; above data.prepare.max_document_bytes = 4,000",
    b'{"text": "' + b"y" * 1_100_000 + b'"}': "a line of 1,100,013 bytes",
}


@pytest.mark.parametrize("line", BAD_LINES, ids=list(BAD_LINES.values()))
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_bad_lines(tmp_path: Path, line: bytes, suffix: str) -> None:
    good = as_lines(["a"])
    path = write(tmp_path / f"a.jsonl{suffix}", good + line + b"\n" + good)
    with pytest.raises(UserError) as error:
        read(path, max_document_bytes=4000)
    assert str(error.value).startswith(f"{path}:2: {BAD_LINES[line]}") and "\n" not in str(error.value)
    counts = Counter[str]()
    assert read(path, counts, max_document_bytes=4000, skip_bad=True) == ["a", "a"] and counts["bad"] == 1


def test_a_document_may_be_six_times_as_long_in_json(tmp_path: Path) -> None:
    for text in ("\x01" * 400_000, "é" * 400_000):
        path = write(tmp_path / "a.jsonl", as_lines([text]))
        assert read(path, max_document_bytes=len(text.encode())) == [text]


def test_skipped_lines_are_not_numbered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """That would read the file up to the span again for each."""
    monkeypatch.setattr(readers, "_lines_before", lambda path, start: pytest.fail("read again"))
    path = write(tmp_path / "a.jsonl", as_lines(["a"]) + b"{\n" * 3 + as_lines(["b"]))
    counts = Counter[str]()
    assert read(path, counts, start=1, skip_bad=True) == ["b"] and counts["bad"] == 3


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


def garble(path: Path) -> None:
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 40] = bytes(40)
    path.write_bytes(content)


@pytest.mark.parametrize("spoil", [cut, garble, lambda path: path.write_bytes(b"no such format")])
@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.parquet", "a.txt.gz", "a.txt.zst"])
def test_damaged_files(tmp_path: Path, name: str, spoil: Callable[[Path], object]) -> None:
    path = tmp_path / name
    texts = [f"{number * 7919 % 65537} text" for number in range(3000)]
    if name == "a.parquet":
        write_parquet(path, texts, rows=1000)
    else:
        write(path, as_lines(texts))
    spoil(path)
    with pytest.raises(UserError) as error:
        read(path)
    assert str(error.value).startswith(f"{path}:") and "\n" not in str(error.value)
    if name == "a.parquet" and spoil is not garble:
        with pytest.raises(UserError, match="damaged"):
            row_groups(str(path))
    counts = Counter[str]()
    left = read(path, counts, skip_bad=True)
    assert counts["bad"] >= 1 and (spoil is garble or left == texts[: len(left)])


def test_bad_columns_and_texts(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", ["a"], "body")
    with pytest.raises(UserError, match=r'no column "text" \(it has n, body\)'):
        read(path)
    pq.write_table(pa.table({"text": [1, 2]}), path)
    with pytest.raises(UserError, match='row 1: "text" is int'):
        read(path)
    invalid = pa.StringArray.from_buffers(1, pa.py_buffer(b"\0\0\0\0\2\0\0\0"), pa.py_buffer(b"a\xff"))
    pq.write_table(pa.table({"text": invalid}), path)
    with pytest.raises(UserError, match="row 1: not UTF-8 at byte 1"):
        read(path)
    with pytest.raises(UserError, match="b.txt: more than 3 bytes in a document"):
        read(write(tmp_path / "b.txt", b"long"), max_document_bytes=3)


def test_names_of_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a.txt", "b=c.txt"):
        (tmp_path / name).write_text("x")
    monkeypatch.chdir(tmp_path)
    found = find_files(["fi=a.txt", "b=c.txt"])
    assert [(file.path, file.source, file.name) for file in found] == [
        ("a.txt", "fi", "fi"),
        ("b=c.txt", "b=c.txt", None),
    ]
    with pytest.raises(UserError, match='"nowhere" is no file'):
        find_files(["fi=nowhere"])
