"""What begins and ends documents: with data.prepare.add_bos a bos_token, the same in all files of a run, and known."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_helpers import write_documents
from helpers import TinyData, copy_data, tiny_config

from titanling.config import load_config
from titanling.config.schema import Data, Prepare, Source, TokenWordRatioFilter
from titanling.data.documents import separate_documents
from titanling.data.ends import ends_of
from titanling.data.indexed import IndexedDataset, read_sidecar
from titanling.data.inspect import verify
from titanling.data.loader import build_loader
from titanling.data.merge import merge
from titanling.data.prepare.encode import Encoder
from titanling.data.prepare.run import prepare
from titanling.data.prepare.tokenizer import load_tokenizer, plain_ids, read_tokenizer
from titanling.data.sources import open_sources
from titanling.data.streaming import open_streams
from titanling.data.training_text import open_training_text
from titanling.errors import UserError
from titanling.train import check

Make = Callable[..., str]
BOS, EOD = 0, 1  # of tokenizers that we train


@pytest.fixture(scope="module")
def with_bos(tiny_data: TinyData, tmp_path_factory: pytest.TempPathFactory) -> TinyData:
    """The tiny data, each document begun. Shared: copy it before changing."""
    folder = tmp_path_factory.mktemp("bos")
    settings = Prepare(text=(str(tiny_data.text),), validation_fraction=0.2, add_bos=True)
    shutil.copytree(tiny_data.tokenizer, folder / "tokenizer")
    made = TinyData(folder, tiny_data.text, f"{folder}/train", f"{folder}/validation", f"{folder}/tokenizer")
    prepare(settings, made.train, made.validation, made.tokenizer)
    return made


def refused(message: str, folder: Path, data: TinyData, changes: dict[str, Any]) -> None:
    """A run with these changes ends before it begins."""
    config = load_config(tiny_config(folder, data, changes)).config
    with pytest.raises(UserError, match=message):
        check(config)


def test_documents_begin_with_bos(with_bos: TinyData, tiny_data: TinyData) -> None:
    for now, before in ((with_bos.train, tiny_data.train), (with_bos.validation, tiny_data.validation)):
        one, other = IndexedDataset(now), IndexedDataset(before)
        assert one.num_documents == other.num_documents
        for number in range(one.num_documents):
            assert one.document(number).tolist() == [BOS, *other.document(number).tolist()]
        assert (verify(now).bos_id, read_sidecar(before).bos_id) == (BOS, None)
    assert "bos_id" not in Path(f"{tiny_data.train}.json").read_text()  # files without are what they were


def test_both_backends_begin_documents(with_bos: TinyData) -> None:
    pytest.importorskip("gigatoken")
    texts = ["the rain", "", "falls on <|begin_of_text|> the roof"]
    files = load_tokenizer(with_bos.tokenizer)
    found = [Encoder(files, backend, BOS)(texts) for backend in ("tokenizers", "gigatoken")]
    assert found[0].ids.tolist() == found[1].ids.tolist() and found[0].lengths.tolist() == found[1].lengths.tolist()
    assert found[0].ids[:1] == [BOS] and (found[0].ids == BOS).sum() == 3
    assert found[0].lengths[1] == 2


def test_a_document_that_does_not_begin_so_is_found(tmp_path: Path) -> None:
    write_documents(f"{tmp_path}/a", [[5, 2, 0], [5, 3, 0], [2, 3, 0]], 9, bos_id=5)
    with pytest.raises(UserError, match="document 2 does not begin with token 5"):
        verify(f"{tmp_path}/a")


def test_filters_count_the_text_alone(tiny_data: TinyData, tmp_path: Path) -> None:
    """A filter that keeps just one number of tokens keeps the same document."""
    (tmp_path / "text.jsonl").write_text('{"text": "xylophone"}\n{"text": "rain"}\n')
    number = {"*": float(len(plain_ids(read_tokenizer(tiny_data.tokenizer), "xylophone")))}
    limit = TokenWordRatioFilter(kind="token_word_ratio", max_ratio=number, min_ratio=number)
    for add_bos in (False, True):
        settings = Prepare(text=(f"{tmp_path}/text.jsonl",), add_bos=add_bos, filters=(limit,))
        prepare(settings, f"{tmp_path}/{add_bos}", None, tiny_data.tokenizer)
        assert read_sidecar(f"{tmp_path}/{add_bos}").tokens == number["*"] + 1 + add_bos


def test_merging(with_bos: TinyData, tiny_data: TinyData, tmp_path: Path) -> None:
    made, _ = merge(f"{tmp_path}/both", [with_bos.train, with_bos.validation])
    assert (made.bos_id, verify(f"{tmp_path}/both").bos_id) == (BOS, BOS)
    with pytest.raises(UserError, match="bos_id is not that of .*; prepare both with the same data.prepare.add_bos"):
        merge(f"{tmp_path}/mixed", [with_bos.train, tiny_data.validation])
    assert not list(tmp_path.glob("mixed*"))


def test_streams_begin_documents_as_files_do(with_bos: TinyData, tmp_path: Path) -> None:
    texts = [f"rain number {number} falls" for number in range(9)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    source = Source(name="x", kind="jsonl", paths=(f"{tmp_path}/a.jsonl",), weight=1.0)
    for add_bos in (False, True):
        data = Data(sources=(source,), prepare=Prepare(add_bos=add_bos), shuffle_buffer=1)
        streamed = open_streams(data, with_bos.tokenizer, 16, 0, 1)
        (stream,) = streamed.open(0, 1, {})
        tokens = np.concatenate([stream.window()[:-1] for _ in range(6)])
        prepare(Prepare(text=source.paths, add_bos=add_bos), f"{tmp_path}/{add_bos}", None, with_bos.tokenizer)
        files = IndexedDataset(f"{tmp_path}/{add_bos}")
        assert tokens.tolist() == files.read(0, len(tokens)).tolist()
        assert ("data.prepare.add_bos" in streamed.identity(1, 2)["stream"]) == add_bos


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
def test_packing_and_masks(packing: str, with_bos: TinyData) -> None:
    """A document's first token is its BOS, at position 0, and only where a document is cut does a part lack it."""
    data = Data(train=with_bos.train, packing=packing, document_mask="causal", packing_window=16)
    source = open_sources(data, 2048, 0, 2)
    whole = 0
    for batch, _ in zip(build_loader(source, 2), range(4), strict=False):
        for row in range(2):
            ids = batch["input_ids"][row]
            ends = (ids == EOD).nonzero().flatten().tolist()
            begins = ((ids == BOS) & (batch["labels"][row] >= 0)).nonzero().flatten().tolist()  # not padding
            assert set(begins) >= {end + 1 for end in ends if end + 1 < len(ids) and packing == "concat"}
            positions = separate_documents(batch, EOD)["positions"][row]
            assert all(positions[begin] == 0 for begin in begins)
            whole += len(begins)
    source.close()
    assert whole


def test_all_files_of_a_run_agree(with_bos: TinyData, tiny_data: TinyData, tmp_path: Path) -> None:
    mixed = [{"name": "a", "paths": [tiny_data.train], "weight": 1.0}]
    mixed.append({"name": "b", "paths": [with_bos.train], "weight": 1.0})
    changes = {"data.train": None, "data.sources": mixed}
    refused("begin with token 0 .*and those of .* without one; prepare all with the same", tmp_path, tiny_data, changes)
    changes = {"data.validation": with_bos.validation, "validation.enable": True}
    refused("validation: its documents begin with token 0", tmp_path, tiny_data, changes)
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n' * 9)
    stream = [{"name": "a", "kind": "jsonl", "paths": [f"{tmp_path}/a.jsonl"], "weight": 1.0}]
    changes |= {"data.train": None, "data.sources": stream}
    refused("data.prepare.add_bos = false, by which the sources are streamed", tmp_path, tiny_data, changes)
    check(load_config(tiny_config(tmp_path, tiny_data, changes | {"data.prepare.add_bos": True})).config)  # the advice


def test_the_setting_changed_after_the_files(with_bos: TinyData, tiny_data: TinyData) -> None:
    for data, add_bos in ((with_bos, False), (tiny_data, True)):
        settings = Prepare(text=(str(data.text),), validation_fraction=0.2, add_bos=add_bos)
        with pytest.raises(
            UserError, match="data.prepare.add_bos = .*set it to (true .--add-bos.|false), or prepare under"
        ):
            prepare(settings, data.train, data.validation, data.tokenizer)


@pytest.mark.parametrize(
    ("settings", "says"),
    [({}, "names no bos_token"), ({"bos_token": "<|end_of_text|>"}, "bos_token is eos_token")],
    ids=["none", "eos_token"],
)
def test_tokenizers_that_can_begin_nothing(
    settings: dict[str, str], says: str, tiny_data: TinyData, tmp_path: Path
) -> None:
    shutil.copytree(tiny_data.tokenizer, tmp_path / "tokenizer")
    written = json.dumps({"eos_token": "<|end_of_text|>"} | settings)
    (tmp_path / "tokenizer/tokenizer_config.json").write_text(written)
    wanted = Prepare(text=(str(tiny_data.text),), add_bos=True)
    with pytest.raises(UserError, match=f"tokenizer_config.json.*{says}.* set add_bos = false"):
        prepare(wanted, f"{tmp_path}/t", None, f"{tmp_path}/tokenizer")
    prepare(Prepare(text=wanted.text), f"{tmp_path}/t", None, f"{tmp_path}/tokenizer")  # the advice


@pytest.mark.parametrize("token", ["eos_token", "bos_token"])
def test_a_token_renamed_beside_the_same_tokenizer_json(token: str, with_bos: TinyData, tmp_path: Path) -> None:
    data = copy_data(with_bos, tmp_path / "data")
    settings = Path(data.tokenizer, "tokenizer_config.json")
    before = json.loads(settings.read_text())
    settings.write_text(json.dumps(before | {token: "a"}))
    says = rf"tokenizer_config.json: its {token} is token \d+, but .*train.json says that {int(token == 'eos_token')}"
    refused(says, tmp_path, data, {})
    with pytest.raises(UserError, match=f"{says}.*; restore {token}"):
        prepare(Prepare(text=(str(data.text),), add_bos=True), data.train, data.validation, data.tokenizer)
    settings.write_text(json.dumps(before))  # the advice
    check(load_config(tiny_config(tmp_path, data)).config)


@pytest.mark.parametrize("kind", ["megatron", "ds", "npy"])
def test_the_files_of_others(kind: str, with_bos: TinyData, tiny_data: TinyData, tmp_path: Path) -> None:
    """What begins their documents is seen where they begin with the tokenizer's bos_token, or data.bos_id says it."""
    for data, bos in ((with_bos, BOS), (tiny_data, None)):
        path = foreign(kind, data, tmp_path / str(bos))
        settings = Data(train=path, eod_id=EOD, npy_dtype="uint32")
        ends, said = ends_of(settings, [path], data.tokenizer)
        assert (ends.bos_id, ends.eod_id) == (bos, EOD) and "data.bos_id" in said[0]
        assert ends_of(settings, [path], None)[0].bos_id is None
        told = settings.model_copy(update={"bos_id": BOS})
        if bos is None:
            with pytest.raises(UserError, match="data.bos_id = 0: a document of .* begins with"):
                ends_of(told, [path], None)
        else:
            assert ends_of(told, [path], None)[0].bos_id == BOS


def foreign(kind: str, data: TinyData, folder: Path) -> str:
    folder.mkdir()
    dataset = IndexedDataset(data.train)
    tokens = dataset.read(0, dataset.num_tokens)
    if kind == "megatron":
        for suffix in ("bin", "idx"):
            shutil.copy(f"{data.train}.{suffix}", folder / f"megatron.{suffix}")
        return str(folder / "megatron")
    if kind == "npy":
        tokens.astype("<u4").tofile(folder / "t.npy")
        return str(folder / "t.npy")
    (folder / "t.ds").write_bytes(tokens.astype("<u2").tobytes())
    ends = [dataset.document_range(index).stop for index in range(dataset.num_documents)]
    np.array(ends, "<u8").tofile(folder / "t.ds.index")
    return str(folder / "t.ds")


def test_a_run_says_what_began_its_documents(with_bos: TinyData, tmp_path: Path) -> None:
    config = load_config(tiny_config(tmp_path, with_bos)).config
    text = open_training_text(config.data, config.training, 0, 4, with_bos.tokenizer, print, 0, 1)
    sha256 = read_sidecar(with_bos.train).tokenizer_sha256
    assert text.documents == {"eod_id": EOD, "bos_id": BOS, "tokenizer_sha256": sha256}
