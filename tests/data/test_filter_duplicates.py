"""Exact deduplication of documents and paragraphs: the first one stays, and a second pass finds nothing."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter

from titanling.config.schema import Filter
from titanling.data.prepare.filters import HashFilter, open_hashes

PARAGRAPHS = st.sampled_from(["", " ", "a", " a ", "b", "long enough", "long enough ", "another long one", "x\ny"])
DOCUMENTS = st.lists(st.lists(PARAGRAPHS, min_size=1, max_size=5).map("\n\n".join).filter(bool), max_size=10)


def open_filter(kind: str, **keys: Any) -> HashFilter:
    """A filter's settings as a file gives them, opened."""
    return open_hashes(TypeAdapter(Filter).validate_python({"kind": kind, **keys}), None)


def run(step: HashFilter, texts: list[str]) -> list[str | None]:
    """What is left of each text, when the hashes of those before it are known."""
    seen: set[int] = set()
    left = []
    for text in texts:
        hashes = step.hashes(text)
        assert hashes.dtype == np.uint64 and hashes.ndim == 1 and len(hashes) >= 1
        new = []
        for value in hashes.tolist():
            new.append(value not in seen)
            seen.add(value)
        left.append(step.keep(text, np.array(new)))
    return left


def test_documents() -> None:
    texts = ["one", "two", "one", "One", "one ", "two"]
    assert run(open_filter("deduplicate_documents"), texts) == ["one", "two", None, "One", "one ", None]


def test_hashes_are_the_same_in_every_process() -> None:
    assert open_filter("deduplicate_documents").hashes("Käse").tolist() == [10878826140187756650]
    assert open_filter("deduplicate_paragraphs").hashes("Käse\n\n Käse ").tolist() == [10878826140187756650] * 2


@pytest.mark.parametrize(
    ("keys", "left"),
    [
        ({}, ["Menu\n\nFirst text.", "Second text.", None, "Menu!\n\nFourth."]),
        ({"min_characters": 5}, ["Menu\n\nFirst text.", "Menu\n\nSecond text.", "Menu", "Menu!\n\nFourth."]),
        ({"separator": "\n"}, ["Menu\n\nFirst text.", "\nSecond text.", None, "Menu!\n\n\nFourth."]),
    ],
)
def test_paragraphs(keys: dict[str, Any], left: list[str | None]) -> None:
    texts = ["Menu\n\nFirst text.", "Menu\n\nSecond text.", "First text.\n\nMenu", "Menu!\n\nMenu!\n\nFourth."]
    assert run(open_filter("deduplicate_paragraphs", **keys), texts) == left


@given(DOCUMENTS)
def test_the_first_document_stays(texts: list[str]) -> None:
    left = run(open_filter("deduplicate_documents"), texts)
    kept = [text for text in left if text is not None]
    assert kept == list(dict.fromkeys(texts))
    assert run(open_filter("deduplicate_documents"), kept) == kept


@given(DOCUMENTS, st.integers(1, 6))
def test_each_paragraph_stays_once_where_it_came_first(texts: list[str], least: int) -> None:
    step = open_filter("deduplicate_paragraphs", min_characters=least)
    kept = [text for text in run(step, texts) if text is not None]
    assert all(text.strip() for text in kept)

    def long(documents: list[str]) -> list[str]:
        parts = [part.strip() for text in documents for part in text.split("\n\n")]
        return [part for part in parts if len(part) >= least]

    assert long(kept) == list(dict.fromkeys(long(texts)))
    assert run(step, kept) == kept
