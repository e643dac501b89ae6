"""The README.md of an exported model: what is known of it from its checkpoint, and nothing else. Imports no torch."""

from collections.abc import Mapping
from typing import Any

from titanling import __version__
from titanling.model.presets import LlamaShape

SETTINGS = {
    "sequence length": "training.seq_len",
    "global batch, sequences": "training.global_batch_size",
    "steps of the run": "training.steps",
    "parameters held in": "training.dtype",
    "computed in": "training.mixed_precision_param",
    "optimizer": "optimizer.name",
    "peak learning rate": "optimizer.lr",
    "weight decay": "optimizer.weight_decay",
    "warm-up, steps": "lr_scheduler.warmup_steps",
    "decay": "lr_scheduler.decay_type",
    "seed": "debug.seed",
}
DATA = {
    "seed of the order": "data.seed",
    "weights converted from": "converted_from",
}


def model_card(state: Mapping[str, Any], shape: LlamaShape, dtype: str) -> str:
    """Markdown: the card's metadata, the model's sizes, and the run's facts as far as `state` (state.json) has them.

    A checkpoint made by conversion has no run behind it, and its card claims none.
    """
    model = {
        "parameters": f"{shape.total_params:,}",
        "without embeddings": f"{shape.non_embedding_params:,}",
        "layers": shape.n_layers,
        "hidden size": shape.dim,
        "feed-forward size": shape.ffn_dim,
        "heads, key/value heads, head size": f"{shape.n_heads}, {shape.n_kv_heads}, {shape.head_dim}",
        "vocabulary": f"{shape.vocab_size:,}",
        "tied embeddings": shape.tie_embeddings,
        "QK-norm": shape.qk_norm,
        "RoPE base": f"{shape.rope_theta:,.0f}",
        "type of the weights": dtype,
    }
    sources = (_look_up(state, "data.sources") or {}).items()
    data = {
        f"SHA-256 of the token files: {name}": files["bin_sha256"] for name, files in sources if "bin_sha256" in files
    }
    data |= {label: _look_up(state, dotted) for label, dotted in DATA.items()}
    run: dict[str, Any] = {}
    if "converted_from" not in state:
        run = {"step": state["step"], "tokens seen": f"{state['tokens_seen']:,}"}
        run |= {label: _look_up(state["config"], dotted) for label, dotted in SETTINGS.items()}
    family = "Qwen3" if shape.qk_norm else "Llama"
    head = "---\nlibrary_name: transformers\npipeline_tag: text-generation\n---\n"
    intro = f"# {family} model, {shape.total_params / 1e6:,.0f} M parameters\n\nExported by titanling {__version__}."
    parts = [head, intro, _table("Model", model), _table("Training", run), _table("Data", data)]
    return "\n\n".join(part.strip("\n") for part in parts if part) + "\n"


def _look_up(tree: Any, dotted: str) -> Any:
    for key in dotted.split("."):
        tree = tree.get(key) if isinstance(tree, Mapping) else None
    return tree


def _table(title: str, facts: Mapping[str, Any]) -> str:
    """Facts that are known, as a Markdown table; nothing if there are none."""
    rows = [f"| {label} | {_plain(value)} |" for label, value in facts.items() if value is not None]
    return "\n".join([f"## {title}", "", "| | |", "|---|---|", *rows]) if rows else ""


def _plain(value: Any) -> str:
    """On one line, without a character that Markdown or a terminal would take for more than text."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "".join(c for c in " ".join(str(value).split()) if c.isprintable() and c not in "|<>[]`\\")[:100]
