"""Streaming sources: every document once an epoch whoever reads it, and the same batches after a resume."""

import gzip
import json
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import VOCAB, TinyData, clean_env, launch_ranks, run_python, run_train, tiny_config

from titanling.config import load_config
from titanling.config.schema import Data, Source
from titanling.data.prepare.tokenizer import load_tokenizer
from titanling.data.stream_files import open_files
from titanling.data.stream_loader import StreamLoader, build_stream_loader
from titanling.data.streaming import Place, Stream, Streams, check_streams, open_streams
from titanling.errors import UserError

SEQ_LEN = 16


def documents(count: int, first: int = 0) -> list[str]:
    """Texts that tell which they are, of different lengths."""
    return [f"document {number}: " + "rain falls on the roof " * (number % 7) for number in range(first, first + count)]


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


@pytest.mark.parametrize("kind", ["jsonl", "gz", "parquet", "hf"])
@pytest.mark.parametrize("shards", [1, 2, 3, 4, 6, 7])
def test_shards_share_all_documents(tmp_path: Path, tiny_data: TinyData, kind: str, shards: int) -> None:
    texts = documents(90)
    write = write_parquet if kind == "parquet" else write_jsonl
    suffix = {"hf": "jsonl", "gz": "jsonl.gz"}.get(kind, kind)
    paths = [write(tmp_path / f"{file}.{suffix}", texts[30 * file : 30 * file + 30]) for file in range(3)]
    settings = {"hf": {"kind": "hf"}, "parquet": {"kind": "parquet"}}.get(kind, {})
    if kind == "hf":
        pytest.importorskip("datasets")
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
