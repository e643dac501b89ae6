"""Write small files of every kind that a version of titanling writes, and what they must give: FOLDER/expected.json.

Run with the code of the version, in a checkout of its own, and with this folder's scripts; for commit 053da0a:

    git worktree add /tmp/053da0a 053da0a
    PYTHONPATH=/tmp/053da0a:$PWD/tests:$PWD/tests/compatibility OMP_NUM_THREADS=1 \\
        python tests/compatibility/make.py tests/compatibility/053da0a

The test takes every folder here that has an expected.json. Files of a version, once added, are never made again.
"""

import gzip
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import tomli_w
from outcome import AT_ONE_RANK, AT_TWO_RANKS, RUNS, STEPS, of_folder, opened, outcome

from titanling.checkpoint.export import export_to_hf
from titanling.checkpoint.import_model import import_hf
from titanling.config.load import dump_toml
from titanling.config.schema import Prepare
from titanling.data.ids import has_ids, read_ids
from titanling.data.inspect import verify
from titanling.data.merge import merge
from titanling.data.prepare.report import read_report, rows
from titanling.data.prepare.run import prepare
from titanling.data.prepare.tokenizer import read_tokenizer

WORDS = (
    "the a model learns from text and every token has its place in the sequence while rain falls on the roof".split()
)
TINY = {
    "dim": 8,
    "n_layers": 1,
    "n_heads": 2,
    "n_kv_heads": 1,
    "ffn_dim": 16,
    "vocab_size": 272,
    "tie_embeddings": True,
}
TEXT = "the rain falls on café roofs\n"
UNTIED = {"n_layers": 2, "tie_embeddings": False}
SOURCES = [
    {"name": "plain", "paths": ["data/train"], "weight": 3.0},
    {"name": "named", "paths": ["named/train"], "weight": 1.0},
]
STREAMED = [{"name": "lines", "kind": "jsonl", "paths": ["text/*.jsonl"], "weight": 1.0}]
# Run → what of its tables differs from `settings`.
TABLES: dict[str, dict[str, Any]] = {
    "one": {
        "validation": {"enable": True, "freq": 1, "steps": 2},
        "data": {"prepare": {"text": ["text"], "vocab_size": 272, "validation_fraction": 0.25}},
    },
    "streams": {
        "data": {"train": None, "validation": None, "sources": STREAMED, "shuffle_buffer": 3},
    },
    "mixture": {
        "data": {
            "train": None,
            "sources": SOURCES,
            "stages": [{"from_step": 3, "weights": {"plain": 1.0, "named": 3.0}}],
            "packing": "best_fit",
            "packing_window": 16,
            "document_mask": "causal",
            "audit_log": True,
        },
    },
    "float16": {"training": {"mixed_precision_param": "float16"}},
    "bfloat16": {"training": {"dtype": "bfloat16", "mixed_precision_param": "bfloat16"}},
    "fsdp": {"model": UNTIED | {"qk_norm": True}, "data": {"document_mask": "causal"}},
    "pipeline": {"model": UNTIED, "parallelism": {"pipeline_parallel_microbatch_size": 2}},
}


def main() -> None:
    """FOLDER, or in the processes that torchrun starts there: --ranks."""
    if sys.argv[1] == "--ranks":
        for run in AT_TWO_RANKS:
            train(run)
            note(run)
        return
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True)
    os.chdir(folder)
    make_text(Path("text"))
    make_token_files()
    for run in AT_ONE_RANK:
        train(run)
        note(run)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    subprocess.run([sys.executable, *torchrun, __file__, "--ranks"], check=True)
    export_to_hf(Path(f"runs/one/checkpoints/step-{STEPS:06d}"), Path("hf"))
    export_to_hf(Path(f"runs/fsdp/checkpoints/step-{STEPS:06d}"), Path("hf-bfloat16"), dtype="bfloat16")
    os.mkdir("weights")  # without the tokenizer, whose place in this machine's folders would be noted
    for name in ("config.json", "model.safetensors"):
        shutil.copy(f"hf-bfloat16/{name}", "weights")
    import_hf(Path("weights"), Path("imported"))
    shutil.rmtree("weights")
    expected = {
        "runs": {run: json.loads(Path(f"{run}.json").read_text()) for run in RUNS},
        "token_files": {str(path.with_suffix("")): of_token_files(path) for path in sorted(Path().glob("*/*.bin"))},
        "reports": {report: rows(read_report(report)) for report in ("data/train", "named/train")},
        "exports": {folder: of_folder(folder) for folder in ("hf", "hf-bfloat16", "imported/step-000000/model")},
        "encoded": {TEXT: read_tokenizer("data/tokenizer").encode(TEXT).ids},
    }
    for run in RUNS:
        Path(f"{run}.json").unlink()
    Path("expected.json").write_text(json.dumps(expected, indent=1) + "\n")


def of_token_files(path: Path) -> dict[str, Any]:
    """What a reader of token files sees: the sidecar, the names of the documents."""
    prefix = str(path.with_suffix(""))
    sidecar = verify(prefix)
    names = read_ids(prefix, range(sidecar.documents)) if has_ids(prefix) else None
    return {"sidecar": sidecar.model_dump(mode="json"), "names": names}


def make_text(folder: Path) -> None:
    """Some forty short documents: JSON lines with names, plain text, a packed file."""
    choose = random.Random(0)
    folder.mkdir()

    def line(name: str) -> str:
        text = " ".join(choose.choices(WORDS, k=choose.randint(4, 30)))
        return json.dumps({"id": name, "text": text}) + "\n"

    for file in "ab":
        (folder / f"{file}.jsonl").write_text("".join(line(f"{file}-{row}") for row in range(14)))
    (folder / "c.jsonl.gz").write_bytes(gzip.compress("".join(line(f"c-{row}") for row in range(8)).encode(), mtime=0))
    for number in range(4):
        (folder / f"d{number}.txt").write_text(" ".join(choose.choices(WORDS, k=40)) + "\n")


def make_token_files() -> None:
    """Token files without names, with names, and merged; all of one tokenizer."""
    settings = Prepare(text=("text",), vocab_size=TINY["vocab_size"], validation_fraction=0.25)
    prepare(settings, "data/train", "data/validation", "data/tokenizer")
    named = Prepare(text=("lines=text/*.jsonl",), id_field="id", validation_fraction=0.25)
    prepare(named, "named/train", "named/validation", "data/tokenizer")
    merge("merged/train", ["named/train", "named/validation"])


def settings(run: str) -> dict[str, Any]:
    """The config of a run, as TOML's tables."""
    tables: dict[str, Any] = {
        "job": {"dump_folder": f"runs/{run}", "description": f"compatibility: {run}"},
        "model": TINY | {"hf_assets_path": "data/tokenizer"},
        "data": {"train": "data/train", "validation": "data/validation"},
        "training": {
            "steps": STEPS,
            "seq_len": 16,
            "local_batch_size": 2,
            "global_batch_size": 4,
            "mixed_precision_param": "float32",
        },
        "optimizer": {"lr": 1e-2},
        "lr_scheduler": {"warmup_steps": 1, "total_steps": 2 * STEPS},
        "checkpoint": {"enable": True, "interval": STEPS, "keep_latest_k": 2},
        "metrics": {"log_freq": 1, "enable_tensorboard": False},
        "parallelism": AT_TWO_RANKS.get(run, {}),
    }
    for table, changes in TABLES[run].items():
        merged = tables.get(table, {}) | changes
        tables[table] = {key: value for key, value in merged.items() if value is not None}
    return tables


def train(run: str) -> None:
    """Make the run folder, as `titanling.train` does, but for the messages."""
    path = Path(f"runs/{run}/config.toml")
    if os.environ.get("RANK", "0") == "0":
        path.parent.mkdir(parents=True)
        path.with_suffix(".part").write_text(tomli_w.dumps(settings(run)))
        path.with_suffix(".part").rename(path)
    while not path.exists():
        pass
    with opened(run, {"training.steps": STEPS}) as trainer:
        config, rank = trainer.config, trainer.world.rank
        trainer.train()
        trainer.world.gather(None)
        if rank == 0:
            path.write_text(dump_toml(config))
        trainer.world.gather(None)


def note(run: str) -> None:
    """What the run gives, to RUN.json. The run folder stays as it is."""
    rank, folder = os.environ.get("RANK", "0"), f"copy-{run}"
    if rank == "0":
        shutil.copytree(f"runs/{run}", f"runs/{folder}.part")
        os.rename(f"runs/{folder}.part", f"runs/{folder}")
    while not os.path.exists(f"runs/{folder}"):
        pass
    found, _ = outcome(run, {"job.dump_folder": f"runs/{folder}"})
    if rank == "0":
        Path(f"{run}.json").write_text(json.dumps(found))
        shutil.rmtree(f"runs/{folder}")


if __name__ == "__main__":
    main()
