"""Each filter of documents on small real text, and what they refuse before any work."""

import gzip
import json
import os
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from data_helpers import run_python
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter

from titanling.config.schema import Filter
from titanling.data.prepare.filters import Filters, TokenFilters, check_filters
from titanling.data.prepare.filters.contamination import KnownTexts
from titanling.data.prepare.filters.extras import extra_version
from titanling.data.prepare.filters.lists import words_of
from titanling.data.prepare.filters.repetition import NGrams, repeated_parts
from titanling.errors import UserError

ENGLISH = "The committee will meet again on Tuesday to discuss the budget for the coming year and the old bridge."
GERMAN = "Der Ausschuss trifft sich am Dienstag erneut, um über den Haushalt des kommenden Jahres zu beraten."
FINNISH = (
    "Valiokunta kokoontuu jälleen tiistaina keskustelemaan ensi vuoden talousarviosta ja vanhan sillan korjauksista."
)


def setting(kind: str, **keys: Any) -> Any:
    """A filter's settings, as a file gives them."""
    return TypeAdapter(Filter).validate_python({"kind": kind, **keys})


def build(kind: str, language: str | None = None, **keys: Any) -> Callable[[str], str | None]:
    """One filter."""
    return Filters([setting(kind, **keys)], language).apply


@pytest.fixture
def bad_list(tmp_path: Path) -> str:
    """A list of words and phrases for German, with comments."""
    (tmp_path / "de.txt").write_text("# rude\nMist\nblöde Kuh  # two words\n\nStraße\n", encoding="utf-8")
    return f"{tmp_path}/{{language}}.txt"


@pytest.mark.parametrize(
    ("keys", "kept"),
    [
        ({"min_characters": 5}, ["abc de", "one two three"]),
        ({"max_characters": 6}, ["ñ", "abc de"]),
        ({"min_words": 2, "max_words": 2}, ["abc de"]),
        ({"min_characters": 2, "max_words": 2}, ["abc de"]),
    ],
)
def test_length(keys: dict[str, int], kept: list[str]) -> None:
    apply = build("length", **keys)
    assert [text for text in ("ñ", "abc de", "one two three") if apply(text)] == kept


@pytest.mark.parametrize(
    ("text", "hits"),
    [
        ("Das ist Mist, und MIST bleibt mist!", 3),
        ("Misthaufen, Kunstmist", 0),
        ("du blöde\n Kuh; blöde, Kuh", 2),
        ("blöde Ziege, liebe Kuh", 0),
        ("STRASSE und Straße", 2),  # ß and ss are the same without case
        ("", 0),
    ],
)
def test_bad_words_are_whole_words_and_phrases(bad_list: str, text: str, hits: int) -> None:
    for wanted in range(1, 5):
        apply = build("bad_words", "de", path=bad_list, hits=wanted)
        for filler in ("", " und so weiter" * 3):
            assert (apply(text + filler) is None) == (hits >= wanted or not text + filler)


def test_a_list_in_the_home_folder(bad_list: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, name = os.path.split(bad_list)
    monkeypatch.setenv("HOME", folder)
    assert build("bad_words", "de", path=f"~/{name}", hits=1)("so ein Mist") is None


@given(st.lists(st.sampled_from("mist, Mist (blöde kuh kuh! x straße-mist".split()), max_size=12), st.integers(1, 4))
def test_bad_words_agree_with_a_plain_count(
    tmp_path_factory: pytest.TempPathFactory, pieces: list[str], n: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "plain.txt"
    path.write_text("Mist\nblöde Kuh\n", encoding="utf-8")
    words = words_of(" ".join(pieces))
    hits = words.count("mist") + sum(pair == ("blöde", "kuh") for pair in zip(words, words[1:], strict=False))
    dropped = build("bad_words", path=str(path), hits=n)(" ".join(pieces) or "x") is None
    assert dropped == (hits >= n)


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("Title\n=====\n\nText (with 3 words).\n", "Title\n\nText (with 3 words).\n"),
        ("*** --- ***\n+++\n", None),
        ("size = [1, 2];\n}}\n", "size = [1, 2];\n"),
        ("हिन्दी में\n日本語。\n||||", "हिन्दी में\n日本語。"),  # vowel signs belong to their letters
        ("no symbols at all", "no symbols at all"),
        (" \n\n", None),
    ],
)
def test_symbol_lines_are_taken_out(text: str, left: str | None) -> None:
    assert build("symbol_lines")(text) == left


PROSE = " ".join(f"{word} of the people that have seen river number {word}" for word in "one two six".split())
GOPHER = {"min_words": 5, "min_stop_words": 2}


@pytest.mark.parametrize(
    ("text", "keys", "passes"),
    [
        (PROSE, {}, True),
        (PROSE, {"min_words": 50}, False),
        (PROSE, {"max_words": 20}, False),
        (PROSE, {"min_mean_word_length": 4.2}, False),
        (PROSE, {"max_mean_word_length": 3.9}, False),
        (PROSE, {"min_stop_words": 4}, True),  # of, the, that, have: each counts once
        (PROSE, {"min_stop_words": 5}, False),
        (PROSE + " # # # #", {}, False),
        (PROSE + " # # #", {}, True),  # 3 of 33 words
        (PROSE + "… … ... ...", {}, False),
        ("\n".join(f"- {PROSE}" for _ in range(10)), {}, False),
        (PROSE + "\n" + "\n".join(f"- {PROSE}" for _ in range(9)), {}, True),  # nine of ten
        ("\n".join([PROSE, PROSE, PROSE + " …"]), {}, False),
        ("\n".join([PROSE, PROSE, PROSE, PROSE + " …"]), {}, True),
        (PROSE + " 1234 5678 91011 1213 1415 1617 181 920", {}, False),  # 30 of 38 words have a letter
        (PROSE + " 1234 x2345 x91011 x1213", {}, True),
    ],
)
def test_gopher_quality(text: str, keys: dict[str, Any], passes: bool) -> None:
    assert (build("gopher_quality", "en", **(GOPHER | keys))(text) is not None) == passes


def test_stop_words_come_from_the_language_s_list(tmp_path: Path) -> None:
    (tmp_path / "de.txt").write_text("der\nund\n", encoding="utf-8")
    keys = GOPHER | {"stop_words": f"{tmp_path}/{{language}}.txt"}
    apply = build("gopher_quality", "de", **keys)
    assert apply("Der alte Mann und sein großes Meer") and not apply("Der alte Mann oder sein großes Meer")


def test_repeated_parts() -> None:
    assert repeated_parts(["ab c", "d", "ab c", "ab c"]) == (0.5, 0.6)
    assert repeated_parts(["ab"]) == repeated_parts([]) == (0.0, 0.0)


def brute_force(words: list[str], n: int) -> tuple[float, float]:
    """Shares of the top n-gram and of repeated n-grams, word by word."""
    grams = [tuple(words[start : start + n]) for start in range(len(words) - n + 1)]
    total = sum(map(len, words))

    def share(starts: list[int]) -> float:
        covered = {place for start in starts for place in range(start, start + n)}
        return sum(len(words[place]) for place in covered) / total

    top = [share([at for at, other in enumerate(grams) if other == gram]) for gram in grams if grams.count(gram) > 1]
    return max(top, default=0.0), share([at for at, gram in enumerate(grams) if gram in grams[:at]])


@given(st.lists(st.sampled_from(["a", "bb", "ccc", "dddd"]), min_size=1, max_size=30), st.floats(0, 1))
def test_n_grams_agree_with_counting_them_one_by_one(words: list[str], limit: float) -> None:
    grams = NGrams(words)
    for n in range(1, min(len(words), 6) + 1):
        grams.grow()
        top, repeated = brute_force(words, n)
        assert grams.repeated() == pytest.approx(repeated)
        assert not grams.top_is_above(top) and (top == 0 or grams.top_is_above(top - 1e-9))
        assert grams.top_is_above(limit) == (top > limit)


def test_many_short_runs_are_not_measured_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = []
    share = NGrams.share
    monkeypatch.setattr(NGrams, "share", lambda grams, starts: measured.append(grams.n) or share(grams, starts))
    runs = " ".join(f"w{number} " * 3 for number in range(3000))
    keys = {"repeated_n_grams": [], "top_n_grams": [[2, 0.2], [3, 0.18]]}
    assert build("gopher_repetition", **keys)(runs) and not measured
    assert not build("gopher_repetition", **keys)(runs + " buy now" * 3000) and len(measured) < 10


VARIED = "each of these words stands here once so nothing in this line can come back again at all".split()


@pytest.mark.parametrize(
    ("text", "keys", "passes"),
    [
        (" ".join(VARIED), {}, True),
        ("\n".join([" ".join(VARIED), "menu", "menu", "menu"]), {}, False),  # half of the lines
        ("\n".join([" ".join(VARIED), "menu", "menu", "menu"]), {"max_lines": 0.5}, True),
        (" ".join(VARIED) + "\n\n" + " ".join(VARIED), {"max_lines": 1, "max_line_characters": 1}, False),
        ("buy now " * 4 + " ".join(VARIED), {}, False),  # the top 2-gram
        ("buy now " * 4 + " ".join(VARIED), {"top_n_grams": [[2, 0.4]], "repeated_n_grams": []}, True),
        (" ".join(VARIED + VARIED[:9]), {"top_n_grams": []}, False),  # nine words again: 36 of 100 characters
        (" ".join(VARIED + VARIED[:9]), {"top_n_grams": [], "repeated_n_grams": [[5, 0.4], [10, 0.0]]}, True),
        ("word", {}, True),
    ],
)
def test_gopher_repetition(text: str, keys: dict[str, Any], passes: bool) -> None:
    assert (build("gopher_repetition", **keys)(text) is not None) == passes


def test_mojibake_is_repaired_and_nothing_else() -> None:
    apply = build("fix_text")
    assert apply("Das KÃ¤tzchen sagt â€œmiauâ€\x9d.") == "Das Kätzchen sagt “miau”."
    for text in ("Käse, “so”, ﬁn, ＡＢＣ, &amp; 日本", ENGLISH):
        assert apply(text) is text
    assert apply("cafe\u0301") == "café" and build("fix_text", normalization="none")("cafe\u0301") == "cafe\u0301"
    assert build("fix_text", normalization="NFKC")("ﬁn") == "fin"


def test_language_by_py3langid() -> None:
    for code, own in (("en", ENGLISH), ("de", GERMAN), ("fi", FINNISH)):
        apply = build("language", code)
        assert [text for text in (ENGLISH, GERMAN, FINNISH) if apply(text)] == [own]
    mixed = GERMAN + " " + ENGLISH * 5
    assert build("language", "de", characters=len(GERMAN))(mixed) and not build("language", "de")(mixed)


@pytest.mark.slow
def test_language_by_lingua() -> None:
    pytest.importorskip("lingua")  # 100 MB to install, 1 GB to run: not among the tests' packages
    apply = build("language", "de", library="lingua")
    assert [text for text in (ENGLISH, GERMAN, FINNISH) if apply(text)] == [GERMAN]


def write_fasttext(path: Path, labels: dict[str, list[str]]) -> None:
    """A model in fasttext's format, version 12: each label has a direction, which its words have too."""
    words = ["</s>", *(word for own in labels.values() for word in own)]
    size = len(labels)
    entries = [(word, 0) for word in words] + [(f"__label__{label}", 1) for label in labels]
    data = struct.pack("<2i", 793712314, 12)
    data += struct.pack("<12id", size, 5, 1, 1, 0, 1, 3, 3, 0, 0, 0, 100, 1e-4)  # softmax, supervised, no subwords
    data += struct.pack("<3i2q", len(entries), len(words), size, len(entries), -1)
    data += b"".join(word.encode() + b"\0" + struct.pack("<qb", 1, kind) for word, kind in entries)
    rows = [[0.0] * size] + [
        [20.0 * (index == at) for at in range(size)] for index, own in enumerate(labels.values()) for _ in own
    ]
    unit = [[float(row == column) for column in range(size)] for row in range(size)]
    for matrix in (rows, unit):
        data += struct.pack("<?2q", False, len(matrix), size)
        data += b"".join(struct.pack(f"<{size}f", *row) for row in matrix)
    path.write_bytes(data)


def test_language_by_a_model_of_fasttext(tmp_path: Path) -> None:
    model = tmp_path / "model.bin"
    write_fasttext(
        model, {"eng_Latn": ["the", "and"], "deu_Latn": ["der", "und"], "srp_Cyrl": ["и"], "srp_Latn": ["i"]}
    )
    build_it = lambda code: build("language", code, library="fasttext", model=str(model))  # noqa: E731
    apply = build_it("deu")
    assert apply("der\nund und") and not apply("the and the") and not apply("und and the")
    assert build_it("srp")("и i") and not build_it("srp_Cyrl")("и i")  # either script, or one
    with pytest.raises(UserError, match=r'"de"; name the source by one of its labels \(deu_Latn'):
        build_it("de")
    model.write_bytes(b"no model at all")
    with pytest.raises(UserError, match=r"model\.bin: not a model of fasttext"):
        build_it("deu")


def test_token_word_ratio_by_language() -> None:
    keys = {"max_ratio": {"fi": 3, "*": 2}, "min_ratio": {"*": 1}}
    for language, tokens in (("fi", 30), ("sv", 20), (None, 20)):
        filters = TokenFilters([setting("token_word_ratio", **keys)], language)
        ten = "ord " * 10
        assert [filters.keep(ten, n) for n in (9, 10, tokens, tokens + 1)] == [False, True, True, False]
        assert (filters.report[0].documents_in, filters.report[0].bytes_out) == (4, 80)


QUESTION = "Which river flows through the old town of the city where the composer of the ninth symphony was born?"


@pytest.fixture
def test_set(tmp_path: Path) -> str:
    """A test set of a question and its choices."""
    row = {"question": QUESTION, "choices": ["the Rhine", "the Danube and all of its many tributaries"], "answer": 0}
    (tmp_path / "quiz.jsonl.gz").write_bytes(gzip.compress(json.dumps(row).encode() + b"\n"))
    (tmp_path / "lines.txt").write_text("Mary had a little lamb, its fleece was white.\ntoo short\n")
    return str(tmp_path / "*")


def test_decontamination_by_containment(test_set: str) -> None:
    apply = build("decontaminate", test_sets=[test_set], min_containment=0.5)
    long = "Something else entirely stands here, over and over, in many words. " * 50
    upper = QUESTION.upper().replace(" ", "\n")
    half = " ".join(QUESTION.split()[:16])  # 4 of the 7 different 13-grams
    for contaminated in (
        QUESTION,
        long + QUESTION + long,
        long + upper,
        half,
        "x mary had a little lamb its fleece was white",
    ):
        assert apply(contaminated) is None
    for clean in (
        long,
        " ".join(QUESTION.split()[:14]),
        "the Rhine too short",
        "Mary had a little lamb, its fleece was",
    ):
        assert apply(clean) is clean
    assert build("decontaminate", test_sets=[test_set])(half) is half
    assert (
        build("decontaminate", test_sets=[test_set], min_words=7)("the danube and all of its many tributaries") is None
    )


@given(
    st.lists(st.sampled_from("abcd"), max_size=40), st.lists(st.sampled_from("abcde"), max_size=60), st.integers(2, 5)
)
def test_containment_agrees_with_sets(test: list[str], document: list[str], n: int) -> None:
    length = min(n, len(test))
    grams = {tuple(test[at : at + length]) for at in range(len(test) - length + 1)} if len(test) >= 2 else set()
    held = {tuple(document[at : at + length]) for at in range(len(document) - length + 1)}
    expected = len(grams & held) / len(grams) if grams else 0.0
    assert KnownTexts([" ".join(test)], n, 2).containment(" ".join(document)) == pytest.approx(expected)


def test_filters_apply_in_order_and_the_report_adds_up(bad_list: str) -> None:
    settings = [
        setting("symbol_lines"),
        setting("length", min_words=3),
        setting("bad_words", path=bad_list, hits=1),
    ]
    filters = Filters(settings, "de")
    texts = ["eins zwei drei\n----\n", "zu kurz\n== == ==\n", "so ein Mist aber auch", "+++", "vier fünf sechs"]
    assert [filters.apply(text) for text in texts] == ["eins zwei drei\n", None, None, None, "vier fünf sechs"]
    symbols, length, words = filters.report
    assert [(c.documents_in, c.documents_out) for c in filters.report] == [(5, 4), (4, 3), (3, 2)]
    assert symbols.bytes_in == sum(len(text.encode()) for text in texts)
    assert (symbols.bytes_out, length.bytes_out) == (length.bytes_in, words.bytes_in)
    assert words.bytes_out == len("eins zwei drei\nvier fünf sechs".encode())


PACKED = gzip.compress(" ".join(map(str, range(9999))).encode())
GARBLED = PACKED[:500] + bytes(100) + PACKED[600:]


def refusal(settings: list[Any], *languages: str | None) -> str:
    """The one line with which the check fails."""
    with pytest.raises(UserError) as caught:
        check_filters(settings, languages or (None,))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_is_missing_or_wrong_is_said_before_any_work(tmp_path: Path, bad_list: str) -> None:
    words = setting("bad_words", path=bad_list)
    assert "fr.txt: no such list (language fr); add the file" in refusal([words], "de", "fr")
    assert "set data.prepare.language" in refusal([words], "de", None)
    assert 'does not know the language "web"' in refusal([setting("language")], "web")
    assert "does not know which language is wanted" in refusal([setting("language")])
    assert 'no limit for "sv"' in refusal([setting("token_word_ratio", max_ratio={"de": 2})], "de", "sv")
    assert "set stop_words to a list, or min_stop_words = 0" in refusal([setting("gopher_quality")], "de")
    assert "nowhere.txt" in refusal([setting("decontaminate", test_sets=["nowhere.txt"])])
    late = [setting("token_word_ratio", max_ratio={"*": 2}), setting("length", min_words=1)]
    assert '"length" stands behind "token_word_ratio"' in refusal(late)
    files = {
        "empty.txt": (b"# nothing\n", "bad_words", "holds no word"),
        "latin.txt": (b"na\xefve\n", "bad_words", "not UTF-8 at byte 2"),
        "signs.txt": (b"!!\n", "bad_words", "neither letter nor digit"),
        "bad.jsonl": (b'{"a": "b"}\n{"a": \n', "decontaminate", "cannot be read at line 2"),
        "cut.txt.gz": (gzip.compress(b"words " * 999)[:40], "decontaminate", "cannot be read at line 0"),
        "hit.txt.gz": (GARBLED, "decontaminate", "damaged"),
        "test.csv": (b"a,b\n", "decontaminate", "a test set is a .txt or .jsonl"),
        "short.txt": (b"three short words\n", "decontaminate", "no text of 8 words or more"),
    }
    for name, (data, kind, says) in files.items():
        (tmp_path / name).write_bytes(data)
        key = {"path": str(tmp_path / name)} if kind == "bad_words" else {"test_sets": [str(tmp_path / name)]}
        message = refusal([setting(kind, **key)])
        assert says in message and name in message


@pytest.mark.parametrize(
    ("package", "keys"),
    [
        ("ftfy", {"kind": "fix_text"}),
        ("py3langid", {"kind": "language"}),
        ("lingua", {"kind": "language", "library": "lingua"}),
        ("fasttext", {"kind": "language", "library": "fasttext", "model": "lid.bin"}),
    ],
)
def test_a_missing_extra_is_named_with_its_command(
    monkeypatch: pytest.MonkeyPatch, package: str, keys: dict[str, str]
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    assert f"pip install 'titanling[{package}]'" in refusal([setting(**keys)], "de")


def test_a_package_may_come_under_another_name() -> None:
    from importlib.metadata import version

    assert extra_version("no-such-package", "numpy") == f"numpy {version('numpy')}"
    assert extra_version("no-such-package") == "no-such-package of an unknown version"


def test_the_fingerprint_follows_the_lists_and_nothing_else(tmp_path: Path, bad_list: str, test_set: str) -> None:
    settings = [setting("bad_words", path=bad_list), setting("decontaminate", test_sets=[test_set])]
    before = check_filters(settings, ["de"])
    assert check_filters(settings, ["de"]) == before and int(before, 16)
    for path in (tmp_path / "de.txt", tmp_path / "lines.txt"):
        path.write_text(path.read_text(encoding="utf-8") + "noch ein neuer Satz aus mehr als acht Wörtern\n")
        after = check_filters(settings, ["de"])
        assert after != before
        before = after


def test_nothing_heavy_is_imported_for_small_filters() -> None:
    program = (
        "import sys; from titanling.data.prepare.filters import check_filters; "
        "print([m for m in ('torch', 'ftfy', 'py3langid', 'lingua', 'fasttext', 'tokenizers') if m in sys.modules])"
    )
    run = run_python("-c", program)
    assert (run.returncode, run.stdout) == (0, "[]\n"), run.stderr
