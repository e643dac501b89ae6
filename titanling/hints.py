"""What the end of a run recommends: which checkpoint, and a prompt in the run's own language. Imports no torch."""

import os
from pathlib import Path

from titanling.checkpoint import folder
from titanling.checkpoint.remote import open_root
from titanling.config import Config
from titanling.data.indexed import IndexedDataset
from titanling.errors import UserError

DOCUMENTS, FIRST_TOKENS, WORDS, CHARACTERS = 8, 64, 4, 60
"""Where a prompt is looked for, and how long it is."""


def better_step(config: Config, steps: int) -> int | None:
    """The step that validated better than the last one, if its checkpoint was kept for that."""
    if not config.checkpoint.keep_best:
        return None
    try:
        root = open_root(Path(config.job.dump_folder), config.checkpoint.folder)
        state = folder.read_json(folder.step_folder(root, steps) / folder.STATE)
        best = (state.get("best") or {}).get("step", steps)
        there = (folder.step_folder(root, best) / folder.MANIFEST).exists()
        return best if best != steps and there else None
    except Exception:  # each client of a URL has its own: what cannot be read is not recommended
        return None


def first_words(config: Config) -> str:
    """The first words of a document like those of the run, for the model to continue; "" if none can be read."""
    from titanling.data.prepare.tokenizer import load_tokenizer  # it imports tokenizers

    prefix, assets = config.data.validation or config.data.train, config.model.hf_assets_path
    if prefix is None or assets is None or not os.path.isfile(f"{prefix}.json"):
        return ""
    try:
        tokenizer, dataset = load_tokenizer(assets).tokenizer, IndexedDataset(prefix)
        for document in range(min(DOCUMENTS, dataset.num_documents)):
            tokens = dataset.document_range(document)
            text = tokenizer.decode(dataset.read(tokens.start, min(len(tokens), FIRST_TOKENS)).tolist())
            words = next((line.split() for line in text.splitlines() if len(line.split()) > WORDS), [])
            chosen = " ".join(words[:WORDS])
            if chosen and chosen.isprintable() and len(chosen) <= CHARACTERS:
                return chosen
        dataset.close()
    except (UserError, OSError, IndexError, ValueError):
        pass  # the run is done: it shall not end in an error about a hint
    return ""
