"""A checkpoint's model, by itself: verified while it is read, for generation and conversion."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from titanling.checkpoint import folder
from titanling.checkpoint.loading import Opened, open_checkpoint, read_tensors
from titanling.checkpoint.names import check_tensors, saved_shape
from titanling.checkpoint.origin import eos_ids, origin_of
from titanling.checkpoint.shards import THREADS, Shards
from titanling.data.prepare.tokenizer import TokenizerFiles, load_tokenizer
from titanling.errors import UserError
from titanling.model.llama import Llama, build_on_meta
from titanling.model.presets import LlamaShape


class SavedModel(NamedTuple):
    """A model with its trained weights, and the state.json saved with it."""

    model: Llama
    shape: LlamaShape
    state: dict[str, Any]


def load_model(checkpoint: Path) -> SavedModel:
    """The model of a checkpoint on the CPU, in the type that it was saved in.

    Raises UserError if the folder is no checkpoint or a file of it is damaged.
    """
    opened = open_checkpoint(checkpoint)
    with verified(opened):
        shape, shards = open_weights(opened)
        model = build_on_meta(shape, shards.dtype("model.embed_tokens.weight")).to_empty(device="cpu")
        read_tensors(shards, {name: parameter.detach() for name, parameter in model.named_parameters()})
    return SavedModel(model.eval(), shape, opened.state)


def open_weights(opened: Opened) -> tuple[LlamaShape, Shards]:
    """A checkpoint's shape and tensors. Raises UserError if these are not just the model's, naming the first."""
    shape = saved_shape(opened.state["model"], opened.path / folder.STATE)
    shards = Shards(opened.path / "model")
    check_tensors(shards, shape, opened.path)
    return shape, shards


@contextmanager
def verified(opened: Opened, rank: int = 0, size: int = 1) -> Iterator[None]:
    """Compare the model's files with their hashes in threads while the body reads them.

    Of several processes each takes its share. Raises UserError at the end naming the file that is damaged, whatever the
    body stumbled over because of it.
    """
    names = sorted(name for name in opened.manifest if name.startswith("model/"))[rank::size]
    pool = ThreadPoolExecutor(THREADS, thread_name_prefix="checkpoint-verify")
    checks = [pool.submit(folder.damage, opened.path, [name], opened.manifest) for name in names]

    def refuse_damage() -> None:
        problem = next((found for check in checks if (found := check.result()) is not None), None)
        if problem is not None:
            raise UserError(f"{problem}; this checkpoint is damaged: use an earlier one")

    try:
        yield
        refuse_damage()
    except UserError:
        refuse_damage()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def setting(state: dict[str, Any], dotted: str) -> Any:
    """A value of the config that was saved with a checkpoint. Raises UserError if there is none."""
    table, key = dotted.split(".")
    try:
        return state["config"][table][key]
    except (KeyError, TypeError):
        raise UserError(f"{folder.STATE}: its config has no {dotted}; it was not written by titanling") from None


class TextEnds(NamedTuple):
    """How a text of a saved model begins and ends."""

    bos_id: int | None
    """Before each document of its training text; None: nothing."""
    stop_ids: list[int]
    """Each of them ends a text; the first one ended those of its training."""


def text_ends(state: dict[str, Any], files: TokenizerFiles) -> TextEnds:
    """What training or, of a model that is only converted, its tokenizer says of the text's ends.

    State from before training text could begin with anything says nothing, and its text did not. Raises UserError if
    the tokenizer lacks the token.
    """
    documents = state.get("documents") or {}
    bos_id = documents.get("bos_id")
    if not documents and "converted_from" in state and files.adds_bos:
        bos_id = files.bos_id
    if bos_id is not None and files.tokenizer.id_to_token(bos_id) is None:
        raise UserError(
            f"{files.folder}: has no token {bos_id}, with which each document of the training text begins; give the"
            " tokenizer that the model was trained with, --tokenizer"
        )
    stops = [documents.get("eod_id", files.eod_id), files.eod_id, *eos_ids(origin_of(state))]
    return TextEnds(bos_id, list(dict.fromkeys(stops)))


def find_tokenizer(state: dict[str, Any], shape: LlamaShape, given: Path | None) -> tuple[Path, TokenizerFiles]:
    """The tokenizer to use with a saved model, and its directory: the given one, else the run's.

    Raises UserError if there is none, if it has more tokens than the model, or if the run's own has changed since.
    """
    directory = given or setting(state, "model.hf_assets_path")
    if directory is None:
        raise UserError("the run of this checkpoint had no tokenizer (model.hf_assets_path); give one with --tokenizer")
    directory = Path(directory)
    if not directory.is_dir():
        raise UserError(f"{directory}: no such tokenizer directory; say where it is with --tokenizer")
    files = load_tokenizer(str(directory))
    if files.vocab_size > shape.vocab_size:
        raise UserError(
            f"{directory}: has {files.vocab_size} tokens, the model only {shape.vocab_size}; give the tokenizer"
            " that it was trained with, --tokenizer"
        )
    trained_with = (state.get("documents") or {}).get("tokenizer_sha256")
    if given is None and trained_with not in (None, files.sha256):
        raise UserError(
            f"{directory}/tokenizer.json: has changed since the training text was made with it; give the folder of the"
            f" former with --tokenizer; --tokenizer {directory} takes this one all the same"
        )
    return directory, files
