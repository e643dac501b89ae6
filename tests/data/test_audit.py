"""The auditors' log is cut where a run goes on."""

import json
from pathlib import Path

import numpy as np
import pytest
from data_helpers import write_documents

from titanling.config.schema import Data
from titanling.data.audit import AuditLog, cut_after
from titanling.data.sources import MixedSource, open_sources

LINES = [b'{"step": %d, "sequences": [%s]}\n' % (step, b"0" * 9 * step) for step in range(1, 31)]


@pytest.mark.parametrize("step", [0, 1, 9, 10, 29, 30, 99])
@pytest.mark.parametrize("torn", [b"", b'{"step": 31, "seq', b'{"st'])
def test_cut_behind_any_step(tmp_path: Path, step: int, torn: bytes) -> None:
    path = tmp_path / "log"
    path.write_bytes(b"".join(LINES) + torn)
    cut_after(path, step)
    assert path.read_bytes() == b"".join(LINES[:step])
    cut_after(path, step)
    assert path.read_bytes() == b"".join(LINES[:step])


@pytest.fixture
def source(tmp_path: Path) -> MixedSource:
    write_documents(str(tmp_path / "a"), [list(range(1, 60)), list(range(60, 199))], vocab_size=200)
    return open_sources(Data(train=str(tmp_path / "a")), 8, 0, 4)


def test_ranks_come_and_go(tmp_path: Path, source: MixedSource) -> None:
    def run(ranks: int, after: int, until: int) -> None:
        for rank in range(ranks):
            log = AuditLog(tmp_path, source, rank, ranks)
            log.resume_at(after)
            for step in range(after + 1, until + 1):
                log.append(step, 4 * (step - 1), [np.zeros((1, 8), np.int64)] * (4 // ranks))
            log.close()

    def samples() -> dict[str, list[list[int]]]:
        return {
            path.name: [[s["sample"] for s in json.loads(line)["sequences"]] for line in path.read_text().splitlines()]
            for path in sorted((tmp_path / "data").iterdir())
        }

    run(4, 0, 3)
    assert samples()["steps-rank002.jsonl"] == [[2], [6], [10]]
    run(2, 2, 4)
    assert samples() == {
        "steps-rank000.jsonl": [[0], [4], [8, 10], [12, 14]],
        "steps-rank001.jsonl": [[1], [5], [9, 11], [13, 15]],
        "steps-rank002.jsonl": [[2], [6]],
        "steps-rank003.jsonl": [[3], [7]],
    }
    run(1, 0, 1)  # anew
    found = samples()
    assert found.pop("steps-rank000.jsonl") == [[0, 1, 2, 3]]
    assert found == {  # kept
        "steps-rank000.1.jsonl": [[0], [4], [8, 10], [12, 14]],
        "steps-rank001.1.jsonl": [[1], [5], [9, 11], [13, 15]],
        "steps-rank002.1.jsonl": [[2], [6]],
        "steps-rank003.1.jsonl": [[3], [7]],
    }
