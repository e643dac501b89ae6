"""From a checkpoint to a directory that Hugging Face's transformers loads as it is."""

import json
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from titanling.checkpoint.weights import find_tokenizer, load_model
from titanling.errors import UserError
from titanling.model.hf import to_hf_config

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


def export_to_hf(checkpoint: Path, output: Path, tokenizer: Path | None = None, dtype: str | None = None) -> list[str]:
    """Write weights, config.json, generation_config.json and tokenizer; return the names of the files.

    `tokenizer` is the run's own by default; `dtype` the one that the weights were saved in. The output appears only
    when it is whole. Raises UserError for a damaged checkpoint, a missing tokenizer, an output that exists or that
    cannot be written.
    """
    output = output.resolve()  # "." has no name to put .partial behind
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"{output}: exists already; give another --output or remove it")
    saved = load_model(checkpoint)
    training = saved.state["config"]["training"]
    directory, files = find_tokenizer(saved, tokenizer)
    dtype = dtype or training["dtype"]
    weights = {name: p.detach().to(getattr(torch, dtype)).contiguous() for name, p in saved.model.named_parameters()}
    config = to_hf_config(saved.shape, training["seq_len"], dtype, files.bos_id, files.eod_id)
    generation = {key: config[key] for key in ("bos_token_id", "eos_token_id")}

    partial = output.with_name(output.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        save_file(weights, partial / "model.safetensors", metadata={"format": "pt"})
        for name, content in (("config.json", config), ("generation_config.json", generation)):
            (partial / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        for name in TOKENIZER_FILES:
            if (directory / name).is_file():
                shutil.copyfile(directory / name, partial / name)
        if output.exists():
            output.rmdir()
        partial.rename(output)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"{output}: cannot be written: {reason}; free some space or choose another") from None
    return sorted(path.name for path in output.iterdir())
