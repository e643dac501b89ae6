"""Turns batches of documents into token ids: by gigatoken where it gives the very ids of tokenizers, else by that."""

import json
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Encoding, Tokenizer

from titanling.data.prepare.tokenizer import TokenizerFiles, encode_plainly
from titanling.errors import UserError


class Encoded(NamedTuple):
    """Token ids of several documents, one after another: documents are many and short."""

    ids: np.ndarray
    """(tokens,), uint32."""
    lengths: np.ndarray
    """(documents,), int64."""


class Backend(NamedTuple):
    """A library's two steps from documents to token ids: no special tokens added, those written out are plain text."""

    encode: Callable[[list[str]], Any]
    """Threads of the library's own work here."""
    ids: Callable[[Any], Encoded]
    """What `encode` made, as arrays: Python works here."""


# How much of the data both backends encode: of the first batch, to choose, and of every later one.
FIRST_PIECES, LATER_PIECES, PIECE_CHARACTERS = 64, 1, 1_000


class Encoder:
    """Encodes documents, closes each with the end-of-document token and, with `bos_id`, begins each with that.

    `backend`: "tokenizers"; "gigatoken", or an error; "auto", which is gigatoken if it is installed, can run this
    tokenizer, and agrees with tokenizers on a sample of the first batch. A sample of every later batch is compared
    too (`UserError` if they differ: what was encoded before might be wrong). So the ids are those of tokenizers.

    Attributes: `marks`, how many tokens of a document are not its text; `note`, a line that says why it is not
    gigatoken though that is installed, None otherwise; `backend`, the one in use, once a batch was encoded;
    `vocab_size`, above every id.
    """

    def __init__(self, files: TokenizerFiles, backend: str = "auto", bos_id: int | None = None) -> None:
        self.marks = 1 if bos_id is None else 2
        self.note: str | None = None
        self.backend = backend
        self.vocab_size = files.vocab_size
        self._eod_id, self._bos_id = files.eod_id, bos_id
        self._reference = _tokenizers(files.tokenizer)
        self._chosen: Backend | None = self._reference if backend == "tokenizers" else None
        self._tokenizer = files.tokenizer

    def __call__(self, texts: Sequence[str]) -> Encoded:
        """Token ids of the texts (at least one), each closed, and begun. Raises `UserError`."""
        return self.close(*self.encode(texts))

    def encode(self, texts: Sequence[str]) -> tuple[Backend, Any]:
        """The first part of a call, which may run in a thread while `close` ends the call before."""
        if self._chosen is None:
            self._chosen = self._choose(texts)
        elif self._chosen is not self._reference and not self._agrees(self._chosen, texts, LATER_PIECES):
            raise UserError(
                "gigatoken and tokenizers give different ids for some of this text, though not for its beginning;"
                ' set data.prepare.backend = "tokenizers" and begin anew: what came before may be wrong too'
            )
        return self._chosen, self._chosen.encode(list(texts))

    def close(self, backend: Backend, encoded: Any) -> Encoded:
        """The second part: the ids, each document closed, and begun."""
        documents = backend.ids(encoded)
        lengths = documents.lengths + self.marks
        ids = np.full(int(lengths.sum()), self._eod_id, np.uint32)
        is_text = np.ones(len(ids), bool)
        ends = np.cumsum(lengths)
        is_text[ends - 1] = False
        if self._bos_id is not None:
            is_text[ends - lengths] = False
            ids[ends - lengths] = self._bos_id
        ids[is_text] = documents.ids
        return Encoded(ids, lengths)

    def _choose(self, texts: Sequence[str]) -> Backend:
        wanted = self.backend == "gigatoken"
        try:
            fast = _gigatoken(self._tokenizer)
            problem = None if self._agrees(fast, texts, FIRST_PIECES) else "gives other ids than tokenizers"
        except ImportError:
            problem = "is not installed (pip install gigatoken)" if wanted else ""
        except Exception as error:  # a tokenizer that it does not support, or a version of it that we do not know
            problem = f"cannot run this tokenizer ({' '.join(str(error).split())[:200]})"
        if problem is None:
            self.backend = "gigatoken"
            return fast
        if wanted:
            raise UserError(f'data.prepare.backend = "gigatoken": it {problem}; set it to "auto" or "tokenizers"')
        self.note = f"gigatoken {problem}: tokenised by tokenizers, more slowly" if problem else None
        self.backend = "tokenizers"
        return self._reference

    def _agrees(self, fast: Backend, texts: Sequence[str], pieces: int) -> bool:
        """Whether both give the same ids on pieces of documents spread evenly over `texts`."""
        step = -(-len(texts) // pieces)
        sample = [text[:PIECE_CHARACTERS] for text in texts[::step]]
        found, expected = (backend.ids(backend.encode(sample)) for backend in (fast, self._reference))
        return all(map(np.array_equal, found, expected))


def _tokenizers(tokenizer: Tokenizer) -> Backend:
    # Otherwise a text that mentions <|end_of_text|> would end its document there.
    encode_plainly(tokenizer)

    def ids(encodings: list[Encoding]) -> Encoded:
        found = [np.array(encoding.ids, np.uint32) for encoding in encodings]
        return Encoded(np.concatenate(found), np.array([len(part) for part in found]))

    return Backend(lambda texts: tokenizer.encode_batch_fast(texts, add_special_tokens=False), ids)


def _gigatoken(tokenizer: Tokenizer) -> Backend:
    """Raises ImportError, and what gigatoken raises for a tokenizer that it does not support."""
    import awkward
    import gigatoken

    settings: dict[str, Any] = json.loads(tokenizer.to_str())
    # It would find special tokens in a text, and has no switch for that: it is not told of them.
    settings["added_tokens"] = [token for token in settings["added_tokens"] if not token["special"]]
    settings["post_processor"] = None
    fast = gigatoken.Tokenizer.from_json(json.dumps(settings))

    def ids(encoded: Any) -> Encoded:
        return Encoded(awkward.to_numpy(awkward.flatten(encoded)), awkward.to_numpy(awkward.num(encoded)))

    return Backend(fast.encode_batch, ids)
