"""How many tokens a tokenizer spends on a text, beside others: fertility per word and byte, normalised length."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from tokenizers import Tokenizer

from titanling.data.prepare.sample import Sample
from titanling.data.prepare.tokenizer import encode_plainly, plain_ids


@dataclass(frozen=True)
class Fertility:
    """One tokenizer on one source."""

    tokens: int
    tokens_per_word: float
    """Words are what white space separates: of no meaning in Chinese, Japanese or Thai."""
    tokens_per_byte: float
    normalised_length: float
    """Tokens over those of the reference tokenizer, NSL in Dagan et al. (2024), "Getting the most out of your
    tokenizer for pre-training and domain adaptation"; below 1: shorter than the reference."""


@dataclass(frozen=True)
class SourceReport:
    """All tokenizers on one source."""

    name: str
    words: int
    bytes: int
    """Length of the text in UTF-8."""
    tokenizers: dict[str, Fertility]


def compare(tokenizers: Mapping[str, Tokenizer], sample: Sample, reference: str) -> list[SourceReport]:
    """Encode the sample with each tokenizer, as data is prepared; a report for each source."""
    for tokenizer in tokenizers.values():
        encode_plainly(tokenizer)
    reports = []
    for index, source in enumerate(sample.sources):
        words = size = 0
        tokens = dict.fromkeys(tokenizers, 0)
        for text in sample.of(index):
            words += len(text.split())
            size += len(text.encode())
            for name, tokenizer in tokenizers.items():
                tokens[name] += len(plain_ids(tokenizer, text))
        rows = {
            name: Fertility(count, count / max(1, words), count / max(1, size), count / max(1, tokens[reference]))
            for name, count in tokens.items()
        }
        reports.append(SourceReport(source.name, words, size, rows))
    return reports


def means(reports: Sequence[SourceReport], shares: Sequence[float]) -> dict[str, dict[str, float]]:
    """Each figure of each tokenizer, averaged over the sources by their `shares`."""
    return {
        name: {
            figure: sum(share * getattr(r.tokenizers[name], figure) for r, share in zip(reports, shares, strict=True))
            for figure in ("tokens_per_word", "tokens_per_byte", "normalised_length")
        }
        for name in reports[0].tokenizers
    }


def as_json(reports: Sequence[SourceReport], shares: Sequence[float], reference: str) -> dict[str, Any]:
    """The reports and their means, for a file."""
    sources = [asdict(report) | {"share": share} for report, share in zip(reports, shares, strict=True)]
    return {"reference": reference, "sources": sources, "mean": means(reports, shares)}
