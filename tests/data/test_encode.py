"""Encoding: both backends give the same ids and files, special tokens in a text are text, and who is chosen when."""

import builtins
import sys
import types
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from data_helpers import texts_of
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import processors

from titanling.config.schema import Prepare
from titanling.data.indexed import IndexedDataset
from titanling.data.prepare.encode import Encoder
from titanling.data.prepare.run import prepare
from titanling.data.prepare.tokenizer import TokenizerFiles, load_tokenizer
from titanling.data.prepare.train import Recipe, train_tokenizer
from titanling.errors import UserError

ROOM = Path(__file__).parents[2] / "titanling"
RECIPES = [Recipe(kind, digits) for kind in ("byte-level", "byte-fallback") for digits in (False, True)]


@pytest.fixture(scope="module", params=RECIPES, ids=lambda recipe: f"{recipe.kind}-{recipe.split_digits}")
def files(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TokenizerFiles:
    """A tokenizer of each recipe, trained on our own source."""
    directory = str(tmp_path_factory.mktemp("tokenizer") / "t")
    train_tokenizer(
        [path.read_text() for path in sorted((ROOM / "data").rglob("*.py"))], 1500, directory, request.param
    )
    return load_tokenizer(directory)


@pytest.fixture(scope="module")
def both(files: TokenizerFiles) -> tuple[Encoder, Encoder]:
    """An encoder of each library."""
    pytest.importorskip("gigatoken")
    return Encoder(files, "gigatoken"), Encoder(files, "tokenizers")


def documents(files: TokenizerFiles, texts: list[str], backend: str) -> list[list[int]]:
    return documents_of(Encoder(files, backend), texts)


def documents_of(encoder: Encoder, texts: list[str]) -> list[list[int]]:
    ids, lengths = encoder(texts)
    return [part.tolist() for part in np.split(ids, np.cumsum(lengths)[:-1])]


TEXTS = [
    "def f(x):\n    return 12.5\n",
    "<|end_of_text|>",
    "a <|begin_of_text|> b",
    " ",
    "x",
    "ñ 日本語 🦊 e\u0301 ▁ <0x41>\x00",
]


def test_each_document_is_closed_and_special_tokens_are_text(files: TokenizerFiles) -> None:
    for ids, text in zip(documents(files, TEXTS, "tokenizers"), TEXTS, strict=True):
        assert ids[-1] == files.eod_id and ids.count(files.eod_id) == 1 and files.bos_id not in ids
        assert files.tokenizer.decode(ids[:-1], skip_special_tokens=False) == text


def test_backends_agree(files: TokenizerFiles) -> None:
    pytest.importorskip("gigatoken")
    texts = TEXTS + [path.read_text() for path in sorted(ROOM.rglob("*.py"))]
    encoder = Encoder(files)
    encoder(texts)
    assert encoder.backend == "gigatoken" and encoder.note is None
    assert documents(files, texts, "gigatoken") == documents(files, texts, "tokenizers")


@settings(max_examples=150, deadline=None)
@given(
    texts=st.lists(
        st.text(min_size=1, max_size=80) | st.text("aB1 \n\t'ſ.é\u0301٣日", min_size=1), min_size=1, max_size=6
    )
)
def test_backends_agree_on_any_text(both: tuple[Encoder, Encoder], texts: list[str]) -> None:
    fast, reference = both
    assert documents_of(fast, texts) == documents_of(reference, texts)


def test_truncation_padding_and_templates_of_a_tokenizer_do_not_reach_the_data(files: TokenizerFiles) -> None:
    changed = load_tokenizer_like(files)
    changed.tokenizer.enable_truncation(2)
    changed.tokenizer.enable_padding(length=99)
    token = files.tokenizer.id_to_token(files.bos_id)
    changed.tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{token} $A", special_tokens=[(token, files.bos_id)]
    )
    for backend in ("tokenizers", "auto"):
        assert documents(changed, TEXTS, backend) == documents(files, TEXTS, "tokenizers")


def load_tokenizer_like(files: TokenizerFiles) -> TokenizerFiles:
    """A copy that may be changed."""
    copy = type(files.tokenizer).from_str(files.tokenizer.to_str())
    return TokenizerFiles(copy, files.sha256, files.vocab_size, files.eod_id, files.bos_id)


@pytest.fixture
def no_gigatoken(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if it were not installed."""
    monkeypatch.delitem(sys.modules, "gigatoken", raising=False)
    real = builtins.__import__

    def without(name: str, *others: object) -> types.ModuleType:
        if name in ("gigatoken", "awkward"):
            raise ImportError(name)
        return real(name, *others)

    monkeypatch.setattr(builtins, "__import__", without)


def test_without_gigatoken(files: TokenizerFiles, no_gigatoken: None) -> None:
    encoder = Encoder(files)
    encoder(TEXTS)
    assert encoder.backend == "tokenizers" and encoder.note is None
    with pytest.raises(UserError, match='"gigatoken": it is not installed'):
        Encoder(files, "gigatoken")(TEXTS)


@pytest.fixture(params=["first", "later", "refuses"])
def wrong(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A gigatoken that gives other ids at once, only in texts that mention "odd", or takes no tokenizer."""
    awkward = types.SimpleNamespace(
        flatten=lambda rows: [token for row in rows for token in row],
        num=lambda rows: [len(row) for row in rows],
        to_numpy=np.array,
    )

    class Fake:
        @staticmethod
        def from_json(text: str) -> "Fake":
            if request.param == "refuses":
                raise RuntimeError("Unsupported\n\npre_tokenizer")
            fake = Fake()
            fake.tokenizer = tokenizers.Tokenizer.from_str(text)
            return fake

        def encode_batch(self, texts: list[str]) -> list[list[int]]:
            wrong = [request.param == "first" or "odd" in text for text in texts]
            rows = [self.tokenizer.encode(text).ids for text in texts]
            return [row[:-1] if bad else row for row, bad in zip(rows, wrong, strict=True)]

    import tokenizers

    monkeypatch.setitem(sys.modules, "gigatoken", types.SimpleNamespace(Tokenizer=Fake))
    monkeypatch.setitem(sys.modules, "awkward", awkward)
    return request.param


def test_other_ids_are_never_written(files: TokenizerFiles, wrong: str) -> None:
    texts = ["some text", "other"]
    encoder = Encoder(files)
    if wrong == "later":
        encoder(texts)
        assert encoder.backend == "gigatoken"
        with pytest.raises(UserError, match='set data.prepare.backend = "tokenizers" and begin anew: what came'):
            encoder(["odd text"])
        return
    says = {"first": "gives other ids", "refuses": "cannot run this tokenizer \\(Unsupported pre_tokenizer\\)"}[wrong]
    assert np.array_equal(encoder(texts).ids, Encoder(files, "tokenizers")(texts).ids)
    assert encoder.backend == "tokenizers"
    with pytest.raises(UserError, match=f'"gigatoken": it {says}') as error:
        Encoder(files, "gigatoken")(texts)
    assert "\n" not in str(error.value) and encoder.note.count("\n") == 0 and "more slowly" in encoder.note


def test_prepared_files_are_the_same(tmp_path: Path) -> None:
    pytest.importorskip("gigatoken")
    settings = {"text": (str(ROOM),), "vocab_size": 400, "validation_fraction": 0.2}
    for backend in ("auto", "tokenizers"):
        where = tmp_path / backend
        lines = prepare(Prepare(**settings, backend=backend), f"{where}/t", f"{where}/v", f"{tmp_path}/tokenizer")
        assert not any("gigatoken" in line for line in lines)
    for name in ("t.bin", "t.idx", "t.json", "v.bin", "v.idx", "v.json"):
        assert (tmp_path / "auto" / name).read_bytes() == (tmp_path / "tokenizers" / name).read_bytes()


def test_batches_of_two_splits_lose_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("titanling.data.prepare.tokenise.BATCH_CHARACTERS", 9_000)
    settings = Prepare(text=(str(ROOM / "data"),), vocab_size=400, validation_fraction=0.4)
    prepare(settings, f"{tmp_path}/t", f"{tmp_path}/v", f"{tmp_path}/tokenizer")
    tokenizer, found = load_tokenizer(f"{tmp_path}/tokenizer").tokenizer, Counter()
    for split in ("t", "v"):
        dataset = IndexedDataset(f"{tmp_path}/{split}")
        assert dataset.num_documents > 2
        found.update(tokenizer.decode(dataset.document(index)[:-1]) for index in range(dataset.num_documents))
    assert found == Counter(texts_of(ROOM / "data"))
