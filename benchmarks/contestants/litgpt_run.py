"""litgpt: its GPT model and chunked loss in the loop of its `pretrain`, on Fabric, without logging or saving."""

from importlib.metadata import version

import lightning
import torch
from litgpt import GPT, Config
from litgpt.utils import chunked_cross_entropy
from protocol import BETAS, LR, MAX_NORM, WEIGHT_DECAY, Session, Sizes
from torch import nn

PRECISIONS = {"fp32": "32-true", "bf16-autocast": "bf16-mixed", "bf16-parameters": "bf16-true"}


def build_model(sizes: Sizes) -> GPT:
    """The model, tied, with N(0, 0.02) weights like the others'."""
    config = Config(
        block_size=sizes.seq_len,
        n_layer=sizes.n_layers,
        n_embd=sizes.dim,
        n_head=sizes.n_heads,
        n_query_groups=sizes.n_kv_heads,
        head_size=sizes.head_dim,
        intermediate_size=sizes.ffn_dim,
        vocab_size=sizes.vocab_size,
        padded_vocab_size=sizes.vocab_size,
        rotary_percentage=1.0,
        parallel_residual=False,
        bias=False,
        norm_class_name="RMSNorm",
        norm_eps=1e-5,
        mlp_class_name="LLaMAMLP",
    )
    model = GPT(config)
    model.transformer.wte.weight = model.lm_head.weight
    for parameter in model.parameters():
        if parameter.ndim == 2:
            nn.init.normal_(parameter, 0.0, 0.02)
    return model


def main() -> None:
    """Build, then train as the driver says."""
    session = Session(__doc__)
    cell, sizes = session.cell, session.sizes
    fabric = lightning.Fabric(accelerator="cpu", devices=1, precision=PRECISIONS[cell.precision])
    fabric.launch()
    fabric.seed_everything(0, verbose=False)
    with fabric.init_module():
        model = build_model(sizes)
    parameters = sum(p.numel() for p in model.parameters())
    if cell.compiled:
        model = torch.compile(model)
    model = fabric.setup(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=BETAS, weight_decay=WEIGHT_DECAY, fused=True)
    optimizer = fabric.setup_optimizers(optimizer)
    session.ready(
        parameters,
        "float32" if cell.precision == "fp32" else "bfloat16",
        torch.get_num_threads(),
        torch=torch.__version__,
        litgpt=version("litgpt"),
        lightning=lightning.__version__,
    )
    model.train()
    while True:
        tokens = torch.randint(sizes.vocab_size, (sizes.batch, sizes.seq_len + 1))
        loss = chunked_cross_entropy(model(tokens[:, :-1].contiguous()), tokens[:, 1:].contiguous())
        fabric.backward(loss)
        fabric.clip_gradients(model, optimizer, max_norm=MAX_NORM)
        optimizer.step()
        optimizer.zero_grad()
        if not session.step_done(loss.detach()):
            return


if __name__ == "__main__":
    main()
