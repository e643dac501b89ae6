"""Training a tokenizer on text without a break: it ends, says so, changes nothing for other text, and heeds Ctrl-C."""

import os
import random
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, trainers
from tokenizers.pre_tokenizers import ByteLevel, WhitespaceSplit

from titanling.data.prepare.bpe import LONGEST, PIECE, _pieces, train_bpe
from titanling.data.prepare.train import Recipe, train_tokenizer
from titanling.errors import UserError

CHARACTERS = {
    "one letter": "a",
    "DNA": "ACGT",
    "Han": "".join(map(chr, range(0x4E00, 0x4E40))),
    "emoji": "".join(map(chr, range(0x1F600, 0x1F640))),
    "spaces": " ",
    "line breaks": "\n",
    "digits": "0123456789",
    "rules": "=",
}
LENGTH = 20_000


def run_of(kind: str, length: int = LENGTH) -> str:
    return "".join(random.Random(0).choices(CHARACTERS[kind], k=length))


@pytest.mark.timeout(60)
@pytest.mark.parametrize("kind", CHARACTERS)
@pytest.mark.parametrize("recipe", ["byte-level", "byte-fallback"])
def test_a_long_run_is_cut_and_that_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str, recipe: str
) -> None:
    text = f"before it {run_of(kind)} behind it"
    train_tokenizer([text], 360, str(tmp_path / "made"), Recipe(kind=recipe))
    said = capsys.readouterr().err
    assert "without a break" in said and len(said.splitlines()) == 1, said
    made = Tokenizer.from_file(str(tmp_path / "made/tokenizer.json"))
    assert max(len(made.decode([token])) for token in made.get_vocab().values()) <= LONGEST
    assert made.decode(made.encode(text).ids) == text


def library(texts: list[str], pre_tokenizer: object) -> str:
    """What tokenizers itself makes of them."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=400, show_progress=False))
    return tokenizer.to_str()


@pytest.mark.parametrize("pre_tokenizer", [ByteLevel(add_prefix_space=False), WhitespaceSplit()])
def test_other_text_gives_the_same_tokenizer(pre_tokenizer: object, capsys: pytest.CaptureFixture[str]) -> None:
    choose = random.Random(1)
    texts = [
        " ".join(choose.choices(("rain", "roof", "münchen", "x" * (LONGEST - 1), "雨" * 340), k=12)) for _ in range(5)
    ]
    texts += ["雨が降る。" * 14_000, "a1" * 34_000]  # long, and no word of them is
    if isinstance(pre_tokenizer, WhitespaceSplit):
        texts = texts[:5]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer
    train_bpe(tokenizer, texts, trainers.BpeTrainer(vocab_size=400, show_progress=False))
    assert tokenizer.to_str() == library(texts, pre_tokenizer)
    assert capsys.readouterr().err == ""


@settings(max_examples=10, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["a", "雨", " ", "1", "=", "a1", "雨。", "x "]), st.integers(1, 2 * PIECE))))
def test_a_text_is_cut_only_within_runs_that_are_cut_anyway(parts: list[tuple[str, int]]) -> None:
    text = "".join(part * (count // len(part)) for part, count in parts)
    pieces = list(_pieces(text))
    assert "".join(pieces) == text
    place = 0
    for piece in pieces[:-1]:
        place += len(piece)
        around = text[place - LONGEST : place + 1]
        assert len(set(around)) == 1, "the characters around a cut are one run"


@pytest.mark.parametrize("recipe", ["byte-level", "byte-fallback"])
def test_ctrl_c_ends_it_and_leaves_nothing(tmp_path: Path, recipe: str) -> None:
    """The texts never end: only the signal ends them."""
    given = 0

    def texts() -> Iterator[str]:
        nonlocal given
        while True:
            given += 1
            if given == 5:
                os.kill(os.getpid(), signal.SIGINT)
            yield "rain falls on the roof " * 50

    with pytest.raises(KeyboardInterrupt):
        train_tokenizer(texts(), 400, str(tmp_path / "made"), Recipe(kind=recipe))
    assert list(tmp_path.iterdir()) == []


def test_what_is_wrong_with_the_text_is_said(tmp_path: Path) -> None:
    def texts() -> Iterator[str]:
        yield "rain " * 100
        raise UserError("x.jsonl:7: not JSON; correct it")

    with pytest.raises(UserError, match="x.jsonl:7"):
        train_tokenizer(texts(), 400, str(tmp_path / "made"))
    assert list(tmp_path.iterdir()) == []
