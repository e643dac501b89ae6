"""The tokens that end and begin each document: a run's token files and its tokenizer must agree on them. No torch."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from titanling.config.schema import Data
from titanling.data.indexed import read_sidecar
from titanling.data.token_files import bos_of, facts, is_foreign
from titanling.errors import UserError


class Ends(NamedTuple):
    """Of each document of a run's text."""

    eod_id: int
    """Id of its last token."""
    bos_id: int | None
    """Id of its first token, if that is there only to begin it; None: it is not, or it is not known."""


def ends_of(data: Data, prefixes: Sequence[str], tokenizer: str | None) -> tuple[Ends, list[str]]:
    """What ends and begins the documents of all these token files; and what is to be said of it.

    `tokenizer` is the folder of the run's, if it has one. Raises UserError if the files differ.
    """
    foreign = [prefix for prefix in prefixes if is_foreign(prefix)]
    own = _special_ids(tokenizer)[1] if foreign and tokenizer and data.bos_id is None else None
    found = [Ends(facts(prefix, data).eod_id, bos_of(prefix, data, own)) for prefix in prefixes]
    for prefix, ends in zip(prefixes, found, strict=True):
        if ends.eod_id != found[0].eod_id:
            raise UserError(
                f"{prefix}: its documents end with token {ends.eod_id} and those of {prefixes[0]} with"
                f" {found[0].eod_id}; prepare all with one eos_token (tokenizer_config.json)"
            )
        if ends.bos_id != found[0].bos_id:
            theirs, ours = (f"with token {bos}" if bos is not None else "without one" for _, bos in (ends, found[0]))
            raise UserError(
                f"{prefix}: its documents begin {theirs} (bos_token) and those of {prefixes[0]} {ours}; prepare all"
                " with the same data.prepare.add_bos (of the files of others, data.bos_id may say it)"
            )
    if not foreign:
        return found[0], []
    begin = "without a bos_token, as far as is known" if found[0].bos_id is None else f"with token {found[0].bos_id}"
    return found[0], [f"data: the documents of {foreign[0]} begin {begin} (data.bos_id would say it)"]


def check_ends(prefixes: Iterable[str], tokenizer: str) -> None:
    """Raise UserError if a tokenizer's folder no longer means the tokens that our files among these were made with.

    tokenizer_config.json, which names them, can be edited beside the same tokenizer.json.
    """
    eod_id, bos_id = _special_ids(tokenizer)
    for prefix in prefixes:
        if is_foreign(prefix):
            continue
        sidecar = read_sidecar(prefix)
        marks = {"eos_token": (eod_id, sidecar.eod_id, "ends"), "bos_token": (bos_id, sidecar.bos_id, "begins")}
        for name, (now, then, verb) in marks.items():
            if None not in (now, then) and now != then:
                raise UserError(
                    f"{tokenizer}/tokenizer_config.json: its {name} is token {now}, but {prefix}.json says that"
                    f" {then} {verb} its documents; restore {name}, or prepare the text again under another prefix"
                )


def _special_ids(tokenizer: str) -> tuple[int | None, int | None]:
    from titanling.data.prepare.tokenizer import special_ids  # it imports tokenizers

    return special_ids(tokenizer)
