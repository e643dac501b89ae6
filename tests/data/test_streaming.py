"""Streaming sources: every document once an epoch whoever reads it, and the same batches after a resume."""

import gzip
import json
import re
from collections import Counter
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import VOCAB, TinyData, run_python, tiny_config

from titanling.config import load_config
from titanling.config.check import check_runnable
from titanling.config.schema import Data, Source, Training
from titanling.data.prepare.tokenizer import load_tokenizer
from titanling.data.stream_files import open_files
from titanling.data.stream_loader import StreamLoader, build_stream_loader
from titanling.data.streaming import Streams, check_streams, open_streams
from titanling.data.training_text import open_training_text
from titanling.errors import UserError

SEQ_LEN = 16


def documents(count: int, first: int = 0) -> list[str]:
    """Texts that tell which they are, of different lengths."""
    return [f"document {number}: " + f"rain {number} falls " * (number % 7) for number in range(first, first + count)]


def write_jsonl(path: Path, texts: list[str], field: str = "text") -> str:
    lines = "".join(json.dumps({field: text, "id": number}) + "\n" for number, text in enumerate(texts)).encode()
    with gzip.open(path, "wb") if path.suffix == ".gz" else path.open("wb") as file:
        file.write(lines)
    return str(path)


def write_parquet(path: Path, texts: list[str]) -> str:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"id": range(len(texts)), "text": texts}), path, row_group_size=7)
    return str(path)


def source(*paths: str, name: str = "x", **settings: Any) -> Source:
    return Source(**({"name": name, "kind": "jsonl", "paths": paths, "weight": 1.0} | settings))


def streams(data: TinyData, *sources: Source, **settings: Any) -> Streams:
    data_settings = Data(sources=sources, **({"shuffle_buffer": 8} | settings))
    return open_streams(data_settings, data.tokenizer, SEQ_LEN, seed=3, sequences=4)


def loader(streamed: Streams, rank: int = 0, ranks: int = 1, said: list[str] | None = None) -> StreamLoader:
    return build_stream_loader(streamed, 2, (said if said is not None else []).append, rank, ranks)


def text_of(data: TinyData, tokens: list[int]) -> list[str]:
    """Documents of a token stream, the last perhaps cut."""
    files = load_tokenizer(data.tokenizer)
    return files.tokenizer.decode(tokens, skip_special_tokens=False).split(files.tokenizer.id_to_token(files.eod_id))


def read_to_the_end(streamed: Streams, shard: int, shards: int) -> list[list[int]]:
    """Windows of one shard up to the end of max_epochs."""
    (stream,) = streamed.open(shard, shards, {})
    windows: list[list[int]] = []
    with pytest.raises(UserError, match=r'"x": its max_epochs = 3 are over for shard'):
        while True:
            windows.append(stream.window().tolist())
    return windows


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """`datasets` without a network, and with a cache of its own."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("hub"))


SPLITS = [("jsonl", shards) for shards in (1, 2, 3, 4, 6)]
SPLITS += [(kind, shards) for kind in ("gz", "parquet", "hf") for shards in (4, 6)]


@pytest.mark.parametrize(("kind", "shards"), SPLITS)
def test_shards_share_all_documents(
    tmp_path: Path, tiny_data: TinyData, request: pytest.FixtureRequest, kind: str, shards: int
) -> None:
    texts = documents(90)
    write = write_parquet if kind == "parquet" else write_jsonl
    suffix = {"hf": "jsonl", "gz": "jsonl.gz"}.get(kind, kind)
    paths = [write(tmp_path / f"{file}.{suffix}", texts[30 * file : 30 * file + 30]) for file in range(3)]
    settings = {"hf": {"kind": "hf"}, "parquet": {"kind": "parquet"}}.get(kind, {})
    if kind == "hf":
        request.getfixturevalue("hub")
        paths = [str(tmp_path)]
    streamed = streams(tiny_data, source(*paths, max_epochs=3.0, **settings))
    owners: dict[str, int] = {}
    for shard in range(shards):
        windows = read_to_the_end(streamed, shard, shards)
        assert all(before[-1] == after[0] for before, after in zip(windows, windows[1:], strict=False))
        *whole, _ = text_of(tiny_data, [token for window in windows for token in window[:-1]])
        # Once an epoch, but for the end of the last one, which is less than a window.
        assert set(Counter(whole).values()) <= {2, 3} and Counter(whole).total() > 2.5 * len(set(whole))
        assert not owners.keys() & set(whole)
        owners |= dict.fromkeys(whole, shard)
    assert owners.keys() == set(texts)
    sizes = Counter(owners.values()).values()
    assert max(sizes) - min(sizes) <= 3  # one of each file


def tensors(loader: StreamLoader, count: int) -> list[torch.Tensor]:
    """(2, batch, seq): inputs and labels of so many batches."""
    found = [torch.stack([batch["input_ids"], batch["labels"]]) for batch in islice(loader, count)]
    assert all(each.dtype == torch.int64 and torch.equal(each[0, :, 1:], each[1, :, :-1]) for each in found)
    return found


@pytest.mark.parametrize(("rank", "ranks", "workers"), [(0, 1, 0), (2, 3, 0), (0, 1, 2), (1, 2, 2)])
def test_a_resumed_loader_reads_the_same(
    tmp_path: Path, tiny_data: TinyData, rank: int, ranks: int, workers: int
) -> None:
    paths = [write_jsonl(tmp_path / f"{file}.jsonl", documents(40, first=40 * file)) for file in range(2)]
    sources = [source(paths[0], name="x", weight=3.0), source(paths[1], name="y", weight=1.0)]

    def fresh() -> StreamLoader:
        return loader(streams(tiny_data, *sources, workers=workers), rank, ranks)

    straight = tensors(fresh(), 60)  # several epochs of x, and blocks that end within a batch
    assert len({each[0].numpy().tobytes() for each in straight}) > 50
    for stop in (1, 7, 32) if workers else (0, 1, 7, 32):
        first = fresh()
        assert all(map(torch.equal, tensors(first, stop), straight))
        text = json.dumps(first.state_dict())
        assert len(text) < 1000 + 500 * workers
        again = fresh()
        again.load_state_dict(json.loads(text))
        assert all(map(torch.equal, tensors(again, 15), straight[stop : stop + 15]))


@pytest.mark.parametrize("change", [lambda s: s.pop("batches"), lambda s: s.update(places={"x": ["a"]})])
def test_a_state_that_is_none(tmp_path: Path, tiny_data: TinyData, change: Callable[[dict[str, Any]], object]) -> None:
    streamed = streams(tiny_data, source(write_jsonl(tmp_path / "x.jsonl", documents(9))))
    first = loader(streamed)
    tensors(first, 3)
    state = first.state_dict()
    change(state["dataset_state"])
    with pytest.raises((LookupError, TypeError, ValueError)):
        loader(streamed).load_state_dict(state)


def test_a_mixture_of_streams_and_their_epochs(tmp_path: Path, tiny_data: TinyData) -> None:
    """Shares are exact over all ranks; each source's own documents come in windows of its own."""
    marks = {"x": "rain ", "y": "roof "}
    paths = {name: write_jsonl(tmp_path / f"{name}.jsonl", [mark * 30] * 20) for name, mark in marks.items()}
    sources = [source(paths["x"], name="x", weight=3.0), source(paths["y"], name="y", weight=1.0)]
    streamed, said = streams(tiny_data, *sources), [[], []]
    decode = load_tokenizer(tiny_data.tokenizer).tokenizer.decode
    of_x = 0
    for rank in range(2):
        for batch in islice(loader(streamed, rank, 2, said[rank]), 256):
            for row in batch["input_ids"].tolist():
                assert ("rain" in decode(row)) != ("roof" in decode(row))
                of_x += "rain" in decode(row)
    assert of_x == 768  # of 1,024
    assert said[0][0] == 'data: "x" is read for the 2nd time' and len(said[0]) > 4
    assert streamed.describe(4) == [
        "data: streamed, tokenised by a thread of each rank",
        "  x  75.00 %  of 1 jsonl file",
        "  y  25.00 %  of 1 jsonl file",
    ]


def test_the_buffer_shuffles_and_epochs_differ(tmp_path: Path, tiny_data: TinyData) -> None:
    path = write_jsonl(tmp_path / "x.jsonl", documents(64))

    def order(buffer: int, seed: int = 3) -> list[int]:
        data = Data(sources=(source(path, max_epochs=2.0),), shuffle_buffer=buffer)
        (stream,) = open_streams(data, tiny_data.tokenizer, SEQ_LEN, seed, 4).open(0, 1, {})
        tokens: list[int] = []
        with pytest.raises(UserError):
            while True:
                tokens += stream.window()[:-1].tolist()
        return [int(text.split(":")[0].removeprefix("document ")) for text in text_of(tiny_data, tokens)[:-1]]

    in_order, shuffled = order(1), order(16)
    assert in_order[:64] == list(range(64))
    assert shuffled[:64] != in_order[:64] and shuffled[:64] != shuffled[64:128] and shuffled != order(16, seed=4)
    for block in range(4):
        assert sorted(shuffled[16 * block : 16 * block + 16]) == list(range(16 * block, 16 * block + 16))
    assert sorted(order(1000)[:64]) == list(range(64))  # a block ends with its epoch


def damage_gz(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


def bad_line(line: bytes) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        lines = path.read_bytes().splitlines(keepends=True)
        path.write_bytes(b"".join([*lines[:4], line + b"\n", *lines[5:]]))

    return change


BAD_FILES: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "truncated gz": ("x.jsonl.gz", damage_gz, r"x\.jsonl\.gz: damaged \(Compressed file ended"),
    "no gz": ("x.jsonl.gz", lambda path: path.write_bytes(b"{}\n"), r"x\.jsonl\.gz: damaged .*Not a gzipped"),
    "no zst": ("x.jsonl.zst", lambda path: None, r"x\.jsonl\.zst: damaged"),
    "no json": ("x.jsonl", bad_line(b'{"text": '), r"x\.jsonl:5: not JSON"),
    "no utf-8": ("x.jsonl", bad_line(b'{"text": "\xff"}'), r"x\.jsonl:5: not UTF-8 at byte 10 of the line"),
    "no object": ("x.jsonl", bad_line(b"[]"), r"x\.jsonl:5: no JSON object"),
    "no field": (
        "x.jsonl",
        bad_line(b'{"content": "a"}'),
        r'x\.jsonl:5: no "text" .*; correct text_field of source "x"',
    ),
    "no text": ("x.jsonl", bad_line(b'{"text": 5}'), r'x\.jsonl:5: "text" is int, not a string'),
    "null": ("x.jsonl", bad_line(b'{"text": null}'), r'x\.jsonl:5: "text" is null, not a string'),
    "half a pair": ("x.jsonl", bad_line(rb'{"text": "a\ud800"}'), r"x\.jsonl:5: half a surrogate pair at char"),
    "a null in hf": ("x.hf.jsonl", bad_line(b'{"text": null}'), r'"x": .*, file 1, row 5: "text" is null, not text'),
    "no parquet": ("x.parquet", lambda path: None, r"x\.parquet: damaged"),
    "only empty texts": (
        "x.jsonl",
        lambda path: path.write_bytes(b'{"text": ""}\n\n' * 3),
        r'"x" has no document for shard 1 of 1',
    ),
}


def error_of(reading: StreamLoader) -> str:
    """What reading ends with. Keeps no frame: workers whose loader hangs in a circle take seconds to end."""
    try:
        tensors(reading, 50)
    except UserError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(("case", "workers"), [*((case, 0) for case in BAD_FILES), ("no json", 1), ("truncated gz", 1)])
def test_bad_files(
    tmp_path: Path, tiny_data: TinyData, request: pytest.FixtureRequest, case: str, workers: int
) -> None:
    name, change, says = BAD_FILES[case]
    write_jsonl(tmp_path / name, documents(40))
    change(tmp_path / name)
    kind, path = "parquet" if name.endswith("parquet") else "jsonl", str(tmp_path / name)
    if name.endswith((".zst", ".parquet")):
        pytest.importorskip("pyarrow")
    if ".hf." in name:
        request.getfixturevalue("hub")
        kind, path = "hf", str(tmp_path)
    said = error_of(loader(streams(tiny_data, source(path, kind=kind), workers=workers)))
    assert re.search(says, said) and len(said.splitlines()) == 1, said


def test_compressed_and_other_fields(tmp_path: Path, tiny_data: TinyData) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    texts = documents(30)
    plain = write_jsonl(tmp_path / "a.jsonl", texts, field="body")
    packed = pyarrow.compress(Path(plain).read_bytes(), "zstd", asbytes=True)
    (tmp_path / "a.jsonl.zst").write_bytes(packed)
    compressed = source(str(tmp_path / "*.zst"), text_field="body")
    files = open_files(Data(sources=(compressed,)), compressed)
    assert list(files.read(0, 0, 0, 1)) == list(enumerate(texts))
    assert list(files.read(0, 7, 1, 3)) == [row for row in enumerate(texts) if row[0] >= 7 and row[0] % 3 == 1]
    (tmp_path / "a.jsonl.zst").write_bytes(packed[:-20])
    with pytest.raises(UserError, match=r"a\.jsonl\.zst: damaged"):
        list(files.read(0, 0, 0, 1))
    parquet = source(write_parquet(tmp_path / "a.parquet", texts), kind="parquet")
    read = open_files(Data(sources=(parquet,)), parquet).read
    assert list(read(0, 9, 2, 4)) == [row for row in enumerate(texts) if row[0] >= 9 and row[0] % 4 == 2]


def test_checks_before_a_run(tmp_path: Path, tiny_data: TinyData, hub: None, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_jsonl(tmp_path / "x.jsonl", documents(4), field="body")

    def refused(says: str, vocab_size: int = VOCAB, workers: int = 0, **settings: Any) -> None:
        only = source(**({"paths": (path,), "name": "x"} | settings))  # type: ignore[arg-type]
        data = Data(sources=(only,), workers=workers)
        with pytest.raises(UserError, match=says):
            check_streams(data, tiny_data.tokenizer, vocab_size, SEQ_LEN, 0, 4)

    refused(r'x\.jsonl:1: no "text" \(it has body, id\)')
    refused(r'"x": .*none\.jsonl is no file, nor a glob of any', paths=(str(tmp_path / "none.jsonl"),))
    refused(r"tokenizer.json: token ids reach 319, .* set model.vocab_size to 320", text_field="body", vocab_size=300)
    with monkeypatch.context() as no_fork:
        no_fork.setattr("multiprocessing.get_all_start_methods", lambda: ["spawn"])
        refused(r"data.workers = 2: processes cannot fork on this system", text_field="body", workers=2)
    refused(r'has no column "text" but body, id', kind="hf", paths=(str(tmp_path),))
    refused(r'file 1, row 1: "id" is of type int, not text', kind="hf", paths=(str(tmp_path),), text_field="id")
    refused(r'datasets cannot stream split "other"', kind="hf", paths=(str(tmp_path),), split="other")


def test_what_is_wrong_with_one_rank_ends_all(tmp_path: Path, tiny_data: TinyData) -> None:
    paths = [write_jsonl(tmp_path / f"{file}.jsonl", documents(40)) for file in range(2)]
    bad_line(b"{")(Path(paths[1]))
    data, training = Data(sources=(source(*paths),), shuffle_buffer=4), Training(seq_len=SEQ_LEN, local_batch_size=2)
    said: list[str | None] = []

    def gather(own: str | None) -> list[str | None]:
        said.append(own)
        return list(said)

    for rank in (1, 0):  # each reads a file
        text = open_training_text(data, training, 3, 4, tiny_data.tokenizer, print, rank, 2)
        with pytest.raises(UserError, match=r"1\.jsonl:5: not JSON"):
            text.read(iter(text.loader), 20, gather)
    assert [own is None for own in said] == [False, True]
    assert len(text.read(iter(text.loader), 20, lambda own: [own])) == 20


STREAM = {"name": "x", "kind": "jsonl", "paths": ["x.jsonl"], "weight": 1.0}
REFUSED = {
    "both kinds": (
        {"data.sources": [STREAM, {"name": "y", "paths": ["y"], "weight": 1.0}]},
        'sources has some of kind "tokens" and some that are streamed',
    ),
    "half an epoch": ({"data.sources": [STREAM | {"max_epochs": 1.5}]}, "max_epochs = 1.5: must be a whole number"),
    "two data sets": ({"data.sources": [STREAM | {"kind": "hf", "paths": ["a", "b"]}]}, "one name or folder"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_settings(tmp_path: Path, tiny_data: TinyData, case: str) -> None:
    changes, says = REFUSED[case]
    path = tiny_config(tmp_path, tiny_data, {"data.train": None} | changes)
    with pytest.raises(UserError, match=re.escape(says)):
        load_config(path)


def test_refused_before_torch(tmp_path: Path, tiny_data: TinyData) -> None:
    path = tiny_config(tmp_path, tiny_data, {"data.train": None, "data.sources": [STREAM]})
    with pytest.raises(UserError, match="needs a tokenizer: set model.hf_assets_path"):
        check_runnable(load_config(path, {"model.hf_assets_path": None}).config)
    code = "import sys; from titanling import cli, train\ntry: cli.run(train.main)\n"
    code += "finally: assert 'torch' not in sys.modules"
    run = run_python("-c", code, "--config", path)
    assert run.returncode == 2 and len(run.stderr.splitlines()) == 1, run.stderr
    assert '"x": x.jsonl is no file' in run.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("script", [("trace_data.py", "--step", "1"), ("verify_data.py",)])
def test_looking_into_it_is_refused(tmp_path: Path, tiny_data: TinyData, script: tuple[str, ...]) -> None:
    path = tiny_config(tmp_path, tiny_data, {"data.train": None, "data.sources": [STREAM]})
    run = run_python(f"scripts/{script[0]}", "--config", path, *script[1:])
    assert run.returncode == 2 and "streamed" in run.stderr and len(run.stderr.splitlines()) == 1


def test_parity_is_refused(tmp_path: Path, tiny_data: TinyData) -> None:
    from titanling.parity import compare

    path = write_jsonl(tmp_path / "x.jsonl", documents(9))
    config = tiny_config(tmp_path, tiny_data, {"data.train": None, "data.sources": [STREAM | {"paths": [path]}]})
    with pytest.raises(UserError, match=r"toml: data\.sources: its sources are streamed: one process would"):
        compare(load_config(config), 1)


def test_a_run_goes_on_where_it_was_killed(tmp_path: Path, tiny_data: TinyData) -> None:
    """Across a stage, with masked documents, and bit for bit."""
    from runs import differing, open_trainer, rows, saved_tensors

    from titanling.checkpoint.describe import inspect

    paths = [write_jsonl(tmp_path / f"{name}.jsonl", documents(40)) for name in "xy"]
    settings = {
        "data.train": None,
        "data.sources": [
            {"name": name, "kind": "jsonl", "paths": [path], "weight": weight}
            for name, path, weight in zip("xy", paths, (3.0, 1.0), strict=True)
        ],
        "data.stages": [{"from_step": 5, "weights": {"x": 1.0, "y": 3.0}}],
        "data.shuffle_buffer": 8,
        "data.document_mask": "causal",
        "training.steps": 8,
        "checkpoint.interval": 3,
    }
    with open_trainer(tmp_path / "straight", tiny_data, settings) as trainer:
        trainer.train()
    with open_trainer(tmp_path / "killed", tiny_data, settings) as trainer:
        for _ in range(4):
            trainer.train_step()
            if trainer.step == 3:
                trainer.save()
        trainer.checkpointer.finish()
    with open_trainer(tmp_path / "killed", tiny_data, settings) as trainer:
        assert trainer.step == 3
        trainer.train()
    left, right = (saved_tensors(tmp_path / name / "run/checkpoints/step-000008") for name in ("straight", "killed"))
    assert not differing(left, right)
    assert rows(tmp_path / "straight/run")[3:] == rows(tmp_path / "killed/run")
    described = inspect(str(tmp_path / "killed/run/checkpoints/step-000008"))
    assert "x, 1 jsonl file, streamed; y, 1 jsonl file, streamed" in described
    for changes, says in (
        ({"data.workers": 1}, r"data.workers was 0 and is now 1; restore these \(token files"),
        (
            {"data.train": tiny_data.train, "data.sources": None, "data.stages": None},
            "trained on other data|data.stages",
        ),
    ):
        with pytest.raises(UserError, match=says), open_trainer(tmp_path / "killed", tiny_data, settings | changes):
            pass
