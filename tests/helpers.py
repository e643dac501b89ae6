"""What tests share: a tiny data set, configs of runs over it, and the training command as a user calls it.

`tests/conftest.py` puts this folder on the path (`from helpers import …`) and makes the data once: fixture `tiny_data`.
"""

import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import tomli_w

from titanling.config.schema import Prepare
from titanling.data.prepare.run import prepare
from titanling.launch import free_port
from titanling.ranks import LAUNCHED

ROOT = Path(__file__).resolve().parents[1]

# What a launcher tells its processes; a test that itself runs under one must not pass it on.
LAUNCHER = (*LAUNCHED, "MASTER_ADDR", "MASTER_PORT", "NGPU", "NNODES", "NODE_RANK")

SEQ_LEN = 32
VOCAB = 320


class TinyData(NamedTuple):
    """A prepared data set of some ten thousand tokens: text, tokenizer, prefixes. Shared: copy it before changing."""

    folder: Path
    text: Path
    """Folder of the text files."""
    train: str
    """Prefix of the training files."""
    validation: str
    """Prefix of the validation files."""
    tokenizer: str
    """Directory of the tokenizer, of VOCAB tokens."""


def make_tiny_data(folder: Path) -> TinyData:
    """Write 24 short text files under `folder` and prepare them."""
    words = "the a model learns from text and every token has its place in the sequence while rain falls on the roof"
    choose, text = random.Random(0), folder / "text"
    text.mkdir(parents=True)
    for number in range(24):
        lines = [" ".join(choose.choices(words.split(), k=9)) + ".\n" for _ in range(40)]
        (text / f"{number:02d}.txt").write_text("".join(lines), encoding="utf-8")
    data = TinyData(folder, text, str(folder / "train"), str(folder / "validation"), str(folder / "tokenizer"))
    settings = Prepare(text=(str(text),), vocab_size=VOCAB, validation_fraction=0.2)
    prepare(settings, data.train, data.validation, data.tokenizer)
    return data


def tiny_settings(folder: Path, data: TinyData, changes: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Dotted key → value of a four-step run of a two-layer model into `folder`/run, with `changes` (None removes)."""
    settings = {
        "job.dump_folder": str(folder / "run"),
        "model.dim": 32,
        "model.n_layers": 2,
        "model.n_heads": 4,
        "model.n_kv_heads": 2,
        "model.ffn_dim": 64,
        "model.vocab_size": VOCAB,
        "model.hf_assets_path": data.tokenizer,
        "data.train": data.train,
        "data.validation": data.validation,
        "training.steps": 4,
        "training.seq_len": SEQ_LEN,
        "training.local_batch_size": 2,
        "training.global_batch_size": 4,
        "training.mixed_precision_param": "float32",
        "lr_scheduler.warmup_steps": 2,
        "checkpoint.enable": True,
        "checkpoint.interval": 2,
        "metrics.log_freq": 1,
    } | dict(changes or {})
    return {key: value for key, value in settings.items() if value is not None}


def tiny_config(folder: Path, data: TinyData, changes: Mapping[str, Any] | None = None, name: str = "run.toml") -> Path:
    """Write `tiny_settings` as TOML to `folder`/`name`; return its path."""
    tree: dict[str, Any] = {}
    for dotted, value in tiny_settings(folder, data, changes).items():
        *tables, key = dotted.split(".")
        inner = tree
        for table in tables:
            inner = inner.setdefault(table, {})
        inner[key] = value
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text(tomli_w.dumps(tree), encoding="utf-8")
    return path


def clean_env(**changes: str) -> dict[str, str]:
    """A user's environment: no launcher's variables nor ours, one thread, the checkout importable, `changes`."""
    env = {key: value for key, value in os.environ.items() if key not in (*LAUNCHER, "PYTHONSAFEPATH")}
    return env | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | changes


def run_python(
    *arguments: str | Path, cwd: Path = ROOT, env: Mapping[str, str] | None = None, timeout: float = 120
) -> subprocess.CompletedProcess[str]:
    """Run this interpreter in `clean_env` (or `env`); return its exit code, stdout and stderr."""
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=env or clean_env(), capture_output=True, text=True, timeout=timeout)


def run_train(
    *arguments: str | Path, cwd: Path = ROOT, env: Mapping[str, str] | None = None, timeout: float = 120
) -> subprocess.CompletedProcess[str]:
    """Run `python -m titanling.train` with `arguments`, in one process."""
    return run_python("-m", "titanling.train", *arguments, cwd=cwd, env=env, timeout=timeout)


def launch_ranks(script: str, group: str, ranks: int, folder: Path, data: TinyData, timeout: float) -> Any:
    """Run one group of a script of tests/distributed under torchrun; what it leaves in `folder`/results.json."""
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--master-port", str(free_port())]
    worker = [ROOT / "tests/distributed" / script, group, folder, json.dumps(list(map(str, data)))]
    done = run_python(*torchrun, *worker, env=clean_env(PYTHONPATH=f"{ROOT}:{ROOT / 'tests'}"), timeout=timeout)
    assert done.returncode == 0, done.stderr[:20000]
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))


def copy_data(data: TinyData, folder: Path) -> TinyData:
    """A copy of a data set under `folder`, free to be damaged."""
    shutil.copytree(data.folder, folder)
    return TinyData(
        folder, folder / "text", str(folder / "train"), str(folder / "validation"), str(folder / "tokenizer")
    )


def snapshot(folder: Path) -> dict[str, str]:
    """Relative path → SHA-256 of every file below `folder`, "" for a folder: equal only if nothing changed."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        for path in folder.rglob("*")
    }


def flip_bit(path: Path, at: float = 0.5) -> None:
    """Damage a file: change one bit at a fraction of its length."""
    content = bytearray(path.read_bytes())
    content[int(at * (len(content) - 1))] ^= 1
    path.write_bytes(content)
