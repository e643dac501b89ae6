"""Convert a checkpoint to a Hugging Face model directory."""

import argparse
from pathlib import Path

from titanling import cli

EXAMPLE = "example: python scripts/convert_dcp_to_hf.py --checkpoint outputs/debug/checkpoints/step-000200 --output hf/"


def main() -> None:
    """Arguments → export_to_hf."""
    parser = argparse.ArgumentParser(description=__doc__, epilog=EXAMPLE)
    parser.add_argument("--checkpoint", type=Path, required=True, help="a step-… folder")
    parser.add_argument("--output", type=Path, required=True, help="directory to make; must not exist, or be empty")
    parser.add_argument("--tokenizer", type=Path, help="tokenizer directory (default: the one of the run)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: as saved")
    arguments = parser.parse_args()

    from titanling.checkpoint.export import export_to_hf  # torch takes seconds to import: not for --help

    files = export_to_hf(arguments.checkpoint, arguments.output, arguments.tokenizer, arguments.dtype)
    print(f"wrote {arguments.output}: {', '.join(files)}")
    print(f'load it with  AutoModelForCausalLM.from_pretrained("{arguments.output}")')


if __name__ == "__main__":
    cli.run(main)
