"""Filters of a config through the whole preparation: what is written, what the report says, any number of workers."""

import json
import shutil
from pathlib import Path

import pytest
from pydantic import TypeAdapter

from titanling.config.load import load_config
from titanling.config.schema import Filter
from titanling.data.indexed import IndexedDataset
from titanling.data.prepare import pieces
from titanling.data.prepare.filters import chain
from titanling.data.prepare.run import prepare
from titanling.data.prepare.tokenizer import load_tokenizer
from titanling.data.prepare.train import train_tokenizer
from titanling.errors import UserError

FOOTER = "Alle Rechte vorbehalten, Impressum und Datenschutz."
GERMAN = [
    "Der Ausschuss trifft sich am Dienstag erneut, um über den Haushalt des kommenden Jahres zu beraten.",
    "Im Garten hinter dem alten Haus standen drei Apfelbäume, die jedes Jahr viele Früchte trugen.",
    "Die Lehrerin erklärte den Kindern, warum der Mond manchmal nur halb zu sehen ist.",
]
ENGLISH = "The committee will meet again on Tuesday to discuss the budget for the coming year and the old bridge."
CONFIG = """
[data.prepare]
text = ["de={folder}/de.jsonl"]
validation_fraction = 0.0001

[[data.prepare.filters]]
kind = "fix_text"
[[data.prepare.filters]]
kind = "symbol_lines"
[[data.prepare.filters]]
kind = "deduplicate_documents"
[[data.prepare.filters]]
kind = "deduplicate_paragraphs"
[[data.prepare.filters]]
kind = "language"
[[data.prepare.filters]]
kind = "bad_words"
path = "{folder}/{{language}}.txt"
hits = 1
[[data.prepare.filters]]
kind = "token_word_ratio"
max_ratio = {{ de = 12 }}
"""


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A config, its JSONL in small pieces, its list, and a tokenizer."""
    first = f"{GERMAN[0]}\n\n{FOOTER}"
    rows = [
        first,
        f"{GERMAN[1]}\n=====\n\n{FOOTER}",
        first,
        ENGLISH,
        GERMAN[2].replace("ä", "Ã¤"),
        "Das ist ein Mist, den hier im ganzen Land niemand lesen und schon gar nicht lernen will.",
        f"{GERMAN[2]}\n\nUnd ein neuer Absatz, der am Ende des langen Tages noch geschrieben wurde.",
        "Donaudampfschifffahrtsgesellschaftskapitänsmützenabzeichen" * 2,
    ]
    (tmp_path / "de.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows), encoding="utf-8")
    (tmp_path / "de.txt").write_text("Mist\n", encoding="utf-8")
    (tmp_path / "run.toml").write_text(CONFIG.format(folder=tmp_path), encoding="utf-8")
    train_tokenizer(iter(GERMAN), 300, str(tmp_path / "tokenizer"))
    monkeypatch.setattr(pieces, "PIECE_BYTES", 300)
    return tmp_path / "run.toml"


def run(config: Path, output: Path, **changes) -> list[str]:
    """Prepare; the texts that were written."""
    output.mkdir()
    settings = load_config(config).config.data.prepare.model_copy(update=changes)
    prepare(settings, f"{output}/train", None, f"{config.parent}/tokenizer")
    tokenizer, data = load_tokenizer(f"{config.parent}/tokenizer").tokenizer, IndexedDataset(f"{output}/train")
    return [tokenizer.decode(data.document(number)[:-1].tolist()) for number in range(data.num_documents)]


def test_filters_in_the_order_given(config: Path, tmp_path: Path) -> None:
    written = run(config, tmp_path / "one", workers=1)
    assert written == [
        f"{GERMAN[0]}\n\n{FOOTER}",
        GERMAN[1],
        GERMAN[2],
        "Und ein neuer Absatz, der am Ende des langen Tages noch geschrieben wurde.",
    ]
    assert run(config, tmp_path / "two", workers=2) == written
    name = next((tmp_path / "one").glob("*.report.json"))
    report = json.loads(name.read_text(encoding="utf-8"))
    source = report["sources"]["de"]
    kinds = "fix_text symbol_lines deduplicate_documents deduplicate_paragraphs language bad_words token_word_ratio"
    assert report["filters"] == kinds.split()
    left = [counts["documents_out"] for counts in source["filters"]]
    assert left == [8, 8, 7, 7, left[4], left[4] - 1, 4] and left[4] in (5, 6)  # the long word is in no language
    for before, after in zip(source["filters"], source["filters"][1:], strict=False):
        assert (before["documents_out"], before["bytes_out"]) == (after["documents_in"], after["bytes_in"])
    assert source["filters"][-1]["bytes_out"] == source["splits"]["training"]["bytes"]
    assert (tmp_path / "two" / name.name).read_bytes() == name.read_bytes()


def test_what_filters_load_is_loaded_once(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built = []
    decontaminate = chain.decontaminate
    monkeypatch.setattr(chain, "decontaminate", lambda its: built.append(its) or decontaminate(its))
    (tmp_path / "test.txt").write_text(f"{GERMAN[0]}\n", encoding="utf-8")
    (tmp_path / "fi.jsonl").write_bytes((tmp_path / "de.jsonl").read_bytes())
    kinds = {"kind": "decontaminate", "test_sets": [f"{tmp_path}/test.txt"]}, {"kind": "deduplicate_documents"}
    filters = tuple(TypeAdapter(Filter).validate_python(kinds[each]) for each in (0, 1, 0))
    text = tuple(f"{language}={tmp_path}/{language}.jsonl" for language in ("de", "fi"))
    assert len(run(config, tmp_path / "out", text=text, filters=filters, workers=1)) == 6
    assert len(built) == 3  # to check it, and for each stage: not for each language and piece
    report = json.loads(next((tmp_path / "out").glob("*.report.json")).read_text(encoding="utf-8"))
    counts = [[each["documents_in"] for each in report["sources"][name]["filters"]] for name in ("de", "fi")]
    assert counts == [[8, 6, 6], [8, 6, 0]]


def test_a_filter_that_cannot_work_stops_before_anything_is_written(config: Path, tmp_path: Path) -> None:
    (tmp_path / "de.txt").unlink()
    shutil.rmtree(tmp_path / "tokenizer")
    with pytest.raises(UserError, match=r"de\.txt: no such list \(language de\)"):
        run(config, tmp_path / "out")
    assert not list((tmp_path / "out").iterdir()) and not (tmp_path / "tokenizer").exists()
