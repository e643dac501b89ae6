"""titanling itself: a Trainer built from a config over token files, driven by its own `train_step`."""

import gc
import json
import tempfile
from pathlib import Path

import torch
from protocol import BETAS, LR, MAX_NORM, WEIGHT_DECAY, Cell, Session, Sizes
from random_tokens import write_tokens

from titanling import __version__
from titanling.config import load_config
from titanling.model.presets import resolve_shape
from titanling.parallel.degrees import Degrees
from titanling.parallel.precision import compute_dtype
from titanling.trainer import Trainer

STEPS = 1_000_000  # never reached: the driver ends the run
DATA_STEPS = 50  # so many steps of data; the loader begins another epoch by itself

PRECISIONS = {
    "fp32": {"mixed_precision_param": "float32"},
    "bf16-autocast": {"mixed_precision_param": "bfloat16"},
    "bf16-parameters": {"dtype": "bfloat16", "mixed_precision_param": "bfloat16"},
}


def config_text(folder: Path, cell: Cell, sizes: Sizes, smoke: bool) -> str:
    """The TOML of the run."""
    model = {"flavor": "minilingua_30m", "vocab_size": sizes.vocab_size}
    if smoke:
        model |= {key: getattr(sizes, key) for key in ("dim", "n_layers", "n_heads", "n_kv_heads", "ffn_dim")}
    tables = {
        "job": {"dump_folder": str(folder / "run"), "description": "benchmark"},
        "model": model,
        "data": {"train": str(folder / "train")},
        "training": {
            "steps": STEPS,
            "seq_len": sizes.seq_len,
            "local_batch_size": sizes.batch,
            "max_norm": MAX_NORM,
            **PRECISIONS[cell.precision],
        },
        "optimizer": {"lr": LR, "beta1": BETAS[0], "beta2": BETAS[1], "weight_decay": WEIGHT_DECAY},
        "lr_scheduler": {"warmup_steps": 0, "decay_ratio": 0.0},
        "compile": {"enable": cell.compiled},
        "metrics": {"log_freq": STEPS},
    }
    lines = []
    for table, keys in tables.items():
        # JSON's strings, numbers and booleans are TOML's too.
        lines += [f"[{table}]", *(f"{key} = {json.dumps(value)}" for key, value in keys.items())]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Build, then train as the driver says."""
    session = Session(__doc__)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_tokens(folder / "train", session.sizes.vocab_size, DATA_STEPS * session.sizes.tokens)
        path = folder / "run.toml"
        path.write_text(config_text(folder, session.cell, session.sizes, session.smoke), encoding="utf-8")
        config = load_config(str(path)).config
        trainer = Trainer(config, resolve_shape(config.model), Degrees())
        parameters = sum(p.numel() for _, p in trainer.runner.named_parameters())
        dtype = str(compute_dtype(trainer.world.device, config.training)).removeprefix("torch.")
        gc.disable()  # as Trainer.train does
        session.ready(parameters, dtype, torch.get_num_threads(), titanling=__version__, torch=torch.__version__)
        while session.step_done(trainer.train_step()[0]):
            pass
        trainer.close()


if __name__ == "__main__":
    main()
