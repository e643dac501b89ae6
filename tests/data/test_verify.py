"""Verifying a run's loaders: sound ones pass, and each way of being broken is found."""

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from data_helpers import ROOT, run_python, write_documents

from titanling.data.loader import BatchStream
from titanling.data.mixture import Mixture
from titanling.data.packing import PackedSource
from titanling.data.sources import WindowSource
from titanling.errors import UserError


@pytest.fixture(scope="module")
def script() -> ModuleType:
    """scripts/verify_data.py as a module of this process, so that what it uses can be broken."""
    spec = importlib.util.spec_from_file_location("verify_data", ROOT / "scripts/verify_data.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two sources whose shares change at step 41; 320 sequences in 80 steps."""
    folder = tmp_path_factory.mktemp("verify")
    for number, name in enumerate("xy"):
        random = np.random.default_rng(number)
        documents = [random.integers(1, 5000, size).tolist() for size in random.geometric(1 / 40, 60)]
        write_documents(str(folder / name), documents, vocab_size=5000, vocab=5000)
    path = folder / "run.toml"
    path.write_text(
        f"""
[model]
flavor = "debugmodel"
vocab_size = 5000
[training]
seq_len = 16
steps = 80
local_batch_size = 1
global_batch_size = 4
[data]
root = "{folder}"
packing_window = 16
[[data.sources]]
name = "x"
paths = ["x"]
weight = 3.0
[[data.sources]]
name = "y"
paths = ["y"]
weight = 1.0
[[data.stages]]
from_step = 40
weights = {{ x = 1.0, y = 3.0 }}
""",
        encoding="utf-8",
    )
    return path


@pytest.fixture
def verify(
    script: ModuleType, config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, dict[str, Any]]]:
    """Runs the command in this process: its exit code and what it prints as JSON."""

    def run(*arguments: str) -> tuple[int, dict[str, Any]]:
        monkeypatch.setattr(sys, "argv", ["verify_data.py", "--config", str(config), "--json", *arguments])
        code = script.main()
        return code, json.loads(capsys.readouterr().out)

    return run


@pytest.mark.parametrize("ranks", ["1", "4"])
@pytest.mark.parametrize("packing", ["concat", "best_fit"])
def test_sound_loaders_pass(verify: Callable, ranks: str, packing: str) -> None:
    code, found = verify("--ranks", ranks, "--steps", "21:80", f"--data.packing={packing}")
    assert (code, found["faults"], found["sequences"]) == (0, [], 240)
    x, y = found["shares"]
    assert (x["expected"], y["expected"]) == (80 * 0.75 + 160 * 0.25, 80 * 0.25 + 160 * 0.75)
    assert x["sequences"] + y["sequences"] == 240 and abs(x["sequences"] - x["expected"]) <= x["tolerance"] < 40
    assert (found["padding"] > 0) == (packing == "best_fit")


def test_an_order_that_repeats_is_found(verify: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in (WindowSource, PackedSource):
        right = kind.window_of
        monkeypatch.setattr(kind, "window_of", lambda self, sample, right=right: right(self, sample) // 2)
    for packing in ("concat", "best_fit"):
        code, found = verify("--steps", "1:20", f"--data.packing={packing}")
        assert code == 1 and "read again in the same epoch" in found["faults"][0] and found["same_text"] > 8


def test_ranks_that_read_the_same_are_found(verify: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    right = BatchStream.__init__
    monkeypatch.setattr(BatchStream, "__init__", lambda self, source, local, *_: right(self, source, local, 0, 4))
    code, found = verify("--steps", "1:20", "--ranks", "4")
    assert code == 1 and found["same_text"] == 60
    assert found["faults"] == [
        "60 sequences are not what the order and the files say; the first is sequence 1 (step 1, data-parallel rank 1)"
    ]


def test_a_mixture_that_is_off_is_found(verify: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Mixture, "locate", lambda self, samples: (np.zeros_like(samples), samples))
    code, found = verify("--steps", "41:80")
    assert code == 1 and [fault[:26] for fault in found["faults"]] == [
        '"x" gives 160 sequences, a',
        '"y" gives 0 sequences, and',
    ]


def test_sequences_that_are_left_out_are_found(verify: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    right = Mixture.locate

    def locate(self: Mixture, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        sources, numbers = right(self, samples)
        return sources, numbers + (numbers > 20)

    monkeypatch.setattr(Mixture, "locate", locate)
    code, found = verify("--steps", "1:20")
    assert code == 1 and found["faults"] == ['"x": 1 of its sequences are left out']


def test_the_command(config: Path) -> None:
    done = run_python("scripts/verify_data.py", "--config", str(config), "--steps", "1:40", "--ranks", "2")
    assert done.returncode == 0, done.stderr
    head, _, x, y, _, last = done.stdout.splitlines()
    assert head == "steps 1 to 40 on 2 processes: 160 sequences" and last.startswith("right: ")
    assert (x.split()[0], x.split()[3], y.split()[0], y.split()[3]) == ("x", "75.00%", "y", "25.00%")
    wrong = run_python("scripts/verify_data.py", "--config", str(config), "--steps", "0:4")
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert "--steps 0:4: must be A:B" in wrong.stderr and len(wrong.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--steps", "7"], "--steps 7: must be A:B"),
        (["--steps", "9:8"], "--steps 9:8: must be A:B"),
        (["--ranks", "0"], "--ranks 0: must be 1 or more"),
        (["--ranks", "3"], "is not a multiple of"),
        (["--data.root=nowhere"], "is no prefix of token files"),
    ],
)
def test_bad_input(verify: Callable, arguments: list[str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        verify(*arguments)
