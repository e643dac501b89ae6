"""Trained tokenizers: both kinds, what they promise, weighted samples, comparisons, and every bad input."""

import gzip
import json
import os
import random
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from data_helpers import ROOT, run_python
from hypothesis import given, settings
from hypothesis import strategies as st

from titanling.data.prepare.fertility import compare, means
from titanling.data.prepare.readers import Reading
from titanling.data.prepare.sample import Sample, Source, parse_sources
from titanling.data.prepare.tokenizer import load_tokenizer
from titanling.data.prepare.train import BYTES, Recipe, train_tokenizer
from titanling.errors import UserError

TRAIN, COMPARE = "scripts/train_tokenizer.py", "scripts/compare_tokenizers.py"
TEXTS = [
    "def first(x):\n    return x + 12.50  # ñandú\n\n\n" * 20,
    "Žluťoučký kůň úpěl ďábelské ódy, 2024-11-26!  Two  spaces\tand a tab.\r\n" * 20,
    " ".join("".join(random.Random(i).choices("aeiounrst", k=6)) + f" {i * 37}" for i in range(400)),
    "日本語のテキスト。" * 9 + "<0x41><0x41> <|user|> ▁▁ 🦊 e\u0301" * 9,
]
RECIPES = {
    f"{kind}{'-digits' * digits}": Recipe(kind, digits, special_tokens=("<|user|>",), pad_to_multiple=64)
    for kind in ("byte-level", "byte-fallback")
    for digits in (False, True)
}


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One directory for each recipe."""
    folder = tmp_path_factory.mktemp("trained")
    for name, recipe in RECIPES.items():
        train_tokenizer(TEXTS, 420, str(folder / name), recipe)
    return {name: folder / name for name in RECIPES}


@pytest.mark.parametrize("name", RECIPES)
def test_transformers_gives_the_same_ids_and_the_text_back(trained: dict[str, Path], name: str) -> None:
    from transformers import AutoTokenizer

    ours = load_tokenizer(str(trained[name]))
    theirs = AutoTokenizer.from_pretrained(trained[name], local_files_only=True)
    assert ours.vocab_size == len(theirs) == 448  # 420, to a multiple of 64
    assert (ours.bos_id, ours.eod_id, theirs.convert_tokens_to_ids("<|user|>")) == (0, 1, 2)
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.model_max_length) == (0, 1, 131072)
    assert theirs.convert_ids_to_tokens(447) == "<|reserved_27|>"
    for text in [text.replace("<|user|>", "") for text in TEXTS] + ["", " ", " a", "\x00\x7f\u2028 ∑"]:
        ids = theirs(text)["input_ids"]
        assert ids == ours.tokenizer.encode(text).ids
        assert theirs.decode(ids) == text
    assert 2 in theirs("a <|user|> b")["input_ids"]
    assert theirs.decode([2, 447, *theirs("a b")["input_ids"]], skip_special_tokens=True) == "a b"


@settings(max_examples=60, deadline=None)
@given(text=st.text(max_size=60) | st.text("▁ <0x4A>1\n\t.", max_size=30))
def test_every_text_comes_back(trained: dict[str, Path], text: str) -> None:
    for directory in trained.values():
        tokenizer = load_tokenizer(str(directory)).tokenizer
        tokenizer.encode_special_tokens = True
        assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


@pytest.mark.parametrize("name", RECIPES)
def test_digits_stand_alone_if_wanted(trained: dict[str, Path], name: str) -> None:
    tokenizer = load_tokenizer(str(trained[name])).tokenizer
    long = [token for token in tokenizer.get_vocab() if re.search(r"\d", token) and token not in BYTES]
    merged = [token for token in long if len(token) > 1 and not token.startswith("<|")]
    assert bool(merged) == (not RECIPES[name].split_digits)


def test_words_are_cut_where_no_merge_reaches(trained: dict[str, Path]) -> None:
    tokens = load_tokenizer(str(trained["byte-fallback"])).tokenizer.get_vocab().keys() - set(BYTES)
    learned = [token for token in tokens if not token.startswith("<|")]
    assert any(token.startswith(" ") and token.strip() for token in learned)
    for token in learned:
        assert " " not in token.lstrip(" ") and len({c.isalpha() or c == "\u0301" for c in token.strip(" ")}) <= 1


def test_rare_characters_are_written_as_bytes(tmp_path: Path) -> None:
    text = "common words " * 999 + "☃"
    for coverage, as_bytes in ((0.9995, 3), (1.0, 0)):
        directory = str(tmp_path / str(coverage))
        train_tokenizer([text], 320, directory, Recipe("byte-fallback", character_coverage=coverage))
        found = load_tokenizer(directory).tokenizer.encode("☃")
        assert sum(token in BYTES for token in found.tokens) == as_bytes and found.ids


def test_the_same_text_gives_the_same_bytes(trained: dict[str, Path], tmp_path: Path) -> None:
    for name, recipe in RECIPES.items():
        train_tokenizer(TEXTS, 420, str(tmp_path / name), recipe)
        for file in sorted(trained[name].iterdir()):
            assert (tmp_path / name / file.name).read_bytes() == file.read_bytes()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"kind": "wordpiece"}, "--kind wordpiece"),
        ({"special_tokens": ("<|a|>", "<|a|>")}, "<|a|>: given 2 times"),
        ({"special_tokens": ("<|end_of_text|>",)}, "given 2 times"),
        ({"special_tokens": ("",)}, "is empty"),
        ({"eos_token": " </s>"}, "begins or ends with white space"),
        ({"special_tokens": ("<0x0A>",)}, "name is taken"),
        ({"pad_to_multiple": 0}, "--pad-to-multiple 0"),
        ({"model_max_length": 0}, "--model-max-length 0"),
        ({"character_coverage": 0.0}, "--character-coverage 0.0"),
        ({"character_coverage": float("nan")}, "--character-coverage nan"),
    ],
)
def test_recipes_that_make_no_sense(changes: dict, says: str) -> None:
    with pytest.raises(UserError) as error:
        Recipe(**changes)
    assert says in str(error.value)


def test_a_vocabulary_must_hold_bytes_special_tokens_and_characters(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="257: too small for 256 bytes and 2 special tokens; make it 258"):
        train_tokenizer(TEXTS, 257, str(tmp_path / "a"))
    with pytest.raises(UserError, match="270: too small for 256 bytes, 2 special tokens and .* characters"):
        train_tokenizer(TEXTS, 270, str(tmp_path / "a"), Recipe("byte-fallback"))
    assert not list(tmp_path.iterdir())
    assert train_tokenizer(["ab"], 5000, str(tmp_path / "b")) < 300  # the text gives no more


@pytest.fixture
def languages(tmp_path: Path) -> Path:
    """A large source of 40 files, a small one, and one long file."""
    for name, files, words in (("large", 40, 900), ("small", 1, 60), ("long", 1, 30_000)):
        (tmp_path / name).mkdir()
        for index in range(files):
            rng = random.Random(f"{name} {index}")
            text = " ".join(f"{name[:2]}{rng.randrange(999)}" for _ in range(words))
            (tmp_path / name / f"{index:02}.txt").write_text(text)
    return tmp_path


def sources(folder: Path, **weights: float) -> list[Source]:
    return [Source(name, (str(folder / name),), weight) for name, weight in weights.items()]


def test_sources_are_sampled_by_weight(languages: Path) -> None:
    sample = Sample(sources(languages, large=6, small=3, long=1), 50_000, seed=3)
    assert sample.shares == pytest.approx([0.6, 0.3, 0.1])
    taken = ["".join(sample.of(index)) for index in range(3)]
    assert [len(text) for text in taken] == pytest.approx([30_000, 15_000, 5_000], rel=0.2)
    assert [text[:2] for text in taken] == ["la", "sm", "lo"]
    whole = (languages / "small" / "00.txt").read_text()
    assert len(taken[1]) == 15_000 and taken[1].count(whole) == 15_000 // len(whole)  # repeated
    assert all(len(text) <= quota for text, quota in zip(taken, sample.quotas, strict=True))
    assert list(sample) == list(sample) == list(Sample(sample.sources, 50_000, seed=3))
    assert list(sample) != list(Sample(sample.sources, 50_000, seed=4))


def test_a_large_source_is_sampled_all_over(languages: Path) -> None:
    texts = {path.read_text() for path in (languages / "large").iterdir()}
    taken = list(Sample(sources(languages, large=1), 50_000))
    assert len(taken) > 8 and len(set(taken)) == len(taken) and sum(text in texts for text in taken) >= len(taken) - 1
    whole = (languages / "long" / "00.txt").read_text()
    places = [whole.index(piece) for piece in Sample(sources(languages, long=1), 40_000)]
    assert len(places) >= 3 and places == sorted(places) and places[-1] > len(whole) / 2


def test_without_a_bound_everything_is_taken_once(languages: Path) -> None:
    sample = Sample(sources(languages, large=1), 10**9)
    assert Counter(sample) == Counter(path.read_text() for path in (languages / "large").iterdir())
    each = Sample(sources(languages, large=1, small=5), 20_000, each=True)
    assert each.quotas == [20_000, each.bytes[1]]


@pytest.mark.parametrize("max_bytes", [160_000, 10**6])
def test_every_packed_file_is_sampled(tmp_path: Path, max_bytes: int) -> None:
    for name in "abcd":
        text = " ".join(f"{name}{number}" for number in range(20_000))
        (tmp_path / f"{name}.txt.gz").write_bytes(gzip.compress(text.encode()))
    packed, plain = Source("packed", (f"{tmp_path}/*.gz",)), Source("plain", (f"{tmp_path}/plain.txt",))
    (tmp_path / "plain.txt").write_text("plain " * 90_000)
    sample = Sample([packed, plain], max_bytes)
    text = " ".join(sample.of(0))
    words = Counter(word[0] for word in text.split() if word[0].isalpha())
    assert set(words) == set("abcd") and len(text) == pytest.approx(sample.quotas[0], rel=0.2)
    if max_bytes == 10**6:  # more than the packed size, and less than the text: no part of it comes twice
        assert sample.quotas[0] > sample.bytes[0] and max(words.values()) < 1.2 * min(words.values())
        assert text.count("a17 ") == 1


def test_a_sample_is_read_as_it_is_told(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"body": "one"}\n{"text": "two"}\n')
    source = Source("en", (f"{tmp_path}/a.jsonl",))
    with pytest.raises(UserError, match="--text-field"):
        list(Sample([source], 10))
    assert list(Sample([source], 10**6, reading=Reading("body", skip_bad=True)))[0] == "one"


def test_sources_in_words_and_in_toml(tmp_path: Path) -> None:
    (tmp_path / "s.toml").write_text(
        '[[sources]]\nname = "en"\ntext = ["a", "b:c"]\nweight = 27\n[[sources]]\nname = "de"\ntext = "d"\n'
    )
    assert parse_sources([f"{tmp_path}/s.toml", "fi=x/y.txt:2.5", "sv=odd:dir/z"]) == [
        Source("en", ("a", "b:c"), 27.0),
        Source("de", ("d",), 1.0),
        Source("fi", ("x/y.txt",), 2.5),
        Source("sv", ("odd:dir/z",), 1.0),
    ]


@pytest.mark.parametrize(
    ("argument", "says"),
    [
        ("english", "must be NAME=PATH"),
        ("en=", "must be NAME=PATH"),
        ("=a", "must be NAME=PATH"),
        ("en=a:0", "source en: weight 0; must be positive"),
        ("en=a:-2", "weight -2"),
        ("en=a:nan", "weight nan"),
        ("en=a:inf", "weight inf"),
        ("en=a:much", 'the weight "much" is no number'),
        ("fi=a", "source fi: named twice"),
        ("nowhere.toml", "nowhere.toml: no such file"),
        ("name = 3", "has no [[sources]]"),
        ("[[sources]", "not valid TOML"),
        ('[[sources]]\nname = "x"', "needs a name and a text"),
        ('[[sources]]\nname = "x"\ntext = "t"\nwieght = 2', "wieght = 2"),
        ('[[sources]]\nname = "x"\ntext = [3]', "must be a path or a list of paths"),
        ('[[sources]]\nname = "x"\ntext = "t"\nweight = true', "weight = True"),
    ],
)
def test_bad_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, argument: str, says: str) -> None:
    monkeypatch.chdir(tmp_path)
    if argument == "name = 3" or argument.startswith("["):
        Path("s.toml").write_text(argument)
        argument = "s.toml"
    with pytest.raises(UserError) as error:
        parse_sources(["fi=b", argument])
    assert says in str(error.value)


def test_sources_without_text(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("")
    for path, says in (("nowhere", "source en: "), ("empty.txt", "source en: holds no text")):
        with pytest.raises(UserError, match=says) as error:
            Sample([Source("en", (str(tmp_path / path),))], 100)
        assert "data.prepare" not in str(error.value)


def test_fertility(languages: Path, trained: dict[str, Path]) -> None:
    tokenizers = {name: load_tokenizer(str(path)).tokenizer for name, path in trained.items()}
    (languages / "small" / "00.txt").write_text("return x\n return  first")
    sample = Sample(sources(languages, small=3, large=1), 10_000, each=True)
    small, large = reports = compare(tokenizers, sample, "byte-level")
    assert (small.name, small.words, small.bytes) == ("small", 4, 23)
    for name, tokenizer in tokenizers.items():
        found = small.tokenizers[name]
        assert found.tokens == len(tokenizer.encode("return x\n return  first"))
        assert (found.tokens_per_word, found.tokens_per_byte) == (found.tokens / 4, found.tokens / 23)
        assert found.normalised_length == found.tokens / small.tokenizers["byte-level"].tokens
    mean = means(reports, sample.shares)["byte-fallback"]["tokens_per_word"]
    parts = [report.tokenizers["byte-fallback"].tokens_per_word for report in (small, large)]
    assert mean == pytest.approx(0.75 * parts[0] + 0.25 * parts[1])


def test_a_tokenizer_that_cuts_texts_off_does_not_win(languages: Path, trained: dict[str, Path]) -> None:
    whole, cut, plain = (load_tokenizer(str(trained["byte-level"])).tokenizer for _ in range(3))
    plain.encode_special_tokens = True
    cut.enable_truncation(4)
    cut.enable_padding(length=7)
    text = "return x\n return <|user|> first"
    (languages / "small" / "00.txt").write_text(text)
    sample = Sample(sources(languages, small=1), 10_000)
    (report,) = compare({"whole": whole, "cut": cut}, sample, "whole")
    assert {found.tokens for found in report.tokenizers.values()} == {len(plain.encode(text))}


@pytest.mark.parametrize("kind", ["byte-level", "byte-fallback"])
@pytest.mark.parametrize("token", ["END", "E"])
def test_a_special_token_that_plain_text_would_give_is_refused(tmp_path: Path, kind: str, token: str) -> None:
    with pytest.raises(UserError, match=f"special token {token}: is also a word"):
        train_tokenizer(["END of BEND, " * 99], 280, str(tmp_path / "a"), Recipe(kind, eos_token=token))
    assert not list(tmp_path.iterdir())
    train_tokenizer(["END of BEND, " * 99], 280, str(tmp_path / "a"), Recipe(kind, eos_token=f"<{token}>"))
    tokenizer = load_tokenizer(str(tmp_path / "a")).tokenizer
    assert tokenizer.encode(f"<{token}>").ids == [1]


def script(*arguments: object) -> subprocess.CompletedProcess:
    return run_python(*map(str, arguments), env=os.environ | {"PYTHONPATH": str(ROOT)})


def test_scripts_train_and_compare(languages: Path, tmp_path: Path) -> None:
    output = tmp_path / "out" / "tokenizer"
    command = [TRAIN, "--source", f"la={languages}/large:3", f"sm={languages}/small", "--vocab-size", "300"]
    options = ["--kind", "byte-fallback", "--split-digits", "--pad-to-multiple", "128", "--special-tokens", "<|a|>"]
    done = script(*command, *options, "--output", output)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert "75.00%" in done.stdout and "repeated" in done.stdout and "vocabulary 384" in done.stdout
    assert load_tokenizer(str(output)).tokenizer.token_to_id("<|a|>") == 2
    assert sorted(path.name for path in output.parent.iterdir()) == ["tokenizer"]

    again = script(*command, "--output", output)
    assert again.returncode == 2 and "exists and is never overwritten" in again.stderr
    other = tmp_path / "other"
    assert script(*command, "--output", other).returncode == 0
    report = tmp_path / "report" / "r.json"
    compared = script(COMPARE, output, other, "--source", f"lo={languages}/long", "sm=README.md:3", "--json", report)
    assert compared.returncode == 0, compared.stderr
    lines = [line.split() for line in compared.stdout.splitlines()]
    assert [line[0] for line in lines] == ["source", "lo", "lo", "sm", "sm", "mean", "mean", "NSL:"]
    assert lines[1][4] == lines[5][4] == "1.000" != lines[2][4]
    found = json.loads(report.read_text())
    assert found["reference"] == str(output) and [source["share"] for source in found["sources"]] == [0.25, 0.75]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((TRAIN, "--vocab-size", 300, "--source", "en=nowhere", "--output", "o"), '"nowhere"'),
        ((TRAIN, "--vocab-size", 30, "--source", "en=README.md", "--output", "o"), "too small"),
        ((TRAIN, "--vocab-size", 300, "--source", "en=README.md", "--output", "o", "--max-bytes", 0), "--max-bytes 0"),
        ((TRAIN, "--vocab-size", 300, "--source", "en=README.md", "--output", "docs"), "docs: exists"),
        ((COMPARE, "nowhere", "--source", "en=README.md"), "nowhere/tokenizer.json: no such file"),
        ((COMPARE, "a", "a", "--source", "en=README.md"), "named twice"),
    ],
)
def test_scripts_refuse_in_one_line(arguments: tuple, says: str) -> None:
    done = script(*arguments)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert says in done.stderr and not (ROOT / "o").exists()


def test_a_killed_training_leaves_nothing(languages: Path, tmp_path: Path) -> None:
    output = tmp_path / "tokenizer"
    command = [sys.executable, TRAIN, "--source", "code=python-stdlib", "--vocab-size", "9000", "--output", output]
    process = subprocess.Popen(
        command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline().startswith("source")  # it has begun
    process.kill()
    process.communicate()
    assert not output.exists()
