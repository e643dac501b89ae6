"""Builds filters from their settings, applies them in order, and checks them before any work."""

import hashlib
from collections.abc import Callable, Collection, Iterator, Sequence

from titanling.config.schema import (
    BadWordsFilter,
    DecontaminateFilter,
    DeduplicateDocumentsFilter,
    DeduplicateParagraphsFilter,
    Filter,
    FixTextFilter,
    GopherQualityFilter,
    GopherRepetitionFilter,
    LanguageFilter,
    LengthFilter,
    SymbolLinesFilter,
    TokenWordRatioFilter,
)
from titanling.data.indexed import file_sha256
from titanling.data.prepare.counts import Counts
from titanling.data.prepare.filters.bad_words import bad_words
from titanling.data.prepare.filters.contamination import decontaminate
from titanling.data.prepare.filters.duplicates import DocumentHashes, HashFilter, ParagraphHashes
from titanling.data.prepare.filters.extras import extra_version
from titanling.data.prepare.filters.language import language as is_language
from titanling.data.prepare.filters.lists import find_test_sets, list_path
from titanling.data.prepare.filters.quality import gopher_quality, length, symbol_lines
from titanling.data.prepare.filters.ratio import token_word_ratio
from titanling.data.prepare.filters.repair import fix_text
from titanling.data.prepare.filters.repetition import gopher_repetition
from titanling.errors import UserError
from titanling.paths import expand

Apply = Callable[[str], str | None]
LANGUAGE_PACKAGES = {
    "py3langid": ("py3langid",),
    "lingua": ("lingua-language-detector",),
    "fasttext": ("fasttext-predict", "fasttext", "fasttext-wheel"),
}


BY_LANGUAGE = (LanguageFilter, BadWordsFilter, GopherQualityFilter)


class Steps:
    """Filters of a document's text, built once each, or once for each language: some load models and test sets."""

    def __init__(self) -> None:
        self._built: dict[tuple[Filter, str | None], Apply] = {}

    def get(self, setting: Filter, language: str | None) -> Apply:
        """What a filter does to a text. Raises `UserError` as the filters do when built."""
        key = setting, language if isinstance(setting, BY_LANGUAGE) else None
        if key not in self._built:
            self._built[key] = _build(setting, language)
        return self._built[key]


class Filters:
    """Consecutive filters of one document's text, in one source language.

    `steps` holds what was built for other parts. Attributes: `report`, what each of `settings` has counted here.
    Raises `UserError` as the filters do when built.
    """

    def __init__(self, settings: Sequence[Filter], language: str | None, steps: Steps | None = None) -> None:
        steps = steps or Steps()
        self._steps = [steps.get(each, language) for each in settings]
        self.report = [Counts() for _ in settings]

    def apply(self, text: str) -> str | None:
        """What the filters make of a text, not empty; None if one drops it."""
        for step, counts in zip(self._steps, self.report, strict=True):
            result = step(text) or None
            counts.take(text, result)
            if result is None:
                return None
            text = result
        return text


class TokenFilters:
    """The filters that know a document's number of tokens. Attributes as of `Filters`."""

    def __init__(self, settings: Sequence[Filter], language: str | None) -> None:
        self._steps = [token_word_ratio(each, language) for each in settings if isinstance(each, TokenWordRatioFilter)]
        self.report = [Counts() for _ in settings]

    def keep(self, text: str, tokens: int) -> bool:
        """Whether a text of so many tokens (without the end-of-document token) passes all."""
        for step, counts in zip(self._steps, self.report, strict=True):
            passes = step(text, tokens)
            counts.take(text, text if passes else None)
            if not passes:
                return False
        return True


def open_hashes(setting: Filter, language: str | None) -> HashFilter:
    """A filter that needs what came before. Exact copies are the same in every language."""
    if isinstance(setting, DeduplicateDocumentsFilter):
        return DocumentHashes()
    assert isinstance(setting, DeduplicateParagraphsFilter), setting
    return ParagraphHashes(setting)


def check_filters(settings: Sequence[Filter], languages: Collection[str | None]) -> str:
    """Build every filter for every language, so that what is missing or wrong is found before any work.

    Returns a fingerprint (hexadecimal) of what changes results beside the settings: lists, models, test files, and the
    versions of libraries that decide. Raises `UserError`, also if a filter that needs tokens does not stand last.
    """
    for before, after in zip(settings, settings[1:], strict=False):
        if before.needs == "tokens" and after.needs != "tokens":
            raise UserError(
                f'data.prepare.filters: "{after.kind}" stands behind "{before.kind}", which needs the number of tokens'
                " and so comes last; put it in front"
            )
    ordered = sorted(languages, key=lambda language: language or "")
    steps = Steps()
    for language in ordered:
        for each in settings:
            {"text": steps.get, "hashes": open_hashes, "tokens": _build_tokens}[each.needs](each, language)
    digest = hashlib.sha256()
    for fact in (fact for each in settings for fact in _facts(each, ordered)):
        digest.update(f"{fact}\n".encode())
    return digest.hexdigest()


def _build_tokens(setting: Filter, language: str | None) -> TokenFilters:
    return TokenFilters([setting], language)


def _build(setting: Filter, language: str | None) -> Apply:
    match setting:
        case LengthFilter():
            return length(setting)
        case LanguageFilter():
            return is_language(setting, language)
        case BadWordsFilter():
            return bad_words(setting, language)
        case SymbolLinesFilter():
            return symbol_lines(setting)
        case GopherQualityFilter():
            return gopher_quality(setting, language)
        case GopherRepetitionFilter():
            return gopher_repetition(setting)
        case FixTextFilter():
            return fix_text(setting)
        case DecontaminateFilter():
            return decontaminate(setting)
    raise TypeError(f"{setting.kind} does not work on a text alone")


def _facts(setting: Filter, languages: Sequence[str | None]) -> Iterator[str]:
    """What beside its settings changes what a filter does."""
    match setting:
        case BadWordsFilter():
            yield from (file_sha256(list_path(setting.path, language)) for language in languages)
        case GopherQualityFilter(stop_words=str()) if setting.min_stop_words:
            yield from (file_sha256(list_path(str(setting.stop_words), language)) for language in languages)
        case FixTextFilter():
            yield extra_version("ftfy")
        case DecontaminateFilter():
            yield from map(file_sha256, find_test_sets(setting.test_sets))
        case LanguageFilter():
            yield extra_version(*LANGUAGE_PACKAGES[setting.library])
            if setting.model is not None:
                yield file_sha256(expand(setting.model))
