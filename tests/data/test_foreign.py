"""Training on token files that others wrote, .ds, .npy and Megatron's without our sidecar, in one mixture with ours."""

import json
import shutil
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import TinyData, run_python, run_train, tiny_config

from titanling.config.schema import Config, Data, Model, Prepare, Source
from titanling.data import token_files
from titanling.data.indexed import IndexedDataset, read_sidecar
from titanling.data.sources import identity, open_sources
from titanling.data.token_files import check_files, facts, hashes, is_foreign
from titanling.data.trace import pieces, sights
from titanling.errors import UserError
from titanling.train import _prepare_data

KINDS = ("ours", "megatron", "ds", "npy")


def convert(data: TinyData, folder: Path) -> dict[str, str]:
    """Kind → the training files in that form, without what only ours have."""
    folder.mkdir(parents=True, exist_ok=True)
    dataset = IndexedDataset(data.train)
    tokens = dataset.read(0, dataset.num_tokens)
    ends = [dataset.document_range(index).stop for index in range(dataset.num_documents)]
    for suffix in ("bin", "idx"):
        shutil.copy(f"{data.train}.{suffix}", folder / f"megatron.{suffix}")
    (folder / "t.ds").write_bytes(tokens.astype("<u2").tobytes())
    (folder / "t.ds.index").write_bytes(struct.pack(f"<{len(ends)}Q", *ends))
    tokens.astype("<u4").tofile(folder / "t.npy")
    return {"ours": data.train} | {kind: str(folder / name) for kind, name in zip(KINDS[1:], NAMES, strict=True)}


NAMES = ("megatron", "t.ds", "t.npy")


@pytest.fixture
def files(tiny_data: TinyData, tmp_path: Path) -> dict[str, str]:
    """Each kind, of the same tokens."""
    return convert(tiny_data, tmp_path / "files")


@pytest.fixture
def eod_id(tiny_data: TinyData) -> int:
    """What ends a document of theirs."""
    return read_sidecar(tiny_data.train).eod_id


def mixture(files: dict[str, str], eod_id: int, changes: dict[str, Any] | None = None) -> Data:
    sources = tuple(Source(name=kind, paths=(path,), weight=1.0) for kind, path in files.items())
    return Data(**({"sources": sources, "eod_id": eod_id, "npy_dtype": "uint32"} | (changes or {})))


def test_all_kinds_hold_the_same(files: dict[str, str], eod_id: int) -> None:
    data = mixture(files, eod_id, {"document_mask": "causal"})
    ours = facts(files["ours"], data)
    for kind, path in files.items():
        assert is_foreign(path) == (kind != "ours")
        found = check_files(path, data, 320, ours.tokenizer_sha256)
        assert (found.tokens, found.eod_id) == (ours.tokens, eod_id)
        assert (found.tokenizer_sha256 is None) == (found.utf8_bytes is None) == (kind != "ours")
    assert len({json.dumps(hashes(path)) for path in files.values()}) == 4
    source = open_sources(data, 32, 0, 4)
    windows = np.arange(source.sources[0].num_windows)
    rows = [each.read_windows(windows).tolist() for each in source.sources]
    assert rows[0] == rows[1] == rows[2] == rows[3]
    datasets = [each.datasets[0] for each in source.sources]  # best-fit packing asks where documents begin
    begins = [dataset.document_starts(0, ours.tokens).tolist() for dataset in datasets]
    assert len(begins[0]) == datasets[0].num_documents - 1 and begins[0] == begins[1] == begins[2] == begins[3]
    some = [dataset.document_starts(begins[0][2], begins[0][9]).tolist() for dataset in datasets]
    assert some[0] == some[1] == some[2] == some[3] == begins[0][3:9]


def test_all_kinds_are_traced_both_ways(files: dict[str, str], eod_id: int) -> None:
    source = open_sources(mixture(files, eod_id), 32, 0, 4)
    steps, seen = 50, {}
    for sample in range(4 * steps):
        for piece in pieces(source, sample):
            seen.setdefault((piece.source, piece.document), []).append((sample, piece.first, piece.tokens))
    assert {name for name, _ in seen} == set(KINDS)
    for (name, document), places in seen.items():
        found = [(s.sample, s.first, s.tokens) for s in sights(source, name, document, 4 * steps, 4)]
        assert sorted(found) == sorted(places)


def test_a_run_over_all_kinds(files: dict[str, str], eod_id: int, tiny_data: TinyData, tmp_path: Path) -> None:
    sources = [{"name": kind, "paths": [path], "weight": 1.0} for kind, path in files.items()]
    sources[2]["paths"] = [files["ds"].replace("t.ds", "*.ds")]
    settings = {
        "data.train": None,
        "data.sources": sources,
        "data.eod_id": eod_id,
        "data.npy_dtype": "uint32",
        "data.document_mask": "causal",
        "data.validation": files["ds"],
        "validation.enable": True,
    }
    path = tiny_config(tmp_path, tiny_data, settings)
    done = run_train("--config", path)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text("utf-8").splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4]
    assert all("val_bits_per_byte" not in row for row in rows) and any("val_loss" in row for row in rows)
    trace = ("scripts/trace_data.py", "--config", tmp_path / "run/config.toml")
    traced = run_python(*trace, "--step", "2", "--json")
    assert traced.returncode == 0, traced.stderr
    read = [piece for line in traced.stdout.splitlines() for piece in json.loads(line)["pieces"]]
    foreign = next(piece for piece in read if piece["source"] != "ours")
    again = run_python(*trace, "--document", f"{foreign['source']}:{foreign['document']}")
    assert "\nstep 2 " in f"\n{again.stdout}", again.stderr
    # Other text under the same name is not what the checkpoint was trained on.
    with open(files["npy"], "r+b") as file:
        file.write(struct.pack("<I", 7))
    refused = run_train("--config", path, "--training.steps=6")
    assert refused.returncode == 2 and 'was trained on other data than this config: the .bin of source "npy"' in (
        refused.stderr
    )


@pytest.mark.parametrize("kind", KINDS[1:])
def test_a_run_over_one(files: dict[str, str], eod_id: int, kind: str) -> None:
    data = Data(train=files[kind], eod_id=eod_id, npy_dtype="uint32")
    known = identity(open_sources(data, 32, 0, 4))
    assert known == identity(open_sources(data, 32, 0, 4))
    assert known["sources"] != identity(open_sources(Data(train=files["ours"]), 32, 0, 4))["sources"]


@pytest.mark.parametrize("kind", KINDS[1:])
def test_nothing_is_prepared_in_their_place(
    files: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    """Where an extended config has text to prepare."""
    before = sorted(Path(files[kind]).parent.iterdir())
    data = Data(train=files[kind], eod_id=0, prepare=Prepare(text=("README.md",)))
    _prepare_data(Config(data=data, model=Model(flavor="minilingua_30m", hf_assets_path=str(tmp_path / "none"))))
    assert sorted(Path(files[kind]).parent.iterdir()) == before and not (tmp_path / "none").exists()
    assert not capsys.readouterr().out


def test_what_is_not_finished_is_not_taken_for_megatrons(files: dict[str, str], eod_id: int) -> None:
    Path(f"{files['megatron']}.json.partial").touch()
    with pytest.raises(UserError, match=r"megatron\.json: no such file, so .* unfinished"):
        check_files(files["megatron"], mixture(files, eod_id), 320, None)


REFUSED: dict[str, tuple[str, dict[str, Any], int, str]] = {
    "no eod, megatron": ("megatron", {"eod_id": None}, 320, "megatron.bin is unfinished or foreign; prepare it"),
    "no eod, ds": ("ds", {"eod_id": None}, 320, "t.ds: does not say where its documents end; set data.eod_id"),
    "another eod, ours": ("ours", {"eod_id": 300}, 320, "data.eod_id = 300: "),
    "another eod, masked": (
        "megatron",
        {"eod_id": 300, "document_mask": "causal"},
        320,
        "not with data.eod_id = 300",
    ),
    "small vocabulary": ("ds", {}, 40, "t.ds: has the token id "),
    "small vocabulary, megatron": ("megatron", {}, 40, "beyond the model's vocabulary of 40"),
    "wide npy read as narrow": ("npy", {"npy_dtype": "uint16"}, 320, 'as of uint32; set data.npy_dtype = "uint32"'),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(files: dict[str, str], eod_id: int, case: str) -> None:
    kind, changes, vocab_size, says = REFUSED[case]
    with pytest.raises(UserError) as caught:
        check_files(files[kind], mixture(files, eod_id, changes), vocab_size, None)
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_a_narrow_npy_read_as_wide(tmp_path: Path, eod_id: int) -> None:
    np.arange(1, 301, dtype="<u2").tofile(tmp_path / "t.npy")
    data = Data(train=str(tmp_path / "t.npy"), eod_id=eod_id, npy_dtype="uint32")
    with pytest.raises(UserError, match=r"vocabulary of 320; .* or data.npy_dtype to uint16"):
        check_files(str(tmp_path / "t.npy"), data, 320, None)


def test_ids_are_looked_at_from_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_files, "SAMPLE_TOKENS", 8)
    path, data = tmp_path / "t.npy", Data(train=str(tmp_path / "t.npy"), eod_id=1)
    for at in (0, 1000, 999):
        tokens = np.full(1001, 5, "<u2")
        tokens[at] = 320
        tokens.tofile(path)
        with pytest.raises(UserError, match="token id 320"):
            check_files(str(path), data, 320, None)


def test_the_identity_of_a_file_sees_its_ends_and_its_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_files, "END_BYTES", 10)
    path, seen = tmp_path / "t.npy", set()
    for content in (b"a" * 40, b"a" * 41, b"b" + b"a" * 39, b"a" * 39 + b"b", b"a" * 12):
        path.write_bytes(content)
        seen.add(hashes(str(path))["bin_sha256"])
    assert len(seen) == 5
