"""The README.md of an exported model: what is known of it from its checkpoint, and nothing else. Imports no torch."""

from collections.abc import Mapping
from typing import Any

from titanling import __version__
from titanling.checkpoint.origin import origin_of
from titanling.checkpoint.phases import SETTINGS, look_up, phase_of
from titanling.model.presets import LlamaShape

DATA = {"seed of the order": "data.seed"}


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
    sources = (look_up(state, "data.sources") or {}).items()
    data = {
        f"SHA-256 of the token files: {name}": files["bin_sha256"] for name, files in sources if "bin_sha256" in files
    }
    data |= {label: look_up(state, dotted) for label, dotted in DATA.items()}
    data["weights converted from"] = (origin_of(state) or {}).get("from")
    phases = [] if "converted_from" in state else [*(state.get("phases") or []), phase_of(state)]
    family = "Qwen3" if shape.qk_norm else "Llama"
    head = "---\nlibrary_name: transformers\npipeline_tag: text-generation\n---\n"
    intro = f"# {family} model, {shape.total_params / 1e6:,.0f} M parameters\n\nExported by titanling {__version__}."
    parts = [head, intro, _table("Model", model), _table("Training", *map(_run, phases)), _table("Data", data)]
    return "\n\n".join(part.strip("\n") for part in parts if part) + "\n"


def _run(phase: Mapping[str, Any]) -> dict[str, Any]:
    facts = {"step": phase["step"], "tokens seen": f"{phase['tokens_seen']:,}", "computed in": phase["computed_in"]}
    return facts | {label: phase["settings"].get(key) for label, key in SETTINGS.items()}


def _table(title: str, *columns: Mapping[str, Any]) -> str:
    """Facts that are known, as a Markdown table with a column for each phase; nothing if there are none."""
    labels = [label for label in (columns[0] if columns else {}) if any(facts[label] is not None for facts in columns)]
    if not labels:
        return ""
    heads = [f"phase {number}" for number in range(1, len(columns) + 1)] if len(columns) > 1 else [""]
    rows = [["", *heads], ["---"] * (len(columns) + 1)]
    rows += [[label, *(_plain(facts[label]) for facts in columns)] for label in labels]
    return "\n".join([f"## {title}", "", *(f"| {' | '.join(row)} |" for row in rows)])


def _plain(value: Any) -> str:
    """On one line, without a character that Markdown or a terminal would take for more than text."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "".join(c for c in " ".join(str(value).split()) if c.isprintable() and c not in "|<>[]`\\")[:100]
