"""A checkpoint to Hugging Face's files as torchtitan's conversion script goes about it, with torch's own parts.

The whole model is built in float32 on the CPU, the checkpoint is loaded into it, all of it is cast, written by
HuggingFaceStorageWriter and consolidated. No config.json and no tokenizer: it writes none.
"""

import argparse
import warnings

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import HuggingFaceStorageWriter

from titanling.config.schema import Model
from titanling.model.llama import Llama
from titanling.model.presets import resolve_shape


def main() -> None:
    """Arguments → files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--flavor", required=True, help="the model's preset")
    parser.add_argument("--checkpoint", required=True, help="a checkpoint of torch.distributed.checkpoint")
    parser.add_argument("--output", required=True, help="directory to make")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    with torch.device("cpu"):
        model = Llama(resolve_shape(Model(flavor=arguments.flavor)))
    weights = model.state_dict()
    dcp.load(weights, checkpoint_id=arguments.checkpoint)
    weights = {name: tensor.to(torch.bfloat16) for name, tensor in weights.items()}
    writer = HuggingFaceStorageWriter(
        arguments.output,
        fqn_to_index_mapping=dict.fromkeys(weights, 1),
        save_distributed=True,
        enable_consolidation=True,
        thread_count_consolidation=5,
    )
    dcp.save(weights, storage_writer=writer)


if __name__ == "__main__":
    main()
