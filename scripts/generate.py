"""Continue a text with a checkpoint's model."""

import sys
from os.path import dirname, realpath

sys.path.insert(0, dirname(dirname(realpath(__file__))))
from titanling import environment

environment.require()

import argparse

from titanling import cli
from titanling.checkpoint.remote import open_path

EXAMPLE = (
    "example: python scripts/generate.py --checkpoint outputs/debug/checkpoints/step-000200"
    ' --prompt "def fibonacci(n):" --temperature 0.7 --top-p 0.9'
)


def main() -> None:
    """Arguments → generate."""
    parser = argparse.ArgumentParser(description=__doc__, epilog=EXAMPLE)
    parser.add_argument("--checkpoint", type=cli.path_or_url, required=True, help="a step-… folder, or its URL")
    parser.add_argument("--prompt", required=True, help="the text to continue")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=0.8, help="0: greedy (default 0.8)")
    parser.add_argument("--top-k", type=int, default=0, help="keep the k likeliest tokens; 0: all (default)")
    parser.add_argument("--top-p", type=float, default=0.95, help="nucleus sampling; 1: off (default 0.95)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tokenizer", type=cli.local_path, help="tokenizer directory (default: the one of the run)")
    arguments = parser.parse_args()

    if arguments.max_new_tokens < 1 or arguments.temperature < 0 or arguments.top_k < 0 or not 0 < arguments.top_p <= 1:
        parser.error("needs --max-new-tokens ≥ 1, --temperature ≥ 0, --top-k ≥ 0 and 0 < --top-p ≤ 1")

    import torch  # takes seconds: not for --help

    from titanling.checkpoint.weights import find_tokenizer, load_model, text_ends
    from titanling.model.generate import CachedDecoder, generate

    saved = load_model(open_path(arguments.checkpoint))
    _, files = find_tokenizer(saved.state, saved.shape, arguments.tokenizer)
    ends = text_ends(saved.state, files)
    prompt = files.encode_prompt(arguments.prompt, ends.bos_id)
    capacity = len(prompt) + arguments.max_new_tokens
    new = generate(
        CachedDecoder(saved.model, saved.shape.n_layers, capacity),
        torch.tensor(prompt),
        arguments.max_new_tokens,
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
        seed=arguments.seed,
        stop_ids=ends.stop_ids,
    )
    cli.say(arguments.prompt + files.continuation(prompt, new))


if __name__ == "__main__":
    cli.run(main)
