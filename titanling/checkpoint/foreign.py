"""Checkpoints of other programs, told by their files' names alone: what they are, and the way from there to here."""

import re
from contextlib import suppress
from pathlib import Path

from titanling.checkpoint import folder

_HF = "then give the Hugging Face directory that it makes"
_MEGATRON = "docs/checkpoints.md shows how to bring it here (convert_hf_to_dcp.py --format megatron)"
_PICKLE = (
    "a pickle, which can run any program when it is read: load it where you trust it, and save the model as a Hugging"
    " Face directory (save_pretrained)"
)
# What a folder holds, by a pattern of a file's name → what it is. The first that is found tells.
_SIGNS = (
    (r"latest_checkpointed_iteration\.txt|iter_\d+|mp_rank_\d\d(_\d+)?|common\.pt", f"of Megatron; {_MEGATRON}"),
    (
        r"\.metadata|__\d+_\d+\.distcp",
        "a checkpoint of PyTorch (DCP), as torchtitan saves it; there, scripts/checkpoint_conversion/convert_to_hf.py"
        f" converts it, {_HF}",
    ),
    (r"global_step\d+|zero_to_fp32\.py", "of DeepSpeed; its zero_to_fp32.py, with --safe_serialization, converts it"),
    (r"lit_model\.pth", f"of LitGPT; litgpt convert_from_litgpt converts it; load that and save_pretrained, {_HF}"),
    (
        r"adapter_config\.json",
        "an adapter of PEFT, not a whole model; AutoPeftModelForCausalLM.from_pretrained(…).merge_and_unload()"
        f" .save_pretrained(…), {_HF}",
    ),
    (
        r"consolidated\.\d\d\.pth|params\.json",
        f"of Meta's own release; python -m transformers.models.llama.convert_llama_weights_to_hf converts it, {_HF}",
    ),
    (
        r".*\.gguf",
        "a GGUF file; AutoModelForCausalLM.from_pretrained(FOLDER, gguf_file=NAME).save_pretrained(…) converts it,"
        f" {_HF}",
    ),
    (r".*\.nemo", f"of NeMo; {_MEGATRON}"),
    (r".*\.(pt|pth|bin|ckpt|pkl)", _PICKLE),
    (r".*\.safetensors", "files of tensors without their config.json; give the Hugging Face directory, with both"),
)


def what_it_is(path: Path) -> str:
    """What a path that is no checkpoint of ours holds instead and how to convert it, in words; empty if unknown."""
    with suppress(OSError, ValueError):
        if not path.exists():
            name = str(path)
            on_hub = re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not path.parent.exists()
            hub = f"; if it is of the Hub, get it first: hf download {name} --local-dir FOLDER"
            return f"is not there{hub if on_hub else ''}"
        if path.is_file():
            names = [path.name]
        else:
            for inside in (path, path / "checkpoints"):
                steps = folder.list_steps(inside) if inside.is_dir() else []
                if steps:
                    newest = inside / folder.step_name(steps[-1])
                    return f"is a run, or the folder of its checkpoints; give one of them, {newest}"
            names = sorted(entry.name for entry in path.iterdir())
        for pattern, what in _SIGNS:
            if any(re.fullmatch(pattern, name) for name in names):
                return f"is {what}"
    return ""
