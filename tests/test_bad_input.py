"""What a user can get wrong: exit code 2, one line that names file, key and remedy, and nothing half-written."""

import errno
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import TinyData, clean_env, copy_data, flip_bit, run_train, snapshot, tiny_config

NO_TORCH_SECONDS = 30  # far below what a hang costs, far above what a check without torch takes


def refused(run: subprocess.CompletedProcess[str], *says: str) -> str:
    """Check a refusal and return its line."""
    assert run.returncode == 2, (run.returncode, run.stdout, run.stderr)
    assert "Traceback" not in run.stdout + run.stderr
    lines = run.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), run.stderr
    for text in says:
        assert text in lines[0], f"{text!r} is not in: {lines[0]}"
    return lines[0]


def refuse_config(folder: Path, data: TinyData, changes: dict[str, Any], *says: str, **env: str) -> None:
    """A run with these changes is refused, and neither its folder nor the data changes."""
    path = tiny_config(folder, data, changes)
    before, data_before = snapshot(folder), snapshot(data.folder)
    refused(run_train("--config", path, env=clean_env(**env), timeout=NO_TORCH_SECONDS), *says)
    assert snapshot(folder) == before and snapshot(data.folder) == data_before


# The config


def test_no_config_named() -> None:
    refused(run_train(), "--config FILE is missing", "--help")


def test_config_file_missing(tmp_path: Path) -> None:
    refused(run_train("--config", tmp_path / "no.toml"), f"{tmp_path / 'no.toml'}: no such config file")


def test_config_file_malformed(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text("[training]\nsteps = = 3\n")
    refused(run_train("--config", path), f"{path}: not valid TOML", "line 2")


def test_extends_in_a_circle(tmp_path: Path) -> None:
    for name, base in (("a", "b"), ("b", "a")):
        (tmp_path / f"{name}.toml").write_text(f'extends = "{base}.toml"\n')
    refused(run_train("--config", tmp_path / "a.toml"), f"{tmp_path / 'b.toml'}: extends goes in a circle", "remove")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"trainig.steps": 3}, "unknown table [trainig]; did you mean training?"),
        ({"training.step": 3}, "unknown key step in [training]; did you mean steps?"),
        ({"model.flavor": "minilingua_40m"}, 'model.flavor = "minilingua_40m": no such preset; did you mean mini'),
        ({"training.steps": "3"}, 'training.steps = "3": must be an integer'),
        ({"training.seq_len": 2.5}, "training.seq_len = 2.5: must be an integer"),
        ({"optimizer.lr": -1.0}, "optimizer.lr = -1.0: must be greater than 0"),
        ({"model.n_kv_heads": 3}, "model.n_heads = 4 is not a multiple of model.n_kv_heads = 3"),
        ({"model.dim": 34}, "model.dim = 34 is not a multiple of model.n_heads = 4; set model.head_dim"),
        ({"model.head_dim": 7}, "model.head_dim = 7 is odd"),
        ({"training.global_batch_size": 3}, "training.global_batch_size = 3 is not a multiple of local_batch_size = 2"),
        (
            {"parallelism.pipeline_parallel_schedule": "1f2b"},
            'parallelism.pipeline_parallel_schedule = "1f2b" is unknown; use one of GPipe',
        ),
        (
            {"parallelism.fsdp_reshard_after_forward": 1},
            "parallelism.fsdp_reshard_after_forward = 1: must be 'default', ",
        ),
        ({"activation_checkpoint.mode": "memory_budget"}, 'activation_checkpoint.mode = "memory_budget" is the comp'),
        (
            {"compile.enable": True, "compile.backend": "no"},
            'compile.backend = "no": torch has no such backend; use one',
        ),
        (
            {"parallelism.plans": ["a.py:Mine"]},
            'parallelism.plans = "a.py:Mine": "a.py" is no Python file; give "path/',
        ),
        ({"model.converters": ["mine"]}, "model.converters = \"mine\": must be 'quantize.linear.float8'"),
        ({"data.train": None}, "data.train is not set"),
        ({"validation.enable": True, "data.validation": None}, "validation.enable = true needs data.validation"),
        ({"sampling.freq": 1, "model.hf_assets_path": None}, "sampling.freq > 0 needs a tokenizer"),
        ({"model.hf_assets_path": "/nowhere"}, 'model.hf_assets_path = "/nowhere": has no tokenizer.json; correct it'),
    ],
)
def test_config_values(tmp_path: Path, tiny_data: TinyData, changes: dict[str, Any], says: str) -> None:
    refuse_config(tmp_path, tiny_data, changes, f"{tmp_path / 'run.toml'}: {says}")


@pytest.mark.parametrize(
    ("changes", "world", "says"),
    [
        ({}, 3, "training.global_batch_size = 4 is not a multiple of training.local_batch_size = 2 × 3"),
        ({"parallelism.data_parallel_replicate_degree": 2}, 3, "does not fit 3 processes (NGPU × NNODES)"),
        ({"parallelism.data_parallel_shard_degree": 4}, 2, "does not fit 2 processes (NGPU × NNODES)"),
        ({"parallelism.data_parallel_shard_degree": 2}, 1, "does not fit 1 process (NGPU × NNODES)"),
        ({"parallelism.tensor_parallel_degree": 2}, 1, "parallelism.data_parallel_shard_degree = -1 × tensor_parallel"),
        ({"parallelism.tensor_parallel_degree": 4}, 4, "does not divide model.n_kv_heads = 2; this model can use 1, 2"),
        (
            {"parallelism.pipeline_parallel_degree": 4},
            4,
            "parallelism.pipeline_parallel_degree = 4: 2 layers leave stage",
        ),
        (
            {"parallelism.pipeline_parallel_degree": 2, "model.tie_embeddings": True},
            2,
            "the tied embedding would be on",
        ),
        (
            {"parallelism.context_parallel_degree": 2, "training.seq_len": 30},
            2,
            "training.seq_len = 30 does not divide",
        ),
        (
            {"parallelism.context_parallel_degree": 2, "validation.enable": True, "validation.seq_len": 30},
            2,
            "validation.seq_len = 30 does not divide by context_parallel_degree = 2 (two pieces each)",
        ),
        (
            {"parallelism.pipeline_parallel_degree": 2, "parallelism.pipeline_parallel_microbatch_size": 3},
            2,
            "parallelism.pipeline_parallel_microbatch_size = 3 does not divide the 4 sequences of a step",
        ),
        (
            {
                "parallelism.pipeline_parallel_degree": 2,
                "parallelism.pipeline_parallel_schedule": "ZBVZeroBubble",
                "model.n_layers": 6,
                "compile.enable": True,
            },
            2,
            "splits the backward pass, which compiled blocks cannot; set compile.enable = false",
        ),
        (
            {"parallelism.tensor_parallel_degree": 2, "parallelism.enable_async_tensor_parallel": True},
            2,
            "parallelism.enable_async_tensor_parallel = true needs ",
        ),
        (
            {"parallelism.context_parallel_degree": 2, "parallelism.context_parallel_rotate_method": "alltoall"},
            2,
            'context_parallel_rotate_method = "alltoall" is not supported; set "allgather"',
        ),
    ],
)
def test_batch_and_degrees_against_the_world_size(
    tmp_path: Path, tiny_data: TinyData, changes: dict[str, Any], world: int, says: str
) -> None:
    meet = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1", "RANK": "0", "WORLD_SIZE": str(world)}
    refuse_config(tmp_path, tiny_data, changes, str(tmp_path / "run.toml"), says, **meet)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"comm.backend": "nccl"}, 'comm.backend = "nccl" needs GPUs and this machine has none; set "auto" or "gloo"'),
        ({"model.converters": ["float8"]}, "needs an NVIDIA GPU of compute capability 8.9 or more"),
        ({"kernels.implementation": "triton"}, '"auto" would run torch here'),
    ],
)
def test_what_needs_a_gpu(tmp_path: Path, tiny_data: TinyData, changes: dict[str, Any], says: str) -> None:
    refuse_config(tmp_path, tiny_data, changes, says, CUDA_VISIBLE_DEVICES="", HIP_VISIBLE_DEVICES="")


@pytest.mark.parametrize("changes", [{"PATH": "/nothing", "CXX": ""}, {"CXX": "/nothing/g++"}])
def test_without_a_compiler_nothing_is_compiled_and_the_run_goes_on(
    tmp_path: Path, tiny_data: TinyData, changes: dict[str, str]
) -> None:
    env = clean_env(**changes)
    run = run_train("--config", tiny_config(tmp_path, tiny_data, {"compile.enable": True}), env=env)
    assert run.returncode == 0, run.stderr
    (line,) = (line for line in run.stdout.splitlines() if line.startswith("compile: "))
    assert line.endswith("no C++ compiler found, so nothing is compiled; install g++ (or set CXX) to train faster")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"training.seq_len": 20_000}, "training.seq_len = 20000: {data}/train.bin holds only"),
        ({"validation.enable": True, "validation.seq_len": 9_000}, "validation.seq_len = 9000: {data}/validation.bin"),
        ({"validation.enable": True, "training.seq_len": 9_000}, "training.seq_len = 9000: {data}/validation.bin"),
    ],
)
def test_sequences_longer_than_the_data(
    tmp_path: Path, tiny_data: TinyData, changes: dict[str, Any], says: str
) -> None:
    says = says.format(data=tiny_data.folder)
    refuse_config(tmp_path, tiny_data, changes, f"{tmp_path / 'run.toml'}: {says}", "smaller seq_len")


# The data


def cut(path: Path) -> None:
    """Take the last bytes off a file."""
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 6)


def swap_magic(path: Path) -> None:
    """Make a file start like no Megatron index."""
    path.write_bytes(b"PK" + path.read_bytes()[2:])


DAMAGES = {
    "bin missing": ("train.bin", Path.unlink, "no such file; correct the prefix in [data]"),
    "idx missing": ("train.idx", Path.unlink, "no such file; correct the prefix in [data]"),
    "sidecar missing": ("train.json", Path.unlink, "no such file, so"),
    "bin truncated": ("train.bin", cut, "delete the three files of this prefix and prepare them again"),
    "idx truncated": ("train.idx", cut, "delete the three files of this prefix and prepare them again"),
    "idx foreign": ("train.idx", swap_magic, "not a Megatron index"),
    "sidecar malformed": ("train.json", cut, "prepare them again"),
    "validation truncated": ("validation.bin", cut, "prepare them again"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_data(tmp_path: Path, tiny_data: TinyData, damage: str) -> None:
    name, spoil, says = DAMAGES[damage]
    data = copy_data(tiny_data, tmp_path / "data")
    spoil(data.folder / name)
    refuse_config(tmp_path / "job", data, {"validation.enable": True}, str(data.folder / name), says)


def test_bin_and_idx_of_different_data(tmp_path: Path, tiny_data: TinyData) -> None:
    data = copy_data(tiny_data, tmp_path / "data")
    shutil.copy(f"{data.validation}.idx", f"{data.train}.idx")
    refuse_config(tmp_path / "job", data, {}, f"{data.train}.bin", f"{data.train}.idx describes", "prepare them again")


def test_data_of_another_tokenizer(tmp_path: Path, tiny_data: TinyData) -> None:
    data = copy_data(tiny_data, tmp_path / "data")
    tokenizer = Path(data.tokenizer, "tokenizer.json")
    tokenizer.write_text(tokenizer.read_text() + "\n")
    says = (f"{data.train}.json: the data was tokenised with another tokenizer", "correct model.hf_assets_path")
    refuse_config(tmp_path / "job", data, {}, *says)
    # The same through the path that would prepare what is missing.
    refuse_config(tmp_path / "job", data, {"data.prepare.text": [str(data.text)]}, *says)


def test_ids_beyond_the_vocabulary(tmp_path: Path, tiny_data: TinyData) -> None:
    says = f"{tiny_data.train}.json: token ids reach 319, beyond the model's vocabulary; set model.vocab_size to 320"
    refuse_config(tmp_path, tiny_data, {"model.vocab_size": 319}, says)


@pytest.mark.parametrize("corpus", ["missing", "no files", "an empty file", "not UTF-8"])
def test_corpus_without_text(tmp_path: Path, tiny_data: TinyData, corpus: str) -> None:
    text, made = tmp_path / "text", tmp_path / "made"
    if corpus != "missing":
        text.mkdir()
    if corpus == "an empty file":
        (text / "a.txt").touch()
    if corpus == "not UTF-8":
        (text / "a.txt").write_bytes(b"caf\xe9 " * 9)
    changes = {
        "data.prepare.text": [str(text)],
        "data.prepare.vocab_size": 300,
        "data.train": str(made / "train"),
        "data.validation": str(made / "validation"),
        "model.hf_assets_path": str(made / "tokenizer"),
    }
    says = {"an empty file": "holds no text", "not UTF-8": "not UTF-8 at byte 3; if it is Latin-1, convert it"}
    run = run_train("--config", tiny_config(tmp_path, tiny_data, changes))
    refused(run, str(text), says.get(corpus, "is no file, folder or glob that holds any; correct the path"))
    assert not made.exists() or not list(made.iterdir())
    assert not (tmp_path / "run").exists()


def test_one_document_is_divided(tmp_path: Path, tiny_data: TinyData) -> None:
    made = tmp_path / "made"
    changes = {
        "data.prepare.text": [str(tiny_data.text / "00.txt")],
        "data.prepare.vocab_size": 300,
        "data.train": str(made / "train"),
        "data.validation": str(made / "validation"),
        "model.hf_assets_path": str(made / "tokenizer"),
    }
    run = run_train("--config", tiny_config(tmp_path, tiny_data, changes))
    assert run.returncode == 0, run.stderr
    assert all((made / f"{name}.bin").stat().st_size for name in ("train", "validation"))


# The run folder


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MiB; skips where mounting is not permitted."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "titanling-test", str(disk)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a file system is not permitted here")
    try:
        yield disk
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


@pytest.mark.parametrize("below", ["", "deeper/still"])
def test_dump_folder_is_a_file(tmp_path: Path, tiny_data: TinyData, below: str) -> None:
    # A file in its place, since root, as whom containers run, may write anywhere.
    (tmp_path / "taken").write_text("mine")
    folder = str(tmp_path / "taken" / below)
    says = f'run.toml: job.dump_folder = "{folder}": {tmp_path / "taken"} is not a folder; set another folder'
    refuse_config(tmp_path, tiny_data, {"job.dump_folder": folder}, says)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_dump_folder_is_not_writable(tmp_path: Path, tiny_data: TinyData) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    refuse_config(tmp_path, tiny_data, {"job.dump_folder": str(tmp_path / "locked" / "run")}, "locked is not writable")


def test_dump_folder_on_a_read_only_disk(small_disk: Path, tmp_path: Path, tiny_data: TinyData) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    refuse_config(tmp_path, tiny_data, {"job.dump_folder": str(small_disk / "run")}, f"{small_disk} is not writable")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_data: TinyData) -> Path:
    """The folder of a finished run of four steps with checkpoints at 2 and 4. Shared: copy it before changing."""
    folder = tmp_path_factory.mktemp("finished")
    run = run_train("--config", tiny_config(folder, tiny_data))
    assert run.returncode == 0, run.stderr
    return folder


@pytest.fixture
def job(tmp_path: Path, finished: Path, tiny_data: TinyData) -> Path:
    """A copy of the finished run, with its config, ready to be run again."""
    shutil.copytree(finished / "run", tmp_path / "run")
    tiny_config(tmp_path, tiny_data)
    return tmp_path


def refuse_resume(job: Path, *arguments: str, says: tuple[str, ...]) -> None:
    """Running again is refused, and no file of the run changes."""
    before = snapshot(job)
    refused(run_train("--config", job / "run.toml", *arguments), *says)
    assert snapshot(job) == before


def test_checkpoint_of_another_model(job: Path) -> None:
    says = (str(job / "run/checkpoints/step-000004"), "another model", "ffn_dim was 64 and is now 96")
    refuse_resume(job, "--model.ffn_dim=96", "--training.steps=6", says=(*says, "use another job.dump_folder"))


def test_changed_architecture_of_the_same_parameters(job: Path) -> None:
    says = ("rope_theta was 500000.0 and is now 10000.0", "use another job.dump_folder")
    refuse_resume(job, "--model.rope_theta=1e4", "--training.steps=6", says=says)


def test_checkpoint_of_other_data(job: Path, tiny_data: TinyData) -> None:
    says = ("was trained on other data", 'the .bin of source "train" was', "and is now", "use another job.dump_folder")
    refuse_resume(job, f"--data.train={tiny_data.validation}", "--training.steps=6", says=says)


def test_checkpoint_of_another_sequence_length(job: Path) -> None:
    refuse_resume(job, "--training.seq_len=16", "--training.steps=6", says=("seq_len was 32 and is now 16",))


def test_load_step_that_is_not_there(job: Path) -> None:
    says = (f"command line: checkpoint.load_step = 3: {job / 'run/checkpoints'} has no such", "it has: 2, 4")
    refuse_resume(job, "--checkpoint.load_step=3", says=says)


@pytest.mark.parametrize("pattern", ["model/*", "optimizer/*", "state.json", "manifest.json"])
def test_a_damaged_checkpoint_names_the_file(job: Path, pattern: str) -> None:
    (victim,) = (job / "run/checkpoints/step-000004").glob(pattern)
    # In the manifest, what reads as another hash would be blamed on the file it belongs to: break its syntax.
    flip_bit(victim, at=0.0 if pattern == "manifest.json" else 0.5)
    refuse_resume(job, "--checkpoint.fallback=false", says=(f"{victim}: ", "--checkpoint.load_step 2"))
    if pattern == "model/*":  # the remedy works; once is enough
        resumed = run_train("--config", job / "run.toml", "--checkpoint.load_step", "2")
        assert resumed.returncode == 0 and f"resumed from {job / 'run/checkpoints/step-000002'}" in resumed.stdout


def test_a_checkpoint_file_that_is_gone(job: Path) -> None:
    (victim,) = (job / "run/checkpoints/step-000004/model").iterdir()
    victim.unlink()
    says = (f"{victim}: missing from the checkpoint", "--checkpoint.load_step 2")
    refuse_resume(job, "--checkpoint.fallback=false", says=says)


def test_a_half_written_checkpoint_is_ignored_and_removed(job: Path) -> None:
    checkpoints = job / "run/checkpoints"
    whole, half = checkpoints / "step-000004", checkpoints / "step-000004.partial"
    whole.rename(half)
    (half / "manifest.json").unlink()
    run = run_train("--config", job / "run.toml")
    assert run.returncode == 0 and f"resumed from {checkpoints / 'step-000002'}" in run.stdout
    assert sorted(path.name for path in checkpoints.iterdir()) == ["step-000002", "step-000004"]


def test_changed_steps_and_lr_are_allowed_and_said(job: Path) -> None:
    run = run_train("--config", job / "run.toml", "--training.steps=5", "--optimizer.lr=1e-4")
    assert run.returncode == 0 and run.stderr == ""
    (line,) = (line for line in run.stdout.splitlines() if line.startswith("resumed from"))
    assert "training.steps was 4, now 5" in line and "optimizer.lr was 0.0008, now 0.0001" in line
    rows = [json.loads(line) for line in (job / "run/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]


# A full disk


def leave_free(disk: Path, free: int) -> Path:
    """Fill the disk with a ballast until `free` bytes are left; return the ballast."""
    status, ballast = os.statvfs(disk), disk / "ballast"
    ballast.write_bytes(b"\1" * (status.f_bavail * status.f_frsize - free))
    return ballast


@pytest.mark.parametrize(
    ("free", "says"),
    [
        # One checkpoint takes 504 KB; a save first looks whether the tensors (469 KB) fit.
        (200_000, ("step-000006: could not be saved", "No space left on device: it needs", "free some space")),
        (492_000, ("step-000006: could not be saved", os.strerror(errno.ENOSPC), "free some space")),
        (0, (os.strerror(errno.ENOSPC), "free some space")),
    ],
    ids=["seen before writing", "while writing", "from the start"],
)
def test_disk_full(job: Path, small_disk: Path, free: int, says: tuple[str, ...]) -> None:
    """The checkpoints before stay whole, and with room the same command goes on."""
    moved = small_disk / "run"
    shutil.move(job / "run", moved)
    command = ("--config", job / "run.toml", f"--job.dump_folder={moved}", "--training.steps=6")
    before = snapshot(moved / "checkpoints")
    ballast = leave_free(small_disk, free)
    refused(run_train(*command), str(moved), *says)
    assert snapshot(moved / "checkpoints") == before
    assert not list(moved.rglob("*.partial")) and (moved / "config.toml").stat().st_size > 0

    ballast.unlink()
    if free == 200_000:  # leaves the folder as the next case does
        return
    resumed = run_train(*command)
    assert resumed.returncode == 0, resumed.stderr
    assert f"resumed from {moved / 'checkpoints/step-000004'}" in resumed.stdout
    rows = [json.loads(line) for line in (moved / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
