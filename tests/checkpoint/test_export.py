"""Checkpoints that transformers loads as they are: same logits, same greedy tokens, nothing half-written."""

import json
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conversion_helpers import LAYOUTS, assert_same, commit, divide, whole_tensors, write_checkpoint
from helpers import ROOT, TinyData, flip_bit, run_python, run_train, tiny_config
from model_helpers import SHAPES, hf_greedy, random_ids, random_model
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from titanling.checkpoint import folder, stream
from titanling.checkpoint.export import export_to_hf, parse_size
from titanling.checkpoint.weights import load_model
from titanling.data.prepare.train import train_tokenizer
from titanling.errors import UserError
from titanling.launch import free_port
from titanling.model.generate import CachedDecoder, generate
from titanling.model.llama import Llama
from titanling.model.presets import LlamaShape

TEXTS = ("the rain falls on the roof\n", "def fibonacci(n):\n\treturn  n\n", "Ääkköset, 日本語 🦀", "", " ", "a\r\nb")
FILES = ["README.md", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json"]
FILES += ["tokenizer_config.json", "special_tokens_map.json"]

Save = Callable[..., tuple[Path, Llama]]


@pytest.fixture
def save(tmp_path: Path, tiny_data: TinyData) -> Save:
    """Saves a checkpoint of a random model; returns its folder and the model."""

    def make(
        shape: LlamaShape,
        dtype: str = "float32",
        tokenizer: str | None = tiny_data.tokenizer,
        layout: str = "one",
        without: str | None = None,
        also: str | None = None,
    ) -> tuple[Path, Llama]:
        changes = {"training.dtype": dtype, "model.hf_assets_path": tokenizer}
        if dtype == "bfloat16":
            changes["training.mixed_precision_param"] = dtype
        model = random_model(shape).to(getattr(torch, dtype))
        weights = {name: tensor for name, tensor in model.state_dict().items() if name != without}
        if also is not None:
            weights[also] = torch.zeros(3)
        return write_checkpoint(tmp_path / "run", model, tiny_data, layout, changes, weights), model

    return make


@pytest.mark.parametrize("name", SHAPES)
def test_transformers_loads_it(name: str, save: Save, tmp_path: Path, tiny_data: TinyData) -> None:
    checkpoint, model = save(SHAPES[name])
    files = export_to_hf(checkpoint, tmp_path / "hf")
    assert set(FILES) == set(files) == {path.name for path in (tmp_path / "hf").iterdir()}
    twin, info = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not any(info.values()), info  # missing, unexpected, mismatched keys; errors
    assert twin.dtype == torch.float32

    ids = random_ids(SHAPES[name], 2, 90)
    with torch.no_grad():
        wanted = model(ids)
        assert wanted.abs().max() > 1
        assert (twin(ids).logits - wanted).abs().max() <= 1e-4
    tokens = generate(CachedDecoder(model, model.shape.n_layers, 70), ids[0, :6], 64, temperature=0)
    assert hf_greedy(twin, ids[0, :6], 64) == tokens


def test_the_exported_tokenizer_is_the_runs(save: Save, tmp_path: Path, tiny_data: TinyData) -> None:
    checkpoint, _ = save(SHAPES["gqa3_tied"])
    export_to_hf(checkpoint, tmp_path / "hf")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "hf")
    ours = Tokenizer.from_file(f"{tiny_data.tokenizer}/tokenizer.json")
    for text in TEXTS:
        ids = ours.encode(text).ids
        assert theirs(text)["input_ids"] == ids
        assert theirs.decode(ids) == text
    config = json.loads((tmp_path / "hf/config.json").read_text())
    assert (theirs.bos_token_id, theirs.eos_token_id) == (config["bos_token_id"], config["eos_token_id"]) == (0, 1)
    generation = GenerationConfig.from_pretrained(tmp_path / "hf")
    assert (generation.bos_token_id, generation.eos_token_id) == (0, 1)
    assert config["max_position_embeddings"] == 32  # training.seq_len of the tiny run


def test_a_tokenizer_without_bos(save: Save, tmp_path: Path) -> None:
    train_tokenizer(iter(["some text"] * 9), 300, str(tmp_path / "tokenizer"))
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        content = json.loads((tmp_path / "tokenizer" / name).read_text())
        del content["bos_token"]
        (tmp_path / "tokenizer" / name).write_text(json.dumps(content))
    checkpoint, _ = save(SHAPES["untied"], tokenizer=None)
    export_to_hf(checkpoint, tmp_path / "hf", tokenizer=tmp_path / "tokenizer")
    assert json.loads((tmp_path / "hf/config.json").read_text())["bos_token_id"] is None
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "hf").config.eos_token_id == 1


@pytest.mark.parametrize("name", SHAPES)
def test_another_dtype(name: str, save: Save, tmp_path: Path) -> None:
    checkpoint, model = save(SHAPES[name])
    export_to_hf(checkpoint, tmp_path / "hf", dtype="bfloat16")
    weights = load_file(tmp_path / "hf/model.safetensors")
    assert weights.keys() == model.state_dict().keys()
    for key, value in model.state_dict().items():
        assert torch.equal(weights[key], value.bfloat16())
    twin = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype="auto")
    assert twin.dtype == torch.bfloat16


def test_by_default_the_dtype_saved(save: Save, tmp_path: Path) -> None:
    checkpoint, model = save(SHAPES["qk_norm"], dtype="bfloat16")
    export_to_hf(checkpoint, tmp_path / "hf")
    weights = load_file(tmp_path / "hf/model.safetensors")
    assert all(torch.equal(weights[key], value) for key, value in model.state_dict().items())
    assert {value.dtype for value in weights.values()} == {torch.bfloat16}
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype="auto").dtype == torch.bfloat16


@pytest.mark.parametrize("name", SHAPES)
def test_a_checkpoint_loads_bit_equal(name: str, save: Save) -> None:
    checkpoint, model = save(SHAPES[name])
    saved = load_model(checkpoint)
    assert saved.shape == SHAPES[name] and not saved.model.training and saved.state["step"] == 3
    state = saved.model.state_dict()
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize("layout", [*LAYOUTS, "pipeline"])
def test_every_layout_in_small_files(layout: str, save: Save, tmp_path: Path) -> None:
    checkpoint, model = save(SHAPES["head_dim"], layout=layout)
    files = export_to_hf(checkpoint, tmp_path / "hf", max_shard_size="20KB", verify=True)
    weights = [name for name in files if name.endswith(".safetensors")]
    assert len(weights) > 2 and weights == [
        f"model-{number:05d}-of-{len(weights):05d}.safetensors" for number in range(1, len(weights) + 1)
    ]
    assert_same(whole_tensors(tmp_path / "hf"), model.state_dict())
    index = json.loads((tmp_path / "hf/model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in model.state_dict().values())
    assert index["metadata"]["total_parameters"] == model.shape.total_params
    for name in weights:
        held = load_file(tmp_path / "hf" / name)
        assert {key for key, file in index["weight_map"].items() if file == name} == held.keys()
        assert len(held) == 1 or sum(tensor.nbytes for tensor in held.values()) <= 20_000
    twin, info = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not any(info.values()), info
    assert_same(twin.state_dict(), model.state_dict())


@pytest.mark.parametrize(
    ("text", "size"), [("5GB", 5 * 10**9), ("1.5 MiB", 3 * 2**19), ("700", 700), ("2g", 2 * 10**9)]
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "0", "-1GB", "5XB", "GB", "1e9", "5IB"])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(UserError, match="--max-shard-size .*such as 5GB"):
        parse_size(text)


def test_every_dtype_in_blocks(save: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "BLOCK_BYTES", 1000)  # a few rows
    checkpoint, model = save(SHAPES["untied"], layout="rows_and_columns")
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        name = str(dtype).removeprefix("torch.")
        export_to_hf(checkpoint, tmp_path / name, dtype=name, verify=True)
        assert_same(whole_tensors(tmp_path / name), {key: t.to(dtype) for key, t in model.state_dict().items()})
        assert json.loads((tmp_path / name / "config.json").read_text())["torch_dtype"] == name


def test_float16_that_would_overflow(save: Save, tmp_path: Path, tiny_data: TinyData) -> None:
    model = random_model(SHAPES["untied"])
    model.model.layers["1"].mlp.up_proj.weight.data[3, 5] = 70_000
    checkpoint = write_checkpoint(tmp_path / "run", model, tiny_data)
    with pytest.raises(UserError, match="layers.1.mlp.up_proj.weight: has values that float16 cannot hold; use"):
        export_to_hf(checkpoint, tmp_path / "hf", dtype="float16")
    assert not list(tmp_path.glob("hf*"))


def test_the_model_card_has_facts_only(save: Save, tmp_path: Path) -> None:
    checkpoint, model = save(SHAPES["gqa3_tied"])
    export_to_hf(checkpoint, tmp_path / "hf")
    card = (tmp_path / "hf/README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n")
    for fact in (f"| parameters | {model.shape.total_params:,} |", "| step | 3 |", "| tokens seen | 384 |", "ab" * 32):
        assert fact in card
    assert str(tmp_path) not in card and "None" not in card


@pytest.mark.parametrize("layout", ["one", "rows"])
def test_a_missing_or_unknown_tensor_is_named(layout: str, save: Save, tmp_path: Path) -> None:
    name = "model.layers.1.mlp.down_proj.weight"
    checkpoint, _ = save(SHAPES["untied"], layout=layout, without=name)
    refused(f"has no tensor {name}", checkpoint, tmp_path / "hf")
    checkpoint, _ = save(SHAPES["untied"], layout=layout, also="model.layers.2.extra.weight")
    refused("holds a tensor model.layers.2.extra.weight", checkpoint, tmp_path / "hf")


def test_a_missing_piece_is_named(save: Save, tmp_path: Path, tiny_data: TinyData) -> None:
    model = random_model(SHAPES["untied"])
    checkpoint = write_checkpoint(tmp_path / "run", model, tiny_data, "rows")
    state = json.loads((checkpoint / "state.json").read_text())
    pieces = divide(model.state_dict(), "rows")
    del pieces[1]["model.layers.0.self_attn.q_proj.weight"]
    checkpoint = commit(tmp_path / "torn", state, pieces)
    refused("holds .* of the .* values of model.layers.0.self_attn.q_proj.weight", checkpoint, tmp_path / "hf")


def test_output_in_the_checkpoint_is_refused(save: Save) -> None:
    checkpoint, _ = save(SHAPES["untied"])
    refused("lies in the checkpoint itself", checkpoint, checkpoint / "hf")


def test_verify_finds_what_the_disk_changed(save: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint, _ = save(SHAPES["untied"])

    def forget(path: Path) -> None:
        flip_bit(path, 0.999)

    monkeypatch.setattr(folder, "forget_cached", forget)
    with pytest.raises(UserError, match=r"model.safetensors: .*\.weight does not read back as it was written"):
        export_to_hf(checkpoint, tmp_path / "hf", verify=True)
    assert not list(tmp_path.glob("hf*"))


LIMITED = """
import os, resource, runpy
if os.environ["RANK"] == "1":
    resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, 5_000))
runpy.run_path({script!r}, run_name="__main__")
"""


@pytest.mark.slow
def test_two_processes_share_the_work(save: Save, tmp_path: Path) -> None:
    checkpoint, model = save(SHAPES["untied"], layout="rows")
    script = ROOT / "scripts/convert_dcp_to_hf.py"
    options = ("--checkpoint", checkpoint, "--output", tmp_path / "hf", "--max-shard-size", "20KB", "--verify")

    def convert(program: Path) -> subprocess.CompletedProcess[str]:
        launch = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port()))
        return run_python("-B", *launch, program, *options)

    limited = tmp_path / "limited.py"
    limited.write_text(LIMITED.format(script=str(script)))
    failed = convert(limited)
    assert failed.returncode != 0
    assert f"error: {tmp_path}/hf: cannot be written: File too large" in failed.stderr
    assert not list(tmp_path.glob("hf*"))

    done = convert(script)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("wrote ") == 1
    assert_same(whole_tensors(tmp_path / "hf"), model.state_dict())
    assert not list(tmp_path.glob("hf.*"))


@pytest.mark.slow
def test_memory_does_not_grow_with_the_model(tmp_path: Path, tiny_data: TinyData) -> None:
    code = (
        "import atexit, runpy;"
        " atexit.register(lambda: print(open('/proc/self/status').read().partition('VmHWM:')[2].split()[0]));"
        " runpy.run_path('scripts/convert_dcp_to_hf.py', run_name='__main__')"
    )
    peaks = []
    for name, dim in (("small", 32), ("large", 4096)):
        model = random_model(replace(SHAPES["gqa3_tied"], dim=dim, vocab_size=16384))
        checkpoint = write_checkpoint(tmp_path / name, model, tiny_data, "rows")
        done = run_python("-c", code, "--checkpoint", checkpoint, "--output", tmp_path / f"hf-{name}", "--verify")
        assert done.returncode == 0, done.stderr
        peaks.append(int(done.stdout.split()[-1]) * 1024)
    size = (tmp_path / "hf-large/model.safetensors").stat().st_size
    assert size > 200 * 2**20
    assert peaks[1] - peaks[0] < 160 * 2**20, peaks


def test_an_empty_output_directory_will_do(save: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint, _ = save(SHAPES["untied"])
    (tmp_path / "hf").mkdir()
    monkeypatch.chdir(tmp_path / "hf")
    assert "config.json" in export_to_hf(checkpoint, Path("."))
    assert (tmp_path / "hf/config.json").is_file()
    assert not list(tmp_path.glob("*.partial"))


def refused(words: str, checkpoint: Path, output: Path, tokenizer: Path | None = None) -> None:
    """Exporting raises a one-line UserError with these words and leaves nothing behind."""
    before = sorted(output.parent.rglob("*"))
    with pytest.raises(UserError, match=words) as caught:
        export_to_hf(checkpoint, output, tokenizer)
    assert "\n" not in str(caught.value)
    assert sorted(output.parent.rglob("*")) == before


def test_an_existing_output_is_refused(save: Save, tmp_path: Path) -> None:
    checkpoint, _ = save(SHAPES["untied"])
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine.txt").write_text("mine")
    refused("full: exists already; give another --output or remove it", checkpoint, tmp_path / "full")
    refused("mine.txt: exists already", checkpoint, tmp_path / "full/mine.txt")
    refused("cannot be written: Not a directory", checkpoint, tmp_path / "full/mine.txt/hf")


def test_no_checkpoint(tmp_path: Path) -> None:
    refused("step-000009: no such checkpoint folder", tmp_path / "step-000009", tmp_path / "hf")
    (tmp_path / "empty").mkdir()
    refused("manifest.json: missing; .*empty is not a whole checkpoint", tmp_path / "empty", tmp_path / "hf")


@pytest.mark.parametrize("kind", ["model/*.safetensors", "state.json"])
def test_a_damaged_checkpoint(kind: str, save: Save, tmp_path: Path) -> None:
    checkpoint, _ = save(SHAPES["untied"])
    (path,) = checkpoint.glob(kind)
    content = bytearray(path.read_bytes())
    content[-5] ^= 4
    path.write_bytes(content)
    refused(f"{path.name}: its hash is not the one", checkpoint, tmp_path / "hf")
    path.write_bytes(content[:-1])
    refused(f"{path.name}: has {len(content) - 1} bytes instead of {len(content)}", checkpoint, tmp_path / "hf")
    path.unlink()
    refused(f"{path.name}: missing from the checkpoint", checkpoint, tmp_path / "hf")


def test_a_missing_tokenizer(save: Save, tmp_path: Path) -> None:
    checkpoint, _ = save(SHAPES["untied"], tokenizer=None)
    refused("had no tokenizer .*; give one with --tokenizer", checkpoint, tmp_path / "hf")
    refused("nowhere: no such tokenizer directory", checkpoint, tmp_path / "hf", tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    refused("empty/tokenizer.json: no such file", checkpoint, tmp_path / "hf", tmp_path / "empty")


def test_a_tokenizer_larger_than_the_model(save: Save, tmp_path: Path) -> None:
    checkpoint, _ = save(replace(SHAPES["untied"], vocab_size=319))
    refused("tokenizer: has 320 tokens, the model only 319; give the tokenizer", checkpoint, tmp_path / "hf")


def test_a_model_with_padded_vocabulary(save: Save, tmp_path: Path) -> None:
    checkpoint, _ = save(replace(SHAPES["untied"], vocab_size=384))
    export_to_hf(checkpoint, tmp_path / "hf")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "hf").lm_head.weight.shape == (384, 32)


def test_a_full_disk_leaves_nothing(save: Save, tmp_path: Path) -> None:
    """A limit on the size of a file stands for the disk: the weights do not fit, all else does."""
    checkpoint, _ = save(SHAPES["untied"])
    code = (
        "import resource, runpy; limit = resource.RLIMIT_FSIZE; "
        "resource.setrlimit(limit, (50_000, resource.getrlimit(limit)[1])); "
        "runpy.run_path('scripts/convert_dcp_to_hf.py', run_name='__main__')"
    )
    done = run_python("-B", "-c", code, "--checkpoint", checkpoint, "--output", tmp_path / "hf")
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {tmp_path}/hf: cannot be written: ") and "too large" in done.stderr
    assert done.stderr.count("\n") == 1
    assert not list(tmp_path.glob("hf*"))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_data: TinyData) -> Path:
    """The last checkpoint of a real run."""
    folder = tmp_path_factory.mktemp("run")
    done = run_train("--config", tiny_config(folder, tiny_data))
    assert done.returncode == 0, done.stderr
    return folder / "run/checkpoints/step-000004"


def test_the_convert_command(run: Path, tmp_path: Path) -> None:
    script = ROOT / "scripts/convert_dcp_to_hf.py"
    done = run_python(script, "--checkpoint", run, "--output", "made/hf/", "--dtype", "float32", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "wrote made/hf: README.md, config.json, " in done.stdout
    twin, info = AutoModelForCausalLM.from_pretrained(tmp_path / "made/hf", output_loading_info=True)
    assert not any(info.values()), info
    saved = load_model(run)
    ids = random_ids(saved.shape, 2, 32)
    with torch.no_grad():
        assert (twin(ids).logits - saved.model(ids)).abs().max() <= 1e-4
    assert AutoTokenizer.from_pretrained(tmp_path / "made/hf")("the rain")["input_ids"]

    again = run_python(script, "--checkpoint", run, "--output", "made/hf/", cwd=tmp_path)
    assert again.returncode == 2
    assert again.stderr == f"error: {tmp_path}/made/hf: exists already; give another --output or remove it\n"


def test_the_generate_command(run: Path, tiny_data: TinyData) -> None:
    script = ROOT / "scripts/generate.py"
    options = ("--checkpoint", run, "--prompt", "the rain", "--max-new-tokens", "12", "--seed", "3")
    done = run_python(script, *options, "--temperature", "0")
    assert done.returncode == 0, done.stderr
    saved, tokenizer = load_model(run), Tokenizer.from_file(f"{tiny_data.tokenizer}/tokenizer.json")
    prompt = torch.tensor(tokenizer.encode("the rain").ids)
    decoder = CachedDecoder(saved.model, saved.shape.n_layers, len(prompt) + 12)
    new = generate(decoder, prompt, 12, temperature=0, stop_ids=[1])
    assert done.stdout == "the rain" + tokenizer.decode(new) + "\n"
    assert run_python(script, *options, "--top-k", "1").stdout == done.stdout

    wrong = run_python(script, *options, "--tokenizer", "nowhere")
    assert (wrong.returncode, wrong.stderr.count("\n")) == (2, 1)
    assert wrong.stderr.startswith("error: nowhere: no such tokenizer directory; ")
    assert run_python(script, *options, "--top-p", "0").returncode == 2
