"""What users of other trainers type: the message says what it is called here."""

import re
from pathlib import Path

import pytest

from titanling.config.arguments import parse_arguments
from titanling.config.hints import _NAMES, name_here
from titanling.config.load import is_key, load_config
from titanling.errors import UserError


def test_each_hint_names_what_there_is() -> None:
    for here in _NAMES:
        for dotted in re.findall(r"(?<![./\w])[a-z0-9_]+\.[a-z0-9_.]*[a-z0-9_]", here):
            assert is_key(dotted) or dotted == "run_train.sh", dotted
    names = [name for names in _NAMES.values() for name in names.split()]
    assert len(names) == len(set(names))


TYPED = {
    "--batch_size": "training.local_batch_size",
    "--micro-batch-size": "training.local_batch_size",
    "--per_device_train_batch_size": "training.local_batch_size",
    "--gradient_accumulation_steps": "training.global_batch_size",
    "--global-batch-size": "training.global_batch_size",
    "--max_seq_len": "training.seq_len",
    "--lr": "optimizer.lr",
    "--learning_rate": "optimizer.lr",
    "--weight-decay": "optimizer.weight_decay",
    "--epochs": "training.steps",
    "--num_train_epochs": "training.steps",
    "--max_steps": "training.steps",
    "--train-iters": "training.steps",
    "--seed": "debug.seed",
    "--bf16": "training.mixed_precision_param",
    "--output_dir": "job.dump_folder",
    "--resume": "checkpoint.enable = true",
    "--save_steps": "checkpoint.interval",
    "--warmup_steps": "lr_scheduler.warmup_steps",
    "--tensor-model-parallel-size": "parallelism.tensor_parallel_degree",
    "--config-file": "--config FILE",
    "--job.config": "--config FILE",
    "-c": "--config FILE",
    "--training.batch_size": "training.local_batch_size",
    "--training.seq-len": "training.seq_len",
    "--Training.steps": "training.steps",
    "--training.lr": "optimizer.lr",
    "--training.compile": "compile.enable",
    "--checkpoint.enable_checkpoint": "checkpoint.enable",
    "--float8.filter_fqns": "quantize.linear.float8.filter_fqns",
}


@pytest.mark.parametrize(("word", "here"), TYPED.items())
def test_words_of_other_trainers(tmp_path: Path, word: str, here: str) -> None:
    with pytest.raises(UserError, match=re.escape(here)):
        parse_arguments([word, "3"])
    table, _, key = word.lstrip("-").rpartition(".")
    if table.islower() and "-" not in key and table not in ("job", "float8"):  # the same in a file
        (tmp_path / "a.toml").write_text(f"[{table}]\n{key} = 3\n")
        with pytest.raises(UserError, match=re.escape(here)):
            load_config(tmp_path / "a.toml")


def test_what_is_unknown_is_left_to_the_nearest_name() -> None:
    assert name_here("zzz") == "" and name_here("--Max-Steps") == "training.steps"
    with pytest.raises(UserError, match=r"'--zzz': expected --config FILE or --table\.key value$"):
        parse_arguments(["--zzz"])
