"""Tokenise JSONL as Megatron-LM's preprocess_data.py does with one worker and --append-eod: megatron-core's writer.

Documents are encoded one at a time by the very tokenizers library that titanling uses.
"""

import argparse
import json
import time
from importlib.metadata import version

import numpy as np
import torch
from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder
from tokenizers import Tokenizer

EOD = "<|end_of_text|>"


def main() -> None:
    """Arguments → .bin and .idx; prints seconds and versions as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("jsonl")
    parser.add_argument("tokenizer", help="directory")
    parser.add_argument("prefix")
    arguments = parser.parse_args()
    tokenizer = Tokenizer.from_file(f"{arguments.tokenizer}/tokenizer.json")
    eod = tokenizer.token_to_id(EOD)
    start = time.perf_counter()
    dtype = DType.optimal_dtype(tokenizer.get_vocab_size())
    builder = IndexedDatasetBuilder(f"{arguments.prefix}.bin", dtype=dtype)
    with open(arguments.jsonl, encoding="utf-8") as lines:
        for line in lines:
            ids = tokenizer.encode(json.loads(line)["text"], add_special_tokens=False).ids
            builder.add_document(torch.IntTensor([*ids, eod]), [len(ids) + 1])
    builder.finalize(f"{arguments.prefix}.idx")
    versions = {name: version(name) for name in ("megatron-core", "tokenizers", "torch")} | {"numpy": np.__version__}
    print(json.dumps({"seconds": time.perf_counter() - start, "versions": versions}))


if __name__ == "__main__":
    main()
