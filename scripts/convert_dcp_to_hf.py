"""Convert a checkpoint to a Hugging Face model directory. Under torchrun, the processes share the work."""

import sys
from os.path import dirname, realpath

sys.path.insert(0, dirname(dirname(realpath(__file__))))
from titanling import environment

environment.require()

import argparse
import os

from titanling import cli
from titanling.ranks import is_first

EXAMPLE = (
    "example: python scripts/convert_dcp_to_hf.py --checkpoint outputs/debug/checkpoints/step-000200 --output hf/"
    " --dtype bfloat16 --verify"
)


def main() -> None:
    """Arguments → export_to_hf."""
    parser = argparse.ArgumentParser(description=__doc__, epilog=EXAMPLE)
    parser.add_argument("--checkpoint", type=cli.path_or_url, required=True, help="a step-… folder, or its URL")
    parser.add_argument(
        "--output", type=cli.local_path, required=True, help="directory to make; must not exist, or be empty"
    )
    parser.add_argument("--tokenizer", type=cli.local_path, help="tokenizer directory (default: the one of the run)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: as saved")
    parser.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="of a weight file (default 5GB)")
    parser.add_argument("--verify", action="store_true", help="read everything back and compare every tensor")
    arguments = parser.parse_args()

    # Reading, converting, writing and hashing are threads already; OpenMP's would wait for each other, spinning.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    from titanling.checkpoint.export import export_to_hf  # torch takes seconds to import: not for --help
    from titanling.checkpoint.remote import open_path

    files = export_to_hf(
        open_path(arguments.checkpoint),
        arguments.output,
        arguments.tokenizer,
        arguments.dtype,
        arguments.max_shard_size,
        arguments.verify,
        cli.say,
    )
    if is_first():
        cli.say(f"wrote {arguments.output}: {', '.join(files)}")
        cli.say(f'load it with  AutoModelForCausalLM.from_pretrained("{arguments.output}")')


if __name__ == "__main__":
    cli.run(main, "nothing was written", reports=True)
