"""Drops documents that are not in the language that they should be in."""

import os
from collections.abc import Callable
from functools import cache, lru_cache
from typing import Any

from titanling.config.schema import LanguageFilter
from titanling.data.prepare.filters.extras import import_extra
from titanling.errors import UserError
from titanling.paths import expand

Score = Callable[[str], float]


def language(settings: LanguageFilter, code: str | None) -> Callable[[str], str | None]:
    """Keeps documents that are in the language `code` (as the library names it) with the probability wanted.

    Raises `UserError`: no language, one that the library does not know, no library, no model.
    """
    if code is None:
        raise UserError(
            'data.prepare.filters: kind = "language" does not know which language is wanted; set data.prepare.language'
        )
    score = {"py3langid": _py3langid, "lingua": _lingua, "fasttext": _fasttext}[settings.library](settings, code)

    def apply(text: str) -> str | None:
        return text if score(text[: settings.characters]) >= settings.min_score else None

    return apply


def _py3langid(settings: LanguageFilter, code: str) -> Score:
    import_extra("py3langid", "py3langid", _who(settings))
    identifier = _identifier()
    if code not in identifier.nb_classes:
        raise _unknown(settings, code, "an ISO 639-1 code such as de")

    def score(text: str) -> float:
        found, probability = identifier.classify(text)
        return probability if found == code else dict(identifier.rank(text))[code]

    return score


def _lingua(settings: LanguageFilter, code: str) -> Score:
    module = import_extra("lingua", "lingua", _who(settings))
    wanted = next((each for each in module.Language.all() if each.iso_code_639_1.name.lower() == code.lower()), None)
    if wanted is None:
        raise _unknown(settings, code, "an ISO 639-1 code such as de")
    detector = _detector()
    return lambda text: detector.compute_language_confidence(text, wanted)


def _fasttext(settings: LanguageFilter, code: str) -> Score:
    import_extra("fasttext", "fasttext", _who(settings))
    try:
        path = expand(str(settings.model))
        status = os.stat(path)
        model = _model(path, (status.st_mtime_ns, status.st_size))
    except (ValueError, OSError) as error:
        raise UserError(f"{settings.model}: not a model of fasttext ({error}); correct data.prepare.filters") from None
    # lid.176 says de, GlotLID deu_Latn; a language of several scripts has several labels.
    known, _ = model.predict("", k=-1, threshold=-1.0)  # an empty line has all labels, whatever their probability
    names = [name.removeprefix("__label__") for name in known]
    labels = {f"__label__{name}" for name in names if code in (name, name.partition("_")[0])}
    if not labels:
        raise _unknown(settings, code, f"one of its labels ({', '.join(sorted(names)[:3])} …)")

    def score(text: str) -> float:
        names, probabilities = model.predict(" ".join(text.split()), k=-1)
        # Rounding takes fasttext's probabilities slightly above 1.
        return min(1.0, sum(float(p) for name, p in zip(names, probabilities, strict=True) if name in labels))

    return score


@lru_cache(1)
def _model(path: str, version: tuple[int, int]) -> Any:
    """One for all languages of a process: it may hold gigabytes."""
    import fasttext

    return fasttext.load_model(path)


@cache
def _identifier() -> Any:
    """One for all languages of a process: it takes a second to load."""
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


@cache
def _detector() -> Any:
    """As above; it loads its models, about 1 GB, when it is used."""
    from lingua import LanguageDetectorBuilder

    return LanguageDetectorBuilder.from_all_languages().build()


def _who(settings: LanguageFilter) -> str:
    return f'data.prepare.filters: library = "{settings.library}"'


def _unknown(settings: LanguageFilter, code: str, wanted: str) -> UserError:
    return UserError(f'{_who(settings)} does not know the language "{code}"; name the source by {wanted}')
