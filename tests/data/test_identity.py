"""Token files that are not what they were: noticed at start, at resume, and while they are read; copies are as good."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_helpers import write_documents

from titanling.checkpoint.resume import check_resumable
from titanling.config.schema import Data
from titanling.data import identity as identity_module
from titanling.data.check_files import check_dataset
from titanling.data.identity import BLOCK_BYTES, BLOCKS, sample_file
from titanling.data.indexed import HEADER, read_sidecar, write_sidecar
from titanling.data.loader import BatchStream, validation_batches
from titanling.data.sources import check_sources, identity, open_sources
from titanling.data.token_files import open_files
from titanling.errors import UserError

VOCAB, SEQ_LEN, EOD = 100, 8, 0
DOCUMENTS = [[*range(1 + n, 6 + n + n % 3), EOD] for n in range(40)]
FLAT = np.array([token for document in DOCUMENTS for token in document])
ENDS = np.cumsum([len(document) for document in DOCUMENTS])
KINDS = ("ours", "megatron", "ds", "npy")


def write(folder: Path, kind: str) -> Data:
    """The same documents as files of one kind, and the [data] that reads them."""
    folder.mkdir(exist_ok=True)
    path = folder / {"ds": "t.ds", "npy": "t.npy"}.get(kind, "t")
    if kind in ("ours", "megatron"):
        write_documents(str(path), DOCUMENTS, VOCAB)
        if kind == "megatron":
            Path(f"{path}.json").unlink()
    else:
        path.write_bytes(FLAT.astype("<u2").tobytes())
        if kind == "ds":
            Path(f"{path}.index").write_bytes(ENDS.astype("<u8").tobytes())
    return Data(train=str(path), eod_id=None if kind == "ours" else EOD)


def state_of(data: Data, **changes: Any) -> dict[str, Any]:
    """What a checkpoint says of its data, after a trip through JSON."""
    source = open_sources(data, SEQ_LEN, 0, 4)
    state = {"model": {}, "config": {}, "step": 3, "tokens_seen": 96, "data": identity(source)} | changes
    source.close()
    return json.loads(json.dumps(state))


def resume(state: dict[str, Any], data: Data) -> list[str]:
    """What the start of a run on these files does that has that checkpoint."""
    check_sources(data, VOCAB, None, SEQ_LEN)
    return check_resumable(Path("step-3"), state, {}, state_of(data)["data"], {})


def rewrite(path: Path, dtype: str, change: Callable[[np.ndarray], object], offset: int = 0) -> None:
    """Change a file's numbers from a byte on, in place."""
    content = path.read_bytes()
    numbers = np.frombuffer(content[offset:], dtype).copy()
    change(numbers)
    with path.open("r+b") as file:
        file.write(content[:offset] + numbers.tobytes())


def permute(tokens: np.ndarray) -> None:
    """Move all tokens but the last: nothing that an index could see."""
    tokens[:] = np.concatenate([np.roll(tokens[:-1], 7), tokens[-1:]])


def one_bit(tokens: np.ndarray) -> None:
    tokens[len(tokens) // 3] ^= 1


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Samples of small files too: 8 blocks of 64 bytes."""
    monkeypatch.setattr(identity_module, "BLOCKS", 8)
    monkeypatch.setattr(identity_module, "BLOCK_BYTES", 64)


def test_a_sample_sees_size_ends_and_blocks_between_and_no_time(tmp_path: Path, small_blocks: None) -> None:
    path, content = tmp_path / "file", bytearray(os.urandom(5000))
    path.write_bytes(content)
    known = sample_file(str(path))
    os.utime(path, (1, 1))
    shutil.copy(path, tmp_path / "copy")
    assert sample_file(str(path)) == sample_file(str(tmp_path / "copy")) == known
    seen = set()
    for place in range(0, 5000, 16):
        content[place] ^= 1
        path.write_bytes(content)
        if sample_file(str(path)) != known:
            seen.add(place // 64)
        content[place] ^= 1
    assert 8 <= len(seen) <= 16 and {0, 4999 // 64} <= seen
    path.write_bytes(content + b"\0")
    assert sample_file(str(path)) != known
    path.write_bytes(b"")
    assert sample_file(str(path))


def test_what_is_no_more_than_the_blocks_is_hashed_whole(tmp_path: Path) -> None:
    path, content = tmp_path / "file", bytearray(BLOCKS * BLOCK_BYTES)
    seen = set()
    for place in (None, 0, BLOCK_BYTES * 3 + 1, len(content) // 2 + 1, len(content) - 1):
        if place is not None:
            content[place] ^= 1
        path.write_bytes(content)
        seen.add(sample_file(str(path)))
    assert len(seen) == 5


@pytest.mark.parametrize("kind", KINDS)
def test_copied_and_moved_files_are_the_same(tmp_path: Path, kind: str) -> None:
    data = write(tmp_path / "here", kind)
    state = state_of(data)
    shutil.copytree(tmp_path / "here", tmp_path / "there")  # with new times
    moved = data.model_copy(update={"train": data.train.replace("here", "there")})
    assert resume(state, moved) == []
    del state["data"]["files"]  # of an earlier version
    assert resume(state, data) == []


@pytest.mark.parametrize("change", [permute, one_bit])
@pytest.mark.parametrize("kind", [*KINDS, "of an earlier version"])
def test_exchanged_tokens_are_refused_and_restoring_them_helps(
    tmp_path: Path, kind: str, change: Callable[[np.ndarray], None]
) -> None:
    data = write(tmp_path, kind if kind in KINDS else "ours")
    if kind == "of an earlier version":
        older = read_sidecar(data.train).model_copy(update={"bin_sample": None, "idx_sample": None})
        write_sidecar(data.train, older)
    path = tmp_path / {"ds": "t.ds", "npy": "t.npy"}.get(kind, "t.bin")
    state, good = state_of(data), path.read_bytes()
    rewrite(path, "<u2", change)
    with pytest.raises(UserError) as refused:
        resume(state, data)
    said = str(refused.value)
    assert ".bin" in said or str(path) in said, said
    assert "restore" in said and "\n" not in said
    path.write_bytes(good)
    assert resume(state, data) == []


def test_a_sidecar_that_was_exchanged_too(tmp_path: Path) -> None:
    """What is consistent in itself, and still not what the run was trained on."""
    data = write(tmp_path, "ours")
    state = state_of(data)
    for path in tmp_path.iterdir():
        path.unlink()
    write_documents(data.train, DOCUMENTS[::-1], VOCAB)
    with pytest.raises(UserError, match=r"trained on other data than this config: the \.bin of source"):
        resume(state, data)


# What of the index: its array, and what becomes of it.
INDICES: dict[str, tuple[str, Callable[[np.ndarray], object]]] = {
    "length beyond": ("lengths", lambda a: a.__setitem__(3, 10**6)),
    "negative length": ("lengths", lambda a: a.__setitem__(3, -4)),
    "lengths exchanged": ("lengths", lambda a: a.__setitem__(slice(3, 5), a[3:5][::-1].copy())),
    "offset beyond": ("pointers", lambda a: a.__setitem__(7, 10**9)),
    "negative offset": ("pointers", lambda a: a.__setitem__(7, -8)),
    "offset between tokens": ("pointers", lambda a: a.__setitem__(7, a[7] + 1)),
    "offsets exchanged": ("pointers", lambda a: a.__setitem__(slice(7, 9), a[7:9][::-1].copy())),
    "documents unsorted": ("documents", lambda a: a.__setitem__(slice(5, 7), a[5:7][::-1].copy())),
    "document beyond": ("documents", lambda a: a.__setitem__(5, 10**9)),
    "negative document": ("documents", lambda a: a.__setitem__(5, -1)),
    "not from the first": ("documents", lambda a: a.__setitem__(0, 1)),
}


@pytest.mark.parametrize("sealed", [True, False])
@pytest.mark.parametrize("case", INDICES)
def test_a_damaged_index_is_refused_at_start(tmp_path: Path, case: str, sealed: bool) -> None:
    """Of Megatron's, whose hash nobody knows, and of ours with a hash of the damaged file."""
    data = write(tmp_path, "ours" if sealed else "megatron")
    array, change = INDICES[case]
    count = len(DOCUMENTS)
    offset = HEADER.size + {"lengths": 0, "pointers": 4 * count, "documents": 12 * count}[array]
    length = {"lengths": 4, "pointers": 8, "documents": 8}[array] * (count + (array == "documents"))
    path, dtype = Path(f"{data.train}.idx"), "<i4" if array == "lengths" else "<i8"
    content = path.read_bytes()
    numbers = np.frombuffer(content[offset : offset + length], dtype).copy()
    change(numbers)
    path.write_bytes(content[:offset] + numbers.tobytes() + content[offset + length :])
    if sealed:
        write_sidecar(data.train, read_sidecar(data.train).model_copy(update={"idx_sample": sample_file(str(path))}))
    with pytest.raises(UserError, match=r"t\.idx") as refused:
        check_sources(data, VOCAB, None, SEQ_LEN)
    assert "\n" not in str(refused.value)


LIES: dict[str, dict[str, Any]] = {
    "documents": {"documents": 39},
    "tokens": {"tokens": 7},
    "end of documents": {"eod_id": 9},
    "size": {"bin_bytes": 2},
    "hash": {"bin_sample": "0" * 32},
    "vocabulary": {"vocab_size": 101},
}


@pytest.mark.parametrize("lie", LIES)
def test_a_sidecar_that_lies(tmp_path: Path, lie: str) -> None:
    data = write(tmp_path, "ours")
    write_sidecar(data.train, read_sidecar(data.train).model_copy(update=LIES[lie]))
    with pytest.raises(UserError, match=r"t\.(json|bin|idx)"):
        check_sources(data, VOCAB, None, SEQ_LEN)


@pytest.mark.parametrize("place", [0, 3, 8, 100, (len(FLAT) - 1) // SEQ_LEN * SEQ_LEN])
@pytest.mark.parametrize("packing", ["concat", "best_fit", "masked", "mixed"])
def test_an_id_beyond_the_vocabulary_is_traced_to_its_document(tmp_path: Path, packing: str, place: int) -> None:
    data = write(tmp_path, "megatron")
    rewrite(Path(f"{data.train}.bin"), "<u2", lambda tokens: tokens.__setitem__(place, VOCAB + 7))
    changes: dict[str, Any] = {"packing": "best_fit", "packing_window": 16} if packing != "concat" else {}
    if packing == "masked":
        changes["document_mask"] = "causal"
    if packing == "mixed":
        good = write(tmp_path / "good", "megatron").train
        named = [{"name": name, "paths": [path], "weight": 1.0} for name, path in (("a", good), ("b", data.train))]
        changes = {"train": None, "sources": named}
    data = Data.model_validate(data.model_dump(exclude_unset=True) | changes)
    source = open_sources(data, SEQ_LEN, 0, 4)
    document = int(np.searchsorted(ENDS, place, side="right"))
    says = rf"t\.bin: token {place}, in document {document}, is 107, .* end with 99 \(sample \d+ of the run\)"
    stream = BatchStream(source, 2, vocab_size=VOCAB)
    reading = iter(stream)
    steps = 2 * sum(each.num_windows for each in source.sources)
    with pytest.raises(UserError, match=says):
        for _ in range(steps):
            next(reading)
    stream.close()


def test_an_id_beyond_the_vocabulary_in_validation(tmp_path: Path) -> None:
    data = write(tmp_path, "npy")
    rewrite(Path(data.train), "<u2", lambda tokens: tokens.__setitem__(100, 65_000))
    files = open_files(data.train, data)
    with pytest.raises(UserError, match=r"t\.npy: token 100, in document \d+, is 65000, .*of validation"):
        list(validation_batches(files, SEQ_LEN, 2, vocab_size=VOCAB))


@pytest.mark.parametrize("what", ["cut off", "changed", "only touched", "index cut off", "replaced"])
@pytest.mark.parametrize("kind", ["ours", "ds"])
def test_files_that_change_while_a_run_reads_them(tmp_path: Path, kind: str, what: str) -> None:
    data = write(tmp_path, kind).model_copy(update={"packing": "best_fit", "packing_window": 16})
    path = tmp_path / {"ours": "t.bin", "ds": "t.ds"}[kind]
    index = tmp_path / {"ours": "t.idx", "ds": "t.ds.index"}[kind]
    source = open_sources(data, SEQ_LEN, 0, 4)
    identity(source)
    if what == "cut off":
        os.truncate(path, 10)
    elif what == "changed":
        rewrite(path, "<u2", permute)
        os.utime(path, (1, 1))  # an older time is another one too
    elif what == "only touched":
        os.utime(path, (1, 1))
    elif what == "index cut off":
        os.truncate(index, 40)
    else:  # the run reads the one that it opened
        path.unlink()
        path.write_bytes(bytes(8))
    if what in ("only touched", "replaced"):
        source.batch(np.arange(40))
        return
    named = index if what == "index cut off" else path
    with pytest.raises(UserError, match=f"{named.name}: (became shorter|was changed while)"):
        source.batch(np.arange(40))


def test_a_good_data_set_passes(tmp_path: Path) -> None:
    for kind in KINDS:
        check_sources(write(tmp_path / kind, kind), VOCAB, None, SEQ_LEN)
    sidecar = check_dataset(str(tmp_path / "ours/t"), VOCAB)
    assert sidecar.bin_sample == sample_file(str(tmp_path / "ours/t.bin"))
