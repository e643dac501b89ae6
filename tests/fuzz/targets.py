"""What is fuzzed: files that titanling reads, what makes odd ones of them, and the commands that read them."""

import gzip
import json
import shlex
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import mutate
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tomli
import torch
from helpers import ROOT
from safetensors.torch import load_file, save_file

FILES = ROOT / "tests/compatibility/053da0a"
STEP = "checkpoints/step-000002"
SMALL = {"training.steps": 3, "metrics.enable_tensorboard": False}
TRAIN = "-m titanling.train --training.steps 3 --config"
CHECKPOINT = "scripts/checkpoint.py"


class Target(NamedTuple):
    """A kind of input."""

    needs: Sequence[str]
    """What of `make_base`'s folder it reads."""
    change: Callable[[Path, Random], None]
    """Makes odd what lies in a folder."""
    commands: Sequence[str]
    """One of them is run."""
    confined: bool = True
    """Whether nothing outside of the folder may be read: no path is the user's own word."""
    codes: Sequence[int] = ()
    """Exit codes that are right beside 0 and 2."""


def make_base(folder: Path) -> None:
    """Good files of every kind, small; most are those that an earlier version has written."""
    shutil.copytree(FILES, folder)
    (folder / "outside.txt").write_text("not yours\n")
    texts = [json.loads(line)["text"] for line in (folder / "text/a.jsonl").read_text().splitlines()]
    rows = {"text": texts, "id": [f"row {number}" for number in range(len(texts))], "n": list(range(len(texts)))}
    (folder / "lines").mkdir()
    shutil.copy(folder / "text/a.jsonl", folder / "lines")
    (folder / "packed").mkdir()
    lines = (folder / "text/b.jsonl").read_bytes()
    (folder / "packed/a.jsonl.gz").write_bytes(gzip.compress(lines, mtime=0))
    with pa.output_stream(str(folder / "packed/b.jsonl.zst"), compression="zstd") as stream:
        stream.write(lines)
    (folder / "columns").mkdir()
    pq.write_table(pa.table(rows), folder / "columns/a.parquet", row_group_size=5)
    np.fromfile(folder / "data/train.bin", np.uint16).tofile(folder / "flat.npy")
    tokens = np.fromfile(folder / "data/train.bin", np.uint16)
    tokens.tofile(folder / "flat.ds")
    ends = np.flatnonzero(tokens == json.loads((folder / "data/train.json").read_text())["eod_id"]) + 1
    ends.astype("<u8").tofile(folder / "flat.ds.index")
    _make_divided(folder / "divided", folder / "hf")
    _make_megatron(folder / "megatron", folder / "hf")
    for run in ("one", "mixture"):
        config = (folder / f"runs/{run}/config.toml").read_text()
        (folder / f"{run}.toml").write_text(config)


def _make_divided(folder: Path, model: Path) -> None:
    """A Hugging Face folder with two weight files and their index."""
    shutil.copytree(model, folder)
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    places = {}
    for number in range(2):
        names = sorted(weights)[number::2]
        file = f"model-{number + 1:05d}-of-00002.safetensors"
        save_file({name: weights[name] for name in names}, folder / file, {"format": "pt"})
        places |= dict.fromkeys(names, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


def _make_megatron(folder: Path, model: Path) -> None:
    """The same model as Megatron names it, of one rank."""
    folder.mkdir()
    ours, layer = load_file(model / "model.safetensors"), "model.layers.0."
    qkv = torch.cat([ours[f"{layer}self_attn.{name}_proj.weight"] for name in "qkv"])
    theirs = {
        "embedding.word_embeddings.weight": ours["model.embed_tokens.weight"],
        "decoder.final_layernorm.weight": ours["model.norm.weight"],
        "decoder.layers.0.input_layernorm.weight": ours[f"{layer}input_layernorm.weight"],
        "decoder.layers.0.pre_mlp_layernorm.weight": ours[f"{layer}post_attention_layernorm.weight"],
        "decoder.layers.0.self_attention.linear_qkv.weight": qkv,
        "decoder.layers.0.self_attention.linear_proj.weight": ours[f"{layer}self_attn.o_proj.weight"],
        "decoder.layers.0.mlp.linear_fc1.weight": torch.cat(
            [ours[f"{layer}mlp.{name}_proj.weight"] for name in ("gate", "up")]
        ),
        "decoder.layers.0.mlp.linear_fc2.weight": ours[f"{layer}mlp.down_proj.weight"],
    }
    save_file({name: tensor.contiguous() for name, tensor in theirs.items()}, folder / "mp_rank_00.safetensors")


def _one_of(pattern: str, *changes: mutate.Change, kinds: float = 0.05) -> mutate.Change:
    """Change one of the files that a pattern finds, in one of these ways or, seldom, what it is."""

    def change(folder: Path, random: Random) -> None:
        path = random.choice(sorted(path for path in folder.glob(pattern) if path.is_file()))
        (mutate.change_kind if random.random() < kinds else random.choice(changes))(path, random)

    return change


def _bytes(path: Path, random: Random) -> None:
    path.write_bytes(mutate.change_bytes(path.read_bytes(), random))


def _sealed(change: mutate.Change, run: str = "one") -> mutate.Change:
    """Change files of a run's checkpoint, and make its hashes right again."""

    def sealed(folder: Path, random: Random) -> None:
        checkpoint = folder / "runs" / run / STEP
        change(checkpoint, random)
        mutate.reseal(checkpoint)

    return sealed


def _state(run: str) -> mutate.Change:
    return _sealed(_one_of("state.json", mutate.change_json_file, kinds=0), run)


def _manifest(folder: Path, random: Random) -> None:
    path = folder / "runs/one" / STEP / "manifest.json"
    mutate.change_json_file(path, random)
    if random.random() < 0.5:  # and its seal, which a stranger can compute as well
        from titanling.checkpoint import folder as checkpoints

        try:
            value = json.loads(path.read_text())
            files = value["files"]
            path.write_bytes(checkpoints.encode_json(checkpoints._manifest(files)))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            pass


def _names(folder: Path, random: Random) -> None:
    """Folders beside the checkpoints, whose names say what became of them."""
    root = folder / "runs/one/checkpoints"
    for _ in range(random.choice((1, 2, 3))):
        suffix = random.choice((".deleted", ".partial", ".damaged", ".superseded", ".x", "0", ".deleted.deleted", ""))
        path = root / f"step-{random.choice(('000002', '000003', '9' * 30, '0', '000000'))}{suffix}"
        if path.exists() or path.is_symlink():
            continue
        action = random.randrange(5)
        if action == 0:
            path.mkdir()
        elif action == 1:
            path.write_text("")
        elif action == 2:
            shutil.copytree(root / "step-000002", path)
        elif action == 3:
            path.symlink_to(random.choice(("step-000002", path.name, "../../../../outside.txt")))
        else:
            shutil.copytree(root / "step-000002", path)
            _bytes(random.choice([each for each in path.rglob("*") if each.is_file()]), random)


def _config(folder: Path, random: Random) -> None:
    path = folder / random.choice(("one.toml", "mixture.toml"))
    text = path.read_text()
    path.rename(folder / "run.toml")
    path = folder / "run.toml"
    action = random.randrange(10)
    if action < 6:
        path.write_text(mutate.toml_text(mutate.change(tomli.loads(text), random, random.choice((1, 1, 2, 3)))))
    elif action < 8:
        path.write_bytes(mutate.change_bytes(text.encode(), random))
    else:
        head = random.choice(
            (
                'extends = "run.toml"\n',
                'extends = ["base.toml", "base.toml"]\n',
                'extends = "base\\u0000.toml"\n',
                'extends = ["."]\n',
                "extends = 3\n",
                'extends = "' + "x" * 5000 + '"\n',
                "x = " + "[" * 5000 + "]" * 5000 + "\n",
                "x = " + "{a=" * 400 + "1" + "}" * 400 + "\n",
                "a" + ".a" * 3000 + " = 1\n",
                "[" + ".".join("a" * 2000) + "]\n",
                "x = " + "9" * 5000 + "\n",
                "training = 3\n",
                '"\\u001b[31m" = 1\n',
            )
        )
        path.write_text(head + text)
        (folder / "base.toml").write_text('extends = ["base2.toml", "base2.toml"]\n')
        for number in range(2, 40):
            inner = f'extends = ["base{number + 1}.toml", "base{number + 1}.toml"]\n'
            (folder / f"base{number}.toml").write_text(inner)
        (folder / "base40.toml").write_text("")


def _nothing(folder: Path, random: Random) -> None:
    pass


PREPARE = "scripts/prepare_data.py --output made --vocab-size 300 --workers 1 --validation-fraction 0.3 --text"
GIVEN = "--tokenizer data/tokenizer"


def read_run(run: str) -> tuple[str, ...]:
    """Commands that read a run's folder."""
    return (
        f"{TRAIN} runs/{run}/config.toml",
        f"{TRAIN} runs/{run}/config.toml",
        f"{TRAIN} runs/{run}/config.toml",
        f"{CHECKPOINT} list runs/{run}",
        f"{CHECKPOINT} verify runs/{run}",
        f"{CHECKPOINT} inspect runs/{run}/{STEP} --tensors",
        f"{CHECKPOINT} diff runs/{run}/{STEP} runs/bfloat16/{STEP}",
        f"{CHECKPOINT} prune runs/{run} --keep 1",
        f"scripts/convert_dcp_to_hf.py --checkpoint runs/{run}/{STEP} --output made",
        f"scripts/generate.py --checkpoint runs/{run}/{STEP} --prompt the --max-new-tokens 3 --seed 1",
        f"{TRAIN} runs/bfloat16/config.toml --job.dump_folder made --checkpoint.initial_load_path runs/{run}/{STEP}",
        f"{TRAIN} runs/{run}/config.toml --job.dump_folder made --checkpoint.initial_load_path runs/{run}/{STEP}"
        " --checkpoint.initial_load_model_only false",
    )


READ_RUN = read_run("one")
READ_TOKENS = (
    f"{TRAIN} runs/one/config.toml",
    f"{TRAIN} runs/mixture/config.toml",
    "scripts/data.py stats named/train data/train",
    "scripts/data.py verify named/train data/train",
    "scripts/data.py inspect named/train --document 3 --tokenizer data/tokenizer",
    "scripts/data.py inspect data/train --sample 3 --seq-len 16",
    "scripts/data.py inspect named/train --id a-3 --tokenizer data/tokenizer",
    "scripts/data.py merge made/train named/train named/validation",
    "scripts/data.py merge made/train data/train data/validation",
    "scripts/trace_data.py --config runs/mixture/config.toml --step 2",
    "scripts/trace_data.py --config runs/mixture/config.toml --document named:1",
    "scripts/trace_data.py --config runs/mixture/config.toml --id named:a-3",
    "scripts/verify_data.py --config runs/mixture/config.toml --steps 1:4",
)
READ_HF = (
    "scripts/convert_hf_to_dcp.py --input hf --output made",
    "scripts/convert_hf_to_dcp.py --input divided --output made",
    f"{TRAIN} runs/bfloat16/config.toml --job.dump_folder made --checkpoint.initial_load_path hf",
    f"{TRAIN} runs/bfloat16/config.toml --job.dump_folder made --checkpoint.initial_load_path divided",
)
READ_TOKENIZER = (
    f"scripts/generate.py --checkpoint runs/one/{STEP} --tokenizer hf --prompt the --max-new-tokens 3",
    f"scripts/convert_dcp_to_hf.py --checkpoint runs/one/{STEP} --output made --tokenizer hf",
    f"{PREPARE} text --tokenizer hf",
    "scripts/compare_tokenizers.py hf data/tokenizer --text text",
    f"{TRAIN} runs/bfloat16/config.toml --model.hf_assets_path hf --job.dump_folder made",
)
# Commands whose arguments are made odd. `TRAIN` and the planner know the config's keys.
ARGUMENTS = (
    *READ_RUN,
    *READ_TOKENS,
    *READ_HF,
    *READ_TOKENIZER,
    "-m titanling.train --config one.toml --print-config --training.seq_len 16",
    "-m titanling.train --config one.toml --dry-run --model.dim 64 --training.local_batch_size 2",
    "scripts/plan.py --config one.toml --world-size 8 --hardware h100 --json made.json",
    f"{PREPARE} text lines=lines --text-field text --id-field id --max-document-bytes 500 --shard 1/1 --language en",
    "scripts/train_tokenizer.py --source text --output made --vocab-size 300 --special-tokens <a> <b> --seed 1"
    " --max-bytes 1000 --character-coverage 0.9 --pad-to-multiple 8",
    "scripts/verify_data.py --config mixture.toml --steps 1:2 --ranks 2 --json",
    "scripts/trace_data.py --config mixture.toml --step 1 --world-size 1 --text --json",
    "scripts/convert_hf_to_dcp.py --format megatron --input megatron --output made --config one.toml --vocab-size 272",
    "scripts/convert_dcp_to_hf.py --checkpoint imported/step-000000 --output made --tokenizer hf --dtype bfloat16"
    " --max-shard-size 1KB --verify",
    "scripts/generate.py --checkpoint runs/one/checkpoints/step-000002 --prompt the --max-new-tokens 2 --top-k 3"
    " --top-p 0.5 --temperature 0.1 --seed 3 --tokenizer data/tokenizer",
    "scripts/deduplicate.py --input lines --output made --n-grams 2 --buckets 2 --hashes 2 --workers 1",
    "scripts/make_standin.py --output made --vocab-size 300",
    "scripts/compare_tokenizers.py data/tokenizer hf --text text --reference hf --max-bytes 1000 --json made.json",
    "scripts/parity.py --config one.toml --steps 1",
    "scripts/check_env.py",
)
EVERYTHING = ("runs", "data", "named", "merged", "text", "hf", "divided", "megatron", "imported", "lines", "packed",
              "columns", "one.toml", "mixture.toml", "flat.npy", "flat.ds", "flat.ds.index")  # fmt: skip
RUN = ("runs/one", "runs/bfloat16", "data", "text")
TARGETS: dict[str, Target] = {
    "config": Target(
        ("one.toml", "mixture.toml", "data", "named", "text"),
        _config,
        (
            "-m titanling.train --config run.toml --print-config",
            "-m titanling.train --config run.toml --dry-run",
            "-m titanling.train --config run.toml --dry-run",
            "scripts/plan.py --config run.toml --world-size 8 --hardware h100",
            "scripts/trace_data.py --config run.toml --step 1",
        ),
        confined=False,
    ),
    "sidecar": Target(
        ("runs/one", "runs/mixture", "data", "named", "text"),
        _one_of("[dn]a*/*.json", mutate.change_json_file),
        READ_TOKENS,
    ),
    "index": Target(
        ("runs/one", "runs/mixture", "data", "named", "text"), _one_of("[dn]a*/*.idx", _bytes), READ_TOKENS
    ),
    "tokens": Target(
        ("runs/one", "runs/mixture", "data", "named", "text"), _one_of("[dn]a*/*.bin", _bytes), READ_TOKENS
    ),
    "names": Target(
        ("runs/one", "runs/mixture", "data", "named", "text"),
        _one_of("named/*.ids.jsonl", mutate.change_lines),
        READ_TOKENS,
    ),
    "flat": Target(
        ("one.toml", "data", "flat.npy", "flat.ds", "flat.ds.index"),
        _one_of("flat*", _bytes),
        tuple(
            f"{command} one.toml --data.train flat.{kind} --data.eod_id 1 --validation.enable false"
            for kind in ("npy", "ds")
            for command in (
                TRAIN,
                "scripts/trace_data.py --step 1 --config",
                "scripts/verify_data.py --steps 1:2 --config",
            )
        ),
    ),
    "state": Target(RUN, _state("one"), READ_RUN, codes=(1,)),
    "state of streams": Target((*RUN, "runs/streams"), _state("streams"), read_run("streams"), codes=(1,)),
    "state of a mixture": Target((*RUN, "runs/mixture", "named"), _state("mixture"), read_run("mixture"), codes=(1,)),
    "state of float16": Target((*RUN, "runs/float16"), _state("float16"), read_run("float16"), codes=(1,)),
    "safetensors": Target(
        RUN, _sealed(_one_of("*/*.safetensors", mutate.change_safetensors, kinds=0)), READ_RUN, codes=(1,)
    ),
    "manifest": Target(RUN, _manifest, READ_RUN, codes=(1,)),
    "checkpoint": Target(
        RUN, _one_of("runs/one/checkpoints/step-000002/**/*", _bytes, kinds=0.5), READ_RUN, codes=(1,)
    ),
    "folders": Target(RUN, _names, READ_RUN, codes=(1,)),
    "run": Target(
        ("runs/one", "runs/mixture", "runs/bfloat16", "data", "named", "text"),
        _one_of("runs/[om]*/**/*s*.jsonl", mutate.change_lines, kinds=0.1),
        (
            f"{TRAIN} runs/one/config.toml",
            f"{TRAIN} runs/mixture/config.toml",
            f"{TRAIN} runs/mixture/config.toml",
        ),
    ),
    "hugging face": Target(
        ("hf", "divided", "runs/bfloat16", "data", "text"),
        _one_of("*[fd]*/*[gx].json", mutate.change_json_file),
        READ_HF,
    ),
    "hugging face weights": Target(
        ("hf", "divided", "runs/bfloat16", "data", "text"),
        _one_of("*/*.safetensors", mutate.change_safetensors),
        READ_HF,
    ),
    "tokenizer": Target(
        ("hf", "runs/one", "runs/bfloat16", "data", "text"),
        _one_of("hf/*token*.json", mutate.change_json_file),
        READ_TOKENIZER,
    ),
    "megatron": Target(
        ("megatron", "one.toml", "data"),
        _one_of("megatron/*", mutate.change_safetensors),
        (
            "scripts/convert_hf_to_dcp.py --format megatron --input megatron --output made --config one.toml",
            "scripts/convert_hf_to_dcp.py --format megatron --input megatron --output made --config one.toml"
            " --vocab-size 270",
        ),
    ),
    "lines": Target(
        ("lines", "data", "runs/streams"),
        _one_of("lines/*", mutate.change_lines),
        (
            f"{PREPARE} lines",
            f"{PREPARE} lines {GIVEN} --skip-bad --id-field id",
            f"{TRAIN} runs/streams/config.toml --data.sources.0.paths '[\"lines/*\"]' --job.dump_folder made",
        ),
        confined=False,
    ),
    "packed": Target(
        ("packed", "data", "runs/streams"),
        _one_of("packed/*", _bytes),
        (
            f"{PREPARE} packed {GIVEN}",
            f"{PREPARE} packed {GIVEN} --skip-bad",
            f"{TRAIN} runs/streams/config.toml --data.sources.0.paths '[\"packed/*\"]' --job.dump_folder made",
        ),
        confined=False,
    ),
    "columns": Target(
        ("columns", "data", "runs/streams"),
        _one_of("columns/*", _bytes),
        (
            f"{PREPARE} columns {GIVEN}",
            f"{PREPARE} columns {GIVEN} --skip-bad --id-field n",
            f"{TRAIN} runs/streams/config.toml --data.sources.0.paths '[\"columns/*\"]' --data.sources.0.kind parquet"
            " --job.dump_folder made",
        ),
        confined=False,
    ),
    "plain": Target(
        ("text", "data"),
        _one_of("text/*", _bytes),
        (f"{PREPARE} text {GIVEN}", "scripts/train_tokenizer.py --source text --output made --vocab-size 300"),
        confined=False,
    ),
    "arguments": Target(EVERYTHING, _nothing, ARGUMENTS, confined=False, codes=(1,)),
}
ODD_ARGUMENTS = (
    *("", " ", "0", "-1", "1", "3", "9" * 30, "9" * 5000, "1.5", "nan", "inf", "-inf", "1e400", "true", "x", "ä"),
    *(
        "../outside.txt",
        "..",
        ".",
        "/",
        "~",
        "~nobody",
        "$HOME",
        "s3://bucket/x",
        "memory://x/y",
        "file:///x",
        "x\x1b[1m",
    ),
    *("text", "data", "data/train", "named/train", "hf", "runs/one", "one.toml", "outside.txt", "flat.npy", "[1, 2]"),
    *("a=b", "[a", "{a}", "%s", "a:b", "1:2", "2:1", "1/2", "0/0", "x" * 5000, "\u202e", "--x", "--help", "-", "--"),
    *("auto", "float32", "h100", "fi", "1/1", "''", "step-000002", f"runs/fsdp/{STEP}", f"runs/pipeline/{STEP}"),
)


def command_of(target: Target, random: Random) -> list[str]:
    """One of the target's commands, as a list of words; with odd arguments if these are what is fuzzed."""
    words = shlex.split(random.choice(target.commands))
    if target.change is not _nothing:
        return words
    first = 2 if words[0] == "-m" else 1
    for _ in range(random.choice((1, 1, 2, 3))):
        at = random.randrange(first, len(words) + 1)
        action = random.randrange(5)
        if action == 0 and at < len(words):
            del words[at]
        elif action == 1:
            words.insert(at, random.choice(ODD_ARGUMENTS))
        elif at < len(words):
            words[at] = random.choice(ODD_ARGUMENTS)
    return [word.replace("\0", "") for word in words]


def copy_base(base: Path, target: Target, folder: Path) -> None:
    """What a target needs, as a folder of its own, with something beside it that is not its business."""
    folder.mkdir(parents=True)
    for name in target.needs:
        source, copy = base / name, folder / name
        if source.is_dir():
            shutil.copytree(source, copy)
        else:
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, copy)
    (folder.parent / "outside.txt").write_text("not yours\n")


Report = dict[str, Any]
