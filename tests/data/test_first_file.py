"""Preparing one's own first file, wherever it lies; and settings that are edited behind finished files."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from data_helpers import texts_of
from helpers import run_python
from tokenizers import Tokenizer

from titanling.config.schema import Prepare
from titanling.data.check_files import check_dataset, verify_hashes
from titanling.data.indexed import IndexedDataset, read_sidecar
from titanling.data.prepare.record import COMPARED, NOT_COMPARED
from titanling.data.prepare.run import Shard, prepare
from titanling.data.prepare.train import train_tokenizer
from titanling.errors import UserError

LINES = [f"line {number}: the rain falls on the roof, ñandú 日本語 {number * number}\n" for number in range(200)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = str(tmp_path_factory.mktemp("shared") / "tokenizer")
    train_tokenizer(iter(LINES), 320, folder)
    return folder


def run(source: Path | str, output: Path, folder: str, shard: Shard | None = None, **settings) -> list[str]:
    settings = {"text": (str(source),), "workers": 1} | settings
    return prepare(Prepare(**settings), f"{output}/train", f"{output}/validation", folder, shard)


def documents(prefix: Path | str, tokenizer: str) -> list[str]:
    dataset, decode = IndexedDataset(str(prefix)), Tokenizer.from_file(f"{tokenizer}/tokenizer.json").decode
    ids = [dataset.document(index).tolist() for index in range(dataset.num_documents)]
    dataset.close()
    assert all(each[-1] == read_sidecar(str(prefix)).eod_id for each in ids)
    return [decode(each[:-1], skip_special_tokens=False) for each in ids]


FIRST: dict[str, tuple[str, str, dict]] = {
    "input.txt": ("input.txt", "".join(LINES), {}),
    "one line": ("input.txt", "".join(LINES).replace("\n", " "), {}),
    "few lines of JSON": ("a.jsonl", "".join(json.dumps({"text": line}) + "\n" for line in LINES[:7]), {}),
    "most for validation": ("a.jsonl", "".join(json.dumps({"text": line}) + "\n" for line in LINES[:3]), {"f": 0.999}),
    "separated": ("a.txt", "<|endoftext|>\n".join(LINES[:9]), {"document_separator": "<|endoftext|>"}),
}


@pytest.mark.parametrize("case", FIRST)
def test_few_documents_are_divided_by_their_tokens(tmp_path: Path, tokenizer: str, case: str) -> None:
    name, content, settings = FIRST[case]
    (tmp_path / name).write_text(content)
    fraction = settings.pop("f", 0.01) if "f" in settings else 0.01
    lines = run(tmp_path / name, tmp_path, tokenizer, validation_fraction=fraction, **settings)
    assert any("no document falls into it; validation is the last" in line for line in lines)
    halves = [documents(tmp_path / split, tokenizer) for split in ("train", "validation")]
    whole = content.removesuffix("\n") if case == "separated" else content
    texts = [line.strip("\n") for line in LINES[:9]] if case == "separated" else None
    if name.endswith("jsonl"):
        texts = [json.loads(row)["text"] for row in content.splitlines()]
    assert "".join(halves[0] + halves[1]) == ("".join(texts) if texts else whole)
    sizes = [read_sidecar(str(tmp_path / split)) for split in ("train", "validation")]
    for half, sidecar, split in zip(halves, sizes, ("train", "validation"), strict=True):
        assert half and sidecar.utf8_bytes == sum(len(text.encode()) for text in half)
        check_dataset(str(tmp_path / split), 320)
        verify_hashes(str(tmp_path / split))
    if case == "input.txt":
        assert halves[0][-1].endswith("\n") and 0.005 < sizes[1].tokens / sizes[0].tokens < 0.02


def test_names_of_documents_that_are_divided(tmp_path: Path, tokenizer: str) -> None:
    rows = [{"text": line * 9, "id": number} for number, line in enumerate(LINES[:3])]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run(tmp_path / "a.jsonl", tmp_path, tokenizer, validation_fraction=0.02, id_field="id")
    assert (tmp_path / "train.ids.jsonl").read_text() == "0\n1\n2\n"
    assert (tmp_path / "validation.ids.jsonl").read_text() == "2\n"


def test_both_parts_of_a_document_begin_with_bos(tmp_path: Path, tokenizer: str) -> None:
    (tmp_path / "input.txt").write_text("".join(LINES))
    run(tmp_path / "input.txt", tmp_path, tokenizer, add_bos=True)
    texts = []
    for split in ("train", "validation"):
        sidecar = read_sidecar(str(tmp_path / split))
        [text] = documents(tmp_path / split, tokenizer)
        assert text.startswith("<|begin_of_text|>")
        texts.append(text.removeprefix("<|begin_of_text|>"))
        assert sidecar.utf8_bytes == len(texts[-1].encode())
    assert "".join(texts) == "".join(LINES)


def test_too_little_for_both(tmp_path: Path, tokenizer: str) -> None:
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(UserError, match=r"too few to keep some for validation; .*validation_fraction = 0") as error:
        run(tmp_path / "a.txt", tmp_path / "out", tokenizer)
    assert "\n" not in str(error.value)
    prepare(Prepare(text=(f"{tmp_path}/a.txt",), validation_fraction=0.0), f"{tmp_path}/t", None, tokenizer)
    assert documents(tmp_path / "t", tokenizer) == ["a"]


def test_no_validation_is_wanted_and_named(tmp_path: Path, tokenizer: str) -> None:
    (tmp_path / "a.txt").write_text("some text")
    with pytest.raises(UserError, match=r"validation_fraction = 0: .* remove data\.validation"):
        run(tmp_path / "a.txt", tmp_path, tokenizer, validation_fraction=0.0)


def test_a_separator_that_is_not_named(tmp_path: Path, tokenizer: str) -> None:
    (tmp_path / "a.txt").write_text("one\n<|endoftext|>\ntwo\n<|endoftext|>\n")
    with pytest.raises(UserError, match=r'set data\.prepare\.document_separator .* = "<\|endoftext\|>"'):
        run(tmp_path / "a.txt", tmp_path / "out", tokenizer)
    run(tmp_path / "a.txt", tmp_path / "out", tokenizer, document_separator="<|endoftext|>")
    run(tmp_path / "a.txt", tmp_path / "whole", tokenizer, format="text")


def test_a_text_that_is_too_long_is_refused_before_others_are_read(tmp_path: Path, tokenizer: str) -> None:
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "b.txt").write_text("one\n\ntwo\n\n")
    with pytest.raises(UserError, match=r"b\.txt: more than 8 bytes in a document; .*document_separator"):
        run(tmp_path, tmp_path / "out", tokenizer, max_document_bytes=8)
    assert not list((tmp_path / "out").rglob("*.parts"))
    run(tmp_path, tmp_path / "out", tokenizer, max_document_bytes=8, document_separator="\n\n")


def test_filters_that_leave_nothing_are_named(tmp_path: Path, tokenizer: str) -> None:
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in LINES[:9]))
    filters = ({"kind": "length", "min_characters": 10}, {"kind": "length", "min_characters": 10_000})
    with pytest.raises(UserError, match=r"leave none of 9 documents \(length 9 → 9, length 9 → 0\)"):
        run(tmp_path / "a.jsonl", tmp_path / "out", tokenizer, filters=filters)


# The output lies in the text, beside it, or around it, and what is killed stays there.


def leave(folder: Path, output: Path) -> None:
    """What killed preparations, runs and exports leave."""
    for name in ("train.bin.partial", "train.parts/ab12/part.json", "train-shard-00001-of-00002.parts/x/training.bin"):
        (output / name).parent.mkdir(parents=True, exist_ok=True)
        (output / name).write_bytes(b'{"text": "eaten"}')
    for name in ("other.bin.partial", "other.parts/x/text.bin"):  # another preparation's
        (folder / "deep" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "deep" / name).write_bytes(b"eaten")
    for name in ("config.json", "model.safetensors", "README.md", "tokenizer.json"):
        (folder / "export" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "export" / name).write_text("eaten")
    for name in ("config.toml", "metrics.jsonl", "checkpoints/step-000002/state.json"):
        (folder / "run" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "run" / name).write_text("eaten")


@pytest.mark.parametrize("source", ["{text}", "{text}/**/*", "{text}/", "{linked}", "{relative}"])
@pytest.mark.parametrize("place", ["text", "text/out", "text/deep/linked"])
def test_outputs_are_no_inputs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, place: str, tokenizer: str
) -> None:
    text, output = tmp_path / "text", tmp_path / place
    (text / "deep").mkdir(parents=True)
    for number in range(30):
        (text / ("" if number % 2 else "deep") / f"{number}.txt").write_text(LINES[number] * 9)
    (tmp_path / "link").symlink_to(text)
    if place.endswith("linked"):
        (tmp_path / "elsewhere").mkdir()
        (text / "deep" / "linked").symlink_to(tmp_path / "elsewhere")
    output.mkdir(exist_ok=True)
    leave(text, output)
    monkeypatch.chdir(tmp_path)
    source = source.format(text=text, linked=tmp_path / "link", relative="text")
    settings = Prepare(text=(source,), vocab_size=300, workers=1)
    for _ in range(2):  # and what the first start has made is no input of the second
        prepare(settings, f"{output}/train", f"{output}/validation", f"{output}/tokenizer")
        found = documents(output / "train", f"{output}/tokenizer") + documents(
            output / "validation", f"{output}/tokenizer"
        )
        assert sorted(found) == sorted(line * 9 for line in LINES[:30])
    # Another preparation of the same folder finds the first one's files.
    prepare(settings, f"{tmp_path}/t", f"{tmp_path}/v", tokenizer)
    assert read_sidecar(f"{tmp_path}/t").documents + read_sidecar(f"{tmp_path}/v").documents == 30


def test_shards_are_no_inputs(tmp_path: Path, tokenizer: str) -> None:
    for number in range(12):
        (tmp_path / f"{number}.txt").write_text(LINES[number])
    for _ in range(2):
        run(tmp_path, tmp_path, tokenizer, Shard(1, 1))
        found = [read_sidecar(str(path)[:-5]).documents for path in tmp_path.glob("*-of-00001.json")]
        assert sum(found) == 12


@pytest.mark.parametrize("name", ["train.json", "train.bin"])
def test_a_text_that_has_the_name_of_an_output(tmp_path: Path, tokenizer: str, name: str) -> None:
    (tmp_path / name).write_text('{"text": "mine"}\n')
    with pytest.raises(UserError, match="train"):
        run(tmp_path / name, tmp_path, tokenizer)
    assert (tmp_path / name).read_text() == '{"text": "mine"}\n' and len(list(tmp_path.iterdir())) == 1
    run(tmp_path / name, tmp_path / "out", tokenizer, format="jsonl")


def test_links(tmp_path: Path) -> None:
    for name in ("a/one.txt", "b/two.txt"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(name)
    (tmp_path / "a" / "again").symlink_to(tmp_path / "a")  # a circle
    (tmp_path / "a" / "b").symlink_to(tmp_path / "b")
    assert texts_of(tmp_path / "a") == ["b/two.txt", "a/one.txt"]
    assert texts_of(tmp_path) == ["a/one.txt", "b/two.txt"]
    (tmp_path / "a" / "gone.txt").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"gone\.txt: is a link to nothing"):
        texts_of(tmp_path)


# Settings that are edited behind finished files.

CHANGES: dict[str, object] = {
    "format": "jsonl",
    "text_field": "body",
    "id_field": "name",
    "document_separator": "\n\n",
    "max_document_bytes": 9999,
    "skip_bad": True,
    "vocab_size": 330,
    "validation_fraction": 0.5,
    "language": "fi",
    "filters": ({"kind": "length", "min_characters": 5},),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tokenizer: str) -> Path:
    folder = tmp_path_factory.mktemp("made")
    rows = [{"text": line * 3, "body": line * 4, "name": number} for number, line in enumerate(LINES[:40])]
    (folder / "text").mkdir()
    for part in range(2):
        lines = [json.dumps(row) + "\n" for row in rows[part::2]]
        (folder / "text" / f"{part}.jsonl").write_text("".join(lines))
    run(folder / "text", folder, tokenizer, vocab_size=320)
    return folder


def test_every_setting_is_compared_or_has_a_reason() -> None:
    assert set(Prepare.model_fields) == {*COMPARED, *NOT_COMPARED} and not set(COMPARED) & set(NOT_COMPARED)
    assert set(CHANGES) == set(COMPARED)


@pytest.mark.parametrize("key", COMPARED)
def test_a_changed_setting_is_refused(made: Path, tmp_path: Path, tokenizer: str, key: str) -> None:
    settings = {"vocab_size": 320} | {key: CHANGES[key]}
    before = {path.name: path.read_bytes() for path in made.glob("*.*")}
    with pytest.raises(UserError, match=rf"train: was prepared with data\.prepare\.{key} = .*; restore that, or give"):
        run(made / "text", made, tokenizer, **settings)
    assert {path.name: path.read_bytes() for path in made.glob("*.*")} == before
    # What the message says works: restored, under new names, or without text.
    run(made / "text", made, tokenizer, vocab_size=320)
    own = f"{tmp_path}/tokenizer" if key == "vocab_size" else tokenizer
    assert run(made / "text", tmp_path, own, **settings)
    assert run("x", made, tokenizer, **(settings | {"text": ()})) == []


@pytest.mark.parametrize("key", NOT_COMPARED)
def test_what_changes_nothing_may_change(made: Path, tokenizer: str, key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(made)
    changes = {"text": ("text/*.jsonl",), "workers": 2, "backend": "tokenizers", "add_bos": False}
    assert "used as it is" in run(made / "text", made, tokenizer, **{"vocab_size": 320, key: changes[key]})[0]


CONTENTS: dict[str, Callable[[Path], object]] = {
    "another file": lambda text: (text / "2.jsonl").write_text('{"text": "new"}\n'),
    "a file less": lambda text: (text / "1.jsonl").unlink(),
    "longer": lambda text: (text / "1.jsonl").write_text((text / "1.jsonl").read_text() * 2),
    "of the same size": lambda text: (text / "1.jsonl").write_text(
        (text / "1.jsonl").read_text().replace("rain", "wind")
    ),
    "exchanged": lambda text: [(text / "1.jsonl").rename(text / "x"), (text / "0.jsonl").rename(text / "1.jsonl")],
}


@pytest.mark.parametrize("case", CONTENTS)
def test_other_text_is_refused(made: Path, tmp_path: Path, tokenizer: str, case: str) -> None:
    import shutil

    shutil.copytree(made, tmp_path / "copy")  # it may lie elsewhere, with other times
    assert "used as it is" in run(tmp_path / "copy" / "text", tmp_path / "copy", tokenizer, vocab_size=320)[0]
    CONTENTS[case](tmp_path / "copy" / "text")
    with pytest.raises(UserError, match=r"train: was prepared from 2 files .*; restore that, or give data\.train"):
        run(tmp_path / "copy" / "text", tmp_path / "copy", tokenizer, vocab_size=320)
    shutil.rmtree(tmp_path / "copy" / "text")
    said = run(tmp_path / "copy" / "text", tmp_path / "copy", tokenizer, vocab_size=320)
    assert "its text is no longer there to be compared" in said[0]


def test_older_files_say_nothing_of_it_and_are_used(made: Path, tmp_path: Path, tokenizer: str) -> None:
    import shutil

    shutil.copytree(made, tmp_path / "old")
    for split in ("train", "validation"):
        path = tmp_path / "old" / f"{split}.json"
        path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "prepared"}))
    said = run(tmp_path / "old" / "text", tmp_path / "old", tokenizer, text_field="body")
    assert all("by which settings it was prepared is not recorded" in line for line in said)


def test_validation_cannot_come_later(tmp_path: Path, tokenizer: str) -> None:
    (tmp_path / "a.txt").write_text("".join(LINES))
    settings = Prepare(text=(f"{tmp_path}/a.txt",))
    prepare(settings, f"{tmp_path}/train", None, tokenizer)
    with pytest.raises(UserError, match=r"validation_fraction = 0\.0, and now it is 0\.01"):
        prepare(settings, f"{tmp_path}/train", f"{tmp_path}/validation", tokenizer)


def test_the_script(tmp_path: Path) -> None:
    (tmp_path / "input.txt").write_text("".join(LINES) * 3)
    arguments = ("scripts/prepare_data.py", "--text", tmp_path / "input.txt", "--output", tmp_path / "out")
    done = run_python(*arguments, "--vocab-size", "300", "--validation-fraction", "0")
    assert done.returncode == 0 and "text: 1 × plain text" in done.stdout, done.stderr
    assert not (tmp_path / "out" / "validation.bin").exists() and (tmp_path / "out" / "train.bin").exists()
    changed = run_python(*arguments, "--vocab-size", "300", "--format", "jsonl", "--validation-fraction", "0")
    assert changed.returncode == 2 and "data.prepare.format" in changed.stderr and changed.stderr.count("\n") == 1
