"""Streaming sources on two ranks with two workers each: one torchrun of streams.py."""

import json
from pathlib import Path

import pytest
from helpers import TinyData, launch_ranks


@pytest.mark.slow
def test_two_ranks_with_workers(tmp_path: Path, tiny_data: TinyData) -> None:
    for file in range(3):
        texts = [f"text {file} {row} " + f"{file} rain {row} " * (row % 7) for row in range(40)]
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        (tmp_path / f"{file}.jsonl").write_text(lines, encoding="utf-8")
        (tmp_path / "bad").mkdir(exist_ok=True)
        (tmp_path / f"bad/{file}.jsonl").write_text(lines, encoding="utf-8")
    with (tmp_path / "bad/2.jsonl").open("a", encoding="utf-8") as last:
        last.write("{\n")  # row 40 of a file that the ranks share: the first one's
    found = launch_ranks("streams.py", "two", 2, tmp_path, tiny_data, timeout=300)
    assert found["step"] == 3 and found["resumed"] == []
    first, second = ({tuple(row) for batch in rank for row in batch} for rank in found["seen"])
    assert len(first) == len(second) == 12 and not first & second
    assert "data-parallel ranks was 2 and is now 1; restore these" in found["refused"]
    for rank in range(2):  # whichever met it
        assert "bad/2.jsonl:41: not JSON" in (tmp_path / f"error-{rank}.txt").read_text(encoding="utf-8")
    states = [
        json.loads((tmp_path / f"stopped/checkpoints/step-{step:06d}/state.json").read_text(encoding="utf-8"))
        for step in (3, 6)
    ]
    ranks = [state["loader"]["ranks"] for state in states]
    assert [len(each) for each in ranks] == [2, 2] and ranks[0][0] != ranks[0][1]
    assert all(len(json.dumps(each)) < 2000 for each in ranks)
