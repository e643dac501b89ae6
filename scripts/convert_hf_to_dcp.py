"""Convert a Hugging Face directory of a Llama or dense Qwen3 model, or the tensors of a Megatron-core Llama checkpoint,
to a checkpoint whose weights a run starts from: OUTPUT/step-000000."""

import sys
from os.path import dirname, realpath

sys.path.insert(0, dirname(dirname(realpath(__file__))))
from titanling import environment

environment.require()

import argparse
import os
from typing import Any

from titanling import cli
from titanling.errors import UserError
from titanling.ranks import this_process

EXAMPLE = "example: python scripts/convert_hf_to_dcp.py --input Llama-3.2-1B/ --output converted/"
MEGATRON = (
    "; of Megatron (docs/checkpoints.md shows how to make the .safetensors files): python scripts/convert_hf_to_dcp.py"
    " --format megatron --input dumped/ --flavor 8B --vocab-size 128256 --tokenizer Llama-3.1-8B/ --output converted/"
)


def main() -> None:
    """Arguments → import_hf or import_megatron."""
    parser = argparse.ArgumentParser(description=__doc__, epilog=EXAMPLE + MEGATRON)
    parser.add_argument(
        "--input", type=cli.local_path, required=True, help="the directory; only JSON and .safetensors are read"
    )
    parser.add_argument("--output", type=cli.local_path, required=True, help="folder to make step-000000 in")
    parser.add_argument("--format", choices=("hf", "megatron"), default="hf", help="of the input (default hf)")
    megatron = parser.add_argument_group("for --format megatron, whose files do not say what model they hold")
    megatron.add_argument("--flavor", help="a preset with the model's sizes")
    megatron.add_argument("--config", type=cli.local_path, help="or a config whose [model] has them")
    megatron.add_argument("--vocab-size", type=int, help="number of tokens; rows beyond are padding, and cut")
    megatron.add_argument("--tokenizer", type=cli.local_path, help="tokenizer directory, for generation and export")
    arguments = parser.parse_args()
    if arguments.format == "hf" and (
        arguments.flavor or arguments.config or arguments.vocab_size or arguments.tokenizer
    ):
        parser.error("--flavor, --config, --vocab-size and --tokenizer are for --format megatron")
    if arguments.format == "megatron" and (arguments.flavor is None) == (arguments.config is None):
        parser.error("--format megatron needs either --flavor or --config")

    size = this_process().size
    if size > 1:
        raise UserError(f"WORLD_SIZE={size}: this conversion is the work of one process; start it without torchrun")

    # Reading, converting, writing and hashing are threads already; OpenMP's would wait for each other, spinning.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    from titanling.checkpoint.import_model import import_hf  # torch takes seconds to import: not for --help

    if arguments.format == "hf":
        made = import_hf(arguments.input, arguments.output)
    else:
        made = _megatron(arguments)
    cli.say(f"wrote {made.path}")
    if made.tokenizer is None:
        cli.say("it comes without a tokenizer.json; generation and export need --tokenizer, a folder that has one")
    if made.model_table is None:
        cli.say("no preset has its RoPE scaling, so no config can name this model: generate from it, export it")
    else:
        import tomli_w

        cli.say("a run starts from it with this in its config, beside what it needs else:\n")
        model = made.model_table | ({} if made.tokenizer is None else {"hf_assets_path": str(made.tokenizer)})
        cli.say(tomli_w.dumps({"model": model, "checkpoint": {"initial_load_path": str(made.path)}}))


def _megatron(arguments: argparse.Namespace) -> Any:
    from titanling.checkpoint.import_model import import_megatron
    from titanling.config import load_config
    from titanling.config.schema import Model, Training
    from titanling.model.presets import resolve_shape

    config = load_config(arguments.config).config if arguments.config is not None else None
    model = config.model if config is not None else Model(flavor=arguments.flavor)
    training = config.training if config is not None else Training()
    vocab_size, tokenizer = arguments.vocab_size, arguments.tokenizer
    return import_megatron(
        arguments.input, arguments.output, resolve_shape(model), vocab_size, tokenizer, training.seq_len
    )


if __name__ == "__main__":
    cli.run(main, "nothing was written", reports=True)
