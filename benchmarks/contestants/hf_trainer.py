"""Hugging Face: `Trainer` with `LlamaForCausalLM`, SDPA and fused AdamW, without logging, evaluation or saving."""

import tempfile
from typing import Any

import accelerate
import torch
import transformers
from protocol import BETAS, LR, MAX_NORM, WEIGHT_DECAY, Session, Sizes
from torch import Tensor
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments


class RandomTokens(Dataset):
    """Sequences of random tokens; the model shifts the labels itself."""

    def __init__(self, sizes: Sizes, length: int = 4096) -> None:
        self.sequences = torch.randint(sizes.vocab_size, (length, sizes.seq_len))

    def __len__(self) -> int:
        return len(self.sequences)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.sequences[index], "labels": self.sequences[index]}


class LastLoss(Trainer):
    """Remembers the loss of the last step, which no callback is given."""

    last_loss = torch.zeros(())

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """The library's own."""
        self.last_loss = super().training_step(*args, **kwargs)
        return self.last_loss


class Driven(TrainerCallback):
    """Reports each step to the driver, and waits between windows."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.trainer: LastLoss | None = None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop when the driver has seen enough."""
        assert self.trainer is not None
        control.should_training_stop = not self.session.step_done(self.trainer.last_loss)


def build_model(sizes: Sizes) -> LlamaForCausalLM:
    """The model, tied, with random weights."""
    config = LlamaConfig(
        vocab_size=sizes.vocab_size,
        hidden_size=sizes.dim,
        intermediate_size=sizes.ffn_dim,
        num_hidden_layers=sizes.n_layers,
        num_attention_heads=sizes.n_heads,
        num_key_value_heads=sizes.n_kv_heads,
        max_position_embeddings=sizes.seq_len,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        use_cache=False,
        attn_implementation="sdpa",
    )
    return LlamaForCausalLM(config)


def main() -> None:
    """Build, then train as the driver says."""
    session = Session(__doc__)
    cell, sizes = session.cell, session.sizes
    torch.manual_seed(0)
    model = build_model(sizes)
    if cell.precision == "bf16-parameters":
        model.bfloat16()
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=1_000_000,
            per_device_train_batch_size=sizes.batch,
            learning_rate=LR,
            adam_beta1=BETAS[0],
            adam_beta2=BETAS[1],
            weight_decay=WEIGHT_DECAY,
            max_grad_norm=MAX_NORM,
            optim="adamw_torch_fused",
            lr_scheduler_type="constant",
            bf16=cell.precision == "bf16-autocast",
            torch_compile=cell.compiled,
            use_cpu=True,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        driven = Driven(session)
        trainer = LastLoss(model=model, args=arguments, train_dataset=RandomTokens(sizes), callbacks=[driven])
        driven.trainer = trainer
        session.ready(
            sum(p.numel() for p in model.parameters()),
            "float32" if cell.precision == "fp32" else "bfloat16",
            torch.get_num_threads(),
            torch=torch.__version__,
            transformers=transformers.__version__,
            accelerate=accelerate.__version__,
        )
        trainer.train()


if __name__ == "__main__":
    main()
